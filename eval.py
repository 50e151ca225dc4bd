"""Use a student and score it: predictions, accuracy, rationales, at any world size.

    python eval.py runs/NAME/best --dataset svamp --split test
    python eval.py runs/NAME/best --predict inputs.jsonl --explain

This file owns process groups and devices, the student folder, prediction, scoring and
`predictions.jsonl`. It knows nothing of optimizers or training state.
"""

import sys

if sys.platform == "win32" or sys.version_info < (3, 10):
    sys.exit("error: this program needs Linux or macOS and Python 3.10 or newer")

import argparse
import contextlib
import functools
import json
import os
import shutil
import time
import traceback
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from data import (
    MAX_SOURCE,
    SPLITS,
    Example,
    Rationales,
    Task,
    Text,
    Tokenizer,
    UserError,
    get_task,
    is_correct,
    load_dataset,
    other_form,
    pad,
    parse_completion,
    read_example,
    read_records,
    write_jsonl,
)
from dsbs import METHODS, PREFIXES, RATIONALE, make_source
from t5 import T5

STUDENT = T5  # a fork assigns its own class: no other line names the architecture

LABEL_TOKENS, RATIONALE_TOKENS = 64, 256  # greedy decoding; the released code's 64 cuts rationales
MAX_TOKENS = 8_192  # source tokens in one batch of prediction, padding included
MULTIPLE = {"cpu": 1, "cuda": 8}  # lengths are rounded up: CUDA's attention wants aligned biases
TIMEOUT = 600.0  # seconds that a rank waits for another
NAMED = ("palm", "neox", "human")  # values of --rationales that are not a teacher's files


# ---- Processes -----------------------------------------------------------------------------------


def rank_and_world() -> tuple[int, int]:
    """Returns this process's rank and the number of processes: (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def print0(*words: Any, file=None) -> None:
    """Prints on rank 0 alone, above a progress bar if there is one. `file`: default stdout."""
    if rank_and_world()[0] == 0:
        tqdm.write(" ".join(map(str, words)), file=file or sys.stdout)
        (file or sys.stdout).flush()


def choose_device(name: str | None) -> torch.device:
    """Returns the device for `cpu`, `cuda`, `cuda:N`, or None for the best one. Under torchrun a
    rank gets the GPU of its LOCAL_RANK. UserError where there is no such device."""
    cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
    local = int(os.environ.get("LOCAL_RANK", 0))
    if not (name or cards):
        warn_of_idle_gpu()
    name = name or ("cuda" if cards else "cpu")
    allowed = {"cpu": torch.device("cpu")}
    if local < cards:
        allowed["cuda"] = torch.device("cuda", local)
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        allowed |= {f"cuda:{i}": torch.device("cuda", i) for i in range(cards)}
    if name not in allowed:
        words = f"allowed: {', '.join(allowed)}; torch finds {cards} CUDA devices"
        raise UserError(f"--device {name!r} of local rank {local} is not available; {words}")
    return allowed[name]


@functools.lru_cache(maxsize=1)  # once
def warn_of_idle_gpu() -> None:
    """Says so where there is a CUDA driver and this torch cannot use it: the CPU is used."""
    driver = shutil.which("nvidia-smi") or Path("/proc/driver/nvidia/version").exists()
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if driver and not hidden and int(os.environ.get("RANK", 0)) == 0:
        version = f"torch {torch.__version__} (CUDA {torch.version.cuda})"
        reason = f"warning: this machine has a CUDA driver, but {version} finds no device"
        print(f"{reason}; using the CPU. See https://pytorch.org/get-started", file=sys.stderr)


@contextlib.contextmanager
def processes(device: torch.device, timeout: float = TIMEOUT) -> Iterator[None]:
    """Opens the process group that torchrun's environment describes, if any: NCCL on GPUs, gloo on
    CPUs. A rank that waits for another for longer than `timeout` seconds raises.

    After an exception the group stays open: under NCCL, destroy_process_group can wait for ever for
    collectives that the other ranks never join. The program prints the error, and `exit_process`
    ends it. https://github.com/NVIDIA/nccl/issues/863
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        yield
        return
    limit = timedelta(seconds=timeout)
    store, rank, world = next(dist.rendezvous("env://", timeout=limit))
    store.set_timeout(limit)
    store = fresh_store(store, rank, world, time.monotonic() + timeout)
    backend, card = ("nccl", device) if device.type == "cuda" else ("gloo", None)
    dist.init_process_group(
        backend, store=store, rank=rank, world_size=world, timeout=limit, device_id=card
    )
    yield
    dist.destroy_process_group()


class Interrupted(Exception):
    """A signal, whose number is the argument, asked the run to stop."""


class RunError(Exception):
    """A run cannot continue, though its flags are right; what it saved stays."""


def exit_status(program: Callable[[], int]) -> int:
    """Runs a program and returns its exit status. Prints what ended it: one line and status 2 for a
    UserError, one line and 1 for a RunError, the traceback and 1 for any other exception."""
    try:
        return program()
    except (UserError, RunError) as error:
        # Mostly all ranks raise the same error: the first rank of a machine prints it, and then
        # torchrun ends the others. A rank that raises alone prints two seconds later.
        if int(os.environ.get("LOCAL_RANK", 0)) > 0:
            time.sleep(2)
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    except KeyboardInterrupt:
        return 130
    except Exception:
        trace = traceback.format_exc()
        print(f"rank {os.environ.get('RANK', 0)} failed:\n{trace}", end="", file=sys.stderr)
        return 1


def exit_process(status: int) -> NoReturn:
    """Exits the program. A rank exits without the interpreter's shutdown, in which a gloo thread
    that releases a collective's tensor can abort the process, and with it the whole job:
    https://github.com/pytorch/pytorch/issues/190489"""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def fresh_store(store: dist.Store, rank: int, world: int, deadline: float) -> dist.Store:
    """Returns a part of torchrun's store that no earlier attempt has written to.

    The store outlives the workers: after a restart (--max-restarts) it still holds the addresses
    of the workers that it replaced. So each rank asks rank 0 under a new name, and rank 0 answers
    with a prefix. UserError on rank 0 if a rank has not asked by `deadline` (time.monotonic()).
    """
    if rank > 0:
        me = uuid.uuid4().hex
        store.set(f"hello/{rank}", me)
        prefix = store.get(f"answer/{me}").decode()
        store.set(f"{prefix}/{rank}", "received")
        return dist.PrefixStore(prefix, store)
    prefix, silent = uuid.uuid4().hex, set(range(1, world))
    while silent:
        for other in silent:
            if store.check([f"hello/{other}"]):  # of this attempt, or of an earlier one
                store.set(f"answer/{store.get(f'hello/{other}').decode()}", prefix)
        if time.monotonic() > deadline:
            raise UserError(f"ranks {sorted(silent)} did not start within --timeout")
        time.sleep(0.02)
        silent = {other for other in silent if not store.check([f"{prefix}/{other}"])}
    return dist.PrefixStore(prefix, store)


# ---- A student folder ----------------------------------------------------------------------------


@dataclass
class Student:
    """A trained model, and what its folder's `dsbs.json` says about how to use it."""

    model: nn.Module
    tokenizer: Tokenizer
    method: str  # a key of METHODS
    prefixes: str  # a key of PREFIXES
    dataset: str  # gives the form of an answer, and the scorer
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    precision: str = "fp32"
    signals: list[int] = field(default_factory=list)  # that this rank got: they end a prediction


@contextlib.contextmanager
def shown_to_user() -> Iterator[None]:
    """A ValueError about a folder of weights becomes a UserError."""
    try:
        yield
    except ValueError as error:
        raise UserError(str(error)) from None


def load_model(folder: Path) -> nn.Module:
    """STUDENT.from_pretrained; UserError where the folder is at fault."""
    with shown_to_user():
        return STUDENT.from_pretrained(folder)


def untrained_config(size: str, vocab_size: int) -> Any:
    """What `STUDENT(config)` takes for `--weights random`; T5's where the class has no own."""
    return getattr(STUDENT, "untrained_config", T5.untrained_config)(size, vocab_size)


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder: the student class's own `load_tokenizer`, or SentencePiece's. It
    needs `encode`, `encode_batch`, `decode`, `save`, `pad_id`, `unk_id` and `vocab_size`."""
    own = getattr(STUDENT, "load_tokenizer", None)
    return own(folder) if own else Tokenizer(folder / "spiece.model")


def check_vocabulary(model: nn.Module, tokenizer: Any, folder: str | os.PathLike) -> None:
    """UserError unless a model's config has room for its vocabulary and the same special ids: the
    config's are those that training and generation use. A fork may have no such config."""
    config, size = getattr(model, "config", None), tokenizer.vocab_size
    rows = getattr(config, "vocab_size", size)
    if rows < size:
        raise UserError(f"{folder}: vocab_size {rows} is smaller than its vocabulary, {size}")
    pad = tokenizer.pad_id
    wanted = {"decoder_start_token_id": pad, "pad_token_id": pad}
    wanted["eos_token_id"] = getattr(tokenizer, "eos_id", None)
    for key, id in wanted.items():
        given = getattr(config, key, id)
        if id is not None and given != id:
            reason = f"{key} is {given} in config.json and {id} in the vocabulary"
            raise UserError(f"{folder}: {reason}; correct config.json, or give another vocabulary")


def load_student(folder: str | os.PathLike, device: torch.device, precision: str) -> Student:
    """Loads a student folder such as `runs/NAME/best`. UserError says what is missing or damaged.
    With precision bf16 the weights are bfloat16, since prediction needs no others."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; give a student such as runs/NAME/best")
    try:
        about = json.loads((folder / "dsbs.json").read_text())
        use = {key: about[key] for key in ("method", "prefixes", "dataset")}
        if use["method"] not in METHODS or use["prefixes"] not in PREFIXES:
            raise ValueError(f"unknown method or prefixes in {use}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder} is not a student; its dsbs.json: {error!r}") from None
    tokenizer = load_tokenizer(folder)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    model = load_model(folder).to(device=device, dtype=dtype)
    check_vocabulary(model, tokenizer, folder)
    return Student(model, tokenizer, **use, device=device, precision=precision)


# ---- Prediction ----------------------------------------------------------------------------------


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Returns a context in which matrix products of fp32 weights run in bf16; for fp32 it changes
    nothing. Its cache of cast weights is off: it would hold a second copy of the model."""
    return torch.autocast(
        device.type, dtype=torch.bfloat16, enabled=precision == "bf16", cache_enabled=False
    )


@contextlib.contextmanager
def replaced(model: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Replaces each parameter p by change(p) inside the context; p itself does not change. A
    parameter that several modules share is still shared."""
    before = [(m, name, p) for m in model.modules() for name, p in m._parameters.items()]
    before = [(module, name, p) for module, name, p in before if p is not None]
    after = {p: nn.Parameter(change(p.detach())) for p in dict.fromkeys(p for *_, p in before)}
    for module, name, p in before:
        setattr(module, name, after[p])
    try:
        yield
    finally:
        for module, name, p in before:
            setattr(module, name, p)


@contextlib.contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Gathers a sharded model (FSDP2) once on every rank, in the dtype that it computes in.
    https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html"""
    units = [module for module in model.modules() if hasattr(module, "unshard")]
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    yield
    for unit in units:
        keep = unit is model or isinstance(unit, nn.Linear)  # as `parallelize` in train.py says
        unit.set_reshard_after_forward(not keep, recurse=False)
    model.reset_iter_state()  # shards them again, and forgets the order in which blocks ran


def ready(model: nn.Module, precision: str) -> contextlib.AbstractContextManager:
    """Returns a context with the weights that decoding needs: complete on every rank, so that no
    token waits for other ranks, and in the dtype of the products, so that no token casts them.
    Training's own weights stay sharded and in float32."""
    if hasattr(model, "unshard"):
        return gathered(model)
    if precision == "bf16":
        return replaced(model, lambda p: p.to(torch.bfloat16))
    return contextlib.nullcontext()


def generate_texts(
    student: Student,
    sources: list[Text],
    max_new_tokens: int,
    batch_size: int = 64,
    progress: str | None = None,
) -> list[str]:
    """Returns one greedy completion for each source, in the order of `sources`, on every rank.

    Sources are sorted by length into batches of at most `batch_size` rows and MAX_TOKENS source
    tokens; rank r decodes every world-th batch from the r-th on, so that one rank decodes each
    source. `progress` names the progress bar. Where a rank got a signal (`student.signals`),
    all ranks raise Interrupted.
    """
    rank, world = rank_and_world()
    model, device, tokenizer = student.model, student.device, student.tokenizer
    ids = tokenizer.encode_batch(sources, MAX_SOURCE)
    order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))  # the longest first
    batches = []
    while order:
        rows = max(1, min(batch_size, MAX_TOKENS // len(ids[order[0]])))
        batches, order = [*batches, order[:rows]], order[rows:]
    quiet = rank > 0 or not progress or None  # None: only on a terminal
    bar = tqdm(batches[rank::world], desc=progress, leave=False, disable=quiet)
    texts, was_training = {}, model.training
    model.eval()
    with torch.no_grad(), ready(model, student.precision), autocast(device, student.precision):
        for batch in bar:
            if student.signals:
                break
            rows = [ids[i] for i in batch]
            input_ids = pad(rows, tokenizer.pad_id, MULTIPLE[device.type])  # (B, S) int64
            mask = pad([[1] * len(row) for row in rows], 0, MULTIPLE[device.type])  # (B, S)
            inputs = (torch.from_numpy(array).to(device) for array in (input_ids, mask))
            tokens = model.generate(*inputs, max_new_tokens=max_new_tokens)  # (B, T)
            texts |= {i: tokenizer.decode(row) for i, row in zip(batch, tokens.tolist())}
    model.train(was_training)
    parts = [(texts, next(iter(student.signals), 0))] * world
    if world > 1:
        dist.all_gather_object(parts, parts[0])
    signal = max(signal for _, signal in parts)
    if signal:
        raise Interrupted(signal)
    texts = {i: text for part, _ in parts for i, text in part.items()}
    assert len(texts) == len(sources), "one rank decodes each source"
    return [texts[i] for i in range(len(sources))]


def predict(
    student: Student, examples: list[Example], explain: bool = False, progress: str | None = None
) -> list[dict]:
    """Returns {"id", "prediction"} for each example, and "rationale" if `explain`.

    The text of a single-task student is parsed into rationale and label; where it has no answer,
    the prediction is empty, never a guess. UserError for `explain` where the method teaches no
    rationales.
    """
    if explain and not METHODS[student.method].explains:
        able = ", ".join(name for name, method in METHODS.items() if method.explains)
        raise UserError(f"--explain: trained with {student.method}, not with one of {able}")

    def generate(max_new_tokens: int, *task: str) -> list[str]:
        sources = [make_source(e, student.method, student.prefixes, *task) for e in examples]
        return generate_texts(student, sources, max_new_tokens, progress=progress)

    if student.method == "single-task":
        task = get_task(student.dataset)
        answers = [parse_completion(task, t, False) or (t, "") for t in generate(RATIONALE_TOKENS)]
    else:
        labels = generate(LABEL_TOKENS)
        rationales = generate(RATIONALE_TOKENS, RATIONALE) if explain else labels
        answers = zip(rationales, labels)
    rows = []
    for example, (rationale, label) in zip(examples, answers):
        row = {"id": example.id, "prediction": label}
        rows.append(row | {"rationale": rationale} if explain else row)
    return rows


# ---- Scoring -------------------------------------------------------------------------------------


def gold_labels(examples: list[Example]) -> tuple[str, list[str | None]]:
    """Returns the labels to score a split on: ("human", labels) where an example has a human's,
    else ("teacher", labels). UserError where no example has any."""
    kind = "human" if any(e.label is not None for e in examples) else "teacher"
    gold = [e.label if kind == "human" else e.teacher_label for e in examples]
    if set(gold) == {None}:
        raise UserError("no example has a label, neither human nor the teacher's: nothing to score")
    return kind, gold


def score(task: Task, texts: Iterable[str], examples: list[Example]) -> tuple[dict, list[bool]]:
    """Scores one text for each example. Returns ({"accuracy", "n", "labels"}, what is right).
    "labels" is "human" or "teacher" (`gold_labels`), and "n" counts the examples that have one."""
    kind, gold = gold_labels(examples)
    right = [x is not None and is_correct(task, text, x) for text, x in zip(texts, gold)]
    n = sum(x is not None for x in gold)
    return {"accuracy": sum(right) / n, "n": n, "labels": kind}, right


def evaluate(
    student: Student, examples: list[Example], explain: bool = False, progress: str | None = None
) -> tuple[dict, list[dict]]:
    """Predicts a split and scores it with the scorer of the student's dataset.

    Returns (what `score` returns, rows of `predictions.jsonl` in the examples' order). UserError if
    no example has a label.
    """
    gold_labels(examples)  # its error comes before an hour of prediction
    rows = predict(student, examples, explain, progress)
    task = get_task(student.dataset)
    summary, right = score(task, [row["prediction"] for row in rows], examples)
    return summary, [row | {"correct": correct} for row, correct in zip(rows, right)]


def rationale_source(names: list[str] | None, dataset: str | Task, needed: bool) -> Rationales:
    """Returns what `load_dataset` joins to a split: what --rationales names; without names, and
    only where the method needs rationales, the released completions of a benchmark. A folder's
    examples have their own."""
    if names:
        return names[0] if names[0] in NAMED and len(names) == 1 else names
    return "palm" if needed and get_task(dataset).palm else None


# ---- Command line --------------------------------------------------------------------------------


def read_inputs(path: str) -> list[Example]:
    """Reads inputs to predict from a file, or from standard input for `-`.

    If the first line is a JSON object, each line is one: {"input": str or [str, str]}, with "id"
    and "rationale" optional. Otherwise each line is a text. Blank lines do not count; an input
    without an id gets its line number, from 1. UserError for a file or line that is neither, such
    as a JSON array or another encoding.
    """
    try:
        content = sys.stdin.read().encode() if path == "-" else Path(path).read_bytes()
    except UnicodeDecodeError as error:
        content = error.object
    except OSError as error:
        raise UserError(f"--predict {path}: {error}; allowed: a UTF-8 text file, or -") from None
    wrong = other_form(path, content)
    if wrong:
        raise UserError(f"--predict {path}: {wrong}")
    text = content.decode("utf-8-sig")
    lines = [line.rstrip("\r") for line in text.split("\n")]
    if not text.lstrip().startswith("{"):
        return [Example(str(i), line, None) for i, line in enumerate(lines, 1) if line.strip()]
    no_task = Task("--predict", labels=None, scorer="text", marker="", folder="")

    def make(r: dict) -> Example:  # an input with a label may have any
        r = {"id": str(r.get("id", "")), "input": r["input"], "rationale": r.get("rationale")}
        return read_example(no_task, r)

    records = read_records(path, lines, make, '{"input": "..."} or {"input": ["...", "..."]}')
    return [replace(example, id=example.id or str(i)) for i, example in records]


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Defines all flags and their defaults."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("student", help="a student folder, such as runs/NAME/best")
    add("--dataset", help="default: the one it was trained on")
    add("--split", default="test", choices=SPLITS)
    add("--data-root", default="datasets")
    add("--rationales", nargs="+", help="palm, neox, human or teacher files (for rationale-input)")
    add("--predict", metavar="FILE", help="predict these inputs (JSON or plain lines; - for stdin)")
    add("--explain", action="store_true", help="generate rationales too")
    add("--out", metavar="FILE", help="default: predictions.jsonl in the student folder")
    add("--device")
    add("--precision", choices=("fp32", "bf16"), help="default: bf16 on CUDA, fp32 on CPU")
    return parser.parse_args(argv)


def run(args: argparse.Namespace, device: torch.device) -> int:
    """Prints a JSON line for each input to predict; or scores a split, writes `predictions.jsonl`
    and prints one JSON line. Returns 0."""
    precision = args.precision or ("bf16" if device.type == "cuda" else "fp32")
    student = load_student(args.student, device, precision)
    if args.predict:
        for row in predict(student, read_inputs(args.predict), args.explain, progress="predict"):
            print0(json.dumps(row, ensure_ascii=False))
        return 0
    student.dataset = args.dataset or student.dataset
    task, needed = get_task(student.dataset), student.method == "rationale-input"
    rationales = rationale_source(args.rationales, task, needed)
    examples = load_dataset(task, args.split, args.data_root, rationales)
    summary, rows = evaluate(student, examples, args.explain, progress=args.split)
    out = Path(args.out or Path(args.student, "predictions.jsonl"))
    if rank_and_world()[0] == 0:
        write_jsonl(out, rows)
    about = {"student": args.student, "dataset": student.dataset, "split": args.split}
    print0(json.dumps({**about, **summary, "predictions": str(out)}))
    return 0


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns its exit status: see `exit_status`."""
    args = parse_args(argv)

    def program() -> int:
        device = choose_device(args.device)
        with processes(device):
            return run(args, device)

    return exit_status(program)


if __name__ == "__main__":
    exit_process(main())
