"""Ask a teacher for rationales and labels: few-shot chain of thought (Section 3.1).

    python teacher.py --dataset svamp --split train --model NAME --base-url URL

Any server that speaks OpenAI's HTTP API will do. This file owns prompts, the client, the raw log
and the report; it knows nothing of torch or training. What flows:

    prompt + example -> request -> NAME.raw.jsonl (append-only, paid for once)
                                   -> NAME.jsonl (examples with answers) and NAME.report.json

The last two are derived from the log, offline and again whenever wanted (--parse-only).

A prompt file is plain text: comments (#) and an instruction at its top, then demonstrations, each
an input after "Q: " and its rationale and answer after "A: ", parted by blank lines.
"""

import sys

if sys.platform == "win32" or sys.version_info < (3, 10):
    sys.exit("error: this program needs Linux or macOS and Python 3.10 or newer")

import argparse
import contextlib
import email.utils
import errno
import functools
import http.client
import itertools
import json
import os
import random
import re
import shlex
import signal
import socket
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data import (
    INVENTED,
    SPLITS,
    TASKS,
    Example,
    Task,
    Text,
    UserError,
    data_files,
    evaluate_arithmetic,
    format_answer,
    get_task,
    is_correct,
    load_dataset,
    lock,
    not_allowed,
    parse_completion,
    sha256,
    write_json,
    write_jsonl,
)

HERE = Path(__file__).parent
OPENAI = "https://api.openai.com/v1"
STOP = ["\nQ:"]  # completions run on into invented questions
BACKOFF, LONGEST = 0.5, 60.0  # seconds before the first retry, and at most; doubled in between
GIVE_UP = 20  # failures in a row, and one more for each worker, that mean the server is the reason
MAX_BODY = 1 << 26  # bytes


# ---- Prompts -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prompt:
    """An instruction, demonstrations (input, answer), and what to call the parts of a pair."""

    instruction: str
    shots: tuple[tuple[str, str], ...]
    names: tuple[str, str] = ("Premise", "Hypothesis")

    def question(self, input: Text) -> str:
        """An input as the demonstrations write theirs: a pair on two lines with their names."""
        if isinstance(input, str):
            return input
        return "\n".join(f"{name}: {part}" for name, part in zip(self.names, input))

    def text(self, input: Text) -> str:
        """All in one text, for the completions API; what follows it is the answer."""
        blocks = [self.instruction] * bool(self.instruction)
        blocks += [f"Q: {question}\nA: {answer}" for question, answer in self.shots]
        return "\n\n".join([*blocks, f"Q: {self.question(input)}\nA:"])

    def turns(self, input: Text) -> list[dict]:
        """Demonstrations as turns of a chat. A small model kept to the form in 39 of 40 answers
        so, in 17 of 40 given one message (README, A teacher without an account)."""
        said = [text for shot in self.shots for text in shot] + [self.question(input)]
        said[0] = f"{self.instruction}\n\n{said[0]}".strip()  # not every model has a system role
        roles = itertools.cycle(("user", "assistant"))
        return [{"role": role, "content": text} for role, text in zip(roles, said)]

    @functools.cached_property
    def sha256(self) -> str:
        """Of all but the input."""
        return sha256(self.text("").encode())


def read_prompt(name: str, shots: int | None = None) -> Prompt:
    """`prompts/NAME.txt`, or a folder's `prompt.txt`: the first `shots` of its demonstrations.

    0 is zero-shot (Limitations; Kojima et al., 2022): the instruction, the label set, the form of
    the answer. UserError with file and line where the form is broken.
    """
    task = get_task(name)
    where = HERE / "prompts" / f"{'svamp' if name == 'asdiv' else name}.txt"
    path = where if name in TASKS else Path(task.folder, "prompt.txt")
    placeholder = "84 / 2" if task.scorer == "arithmetic" else (task.labels or ("LABEL",))[0]
    answer = format_answer(task, "", "(a) CHOICE" if task.choices else placeholder)
    instruction, demonstrations = "Answer the question.", []
    try:
        instruction, demonstrations = _parse_prompt(task, path, answer)
    except FileNotFoundError:
        if shots != 0:
            raise UserError(
                f"{path} does not exist; use --shots 0, or write it, about ten demonstrations in "
                "this form:\n# a comment, not sent\nAn instruction, if you like.\n\n"
                f"Q: an input, one or more lines\nA: its rationale. {answer}\n\nQ: the next ..."
            ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {error}; a prompt is a text file in UTF-8") from None
    if shots == 0:
        labels = f" The answer is one of: {', '.join(task.labels)}." if task.labels else ""
        form = format_answer(task, "", "LABEL") if task.labels else answer
        instruction += f"{labels} Think step by step, then end in this form: {form}"
    elif not demonstrations:
        raise UserError(f"{path} holds no demonstration; it needs some, or use --shots 0")
    if (shots or 0) > len(demonstrations):
        raise UserError(f"--shots {shots}: {path} holds {len(demonstrations)}, allowed 0 to that")
    names = re.fullmatch(r"(\w+): .*\n(\w+): .*", demonstrations[0][0] if demonstrations else "")
    return Prompt(instruction, tuple(demonstrations[:shots]), *([names.groups()] if names else []))


def _parse_prompt(task: Task, path: Path, form: str) -> tuple[str, list[tuple[str, str]]]:
    """(instruction, demonstrations) of a file whose blocks are parted by blank lines."""
    text, instruction, demonstrations = path.read_text("utf-8-sig"), "", []

    def fail(number: int, reason: str) -> None:
        raise UserError(
            f"{path}:{number}: {reason}; a demonstration is 'Q: ' and an input, then "
            f"'A: ' and a rationale ending in {form!r}, then a blank line"
        )

    for block in re.finditer(r"(?:.*\S.*\n?)+", text):
        number = text.count("\n", 0, block.start()) + 1
        start, *parts = re.split(r"^([QA]):", block[0], flags=re.MULTILINE)
        if not demonstrations:
            start = re.sub(r"^#.*\n?", "", start, flags=re.MULTILINE)
        if not parts and not demonstrations:
            instruction = f"{instruction}\n{start.strip()}".strip()
            continue
        if start or parts[::2] != ["Q", "A"]:
            fail(number, f"{(start or block[0])[:60]!r} is not one Q and one A")
        question, answer = parts[1].strip(), parts[3].strip()
        rationale, label = parse_completion(task, answer) or ("", "")
        number += parts[1].count("\n")
        if not question or not rationale:
            fail(number, f"no input before it, or {answer[-60:]!r} is no rationale with an answer")
        if allowed := not_allowed(task, question, label):
            fail(number, f"label {label!r} is not {allowed}")
        demonstrations.append((question, answer))
    return instruction, demonstrations


# ---- The raw log ---------------------------------------------------------------------------------


class Log:
    """`NAME.raw.jsonl`: a line for each final answer or refusal. One process at a time appends."""

    def __init__(self, path: Path):
        self.path, self.guard = path, threading.Lock()
        self.file = lock(path)  # unbuffered
        with open(path, "rb") as file:  # a crash may have torn the last line
            tail = file.seek(0, os.SEEK_END)
            while tail and not _ends_line(file, tail):
                tail -= 1
            file.seek(tail)
            if torn := file.read():
                if not torn.startswith(b'{"id": "'[: len(torn)]):
                    raise UserError(f"{path} is no raw log: it ends in {torn[:60]!r}; give "
                                    "another --out")  # fmt: skip
                if _record(torn) is None:
                    print(f"{path}: a torn last line of {len(torn)} bytes is taken off")
                    self.file.truncate(tail)
                else:
                    self.file.write(b"\n")

    def append(self, record: dict) -> None:
        """Writes one line with one call, so that no crash of ours leaves half of it."""
        line = (json.dumps(record, ensure_ascii=False) + "\n").encode()
        with self.guard:
            size = os.fstat(self.file.fileno()).st_size
            if self.file.write(line) < len(line):  # a full disk takes a part
                self.file.truncate(size)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_) -> None:
        os.fsync(self.file.fileno())
        self.file.close()


def _ends_line(file, position: int) -> bool:
    file.seek(position - 1)
    return file.read(1) == b"\n"


FIELDS = {"id": str, "sample": int, "prompt_sha256": str, "input_sha256": str, "model": str,
          "settings": dict, "completion": str | None, "usage": dict | None, "attempts": int,
          "seconds": int | float, "time": str}  # fmt: skip


def _record(line: bytes) -> dict | None:
    try:
        record = json.loads(line)
        return record if all(isinstance(record[k], kind) for k, kind in FIELDS.items()) else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def read_log(path: Path) -> Iterator[tuple[int, dict]]:
    """(line number, record) of each line. A torn last one is passed over; UserError for others."""
    try:
        file = open(path, "rb")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; it is what teacher.py writes to "
                        "NAME.raw.jsonl, given --out NAME") from None  # fmt: skip
    with file:
        for number, line in enumerate(file, 1):
            if record := _record(line):
                yield number, record
            elif line.endswith(b"\n"):
                raise UserError(
                    f"{path}:{number}: not a line of a raw log: {line[:80]!r}; mend "
                    "or remove it, or give another --out"
                )


# ---- From a log to training data -----------------------------------------------------------------


@dataclass(slots=True)
class Answer:
    """What a log's line says. state: answered, unparsed, truncated or failed."""

    state: str
    rationale: str | None = None
    label: str | None = None


def read_answer(name: str | Task, record: dict) -> Answer:
    """Parses a completion. Of a reasoning model's answer the thoughts (<think>, or the log's
    `reasoning`) count where the answer has no rationale, or nothing, besides."""
    if record.get("error"):
        return Answer("failed")
    text, thoughts = record["completion"] or "", record.get("reasoning") or ""
    before, closed, after = text.rpartition("</think>")  # the opening tag may be the prompt's
    if closed or text.lstrip().startswith("<think>"):
        thoughts, text = (before, after) if closed else (text, "")
        thoughts = thoughts.strip().removeprefix("<think>")
    text = re.sub(r"^\s*A:", "", text).strip()
    found = parse_completion(name, text or thoughts)
    # Cut by length, unless it had long gone on to questions of its own.
    cut = record.get("finish_reason") == "length" and not INVENTED.search(text)
    if found is None:
        return Answer("truncated" if cut else "unparsed", text or thoughts.strip())
    return Answer("truncated" if cut else "answered", found[0] or thoughts.strip(), found[1])


def vote(name: str | Task, example: Example, answers: list[Answer]) -> Answer:
    """The majority's label, and the first rationale that led to it. Equations of one value are one
    label; labels in the set go before others; only whole answers vote, if there are any."""
    votes = [a for a in answers if a.state == "answered"]
    task = get_task(name)
    votes = [a for a in votes if not not_allowed(task, example.input, a.label)] or votes
    if not votes:
        return max(answers, key=lambda a: bool(a.label))
    exact = evaluate_arithmetic if task.scorer == "arithmetic" else str.strip
    values = [exact(a.label) for a in votes]
    return votes[values.index(Counter(values).most_common(1)[0][0])]


def derive(
    name: str, examples: Iterable[Example], answers: dict[str, dict[int, Answer]], keep: str
) -> tuple[list[dict], dict]:
    """(rows of NAME.jsonl, report) of the answers by example id.

    keep: "all" (cut and unparsed ones too, those without a label), "parsed" (whole answers), or
    "correct" (whole and right by the human label). accuracy: right answers among the settled
    examples (a refusal, an unparsed or a cut answer is wrong), the paper's few-shot CoT.
    """
    task, rows, labels = get_task(name), [], Counter()
    states = Counter(answer.state for some in answers.values() for answer in some.values())
    scored = correct = outside = 0
    for example in examples:
        if not (some := answers.get(example.id)):
            continue
        chosen = vote(task, example, [some[sample] for sample in sorted(some)])
        whole = chosen.state == "answered"
        right = (
            whole and example.label is not None
            and is_correct(task, chosen.label, example.label)
        )  # fmt: skip
        scored, correct = scored + (example.label is not None), correct + right
        if whole:
            labels[chosen.label] += 1
            outside += bool(not_allowed(task, example.input, chosen.label))
        if chosen.state != "failed" and {"all": True, "parsed": whole, "correct": right}[keep]:
            rows.append(
                {
                    "id": example.id,
                    "input": example.input,
                    "label": example.label,
                    "rationale": chosen.rationale,
                    "teacher_label": chosen.label,
                }
            )
    return rows, {
        "settled": sum(map(len, answers.values())),
        "answered": sum(states.values()) - states["failed"],
        **{state: states[state] for state in ("failed", "truncated", "unparsed")},
        "labels_outside_the_set": outside,
        "label_counts": dict(labels.most_common(20)),
        "accuracy": correct / scored if scored else None,
        "correct": correct,
        "scored": scored,
        "kept": len(rows),
        "keep": keep,
    }


# ---- The client ----------------------------------------------------------------------------------


class Stop(Exception):
    """The server refuses for good, or a limit is reached: nothing more is asked."""


class Retry(Exception):
    """No answer this time. `after` seconds at least, everybody where `shared`."""

    def __init__(self, reason: str, after: float = 0.0, shared: bool = False):
        super().__init__(reason)
        self.after, self.shared = after, shared


class Refusal(Exception):
    """A 4xx that says no to this request as it is."""

    def __init__(self, status: int, words: str, told: str):
        super().__init__(words)
        self.status, self.told = status, told


@dataclass(frozen=True)
class Dialect:
    """How the server wants to be spoken to, learnt from its refusals."""

    url: str
    api: str  # chat or completions
    limit: str = "max_tokens"  # or max_completion_tokens
    without: frozenset[str] = frozenset()  # parameters that it refused


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirected POST becomes a GET, and takes the key to another host: an error instead."""

    def redirect_request(self, *_) -> None:
        return None


def base_urls(url: str) -> list[str]:
    """Where the API may lie: what is given, with or without /v1; UserError for no URL."""
    parts = re.fullmatch(r"(https?://)(\[[0-9a-fA-F:]+\]|[\w.-]+)(:\d+)?(/[!-~]*)?", url.strip())
    if not parts or re.search(r"[@?#]", parts[4] or ""):
        raise UserError("--base-url must be like http://localhost:8000/v1, without a password or "
                        "a query in it; a key comes from OPENAI_API_KEY")  # fmt: skip
    path = re.sub(r"/(chat/)?completions$", "", (parts[4] or "").rstrip("/")).rstrip("/")
    versioned = re.search(r"/v\d\w*(/|$)", path)
    paths = [path] if versioned else [path, path + "/v1"] if path else ["/v1", ""]
    return [f"{parts[1]}{parts[2]}{parts[3] or ''}{path}" for path in paths]


UNKNOWN_MODEL = re.compile(
    r"model_not_found|model\b.{0,80}(does not exist|not exist|not found)"
    r"|(unknown|invalid|no such|not a valid) model", re.IGNORECASE | re.DOTALL)  # fmt: skip
# Not the word billing, which ordinary rate limits name too.
NO_QUOTA = re.compile(r"insufficient_quota|billing_hard_limit|(credit|insufficient) balance",
                      re.IGNORECASE)  # fmt: skip
NO_CHAT = re.compile(r"chat.template|not a chat model|v1/completions", re.IGNORECASE)


class Client:
    """Asks for the answers of (example, sample) jobs, many at a time, and logs each final one."""

    def __init__(self, args: argparse.Namespace, prompt: Prompt):
        self.args, self.prompt = args, prompt
        self.key = (os.environ.get("OPENAI_API_KEY") or "").strip()
        if not self.key.isascii() or not self.key.isprintable() or " " in self.key:
            raise UserError("OPENAI_API_KEY holds a space or another character that no key has")
        urls = base_urls(args.base_url or os.environ.get("OPENAI_BASE_URL") or OPENAI)
        if not self.key and urls[0] == OPENAI:
            raise UserError(
                "OPENAI_API_KEY is not set and OpenAI's own server needs one; set it, "
                "or give another server with --base-url or OPENAI_BASE_URL"
            )
        apis = ["chat", "completions"] if args.api == "auto" else [args.api]
        self.routes = [(url, api) for api in apis for url in urls]
        self.dialect = Dialect(*self.routes[0])
        self.opener = urllib.request.build_opener(NoRedirect)  # proxies, TLS: Python's defaults
        self.stopping, self.reason = threading.Event(), ""
        self.guard, self.pause_until = threading.RLock(), 0.0
        self.answered = self.failed = self.in_a_row = 0
        self.tokens, self.said = 0, set()

    # -- one request

    def body(self, dialect: Dialect, example: Example, sample: int) -> dict:
        """The JSON of a request."""
        args = self.args
        body = {"model": args.model, dialect.limit: args.max_tokens, "stop": STOP,
                "temperature": args.temperature}  # fmt: skip
        if args.seed is not None:
            body["seed"] = args.seed + sample
        body = {k: v for k, v in body.items() if k not in dialect.without}
        if dialect.api == "chat":
            return body | {"messages": self.prompt.turns(example.input)}
        return body | {"prompt": self.prompt.text(example.input)}

    def post(self, dialect: Dialect, body: dict) -> dict:
        """The JSON object that the server answers. Raises Stop, Retry or Refusal."""
        path = "/chat/completions" if dialect.api == "chat" else "/completions"
        headers = {"Content-Type": "application/json", "User-Agent": "dsbs"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        request = urllib.request.Request(dialect.url + path, json.dumps(body).encode(), headers)
        deadline = time.monotonic() + self.args.timeout
        raw, status, after = b"", 200, None
        try:
            try:
                response = self.opener.open(request, timeout=self.args.timeout)
            except urllib.error.HTTPError as error:
                response, status = error, error.code
                after = error.headers.get("Retry-After")
            with response:
                while part := response.read1(1 << 16):
                    raw += part
                    if time.monotonic() > deadline or len(raw) > MAX_BODY:
                        raise TimeoutError("the answer was too slow or too long")
        except (OSError, http.client.HTTPException) as error:
            self.unreachable(dialect, error)
        except (ValueError, OverflowError) as error:
            raise Stop(f"{dialect.url} is no address: {error}") from None
        text = raw.decode("utf-8", "replace")
        try:
            value = self.clean(json.loads(text))
        except (ValueError, RecursionError):
            value = None
        error = value.get("error") if isinstance(value, dict) else None
        if status == 200 and error:  # some gateways send errors so
            code = error.get("code") if isinstance(error, dict) else None
            status = code if isinstance(code, int) and code >= 400 else 500
        if status == 200:
            if not isinstance(value, dict):
                raise Retry("an answer that is not a JSON object")
            return value
        told = complaint(value)
        words = told or self.clean(re.sub(r"<[^>]*>|\s+", " ", text)).strip()
        words = f"HTTP {status}: {words[:300] or 'no words'}"
        if 300 <= status < 400:
            place = self.clean(response.headers.get("Location") or "nowhere")
            raise Stop(f"{words}; {dialect.url} redirects to {place}: give that as --base-url")
        if (
            status in (401, 402, 403)
            or (status in (400, 404) and UNKNOWN_MODEL.search(told))
            or (status == 429 and NO_QUOTA.search(told))
        ):
            raise Stop(words)
        if status in (408, 409, 425, 429) or (status >= 500 and status != 501):
            raise Retry(words, retry_after(after), shared=status == 429)
        raise Refusal(status, words, told)

    def clean(self, value: Any) -> Any:
        """What a server sent, without the key, should it echo it, and without half characters."""
        if isinstance(value, str):
            value = value.encode("utf-8", "replace").decode()
            return value.replace(self.key, "[key]") if len(self.key) > 7 else value
        if isinstance(value, list):
            return [self.clean(part) for part in value]
        if isinstance(value, dict):
            return {self.clean(key): self.clean(part) for key, part in value.items()}
        return value

    def unreachable(self, dialect: Dialect, error: Exception) -> None:
        """A broken connection may come back; one that never was is a mistake."""
        cause = getattr(error, "reason", error)
        words = f"{type(cause).__name__}: {cause}"
        if isinstance(cause, ssl.SSLCertVerificationError) or (
            isinstance(cause, ConnectionRefusedError | socket.gaierror)
            and not (self.answered or self.said)
        ):
            raise Stop(f"cannot reach {dialect.url}: {words}") from None
        raise Retry(words) from None

    def adapt(self, dialect: Dialect, refusal: Refusal) -> bool:
        """Speaks otherwise after a refusal that asks for it; False if it does not."""
        told, known = refusal.told, {"stop", "temperature", "seed"} - dialect.without
        named = {key for key in known if re.search(rf"""["'`]{key}["'`]""", told)}
        with self.guard:
            if self.dialect != dialect:
                return True  # another worker was told the same
            if refusal.status in (404, 405, 501) or NO_CHAT.search(told):
                place = self.routes.index((dialect.url, dialect.api)) + 1
                if self.answered or place == len(self.routes):
                    raise Stop(f"{refusal} ({dialect.url}, {dialect.api} API)")
                url, api = self.routes[place]
                new, what = replace(dialect, url=url, api=api), f"the {api} API at {url}"
            elif "max_completion_tokens" in told and dialect.limit == "max_tokens":
                new = replace(dialect, limit="max_completion_tokens")
                what = "max_completion_tokens instead of max_tokens"
            elif named:
                new = replace(dialect, without=dialect.without | named)
                what = f"without {', '.join(sorted(named))}"
            else:
                return False
            self.dialect = new
        say(f"{refusal}; going on with: {what}")
        return True

    # -- one job

    def settle(self, example: Example, sample: int) -> dict | None:
        """The line to log: an answer, or a final refusal. None if it is left: all stops."""
        tries, attempts, seen = 0, 0, -1
        while True:
            while (rest := self.pause_until - time.monotonic()) > 0:
                self.stopping.wait(rest + random.uniform(0, 0.05))
                if self.stopping.is_set():
                    return None
            if self.stopping.is_set():
                return None
            dialect, attempts, start = self.dialect, attempts + 1, time.monotonic()
            body = self.body(dialect, example, sample)
            try:
                answer = read_reply(self.post(dialect, body), body)
                break
            except Refusal as refusal:
                if self.adapt(dialect, refusal):
                    continue
                answer = {"completion": None, "error": str(refusal)}
                self.say_once(f"{refusal}; {example.id!r} is left out")
                break
            except Retry as retry:
                # A rate limit that lets others through is not this request's fault.
                tries += not (retry.shared and self.answered > seen >= 0)
                seen = self.answered
                if tries > self.args.max_retries:
                    answer = {"completion": None, "error": f"after {attempts} attempts: {retry}"}
                    break
                self.say_once(f"{retry}; trying again")
                delay = min(LONGEST, BACKOFF * 2 ** max(0, tries - 1)) * random.uniform(0.5, 1)
                delay = max(delay, retry.after)
                if retry.shared:
                    self.pause_until = max(self.pause_until, time.monotonic() + delay)
                else:
                    self.stopping.wait(delay)
        settings = {"api": dialect.api, "temperature": self.args.temperature,
                    "seed": self.args.seed, "max_tokens": self.args.max_tokens}  # fmt: skip
        settings |= {"refused": sorted(dialect.without)} if dialect.without else {}
        return {
            "id": example.id, "sample": sample, "prompt_sha256": self.prompt.sha256,
            "input_sha256": input_sha256(example), "model": self.args.model, "settings": settings,
            "usage": None, **answer, "attempts": attempts,
            "seconds": round(time.monotonic() - start, 3),
            "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }  # fmt: skip

    def say_once(self, words: str) -> None:
        """The first time that something of this kind is said."""
        kind = re.sub(r"\d+", "N", words)[:60]
        if kind not in self.said:
            self.said.add(kind)
            say(words)

    # -- all jobs

    def run(self, jobs: Iterable[tuple[Example, int]], log: Log, bar: tqdm) -> str:
        """Asks until the jobs are done or something stops it; why, if something did."""
        jobs = iter(jobs)

        def work() -> None:
            try:
                while True:
                    with self.guard:
                        if self.tokens >= (self.args.max_tokens_total or float("inf")):
                            self.stop(f"--max-tokens-total {self.args.max_tokens_total} is reached")
                        job = None if self.stopping.is_set() else next(jobs, None)
                    record = job and self.settle(*job)
                    if record is None:
                        return
                    log.append(record)
                    self.count(record, bar)
            except (Stop, OSError) as error:
                self.stop(str(error))
            except BaseException:
                self.stopping.set()
                raise

        with ThreadPoolExecutor(self.args.concurrency) as pool:
            workers = [pool.submit(work) for _ in range(self.args.concurrency)]
        for worker in workers:
            worker.result()  # a mistake of ours is not to be hidden
        return self.reason

    @contextlib.contextmanager
    def signals(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM finish what is in flight; the second Ctrl-C does not wait for it."""

        def note(number: int, _) -> None:
            if self.stopping.is_set() and number == signal.SIGINT:
                os._exit(130)
            self.stop(f"stopped by {signal.Signals(number).name}")

        before = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def stop(self, reason: str) -> None:
        """Nothing new is asked from now on; the first reason stands."""
        self.reason = self.reason or reason
        self.stopping.set()

    def count(self, record: dict, bar: tqdm) -> None:
        """Keeps the totals that limits are checked against."""
        with self.guard:
            failed = bool(record.get("error"))
            self.answered, self.failed = self.answered + (not failed), self.failed + failed
            self.in_a_row = self.in_a_row + 1 if failed else 0
            self.tokens += total_tokens(record)
            bar.set_postfix(failed=self.failed, tokens=self.tokens, refresh=False)
            bar.update()
        if self.in_a_row > GIVE_UP + self.args.concurrency:
            self.stop(f"{self.in_a_row} failures in a row, the last: {record['error']}")


def retry_after(value: str | None) -> float:
    """Seconds of a Retry-After header, which may be a date; 0 for none, at most a day."""
    try:
        seconds = float(value or 0)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError):
            seconds = 0.0
    return min(86_400.0, seconds) if seconds > 0 else 0.0  # and 0 for NaN


def complaint(value: Any) -> str:
    """What an error body says, without the request that some servers send back in it: message,
    quoted parameter, code and type; FastAPI's `detail` likewise."""
    error = value.get("error", value) if isinstance(value, dict) else {}
    if not isinstance(error, dict):
        return str(error)
    details = error.get("detail")
    if isinstance(details, list):
        details = [d for d in details if isinstance(d, dict)]
        return "; ".join(f"{d.get('msg')}: {d.get('loc')}" for d in details)
    said = [error.get("message") or details, *(error.get(k) for k in ("code", "type"))]
    quoted = [f"{error['param']!r}"] if isinstance(error.get("param"), str) else []
    return " ".join([part for part in said if isinstance(part, str)] + quoted)


def read_reply(reply: dict, body: dict) -> dict:
    """completion, reasoning if any, finish_reason and usage of a reply; Retry if it has none."""
    try:
        choice = reply["choices"][0]
        message = choice["message"] if "messages" in body else {"content": choice["text"]}
        content, finish = message.get("content"), choice.get("finish_reason")
    except (KeyError, IndexError, TypeError, AttributeError):
        raise Retry("an answer without choices") from None
    parts = content if isinstance(content, list) else []
    thoughts = [message.get("reasoning_content") or message.get("reasoning")]
    thoughts += [part.get("thinking") for part in parts if isinstance(part, dict)]
    reasoning, refused = flat(thoughts), flat(message.get("refusal"))
    finish = finish if isinstance(finish, str) else None
    answer = {"completion": flat(content), "finish_reason": finish}
    if reasoning:
        answer["reasoning"] = reasoning
    if content is None and (refused or finish == "content_filter"):
        answer = {"completion": None, "finish_reason": finish, "error": refused or finish}
    elif content is None and not reasoning and finish != "length":
        raise Retry("an answer with null content")
    usage = reply.get("usage") if isinstance(reply.get("usage"), dict) else {}
    usage = {key: n for key, n in usage.items() if isinstance(n, int)}
    if "total_tokens" not in usage:
        asked = body.get("prompt") or "".join(turn["content"] for turn in body["messages"])
        total = (len(asked) + len(answer["completion"] or "") + len(reasoning)) // 4
        usage = {"total_tokens": total, "estimated": 1}  # by four characters a token
    return answer | {"usage": usage}


def flat(content: object) -> str:
    """The text of a message's content, which may be a list of parts."""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "".join(map(flat, content))
    return flat(content.get("text")) if isinstance(content, dict) else ""


def total_tokens(record: dict) -> int:
    """What a line cost, as the server said or as estimated."""
    return (record.get("usage") or {}).get("total_tokens") or 0


def input_sha256(example: Example) -> str:
    """Tells whether an id still stands for the same input."""
    text = example.input if isinstance(example.input, str) else "\n".join(example.input)
    return sha256(text.encode())


def say(words: str) -> None:
    """Past the progress bar."""
    tqdm.write(words, file=sys.stderr)


# ---- Command line --------------------------------------------------------------------------------


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """All flags; the key comes from the environment and is none of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--dataset", required=True, help=f"{', '.join(TASKS)}, or a folder of *.jsonl")
    add("--split", default="train", choices=SPLITS)
    add("--data-root", default="datasets", help="where the benchmarks lie; default datasets")
    add("--out", help="NAME of NAME.raw.jsonl, NAME.jsonl, NAME.report.json; default "
        "teacher/DATASET.SPLIT")  # fmt: skip
    add("--model", help="what the server calls it")
    add("--base-url", help="default: OPENAI_BASE_URL, or OpenAI's own; the key is OPENAI_API_KEY")
    add("--api", default="auto", choices=("auto", "chat", "completions"))
    add("--shots", type=int, help="demonstrations; default all, 0 is zero-shot")
    add("--limit", type=int, help="ask for the first so many examples only")
    add("--samples", type=int, default=1, help="answers an example; the majority's label counts")
    add("--temperature", type=float, help="default 0, or 0.7 with several samples")
    add("--seed", type=int, help="passed on; sample k gets seed + k")
    add("--max-tokens", type=int, default=512, help="of one answer; default 512")
    add("--max-tokens-total", type=int, help="stop when the log has cost so many, prompts included")
    add("--concurrency", type=int, default=8, help="requests in flight; default 8")
    add("--max-retries", type=int, default=8, help="of one request; default 8")
    add("--timeout", type=float, default=300, help="seconds for one request; default 300")
    add("--retry", default="", help="ask again: truncated,failed,unparsed (one or several)")
    add(
        "--keep",
        default="parsed",
        choices=("all", "parsed", "correct"),
        help="which answers NAME.jsonl holds; default parsed: whole ones with a label",
    )
    add("--parse-only", action="store_true", help="derive the files from the log, offline")
    add("--completions", choices=("palm", "neox"), help="report on released completions, offline")
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> None:
    """Fills in what follows from the rest; UserError for what cannot be."""
    lowest = {"shots": 0, "limit": 1, "samples": 1, "max_tokens": 1, "max_tokens_total": 1,
              "concurrency": 1, "max_retries": 0, "timeout": 0.001, "temperature": 0}  # fmt: skip
    for name, least in lowest.items():
        value = getattr(args, name)
        if value is not None and not least <= value < float("inf"):
            raise UserError(f"--{name.replace('_', '-')} {value}: must be at least {least}")
    args.retry = set(filter(None, args.retry.split(",")))
    if wrong := args.retry - {"truncated", "failed", "unparsed"}:
        raise UserError(f"--retry {wrong.pop()!r} is unknown; allowed: truncated,failed,unparsed")
    if args.temperature is None:
        args.temperature = 0.7 if args.samples > 1 else 0.0
    if args.samples > 1 and args.temperature == 0:
        raise UserError(f"--samples {args.samples} would be the same at --temperature 0; allowed: "
                        "above 0, such as 0.7")  # fmt: skip
    if not (args.model or args.parse_only or args.completions):
        raise UserError("--model is missing; give the name that the server knows")
    if args.out or not args.completions:
        args.out = args.out or f"teacher/{Path(args.dataset).name}.{args.split}"
        args.out = re.sub(r"(\.raw)?\.jsonl$", "", args.out)


def read_answers(
    path: Path, name: str, examples: list[Example]
) -> tuple[dict[str, dict[int, Answer]], dict]:
    """(answers by id and sample, facts) of a log; a later line for the same example and sample
    replaces an earlier one. facts: how they were asked for, and what all the lines cost."""
    inputs = {example.id: input_sha256(example) for example in examples}
    answers, cost, asked, times = {}, Counter(), {}, (None, None)
    task = get_task(name)
    for number, record in read_log(path):
        id = record["id"]
        if record["input_sha256"] != inputs.get(id):
            raise UserError(
                f"{path}:{number}: {id!r} stands for another input than in this split of {name}; "
                "if the data changed, give another --out"
            )
        answer, some = read_answer(task, record), answers.setdefault(id, {})
        if answer.state != "failed" or record["sample"] not in some:  # else the old one stands
            some[record["sample"]] = answer
        for key in ("prompt_tokens", "completion_tokens", "total_tokens"):
            cost[key] += (record.get("usage") or {}).get(key) or 0
        cost["retries"] += record["attempts"] - 1
        cost["request_seconds"] += record["seconds"]
        times = (times[0] if asked else record["time"], record["time"])
        asked = asked if asked and record.get("error") else record
    asked = {key: asked.get(key) for key in ("model", "prompt_sha256", "settings")}
    return answers, {**asked, "first": times[0], "last": times[1], "cost": dict(cost)}


def annotate(args: argparse.Namespace, examples: list[Example], path: Path) -> str:
    """Asks for what the log lacks; returns why it stopped early, if it did."""
    prompt = read_prompt(args.dataset, args.shots)
    client = Client(args, prompt)
    with Log(path) as log:
        answers, facts = read_answers(path, args.dataset, examples)
        if answers:  # only lines of one kind ever come into a log: the last tells
            before = {**facts, **facts["settings"]}
            now = {"prompt_sha256": prompt.sha256, "model": args.model,
                   "temperature": args.temperature, "seed": args.seed}  # fmt: skip
            now |= {} if args.api == "auto" else {"api": args.api}
            changed = [f"{k} {before[k]} there, {now[k]} here" for k in now if now[k] != before[k]]
            if changed:
                raise UserError(
                    f"{path} was asked for otherwise: {'; '.join(changed)}; give another --out"
                )
            client.routes = [r for r in client.routes if r[1] == before["api"]]
            client.dialect = Dialect(*client.routes[0])
        client.tokens = facts["cost"].get("total_tokens", 0)
        done = {(id, sample) for id, some in answers.items() for sample, answer in some.items()
                if answer.state not in args.retry}  # fmt: skip
        del answers  # half a million rationales are not needed while asking
        jobs = [
            (example, sample) for example in examples[: args.limit]
            for sample in range(args.samples) if (example.id, sample) not in done
        ]  # fmt: skip
        total = len(examples[: args.limit]) * args.samples
        print(
            f"prompt {prompt.sha256[:12]} with {len(prompt.shots)} demonstrations; asking "
            f"{args.model} for {len(jobs):,} of {total:,} answers",
            flush=True,
        )
        with (
            client.signals(),
            tqdm(total=total, initial=total - len(jobs), unit="", disable=None) as bar,
        ):
            return client.run(jobs, log, bar)


def show(report: dict) -> None:
    """The report, in a few lines."""
    r, cost = report, report.get("cost", {})
    share = lambda n: f"{n:,} ({n / max(1, r['settled']):.2%})"  # noqa: E731
    print(
        f"answered {r['answered']:,}, of {r['examples']:,} examples; "
        f"failed {share(r['failed'])}, truncated {share(r['truncated'])}, unparsed "
        f"{share(r['unparsed'])}, labels outside the set {r['labels_outside_the_set']:,}"
    )
    if cost:
        print(
            f"cost {cost['total_tokens']:,} tokens ({cost['prompt_tokens']:,} prompt, "
            f"{cost['completion_tokens']:,} completion), {cost['retries']:,} retries"
        )
    if len(r["label_counts"]) <= 10:
        print(f"labels: {', '.join(f'{k} {v:,}' for k, v in r['label_counts'].items())}")
    if r["accuracy"] is not None:
        print(f"accuracy {r['accuracy']:.4f} ({r['correct']:,} of {r['scored']:,}, human labels)")


def released(args: argparse.Namespace) -> tuple[list[Example], dict, dict]:
    """(examples, answers, facts) of released completions: over train's whole file, as their
    figures are, where our valid is cut out of it."""
    name, root, counts = args.dataset, args.data_root, Counter()
    splits, examples, answers = [args.split], [], {}
    if args.split == "train" and data_files(name, "train", root) == data_files(name, "valid", root):
        splits.append("valid")
    for split in splits:
        examples += load_dataset(name, split, root, args.completions, counts)
    for e in examples:
        state = "answered" if e.teacher_label else "unparsed"
        answers[e.id] = {0: Answer(state, e.rationale, e.teacher_label)}
    outside = counts["teacher_labels_dropped"]  # by the loader: parsed, but of no use
    unparsed = sum(not e.teacher_label for e in examples) - outside
    return (
        examples,
        answers,
        {
            "completions": args.completions,
            "splits": splits,
            "unparsed": unparsed,
            "labels_outside_the_set": outside,
        },
    )


def run(args: argparse.Namespace, words: list[str]) -> int:
    """Annotates, or derives what is asked for; the exit status."""
    check(args)
    examples, why = load_dataset(args.dataset, args.split, args.data_root), ""
    if args.completions:
        examples, answers, facts = released(args)
    else:
        if not args.parse_only:
            why = annotate(args, examples, Path(args.out + ".raw.jsonl"))
        answers, facts = read_answers(Path(args.out + ".raw.jsonl"), args.dataset, examples)
    rows, report = derive(args.dataset, examples, answers, args.keep)
    about = {"dataset": args.dataset, "split": args.split, "examples": len(examples)}
    report = {**about, **report, **facts}
    show(report)
    if args.out:
        try:
            write_jsonl(Path(args.out + ".jsonl"), rows)
            write_json(Path(args.out + ".report.json"), report)
        except OSError as error:
            raise UserError(f"{args.out}.jsonl: {error.strerror}; the log is complete: free some "
                            "space and use --parse-only") from None  # fmt: skip
        print(f"{len(rows):,} examples (--keep {args.keep}) in {args.out}.jsonl, report in "
              f"{args.out}.report.json")  # fmt: skip
    if args.parse_only or args.completions:
        return 0
    asked = [
        answers.get(example.id, {}).get(sample)
        for example in examples[: args.limit] for sample in range(args.samples)
    ]  # fmt: skip
    left, failed = asked.count(None), sum(a is not None and a.state == "failed" for a in asked)
    if left or failed:
        retry = (args.retry if why else set()) | ({"failed"} if failed else set())
        again = re.sub(r" --retry[ =]\S+", "", " " + shlex.join(words)).strip()
        again += f" --retry {','.join(sorted(retry))}" if retry else ""
        print(f"{left:,} not asked for, {failed:,} failed{': ' * bool(why)}{why}; to go on:\n  "
              f"python teacher.py {again}", file=sys.stderr)  # fmt: skip
    return 3 if left or failed else 0


def main(argv: list[str] | None = None) -> int:
    """Exit status 0 when all that was asked for is answered, 3 when something is left or was
    refused for good, 2 for a user's mistake."""
    words = sys.argv[1:] if argv is None else argv
    try:
        return run(parse_args(words), words)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # while nothing is asked
        return 130


if __name__ == "__main__":
    sys.exit(main())
