"""SVAMP and, without human labels, ASDiv: `--augment asdiv` (Figures 7 and 9)."""

import json

import pytest
from conftest import write_jsonl

import train


@pytest.fixture
def root(tmp_path):
    """A data root of 20 problems of SVAMP's, 5 of its test and 12 of ASDiv's, and a teacher's
    answers to both: none to ASDiv's last, no equation for the one before."""
    (tmp_path / "asdiv").mkdir()
    for split, n in (("train", 20), ("test", 5)):
        rows = [{"input": f"Ann has {i} pens and gets 2.\nHow many?", "label": f"( {i} + 2 )"}
                for i in range(n)]  # fmt: skip
        write_jsonl(tmp_path / "svamp" / f"svamp_{split}.json", rows)
    problems = "".join(
        f'<Problem ID="n-{i}"><Body>Bob had {i} figs.</Body><Question>Now?</Question>'
        f"<Answer>{i}</Answer></Problem>" for i in range(12)
    )  # fmt: skip
    (tmp_path / "asdiv" / "ASDiv.xml").write_text(f"<Machine>{problems}</Machine>")
    answers = {
        "svamp": [(f"svamp-train-{i}", f"({i} + 2)") for i in range(20)],
        "asdiv": [(f"n-{i}", f"({i} * 1)") for i in range(10)] + [("n-10", "many")],
    }
    for name, some in answers.items():
        rows = [{"id": id, "rationale": "So it is.", "teacher_label": label} for id, label in some]
        write_jsonl(tmp_path / f"{name}.jsonl", rows)
    return tmp_path


def config(root, *sources, **more) -> train.Config:
    sources = [s if s == "palm" else str(root / f"{s}.jsonl") for s in sources]
    return train.resolve(train.Config(dataset="svamp", data_root=str(root), rationales=sources,
                                      augment="asdiv", **more))  # fmt: skip


def test_asdiv_is_added_with_the_teachers_labels(root):
    c = config(root, "svamp", "asdiv", labels="teacher")
    data = train.prepare(c)
    assert len(data.ids) == 18 + 10  # two of SVAMP's are valid; two of ASDiv's have no label
    assert sum(id.startswith("n-") for id in data.ids) == 10
    assert len(data.rows) == 2 * 28
    assert len(data.valid) == 2 and len(data.test) == 5, "only training gets more"
    assert "18 of 18 training" in data.notes[0] and "12 of asdiv" in data.notes[0]
    assert "outside the set: 1;" in data.notes[1] and "without an example: 0" in data.notes[1]
    half = train.prepare(config(root, "svamp", "asdiv", labels="teacher", augment_fraction=0.5))
    assert 18 + 4 <= len(half.ids) <= 18 + 6 and set(half.ids) < set(data.ids)


def test_human_labels_or_palm_s_for_svamp_and_files_for_asdiv(root):
    assert len(train.prepare(config(root, "asdiv", labels="human", method="standard")).ids) == 28
    said = [f"There are {i} and 2. The answer is ({i} + 2)." for i in range(20)]
    (root / "svamp" / "llm").mkdir()
    for i, part in enumerate((said[:10], said[10:])):
        (root / "svamp" / "llm" / f"train_CoT_{i}.json").write_text(json.dumps(part))
    data = train.prepare(config(root, "palm", "asdiv", labels="teacher"))
    assert len(data.ids) == 28 and len(data.rows) == 56


def test_it_trains_to_a_result(root, call):
    words = "--dataset svamp --labels teacher --augment asdiv --augment-fraction 0.5 --steps 2"
    words = [*words.split(), "--batch-size", 6, "--data-root", root, "--out", root / "run"]
    words += ["--rationales", root / "svamp.jsonl", root / "asdiv.jsonl"]
    call(train.main, *words)
    assert json.loads((root / "run" / "result.json").read_text())["n_test"] == 5
    about = json.loads((root / "run" / "run.json").read_text())
    assert about["config"]["augment_fraction"] == 0.5
    hashed = {name.rsplit("/", 1)[-1] for name in about["data_sha256"]}
    assert {"ASDiv.xml", "asdiv.jsonl", "svamp.jsonl", "svamp_train.json"} <= hashed
