"""README's commands parse, its numbers match the code, and its forks run as printed."""

import json
import re
import runpy
import shlex

import pytest
from conftest import ROOT, read_jsonl, read_steps, run, write_jsonl
from server import Server

import data
import dsbs
import eval as evaluation
import teacher
import train
from scripts import reproduce

README = (ROOT / "README.md").read_text()
COMMANDS = [
    line.partition("#")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
]
FORKING = README.split("\n## Forking")[1]
SNIPPETS = re.findall(r"```python\n(.*?)```", FORKING, re.DOTALL)
OTHER = {"out", "resume", "plan", "gpus", "json", "timeout"}  # of train.py's flags
SHORT = "--steps 4 --batch-size 6 --eval-every 2".split()


@pytest.mark.parametrize("command", [c for c in COMMANDS if ".py" in c])
def test_commands_parse(command):
    words = shlex.split(command)
    script = next(i for i, word in enumerate(words) if word.endswith(".py"))
    if words[script] == "train.py":
        given = vars(train.parse_args(words[script + 1 :]))
        assert given.keys() <= {f.name for f in train.fields(train.Config)} | OTHER
    elif words[script] == "teacher.py":
        teacher.check(teacher.parse_args(words[script + 1 :]))
    elif words[script] == "scripts/reproduce.py":
        reproduce.scales(reproduce.parse_args(words[script + 1 :]))
    else:
        evaluation.parse_args(words[script + 1 :])


def test_three_commands_from_unlabelled_inputs_to_a_student(tmp_path, call, monkeypatch):
    """As printed, but for the server's address; from a folder of inputs and a prompt."""
    block = README.split("and three commands:")[1].split("```")[1].splitlines()
    commands = [line for line in block if ".py" in line]
    assert len(commands) == 3
    monkeypatch.chdir(tmp_path)
    rows = [{"id": f"m{i}", "input": f"What colour is the sky, number {i}?"} for i in range(30)]
    write_jsonl(tmp_path / "mine" / "train.jsonl", rows)
    prompt = "Q: What is the colour of grass?\nA: Grass is a plant. So the answer is green.\n"
    (tmp_path / "mine" / "prompt.txt").write_text(prompt)
    with Server() as server:
        for line in commands:
            words = shlex.split(line.replace("NAME", "m").replace("URL", server.url))[1:]
            quick = [*SHORT, "--out", "run"] if words[0] == "train.py" else []
            call(train.main if quick else teacher.main, *words[1:], *quick)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["labels"] == "teacher" and result["n_test"] == 0


@pytest.fixture
def fork(request, tmp_path, monkeypatch):
    """Trains with a snippet of README's, in this process or in several others; gives the run."""

    def fork(snippet, *words, processes=1):
        assert snippet.count("\n") < 10
        words = [*map(str, words), *SHORT, "--out", str(tmp_path / "r")]
        (tmp_path / "fork.py").write_text(snippet)
        if processes > 1:
            run(tmp_path / "fork.py", *words, processes=processes)
            return tmp_path / "r"
        monkeypatch.setattr("sys.argv", ["fork.py", *words])
        monkeypatch.setattr(evaluation, "STUDENT", evaluation.STUDENT)  # put back at the end
        for table in (data.TASKS, dsbs.TARGETS, dsbs.PREFIXES["paper"]):
            undo = dict(table)
            request.addfinalizer(lambda table=table, undo=undo: (table.clear(), table.update(undo)))
        with pytest.raises(SystemExit) as left:
            runpy.run_path(str(tmp_path / "fork.py"))
        assert left.value.code == 0
        return tmp_path / "r"

    return fork


def test_the_fork_of_the_architecture(small_task, fork):
    out = fork(SNIPPETS[0], "--dataset", small_task)
    assert json.loads((out / "result.json").read_text())["best_step"] > 0
    size = (out / "last" / "model.safetensors").stat().st_size
    assert size < 3.5e6, "one encoder block is saved, not two"


def test_the_fork_of_the_task(tmp_path, fork):
    for name, n in (("train", 30), ("test", 5)):
        rows = [{"question": f"is it, {i}", "title": "Water", "answer": i % 2 > 0,
                 "passage": "Water is wet."} for i in range(n)]  # fmt: skip
        write_jsonl(tmp_path / "boolq" / f"boolq_{name}.jsonl", rows)
    out = fork(SNIPPETS[1], "--dataset", "boolq", "--method", "standard", "--data-root", tmp_path)
    rows = read_jsonl(out / "predictions.jsonl")
    assert [row["id"] for row in rows] == [f"boolq-test-{i}" for i in range(5)]


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_fork_with_a_third_task(small_task, fork, processes):
    words = ["--dataset", small_task, "--lam", "0.5"]
    steps = read_steps(fork(SNIPPETS[2], *words, processes=processes))
    assert len(steps) == 4
    for m in steps:
        assert m["label_loss"] > 0 and m["rationale_loss"] > 0 and m["gist_loss"] > 0
        others = m["rationale_loss"] + m["gist_loss"]
        assert m["loss"] == pytest.approx(m["label_loss"] + 0.5 * others, rel=1e-5)
