"""Use a student and score it: predictions, accuracy, rationales, at any world size.

    python eval.py runs/NAME/best --dataset svamp --split test
    python eval.py runs/NAME/best --predict inputs.jsonl --explain

This file owns loading a student folder, prediction, scoring and `predictions.jsonl`. It knows
nothing of optimizers or training state.
"""

import argparse
import contextlib
import json
import os
import sys
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from data import (
    MAX_SOURCE,
    Example,
    Tokenizer,
    UserError,
    get_task,
    is_correct,
    load_dataset,
    pad,
    parse_completion,
    write_jsonl,
)
from dsbs import METHODS, PREFIXES, RATIONALE, make_source
from t5 import T5

STUDENT = T5  # a fork puts its own class here: nothing else names the architecture

LABEL_TOKENS, RATIONALE_TOKENS = 64, 256  # greedy decoding; the released code's 64 cuts rationales
MAX_TOKENS = 8_192  # source tokens in a batch that is decoded
MULTIPLE = {"cpu": 1, "cuda": 8}  # lengths are rounded up: CUDA's attention wants aligned biases
TIMEOUT = 600.0  # seconds that a rank waits for another
NAMED = ("palm", "neox", "human")  # --rationales that are not a teacher's files


# ----------------------------------------------------------------------------- processes


def rank_and_world() -> tuple[int, int]:
    """This process's number and how many there are: (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def print0(*words: Any, file=None) -> None:
    """Prints on rank 0 alone, past a progress bar if there is one."""
    if rank_and_world()[0] == 0:
        tqdm.write(" ".join(map(str, words)), file=file or sys.stdout)
        (file or sys.stdout).flush()


def choose_device(name: str | None) -> torch.device:
    """`cpu`, `cuda`, `cuda:N` or None for the best there is; under torchrun LOCAL_RANK's GPU."""
    allowed = "allowed: cpu" + (", cuda, cuda:N" if torch.cuda.is_available() else
                                " (this torch finds no CUDA device)")
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name!r} is unknown; {allowed}") from None
    if device.type == "cuda":
        local = int(os.environ.get("LOCAL_RANK", 0))
        alone = int(os.environ.get("WORLD_SIZE", 1)) == 1
        device = torch.device("cuda", device.index if alone and device.index else local)
        if 0 < (count := torch.cuda.device_count()) <= device.index and not alone:
            raise UserError(f"rank {os.environ['RANK']} wants GPU {local} of {count}; allowed: "
                            f"--nproc_per_node={count} at most")  # fmt: skip
    there = {"cpu": 1, "cuda": torch.cuda.device_count()}.get(device.type, 0)
    if (device.index or 0) >= there:
        raise UserError(f"--device {name!r} is not available; {allowed}")
    return device


@contextlib.contextmanager
def processes(device: torch.device, timeout: float = TIMEOUT) -> Iterator[None]:
    """The process group of torchrun's environment, if there is one: NCCL on GPUs, gloo on CPUs.
    A rank that waits for another for longer than `timeout` seconds gives up.

    After an exception the group is not taken down: under NCCL that can wait for ever for
    collectives that the other ranks never join. The program prints the error and leaves (`leave`).
    https://github.com/NVIDIA/nccl/issues/863
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
    """A signal asked the run to stop; `number` is the signal's."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


class RunError(Exception):
    """A run that cannot go on, though its flags are fine; what it saved is kept."""


def exit_status(program: Callable[[], int]) -> int:
    """What a program returns, or the status of what ended it, which is printed: 2 for a user's
    mistake and 1 for a RunError, each in one line; 1, with the whole traceback, for all else."""
    try:
        return program()
    except (UserError, RunError) as error:
        # Mostly the same on every rank: the first of a machine prints it, and then torchrun ends
        # the others. A rank that is alone with it prints it a moment later.
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


def leave(status: int) -> NoReturn:
    """Ends the program, and a rank at once: in the interpreter's own shutdown a thread of gloo that
    still lets go of a collective's tensor aborts the process, and so the whole job, now and then
    (https://github.com/pytorch/pytorch/issues/190489)."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def fresh_store(store: dist.Store, rank: int, world: int, deadline: float) -> dist.Store:
    """torchrun's store outlives its workers, and so do the addresses of those that a restart
    (--max-restarts) replaced: rank 0 names a part of it that is new, to each that asks now."""
    if rank > 0:
        me = uuid.uuid4().hex
        store.set(f"hello/{rank}", me)
        name = store.get(f"answer/{me}").decode()
        store.set(f"{name}/{rank}", "heard")
        return dist.PrefixStore(name, store)
    name, silent = uuid.uuid4().hex, set(range(1, world))
    while silent := {other for other in silent if not store.check([f"{name}/{other}"])}:
        for other in silent:
            if store.check([f"hello/{other}"]):  # from this attempt, or an earlier one
                store.set(f"answer/{store.get(f'hello/{other}').decode()}", name)
        if time.monotonic() > deadline:
            raise UserError(f"ranks {sorted(silent)} did not come within --timeout")
        time.sleep(0.02)
    return dist.PrefixStore(name, store)


# ---------------------------------------------------------------------------- a student folder


@dataclass
class Student:
    """A trained model with what is needed to ask it: `dsbs.json` of its folder."""

    model: nn.Module
    tokenizer: Tokenizer
    method: str
    prefixes: str
    dataset: str  # whose answer form and scorer it learnt
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    precision: str = "fp32"
    interrupted: Callable[[], int] = lambda: 0  # the number of a signal that this rank got, or 0


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


def load_student(folder: str | os.PathLike, device: torch.device, precision: str) -> Student:
    """From `runs/NAME/best`: model, vocabulary and `dsbs.json`. UserError says what is missing."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; give a student such as runs/NAME/best")
    if not (folder / "dsbs.json").is_file():
        raise UserError(f"{folder} is not a student: dsbs.json is missing; give a folder that "
                        "train.py wrote, such as runs/NAME/best")  # fmt: skip
    try:
        about = json.loads((folder / "dsbs.json").read_text())
        method, prefixes, dataset = about["method"], about["prefixes"], about["dataset"]
        if method not in METHODS or prefixes not in PREFIXES:
            raise ValueError(f"unknown method {method!r} or prefixes {prefixes!r}")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / 'dsbs.json'} is damaged: {error!r}") from None
    tokenizer = load_tokenizer(folder)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    model = load_model(folder).to(device=device, dtype=dtype)  # cast once, and moved after that
    return Student(model, tokenizer, method, prefixes, dataset, device, precision)


# ---------------------------------------------------------------------------------- prediction


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """bf16 matrix products on fp32 weights, or nothing for fp32. The cache of cast weights is off:
    it would hold a second copy of the model from one micro-batch to the next."""
    return torch.autocast(
        device.type, dtype=torch.bfloat16, enabled=precision == "bf16", cache_enabled=False
    )


@contextlib.contextmanager
def replaced(model: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """change(p) instead of each parameter p, for a while; p itself is not touched."""
    before = [(module, name, p) for module in model.modules()
              for name, p in module._parameters.items() if p is not None]  # fmt: skip
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
    """A sharded model (FSDP) put together once on every rank, in the dtype it computes in."""
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
    """Weights as decoding wants them, for as long as it lasts: whole on every rank, so that no
    token needs the others, and in the dtype that the products compute in, so that no token casts
    them. Training's own weights stay as they are, sharded and in float32."""
    if hasattr(model, "unshard"):
        return gathered(model)
    if precision == "bf16":
        return replaced(model, lambda p: p.to(torch.bfloat16))
    return contextlib.nullcontext()


def generate_texts(
    student: Student,
    sources: list[str | tuple[str, ...]],
    max_new_tokens: int,
    batch_size: int = 64,
    progress: str | None = None,
) -> list[str]:
    """One greedy completion per source, in the order given, on every rank.

    Sources are sorted by length into batches (of at most MAX_TOKENS, padding included) and the
    batches dealt to the ranks, so that each source is decoded once. Where a rank got a signal
    (`student.interrupted`), all ranks raise Interrupted.
    """
    rank, world = rank_and_world()
    ids = student.tokenizer.encode_batch(sources, MAX_SOURCE)
    order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
    batches = []
    while order:  # the longest first
        rows = max(1, min(batch_size, MAX_TOKENS // len(ids[order[0]])))
        batches, order = [*batches, order[:rows]], order[rows:]
    model, device, mine = student.model, student.device, {}
    was_training = model.training
    model.eval()
    bar = tqdm(
        batches[rank::world], desc=progress, leave=False,
        disable=rank > 0 or not progress or not sys.stderr.isatty(),
    )
    with torch.no_grad(), ready(model, student.precision), autocast(device, student.precision):
        for batch in bar:
            if student.interrupted():
                break
            rows = [ids[i] for i in batch]
            input_ids = pad(rows, student.tokenizer.pad_id, MULTIPLE[device.type])
            mask = pad([[1] * len(row) for row in rows], 0, MULTIPLE[device.type])
            tokens = model.generate(
                torch.from_numpy(input_ids).to(device),
                torch.from_numpy(mask).to(device),
                max_new_tokens=max_new_tokens,
            )
            for i, row in zip(batch, tokens.tolist()):
                mine[i] = student.tokenizer.decode(row)
    model.train(was_training)
    parts = [(mine, student.interrupted())]
    if world > 1:
        parts = [None] * world
        dist.all_gather_object(parts, (mine, student.interrupted()))
    if number := max(number for _, number in parts):
        raise Interrupted(number)
    texts = {i: text for part, _ in parts for i, text in part.items()}
    assert len(texts) == len(sources), "each source is decoded exactly once"
    return [texts[i] for i in range(len(sources))]


def predict(
    student: Student, examples: list[Example], explain: bool = False, progress: str | None = None
) -> list[dict]:
    """{"id", "prediction"} for each example, with "rationale" too if asked to explain.

    A single-task student's text is parsed into rationale and label; where it holds no answer
    the prediction is empty, never a guess.
    """
    if explain and not METHODS[student.method].explains:
        able = ", ".join(name for name, method in METHODS.items() if method.explains)
        raise UserError(
            f"--explain: this student was trained with {student.method}, which teaches no "
            f"rationales; allowed: students of {able}"
        )
    single = student.method == "single-task"
    sources = [make_source(e, student.method, student.prefixes) for e in examples]
    new_tokens = RATIONALE_TOKENS if single else LABEL_TOKENS
    texts = generate_texts(student, sources, new_tokens, progress=progress)
    rationales = [None] * len(texts)
    if single:
        task = get_task(student.dataset)
        parsed = [parse_completion(task, t) or (t, "") for t in texts]
        rationales, texts = [r for r, _ in parsed], [label for _, label in parsed]
    elif explain:
        sources = [make_source(e, student.method, student.prefixes, RATIONALE) for e in examples]
        rationales = generate_texts(student, sources, RATIONALE_TOKENS, progress=progress)
    rows = [{"id": e.id, "prediction": text} for e, text in zip(examples, texts)]
    if explain:
        for row, rationale in zip(rows, rationales):
            row["rationale"] = rationale
    return rows


# ------------------------------------------------------------------------------------- scoring


def gold_labels(examples: list[Example]) -> tuple[str, list[str | None]]:
    """What to score a split on: ("human", labels) where it has any, else ("teacher", labels)."""
    kind = "human" if any(e.label is not None for e in examples) else "teacher"
    return kind, [e.label if kind == "human" else e.teacher_label for e in examples]


def evaluate(
    student: Student, examples: list[Example], explain: bool = False, progress: str | None = None
) -> tuple[dict, list[dict]]:
    """Predicts a split and scores it.

    Returns ({"accuracy", "n", "labels"}, rows of `predictions.jsonl` in the examples' order).
    `labels` says whose labels were the measure; examples that have none of these are not counted.
    """
    kind, gold = gold_labels(examples)
    scored = [label is not None for label in gold]
    if not any(scored):
        raise UserError("no example has a label, neither human nor the teacher's: nothing to score")
    rows, task = predict(student, examples, explain, progress), get_task(student.dataset)
    for row, label in zip(rows, gold):
        row["correct"] = label is not None and is_correct(task, row["prediction"], label)
    accuracy = sum(row["correct"] for row in rows) / sum(scored)
    return {"accuracy": accuracy, "n": sum(scored), "labels": kind}, rows


def rationale_source(
    names: list[str] | None, dataset: str, needed: bool
) -> str | list[str] | None:
    """What `load_dataset` shall join to a split. Named with --rationales: that. Else, and only if
    the method needs rationales: the released completions for the four benchmarks; a folder (and
    the demo) carries its own."""
    if names:
        return names[0] if names[0] in NAMED and len(names) == 1 else names
    return "palm" if needed and get_task(dataset).palm else None


# ------------------------------------------------------------------------------- command line


def read_inputs(path: str) -> list[Example]:
    """Inputs to predict, from a file or `-` for standard input: JSON lines ({"input": str or
    [str, str], "id" and "rationale" optional) if the first line is an object, else a text a line.
    An input without an id gets its line number, from 1."""
    try:
        lines = (sys.stdin if path == "-" else open(path, encoding="utf-8")).read().split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--predict {path}: {error}; allowed: a UTF-8 text file, or -") from None
    numbered = [(i, line.rstrip("\r")) for i, line in enumerate(lines, 1) if line.strip()]
    if not numbered or not numbered[0][1].lstrip().startswith("{"):
        return [Example(str(i), line, None) for i, line in numbered]
    examples = []
    for i, line in numbered:
        try:
            row = json.loads(line)
            text = row["input"]
            if isinstance(text, list) and [type(part) for part in text] == [str, str]:
                text = tuple(text)
            elif not isinstance(text, str):
                raise TypeError("input is neither a string nor a pair of strings")
            examples.append(Example(str(row.get("id", i)), text, None, row.get("rationale")))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f'{path}:{i}: {error!r}; expected {{"input": "..."}} or {{"input": ["...", "..."]}}'
            ) from None
    return examples


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """All flags, with their defaults."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("student", help="a student folder, such as runs/NAME/best")
    add("--dataset", help="default: the one it was trained on")
    add("--split", default="test", choices=("train", "valid", "test"))
    add("--data-root", default="datasets")
    add("--rationales", nargs="+", help="palm, neox, human or teacher files (for rationale-input)")
    add("--predict", metavar="FILE", help="predict these inputs (JSON or plain lines; - for stdin)")
    add("--explain", action="store_true", help="generate rationales too")
    add("--out", metavar="FILE", help="default: predictions.jsonl in the student folder")
    add("--device")
    add("--precision", choices=("fp32", "bf16"), help="default: bf16 on CUDA, fp32 on CPU")
    return parser.parse_args(argv)


def run(args: argparse.Namespace, device: torch.device) -> None:
    """Predicts inputs, or scores a split; prints a JSON line for each, or one in the end."""
    precision = args.precision or ("bf16" if device.type == "cuda" else "fp32")
    student = load_student(args.student, device, precision)
    if args.predict:
        rows = predict(student, read_inputs(args.predict), args.explain, progress="predict")
        for row in rows:
            print0(json.dumps(row, ensure_ascii=False))
        return
    dataset = args.dataset or student.dataset
    get_task(dataset)
    out = Path(args.out) if args.out else Path(args.student) / "predictions.jsonl"
    if not out.parent.is_dir():
        raise UserError(f"--out {out}: {out.parent} is no folder; make it, or give another")
    rationales = rationale_source(args.rationales, dataset, student.method == "rationale-input")
    examples = load_dataset(dataset, args.split, args.data_root, rationales)
    student.dataset = dataset
    summary, rows = evaluate(student, examples, args.explain, progress=args.split)
    if rank_and_world()[0] == 0:
        write_jsonl(out, rows)
    about = {"student": args.student, "dataset": dataset, "split": args.split}
    print0(json.dumps({**about, **summary, "predictions": str(out)}))


def main(argv: list[str] | None = None) -> int:
    """Exit status 2, with one line, for a user's mistake."""
    args = parse_args(argv)

    def program() -> int:
        device = choose_device(args.device)
        with processes(device):
            run(args, device)
        return 0

    return exit_status(program)


if __name__ == "__main__":
    leave(main())
