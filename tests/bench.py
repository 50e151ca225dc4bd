"""How fast it is, in a table and in bench.json: `python tests/bench.py [--quick] [NAME ...]`.

Each measure runs the commands that a user runs. Ratios are against what could at best be had, or
against what a user would otherwise run. Run it with nothing else running.
"""

import argparse
import hashlib
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent


def teacher_command(url: str, *words: object) -> list[str]:
    """teacher.py as a user starts it."""
    python = [sys.executable, str(ROOT / "teacher.py"), "--model", "m", "--base-url", url]
    return [*python, *map(str, words)]


def watch(command: list[str], until=lambda: False) -> tuple[float, float | None, list[float]]:
    """(seconds to the end, seconds until `until()`, resident GiB every 0.1 s) of a command."""
    start, reached, resident = time.perf_counter(), None, []
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as p:
        while p.poll() is None:
            lines = Path(f"/proc/{p.pid}/status").read_text().splitlines()
            sizes = [int(line.split()[1]) for line in lines if line.startswith("VmRSS")]
            resident += [size / (1 << 20) for size in sizes]
            if reached is None and until():
                reached = time.perf_counter() - start
            time.sleep(0.1)
        assert p.returncode == 0, p.stdout.read().decode()
    return time.perf_counter() - start, reached, resident


class Server:
    """tests/server.py as a process of its own."""

    def __init__(self, latency: float):
        command = [sys.executable, HERE / "server.py", "--port", "0", "--latency", str(latency)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.url = self.process.stdout.readline().split()[-1]

    def __enter__(self) -> str:
        return self.url

    def __exit__(self, *_) -> None:
        self.process.terminate()
        self.process.wait()


def teacher_speed(quick: bool, folder: Path) -> dict:
    """1,000 requests of 100 ms, 32 at a time: time over requests x latency / concurrency, from
    the first request on; the resident size in the last half over that in the first."""
    n, latency, concurrency = (320 if quick else 1000), 0.1, 32
    rows = ({"id": f"q{i}", "input": f"What is number {i}?"} for i in range(n * 10 // 9 + 1))
    write(folder / "train.jsonl", rows)
    (folder / "prompt.txt").write_text("Q: What?\nA: Because it is. So the answer is yes.\n")
    ratios, whole, growth = [], [], []
    with Server(latency) as url:
        for repeat in range(1 if quick else 3):
            out, log = folder / f"out{repeat}", folder / f"out{repeat}.raw.jsonl"
            command = teacher_command(url, "--dataset", folder, "--limit", n, "--concurrency",
                                      concurrency, "--out", out)  # fmt: skip
            seconds, started, resident = watch(command, lambda log=log: log.exists())
            assert sum(1 for _ in log.open()) == n
            ideal = n * latency / concurrency
            whole.append(seconds / ideal)
            ratios.append((seconds - started) / ideal)
            growth.append(max(resident[len(resident) // 2 :]) / max(resident[: len(resident) // 2]))
    return {"requests": n, "time over ideal": median(ratios), "with start and end": median(whole),
            "memory growth": median(growth)}  # fmt: skip


def teacher_resume(quick: bool, folder: Path) -> dict:
    """A log of e-SNLI's size (made up in its format) with all but the last answer: seconds to the
    first request, peak resident GiB, seconds to the end."""
    n, pick = (20_000 if quick else 549_367), random.Random(0)
    words = [f"word{i}" for i in range(3000)]
    sentence = lambda least: " ".join(pick.choices(words, k=least + pick.randrange(8)))  # noqa: E731
    (folder / "esnli").mkdir()
    pairs = [(sentence(8), sentence(5)) for _ in range(n)]
    rows = ({"premise": a, "hypothesis": b, "label": i % 3} for i, (a, b) in enumerate(pairs))
    write(folder / "esnli" / "esnli_train.json", rows)
    sys.path.insert(0, str(ROOT))
    import teacher

    prompt = teacher.read_prompt("esnli").sha256
    settings = {"api": "chat", "temperature": 0.0, "seed": None, "max_tokens": 512}
    records = (
        {"id": f"esnli-train-{i}", "sample": 0, "prompt_sha256": prompt,
         "input_sha256": hashlib.sha256("\n".join(pair).encode()).hexdigest(), "model": "m",
         "settings": settings, "completion": f"Because {sentence(20)}.\nAnswer: neutral",
         "finish_reason": "stop", "usage": {"total_tokens": 900}, "attempts": 1, "seconds": 0.5,
         "time": "2026-01-01T00:00:00+00:00"} for i, pair in enumerate(pairs[:-1])
    )  # fmt: skip
    write(folder / "out.raw.jsonl", records)
    size = (folder / "out.raw.jsonl").stat().st_size
    with Server(0.0) as url:
        command = teacher_command(url, "--dataset", "esnli", "--data-root", folder, "--out",
                                  folder / "out", "--api", "chat")  # fmt: skip
        done = lambda: (folder / "out.raw.jsonl").stat().st_size > size  # noqa: E731
        seconds, asked, resident = watch(command, done)
    return {"examples": n, "seconds to the first answer": asked, "peak GiB": max(resident),
            "seconds to the end": seconds}  # fmt: skip


SHARDED = """
import sys, threading, time
from pathlib import Path
sys.path.insert(0, {root!r})
import torch, torch.distributed as dist
import torch.distributed.fsdp, train, eval as evaluation
def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) for x in lines if x.startswith("RssAnon")) / (1 << 20)
peak, measuring = 0.0, True
def watch():
    global peak
    while measuring:
        peak = max(peak, anonymous())
        time.sleep(0.005)
with evaluation.processes(torch.device("cpu")):
    rank, world = evaluation.rank_and_world()
    c = train.Config(weights={folder!r}, dataset="demo", device="cpu", precision="fp32",
                     parallel="fsdp" if world > 1 else "none")
    tokenizer = type("Tokenizer", (), {{"vocab_size": 1}})
    if world > 1:
        dist.init_device_mesh("cpu", (world,))
        dist.barrier()
    base = anonymous()
    threading.Thread(target=watch, daemon=True).start()
    start = time.perf_counter()
    model = train.build_model(c, tokenizer)
    loaded, seconds, peak = peak - base, time.perf_counter() - start, 0.0
    out = Path({folder!r} + "-out")
    train.save_student(c, model, out, Path({folder!r}) / "config.json", 1, 0.5)
    exported, measuring = peak - base, False
    found = [None] * world
    if world > 1:
        dist.all_gather_object(found, (loaded, exported, seconds))
    else:
        found = [(loaded, exported, seconds)]
    if rank == 0:
        print("FOUND", *[max(x) for x in zip(*found)])
"""


def sharded_memory(quick: bool, folder: Path) -> dict:
    """Peak anonymous GiB of any rank, beyond the interpreter and its libraries, while pretrained
    weights are read and while a student is written: 1, 2 and 4 ranks, FSDP where several."""
    sys.path.insert(0, str(ROOT))
    import torch

    from t5 import T5, T5Config

    depth = 2 if quick else 12
    config = T5Config.preset("large", num_layers=depth, num_decoder_layers=depth)
    with torch.device("meta"):
        model = T5(config)
    model.to_empty(device="cpu").save_pretrained(folder / "weights")
    size = 4 * sum(p.numel() for p in model.parameters()) / (1 << 30)
    del model
    script = folder / "sharded.py"
    script.write_text(SHARDED.format(root=str(ROOT), folder=str(folder / "weights")))
    figures = {"weights, GiB": size}
    for ranks in (1, 2, 4):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                   f"--nproc_per_node={ranks}", script]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        found = [line for line in done.stdout.splitlines() if line.startswith("FOUND")]
        assert found, done.stdout + done.stderr
        loaded, exported, seconds = map(float, found[0].split()[1:])
        figures |= {f"{ranks} ranks: loading, GiB": loaded, f"{ranks} ranks: exporting": exported,
                    f"{ranks} ranks: seconds to load": seconds}  # fmt: skip
    return figures


def write(path: Path, rows) -> None:
    """A JSON object a line."""
    with path.open("w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


MEASURES = {"teacher-speed": teacher_speed, "teacher-resume": teacher_resume,
            "sharded-memory": sharded_memory}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(MEASURES)}")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    results = {"machine": f"{os.cpu_count()} x {platform.machine()}", "date": str(date.today()),
               "python": platform.python_version(), "quick": args.quick}  # fmt: skip
    for name in args.names or MEASURES:
        with tempfile.TemporaryDirectory() as folder:
            results[name] = MEASURES[name](args.quick, Path(folder))
        for what, value in results[name].items():
            print(f"{name:<16}{what:<28}{value:>12,.4g}", flush=True)
    (ROOT / "bench.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
