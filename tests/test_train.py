"""Training as a user meets it: run folders, exact resume, signals, precision, compiled blocks."""

import copy
import dataclasses
import fcntl
import json
import os
import random
import resource
import shutil
import signal
import time

import numpy as np
import pytest
import torch
from conftest import (
    QUICK,
    a_batch,
    kill,
    read_jsonl,
    read_steps,
    run,
    same_steps,
    saved_state,
    start,
    wait_for_step,
)
from torch._dynamo.testing import CompileCounterWithBackend

import eval as evaluation
import train
from data import load_dataset
from t5 import T5, T5Config


def weights(out, which="last"):
    return (out / which / "model.safetensors").read_bytes()


def same_runs(a, b) -> bool:
    """The same figures in each step and evaluation, students and results, bit for bit."""
    return (
        same_steps(a / "metrics.jsonl", b / "metrics.jsonl")
        and all(weights(a, which) == weights(b, which) for which in ("best", "last"))
        and (a / "result.json").read_text() == (b / "result.json").read_text()
    )


@pytest.fixture
def begin(call, monkeypatch):
    """train.py in this process until `event` happens, as its n-th step or decoding begins; by
    default a crash, which like SIGKILL leaves what was saved before."""

    def crash():
        raise RuntimeError("as if killed")

    def begin(n, *words, event=crash, of=(train, "train_step"), check=1):
        plainly, calls = getattr(*of), []

        def spy(*args, **more):
            calls.append(1)
            if len(calls) == n:
                event()
            return plainly(*args, **more)

        with monkeypatch.context() as m:
            m.setattr(*of, spy)
            return call(train.main, *words, check=check)

    return begin


def sends(*numbers):
    return lambda: [os.kill(os.getpid(), number) for number in numbers]


def test_run_folder(whole, small_task):
    names = {p.name for p in whole.iterdir()} - {".lock"}
    assert names == {"run.json", "metrics.jsonl", "best", "last", "state", "predictions.jsonl",
                     "result.json"}  # fmt: skip
    student = {"config.json", "model.safetensors", "spiece.model", "tokenizer_config.json",
               "dsbs.json", "README.md"}  # fmt: skip
    for folder in ("best", "last"):
        assert {p.name for p in (whole / folder).iterdir()} == student
    about = json.loads((whole / "run.json").read_text())
    assert about["config"]["steps"] == 12 and len(about["data_sha256"]) == 3
    assert about["versions"]["torch"] == torch.__version__
    rows = read_steps(whole)
    assert [row["step"] for row in rows] == list(range(1, 13))
    every = read_jsonl(whole / "metrics.jsonl")
    scores = {row["step"]: row["valid_accuracy"] for row in every if "valid_accuracy" in row}
    assert list(scores) == [4, 8, 12] and len(every) == 15
    for i, row in enumerate(rows):
        assert row["lr"] == pytest.approx(1e-3 * (1 - i / 12))  # linear to 0, no warm-up
        assert row["loss"] == pytest.approx(row["label_loss"] + row["rationale_loss"])
        assert row["examples_per_second"] > 0 and row["peak_memory_bytes"] > 1e7
    result = json.loads((whole / "result.json").read_text())
    predictions = read_jsonl(whole / "predictions.jsonl")
    test = load_dataset(str(small_task), "test")
    assert [row["id"] for row in predictions] == [e.id for e in test]
    assert [row["correct"] for row in predictions] == [
        row["prediction"].strip() == e.label for row, e in zip(predictions, test)
    ]
    assert result["test_accuracy"] == np.mean([row["correct"] for row in predictions])
    assert result["n_test"] == 7 and result["labels"] == "human"
    assert result["valid_accuracy"] == max(scores.values())
    assert result["best_step"] == max(scores, key=scores.get)
    first = load_dataset(str(small_task), "train")[0].label  # each of four labels is in six
    assert result["majority_accuracy"] == pytest.approx(np.mean([e.label == first for e in test]))
    best = json.loads((whole / "best" / "dsbs.json").read_text())
    assert [best[key] for key in ("step", "valid_accuracy")] == [
        result[key] for key in ("best_step", "valid_accuracy")
    ]


def test_a_finished_run_is_shown_not_repeated(whole, small_task, call):
    before = {p: p.stat().st_mtime_ns for p in whole.rglob("*") if p.is_file()}
    base = ["--dataset", small_task, "--out", whole, *QUICK]
    for words in (base, [*base, "--resume"], ["--out", whole, "--resume"]):
        shown = call(train.main, *words).out
        assert "is finished" in shown and "test accuracy" in shown
    again = next(line for line in shown.splitlines() if line.strip().startswith("python train.py"))
    assert "--steps 12" in again and f"--out {whole}-2" in again
    after = {p: p.stat().st_mtime_ns for p in whole.rglob("*") if p.is_file()}
    assert {p for p in before if after[p] != before[p]} <= {whole / ".lock"}


def test_other_settings_data_or_files_are_refused(whole, small_task, call, tmp_path):
    base = ["--dataset", small_task, "--out", whole, *QUICK]
    error = call(train.main, *base, "--lr", "0.1", check=2).err
    assert "lr 0.001 there, 0.1 here" in error and error.count("\n") == 1
    error = call(train.main, *base, "--resume", "--seed", "3", check=2).err
    assert "seed 0 there, 3 here" in error
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    error = call(train.main, *base[:2], "--out", tmp_path / "other", check=2).err
    assert "is not a run" in error and (tmp_path / "other" / "notes.txt").read_text() == "mine"
    # the same settings, other contents
    data = shutil.copytree(small_task, tmp_path / "colours")
    out = shutil.copytree(whole, tmp_path / "run")
    (out / "run.json").write_text(
        (out / "run.json").read_text().replace(str(small_task), str(data))
    )
    assert "finished" in call(train.main, "--out", out, "--resume").out
    with open(data / "train.jsonl", "a") as file:
        file.write('{"id": "new", "input": "x", "label": "red"}\n')
    error = call(train.main, "--out", out, "--resume", check=2).err
    assert "data files or their contents" in error


def test_default_name_tells_runs_apart(small_task):
    def name(**settings):
        return train.run_name(train.resolve(train.Config(dataset=str(small_task), **settings)))

    others = dict(seed=1, method="standard", labels="teacher", lr=1.0, fraction=0.5, lam=2)
    others |= dict(prefixes="released", steps=3)
    names = [name(), *(name(**{key: value}) for key, value in others.items())]
    assert len(set(names)) == len(names)
    assert name(save_every=1) == name(micro_tokens=99) == name()


def test_smaller_fractions_are_contained_in_larger_ones(small_task):
    def ids(fraction, seed=0):
        config = train.Config(dataset=str(small_task), fraction=fraction, seed=seed)
        return train.prepare(train.resolve(config)).ids

    every = [ids(f) for f in (0.1, 0.25, 0.5, 1.0)]
    assert [len(part) for part in every] == [2, 6, 12, 24]
    assert every[-1] == [e.id for e in load_dataset(str(small_task), "train")], "the file's order"
    for small, large in zip(every, every[1:]):
        assert set(small) < set(large)
        assert small == [id for id in large if id in small]
    assert ids(0.25, seed=1) != ids(0.25)


def test_two_processes_on_one_folder_exclude_each_other(small_task, begin, call, tmp_path):
    base = ["--dataset", small_task, *QUICK, "--out", tmp_path]
    (tmp_path / "run.json.tmp").write_text('{"conf')  # of a start that was killed
    begin(2, *base)
    assert "holds an unfinished run" in call(train.main, *base, check=2).err
    with open(tmp_path / ".lock") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert "in use by another process" in call(train.main, *base, "--resume", check=2).err


def test_a_loss_that_is_not_finite_stops_the_run(small_task, call, tmp_path):
    words = ["--dataset", small_task, *QUICK, "--lr", "1e30", "--out", tmp_path]
    error = call(train.main, *words, check=1).err
    assert "is not finite; its examples: c" in error and "Traceback" not in error
    rows = read_steps(tmp_path)
    assert f"step {len(rows) + 1}:" in error
    assert all(np.isfinite(row["loss"]) for row in rows)


@pytest.mark.slow
def test_killed_at_random_moments_and_resumed_gives_the_same_bits(whole, small_task, tmp_path):
    """SIGKILL twice and SIGTERM once; the last process is given another number of threads."""
    words = ["train.py", "--dataset", small_task, *QUICK, "--out", tmp_path, "--resume"]
    rng, lengths = random.Random(1), []
    for turn in range(3):
        process = start(*words)
        wait_for_step(tmp_path, min(11, 3 * turn + rng.randint(1, 3)), process)
        time.sleep(rng.uniform(0, 0.05))
        if turn == 1:
            process.send_signal(signal.SIGTERM)
            said = process.communicate(timeout=60)[0]
            assert process.returncode == 143, said
        else:
            kill(process)
        saved = (tmp_path / "metrics.jsonl").read_bytes()
        if state := saved_state(tmp_path):
            lengths.append(saved[: state["metrics_bytes"]])
        assert not (tmp_path / "result.json").exists(), "the kill came too late to mean anything"
    said = run(*words, OMP_NUM_THREADS="2").stdout
    assert "continuing after step" in said and "; 1 threads" in said
    assert same_runs(whole, tmp_path)
    final = (tmp_path / "metrics.jsonl").read_bytes()
    assert lengths and all(final.startswith(kept) for kept in lengths)  # byte for byte
    assert len(list((tmp_path / "state").glob("step-*"))) == 1


def test_resume_restores_a_best_that_a_crash_left_behind(whole, small_task, begin, call, tmp_path):
    """Killed between the two renames of best/: the old one gets its name back. Without it, after
    an evaluation, the run cannot know which student was the best."""
    out, lost = tmp_path / "run", tmp_path / "lost"
    base = ["--dataset", small_task, *QUICK]
    begin(11, *base, "--out", out)
    (out / "best").rename(out / "best.old")
    shutil.copytree(out, lost, ignore=shutil.ignore_patterns("best.old"))
    error = call(train.main, *base, "--out", lost, "--resume", check=2).err
    assert "best is gone" in error and error.count("\n") == 1
    call(train.main, *base, "--out", out, "--resume")
    assert same_runs(whole, out) and not (out / "best.old").exists()


def test_best_is_the_best_so_far(small_task, begin, call, tmp_path, monkeypatch):
    """A worse student does not replace it. One that is newer than the state does not count: the
    resumed run evaluates that step again, here with another outcome."""
    accuracies = iter([0.5, 0.4, 0.6, 0.4, 0.3, 0.0, 0.0])
    plainly = evaluation.evaluate
    monkeypatch.setattr(evaluation, "evaluate", lambda *a, **k: (
        {**plainly(*a, **k)[0], "accuracy": next(accuracies)}, []))  # fmt: skip
    about = lambda: json.loads((tmp_path / "best" / "dsbs.json").read_text())  # noqa: E731
    words = ["--dataset", small_task, "--out", tmp_path, *QUICK]
    begin(9, *words)  # evaluations of steps 4 and 8
    assert (about()["step"], about()["valid_accuracy"]) == (4, 0.5)
    begin(3, *words, "--resume")  # step 8 again: 0.6
    assert (about()["step"], about()["valid_accuracy"]) == (8, 0.6)
    shutil.rmtree(max((tmp_path / "state").iterdir()))  # its state is lost
    call(train.main, *words, "--resume")
    assert (about()["step"], about()["valid_accuracy"]) == (4, 0.4)


def test_each_step_draws_other_dropout_masks(small_task, call, tmp_path):
    """With one example in each step and no learning, only dropout changes the loss."""
    for dropout, expected in (("0.1", 3), ("0", 1)):
        out = tmp_path / dropout
        call(train.main, "--dataset", small_task, *QUICK, "--batch-size", 1, "--lr", 1e-30,
             "--fraction", 0.01, "--steps", 3, "--dropout", dropout, "--out", out)  # fmt: skip
        assert len({round(row["loss"], 4) for row in read_steps(out)}) == expected


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1])
def test_a_signal_saves_and_leaves(whole, small_task, begin, call, tmp_path, number):
    """Torchrun passes a terminal's Ctrl-C on, so it comes twice."""
    base = ["--dataset", small_task, *QUICK, "--out", tmp_path]
    event = sends(number, *[number] * (number == signal.SIGINT))
    text = begin(2, *base, event=event, check=128 + number).out
    assert f"stopped by signal {int(number)}; " in text and "--resume" in text
    assert saved_state(tmp_path)["step"] == len(read_steps(tmp_path)) < 4
    call(train.main, "--out", tmp_path, "--resume")  # the other flags, micro-batches: run.json's
    assert same_runs(whole, tmp_path)


def test_a_signal_in_an_evaluation_ends_it(whole, small_task, begin, call, tmp_path):
    """Neither a line of metrics.jsonl nor a best comes of it, and the state is of its step; in the
    final scoring too."""
    base = ["--dataset", small_task, *QUICK[:-2], "--save-every", "100", "--out", tmp_path]
    decodes = dict(event=sends(signal.SIGTERM), of=(T5, "generate"), check=143)
    begin(1, *base, **decodes)
    assert saved_state(tmp_path)["step"] == 4 == len(read_jsonl(tmp_path / "metrics.jsonl"))
    assert not (tmp_path / "best").exists()
    call(train.main, *base, "--resume")
    assert same_runs(whole, tmp_path)
    (tmp_path / "result.json").unlink()
    begin(2, *base, "--resume", **decodes)  # the last evaluation again, and then test
    assert not (tmp_path / "result.json").exists()
    call(train.main, *base, "--resume")
    assert same_runs(whole, tmp_path)


def test_a_full_disk_ends_with_an_error_and_the_last_good_state(
    whole, small_task, begin, call, tmp_path
):
    base = ["--dataset", small_task, *QUICK, "--out", tmp_path]
    begin(5, *base)
    before = saved_state(tmp_path)
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:  # bytes in a file: the weights fit, AdamW's moments do not
        resource.setrlimit(resource.RLIMIT_FSIZE, (6_000_000, unlimited[1]))
        error = call(train.main, *base, "--resume", check=1).err
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert "--resume" in error and "Traceback" not in error
    assert saved_state(tmp_path) == before
    call(train.main, *base, "--resume")
    assert same_runs(whole, tmp_path)
    assert len(list((tmp_path / "state").glob("step-*"))) == 1


def test_recomputed_activations_give_the_same_bits(whole, small_task, call, tmp_path):
    """With dropout; the memory that it saves is test_plan.py's."""
    call(train.main, "--dataset", small_task, *QUICK, "--recompute", "--out", tmp_path)
    assert same_runs(whole, tmp_path)


@pytest.mark.parametrize("recompute", [False, True])
def test_compiled_blocks_are_whole_graphs_and_give_the_same_losses(recompute, monkeypatch):
    """For any shape: nothing is compiled again once both kinds of blocks have been seen."""
    counter = CompileCounterWithBackend("eager")
    plainly = torch.nn.Module.compile
    count = lambda block, **more: plainly(block, backend=counter, **more)  # noqa: E731
    monkeypatch.setattr(torch.nn.Module, "compile", count)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    shape = dict(vocab_size=99, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=3)
    torch.manual_seed(0)
    plain = T5(T5Config(**shape, dropout_rate=0.0)).train()
    c = train.Config(device="cpu", precision="fp32", parallel="none")
    fast = copy.deepcopy(plain)
    fast = train.parallelize(fast, dataclasses.replace(c, recompute=recompute, compile=True))
    graphs = []
    for i in range(5):
        batch = a_batch(rows=2 + i % 3, source=7 + 3 * i, target=4 + 2 * i)
        losses = [train.forward_backward(m, batch, torch.ones(2), c, 1) for m in (plain, fast)]
        torch.testing.assert_close(*losses, atol=1e-5, rtol=1e-5)
        for one, other in zip(plain.parameters(), fast.parameters()):
            torch.testing.assert_close(one.grad, other.grad, atol=1e-4, rtol=1e-4)
        graphs.append(counter.frame_count)
    assert graphs[0] >= 2 and graphs[1] == graphs[-1], graphs
    assert not torch._dynamo.utils.counters["graph_break"]
