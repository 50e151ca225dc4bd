"""`scripts/first_run.sh`: all its checks on two processes, and what it says of runs gone wrong."""

import os
import subprocess
import sys
from pathlib import Path

from conftest import ROOT, environment

# In place of `python`: each run leaves figures at once, and each is wrong in its own way.
STAND_IN = """#!{python}
import os, pathlib, subprocess, sys
words = sys.argv[1:]
if words[0] == "-c":
    print(0)
elif words[0] == "-":
    sys.exit(subprocess.run([sys.executable, *words], stdin=sys.stdin).returncode)
elif "--plan" in words:
    print('{{"peak_gib": 1}}')
elif "--resume" in words:
    sys.exit("error: no room\\nE1125 failed (exitcode: 1)\\nTraceback of torchrun")
else:
    run = pathlib.Path(words[words.index("--out") + 1])
    run.mkdir()
    row = '{{"step": 8, "loss": %d, "label_loss": 1, "peak_memory_bytes": 4e9, '
    row += '"examples_per_second": 4}}\\n'
    (run / "metrics.jsonl").write_text(row % (run.name == "fsdp") * 8)
"""


def first_run(out: Path, *, bin: Path = Path(sys.executable).parent):
    env = environment(PATH=f"{bin}{os.pathsep}{os.environ['PATH']}", OUT=str(out))
    env["CUDA_VISIBLE_DEVICES"] = ""
    script = ROOT / "scripts" / "first_run.sh"
    return subprocess.run(
        ["sh", script], env=env, cwd=out.parent, capture_output=True, text=True, timeout=300
    )


def test_all_checks_pass_and_leave_a_report(tmp_path):
    out = tmp_path / "out"
    done = first_run(out)
    assert done.returncode == 0, done.stdout + done.stderr
    words = [line.split()[0] for line in done.stdout.splitlines()]
    assert words == ["pass"] * 5 + ["info"]
    assert "from DDP: 0 (expected <= 0)" in done.stdout
    report = (out / "report.txt").read_text()
    assert report.startswith(done.stdout) and "torch 2" in report
    for name in ("ddp", "fsdp", "killed", "big"):
        assert (out / name / "metrics.jsonl").stat().st_size > 0
        assert (out / name / "run.json").exists() and (out / f"{name}.log").exists()
    again = first_run(out)
    assert again.returncode == 2 and again.stderr.count("\n") == 1 and "is there" in again.stderr


def test_each_check_can_fail(tmp_path):
    (tmp_path / "python").write_text(STAND_IN.format(python=sys.executable))
    (tmp_path / "python").chmod(0o755)
    done = first_run(tmp_path / "my out", bin=tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    said = [line[:7] for line in lines if line.startswith(("pass", "FAIL"))]
    assert said == ["FAIL  1", "FAIL  2", "FAIL  3", "FAIL  4", "pass  5"]
    assert "1 (expected < 1)" in done.stdout and "1 (expected <= 0.0001)" in done.stdout
    assert "error: no room" in lines and "Traceback of torchrun" not in lines
