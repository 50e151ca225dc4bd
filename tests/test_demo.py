"""The bundled task: its script gives the bundled bytes, and the task is what it says it is."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import sentencepiece

DEMO = Path(__file__).parents[1] / "demo"
SPLITS = {"train": 300, "valid": 200, "test": 1000}
JSONL = (*SPLITS, "pool", "weak")
WRITTEN_WITH = "0.2.3"  # the sentencepiece that trained the bundled vocabulary


def read(name: str) -> list[dict]:
    return [json.loads(line) for line in (DEMO / f"{name}.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def files() -> dict[str, list[dict]]:
    return {name: read(name) for name in JSONL}


@pytest.fixture(scope="module")
def vocabulary() -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(DEMO / "spiece.model"))


@pytest.fixture(scope="module")
def rewritten(tmp_path_factory) -> list[Path]:
    """What the script writes, twice: run from two folders."""
    folders = [tmp_path_factory.mktemp(name) for name in ("once", "again")]
    for folder in folders:
        script = [sys.executable, str(DEMO / "make_demo.py"), "--out", str(folder)]
        subprocess.run(script, check=True, cwd=folder, timeout=60)
    return folders


def test_the_script_writes_the_bundled_bytes(rewritten):
    names = {f"{name}.jsonl" for name in JSONL} | {"task.json", "spiece.model"}
    for folder in rewritten:
        assert {path.name for path in folder.iterdir()} == names
        for name in names - {"spiece.model"}:
            assert (folder / name).read_bytes() == (DEMO / name).read_bytes(), name


def test_the_script_writes_the_bundled_vocabulary(rewritten, vocabulary):
    once, again = ((folder / "spiece.model").read_bytes() for folder in rewritten)
    assert once == again
    # Another release of the trainer may choose other pieces, another processor other last bits.
    if sentencepiece.__version__ == WRITTEN_WITH:
        new = sentencepiece.SentencePieceProcessor(model_proto=once)
        ids = range(vocabulary.vocab_size())
        assert new.vocab_size() == len(ids)
        assert new.id_to_piece(list(ids)) == vocabulary.id_to_piece(list(ids))
        assert new.get_score(list(ids)) == pytest.approx(vocabulary.get_score(list(ids)), abs=1e-4)


def test_sizes_ids_and_keys(files):
    sizes = {**SPLITS, "pool": 700, "weak": sum(SPLITS.values())}
    assert {name: len(rows) for name, rows in files.items()} == sizes
    ids = [row["id"] for name in (*SPLITS, "pool") for row in files[name]]
    assert len(set(ids)) == len(ids)
    keys = {"id", "input", "label", "rationale", "teacher_label"}
    for name, rows in files.items():
        assert all(set(row) == (keys | {"facts"} if name in SPLITS else keys) for row in rows)
        assert all((row["rationale"] is None) == (row["teacher_label"] is None) for row in rows)


def test_no_input_is_in_two_places(files):
    inputs = [row["input"] for name in (*SPLITS, "pool") for row in files[name]]
    assert len(set(inputs)) == len(inputs)


def test_the_weak_teacher_answers_the_same_examples(files):
    splits = [row for split in SPLITS for row in files[split]]
    for key in ("id", "input", "label"):
        assert [row[key] for row in files["weak"]] == [row[key] for row in splits]


def decision(days: int, state: str, category: str, member: bool) -> str:
    """The policy once more, as a table: (sealed, in time, household, member) to a decision."""
    table = {
        "1111": "refund", "1110": "refund", "1101": "refund", "1100": "refund",
        "1011": "exchange", "1010": "voucher", "1001": "exchange", "1000": "voucher",
        "0111": "exchange", "0110": "exchange", "0101": "voucher", "0100": "refuse",
        "0011": "voucher", "0010": "refuse", "0001": "voucher", "0000": "refuse",
    }  # fmt: skip
    facts = (state == "sealed", days <= 30, category == "household", member)
    return table["".join(str(int(fact)) for fact in facts)]


def test_labels_are_what_the_policy_says(files):
    for split in SPLITS:
        for row in files[split]:
            assert row["label"] == decision(**row["facts"]), row
    assert all(row["label"] is None for row in files["pool"])


def test_rationales_lead_to_the_teachers_label(files):
    """A teacher's mistake is a fact misread, and its conclusion follows from what it says."""
    for split in (*SPLITS, "pool"):
        for row in filter(lambda row: row["rationale"], files[split]):
            words = row["rationale"].split(".")[0]
            says = {
                "days": 14 if "in time" in words else 60,
                "state": "sealed" if "sealed" in words else "opened",
                "category": "household" if "household" in words else "personal",
                "member": "a member" in words,
            }
            assert row["teacher_label"] == decision(**says), row
            if split in SPLITS:
                true = {**row["facts"], "days": 14 if row["facts"]["days"] <= 30 else 60}
                misread = sum(says[fact] != true[fact] for fact in true)
                assert misread == (row["teacher_label"] != row["label"]), row


def test_label_shares(files):
    """A student that always gives the most frequent label is right on about a third."""
    labels = json.loads((DEMO / "task.json").read_text())["labels"]
    for split in SPLITS:
        count = Counter(row["label"] for row in files[split])
        assert set(count) == set(labels)
        assert max(count.values()) <= 0.37 * len(files[split])
        assert min(count.values()) >= 0.15 * len(files[split])


def test_teacher_noise(files):
    def shares(rows):
        unparsable = sum(row["teacher_label"] is None for row in rows)
        right = sum(row["teacher_label"] == row["label"] for row in rows)
        return 1 - (right + unparsable) / len(rows), unparsable / len(rows)

    for split in SPLITS:
        wrong, unparsable = shares(files[split])
        assert 0.05 <= wrong <= 0.08 and 0.01 <= unparsable <= 0.02, split
    wrong, unparsable = shares(files["weak"])
    assert 0.25 <= wrong <= 0.30 and 0.04 <= unparsable <= 0.08


def test_vocabulary(files, vocabulary):
    """T5's special ids, bytes, every printable character, and no unknown or byte in the task."""
    v = vocabulary
    assert (v.pad_id(), v.eos_id(), v.unk_id(), v.bos_id()) == (0, 1, 2, -1)
    assert sum(map(v.is_byte, range(v.vocab_size()))) == 256
    assert all(v.piece_to_id(chr(code)) != v.unk_id() for code in range(33, 127))
    assert v.decode(v.encode("Größe 7 €")) == "Größe 7 €"
    texts = {row[key] for rows in files.values() for row in rows for key in ("input", "rationale")}
    texts |= {"[label] x", "[rationale] x", "predict: x", "explain: x"}
    texts |= {f"So the answer is {row['label']}." for row in files["train"]}
    for text in filter(None, texts):
        ids = v.encode(text)
        assert not any(i == v.unk_id() or v.is_byte(i) for i in ids), text
        assert v.decode(ids) == text and len(ids) <= 64


def test_transformers_gives_the_same_ids(files, tmp_path):
    """Its T5Tokenizer has no byte fallback, so the pieces alone must cover the task."""
    transformers = pytest.importorskip("transformers", reason="requirements-dev.txt")
    (tmp_path / "spiece.model").write_bytes((DEMO / "spiece.model").read_bytes())
    theirs = transformers.T5Tokenizer.from_pretrained(tmp_path, extra_ids=100)
    ours = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "spiece.model"))
    rows = files["train"] + files["valid"] + files["weak"][:300]
    texts = [f"{prefix} {row['input']}" for row in rows for prefix in ("[label]", "explain:")]
    texts += [row["rationale"] for row in rows if row["rationale"]]
    assert theirs(texts).input_ids == [ids + [1] for ids in ours.encode(texts)]
