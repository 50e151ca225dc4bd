"""Training as a user meets it: run folders, exact resume, signals, several processes, forks."""

import copy
import dataclasses
import json
import random
import resource
import shutil
import signal
import subprocess
import time

import numpy as np
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
from torch._dynamo.testing import CompileCounterWithBackend

import train
from data import load_dataset
from t5 import T5, T5Config

QUICK = "--steps 12 --batch-size 6 --micro-tokens 200 --eval-every 4 --save-every 3".split()


def weights(out, which="last"):
    return (out / which / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def whole(small_task, tmp_path_factory):
    """An uninterrupted run in one process: what others are compared with."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    run("train.py", "--dataset", small_task, "--out", out, *QUICK)
    return out


# --------------------------------------------------------------------------------- run folder


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
    best = json.loads((whole / "best" / "dsbs.json").read_text())
    assert (best["step"], best["valid_accuracy"]) == (
        result["best_step"], result["valid_accuracy"])  # fmt: skip


def test_a_finished_run_is_shown_not_repeated(whole, small_task):
    before = {p: p.stat().st_mtime_ns for p in whole.rglob("*") if p.is_file()}
    for extra in ([], ["--resume"]):
        shown = run("train.py", "--dataset", small_task, "--out", whole, *QUICK, *extra).stdout
        assert "is finished" in shown and "test accuracy" in shown and f"{whole}-2" in shown
    again = next(line for line in shown.splitlines() if line.strip().startswith("python train.py"))
    assert "--steps 12" in again and "--batch-size 6" in again
    short = run("train.py", "--out", whole, "--resume").stdout  # the other flags: run.json's
    assert "is finished" in short
    after = {p: p.stat().st_mtime_ns for p in whole.rglob("*") if p.is_file()}
    assert {p for p in before if after[p] != before[p]} <= {whole / ".lock"}


def test_other_settings_data_or_files_are_refused(whole, small_task, tmp_path):
    base = ["--dataset", str(small_task), "--out", str(whole), *QUICK]
    error = run("train.py", *base, "--lr", "0.1", check=2).stderr
    assert "lr 0.001 there, 0.1 here" in error and error.count("\n") == 1
    error = run("train.py", *base, "--resume", "--seed", "3", check=2).stderr
    assert "seed 0 there, 3 here" in error
    copy = shutil.copytree(small_task, tmp_path / "colours")
    shutil.copytree(whole, tmp_path / "run")
    config = json.loads((tmp_path / "run" / "run.json").read_text())
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    error = run("train.py", *QUICK, "--dataset", copy, "--out", tmp_path / "other", check=2).stderr
    assert "is not a run" in error and (tmp_path / "other" / "notes.txt").read_text() == "mine"
    # the same settings, other contents
    config["config"]["dataset"] = str(copy)
    config["data_sha256"] = {k.replace(str(small_task), str(copy)): v
                             for k, v in config["data_sha256"].items()}  # fmt: skip
    (tmp_path / "run" / "run.json").write_text(json.dumps(config))
    assert "finished" in run("train.py", "--out", tmp_path / "run", "--resume").stdout
    with open(copy / "train.jsonl", "a") as file:
        file.write('{"id": "new", "input": "x", "label": "red"}\n')
    error = run("train.py", "--out", tmp_path / "run", "--resume", check=2).stderr
    assert "data files or their contents" in error


def test_default_name_tells_runs_apart(small_task):
    def name(**settings):
        return train.run_name(train.resolve(train.Config(dataset=str(small_task), **settings)))

    assert name() == "runs/colours_tiny_step-by-step_human_seed-0"
    names = [name(), name(seed=1), name(method="standard"), name(labels="teacher"), name(lr=1.0),
             name(fraction=0.5), name(prefixes="released"), name(steps=3), name(lam=2)]  # fmt: skip
    assert len(set(names)) == len(names)
    assert name(save_every=1) == name(micro_tokens=99) == name()


def test_smaller_fractions_are_contained_in_larger_ones(small_task):
    def ids(fraction, seed=0):
        config = train.Config(dataset=str(small_task), fraction=fraction, seed=seed)
        return train.prepare(train.resolve(config)).ids

    every = [ids(f) for f in (0.1, 0.25, 0.5, 1.0)]
    assert [len(part) for part in every] == [2, 6, 12, 24]
    for small, large in zip(every, every[1:]):
        assert set(small) < set(large)
        assert small == [id for id in large if id in small]
    assert ids(0.25, seed=1) != ids(0.25)


def test_what_was_derived_is_printed(small_task, tmp_path):
    text = run("train.py", "--dataset", small_task, "--out", tmp_path / "r", "--labels", "teacher",
               "--steps", 1, "--batch-size", 2).stdout  # fmt: skip
    assert "left out, no teacher label: 1" in text and "without rationale: 1" in text
    assert "truncated sources 0" in text and "unknown tokens" in text
    assert "parameters" in text and "steps: 1 of 2 examples" in text
    assert "--predict inputs.txt --explain" in text


# ------------------------------------------------------------------------------- exact resume


@pytest.mark.parametrize("processes", [1, 2])
def test_killed_at_random_moments_and_resumed_gives_the_same_bits(
    whole, small_task, tmp_path, processes
):
    """Three SIGKILLs of all processes, at any moment of the run."""
    base = ["train.py", "--dataset", small_task, *QUICK]
    expected = whole
    if processes > 1:
        expected = tmp_path / "whole"
        run(*base, "--out", expected, processes=processes)
    out, rng, lengths = tmp_path / "killed", random.Random(processes), []
    for turn in range(3):
        process = start(*base, "--out", out, "--resume", processes=processes)
        wait_for_step(out, min(11, 3 * turn + rng.randint(1, 3)), process)
        time.sleep(rng.uniform(0, 0.05))
        kill(process)
        saved = (out / "metrics.jsonl").read_bytes()
        if state := saved_state(out):
            lengths.append(saved[: state["metrics_bytes"]])
        assert not (out / "result.json").exists(), "the kill came too late to mean anything"
    text = run(*base, "--out", out, "--resume", processes=processes).stdout
    assert "continuing after step" in text
    assert weights(out) == weights(expected)
    assert weights(out, "best") == weights(expected, "best")
    assert same_steps(out / "metrics.jsonl", expected / "metrics.jsonl")
    assert (out / "result.json").read_text() == (expected / "result.json").read_text()
    final = (out / "metrics.jsonl").read_bytes()
    assert lengths and all(final.startswith(kept) for kept in lengths)  # byte for byte
    assert len(list((out / "state").glob("step-*"))) == 1


def test_resume_restores_a_best_that_a_crash_left_behind(whole, small_task, tmp_path):
    """Killed between the two renames of best/: the old one gets its name back. Without it, after
    an evaluation, the run cannot know which student was the best."""
    out = tmp_path / "run"
    base = ["train.py", "--dataset", small_task, *QUICK, "--out", out]
    killed_after(10, out, *base)
    (out / "best").rename(out / "best.old")
    shutil.copytree(out, tmp_path / "lost")
    shutil.rmtree(tmp_path / "lost" / "best.old")
    error = run(*base[:-1], tmp_path / "lost", "--resume", check=2).stderr
    assert "best is gone" in error and error.count("\n") == 1
    run(*base, "--resume")
    assert weights(out, "best") == weights(whole, "best") and not (out / "best.old").exists()
    assert same_steps(out / "metrics.jsonl", whole / "metrics.jsonl")


def test_a_state_can_be_read_right_after_it_was_saved(tmp_path):
    """Weights, moments and the step, with other contents there before."""
    c = train.resolve(train.Config(device="cpu"))
    torch.manual_seed(0)
    models = [T5(T5Config.preset("tiny", vocab_size=64)) for _ in range(2)]
    one, two = [torch.optim.AdamW(model.parameters()) for model in models]
    for p in models[0].parameters():
        p.grad = torch.randn_like(p)
    one.step()
    train.save_state(c, tmp_path, 1, models[0], one, 7)
    facts = train.load_state(c, tmp_path, models[1], two)
    assert facts["step"] == 1 and facts["metrics_bytes"] == 7
    for p, q in zip(models[0].parameters(), models[1].parameters()):
        assert torch.equal(p, q)
        for key in ("step", "exp_avg", "exp_avg_sq"):
            assert torch.equal(one.state[p][key], two.state[q][key])


SLOW_DECODING = """
import sys, time
import eval as evaluation, train
from t5 import T5
quick = T5.generate
def generate(*args, **more):
    print("decoding", flush=True)
    time.sleep(0.5)
    return quick(*args, **more)
T5.generate = generate
evaluation.MAX_TOKENS = 40  # a batch for each example
evaluation.leave(train.main())
"""


@pytest.mark.parametrize("processes", [1, 2])
def test_a_signal_in_an_evaluation_ends_it(whole, small_task, tmp_path, processes):
    """Neither a line of metrics.jsonl nor a best comes of it, and the state is of its step; in the
    final scoring too."""
    script, out = tmp_path / "slow.py", tmp_path / "run"
    script.write_text(SLOW_DECODING)
    base = ["--dataset", small_task, *QUICK, "--save-every", "100", "--out", out, "--resume"]
    process = start(script, *base, processes=processes)
    while process.stdout.readline() != "decoding\n":
        assert process.poll() is None
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    text = process.communicate()[0]
    assert process.returncode == (143 if processes == 1 else 1), text
    assert "stopped by signal 15" in text and time.monotonic() - began < 15
    assert saved_state(out)["step"] == 4 == len(read_jsonl(out / "metrics.jsonl"))
    assert not (out / "best").exists()
    run("train.py", *base, processes=processes)
    if processes == 1:
        assert weights(out) == weights(whole) and weights(out, "best") == weights(whole, "best")
        assert same_steps(out / "metrics.jsonl", whole / "metrics.jsonl")
        (out / "result.json").unlink()
        process = start(script, *base)
        while "valid 0" not in (line := process.stdout.readline()) and line:
            pass  # the last evaluation is done again, then test is scored
        process.send_signal(signal.SIGTERM)
        process.communicate()
        assert process.returncode == 143 and not (out / "result.json").exists()
        run("train.py", *base)
        assert (out / "result.json").read_text() == (whole / "result.json").read_text()


@pytest.mark.parametrize(
    "number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 138)]
)
def test_a_signal_saves_and_leaves(whole, small_task, tmp_path, number, status):
    out = tmp_path / "run"
    base = ["train.py", "--dataset", small_task, *QUICK, "--out", out]
    process = start(*base)
    wait_for_step(out, 1, process)
    process.send_signal(number)
    if number == signal.SIGINT:  # torchrun passes a terminal's Ctrl-C on: it comes twice
        time.sleep(0.1)
        process.send_signal(number)
    text = process.communicate()[0]
    assert process.returncode == status, text
    assert f"stopped by signal {int(number)}; " in text and "--resume" in text
    assert saved_state(out)["step"] == len(read_steps(out))
    run(*base, "--resume")
    assert weights(out) == weights(whole)
    assert same_steps(out / "metrics.jsonl", whole / "metrics.jsonl")


def test_ranks_agree_on_the_step_they_stop_at(small_task, tmp_path):
    """SIGTERM to one of two ranks: both leave with 143 after the same step."""
    out = tmp_path / "run"
    script = tmp_path / "main.py"
    script.write_text(
        "import os, sys, train\n"
        f"open({str(tmp_path)!r} + '/pid' + os.environ['RANK'], 'w').write(str(os.getpid()))\n"
        "try: status = train.main()\n"
        "except SystemExit as leave: status = leave.code\n"
        f"open({str(tmp_path)!r} + '/left' + os.environ['RANK'], 'w').write(str(status))\n"
        "sys.exit(status)\n"
    )
    base = [script, "--dataset", small_task, "--out", out, *QUICK, "--steps", "400"]
    process = start(*base, processes=2)
    wait_for_step(out, 2, process)
    pid = int((tmp_path / "pid1").read_text())
    subprocess.run(["kill", "-TERM", str(pid)], check=True)
    text = process.communicate()[0]
    assert [(tmp_path / f"left{rank}").read_text() for rank in (0, 1)] == ["143", "143"], text
    assert saved_state(out)["step"] == len(read_steps(out))


def test_a_full_disk_ends_with_an_error_and_the_last_good_state(whole, small_task, tmp_path):
    out = tmp_path / "run"
    base = ["train.py", "--dataset", small_task, *QUICK, "--out", out]
    killed_after(4, out, *base)
    before = saved_state(out)
    limit = 6_000_000  # bytes in a file: the weights fit, AdamW's moments do not

    done = subprocess.run(
        command(*base, "--resume"), cwd=ROOT, env=environment(), capture_output=True, text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "the last saved state is kept" in done.stderr and "Traceback" not in done.stderr
    assert saved_state(out) == before
    run(*base, "--resume")
    assert weights(out) == weights(whole)
    assert len(list((out / "state").glob("step-*"))) == 1


def test_what_may_change_on_resume_and_what_may_not(small_task, tmp_path):
    """Another world size, size of micro-batches and save interval: the same losses (dropout 0)."""
    base = ["train.py", "--dataset", small_task, *QUICK, "--dropout", "0", "--lr", "5e-5"]
    run(*base, "--out", tmp_path / "one")
    out = tmp_path / "two"
    process = start(*base, "--out", out)
    wait_for_step(out, 6, process)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    stopped = len(read_steps(out))
    assert 6 <= stopped < 12
    run(*base, "--out", out, "--resume", "--micro-tokens", 150, "--save-every", 2, processes=2)
    a, b = read_steps(tmp_path / "one"), read_steps(out)
    assert len(b) == 12
    for x, y in zip(a, b):
        assert y["loss"] == pytest.approx(x["loss"], rel=1e-5)
        assert y["grad_norm"] == pytest.approx(x["grad_norm"], rel=1e-4)


def test_a_resumed_run_keeps_its_micro_batches(small_task, tmp_path):
    """With dropout, others would give other masks; also after a start killed while it began."""
    base, out = ["train.py", "--dataset", small_task, *QUICK[:4], *QUICK[6:]], tmp_path / "cut"
    run(*base, "--micro-tokens", 99, "--out", tmp_path / "whole")
    out.mkdir()
    (out / "run.json.tmp").write_text('{"conf')
    killed_after(7, out, *base, "--micro-tokens", 99, "--out", out)
    run("train.py", "--resume", "--out", out)
    assert same_steps(tmp_path / "whole" / "metrics.jsonl", out / "metrics.jsonl")


def test_the_thread_count_is_put_back(small_task, tmp_path):
    out = tmp_path / "run"
    base = ["train.py", "--dataset", small_task, *QUICK, "--out", out]
    process = start(*base)  # with one thread
    wait_for_step(out, 4, process)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    done = subprocess.run(
        command(*base, "--resume"), cwd=ROOT, env=environment(OMP_NUM_THREADS="2"),
        capture_output=True, text=True,
    )  # fmt: skip
    assert "; 1 threads" in done.stdout, done.stdout + done.stderr


def test_two_processes_on_one_folder_exclude_each_other(small_task, tmp_path):
    out = tmp_path / "run"
    base = ["train.py", "--dataset", small_task, *QUICK, "--steps", "2000", "--out", out]
    process = start(*base)
    wait_for_step(out, 1, process)
    error = run(*base, "--resume", check=2).stderr
    assert "in use by another process" in error
    kill(process)
    assert "holds an unfinished run" in run(*base, check=2).stderr


def test_a_loss_that_is_not_finite_stops_the_run(small_task, tmp_path):
    out = tmp_path / "run"
    done = run("train.py", "--dataset", small_task, *QUICK, "--lr", "1e30", "--out", out, check=1)
    assert "is not finite; its examples: c" in done.stderr and "Traceback" not in done.stderr
    rows = read_steps(out)
    assert f"step {len(rows) + 1}:" in done.stderr
    assert all(np.isfinite(row["loss"]) for row in rows)


# ---------------------------------------------------------------------------- several processes


def test_parallel_none_under_torchrun_is_refused(small_task, tmp_path):
    done = run("train.py", "--dataset", small_task, "--parallel", "none", "--out", tmp_path / "r",
               processes=2, check=1)  # fmt: skip
    assert "would train 2 models" in done.stderr and not (tmp_path / "r").exists()


# --------------------------------------------------------------------------------------- forks


@pytest.mark.slow
def test_a_fork_that_is_no_t5_and_has_its_own_tokenizer(small_task, tmp_path):
    """It trains, resumes after SIGKILL, runs on two processes, and its student is used."""
    script = ROOT / "tests" / "fork.py"
    base = [script, "--dataset", small_task, *QUICK, "--dropout", "0"]
    one, two, again = (tmp_path / name for name in ("one", "two", "again"))
    run(*base, "--out", one)
    run(*base, "--out", two, processes=2)
    a, b = read_steps(one), read_steps(two)
    assert b[-1]["loss"] == pytest.approx(a[-1]["loss"], rel=1e-3)
    assert a[-1]["loss"] < a[0]["loss"]
    killed_after(4, again, *base, "--save-every", "2", "--out", again)
    run(script, "--out", again, "--resume")
    assert same_steps(one / "metrics.jsonl", again / "metrics.jsonl")
    files = {path.name for path in (again / "best").iterdir()}
    assert "tokenizer_config.json" in files and "spiece.model" not in files
    assert "Causal student" in (again / "best" / "README.md").read_text()
    done = run(script, "eval", again / "best", "--predict", "-", stdin="What is snow?\n")
    assert json.loads(done.stdout)["id"] == "1"


# ---------------------------------------------------------------------------------- precision


def test_bf16_trains_fp32_weights(small_task, tmp_path):
    """The autocast path of a GPU, here on the CPU: weights and state stay float32."""
    args = ["--dataset", str(small_task), *QUICK, "--steps", "4", "--precision", "bf16"]
    assert train.main([*args, "--out", str(tmp_path / "r")]) == 0
    model = T5.from_pretrained(tmp_path / "r" / "last")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert json.loads((tmp_path / "r" / "run.json").read_text())["config"]["precision"] == "bf16"
    rows = read_steps(tmp_path / "r")
    assert rows[-1]["loss"] < rows[0]["loss"]


def test_dropout_is_the_runs_whatever_the_config_says(small_task, tmp_path):
    config = train.resolve(train.Config(dataset=str(small_task), dropout=0.25))
    model = train.build_model(config, train.prepare(config).tokenizer)
    rates = {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)}
    assert rates == {0.25}


@pytest.mark.parametrize("recompute", [False, True])
def test_compiled_blocks_are_whole_graphs_and_give_the_same_losses(recompute, monkeypatch):
    """For any shape: nothing is compiled again once both kinds of blocks have been seen."""
    counter = CompileCounterWithBackend("eager")
    plainly = torch.nn.Module.compile
    count = lambda block, **more: plainly(block, backend=counter, **more)  # noqa: E731
    monkeypatch.setattr(torch.nn.Module, "compile", count)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    config = T5Config(vocab_size=50, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=3,
                      dropout_rate=0.0)  # fmt: skip
    torch.manual_seed(0)
    plain = T5(config).train()
    c = train.Config(device="cpu", precision="fp32", parallel="none")
    fast = copy.deepcopy(plain)
    fast = train.parallelize(fast, dataclasses.replace(c, recompute=recompute, compile=True))
    graphs = []
    for i in range(8):
        rows, source, target = 2 + i % 3, 7 + 3 * i, 4 + 2 * i
        ids, labels = (torch.randint(2, 50, (rows, n)) for n in (source, target))
        ids[0, 4:], labels[0, 2:] = 0, -100
        batch = dict(input_ids=ids, attention_mask=(ids > 0).long(), labels=labels,
                     tasks=torch.arange(rows) % 2)  # fmt: skip
        losses = [train.forward_backward(m, batch, torch.ones(2), c, 1) for m in (plain, fast)]
        torch.testing.assert_close(*losses, atol=1e-5, rtol=1e-5)
        for one, other in zip(plain.parameters(), fast.parameters()):
            torch.testing.assert_close(one.grad, other.grad, atol=1e-4, rtol=1e-4)
        graphs.append(counter.frame_count)
    assert graphs[0] >= 2 and graphs[1] == graphs[-1], graphs
    assert not torch._dynamo.utils.counters["graph_break"]
