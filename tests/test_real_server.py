"""A real server: `DSBS_SERVER=http://localhost:8123/v1 pytest tests/test_real_server.py`, with what
`scripts/local_teacher.sh` starts, or any other."""

import os

import pytest
from conftest import read_jsonl, run

SERVER = os.environ.get("DSBS_SERVER")


@pytest.mark.server
@pytest.mark.skipif(not SERVER, reason="DSBS_SERVER names no server")
@pytest.mark.parametrize("api", ["chat", "completions"])
def test_a_real_server_answers_both_apis(tmp_path, api):
    model = os.environ.get("DSBS_MODEL", "any")
    words = ["teacher.py", "--dataset", "demo", "--split", "test", "--limit", "4", "--model", model,
             "--base-url", SERVER, "--api", api, "--out", tmp_path / "out"]  # fmt: skip
    run(*words)
    log = read_jsonl(tmp_path / "out.raw.jsonl")
    assert len(log) == 4 and all(line["completion"] for line in log)
    assert all(line["usage"]["total_tokens"] > 500 for line in log), "ten demonstrations"
    assert {line["settings"]["api"] for line in log} == {api}
    run(*words)
    assert read_jsonl(tmp_path / "out.raw.jsonl") == log, "nothing is asked twice"
