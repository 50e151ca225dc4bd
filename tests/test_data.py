"""Datasets, their splits and bad input, completions, and the order of batches."""

import errno
import json
import os
import subprocess
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data import (
    TASKS,
    Example,
    Task,
    Tokenizer,
    UserError,
    check_labels,
    data_files,
    format_answer,
    get_task,
    has_split,
    is_correct,
    load_dataset,
    lock,
    parse_completion,
    unknown_characters,
    write_text,
)

REAL = Path(__file__).parents[2] / "shared" / "data" / "datasets"
real_data = pytest.mark.skipif(not REAL.is_dir(), reason=f"no real data in {REAL}")
NLI = ("entailment", "neutral", "contradiction")


def write(path: Path, *records: dict | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_text("".join(line + "\n" for line in lines))
    return path


def example(i: int, label: str | None = "yes", **more) -> dict:
    return {"id": f"x{i}", "input": f"text {i}", "label": label, **more}


def error_of(name, split="train", root="datasets", rationales=None) -> str:
    with pytest.raises(UserError) as error:
        load_dataset(str(name), split, root, rationales)
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- Files


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "new folder" / "file"
    write_text(path, "é\n")
    assert path.read_bytes() == b"\xc3\xa9\n"

    def full(file: int) -> None:
        assert path.read_bytes() == b"\xc3\xa9\n"
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as m:
        m.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            write_text(path, "other")
    assert path.read_text() == "é\n" and list(path.parent.iterdir()) == [path]


def test_a_lock_excludes_others_until_it_is_closed(tmp_path: Path, monkeypatch, capsys) -> None:
    path = tmp_path / "folder" / "log"
    with lock(path) as file:
        file.write(b"line\n")
        with pytest.raises(UserError, match="in use by another process"):
            lock(path)
    with lock(path):
        assert path.read_text() == "line\n"
    with pytest.raises(UserError, match="--out .*File exists"):
        lock(path / "below")

    for code in (errno.ENOLCK, errno.EINVAL, errno.EIO):

        def no_locks(*_, code=code) -> None:
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr("fcntl.flock", no_locks)
        with lock(path), lock(path):
            assert capsys.readouterr().err.count("warning: ") == 2


# ---- Real data


@real_data
@pytest.mark.parametrize(
    ("name", "counts"),
    [("svamp", (720, 80, 200)), ("cqa", (8766, 975, 1221)), ("asdiv", (2305, None, None))],
)
def test_real_counts(name: str, counts: tuple) -> None:
    ids = set()
    for split, count in zip(("train", "valid", "test"), counts):
        assert has_split(name, split, REAL) == (count is not None)
        if count:
            examples = load_dataset(name, split, REAL)
            assert len(examples) == count
            assert all(e.rationale is None and e.teacher_label is None for e in examples)
            ids |= {e.id for e in examples}
    assert len(ids) == sum(filter(None, counts)), "no example is in two splits"


@real_data
def test_real_records() -> None:
    svamp, cqa, asdiv = (load_dataset(n, "train", REAL)[0] for n in ("svamp", "cqa", "asdiv"))
    assert (svamp.id, svamp.label) == ("svamp-train-0", "( 84.0 / 2.0 )")
    assert svamp.input.endswith("points each round\nHow many points did he score per round?")
    assert cqa.input.endswith("(c) garden center\n(d) math problem\n(e) gravity")
    assert cqa.label == "math problem" and asdiv.label is None
    ids = [int(e.id.rpartition("-")[2]) for e in load_dataset("svamp", "valid", REAL)]
    order = np.random.default_rng(0).permutation(800)
    assert ids == sorted(order[:80].tolist())
    assert data_files("svamp", "valid", REAL, "palm")[0] == REAL / "svamp" / "svamp_train.json"


@real_data
@pytest.mark.parametrize("name", ["svamp", "cqa"])
def test_released_rationales_are_clean_and_targets_made_of_them_are_read_back(name: str) -> None:
    """Their accuracy is test_teacher.py's."""
    examples = load_dataset(name, "train", REAL, "palm")
    rationales = [e.rationale for e in examples if e.rationale]
    assert len(rationales) > 0.95 * len(examples)
    assert not any("\n\n" in r or "Q:" in r or TASKS[name].marker in r for r in rationales)
    for e in examples:
        for label in filter(None, (e.label, e.teacher_label)):
            rationale = " ".join((e.rationale or "").split())
            text = f"{rationale} {format_answer(name, e.input, label)}".strip()
            assert parse_completion(name, text) == (rationale, label), text


@real_data
def test_human_rationales_and_their_counts() -> None:
    counts = Counter()
    examples = load_dataset("cqa", "valid", REAL, "human", counts)
    assert examples[0].rationale == "bums are well known to take up residence under bridges."
    assert all(e.teacher_label is None for e in examples) and counts["examples"] == 975


# ---- Layouts of the archive, made up


def nli_root(root: Path, name: str, split: str = "valid", n: int = 3) -> Path:
    rows = [{"premise": f"p{i}", "hypothesis": f"h{i}", "label": i % 3} for i in range(n)]
    for i, row in enumerate(rows):
        row |= {"explanation_1": f"e{i}"} if name == "esnli" else {"uid": f"u{i}", "reason": ""}
    write(root / name / f"{name}_{split}.json", *rows)
    return root


def test_nli_layout_with_palm_neox_and_human(tmp_path: Path) -> None:
    nli_root(tmp_path, "esnli")
    answers = [f"r{i}\nAnswer: {label}\n\nPremise: x\nAnswer: x" for i, label in enumerate(NLI)]
    answers[2] = "r2\nAnswer: perhaps"
    write(tmp_path / "esnli/llm/valid_CoT_0.json", json.dumps(answers[:2]))
    write(tmp_path / "esnli/llm/valid_CoT_1.json", json.dumps(answers[2:]))
    counts = Counter()
    examples = load_dataset("esnli", "valid", tmp_path, "palm", counts)
    assert examples[1] == Example("esnli-valid-1", ("p1", "h1"), "neutral", "r1", "neutral")
    assert examples[2] == Example("esnli-valid-2", ("p2", "h2"), "contradiction", "r2", None)
    assert counts == {"examples": 3, "without_rationale": 0, "teacher_labels_dropped": 1}
    human = load_dataset("esnli", "valid", tmp_path, "human")
    assert [e.rationale for e in human] == ["e0", "e1", "e2"]

    nli_root(tmp_path, "anli1")
    neox = [" r0 So the answer is neutral.", "  r1 The answer is neutral.\n", "no idea"]
    path = write(tmp_path / "gpt-neox/anli1/valid.json", json.dumps(neox))
    assert data_files("anli1", "valid", tmp_path, "neox")[1:] == [path]
    examples = load_dataset("anli1", "valid", tmp_path, "neox")
    assert [e.id for e in examples] == ["u0", "u1", "u2"]
    assert [(e.rationale, e.teacher_label) for e in examples] == [
        ("r0", "neutral"), ("r1", "neutral"), (None, None),
    ]  # fmt: skip


def test_completions_follow_a_row_through_the_split(tmp_path: Path) -> None:
    rows = [{"input": f"i{i}", "label": f"( {i}.0 )"} for i in range(25)]
    write(tmp_path / "svamp/svamp_train.json", *rows)
    answers = json.dumps([f"r{i} The answer is ({i})." for i in range(25)])
    write(tmp_path / "gpt-neox/svamp/train.json", answers)
    splits = [load_dataset("svamp", s, tmp_path, "neox") for s in ("train", "valid")]
    assert [len(split) for split in splits] == [22, 3]
    for e in sum(splits, []):
        row = e.input[1:]
        assert e.id == f"svamp-train-{row}" and e.rationale == f"r{row}"
        assert e.teacher_label == f"({row})" and e.label == f"( {row}.0 )"


def test_bad_archive(tmp_path: Path) -> None:
    message = error_of("svamp", root=tmp_path)
    assert "svamp_train.json" in message and "google-research/distilling-step-by-step" in message
    assert "chaochun/nlu-asdiv-dataset" in error_of("asdiv", root=tmp_path)
    write(tmp_path / "asdiv/ASDiv.xml", "<Machine><ProblemSet><Problem>")
    assert "ASDiv.xml" in error_of("asdiv", root=tmp_path)
    assert "train" in error_of("asdiv", "test", tmp_path)
    write(tmp_path / "asdiv/ASDiv.xml", '<M><Problem ID="1"><Body>b</Body></Problem></M>')
    assert "no 'Question'" in error_of("asdiv", root=tmp_path)

    nli_root(tmp_path, "esnli")
    assert "valid_CoT_0.json" in error_of("esnli", "valid", tmp_path, "palm")
    neox = write(tmp_path / "gpt-neox/esnli/valid.json", '["Answer: neutral"]')
    message = error_of("esnli", "valid", tmp_path, "neox")
    assert "another dataset" in message and "1 completions for 3 rows" in message
    for content in ('{"a": 1}', "[1, 2, 3]", "[", "[" * 100_000):
        write(neox, content)
        assert str(neox) in error_of("esnli", "valid", tmp_path, "neox")
    good = {"premise": "p", "hypothesis": "h", "label": 1, "explanation_1": ""}
    for bad in ({"label": -1}, {"label": "neutral"}, {"label": 3}, {"premise": None}):
        path = write(tmp_path / "esnli/esnli_test.json", good, {**good, **bad})
        assert f"{path}:2" in error_of("esnli", "test", tmp_path)


def test_cqa_answer_must_be_a_choice(tmp_path: Path) -> None:
    row = {"id": "1", "question": "q", "choices": ["park", "math (hard)"], "answer": "park"}
    path = write(tmp_path / "cqa/cqa_test.json", row, {**row, "id": "2", "answer": "Park"})
    message = error_of("cqa", "test", tmp_path)
    assert f"{path}:2" in message and "'Park' is not one of park, math (hard)" in message
    write(path, row, row)
    assert "duplicate ids" in error_of("cqa", "test", tmp_path)


# ---- Folders


def test_folder_with_all_files(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", example(1), "", example(2, "no", rationale=" r ", extra=[1]))
    write(tmp_path / "valid.jsonl", example(3, teacher_label="no"))
    write(tmp_path / "test.jsonl", {"id": "4", "input": ["premise", "hypothesis"], "label": None})
    name = str(tmp_path)
    assert get_task(name).labels == ("no", "yes")
    assert (get_task(name).scorer, get_task(name).marker) == ("text", "So the answer is")
    train, valid, test = (load_dataset(name, split) for split in ("train", "valid", "test"))
    assert train == [Example("x1", "text 1", "yes"), Example("x2", "text 2", "no", "r")]
    assert valid == [Example("x3", "text 3", "yes", None, "no")]
    assert test == [Example("4", ("premise", "hypothesis"), None)]
    assert data_files(name, "valid") == [tmp_path / "valid.jsonl"]


def test_folder_without_valid_and_test(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", *(example(i) for i in range(31)))
    train, valid = (load_dataset(str(tmp_path), split) for split in ("train", "valid"))
    assert (len(train), len(valid)) == (27, 4)
    order = np.random.default_rng(0).permutation(31)
    assert [e.id for e in valid] == [f"x{i}" for i in sorted(order[:4])]
    assert [e.id for e in train] == [f"x{i}" for i in sorted(order[4:])]
    assert has_split(str(tmp_path), "valid") and not has_split(str(tmp_path), "test")
    assert "test.jsonl" in error_of(tmp_path, "test")


def test_label_sets_of_folders(tmp_path: Path) -> None:
    path = write(tmp_path / "train.jsonl", *(example(i, f"label {i}") for i in range(21)))
    assert get_task(str(tmp_path)).labels is None, "21 are free text"
    write(path, *(example(i, f"label {i}") for i in range(20)))
    assert len(get_task(str(tmp_path)).labels) == 20, "a changed file is read again"
    write(tmp_path / "valid.jsonl", example(1), example(2, "label 3"))
    message = error_of(tmp_path, "valid")
    assert f"{tmp_path / 'valid.jsonl'}:1" in message and "'yes'" in message
    assert "label 0, label 1" in message
    write(tmp_path / "task.json", {"labels": None})
    assert len(load_dataset(str(tmp_path), "valid")) == 2
    write(tmp_path / "task.json", {"labels": ["a", "b"], "marker": " Antwort: "})
    task = get_task(str(tmp_path))
    assert (task.labels, task.marker) == (("a", "b"), "Antwort:")
    write(tmp_path / "task.json", {"scorer": "arithmetic"})
    assert get_task(str(tmp_path)).labels is None
    assert "'label 0' is not numbers" in error_of(tmp_path)


@pytest.mark.parametrize(
    "content",
    ["{", "[]", "1", '{"labels": "yes"}', '{"labels": []}', '{"labels": [1]}', '{"labels": [""]}',
     '{"scorer": "bleu"}', '{"scorer": 1}', '{"marker": ""}', '{"marker": 3}'],
)  # fmt: skip
def test_bad_task_file(tmp_path: Path, content: str) -> None:
    write(tmp_path / "train.jsonl", example(1))
    write(tmp_path / "task.json", content)
    message = error_of(tmp_path)
    assert str(tmp_path / "task.json") in message and "scorer" in message


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "property name"),
        ("[1]", "not a JSON object"),
        ("[" * 100_000, "recursion"),
        ('{"id": "7", "label": "yes"}', "no 'input'"),
        ('{"input": "i", "label": "yes"}', "no 'id'"),
        ('{"id": 7, "input": "i", "label": "yes"}', "id 7 is not a text"),
        ('{"id": "7", "input": 3, "label": "yes"}', "input 3"),
        ('{"id": "7", "input": ["a", "b", "c"], "label": "yes"}', "input"),
        ('{"id": "7", "input": "i", "label": 1}', "label 1"),
        ('{"id": "7", "input": "i", "label": "yes", "rationale": []}', "rationale"),
        ('{"id": "7", "input": "i", "label": "yes", "teacher_label": 0}', "teacher_label"),
        ('{"id": "7", "input": "\\ud800", "label": "yes"}', "surrogate"),
        ('{"id": "7", "input": "i", "label": "maybe"}', "'maybe' is not one of yes, no"),
        ('{"id": "x1", "input": "i", "label": "yes"}', "duplicate"),
    ],
)
def test_bad_lines(tmp_path: Path, line: str, reason: str) -> None:
    path = write(tmp_path / "train.jsonl", example(1), example(2, "no"), "", line)
    write(tmp_path / "task.json", {"labels": ["yes", "no"]})
    message = error_of(tmp_path)
    assert reason in message
    assert (f"{path}:" if reason == "duplicate" else f"{path}:4:") in message


def test_empty_splits(tmp_path: Path) -> None:
    path = write(tmp_path / "train.jsonl", "")
    for split in ("train", "valid"):
        assert f"{path}: the {split} split" in error_of(tmp_path, split)
    write(path, example(1))
    assert "empty" in error_of(tmp_path), "its only example is valid's"
    write(tmp_path / "test.jsonl", "")
    assert "empty" in error_of(tmp_path, "test")


def test_teacher_files(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    write(folder / "train.jsonl", *(example(i, rationale="own") for i in range(1, 4)))
    write(folder / "valid.jsonl", example(9))
    one = write(
        tmp_path / "one.jsonl",
        {"id": "x1", "rationale": "because", "teacher_label": "yes"},
        {"id": "x2", "rationale": "why", "teacher_label": "perhaps", "input": "text 2"},
        {"id": "y", "rationale": "stranger"},
    )
    two = write(tmp_path / "two.jsonl", {"id": "x9", "rationale": "nine", "teacher_label": None})
    counts = Counter()
    train = load_dataset(str(folder), "train", rationales=[str(one), two], counts=counts)
    assert [(e.rationale, e.teacher_label) for e in train] == [
        ("because", "yes"), ("why", None), (None, None),
    ]  # fmt: skip
    assert counts == {
        "examples": 3, "without_rationale": 1, "teacher_labels_dropped": 1,
        "teacher_ids_unmatched": 1,  # y; x9 has a partner in valid
    }  # fmt: skip
    assert load_dataset(str(folder), "valid", rationales=[one, two])[0].rationale == "nine"
    assert data_files(str(folder), "valid", rationales=[one, two])[1:] == [one, two]

    other = write(tmp_path / "other.jsonl", {"id": "z", "rationale": "r"})
    message = error_of(folder, rationales=[one, other])
    assert str(other) in message and "another dataset" in message
    assert f"{one}:1" in error_of(folder, rationales=[one, one]), "an answer twice"
    assert "missing.jsonl" in error_of(folder, rationales=[tmp_path / "missing.jsonl"])
    for bad in ('{"rationale": "r"}', '{"id": 1}', '{"id": "x1", "rationale": 1}', "nonsense"):
        write(other, bad)
        assert f"{other}:1" in error_of(folder, rationales=[other])


# ---- Completions


@pytest.fixture
def closed(tmp_path: Path) -> str:
    write(tmp_path / "train.jsonl", example(1))
    labels = ["yes", "no", "yes, in part", "v1.0 (old). Beta", "no-go"]
    write(tmp_path / "task.json", {"labels": labels})
    return str(tmp_path)


SVAMP = [
    ("8 / 2 = 4. The answer is (8 / 2).\n\nQ: x\nA: The answer is (9).", ("8 / 2 = 4.", "(8 / 2)")),
    ("r The answer is ((415 - 309) - (41", None),
    ("r The answer is (9 - 2) * (3", None),
    ("r The answer is (n - 3).", None),
    ("r The answer is (9**9**9).", None),
    ("r", None),
    ("\n\nQ: invented The answer is (3).", None),
    ("r\n\nQ: invented\nA: The answer is (3).", None),
    ("The answer is (3).", ("", "(3)")),
    ("r The answer is\n( 84.0 / 2.0 ) points. It is (3).", ("r", "( 84.0 / 2.0 )")),
    ("r The answer is (84 / 2). This is (42).", ("r", "(84 / 2)")),
    ("r The answer is (84 / 2) = 42.", ("r", "(84 / 2)")),
    ("r The answer is (3). So The answer is (4).", None),
    ("r The answer is (3). Q: invented The answer is (4).", ("r", "(3)")),
    ("r The answer is (5 * 3) *", None),
    ("r The answer is ((29/2) and (30/2)).", ("r", "(30/2)")),
    ("r The answer is (3).\n\nAnother. The answer is (4).", ("r", "(3)")),
    ("first\n\nthen The answer is (3).", ("first\n\nthen", "(3)")),
    ("The answer is easy. The answer is (3).", ("The answer is easy.", "(3)")),
]
CQA = [
    ("r So the answer is (d) math problem.\n\nQ: x", ("r", "math problem")),
    ("r So the answer is (d) math problem. It is not (a) park.", ("r", "math problem")),
    ("r So the answer is either (a) ocean or (b) sea.", None),
    ("r So the answer is one of these four.", None),
    ("r So the answer is (e) Washington D.C.\n\n", ("r", "Washington D.C")),
    ("r So the answer is (b) good luck!\n\n", ("r", "good luck!")),
    ("r So the answer is (a) (this makes no sense).", ("r", "(this makes no sense)")),
    ("r So the answer is (a)", None),
]
ESNLI = [
    ("r\nAnswer: neutral\n\nPremise: x\nAnswer: entailment", ("r", "neutral")),
    ("r Answer: neutral Premise: x", ("r", "neutral")),
    ("r\nAnswer: neutral or contradiction", None),
    ("r\nAnswer: maybe", ("r", "maybe")),
    ("r\nAnswer:", None),
    ("r So the answer is **entailment**.", ("r", "entailment")),
]
ANLI = [
    ("r So the answer is contradiction.\n\nPremise: x", ("r", "contradiction")),
    ("r The answer is neutral. I hope this helps.", ("r", "neutral")),
    ("r So the answer is neutral, because it is not said.", ("r", "neutral")),
    ("r So the answer is neutrality.", ("r", "neutrality")),
]


CLOSED = [
    ("r So the answer is yes.", ("r", "yes")),
    ("r So the answer is yes. No doubt, no.", ("r", "yes")),
    ("r So the answer is yes, in part.", ("r", "yes, in part")),
    ("r So the answer is no-go.", ("r", "no-go")),
    ("r So the answer is v1.0 (old). Beta.", ("r", "v1.0 (old). Beta")),
    ("r So the answer is yes or no.", None),
    ("r So the answer is yes.\nInput: x\nSo the answer is no.", ("r", "yes")),
    ("r So the answer is yes.\n\nSo the answer is no.", ("r", "yes")),
    ("r Thus\nso: So the\nanswer is yes.", ("r Thus\nso:", "yes")),
    ("r AlSo the answer is yes.", None),
]
FREE = [
    ("r So the answer is a green hat. It is not blue.", ("r", "a green hat")),
    ("r So the answer is 42. I hope this helps!", ("r", "42")),
    ("r So the answer is the U.S. Congress.", ("r", "the U.S. Congress")),
    ("r So the answer is version 1.2 (beta) of a.b.c.", ("r", "version 1.2 (beta) of a.b.c")),
    ("r So the answer is a hat.\nQuestion: x\nSo the answer is b.", ("r", "a hat")),
]
CASES = dict(svamp=SVAMP, cqa=CQA, esnli=ESNLI, anli1=ANLI, closed=CLOSED, free=FREE)


@pytest.mark.parametrize("name, case", [(name, c) for name, cases in CASES.items() for c in cases])
def test_completions(closed: str, name: str, case: tuple) -> None:
    own = {"closed": closed, "free": replace(get_task(closed), labels=None)}
    assert parse_completion(own.get(name, name), case[0]) == case[1]


def test_answers_are_written_as_they_are_read(closed: str) -> None:
    choices = "q\nAnswer Choices:\n(a) bridge\n(b) math (hard) \n(c) bridge\n(d) U.S. a.m."
    assert format_answer("cqa", choices, "math (hard)") == "So the answer is (b) math (hard)."
    assert format_answer("cqa", choices, "bridge") == "So the answer is (a) bridge."
    assert parse_completion("cqa", format_answer("cqa", choices, "sea")) is None
    assert format_answer("svamp", "", "( 84.0 / 2.0 )") == "The answer is ( 84.0 / 2.0 )."
    assert format_answer("svamp", "", "8.0") == "The answer is (8.0)."
    assert format_answer("asdiv", "", "(1 + 2) * (3)") == "The answer is (1 + 2) * (3)."
    assert format_answer("esnli", ("p", "h"), "neutral") == "Answer: neutral"
    for label in get_task(closed).labels:
        assert parse_completion(closed, "r " + format_answer(closed, "", label)) == ("r", label)


def test_hostile_completions_are_quick() -> None:
    """Time grows with the length of a completion, not with its square or cube."""

    def seconds(*words) -> float:
        start = time.process_time()
        parse_completion(*words)
        return time.process_time() - start

    for junk in ("(", " ", "\n", "\n ", ". ", "(1+", "The answer is (", "So the answer is (a) ",
                 "Answer: neutral or ", "Q: ", "\0", "and (", "((1) and ", "\n- ",
                 "*", "\n>", "1,", "$1 x ", "a b ", "=", '"a" '):  # fmt: skip
        for name in ("svamp", "cqa", "esnli", "anli1"):
            for start in ("", TASKS[name].marker):
                short, long = (seconds(name, start + junk * n) for n in (500, 2_000))
                assert long < 8 * short + 0.05, (name, start, junk)


@pytest.mark.parametrize("completion", [
    "Rain falls.\n\n__So the answer is yes.__ Sure, no doubt",
    "Rain falls.\n***So the answer is***: yes",
    "Rain falls.\n\n## So the answer is: `yes`", "Rain falls. “So the answer is yes”",
    "Rain falls.\n> So the *answer* is\n>\n> - yes",
    "Rain falls.\n\n---\n\n* _So the answer is_ 'yes'.",
])  # fmt: skip
def test_marks_belong_to_neither_rationale_nor_label(completion: str, closed: str) -> None:
    free = replace(get_task(closed), labels=None)
    assert parse_completion(closed, completion) == ("Rain falls.", "yes")
    assert parse_completion(free, completion.split(" Sure")[0]) == ("Rain falls.", "yes")
    cqa = completion.split(" Sure")[0].replace("yes", "(b) yes")
    assert parse_completion("cqa", cqa) == ("Rain falls.", "yes")


def test_marks_within_a_label_stay(closed: str) -> None:
    free = replace(get_task(closed), labels=None)
    for label in ('"yes" or "no"', "snake_case", "6 * 7", "'tis", "the dogs'", "*a* and *b*"):
        assert parse_completion(free, f"r So the answer is {label}.") == ("r", label)
    stars = replace(get_task(closed), labels=("*", "**", "***"))
    assert parse_completion(stars, "r So the answer is **.") == ("r", "**")


WHOLE = {
    "(7 - 2) * (3 + 1) / 2": "(7 - 2) * (3 + 1) / 2", "$2,450.50": "2450.50", "-3": "-3",
    "7 - 2 = 5 apples": "5", "**12** red pens": "12", "8 x $3 = $24": "24", "6÷2": "3",
    "12 km/h. That is 3 times more": "12", "`(5 + 1) * 2`": "12", "$7$": "7", "35%": "35",
    "3 *-4* -5 apples": "60",
}  # fmt: skip
PARTS = ["7 or 8", "7 - y", "2(3 + 4)", "7^2", "7**2", "2 ** -1", "7 = 8", "(1 + 2) and (3)",
         "2 million", "4 + 3 less two", "9x", "1,23", "7 1/2", "50 * 20%", "(7", "7\n+ 2",
         "3 dozen", "7, 8", "about 7", "7 (not 8)", "3 *-4* -5 y", "7²", "2x - 3",
         "5 boxes.2 left"]  # fmt: skip


@pytest.mark.parametrize("text", [*WHOLE, *PARTS])
def test_an_expression_counts_whole_or_not_at_all(tmp_path: Path, text: str) -> None:
    write(tmp_path / "train.jsonl", example(1, "1"))
    write(tmp_path / "task.json", {"scorer": "arithmetic", "marker": "Result:"})
    for task, marker in ((tmp_path, "Result:"), ("svamp", "The answer is")):
        parsed = parse_completion(str(task), f"r {marker} {text}.", released=False)
        assert (parsed is not None) == (text in WHOLE), parsed
        assert not parsed or (parsed[0] == "r" and is_correct("svamp", parsed[1], WHOLE[text]))
    assert parse_completion("svamp", "The answer is (7 - 2) * (3).") == ("", "(7 - 2) * (3)")
    assert parse_completion("svamp", "The answer is (7 - 2) * 3.") == ("", "(7 - 2)"), "released"


ROWS = [example(i, "yes" if i % 2 else "né") for i in range(4)]
FORMS = {
    "JSON array": json.dumps(ROWS, indent=1).encode(),
    "UTF-16": "".join(json.dumps(row) + "\n" for row in ROWS).encode("utf-16"),
    "latin-1": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode(
        "latin-1"
    ),
    "CSV": ("id,input,label\n" + "".join(f"{r['id']},{r['input']},né\n" for r in ROWS)).encode(),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_file_of_another_form_is_named_and_the_command_converts_it(tmp_path, form) -> None:
    path = tmp_path / "train.jsonl"
    path.write_bytes(FORMS[form])
    message = error_of(tmp_path)
    assert form in message and '"id"' in message
    command = message.split("`")[1].replace("> new", f"> {tmp_path / 'new'}")
    subprocess.run(command, shell=True, check=True)
    os.replace(tmp_path / "new", path)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())  # passed over
    read = [e for split in ("train", "valid") for e in load_dataset(str(tmp_path), split)]
    assert {e.input for e in read} == {row["input"] for row in ROWS}


def test_an_error_shows_the_keys_that_a_task_reads(tmp_path: Path) -> None:
    read = lambda r: (None, r["body"].strip(), ("bad", "good")[r["stars"]])  # noqa: E731
    task = Task("films", None, "text", "So", "films", read=read)
    for record, parts in (({"stars": 1}, ["no 'body'"]), ({"body": 3, "stars": 1}, ["body int"]),
                          ({"body": "b", "stars": "1"}, ["stars str"])):  # fmt: skip
        write(tmp_path / "films/test.jsonl", record)
        with pytest.raises(UserError) as error:
            load_dataset(task, "test", tmp_path)
        assert all(p in str(error.value) for p in [*parts, '{"body": "...", "stars": "..."}'])


def test_labels_through_the_vocabulary(tokenizer: Tokenizer) -> None:
    task = replace(TASKS["demo"], labels=None)
    check = lambda *labels, t=task: check_labels(t, tokenizer, [*labels, None], [])  # noqa: E731
    assert check("a man", "on a ladder") == []
    assert "'①'" in " ".join(check("①")) and "characters: ①" in " ".join(check("①", "a"))
    assert "'a\\nman'" in " ".join(check("a\nman", t=replace(task, labels=("a\nman", "a"))))
    assert "'A', 'a'" in " ".join(check("a", "A", "on"))
    for labels in (("の", "a"), ("a  man", "a man"), ("a", "a</s>")):
        with pytest.raises(UserError, match="come back changed"):
            check(t=replace(task, labels=labels))
    choices = ["q\nAnswer Choices:\n(a) ½ man\n(b) on"]
    assert "½" in check_labels(TASKS["cqa"], tokenizer, ["on"], choices)[0]
    assert unknown_characters(["a の の 犬", ("犬 犬", "b")], tokenizer)[:2] == ["犬", "の"]


def test_text_is_right_when_equal_but_for_whitespace() -> None:
    assert is_correct("cqa", " math  problem\n", "math\nproblem")
    assert not is_correct("cqa", "Math problem", "math problem")
