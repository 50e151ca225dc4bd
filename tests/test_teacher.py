"""The teacher against a real and hostile HTTP server (server.py). The oracle is what that server
was asked and answered, and the files on disk."""

import email.utils
import gzip
import json
import re
import resource
import signal
import subprocess
import time
import zlib
from collections import Counter
from types import SimpleNamespace

import pytest
from conftest import REAL, ROOT, command, environment, read_jsonl
from server import COLOURS, FAULTS, Server, completion
from server import answer as default_answer

import teacher
from data import TASKS, load_dataset, not_allowed, parse_completion

PROMPT = """# not sent
Say which colour it is.

Q: What is the colour of a leaf?
A: Leaves are green. So the answer is green.

Q: What is the colour of milk?
A: Milk is
plainly white. So the answer is white.
"""
NOBODY = SimpleNamespace(url="http://127.0.0.1:9")  # where nothing is asked
SILENT = ("OPENAI_API_KEY", "OPENAI_BASE_URL", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY")


def question(i: int) -> str:
    return f"What is the colour of {list(COLOURS)[i % 4]}, number {i}?"


def number(text: str) -> int:
    """Of a question."""
    return int(text.rstrip("?").rpartition(" ")[2])


def make_folder(folder, n: int, labels: bool = True):
    """n questions to ask, with a prompt and nothing else to learn from."""
    folder.mkdir(exist_ok=True)
    rows = [{"id": f"c{i}", "input": question(i)} for i in range(n)]
    for i, row in enumerate(rows):
        row["label"] = list(COLOURS.values())[i % 4] if labels else None
    for name, some in (("train", rows), ("valid", [{"id": "v", "input": "v", "label": None}])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    (folder / "prompt.txt").write_text(PROMPT)
    return folder


class Room:
    """A folder of questions, the command to ask them, and the files that it leaves."""

    def __init__(self, path, capsys):
        self.path, self.capsys, self.folder = path, capsys, make_folder(path / "colours", 24)
        self.raw, self.out = path / "out.raw.jsonl", path / "out.jsonl"

    def words(self, server, *words) -> list[str]:
        where = ["--model", "m", "--base-url", server.url] if server else []
        return [str(w) for w in ("--dataset", self.folder, "--out", self.path / "out", *where,
                                 *words)]  # fmt: skip

    def ask(self, server, *words, status: int = 0):
        """In this process; gives what it printed (out, err)."""
        self.capsys.readouterr()
        got, said = teacher.main(self.words(server, *words)), self.capsys.readouterr()
        assert got == status, said
        assert "Traceback" not in said.err
        if status == 2:
            assert said.err.startswith("error: ") and said.err.rstrip().count("\n") < 9
        return said

    def start(self, server, *words, **more) -> subprocess.Popen:
        """In a process of its own, with short pauses."""
        program = "import sys, teacher; teacher.BACKOFF = 0.02; sys.exit(teacher.main())"
        return subprocess.Popen(
            command("-c", program, *self.words(server, *words)), cwd=ROOT, env=environment(),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more)  # fmt: skip

    def log(self) -> list[dict]:
        return read_jsonl(self.raw)

    def report(self) -> dict:
        return json.loads((self.path / "out.report.json").read_text())


@pytest.fixture
def room(tmp_path, monkeypatch, capsys):
    for name in SILENT:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(teacher, "BACKOFF", 0.01)
    return Room(tmp_path, capsys)


def error(message: str, **more) -> dict:
    return {"error": {"message": message, **more}}


def wait_until(ready, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.005)


# ---- Prompts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["esnli", "anli1", "cqa", "svamp", "asdiv", "demo"])
def test_bundled_prompts(name):
    prompt, task = teacher.read_prompt(name), TASKS[name]
    assert len(prompt.shots) == 10 and prompt.instruction
    labels = []
    for input, answer in prompt.shots:
        rationale, label = parse_completion(name, answer)
        assert len(rationale) > 20 and input == input.strip()
        labels.append(label)
        if name == "cqa":
            assert not not_allowed(task, input, label)
    allowed = {"demo": ["refund", "exchange", "voucher", "refuse"]}.get(name, task.labels)
    if allowed:
        assert set(labels) == set(allowed)
        assert sum(a != b for a, b in zip(labels, labels[1:])) > len(allowed), "in mixed order"
    assert len(prompt.text("")) < 3 * (4096 - 512 - 300), "fits a small window"


@pytest.mark.parametrize("name", ["svamp", "asdiv", "cqa", "demo"])
def test_no_demonstration_is_from_a_split(name):
    if name != "demo" and not REAL.exists():
        pytest.skip("the real data is not here")
    squash = lambda text: "".join(filter(str.isalnum, text.lower()))  # noqa: E731
    inputs = {squash(e.input) for split in TASKS[name].splits
              for e in load_dataset(name, split, REAL)}  # fmt: skip
    shots = [squash(input) for input, _ in teacher.read_prompt(name).shots]
    assert not inputs.intersection(shots)
    if name == "cqa":  # the questions without their choices
        assert not any(input.startswith(shot.split("answerchoices")[0])
                       for input in inputs for shot in shots)  # fmt: skip


GOOD = "Q: one?\nA: Leaves. So the answer is red.\n"


@pytest.mark.parametrize("text, line", [
    (GOOD + "\nQ: two?\n", 4),
    (GOOD + "\nloose text\n", 1),
    (GOOD + "A: again\n", 1),
    (GOOD + "\n# no comment down here\n" + GOOD, 1),
    ("# c\n\n\nQ: one?\nmore?\nA: no answer\n", 4),
    (GOOD + "\nQ: two?\nA: So the answer is red.\n", 4),  # no rationale
    ("Q:\nA: Leaves. So the answer is red.\n", 1),
    (GOOD + "\nQ: two?\nA: Hm. So the answer is purple.\n", 4),
    (GOOD + "\nQ: two?\nA: Hm. So the answer is red. Or: So the answer is blue.\n", 4),
])  # fmt: skip
def test_a_malformed_prompt_is_told_with_its_line(room, text, line):
    (room.folder / "prompt.txt").write_text(text)
    with Server() as server:
        said = room.ask(server, status=2)
    assert f"prompt.txt:{line}: " in said.err and "'A: '" in said.err
    assert not server.seen and not room.raw.exists()


@pytest.mark.parametrize("text", ["# only this\n", "", "Just an instruction.\n", GOOD[2:]])
def test_a_prompt_without_demonstrations(room, text):
    (room.folder / "prompt.txt").write_text(text)
    assert "--shots 0" in room.ask(NOBODY, status=2).err


def test_a_prompt_in_another_encoding(room):
    (room.folder / "prompt.txt").write_bytes(PROMPT.replace("Milk", "Lait à café").encode("latin1"))
    assert "UTF-8" in room.ask(NOBODY, status=2).err
    for raw in (PROMPT.encode("utf-8-sig"), PROMPT.replace("\n", "\r\n").encode()):
        (room.folder / "prompt.txt").write_bytes(raw)
        prompt = teacher.read_prompt(str(room.folder))
        assert prompt.instruction == "Say which colour it is." and len(prompt.shots) == 2
        assert prompt.shots[1][1] == "Milk is\nplainly white. So the answer is white."


def test_what_is_sent_with_demonstrations(room):
    with Server() as server:
        room.ask(server, "--limit", 1)
        (chat,) = server.seen
        room.raw.unlink()
        room.ask(server, "--limit", 1, "--api", "completions")
        plain = server.seen[-1]
        room.raw.unlink()
        room.ask(server, "--limit", 1, "--shots", 1)
    turns = chat.body["messages"]
    assert [turn["role"] for turn in turns] == ["user", "assistant"] * 2 + ["user"]
    assert turns[0]["content"] == "Say which colour it is.\n\nWhat is the colour of a leaf?"
    assert turns[1]["content"] == "Leaves are green. So the answer is green."
    assert turns[-1]["content"] == question(0)
    assert plain.path == "/v1/completions" and "messages" not in plain.body
    text = PROMPT.replace("# not sent\n", "") + f"\nQ: {question(0)}\nA:"
    assert plain.body["prompt"] == text
    for body in (chat.body, plain.body):
        assert body["model"] == "m" and body["temperature"] == 0 and body["max_tokens"] == 512
        assert "seed" not in body and "Authorization" not in chat.headers
    assert len(server.seen[-1].body["messages"]) == 3
    assert "not sent" not in json.dumps([ask.body for ask in server.seen])


@pytest.mark.parametrize("file", [True, False])
def test_zero_shot(room, file):
    """Limitations, after Kojima et al.: an instruction, the label set, the answer's form."""
    if not file:
        (room.folder / "prompt.txt").unlink()
    with Server() as server:
        room.ask(server, "--shots", 0)
    (text,) = (turn["content"] for turn in server.seen[0].body["messages"])
    assert "leaf" not in text and text.endswith("\n\n" + server.seen[0].question)
    for part in (*COLOURS.values(), "step by step", "So the answer is LABEL."):
        assert part in text
    assert ("Say which colour" in text) == file
    assert room.report()["accuracy"] == 1


# ---- The client: where and how -------------------------------------------------------------------


@pytest.mark.parametrize("base, given", [
    ("/v1", "/v1"), ("/v1", "/v1/"), ("", ""), ("/api/v1", "/api/v1"), ("/v1beta/openai",) * 2,
])  # fmt: skip
def test_the_base_url_is_used_as_given(room, monkeypatch, base, given):
    with Server(base=base) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.root + given)
        room.ask(None, "--model", "m", "--limit", 2)
        room.raw.unlink()
        room.ask(None, "--model", "m", "--limit", 2, "--api", "completions")
    paths = [base + "/chat/completions"] * 2 + [base + "/completions"] * 2
    assert [ask.path for ask in server.seen] == paths


@pytest.mark.parametrize("url, hint", [
    *((url, "http://localhost:8000/v1") for url in (
        "localhost:8000", "ftp://h/v1", "http://me:pass1234@h/v1", "http://h/v1?key=pass1234",
        "http://h/a b", "nonsense", "http://h/é", "http://h:999999/v1")),
    ("https://x.openai.azure.com/openai/deployments/y?api-version=2024-10-21", "openai/v1/"),
    ("https://api.openai.com/v1", "OPENAI_API_KEY"),
])  # fmt: skip
def test_no_base_url(room, url, hint):
    said = room.ask(None, "--model", "m", "--base-url", url, status=2).err
    assert hint in said and "pass1234" not in said


def test_a_proxy_of_the_environment_is_used_and_named(room, monkeypatch):
    proxied = lambda ask: (200, {}, completion(True, default_answer(ask.question)))  # noqa: E731
    words = ["--model", "m", "--base-url", "http://teacher.invalid/v1", "--limit", 4]
    with Server(proxied) as server:
        monkeypatch.setenv("http_proxy", server.root.replace("//", "//me:pass1234@"))
        monkeypatch.setenv("no_proxy", "")
        room.ask(None, *words)
        server.reply = lambda ask: (403, {}, "<h1>Access denied</h1>")
        room.raw.unlink()
        said = room.ask(None, *words, status=2).err
    assert {ask.path for ask in server.seen} == {"http://teacher.invalid/v1/chat/completions"}
    assert f"proxy {server.root}" in said and "Access denied" in said and "pass1234" not in said


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_loopback_goes_past_a_proxy(room, monkeypatch, host):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with Server() as server:
        url = server.url.replace("127.0.0.1", host)
        room.ask(None, "--model", "m", "--base-url", url, "--limit", 3)
    assert len(server.seen) == 3


def test_nobody_there(room):
    with Server() as server:
        pass
    start = time.monotonic()
    said = room.ask(server, status=3).err
    assert server.url in said and "refused" in said and not room.log()
    assert time.monotonic() - start < 5


def test_little_is_sent_and_body_changes_it(room):
    more = (
        '{"reasoning_effort": "low", "max_tokens": null, "max_completion_tokens": 2000, "x": [1]}'
    )
    with Server() as server:
        room.ask(server, "--limit", 2)
        assert server.seen[0].body.keys() == {"model", "messages", "temperature", "max_tokens"}
        said = room.ask(server, "--limit", 2, "--body", more, status=2).err
        assert "reasoning_effort" in said and "another --out" in said
        room.raw.unlink()
        room.ask(server, "--limit", 1, "--body", more)
        body = server.seen[-1].body
        assert body["reasoning_effort"] == "low" and body["x"] == [1]
        assert body["max_completion_tokens"] == 2000 and "max_tokens" not in body
        room.ask(server, "--limit", 2, "--body", more.replace("2000", "4000"))  # cut ones again
    assert server.seen[-1].body["max_completion_tokens"] == 4000 and len(server.seen) == 4


@pytest.mark.parametrize("body", ["{", "[]", "null", '{"messages": []}', '{"model": "other"}'])
def test_a_body_that_cannot_be_merged(room, body):
    assert "--body" in room.ask(NOBODY, "--body", body, status=2).err


# ---- The client: refusals ------------------------------------------------------------------------

UNSUPPORTED = "Unsupported parameter: '{}' is not supported with this model."


@pytest.mark.parametrize("keys", [["max_tokens"], ["top_k"], ["max_tokens", "temperature", "seed"]])
def test_a_key_refused_in_the_documented_form_is_dropped_once(room, keys):
    def reply(ask):
        wrong = [key for key in keys if key in ask.body]
        code = "unsupported_value" if wrong == ["temperature"] else "unsupported_parameter"
        if wrong:
            return 400, {}, error(UNSUPPORTED.format(wrong[0]), param=wrong[0], code=code)

    with Server(reply) as server:
        words = ["--seed", 1, "--concurrency", 4, "--body", '{"top_k": 5}']
        said = room.ask(server, *words).err
        asked = len(server.seen)
        room.ask(server, *words)
    assert asked == len(server.seen) <= 24 + 4 * len(keys) and len(room.log()) == 24
    body = server.seen[-1].body
    assert not set(keys) & set(body)
    assert ("max_completion_tokens" in body) == ("max_tokens" in keys)
    assert all(said.count(UNSUPPORTED.format(key)) == 1 for key in keys)


def echo(ask):
    return {"detail": [{"loc": ["body", "temperature"], "msg": "Bad words", "input": ask.body}]}


REFUSALS = [  # status, body, the server's words
    (400, error("Bad words " * 60, code=400), "Bad words " * 59 + "Bad words"),
    (403, error("Region not supported"), "Region not supported"),
    (403, "<html><h1>Forbidden by <b>us</b></h1></html>", "Forbidden by us"),
    (404, {"object": "error", "message": "The model `m` is gone"}, "The model `m` is gone"),
    (404, {"detail": "Not Found"}, "a --base-url that ends in /v1"),
    (400, [{"error": {"code": 400, "message": "API key expired."}}], "API key expired."),
    (400, {"code": "invalid", "error": "Argument not supported: temperature"}, "not supported"),
    (400, error("Provider error", metadata={"raw": json.dumps(error("No `temperature`"))}),
     "No `temperature`"),
    (422, {"message": {"detail": [{"loc": ["body", "temperature"], "msg": "Extra"}]}}, "Extra"),
    (422, echo, "Bad words"), (413, {"errors": ["Too", "large"]}, "large"), (400, '"No."', "No."),
    (400, "plain words", "plain words"), (501, "", "501"), (410, {"title": "Gone away"}, "Gone"),
    (401, error("Incorrect API key: none."), "Incorrect API key"), (402, error("No credit"), "No"),
]  # fmt: skip


@pytest.mark.parametrize("status, body, words", REFUSALS)
def test_a_refusal_before_any_answer_stops_with_the_servers_words(room, status, body, words):
    reply = lambda ask: (status, {}, body(ask) if callable(body) else body)  # noqa: E731
    with Server(reply) as server:
        said = room.ask(server, "--concurrency", 4, status=2).err
        assert len(server.seen) <= 4 and not room.log(), "nothing is logged as failed"
        assert words in said and "leaf" not in said, "whole, without our own prompt"
        asks_for = [key for key in ("temperature", "stop") if f"without {key}" in said]
        assert asks_for == ["temperature"] * ("temperature" in json.dumps(body if body != echo
                                              else "temperature"))  # fmt: skip
        if asks_for:
            assert """--body '{"temperature": null}'""" in said
        server.reply = lambda ask: None
        room.ask(server)
    assert set(server.answered().values()) == {1} and len(room.log()) == 24


@pytest.mark.parametrize("status, body, words", [*REFUSALS[:5], (422, echo, "Bad words")])
def test_after_the_first_answer_a_refusal_belongs_to_its_example(room, status, body, words):
    with Server() as server:
        bad = lambda ask: (status, {}, body(ask) if callable(body) else body)  # noqa: E731
        server.reply = lambda ask: bad(ask) if number(ask.question) == 5 else None
        said = room.ask(server, status=3)
        assert "--retry failed" in said.err and room.report()["failed"] == 1
        assert set(server.asked().values()) == {1}, "a refusal is not asked again"
        (line,) = (line for line in room.log() if line["id"] == "c5")
        assert line["completion"] is None and words.strip() in line["error"]
        room.ask(server, status=3)
        assert len(server.seen) == 24
        server.reply = lambda ask: None
        room.ask(server, "--retry", "failed")
    assert len(room.log()) == 25 and len(read_jsonl(room.out)) == 24, "nothing is rewritten"


@pytest.mark.parametrize("status, code", [(401, ""), (402, ""), (429, "insufficient_quota")])
def test_a_bad_key_or_no_credit_stops_after_answers_too(room, status, code):
    with Server() as server:
        room.ask(server, "--limit", 4)
        log = room.raw.read_bytes()
        server.reply = lambda ask: (status, {}, error("No credit", code=code))
        said = room.ask(server, "--concurrency", 4, status=3).err
        assert len(server.seen) <= 8 and room.raw.read_bytes() == log
        assert "No credit" in said and "20 not asked for" in said and "the same command" in said


def test_a_moderated_input_is_not_the_servers_refusal(room):
    """Azure's form, for the first example, before anything was answered."""
    bad = error("The prompt triggered the content policy", code="content_filter")
    with Server(lambda ask: (400, {}, bad) if number(ask.question) == 0 else None) as server:
        room.ask(server, "--concurrency", 1, status=3)
    assert len(room.log()) == 24 and room.report()["failed"] == 1 == server.asked()[question(0)]


@pytest.mark.parametrize("status", [500, 429, 200])
def test_five_equal_failures_stop(room, status):
    body = completion(True, "", "SAFETY") if status == 200 else error("Down, number 7")
    with Server(lambda ask: (status, {}, body)) as server:
        room.ask(server, "--max-retries", 1, "--concurrency", 1, status=3)
    assert len(server.seen) == (5 if status == 200 else 10) and room.report()["failed"] == 5


def test_different_failures_at_the_start_do_not_stop(room):
    endings = ("content_filter", "SAFETY", "RECITATION", "BLOCKLIST", "SPII", "refusal")
    first = {question(i): completion(True, "", ending) for i, ending in enumerate(endings)}
    with Server(lambda ask: (200, {}, first[ask.question]) if ask.question in first else None) as s:
        room.ask(s, "--concurrency", 1, status=3)
    assert room.report()["failed"] == 6 and len(final(room)) == 24


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_refused(room, monkeypatch, status):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-key-0123456789")
    with Server() as other, Server() as server:
        server.reply = lambda ask: (status, {"location": other.url + "/chat/completions"}, "")
        assert other.url in room.ask(server, status=3).err
    assert not other.seen and len(server.seen) <= 8


# ---- The client: when it fails -------------------------------------------------------------------


def final(room) -> list[dict]:
    """The log's lines that are answers or final failures."""
    return [line for line in room.log() if line.get("final", True)]


PAID = ("half a body", "no choices", "null content", "wrong JSON", "a list")  # status 200


@pytest.mark.parametrize("kind", FAULTS)
@pytest.mark.parametrize("api", ["chat", "completions"])
def test_a_fault_is_tried_again(room, kind, api):
    with Server(kinds=(kind,), hang=1.0) as server:
        server.fault = lambda ask: kind if ask.attempt == 1 and number(ask.question) < 6 else None
        room.ask(server, "--timeout", 0.5, "--api", api, "--limit", 12)
    assert len(final(room)) == 12 and set(server.answered().values()) == {1}
    assert sorted(line["attempts"] for line in final(room)) == [1] * 6 + [2] * 6
    wasted = [line for line in room.log() if not line.get("final", True)]
    assert len(wasted) == 6 * (kind in PAID), "what was paid for is logged"
    assert all(line["usage"]["total_tokens"] > 0 for line in wasted)
    report = room.report()
    assert report["cost"]["retries"] == 6 and report["accuracy"] == 1 and report["settled"] == 12


@pytest.mark.parametrize("status, body", [
    (429, error("Rate limit reached for m. Please try again in 20ms. See your billing page.")),
    (408, ""), (409, ""), (425, ""), (502, "<html>"), (529, error("Overloaded")),
    (200, error("Provider returned error", code=502)), (200, "null"), (200, b"\xff\xfe"),
    (200, {"choices": None}), (200, {"choices": ["text"]}), (200, "[" * 100_000),
    (200, {"choices": [{"message": None}]}), (200, ""), (200, b"\x1f\x8b\x08broken"),
    (200, '{"choices": [{"message": {"content": %s}}]}' % ("[" * 900 + "]" * 900)),
    (200, "data: {\"choices\": 5}\n\ndata: 7\n\n"), (200, "data: [DONE]\n\n"),
])  # fmt: skip
def test_other_passing_faults(room, status, body):
    with Server(lambda ask: (status, {}, body) if ask.attempt == 1 else None) as server:
        room.ask(server, "--limit", 3)
    assert [line["attempts"] for line in final(room)] == [2, 2, 2]
    assert len(room.log()) == 3 + 3 * (status == 200)


@pytest.mark.slow
def test_a_thousand_requests_at_twenty_percent_faults(room):
    make_folder(room.folder, 1000)
    with Server(faults=0.2, seed=1, hang=4) as server:
        process = room.start(server, "--concurrency", 32, "--timeout", 2.5)
        said = process.communicate()
    assert process.returncode == 0, said
    lines = final(room)
    assert {line["id"] for line in lines} == {f"c{i}" for i in range(1000)}
    assert len(lines) == 1000 == len(read_jsonl(room.out))
    assert set(server.answered().values()) == {1}, "none is asked again after its answer"
    assert len(server.seen) > 1150 and {a.status for a in server.seen} >= set(FAULTS)
    assert sum(line["attempts"] for line in lines) == len(server.seen)
    assert room.report()["accuracy"] == 1


@pytest.mark.slow
def test_three_kills_lose_nothing(room):
    make_folder(room.folder, 1000)
    words, paid = ["--concurrency", 32, "--timeout", 2.5], []
    lines = lambda: room.raw.read_bytes().split(b"\n") if room.raw.exists() else []  # noqa: E731

    def answered():
        good = [json.loads(line) for line in lines() if line.endswith(b"}")]
        return Counter(int(line["id"][1:]) for line in good if line.get("final", True))

    with Server(faults=0.2, seed=2, hang=4, latency=0.02) as server:
        for goal in (200, 450, 700, 1000):
            process = room.start(server, *words)
            if goal < 1000:
                wait_until(lambda: len(lines()) > goal or process.poll() is not None)  # noqa: B023
                process.send_signal(signal.SIGKILL)
            said = process.communicate()
            assert process.returncode == (0 if goal == 1000 else -signal.SIGKILL), said
            paid.append((len(server.seen), set(answered())))
    for mark, logged in paid[:3]:
        assert not logged & {number(ask.question) for ask in server.seen[mark:]}
    assert answered() == dict.fromkeys(range(1000), 1)
    assert sum(server.answered().values()) <= 1000 + 3 * 32, "those in flight at most"
    assert room.report()["accuracy"] == 1


@pytest.mark.parametrize("status, form", [
    (429, "words"), pytest.param(429, "date", marks=pytest.mark.slow), (503, "seconds"),
])  # fmt: skip
def test_a_pause_asked_for_is_a_floor_and_429_pauses_all(room, status, form):
    make_folder(room.folder, 60)

    def reply(ask):
        if number(ask.question) == 8 and ask.attempt == 1:
            late = email.utils.formatdate(time.time() + 2, usegmt=True)  # in 1 to 2 seconds
            asked = {"seconds": {"Retry-After": "1"}, "date": {"Retry-After": late}}.get(form, {})
            return status, asked, error("Please try again in 0m1.05s." if not asked else "Slow")

    with Server(reply, latency=0.05) as server:
        room.ask(server, "--concurrency", 4)
    first, second = (ask.time for ask in server.seen if number(ask.question) == 8)
    assert 0.9 < second - first < 4
    meanwhile = [ask for ask in server.seen if first + 0.2 < ask.time < first + 0.9]
    assert not meanwhile if status == 429 else len(meanwhile) > 10
    assert set(server.answered().values()) == {1}


@pytest.mark.parametrize("value", ["soon", "", "-5", "nan", "Tue, 99 Foo 2020 00:00:00 GMT",
                                   "Wed, 21 Oct 2015 07:28:00 GMT"])  # fmt: skip
def test_a_useless_retry_after(room, value):
    slow = lambda ask: (429, {"Retry-After": value}, "") if ask.attempt == 1 else None  # noqa: E731
    with Server(slow) as server:
        room.ask(server, "--limit", 2)
    assert len(room.log()) == 2


@pytest.mark.parametrize("value", [
    "inf", pytest.param("Fri, 31 Dec 9999 23:59:59 GMT", marks=pytest.mark.slow),
])  # fmt: skip
def test_an_endless_retry_after_can_be_stopped(room, value):
    with Server(lambda ask: (429, {"Retry-After": value}, "")) as server:
        process = room.start(server, "--concurrency", 2, "--timeout", 5)
        wait_until(lambda: len(server.seen) == 2)  # both workers ask, so signals are handled
        time.sleep(0.3)
        assert process.poll() is None, process.communicate()
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=20)
    assert process.returncode == 3 and "Traceback" not in said[1]


def test_an_outage_does_not_fail_everything(room):
    make_folder(room.folder, 300)
    with Server(lambda ask: (503, {}, "") if number(ask.question) > 20 else None) as server:
        said = room.ask(server, "--max-retries", 1, "--concurrency", 4, status=3).err
        assert "in a row" in said and "503" in said
        failed = [line for line in room.log() if line.get("error")]
        assert 20 <= len(failed) <= 40 and len(server.seen) < 110
        server.reply = lambda ask: None
        room.ask(server, "--retry", "failed")
    assert room.report()["answered"] == 300 and set(server.answered().values()) == {1}


def test_many_failures_among_answers_are_no_outage(room):
    make_folder(room.folder, 150)
    with Server(lambda ask: (400, {}, "") if number(ask.question) % 2 else None) as server:
        room.ask(server, "--concurrency", 4, status=3)
    assert len(room.log()) == 150 and room.report()["failed"] == 75


@pytest.mark.parametrize("signals", [
    pytest.param([signal.SIGINT], marks=pytest.mark.slow), [signal.SIGTERM], [signal.SIGINT] * 2,
])  # fmt: skip
def test_a_signal_finishes_what_is_in_flight(room, signals):
    twice = len(signals) == 2
    with Server(latency=30 if twice else 0.4) as server:
        process = room.start(server, "--concurrency", 3)
        wait_until(lambda: len(server.seen) > (2 if twice else 5))
        for number_ in signals:
            process.send_signal(number_)
            time.sleep(0.1)
        out, err = process.communicate(timeout=10)
        assert process.returncode == (130 if twice else 3), err
        assert "Traceback" not in err
        if not twice:
            assert {line["id"] for line in room.log()} == {
                f"c{number(q)}" for q in server.answered()}  # fmt: skip
            assert 6 <= len(server.seen) == len(room.log()) == len(read_jsonl(room.out)) <= 9
            assert f"{24 - len(room.log())} not asked for" in err and signals[0].name in err


@pytest.mark.parametrize("key", ["sk-proj-Secret_Key-0123456789\n", "sk/a+b/Secret/0123=="])
@pytest.mark.parametrize("status", [200, 400, 307, 500])
@pytest.mark.parametrize("form", ["raw", "escaped", "percent", "stream"])
def test_the_key_is_nowhere(room, monkeypatch, key, status, form):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    key = key.strip()
    echoed = "".join(f"%{ord(c):02X}" if c in "S/+=" else c for c in key)

    def reply(ask):
        """Says the key in all that it says, as a careless gateway would."""
        assert ask.headers["Authorization"] == f"Bearer {key}"
        text = f"Because you said {echoed if form == 'percent' else key}. So the answer is blue."
        good = completion(True, text, reasoning=key)
        if form == "stream" and status == 200:  # in two pieces
            return 200, {}, stream([text[:25], text[25:]])
        raw = json.dumps(good | error(text) if status != 200 else good)
        raw = (
            raw.replace("/", "\\/").replace("Secret", "\\u0053ecret") if form == "escaped" else raw
        )
        return status, {"X": key, "Location": f"http://h/?{key}&{echoed}"}, raw

    with Server(reply) as server:
        assert key not in json.dumps(room.words(server))
        code = {200: 0, 400: 2}.get(status, 3)
        said = room.ask(server, "--max-retries", 1, "--keep", "all", status=code)
    assert server.seen and not {key, echoed} & set(re.split(r"[ ,&?']", said.out + said.err))
    for path in room.path.rglob("*"):
        assert path.is_dir() or "ecret" not in path.read_text(), path
    assert "ecret" not in said.out + said.err


@pytest.mark.parametrize("key", ["two words", "clé", "a\nb"])
def test_no_key(room, monkeypatch, key):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    said = room.ask(NOBODY, status=2).err
    assert "OPENAI_API_KEY" in said and key not in said


# ---- The client: what answers say ----------------------------------------------------------------

ANSWER, SO = "The sky is blue. So the answer is blue.", "So the answer is blue."
THOUGHT = "Look at the sky."
QUOTE = "They want the form: So the answer is red."


def stream(pieces: list[str], end: str = "data: [DONE]\n\n", finish: str | None = "stop") -> str:
    """A chat answer as `data:` lines."""
    deltas = [{"role": "assistant"}, *({"content": piece} for piece in pieces), {}]
    events = [
        {"choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in deltas
    ]
    events[-1]["choices"][0]["finish_reason"] = finish
    events.append({"choices": [], "usage": {"total_tokens": 77}})
    lines = (f"data: {json.dumps(event)}\n\n" for event in events)
    return ": a comment\n\n" + "".join(lines) + end


@pytest.mark.parametrize("content, finish, more, state, rationale", [
    (ANSWER, "stop", {}, "answered", "The sky is blue."),
    (ANSWER, "stop", {"reasoning_content": QUOTE}, "answered", "The sky is blue."),
    (SO, "stop", {"reasoning_content": THOUGHT}, "answered", THOUGHT),
    (SO, None, {"reasoning": THOUGHT}, "answered", THOUGHT), (SO, "stop", {}, "answered", ""),
    (f"<think>\n{THOUGHT}\n</think>\n\n{ANSWER}", "stop", {}, "answered", "The sky is blue."),
    (f"{THOUGHT}\n</think>\n\n{SO}", "stop", {}, "answered", THOUGHT),
    (f"<think>{QUOTE}</think>{ANSWER}", "EOS", {}, "answered", "The sky is blue."),
    ([{"type": "text", "text": "The sky is blue. "}, {"type": "text", "text": SO}], "stop", {},
     "answered", "The sky is blue."),
    ([{"type": "thinking", "thinking": [{"type": "text", "text": THOUGHT}]},
      {"type": "text", "text": SO}], "end_turn", {}, "answered", THOUGHT),
    (f"A: {ANSWER}", "stop", {}, "answered", "The sky is blue."),
    (f"{ANSWER}\n\nQ: What of grass?\nA: Grass is", "length", {}, "answered", "The sky is blue."),
    # Thoughts give no label.
    (None, "stop", {"reasoning": f"{THOUGHT} {SO}"}, "unparsed", ""),
    ("", "STOP", {"reasoning_content": QUOTE}, "unparsed", ""),
    (f"<think>\n{QUOTE}", "stop", {}, "unparsed", ""),
    (f"Hm. <thinking>{QUOTE}", "stop", {}, "unparsed", "Hm."),
    (f"<THINK>{QUOTE}</THINK>", "stop", {}, "unparsed", ""),
    ([{"type": "thinking", "thinking": QUOTE}, {"type": "reasoning", "text": QUOTE}], "stop", {},
     "unparsed", ""),
    ("I do not know.", "stop", {"reasoning": QUOTE}, "unparsed", "I do not know."),
    # Cut.
    (ANSWER, "MAX_TOKENS", {}, "truncated", "The sky is blue."),
    (SO, "length", {"reasoning": THOUGHT}, "truncated", ""),
    (f"<think>\n{QUOTE}", "length", {}, "truncated", ""),
    (None, "length", {}, "truncated", ""),
    # Refused.
    (None, "stop", {"refusal": "I cannot help."}, "failed", None),
    (ANSWER, "content_filter", {}, "failed", None), (None, "RECITATION", {}, "failed", None),
    ("The sky", "Prohibited_Content", {}, "failed", None), (ANSWER, "refusal", {}, "failed", None),
])  # fmt: skip
def test_the_ending_decides_what_an_answer_is(room, content, finish, more, state, rationale):
    with Server(lambda ask: (200, {}, completion(True, content, finish, **more))) as server:
        room.ask(server, "--limit", 1, status=3 if state == "failed" else 0)
        assert len(server.seen) == 1
        report = room.report()
        assert (state == "answered") == (len(read_jsonl(room.out)) == 1 == report["correct"])
        counts = {key: report[key] for key in ("failed", "truncated", "unparsed")}
        assert counts == {key: int(key == state) for key in counts}
        assert report["cost"]["total_tokens"] == 10
        assert report["labels_without_rationale"] == (state == "answered" and not rationale)
        room.ask(None, "--parse-only", "--keep", "all")
        rows = read_jsonl(room.out)
        assert [row["rationale"] for row in rows] == [rationale] * (state != "failed")
    if state == "failed":
        assert (more.get("refusal") or finish) in room.log()[0]["error"]


@pytest.mark.parametrize("finish, more", [
    ("error", {}), ("abort", {}), ("network_error", {}), ("stop", {"error": {"message": "Died"}}),
    ("a new word", {}),
])  # fmt: skip
def test_an_answer_that_was_broken_off_is_asked_again(room, finish, more):
    bad = completion(True, ANSWER, finish)
    bad["choices"][0] |= more
    with Server(lambda ask: (200, {}, bad)) as server:
        room.ask(server, "--limit", 2, "--max-retries", 2, "--keep", "all", status=3)
        assert len(server.seen) == 6 and not read_jsonl(room.out)
        report = room.report()
        assert report["failed"] == 2 and report["cost"]["total_tokens"] == 60
        assert report["unknown_endings"] == ({} if more else {finish: 6})
        server.reply = lambda ask: None
        room.ask(server, "--limit", 2, "--retry", "failed")
    assert room.report()["answered"] == 2


@pytest.mark.parametrize("pack", [
    lambda text: "\ufeff" + text, lambda text: gzip.compress(text.encode()),
    lambda text: zlib.compress(text.encode()), lambda text: text.encode("utf-16"),
    lambda text: stream([ANSWER[:7], ANSWER[7:]]),
    lambda text: stream([ANSWER], end="").replace("\n", "\r\n"),
])  # fmt: skip
@pytest.mark.parametrize("header", [{}, {"Content-Type": "text/event-stream"}])
def test_a_form_that_nobody_asked_for_is_read(room, pack, header):
    good = json.dumps(completion(True, ANSWER))
    with Server(lambda ask: (200, header, pack(good))) as server:
        room.ask(server, "--limit", 3)
    assert len(server.seen) == 3 and {line["completion"] for line in room.log()} == {ANSWER}
    assert {line["usage"]["total_tokens"] for line in room.log()} <= {10, 77}


def test_a_stream_without_an_end_is_no_answer(room):
    half = stream([ANSWER], end="", finish=None)
    with Server(lambda ask: (200, {}, half) if ask.attempt == 1 else None) as server:
        room.ask(server, "--limit", 2)
    assert len(server.seen) == 4 and sum("final" in line for line in room.log()) == 2


@pytest.mark.parametrize("concurrency, most", [(1, 3), (8, 10)])
@pytest.mark.parametrize("body", ["event: x\n<answer>", "{'choices': 1}", {"status": "ok"}])
def test_an_unknown_form_stops_and_is_named(room, body, concurrency, most):
    with Server(lambda ask: (200, {"Content-Type": "text/x-odd"}, body)) as server:
        said = room.ask(server, "--concurrency", concurrency, status=3).err
        assert len(server.seen) <= most and "text/x-odd" in said
        assert len(room.log()) == len(server.seen) and not read_jsonl(room.out)
        server.reply = lambda ask: None
        room.ask(server)
    assert room.report()["answered"] == 24


@pytest.mark.parametrize("where", ["content", "finish", "reasoning", "usage", "error", "refusal"])
def test_half_a_surrogate_pair(room, where):
    bad = "\ud83d!"
    good = completion(True, bad + ANSWER if where == "content" else ANSWER)
    if where == "usage":
        good["usage"] = {"total_tokens": 10, bad: 5, "kind": bad}
    elif where in ("reasoning", "refusal"):
        content = None if where == "refusal" else ANSWER
        good["choices"][0]["message"].update({where: bad, "content": content})
    elif where == "finish":
        good["choices"][0]["finish_reason"] = bad
    reply = (400, {}, error(bad)) if where == "error" else (200, {}, good)
    code = {"error": 2, "refusal": 3, "finish": 3}.get(where, 0)
    with Server(lambda ask: reply) as server:
        room.ask(server, "--limit", 3, "--max-retries", 0, status=code)
    if where != "error":
        room.ask(None, "--parse-only")
        assert len(read_jsonl(room.out)) == 3 * (code == 0)


@pytest.mark.parametrize("usage", [
    None, [], "much", {}, {"total_tokens": None}, {"total_tokens": "10"},
    {"total_tokens": 10, "prompt_tokens": "7", "completion_tokens": None},
    {"total_tokens": 10, "prompt_tokens": {"cached": 7}},
])  # fmt: skip
def test_odd_usage_neither_stops_nor_spoils_the_log(room, usage):
    with Server(lambda ask: (200, {}, {**completion(True, ANSWER), "usage": usage})) as server:
        room.ask(server, "--limit", 3)
        room.ask(server, "--limit", 3)
    assert len(server.seen) == 3 and room.report()["cost"]["total_tokens"] > 29


# ---- The raw log ---------------------------------------------------------------------------------


def test_a_torn_last_line_is_skipped_and_never_truncated(room):
    odd = lambda question: f'"Señor" \\ 😀 {{"id": "\n"}} {ANSWER}'  # noqa: E731
    with Server(answer=odd) as server:
        room.ask(server, "--limit", 3, "--concurrency", 1)
        *lines, last = room.raw.read_bytes().splitlines(keepends=True)
        for cut in (*range(1, 20), *range(20, len(last), 7), len(last) - 1):
            room.raw.write_bytes(b"".join(lines) + last[:cut])
            known = [record["id"] for _, record in teacher.read_log(room.raw)]
            assert known == ["c0", "c1", "c2"][: 2 + (cut == len(last) - 1)]
        for cut in (0, 1, 20, len(last) // 2, len(last) - 2, len(last) - 1):
            torn = b"".join(lines) + last[:cut]
            room.raw.write_bytes(torn)
            asked = len(server.seen)
            said = room.ask(server, "--limit", 3).err
            assert ("torn" in said) == (0 < cut < len(last) - 1)
            assert len(server.seen) - asked == (cut < len(last) - 1)
            assert room.raw.read_bytes().startswith(torn)
            room.ask(server, "--limit", 3)  # it can be read ever after
            assert room.report()["settled"] == 3


@pytest.mark.parametrize("line", [
    "garbage", "[]", "{}", "", "null", "\0" * 40, '{"id": "c1"}', "no input", "settings", "usage",
    "attempts",
])  # fmt: skip
def test_a_malformed_line_is_told_with_its_place(room, line):
    with Server() as server:
        room.ask(server, "--limit", 3, "--concurrency", 1)
        first, record, last = room.raw.read_text().splitlines()
        change = {"no input": {"input_sha256": None}, "settings": {"settings": "chat"},
                  "usage": {"usage": [7]}, "attempts": {"attempts": "1"}}.get(line)  # fmt: skip
        line = json.dumps(json.loads(record) | change) if change else line
        room.raw.write_text(f"{first}\n{line}\n{last}\n")
        before = room.raw.read_bytes()
        for words in ((server,), (None, "--parse-only")):
            assert "out.raw.jsonl:2: " in room.ask(*words, status=2).err
        assert room.raw.read_bytes() == before and len(server.seen) == 3


def test_two_processes_exclude_each_other(room):
    with Server(latency=0.15) as server:
        process = room.start(server)
        wait_until(lambda: server.seen)
        assert "in use by another process" in room.ask(server, status=2).err
        room.ask(None, "--parse-only")  # reading is no harm
        process.communicate()
    assert process.returncode == 0 and set(server.asked().values()) == {1}


@pytest.mark.parametrize("change, said", [
    (["--model", "other"], "model m there, other here"), (["--temperature", "0.5"], "temperature"),
    (["--seed", "7"], "seed"), (["--api", "completions"], "api chat there, completions here"),
    (["--shots", "1"], "prompt_sha256"), ("prompt.txt", "prompt_sha256"),
    ("train.jsonl", "raw.jsonl:1: 'c0' stands for another input"),
])  # fmt: skip
def test_a_log_is_of_one_kind(room, change, said):
    with Server() as server:
        room.ask(server, "--limit", 4, "--concurrency", 1)
        before, words = room.raw.read_bytes(), change if isinstance(change, list) else []
        if not words:
            path = room.folder / change
            path.write_text(path.read_text().replace("Milk", "Tea").replace("sky, n", "Sky, n"))
        told = room.ask(server, *words, status=2).err
        assert said in told and "another --out" in told
        assert room.raw.read_bytes() == before and len(server.seen) == 4
        room.ask(server, *words, "--out", room.path / "new")
    assert len(server.seen) == 28


def test_a_full_disk_loses_nothing(room):
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))  # noqa: E731
    with Server() as server:
        process = room.start(server, preexec_fn=limit)
        _, err = process.communicate()
        assert process.returncode == 3 and "space" in err or "large" in err, err
        mark, whole = len(server.seen), room.raw.read_bytes().split(b"\n")[:-1]
        room.ask(server)
    again = {f"c{number(ask.question)}" for ask in server.seen[mark:]}
    assert not again & {json.loads(line)["id"] for line in whole} and 3 < len(whole) < 24
    assert room.report()["answered"] == 24


# ---- What is asked, and what becomes of it -------------------------------------------------------


def test_samples(room):
    says = {5: "Red? So the answer is red.", 6: "One. So the answer is blue.",
            7: "Two. So the answer is blue."}  # fmt: skip
    with Server(lambda ask: (200, {}, completion(True, says[ask.body["seed"]]))) as server:
        assert "--temperature 0" in room.ask(
            server, "--samples", 3, "--temperature", 0, status=2).err  # fmt: skip
        room.ask(server, "--samples", 3, "--seed", 5, "--limit", 4)
    assert Counter(ask.body["seed"] for ask in server.seen) == {5: 4, 6: 4, 7: 4}
    assert {ask.body["temperature"] for ask in server.seen} == {0.7}
    assert sorted((line["id"], line["sample"]) for line in room.log()) == [
        (f"c{i}", sample) for i in range(4) for sample in range(3)]  # fmt: skip
    assert [(r["rationale"], r["teacher_label"]) for r in read_jsonl(room.out)] == [
        ("One.", "blue")] * 4  # fmt: skip
    report = room.report()
    assert report["answered"] == 12 and report["correct"] == 1 and report["scored"] == 4


@pytest.mark.parametrize("answers, chosen", [
    ("red blue blue", 1), ("red blue", 0), ("pink pink red", 2), ("pink", 0),
    ("-truncated blue", 1), ("-failed -unparsed red", 2),
    ("(3*4) (3+4) (4+3)", 1),  # equations of one value are one label
])  # fmt: skip
def test_the_majority(room, answers, chosen):
    answers = [teacher.Answer(word[1:]) if word[0] == "-" else
               teacher.Answer("answered", "", word) for word in answers.split()]  # fmt: skip
    name = "svamp" if "(" in str(answers[0].label) else str(room.folder)
    example = load_dataset(str(room.folder), "train")[0]
    assert teacher.vote(name, example, answers) is answers[chosen]


def test_a_ceiling_of_tokens(room):
    with Server() as server:  # 10 a request
        said = room.ask(server, "--max-tokens-total", 50, "--concurrency", 1, status=3)
        assert len(server.seen) == 5 and "--max-tokens-total 50" in said.err
        room.ask(server, "--max-tokens-total", 50, status=3)
        assert len(server.seen) == 5, "it is reached already"
        room.ask(server, "--max-tokens-total", 100, "--concurrency", 4, status=3)
        assert 10 <= len(server.seen) <= 13
        room.ask(server)
    assert set(server.asked().values()) == {1} and room.report()["cost"]["total_tokens"] == 240


def scripted(ask):
    """Of 24: 10-12 wrong, 13-14 outside the set, 15-16 unparsed, 17 cut, 18 refused, 0 late."""
    i = number(ask.question)
    if i == 18 or (i == 0 and ask.attempt == 1):
        return 400 if i else 503, {}, error("No")
    if 10 <= i < 18:
        wrong = list(COLOURS.values())[(i + 1) % 4]
        text = [f"Hm. So the answer is {wrong}."] * 3 + ["Hm. So the answer is purple."] * 2
        text = [*text, *["Who knows?"] * 2, "Hm. So the answer is green."][i - 10]
        return 200, {}, completion(True, text, "length" if i == 17 else "stop")


def test_a_failure_replaces_no_answer(room):
    with Server(lambda ask: (200, {}, completion(True, "Who knows?"))) as server:
        room.ask(server, "--limit", 2)
        server.reply = lambda ask: (200, {}, completion(True, "", "SAFETY"))
        room.ask(server, "--limit", 2, "--retry", "unparsed")
    assert len(room.log()) == 4 and room.report()["unparsed"] == 2


def test_the_report_and_what_is_kept_and_asked_again(room):
    with Server(scripted) as server:
        said = room.ask(server, status=3).out
        url = server.url
    report = room.report()
    assert {key: report[key] for key in (
        "examples", "settled", "answered", "failed", "truncated", "unparsed",
        "labels_outside_the_set", "correct", "scored", "kept")} == {
        "examples": 24, "settled": 24, "answered": 23, "failed": 1, "truncated": 1, "unparsed": 2,
        "labels_outside_the_set": 2, "correct": 15, "scored": 24, "kept": 20}  # fmt: skip
    assert report["accuracy"] == 15 / 24 and "accuracy 0.6250 (15 of 24" in said
    # Right: blue 0 4 8 20, green 1 5 9 21, red 2 6 22, white 3 7 19 23. Wrong: white, blue, green.
    assert report["label_counts"] == {"blue": 5, "green": 5, "red": 3, "white": 5, "purple": 2}
    assert report["cost"]["total_tokens"] == 230 and report["cost"]["prompt_tokens"] == 7 * 23
    assert report["cost"]["retries"] == 1 and report["model"] == "m"
    assert report["prompt_sha256"] == room.log()[0]["prompt_sha256"]
    assert report["prompt_sha256"][:12] in said

    derived, log = room.out.read_bytes(), room.raw.read_bytes()
    for keep, rows in {"all": 23, "correct": 15, "parsed": 20}.items():
        room.out.unlink()
        room.ask(None, "--parse-only", "--keep", keep)  # the server is gone
        assert len(read_jsonl(room.out)) == rows
    assert room.out.read_bytes() == derived and room.raw.read_bytes() == log
    rows = read_jsonl(room.out)
    assert rows[1] == {"id": "c1", "input": question(1), "label": "green", "teacher_label": "green",
                       "rationale": "Because people say that grass looks green."}  # fmt: skip
    assert len(load_dataset(str(room.folder), "train", rationales=[str(room.out)])) == 24

    with Server() as server:
        assert server.url != url
        room.ask(server, "--retry", "truncated,unparsed", status=3)
        assert sorted(map(number, server.asked())) == [15, 16, 17]
        room.ask(server, "--retry", "failed")
        assert number(server.seen[-1].question) == 18 and len(server.seen) == 4
    assert room.report()["correct"] == 19 and room.report()["cost"]["total_tokens"] == 270


@pytest.mark.parametrize("words, parts", [
    ("--samples 0", ["--samples 0"]), ("--concurrency 0", ["--concurrency 0"]),
    ("--timeout 0", ["--timeout"]), ("--timeout nan", ["nan"]), ("--temperature -1", ["-1"]),
    ("--retry lost", ["'lost'", "truncated,failed,unparsed"]), ("--limit 0", ["--limit 0"]),
    ("--shots 3", ["--shots 3", "2"]), ("--model ", ["--model"]), ("--max-retries -1", ["-1"]),
    ("--dataset imdb", ["'imdb'"]), ("--out /proc/none/x", ["/proc/none"]),
])  # fmt: skip
def test_mistakes_are_told_in_a_line(room, words, parts):
    with Server() as server:
        said = room.ask(server, *words.split(" "), status=2).err
    assert all(part in said for part in parts) and said.count("\n") == 1 and not server.seen


@pytest.mark.parametrize("name, split, accuracy", [
    ("svamp", "train", "0.7350"), ("svamp", "test", "0.7400"),
    ("cqa", "train", "0.7426"), ("cqa", "test", "0.7723"),
])  # fmt: skip
def test_released_completions_score_as_published(name, split, accuracy, tmp_path, capsys):
    if not REAL.exists():
        pytest.skip("the real data is not here")
    words = ["--completions", "palm", "--dataset", name, "--split", split, "--data-root", str(REAL)]
    assert teacher.main([*words, "--out", str(tmp_path / "palm")]) == 0
    assert f"accuracy {accuracy} " in capsys.readouterr().out
    report = json.loads((tmp_path / "palm.report.json").read_text())
    assert f"{report['accuracy']:.4f}" == accuracy
    assert report["completions"] == "palm" and report["unparsed"] < report["scored"] / 10
