"""The bundled task: its script gives the bundled bytes, and the task is what it says it is."""

import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece
from conftest import read_jsonl

DEMO = Path(__file__).parents[1] / "demo"
SPLITS = {"train": 600, "valid": 200, "test": 1000}
JSONL = (*SPLITS, "pool", "weak")
WRITTEN_WITH = "0.2.3"  # the sentencepiece that trained the bundled vocabulary


@pytest.fixture(scope="module")
def files() -> dict[str, list[dict]]:
    return {name: read_jsonl(DEMO / f"{name}.jsonl") for name in JSONL}


def test_the_script_writes_the_bundled_files(tmp_path):
    subprocess.run([sys.executable, DEMO / "make_demo.py", "--out", tmp_path], check=True)
    names = {f"{name}.jsonl" for name in JSONL} | {"task.json", "spiece.model"}
    assert {path.name for path in tmp_path.iterdir()} == names
    for name in names - {"spiece.model"}:
        assert (tmp_path / name).read_bytes() == (DEMO / name).read_bytes(), name
    # Another release of the trainer may choose other pieces, another processor other last bits.
    if sentencepiece.__version__ == WRITTEN_WITH:
        old, new = (
            sentencepiece.SentencePieceProcessor(model_file=str(folder / "spiece.model"))
            for folder in (DEMO, tmp_path)
        )
        ids = list(range(old.vocab_size()))
        assert new.vocab_size() == len(ids) and new.id_to_piece(ids) == old.id_to_piece(ids)
        assert new.get_score(ids) == pytest.approx(old.get_score(ids), abs=1e-4)


def test_sizes_ids_and_keys(files):
    """No input is in two places, and the weak teacher answers the same examples."""
    sizes = {**SPLITS, "pool": 700, "weak": sum(SPLITS.values())}
    assert {name: len(rows) for name, rows in files.items()} == sizes
    for key in ("id", "input"):
        every = [row[key] for name in (*SPLITS, "pool") for row in files[name]]
        assert len(set(every)) == len(every)
    for name, rows in files.items():
        assert all((row["rationale"] is None) == (row["teacher_label"] is None) for row in rows)
        assert all(("facts" in row) == (name in SPLITS) for row in rows)
    splits = [row for split in SPLITS for row in files[split]]
    for key in ("id", "input", "label"):
        assert [row[key] for row in files["weak"]] == [row[key] for row in splits]


RULES = """
         faulty   unwanted misdelivered
kitchen  exchange voucher  refund
clothing refund   exchange voucher
toy      voucher  refuse   exchange
garden   refuse   refund   refuse
"""


def test_labels_are_what_the_policy_says(files):
    """The rules once more, as a table. Neither fact alone decides."""
    matters, *rows = map(str.split, RULES.strip().splitlines())
    for split in SPLITS:
        for row in files[split]:
            department = next(r for r in rows if r[0] == row["facts"]["department"])
            assert row["label"] == department[1 + matters.index(row["facts"]["matter"])], row
            assert not any(fact in row["input"] for fact in row["facts"].values())
    assert all(row["label"] is None for row in files["pool"])
