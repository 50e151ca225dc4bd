"""Several processes: DDP and FSDP train like one process, resume at any number, lose nothing."""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import (
    ROOT,
    command,
    environment,
    kill,
    killed_after,
    read_jsonl,
    read_steps,
    run,
    same_steps,
    saved_state,
    start,
    wait_for_step,
)
from safetensors.torch import load_file

import eval as evaluation
from t5 import T5, T5Config

SAME = "--steps 12 --batch-size 6 --micro-tokens 99 --eval-every 6 --save-every 3 --lr 5e-5".split()


@pytest.fixture(scope="module")
def tied(tmp_path_factory) -> Path:
    """A T5 1.0 with one matrix for embedding and head, whose sizes no number of ranks divides."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    T5(T5Config(vocab_size=1345, d_model=52, d_kv=9, d_ff=37, num_layers=2, num_heads=3,
                relative_attention_num_buckets=10)).save_pretrained(folder)  # fmt: skip
    shutil.copy(ROOT / "demo" / "spiece.model", folder)
    return folder


def train(small_task, out, *words, **more):
    return run("train.py", "--dataset", small_task, "--out", out, *words, **more)


def close(a: Path, b: Path) -> None:
    """Losses to 1e-5, gradient norms to 1e-4 relative, the same validation accuracies."""
    scores = [[row["valid_accuracy"] for row in read_jsonl(out / "metrics.jsonl")
               if "valid_accuracy" in row] for out in (a, b)]  # fmt: skip
    assert scores[0] == scores[1] and len(scores[0]) == 2
    a, b = read_steps(a), read_steps(b)
    assert len(a) == len(b) == 12
    for x, y in zip(a, b):
        for loss in ("loss", "label_loss", "rationale_loss"):
            assert abs(x[loss] - y[loss]) <= 1e-5 * max(1, abs(x[loss])), (x, y)
        assert abs(x["grad_norm"] - y["grad_norm"]) <= 1e-4 * x["grad_norm"], (x, y)


@pytest.fixture(scope="module")
def alone(small_task, tied, tmp_path_factory):
    """One process without dropout, for an untied and a tied head."""
    out = tmp_path_factory.mktemp("alone")
    for name, weights in (("untied", "random"), ("tied", tied)):
        train(small_task, out / name, *SAME, "--dropout", "0", "--weights", weights)
    return out


@pytest.mark.parametrize(
    "parallel, processes, head", [("ddp", 4, "untied"), ("fsdp", 2, "untied"), ("fsdp", 4, "tied")]
)
def test_many_train_like_one(alone, small_task, tied, tmp_path, parallel, processes, head):
    """Ragged batches, accumulation, ranks without a row of some task (four ranks, six examples,
    two of them bare), evaluation; the students are files that `from_pretrained` loads."""
    weights = tied if head == "tied" else "random"
    train(small_task, tmp_path / "r", *SAME, "--dropout", "0", "--weights", weights, "--parallel",
          parallel, processes=processes)  # fmt: skip
    close(alone / head, tmp_path / "r")
    for name in ("best", "last"):
        one, many = (T5.from_pretrained(p / name) for p in (alone / head, tmp_path / "r"))
        for (key, a), b in zip(one.named_parameters(), many.parameters()):
            assert torch.allclose(a, b, atol=2e-5), key
    for name in ("predictions.jsonl", "result.json"):  # every example once, in order
        assert (alone / head / name).read_text() == (tmp_path / "r" / name).read_text()


def test_resumed_at_other_numbers_of_processes(alone, small_task, tied, tmp_path):
    """4 -> 1 -> 2, killed in between; FSDP where there are several."""
    out = tmp_path / "r"
    words = ["train.py", "--dataset", small_task, "--out", out, *SAME, "--dropout", "0",
             "--weights", tied, "--resume"]  # fmt: skip
    for processes, step in ((4, 3), (1, 6)):
        more = ["--parallel", "fsdp"] if processes > 1 else []
        process = start(*words, *more, processes=processes)
        wait_for_step(out, step + 1, process)
        kill(process)
        assert saved_state(out)["step"] >= step
    run(*words, "--parallel", "fsdp", processes=2)
    close(alone / "tied", out)


@pytest.mark.parametrize("parallel", ["fsdp", "ddp"])
def test_killed_and_resumed_gives_the_same_bits(small_task, tmp_path, parallel):
    """With dropout; one rank alone is killed at a random moment, then all of them."""
    words, processes = ["--parallel", parallel], 2
    train(small_task, tmp_path / "whole", *SAME, *words, processes=processes)
    out, dice = tmp_path / "cut", random.Random(4)
    words = ["train.py", "--dataset", small_task, "--out", out, *SAME, *words, "--resume"]
    process = start(*words, processes=processes)
    wait_for_step(out, dice.randrange(3, 6), process)
    time.sleep(dice.random() / 4)
    worker = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[-1]
    os.kill(int(worker), signal.SIGKILL)
    assert process.wait(timeout=120) == 1, "the others leave too"
    process.stdout.close()
    killed_after(8, out, *words, processes=processes) if saved_state(out) else None
    run(*words, processes=processes)
    assert same_steps(tmp_path / "whole" / "metrics.jsonl", out / "metrics.jsonl")
    for name in ("best", "last"):
        a, b = (load_file(p / name / "model.safetensors") for p in (tmp_path / "whole", out))
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_a_restart_by_torchrun_goes_on_by_itself(small_task, tmp_path):
    words = ["train.py", "--dataset", small_task, "--out", tmp_path / "r", *SAME, "--parallel",
             "fsdp", "--resume"]  # fmt: skip
    line = command(*words, processes=2)
    line[4:4] = ["--max-restarts=1"]
    process = subprocess.Popen(line, cwd=ROOT, env=environment(), text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               start_new_session=True)  # fmt: skip
    wait_for_step(tmp_path / "r", 5, process)
    worker = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[-1]
    os.kill(int(worker), signal.SIGKILL)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and "continuing after step" in said, said
    assert len(read_steps(tmp_path / "r")) == 12


def test_two_agents_of_two_processes(alone, small_task, tied, tmp_path):
    """Two nodes: all that is known of the others comes from torchrun's environment."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    agents = []
    for node in (0, 1):
        line = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--node-rank={node}",
                "--nproc-per-node=2", "--master-addr=localhost", f"--master-port={port}",
                "train.py", "--dataset", small_task, "--out", tmp_path / "r", *SAME,
                "--dropout", "0", "--weights", tied, "--parallel", "fsdp", "--resume"]  # fmt: skip
        agents.append(subprocess.Popen(list(map(str, line)), cwd=ROOT, env=environment()))
    assert [agent.wait(timeout=120) for agent in agents] == [0, 0]
    close(alone / "tied", tmp_path / "r")


def test_a_fork_that_is_no_t5_is_sharded_too(small_task, tmp_path):
    run("tests/fork.py", "--dataset", small_task, "--out", tmp_path / "r", *SAME, "--parallel",
        "fsdp", processes=2)  # fmt: skip
    weights = load_file(tmp_path / "r" / "last" / "model.safetensors")
    assert weights["embedding.weight"].shape == (258, 64), "whole, not a shard"
    assert json.loads((tmp_path / "r" / "result.json").read_text())["n_test"] == 7


def test_recomputing_activations_changes_nothing(small_task, tmp_path):
    """The same bits with dropout, sharded or not."""
    for processes, words in ((1, []), (2, ["--parallel", "fsdp"])):
        a, b = (tmp_path / f"{name}{processes}" for name in "ab")
        for out, more in ((a, []), (b, ["--recompute"])):
            train(small_task, out, *SAME, *words, *more, "--steps", "4", processes=processes)
        assert same_steps(a / "metrics.jsonl", b / "metrics.jsonl")


def test_nothing_not_finite_is_hidden(small_task, tmp_path):
    done = train(small_task, tmp_path / "r", *SAME, "--lr", "1e30", "--parallel", "fsdp",
                 processes=2, check=None)  # fmt: skip
    assert done.returncode == 1 and "is not finite; its examples: " in done.stderr
    assert done.stderr.count("error: step") == 1, "rank 0 alone speaks"


def test_batches_to_decode_are_cut_by_tokens():
    """Long sources come in smaller batches; each source once, in order."""
    student = evaluation.Student.__new__(evaluation.Student)
    seen = []

    class Echo(torch.nn.Module):
        def generate(self, input_ids, attention_mask, max_new_tokens):
            seen.append(tuple(input_ids.shape))
            return input_ids[:, :1]

    class Ids:
        pad_id, eos_id = 0, 1

        def encode_batch(self, texts, limit):
            return [[int(n)] * int(n) for n in texts]

        def decode(self, ids):
            return str(ids[0])

    student.model, student.tokenizer, student.precision = Echo(), Ids(), "fp32"
    student.device, student.interrupted = torch.device("cpu"), lambda: 0
    texts = [str(n) for n in (3, 1000, 7, 1024, 2000, *range(1, 70))]
    assert evaluation.generate_texts(student, texts, 4) == texts
    assert all(rows * length <= evaluation.MAX_TOKENS and rows <= 64 for rows, length in seen)


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_a_rank_without_any_row_keeps_step(small_task, tmp_path, mode):
    words = ["--dataset", small_task, "--method", "standard", "--steps", "2", "--eval-every", "2",
             "--batch-size", "1", "--dropout", "0", "--lr", "5e-5"]  # fmt: skip
    run("train.py", *words, "--out", tmp_path / "one")
    run("train.py", *words, "--parallel", mode, "--out", tmp_path / "two", processes=2)
    one, two = (read_steps(tmp_path / name) for name in ("one", "two"))
    for a, b in zip(one, two, strict=True):
        assert abs(a["label_loss"] - b["label_loss"]) < 1e-5
        assert abs(a["grad_norm"] / b["grad_norm"] - 1) < 1e-4
