"""Predicting and scoring: against transformers, at several world sizes, from the command line."""

import io
import json
import shutil

import pytest
import torch
from conftest import read_jsonl, run

import eval as evaluation
import train
from data import Example, Tokenizer, load_dataset
from dsbs import METHODS, make_source
from eval import evaluate, generate_texts, load_student, predict

CPU = torch.device("cpu")
QUICK = "--steps 30 --batch-size 12 --eval-every 15 --lr 3e-3".split()


@pytest.fixture(scope="module")
def students(small_task, tmp_path_factory):
    """A quickly trained student of each method, in the test's own process."""
    folder = tmp_path_factory.mktemp("students")
    for method in METHODS:
        args = ["--dataset", str(small_task), "--method", method, "--out", str(folder / method)]
        assert train.main([*args, *QUICK]) == 0
    return folder


@pytest.fixture
def ask(call, monkeypatch):
    """eval.py's command line in this process: its output, after it exits with `check`."""

    def ask(*words, check=0, stdin=""):
        monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
        return call(evaluation.main, *words, check=check)

    return ask


def jsonl_of(text):
    return [json.loads(line) for line in text.splitlines()]


def test_transformers_loads_a_student_unchanged(students, small_task):
    """AutoTokenizer and AutoModelForSeq2SeqLM give eval.py's ids and test predictions."""
    transformers = pytest.importorskip("transformers", reason="the oracle needs transformers")
    for method in ("step-by-step", "standard"):
        folder = students / method / "best"
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        model = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
        ours = Tokenizer(folder / "spiece.model")
        sources = [make_source(e, method) for e in load_dataset(str(small_task), "test")]
        assert [tokenizer(s).input_ids for s in sources] == ours.encode_batch(sources)
        assert len(tokenizer) == ours.vocab_size
        batch = tokenizer(sources, return_tensors="pt", padding=True)
        tokens = model.generate(**batch, max_new_tokens=64, do_sample=False, num_beams=1)
        texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
        rows = read_jsonl(students / method / "predictions.jsonl")
        assert texts == [row["prediction"] for row in rows]


@pytest.mark.slow
def test_world_size_does_not_change_predictions(students, tmp_path):
    """Seven examples on three processes: every one scored once, in the data set's order."""
    out = tmp_path / "three.jsonl"
    done = run("eval.py", students / "step-by-step" / "best", "--out", out, processes=3)
    assert jsonl_of(done.stdout)[-1]["n"] == 7
    assert out.read_text() == (students / "step-by-step" / "predictions.jsonl").read_text()


def test_batches_to_decode_are_cut_by_tokens(tokenizer, monkeypatch):
    """Long sources come in smaller batches; each source once, in order, on one of the ranks."""
    seen = []

    class Echo(torch.nn.Module):
        def generate(self, input_ids, attention_mask, max_new_tokens):
            seen.append(input_ids.shape)
            return input_ids

    student = evaluation.Student(Echo(), tokenizer, "standard", "paper", "demo")
    texts = [("a man " * n).strip() for n in (3, 900, 7, 1000, *range(1, 70))]
    got = generate_texts(student, texts, 4)
    assert all(text.startswith(said) for text, said in zip(texts, got)) and got[4:] == texts[4:]
    assert all(rows * length <= evaluation.MAX_TOKENS and rows <= 64 for rows, length in seen)
    decoded, gather = [], lambda parts, part: decoded.extend(part[0])
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    for rank in range(3):
        monkeypatch.setattr(evaluation, "rank_and_world", lambda rank=rank: (rank, 3))
        with pytest.raises(AssertionError, match="one rank decodes"):  # the others' are missing
            generate_texts(student, texts, 4)
    assert sorted(decoded) == list(range(len(texts)))


def test_eval_gives_the_runs_own_test_accuracy(students, ask):
    for method in METHODS:
        done = ask(students / method / "best")
        last = jsonl_of(done.out)[-1]
        result = json.loads((students / method / "result.json").read_text())
        assert last["accuracy"] == result["test_accuracy"] and last["split"] == "test"
        ours = students / method / "best" / "predictions.jsonl"
        assert ours.read_text() == (students / method / "predictions.jsonl").read_text()
        ours.unlink()


def test_single_task_is_parsed_back_and_never_guessed(students, small_task, monkeypatch):
    student = load_student(students / "single-task" / "best", CPU, "fp32")
    texts = ["Snow is white. So the answer is white.", "Snow is white", "So the answer is"]
    monkeypatch.setattr(evaluation, "generate_texts", lambda *a, **k: texts)
    examples = [Example(str(i), "?", "white") for i in range(3)]
    rows = predict(student, examples, explain=True)
    assert [row["prediction"] for row in rows] == ["white", "", ""]
    assert rows[0]["rationale"] == "Snow is white."
    summary, rows = evaluate(student, examples)
    assert summary["accuracy"] == pytest.approx(1 / 3)


def test_scored_on_human_labels_else_the_teachers(students):
    student = load_student(students / "standard" / "best", CPU, "fp32")
    examples = [Example(str(i), "What is the colour of sky?", None, None, "blue") for i in range(3)]
    assert evaluate(student, examples)[0]["labels"] == "teacher"
    examples[0].label = "blue"
    summary, _ = evaluate(student, examples)
    assert summary["labels"] == "human" and summary["n"] == 1
    with pytest.raises(ValueError, match="nothing to score"):
        evaluate(student, [Example("a", "x", None)])


def test_predict_reads_json_lines_and_plain_text(ask, students, tmp_path):
    student = students / "step-by-step" / "best"
    test = [{"id": "p", "input": "What is the colour of sky?"}, {"input": ["snow", "grass"]}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in test))
    done = ask(student, "--predict", tmp_path / "in.jsonl", "--explain")
    rows = jsonl_of(done.out)
    assert [row["id"] for row in rows] == ["p", "2"]
    assert all(set(row) == {"id", "prediction", "rationale"} for row in rows)
    plain = "What is the colour of sky?\n\nWhat is the colour of snow?\n"
    rows = jsonl_of(ask(student, "--predict", "-", stdin=plain).out)
    assert [row["id"] for row in rows] == ["1", "3"]
    assert rows[0]["prediction"] == jsonl_of(done.out)[0]["prediction"]
    assert ask(student, "--predict", "-", stdin="").out == ""


def test_a_byte_order_mark_is_passed_over_and_other_forms_are_named(ask, students, tmp_path):
    student, path = students / "standard" / "best", tmp_path / "in.jsonl"
    line = '{"id": "q7", "input": "What is the colour of sky?"}\n'
    path.write_text(line, encoding="utf-8-sig")
    for words in (dict(), dict(stdin="\ufeff" + line)):
        done = ask(student, "--predict", "-" if words else path, **words)
        assert [row["id"] for row in jsonl_of(done.out)] == ["q7"]
    for content, name in ((f"[{line}]".encode(), "JSON array"), (line.encode("utf-16"), "UTF-16"),
                          (b"Le caf\xe9?\n", "latin-1")):  # fmt: skip
        path.write_bytes(content)
        error = ask(student, "--predict", path, check=2).err
        assert name in error and error.count("\n") == 1
    path.write_text("[1] a note, with a comma\n[2] another\n")
    assert len(jsonl_of(ask(student, "--predict", path).out)) == 2


def test_explain_needs_a_student_that_learnt_to(ask, students):
    error = ask(students / "standard" / "best", "--predict", "-", "--explain", check=2).err
    assert "trained with standard" in error and "step-by-step" in error


@pytest.mark.parametrize(
    "missing", ["dsbs.json", "config.json", "spiece.model", "model.safetensors"]
)
def test_a_folder_that_is_no_student(ask, students, tmp_path, missing):
    folder = shutil.copytree(students / "standard" / "best", tmp_path / "student")
    (folder / missing).unlink()
    done = ask(folder, check=2)
    assert missing in done.err and done.err.count("\n") == 1
    assert "not a folder" in ask(tmp_path / "none", check=2).err
