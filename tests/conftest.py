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

ROOT = Path(__file__).parents[1]
REAL = ROOT.parent / "shared" / "data" / "datasets"


def command(*words, processes: int = 1) -> list[str]:
    """`python FILE ...`, or torchrun with so many processes."""
    python = [sys.executable]
    if processes > 1:
        python += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [*python, *map(str, words)]


def environment(**more) -> dict:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **more}


def run(*words, processes: int = 1, check: int | None = 0, stdin: str | None = None, cwd=ROOT):
    """Runs a command to its end; fails with its output unless it exits with `check`."""
    done = subprocess.run(
        command(*words, processes=processes), cwd=cwd, env=environment(),
        input=stdin, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert check is None or done.returncode == check, f"{words}\n{done.stdout}\n{done.stderr}"
    return done


def start(*words, processes=1):
    """The command in the background, in a process group of its own."""
    return subprocess.Popen(
        command(*words, processes=processes), cwd=ROOT, env=environment(), text=True,
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


def killed_after(step, out, *words, processes=1):
    """Starts the run, kills it once the step is logged, and gives its last state."""
    process = start(*words, processes=processes)
    wait_for_step(out, step, process)
    kill(process)
    return saved_state(out)


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def read_steps(out: Path) -> list[dict]:
    """The lines of a run's `metrics.jsonl` that are optimizer steps, not evaluations."""
    return [row for row in read_jsonl(out / "metrics.jsonl") if "loss" in row]


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
    folder.mkdir()
    colours = {"sky": "blue", "grass": "green", "blood": "red", "snow": "white"}
    rows = []
    for i in range(37):
        thing, colour = list(colours.items())[i % 4]
        reason = f"{'Many ' * (i % 5)}people say that {thing} looks {colour}."
        row = {"id": f"c{i}", "input": f"What is the colour of {thing}, number {i}?"}
        rows.append(row | {"label": colour, "rationale": reason, "teacher_label": colour})
    del rows[3]["rationale"], rows[4]["teacher_label"]
    for name, part in {"train": rows[:24], "valid": rows[24:30], "test": rows[30:]}.items():
        lines = "".join(json.dumps(row) + "\n" for row in part)
        (folder / f"{name}.jsonl").write_text(lines)
    return folder
