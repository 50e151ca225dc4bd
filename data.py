"""Text and files: examples, datasets, answers in completions, tokens, the order of batches.

A new dataset is a row of `TASKS`, or a folder of `*.jsonl`. This file returns strings and numpy
arrays. It imports neither torch nor another file of ours, and it knows nothing of prompts, the
network, lambda or ranks.
"""

import contextlib
import fcntl
import functools
import hashlib
import io
import json
import operator
import os
import re
import shlex
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import sentencepiece

Text = str | tuple[str, ...]  # one part, or several
Rationales = str | Sequence[str | Path] | None  # palm, neox or human; a teacher's files; none


class UserError(ValueError):
    """A user gave something wrong. One line: the value, what is allowed, how to correct it."""


@dataclass(slots=True)
class Example:
    """An input, a human's label for it, and a teacher's rationale and label."""

    id: str
    input: str | tuple[str, str]  # a pair for NLI: (premise, hypothesis)
    label: str | None
    rationale: str | None = None
    teacher_label: str | None = None


# ---- Files ---------------------------------------------------------------------------------------


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 file atomically, and creates its folder. Readers see the old file or the new
    one, also after a crash. OSError, such as a full disk, leaves the old file as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Two processes may write the same file, so each has its own temporary file.
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Writes one JSON value, indented, with `write_text`."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_jsonl(path: Path, rows: Iterable[dict]) -> None:
    """Writes one JSON object a line with `write_text`."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def lock(path: Path) -> BinaryIO:
    """Opens a file for appending and locks it against other processes until it is closed; the
    system unlocks it after SIGKILL too. Creates the file and its folder.

    UserError if another process holds the lock or the file cannot be written. A filesystem without
    locks gives one warning and no lock.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "ab", buffering=0)
    except OSError as error:
        raise UserError(f"--out {path}: {error.strerror}; give another name") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise UserError(f"{path} is in use by another process; give another --out") from None
    except OSError as error:  # Lustre without `-o flock`, some NFS and FUSE
        print(f"warning: {path} has no lock: {error.strerror}; use one process", file=sys.stderr)
    return file


def sha256(content: bytes | Path) -> str:
    """The sha256 of bytes, or of a file that is read in pieces, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with io.BytesIO(content) if isinstance(content, bytes) else open(content, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


# ---- Arithmetic: the value of model text, which is never executed --------------------------------

MAX_LENGTH, MAX_DIGITS, MAX_DEPTH = 2000, 100, 50  # of a text, of a number, of nested ( and -
NUMBER = r"[0-9]+\.?[0-9]*|\.[0-9]+"
TOKEN = re.compile(rf"{NUMBER}|[-+*/()]")
OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}


def evaluate_arithmetic(text: str) -> Fraction | None:
    """Returns the exact value of numbers, + - * /, parentheses and unary minus; None for all else.

    >>> evaluate_arithmetic("( 84.0 / 2.0 )"), evaluate_arithmetic("9**9**9")
    (Fraction(42, 1), None)
    """
    if len(text) > MAX_LENGTH:
        return None
    tokens = ["end", *reversed(TOKEN.findall(text))]  # a stack: the next token is the last
    # Nothing but space may be between the tokens.
    if TOKEN.sub("", text).strip() or max(map(len, tokens)) > MAX_DIGITS:
        return None

    def parse(level: int, depth: int) -> Fraction:
        """level 0: a sum of products; 1: a product of factors; 2: a factor."""
        if level < 2:
            value = parse(level + 1, depth)
            while tokens[-1] in (("+", "-"), ("*", "/"))[level]:
                value = OPERATIONS[tokens.pop()](value, parse(level + 1, depth))
            return value
        token = tokens.pop()
        if token not in ("(", "-"):
            return Fraction(token)  # raises ValueError for all but a number
        if depth == MAX_DEPTH:
            raise ValueError("too deep")
        value = -parse(2, depth + 1) if token == "-" else parse(0, depth + 1)
        if token == "(" and tokens.pop() != ")":
            raise ValueError("not closed")
        return value

    try:
        value = parse(0, 0)
    except (ValueError, ZeroDivisionError):
        return None
    return value if tokens == ["end"] else None


# ---- The datasets --------------------------------------------------------------------------------

SPLITS = ("train", "valid", "test")
ARCHIVE = "`git clone https://github.com/google-research/distilling-step-by-step`, unpacked"
NLI = ("entailment", "neutral", "contradiction")  # in the order of the integer labels
LETTERS = "abcdefghij"  # of the choices in an input
MARKER = "So the answer is"  # of a folder whose task.json has no other
WANTED = {str: "a text", list: "a list", int: "an integer", float: "a number", type(None): "null"}


@dataclass(frozen=True)
class Task:
    """All facts about a dataset. Functions below take a Task, or its name."""

    name: str
    labels: tuple[str, ...] | None  # the closed set; None for free text, arithmetic or choices
    scorer: str  # "text" or "arithmetic"
    marker: str  # what comes before the label in a completion
    folder: str  # below the data root, or absolute
    file: str = "{}.jsonl"  # the name of a split's file
    # Maps a record to (its id or None, input, label). None: the record has our own format.
    read: Callable[[dict], tuple[str | None, Text, str | None]] | None = None
    splits: tuple[str, ...] = SPLITS
    cut: bool = False  # valid is a part of train's file
    palm: dict[str, int] | None = None  # the number of files with completions, for each file split
    human: str | None = None  # the key of a human's explanation
    source: str = "your own folder: train.jsonl, and optionally valid.jsonl and test.jsonl"
    also: tuple[str, ...] = ()  # markers that other teachers write
    end: str = "."  # what comes after the label
    choices: bool = False  # multiple choice: each input ends in its "Answer Choices:"


def typed(key: str, value: Any, *kinds: type) -> Any:
    """Returns the value of a key. ValueError with both and the wanted types where it has another
    type."""
    if type(value) not in kinds:
        wanted = " or ".join(WANTED[kind] for kind in kinds)
        raise ValueError(f"{key} {value!r:.200} is not {wanted}")
    return value


def _read_own(r: dict) -> tuple[str | None, Text, str | None]:
    """Our own format: id, input (a text or a list of two) and label, which may be missing."""
    parts = r["input"]
    input = tuple(parts) if isinstance(parts, list) else parts
    return typed("id", r["id"], str), input, r.get("label")


def _read_choices(r: dict) -> tuple[str | None, Text, str | None]:
    """CommonsenseQA: the choices become lines of the input, the label is the text of one."""
    id, question, answer = r["id"], typed("question", r["question"], str), r["answer"]
    choices = zip(LETTERS, typed("choices", r["choices"], list))
    lines = [f"({letter}) {choice}" for letter, choice in choices]
    return id, "\n".join([question, "Answer Choices:", *lines]), answer


def _read_nli(r: dict) -> tuple[str | None, Text, str | None]:
    """e-SNLI and ANLI: the input is a pair, the label an integer; only ANLI has ids."""
    parts = tuple(typed(key, r[key], str) for key in ("premise", "hypothesis"))
    label = typed("label", r["label"], int, float)  # pandas writes 1.0
    if label not in (0, 1, 2):
        raise ValueError(f"label {label!r} is not 0 {NLI[0]}, 1 {NLI[1]} or 2 {NLI[2]}")
    return r.get("uid"), parts, NLI[int(label)]


def _read_asdiv(r: dict) -> tuple[str | None, Text, str | None]:
    """ASDiv: the two texts of SVAMP's inputs, and no label."""
    return r["ID"], "\n".join(typed(key, r[key], str) for key in ("Body", "Question")), None


# fmt: off
TASKS = {task.name: task for task in (
    # Above each benchmark: a line of its file, and what one of its released completions looks like.
    # {"input":"Luke [...] round?","label":"( 84.0 \/ 2.0 )"}
    # Luke scored 84 points [...] 84 / 2 = 42. The answer is (84 / 2).\n\nQ: There are [...]
    Task("svamp", None, "arithmetic", "The answer is", "svamp", "svamp_{}.json",
         lambda r: (None, r["input"], r["label"]), cut=True, palm={"train": 2, "test": 1},
         source=ARCHIVE),
    # {"id":"6b81[...]","question":"\"There are 10 apples [...]","choices":["park","coloring book",
    # "garden center","math problem","gravity"],"answer":"math problem",
    # "abstractive_explanation":"webmath is [...]","extractive_explanation":"[...]"}
    # The answer must be something [...] So the answer is (d) math problem.\n\nQ: "The man [...]
    Task("cqa", None, "text", "So the answer is", "cqa", "cqa_{}.json", _read_choices, cut=True,
         palm={"train": 10, "test": 2}, human="abstractive_explanation", source=ARCHIVE,
         choices=True),
    # {"premise":"[...]","hypothesis":"[...]","label":1,"explanation_1":"[...]"}
    # [...]\nAnswer: neutral\n\nPremise: [...]
    Task("esnli", NLI, "text", "Answer:", "esnli", "esnli_{}.json", _read_nli,
         palm={"train": 100, "valid": 2, "test": 2}, human="explanation_1", source=ARCHIVE,
         also=("So the answer is", "The answer is"), end=""),
    # {"uid":"[...]","premise":"[...]","hypothesis":"[...]","label":2,"reason":"[...]"}
    # [...] So the answer is contradiction.\n\nPremise: [...]
    Task("anli1", NLI, "text", "So the answer is", "anli1", "anli1_{}.json", _read_nli,
         palm={"train": 4, "valid": 1, "test": 1}, human="reason", source=ARCHIVE,
         also=("The answer is",)),
    # Its labels are not read: it gives more inputs for SVAMP's teacher (Figures 7 and 9).
    # <Problem ID="nluds-0001"><Body>Seven red [...]</Body><Question>How [...]
    Task("asdiv", None, "arithmetic", "The answer is", "asdiv", "ASDiv.xml", _read_asdiv,
         ("train",), source="https://github.com/chaochun/nlu-asdiv-dataset"),
    Task("demo", None, "text", MARKER, str(Path(__file__).resolve().parent / "demo")),
)}
# fmt: on


def get_task(name: str | Task) -> Task:
    """Returns the Task of a dataset: a row of the table, a folder, or a Task, which it returns
    unchanged.

    A folder's facts are in its task.json; without one, the labels are those in train.jsonl, if
    they are at most 20. UserError for an unknown name or a malformed task.json or train.jsonl.
    """
    if isinstance(name, Task):
        return name
    task = TASKS.get(name) or Task(name, None, "text", MARKER, name)
    if task.read:
        return task
    folder = Path(task.folder).absolute()
    train = folder / "train.jsonl"
    if not train.is_file():
        allowed = f"one of {', '.join(TASKS)}, or a folder holding train.jsonl"
        raise UserError(f"dataset {name!r} is unknown: {allowed}")
    facts = _read_task_file(folder / "task.json", task)
    if "labels" not in facts and facts["scorer"] == "text":
        lines = _read(train, lambda r: _text("label", r.get("label")), OWN_FORM)
        labels = sorted({label for _, label in lines} - {None})
        facts["labels"] = tuple(labels) if 0 < len(labels) <= 20 else None
    cut = not (folder / "valid.jsonl").is_file()
    return replace(task, folder=str(folder), cut=cut, **facts)


def _read_task_file(path: Path, task: Task) -> dict:
    """Returns the scorer and the marker of a folder's task.json, by default the task's, and the
    labels where it has them. UserError where it has another form."""
    try:
        facts = json.loads(path.read_bytes()) if path.is_file() else {}
        if not isinstance(facts, dict):
            raise ValueError("not a JSON object")
        marker = _text("marker", facts.get("marker", task.marker))
        fields = {
            "scorer": facts.get("scorer", task.scorer),
            "marker": marker and " ".join(marker.split()),
        }
        if "labels" in facts:
            labels = typed("labels", facts["labels"], list, type(None))
            fields["labels"] = labels and tuple(_text("label", label) for label in labels)
        if marker is None or facts.get("labels") == [] or None in (fields.get("labels") or ()):
            raise ValueError("a list or a text is empty")
        if fields["scorer"] not in ("text", "arithmetic"):
            raise ValueError(f"scorer {fields['scorer']!r} is unknown")
        return fields
    except (ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: {error}; it looks like {TASK_FORM}") from None


def data_files(
    name: str | Task, split: str, root: str | Path = "datasets", rationales: Rationales = None
) -> list[Path]:
    """Lists the files that `load_dataset` reads for a split: the examples, then the teacher's
    answers. They need not exist. UserError for a split or rationales that the dataset lacks."""
    task = get_task(name)
    if split not in task.splits:
        raise UserError(f"split {split!r} of {task.name}: one of {', '.join(task.splits)}")
    file_split = "train" if split == "valid" and task.cut else split
    path = Path(root, task.folder, task.file.format(file_split))
    if not isinstance(rationales, str):
        return [path, *map(Path, rationales or ())]
    answers = {}
    if task.palm:
        shards = range(task.palm[file_split])
        answers["palm"] = [path.parent / "llm" / f"{file_split}_CoT_{i}.json" for i in shards]
        answers["neox"] = [Path(root, "gpt-neox", task.name, f"{file_split}.json")]
    if task.human:
        answers["human"] = []  # the explanations are in the file of the examples
    if rationales not in answers:
        allowed = ", ".join([*answers, "a teacher's files (*.jsonl)"])
        raise UserError(f"rationales {rationales!r} of {task.name}: {allowed}")
    return [path, *answers[rationales]]


def has_split(name: str | Task, split: str, root: str | Path = "datasets") -> bool:
    """Says whether the file of a split exists, without opening it."""
    task = get_task(name)
    return split in task.splits and data_files(task, split, root)[0].is_file()


def load_dataset(
    name: str | Task,
    split: str,
    root: str | Path = "datasets",
    rationales: Rationales = None,
    counts: Counter | None = None,
    mixed_with: str | Task | None = None,
) -> list[Example]:
    """Reads the examples of a split, in the order of its file.

    rationales: None (those in a folder's own lines; benchmarks have none), "palm", "neox",
    "human", or a list of teacher files, which are joined by id. A teacher file may also answer
    other splits of the dataset, and of the dataset that this one is `mixed_with`.

    Adds to `counts`: examples, without_rationale, teacher_labels_dropped (neither in the closed set
    nor among the choices) and teacher_ids_unmatched. UserError: a file is missing, malformed or
    for another dataset; a label is outside the set; an id occurs twice; a split is empty.
    """
    task, counts = get_task(name), Counter() if counts is None else counts
    path, *answers = data_files(task, split, root, rationales)
    examples = _read_examples(task, split, path, rationales)
    if answers and isinstance(rationales, str):
        _join_completions(task, path, examples, answers)
    elif answers:
        related = [task, get_task(mixed_with)] if mixed_with else [task]
        counts["teacher_ids_unmatched"] += _join_files(examples, answers, related, root)
    # Completions are joined by row, so the file is divided after that.
    if task.cut and split != "test":
        examples = [examples[i] for i in split_indices(len(examples))[split == "valid"]]
    for example in examples:
        if example.label and example.label != example.label.strip():
            example.label = example.label.strip()
            counts["labels_stripped"] += 1
        if example.teacher_label and not_allowed(task, example.input, example.teacher_label):
            example.teacher_label = None
            counts["teacher_labels_dropped"] += 1
        counts["without_rationale"] += not example.rationale
    counts["examples"] += len(examples)
    return examples


def split_indices(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the (train, valid) rows of a file of n rows, each in file order. A fixed random
    tenth, rounded up, is valid."""
    order, n_valid = np.random.default_rng(0).permutation(n), -(-n // 10)
    return np.sort(order[n_valid:]), np.sort(order[:n_valid])


# What the files look like: task.json, a line of our own format, a line of a teacher's file.
TASK_FORM = '{"labels": ["yes", "no"] or null, "scorer": "text" or "arithmetic", "marker": "so:"}'
OWN_FORM = '{"id": "7", "input": "a text, or a list of two", "label": "a text, or null"}'
TEACHER_FORM = '{"id": "7", "rationale": "because", "teacher_label": "yes"}'
# Makes such lines of a JSON array or a CSV file: the reader, and the file's name.
CONVERT = 'python -c "import csv, json, sys; [print(json.dumps(r)) for r in {}(sys.stdin)]" < {}'


def _read(path: Path, make: Callable, form: str, source: str = "") -> Iterator[tuple[int, Any]]:
    """Yields (line number, make(object)) of a file's lines, or of ASDiv's problems."""
    try:
        with path.open("rb") as file:
            lines = _problems(file) if path.suffix == ".xml" else file
            yield from read_records(path, lines, make, form)
    except (OSError, ElementTree.ParseError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: {reason}; it comes from {source}") from None


def _problems(file: BinaryIO) -> Iterator[str]:
    """Yields each problem of ASDiv's XML as a line of JSON: its attributes and its texts."""
    for problem in ElementTree.parse(file).iter("Problem"):
        yield json.dumps({**problem.attrib, **{child.tag: child.text for child in problem}})


class _Keys(dict):
    """A record that has every key, and remembers those that were looked up."""

    def __missing__(self, key: str) -> str:
        return self.setdefault(key, "...")


def _form(task: Task) -> str:
    """Returns an example of a line in the task's files: its keys are those that `read` looks up."""
    if task.read is None:
        return OWN_FORM
    keys = _Keys()
    with contextlib.suppress(Exception):  # it may want no text where it gets one
        task.read(keys)
    return json.dumps(keys)


def read_records(
    path: Path | str, lines: Iterable[bytes | str], make: Callable[[dict], Any], form: str
) -> Iterator[tuple[int, Any]]:
    """Yields (line number from 1, make(object)) of JSON lines; passes over blank lines and a byte
    order mark.

    UserError with path and line, and with `form`, an example of a line, where a line is no JSON
    object or `make` raises for it, as a missing key or a wrong type does. Where the whole file has
    another form, that is said, with the command that converts it.
    """
    for number, line in enumerate(lines, 1):
        try:
            text = line if isinstance(line, str) else line.decode("utf-8-sig")
            if not text.strip():
                continue
            value = json.loads(text)
            if not isinstance(value, dict):
                raise ValueError("not a JSON object")
            yield number, make(value)
            continue
        except KeyError as error:
            reason = f"no {error}"
        except (TypeError, AttributeError, IndexError) as error:
            # Python's words alone would not say which key they are about.
            kinds = ", ".join(f"{key} {type(v).__name__}" for key, v in value.items())
            reason = f"{error} ({kinds})"
        except (ValueError, RecursionError) as error:
            # Of JSON's errors the message alone: their own line and column would confuse.
            reason = getattr(error, "msg", error)
        if Path(path).is_file():
            reason = other_form(path, Path(path).read_bytes(), csv=number == 1) or reason
        raise UserError(f"{path}:{number}: {reason}; a line looks like {form}")


def other_form(path: Path | str, content: bytes, csv: bool = False) -> str:
    """Returns "" for a file of lines in UTF-8; else what the file is, and how to convert it. A file
    is CSV only if `csv` says that it should have been JSON."""
    name = shlex.quote(str(path))
    encoding = json.detect_encoding(content).upper()  # by its byte order mark and its zero bytes
    try:
        text = content.decode(encoding).strip()
    except UnicodeDecodeError:
        encoding = "latin-1" if encoding.startswith("UTF-8") else encoding
    if not encoding.startswith("UTF-8"):
        known = re.sub("-(?=1$|[LB]E$)", "", encoding)  # iconv's name: latin1, UTF-16LE
        return f"not UTF-8; it looks like {encoding}: `iconv -f {known} -t UTF-8 {name} > new`"
    with contextlib.suppress(ValueError, RecursionError):
        if text.startswith("[") and isinstance(json.loads(text), list):
            command = CONVERT.format("json.load", name)
            return f"a JSON array, not JSON lines; convert it: `{command} > new`"
    if csv and re.match(r"[^{[<\n]+[,;\t]", text):
        command = CONVERT.format("csv.DictReader", name)
        return f"looks like CSV, not JSON lines; convert it: `{command} > new`"
    return ""


def _read_examples(task: Task, split: str, path: Path, rationales: Rationales) -> list[Example]:
    """Reads every example in the file of a split, and gives an id to those that have none."""
    read = functools.partial(read_example, task, rationales=rationales)
    examples = [example for _, example in _read(path, read, _form(task), task.source)]
    if len(examples) < (2 if task.cut and split != "test" else 1):
        raise UserError(f"{path}: the {split} split of {task.name} is empty; it needs examples")
    for row, example in enumerate(examples):
        if example.id is None:
            example.id = f"{path.stem.replace('_', '-')}-{row}"
    twice = [id for id, n in Counter(example.id for example in examples).items() if n > 1]
    if twice:
        raise UserError(f"{path}: duplicate ids, {len(twice)} of them, such as {twice[:3]}")
    return examples


def read_example(task: Task, record: dict, rationales: Rationales = None) -> Example:
    """Makes an Example of one record. KeyError, TypeError or ValueError where the record is
    malformed or its label is not allowed; the label keeps the space around it."""
    id, input, label = (task.read or _read_own)(record)
    parts = input if isinstance(input, tuple) and len(input) == 2 else (input,)
    if not all(isinstance(part, str) for part in parts):
        raise ValueError(f"input {input!r} is neither a text nor a list of two")
    id = typed("id", id, str, type(None))
    "".join([id or "", *parts]).encode()  # ValueError for half of a surrogate pair
    known = _text("label", label)
    example = Example(id, input, known and label)
    if task.read is None and rationales is None:
        _add_answer(example, record)
    elif rationales == "human":
        example.rationale = _text(task.human, record[task.human])
    if known and (allowed := not_allowed(task, input, known)):
        raise ValueError(f"label {known!r} is not {allowed}")
    return example


def _add_answer(example: Example, record: dict) -> None:
    """Copies a teacher's rationale and label from a record in our own format."""
    example.rationale = _text("rationale", record.get("rationale"))
    example.teacher_label = _text("teacher_label", record.get("teacher_label"))


def _text(key: str, value: Any) -> str | None:
    """Returns a text without surrounding space; None for null and for blank text."""
    text = typed(key, value, str, type(None)) or ""
    text.encode()  # ValueError for half of a surrogate pair
    return text.strip() or None


def _choices(input: Text) -> list[str]:
    """Returns what a multiple-choice input offers: the lines "(a) park" at its end."""
    lines = str(input).rpartition("\nAnswer Choices:\n")[2].split("\n")
    return [line[4:].strip() for line in lines if re.match(rf"\([{LETTERS}]\) ", line)]


def not_allowed(task: Task, input: Text, label: str) -> str:
    """Returns "" for an allowed label, else what is allowed: the task's set, what a multiple-choice
    input offers, or any arithmetic."""
    if task.scorer == "arithmetic":
        return "" if evaluate_arithmetic(label) is not None else "numbers, + - * /, parentheses"
    allowed = _choices(input) if task.choices else task.labels
    return "" if allowed is None or label in allowed else f"one of {', '.join(allowed)}"


def _join_completions(task: Task, path: Path, examples: list[Example], files: list[Path]) -> None:
    """Joins released completions to the rows of the data file by position: the rows go on from
    one file to the next."""
    completions = []
    for file in files:
        try:
            shard = typed("the file", json.loads(file.read_bytes()), list)
            completions += [typed("a completion", text, str) for text in shard]
        except (OSError, ValueError, RecursionError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"{file}: {reason}; it comes from {task.source}") from None
    if len(completions) != len(examples):
        counts = f"{len(completions)} completions for {len(examples)} rows of {path}"
        problem = f"{files[0]} and those after it are for another dataset: {counts}"
        raise UserError(f"{problem}; get both from {task.source}")
    for example, completion in zip(examples, completions):
        rationale, example.teacher_label = parse_completion(task, completion) or (None, None)
        example.rationale = rationale or None


def _join_files(
    examples: list[Example], files: list[Path], related: list[Task], root: str | Path
) -> int:
    """Joins a teacher's answers in our own format to examples by id. Returns the number of ids that
    are in no split of the examples' dataset, the first of `related`, nor of another."""
    by_id = {example.id: example for example in examples}
    known, seen = set(by_id), set()

    def join(r: dict) -> str:
        id = typed("id", r["id"], str)
        if id in seen:
            raise ValueError(f"id {id!r} occurs twice")
        seen.add(id)
        # The answer to another split's example is checked like the others, and dropped.
        _add_answer(by_id.get(id, Example("", "", None)), r)
        return id

    for file in files:
        source = "teacher.py, or --rationales is mistyped"
        ids = {id for _, id in _read(file, join, TEACHER_FORM, source)}
        if not ids <= known:  # reading the other splits takes a while
            splits = [(t, s) for t in related for s in t.splits if has_split(t, s, root)]
            known |= {e.id for t, s in splits for e in load_dataset(t, s, root)}
        if not ids & known:
            reason = f"none of its {len(ids)} ids is in {related[0].name}"
            like = f"whose ids look like {examples[0].id!r}"
            raise UserError(f"{file} is for another dataset: {reason}, {like}")
    return len(seen - known)


# ---- Answers in text -----------------------------------------------------------------------------
#
# A completion is read from left to right. What follows an invented example is cut off. The text
# before a marker is the rationale. The label is what follows the marker, up to the end of the
# sentence, without the marks around it: a label of the closed set, the words of one choice, a whole
# expression, or any text. All patterns take time that is linear in the length of the text, since
# completions may be hostile.

# Where a completion runs on into an invented example: at a line's start, or after a sentence.
INVENTED = re.compile(r"(?:^|(?<=[.!?]))[ \t*_#]*(?:Q|Question|Input|Premise)[*_]*:", re.MULTILINE)
BLANK_LINE = re.compile(r"\n[ \t]*\n")
# Marks around a marker or a label belong to neither it nor the rationale: Markdown's emphasis and
# code, and quotes; and, at the start of a line, the marks of headings, quotations and lists.
OPENING, CLOSING = "*_`\"'“‘", "*_`\"'”’"
CLOSE = str.maketrans(OPENING, CLOSING)
LINE_MARKS = "#>*+•-"
# From a marker to the end of its answer's line, without what is between the two.
LINE = re.compile(rf"(?:\n(?:[ \t]*[{LINE_MARKS}]+(?=\s))+|[\s:])*(.*)")
LETTER = re.compile(rf"\([*_`]*[{LETTERS}][*_`]*\)[*_`]*[ \t]*")  # of a choice: "(b) "
# The full stop that ends an answer: the line's last, or one before a space, but not U.S. or Dr.
STOP = re.compile(
    rf"(?:(?<!\.[A-Za-z])(?<!\b[DMS][rst])|(?=.[{CLOSING}]*$))\.([{CLOSING}]*)(?:\s|$).*"
)
# A pair of marks and the words between them, none of which has the same mark.
EMPHASIS = re.compile(
    r"(?<!\S)([*_`]+(?![*_`])|[\"'“‘])(?=\S)((?:(?!\1).)+)(?<=\S)(?:\1|[”’])(?![\w(])"
)
# Marks at one end, whose partner is outside the label.
LONE = re.compile(r"^[*_`\"“]+|[*_`\"”]+$")
# An arithmetic answer that goes on in the next line: "7" and then "+ 2".
CONTINUES = re.compile(r"\n[ \t]*[-+*/=×÷)][ \t]*[\d($]")
# How others write numbers: 1,000 for 1000, $5, 3 x 4, and 5 red apples.
THOUSANDS = re.compile(r"(?<![\d,.])\d{1,3}(?:,\d{3})+(?![\d,])")
TIMES = re.compile(r"(?<=[\d)])\s*[xX]\s*(?=[\d($])")
SIGNS = str.maketrans("×·÷−–", "**/--", "$€£¥\\")
# Words that compute or compare, and variables: a number with one of these has another value.
COMPUTES = (
    "(?i:and|or|not|if|plus|minus|times|over|of|by|to|from|mod|divided|multiplied|point|factorial|"
    "(?:dozen|hundred|thousand|million|billion|trillion|half|halve|third|quarter|percent)s?|bn|pi|"
    "squared|cubed|more|less|fewer|than)|[exyznkKMB²³]"
)
# At most four other words after a number are its unit.
UNIT = rf"(?!(?:{COMPUTES})(?![^\W\d_]))[^\W\d_]+"
UNITS = re.compile(rf"(?<=[\d)])\s*°?{UNIT}(?:(?:\s+|[/'’-]){UNIT}){{0,3}}(?![^\W_]|\.\d)")


def parse_completion(
    name: str | Task, completion: str, released: bool = True
) -> tuple[str, str] | None:
    """Returns (rationale, label) of a teacher's completion or of a single-task student's text;
    None where it has no answer, or different ones. A label outside the closed set is returned as
    it is written, without Markdown's marks around it. `released` is for the completions that came
    with the benchmarks: their expressions are cut as the released parser did.

    >>> parse_completion("svamp", "84 / 2 = 42. The answer is (84 / 2).\n\nQ: There are")
    ('84 / 2 = 42.', '(84 / 2)')
    """
    task = get_task(name)
    # 1. The completion ends where it goes on to an invented example.
    text = INVENTED.split(completion.strip(), maxsplit=1)[0]
    # 2. Each marker may have an answer after it; "The answer is easy." has none.
    found = None
    for match in _marker(task).finditer(text):
        window = text[match.end() : match.end() + MAX_LENGTH]
        opened = "" if match["closed"].strip(":") else match["opened"]
        label = _answer(task, window, opened, released and task.palm is not None)
        # 3. The first answer counts; a later one that differs makes the whole text doubtful.
        if label and found and not is_correct(task, label, found[1]):
            return None
        if label and not found:
            found = _rationale(text[: match.start()]), label
            # Blank lines may divide a rationale, but after an answer they start something new.
            end = LINE.match(text, match.end()).end()
            # A marker beyond the cut is still found, and has no answer after it.
            text = text[:end] + BLANK_LINE.split(text[end:], maxsplit=1)[0]
    return found


def _marker(task: Task) -> re.Pattern:
    """Matches any of a task's markers from the start of a word, with any space and marks of
    emphasis in it. "opened" are the marks that open before it, around marker and label: "**" in
    `Snow is white. **So the answer is no.**`; "closed" are the marks that end with the marker."""
    words = (re.findall(r"\w+|[^\w\s]", marker) for marker in (task.marker, *task.also))
    spellings = "|".join(r"[\s*_`]*".join(map(re.escape, marker)) for marker in words)
    opened = rf"(?P<opened>(?:(?<!\S)[{OPENING}]+)?)"
    closed = rf"(?P<closed>(?:[:{CLOSING}]*(?=\s))?)"
    return re.compile(rf"{opened}(?<![^\W_])(?:{spellings}){closed}")  # re keeps it


def _rationale(text: str) -> str:
    """Returns the text before a marker, without lines at its end that hold only marks."""
    lines = text.split("\n")
    while lines and not lines[-1].strip(LINE_MARKS + " \t"):
        lines.pop()
    return "\n".join(lines).strip()


def _bare(text: str) -> str:
    """Returns a label without the marks around it; `"yes" or "no"`, *a* and *b*, 'tis stay."""
    text = text.strip()
    while match := EMPHASIS.fullmatch(text):
        text = match[2]
    return LONE.sub(lambda match: match[0] if text.count(match[0]) > 1 else "", text).strip()


def _answer(task: Task, text: str, opened: str, released: bool) -> str | None:
    """Returns the label at the start of a text, just after a marker; `opened` are the marks
    before the marker."""
    match = LINE.match(text)
    line = match[1].rstrip()
    sentence = STOP.sub(r"\1", line).removesuffix(opened.translate(CLOSE)[::-1])
    if task.scorer == "arithmetic":
        if not STOP.search(line) and CONTINUES.match(text, match.end()):
            return None
        return _released_expression(sentence) if released else _expression(sentence)
    # A label's words may have any space between them.
    spellings = {label: r"\s+".join(map(re.escape, label.split())) for label in task.labels or ()}
    for label in sorted(spellings, key=len, reverse=True):
        # "neutral.", "**neutral**", "neutral, as he ...", but not "neutral or contradiction".
        if match := re.match(rf"[{OPENING}]*{spellings[label]}(?![^\W_]|-|_\w)(.*)", line):
            others = rf"(?<!\w)(?:{'|'.join(spellings.values())})(?!\w)"
            return None if re.search(others, STOP.sub("", match[1])) else label
    if task.choices:
        before, *choices = LETTER.split(sentence)
        if len(choices) != 1 or before.strip(OPENING):
            return None  # "(a) ocean or (b) sea", "all of these"
        sentence = before + choices[0]
    return _bare(sentence) or None


def _expression(sentence: str) -> str | None:
    """Returns the whole expression that a sentence is, as numbers, + - * / and parentheses; None
    where it holds anything but that, marks and units. After `=` it must have the same value."""
    for text in (sentence, EMPHASIS.sub(r"\2", sentence)):  # "(9) * 2" has no emphasis in it
        sides = [_numbers(side) for side in text.split("=")]
        if all(_same_value(side, sides[0]) for side in sides):
            return sides[0]
    return None


def _numbers(text: str) -> str:
    """Returns an expression as `evaluate_arithmetic` reads it: "$1,000 x 3 boxes" is "1000 * 3"."""
    if evaluate_arithmetic(text) is None:
        text = THOUSANDS.sub(lambda match: match[0].replace(",", ""), text)
        text = UNITS.sub("", TIMES.sub(" * ", text).translate(SIGNS)).strip()
        text = re.sub(rf"^(-?{NUMBER})\s*%$", r"\1", text)
    return " ".join(text.split())


def _released_expression(sentence: str) -> str | None:
    """Returns an expression as the released parser cuts it, from the first parenthesis to the last:
    "(16 * 17) * 4" becomes "(16 * 17)"; of "(3 + 1) and (9 - 2)" the last remains, which is the
    value of Python's `and`."""
    sentence = EMPHASIS.sub(r"\2", sentence).lstrip("$")
    match = re.match(r"\(.*\)", sentence)
    if not match or sentence.count("(") > sentence.count(")") or sentence[-1] in "+-*/":
        return None  # the completion was cut off: "(120 /", "(9 - 2) * (3"
    label = match[0].split("and")[-1].strip()
    if label.count(")") > label.count("("):  # one around the sentence or the whole list
        label = label[:-1]
    return label if evaluate_arithmetic(label) is not None else None


def format_answer(name: str | Task, input: Text, label: str) -> str:
    """The sentence that `parse_completion` reads the label from: single-task's last words.

    >>> format_answer("svamp", "Luke scored [...]", "84 / 2")
    'The answer is (84 / 2).'
    """
    task, label = get_task(name), label.strip()
    if task.scorer == "arithmetic" and not (label.startswith("(") and label.endswith(")")):
        label = f"({label})"
    if task.choices and label in (choices := _choices(input)):
        label = f"({LETTERS[choices.index(label)]}) {label}"
    return f"{task.marker} {label}{task.end}"


def is_correct(name: str | Task, prediction: str | None, label: str) -> bool:
    """Text is right when equal after whitespace normalisation (the released rule is strip),
    arithmetic when the exact values agree to 1e-6 relative. No prediction is wrong."""
    if prediction is None or get_task(name).scorer == "text":
        return prediction is not None and prediction.split() == label.split()
    return _same_value(prediction, label)


def _same_value(a: str, b: str) -> bool:
    x, y = evaluate_arithmetic(a), evaluate_arithmetic(b)
    return x is not None and y is not None and abs(x - y) <= max(abs(x), abs(y)) / 10**6


# ---- Tokens --------------------------------------------------------------------------------------

MAX_SOURCE, MAX_TARGET = 1024, 256  # tokens; Appendix A.1, and the released code's cut
SENTINELS = 100
SPECIAL = re.compile(r"(</s>|<pad>|<unk>|<extra_id_(?:[0-9]|[1-9][0-9])>)")


def _why_unreadable(path: Path) -> str:
    """Says what is in the place of a vocabulary, where that is known."""
    if path.is_symlink() and not path.exists():
        return f"a link to nothing ({os.readlink(path)}); copy the folder with `cp -rL`"
    if path.is_file() and path.read_bytes().startswith(b"version https://git-lfs"):
        return "a git-lfs pointer, not the file; fetch that with `git lfs pull`"
    if path.with_name("tokenizer.json").exists() and not path.exists():
        fetch = f"`hf download google/t5-v1_1-base spiece.model --local-dir {path.parent}`"
        reason = "newer transformers saves tokenizer.json alone"
        return f"{reason}; copy spiece.model of the base model, as by {fetch}"
    return ""


def _added(path: Path) -> Iterator[tuple[str, int]]:
    """Yields the tokens in the files that `transformers` saves beside a vocabulary."""
    for file in (path.with_name("added_tokens.json"), path.with_name("tokenizer.json")):
        try:
            found = json.loads(file.read_bytes()) if file.is_file() else {}
            if file.name == "tokenizer.json":
                found = {token["content"]: token["id"] for token in found.get("added_tokens", ())}
            yield from found.items()
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise UserError(f"{file} is damaged: {error!r}; fetch it again, or remove it") from None


class Tokenizer:
    """T5's tokenizer: a SentencePiece model, and 100 sentinels above its pieces; <extra_id_0> has
    the highest id. UserError where the file is no such model, or pad, EOS and unknown have other
    ids than T5's. https://huggingface.co/docs/transformers/model_doc/t5#transformers.T5Tokenizer"""

    pad_id, eos_id, unk_id = 0, 1, 2

    def __init__(self, path: str | Path):
        path, self.model = Path(path), sentencepiece.SentencePieceProcessor()
        try:
            self.file = path.read_bytes()
            self.model.LoadFromSerializedProto(self.file)
        except (OSError, RuntimeError) as error:
            reason = getattr(error, "strerror", "not a SentencePiece model")
            reason = _why_unreadable(path) or f"{reason}; a T5 folder holds one as spiece.model"
            raise UserError(f"{path}: {reason}") from None
        ids = self.model.pad_id(), self.model.eos_id(), self.model.unk_id()
        if ids != (0, 1, 2):
            raise UserError(f"{path}: pad, eos, unk are {ids}, not T5's (0, 1, 2); train another")
        self.pieces = self.model.GetPieceSize()
        self.vocab_size = self.pieces + SENTINELS
        self.special = {"<pad>": 0, "</s>": 1, "<unk>": 2}
        self.special |= {f"<extra_id_{n}>": self.vocab_size - 1 - n for n in range(SENTINELS)}
        if added := [token for token, id in _added(path) if self.special.get(token) != id]:
            names = ", ".join(map(repr, added[:10]))
            problem = f"{len(added)} added tokens are not implemented: {names}"
            raise UserError(f"{path.parent}: {problem}; give the folder of a model without them")

    def encode(self, text: Text, max_length: int | None = None) -> list[int]:
        """Returns the ids of a text, or of several parts, each followed by EOS. They are at most
        `max_length` in all."""
        return self.encode_batch([text], max_length)[0]

    def encode_batch(self, texts: Sequence[Text], max_length: int | None = None) -> list[list[int]]:
        """Encodes each text; ten times faster than one at a time. Where a text is too long, every
        part keeps its EOS and gets an even share of the rest, and longer parts get what a
        shorter one does not need: the last part is never lost."""
        texts = [(text,) if isinstance(text, str) else text for text in texts]
        ids, batch = iter(self.ids([part for text in texts for part in text])), []
        for text in texts:
            parts = list(islice(ids, len(text)))
            if max_length is not None:
                room = max_length - len(parts)
                assert room >= 0, "every part needs room for its EOS"
                parts = [part[:room] for part in parts]
                while sum(map(len, parts)) > room:
                    max(parts, key=len).pop()
            batch.append([id for part in parts for id in (*part, self.eos_id)])
        return batch

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the ids of each text, without EOS. As in T5's tokenizer, special tokens in a text
        get their own ids, and SentencePiece encodes what is between them piece by piece."""
        # Texts without special tokens, which most are, need no regular expression.
        split = [SPECIAL.split(text) if "<" in text else (text,) for text in texts]
        pieces = iter(self.model.Encode([piece for text in split for piece in text[::2]]))
        batch = []
        for text in split:
            ids = next(pieces)
            for special in text[1::2]:
                ids += [self.special[special], *next(pieces)]
            batch.append(ids)
        return batch

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text, without special tokens and ids above the vocabulary."""
        return self.model.Decode([int(id) for id in ids if self.unk_id < id < self.pieces])

    def save(self, folder: Path) -> None:
        """Writes `spiece.model` and what `transformers`' AutoTokenizer needs to read it."""
        (folder / "spiece.model").write_bytes(self.file)
        config = {"tokenizer_class": "T5Tokenizer", "extra_ids": SENTINELS, "pad_token": "<pad>"}
        config |= {"eos_token": "</s>", "unk_token": "<unk>", "model_max_length": MAX_SOURCE}
        write_json(folder / "tokenizer_config.json", config)


def check_labels(
    task: Task, tokenizer: Any, labels: Iterable[str | None], inputs: Iterable[Text]
) -> list[str]:
    """Sends each label, and each choice that an input offers, through the tokenizer and back.
    Returns warnings about those that come back changed, and about labels that differ only in case.

    UserError where a label of a closed set comes back changed, whitespace apart, or two as one.
    """
    closed = set(task.labels or ())
    labels = (closed | set(labels)) - {None}
    choices = {choice for input in inputs for choice in _choices(input)} if task.choices else set()
    # What the student would write, at best: each text as ids, and these as text again.
    texts = sorted(labels | choices)
    back = dict(zip(texts, map(tokenizer.decode, tokenizer.encode_batch(texts))))
    lost = {text for text in texts if back[text].split() != text.split()}  # more than space
    changed = [text for text in texts if back[text] != text]
    changed.sort(key=lambda text: text not in lost)
    shown = ", ".join(f"{text!r} as {back[text]!r}" for text in changed[:5])
    problem = f"{len(changed)} labels or choices come back changed from the vocabulary: {shown}"
    if faults := sorted({character for text in lost for character in {*text} - {*back[text]}}):
        problem += f"; it cannot write these characters: {' '.join(faults)}"
    # Two labels may come back as one, such as "a</s>" and "a".
    written = {" ".join(back[label].split()) for label in closed}
    if closed & lost or len(written) < len(closed):
        raise UserError(f"{problem}; write these labels in other characters, each its own way")
    notes = [f"warning: {problem}"] if changed else []
    folded = {label: " ".join(label.split()).casefold() for label in sorted(labels)}
    counts = Counter(folded.values())
    alike = [label for label in folded if counts[folded[label]] > 1]
    if alike and task.scorer == "text":
        shown = ", ".join(map(repr, sorted(alike, key=folded.get)[:10]))
        notes.append(f"warning: labels that differ only in case or space: {shown}")
    return notes


def unknown_characters(texts: Iterable[Text], tokenizer: Any) -> list[str]:
    """Returns the ten most frequent characters that the vocabulary lacks."""
    counts = Counter(chain.from_iterable(map("".join, texts)))
    characters = [c for c, _ in counts.most_common()]
    encoded = zip(characters, tokenizer.encode_batch(characters))
    return [c for c, ids in encoded if tokenizer.unk_id in ids][:10]


@dataclass
class TokenRows:
    """n tokenised rows in flat arrays, which take a tenth of the memory of lists. The source of row
    i is source_ids[source_offsets[i] : source_offsets[i + 1]]. The rows of an example are
    consecutive, its label row first."""

    tasks: np.ndarray  # (n,) uint8: the number of the row's task; 0 is the label
    source_ids: np.ndarray  # (source tokens,) int32
    source_offsets: np.ndarray  # (n + 1,) int64
    target_ids: np.ndarray  # (target tokens,) int32
    target_offsets: np.ndarray  # (n + 1,) int64
    example: np.ndarray  # (n,) int32: the example that a row belongs to, ascending from 0
    n_examples: int
    truncated_sources: int  # rows
    truncated_targets: int
    unknown_tokens: int  # of total_tokens, in sources and targets, after truncation
    total_tokens: int
    pad_id: int

    def __len__(self) -> int:
        return len(self.tasks)

    def source(self, i: int) -> np.ndarray:
        """Returns the ids of a row's source, (S,) int32."""
        return self.source_ids[self.source_offsets[i] : self.source_offsets[i + 1]]

    def target(self, i: int) -> np.ndarray:
        """Returns the ids of a row's target, (T,) int32."""
        return self.target_ids[self.target_offsets[i] : self.target_offsets[i + 1]]

    def lengths(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of these rows' sources and of their targets."""
        source, target = self.source_offsets, self.target_offsets
        return source[rows + 1] - source[rows], target[rows + 1] - target[rows]

    def rows_of(self, examples: np.ndarray) -> np.ndarray:
        """Indices of these examples' rows, in the order of `examples`."""
        starts = np.searchsorted(self.example, examples, "left")
        ends = np.searchsorted(self.example, examples, "right")
        return np.concatenate([np.arange(start, end) for start, end in zip(starts, ends)])


def tokenize_rows(
    rows: Sequence, tokenizer: Tokenizer, max_source: int = MAX_SOURCE, max_target: int = MAX_TARGET
) -> TokenRows:
    """Tokenises `dsbs.Row`s, each with a task `number`, a `source` and a `target`; limits are in
    tokens. Where a target is a pair (rationale, answer) and too long, this function cuts the end
    of the rationale: the answer and EOS stay, whatever the limit. UserError if there are no rows.
    """

    def cut_source(i: int, ids: list[int]) -> list[int]:
        return tokenizer.encode(rows[i].source, max_source)

    def cut_target(i: int, ids: list[int]) -> list[int]:
        target = rows[i].target
        end = [tokenizer.eos_id] if isinstance(target, str) else tokenizer.encode(target[1])
        return [*ids[: max(0, max_target - len(end))], *end]

    if not rows:
        raise UserError("no example has a label of the kind to train on: see --labels")
    tasks = np.array([row.number for row in rows], np.uint8)
    assert tasks[0] == 0, "an example begins with its label row"
    example = np.cumsum(tasks == 0, dtype=np.int32) - 1
    sources = (row.source for row in rows)
    targets = (row.target if isinstance(row.target, str) else " ".join(row.target) for row in rows)
    *source, cut_sources = _pack(sources, tokenizer, max_source, cut_source)
    *target, cut_targets = _pack(targets, tokenizer, max_target, cut_target)
    ids = source[0], target[0]
    unknown = sum(int((x == tokenizer.unk_id).sum()) for x in ids)
    counts = int(example[-1]) + 1, cut_sources, cut_targets, unknown, sum(map(len, ids))
    return TokenRows(tasks, *source, *target, example, *counts, tokenizer.pad_id)


def _pack(
    texts: Iterator[Text], tokenizer: Tokenizer, limit: int, cut: Callable[[int, list], list]
) -> tuple[np.ndarray, np.ndarray, int]:
    """Returns (flat ids, offsets, number of texts that were cut). Few ids are Python integers at
    one time, since these take ten times the memory."""
    flat, lengths, n_cut = [], [0], 0
    while batch := tokenizer.encode_batch(list(islice(texts, 4096))):
        for i, ids in enumerate(batch):
            if len(ids) > limit:
                batch[i], n_cut = cut(len(lengths) - 1 + i, ids), n_cut + 1
        lengths += map(len, batch)
        flat.append(np.fromiter(chain.from_iterable(batch), np.int32))
    return np.concatenate(flat), np.cumsum(lengths), n_cut


# ---- The order of batches ------------------------------------------------------------------------


@functools.lru_cache(maxsize=4)
def _permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    """Returns the order of n examples in an epoch. The cache saves a shuffle at each step."""
    return np.random.default_rng([seed, epoch]).permutation(n)


def step_examples(n: int, batch_size: int, seed: int, step: int) -> np.ndarray:
    """Returns the examples of a step (from 0), (batch_size,) int64 below n.

    The permutations of all epochs make one sequence, and each step takes the next `batch_size` of
    it: no example is dropped, and a step may reach into the next epoch.
    """
    epochs, positions = np.divmod(np.arange(step * batch_size, (step + 1) * batch_size), n)
    orders = {int(epoch): _permutation(n, seed, int(epoch)) for epoch in np.unique(epochs)}
    return np.array([orders[e][i] for e, i in zip(epochs.tolist(), positions.tolist())])


def micro_batches(
    source_lengths: np.ndarray,
    target_lengths: np.ndarray,
    tasks: np.ndarray,
    micro_tokens: int,
    world: int,
    overhead: int,
) -> list[list[np.ndarray]]:
    """Divides the n rows of one step, whose lengths and tasks are (n,) integers, into micro-batches
    for `world` ranks. Returns a list of index arrays for each rank, equally many for all.

    A micro-batch has rows x (longest source + longest target) positions, padding included, and at
    most `micro_tokens`, unless it is a single row. Rows of one task stay together and are sorted by
    length, so that a label is not padded to the length of a rationale.

    Many small micro-batches have little padding, but each costs the time of `overhead` further
    positions: of several ways to cut, this function chooses the fastest. Ranks run micro-batches
    of similar cost at the same time. A rank's last micro-batch may be empty.
    """
    order = np.lexsort((source_lengths + target_lengths, tasks))
    rows = list(zip(*(x[order].tolist() for x in (tasks, source_lengths, target_lengths))))

    def cut(limit: int) -> list[tuple[int, int, int]]:
        """Returns (positions, first row, end) of each micro-batch, each filled up to the limit."""
        pieces, first, source, target = [], 0, 0, 0
        for i, (task, s, t) in enumerate(rows):
            positions = (i + 1 - first) * (max(source, s) + max(target, t))
            if i > first and (positions > limit or task != rows[first][0]):
                pieces.append(((i - first) * (source + target), first, i))
                first, source, target = i, 0, 0
            source, target = max(source, s), max(target, t)
        return [*pieces, ((len(rows) - first) * (source + target), first, len(rows))]

    def time(pieces: list[tuple[int, int, int]]) -> int:
        """All ranks wait for the slowest of the `world` micro-batches that run at one time."""
        return sum(positions + overhead for positions, _, _ in pieces[::world])

    # Limits from the largest that is allowed down to the longest row, a tenth less each time.
    longest = max(source + target for _, source, target in rows)
    limits = [min(micro_tokens, len(rows) * longest)]
    while limits[-1] > longest:
        limits.append(int(0.9 * limits[-1]))
    best = min((sorted(cut(limit), reverse=True) for limit in limits), key=time)
    indices = [order[first:end] for _, first, end in best]
    indices += [order[:0]] * (-len(indices) % world)
    return [indices[rank::world] for rank in range(world)]


def collate(rows: TokenRows, indices: np.ndarray, multiple: int = 1) -> dict[str, np.ndarray]:
    """Returns input_ids (B, S) with PAD, attention_mask (B, S), labels (B, T) padded with -100 and
    tasks (B,), all int64; S and T are rounded up to a multiple. Without indices it returns one
    row of loss 0, for a rank that must run as many micro-batches as the others."""
    sources = [rows.source(i) for i in indices] or [np.array([1])]  # any id
    targets = [rows.target(i) for i in indices] or [np.array([-100])]
    return {
        "input_ids": pad(sources, rows.pad_id, multiple),
        "attention_mask": pad([np.ones_like(source) for source in sources], 0, multiple),
        "labels": pad(targets, -100, multiple),
        "tasks": rows.tasks[indices].astype(np.int64) if len(indices) else np.zeros(1, np.int64),
    }


def pad(arrays: Sequence[Sequence[int]], value: int, multiple: int = 1) -> np.ndarray:
    """Pads ragged rows with `value`: returns (rows, longest) int64, where the longest length is
    rounded up to a multiple."""
    longest = round_up(max(map(len, arrays)), multiple)
    padded = np.full((len(arrays), longest), value, np.int64)
    for row, array in zip(padded, arrays):
        row[: len(array)] = array
    return padded


def round_up(number: int | np.ndarray, multiple: int) -> int | np.ndarray:
    """Returns the next multiple: round_up(13, 8) is 16."""
    return -(-number // multiple) * multiple
