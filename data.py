"""Everything about text: examples, datasets, answers in completions, tokens, the order of batches.

A new dataset is a row of `TASKS` or a folder of `*.jsonl`. This file gives strings and numpy arrays;
it knows nothing of torch, prompts, the network, lambda or ranks, and imports none of our files.
"""

import functools
import json
import math
import re
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import sentencepiece

SPLITS = ("train", "valid", "test")
Text = str | tuple[str, ...]


class UserError(ValueError):
    """What a user gave is wrong. One line: the value, what is allowed, how to mend it."""


@dataclass(slots=True)
class Example:
    """One input with what a human (label) and a teacher (rationale, teacher_label) said of it."""

    id: str
    input: str | tuple[str, str]  # a pair for NLI: (premise, hypothesis)
    label: str | None
    rationale: str | None = None
    teacher_label: str | None = None


# ---- Arithmetic: values of model text, never executed ---------------------------------------

MAX_LENGTH, MAX_DIGITS, MAX_DEPTH = 2000, 100, 50  # characters, of one number, of ( and -
NUMBER = r"[0-9]+\.?[0-9]*|\.[0-9]+"
TOKEN = re.compile(NUMBER + r"|[-+*/()]")


def evaluate_arithmetic(text: str) -> Fraction | None:
    """The exact value of numbers, + - * /, parentheses and unary minus; None for all else.

    >>> evaluate_arithmetic("( 84.0 / 2.0 )"), evaluate_arithmetic("9**9**9")
    (Fraction(42, 1), None)
    """
    if len(text) > MAX_LENGTH:
        return None
    tokens = TOKEN.findall(text)
    if "".join(tokens) != "".join(text.split()) or any(len(t) > MAX_DIGITS for t in tokens):
        return None
    tokens = [*tokens, "end"][::-1]

    def add(depth: int) -> Fraction:
        value = multiply(depth)
        while tokens[-1] in ("+", "-"):
            value += multiply(depth) if tokens.pop() == "+" else -multiply(depth)
        return value

    def multiply(depth: int) -> Fraction:
        value = factor(depth)
        while tokens[-1] in ("*", "/"):
            value = value * factor(depth) if tokens.pop() == "*" else value / factor(depth)
        return value

    def factor(depth: int) -> Fraction:
        token = tokens.pop()
        if depth > MAX_DEPTH:
            raise ValueError("too deep")
        if token == "-":
            return -factor(depth + 1)
        if token != "(":
            return Fraction(token)  # a ValueError for anything but a number
        value = add(depth + 1)
        if tokens.pop() != ")":
            raise ValueError("an open parenthesis")
        return value

    # Tokens left over are an error as well. The end is never popped but as a wrong factor or ")",
    # which raises at once.
    try:
        value = add(0)
    except (ValueError, ZeroDivisionError):
        return None
    return value if tokens == ["end"] else None


# ---- The datasets ----------------------------------------------------------------------------

ARCHIVE = "the released archive, https://github.com/google-research/distilling-step-by-step"
ASDIV = "https://github.com/chaochun/nlu-asdiv-dataset"
NLI = ("entailment", "neutral", "contradiction")  # the order of integer labels


@dataclass(frozen=True)
class Task:
    """All facts of a dataset. `labels` is the closed set, or None where any text may be an answer
    (cqa: where the choices are the input's own)."""

    name: str
    labels: tuple[str, ...] | None
    scorer: str  # "text" or "arithmetic"
    marker: str  # what comes before the label in a completion
    end: str = "."  # and what comes after it
    also: tuple[str, ...] = ()  # markers that other teachers use
    path: str = "{}.jsonl"  # of a split's file, below the folder or the data root
    folder: Path | None = None  # None: below the data root
    # From a record to (its own id or None, input, label); None: our own format.
    read: Callable[[dict], tuple[str | None, Text, str | None]] | None = None
    cut: bool = False  # valid is cut out of train's file
    shards: tuple[tuple[str, int], ...] = ()  # (file's split, number of files of PaLM completions)
    human: str | None = None  # the key of a human's explanation
    source: str = ""  # where to get it
    record: str = '{"id": "7", "input": "text, or a list of two", "label": "yes"}'


def _read_cqa(record: dict) -> tuple[str | None, Text, str | None]:
    choices = [f"({letter}) {c}" for letter, c in zip("abcdefghij", record["choices"])]
    return record["id"], "\n".join([record["question"], "Answer Choices:", *choices]), record["answer"]


def _read_nli(record: dict) -> tuple[str | None, Text, str | None]:
    if record["label"] not in (0, 1, 2):
        raise ValueError(f"label {record['label']!r}, not 0 {NLI[0]}, 1 {NLI[1]}, 2 {NLI[2]}")
    return record.get("uid"), (record["premise"], record["hypothesis"]), NLI[record["label"]]


# `record` is a raw line of each dataset. Completions look like this, and run on after it:
#   svamp  Luke scored 84 points after 2 rounds. [...] The answer is (84 / 2).\n\nQ: There are
#   cqa    The answer must be [...] So the answer is (d) math problem.\n\nQ: "The man was
#   anli1  [...] So the answer is contradiction.\n\nPremise:
#   esnli  [...]\nAnswer: neutral\n\nPremise:
TASKS = {
    task.name: task
    for task in (
        Task(
            "svamp", None, "arithmetic", "The answer is", path="svamp/svamp_{}.json", cut=True,
            read=lambda r: (None, r["input"], r["label"]),
            shards=(("train", 2), ("test", 1)), source=ARCHIVE,
            record=r'{"input":"Luke scored 84 [...] per round?","label":"( 84.0 \/ 2.0 )"}',
        ),
        Task(
            "cqa", None, "text", "So the answer is", path="cqa/cqa_{}.json", cut=True,
            read=_read_cqa, shards=(("train", 10), ("test", 2)),
            human="abstractive_explanation", source=ARCHIVE,
            record='{"id":"6b81[...]","question":"\\"There are 10 [...] of?","choices":["park",'
            '"coloring book","garden center","math problem","gravity"],"answer":"math problem",'
            '"abstractive_explanation":"webmath is [...]","extractive_explanation":"[...]"}',
        ),
        Task(
            "esnli", NLI, "text", "Answer:", end="", also=("So the answer is", "The answer is"),
            path="esnli/esnli_{}.json", read=_read_nli,
            shards=(("train", 100), ("valid", 2), ("test", 2)),
            human="explanation_1", source=ARCHIVE,
            record='{"premise":"A man [...]","hypothesis":"[...]","label":1,"explanation_1":"[...]"}',
        ),
        Task(
            "anli1", NLI, "text", "So the answer is", also=("The answer is",),
            path="anli1/anli1_{}.json", read=_read_nli,
            shards=(("train", 4), ("valid", 1), ("test", 1)), human="reason", source=ARCHIVE,
            record='{"uid":"fd4e[...]","premise":"[...]","hypothesis":"[...]","label":2,'
            '"reason":"[...]"}',
        ),
        # Unlabelled here: more inputs for SVAMP's teacher. Problem, Body, Question elements.
        Task(
            "asdiv", None, "arithmetic", "The answer is", path="asdiv/ASDiv.xml", source=ASDIV,
            record='<Problem ID="nluds-0001"><Body>Seven red [...]</Body><Question>How many [...]',
        ),
        Task("demo", None, "text", "So the answer is", folder=Path(__file__).parent / "demo"),
    )
}  # fmt: skip


def get_task(name: str) -> Task:
    """A row of the table, or what `task.json`, else the labels in `train.jsonl`, say of a folder."""
    task = TASKS.get(name)
    if task and not task.folder:
        return task
    folder = task.folder if task else Path(name)
    if not (folder / "train.jsonl").is_file():
        raise UserError(
            f"dataset {name!r} is unknown: one of {', '.join(TASKS)}, or a folder holding train.jsonl"
        )
    files = [f for f in (folder / "task.json", folder / "train.jsonl") if f.is_file()]
    return _folder_task(name, folder, tuple((f.name, f.stat().st_mtime_ns) for f in files))


@functools.lru_cache(maxsize=8)
def _folder_task(name: str, folder: Path, files: tuple) -> Task:
    """`files` with their times make the cache forget a folder that was changed."""
    facts, where = {}, folder / "task.json"
    if where.is_file():
        try:
            facts = json.loads(where.read_bytes())
        except ValueError as error:
            raise UserError(f"{where}: {error}; write it as one JSON object") from None
    scorer = facts.get("scorer", "text") if isinstance(facts, dict) else None
    marker = facts.get("marker", "So the answer is") if scorer else None
    labels = facts.get("labels") if scorer else None
    known = (*["text", "arithmetic"],)
    if (
        scorer not in known
        or not (isinstance(marker, str) and marker.strip())
        or not (labels is None or (isinstance(labels, list) and labels
                and all(isinstance(x, str) and x.strip() for x in labels)))
    ):  # fmt: skip
        raise UserError(
            f'{where}: needs "labels": a list of texts or null, "scorer": "text" or "arithmetic", '
            f'"marker": a text; it has {json.dumps(facts)[:200]}'
        )
    if "labels" not in facts and scorer == "text":
        seen = {record.get("label") for _, record in _read_jsonl(folder / "train.jsonl")}
        labels = sorted({x.strip() for x in seen if isinstance(x, str)})
        labels = labels if 0 < len(labels) <= 20 else None
    labels = tuple(x.strip() for x in labels) if labels else None
    return Task(name, labels, scorer, " ".join(marker.split()), folder=folder)


def _file_split(task: Task, split: str, root: str | Path) -> str:
    """The split whose file holds `split`: train's for a valid that is cut out of it."""
    if split not in SPLITS:
        raise UserError(f"split {split!r}: one of {', '.join(SPLITS)}")
    cut = task.cut or (task.folder and not (task.folder / "valid.jsonl").is_file())
    return "train" if split == "valid" and cut else split


def _data_file(task: Task, split: str, root: str | Path) -> Path:
    return (task.folder or Path(root)) / task.path.format(_file_split(task, split, root))


def has_split(name: str, split: str, root: str | Path = "datasets") -> bool:
    """Is there a file for this split? It isn't opened."""
    task = get_task(name)
    return (name != "asdiv" or split == "train") and _data_file(task, split, root).is_file()


def teacher_files(
    name: str, split: str, root: str | Path = "datasets", rationales: str | Sequence | None = None
) -> list[Path]:
    """The files of a teacher's answers that `load_dataset` with these arguments reads."""
    task, source = get_task(name), _file_split(get_task(name), split, root)
    if rationales is None or rationales == "human":
        return []
    if not isinstance(rationales, str):
        return [Path(file) for file in rationales]
    if rationales not in ("palm", "neox"):
        raise UserError(
            f"rationales {rationales!r}: palm, neox, human, or a list of a teacher's .jsonl files"
        )
    if not task.shards:
        raise UserError(
            f"rationales {rationales!r} are not to be had for {name}: only for "
            f"{', '.join(t for t in TASKS if TASKS[t].shards)}; give a teacher's .jsonl files"
        )
    if rationales == "neox":
        return [Path(root) / "gpt-neox" / name / f"{source}.json"]
    folder = _data_file(task, split, root).parent / "llm"
    return [folder / f"{source}_CoT_{i}.json" for i in range(dict(task.shards)[source])]


def data_files(
    name: str, split: str, root: str | Path = "datasets", rationales: str | Sequence | None = None
) -> list[Path]:
    """All files that `load_dataset` with these arguments reads, for a run to hash."""
    return [_data_file(get_task(name), split, root), *teacher_files(name, split, root, rationales)]


def load_dataset(
    name: str,
    split: str,
    root: str | Path = "datasets",
    rationales: str | Sequence | None = None,
    counts: Counter | None = None,
) -> list[Example]:
    """The examples of a split, in the order of its file.

    rationales: None (what a folder's own lines carry), "palm", "neox", "human", or a list of
    teacher files (`*.jsonl`, joined by id). `counts` is added to: examples, without_rationale,
    teacher_labels_dropped (outside the closed label set or the input's choices), and
    teacher_ids_unmatched. UserError: a file that is missing, malformed or for another dataset, a
    label outside the set, duplicate ids, an empty split.
    """
    task, counts = get_task(name), Counter() if counts is None else counts
    if name == "asdiv" and split != "train":
        raise UserError(f"split {split!r}: asdiv only has train")
    if rationales == "human" and not task.human:
        human = ", ".join(t for t in TASKS if TASKS[t].human)
        raise UserError(f"rationales 'human' are not to be had for {name}: only for {human}")
    answers = teacher_files(name, split, root, rationales)
    path, file_split = _data_file(task, split, root), _file_split(task, split, root)
    examples = _read_examples(task, path, rationales)
    if isinstance(rationales, str) and rationales != "human":
        _attach_completions(task, path, examples, answers)
    if file_split != split or (split == "train" and _file_split(task, "valid", root) == "train"):
        examples = [examples[i] for i in split_indices(len(examples))[split == "valid"]]
    if not examples:
        raise UserError(f"{path}: split {split!r} of {name} is empty; it needs an example or more")
    if answers and not isinstance(rationales, str):
        _attach_files(name, root, examples, answers, counts)
    for example in examples:
        if example.teacher_label and _outside(task, example, example.teacher_label):
            example.teacher_label = None
            counts["teacher_labels_dropped"] += 1
        counts["without_rationale"] += not example.rationale
    counts["examples"] += len(examples)
    return examples


def split_indices(n: int) -> tuple[np.ndarray, np.ndarray]:
    """(train, valid) rows of a file of n: a fixed random tenth is valid, each in file order."""
    order, n_valid = np.random.default_rng(0).permutation(n), -(-n // 10)
    return np.sort(order[n_valid:]), np.sort(order[:n_valid])


def _read_examples(task: Task, path: Path, rationales: str | Sequence | None) -> list[Example]:
    if task.name == "asdiv":
        records = _read_asdiv(path)
    else:
        records = _read_jsonl(path, task.source, task.record)
    examples, prefix, row = [], path.stem.replace("_", "-"), 0
    for line, record in records:
        try:
            example = _make_example(task, record, f"{prefix}-{row}", rationales)
        except (KeyError, TypeError, ValueError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else error
            raise UserError(f"{path}:{line}: {reason}; a record looks like {task.record}") from None
        examples.append(example)
        row += 1
    twice = [i for i, n in Counter(example.id for example in examples).items() if n > 1]
    if twice:
        raise UserError(f"{path}: duplicate ids {', '.join(twice[:5])} ({len(twice)} in all)")
    return examples


def _make_example(task: Task, record: dict, number: str, rationales: object) -> Example:
    """KeyError or ValueError where the record is malformed or the label isn't one."""
    rationale = teacher_label = None
    if task.read is None:
        id, input, label = record["id"], record["input"], record.get("label")
        if isinstance(input, list):
            input = tuple(input)
        if rationales is None:
            rationale, teacher_label = record.get("rationale"), record.get("teacher_label")
    else:
        id, input, label = task.read(record)
        id = number if id is None else id
        if rationales == "human":
            rationale = record[task.human]
    parts = input if isinstance(input, tuple) and len(input) == 2 else (input,)
    if not all(isinstance(part, str) for part in parts):
        raise ValueError(f"input {input!r} is neither a text nor a list of two texts")
    "".join(parts).encode()  # half of a surrogate pair is a ValueError
    if not isinstance(id, str):
        raise ValueError(f"id {id!r} is not a text")
    label = _text_or_none("label", label)
    rationale = _text_or_none("rationale", rationale)
    teacher_label = _text_or_none("teacher_label", teacher_label)
    example = Example(id, input, label, rationale, teacher_label)
    if label is not None and (allowed := _outside(task, example, label)):
        raise ValueError(f"label {label!r} is not {allowed}")
    return example


def _text_or_none(key: str, value: object) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str):
        raise ValueError(f"{key} {value!r} is neither a text nor null")
    value.encode()
    return value.strip() or None


def _choices(input: str) -> list[str]:
    """The choices that a CQA input ends with: a line "(a) park" each."""
    return re.findall(r"^\([a-j]\) (.*)$", input.rpartition("\nAnswer Choices:\n")[2], re.MULTILINE)


def _outside(task: Task, example: Example, label: str) -> str:
    """What is allowed, where the label is not; "" where it is."""
    if task.scorer == "arithmetic":
        return "" if evaluate_arithmetic(label) is not None else "numbers, + - * / and parentheses"
    allowed = [c.strip() for c in _choices(example.input)] if task.name == "cqa" else task.labels
    return "" if allowed is None or label in allowed else f"one of {', '.join(allowed)}"


def _open(path: Path, source: str = "") -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        where = f"it comes from {source}" if source else "check the path"
        raise UserError(f"{path}: {error.strerror}; {where}") from None


def _read_jsonl(path: Path, source: str = "", record: str = "") -> Iterator[tuple[int, dict]]:
    """(line from 1, object) of each line that is not blank."""
    with _open(path, source) as file:
        for number, line in enumerate(file, 1):
            if line.isspace():
                continue
            try:
                value = json.loads(line)
                if not isinstance(value, dict):
                    raise ValueError("not a JSON object")
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path}:{number}: {error}; a line is one JSON object") from None
            yield number, value


def _read_asdiv(path: Path) -> Iterator[tuple[int, dict]]:
    """(problem from 1, its record in our own format)."""
    try:
        with _open(path, ASDIV) as file:
            problems = ElementTree.parse(file).getroot().iter("Problem")
    except ElementTree.ParseError as error:
        raise UserError(f"{path}: {error}; get it again from {ASDIV}") from None
    for number, problem in enumerate(problems, 1):
        body, question = problem.findtext("Body"), problem.findtext("Question")
        text = None if body is None or question is None else f"{body}\n{question}"
        yield number, {"id": problem.get("ID"), "input": text}


def _attach_completions(
    task: Task, path: Path, examples: list[Example], files: list[Path]
) -> None:
    """Completions belong to examples by their place in the file: `files`, one after the other."""
    completions = []
    for file in files:
        try:
            with _open(file, task.source) as opened:
                part = json.load(opened)
            if not (isinstance(part, list) and all(isinstance(x, str) for x in part)):
                raise ValueError("not a JSON list of texts")
        except UserError:
            raise
        except (ValueError, RecursionError) as error:
            raise UserError(f"{file}: {error}; get it again from {task.source}") from None
        completions += part
    if len(completions) != len(examples):
        raise UserError(
            f"{files[0].parent}: {len(completions)} completions in {len(files)} files are for another "
            f"dataset: {path} has {len(examples)} rows; get both from {task.source}"
        )
    for example, completion in zip(examples, completions):
        rationale, example.teacher_label = parse_completion(task.name, completion) or (None, None)
        example.rationale = rationale or None


def _attach_files(
    name: str, root: str | Path, examples: list[Example], files: list[Path], counts: Counter
) -> None:
    """A teacher's own answers belong to examples by id."""
    by_id, answered = {example.id: example for example in examples}, set()
    for file in files:
        ids = set()
        for line, record in _read_jsonl(file):
            try:
                id, rationale = record["id"], _text_or_none("rationale", record.get("rationale"))
                label = _text_or_none("teacher_label", record.get("teacher_label"))
                if not isinstance(id, str):
                    raise ValueError(f"id {id!r} is not a text")
            except (KeyError, ValueError) as error:
                reason = f"no {error}" if isinstance(error, KeyError) else error
                raise UserError(
                    f'{file}:{line}: {reason}; a line is {{"id", "rationale", "teacher_label"}}'
                ) from None
            if id in ids or id in answered:
                raise UserError(f"{file}:{line}: duplicate id {id!r}; keep one answer to an example")
            ids.add(id)
            if id in by_id:
                by_id[id].rationale, by_id[id].teacher_label = rationale, label
        counts["teacher_ids_unmatched"] += len(ids - by_id.keys())
        if not ids & by_id.keys() and not _known_elsewhere(name, root, ids):
            raise UserError(
                f"{file} is for another dataset: none of its {len(ids)} ids is in {name} "
                f"(such as {examples[0].id!r})"
            )
        answered |= ids


def _known_elsewhere(name: str, root: str | Path, ids: set[str]) -> bool:
    """Do other splits have any of these ids? Teacher files of all splits may be given at once."""
    splits = [split for split in SPLITS if has_split(name, split, root)]
    return any(example.id in ids for s in splits for example in load_dataset(name, s, root))


# ---- Answers in text ----------------------------------------------------------------------------

# Where a completion runs on into an invented example, at a line's start or after a sentence.
INVENTED = re.compile(r"(?:^|(?<=[.!?]))[ \t]*(?:Q|Question|Input|Premise):", re.MULTILINE)
BLANK_LINE = re.compile(r"\n[ \t]*\n")
EXPRESSION = re.compile(rf"[\s:$]*((?:{NUMBER}|[-+*/() \t])+)")
CHOICE = re.compile(r"[\s:]*\([a-j]\)[ \t]*(.+)")
LINE = re.compile(r"[\s:]*(.+)")
# The full stop that ends an answer: the line's last, or one before a space, unless in U.S. or Dr.
STOP = re.compile(r"(?<!\.[A-Za-z])(?<!\bMr)(?<!\bMs)(?<!\bMrs)(?<!\bDr)(?<!\bSt)\.(?=\s)|\.$")


def parse_completion(name: str, completion: str) -> tuple[str, str] | None:
    """(rationale, label) of a teacher's completion or a single-task student's text; None where it
    has no answer, or several different ones.

    A label outside a closed set is returned as it stands: who uses it decides. SVAMP's is the
    parenthesised expression, as in the released parser: "(16 * 17) * 4." gives "(16 * 17)".
    >>> parse_completion("svamp", "84 / 2 = 42. The answer is (84 / 2).\\n\\nQ: There are")
    ('84 / 2 = 42.', '(84 / 2)')
    """
    task = get_task(name)
    text = INVENTED.split(completion.strip(), maxsplit=1)[0]
    start, end, label = 0, len(text), None
    for match in _marker(task).finditer(text):
        if match.start() >= end:
            break
        answer = _answer(task, text, match.end(), end)
        if answer is None:
            continue
        if label is None:
            start, label = match.start(), answer
            # After an answer a blank line starts something new; before it, it is the rationale's.
            blank = BLANK_LINE.search(text, LINE.match(text, match.end()).end())
            end = blank.start() if blank else end
        elif answer != label:
            return None
    return None if label is None else (text[:start].strip(), label)


@functools.lru_cache(maxsize=16)
def _marker(task: Task) -> re.Pattern:
    spellings = [r"\s+".join(map(re.escape, m.split())) for m in (task.marker, *task.also)]
    return re.compile(rf"(?<!\w)(?:{'|'.join(spellings)})")


def _answer(task: Task, text: str, start: int, end: int) -> str | None:
    """The label that follows a marker which ends at `start`."""
    if task.scorer == "arithmetic":
        match = EXPRESSION.match(text, start, end)
        run = match[1].strip() if match else ""
        # An expression that was cut off, "(120 /" or "(9 - 2) * (3", has no answer.
        if not run.startswith("(") or run.count("(") != run.count(")") or run[-1] in "+-*/":
            return None
        label = run[: run.rindex(")") + 1]
        return label if evaluate_arithmetic(label) is not None else None
    match = (CHOICE if task.name == "cqa" else LINE).match(text, start, end)
    if not match:
        return None
    line = match[1].rstrip()
    if task.labels:
        # "neutral.", "**neutral**", "neutral, as it ..." but not "neutral or contradiction".
        bare = line.lstrip("*\"'`")
        for label in sorted(task.labels, key=len, reverse=True):
            rest = bare[len(label) :]
            if bare.startswith(label) and not re.match(r"[\w-]", rest):
                rest = STOP.split(rest, maxsplit=1)[0]
                other = any(re.search(rf"(?<!\w){re.escape(x)}(?!\w)", rest) for x in task.labels)
                return None if other else label
    label = STOP.split(line, maxsplit=1)[0].strip()
    # Two choices are none: "(a) ocean or (b) sea."
    return None if task.name == "cqa" and re.search(r"\([a-j]\)", label) else label or None


def format_answer(name: str, input: Text, label: str) -> str:
    """The sentence that `parse_completion` reads the label from: single-task's last words.

    >>> format_answer("svamp", "Luke scored 84 ...", "84 / 2")
    'The answer is (84 / 2).'
    """
    task = get_task(name)
    if task.scorer == "arithmetic" and not _wrapped(label):
        label = f"({label})"
    if name == "cqa" and label in (choices := [c.strip() for c in _choices(input)]):
        label = f"({'abcdefghij'[choices.index(label)]}) {label}"
    return f"{task.marker} {label}{task.end}"


def _wrapped(label: str) -> bool:
    """Are the first and the last character a pair of parentheses?"""
    depths = np.cumsum([(c == "(") - (c == ")") for c in label.strip()] or [0])
    return bool(depths[0] == 1 and depths[-1] == 0 and (depths[:-1] > 0).all())


def is_correct(name: str, prediction: str | None, label: str) -> bool:
    """Text is right when equal after strip (the released rule); arithmetic when the exact values
    agree to 1e-6 relative."""
    if prediction is None:
        return False
    if get_task(name).scorer == "text":
        return prediction.strip() == label.strip()
    a, b = evaluate_arithmetic(prediction), evaluate_arithmetic(label)
    return a is not None and b is not None and abs(a - b) <= max(abs(a), abs(b)) / 10**6


# ---- Tokens -------------------------------------------------------------------------------------

SPECIAL = re.compile(r"(</s>|<pad>|<unk>|<extra_id_[0-9]{1,2}>)")
SENTINELS = 100


class Tokenizer:
    """T5's: a SentencePiece model, and 100 sentinels above it, <extra_id_0> the highest."""

    pad_id, eos_id, unk_id = 0, 1, 2

    def __init__(self, path: str | Path):
        self.model = sentencepiece.SentencePieceProcessor()
        try:
            self.model.LoadFromSerializedProto(Path(path).read_bytes())
        except (OSError, RuntimeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not a SentencePiece model"
            raise UserError(f"{path}: {reason}; T5's folders hold it as spiece.model") from None
        ids = (self.model.pad_id(), self.model.eos_id(), self.model.unk_id())
        if ids != (0, 1, 2):
            raise UserError(
                f"{path}: ids of pad, eos, unk are {ids}, not T5's (0, 1, 2); train it with "
                "--pad_id=0 --eos_id=1 --unk_id=2 --bos_id=-1"
            )
        self.pieces = self.model.GetPieceSize()
        self.vocab_size = self.pieces + SENTINELS

    def encode(self, text: Text, max_length: int | None = None) -> list[int]:
        """Ids of a text or of several parts, each followed by EOS; cut to `max_length` in all."""
        return self.encode_batch([text], max_length)[0]

    def encode_batch(self, texts: Sequence[Text], max_length: int | None = None) -> list[list[int]]:
        """`encode` of each. Beyond `max_length` every part keeps its EOS and its share of the rest;
        what a short part leaves over goes to the longer ones, so the last part survives."""
        texts = [(text,) if isinstance(text, str) else text for text in texts]
        parts = iter(self.ids([part for text in texts for part in text]))
        batch = []
        for text in texts:
            own = list(islice(parts, len(text)))
            if max_length is not None and sum(map(len, own)) + len(own) > max_length:
                own = _share(own, max_length - len(own))
            batch.append([id for part in own for id in (*part, self.eos_id)])
        return batch

    def ids(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text, without EOS. Special tokens in it are ids; SentencePiece sees each piece
        between them alone."""
        pieces = [SPECIAL.split(text) if "<" in text else (text,) for text in texts]
        encoded = iter(self.model.Encode([piece for text in pieces for piece in text[::2]]))
        batch = []
        for text in pieces:
            ids = list(next(encoded))
            for special in text[1::2]:
                ids += [self._special(special), *next(encoded)]
            batch.append(ids)
        return batch

    def _special(self, token: str) -> int:
        fixed = {"<pad>": self.pad_id, "</s>": self.eos_id, "<unk>": self.unk_id}
        return fixed[token] if token in fixed else self.vocab_size - 1 - int(token[10:-1])

    def decode(self, ids: Sequence[int]) -> str:
        """The text, without special tokens and ids that are no token."""
        return self.model.Decode([int(id) for id in ids if 2 < id < self.pieces])


def _share(parts: list[list[int]], budget: int) -> list[list[int]]:
    """Cut parts to `budget` ids in all: the shortest first, each an even share of what is left."""
    assert budget >= 0, "max_length must leave room for every part's EOS"
    lengths = [0] * len(parts)
    for done, i in enumerate(sorted(range(len(parts)), key=lambda i: len(parts[i]))):
        lengths[i] = min(len(parts[i]), budget // (len(parts) - done))
        budget -= lengths[i]
    return [part[:length] for part, length in zip(parts, lengths)]


# ---- Rows of tokens -----------------------------------------------------------------------------


class Row(NamedTuple):
    """What a student learns: one task, what it reads, what it should write."""

    task: str  # "label" or "rationale"
    source: Text
    target: str | tuple[str, str]  # a pair is single-task's (rationale, answer)


@dataclass
class TokenRows:
    """Tokenised rows, flat: row i's source is source_ids[source_offsets[i] : source_offsets[i + 1]].
    The rows of an example are consecutive, its label row first."""

    tasks: np.ndarray  # (n,) uint8: 0 label, 1 rationale
    source_ids: np.ndarray  # int32
    source_offsets: np.ndarray  # (n + 1,) int64
    target_ids: np.ndarray
    target_offsets: np.ndarray
    example: np.ndarray  # (n,) int32: the example that a row belongs to, ascending
    n_examples: int
    unknown_tokens: int = 0  # of total_tokens, sources and targets, after truncation
    total_tokens: int = 0
    truncated_sources: int = 0  # rows
    truncated_targets: int = 0

    def __len__(self) -> int:
        return len(self.tasks)

    def source(self, i: int) -> np.ndarray:
        return self.source_ids[self.source_offsets[i] : self.source_offsets[i + 1]]

    def target(self, i: int) -> np.ndarray:
        return self.target_ids[self.target_offsets[i] : self.target_offsets[i + 1]]

    def rows_of(self, examples: np.ndarray) -> np.ndarray:
        """Indices of the rows of these examples, in their order."""
        first = np.searchsorted(self.example, examples, "left")
        last = np.searchsorted(self.example, examples, "right")
        return np.concatenate([np.arange(a, b) for a, b in zip(first, last)])


CHUNK = 4096  # rows whose ids are Python lists at one time


def tokenize_rows(
    rows: Iterable[Row], tokenizer: Tokenizer, max_source: int = 1024, max_target: int = 256
) -> TokenRows:
    """Tokenise once. Of a pair (rationale, answer) that is too long, rationale tokens go from the
    rationale's end; the answer and EOS stay, whatever the limit."""
    tasks, sources, targets, cut = [], [], [], [0, 0]
    rows = iter(rows)
    while chunk := list(islice(rows, CHUNK)):
        tasks.append(np.array([row.task == "rationale" for row in chunk], np.uint8))
        ids = tokenizer.encode_batch([row.source for row in chunk])
        for i, row in enumerate(chunk):
            if len(ids[i]) > max_source:
                ids[i] = tokenizer.encode(row.source, max_source)
                cut[0] += 1
        sources.append(_flat(ids))
        joined = [r.target if isinstance(r.target, str) else " ".join(r.target) for r in chunk]
        ids = tokenizer.encode_batch(joined)
        for i, row in enumerate(chunk):
            if len(ids[i]) > max_target:
                ids[i] = _cut_target(row.target, ids[i], tokenizer, max_target)
                cut[1] += 1
        targets.append(_flat(ids))
    if not tasks:
        raise UserError("no example has what this method trains on: a label, or a rationale")
    tasks = np.concatenate(tasks)
    assert tasks[0] == 0, "an example's label row comes first"
    (source_ids, source_lengths), (target_ids, target_lengths) = (
        map(np.concatenate, zip(*chunks)) for chunks in (sources, targets)
    )
    offsets = [np.append(0, np.cumsum(x)) for x in (source_lengths, target_lengths)]
    example = np.cumsum(tasks == 0, dtype=np.int32) - 1
    unknown = sum(int((ids == tokenizer.unk_id).sum()) for ids in (source_ids, target_ids))
    total = len(source_ids) + len(target_ids)
    return TokenRows(
        tasks, source_ids, offsets[0], target_ids, offsets[1], example, int(example[-1]) + 1,
        unknown, total, *cut,
    )  # fmt: skip


def _flat(ids: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    lengths = np.fromiter(map(len, ids), np.int64, len(ids))
    return np.fromiter((id for row in ids for id in row), np.int32, int(lengths.sum())), lengths


def _cut_target(
    target: str | tuple[str, str], ids: list[int], tokenizer: Tokenizer, max_target: int
) -> list[int]:
    if isinstance(target, str):
        return [*ids[: max_target - 1], tokenizer.eos_id]
    rationale, answer = tokenizer.ids(list(target))
    return [*rationale[: max(0, max_target - 1 - len(answer))], *answer, tokenizer.eos_id]


# ---- The order of batches -----------------------------------------------------------------------


@functools.lru_cache(maxsize=4)
def _permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(n)


def step_examples(n: int, batch_size: int, seed: int, step: int) -> np.ndarray:
    """Examples of a step (from 0): its batch_size places in the epochs' seeded permutations, one
    after the other. Nothing is dropped; a batch may reach into the next epoch."""
    places = np.arange(step * batch_size, (step + 1) * batch_size)
    return np.concatenate([
        _permutation(n, seed, int(epoch))[places[places // n == epoch] % n]
        for epoch in np.unique(places // n)
    ])


def micro_batches(
    source_lengths: np.ndarray, target_lengths: np.ndarray, size: int, world: int
) -> list[list[np.ndarray]]:
    """Deal the rows of one step: for each rank a list of index arrays, all lists equally long.

    Rows sorted by length are cut into as few pieces as a multiple of `world` and at most `size`
    rows each allow; the costliest piece (rows x longest source + rows x longest target, what padding
    makes of it) is as cheap as can be. Pieces of like cost run at the same time; some may be empty.
    """
    order = np.lexsort((target_lengths, source_lengths))
    sources, targets = source_lengths[order].tolist(), target_lengths[order].tolist()
    n_pieces = world * max(1, math.ceil(len(order) / (size * world)))

    def cuts(limit: int) -> list[int]:
        """Where pieces begin when each is filled up to this cost."""
        starts, longest = [0], 0
        for i, (source, target) in enumerate(zip(sources, targets)):
            longest, rows = max(longest, target), i + 1 - starts[-1]
            if rows > 1 and (rows > size or rows * (source + longest) > limit):
                starts.append(i)
                longest = target
        return starts

    low, high = 0, len(order) * (max(sources, default=0) + max(targets, default=0))
    while low < high:  # the smallest limit that needs no more than n_pieces
        middle = (low + high) // 2
        low, high = (low, middle) if len(cuts(middle)) <= n_pieces else (middle + 1, high)
    starts = cuts(high)
    ends = starts[1:] + [len(order)] * (n_pieces + 1 - len(starts))
    pieces = np.split(order, ends[:-1])
    return [pieces[rank::world] for rank in range(world)]


def collate(rows: TokenRows, indices: np.ndarray) -> dict[str, np.ndarray]:
    """input_ids (B, S) int64 padded with 0, attention_mask (B, S), labels (B, T) padded with -100,
    tasks (B,). No indices give one dummy row of weight 0, so that a rank without rows keeps step."""
    if len(indices) == 0:
        one = np.ones((1, 1), np.int64)
        return {"input_ids": one * Tokenizer.eos_id, "attention_mask": one, "labels": one * -100,
                "tasks": np.zeros(1, np.int64)}  # fmt: skip
    sources = [rows.source(i) for i in indices]
    input_ids = _pad(sources, Tokenizer.pad_id)
    mask = _pad([np.ones_like(source) for source in sources], 0)
    labels = _pad([rows.target(i) for i in indices], -100)
    return {"input_ids": input_ids, "attention_mask": mask, "labels": labels,
            "tasks": rows.tasks[indices].astype(np.int64)}  # fmt: skip


def _pad(arrays: list[np.ndarray], value: int) -> np.ndarray:
    padded = np.full((len(arrays), max(map(len, arrays))), value, np.int64)
    for row, array in zip(padded, arrays):
        row[: len(array)] = array
    return padded
