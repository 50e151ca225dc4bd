"""scripts/first_run.sh, the first user's checks: on two gloo processes, and on wrong runs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, environment, read_jsonl

# In place of torchrun: each run leaves figures at once; FSDP's and the large model's are wrong, and
# the killed run does not resume.
STAND_IN = """#!{python}
import pathlib, sys
run = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
if "--resume" in sys.argv:
    sys.exit("error: no room")
run.mkdir()
row = '{{"step": 7, "loss": %d, "peak_memory_bytes": 4e13, "examples_per_second": 4}}\\n'
row = row % (1 + (run.name == "fsdp"))
(run / "metrics.jsonl").write_text(row * (6 if run.name == "killed" else 20))
"""


def first_run(out: Path, path: Path = Path(sys.executable).parent):
    env = environment(OUT=str(out), PATH=f"{path}{os.pathsep}{os.environ['PATH']}")
    return subprocess.run(
        ["sh", "scripts/first_run.sh"], cwd=ROOT, env=env | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True, timeout=400,
    )  # fmt: skip


@pytest.mark.slow
def test_the_checks_pass_here(tmp_path):
    out = tmp_path / "checks"
    done = first_run(out)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line[:4] for line in done.stdout.splitlines()] == ["pass"] * 5
    assert done.stdout in (out / "report.txt").read_text()
    assert "continuing after step" in (out / "killed.log").read_text(), "it was killed and resumed"
    for name in ("ddp", "fsdp", "killed"):
        assert sum("loss" in row for row in read_jsonl(out / name / "metrics.jsonl")) == 20
    again = first_run(out)
    assert again.returncode == 2 and "is there already" in again.stderr


def test_the_checks_can_fail(tmp_path):
    (tmp_path / "torchrun").write_text(STAND_IN.format(python=sys.executable))
    (tmp_path / "torchrun").chmod(0o755)
    done = first_run(tmp_path / "checks", tmp_path)
    assert done.returncode == 1, done.stderr
    lines = [line for line in done.stdout.splitlines() if line[:4] in ("pass", "FAIL")]
    assert [line[:4] for line in lines] == ["FAIL", "FAIL", "FAIL", "FAIL", "pass"], lines
