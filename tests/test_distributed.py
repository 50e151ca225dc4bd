"""Several processes: DDP and FSDP train like one process, resume at any number, lose nothing."""

import json
import os
import random
import shutil
import signal
import socket
import time
from pathlib import Path

import pytest
import torch
from conftest import (
    QUICK,
    ROOT,
    kill,
    read_jsonl,
    read_steps,
    run,
    same_steps,
    saved_state,
    start,
    wait_for_step,
)
from safetensors.torch import load_file

import train
from t5 import T5, T5Config

pytestmark = pytest.mark.slow
SAME = "--steps 12 --batch-size 6 --micro-tokens 99 --eval-every 6 --save-every 3 --lr 5e-5".split()


@pytest.fixture(scope="module")
def tied(tmp_path_factory) -> Path:
    """A T5 1.0 with one matrix for embedding and head, whose sizes no number of ranks divides."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    shape = dict(d_model=52, d_kv=9, d_ff=37, num_layers=2, num_heads=3)
    config = T5Config(vocab_size=1345, relative_attention_num_buckets=10, **shape)
    T5(config).save_pretrained(folder)
    shutil.copy(ROOT / "demo" / "spiece.model", folder)
    return folder


@pytest.fixture(scope="module")
def alone(small_task, tied, tmp_path_factory):
    """One process without dropout, for an untied and a tied head."""
    out = tmp_path_factory.mktemp("alone")
    for name, weights in (("untied", "random"), ("tied", tied)):
        words = ["--dataset", small_task, "--out", out / name, *SAME, "--dropout", 0]
        assert train.main(list(map(str, [*words, "--weights", weights]))) == 0
    return out


def close(a: Path, b: Path) -> None:
    """Losses to 1e-5, gradient norms to 1e-4 relative, the same validation accuracies."""
    scores = [
        [row.get("valid_accuracy") for row in read_jsonl(out / "metrics.jsonl")] for out in (a, b)
    ]
    assert scores[0] == scores[1]
    a, b = read_steps(a), read_steps(b)
    assert len(a) == len(b) == 12
    for x, y in zip(a, b):
        for loss in ("loss", "label_loss", "rationale_loss"):
            assert abs(x[loss] - y[loss]) <= 1e-5 * max(1, abs(x[loss])), (x, y)
        assert abs(x["grad_norm"] - y["grad_norm"]) <= 1e-4 * x["grad_norm"], (x, y)


def same_student(a: Path, b: Path) -> None:
    """Files that `from_pretrained` loads, to a rounding; predictions of all, in order."""
    for name in ("best", "last"):
        one, many = (T5.from_pretrained(p / name) for p in (a, b))
        for (key, x), y in zip(one.named_parameters(), many.parameters()):
            assert torch.allclose(x, y, atol=2e-5), key
    for name in ("predictions.jsonl", "result.json"):
        assert (a / name).read_text() == (b / name).read_text()


@pytest.mark.parametrize("processes, more", [(4, "ddp"), (2, "fsdp --recompute")])
def test_many_train_like_one(alone, small_task, tmp_path, processes, more):
    """Ragged batches, accumulation, ranks without a row of some task (four ranks, six examples,
    two of them bare), evaluation."""
    run("train.py", "--dataset", small_task, "--out", tmp_path, *SAME, "--dropout", "0",
        "--parallel", *more.split(), processes=processes)  # fmt: skip
    close(alone / "untied", tmp_path)
    same_student(alone / "untied", tmp_path)


def test_two_agents_of_two_processes_train_like_one(alone, small_task, tied, tmp_path):
    """Two nodes: all that is known of the others comes from torchrun's environment."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    agents = []
    for node in (0, 1):
        agent = ["--nnodes=2", f"--node-rank={node}", "--master-addr=localhost",
                 f"--master-port={port}"]  # fmt: skip
        agents.append(start("train.py", "--dataset", small_task, "--out", tmp_path, *SAME,
                            "--dropout", "0", "--weights", tied, "--parallel", "fsdp",
                            processes=2, torchrun=agent))  # fmt: skip
    for agent in agents:
        said = agent.communicate(timeout=120)[0]
        assert agent.returncode == 0, said
    close(alone / "tied", tmp_path)
    same_student(alone / "tied", tmp_path)


def test_resumed_at_other_numbers_of_processes(alone, small_task, tied, tmp_path):
    """4 -> 2 -> 1 -> 4, killed in between, sharded or not, in other micro-batches."""
    words = ["train.py", "--dataset", small_task, "--out", tmp_path, *SAME, "--dropout", "0",
             "--weights", tied, "--resume"]  # fmt: skip
    turns = ((4, 3, ["--parallel", "fsdp"]), (2, 6, ["--parallel", "ddp", "--micro-tokens", "150"]),
             (1, 8, ["--save-every", "2"]))  # fmt: skip
    for processes, step, more in turns:
        process = start(*words, *more, processes=processes)
        wait_for_step(tmp_path, step + 1, process)
        kill(process)
        assert saved_state(tmp_path)["step"] >= step
    run(*words, "--parallel", "fsdp", processes=4)
    close(alone / "tied", tmp_path)


@pytest.mark.parametrize("parallel", ["fsdp", "ddp"])
def test_a_killed_rank_and_a_resumed_run_give_the_same_bits(small_task, tmp_path, parallel):
    """With dropout; one rank alone is killed at a random moment. Under FSDP torchrun starts all of
    them again; under DDP the others exit too, and the user continues."""
    whole, cut, dice = tmp_path / "whole", tmp_path / "cut", random.Random(4)
    words = ["train.py", "--dataset", small_task, *SAME, "--parallel", parallel]
    run(*words, "--out", whole, processes=2)
    restarts = parallel == "fsdp"
    words += ["--out", cut, "--resume"]
    process = start(
        *words, processes=2, torchrun=["--standalone", f"--max-restarts={int(restarts)}"]
    )
    wait_for_step(cut, dice.randrange(4, 6), process)
    time.sleep(dice.random() / 4)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    os.kill(int(children.split()[-1]), signal.SIGKILL)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == (0 if restarts else 1), said
    if not restarts:
        assert saved_state(cut)["step"] < 12
        said = run(*words, processes=2).stdout
    assert "continuing after step" in said
    assert same_steps(whole / "metrics.jsonl", cut / "metrics.jsonl")
    for name in ("best", "last"):
        a, b = (load_file(p / name / "model.safetensors") for p in (whole, cut))
        assert all(torch.equal(a[key], b[key]) for key in a)


SIGNALLED = """
import os, signal, sys
import eval as evaluation, train
from t5 import T5
note, where = sys.argv.pop(1), sys.argv.pop(1)
owner, name = (train, "train_step") if where == "training" else (T5, "generate")
plainly, calls = getattr(owner, name), []
def spy(*args, **more):
    calls.append(1)
    if os.environ["RANK"] == "1" and len(calls) == 2:
        os.kill(os.getpid(), signal.SIGTERM)
    return plainly(*args, **more)
setattr(owner, name, spy)
evaluation.MAX_TOKENS = 40  # a batch for each example
status = train.main()
with open(note + os.environ["RANK"], "w") as file:
    file.write(str(status))
evaluation.exit_process(status)
"""


@pytest.mark.parametrize("where, step", [("training", 3), ("evaluation", 4)])
def test_ranks_agree_on_the_step_they_stop_at(small_task, tmp_path, where, step):
    """SIGTERM to one of two ranks: both exit with 143, and what was done is saved."""
    script, out = tmp_path / "main.py", tmp_path / "run"
    script.write_text(SIGNALLED)
    said = run(script, tmp_path / "left", where, "--dataset", small_task, "--out", out, *QUICK,
               processes=2, check=1).stdout  # fmt: skip
    assert [(tmp_path / f"left{rank}").read_text() for rank in (0, 1)] == ["143", "143"], said
    assert "stopped by signal 15" in said and not (out / "best").exists()
    assert saved_state(out)["step"] == len(read_jsonl(out / "metrics.jsonl")) == step


def test_a_fork_that_is_no_t5_and_has_its_own_tokenizer(small_task, tmp_path):
    """Copied, killed and resumed sharded, it trains as it does alone; its student is used."""
    words = ["tests/fork.py", "--dataset", small_task, *SAME, "--lr", "1e-2", "--dropout", "0"]
    one, many = tmp_path / "one", tmp_path / "many"
    run(*words, "--out", one)
    steps = read_steps(one)
    assert steps[-1]["loss"] < steps[0]["loss"]
    process = start(*words, "--out", many, "--parallel", "ddp", processes=2)
    wait_for_step(many, 4, process)
    kill(process)
    run("tests/fork.py", "--out", many, "--resume", "--parallel", "fsdp", processes=2)
    close(one, many)
    weights = load_file(many / "last" / "model.safetensors")
    assert weights["embedding.weight"].shape == (258, 64), "whole, not a shard"
    files = {path.name for path in (many / "best").iterdir()}
    assert "tokenizer_config.json" in files and "spiece.model" not in files
    assert "Causal student" in (many / "best" / "README.md").read_text()
    asked = ["tests/fork.py", "eval", many / "best", "--predict", "-"]
    assert json.loads(run(*asked, stdin="What is snow?\n").stdout)["id"] == "1"
