"""Ask a teacher for rationales and labels: few-shot chain of thought (Section 3.1).

    python teacher.py --dataset svamp --split train --model NAME --base-url URL

This file owns prompts, the client for servers that speak OpenAI's HTTP API, the raw log and the
report. It knows nothing of torch or training. The data flow:

    prompt + example -> request -> NAME.raw.jsonl (append-only, paid for once)
                                   -> NAME.jsonl (examples with answers) and NAME.report.json

The last two are derived from the log, offline and as often as you like (--parse-only).

Servers differ, and the client does not guess what they mean. It has three rules:
1. A request holds few keys, and --body adds, changes or removes any of them.
2. The way an answer ended decides what it is (ENDINGS).
3. Every reply that was paid for is appended to the log before it is judged.

A prompt file is plain text: comments (#) and an instruction at the top, then demonstrations, each
an input after "Q: " and its rationale and answer after "A: ", with blank lines between them.
"""

import argparse
import contextlib
import email.utils
import errno
import functools
import heapq
import html
import http.client
import itertools
import json
import os
import queue
import random
import re
import shlex
import signal
import socket
import ssl
import sys
import time
import urllib.error
import urllib.request
import zlib
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tqdm import tqdm

import data
from data import TASKS, Example, Task, Text, UserError, get_task, not_allowed, parse_completion

HERE = Path(__file__).parent
OPENAI = "https://api.openai.com/v1"
STOP = ["\nQ:"]  # completions run on into invented questions
BACKOFF, LONGEST = 0.5, 60.0  # seconds before the first retry, and at most; doubled in between
GIVE_UP = 20  # failures in a row, and one more for each worker, that mean the server is the reason
SAME = 5  # failures with the same words before any answer, which mean the same
UNREADABLE = 3  # replies in a row, before any answer, after which the run stops
MAX_BODY = 1 << 26  # bytes
NOTHING = re.compile(r"(?!)")

# How an answer ended (`finish_reason`, without case) decides what it is. "filtered" is a final
# failure. Any other ending, such as "error" or "abort", means: ask again.
ENDINGS = {
    "whole": "stop eos eos_token end_turn stop_sequence complete",
    "cut": "length max_tokens max_output_tokens model_length model_context_window_exceeded",
    "filtered": "content_filter content_filtered safety recitation prohibited_content blocklist "
    "spii refusal sensitive guardrail_intervened error_toxic",
}
ENDING = {"": "whole"} | {word: end for end, words in ENDINGS.items() for word in words.split()}


def ending_of(finish_reason: object) -> str:
    """whole, cut, filtered or, for all that the table does not know, unknown."""
    return ENDING.get(str(finish_reason or "").lower(), "unknown")


# ---- Prompts -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prompt:
    """An instruction, demonstrations (input, answer), and what to call the parts of a pair."""

    instruction: str
    shots: tuple[tuple[str, str], ...]
    names: tuple[str, ...] = ("Premise", "Hypothesis")

    def question(self, input: Text) -> str:
        """An input as the demonstrations write theirs: a pair on two lines with their names."""
        if isinstance(input, str):
            return input
        return "\n".join(f"{name}: {part}" for name, part in zip(self.names, input))

    def text(self, input: Text) -> str:
        """All in one text, for the completions API; what follows it is the answer."""
        blocks = [self.instruction] if self.instruction else []
        blocks += [f"Q: {question}\nA: {answer}" for question, answer in self.shots]
        return "\n\n".join([*blocks, f"Q: {self.question(input)}\nA:"])

    def turns(self, input: Text) -> list[dict]:
        """The demonstrations as turns of a chat. A small model kept to the form in 39 of 40 answers
        this way, and in 17 of 40 when given one message (README, A teacher)."""
        texts = [text for shot in self.shots for text in shot] + [self.question(input)]
        texts[0] = f"{self.instruction}\n\n{texts[0]}".strip()  # not all models have a system role
        roles = itertools.cycle(("user", "assistant"))
        return [{"role": role, "content": text} for role, text in zip(roles, texts)]

    @functools.cached_property
    def sha256(self) -> str:
        """Of all but the input."""
        return data.sha256(self.text("").encode())


def read_prompt(name: str, shots: int | None = None) -> Prompt:
    """`prompts/NAME.txt`, or a folder's `prompt.txt`: the first `shots` of its demonstrations.

    0 is zero-shot (Limitations; Kojima et al., 2022): the instruction, the label set, the form of
    the answer. UserError with file and line where the form is broken.
    """
    task = get_task(name)
    where = HERE / "prompts" / f"{'svamp' if name == 'asdiv' else name}.txt"
    path = where if name in TASKS else Path(task.folder, "prompt.txt")
    placeholder = "84 / 2" if task.scorer == "arithmetic" else (task.labels or ("LABEL",))[0]
    answer = data.format_answer(task, "", "(a) CHOICE" if task.choices else placeholder)
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
        form = data.format_answer(task, "", "LABEL") if task.labels else answer
        instruction += f" Write the explanation in your answer.{labels}"
        instruction += f" Think step by step, then end in this form: {form}"
    elif not demonstrations:
        raise UserError(f"{path} holds no demonstration; it needs some, or use --shots 0")
    if (shots or 0) > len(demonstrations):
        raise UserError(f"--shots {shots}: {path} holds {len(demonstrations)}, allowed 0 to that")
    names = re.fullmatch(r"(\w+): .*\n(\w+): .*", demonstrations[0][0] if demonstrations else "")
    used = tuple(demonstrations[:shots])
    return Prompt(instruction, used, names.groups() if names else Prompt.names)


def _parse_prompt(task: Task, path: Path, form: str) -> tuple[str, list[tuple[str, str]]]:
    """(instruction, demonstrations) of a file whose blocks have blank lines between them."""
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
        rationale, label = parse_completion(task, answer, released=False) or ("", "")
        number += parts[1].count("\n")
        if not question or not rationale:
            fail(number, f"no input before it, or {answer[-60:]!r} is no rationale with an answer")
        if allowed := not_allowed(task, question, label):
            fail(number, f"label {label!r} is not {allowed}")
        demonstrations.append((question, answer))
    return instruction, demonstrations


# ---- The raw log ---------------------------------------------------------------------------------


class Log:
    """`NAME.raw.jsonl`: a line for each reply that was paid for and for each final failure. One
    process at a time appends. Nothing is ever rewritten or truncated."""

    def __init__(self, path: Path):
        self.path = path
        self.file = data.lock(path)  # unbuffered
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 1))
            self.torn = file.read() not in (b"", b"\n")  # a crash may have torn the last line

    def append(self, record: dict, secret: re.Pattern = NOTHING) -> None:
        """Writes one line with one call, so that no crash of ours leaves half of it."""
        line = secret.sub("[key]", json.dumps(record, ensure_ascii=False)) + "\n"
        raw = ("\n" * self.torn + line).encode("utf-8", "replace")  # half a surrogate pair: "?"
        if self.file.write(raw) < len(raw):  # a full disk takes a part
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        self.torn = False

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_) -> None:
        os.fsync(self.file.fileno())
        self.file.close()


FIELDS = {"id": str, "sample": int, "prompt_sha256": str, "input_sha256": str, "model": str}
FIELDS |= {"settings": dict, "completion": str | None, "usage": dict | None, "attempts": int}
FIELDS |= {"seconds": int | float, "time": str}


def read_log(path: Path) -> Iterator[tuple[int, dict]]:
    """(line number, record) of each line. The start of a line, which a crash left, is skipped;
    UserError for anything else."""
    try:
        file = open(path, "rb")
    except OSError as error:
        hint = "it is what teacher.py writes to NAME.raw.jsonl, given --out NAME"
        raise UserError(f"{path}: {error.strerror}; {hint}") from None
    with file:
        for number, line in enumerate(file, 1):
            record = read_json(line.decode("utf-8", "replace"))
            with contextlib.suppress(KeyError, TypeError):
                if all(isinstance(record[key], kind) for key, kind in FIELDS.items()):
                    yield number, record
                    continue
            start = b'{"id": "'
            if record is not None or not line.startswith(start[: len(line.rstrip(b"\n")) or 1]):
                raise UserError(
                    f"{path}:{number}: not a line of a raw log: {line[:80]!r}; correct or remove "
                    "it, or give another --out"
                )
            say(f"{path}:{number}: a torn line of {len(line)} bytes is skipped")


# ---- From a log to training data -----------------------------------------------------------------

OPENING, CLOSING = (
    re.compile(rf"[<\[]{slash}(?:think|thinking|thought)[>\]]", re.IGNORECASE)
    for slash in ("", "/")
)


@dataclass(slots=True)
class Answer:
    """What a log's line says. state: answered, unparsed, truncated or failed."""

    state: str
    rationale: str | None = None
    label: str | None = None


def split_thoughts(text: str) -> tuple[str, str]:
    """(thoughts, answer) of a text in which a model thinks aloud: the answer follows the last
    closing tag, and ends where another thought opens that is never closed. The first opening tag
    may be part of the server's own prompt."""
    start = max((tag.end() for tag in CLOSING.finditer(text)), default=0)
    thoughts, answer = text[:start], text[start:]
    if opening := OPENING.search(answer):
        thoughts, answer = thoughts + answer[opening.start() :], answer[: opening.start()]
    return CLOSING.sub("", OPENING.sub("", thoughts)).strip(), answer


def read_answer(name: str | Task, record: dict) -> Answer:
    """Parses a completion. A reasoning model's thoughts (<think>, or the log's `reasoning`) are
    never read for a label. They are the rationale of a whole answer that explains nothing."""
    ending = ending_of(record.get("finish_reason"))
    if record.get("error") or ending not in ("whole", "cut"):
        return Answer("failed")
    thoughts, text = split_thoughts(record["completion"] or "")
    thoughts = thoughts or (record.get("reasoning") or "").strip()
    text = re.sub(r"^\s*A:", "", text).strip()
    found = parse_completion(name, text, released=False)
    # Cut by length, unless it had long gone on to questions of its own.
    cut = ending == "cut" and not data.INVENTED.search(text)
    if found is None:
        return Answer("truncated" if cut else "unparsed", text)
    return (
        Answer("truncated", *found) if cut else Answer("answered", found[0] or thoughts, found[1])
    )


def vote(name: str | Task, example: Example, answers: list[Answer]) -> Answer:
    """The majority's label, and the first rationale that led to it. Equations of one value are one
    label; labels in the set go before others; only whole answers vote, if there are any."""
    votes = [a for a in answers if a.state == "answered"]
    task = get_task(name)
    votes = [a for a in votes if not not_allowed(task, example.input, a.label)] or votes
    if not votes:
        return max(answers, key=lambda a: bool(a.label))
    exact = data.evaluate_arithmetic if task.scorer == "arithmetic" else str.strip
    values = [exact(a.label) for a in votes]
    return votes[values.index(Counter(values).most_common(1)[0][0])]


def derive(
    name: str, examples: Iterable[Example], answers: dict[str, dict[int, Answer]], keep: str
) -> tuple[list[dict], dict]:
    """(rows of NAME.jsonl, report) of the answers by example id.

    keep: "all" (cut and unparsed ones too, those without a label), "parsed" (whole answers), or
    "correct" (whole and right by the human label). accuracy: right answers among the settled
    examples (a failure, an unparsed or a cut answer is wrong), the paper's few-shot CoT.
    """
    task, rows, labels = get_task(name), [], Counter()
    states = Counter(answer.state for some in answers.values() for answer in some.values())
    scored = correct = outside = bare = 0
    for example in (example for example in examples if answers.get(example.id)):
        some = answers[example.id]
        chosen = vote(task, example, [some[sample] for sample in sorted(some)])
        whole, human = chosen.state == "answered", example.label
        right = whole and human is not None and data.is_correct(task, chosen.label, human)
        scored, correct = scored + (human is not None), correct + right
        if whole:
            labels[chosen.label] += 1
            outside += bool(not_allowed(task, example.input, chosen.label))
            bare += not chosen.rationale
        if chosen.state != "failed" and {"all": True, "parsed": whole, "correct": right}[keep]:
            row = {"id": example.id, "input": example.input, "label": human}
            rows.append(row | {"rationale": chosen.rationale, "teacher_label": chosen.label})
    return rows, {
        "settled": sum(map(len, answers.values())),
        "answered": sum(states.values()) - states["failed"],
        **{state: states[state] for state in ("failed", "truncated", "unparsed")},
        "labels_outside_the_set": outside,
        "labels_without_rationale": bare,
        "label_counts": dict(labels.most_common(20)),
        "accuracy": correct / scored if scored else None,
        "correct": correct,
        "scored": scored,
        "kept": len(rows),
        "keep": keep,
    }


# ---- What servers say ----------------------------------------------------------------------------

THOUGHTS = ("reasoning_content", "reasoning", "thinking", "reasoning_details")  # keys of a message
NO_QUOTA = ("insufficient_quota", "billing_hard_limit_reached")


@dataclass
class Reply:
    """What came back from one request, with the key taken out. status 0: nothing came."""

    status: int
    text: str
    headers: Mapping[str, str]
    broken: Exception | None = None  # why nothing came, or why the text ends early


@dataclass
class Verdict:
    """What a reply means. what: answer, failed (this example, for good), again, pause (again, and
    all wait), unreadable, refused, denied, stop or unreachable. fields: for the log, if it was paid
    for."""

    what: str
    words: str = ""
    fields: dict = field(default_factory=dict)


def judge(reply: Reply, body: dict) -> Verdict:
    """Decides by the status, and for a 2xx by the way in which the answer ended."""
    if reply.status == 0:
        return Verdict("unreachable", said(reply.broken))
    value = read_body(reply.text)
    if not 200 <= reply.status < 300:
        return judge_status(reply.status, value, reply)
    choice, fields = read_choice(value)
    fields["usage"] = read_usage(value, fields, body, reply)
    error = value.get("error") if isinstance(value, dict) else None
    if choice is None and error:  # some gateways send their errors with status 200
        code = error.get("code") if isinstance(error, dict) else None
        verdict = judge_status(code if isinstance(code, int) and code > 299 else 500, value, reply)
        what = "again" if verdict.what == "failed" else verdict.what
        return Verdict(what, verdict.words, fields)
    if choice is None:
        kind, start = reply.headers.get("Content-Type", "no type"), reply.text.strip()[:80]
        words = f"an answer in no known form ({kind}), which begins with {start!r}"
        return Verdict("again" if reply.broken else "unreadable", words, fields)
    finish, refusal = choice.get("finish_reason"), flat(choice["message"].get("refusal"))
    ending, error = ending_of(finish), choice.get("error") or error or reply.broken
    if error or ending == "unknown":
        words = f"an answer that ended in {finish!r}" + (f": {said(error)}" if error else "")
        return Verdict("again", words, fields)
    if refusal or ending == "filtered":
        return Verdict("failed", f"the server refused ({finish}): {refusal or 'no words'}", fields)
    if ending == "whole" and not (fields["completion"] + fields.get("reasoning", "")).strip():
        return Verdict("again", "an answer without content", fields)
    return Verdict("answer", "", fields)


def judge_status(status: int, value: Any, reply: Reply) -> Verdict:
    """Decides what a reply means that is an error."""
    error = error_object(value)
    words = f"HTTP {status}: {said(reply.text if value is None else value) or 'no words'}"
    codes = [str(error.get(key)).lower() for key in ("code", "type")]
    if 300 <= status < 400:
        place = reply.headers.get("Location", "nowhere")
        return Verdict("stop", f"{words}; it redirects to {place}: give that as --base-url")
    if status in (401, 402):
        return Verdict("denied", words)
    if any(code in NO_QUOTA for code in codes):
        return Verdict("stop", words)
    if status == 429:
        return Verdict("pause", words)
    if status in (408, 409, 425) or (status >= 500 and status != 501):
        return Verdict("again", words)
    filtered = any(ending_of(code) == "filtered" for code in codes)  # Azure refuses inputs so
    return Verdict("failed" if filtered else "refused", words)


def read_json(text: str) -> Any:
    """The value of a JSON text; None for any other."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def read_body(text: str) -> Any:
    """The JSON of a body. The pieces of a stream (`data:` lines) are joined into one answer."""
    lines = [line[5:].strip() for line in text.split("\n") if line.startswith("data:")]
    events = [event for event in map(read_json, lines) if isinstance(event, dict)]
    if (value := read_json(text)) is not None or not events:
        return value
    message, joined = defaultdict(str), {}
    choice = {"message": message, "finish_reason": "[DONE]" not in lines and "no end of a stream"}
    for event in events:
        joined |= {key: event[key] for key in ("usage", "error") if event.get(key)}
        parts = event.get("choices")
        for part in parts if isinstance(parts, list) else []:
            delta = part.get("delta") or part.get("message") or {"content": part.get("text")}
            for key, piece in delta.items():
                message[key] += flat(piece)
            choice |= {key: part[key] for key in ("finish_reason", "error") if part.get(key)}
    return joined | ({"choices": [choice]} if message else {})


def read_choice(value: Any) -> tuple[dict | None, dict]:
    """(the first choice, its fields in the log); None for a value that is no completion."""
    fields = {"completion": None, "finish_reason": None}
    try:
        choice = value["choices"][0]
        message = choice.get("message") or {"content": choice.get("text")}  # chat or completions
        content = message.get("content")
    except (KeyError, IndexError, TypeError, AttributeError):
        return None, fields
    parts = content if isinstance(content, list) else [content]
    thoughts = [flat(message.get(key)) for key in THOUGHTS]
    thoughts += [flat([part for part in parts if is_thought(part)])]
    fields["completion"] = flat([part for part in parts if not is_thought(part)])
    fields["finish_reason"] = choice.get("finish_reason")
    if thought := next(filter(str.strip, thoughts), ""):
        fields["reasoning"] = thought
    return choice | {"message": message}, fields


def is_thought(part: Any) -> bool:
    """Whether a part of a message's content is no part of the answer."""
    kind = str(part.get("type")) if isinstance(part, dict) else ""
    return kind.startswith(("thinking", "reasoning")) or (kind != "" and bool(part.get("thought")))


def flat(content: Any) -> str:
    """The text of a message's content, which may be a list of parts."""
    if isinstance(content, list):
        return "".join(map(flat, content))
    if isinstance(content, dict):
        return next(
            filter(None, (flat(content.get(k)) for k in ("text", "thinking", "summary"))), ""
        )
    return content if isinstance(content, str) else ""


def read_usage(value: Any, fields: dict, body: dict, reply: Reply) -> dict:
    """The numbers of `usage`; without a total, their sum or four characters a token."""
    usage = value.get("usage") if isinstance(value, dict) else None
    usage = usage if isinstance(usage, dict) else {}
    usage = {key: number for key, number in usage.items() if isinstance(number, int)}
    if "total_tokens" in usage:
        return usage
    if "prompt_tokens" in usage and "completion_tokens" in usage:
        return usage | {"total_tokens": usage["prompt_tokens"] + usage["completion_tokens"]}
    asked = body.get("prompt") or "".join(turn["content"] for turn in body["messages"])
    answer = reply.text if fields["completion"] is None else fields["completion"]
    characters = len(asked) + len(answer) + len(fields.get("reasoning", ""))
    return {"total_tokens": characters // 4, "estimated": 1}


def error_object(value: Any) -> dict:
    """The object with `code`, `param` and `type` in an error's body, which may be in a list."""
    value = value[0] if isinstance(value, list) and value else value
    error = value.get("error") if isinstance(value, dict) else None
    return error if isinstance(error, dict) else value if isinstance(value, dict) else {}


def said(value: Any) -> str:
    """All the words of an error, whatever its shape, in one line."""
    if isinstance(value, Exception):
        cause = getattr(value, "reason", value)  # of an URLError
        return said(f"{type(cause).__name__}: {cause}")
    if isinstance(value, str):
        inner = read_json(value) if value.lstrip()[:1] in ("{", "[") else None
        if isinstance(inner, dict | list):  # OpenRouter's metadata.raw
            return said(inner)
        if value.lstrip().startswith("<"):
            value = html.unescape(re.sub(r"(?is)<(script|style)\b.*?</\1>|<[^>]*>", " ", value))
        return " ".join(value.encode("utf-8", "replace").decode().split())
    if isinstance(value, dict):  # without the request, which FastAPI sends back as `input`
        value = [part for key, part in value.items() if key != "input"]
    parts = map(said, value if isinstance(value, list) else [])
    return "; ".join(dict.fromkeys(filter(None, parts)))


def wait_asked(reply: Reply, words: str) -> float:
    """The seconds of Retry-After, which may be a date, or of "try again in 1m7.66s"; at most a day."""
    value, seconds = reply.headers.get("Retry-After"), 0.0
    try:
        seconds = float(value or 0)
    except ValueError:
        with contextlib.suppress(ValueError, TypeError, OverflowError):
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
    if found := re.search(
        r"(?:again|retry) (?:in|after) ((?:[\d.]+ ?(?:ms|[hms])[a-z]* ?)+)", words
    ):
        units = {"ms": 0.001, "s": 1, "m": 60, "h": 3600}
        parts = re.findall(r"(\d+\.?\d*|\.\d+) ?(ms|[hms])", found[1])
        seconds = max(seconds, sum(float(number) * units[unit] for number, unit in parts))
    return min(86_400.0, seconds) if seconds > 0 else 0.0  # and 0 for NaN


def key_pattern(key: str) -> re.Pattern:
    """Matches a key as it is, JSON-escaped or percent-encoded, also twice."""
    forms = r"\\*(?:{0}|[uU]{1:04x}|[uU]{1:04X}|%(?:25)*{1:02x}|%(?:25)*{1:02X})"
    return re.compile("".join(forms.format(re.escape(c), ord(c)) for c in key))


# ---- The client ----------------------------------------------------------------------------------


@dataclass
class Job:
    """An answer to ask for: the sample-th of an example."""

    example: Example
    sample: int
    attempts: int = 0  # requests sent
    tries: int = 0  # those that count toward --max-retries
    body: dict = field(default_factory=dict)  # the last request's
    start: float = 0.0
    seen: tuple[int, int] = (-1, 0)  # the client's `answered` and `strikes` at that time


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirected POST becomes a GET, and takes the key to another host: an error instead."""

    def redirect_request(self, *_) -> None:
        return None


class Client:
    """Asks for the answers of jobs, many at a time. Workers run `post` and nothing else; the main
    thread alone decides what to send, writes the log, counts and reports."""

    def __init__(self, args: argparse.Namespace, prompt: Prompt):
        self.args, self.prompt = args, prompt
        key = (os.environ.get("OPENAI_API_KEY") or "").strip()
        if not key.isascii() or not key.isprintable() or " " in key:
            raise UserError("OPENAI_API_KEY holds a space or another character that no key has")
        base = check_url(args.base_url or os.environ.get("OPENAI_BASE_URL") or OPENAI)
        if not key and base == OPENAI:
            raise UserError(
                "OPENAI_API_KEY is not set and OpenAI's own server needs one; set it, "
                "or give another server with --base-url or OPENAI_BASE_URL"
            )
        self.url = base + ("/chat/completions" if args.api == "chat" else "/completions")
        self.headers = {"Content-Type": "application/json", "User-Agent": "dsbs"}
        self.headers |= {"Authorization": f"Bearer {key}"} if key else {}
        self.key = key_pattern(key) if len(key) > 7 else NOTHING
        proxies, self.place = proxies_for(base), self.url
        if proxy := proxies.get(urlsplit(base).scheme):
            self.place += f" through the proxy {re.sub('//.*@', '//', proxy)}"
        self.opener = urllib.request.build_opener(NoRedirect, urllib.request.ProxyHandler(proxies))
        self.dropped: set[str] = set()  # keys that the server refused
        self.answered, self.in_log = 0, False  # in this run; whether any earlier one was
        self.heard = False  # whether any reply came
        self.tokens = self.failed = self.strikes = 0
        self.row: list[str] = []  # the failures since the last answer
        self.shown: set[str] = set()
        self.reason, self.refused = "", ""  # why nothing more is asked; what refused it all
        self.pause_until = 0.0
        self.flying: dict[Future, Job] = {}
        self.waiting: list[tuple[float, int, Job]] = []  # a heap by the time to ask again
        self.held: list[tuple[Job, Verdict]] = []  # refused before anything was answered
        self.order = itertools.count()  # of jobs that wait for the same time
        self.arrived: queue.SimpleQueue = queue.SimpleQueue()  # futures that are done

    # -- what workers do

    def post(self, body: dict) -> Reply:
        """Sends one request and reads what comes back within --timeout."""
        request = urllib.request.Request(self.url, json.dumps(body).encode(), self.headers)
        deadline = time.monotonic() + self.args.timeout
        raw, status, headers, broken = b"", 0, {}, None
        try:
            try:
                response = self.opener.open(request, timeout=self.args.timeout)
            except urllib.error.HTTPError as error:
                response = error
            with response:
                status, headers = response.status, response.headers
                while part := response.read1(1 << 16):
                    raw += part
                    if time.monotonic() > deadline or len(raw) > MAX_BODY:
                        raise TimeoutError("the answer was too slow or too long")
        except (OSError, http.client.HTTPException) as error:
            broken = error
        with contextlib.suppress(zlib.error):  # compressed, although nobody asked for it
            if raw[:2] == b"\x1f\x8b" or headers.get("Content-Encoding") == "deflate":
                raw = zlib.decompressobj(47).decompress(raw, MAX_BODY)
        text = raw.decode(json.detect_encoding(raw), "replace")
        headers = {name.title(): self.key.sub("[key]", value) for name, value in headers.items()}
        return Reply(status, self.key.sub("[key]", text), headers, broken)

    # -- what the main thread does

    def request(self, job: Job) -> dict:
        """The JSON of a request: little by default, then --body, then what the server refused."""
        args, input = self.args, job.example.input
        body = {"model": args.model, "temperature": args.temperature, "max_tokens": args.max_tokens}
        if args.api == "chat":
            body["messages"] = self.prompt.turns(input)
        else:  # in chat, `stop` would cut a reasoning model's thoughts
            body |= {"prompt": self.prompt.text(input), "stop": STOP}
        if args.seed is not None:
            body["seed"] = args.seed + job.sample
        body |= args.body
        if "max_tokens" in self.dropped:
            body.setdefault("max_completion_tokens", body.get("max_tokens"))
        return {k: v for k, v in body.items() if v is not None and k not in self.dropped}

    def run(self, jobs: Iterable[Job], log: Log, bar: tqdm) -> str:
        """Asks until the jobs are done or something stops it; returns why, if something did."""
        self.jobs, self.log, self.bar = deque(jobs), log, bar
        with ThreadPoolExecutor(self.args.concurrency) as pool:
            while True:
                while job := self.next_job():
                    job.body, job.start = self.request(job), time.monotonic()
                    job.seen = self.answered, self.strikes
                    future = pool.submit(self.post, job.body)
                    self.flying[future] = job
                    future.add_done_callback(self.arrived.put)
                if self.held and not self.flying:
                    self.release()
                elif self.flying or ((self.waiting or self.jobs) and not self.reason):
                    self.wait()
                else:
                    break
        if self.refused:
            raise UserError(self.refused)
        return self.reason

    def width(self) -> int:
        """The most requests in flight. None is sent while a refusal waits for the others' replies,
        and one at a time where the first replies could not be read."""
        careful = self.strikes and not self.answered
        return 0 if self.held else 1 if careful else self.args.concurrency

    def next_job(self) -> Job | None:
        """The job to ask for now, if there is one. A job that waits keeps its place among the
        `--concurrency`, so that a failing server is asked less."""
        now = time.monotonic()
        if self.reason or now < self.pause_until or len(self.flying) >= self.width():
            return None
        ready = self.waiting and self.waiting[0][0] <= now
        room = len(self.flying) + len(self.waiting) < self.args.concurrency
        if not ready and not (self.jobs and room):
            return None
        if self.tokens >= (self.args.max_tokens_total or float("inf")):
            return self.stop(f"--max-tokens-total {self.args.max_tokens_total} is reached")
        return heapq.heappop(self.waiting)[2] if ready else self.jobs.popleft()

    def wait(self) -> None:
        """Takes the next reply, or returns when a job can be asked for."""
        timeout = None
        if not self.reason and len(self.flying) < self.width() and (self.waiting or self.jobs):
            ready = self.waiting[0][0] if self.waiting else 0.0
            timeout = max(0.0, max(ready, self.pause_until) - time.monotonic())
        with contextlib.suppress(queue.Empty):
            if future := self.arrived.get(timeout=timeout):  # None: a signal came
                self.take(self.flying.pop(future), future.result())

    def take(self, job: Job, reply: Reply) -> None:
        """Logs what was paid for, then does what the reply's verdict says."""
        job.attempts += 1
        verdict = judge(reply, job.body)
        what, words = verdict.what, f"{verdict.words} ({self.place})"
        if what in ("answer", "failed"):
            return self.settle(job, verdict)
        if verdict.fields:
            self.write(job, verdict.fields | {"final": False, "error": verdict.words})
        error = error_object(read_json(reply.text))
        if what == "unreachable" and not self.heard and is_hopeless(reply.broken):
            self.stop(f"cannot reach {words}")
        elif what in ("denied", "stop"):
            self.stop(words, fatal=what == "denied")
        elif what == "refused" and self.drop(job, error):
            self.ask_again(job, 0.0)
        elif what == "refused":
            verdict.words = words + self.advice(job, reply.status, words)
            self.held.append((job, verdict))
        else:
            self.retry(job, reply, verdict)
        self.heard = self.heard or what != "unreachable"

    def retry(self, job: Job, reply: Reply, verdict: Verdict) -> None:
        """Asks again later, until --max-retries; stops where the first replies are unreadable."""
        what, words = verdict.what, f"{verdict.words} ({self.place})"
        if what == "unreadable" and job.seen[1] == self.strikes:  # not one sent with the last
            self.strikes += 1
            if self.strikes >= UNREADABLE and not self.answered:
                return self.stop(words)
        # A rate limit that lets others through is not this request's fault.
        job.tries += what != "pause" or self.answered <= job.seen[0]
        if job.tries > self.args.max_retries:
            words = f"after {job.attempts} attempts: {words}"
            return self.settle(job, Verdict("failed", words, {"completion": None}))
        self.say_once(f"{words}; trying again")
        delay = min(LONGEST, BACKOFF * 2 ** max(0, job.tries - 1)) * random.uniform(0.5, 1)
        delay = max(delay, wait_asked(reply, words))
        if what == "pause":
            self.pause_until = max(self.pause_until, time.monotonic() + delay)
        self.ask_again(job, delay)

    def settle(self, job: Job, verdict: Verdict) -> None:
        """Logs an answer or a final failure. Stops where failures in a row have one reason: the
        same words for the first five, or so many that the server must be it."""
        failed = verdict.what == "failed"
        error = {"error": f"{verdict.words} ({self.place})"} if failed else {}
        self.write(job, {"completion": None, "usage": None, **verdict.fields, **error})
        self.answered, self.failed = self.answered + (not failed), self.failed + failed
        self.row = [*self.row, verdict.words] if failed else []
        self.bar.set_postfix(failed=self.failed, tokens=self.tokens, refresh=False)
        self.bar.update()
        if failed:
            self.say_once(f"{verdict.words}; {job.example.id!r} is left out")
        kinds = {re.sub(r"\d+", "N", words) for words in self.row}
        same = len(self.row) >= SAME and len(kinds) == 1 and not self.answered
        if same or len(self.row) > GIVE_UP + self.args.concurrency:
            self.stop(f"{len(self.row)} failures in a row, the last: {verdict.words}")

    def write(self, job: Job, fields: dict) -> None:
        """Appends a line to the log and counts what it cost."""
        args = self.args
        settings = {"api": args.api, "temperature": args.temperature, "seed": args.seed}
        settings |= {"max_tokens": args.max_tokens, "body": args.body}
        settings |= {"refused": sorted(self.dropped)} if self.dropped else {}
        record = {
            "id": job.example.id,
            "sample": job.sample,
            "prompt_sha256": self.prompt.sha256,
            "input_sha256": input_sha256(job.example),
            "model": args.model,
            "settings": settings,
            **fields,
            "attempts": job.attempts,
            "seconds": round(time.monotonic() - job.start, 3),
            "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }
        self.log.append(record, self.key)
        self.tokens += (record["usage"] or {}).get("total_tokens") or 0

    def release(self) -> None:
        """Decides about the refusals that waited: each belongs to its example if anything was ever
        answered, else to all of them."""
        held, self.held = self.held, []
        if not (self.answered or self.in_log):
            return self.stop(held[0][1].words, fatal=True)
        for job, verdict in held:
            self.settle(job, Verdict("failed", verdict.words, {}))

    def drop(self, job: Job, error: dict) -> bool:
        """Sends a key no more where the server names it in the form that OpenAI documents."""
        key = error.get("param")
        known = error.get("code") in ("unsupported_parameter", "unsupported_value")
        if not known or key not in job.body.keys() - set(INPUTS):
            return False
        instead = "max_completion_tokens instead of" if key == "max_tokens" else "without"
        if key not in self.dropped:
            say(f"{said(error)}; going on {instead} {key}")
        self.dropped.add(key)
        return True

    def advice(self, job: Job, status: int, words: str) -> str:
        """What may help after a refusal."""
        hints = []
        if status == 404:
            hints.append(f"asked for {self.url}; most servers want a --base-url that ends in /v1")
        for key in job.body.keys() - set(INPUTS):
            if re.search(rf"\b{re.escape(key)}\b", words):
                body = {**self.args.body, key: None}
                if key == "max_tokens" and "max_completion_tokens" in words:
                    body["max_completion_tokens"] = self.args.max_tokens
                hints.append(f"to go on without {key}: --body '{json.dumps(body)}'")
        return "".join(f"; {hint}" for hint in hints)

    def ask_again(self, job: Job, delay: float) -> None:
        """After `delay` seconds."""
        heapq.heappush(self.waiting, (time.monotonic() + delay, next(self.order), job))

    def say_once(self, words: str) -> None:
        """The first time that something of this kind is said."""
        kind = re.sub(r"\d+", "N", words)[:60]
        if kind not in self.shown:
            self.shown.add(kind)
            say(words)

    def stop(self, reason: str, fatal: bool = False) -> None:
        """Sends nothing new from now on; the first reason stands. fatal: a user's mistake, where
        nothing was ever answered."""
        self.refused = reason if fatal and not (self.answered or self.in_log) else self.refused
        self.reason = self.reason or reason

    @contextlib.contextmanager
    def signals(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM finish what is in flight; the second Ctrl-C does not wait for it."""

        def note(number: int, _) -> None:
            if self.reason and number == signal.SIGINT:
                os._exit(130)
            self.stop(f"stopped by {signal.Signals(number).name}")
            self.arrived.put(None)

        before = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def is_hopeless(error: Exception | None) -> bool:
    """Whether a connection that never was is a mistake; one that broke may come back."""
    cause = getattr(error, "reason", error)
    never = ConnectionRefusedError, socket.gaierror, ssl.SSLCertVerificationError
    return isinstance(cause, never)


def check_url(url: str) -> str:
    """The base of an API, as it is given; UserError for what is no base."""
    form = "like http://localhost:8000/v1, without a password or a query in it"
    try:
        parts = urlsplit(url.strip())
        good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        good = good and re.fullmatch(r"[!-~]+", url.strip()) and "@" not in parts.netloc
    except ValueError:
        good = False
    if good and "api-version" in parts.query:
        form = "https://NAME.openai.azure.com/openai/v1/ on Azure, without ?api-version="
    if not good or parts.query or parts.fragment:
        raise UserError(f"--base-url must be {form}; a key comes from OPENAI_API_KEY")
    return url.strip().rstrip("/")


def proxies_for(base: str) -> dict[str, str]:
    """The proxies of the environment; none for loopback addresses and for no_proxy's."""
    parts = urlsplit(base)
    local = re.fullmatch(r"(.+\.)?localhost|127\.[\d.]+|::1|0\.0\.0\.0", parts.hostname)
    bypass = local or urllib.request.proxy_bypass(parts.netloc)
    return {} if bypass else urllib.request.getproxies()


def input_sha256(example: Example) -> str:
    """Tells whether an id still stands for the same input."""
    text = example.input if isinstance(example.input, str) else "\n".join(example.input)
    return data.sha256(text.encode())


def say(words: str) -> None:
    """Past the progress bar."""
    tqdm.write(words, file=sys.stderr)


# ---- Command line --------------------------------------------------------------------------------

LIMITS = ("max_tokens", "max_completion_tokens")  # a log may hold answers with several of these
INPUTS = ("model", "messages", "prompt")  # keys of a request that --body may not change


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """All flags; the key comes from the environment and is none of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--dataset", required=True, help=f"{', '.join(TASKS)}, or a folder of *.jsonl")
    add("--split", default="train", choices=data.SPLITS)
    add("--data-root", default="datasets", help="the folder of the benchmarks; default datasets")
    out = "NAME of NAME.raw.jsonl, NAME.jsonl, NAME.report.json; default teacher/DATASET.SPLIT"
    add("--out", help=out)
    add("--model", help="what the server calls it")
    add("--base-url", help="default: OPENAI_BASE_URL, or OpenAI's own; the key is OPENAI_API_KEY")
    add("--api", default="chat", choices=("chat", "completions"), help="completions: base models")
    add("--body", default="{}", help="JSON to merge into every request; null removes a key")
    add("--shots", type=int, help="demonstrations; default all, 0 is zero-shot")
    add("--limit", type=int, help="ask for the first so many examples only")
    add("--samples", type=int, default=1, help="answers an example; the majority's label counts")
    add("--temperature", type=float, help="default 0, or 0.7 with several samples")
    add("--seed", type=int, help="sent to the server; sample k gets seed + k")
    add("--max-tokens", type=int, default=512, help="of one answer; default 512")
    add("--max-tokens-total", type=int, help="stop when the log has cost so many, prompts included")
    add("--concurrency", type=int, default=8, help="requests in flight; default 8")
    add("--max-retries", type=int, default=8, help="of one request; default 8")
    add("--timeout", type=float, default=300, help="seconds for one request; default 300")
    add("--retry", default="", help="ask again: truncated,failed,unparsed (one or several)")
    keep = "which answers NAME.jsonl holds; default parsed: whole ones with a label"
    add("--keep", default="parsed", choices=("all", "parsed", "correct"), help=keep)
    add("--parse-only", action="store_true", help="derive the files from the log, offline")
    add("--completions", choices=("palm", "neox"), help="report on released completions, offline")
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> None:
    """Fills in what follows from the rest; UserError for what cannot be."""
    lowest = {"shots": 0, "max_retries": 0, "temperature": 0, "timeout": 0.001}
    ones = ("limit", "samples", "max_tokens", "max_tokens_total", "concurrency")
    for name, least in (lowest | dict.fromkeys(ones, 1)).items():
        value = getattr(args, name)
        if value is not None and not least <= value < float("inf"):
            raise UserError(f"--{name.replace('_', '-')} {value}: must be at least {least}")
    args.retry = set(filter(None, args.retry.split(",")))
    if wrong := args.retry - {"truncated", "failed", "unparsed"}:
        raise UserError(f"--retry {wrong.pop()!r} is unknown; allowed: truncated,failed,unparsed")
    body = read_json(args.body)
    if not isinstance(body, dict) or body.keys() & set(INPUTS):
        raise UserError(
            f"--body {args.body!r} must be a JSON object without {', '.join(INPUTS)}, such as "
            """--body '{"reasoning_effort": "low", "max_tokens": null}'"""
        )
    args.body = body
    if args.temperature is None:
        args.temperature = 0.7 if args.samples > 1 else 0.0
    if args.samples > 1 and args.temperature == 0:
        several = f"--samples {args.samples} would be the same at --temperature 0"
        raise UserError(f"{several}; allowed: above 0, such as 0.7")
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
    answers, cost, endings, asked, times = {}, Counter(), Counter(), {}, []
    task = get_task(name)
    for number, record in read_log(path):
        id, sample = record["id"], record["sample"]
        if record["input_sha256"] != inputs.get(id):
            raise UserError(
                f"{path}:{number}: {id!r} stands for another input than in this split of {name}; "
                "if the data changed, give another --out"
            )
        for key in ("prompt_tokens", "completion_tokens", "total_tokens"):
            cost[key] += (record["usage"] or {}).get(key) or 0
        cost["request_seconds"] += record["seconds"]
        times = [*times[:1], record["time"]]
        finish = record.get("finish_reason")
        endings[str(finish)] += ending_of(finish) == "unknown"
        if not record.get("final", True):
            continue
        cost["retries"] += record["attempts"] - 1
        answer, some = read_answer(task, record), answers.setdefault(id, {})
        if answer.state != "failed" or sample not in some:  # else the old one stands
            some[sample] = answer
        if answer.state != "failed" or not asked:
            asked = record
    facts = {key: asked.get(key) for key in ("model", "prompt_sha256", "settings")}
    facts |= {"first": times[0] if times else None, "last": times[-1] if times else None}
    return answers, facts | {"unknown_endings": dict(+endings), "cost": dict(cost)}


def annotate(args: argparse.Namespace, examples: list[Example], path: Path) -> str:
    """Asks for what the log lacks; returns why it stopped early, if it did."""
    prompt = read_prompt(args.dataset, args.shots)
    client = Client(args, prompt)
    with Log(path) as log:
        answers, facts = read_answers(path, args.dataset, examples)
        states = {answer.state for some in answers.values() for answer in some.values()}
        client.in_log = bool(states - {"failed"})
        if client.in_log:
            check_agreement(args, prompt, facts, path)
        client.tokens = facts["cost"].get("total_tokens", 0)
        done = {
            (id, sample)
            for id, some in answers.items()
            for sample, answer in some.items()
            if answer.state not in args.retry
        }
        del answers  # half a million rationales are not needed while asking
        wanted = itertools.product(examples[: args.limit], range(args.samples))
        jobs = [Job(*pair) for pair in wanted if (pair[0].id, pair[1]) not in done]
        total = len(examples[: args.limit]) * args.samples
        print(
            f"prompt {prompt.sha256[:12]} with {len(prompt.shots)} demonstrations; asking "
            f"{args.model} for {len(jobs):,} of {total:,} answers",
            flush=True,
        )
        bar = tqdm(total=total, initial=total - len(jobs), unit="", disable=None)
        with client.signals(), bar:
            return client.run(jobs, log, bar)


def check_agreement(args: argparse.Namespace, prompt: Prompt, facts: dict, path: Path) -> None:
    """UserError where a log's answers were asked for in another way. They may differ in the limit
    of tokens, so that cut answers can be asked for again with more."""
    limitless = lambda body: {k: v for k, v in body.items() if k not in LIMITS}  # noqa: E731
    before = {"body": {}, **facts, **facts["settings"]}
    before["body"] = limitless(before["body"])
    now = {"prompt_sha256": prompt.sha256, "model": args.model, "body": limitless(args.body)}
    now |= {"temperature": args.temperature, "seed": args.seed, "api": args.api}
    changed = [f"{k} {before[k]} there, {now[k]} here" for k in now if now[k] != before[k]]
    if changed:
        raise UserError(f"{path} was asked for otherwise: {'; '.join(changed)}; give another --out")


def show(report: dict) -> None:
    """The report, in a few lines."""
    r, cost = report, report.get("cost", {})
    states = ("failed", "truncated", "unparsed")
    shares = (f"{state} {r[state]:,} ({r[state] / max(1, r['settled']):.2%})" for state in states)
    print(
        f"answered {r['answered']:,}, of {r['examples']:,} examples; {', '.join(shares)}, labels "
        f"outside the set {r['labels_outside_the_set']:,}, without a rationale "
        f"{r['labels_without_rationale']:,}"
    )
    if cost:
        print(
            f"cost {cost['total_tokens']:,} tokens ({cost['prompt_tokens']:,} prompt, "
            f"{cost['completion_tokens']:,} completion), {cost['retries']:,} retries"
        )
    for name, n in r.get("unknown_endings", {}).items():
        print(f"warning: {n:,} replies ended in {name!r}, which is no known ending")
    if len(r["label_counts"]) <= 10:
        print(f"labels: {', '.join(f'{k} {v:,}' for k, v in r['label_counts'].items())}")
    if r["accuracy"] is not None:
        print(f"accuracy {r['accuracy']:.4f} ({r['correct']:,} of {r['scored']:,}, human labels)")


def released(args: argparse.Namespace) -> tuple[list[Example], dict, dict]:
    """(examples, answers, facts) of released completions: over train's whole file, as their
    figures are, where our valid is cut out of it."""
    name, root, counts = args.dataset, args.data_root, Counter()
    splits, examples, answers = [args.split], [], {}
    files = [data.data_files(name, split, root) for split in ("train", "valid")]
    if args.split == "train" and files[0] == files[1]:
        splits.append("valid")
    for split in splits:
        examples += data.load_dataset(name, split, root, args.completions, counts)
    for e in examples:
        state = "answered" if e.teacher_label else "unparsed"
        answers[e.id] = {0: Answer(state, e.rationale, e.teacher_label)}
    outside = counts["teacher_labels_dropped"]  # by the loader: parsed, but of no use
    unparsed = sum(not e.teacher_label for e in examples) - outside
    facts = {"completions": args.completions, "splits": splits, "unparsed": unparsed}
    return examples, answers, facts | {"labels_outside_the_set": outside}


def what_is_left(args: argparse.Namespace, wanted: list, why: str, words: list[str]) -> int:
    """Prints how to go on if something is left or failed; the exit status."""
    left, failed = wanted.count(None), sum(a is not None and a.state == "failed" for a in wanted)
    if not left and not failed:
        return 0
    retry = (args.retry if why else set()) | ({"failed"} if failed else set())
    again = re.sub(r" --retry[ =]\S+", "", " " + shlex.join(words)).strip()
    again += f" --retry {','.join(sorted(retry))}" if retry else ""
    why = f": {why}" if why else ""
    say(f"{left:,} not asked for, {failed:,} failed{why}; to go on:\n  python teacher.py {again}")
    return 3


def run(args: argparse.Namespace, words: list[str]) -> int:
    """Annotates, or derives what is asked for; the exit status."""
    check(args)
    examples, why = data.load_dataset(args.dataset, args.split, args.data_root), ""
    if args.completions:
        examples, answers, facts = released(args)
    else:
        path = Path(args.out + ".raw.jsonl")
        if not args.parse_only:
            try:
                why = annotate(args, examples, path)
            except OSError as error:
                why = str(error)
        answers, facts = read_answers(path, args.dataset, examples)
    rows, report = derive(args.dataset, examples, answers, args.keep)
    about = {"dataset": args.dataset, "split": args.split, "examples": len(examples)}
    report = {**about, **report, **facts}
    show(report)
    if args.out:
        try:
            data.write_jsonl(Path(args.out + ".jsonl"), rows)
            data.write_json(Path(args.out + ".report.json"), report)
        except OSError as error:
            rest = "the log is complete: free some space and use --parse-only"
            raise UserError(f"{args.out}.jsonl: {error.strerror}; {rest}") from None
        files = f"{args.out}.jsonl, report in {args.out}.report.json"
        print(f"{len(rows):,} examples (--keep {args.keep}) in {files}")
    if args.parse_only or args.completions:
        return 0
    wanted = itertools.product(examples[: args.limit], range(args.samples))
    wanted = [answers.get(example.id, {}).get(sample) for example, sample in wanted]
    return what_is_left(args, wanted, why, words)


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
