"""Train a student: `python train.py`, or `torchrun --nproc_per_node=16 train.py --size xxl`.

This file owns the run's configuration, process groups, the optimizer and its schedule, the loop,
checkpoints and exact resume. It knows nothing of prompts or scoring rules.

Equations, figures and Appendix A.1 are those of Hsieh et al., 2023
(https://arxiv.org/abs/2305.02301). A row is a source text and a target text; an example gives one
row for each task. A step takes `batch_size` examples, divides their rows into micro-batches of
similar length, and shares these among the ranks. Each loss is divided by the target tokens of the
whole step, so that the gradients add up to those of Eq. 3. One clipped AdamW step follows.

A resumed run computes the same bits as an uninterrupted one on the same hardware, software and
number of processes: the data order depends on (seed, step) alone, dropout on (seed, step, rank). A
state holds the weights, AdamW's moments, the step, the numbers of threads and processes, and the
size of `metrics.jsonl`. It is written to a temporary folder, which is then renamed. The best
accuracy so far is stored in `best/` alone.
"""

import sys

if sys.platform == "win32" or sys.version_info < (3, 10):
    sys.exit("error: this program needs Linux or macOS and Python 3.10 or newer")

import argparse
import contextlib
import json
import math
import os
import platform
import resource
import shlex
import shutil
import signal
import subprocess
import time
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import Field, asdict, dataclass, field, fields, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import eval as evaluation
from data import (
    TASKS,
    Example,
    Tokenizer,
    TokenRows,
    UserError,
    check_labels,
    collate,
    data_files,
    get_task,
    has_split,
    load_dataset,
    lock,
    micro_batches,
    round_up,
    sha256,
    step_examples,
    tokenize_rows,
    unknown_characters,
    write_json,
    write_jsonl,
)
from dsbs import METHODS, PREFIXES, TARGETS, Row, make_rows, multitask_loss, wanted_label
from eval import Interrupted, RunError, Student, print0, rank_and_world
from t5 import shift_right

HERE = Path(__file__).parent
DEMO_VOCABULARY = HERE / "demo" / "spiece.model"

# Appendix A.1; small and xl are not in the paper and take their neighbours' recipe. micro_tokens
# and recompute do not change the result. micro_tokens lets rows of 1,024 + 256 tokens fill a 40 GB
# card (`--plan` says how full it is); for xxl it is one micro-batch a step on 16 cards, since FSDP
# gathers the whole model for each.
PAPER = dict(lr=5e-5, batch_size=64, steps=10_000, eval_every=250, recompute=False)
PAPER_XXL = dict(lr=5e-5, batch_size=32, steps=4_000, eval_every=250, recompute=True)
RECIPES = {
    "tiny": dict(PAPER, lr=1e-3, batch_size=32, steps=700, eval_every=50, micro_tokens=65_536),
    "small": dict(PAPER, micro_tokens=40_960),
    "base": dict(PAPER, micro_tokens=32_768),
    "large": dict(PAPER, micro_tokens=12_288),
    "xl": dict(PAPER_XXL, micro_tokens=10_240),
    "xxl": dict(PAPER_XXL, micro_tokens=5_120),
}
# The bundled task's recipe was chosen by accuracy on valid (demo/README.md). Labels alone have one
# row an example, step-by-step two: more steps of labels alone still end within three minutes.
STEPS_FOR_LABELS_ALONE = {"tiny": 1000}
# The fixed cost of a micro-batch, as a number of padded tokens that take the same time. On a GPU:
# kernel launches, casts of weights, sums of gradients (estimated; about the same for all sizes); on
# a CPU: sums of gradients.
OVERHEAD = {"cuda": 1024, "cpu": 128}


# ------------------------------------------------------------------------------- configuration


BOUNDS = {  # conditions on a number, in words and as a test, which NaN fails
    "at least 1": lambda x: x >= 1,
    "at least 0": lambda x: x >= 0,
    "above 0 and at most 1": lambda x: 0 < x <= 1,
    "at least 0 and below 1": lambda x: 0 <= x < 1,
    "a positive number": lambda x: 0 < x < math.inf,
    "0 or a positive number": lambda x: 0 <= x < math.inf,
}


def flag(default: Any, help: str, allowed: Collection[str] = ()) -> Any:
    """A field of Config that is a flag of train.py. `allowed` is a key of BOUNDS or a collection of
    values; empty allows all. --help shows the allowed values and the default with the text."""
    return field(default=default, metadata={"help": help, "allowed": allowed})


@dataclass
class Config:
    """The settings of a run; each field is a flag. None means "not given", see `resolve`."""

    # The student and its data.
    size: str = flag("tiny", "size of the student", RECIPES)
    weights: str | None = flag(
        None, "T5 folder or random; default weights/t5-v1_1-SIZE, for tiny random"
    )
    dataset: str | None = flag(
        None, "svamp, cqa, esnli, anli1, demo or a folder of *.jsonl; default esnli, for tiny demo"
    )
    data_root: str = flag("datasets", "folder of the benchmarks")
    # What the student learns, and from how many examples.
    method: str = flag("step-by-step", "what it learns", METHODS)
    labels: str = flag("human", "whose labels it learns", ("human", "teacher"))
    rationales: list[str] | None = flag(None, "palm (benchmarks' default), neox, human or files")
    prefixes: str = flag("paper", "whose task prefixes", PREFIXES)
    fraction: float = flag(1.0, "share of the training examples", "above 0 and at most 1")
    augment: str | None = flag(None, "also train on it, with a teacher's labels", ("asdiv",))
    augment_fraction: float = flag(1.0, "share of the augmenting examples", "above 0 and at most 1")
    # The optimizer.
    steps: int | None = flag(None, "optimizer steps; tiny with standard: 1000", "at least 1")
    batch_size: int | None = flag(None, "examples in a step, over all processes", "at least 1")
    lr: float | None = flag(None, "first learning rate; falls linearly to 0", "a positive number")
    lam: float = flag(1.0, "lambda of Eq. 3, the rationales' weight", "0 or a positive number")
    dropout: float = flag(0.1, "probability of dropout", "at least 0 and below 1")
    seed: int = flag(0, "of the order of examples, dropout and random weights", "at least 0")
    # How the run is carried out.
    eval_every: int | None = flag(None, "steps between evaluations", "at least 1")
    device: str | None = flag(None, "cpu, cuda or cuda:N; default a GPU where there is one")
    precision: str | None = flag(None, "default bf16 on CUDA, fp32 on CPU", ("fp32", "bf16"))
    # MAY_CHANGE: a resumed run may change these. They change neither the method nor the order of
    # the data, but may change rounding; other micro-batches draw other dropout masks.
    save_every: int | None = flag(None, "steps between states; default --eval-every", "at least 1")
    micro_tokens: int | None = flag(None, "most padded tokens in a forward pass", "at least 1")
    parallel: str | None = flag(None, "default fsdp for xl, xxl; else ddp", ("none", "ddp", "fsdp"))
    recompute: bool | None = flag(None, "recompute activations in the backward pass")
    compile: bool = flag(False, "compile the model's blocks, for GPUs")


MAY_CHANGE = {"save_every", "micro_tokens", "parallel", "recompute", "compile"}


def check_values(c: Config) -> None:
    """UserError for the first setting whose value is not allowed."""
    for setting in fields(c):
        value, allowed = getattr(c, setting.name), setting.metadata["allowed"]
        if value is None or not allowed:
            continue
        if not (BOUNDS[allowed](value) if isinstance(allowed, str) else value in allowed):
            words = allowed if isinstance(allowed, str) else ", ".join(allowed)
            name = setting.name.replace("_", "-")
            raise UserError(f"--{name} {value!r}; allowed: {words}")


def resolve(config: Config, world: int | None = None) -> Config:
    """Returns a copy with all defaults filled in; `augment` and `rationales` may stay None.

    Defaults depend on the size, the data set, the device and `world`, the number of processes, by
    default torchrun's. `device` becomes "cpu" or "cuda", without the GPU's number; `parallel`
    becomes "none" for one process. Resolving a second time changes nothing, so that a resumed run
    can start from `run.json`.
    UserError for a value or a combination that is not allowed.
    """
    c = replace(config)
    check_values(c)
    recipe = RECIPES[c.size]
    if c.method == "standard":
        recipe = {**recipe, "steps": STEPS_FOR_LABELS_ALONE.get(c.size, recipe["steps"])}
    for name, value in recipe.items():
        if getattr(c, name) is None:
            setattr(c, name, value)
    c.weights = c.weights or ("random" if c.size == "tiny" else f"weights/t5-v1_1-{c.size}")
    c.dataset = c.dataset or ("demo" if c.size == "tiny" else "esnli")
    c.save_every = c.save_every or c.eval_every
    c.device = evaluation.choose_device(c.device).type
    c.precision = c.precision or ("bf16" if c.device == "cuda" else "fp32")
    resolve_rationales(c)
    world = world or int(os.environ.get("WORLD_SIZE", 1))
    if world == 1:
        c.parallel = "none"
    elif c.parallel == "none":
        raise UserError(f"--parallel none would train {world} models; allowed: ddp, fsdp")
    c.parallel = c.parallel or default_parallel(c.size)
    return c


def resolve_rationales(c: Config) -> None:
    """Fills in --rationales; UserError where it, --dataset and --augment do not fit together."""
    if c.dataset == "asdiv":
        raise UserError("--dataset asdiv has no labels; use --augment asdiv with --dataset svamp")
    if isinstance(c.rationales, str):  # run.json stores a name without a list
        c.rationales = [c.rationales]
    uses = c.method != "standard" or c.labels == "teacher"
    c.rationales = evaluation.rationale_source(c.rationales, c.dataset, uses)
    if c.augment and get_task(c.dataset).scorer != "arithmetic":
        raise UserError(f"--augment {c.augment} is not for {c.dataset}; allowed: svamp")
    if c.augment and not split_rationales(c, "augment"):
        raise UserError(f"--augment needs --rationales of `teacher.py --dataset {c.augment}`")
    files = [] if c.augment or isinstance(c.rationales, str) else c.rationales or []
    if {*files} & {*evaluation.NAMED}:
        raise UserError(f"--rationales {' '.join(c.rationales)}: both together need --augment")


def default_parallel(size: str) -> str:
    """For several processes: weights, gradients and AdamW's moments, 16 bytes a parameter, of xl
    (46 GB) and xxl (178 GB) are sharded; smaller models have a copy on each GPU."""
    return "fsdp" if size in ("xl", "xxl") else "ddp"


def run_name(c: Config) -> str:
    """Returns the default run folder, `runs/` and a name: data set, size, method, labels, then
    each other setting that is not at its default, then the seed."""
    default = resolve(Config(size=c.size, dataset=c.dataset, method=c.method, labels=c.labels))
    parts = [Path(c.dataset).name, c.size, c.method, c.labels]
    skip = MAY_CHANGE | {"size", "dataset", "method", "labels", "seed", "data_root", "device"}
    for setting in fields(c):
        name, value = setting.name, getattr(c, setting.name)
        if name not in skip and value != getattr(default, name):
            values = value if isinstance(value, list) else [str(value)]
            parts.append(name.replace("_", "-") + "-" + "+".join(Path(v).name for v in values))
    return "runs/" + "_".join([*parts, f"seed-{c.seed}"])


def command(*words: str) -> str:
    """Returns a command line of train.py with these words, for as many processes as this machine
    runs now."""
    local = os.environ.get("LOCAL_WORLD_SIZE", "1")
    python = ["python"] if local == "1" else ["torchrun", f"--nproc_per_node={local}"]
    return shlex.join([*python, "train.py", *words])


# --------------------------------------------------------------------------------- run folder


def from_rank_0(work: Callable[[], Any]) -> Any:
    """Calls `work` on rank 0 alone; returns its result, or raises its UserError, on every rank.

    So one process reads and changes the run folder, and all ranks act on the same answer. The
    result is pickled and broadcast: it must be small.
    """
    rank, world = rank_and_world()
    box = [None, None]
    if rank == 0:
        try:
            box[0] = work()
        except UserError as error:
            box[1] = str(error)
    if world > 1:
        dist.broadcast_object_list(box, src=0)
    if box[1]:
        raise UserError(box[1])
    return box[0]


def weights_hashes(folder: Path) -> dict[str, str]:
    """Returns {file name: sha256} of config, vocabulary, index and safetensors headers (names,
    shapes, offsets). An 11B model would take minutes to read as a whole; of a .bin file only the
    size is taken. The limit of 128 MB is for a damaged header's length."""
    hashes = {}
    for pattern in ("config.json", "spiece.model", "*.index.json"):
        hashes |= {path.name: sha256(path) for path in folder.glob(pattern)}
    for path in folder.glob("*.safetensors"):
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            hashes[path.name] = sha256(file.read(min(size, 1 << 27)))
    return hashes | {path.name: f"{path.stat().st_size} bytes" for path in folder.glob("*.bin")}


def provenance(c: Config) -> dict:
    """Returns what `run.json` records besides the settings.

    data_sha256: {path: sha256}; weights_sha256: see `weights_hashes`; git_sha: the commit, or None;
    versions: {name: version}. `open_run` compares the two hashes; the rest is for people.
    """
    paths = {path for paths in input_files(c).values() for path in paths}
    described = {path.with_name("task.json") for path in paths if path.name == "train.jsonl"}
    paths |= set(filter(Path.is_file, described))
    # Through a shell, which only warns where git is not installed.
    git = subprocess.run("git rev-parse HEAD", shell=True, cwd=HERE, capture_output=True)
    versions = {"python": platform.python_version(), "numpy": np.__version__}
    return {
        "data_sha256": {str(path): sha256(path) for path in sorted(paths)},
        "weights_sha256": weights_hashes(weights_folder(c)),
        "git_sha": git.stdout.decode().strip() or None,
        "versions": {**versions, "torch": torch.__version__},
    }


def read_run(out: Path) -> dict:
    """Returns the folder's `run.json`; UserError where it is damaged."""
    path = out / "run.json"
    try:
        run = json.loads(path.read_text())
        Config(**run["config"])
        return {key: run[key] for key in ("config", "argv", "data_sha256", "weights_sha256")}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged, or another version's: {error!r}") from None


def open_run(c: Config, out: Path, about: dict, argv: list[str], resume: bool) -> dict | None:
    """Claims the run folder: writes `run.json`, or checks that the one there is of this run.

    Returns `result.json` of a finished run, and None for a new or unfinished one. `about` is
    `provenance(c)`, `argv` the command line without the program. UserError if the folder holds
    another run, or an unfinished one without --resume.
    """
    if not (out / "run.json").exists():
        # A start that was killed may have left a temporary file.
        others = [p.name for p in out.iterdir() if p.name != ".lock" and p.suffix != ".tmp"]
        if others:
            raise UserError(f"{out} is not a run but holds {others[0]!r}; give another --out")
        write_json(out / "run.json", {"config": asdict(c), "argv": argv, **about})
        return None
    run = read_run(out)
    before = run["config"]
    differ = [
        f"{name} {before.get(name)!r} there, {value!r} here"
        for name, value in asdict(c).items()
        if name not in MAY_CHANGE and value != before.get(name)
    ]
    if run["data_sha256"] != about["data_sha256"]:
        differ.append("the data files or their contents")
    if run["weights_sha256"] != about["weights_sha256"]:
        differ.append("the contents of the weights or of the vocabulary")
    if differ:
        words = "; ".join(differ)
        raise UserError(f"{out} is a run with other settings: {words}; give another --out")
    if (out / "result.json").exists():
        return json.loads((out / "result.json").read_text())
    if not resume:
        raise UserError(f"{out} holds an unfinished run; add --resume, or give another --out")
    return None


def publish(temporary: Path, folder: Path) -> None:
    """Renames a folder once all that is in it is on the disk, and replaces `folder`. A crash
    between the two renames leaves FOLDER.old."""
    for path in [*temporary.iterdir(), temporary]:
        fsync(path)
    old = folder.with_name(f"{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(temporary, folder)
    fsync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def fsync(path: Path) -> None:
    """Waits until a file, or a folder's list of files, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def save_student(
    c: Config, model: nn.Module, tokenizer: Tokenizer, folder: Path, step: int, accuracy: float
) -> None:
    """Replaces `folder` by a student that `eval.py` and `transformers` load.

    accuracy: on valid, 0 to 1. Rank 0 first. All ranks of a sharded model must call this, since
    its weights are gathered from all. `best_so_far` repairs a crash. OSError where the disk is
    full.
    """
    temporary, first = folder.with_name(f"{folder.name}.tmp"), rank_and_world()[0] == 0
    if first:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    if fills_shards(type(model)):
        model.save_pretrained(temporary, first)
    else:  # a fork's class writes whole parameters
        sharded = c.parallel == "fsdp"
        with evaluation.replaced(model, lambda p: p.full_tensor() if sharded else p):
            if first:
                model.save_pretrained(temporary)
    if first:
        tokenizer.save(temporary)
        about = {"method": c.method, "prefixes": c.prefixes, "dataset": c.dataset, "step": step}
        write_json(temporary / "dsbs.json", {**about, "valid_accuracy": accuracy})
        (temporary / "README.md").write_text(model_card(c, step, accuracy))
        publish(temporary, folder)


def best_so_far(out: Path, state: dict) -> float:
    """Returns the validation accuracy (0 to 1) of `best/`, or -1 where none counts.

    A student of a later step than `state` does not count: the run was killed between that
    evaluation and the next state, or an older state was put back; it evaluates that step again.
    Repairs a crash in `publish`. UserError where metrics.jsonl has an evaluation and `best/` is
    gone.
    """
    best, old = out / "best", out / "best.old"
    if old.exists() and not best.exists():
        os.replace(old, best)
    if best.exists():
        about = json.loads((best / "dsbs.json").read_text())
        return about["valid_accuracy"] if about["step"] <= state["step"] else -1.0
    if state["step"]:
        logged = (out / "metrics.jsonl").read_bytes()[: state["metrics_bytes"]]
        if b'"valid_accuracy"' in logged:
            raise UserError(f"{best} is gone; bring it back, or start again with another --out")
    return -1.0


def model_card(c: Config, step: int, accuracy: float) -> str:
    """The `README.md` of a student folder."""
    prefix = PREFIXES[c.prefixes]["label"] if METHODS[c.method].prefixed else ""
    others = getattr(evaluation.STUDENT, "usage", "")
    others = f", or {others} with the prefix {prefix!r} before the input" if others else ""
    return f"""# {evaluation.STUDENT.__name__} student, {Path(c.dataset).name}, {c.method}

Trained with Distilling Step-by-Step (Hsieh et al., 2023, https://arxiv.org/abs/2305.02301).

- start: {c.weights} ({c.size}); method {c.method}, {c.labels} labels, seed {c.seed}
- step {step} of {c.steps}, validation accuracy {accuracy:.4f}
- use: `python eval.py THIS_FOLDER --predict inputs.txt`{others}
- It inherits its teacher's errors and biases (the paper's ethics statement): check before use.
"""


# -------------------------------------------------------------------------------------- state


def named_tensors(model: nn.Module, optimizer) -> dict[str, Tensor]:
    """Weights and AdamW's moments by name, all float32; of a sharded model DTensors, which know
    this rank's shard and its place in the whole. These tensors are the model's own: filling them
    fills the model. Nothing else goes to the checkpoint writer: with other objects, torch 2.13
    reports success and writes a file that cannot be read."""
    tensors = {}
    for name, p in model.named_parameters():
        tensors[f"model.{name}"] = p.detach()
        for moment in ("exp_avg", "exp_avg_sq"):
            tensors[f"optimizer.{name}.{moment}"] = optimizer.state[p][moment]
    return tensors


@contextlib.contextmanager
def checkpoint_errors() -> Iterator[None]:
    """Turns torch's CheckpointException into an OSError, and hides its warning about saving without
    a process group, which is what we want for one process and for DDP."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except CheckpointException as error:  # the same on all ranks
        rank, (reason, _) = next(iter(error.failures.items()))
        raise OSError(f"rank {rank}: {reason}") from None


def save_tensors(folder: Path, tensors: dict[str, Tensor], sharded: bool) -> None:
    """Writes tensors to a folder as safetensors (no pickle); each rank of a sharded model writes
    its shards. Returns when all ranks have written. OSError where that fails."""
    import torch.distributed.checkpoint as dcp  # takes a while to import
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    writer.per_thread_copy_ahead = 0  # else it copies through pinned memory, which torch keeps
    with checkpoint_errors():
        dcp.save(tensors, storage_writer=writer, no_dist=not sharded)


def load_tensors(folder: Path, tensors: dict[str, Tensor], sharded: bool) -> None:
    """Fills `tensors` in place from a folder of `save_tensors`, whatever number of processes wrote
    it. DTensors get this rank's shards, and all ranks must call this. OSError where it fails."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    with checkpoint_errors():
        reader = HuggingFaceStorageReader(str(folder))
        dcp.load(tensors, storage_reader=reader, no_dist=not sharded)


def save_state(c: Config, out: Path, step: int, model: nn.Module, optimizer) -> float:
    """Writes `state/step-N/` and removes the state before it. Returns the seconds that it took.

    All ranks of a sharded model call this and write their shards; otherwise rank 0 alone calls it.
    The folder gets its name after everything in it is on the disk, so that a folder with that name
    is a complete state, whenever the power fails.
    """
    start, sharded, first = time.monotonic(), c.parallel == "fsdp", rank_and_world()[0] == 0
    root = out / "state"
    folder = root / f"step-{step:07}"  # names of seven digits sort like numbers
    temporary = root / f"{folder.name}.tmp"
    if first:
        for leftover in root.glob("*.tmp"):  # of a save that was killed
            shutil.rmtree(leftover)
        temporary.mkdir(parents=True)
    if sharded:
        dist.barrier()
    save_tensors(temporary, named_tensors(model, optimizer), sharded)
    if first:
        metrics = out / "metrics.jsonl"
        fsync(metrics)
        facts = {"step": step, "metrics_bytes": metrics.stat().st_size}
        facts |= {"threads": torch.get_num_threads(), "world": rank_and_world()[1]}
        write_json(temporary / "state.json", facts)
        publish(temporary, folder)
        for other in root.glob("step-*"):  # only now may the state before it go
            if other != folder:
                shutil.rmtree(other)
    return time.monotonic() - start


def empty_moments(model: nn.Module, optimizer, step: int) -> None:
    """AdamW's state after `step` steps, its moments still to be filled."""
    for p in model.parameters():
        optimizer.state[p] = {
            "step": torch.tensor(float(step), device=p.device),
            "exp_avg": torch.zeros_like(p, requires_grad=False),
            "exp_avg_sq": torch.zeros_like(p, requires_grad=False),
        }


def load_state(c: Config, out: Path, model: nn.Module, optimizer) -> dict:
    """Fills the model and the optimizer from the newest state, in place, whatever number of
    processes saved it.

    Returns its `state.json`: step (steps done), metrics_bytes, threads, world (processes). Where
    there is no state yet, nothing changes: step and metrics_bytes are 0, world is None, and AdamW
    makes its moments in its first step.
    """
    # The newest complete state; a save that was killed has left step-N.tmp.
    folder = from_rank_0(lambda: max((out / "state").glob("step-*[0-9]"), default=None))
    if folder is None:
        return {"step": 0, "world": None, "metrics_bytes": 0}
    facts = json.loads((folder / "state.json").read_text())
    empty_moments(model, optimizer, facts["step"])
    load_tensors(folder, named_tensors(model, optimizer), c.parallel == "fsdp")
    return facts


# --------------------------------------------------------------------------------------- data


def split_rationales(c: Config, split: str) -> str | list[str] | None:
    """Returns the part of --rationales that one split reads: palm, neox or human, a list of files,
    or None.

    split: train, valid, test or augment. "augment" gets the files alone; where both a name and
    files are given, the other splits get the name. Valid and test get something only where the
    student reads rationales, or where the only labels are a teacher's.
    """
    given = c.rationales if isinstance(c.rationales, list) else []
    if split == "augment":
        return [r for r in given if r not in evaluation.NAMED]
    source = next((r for r in given if r in evaluation.NAMED), c.rationales)
    unlabelled = c.labels == "teacher" and isinstance(source, list)
    needed = split == "train" or c.method == "rationale-input" or unlabelled
    return source if needed else None


def input_files(c: Config) -> dict[str, list[Path]]:
    """Returns {source: files} of every data file that the run reads; `check_files` prints the
    source, to say where a missing file comes from."""
    answers, own = list(map(Path, split_rationales(c, "augment"))), []
    # A folder of your own may do without test.
    tested = c.dataset in TASKS or has_split(c.dataset, "test", c.data_root)
    for split in ("train", "valid", "test") if tested else ("train", "valid"):
        own += data_files(c.dataset, split, c.data_root, split_rationales(c, split))
    files = {get_task(c.dataset).source: [path for path in own if path not in answers]}
    if c.augment:
        files[get_task(c.augment).source] = data_files(c.augment, "train", c.data_root)
    return {**files, "teacher.py, or --rationales is mistyped": answers}


def check_files(c: Config) -> None:
    """UserError that names all weights and data files that are missing, each with what fetches
    it, before anything is read."""
    missing, name = [], f"t5-v1_1-{c.size}"
    if not weights_folder(c).is_dir():
        fetch = f"`hf download google/{name} --local-dir weights/{name}`"
        missing.append(f"--weights {c.weights} does not exist; {fetch}; or allowed: random")
    for source, paths in input_files(c).items():
        lost = [str(path) for path in dict.fromkeys(paths) if not path.is_file()]
        if lost:
            lost[3:] = ["..."] if len(lost) > 3 else []
            missing.append(f"{', '.join(lost)}: No such file; from {source}")
    if missing:
        raise UserError("; and ".join(missing))


def weights_folder(c: Config) -> Path:
    """Where the run's weights and vocabulary are; the bundled vocabulary is random weights'."""
    return DEMO_VOCABULARY.parent if c.weights == "random" else Path(c.weights)


def augmenting(c: Config, counts: Counter) -> list[Example]:
    """Returns the --augment-fraction of the augmenting examples, labelled by the teacher (Figures
    7 and 9). Adds what is dropped to `counts`. The 2 in the seed makes this draw another than that
    of --fraction."""
    files = split_rationales(c, "augment")
    examples = load_dataset(c.augment, "train", c.data_root, files, counts, c.dataset)
    for example in examples:
        example.label = example.teacher_label
    return fraction_of(examples, c.augment_fraction, [c.seed, 2])


def fraction_of(examples: list[Example], fraction: float, seed: list[int]) -> list[Example]:
    """Returns a random part of the examples, at least one, in their order. With the same seed a
    smaller part is contained in a larger one."""
    order = np.random.default_rng(seed).permutation(len(examples))
    return [examples[i] for i in np.sort(order[: max(1, round(fraction * len(order)))])]


@dataclass
class Data:
    """What a run reads, in host memory: training rows as token ids, valid and test as text."""

    tokenizer: Tokenizer
    rows: TokenRows
    ids: list[str]  # of the training examples, as numbered in `rows`
    valid: list[Example]
    test: list[Example]  # empty where there is no test split
    majority: str  # the most frequent training label
    notes: list[str]  # lines for the user: counts of examples, rows, truncation


def read_splits(c: Config, counts: Counter) -> dict[str, list[Example]]:
    """Returns the examples of train, valid and test; none where there is no test split. Adds to
    `counts` what is dropped from train. UserError where valid or test has no label to score."""
    splits = {"test": []}
    for split in ("train", "valid", "test"):
        if split == "test" and not has_split(c.dataset, "test", c.data_root):
            continue
        source, dropped = split_rationales(c, split), counts if split == "train" else None
        examples = load_dataset(c.dataset, split, c.data_root, source, dropped, c.augment)
        if split != "train" and not any(e.label or e.teacher_label for e in examples):
            raise UserError(f"no example of {split} has a label; give --rationales that answer it")
        splits[split] = examples
    return splits


def prepare(c: Config) -> Data:
    """Reads the splits, chooses the training examples and turns them into rows of token ids.

    Every rank does this for itself, with the same result. UserError where no training example has
    the wanted label, none has a rationale that the method needs, or valid or test has no label.
    """
    counts = Counter()
    splits = read_splits(c, counts)
    everything, valid, test = (splits[name] for name in ("train", "valid", "test"))
    tokenizer = evaluation.load_tokenizer(weights_folder(c))
    # The examples to train on: a seeded fraction, with the wanted label.
    own = fraction_of(everything, c.fraction, [c.seed, 1])
    more = augmenting(c, counts) if c.augment else []
    usable = [e for e in own + more if wanted_label(e, c.labels) is not None]
    if not usable:
        raise UserError(f"no training example has a {c.labels} label; see --labels, --rationales")
    bare = sum(not e.rationale for e in usable) if c.method != "standard" else 0
    if bare == len(usable):
        raise UserError(f"--method {c.method} needs rationales, no example has any: --rationales")
    # One row for each example and task, as token ids; and what a user should know about them.
    made = make_rows(usable, c.method, c.labels, c.prefixes, c.dataset)
    rows = tokenize_rows(made, tokenizer)
    notes = [
        f"data: {c.dataset}, {len(own):,} of {len(everything):,} training examples "
        f"(fraction {c.fraction:g}), {len(valid):,} valid, {len(test):,} test"
        + (f"; {len(more):,} of {c.augment} with the teacher's labels" if more else ""),
        f"left out, no {c.labels} label: {len(own + more) - len(usable):,}; "
        f"without rationale: {bare:,}; "
        f"teacher labels outside the set: {counts['teacher_labels_dropped']:,}; "
        f"teacher answers without an example: {counts['teacher_ids_unmatched']:,}",
        describe_rows(rows, made, tokenizer),
    ]
    examples = everything + valid + test
    wanted = [wanted_label(e, c.labels) for e in usable]
    labels, inputs = [e.label for e in examples] + wanted, [e.input for e in examples]
    notes += check_labels(get_task(c.dataset), tokenizer, labels, inputs)
    if counts["labels_stripped"]:
        notes.append(f"warning: space around {counts['labels_stripped']:,} labels was cut")
    majority = Counter(wanted).most_common(1)[0][0]
    return Data(tokenizer, rows, [e.id for e in usable], valid, test, majority, notes)


def describe_rows(rows: TokenRows, made: list[Row], tokenizer: Tokenizer) -> str:
    """Says how many of the rows `made` were cut, and what in them the vocabulary lacks."""

    def share(part: int, whole: int) -> str:
        return f"{part:,} ({100 * part / whole:.2f} %)"

    texts = (text for row in made if rows.unknown_tokens for text in (row.source, row.target))
    unknown = " ".join(unknown_characters(texts, tokenizer))
    return (
        f"rows: {len(rows):,}; truncated sources {share(rows.truncated_sources, len(rows))}, "
        f"targets {share(rows.truncated_targets, len(rows))}; "
        f"unknown tokens {share(rows.unknown_tokens, rows.total_tokens)}"
        + (f", above all of {unknown}" if unknown else "")
    )


# --------------------------------------------------------------------------------------- model

# A fork of this project sets `evaluation.STUDENT` to its own class, which may lack what T5 has.


def build_model(c: Config, tokenizer: Tokenizer) -> nn.Module:
    """Returns the student before training: pretrained weights, or random ones for --weights random.

    It is on the CPU; for FSDP it is already sharded, on this process's device. A class that has
    `load_weights` is sharded while it is empty, so that no process holds a whole model; of another
    class each process holds a whole model for a moment. UserError where the vocabulary is larger
    than the model's.
    """
    torch.manual_seed(c.seed)
    student, folder, random = evaluation.STUDENT, Path(c.weights), c.weights == "random"
    untrained = evaluation.untrained_config(c.size, tokenizer.vocab_size) if random else None
    if c.parallel == "fsdp" and fills_shards(student):
        with evaluation.shown_to_user():
            config = untrained or student.read_config(folder)
            with torch.device("meta"):
                model = student(config)
            parallelize(model, c).to_empty(device=torch.device(c.device))
            if random:
                model.init_weights(c.seed)
            else:
                model.load_weights(folder)
    else:
        model = student(untrained) if random else evaluation.load_model(folder)
    evaluation.check_vocabulary(model, tokenizer, c.weights)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = c.dropout  # whatever config.json says: v1.1's is for pretraining
    return parallelize(model, c) if c.parallel == "fsdp" and not fills_shards(student) else model


def parameters(model: nn.Module) -> int:
    """The number of a model's parameters; those that are shared count once."""
    return sum(p.numel() for p in model.parameters())


def check_size(c: Config, model: nn.Module, tokenizer: Tokenizer) -> None:
    """UserError where --size was given and the weights are of another size. T5 1.0's shapes differ
    from v1.1's, by less than a factor of two."""
    with torch.device("meta"):
        config = evaluation.untrained_config(c.size, tokenizer.vocab_size)
        expected, found = parameters(type(model)(config)), parameters(model)
    if not expected / 2 <= found <= 2 * expected:
        found = f"--weights {c.weights} has {found:,} parameters"
        raise UserError(f"{found}, but --size {c.size} about {expected:,}; give its own size")


def fills_shards(student: type[nn.Module]) -> bool:
    """Can this class read and write a sharded model's weights, as T5 does?"""
    return hasattr(student, "load_weights")


def parallelize(model: nn.Module, c: Config) -> nn.Module:
    """Prepares a model for several processes; its backward then averages gradients over them.

    none: applies --recompute and --compile only. ddp: returns a wrapper; each process has a copy.
    fsdp: changes the model in place; each process holds a shard of every parameter, gradient and
    moment in float32 (FSDP2, https://pytorch.org/docs/stable/distributed.fsdp.fully_shard.html).
    A unit's weights are gathered when it runs, in bf16 where that is the precision, and gradients
    are reduced in float32. Units are the blocks, the embedding and the head; the model itself has
    the rest. An embedding tied to the head belongs to the rest, which stays gathered from the
    first block to the head.
    """
    for block in dict.fromkeys(model.blocks):  # a fork may use one twice
        if c.recompute:
            recompute(block)
        if c.compile:
            block.compile(dynamic=True)
    if c.parallel == "ddp":
        return DistributedDataParallel(model, gradient_as_bucket_view=True)
    if c.parallel == "fsdp":
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        mesh = dist.init_device_mesh(c.device, (dist.get_world_size(),))
        gathered_in = torch.bfloat16 if c.precision == "bf16" else None
        # Inputs are not cast: the residual stream between blocks is float32.
        policy = MixedPrecisionPolicy(
            param_dtype=gathered_in, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        # Embedding and head; one alone is tied, and stays in the unit of the whole model.
        ends = [m for m in model.children() if isinstance(m, nn.Embedding | nn.Linear)]
        units = [*(ends if len(ends) > 1 else []), *model.blocks, model]
        for unit in dict.fromkeys(units):
            # The backward pass needs the head first: it stays gathered. None is torch's default.
            reshard = False if isinstance(unit, nn.Linear) else None
            fully_shard(unit, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
    return model


def recompute(block: nn.Module) -> None:
    """Makes a block keep only its inputs in training, and run again in the backward pass."""
    plain = block.forward

    def forward(*inputs):
        if torch.is_grad_enabled():
            return checkpoint(plain, *inputs, use_reentrant=False)
        return plain(*inputs)

    block.forward = forward


# ------------------------------------------------------------------------------------ the loop


STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)


@contextlib.contextmanager
def noted_signals() -> Iterator[list[int]]:
    """Collects the numbers of the signals that ask the run to stop; the loop then saves and stops.
    One that is ignored at the start (nohup) stays ignored."""
    got = []
    caught = [s for s in STOPPING if signal.getsignal(s) != signal.SIG_IGN]
    before = {s: signal.signal(s, lambda number, _: got.append(number)) for s in caught}
    try:
        yield got
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def to_tensors(arrays: dict[str, np.ndarray], device: torch.device) -> dict[str, Tensor]:
    """Arrays on the device; a GPU copies them from pinned memory while the host goes on."""
    tensors = {key: torch.from_numpy(array) for key, array in arrays.items()}
    if device.type == "cuda":
        tensors = {key: tensor.pin_memory() for key, tensor in tensors.items()}
    return {key: tensor.to(device, non_blocking=True) for key, tensor in tensors.items()}


def forward_backward(
    model: nn.Module, batch: dict[str, Tensor], counts: Tensor, c: Config, scale: int
) -> Tensor:
    """Runs one micro-batch forward and backward; adds `scale` times its gradient to `.grad`.

    batch: input_ids, attention_mask (B, S), labels (B, T), tasks (B,), all int64. counts (tasks,):
    each task's target tokens in the whole step. Returns (tasks + 1,) float32, detached: what this
    micro-batch adds to each task's loss of the step, and to their weighted sum L (Eq. 3).
    """
    labels = batch["labels"]
    # The decoder's input: the start token, then the labels but the last, PAD for -100. The ids are
    # those that the student's own `generate` uses, T5's 0 where it names none; DDP wraps the model.
    config = getattr(getattr(model, "module", model), "config", None)
    ids = [getattr(config, name, 0) for name in ("decoder_start_token_id", "pad_token_id")]
    with evaluation.autocast(counts.device, c.precision):
        logits = model(batch["input_ids"], batch["attention_mask"], shift_right(labels, *ids))
    losses = multitask_loss(logits, labels, batch["tasks"], counts, c.lam)
    (losses.total * scale).backward()
    return torch.cat([losses.each, losses.total[None]]).detach()


def divide(
    c: Config, rows: TokenRows, row_ids: np.ndarray, device: str, world: int
) -> list[list[np.ndarray]]:
    """Divides a step's rows into micro-batches: for each rank arrays of rows' numbers, equally many
    for all. Every rank computes the same division. device: cpu or cuda."""
    lengths = [round_up(x, evaluation.MULTIPLE[device]) for x in rows.lengths(row_ids)]
    tasks = rows.tasks[row_ids]
    ranks = micro_batches(*lengths, tasks, c.micro_tokens, world, OVERHEAD[device])
    return [[row_ids[members] for members in batches] for batches in ranks]


def begin_step(optimizer, c: Config, step: int) -> float:
    """Sets and returns the learning rate, and sets the seed of dropout. Both follow from the step
    (and the rank), so that a resumed run has the same."""
    lr = c.lr * (1 - step / c.steps)  # linear to 0, no warm-up
    for group in optimizer.param_groups:
        group["lr"] = lr
    seed = np.random.SeedSequence([c.seed, step, rank_and_world()[0]])
    torch.manual_seed(int(seed.generate_state(1, np.uint64)[0]))
    return lr


def train_step(
    model, optimizer, c: Config, data: Data, step: int, device: torch.device, stop: int
) -> tuple[dict, int]:
    """Runs one optimizer step, `step` from 0; `stop` is the signal that this rank got, or 0.

    Returns a line of `metrics.jsonl`, and the signal that any rank got, or 0. The line: step (from
    1); each task's loss and their weighted sum, in nats a target token; lr; norm of the gradient
    before clipping; examples and tokens (unpadded) a second; memory. All but the last are over all
    ranks. RunError on all where the loss or norm is not finite; then nothing has changed.
    """
    start, rows, n = time.monotonic(), data.rows, len(TARGETS)
    (rank, world), lr = rank_and_world(), begin_step(optimizer, c, step)
    examples = step_examples(rows.n_examples, c.batch_size, c.seed, step)
    row_ids = rows.rows_of(examples)  # of each example its rows of all tasks
    batches = divide(c, rows, row_ids, device.type, world)[rank]
    tasks, (sources, targets) = rows.tasks[row_ids], rows.lengths(row_ids)

    # What must be known before the first backward pass, copied to the device at once. counts: each
    # task's target tokens in the whole step, the denominators of Eq. 1 and 4. sums: over ranks,
    # each task's loss, L, and how many ranks got each signal.
    arrays = {
        "counts": np.array([targets[tasks == task].sum() for task in range(n)]),
        "sums": np.float32([0] * (n + 1) + [stop == number for number in STOPPING]),
    }
    counts, sums = to_tensors(arrays, device).values()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)

    # Forward and backward; gradients add up over the micro-batches.
    for i, members in enumerate(batches):
        batch = collate(rows, members, evaluation.MULTIPLE[device.type])
        # The loss is one sum over all ranks, and DDP and FSDP average gradients: times world. DDP
        # averages once, in the last micro-batch; FSDP in each, since it keeps only shards.
        wait = c.parallel == "ddp" and i < len(batches) - 1
        with model.no_sync() if wait else contextlib.nullcontext():
            sums[: n + 1] += forward_backward(model, to_tensors(batch, device), counts, c, world)

    # Sums over the ranks, the clipped norm, and one look at all of it.
    if world > 1:
        dist.all_reduce(sums)
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    norm = norm.full_tensor() if c.parallel == "fsdp" else norm
    # The one time in a step that the host waits for the device.
    figures = torch.cat([sums, norm[None]]).tolist()
    task_losses, (loss, *stopped, grad_norm) = figures[:n], figures[n:]
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        raise RunError(
            f"step {step + 1}: loss {loss}, gradient norm {grad_norm} is not finite; its examples: "
            f"{', '.join(data.ids[i] for i in examples)}; lower --lr or correct them"
        )
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    seconds = time.monotonic() - start
    metrics = {
        "step": step + 1, **{f"{task}_loss": x for task, x in zip(TARGETS, task_losses)},
        "loss": loss, "lr": lr, "grad_norm": grad_norm,
        "examples_per_second": c.batch_size / seconds,
        "tokens_per_second": int(sources.sum() + targets.sum()) / seconds,
        **memory_figures(device),
    }  # fmt: skip
    return metrics, next((number for number, ranks in zip(STOPPING, stopped) if ranks), 0)


def memory_figures(device: torch.device) -> dict[str, int]:
    """Bytes: of the step on a GPU, also what torch's allocator reserved for it; of the process so
    far (its resident set) on a CPU."""
    if device.type == "cuda":
        peak, reserved = torch.cuda.max_memory_allocated, torch.cuda.max_memory_reserved
        return {"peak_memory_bytes": peak(device), "reserved_memory_bytes": reserved(device)}
    unit = 1 if sys.platform == "darwin" else 1024
    return {"peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}


def first_lines(c: Config, data: Data, model: nn.Module, done: int) -> str:
    """What a run prints before its first step: data, model, steps, cost. All is float32: a state
    has weights and two moments, 12 bytes a parameter, a student 4."""
    size, world = parameters(model), rank_and_world()[1]
    epochs = c.steps * c.batch_size / data.rows.n_examples
    more = f"; continuing after step {done}" if done else ""
    evaluations = -(-c.steps // c.eval_every)
    return "\n".join(data.notes) + (
        f"\nmodel: {c.weights} ({c.size}), {size:,} parameters; {c.precision} on {world} x "
        f"{c.device}, {c.parallel}; {torch.get_num_threads()} threads\n"
        f"steps: {c.steps:,} of {c.batch_size} examples ({epochs:.1f} epochs), micro-batches of at "
        f"most {c.micro_tokens:,} tokens{more}\n"
        f"cost: {evaluations:,} evaluations of {len(data.valid):,} examples, a state of "
        f"{12 * size / 1e6:,.0f} MB every {c.save_every} steps, best and last "
        f"{4 * size / 1e6:,.0f} MB each; training waits for each"
    )


def train(c: Config, out: Path, data: Data, student: Student) -> None:
    """Trains the student's model from the newest state, or from the start, to the last step.

    Changes the model; writes `state/`, `metrics.jsonl`, `best/` and `last/` in `out`. After a
    signal to any rank it saves and raises Interrupted on all. RunError where a loss or gradient is
    not finite; UserError where `best/` is gone.
    """
    (rank, world), model, device = rank_and_world(), student.model.train(), student.device
    optimizer = torch.optim.AdamW(model.parameters(), lr=c.lr, weight_decay=0.0, fused=True)
    state = load_state(c, out, model, optimizer)
    best = from_rank_0(lambda: best_so_far(out, state))
    step = began_at = state["step"]
    if world == state["world"]:
        torch.set_num_threads(state["threads"])  # another number would give other bits
    saves = c.parallel == "fsdp" or rank == 0  # each rank of a sharded model saves its shards
    print0(first_lines(c, data, model, step))
    # FSDP has sharded the model already. DDP's wrapper is for training alone: students and states
    # are saved from the model in it.
    wrapped = model if c.parallel == "fsdp" else parallelize(model, c)
    if world > 1:
        # DDP arranges its gradient buckets after its first backward, which changes the order of
        # sums. This backward, whose gradients are dropped, does it before the first step, of a new
        # and of a resumed run alike.
        batch = to_tensors(collate(data.rows, np.array([0])), device)
        forward_backward(wrapped, batch, torch.ones(len(TARGETS), device=device), c, world)
        model.zero_grad(set_to_none=True)

    def log(row: dict) -> None:
        if rank == 0:
            with open(out / "metrics.jsonl", "a") as file:
                file.write(json.dumps(row) + "\n")

    if rank == 0:  # lines after the state belong to steps that run again
        with open(out / "metrics.jsonl", "ab") as file:
            file.truncate(state["metrics_bytes"])
    began, shown = time.monotonic(), -math.inf
    # disable=None shows the bar only on a terminal.
    with tqdm(total=c.steps, initial=step, disable=rank > 0 or None) as bar:
        while True:
            # Evaluate if it is due, and write best/ if the student has improved.
            evaluates = step % c.eval_every == 0 or step == c.steps
            if step > 0 and evaluates:
                start = time.monotonic()
                # Decoding has many shapes: compiling each would take longer than it saves.
                with torch.compiler.set_stance("force_eager" if c.compile else "default"):
                    summary, _ = evaluation.evaluate(student, data.valid, progress="valid")
                accuracy, seconds = summary["accuracy"], time.monotonic() - start
                log({"step": step, "valid_accuracy": accuracy, "seconds": seconds})
                print0(f"step {step}/{c.steps}  valid {accuracy:.4f}  ({seconds:.1f} s)")
                if accuracy > best:
                    best = accuracy
                    if saves:
                        save_student(c, model, data.tokenizer, out / "best", step, best)
            if step == c.steps:
                break

            # Train one step.
            got = next(iter(student.signals), 0)
            metrics, stop = train_step(wrapped, optimizer, c, data, step, device, got)
            step += 1
            log(metrics)
            bar.update()
            if time.monotonic() - shown > 10 or step == c.steps:
                shown = time.monotonic()
                left = (shown - began) / (step - began_at) * (c.steps - step)
                figures = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
                print0(figures, f" left {timedelta(seconds=int(left))}")

            # Save the state if it is due: also before an evaluation, which a signal may end.
            due = step % c.save_every == 0 or step % c.eval_every == 0 or step == c.steps or stop
            if due and saves:
                seconds = save_state(c, out, step, model, optimizer)
                if c.parallel == "fsdp" or seconds > 10:
                    print0(f"state of step {step} saved in {seconds:.1f} s")
            if stop:
                if world > 1:
                    dist.barrier()  # all ranks exit together, once rank 0 has saved
                raise Interrupted(stop)
    if saves:
        save_student(c, model, data.tokenizer, out / "last", c.steps, accuracy)


def finish(c: Config, out: Path, data: Data, student: Student) -> dict:
    """Scores the best student on test, once, and writes `predictions.jsonl` and `result.json`."""
    (rank, world), model, best = rank_and_world(), student.model, out / "best"
    if world > 1:
        dist.barrier()  # best/ is written
    if c.parallel == "fsdp" and fills_shards(type(model)):
        model.load_weights(best)
    else:
        student.model = evaluation.load_model(best).to(student.device)
    summary = {"accuracy": None, "n": 0}
    if data.test:
        summary, rows = evaluation.evaluate(student, data.test, progress="test")
        if rank == 0:
            write_jsonl(out / "predictions.jsonl", rows)
    # The rival that always gives the most frequent training label, on the split that is scored.
    scored = data.test or data.valid
    rival, _ = evaluation.score(get_task(c.dataset), [data.majority] * len(scored), scored)
    about = json.loads((best / "dsbs.json").read_text())
    result = {
        "valid_accuracy": about["valid_accuracy"], "test_accuracy": summary["accuracy"],
        "n_test": summary["n"], "best_step": about["step"], "labels": rival["labels"],
        "majority_accuracy": rival["accuracy"], "parameters": parameters(model),
        **{key: getattr(c, key) for key in ("dataset", "size", "method", "fraction", "seed")},
    }  # fmt: skip
    if rank == 0:
        write_json(out / "result.json", result)
    return result


def demo_means(c: Config, result: dict) -> str:
    """The last line of a run of the bundled task at its defaults: both methods' accuracy over
    several seeds (`demo/results.json`, by `scripts/reproduce.py demo`); else an empty string."""
    path = HERE / "demo" / "results.json"
    default = resolve(Config(method=c.method, seed=c.seed))
    if run_name(c) != run_name(default) or not path.exists():
        return ""
    means = ", ".join(
        f"{method} {m['accuracy']:.3f} ({m['standard_error']:.3f}, {m['seeds']} seeds)"
        for method, m in json.loads(path.read_text()).items()
    )
    return f"\nthis run {result['test_accuracy']:.3f}; means on test (standard error): {means}"


def show_result(c: Config, out: Path, result: dict) -> None:
    """The last lines of a run: what came out, where it is, how to use it."""
    test, n = result["test_accuracy"], result["n_test"]
    test = "none: no test split" if test is None else f"{test:.4f} ({n} {result['labels']} labels)"
    explain = " --explain" if METHODS[c.method].explains else ""
    print0(
        f"valid accuracy {result['valid_accuracy']:.4f} (the best, of step {result['best_step']})\n"
        f"test accuracy  {test}; the most frequent training label alone: "
        f"{result['majority_accuracy']:.4f}\n"
        f"the student is in {out / 'best'}; use it with\n"
        f"  python eval.py {out / 'best'} --predict inputs.txt{explain}{demo_means(c, result)}"
    )


# ------------------------------------------------------------------------------- command line


def add_flag(parser: argparse.ArgumentParser, setting: Field) -> None:
    """The flag of one field of Config; its type follows from the annotation."""
    name, default = setting.name, setting.default
    help, allowed = setting.metadata["help"], setting.metadata["allowed"]
    if not isinstance(allowed, str) and allowed:
        help += f": {', '.join(allowed)}"
    if name in RECIPES["tiny"]:
        default = ", ".join(f"{recipe[name]} ({size})" for size, recipe in RECIPES.items())
    if default is not None:
        help += f"; default {default}"
    # The first of `int | None`, or the type itself.
    kind = (get_args(setting.type) or [setting.type])[0]
    how = {bool: {"action": argparse.BooleanOptionalAction}, list[str]: {"nargs": "+"}}
    how = how.get(kind, {"type": kind})
    flag = f"--{name.replace('_', '-')}"
    parser.add_argument(flag, default=argparse.SUPPRESS, help=help, **how)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Config's flags, those alone that were given (`resolve` knows the defaults), and the flags of
    this command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for setting in fields(Config):
        add_flag(parser, setting)
    add = parser.add_argument
    help = "seconds that processes wait for each other; default 600"
    add("--timeout", type=float, default=evaluation.TIMEOUT, help=help)
    add("--plan", action="store_true", help="print memory, steps and time; train nothing")
    add("--gpus", type=int, default=1, help="with --plan; default 1")
    add("--json", action="store_true", help="with --plan: print one JSON object")
    add("--out", type=Path, help="run folder; default runs/ and a name made of the settings")
    add("--resume", action="store_true", help="continue the run folder, or start it")
    return parser.parse_args(argv)


def config_flags(args: argparse.Namespace) -> dict:
    """Those of the flags that are fields of Config."""
    return {f.name: getattr(args, f.name) for f in fields(Config) if hasattr(args, f.name)}


def run(given: dict, args: argparse.Namespace, argv: list[str]) -> int:
    """Trains and scores a run, or shows a finished one; returns 0, or 128 + n after signal n.

    given: the settings that were given, or that run.json has, by Config's names. args and argv: the
    command line, parsed and not.
    UserError, RunError and OSError where the run cannot be started or continued.
    """
    c = resolve(Config(**given))
    check_files(c)
    out = args.out or Path(run_name(c))
    with contextlib.ExitStack() as held:

        def claim() -> dict | None:
            about = provenance(c)
            held.enter_context(lock(out / ".lock"))
            return open_run(c, out, about, argv, args.resume)

        # An existing folder is checked before the data are read, which may take minutes; a new one
        # is made after that, so that a mistake in the data makes no folder.
        exists = from_rank_0((out / "run.json").exists)
        result = from_rank_0(claim) if exists else None
        if result:
            first = [word for word in read_run(out)["argv"] if word != "--resume"]
            again = command(*first, "--out", f"{out}-2")
            print0(f"{out} is finished; to repeat it elsewhere:\n  {again}")
        else:
            data = prepare(c)
            model = build_model(c, data.tokenizer)
            if hasattr(args, "size") and c.weights != "random":
                check_size(c, model, data.tokenizer)
            if not exists:
                from_rank_0(claim)
            print0(f"run folder: {out}")
            device, signals = torch.device(c.device), held.enter_context(noted_signals())
            about = c.method, c.prefixes, c.dataset
            student = Student(
                model.to(device), data.tokenizer, *about, device, c.precision, signals
            )
            try:
                train(c, out, data, student)
                result = finish(c, out, data, student)
            except Interrupted as stop:
                (number,) = stop.args
                again = command("--out", str(out), "--resume")
                print0(f"stopped by signal {number}; the state is saved; go on:\n  {again}")
                return 128 + number
        show_result(c, out, result)
    return 0


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status: 0, 2 for a user's mistake, 1 for a run that
    could not continue, 128 + n after signal n. Errors are printed as one line."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)

    def program() -> int:
        given = config_flags(args)
        if args.plan:
            from scripts import plan

            return plan.run(given, args.gpus, args.json)
        if args.gpus != 1 or args.json:
            raise UserError("--gpus and --json are for --plan; processes are torchrun's to start")
        if not 0 < args.timeout < 10**7:
            raise UserError(f"--timeout {args.timeout}: must be a positive number of seconds")
        if args.resume and args.out and (args.out / "run.json").exists():
            before = read_run(args.out)["config"]  # by each rank: there is no process group yet
            before.pop("parallel")  # the number of processes may have changed
            given = before | given
        try:
            device = evaluation.choose_device(given.get("device"))
            with evaluation.processes(device, args.timeout):
                return run(given, args, argv)
        except (OSError, SafetensorError) as error:  # a full disk, above all
            raise RunError(f"{error}; solve this, then repeat the command with --resume") from None

    return evaluation.exit_status(program)


if __name__ == "__main__":
    # scripts/plan.py imports this file as `train`. Run that module, so that each class exists once.
    from importlib import import_module

    evaluation.exit_process(import_module("train").main())
