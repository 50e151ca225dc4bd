"""What several test files share: running the commands as a user does, and small data."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import sentencepiece
import torch

import train
from data import Tokenizer

ROOT = Path(__file__).parents[1]
REAL = ROOT.parent / "shared" / "data" / "datasets"
QUICK = "--steps 12 --batch-size 6 --micro-tokens 200 --eval-every 4 --save-every 3".split()
torch.set_num_threads(1)  # as in the subprocesses: runs here and there have equal bits


def command(*words, processes: int = 1, torchrun=("--standalone",)) -> list[str]:
    """`python FILE ...`, or torchrun with so many processes and the flags `torchrun`."""
    python = [sys.executable]
    if processes > 1:
        python += ["-m", "torch.distributed.run", *torchrun, f"--nproc_per_node={processes}"]
    return [*python, *map(str, words)]


def environment(**more) -> dict:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **more}


def run(*words, processes: int = 1, check: int = 0, stdin: str | None = None, **variables):
    """Runs a command to its end; fails with its output unless it exits with `check`."""
    done = subprocess.run(
        command(*words, processes=processes), cwd=ROOT, env=environment(**variables),
        input=stdin, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == check, f"{words}\n{done.stdout}\n{done.stderr}"
    return done


def start(*words, cwd=ROOT, **more):
    """The command in the background, in a process group of its own."""
    return subprocess.Popen(
        command(*words, **more), cwd=cwd, env=environment(), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip


def kill(process):
    """SIGKILL to the process and all that it started (torchrun's workers leave the session)."""
    pids = [process.pid]
    for pid in pids:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text()
        pids += map(int, children.split())
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()


def wait_for_step(out, step, process):
    metrics = out / "metrics.jsonl"
    for _ in range(3000):
        if metrics.exists() and metrics.read_bytes().count(b'"loss"') >= step:
            return
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.01)
    raise AssertionError("no such step within 30 s")


def saved_state(out):
    """`state.json` of the newest state, or None."""
    folders = sorted((out / "state").glob("step-*[0-9]"))
    return json.loads((folders[-1] / "state.json").read_text()) if folders else None


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_jsonl(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_steps(out: Path) -> list[dict]:
    """The lines of a run's `metrics.jsonl` that are optimizer steps, not evaluations."""
    return [row for row in read_jsonl(out / "metrics.jsonl") if "loss" in row]


def a_batch(rows=3, source=13, target=7) -> dict[str, torch.Tensor]:
    """Rows of both tasks, the first one padded; ids below 99."""
    ids, labels = torch.randint(2, 99, (rows, source)), torch.randint(2, 99, (rows, target))
    ids[0, 5:], labels[0, 3:] = 0, -100
    return dict(input_ids=ids, attention_mask=(ids > 0).long(), labels=labels,
                tasks=torch.arange(rows) % 2)  # fmt: skip


@pytest.fixture
def call(capsys):
    """A program's `main` in this process: what it printed, once it has returned `check`."""

    def call(main, *words, check=0):
        capsys.readouterr()
        status = main([str(word) for word in words])
        done = capsys.readouterr()
        assert status == check, done
        return done

    return call


def pytest_sessionfinish(session):
    """With STRICT_SKIPS, as CI sets it where everything is installed: only what needs a GPU or a
    real server may skip."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    skipped = reporter.stats.get("skipped", []) if reporter else []
    wrong = [r.nodeid for r in skipped if not {"gpu", "server"} & set(getattr(r, "keywords", ()))]
    if os.environ.get("STRICT_SKIPS") and wrong:
        reporter.write_line(f"not allowed to skip here: {', '.join(wrong)}", red=True)
        session.exitstatus = 1


SAME = ("step", "label_loss", "rationale_loss", "loss", "lr", "grad_norm", "valid_accuracy")


def same_steps(a: Path, b: Path) -> bool:
    """Do two metrics.jsonl hold the same figures, the clock's apart?"""
    a, b = ([[row.get(key) for key in SAME] for row in read_jsonl(path)] for path in (a, b))
    return a == b


@pytest.fixture(scope="session")
def small_task(tmp_path_factory) -> Path:
    """A folder of 24 + 6 + 7 short examples, so that a run takes a moment."""
    folder = tmp_path_factory.mktemp("data") / "colours"
    colours = {"sky": "blue", "grass": "green", "blood": "red", "snow": "white"}
    rows = []
    for i in range(37):
        thing, colour = list(colours.items())[i % 4]
        reason = f"{'Many ' * (i % 5)}people say that {thing} looks {colour}."
        row = {"id": f"c{i}", "input": f"What is the colour of {thing}, number {i}?"}
        rows.append(row | {"label": colour, "rationale": reason, "teacher_label": colour})
    del rows[3]["rationale"], rows[4]["teacher_label"]
    for name, part in {"train": rows[:24], "valid": rows[24:30], "test": rows[30:]}.items():
        write_jsonl(folder / f"{name}.jsonl", part)
    return folder


@pytest.fixture(scope="session")
def whole(small_task, tmp_path_factory):
    """An uninterrupted run in one process: what others are compared with. Not to be changed."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert train.main(["--dataset", str(small_task), "--out", str(out), *QUICK]) == 0
    return out


CORPUS = [
    "Luke scored 84 points after playing 2 rounds of a trivia game.",
    "How many points did he score per round? The answer is (84 / 2).",
    "A man in a blue shirt stands on a ladder; nobody is sleeping outdoors.",
    "[label] premise [rationale] hypothesis. So the answer is neutral, a café.",
]


def train_vocabulary(folder: Path, **options) -> Path:
    """A SentencePiece model of CORPUS, with T5's special ids unless `options` has others."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 20), model_prefix=str(folder / "spiece"), vocab_size=150,
        hard_vocab_limit=False, num_threads=1, minloglevel=2,
        **dict(pad_id=0, eos_id=1, unk_id=2, bos_id=-1) | options,
    )  # fmt: skip
    return folder / "spiece.model"


@pytest.fixture(scope="session")
def vocabulary(tmp_path_factory) -> Path:
    return train_vocabulary(tmp_path_factory.mktemp("vocabulary"))


@pytest.fixture(scope="session")
def tokenizer(vocabulary) -> Tokenizer:
    return Tokenizer(vocabulary)
