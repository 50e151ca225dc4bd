"""scripts/first_run.sh, the first user's checks, on two gloo processes and small models."""

import subprocess

from conftest import ROOT, environment, read_jsonl


def test_the_checks_pass_here_and_fail_where_something_is_wrong(tmp_path):
    out = tmp_path / "checks"
    ask = lambda: subprocess.run(  # noqa: E731
        ["sh", "scripts/first_run.sh"], cwd=ROOT, env=environment(OUT=str(out)),
        capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    done = ask()
    assert done.returncode == 0, done.stdout + done.stderr
    passed = [line for line in done.stdout.splitlines() if line.startswith("pass")]
    assert len(passed) == 5 and "FAIL" not in done.stdout
    assert done.stdout in (out / "report.txt").read_text()
    assert "continuing after step" in (out / "killed.log").read_text(), "it was killed and resumed"
    for name in ("ddp", "fsdp", "killed"):
        assert sum("loss" in row for row in read_jsonl(out / name / "metrics.jsonl")) == 20
    done = ask()
    assert done.returncode == 2 and "is there already" in done.stderr
