"""Text and files: examples, datasets, answers in completions, tokens, the order of batches.

A new dataset is a row of `TASKS`, or a folder of `*.jsonl`. This file returns strings and numpy
arrays. It imports neither torch nor another file of ours, and it knows nothing of prompts, the
network, lambda or ranks.
"""

import errno
import fcntl
import functools
import hashlib
import json
import math
import operator
import os
import re
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from io import FileIO
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

NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # Lustre without `-o flock`, some NFS


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


def lock(path: Path) -> FileIO:
    """Opens a file for appending and locks it against other processes until it is closed; the
    system unlocks it after SIGKILL too. Creates the file and its folder.

    UserError if another process holds the lock or the file cannot be written. A filesystem without
    locks gives one warning and no lock.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "ab", buffering=0)
    except OSError as error:
        raise UserError(
            f"--out {path}: {error.strerror}; give a name that can be written"
        ) from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(
            f"{path} is in use by another process; wait for it, or give another --out"
        ) from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        print(f"warning: {path}: this filesystem has no locks; use one process", file=sys.stderr)
    return file


def sha256(content: bytes | Path) -> str:
    """The sha256 of bytes, or of a file that is read in pieces, as 64 hexadecimal digits."""
    if isinstance(content, bytes):
        return hashlib.sha256(content).hexdigest()
    digest = hashlib.sha256()
    with open(content, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


# ---- Arithmetic: the value of model text, which is never executed --------------------------------

MAX_LENGTH, MAX_DIGITS, MAX_DEPTH = 2000, 100, 50  # of a text, of a number, of nested ( and -
NUMBER = r"[0-9]+\.?[0-9]*|\.[0-9]+"
TOKEN = re.compile(rf"{NUMBER}|[-+*/()]")
OPERATIONS = {
    "+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv,
}  # fmt: skip


def evaluate_arithmetic(text: str) -> Fraction | None:
    """Returns the exact value of numbers, + - * /, parentheses and unary minus; None for all else.

    >>> evaluate_arithmetic("( 84.0 / 2.0 )"), evaluate_arithmetic("9**9**9")
    (Fraction(42, 1), None)
    """
    if len(text) > MAX_LENGTH:
        return None
    tokens = [*TOKEN.findall(text), "end"][::-1]  # a stack, the next token on top
    if "".join(tokens[:0:-1]) != "".join(text.split()) or max(map(len, tokens)) > MAX_DIGITS:
        return None

    def parse(level: int, depth: int) -> Fraction:
        """level 0: a sum of products; 1: a product of factors; 2: a factor."""
        if level < 2:
            value = parse(level + 1, depth)
            while tokens[-1] in (("+", "-"), ("*", "/"))[level]:
                value = OPERATIONS[tokens.pop()](value, parse(level + 1, depth))
            return value
        token = tokens.pop()
        if token not in "(-":
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
ARCHIVE = (
    "the released archive: `git clone https://github.com/google-research/distilling-step-by-step`, "
    "unpack the datasets in it"
)
NLI = ("entailment", "neutral", "contradiction")  # in the order of the integer labels
LETTERS = "abcdefghij"


@dataclass(frozen=True)
class Task:
    """All facts of a dataset. `labels` is the closed set; None where any text may be an answer, or
    where the input offers its own choices."""

    name: str
    labels: tuple[str, ...] | None
    scorer: str  # "text" or "arithmetic"
    marker: str  # what comes before the label in a completion
    folder: str  # below the data root, or absolute
    file: str = "{}.jsonl"  # a split's
    # A record to (its own id or None, input, label). None: it is in our own format.
    read: Callable[[dict], tuple[str | None, Text, str | None]] | None = None
    splits: tuple[str, ...] = SPLITS
    cut: bool = False  # valid is a part of train's file
    palm: dict[str, int] | None = None  # the number of files of completions, by the file's split
    human: str | None = None  # the key of a human's explanation
    source: str = "your own folder: train.jsonl, and valid.jsonl, test.jsonl if there are"
    record: str = '{"id": "7", "input": "text, or a list of two", "label": "yes"}'
    also: tuple[str, ...] = ()  # markers of other teachers
    end: str = "."  # what comes after the label
    choices: bool = False  # multiple choice: each input ends in its "Answer Choices:"


def _read_cqa(r: dict) -> tuple[str | None, Text, str | None]:
    choices = [f"({letter}) {choice}" for letter, choice in zip(LETTERS, r["choices"])]
    return r["id"], "\n".join([r["question"], "Answer Choices:", *choices]), r["answer"]


def _read_nli(r: dict) -> tuple[str | None, Text, str | None]:
    if r["label"] not in (0, 1, 2):
        raise ValueError(f"label {r['label']!r} is not 0 {NLI[0]}, 1 {NLI[1]} or 2 {NLI[2]}")
    return r.get("uid"), (r["premise"], r["hypothesis"]), NLI[r["label"]]


# fmt: off
TASKS = {task.name: task for task in (
    # Luke scored 84 points [...] 84 / 2 = 42. The answer is (84 / 2).\n\nQ: There are [...]
    Task("svamp", None, "arithmetic", "The answer is", "svamp", "svamp_{}.json",
         lambda r: (None, r["input"], r["label"]), cut=True, palm={"train": 2, "test": 1},
         source=ARCHIVE, record=r'{"input":"Luke [...] round?","label":"( 84.0 \/ 2.0 )"}'),
    # The answer must be something [...] So the answer is (d) math problem.\n\nQ: "The man [...]
    Task("cqa", None, "text", "So the answer is", "cqa", "cqa_{}.json", _read_cqa, cut=True,
         palm={"train": 10, "test": 2}, human="abstractive_explanation", source=ARCHIVE,
         choices=True,
         record='{"id":"6b81[...]","question":"\\"There are 10 apples [...]","choices":["park","co'
         'loring book","garden center","math problem","gravity"],"answer":"math problem",'
         '"abstractive_explanation":"webmath is [...]","extractive_explanation":"[...]"}'),
    # [...]\nAnswer: neutral\n\nPremise: [...]
    Task("esnli", NLI, "text", "Answer:", "esnli", "esnli_{}.json", _read_nli,
         palm={"train": 100, "valid": 2, "test": 2}, human="explanation_1", source=ARCHIVE,
         record='{"premise":"[...]","hypothesis":"[...]","label":1,"explanation_1":"[...]"}',
         also=("So the answer is", "The answer is"), end=""),
    # [...] So the answer is contradiction.\n\nPremise: [...]
    Task("anli1", NLI, "text", "So the answer is", "anli1", "anli1_{}.json", _read_nli,
         palm={"train": 4, "valid": 1, "test": 1}, human="reason", source=ARCHIVE,
         record='{"uid":"[...]","premise":"[...]","hypothesis":"[...]","label":2,"reason":"[...]"}',
         also=("The answer is",)),
    # Without labels here: more inputs for SVAMP's teacher.
    Task("asdiv", None, "arithmetic", "The answer is", "asdiv", "ASDiv.xml",
         lambda r: (r["ID"], f"{r['Body']}\n{r['Question']}", None), ("train",),
         source="https://github.com/chaochun/nlu-asdiv-dataset",
         record='<Problem ID="nluds-0001"><Body>Seven red [...]</Body><Question>How [...]'),
    Task("demo", None, "text", "So the answer is", str(Path(__file__).resolve().parent / "demo")),
)}
# fmt: on


def find_task(name: str | Task) -> Task:
    """The row of the table, or a folder's Task before its files are read (`get_task` reads them).
    A Task is returned unchanged, so that every function here takes a name or a Task."""
    if isinstance(name, Task):
        return name
    task = TASKS.get(name) or Task(name, None, "text", "So the answer is", name)
    if task.read:
        return task
    if not Path(task.folder, "train.jsonl").is_file():
        allowed = f"one of {', '.join(TASKS)}, or a folder holding train.jsonl"
        raise UserError(f"dataset {name!r} is unknown: {allowed}")
    cut = not Path(task.folder, "valid.jsonl").is_file()
    return replace(task, folder=str(Path(task.folder).absolute()), cut=cut)


def get_task(name: str | Task) -> Task:
    """The Task with all its facts. Those of a folder are in its task.json; without one, the labels
    are those in train.jsonl, if they are at most 20. This reads the files at each call: a caller
    with many texts keeps the Task."""
    task = find_task(name)
    if task.read or isinstance(name, Task):
        return task
    facts = _read_task_file(Path(task.folder, "task.json"))
    scorer, labels = facts.get("scorer", task.scorer), facts.get("labels")
    if "labels" not in facts and scorer == "text":
        lines = _read(Path(task.folder, "train.jsonl"), lambda r: str(r.get("label") or "").strip())
        seen = set(lines) - {""}
        labels = sorted(seen) if len(seen) <= 20 else None
    labels = tuple(label.strip() for label in labels or ()) or None
    marker = " ".join(facts.get("marker", task.marker).split())
    return replace(task, labels=labels, scorer=scorer, marker=marker)


def _read_task_file(path: Path) -> dict:
    """What a folder's task.json says, checked; {} where there is none."""
    if not path.is_file():
        return {}
    try:
        facts = json.loads(path.read_bytes())
        labels = ["free text"] if facts.get("labels") is None else facts["labels"]
        texts = [facts.get("marker", "marker"), *labels]
        if not (isinstance(labels, list) and labels and all(map(str.strip, texts))):
            raise ValueError("labels or marker")
        if facts.get("scorer", "text") not in ("text", "arithmetic"):
            raise ValueError("scorer")
        return facts
    except (ValueError, AttributeError, TypeError, RecursionError):
        raise UserError(
            f'{path} is not {{"labels": a list of texts or null, "scorer": "text" or '
            f'"arithmetic", "marker": a text}}: {path.read_bytes()[:200]!r}'
        ) from None


def data_files(
    name: str | Task,
    split: str,
    root: str | Path = "datasets",
    rationales: str | Sequence | None = None,
) -> list[Path]:
    """Lists the files that `load_dataset` reads for a split: the data, then the teacher's answers
    that --rationales joins to it."""
    task = find_task(name)
    if split not in task.splits:
        raise UserError(f"split {split!r} of {task.name}: one of {', '.join(task.splits)}")
    file_split = "train" if split == "valid" and task.cut else split
    path = Path(root, task.folder, task.file.format(file_split))
    if rationales is None:
        return [path]
    if not isinstance(rationales, str):
        return [path, *map(Path, rationales)]
    allowed = [*(["palm", "neox"] if task.palm else []), *(["human"] if task.human else [])]
    if rationales not in allowed:
        allowed = ", ".join([*allowed, "a teacher's files (*.jsonl)"])
        raise UserError(f"rationales {rationales!r} of {task.name}: {allowed}")
    if rationales == "human":
        return [path]
    if rationales == "neox":
        return [path, Path(root, "gpt-neox", task.name, f"{file_split}.json")]
    shards = range(task.palm[file_split])
    return [path, *(path.parent / "llm" / f"{file_split}_CoT_{i}.json" for i in shards)]


def has_split(name: str | Task, split: str, root: str | Path = "datasets") -> bool:
    """Says whether a file for this split exists, without opening it."""
    task = find_task(name)
    return split in task.splits and data_files(task, split, root)[0].is_file()


def load_dataset(
    name: str | Task,
    split: str,
    root: str | Path = "datasets",
    rationales: str | Sequence | None = None,
    counts: Counter | None = None,
    beside: str | None = None,
) -> list[Example]:
    """Reads the examples of a split, in the order of its file.

    rationales: None (what a folder's own lines carry; benchmarks have none), "palm", "neox",
    "human", or a list of teacher files, joined by id; those may also hold other splits, and a
    dataset used `beside` this one. Added to `counts`: examples, without_rationale,
    teacher_labels_dropped (not in the closed set, not among the choices) and
    teacher_ids_unmatched. UserError: a file missing, malformed or for another dataset; a label
    outside the set; duplicate ids; an empty split.
    """
    task, counts = get_task(name), Counter() if counts is None else counts
    path, *answers = data_files(task, split, root, rationales)
    examples = _read_examples(task, split, path, rationales)
    if isinstance(rationales, str):
        if answers:
            _attach_completions(task, path, examples, answers)
    elif answers:
        elsewhere = [(task, other) for other in task.splits if other != split]
        if beside:
            elsewhere += [(find_task(beside), other) for other in find_task(beside).splits]
        elsewhere = [(other, s) for other, s in elsewhere if has_split(other, s, root)]
        _attach_files(task, root, examples, answers, counts, elsewhere)
    if task.cut and split != "test":
        examples = [examples[i] for i in split_indices(len(examples))[split == "valid"]]
    for example in examples:
        if example.teacher_label and not_allowed(task, example.input, example.teacher_label):
            example.teacher_label = None
            counts["teacher_labels_dropped"] += 1
        counts["without_rationale"] += not example.rationale
    counts["examples"] += len(examples)
    return examples


def _read_examples(task: Task, split: str, path: Path, rationales: object) -> list[Example]:
    """Every example of a split's file, each with an id of its own."""
    make = functools.partial(_example, task, rationales)
    examples = list(_read(path, make, task.record, task.source))
    if len(examples) < (2 if task.cut and split != "test" else 1):
        raise UserError(f"{path}: the {split} split of {task.name} is empty; it needs examples")
    for row, example in enumerate(examples):
        if example.id is None:
            example.id = f"{path.stem.replace('_', '-')}-{row}"
    twice = [id for id, n in Counter(example.id for example in examples).items() if n > 1]
    if twice:
        raise UserError(f"{path}: duplicate ids, {len(twice)} of them, such as {twice[:3]}")
    return examples


def split_indices(n: int) -> tuple[np.ndarray, np.ndarray]:
    """(train, valid) rows of a file of n: a fixed random tenth is valid, each in file order."""
    order, n_valid = np.random.default_rng(0).permutation(n), -(-n // 10)
    return np.sort(order[n_valid:]), np.sort(order[:n_valid])


def _open(path: Path, source: str) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; it comes from {source}") from None


def _read(path: Path, make: Callable, record: str = "{...}", source: str = "") -> Iterator:
    """`make(object)` of each line that is not blank, or of each problem of ASDiv's."""
    with _open(path, source) as file:
        lines = _problems(path, file, source) if path.suffix == ".xml" else file
        for number, line in enumerate(lines, 1):
            if isinstance(line, bytes) and line.isspace():
                continue
            try:
                value = json.loads(line) if isinstance(line, bytes) else line
                if not isinstance(value, dict):
                    raise ValueError("not a JSON object")
                made = make(value)
            except (KeyError, TypeError, ValueError, RecursionError) as error:
                reason = f"no {error}" if isinstance(error, KeyError) else error
                reason = getattr(error, "msg", reason)  # JSON's own line and column would confuse
                raise UserError(f"{path}:{number}: {reason}; a line looks like {record}") from None
            yield made


def _problems(path: Path, file: BinaryIO, source: str) -> Iterator[dict]:
    try:
        problems = ElementTree.parse(file).getroot().iter("Problem")
    except ElementTree.ParseError as error:
        raise UserError(f"{path}: {error}; it comes from {source}") from None
    for problem in problems:
        yield {**problem.attrib, **{child.tag: child.text for child in problem}}


def _example(task: Task, rationales: object, r: dict) -> Example:
    """KeyError, TypeError or ValueError where the record is malformed or its label isn't one."""
    id, input, label = task.read(r) if task.read else (r["id"], r["input"], r.get("label"))
    input = tuple(input) if isinstance(input, list) else input
    parts = input if isinstance(input, tuple) and len(input) == 2 else (input,)
    if not all(isinstance(part, str) for part in parts):
        raise ValueError(f"input {input!r} is neither a text nor a list of two")
    "".join(parts).encode()  # half of a surrogate pair is a ValueError
    if not isinstance(id, str) and (id is not None or task.read is None):
        raise ValueError(f"id {id!r} is not a text")
    example = Example(id, input, _text({"label": label}, "label"))
    if task.read is None and rationales is None:
        example.rationale, example.teacher_label = _text(r, "rationale"), _text(r, "teacher_label")
    elif rationales == "human":
        example.rationale = _text({task.human: r[task.human]}, task.human)
    if example.label and (allowed := not_allowed(task, input, example.label)):
        raise ValueError(f"label {label!r} is not {allowed}")
    return example


def _text(record: dict, key: str) -> str | None:
    value = record.get(key)
    if not isinstance(value, str | None):
        raise ValueError(f"{key} {value!r} is neither a text nor null")
    return value and value.encode() and value.strip() or None


def _choices(input: Text) -> list[str]:
    """What a multiple-choice input offers: the lines "(a) park" at its end."""
    lines = str(input).rpartition("\nAnswer Choices:\n")[2].split("\n")
    return [line[4:].strip() for line in lines if re.match(rf"\([{LETTERS}]\) ", line)]


def not_allowed(task: Task, input: Text, label: str) -> str:
    """Returns "" for an allowed label, else what is allowed. The set is the task's, or
    what a multiple-choice input offers, or any arithmetic."""
    if task.scorer == "arithmetic":
        return "" if evaluate_arithmetic(label) is not None else "numbers, + - * /, parentheses"
    allowed = _choices(input) if task.choices else task.labels
    return "" if allowed is None or label in allowed else f"one of {', '.join(allowed)}"


def _attach_completions(task: Task, path: Path, examples: list[Example], files: list[Path]) -> None:
    """Joins completions to the data file's rows by position: the files one after the other."""
    completions = []
    for file in files:
        with _open(file, task.source) as opened:
            try:
                part = json.load(opened)
            except (ValueError, RecursionError) as error:
                part = error
        if not (isinstance(part, list) and all(isinstance(x, str) for x in part)):
            reason = part if isinstance(part, Exception) else "not a JSON list of texts"
            raise UserError(f"{file}: {reason}; it comes from {task.source}")
        completions += part
    if len(completions) != len(examples):
        raise UserError(
            f"{files[0]} and those after it are for another dataset: {len(completions)} "
            f"completions for {len(examples)} rows of {path}; get both from {task.source}"
        )
    for example, completion in zip(examples, completions):
        rationale, example.teacher_label = parse_completion(task, completion) or (None, None)
        example.rationale = rationale or None


def _attach_files(
    task: Task, root: str | Path, examples: list[Example], files: list[Path], counts: Counter,
    elsewhere: list[tuple[Task, str]],
) -> None:  # fmt: skip
    """Joins a teacher's answers in our own format to examples by id. An id may also belong to a
    (Task, split) in `elsewhere`; others count as unmatched."""
    by_id, seen = {example.id: example for example in examples}, set()

    def attach(r: dict) -> str:
        rationale, label = _text(r, "rationale"), _text(r, "teacher_label")
        if not isinstance(r["id"], str) or r["id"] in seen:
            raise ValueError(f"id {r['id']!r} is no text, or there twice")
        if example := by_id.get(r["id"]):
            example.rationale, example.teacher_label = rationale, label
        seen.add(r["id"])
        return r["id"]

    for file in files:
        record = '{"id": "7", "rationale": "because", "teacher_label": "yes"}'
        ids = set(_read(file, attach, record, "teacher.py, or --rationales is mistyped"))
        unmatched = ids - by_id.keys()
        if unmatched:  # look there before complaining
            unmatched -= {e.id for where in elsewhere for e in load_dataset(*where, root)}
        counts["teacher_ids_unmatched"] += len(unmatched)
        if unmatched == ids:
            raise UserError(
                f"{file} is for another dataset: none of its {len(ids)} ids is in {task.name}, "
                f"whose ids look like {examples[0].id!r}"
            )


# ---- Answers in text -----------------------------------------------------------------------------

# Where a completion runs on into an invented example: at a line's start, or after a sentence.
INVENTED = re.compile(r"(?:^|(?<=[.!?]))[ \t]*(?:Q|Question|Input|Premise):", re.MULTILINE)
BLANK_LINE = re.compile(r"\n[ \t]*\n")
EXPRESSION = re.compile(rf"[\s:$]*((?:{NUMBER}|[-+*/() \t]|and(?=[ \t]*\())+)")
LINE = re.compile(r"[\s:]*(.*)")
CHOICE = re.compile(rf"[\s:]*\([{LETTERS}]\)[ \t]*(.*)")
# The full stop that ends an answer: the line's last, or one before a space, but not U.S. or Dr.
STOP = re.compile(r"(?<!\.[A-Za-z])(?<!\bMrs)(?<!\b(?:Mr|Ms|Dr|St))\.(?=\s)|\.$")


def parse_completion(name: str | Task, completion: str) -> tuple[str, str] | None:
    """(rationale, label) of a teacher's completion or a single-task student's text; None where it
    has no answer, or different ones. A label outside a closed set is returned as it is written.

    >>> parse_completion("svamp", "84 / 2 = 42. The answer is (84 / 2).\n\nQ: There are")
    ('84 / 2 = 42.', '(84 / 2)')
    """
    task = get_task(name)
    text = INVENTED.split(completion.strip(), maxsplit=1)[0]
    end, found = len(text), None
    for match in _marker(task.marker, *task.also).finditer(text):
        window = match.end(), min(end, match.end() + MAX_LENGTH)
        if match.start() < end and (label := _answer(task, text, *window)):
            if found and label != found[1]:
                return None
            if not found:
                found = text[: match.start()].strip(), label
                # Blank lines may part a rationale, but after an answer they start something new.
                blank = BLANK_LINE.search(text, LINE.match(text, match.end()).end())
                end = blank.start() if blank else end
    return found


@functools.lru_cache(maxsize=16)
def _marker(*markers: str) -> re.Pattern:
    spellings = (r"\s+".join(map(re.escape, marker.split())) for marker in markers)
    return re.compile(rf"(?<!\w)(?:{'|'.join(spellings)})")


def _answer(task: Task, text: str, start: int, end: int) -> str | None:
    """The label in text[start:end], just after a marker."""
    if task.scorer == "arithmetic":
        return _expression(text, start, end)
    match = (CHOICE if task.choices else LINE).match(text, start, end)
    line = match[1].rstrip() if match else ""
    for label in sorted(task.labels or (), key=len, reverse=True):
        # "neutral.", "**neutral**", "neutral, as he ...", but not "neutral or contradiction".
        bare = line.lstrip("*\"'`")
        if bare.startswith(label) and not re.match(r"[\w-]", rest := bare[len(label) :]):
            rest = STOP.split(rest, maxsplit=1)[0]
            others = (rf"(?<!\w){re.escape(other)}(?!\w)" for other in task.labels)
            return None if any(re.search(other, rest) for other in others) else label
    label = STOP.split(line, maxsplit=1)[0].strip()
    # Two choices are none: "(a) ocean or (b) sea."
    return None if task.choices and re.search(rf"\([{LETTERS}]\)", label) else label or None


def _expression(text: str, start: int, end: int) -> str | None:
    """The parenthesised expression, as the released parser cut it: of "(16 * 17) * 4." it is
    "(16 * 17)"; of "(3 + 1) and (9 - 2)" the last, as Python's `and` had it."""
    match = EXPRESSION.match(text, start, end)
    run = match[1].strip() if match else ""
    if run.count("(") > run.count(")") or not run.startswith("(") or run[-1] in "+-*/":
        return None  # cut off: "(120 /", "(9 - 2) * (3"
    label = run.split("and")[-1].strip()
    label = label[: label.rfind(")") + 1]
    while label.count(")") > label.count("("):  # one around the sentence or the whole list
        label = label[: label.rfind(")", 0, -1) + 1]
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
    """Text is right when equal after strip (the released rule), arithmetic when the exact values
    agree to 1e-6 relative. No prediction is wrong."""
    if prediction is None or get_task(name).scorer == "text":
        return prediction is not None and prediction.strip() == label.strip()
    a, b = evaluate_arithmetic(prediction), evaluate_arithmetic(label)
    return a is not None and b is not None and abs(a - b) <= max(abs(a), abs(b)) / 10**6


# ---- Tokens --------------------------------------------------------------------------------------

SENTINELS = 100
SPECIAL = re.compile(r"(</s>|<pad>|<unk>|<extra_id_(?:[0-9]|[1-9][0-9])>)")


class Tokenizer:
    """T5's: a SentencePiece model, and 100 sentinels above it, <extra_id_0> the highest id."""

    pad_id, eos_id, unk_id = 0, 1, 2

    def __init__(self, path: str | Path):
        self.model = sentencepiece.SentencePieceProcessor()
        try:
            self.model.LoadFromSerializedProto(Path(path).read_bytes())
        except (OSError, RuntimeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not a SentencePiece model"
            raise UserError(f"{path}: {reason}; a T5 folder holds one as spiece.model") from None
        ids = self.model.pad_id(), self.model.eos_id(), self.model.unk_id()
        if ids != (0, 1, 2):
            raise UserError(f"{path}: pad, eos, unk are {ids}, not T5's (0, 1, 2); train another")
        self.pieces = self.model.GetPieceSize()
        self.vocab_size = self.pieces + SENTINELS
        self.special = {"<pad>": 0, "</s>": 1, "<unk>": 2}
        self.special |= {f"<extra_id_{n}>": self.vocab_size - 1 - n for n in range(SENTINELS)}

    def encode(self, text: Text, max_length: int | None = None) -> list[int]:
        """Ids of a text, or of several parts, each followed by EOS; at most `max_length` in all."""
        return self.encode_batch([text], max_length)[0]

    def encode_batch(self, texts: Sequence[Text], max_length: int | None = None) -> list[list[int]]:
        """`encode` of each. Where a text is too long, every part keeps its EOS and an even share
        of the rest; what a shorter part leaves goes to the longer ones, so the last survives."""
        texts = [(text,) if isinstance(text, str) else text for text in texts]
        ids, batch = iter(self.ids([part for text in texts for part in text])), []
        for text in texts:
            parts = list(islice(ids, len(text)))
            if max_length is not None and sum(map(len, parts)) + len(parts) > max_length:
                assert max_length >= len(parts), "every part needs room for its EOS"
                budget = max_length - len(parts)
                shortest_first = sorted(range(len(parts)), key=lambda i: len(parts[i]))
                for left, i in zip(range(len(parts), 0, -1), shortest_first):
                    parts[i] = parts[i][: budget // left]
                    budget -= len(parts[i])
            batch.append([id for part in parts for id in (*part, self.eos_id)])
        return batch

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, without EOS. It is split at special tokens, and SentencePiece sees each
        piece in between alone."""
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
        """The text, without special tokens and ids above the vocabulary."""
        return self.model.Decode([int(id) for id in ids if self.unk_id < id < self.pieces])


@dataclass
class TokenRows:
    """Tokenised rows in flat arrays; row i's source is source_ids[source_offsets[i] up to
    source_offsets[i + 1]]. An example's rows are consecutive, its label row first."""

    tasks: np.ndarray  # (n,) uint8: the number of the row's task; 0 is the label
    source_ids: np.ndarray  # int32
    source_offsets: np.ndarray  # (n + 1,) int64
    target_ids: np.ndarray
    target_offsets: np.ndarray
    example: np.ndarray  # (n,) int32: the example that a row belongs to, ascending from 0
    n_examples: int
    truncated_sources: int  # rows
    truncated_targets: int
    unknown_tokens: int  # of total_tokens, in sources and targets, after truncation
    total_tokens: int

    def __len__(self) -> int:
        return len(self.tasks)

    def source(self, i: int) -> np.ndarray:
        return self.source_ids[self.source_offsets[i] : self.source_offsets[i + 1]]

    def target(self, i: int) -> np.ndarray:
        return self.target_ids[self.target_offsets[i] : self.target_offsets[i + 1]]

    def rows_of(self, examples: np.ndarray) -> np.ndarray:
        """Indices of these examples' rows, in the order of `examples`."""
        starts = np.searchsorted(self.example, examples, "left")
        ends = np.searchsorted(self.example, examples, "right")
        return np.concatenate([np.arange(start, end) for start, end in zip(starts, ends)])


def tokenize_rows(
    rows: Sequence, tokenizer: Tokenizer, max_source: int = 1024, max_target: int = 256
) -> TokenRows:
    """Tokenises `dsbs.Row`s, once: a row has a task `number`, a `source` and a `target`. Where a
    target is a pair (rationale, answer) and too long, this function cuts the rationale's end; the
    answer and EOS stay, whatever the limit."""

    def cut_source(i: int) -> list[int]:
        return tokenizer.encode(rows[i].source, max_source)

    def cut_target(i: int) -> list[int]:
        if isinstance(rows[i].target, str):
            return tokenizer.encode(rows[i].target, max_target)
        rationale, answer = tokenizer.ids(rows[i].target)
        room = max(0, max_target - len(answer) - 1)
        return [*rationale[:room], *answer, tokenizer.eos_id]

    if not rows:
        raise UserError("no example has a label of the kind to train on: see --labels")
    tasks = np.array([row.number for row in rows], np.uint8)
    assert tasks[0] == 0, "an example begins with its label row"
    example = np.cumsum(tasks == 0, dtype=np.int32) - 1
    sources, whole = (row.source for row in rows), (row.target for row in rows)
    targets = (t if isinstance(t, str) else " ".join(t) for t in whole)
    source = _pack(sources, tokenizer, max_source, cut_source)
    target = _pack(targets, tokenizer, max_target, cut_target)
    unknown = sum(int((ids == tokenizer.unk_id).sum()) for ids in (source[0], target[0]))
    return TokenRows(
        tasks, *source[:2], *target[:2], example, int(example[-1]) + 1, source[2], target[2],
        unknown, len(source[0]) + len(target[0]),
    )  # fmt: skip


def _pack(
    texts: Iterator[Text], tokenizer: Tokenizer, limit: int, cut: Callable[[int], list[int]]
) -> tuple[np.ndarray, np.ndarray, int]:
    """(flat ids, offsets, number that were cut), with few ids as Python integers at one time."""
    flat, lengths, n_cut = [], [0], 0
    while batch := tokenizer.encode_batch(list(islice(texts, 4096))):
        for i, ids in enumerate(batch):
            if len(ids) > limit:
                batch[i], n_cut = cut(len(lengths) - 1 + i), n_cut + 1
        lengths += map(len, batch)
        flat.append(np.fromiter(chain.from_iterable(batch), np.int32))
    return np.concatenate(flat), np.cumsum(lengths), n_cut


# ---- The order of batches ------------------------------------------------------------------------


@functools.lru_cache(maxsize=4)
def _permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(n)


def step_examples(n: int, batch_size: int, seed: int, step: int) -> np.ndarray:
    """Examples of a step (from 0): its places in the epochs' permutations, one after the other, so
    that nothing is dropped and a step may reach into the next epoch."""
    epochs, places = np.divmod(np.arange(step * batch_size, (step + 1) * batch_size), n)
    parts = [
        _permutation(n, seed, int(epoch))[places[epochs == epoch]] for epoch in np.unique(epochs)
    ]
    return np.concatenate(parts)


def micro_batches(
    source_lengths: np.ndarray,
    target_lengths: np.ndarray,
    tasks: np.ndarray,
    micro_tokens: int,
    world: int,
    overhead: int,
) -> list[list[np.ndarray]]:
    """Deals the rows of one step: each rank gets a list of index arrays, equally many for all.

    A micro-batch takes places: rows x (longest source + longest target), padding included. None
    takes more than `micro_tokens`, unless it is a single row. Rows of one task stay together and
    are sorted by length, so that a label is not padded to a rationale. Many small micro-batches
    have little padding, but each costs as much time as `overhead` places besides its own; of
    several ways to cut, the one that takes least time is chosen. Ranks run micro-batches of
    similar cost at one time; a rank's last one may be empty.
    """
    order = np.lexsort((source_lengths + target_lengths, tasks))
    rows = list(zip(*(x[order].tolist() for x in (tasks, source_lengths, target_lengths))))

    def cut(limit: int) -> list[tuple[int, int, int]]:
        """(places, first row, end) of each micro-batch when each is filled up to the limit."""
        pieces, first, source, target = [], 0, 0, 0
        for i, (task, s, t) in enumerate(rows):
            places = (i + 1 - first) * (max(source, s) + max(target, t))
            if i > first and (places > limit or task != rows[first][0]):
                pieces.append(((i - first) * (source + target), first, i))
                first, source, target = i, 0, 0
            source, target = max(source, s), max(target, t)
        return [*pieces, ((len(rows) - first) * (source + target), first, len(rows))]

    best, least, longest = [], math.inf, max(s + t for _, s, t in rows)
    limit = min(micro_tokens, len(rows) * longest)
    while limit > 0:
        pieces = sorted(cut(limit), reverse=True)
        # All ranks wait for the costliest of the `world` pieces that run at one time.
        time = sum(places + overhead for places, _, _ in pieces[::world])
        if time < least:
            best, least = pieces, time
        limit = int(0.9 * limit) if limit > longest else 0
    dealt = [order[first:end] for _, first, end in best]
    dealt += [order[:0]] * (-len(dealt) % world)
    return [dealt[rank::world] for rank in range(world)]


def collate(rows: TokenRows, indices: np.ndarray, multiple: int = 1) -> dict[str, np.ndarray]:
    """input_ids (B, S) padded with 0, attention_mask (B, S), labels (B, T) padded with -100, tasks
    (B,), all int64; S and T are rounded up to a multiple. No indices give a dummy row of weight
    0, for a rank that must keep step."""
    sources = [rows.source(i) for i in indices] or [np.array([Tokenizer.eos_id])]
    targets = [rows.target(i) for i in indices] or [np.array([-100])]
    return {
        "input_ids": pad(sources, Tokenizer.pad_id, multiple),
        "attention_mask": pad([np.ones_like(source) for source in sources], 0, multiple),
        "labels": pad(targets, -100, multiple),
        "tasks": rows.tasks[indices].astype(np.int64) if len(indices) else np.zeros(1, np.int64),
    }


def pad(arrays: Sequence[Sequence[int]], value: int, multiple: int = 1) -> np.ndarray:
    """Ragged rows -> (rows, longest) int64, filled up with `value`; the longest is rounded up to a
    multiple."""
    longest = round_up(max(map(len, arrays)), multiple)
    padded = np.full((len(arrays), longest), value, np.int64)
    for row, array in zip(padded, arrays):
        row[: len(array)] = array
    return padded


def round_up(number: int | np.ndarray, multiple: int) -> int | np.ndarray:
    """The next multiple: round_up(13, 8) is 16."""
    return -(-number // multiple) * multiple
