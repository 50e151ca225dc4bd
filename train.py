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
from collections.abc import Callable, Iterable, Iterator
from dataclasses import Field, asdict, dataclass, field, fields
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, get_args

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
    is_correct,
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
from dsbs import METHODS, PREFIXES, TARGETS, make_rows, multitask_loss, wanted_label
from eval import (
    NAMED,
    Interrupted,
    RunError,
    Student,
    autocast,
    choose_device,
    exit_process,
    exit_status,
    print0,
    processes,
    rank_and_world,
)
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
# The fixed cost of a micro-batch, as a number of padded tokens that take the same time. On a GPU:
# kernel launches, casts of weights, sums of gradients (estimated; about the same for all sizes); on
# a CPU: sums of gradients.
OVERHEAD = {"cuda": 1024, "cpu": 128}


# ------------------------------------------------------------------------------- configuration


def by_size(name: str) -> str:
    """The defaults of a setting that depends on --size, for the help text."""
    sizes = {}
    for size, recipe in RECIPES.items():
        sizes.setdefault(recipe[name], []).append(size)
    return "; default " + ", ".join(f"{v} ({' '.join(names)})" for v, names in sizes.items())


class Bound(NamedTuple):
    """A condition on a number, in words and as a test, which NaN fails."""

    words: str
    holds: Callable[[float], bool]


COUNT = Bound("at least 1", lambda x: x >= 1)
NATURAL = Bound("at least 0", lambda x: x >= 0)
SHARE = Bound("above 0 and at most 1", lambda x: 0 < x <= 1)
POSITIVE = Bound("a positive number", lambda x: 0 < x < math.inf)
WEIGHT = Bound("0 or a positive number", lambda x: 0 <= x < math.inf)
PROBABILITY = Bound("at least 0 and below 1", lambda x: 0 <= x < 1)


def flag(default: Any, help: str, allowed: Iterable[str] | Bound | None = None) -> Any:
    """A field of Config that is a flag of train.py: its default, help text and allowed values."""
    return field(default=default, metadata={"help": help, "allowed": allowed})


@dataclass
class Config:
    """The settings of a run; each field is a flag. None means "not given", see `resolve`."""

    # The student and its data.
    size: str = flag("tiny", f"{', '.join(RECIPES)}; default tiny", RECIPES)
    weights: str | None = flag(
        None,
        "a Hugging Face T5 folder, or random; default random for tiny, else weights/t5-v1_1-SIZE",
    )
    dataset: str | None = flag(
        None,
        "svamp, cqa, esnli, anli1, demo or a folder of *.jsonl; default demo for tiny, else esnli",
    )
    data_root: str = flag("datasets", "folder of the benchmarks; default datasets")
    # What the student learns, and from how many examples.
    method: str = flag("step-by-step", f"{', '.join(METHODS)}; default step-by-step", METHODS)
    labels: str = flag("human", "human or teacher; default human", ("human", "teacher"))
    rationales: list[str] | None = flag(
        None, "palm, neox, human, or a teacher's .jsonl files; default palm for the benchmarks"
    )
    prefixes: str = flag("paper", "paper or released; default paper", PREFIXES)
    fraction: float = flag(1.0, "share of the training examples; default 1", SHARE)
    augment: str | None = flag(
        None, "asdiv: train on its problems too, with a teacher's labels", ("asdiv",)
    )
    augment_fraction: float = flag(1.0, "share of the augmenting examples; default 1", SHARE)
    # The optimizer.
    steps: int | None = flag(None, "optimizer steps" + by_size("steps"), COUNT)
    batch_size: int | None = flag(
        None, "examples in a step, over all processes" + by_size("batch_size"), COUNT
    )
    lr: float | None = flag(
        None, "learning rate at the start; falls linearly to 0" + by_size("lr"), POSITIVE
    )
    lam: float = flag(1.0, "weight of the rationales' loss, lambda of Eq. 3; default 1", WEIGHT)
    dropout: float = flag(0.1, "default 0.1", PROBABILITY)
    seed: int = flag(0, "default 0", NATURAL)
    # How the run is carried out.
    eval_every: int | None = flag(None, "steps between evaluations" + by_size("eval_every"), COUNT)
    device: str | None = flag(None, "cpu, cuda or cuda:N; default: a GPU where there is one")
    precision: str | None = flag(
        None, "fp32 or bf16; default bf16 on CUDA, fp32 on CPU", ("fp32", "bf16")
    )
    # MAY_CHANGE: a resumed run may change these. They change neither the method nor the order of
    # the data, but may change rounding; other micro-batches draw other dropout masks.
    save_every: int | None = flag(
        None,
        "steps between saved states (each evaluation saves one too); default --eval-every",
        COUNT,
    )
    micro_tokens: int | None = flag(
        None,
        "most tokens, padding included (source + target), in one forward pass on one device"
        + by_size("micro_tokens"),
        COUNT,
    )
    parallel: str | None = flag(
        None,
        "none, ddp or fsdp; default under torchrun: fsdp for xl and xxl, else ddp",
        ("none", "ddp", "fsdp"),
    )
    recompute: bool | None = flag(
        None, "recompute activations in the backward pass" + by_size("recompute")
    )
    compile: bool = flag(False, "compile the model's blocks, for GPUs; default no")


MAY_CHANGE = {"save_every", "micro_tokens", "parallel", "recompute", "compile"}


def check_values(c: Config) -> None:
    """UserError for the first setting whose value is not allowed."""
    for setting in fields(c):
        name, value = f"--{setting.name.replace('_', '-')}", getattr(c, setting.name)
        allowed = setting.metadata["allowed"]
        if value is None or allowed is None:
            continue
        if isinstance(allowed, Bound) and not allowed.holds(value):
            raise UserError(f"{name} {value}: must be {allowed.words}")
        if not isinstance(allowed, Bound) and value not in allowed:
            raise UserError(f"{name} {value!r} is unknown; allowed: {', '.join(allowed)}")


def resolve(config: Config) -> Config:
    """Returns a copy with all defaults filled in; `augment` and `rationales` may stay None.

    Defaults depend on the size, the data set, the device and the number of processes. `device`
    becomes "cpu" or "cuda", without the GPU's number; `parallel` becomes "none" for one process.
    Resolving a second time changes nothing, so that a resumed run can start from `run.json`.
    UserError for a value or a combination that is not allowed.
    """
    c = Config(**asdict(config))
    check_values(c)
    for name, value in RECIPES[c.size].items():
        if getattr(c, name) is None:
            setattr(c, name, value)
    c.weights = c.weights or ("random" if c.size == "tiny" else f"weights/t5-v1_1-{c.size}")
    c.dataset = c.dataset or ("demo" if c.size == "tiny" else "esnli")
    c.save_every = c.save_every or c.eval_every
    device = choose_device(c.device)
    c.device = device.type
    c.precision = c.precision or ("bf16" if device.type == "cuda" else "fp32")
    resolve_rationales(c)
    world = int(os.environ.get("WORLD_SIZE", 1))
    if c.parallel == "none" and world > 1:
        raise UserError(
            f"--parallel none with {world} processes would train {world} models; allowed: ddp, fsdp"
        )
    if world == 1:
        c.parallel = "none"
    elif c.parallel is None:
        c.parallel = default_parallel(c.size)
    return c


def resolve_rationales(c: Config) -> None:
    """Fills in --rationales; UserError where it, --dataset and --augment do not fit together."""
    task = get_task(c.dataset)
    if c.dataset == "asdiv":
        raise UserError(
            "--dataset asdiv has no labels and no test split: it only augments svamp; "
            "allowed: the other names, or a folder"
        )
    if isinstance(c.rationales, str):  # run.json stores a name without a list
        c.rationales = [c.rationales]
    uses = c.method != "standard" or c.labels == "teacher"
    c.rationales = evaluation.rationale_source(c.rationales, c.dataset, uses)
    if c.augment and task.scorer != "arithmetic":
        raise UserError(
            f"--augment {c.augment} with --dataset {c.dataset}: its answers are equations; "
            "allowed: svamp"
        )
    if c.augment and not split_rationales(c, "augment"):
        raise UserError(
            f"--augment {c.augment} needs a teacher's answers to it; annotate it "
            f"with `python teacher.py --dataset {c.augment}` and add the file to "
            f"--rationales, which may be `palm teacher/{c.augment}.train.jsonl`"
        )
    if not c.augment and isinstance(c.rationales, list) and set(c.rationales) & set(NAMED):
        raise UserError(
            f"--rationales {' '.join(c.rationales)}: allowed are one of "
            f"{', '.join(NAMED)}, or files; both together are for --augment"
        )


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
    for path in sorted(folder.glob("*")):
        if path.suffix == ".safetensors":
            with open(path, "rb") as file:
                size = int.from_bytes(file.read(8), "little")
                hashes[path.name] = sha256(file.read(min(size, 1 << 27)))
        elif path.suffix == ".bin":
            hashes[path.name] = f"{path.stat().st_size} bytes"
        elif path.name in ("config.json", "spiece.model") or path.name.endswith(".index.json"):
            hashes[path.name] = sha256(path)
    return hashes


def provenance(c: Config) -> dict:
    """Returns what `run.json` records besides the settings.

    data_sha256: {path: sha256}; weights_sha256: see `weights_hashes`; git_sha: the commit, or None;
    versions: {name: version}. `open_run` compares the two hashes; the rest is for people.
    """
    paths = {path for paths in input_files(c).values() for path in paths}
    described = {path.with_name("task.json") for path in paths if path.name == "train.jsonl"}
    paths |= set(filter(Path.is_file, described))
    random = c.weights == "random"
    try:
        line = ["git", "rev-parse", "HEAD"]
        git = subprocess.run(line, cwd=HERE, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:  # git is not installed
        git = ""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    return {
        "data_sha256": {str(path): sha256(path) for path in sorted(paths)},
        "weights_sha256": weights_hashes(HERE / "demo" if random else Path(c.weights)),
        "git_sha": git or None,
        "versions": {**versions, "numpy": np.__version__},
    }


def open_run(c: Config, out: Path, about: dict, argv: list[str], resume: bool) -> dict | None:
    """Claims the run folder: writes `run.json`, or checks that the one there is of this run.

    Returns `result.json` of a finished run, and None for a new or unfinished one. `about` is
    `provenance(c)`, `argv` the command line without the program. UserError if the folder holds
    another run, or an unfinished one without --resume.
    """
    path = out / "run.json"
    if not path.exists():
        names = sorted(path.name for path in out.iterdir())
        # A start that was killed may have left a temporary file.
        others = [name for name in names if name != ".lock" and not name.endswith(".tmp")]
        if others:
            raise UserError(f"{out} is not a run but holds {others[0]!r}; give another --out")
        write_json(path, {"config": asdict(c), "argv": argv, **about})
        return None
    try:
        run = json.loads(path.read_text())
        before, data, weights = {**run["config"]}, run["data_sha256"], run["weights_sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged: {error!r}; give another --out") from None
    differ = [f"{name} {before.get(name)!r} there, {value!r} here"
              for name, value in asdict(c).items()
              if name not in MAY_CHANGE and value != before.get(name)]  # fmt: skip
    if data != about["data_sha256"]:
        differ.append("the data files or their contents")
    if weights != about["weights_sha256"]:
        differ.append("the contents of the weights or of the vocabulary")
    if differ:
        differ = "; ".join(differ)
        raise UserError(f"{out} is a run with other settings: {differ}; give another --out")
    if (out / "result.json").exists():
        return json.loads((out / "result.json").read_text())
    if not resume:
        raise UserError(
            f"{out} holds an unfinished run; continue it with --resume, or give another --out"
        )
    return None


def save_student(
    c: Config, model: nn.Module, tokenizer: Tokenizer, folder: Path, step: int, accuracy: float
) -> None:
    """Replaces `folder` by a student that `eval.py` and `transformers` load.

    accuracy: on valid, 0 to 1. Rank 0 first. All ranks of a sharded model must call this, since
    its weights are gathered from all. The new folder is on the disk before it replaces the old
    one; `restore` repairs a crash between the two renames. OSError where the disk is full.
    """
    temporary, old = (folder.with_name(folder.name + suffix) for suffix in (".tmp", ".old"))
    first = rank_and_world()[0] == 0
    if first:
        for leftover in (temporary, old):
            shutil.rmtree(leftover, ignore_errors=True)
        temporary.mkdir(parents=True)
    if c.parallel != "fsdp":
        model.save_pretrained(temporary)
    elif fills_shards(type(model)):
        model.save_pretrained(temporary, first)
    else:
        with evaluation.replaced(model, lambda shard: shard.full_tensor()):
            if first:
                model.save_pretrained(temporary)
    if not first:
        return
    tokenizer.save(temporary)
    about = {"method": c.method, "prefixes": c.prefixes, "dataset": c.dataset, "step": step}
    write_json(temporary / "dsbs.json", {**about, "valid_accuracy": accuracy})
    (temporary / "README.md").write_text(model_card(c, step, accuracy))
    for path in [*temporary.iterdir(), temporary]:
        fsync(path)
    if folder.exists():
        os.replace(folder, old)
    os.replace(temporary, folder)
    fsync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def restore(folder: Path) -> None:
    """Renames FOLDER.old back where a crash in `save_student` left no FOLDER."""
    old = folder.with_name(folder.name + ".old")
    if old.exists() and not folder.exists():
        os.replace(old, folder)


def best_so_far(out: Path, state: dict) -> tuple[float, int]:
    """Returns the validation accuracy (0 to 1) and the step of `best/`; (-1, 0) where none counts.

    A student of a later step than `state` does not count: the run was killed between that
    evaluation and the next state, or an older state was put back; it evaluates that step again.
    Repairs a crash in `save_student`. UserError where metrics.jsonl has an evaluation and `best/`
    is gone.
    """
    restore(out / "best")
    path = out / "best" / "dsbs.json"
    if path.exists():
        about = json.loads(path.read_text())
        if about["step"] <= state["step"]:
            return about["valid_accuracy"], about["step"]
    elif state["metrics_bytes"]:
        logged = (out / "metrics.jsonl").read_bytes()[: state["metrics_bytes"]]
        if b'"valid_accuracy"' in logged:
            raise UserError(f"{out / 'best'} is gone; bring it back, or start again with another "
                            "--out")  # fmt: skip
    return -1.0, 0


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


def fsync(path: Path) -> None:
    """Waits until a file, or a folder's list of files, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def latest_state(out: Path) -> Path | None:
    """The folder of the newest complete state, `state/step-N`; None where there is none yet."""
    return max((out / "state").glob("step-*[0-9]"), default=None)


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


def save_state(
    c: Config, out: Path, step: int, model: nn.Module, optimizer, metrics_bytes: int
) -> float:
    """Writes `state/step-N/` and removes the state before it. Returns the seconds that it took.

    `metrics_bytes` is the size of `metrics.jsonl`. All ranks of a sharded model call this and write
    their shards; otherwise rank 0 alone calls it. The folder gets its name after everything in it
    is on the disk, so that a folder with that name is a complete state, whenever the power fails.
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
        write_json(temporary / "state.json", {
            "step": step, "metrics_bytes": metrics_bytes, "threads": torch.get_num_threads(),
            "world": rank_and_world()[1],
        })  # fmt: skip
        for path in [*temporary.iterdir(), temporary]:
            fsync(path)
        os.replace(temporary, folder)
        fsync(root)  # the rename is on the disk too: only now may the state before it go
        for other in root.glob("step-*"):
            if other != folder:
                shutil.rmtree(other)
    if sharded:
        dist.barrier()
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
    folder = from_rank_0(lambda: latest_state(out))
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
        return [r for r in given if r not in NAMED]
    source = next((r for r in given if r in NAMED), c.rationales)
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
    missing = []
    if c.weights != "random" and not Path(c.weights).is_dir():
        name = f"t5-v1_1-{c.size}"
        missing.append(
            f"--weights {c.weights} does not exist; fetch it with `hf download google/{name} "
            f"--local-dir weights/{name}`, or allowed: another Hugging Face T5 folder, or random "
            "(untrained)"
        )
    for source, paths in input_files(c).items():
        lost = [str(path) for path in dict.fromkeys(paths) if not path.is_file()]
        if lost:
            more = f" and {len(lost) - 3} more" if len(lost) > 3 else ""
            missing.append(f"{', '.join(lost[:3])}{more}: No such file; from {source}")
    if missing:
        raise UserError("; and ".join(missing))


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
    test: list[Example] | None
    majority: str  # the most frequent training label
    notes: list[str]  # lines for the user: counts of examples, rows, truncation


def prepare(c: Config) -> Data:
    """Reads the splits, chooses the training examples and turns them into rows of token ids.

    Every rank does this for itself, with the same result. UserError where no training example has
    the wanted label, none has a rationale that the method needs, or valid or test has no label.
    """
    folder = HERE / "demo" if c.weights == "random" else Path(c.weights)
    tokenizer = evaluation.load_tokenizer(folder)
    counts = Counter()

    def load(split: str, counts: Counter | None = None) -> list[Example]:
        source = split_rationales(c, split)
        return load_dataset(c.dataset, split, c.data_root, source, counts, c.augment)

    # The splits; valid and test must have labels to score against.
    everything, valid = load("train", counts), load("valid")
    test = load("test") if has_split(c.dataset, "test", c.data_root) else None
    for split, examples in (("valid", valid), ("test", test)):
        if examples and set(evaluation.gold_labels(examples)[1]) == {None}:
            raise UserError(f"no example of {split} has a label, neither human nor the teacher's: "
                            "nothing to score; give --rationales with the teacher's answers to it, "
                            "or a file with labels")  # fmt: skip
    # The examples to train on: a seeded fraction, with the wanted label.
    own = fraction_of(everything, c.fraction, [c.seed, 1])
    more = augmenting(c, counts) if c.augment else []
    examples = own + more
    usable = [e for e in examples if wanted_label(e, c.labels) is not None]
    if not usable:
        raise UserError(
            f"none of {len(examples)} training examples has a {c.labels} label; "
            "give --rationales that carry teacher labels, or other --labels"
        )
    bare = sum(not e.rationale for e in usable)
    if c.method != "standard" and bare == len(usable):
        raise UserError(
            f"--method {c.method} needs rationales and no training example has one; "
            "give --rationales, or --method standard"
        )
    gold = [e.label for e in everything + valid + (test or [])]
    labels = [*gold, *(wanted_label(e, c.labels) for e in usable)]
    warnings = check_labels(get_task(c.dataset), tokenizer, labels, [e.input for e in everything])
    # One row for each example and task, as token ids; and what a user should know about them.
    made = make_rows(usable, c.method, c.labels, c.prefixes, c.dataset)
    rows = tokenize_rows(made, tokenizer)
    texts = (text for row in made if rows.unknown_tokens for text in (row.source, row.target))
    unknown = " ".join(unknown_characters(texts, tokenizer))

    def share(part: int, whole: int) -> str:
        return f"{part:,} ({100 * part / max(whole, 1):.2f} %)"

    notes = [
        f"data: {c.dataset}, {len(own):,} of {len(everything):,} training examples "
        f"(fraction {c.fraction:g}), {len(valid):,} valid, {len(test or []):,} test"
        + (f"; {len(more):,} of {c.augment} with the teacher's labels" if more else ""),
        f"left out, no {c.labels} label: {len(examples) - len(usable):,}; "
        f"without rationale: {bare if c.method != 'standard' else 0:,}; "
        f"teacher labels outside the set: {counts['teacher_labels_dropped']:,}; "
        f"teacher answers without an example: {counts['teacher_ids_unmatched']:,}",
        f"rows: {len(made):,}; truncated sources {share(rows.truncated_sources, len(made))}, "
        f"targets {share(rows.truncated_targets, len(made))}; "
        f"unknown tokens {share(rows.unknown_tokens, rows.total_tokens)}"
        + (f", above all of {unknown}" if unknown else ""),
        *warnings,
    ]
    if counts["labels_stripped"]:
        notes.append(f"warning: space around {counts['labels_stripped']:,} labels was cut")
    majority = Counter(wanted_label(e, c.labels) for e in usable).most_common(1)[0][0]
    return Data(tokenizer, rows, [e.id for e in usable], valid, test, majority, notes)


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
            parallelize(model, c).to_empty(device=own_device(c))
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
        expected = parameters(type(model)(config))
    if not expected / 2 <= parameters(model) <= 2 * expected:
        raise UserError(
            f"--size {c.size} has about {expected:,} parameters, and --weights {c.weights} "
            f"{parameters(model):,}; give the size of these weights, or weights of this size"
        )


def fills_shards(student: type[nn.Module]) -> bool:
    """Can this class read and write a sharded model's weights, as T5 does?"""
    return hasattr(student, "load_weights")


def own_device(c: Config) -> torch.device:
    """Returns this process's device: the CPU, or the GPU that `eval.processes` made current."""
    return torch.device(c.device, torch.cuda.current_device() if c.device == "cuda" else None)


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


class Signals:
    """Notes the first signal that asks the run to stop; the loop then saves and stops.

    `got` is its number, or 0. A second Ctrl-C, more than a second later, exits at once and saves
    nothing. A signal that is ignored at the start (nohup) stays ignored. Slurm can send SIGUSR1.
    """

    def __init__(self) -> None:
        self.got, self.time = 0, 0.0

    def __enter__(self) -> "Signals":
        caught = [s for s in STOPPING if signal.getsignal(s) != signal.SIG_IGN]
        self.before = {s: signal.signal(s, self.note) for s in caught}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def note(self, number: int, _) -> None:
        # A terminal's Ctrl-C comes twice under torchrun, within a second; a later one is a user's.
        if self.got == number == signal.SIGINT and time.monotonic() - self.time > 1:
            os._exit(128 + number)
        if not self.got:
            self.got, self.time = number, time.monotonic()


def to_tensors(arrays: dict[str, np.ndarray], device: torch.device) -> dict[str, Tensor]:
    """Arrays on the device; a GPU copies them from pinned memory while the host goes on."""
    tensors = {key: torch.from_numpy(array) for key, array in arrays.items()}
    if device.type == "cuda":
        tensors = {key: tensor.pin_memory() for key, tensor in tensors.items()}
    return {key: tensor.to(device, non_blocking=True) for key, tensor in tensors.items()}


def decoder_inputs(model: nn.Module, labels: Tensor) -> Tensor:
    """(B, T) labels, -100 where there is none -> (B, T) ids: the start token, then the labels but
    the last, PAD for -100. The ids are those that the student's own `generate` uses; 0 is T5's."""
    config = getattr(getattr(model, "module", model), "config", None)  # DDP wraps the model
    ids = [getattr(config, name, 0) for name in ("decoder_start_token_id", "pad_token_id")]
    return shift_right(labels, *ids)


def forward_backward(
    model: nn.Module, batch: dict[str, Tensor], counts: Tensor, c: Config, scale: int
) -> Tensor:
    """Runs one micro-batch forward and backward; adds `scale` times its gradient to `.grad`.

    batch: input_ids, attention_mask (B, S), labels (B, T), tasks (B,), all int64. counts (tasks,):
    each task's target tokens in the whole step. Returns (tasks + 1,) float32, detached: what this
    micro-batch adds to each task's loss of the step, and to their weighted sum L (Eq. 3).
    """
    labels = batch["labels"]
    with autocast(counts.device, c.precision):
        logits = model(batch["input_ids"], batch["attention_mask"], decoder_inputs(model, labels))
    losses = multitask_loss(logits, labels, batch["tasks"], counts, c.lam)
    (losses.total * scale).backward()
    return torch.cat([losses.each, losses.total[None]]).detach()


def train_step(
    model, optimizer, c: Config, data: Data, step: int, device: torch.device, stop: int
) -> tuple[dict, int]:
    """Runs one optimizer step, `step` from 0; `stop` is the signal that this rank got, or 0.

    Returns a line of `metrics.jsonl`, and the signal that any rank got, or 0. The line: step (from
    1); each task's loss and their weighted sum, in nats a target token, over all ranks; lr; norm of
    the gradient before clipping; examples and tokens (unpadded) a second, over all ranks; memory.
    RunError on all ranks where the loss or the norm is not finite; then nothing has changed.
    """
    start, rows = time.monotonic(), data.rows
    (rank, world), n = rank_and_world(), len(TARGETS)

    # The step's rows, and this rank's micro-batches. Every rank computes the same division.
    examples = step_examples(rows.n_examples, c.batch_size, c.seed, step)
    row_ids = rows.rows_of(examples)  # of each example its rows of all tasks
    tasks, multiple = rows.tasks[row_ids], evaluation.MULTIPLE[device.type]
    sources, targets = rows.lengths(row_ids)
    lengths = round_up(sources, multiple), round_up(targets, multiple)
    overhead = OVERHEAD[device.type]
    batches = micro_batches(*lengths, tasks, c.micro_tokens, world, overhead)[rank]

    # What must be known before the first backward pass, copied to the device at once.
    uploaded = to_tensors({
        # Each task's target tokens in the whole step: the denominators of Eq. 1 and 4.
        "counts": np.array([targets[tasks == task].sum() for task in range(n)]),
        # Summed over ranks: each task's loss, L, and how many ranks got each signal.
        "sums": np.float32([0] * (n + 1) + [stop == number for number in STOPPING]),
    }, device)  # fmt: skip
    counts, sums = uploaded["counts"], uploaded["sums"]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)

    # Learning rate and dropout follow from the step alone, so a resumed run has the same.
    lr = c.lr * (1 - step / c.steps)  # linear to 0, no warm-up
    for group in optimizer.param_groups:
        group["lr"] = lr
    dropout_seed = np.random.SeedSequence([c.seed, step, rank]).generate_state(1, np.uint64)
    torch.manual_seed(int(dropout_seed[0]))

    # Forward and backward; gradients add up over the micro-batches.
    for i, members in enumerate(batches):
        batch = to_tensors(collate(rows, row_ids[members], multiple), device)
        # The loss is one sum over all ranks, and DDP and FSDP average gradients: times world. DDP
        # averages once, in the last micro-batch; FSDP in each, since it keeps only shards.
        wait = c.parallel == "ddp" and i < len(batches) - 1
        with model.no_sync() if wait else contextlib.nullcontext():
            sums[: n + 1] += forward_backward(model, batch, counts, c, world)

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
            f"{', '.join(data.ids[i] for i in examples)}. This step changed nothing; lower --lr or "
            "correct the examples"
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
        return {
            "peak_memory_bytes": torch.cuda.max_memory_allocated(device),
            "reserved_memory_bytes": torch.cuda.max_memory_reserved(device),
        }
    unit = 1 if sys.platform == "darwin" else 1024
    return {"peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}


def log_line(c: Config, m: dict, seconds_left: float) -> str:
    """One line for people; `metrics.jsonl` has every step."""
    return (
        f"step {m['step']}/{c.steps}  label {m['label_loss']:.4f}  rationale "
        f"{m['rationale_loss']:.4f}  lr {m['lr']:.2e}  norm {m['grad_norm']:.2f}  "
        f"{m['examples_per_second']:.0f} examples/s  {m['tokens_per_second']:.0f} tokens/s  "
        f"{m['peak_memory_bytes'] / 2**30:.2f} GiB  left {timedelta(seconds=int(seconds_left))}"
    )


def first_lines(c: Config, data: Data, model: nn.Module, done: int) -> str:
    """What a run prints before its first step: data, model, steps, disk space. All is float32: a
    state has weights and two moments, 12 bytes a parameter, a student 4."""
    size = parameters(model)
    epochs = c.steps * c.batch_size / data.rows.n_examples
    return "\n".join(data.notes) + (
        f"\nmodel: {c.weights} ({c.size}), {size:,} parameters; {c.precision} on "
        f"{rank_and_world()[1]} x {c.device}, {c.parallel}; {torch.get_num_threads()} threads\n"
        f"steps: {c.steps:,} of {c.batch_size} examples ({epochs:.1f} epochs), micro-batches of at "
        f"most {c.micro_tokens:,} tokens; valid every {c.eval_every}, state every {c.save_every}"
        + (f"; continuing after step {done}" if done else "")
        + f"\ndisk: a state {12 * size / 1e6:,.0f} MB, best and last "
        f"{4 * size / 1e6:,.0f} MB each\n"
        f"cost: {-(-c.steps // c.eval_every):,} evaluations of {len(data.valid):,} examples, "
        f"at least {-(-c.steps // c.save_every):,} saved states; training waits for each"
    )


def train(c: Config, out: Path, data: Data, model: nn.Module, signals: Signals) -> None:
    """Trains from the newest state, or from the start, to the last step.

    Moves `model` to the device and changes it; writes `state/`, `metrics.jsonl`, `best/` and
    `last/` in `out`. After a signal to any rank it saves and raises Interrupted on all. RunError
    where a loss or gradient is not finite; UserError where `best/` is gone.
    """
    rank, world = rank_and_world()
    device = own_device(c)
    model = model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=c.lr, weight_decay=0.0, fused=True)
    state = load_state(c, out, model, optimizer)
    best, _ = from_rank_0(lambda: best_so_far(out, state))
    step = began_at = state["step"]
    if world == state["world"]:
        torch.set_num_threads(state["threads"])  # another number would give other bits
    saves = c.parallel == "fsdp" or rank == 0  # each rank of a sharded model saves its shards
    print0(first_lines(c, data, model, step))
    student = Student(model, data.tokenizer, c.method, c.prefixes, c.dataset, device, c.precision)
    student.interrupted = lambda: signals.got
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

    metrics_file = open(out / "metrics.jsonl", "ab") if rank == 0 else None  # noqa: SIM115
    if metrics_file:  # lines after the state belong to steps that run again
        metrics_file.truncate(state["metrics_bytes"])

    def log(row: dict) -> None:
        if metrics_file:
            metrics_file.write(json.dumps(row).encode() + b"\n")
            metrics_file.flush()

    bar = tqdm(total=c.steps, initial=step, disable=rank > 0 or not sys.stderr.isatty())
    began, shown = time.monotonic(), -math.inf
    with bar:
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
            metrics, stop = train_step(wrapped, optimizer, c, data, step, device, signals.got)
            step += 1
            log(metrics)
            bar.update()
            if time.monotonic() - shown > 10 or step == c.steps:
                shown = time.monotonic()
                left = (shown - began) / (step - began_at) * (c.steps - step)
                print0(log_line(c, metrics, left))

            # Save the state if it is due: also before an evaluation, which a signal may end.
            due = step % c.save_every == 0 or step % c.eval_every == 0 or step == c.steps or stop
            if due and saves:
                written = 0
                if metrics_file:
                    fsync(out / "metrics.jsonl")
                    written = metrics_file.tell()  # a line was just written: this is the file's end
                seconds = save_state(c, out, step, model, optimizer, written)
                if c.parallel == "fsdp" or seconds > 10:
                    print0(f"state of step {step} saved in {seconds:.1f} s")
            if stop:
                if world > 1:
                    dist.barrier()  # all ranks exit together, once rank 0 has saved
                raise Interrupted(stop)
    if metrics_file:
        metrics_file.close()
    if saves:
        save_student(c, model, data.tokenizer, out / "last", c.steps, accuracy)


def finish(c: Config, out: Path, data: Data, model: nn.Module, signals: Signals) -> dict:
    """Scores the best student on test, once, and writes `predictions.jsonl` and `result.json`."""
    rank, world = rank_and_world()
    device, best = own_device(c), out / "best"
    if world > 1:
        dist.barrier()  # best/ is written
    if c.parallel == "fsdp" and fills_shards(type(model)):
        model.load_weights(best)
        student = Student(
            model, data.tokenizer, c.method, c.prefixes, c.dataset, device, c.precision
        )
    else:
        student = evaluation.load_student(best, device, c.precision)
    student.interrupted = lambda: signals.got
    summary = {"accuracy": None, "n": 0}
    if data.test is not None:
        summary, rows = evaluation.evaluate(student, data.test, progress="test")
        if rank == 0:
            write_jsonl(out / "predictions.jsonl", rows)
    # The rival that always gives the most frequent training label, on the split that is scored.
    kind, gold = evaluation.gold_labels(data.valid if data.test is None else data.test)
    scored = [label for label in gold if label is not None]
    task = get_task(c.dataset)
    hits = sum(is_correct(task, data.majority, label) for label in scored)
    about = json.loads((best / "dsbs.json").read_text())
    result = {
        "valid_accuracy": about["valid_accuracy"], "test_accuracy": summary["accuracy"],
        "n_test": summary["n"], "best_step": about["step"], "labels": kind,
        "majority_accuracy": hits / len(scored), "parameters": parameters(model),
        **{key: getattr(c, key) for key in ("dataset", "size", "method", "fraction", "seed")},
    }  # fmt: skip
    if rank == 0:
        write_json(out / "result.json", result)
    return result


def demo_means(c: Config, accuracy: float) -> str:
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
    return f"\nthis run {accuracy:.3f}; means on test (standard error): {means}"


def show_result(c: Config, out: Path, result: dict) -> None:
    """The last lines of a run: what came out, where it is, how to use it."""
    test = result["test_accuracy"]
    print0(
        f"valid accuracy {result['valid_accuracy']:.4f} (best of all evaluations, step "
        f"{result['best_step']})\n"
        + (
            f"test accuracy  {test:.4f} ({result['n_test']} examples, {result['labels']} labels; "
            if test is not None
            else "test accuracy  none: the data set has no test split ("
        )
        + f"the most frequent training label alone: {result['majority_accuracy']:.4f})\n"
        f"the student is in {out / 'best'}; use it with\n"
        f"  python eval.py {out / 'best'} --predict inputs.txt"
        + (" --explain" if METHODS[c.method].explains else "")
        + (demo_means(c, test) if test is not None else "")
    )


# ------------------------------------------------------------------------------- command line


def add_flag(parser: argparse.ArgumentParser, setting: Field) -> None:
    """The flag of one field of Config; its type follows from the annotation."""
    kinds = [setting.type, *get_args(setting.type)]
    how = {"type": next((kind for kind in (int, float) if kind in kinds), str)}
    if bool in kinds:
        how = {"action": argparse.BooleanOptionalAction}
    elif list[str] in kinds:
        how = {"nargs": "+"}
    name = setting.name.replace("_", "-")
    parser.add_argument(f"--{name}", help=setting.metadata["help"], **how)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The flags that were given, and no others: `Config` and `resolve` know the defaults."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], argument_default=argparse.SUPPRESS
    )
    for setting in fields(Config):
        add_flag(parser, setting)
    add = parser.add_argument
    add("--timeout", type=float, help="seconds that processes wait for each other; default 600")
    add("--plan", action="store_true", help="print memory, steps and time; train nothing")
    add("--gpus", type=int, help="with --plan; default 1")
    add("--json", action="store_true", help="with --plan: print one JSON object")
    add("--out", help="run folder; default runs/ and a name made of the settings")
    add("--resume", action="store_true", help="continue the run folder, or start it")
    return parser.parse_args(argv)


def remembered(given: dict, out: str | None, resume: bool) -> dict:
    """Returns `given`, with the flags that were not given taken from OUT/run.json.

    It does so only with --resume, --out and a run.json. `parallel` is not taken from it, since the
    number of processes may have changed. Every rank reads the file: there is no process group yet.
    UserError where it cannot be used.
    """
    path = Path(out or "", "run.json")
    if not (resume and out and path.exists()):
        return given
    try:
        before = json.loads(path.read_text())["config"]
        given = {k: v for k, v in before.items() if k != "parallel"} | given
        Config(**given)
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{path} is damaged, or another version's: {error!r}") from None
    return given


def run(given: dict, argv: list[str], out: str | None, resume: bool, sized: bool) -> int:
    """Trains and scores a run, or shows a finished one; returns 0, or 128 + n after signal n.

    given: the flags that were given, by Config's names. argv: the command line, for run.json.
    sized: was --size given?
    UserError, RunError and OSError where the run cannot be started or continued.
    """
    c = resolve(Config(**given))
    check_files(c)
    out = Path(out or run_name(c))
    with contextlib.ExitStack() as held:

        def claim() -> dict | None:
            about = provenance(c)
            held.enter_context(lock(out / ".lock"))
            return open_run(c, out, about, argv, resume)

        # An existing folder is checked before the data are read, which may take minutes; a new one
        # is made after that, so that a mistake in the data makes no folder.
        exists = from_rank_0((out / "run.json").exists)
        result = from_rank_0(claim) if exists else None
        if result:
            first = from_rank_0(lambda: json.loads((out / "run.json").read_text())["argv"])
            again = command(*(word for word in first if word != "--resume"), "--out", f"{out}-2")
            print0(f"{out} is finished; to repeat it elsewhere:\n  {again}")
        else:
            data = prepare(c)
            model = build_model(c, data.tokenizer)
            if sized and c.weights != "random" and hasattr(type(model), "untrained_config"):
                check_size(c, model, data.tokenizer)
            if not exists:
                from_rank_0(claim)
            print0(f"run folder: {out}")
            signals = held.enter_context(Signals())
            try:
                train(c, out, data, model, signals)
                result = finish(c, out, data, model, signals)
            except Interrupted as stop:
                print0(f"stopped by signal {stop.number}; the state is saved; continue with\n"
                       f"  {command('--out', str(out), '--resume')}")  # fmt: skip
                return 128 + stop.number
        show_result(c, out, result)
    return 0


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status: 0, 2 for a user's mistake, 1 for a run that
    could not continue, 128 + n after signal n. Errors are printed as one line."""
    argv = sys.argv[1:] if argv is None else argv
    given = vars(parse_args(argv))
    out, resume = given.pop("out", None), given.pop("resume", False)
    timeout, only_plan = given.pop("timeout", evaluation.TIMEOUT), given.pop("plan", False)
    gpus, as_json = given.pop("gpus", None), given.pop("json", False)

    def program() -> int:
        if only_plan:
            from scripts import plan

            return plan.run(given, 1 if gpus is None else gpus, as_json)
        if gpus is not None or as_json:
            raise UserError("--gpus and --json are for --plan; processes are torchrun's to start")
        if not 0 < timeout < 10**7:
            raise UserError(f"--timeout {timeout}: must be a positive number of seconds")
        settings = remembered(given, out, resume)
        try:
            with processes(choose_device(settings.get("device")), timeout):
                return run(settings, argv, out, resume, "size" in given)
        except (OSError, SafetensorError) as error:  # a full disk, above all
            more = "solve this, then repeat the command with --resume; saved states are kept"
            raise RunError(f"{error}; {more}") from None

    return exit_status(program)


if __name__ == "__main__":
    # scripts/plan.py imports this file as `train`. Run that module, so that each class exists once.
    from importlib import import_module

    exit_process(import_module("train").main())
