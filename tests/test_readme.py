"""README's commands parse, its numbers match the code, and its forks run as printed."""

import json
import re
import shlex

import pytest
from conftest import ROOT, read_jsonl, run
from server import Server

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
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
OTHER = {"out", "resume", "plan", "gpus", "json", "timeout"}  # of train.py's flags
QUICK = "--steps 6 --batch-size 6 --eval-every 3".split()


def test_the_first_screen_has_the_commands_in_order():
    wanted = ["pip install -r requirements.txt", "python train.py", "pytest",
              "torchrun --nproc_per_node=16 train.py --size xxl"]  # fmt: skip
    assert [c for c in COMMANDS if c in wanted] == wanted
    assert README.index("path/to/folder") < README.index("## Reading order")
    assert "ethics statement" in README and "synthetic" in README


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
        reproduce.scales(reproduce.parse_args(words[script + 1 :])[0])
    else:
        evaluation.parse_args(words[script + 1 :])


def test_three_commands_from_unlabelled_inputs_to_a_student(tmp_path):
    """As printed, but for the server's address; from a folder of inputs and a prompt."""
    block = README.split("and three commands:")[1].split("```")[1].splitlines()
    commands = [line for line in block if ".py" in line]
    assert len(commands) == 3
    (tmp_path / "mine").mkdir()
    rows = ({"id": f"m{i}", "input": f"What is the colour of the sky, number {i}?"}
            for i in range(30))  # fmt: skip
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "mine" / "train.jsonl").write_text(lines)
    prompt = "Q: What is the colour of grass?\nA: Grass is a plant. So the answer is green.\n"
    (tmp_path / "mine" / "prompt.txt").write_text(prompt)
    with Server() as server:
        for line in commands:
            words = shlex.split(line.replace("NAME", "m").replace("URL", server.url))[1:]
            quick = [*QUICK, "--out", "run"] if words[0] == "train.py" else []
            run(ROOT / words[0], *words[1:], *quick, cwd=tmp_path)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["labels"] == "teacher" and result["n_test"] == 0


@pytest.mark.parametrize("processes", [1, 2])
def test_the_fork_of_the_architecture(small_task, tmp_path, processes):
    assert SNIPPETS[0].count("\n") < 10
    (tmp_path / "fork.py").write_text(SNIPPETS[0])
    run(tmp_path / "fork.py", "--dataset", small_task, *QUICK, "--out", tmp_path / "r",
        processes=processes)  # fmt: skip
    assert json.loads((tmp_path / "r" / "result.json").read_text())["best_step"] > 0
    size = (tmp_path / "r" / "last" / "model.safetensors").stat().st_size
    assert size < 3.5e6, "one encoder block is saved, not two"


def test_the_fork_of_the_task(tmp_path):
    assert SNIPPETS[1].count("\n") < 10
    (tmp_path / "task.py").write_text(SNIPPETS[1])
    folder = tmp_path / "datasets" / "boolq"
    folder.mkdir(parents=True)
    for name, n in (("train", 30), ("test", 5)):
        rows = [{"id": f"{name}{i}", "passage": "Water is wet.", "question": f"Is it, {i}?",
                 "answer": "yes" if i % 2 else "no"} for i in range(n)]  # fmt: skip
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"boolq_{name}.jsonl").write_text(text)
    run(tmp_path / "task.py", "--dataset", "boolq", "--method", "standard", *QUICK,
        "--data-root", tmp_path / "datasets", "--out", tmp_path / "r")  # fmt: skip
    predictions = read_jsonl(tmp_path / "r" / "predictions.jsonl")
    assert [row["id"] for row in predictions] == [f"test{i}" for i in range(5)]


@pytest.mark.parametrize("processes", [1, 2])
def test_the_fork_with_a_third_task(small_task, tmp_path, processes):
    assert SNIPPETS[2].count("\n") < 10
    (tmp_path / "third.py").write_text(SNIPPETS[2])
    run(tmp_path / "third.py", "--dataset", small_task, *QUICK, "--lam", "0.5", "--out",
        tmp_path / "r", processes=processes)  # fmt: skip
    steps = [m for m in read_jsonl(tmp_path / "r" / "metrics.jsonl") if "loss" in m]
    assert len(steps) == 6
    for m in steps:
        assert m["label_loss"] > 0 and m["rationale_loss"] > 0 and m["gist_loss"] > 0
        others = m["rationale_loss"] + m["gist_loss"]
        assert m["loss"] == pytest.approx(m["label_loss"] + 0.5 * others, rel=1e-5)
