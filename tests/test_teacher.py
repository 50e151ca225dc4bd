"""The teacher against a real and hostile HTTP server (server.py). The oracle is what that server
was asked and answered, and the files on disk."""

import email.utils
import json
import os
import resource
import signal
import subprocess
import threading
import time
from collections import Counter
from types import SimpleNamespace

import pytest
from conftest import REAL, ROOT, command, environment, read_jsonl, run
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
    ("Q: one?\n\nA: Leaves. So the answer is red.\n", 1),  # parted
    ("A: Leaves. So the answer is red.\n", 1),
    (GOOD + "\nQ: two?\n", 4),
    (GOOD + "\nloose text\n", 4),
    (GOOD + "\n# no comment down here\n" + GOOD, 4),
    (GOOD + GOOD, 1),  # no blank line between them
    ("An instruction.\n" + GOOD, 1),
    ("# c\n\n\nQ: one?\nmore?\nA: no answer\n", 6),
    (GOOD + "\nQ: two?\nA: So the answer is red.\n", 5),  # no rationale
    ("Q:\nA: Leaves. So the answer is red.\n", 2),
    (GOOD + "\nQ: two?\nA: Hm. So the answer is purple.\n", 5),
    (GOOD + "\nQ: two?\nA: Hm. So the answer is red. Or: So the answer is blue.\n", 5),
])  # fmt: skip
def test_a_malformed_prompt_is_told_with_its_line(room, text, line):
    (room.folder / "prompt.txt").write_text(text)
    with Server() as server:
        said = room.ask(server, status=2)
    assert f"prompt.txt:{line}: " in said.err and "'A: '" in said.err
    assert not server.seen and not room.raw.exists()


@pytest.mark.parametrize("text", ["# only this\n", "", "Just an instruction.\n"])
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


def test_a_missing_prompt_shows_the_format_which_works(room):
    path = room.folder / "prompt.txt"
    path.unlink()
    said = room.ask(NOBODY, status=2).err
    assert str(path) in said and "--shots 0" in said
    shown = said.split("form:\n")[1].replace("Q: the next ...", "").replace("LABEL", "red")
    path.write_text(shown.replace("BLUE", "red"))
    assert len(teacher.read_prompt(str(room.folder)).shots) == 1


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


def test_zero_shot_labels_may_occur_in_the_marker(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"id": "1", "input": "which?", "label": "a"}\n')
    (tmp_path / "task.json").write_text('{"labels": ["a", "b"]}')
    instruction = teacher.read_prompt(str(tmp_path), shots=0).instruction
    assert instruction.endswith("one of: a, b. Think step by step, then end in this form: "
                                "So the answer is LABEL.")  # fmt: skip


def test_a_pair_is_named():
    prompt = teacher.read_prompt("esnli")
    assert prompt.question(("A man.", "He.")) == "Premise: A man.\nHypothesis: He."
    assert prompt.text(("A man.", "He.")).endswith("Premise: A man.\nHypothesis: He.\nA:")


# ---- The client: where and how -------------------------------------------------------------------


@pytest.mark.parametrize("base, given", [
    *[("/v1", end) for end in ("", "/", "/v1", "/v1/", "/v1/chat/completions", "/v1/completions")],
    ("", ""), ("/api/v1", "/api/v1"), ("/api/v1", "/api"), ("/openai", "/openai"),
    ("/proxy/v1beta/openai", "/proxy/v1beta/openai/"),
])  # fmt: skip
@pytest.mark.parametrize("api", ["chat", "completions"])
def test_every_usual_base_url(room, monkeypatch, base, given, api):
    with Server(base=base) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.root + given)
        room.ask(None, "--model", "m", "--api", api, "--concurrency", 4)
    assert len(room.log()) == 24 and set(server.answered().values()) == {1}
    assert len(server.seen) <= 24 + 4


@pytest.mark.parametrize("url", [
    "localhost:8000", "ftp://h/v1", "http://me:pass1234@h/v1", "http://h/v1?key=pass1234",
    "http://h/a b", "nonsense",
])  # fmt: skip
def test_no_base_url(room, url):
    said = room.ask(None, "--model", "m", "--base-url", url, status=2).err
    assert "http://localhost:8000/v1" in said and "pass1234" not in said


def test_openai_itself_needs_a_key(room):
    assert "OPENAI_API_KEY" in room.ask(None, "--model", "m", status=2).err


def test_a_proxy_of_the_environment_is_used(room, monkeypatch):
    proxied = lambda ask: (200, {}, completion(True, default_answer(ask.question)))  # noqa: E731
    with Server(proxied) as server:
        monkeypatch.setenv("http_proxy", server.root)
        monkeypatch.setenv("no_proxy", "")
        room.ask(None, "--model", "m", "--base-url", "http://teacher.invalid/v1")
    assert {ask.path for ask in server.seen} == {"http://teacher.invalid/v1/chat/completions"}


def test_nobody_there(room):
    with Server() as server:
        pass
    start = time.monotonic()
    assert f"cannot reach {server.url}" in room.ask(server, status=3).err
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("status, body", [
    (404, {"detail": "Not Found"}), (404, "<html>404 Not Found</html>"), (405, ""), (501, ""),
    (404, error("This is not a chat model and thus not supported in the v1/chat/completions "
                "endpoint. Did you mean to use v1/completions?", param="model")),
    (400, error("As of transformers v4.44, default chat template is no longer allowed, so you must "
                "provide a chat template if the tokenizer does not define one.")),
])  # fmt: skip
def test_auto_falls_back_once(room, status, body):
    chat = lambda ask: (status, {}, body) if "chat" in ask.path else None  # noqa: E731
    with Server(chat) as server:
        said = room.ask(server, "--limit", 20, "--concurrency", 4).err
        asked = sum("chat" in ask.path for ask in server.seen)
        room.ask(server)
    assert 1 <= asked <= 4 and said.count("completions API at") == 1
    assert sum("chat" in ask.path for ask in server.seen) == asked, "the log remembers"
    assert set(server.answered().values()) == {1} and len(room.log()) == 24
    assert {line["settings"]["api"] for line in room.log()} == {"completions"}


UNSUPPORTED = "Unsupported parameter: '{}' is not supported with this model."
SWAPS = {
    "max_tokens": error(UNSUPPORTED.format("max_tokens") + " Use 'max_completion_tokens' instead.",
                        param="max_tokens", code="unsupported_parameter"),
    "stop": error(UNSUPPORTED.format("stop"), param="stop", code="unsupported_parameter"),
    "temperature": error("Unsupported value: 'temperature' does not support 0.0 with this model. "
                         "Only the default (1) value is supported.", param="temperature"),
    "seed": error(UNSUPPORTED.format("seed"), param="seed"),
}  # fmt: skip


@pytest.mark.parametrize("refused", [*SWAPS, "all"])
def test_a_refused_parameter_is_dropped_once(room, refused):
    keys = list(SWAPS) if refused == "all" else [refused]

    def reply(ask):
        wrong = [key for key in keys if key in ask.body]
        return (400, {}, SWAPS[wrong[0]]) if wrong else None

    with Server(reply) as server:
        said = room.ask(server, "--seed", 1, "--concurrency", 4).err
    refusals = Counter(sum(key in ask.body for key in keys) for ask in server.seen)
    assert refusals.pop(0) == 24, "with nothing that was refused"
    assert all(n <= 4 for n in refusals.values()) and len(refusals) == len(keys)
    assert len(room.log()) == 24
    body = server.seen[-1].body
    assert not set(keys) & set(body)
    assert ("max_completion_tokens" in body) == ("max_tokens" in keys)
    assert said.count("going on with") == len(keys)
    assert all(SWAPS[key]["error"]["message"] in said for key in keys)


@pytest.mark.parametrize("status, body", [
    (400, error("This model's maximum context length is 4096 tokens.", code="context_length")),
    (422, {"detail": "unprocessable"}), (413, ""), (400, error("max_tokens is too large: 512")),
    (422, "echo"),  # of what was sent, as pydantic does
])  # fmt: skip
def test_one_refused_example_fails_alone(room, status, body):
    def reply(ask):
        said = {"detail": [{"msg": "bad", "input": ask.body}]} if body == "echo" else body
        return (status, {}, said) if number(ask.question) == 5 else None

    with Server(reply) as server:
        said = room.ask(server, status=3)
        assert all({"stop", "temperature"} < ask.body.keys() for ask in server.seen)
        assert "--retry failed" in said.err and room.report()["failed"] == 1
        assert set(server.asked().values()) == {1}, "a refusal is not asked again"
        (line,) = (line for line in room.log() if line["id"] == "c5")
        assert line["completion"] is None and f"HTTP {status}" in line["error"]
        assert len(read_jsonl(room.out)) == 23
        room.ask(server, status=3)
        assert len(server.seen) == 24
        server.reply = lambda ask: None
        room.ask(server, "--retry", "failed")
    assert len(server.seen) == 25 and server.seen[-1].question == question(5)
    assert room.report()["failed"] == 0 and len(read_jsonl(room.out)) == 24
    assert len(room.log()) == 25, "nothing is rewritten"


# ---- The client: when it fails -------------------------------------------------------------------


@pytest.mark.parametrize("kind", FAULTS)
@pytest.mark.parametrize("api", ["chat", "completions"])
def test_a_fault_is_tried_again(room, kind, api):
    with Server(kinds=(kind,), hang=1.5) as server:
        server.fault = lambda ask: kind if ask.attempt == 1 and number(ask.question) < 6 else None
        room.ask(server, "--timeout", 0.7, "--api", api, "--limit", 12)
    assert len(room.log()) == 12 and set(server.answered().values()) == {1}
    assert sorted(line["attempts"] for line in room.log()) == [1] * 6 + [2] * 6
    report = room.report()
    assert report["cost"]["retries"] == 6 and report["accuracy"] == 1


RATE = (
    "Rate limit reached for m on requests per min. Limit: 3 / min. Please try again in 20s. "
    "Please add a payment method to your account to increase your rate limit. Visit "
    "https://platform.openai.com/account/billing to add a payment method."
)


@pytest.mark.parametrize("status, body", [
    (429, error(RATE, type="requests", code="rate_limit_exceeded")),
    (408, ""), (409, ""), (502, "<html>"), (504, ""), (529, error("Overloaded")), (500, ""),
    (200, error("Provider returned error", code=502)), (200, "null"), (200, b"\xff\xfe"),
    (200, {"choices": None}), (200, {"choices": ["text"]}), (200, "[" * 100_000),
    (200, {"choices": [{"message": None}]}), (200, ""),
])  # fmt: skip
def test_other_passing_faults(room, status, body):
    with Server(lambda ask: (status, {}, body) if ask.attempt == 1 else None) as server:
        room.ask(server, "--limit", 3)
    assert [line["attempts"] for line in room.log()] == [2, 2, 2]
    assert all("error" not in line for line in room.log())


@pytest.mark.slow
def test_a_thousand_requests_at_twenty_percent_faults(room):
    make_folder(room.folder, 1000)
    with Server(faults=0.2, seed=1, hang=4) as server:
        process = room.start(server, "--concurrency", 32, "--timeout", 2.5)
        said = process.communicate()
    assert process.returncode == 0, said
    assert {line["id"] for line in room.log()} == {f"c{i}" for i in range(1000)}
    assert len(room.log()) == 1000 == len(read_jsonl(room.out))
    assert set(server.answered().values()) == {1}, "none is asked again after its answer"
    assert len(server.seen) > 1150 and {a.status for a in server.seen} >= set(FAULTS)
    assert sum(line["attempts"] for line in room.log()) == len(server.seen)
    assert room.report()["accuracy"] == 1


@pytest.mark.slow
def test_three_kills_lose_nothing(room):
    make_folder(room.folder, 1000)
    words, paid = ["--concurrency", 32, "--timeout", 2.5], []
    lines = lambda: room.raw.read_bytes().split(b"\n")[:-1] if room.raw.exists() else []  # noqa: E731
    with Server(faults=0.2, seed=2, hang=4, latency=0.02) as server:
        for goal in (200, 450, 700, 1000):
            process = room.start(server, *words)
            if goal < 1000:
                wait_until(lambda: len(lines()) > goal or process.poll() is not None)  # noqa: B023
                process.send_signal(signal.SIGKILL)
            said = process.communicate()
            assert process.returncode == (0 if goal == 1000 else -signal.SIGKILL), said
            paid.append((len(server.seen), {int(json.loads(line)["id"][1:]) for line in lines()}))
    for mark, logged in paid[:3]:
        assert not logged & {number(ask.question) for ask in server.seen[mark:]}
    assert [json.loads(line)["id"] for line in lines()] == [line["id"] for line in room.log()]
    assert Counter(line["id"] for line in room.log()) == {f"c{i}": 1 for i in range(1000)}
    assert sum(server.answered().values()) <= 1000 + 3 * 32, "those in flight at most"
    assert room.report()["accuracy"] == 1


@pytest.mark.parametrize("form", ["seconds", "date"])
@pytest.mark.parametrize("status", [429, 503])
def test_retry_after_is_a_floor_and_429_pauses_all(room, status, form):
    make_folder(room.folder, 60)

    def reply(ask):
        if number(ask.question) == 8 and ask.attempt == 1:
            late = email.utils.formatdate(time.time() + 2, usegmt=True)  # in 1 to 2 seconds
            return status, {"Retry-After": "1" if form == "seconds" else late}, error("Slow")

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


@pytest.mark.parametrize("value", ["inf", "1e300", "Fri, 31 Dec 9999 23:59:59 GMT"])
def test_an_endless_retry_after_can_be_stopped(room, value):
    with Server(lambda ask: (429, {"Retry-After": value}, "")) as server:
        process = room.start(server, "--concurrency", 2)
        wait_until(lambda: server.seen)
        time.sleep(0.3)
        assert process.poll() is None, process.communicate()
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=20)
    assert process.returncode == 3 and "Traceback" not in said[1]


NO_MODEL = "The model `m` does not exist or you do not have access to it."
STOPS = [
    (401, error("Incorrect API key provided: none.", code="invalid_api_key")),
    (402, error("Insufficient credits")), (403, error("Country, region not supported")),
    (403, "<html><h1>Forbidden by the proxy</h1></html>"),
    (404, error(NO_MODEL, code="model_not_found")), (404, {"object": "error", "message": NO_MODEL}),
    (404, error('model "m" not found, try pulling it first')), (404, {"detail": "Not Found"}),
    (400, error("m is not a valid model ID", code=400)),
    (429, error("You exceeded your current quota, please check your plan and billing details.",
                type="insufficient_quota", code="insufficient_quota")),
]  # fmt: skip


@pytest.mark.parametrize("status, body", STOPS)
@pytest.mark.parametrize("before", [0, 4])
def test_a_refusal_for_good_stops_at_once(room, status, body, before):
    with Server() as server:
        if before:
            room.ask(server, "--limit", before)
        log = room.raw.read_bytes() if before else b""
        server.reply = lambda ask: (status, {}, body)
        said = room.ask(server, "--api", "chat", "--concurrency", 4, status=3).err
        assert len(server.seen) - before <= 4 and room.raw.read_bytes() == log
        words = body if isinstance(body, str) else body.get("error", body)
        words = words if isinstance(words, str) else words.get("message", body.get("detail"))
        assert words.replace("<html><h1>", "").replace("</h1></html>", "") in said
        assert f"{24 - before} not asked for" in said and "python teacher.py" in said
        server.reply = lambda ask: None
        room.ask(server)
    assert set(server.answered().values()) == {1} and len(room.log()) == 24


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_refused(room, monkeypatch, status):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-key-0123456789")
    with Server() as other, Server() as server:
        server.reply = lambda ask: (status, {"Location": other.url + "/chat/completions"}, "")
        assert other.url in room.ask(server, status=3).err
    assert not other.seen and len(server.seen) <= 8


def test_exhausted_retries_fail_one(room):
    with Server(lambda ask: (500, {}, "") if number(ask.question) == 3 else None) as server:
        said = room.ask(server, "--max-retries", 2, status=3)
        assert server.asked()[question(3)] == 3 and server.asked()[question(4)] == 1
        assert "1 failed" in said.err and room.report()["failed"] == 1
        (line,) = (line for line in room.log() if line.get("error"))
        assert line["id"] == "c3" and line["attempts"] == 3 and "HTTP 500" in line["error"]


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


@pytest.mark.parametrize("signals", [[signal.SIGINT], [signal.SIGTERM], [signal.SIGINT] * 2])
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


KEYS = ["sk-proj-Secret_Key-0123456789", "sk-proj-Secret_Key-0123456789\n", "sk/a+b/Secret/0123=="]


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("status", [200, 400, 401, 307, 500])
@pytest.mark.parametrize("escaped", [False, True])
def test_the_key_is_nowhere(room, monkeypatch, key, status, escaped):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    key = key.strip()

    def reply(ask):
        """Says the key in all that it says, as a careless gateway would."""
        assert ask.headers["Authorization"] == f"Bearer {key}"
        text = f"Because you said {key}. So the answer is blue."
        good = completion(True, text, finish=key, reasoning=key)
        raw = json.dumps(good | error(text) if status != 200 else good)
        raw = raw.replace("/", "\\/").replace("Secret", "\\u0053ecret") if escaped else raw
        return status, {"X": key, "Location": f"http://h/?{key}"}, raw

    with Server(reply) as server:
        assert key not in json.dumps(room.words(server))
        said = room.ask(server, "--max-retries", 1, "--keep", "all",
                        status=0 if status == 200 else 3)  # fmt: skip
    assert server.seen and key not in said.out + said.err
    for path in room.path.rglob("*"):
        assert path.is_dir() or key not in path.read_text(), path
        assert path.is_dir() or "Secret" not in path.read_text(), path


@pytest.mark.parametrize("key", ["two words", "clé", "a\nb"])
def test_no_key(room, monkeypatch, key):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    said = room.ask(NOBODY, status=2).err
    assert "OPENAI_API_KEY" in said and key not in said


# ---- The client: what answers say ----------------------------------------------------------------

ANSWER, SO = "The sky is blue. So the answer is blue.", "So the answer is blue."
THOUGHT = "Look at the sky."


@pytest.mark.parametrize("content, finish, more, state, rationale", [
    (ANSWER, "stop", {}, "answered", "The sky is blue."),
    (ANSWER, "stop", {"reasoning_content": THOUGHT}, "answered", "The sky is blue."),
    (SO, "stop", {"reasoning_content": THOUGHT}, "answered", THOUGHT),
    (SO, "stop", {"reasoning": THOUGHT}, "answered", THOUGHT),
    (f"<think>\n{THOUGHT}\n</think>\n\n{ANSWER}", "stop", {}, "answered", "The sky is blue."),
    (f"<think>\n{THOUGHT}\n</think>\n\n{SO}", "stop", {}, "answered", THOUGHT),
    (f"{THOUGHT}\n</think>\n\n{SO}", "stop", {}, "answered", THOUGHT),
    (f"<think>{THOUGHT} So the answer is red.</think>{ANSWER}", "stop", {}, "answered",
     "The sky is blue."),
    ([{"type": "text", "text": ANSWER}], "stop", {}, "answered", "The sky is blue."),
    ([{"type": "text", "text": "The sky is blue. "}, {"type": "text", "text": SO}], "stop", {},
     "answered", "The sky is blue."),
    ([{"type": "thinking", "thinking": [{"type": "text", "text": THOUGHT}]},
      {"type": "text", "text": SO}], "stop", {}, "answered", THOUGHT),
    (None, "stop", {"reasoning_content": f"{THOUGHT} {SO}"}, "answered", THOUGHT),
    (f"A: {ANSWER}", "stop", {}, "answered", "The sky is blue."),
    (f"{ANSWER}\n\nQ: What of grass?\nA: Grass is", "length", {}, "answered", "The sky is blue."),
    (ANSWER, "length", {}, "truncated", "The sky is blue."),
    (f"<think>\n{THOUGHT}", "length", {}, "truncated", THOUGHT),
    (None, "length", {}, "truncated", ""),
    ("", "length", {"reasoning": THOUGHT}, "truncated", THOUGHT),
    ("I do not know.", "stop", {}, "unparsed", "I do not know."),
    ("", "stop", {}, "unparsed", ""),
    (None, "stop", {"refusal": "I cannot help."}, "failed", None),
    (None, "content_filter", {}, "failed", None),
])  # fmt: skip
def test_forms_of_an_answer(room, content, finish, more, state, rationale):
    with Server(lambda ask: (200, {}, completion(True, content, finish, **more))) as server:
        room.ask(server, "--limit", 1, status=3 if state == "failed" else 0)
        assert len(server.seen) == 1
        report = room.report()
        assert (state == "answered") == (len(read_jsonl(room.out)) == 1 == report["correct"])
        counts = {key: report[key] for key in ("failed", "truncated", "unparsed")}
        assert counts == {key: int(key == state) for key in counts}
        room.ask(None, "--parse-only", "--keep", "all")
        rows = read_jsonl(room.out)
        assert [row["rationale"] for row in rows] == [rationale] * (state != "failed")
    if state == "failed":
        assert (more.get("refusal") or finish) in room.log()[0]["error"]


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
    failed = where in ("error", "refusal")
    reply = (400, {}, error(bad)) if where == "error" else (200, {}, good)
    with Server(lambda ask: reply) as server:
        room.ask(server, "--limit", 3, status=3 if failed else 0)
    assert len(room.log()) == 3 == len(server.seen)
    room.ask(None, "--parse-only")
    assert len(read_jsonl(room.out)) == 3 * (not failed)


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


@pytest.mark.parametrize("n", [1, 3])
def test_a_log_cut_at_any_byte_of_its_last_line_is_repaired(room, n):
    odd = lambda question: f'"Señor" \\ 😀 {{"id": "\n"}} {ANSWER}'  # noqa: E731
    with Server(answer=odd) as server:
        room.ask(server, "--limit", n)
        whole = room.raw.read_bytes()
        *lines, last = whole.splitlines(keepends=True)
        for cut in range(len(last)):
            room.raw.write_bytes(b"".join(lines) + last[:cut])
            kept = lines + [last] * (cut == len(last) - 1)  # all but the end of line
            assert [r for _, r in teacher.read_log(room.raw)] == [json.loads(k) for k in kept]
            with teacher.Log(room.raw) as log:
                log.append(json.loads(last))
            assert room.raw.read_bytes() == b"".join(kept) + last, cut
        for cut in (0, 1, 20, len(last) // 2, len(last) - 2, len(last) - 1):
            room.raw.write_bytes(b"".join(lines) + last[:cut])
            asked = len(server.seen)
            said = room.ask(server, "--limit", n).out
            assert ("torn last line" in said) == (0 < cut < len(last) - 1)
            assert len(server.seen) - asked == (cut < len(last) - 1)
            assert room.raw.read_bytes().startswith(b"".join(lines)) and len(room.log()) == n


@pytest.mark.parametrize("line", [
    "garbage", "[]", "{}", "", "null", "\0" * 40, '{"id": "c1"}', "half", "no input", "no seconds",
    "settings", "usage", "attempts",
])  # fmt: skip
def test_a_malformed_line_is_told_with_its_place(room, line):
    with Server() as server:
        room.ask(server, "--limit", 3, "--concurrency", 1)
        first, record, last = room.raw.read_text().splitlines()
        change = {"no input": {"input_sha256": None}, "no seconds": {"seconds": None},
                  "settings": {"settings": "chat"}, "usage": {"usage": [7]},
                  "attempts": {"attempts": "1"}}.get(line)  # fmt: skip
        line = json.dumps(json.loads(record) | change) if change else line
        line = record[: len(record) // 2] if line == "half" else line
        room.raw.write_text(f"{first}\n{line}\n{last}\n")
        before = room.raw.read_bytes()
        for words in ((server,), (None, "--parse-only")):
            assert "out.raw.jsonl:2: " in room.ask(*words, status=2).err
        assert room.raw.read_bytes() == before and len(server.seen) == 3


def test_a_file_that_is_no_log(room):
    room.raw.write_text("dear diary")
    with Server() as server:
        assert "no raw log" in room.ask(server, status=2).err
    assert room.raw.read_text() == "dear diary" and not server.seen
    room.raw.unlink()
    assert "out.raw.jsonl" in room.ask(None, "--parse-only", status=2).err


def test_two_processes_exclude_each_other(room):
    with Server(latency=0.3) as server:
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
        assert room.raw.read_bytes().endswith(b"}\n"), "no half a line stays"
        mark, whole = len(server.seen), room.raw.read_bytes().split(b"\n")[:-1]
        room.ask(server)
    again = {f"c{number(ask.question)}" for ask in server.seen[mark:]}
    assert not again & {json.loads(line)["id"] for line in whole} and 3 < len(whole) < 24
    assert len(room.log()) == 24


# ---- What is asked, and what becomes of it -------------------------------------------------------


def test_limit_and_then_the_rest(room):
    with Server() as server:
        room.ask(server, "--limit", 5)
        assert set(server.asked()) == {question(i) for i in range(5)}
        assert room.report()["settled"] == 5
        room.ask(server, "--limit", 5)
        assert len(server.seen) == 5
        room.ask(server)
    assert len(server.seen) == 24 and set(server.answered().values()) == {1}


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
])  # fmt: skip
def test_the_majority(room, answers, chosen):
    answers = [teacher.Answer(word[1:]) if word[0] == "-" else
               teacher.Answer("answered", "", word) for word in answers.split()]  # fmt: skip
    example = load_dataset(str(room.folder), "train")[0]
    assert teacher.vote(str(room.folder), example, answers) is answers[chosen]


def test_equations_of_one_value_are_one_label():
    answers = [teacher.Answer("answered", "", x) for x in ("(3 * 4)", "(3 + 4)", "(4 + 3)")]
    example = teacher.Example("1", "How many?", None)
    assert teacher.vote("svamp", example, answers) is answers[1]


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


def test_the_printed_command_goes_on(room):
    """Also where the run that left something was itself a --retry."""
    with Server(scripted) as server:
        said = room.ask(server, "--retry", "truncated", status=3).err
        words = said.rpartition("python teacher.py ")[2].split()
        server.reply = lambda ask: None
        assert teacher.main(words) == 0
    assert room.report()["failed"] == 0


def test_without_labels_there_is_no_accuracy(room):
    make_folder(room.folder, 6, labels=False)
    with Server() as server:
        assert "accuracy" not in room.ask(server).out
    assert room.report()["accuracy"] is None and len(read_jsonl(room.out)) == 6


def test_derived_files_are_never_half_written(room, monkeypatch):
    with Server() as server:
        room.ask(server, "--limit", 3)
    before = room.out.read_bytes()
    replaced = []

    def replace(beside, path):
        replaced.append((len(read_jsonl(beside)) if path == room.out else 1, path.read_bytes()))
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as m:
        m.setattr(teacher.os, "replace", replace)
        assert "--parse-only" in room.ask(None, "--parse-only", "--keep", "all", status=2).err
    assert replaced == [(3, before)] and room.out.read_bytes() == before
    assert not list(room.path.glob("*.tmp"))


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


def test_the_command_itself(room):
    """Exit status, streams and progress as a user has them."""
    with Server() as server:
        done = run("teacher.py", *room.words(server, "--concurrency", 32))
    assert len(room.log()) == 24 and "24 examples" in done.stdout and done.stderr == ""
    assert threading.active_count() < 40 and os.access(room.out, os.R_OK)
