"""Train a student: `python train.py`, or `torchrun --nproc_per_node=16 train.py --size xxl`.

This file owns the run's configuration, process groups, the optimizer and its schedule, the loop,
checkpoints and exact resume. It knows nothing of prompts or scoring rules.

A step: N examples -> their rows -> micro-batches of similar length, dealt to the ranks ->
loss (Eq. 3), already divided by the whole step's target tokens -> one clipped AdamW step.

What makes a resumed run equal to an uninterrupted one, bit for bit: the data order is a function
of (seed, step), dropout of (seed, step, rank), and a saved state holds weights, AdamW's moments,
the best accuracy so far and the number of threads. It is written beside, in a folder of its own,
and taken into use by replacing one small file.
"""

import argparse
import contextlib
import fcntl
import hashlib
import json
import math
import os
import platform
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from pathlib import Path
from typing import Any

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
    collate,
    data_files,
    get_task,
    has_split,
    is_correct,
    load_dataset,
    micro_batches,
    round_up,
    step_examples,
    tokenize_rows,
)
from dsbs import METHODS, PREFIXES, TARGETS, make_rows, multitask_loss, wanted_label
from eval import (
    MULTIPLE,
    NAMED,
    RunError,
    Student,
    autocast,
    choose_device,
    exit_status,
    leave,
    print0,
    processes,
    rank_and_world,
    replaced,
)
from t5 import (
    T5,
    T5Config,
    Uninitialised,
    load_weights,
    open_checkpoint,
    shift_right,
    write_json,
)

HERE = Path(__file__).parent
DEMO_VOCABULARY = HERE / "demo" / "spiece.model"
MAX_TARGET = 256  # the released code's cut

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
# What a forward and backward pass costs besides its places, in places. On a GPU: launches, casts
# of weights, sums of gradients (estimated; about the same for all sizes); on a CPU: the sums.
OVERHEAD = {"cuda": 1024, "cpu": 128}


# ------------------------------------------------------------------------------- configuration


@dataclass
class Config:
    """A run, resolved: what `run.json` keeps. None is filled in by `resolve`."""

    size: str = "tiny"
    weights: str | None = None  # a Hugging Face folder, or "random"
    dataset: str | None = None
    data_root: str = "datasets"
    method: str = "step-by-step"
    labels: str = "human"
    rationales: str | list[str] | None = None
    prefixes: str = "paper"
    fraction: float = 1.0  # of the training examples
    augment: str | None = None  # asdiv: inputs without labels, for which the teacher's stand in
    augment_fraction: float = 1.0  # of those
    steps: int | None = None
    batch_size: int | None = None  # examples in an optimizer step, over all processes
    lr: float | None = None
    lam: float = 1.0  # lambda of Eq. 3
    dropout: float = 0.1
    seed: int = 0
    eval_every: int | None = None
    device: str | None = None
    precision: str | None = None
    # These may change when a run is resumed: they do not change what it computes, but for which
    # numbers of dropout's random stream fall to which row, where micro-batches change.
    save_every: int | None = None
    micro_tokens: int | None = None  # places of a micro-batch on one device, padding included
    parallel: str | None = None
    recompute: bool | None = None  # activations, block by block, in the backward pass
    compile: bool = False  # the blocks, by torch.compile: the same sums in another order


MAY_CHANGE = {"save_every", "micro_tokens", "parallel", "recompute", "compile"}


def one_of(flag: str, value: str, allowed: Iterable[str]) -> None:
    """UserError unless the flag's value is an allowed one."""
    if value not in allowed:
        raise UserError(f"--{flag} {value!r} is unknown; allowed: {', '.join(allowed)}")


def resolve(config: Config) -> Config:
    """Fills in what follows from the rest and checks it; UserError for what cannot be run."""
    c = Config(**asdict(config))
    one_of("size", c.size, RECIPES)
    one_of("method", c.method, METHODS)
    one_of("labels", c.labels, ("human", "teacher"))
    one_of("prefixes", c.prefixes, PREFIXES)
    c.weights = c.weights or ("random" if c.size == "tiny" else f"weights/t5-v1_1-{c.size}")
    c.dataset = c.dataset or ("demo" if c.size == "tiny" else "esnli")
    get_task(c.dataset)
    if c.dataset == "asdiv":
        raise UserError("--dataset asdiv has no labels and no test split: it only augments svamp; "
                        "allowed: the other names, or a folder")  # fmt: skip
    if isinstance(c.rationales, str):
        c.rationales = [c.rationales]
    uses = c.method != "standard" or c.labels == "teacher"
    c.rationales = evaluation.rationale_source(c.rationales, c.dataset, uses)
    if c.augment:
        one_of("augment", c.augment, ("asdiv",))
        if get_task(c.dataset).scorer != "arithmetic":
            raise UserError(f"--augment {c.augment} with --dataset {c.dataset}: its answers are "
                            "equations; allowed: svamp")  # fmt: skip
        if not split_rationales(c, "augment"):
            raise UserError(f"--augment {c.augment} needs a teacher's answers to it; annotate it "
                            f"with `python teacher.py --dataset {c.augment}` and add the file to "
                            f"--rationales, which may be `palm teacher/{c.augment}.train.jsonl`")
    elif isinstance(c.rationales, list) and set(c.rationales) & set(NAMED):
        raise UserError(f"--rationales {' '.join(c.rationales)}: allowed are one of "
                        f"{', '.join(NAMED)}, or files; both together are for --augment")
    for name, value in RECIPES[c.size].items():
        if getattr(c, name) is None:
            setattr(c, name, value)
    c.save_every = c.eval_every if c.save_every is None else c.save_every
    device = choose_device(c.device)
    c.device = device.type
    c.precision = c.precision or ("bf16" if device.type == "cuda" else "fp32")
    one_of("precision", c.precision, ("fp32", "bf16"))
    world = int(os.environ.get("WORLD_SIZE", 1))
    one_of("parallel", c.parallel or "none", ("none", "ddp", "fsdp"))
    if c.parallel == "none" and world > 1:
        raise UserError(f"--parallel none with {world} processes would train {world} models; "
                        "allowed: ddp, fsdp")
    if world == 1:
        c.parallel = "none"
    elif c.parallel is None:
        c.parallel = default_parallel(c.size)
    counted = ("steps", "batch_size", "eval_every", "save_every", "micro_tokens")
    bounds = {name: (getattr(c, name) >= 1, "at least 1") for name in counted}
    bounds |= {  # also refuses NaN
        "seed": (c.seed >= 0, "at least 0"),
        "fraction": (0 < c.fraction <= 1, "above 0 and at most 1"),
        "augment_fraction": (0 < c.augment_fraction <= 1, "above 0 and at most 1"),
        "lr": (0 < c.lr < math.inf, "a positive number"),
        "lam": (0 <= c.lam < math.inf, "0 or a positive number"),
        "dropout": (0 <= c.dropout < 1, "at least 0 and below 1"),
    }
    for name, (fine, allowed) in bounds.items():
        if not fine:
            raise UserError(f"--{name.replace('_', '-')} {getattr(c, name)}: must be {allowed}")
    return c


def default_parallel(size: str) -> str:
    """For several processes: weights, gradients and AdamW's moments, 16 bytes a parameter, of xl
    (46 GB) and xxl (178 GB) are sharded; smaller models have a copy on each GPU."""
    return "fsdp" if size in ("xl", "xxl") else "ddp"


def run_name(c: Config) -> str:
    """`runs/` folder named after the settings: the few that are always there, then each that
    differs from what would have been chosen without it."""
    default = resolve(Config(size=c.size, dataset=c.dataset, method=c.method, labels=c.labels))
    parts = [Path(c.dataset).name, c.size, c.method, c.labels]
    skip = MAY_CHANGE | {"size", "dataset", "method", "labels", "seed", "data_root", "device"}
    for field in fields(c):
        name, value = field.name, getattr(c, field.name)
        if name not in skip and value != getattr(default, name):
            values = value if isinstance(value, list) else [str(value)]
            parts.append(name.replace("_", "-") + "-" + "+".join(Path(v).name for v in values))
    return "runs/" + "_".join([*parts, f"seed-{c.seed}"])


def command(c: Config, out: str, resume: bool = False) -> str:
    """The command line that starts this run again."""
    local = os.environ.get("LOCAL_WORLD_SIZE", "1")
    words = ["python"] if local == "1" else ["torchrun", f"--nproc_per_node={local}"]
    words.append("train.py")
    default = asdict(Config())
    default |= {name: RECIPES[c.size][name] for name in ("micro_tokens", "recompute")}
    for name, value in asdict(c).items():
        flag = name.replace("_", "-")
        if value == default[name] or name in ("save_every", "parallel"):
            continue
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", *map(str, value if isinstance(value, list) else [value])]
    return shlex.join([*words, "--out", out, *(["--resume"] if resume else [])])


# --------------------------------------------------------------------------------- run folder


def agreed(work: Callable[[], Any]) -> Any:
    """Rank 0's value of work(), or its UserError, on every rank: one process touches the files."""
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


def lock(folder: Path, held: contextlib.ExitStack) -> None:
    """Claims the folder for as long as `held`; the system lets go of it even after SIGKILL."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = held.enter_context(open(folder / ".lock", "w"))
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(
            f"{folder} is in use by another process; wait for it, or give another --out"
        ) from None
    except OSError as error:
        raise UserError(f"--out {folder}: {error.strerror}; give a folder to write to") from None


def sha256(path: Path) -> str:
    """Of a file's contents."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def weights_hashes(folder: Path) -> dict[str, str]:
    """sha256 of a weights folder's config, vocabulary, index and safetensors headers (names,
    shapes and offsets: the whole of an 11B model would take minutes to read)."""
    hashes = {}
    for path in sorted(folder.glob("*")):
        if path.suffix == ".safetensors":
            with open(path, "rb") as file:
                size = int.from_bytes(file.read(8), "little")
                hashes[path.name] = hashlib.sha256(file.read(min(size, 1 << 27))).hexdigest()
        elif path.suffix == ".bin":
            hashes[path.name] = f"{path.stat().st_size} bytes"
        elif path.name in ("config.json", "spiece.model") or path.name.endswith(".index.json"):
            hashes[path.name] = sha256(path)
    return hashes


def provenance(c: Config) -> dict:
    """All that decides a run's result besides its configuration: data, weights, code, versions."""
    paths = set(map(Path, split_rationales(c, "augment")))
    for split in ["train", "valid"] + ["test"] * has_split(c.dataset, "test", c.data_root):
        paths.update(data_files(c.dataset, split, c.data_root, split_rationales(c, split)))
    if c.augment:
        paths.update(data_files(c.augment, "train", c.data_root))
    facts = [path.with_name("task.json") for path in paths if path.name == "train.jsonl"]
    paths.update(path for path in facts if path.is_file())
    weights = {"spiece.model": sha256(DEMO_VOCABULARY)}
    if c.weights != "random":
        weights = weights_hashes(Path(c.weights))
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=HERE, capture_output=True, text=True)
    return {
        "data_sha256": {str(p): sha256(p) if p.is_file() else None for p in sorted(paths)},
        "weights_sha256": weights,
        "git_sha": git.stdout.strip() or None,
        "versions": {"python": platform.python_version(), "torch": torch.__version__,
                     "numpy": np.__version__},
    }


def open_run(c: Config, out: Path, about: dict, resume: bool) -> dict | None:
    """Claims the run folder: writes `run.json`, or checks that the one there is of this run.

    Returns the result of a finished run, else None. UserError if the folder holds another run,
    or an unfinished one without --resume.
    """
    path = out / "run.json"
    if not path.exists():
        ours = (".lock", "run.json.tmp")  # of a start that was killed
        others = sorted(p.name for p in out.iterdir() if p.name not in ours)
        if others:
            raise UserError(f"{out} is not a run but holds {others[0]!r}; give another --out")
        write_json(path, {"config": asdict(c), **about, "command": command(c, str(out))})
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
        raise UserError(f"{out} holds an unfinished run; continue it with --resume, "
                        "or give another --out")
    return None


def save_student(
    c: Config, model: nn.Module, folder: Path, vocabulary: Path, step: int, accuracy: float
) -> None:
    """A student that `eval.py` and `transformers` load. The new folder is whole before it takes
    the old one's place; a crash between the two renames is mended from the state on resume.
    Of a sharded model all ranks call this and rank 0 writes."""
    beside, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    writes = rank_and_world()[0] == 0
    if writes:
        for leftover in (beside, old):
            shutil.rmtree(leftover, ignore_errors=True)
        beside.mkdir(parents=True)
    if c.parallel != "fsdp":
        model.save_pretrained(beside)
    elif isinstance(model, T5):
        model.save_pretrained(beside, lambda part: part.full_tensor(), writes)
    else:
        with replaced(model, lambda part: part.full_tensor()):
            if writes:
                model.save_pretrained(beside)
    if not writes:
        return
    shutil.copyfile(vocabulary, beside / "spiece.model")
    write_json(beside / "tokenizer_config.json", {
        "tokenizer_class": "T5Tokenizer", "extra_ids": 100, "pad_token": "<pad>",
        "eos_token": "</s>", "unk_token": "<unk>", "model_max_length": evaluation.MAX_SOURCE,
    })  # fmt: skip
    about = {"method": c.method, "prefixes": c.prefixes, "dataset": c.dataset, "step": step}
    write_json(beside / "dsbs.json", about)
    (beside / "README.md").write_text(model_card(c, step, accuracy))
    for path in beside.iterdir():
        fsync(path)
    if folder.exists():
        os.replace(folder, old)
    os.replace(beside, folder)
    shutil.rmtree(old, ignore_errors=True)


def model_card(c: Config, step: int, accuracy: float) -> str:
    """The `README.md` of a student folder."""
    prefix = PREFIXES[c.prefixes]["label"] if METHODS[c.method].prefixed else ""
    return f"""# T5 student, {Path(c.dataset).name}, {c.method}

Trained with Distilling Step-by-Step (Hsieh et al., 2023, https://arxiv.org/abs/2305.02301).

- start: {c.weights} ({c.size}); method {c.method}, {c.labels} labels, seed {c.seed}
- step {step} of {c.steps}, validation accuracy {accuracy:.4f}
- use: `python eval.py THIS_FOLDER --predict inputs.txt`, or `transformers`' AutoTokenizer and
  AutoModelForSeq2SeqLM with the prefix {prefix!r} before the input
- It inherits its teacher's errors and biases (the paper's ethics statement): check before use.
"""


# -------------------------------------------------------------------------------------- state


def fsync(path: Path) -> None:
    """Waits until a file, or a folder's list of files, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def latest_state(out: Path) -> Path | None:
    """The folder of the last state that was saved whole; None where there is none yet."""
    pointer = out / "state" / "latest"
    return pointer.with_name(pointer.read_text()) if pointer.exists() else None


def named_tensors(model: nn.Module, optimizer=None) -> dict[str, Tensor]:
    """Weights, and AdamW's moments if there is an optimizer, by name; of a sharded model this
    rank's parts."""
    tensors = {f"model.{name}": p.detach() for name, p in model.named_parameters()}
    if optimizer:
        for name, p in model.named_parameters():
            for moment in ("exp_avg", "exp_avg_sq"):
                tensors[f"optimizer.{name}.{moment}"] = optimizer.state[p][moment]
    return tensors


@contextlib.contextmanager
def checkpoint_errors() -> Iterator[None]:
    """What torch's checkpoints raise, as an OSError; without its warning that one process is alone,
    which is meant."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except CheckpointException as error:  # the same on all ranks
        rank, (reason, _) = next(iter(error.failures.items()))
        raise OSError(f"rank {rank}: {reason}") from None


def save_tensors(folder: Path, tensors: dict[str, Tensor], sharded: bool) -> None:
    """A sharded checkpoint in safetensors (no pickle): each rank writes its parts, at once."""
    import torch.distributed.checkpoint as dcp  # takes a while to import
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    writer.per_thread_copy_ahead = 0  # else it copies through pinned memory, which torch keeps
    with checkpoint_errors():
        dcp.save(tensors, storage_writer=writer, no_dist=not sharded)


def load_tensors(folder: Path, tensors: dict[str, Tensor], sharded: bool) -> None:
    """Fills tensors, or parts of them, whatever the number of processes that saved them."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    with checkpoint_errors():
        reader = HuggingFaceStorageReader(str(folder))
        dcp.load(tensors, storage_reader=reader, no_dist=not sharded)


def save_state(c: Config, out: Path, step: int, model: nn.Module, optimizer, facts: dict) -> float:
    """Writes `state/step-N/` and then points `state/latest` at it. Of a sharded model the best
    weights are kept as `state/best-N/`, and become a student when training ends. By rank 0 alone
    unless the model is sharded. Returns the seconds that it took."""
    start, sharded, first = time.monotonic(), c.parallel == "fsdp", rank_and_world()[0] == 0
    root = out / "state"
    folder, best = root / f"step-{step:07}", root / f"best-{facts['best_step']:07}"
    new_best = sharded and facts["best_step"] == step
    if first:
        before = latest_state(out)
        for other in root.glob("step-*"):  # what an interrupted save left
            if other != before:
                shutil.rmtree(other)
        folder.mkdir(parents=True)
        if new_best:
            shutil.rmtree(best, ignore_errors=True)
    if sharded:
        dist.barrier()
    save_tensors(folder, named_tensors(model, optimizer), sharded)
    if new_best:
        save_tensors(best, named_tensors(model), sharded)
    if first:
        write_json(folder / "state.json", {"step": step, **facts})
        for place in [folder, best] if new_best else [folder]:
            for path in [*place.iterdir(), place]:  # on the disk before anything points at it
                fsync(path)
        beside = root / "latest.tmp"
        beside.write_text(folder.name)
        fsync(beside)
        os.replace(beside, root / "latest")
        fsync(root)
        for other in [before, *root.glob("best-*")]:
            if other and other != best:
                shutil.rmtree(other, ignore_errors=True)
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
    """Fills the model and the optimizer from the latest state, saved by any number of processes,
    and returns what else was saved; where there is no state yet, what a run starts with."""
    folder = agreed(lambda: latest_state(out))
    if folder is None:
        return {"step": 0, "best": -1.0, "best_step": 0, "world": None, "metrics_bytes": 0}
    facts = json.loads((folder / "state.json").read_text())
    empty_moments(model, optimizer, facts["step"])
    load_tensors(folder, named_tensors(model, optimizer), c.parallel == "fsdp")
    return facts


# --------------------------------------------------------------------------------------- data


def split_rationales(c: Config, split: str) -> str | list[str] | None:
    """What of --rationales feeds train, valid, test, or "augment": the files alone. palm, neox or
    human go before files. Valid and test need a teacher's answers only where the student reads
    them, or where nobody else has labelled the examples."""
    given = c.rationales if isinstance(c.rationales, list) else []
    if split == "augment":
        return [r for r in given if r not in NAMED]
    source = next((r for r in given if r in NAMED), c.rationales)
    unlabelled = c.labels == "teacher" and isinstance(source, list)
    needed = split == "train" or c.method == "rationale-input" or unlabelled
    return source if needed else None


def augmenting(c: Config, counts: Counter) -> list[Example]:
    """That part of ASDiv, its teacher's labels as labels (Figures 7 and 9)."""
    files = split_rationales(c, "augment")
    examples = load_dataset(c.augment, "train", c.data_root, files, counts, c.dataset)
    for example in examples:
        example.label = example.teacher_label
    return fraction_of(examples, c.augment_fraction, [c.seed, 2])


def fraction_of(examples: list[Example], fraction: float, seed: list[int]) -> list[Example]:
    """A seeded prefix of a seeded order: smaller fractions are contained in larger ones."""
    order = np.random.default_rng(seed).permutation(len(examples))
    return [examples[i] for i in np.sort(order[: max(1, round(fraction * len(order)))])]


@dataclass
class Data:
    """Everything that a run reads, tokenised once."""

    tokenizer: Tokenizer
    vocabulary: Path
    rows: TokenRows
    ids: list[str]  # of the training examples, as numbered in `rows`
    valid: list[Example]
    test: list[Example] | None
    majority: str  # the most frequent training label
    notes: list[str]


def prepare(c: Config) -> Data:
    """Reads the splits, takes the fraction, makes rows and token arrays, and counts."""
    vocabulary = DEMO_VOCABULARY if c.weights == "random" else Path(c.weights) / "spiece.model"
    tokenizer = Tokenizer(vocabulary)
    counts = Counter()

    def load(split: str, counts: Counter | None = None) -> list[Example]:
        source = split_rationales(c, split)
        return load_dataset(c.dataset, split, c.data_root, source, counts, c.augment)

    everything, valid = load("train", counts), load("valid")
    test = load("test") if has_split(c.dataset, "test", c.data_root) else None
    for split, examples in (("valid", valid), ("test", test)):
        if examples and set(evaluation.gold_labels(examples)[1]) == {None}:
            raise UserError(f"no example of {split} has a label, neither human nor the teacher's: "
                            "nothing to score; give --rationales with the teacher's answers to it, "
                            "or a file with labels")  # fmt: skip
    own = fraction_of(everything, c.fraction, [c.seed, 1])
    more = augmenting(c, counts) if c.augment else []
    examples = own + more
    usable = [e for e in examples if wanted_label(e, c.labels) is not None]
    if not usable:
        raise UserError(f"none of {len(examples)} training examples has a {c.labels} label; "
                        "give --rationales that carry teacher labels, or other --labels")
    bare = sum(not e.rationale for e in usable)
    if c.method != "standard" and bare == len(usable):
        raise UserError(f"--method {c.method} needs rationales and no training example has one; "
                        "give --rationales, or --method standard")
    made = make_rows(usable, c.method, c.labels, c.prefixes, c.dataset)
    rows = tokenize_rows(made, tokenizer, evaluation.MAX_SOURCE, MAX_TARGET)
    share = lambda part, whole: f"{part:,} ({100 * part / max(whole, 1):.2f} %)"  # noqa: E731
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
        f"unknown tokens {share(rows.unknown_tokens, rows.total_tokens)}",
    ]
    majority = Counter(wanted_label(e, c.labels) for e in usable).most_common(1)[0][0]
    return Data(tokenizer, vocabulary, rows, [e.id for e in usable], valid, test, majority, notes)


# --------------------------------------------------------------------------------------- model


def untrained_config(size: str, tokenizer: Tokenizer) -> T5Config:
    """The shape of that size with the bundled vocabulary's, rounded up for the hardware."""
    return T5Config.preset(size, vocab_size=-(-tokenizer.vocab_size // 64) * 64)


def build_model(c: Config, tokenizer: Tokenizer) -> nn.Module:
    """The student before training: pretrained weights, or that size at random for `random`."""
    torch.manual_seed(c.seed)
    to_shard = c.parallel == "fsdp"

    def shard(model: nn.Module) -> Callable:
        """Of a model without contents: then each rank reads its own rows alone."""
        parallelize(model, c).to_empty(device=own_device(c))
        return own_rows

    if c.weights == "random" and to_shard and issubclass(evaluation.STUDENT, T5):
        with torch.device("meta"), Uninitialised():
            model = evaluation.STUDENT(untrained_config(c.size, tokenizer))
        model.init_weights(c.seed, shard(model))
        to_shard = False
    elif c.weights == "random":
        model = evaluation.STUDENT(untrained_config(c.size, tokenizer))
    elif to_shard and issubclass(evaluation.STUDENT, T5):
        model, to_shard = evaluation.load_model(Path(c.weights), shard), False
    else:
        model = evaluation.load_model(Path(c.weights))
    rows = model.config.vocab_size if hasattr(model, "config") else math.inf  # a fork may lack it
    if rows < tokenizer.vocab_size:
        raise UserError(f"{c.weights}: vocab_size {rows} is smaller than its spiece.model's "
                        f"{tokenizer.vocab_size}; they belong to different models")
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = c.dropout  # whatever config.json says: v1.1's is for pretraining
    return parallelize(model, c) if to_shard else model


def own_device(c: Config) -> torch.device:
    """This process's device: the CPU, or the GPU that `choose_device` made current."""
    return torch.device(c.device, torch.cuda.current_device() if c.device == "cuda" else None)


def parallelize(model: nn.Module, c: Config) -> nn.Module:
    """The same model, made ready for several processes; its backward averages gradients over them.

    ddp: a copy on each. fsdp: each holds a part of every parameter, gradient and moment in float32
    (FSDP2, https://pytorch.org/docs/stable/distributed.fsdp.fully_shard.html); a block's weights
    are gathered when it runs, in bf16 where that is the precision, and gradients reduced in
    float32. An embedding tied to the head is gathered with the whole model, or it would be gone
    when the head needs it.
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
        policy = MixedPrecisionPolicy(  # casting inputs would make the masks -inf
            param_dtype=gathered_in, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        ends = [m for m in model.children() if isinstance(m, nn.Embedding | nn.Linear)]
        units = [*(ends if len(ends) > 1 else []), *model.blocks, model]
        for unit in dict.fromkeys(units):
            # The head is the first that the backward pass needs: it stays gathered until then.
            reshard = False if isinstance(unit, nn.Linear) else None
            fully_shard(unit, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
    return model


def recompute(block: nn.Module) -> None:
    """Keeps only the block's input in training, and runs it again in the backward pass."""
    plain = block.forward

    def forward(*inputs):
        if torch.is_grad_enabled():
            return checkpoint(plain, *inputs, use_reentrant=False)
        return plain(*inputs)

    block.forward = forward


def own_rows(parameter: nn.Parameter) -> tuple[Tensor, int, int]:
    """This rank's part of a sharded parameter, and which rows it is: FSDP2 cuts the first
    dimension like torch.chunk."""
    rank, world = rank_and_world()
    part, rows = parameter.to_local(), parameter.shape[0]
    first = min(rows, rank * -(-rows // world))
    return part, first, first + part.shape[0]


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
    answers, own = list(map(Path, split_rationales(c, "augment"))), []
    # A folder of your own may do without test.
    tested = c.dataset in TASKS or has_split(c.dataset, "test", c.data_root)
    for split in ("train", "valid", "test") if tested else ("train", "valid"):
        own += data_files(c.dataset, split, c.data_root, split_rationales(c, split))
    sources = {get_task(c.dataset).source: [path for path in own if path not in answers],
               "teacher.py, or --rationales is mistyped": answers}  # fmt: skip
    if c.augment:
        sources[get_task(c.augment).source] = data_files(c.augment, "train", c.data_root)
    for source, paths in sources.items():
        if lost := [str(path) for path in dict.fromkeys(paths) if not path.is_file()]:
            more = f" and {len(lost) - 3} more" if len(lost) > 3 else ""
            missing.append(f"{', '.join(lost[:3])}{more}: No such file; from {source}")
    if missing:
        raise UserError("; and ".join(missing))


# ------------------------------------------------------------------------------------ the loop


class Signals:
    """SIGTERM and Ctrl-C while training: the first is noted, and heeded after the step."""

    def __init__(self) -> None:
        self.got, self.at = 0, 0.0

    def __enter__(self) -> "Signals":
        self.before = {s: signal.signal(s, self.note) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def note(self, number: int, _) -> None:
        # torchrun passes a terminal's Ctrl-C on, so that it comes twice; later, it is meant.
        if self.got == number == signal.SIGINT and time.monotonic() - self.at > 1:
            os._exit(128 + number)
        if not self.got:
            self.got, self.at = number, time.monotonic()


def to_tensors(arrays: dict[str, np.ndarray], device: torch.device) -> dict[str, Tensor]:
    """Arrays on the device; a GPU copies them from pinned memory while the host goes on."""
    tensors = {key: torch.from_numpy(array) for key, array in arrays.items()}
    if device.type == "cuda":
        tensors = {key: tensor.pin_memory() for key, tensor in tensors.items()}
    return {key: tensor.to(device, non_blocking=True) for key, tensor in tensors.items()}


def forward_backward(
    model: nn.Module, batch: dict[str, Tensor], counts: Tensor, c: Config, scale: int
) -> Tensor:
    """One micro-batch: adds to the gradients, returns its shares of each task's loss and of L."""
    labels = batch["labels"]
    with autocast(counts.device, c.precision):
        logits = model(batch["input_ids"], batch["attention_mask"], shift_right(labels))
    losses = multitask_loss(logits, labels, batch["tasks"], counts, c.lam)
    (losses.total * scale).backward()
    return torch.cat([losses.each, losses.total[None]]).detach()


def train_step(
    model, optimizer, c: Config, data: Data, step: int, device: torch.device, stop: int
) -> tuple[dict, int]:
    """One optimizer step, `step` from 0; `stop` is the signal that this rank got, or 0.

    Returns its figures for `metrics.jsonl`, and the signal that any rank got.
    """
    start, rows = time.monotonic(), data.rows
    (rank, world), n = rank_and_world(), len(TARGETS)
    mine = rows.rows_of(step_examples(rows.n_examples, c.batch_size, c.seed, step))
    sources, targets = (o[mine + 1] - o[mine] for o in (rows.source_offsets, rows.target_offsets))
    multiple = MULTIPLE[device.type]
    dealt = micro_batches(
        round_up(sources, multiple), round_up(targets, multiple), rows.tasks[mine],
        c.micro_tokens, world, OVERHEAD[device.type],
    )[rank]  # fmt: skip
    known = to_tensors({
        # Each task's target tokens in the whole step: the denominators of Eq. 1 and 4.
        "counts": np.array([targets[rows.tasks[mine] == task].sum() for task in range(n)]),
        # Summed over ranks: each task's loss, L, ranks told to stop by SIGTERM, by SIGINT.
        "shares": np.float32([0] * (n + 1) + [stop == signal.SIGTERM, stop == signal.SIGINT]),
    }, device)  # fmt: skip
    counts, shares = known["counts"], known["shares"]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)

    lr = c.lr * (1 - step / c.steps)  # linear to 0, no warm-up
    for group in optimizer.param_groups:
        group["lr"] = lr
    dropout_seed = np.random.SeedSequence([c.seed, step, rank]).generate_state(1, np.uint64)
    torch.manual_seed(int(dropout_seed[0]))
    losses = []
    for i, part in enumerate(dealt):
        batch = to_tensors(collate(rows, mine[part], multiple), device)
        # Gradients are averaged over the ranks, and our losses are parts of one sum: times world.
        # DDP waits for the last to do it; FSDP does it each time, and keeps no whole gradients.
        wait = c.parallel == "ddp" and i < len(dealt) - 1
        with model.no_sync() if wait else contextlib.nullcontext():
            losses.append(forward_backward(model, batch, counts, c, world))
        shares[:-2] += losses[-1]
    if world > 1:
        dist.all_reduce(shares)
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    norm = norm.full_tensor() if c.parallel == "fsdp" else norm
    # The one time in a step that the host waits for the device.
    figures = torch.cat([shares, norm[None]]).tolist()
    *task_losses, loss, terms, interrupts, grad_norm = figures
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        bad = [mine[part] for part, some in zip(dealt, losses) if not some.isfinite().all()]
        raise RunError(
            f"step {step + 1}: loss {loss}, gradient norm {grad_norm} is not finite"
            f"{blame(bad, mine, data)}. Nothing was changed by this step; lower --lr or mend the "
            "examples"
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
    return metrics, signal.SIGTERM if terms else signal.SIGINT if interrupts else 0


def blame(bad: list[np.ndarray], step_rows: np.ndarray, data: Data) -> str:
    """Which ranks' micro-batches were not finite, and which examples are in them; the whole step
    where only the gradient is not. The same on every rank."""
    world = rank_and_world()[1]
    found = [bad]
    if world > 1:
        found = [None] * world
        dist.all_gather_object(found, bad)

    def examples(parts: list[np.ndarray]) -> str:
        numbers = np.unique(data.rows.example[np.concatenate(parts)])
        return "examples " + ", ".join(data.ids[i] for i in numbers)

    words = [f"; rank {r}, {examples(parts)}" for r, parts in enumerate(found) if parts]
    return "".join(words) or f"; {examples([step_rows])}"


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
    line = (
        f"step {m['step']}/{c.steps}  label {m['label_loss']:.4f}  rationale "
        f"{m['rationale_loss']:.4f}  lr {m['lr']:.2e}  norm {m['grad_norm']:.2f}  "
        f"{m['examples_per_second']:.0f} examples/s  {m['tokens_per_second']:.0f} tokens/s  "
        f"{m['peak_memory_bytes'] / 2**30:.2f} GiB  left {timedelta(seconds=int(seconds_left))}"
    )
    return line + (f"  valid {m['valid_accuracy']:.4f}" if "valid_accuracy" in m else "")


def train(c: Config, out: Path, data: Data, model: nn.Module) -> int:
    """From the first step, or the last saved one, to the last; leaves `best/` and `last/`.

    Returns 0, or the number of the signal after which it saved and stopped. Raises RunError
    where a loss or gradient is not finite.
    """
    rank, world = rank_and_world()
    device = own_device(c)
    model = model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=c.lr, weight_decay=0.0, fused=True)
    state = load_state(c, out, model, optimizer)
    done, best, best_step = state["step"], state["best"], state["best_step"]
    if world == state["world"]:
        torch.set_num_threads(state["threads"])  # another number would give other bits
    sharded = c.parallel == "fsdp"
    saves = sharded or rank == 0  # of a sharded model each rank saves its part
    parameters = sum(p.numel() for p in model.parameters())
    epochs = c.steps * c.batch_size / data.rows.n_examples
    print0("\n".join(data.notes))
    print0(
        f"model: {c.weights} ({c.size}), {parameters:,} parameters; {c.precision} on {world} x "
        f"{device.type}, {c.parallel}; {torch.get_num_threads()} threads\n"
        f"steps: {c.steps:,} of {c.batch_size} examples ({epochs:.1f} epochs), micro-batches of at "
        f"most {c.micro_tokens:,} tokens; valid every {c.eval_every}, state every {c.save_every}"
        + (f"; continuing after step {done}" if done else "")
        + f"\ndisk: a state {12 * parameters / 1e6:,.0f} MB, best and last "
        f"{4 * parameters / 1e6:,.0f} MB each" + (", exported at the end" if sharded else "")
        + f"\ncost: {-(-c.steps // c.eval_every):,} evaluations of {len(data.valid):,} examples, "
        f"at least {-(-c.steps // c.save_every):,} saved states: training waits"
    )
    student = Student(model, data.tokenizer, c.method, c.prefixes, c.dataset, device, c.precision)

    def export(folder: str, step: int) -> None:
        save_student(c, model, out / folder, data.vocabulary, step, best)

    kept = out / "state" / f"best-{best_step:07}"  # where a sharded model's best is until the end
    if best_step and agreed(lambda: student_step(out / "best") != best_step and not kept.exists()):
        if best_step != done:  # best/ is written right after the state of its step
            raise UserError(f"{out / 'best'} is gone or damaged, and its step {best_step} is past; "
                            "bring it back, or start again with another --out")
        if saves:
            export("best", best_step)
    wrapped = model if sharded else parallelize(model, c)
    if world > 1:  # DDP orders its buckets anew after the first backward: do it before step 1
        batch = to_tensors(collate(data.rows, np.array([0])), device)
        forward_backward(wrapped, batch, torch.ones(len(TARGETS), device=device), c, world)
        model.zero_grad(set_to_none=True)

    metrics_file = open(out / "metrics.jsonl", "ab") if rank == 0 else None  # noqa: SIM115
    if metrics_file:
        metrics_file.truncate(state["metrics_bytes"])
    bar = tqdm(total=c.steps, initial=done, disable=rank > 0 or not sys.stderr.isatty())
    began, shown = time.monotonic(), -math.inf
    with bar, Signals() as signals:
        for step in range(done + 1, c.steps + 1):
            metrics, stop = train_step(wrapped, optimizer, c, data, step - 1, device, signals.got)
            last_step, improved = step == c.steps, False
            if step % c.eval_every == 0 or last_step:
                start = time.monotonic()
                with torch.compiler.set_stance("force_eager" if c.compile else "default"):
                    summary, _ = evaluation.evaluate(student, data.valid, progress="valid")
                if (seconds := time.monotonic() - start) > 10:
                    print0(f"evaluation of step {step} took {seconds:.1f} s")
                metrics["valid_accuracy"] = summary["accuracy"]
                improved = summary["accuracy"] > best
                if improved:
                    best, best_step = summary["accuracy"], step

            if metrics_file:
                metrics_file.write(json.dumps(metrics).encode() + b"\n")
                metrics_file.flush()
            bar.update()
            if time.monotonic() - shown > 10 or "valid_accuracy" in metrics:
                shown = time.monotonic()
                left = (shown - began) / (step - done) * (c.steps - step)
                print0(log_line(c, metrics, left))

            save = step % c.save_every == 0 or improved or last_step or stop
            if save and saves:
                facts = {"best": best, "best_step": best_step, "world": world,
                         "threads": torch.get_num_threads()}  # fmt: skip
                if metrics_file:
                    fsync(out / "metrics.jsonl")
                    facts["metrics_bytes"] = metrics_file.tell()
                seconds = save_state(c, out, step, model, optimizer, facts)
                if sharded or seconds > 10:
                    print0(f"state of step {step} saved in {seconds:.1f} s")
                if improved and not sharded:
                    export("best", step)
            if stop and not last_step:
                if world > 1:
                    dist.barrier()  # leave together, once rank 0 has saved
                print0(f"stopped by signal {stop} after step {step}, which is saved; go on with\n"
                       f"  {command(c, str(out), resume=True)}")
                return stop
    if metrics_file:
        metrics_file.close()
    if saves:
        export("last", c.steps)
    if world > 1:
        dist.barrier()
    return 0


def student_step(folder: Path) -> int | None:
    """The step that a student folder of a run was saved at; None where there is none."""
    try:
        return json.loads((folder / "dsbs.json").read_text())["step"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def finish(c: Config, out: Path, data: Data, model: nn.Module) -> dict:
    """Scores the best student on test, once, and writes `predictions.jsonl` and `result.json`."""
    rank, world = rank_and_world()
    device, sharded = own_device(c), c.parallel == "fsdp"
    state = json.loads((latest_state(out) / "state.json").read_text())
    step = state["best_step"]
    kept = out / "state" / f"best-{step:07}"
    if agreed(lambda: student_step(out / "best") != step):
        load_tensors(kept, named_tensors(model), sharded)
        if sharded or rank == 0:
            save_student(c, model, out / "best", data.vocabulary, step, state["best"])
    if world > 1:
        dist.barrier()  # all ranks have read it
    agreed(lambda: shutil.rmtree(kept, ignore_errors=True))
    if sharded and isinstance(model, T5):  # one copy of a large model, in parts
        load_weights(model, open_checkpoint(out / "best"), out / "best", own_rows)
        student = Student(
            model, data.tokenizer, c.method, c.prefixes, c.dataset, device, c.precision
        )
    else:
        student = evaluation.load_student(out / "best", device, c.precision)
    summary = {"accuracy": None, "n": 0}
    if data.test is not None:
        summary, rows = evaluation.evaluate(student, data.test, progress="test")
        if rank == 0:
            evaluation.write_jsonl(out / "predictions.jsonl", rows)
    kind, gold = evaluation.gold_labels(data.valid if data.test is None else data.test)
    scored = [label for label in gold if label is not None]
    task = get_task(c.dataset)
    hits = sum(is_correct(task, data.majority, label) for label in scored)
    result = {
        "valid_accuracy": state["best"], "test_accuracy": summary["accuracy"],
        "n_test": summary["n"], "best_step": step, "labels": kind,
        "majority_accuracy": hits / len(scored),
        **{key: getattr(c, key) for key in ("dataset", "size", "method", "fraction", "seed")},
    }  # fmt: skip
    if rank == 0:
        write_json(out / "result.json", result)
    return result


def show_result(c: Config, out: Path, result: dict) -> None:
    """The last lines of a run: what came out, where it is, how to use it."""
    test = result["test_accuracy"]
    print0(
        f"valid accuracy {result['valid_accuracy']:.4f} (best of all evaluations, step "
        f"{result['best_step']})\n"
        + (f"test accuracy  {test:.4f} ({result['n_test']} examples, {result['labels']} labels; "
           if test is not None else "test accuracy  none: the data set has no test split (")
        + f"the most frequent training label alone: {result['majority_accuracy']:.4f})\n"
        f"the student lies in {out / 'best'}; use it with\n"
        f"  python eval.py {out / 'best'} --predict inputs.txt"
        + (" --explain" if METHODS[c.method].explains else "")
    )


# ------------------------------------------------------------------------------- command line


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The flags that were given, and no others: `Config` and `resolve` know the defaults."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], argument_default=argparse.SUPPRESS
    )
    add = parser.add_argument
    add("--size", help=f"{', '.join(RECIPES)}; default tiny")
    add("--weights", help="a Hugging Face T5 folder, or random; default weights/t5-v1_1-SIZE")
    add("--dataset", help="svamp, cqa, esnli, anli1, demo or a folder of *.jsonl; default demo for "
        "tiny, else esnli")  # fmt: skip
    add("--data-root", help="where the benchmarks lie; default datasets")
    add("--method", help=f"{', '.join(METHODS)}; default step-by-step")
    add("--labels", help="human (default) or teacher")
    add("--rationales", nargs="+", help="palm, neox, human, or a teacher's .jsonl files")
    add("--prefixes", help="paper (default) or released")
    add("--fraction", type=float, help="of the training examples, above 0 and at most 1")
    add("--augment", help="asdiv: train on its problems too, with a teacher's labels")
    add("--augment-fraction", type=float, help="of those; default 1")
    add("--steps", type=int)
    add("--batch-size", type=int, help="examples in an optimizer step, over all processes")
    add("--lr", type=float)
    add("--lam", type=float, help="lambda of Eq. 3; default 1")
    add("--dropout", type=float, help="default 0.1")
    add("--seed", type=int, help="default 0")
    add("--eval-every", type=int, help="steps")
    add("--device", help="cpu, cuda or cuda:N; default: the best there is")
    add("--precision", help="fp32 or bf16; default bf16 on CUDA, fp32 on CPU")
    add("--save-every", type=int, help="steps; default: as often as it evaluates")
    add("--micro-tokens", type=int, help="most padded places (source + target) in one forward on "
        "one device")  # fmt: skip
    add("--parallel", help="none, ddp or fsdp; default under torchrun: fsdp for xl and xxl, "
        "else ddp")  # fmt: skip
    add("--recompute", action=argparse.BooleanOptionalAction, help="activations in the backward "
        "pass, to save memory; default for xl and xxl")  # fmt: skip
    add("--compile", action=argparse.BooleanOptionalAction, help="the model's blocks, for GPUs; "
        "takes minutes once")  # fmt: skip
    add("--timeout", type=float, help="seconds that processes wait for each other; default 600")
    add("--plan", action="store_true", help="print memory, steps and time; train nothing")
    add("--gpus", type=int, help="with --plan; default 1")
    add("--json", action="store_true", help="with --plan")
    add("--out", help="run folder; default runs/ and a name made of the settings")
    add("--resume", action="store_true", help="continue the run folder, or start it")
    return parser.parse_args(argv)


def remembered(given: dict, out: str | None, resume: bool) -> dict:
    """On resume, flags that are not given stay as they were; only `parallel` follows from what
    there is now."""
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


def run(given: dict, out: str | None, resume: bool) -> int:
    """Trains as told by the flags given, or shows what is there; returns the exit status."""
    c = resolve(Config(**given))
    check_files(c)
    out = Path(out or run_name(c))
    with contextlib.ExitStack() as held:

        def claim() -> dict | None:
            about = provenance(c)
            lock(out, held)
            return open_run(c, out, about, resume)

        # A run that is there is looked at first; a new one claims its folder once all is read.
        exists = agreed((out / "run.json").exists)
        result = agreed(claim) if exists else None
        if result:
            print0(f"{out} is finished; to repeat it elsewhere:\n  {command(c, f'{out}-2')}")
        else:
            data = prepare(c)
            model = build_model(c, data.tokenizer)
            if not exists:
                agreed(claim)
            print0(f"run folder: {out}")
            if stop := train(c, out, data, model):
                return 128 + stop
            result = finish(c, out, data, model)
        show_result(c, out, result)
    return 0


def main(argv: list[str] | None = None) -> int:
    """Exit status 2 with one line for a user's mistake, 1 for a run that could not go on, 143 or
    130 for one that a signal stopped."""
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
                return run(settings, out, resume)
        except (OSError, SafetensorError) as error:  # a full disk, above all
            raise RunError(f"{error}; the last saved state is kept: once this is solved, continue "
                           "with --resume") from None  # fmt: skip

    return exit_status(program)


if __name__ == "__main__":
    leave(main())
