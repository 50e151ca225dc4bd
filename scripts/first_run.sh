#!/bin/sh
# For the first user with GPUs: checks of what could not be run where this code was written.
#
#     sh scripts/first_run.sh [GPUS]     # OUT=folder; without a GPU: two processes, small models
# Prints pass or FAIL with the figure and the expected range. Logs, *.json, *.jsonl and report.txt
# of runs/first_run belong to a bug report; XXL leaves 270 GB there, and needs as much host memory.
set -u
cd "$(dirname "$0")/.." || exit 2
cuda=$(python -c 'import torch; print(torch.cuda.device_count())') || exit 2
n=${1:-$([ "$cuda" -gt 0 ] && echo "$cuda" || echo 2)} out=${OUT:-runs/first_run}
[ -e "$out" ] && echo "error: $out is there already; give another folder as OUT" >&2 && exit 2
mkdir -p "$out/data"
for split in train valid test; do head -n 32 "demo/$split.jsonl" > "$out/data/$split.jsonl"; done
cp demo/task.json "$out/data"
{ git rev-parse HEAD; nvidia-smi -L; pip list; } > "$out/report.txt" 2>&1
[ "$cuda" -gt 0 ] && set -- small xxl bf16 32 || set -- tiny tiny fp32 8
first=$1 large=$2 precision=$3 batch=$4

train() { # NAME FLAGS...: a run in $out/NAME, what it prints in $out/NAME.log
    name=$1 && shift
    torchrun --standalone --nproc_per_node="$n" train.py --weights random --dataset "$out/data" \
        --precision $precision --dropout 0 --out "$out/$name" "$@" >> "$out/$name.log" 2>&1
}
steps="--size $first --batch-size 8 --steps 20 --save-every 5"
for mode in ddp fsdp; do train $mode $steps --parallel $mode; done
train killed $steps --parallel ddp &
until grep -qs '"step": 8' "$out/killed/metrics.jsonl" || ! kill -0 $!; do sleep 0.1; done
pkill -9 -f -- "--out $out/killed"; wait
train killed $steps --parallel ddp --resume
python train.py --plan --json --size $large --weights random --gpus "$n" --precision $precision \
    --batch-size $batch --parallel fsdp > "$out/plan.json" 2> "$out/plan.log"
train large --size $large --parallel fsdp --batch-size $batch --steps 3

python - "$out" $precision $batch <<'PYTHON' | tee -a "$out/report.txt"
import json, statistics, sys
out, gpu, batch = sys.argv[1], sys.argv[2] == "bf16", int(sys.argv[3])
def read(name, key):
    rows = map(json.loads, open(f"{out}/{name}/metrics.jsonl"))
    return [row[key] for row in rows if key in row]
def within(value, limit): return value <= limit, f"{value:.3g}, expected at most {limit:.3g}"
def apart(a, b, n):
    pairs = zip(read(a, "loss")[:n], read(b, "loss")[:n], strict=True)
    return within(max(abs(x - y) for x, y in pairs), 1e-2 if gpu else 1e-4)
def memory():  # on a CPU the whole process's, so with the interpreter and its libraries
    plan = json.load(open(f"{out}/plan.json"))["peak_gib"] + (0 if gpu else 2)
    return within(max(read("large", "peak_memory_bytes")) / 2**30, plan)
def seconds():
    saves = [line.split()[-2] for line in open(f"{out}/large.log") if " saved in " in line]
    step = batch / statistics.median(read("large", "examples_per_second")[1:])
    return True, f"{step:.2f} a step of {batch} examples, {', '.join(saves)} a save"
checks = {"losses fall": lambda: within(read("ddp", "loss")[-1], 0.9 * read("ddp", "loss")[0]),
          "FSDP's first losses against DDP's": lambda: apart("ddp", "fsdp", 5),
          "killed and resumed, all losses": lambda: apart("ddp", "killed", 20),
          "the large model's memory, GiB": memory, "its seconds": seconds}
for what, check in checks.items():
    try: passed, figure = check()
    except Exception as error: passed, figure = False, f"{error!r}; see {out}/*.log"
    print("pass" if passed else "FAIL", f" {what}: {figure}")
PYTHON
! grep -q ^FAIL "$out/report.txt"
