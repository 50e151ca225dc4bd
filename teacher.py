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
3. Every reply that was paid for is appended to the log before anything parses it.

A prompt file is plain text: comments (#) and an instruction at the top, then demonstrations, each
an input after "Q: " and its rationale and answer after "A: ", with blank lines between them.
"""

import sys

if sys.platform == "win32" or sys.version_info < (3, 10):
    sys.exit("error: this program needs Linux or macOS and Python 3.10 or newer")

import argparse
import contextlib
import email.utils
import http.client
import itertools
import json
import math
import os
import queue
import random
import re
import signal
import socket
import ssl
import time
import urllib.parse
import urllib.request
import zlib
from collections import Counter, defaultdict, deque, namedtuple
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from io import FileIO
from pathlib import Path
from typing import Any

from tqdm import tqdm

import data
from data import TASKS, Example, Task, Text, UserError, get_task, not_allowed, parse_completion

HERE = Path(__file__).parent
OPENAI = "https://api.openai.com/v1"
STOP = ["\nQ:"]  # completions run on into invented questions
BACKOFF, LONGEST = 0.5, 60.0  # seconds before the first retry, and at most; doubled in between
FIRST = 5  # examples that fail with the same words, before the first answer, that stop the run
GIVE_UP = 20  # failed examples in a row after it, and one more for each worker, that stop the run
UNREADABLE = 3  # unreadable replies, before the first answer, that stop the run
MAX_BODY = 1 << 26  # bytes

# How an answer ended (`finish_reason`, without case) decides what it is. A filtered answer is a
# final failure. Every other ending, such as "error", "abort" or a new word, means: ask again.
ENDINGS = {
    "whole": "stop eos eos_token end_turn stop_sequence complete",
    "cut": "length max_tokens max_output_tokens model_length model_context_window_exceeded",
    "filtered": "content_filter content_filtered safety recitation prohibited_content blocklist "
    "spii refusal sensitive guardrail_intervened error_toxic",
}
ENDING = {"": "whole"} | {word: end for end, words in ENDINGS.items() for word in words.split()}

# What a status means; all others from 500 on: again, from 400 on: refused, from 300 on: stop.
STATUSES = {401: "denied", 402: "denied", 429: "pause", 501: "refused"}
STATUSES |= dict.fromkeys((408, 409, 425), "again")
CODES = {"insufficient_quota": "stop", "content_filter": "failed"}  # `error.code`, before those
THOUGHTS = ("reasoning_content", "reasoning", "thinking", "reasoning_details")  # keys of a message
INPUTS = ("model", "messages", "prompt")  # keys of a request that stay
TOKENS = ("total_tokens", "prompt_tokens", "completion_tokens")
LIMITS = ("max_tokens", "max_completion_tokens")  # of an answer; a log may hold several


# ---- Prompts -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prompt:
    """An instruction, demonstrations (input, answer), and the names of the two parts of a pair."""

    instruction: str
    shots: tuple[tuple[str, str], ...]
    names: tuple[str, ...] = ("Premise", "Hypothesis")

    def question(self, input: Text) -> str:
        """Writes an input as the demonstrations do: a pair on two lines, each with its name."""
        if isinstance(input, str):
            return input
        return "\n".join(f"{name}: {part}" for name, part in zip(self.names, input))

    def text(self, input: Text) -> str:
        """Returns the prompt as one text, for the completions API. The teacher continues it with
        the answer."""
        shots = [f"Q: {question}\nA: {answer}" for question, answer in self.shots]
        return "\n\n".join([self.instruction, *shots, f"Q: {self.question(input)}\nA:"]).strip()

    def turns(self, input: Text) -> list[dict]:
        """Returns the demonstrations as turns of a chat, and the input as the last. With an earlier
        wording of the prompts, SmolLM2-135M kept to the form in 39 of 40 answers this way, and in
        17 of 40 as one message (README, A teacher)."""
        texts = [text for shot in self.shots for text in shot] + [self.question(input)]
        texts[0] = f"{self.instruction}\n\n{texts[0]}".strip()  # not all models have a system role
        roles = itertools.cycle(("user", "assistant"))
        return [{"role": role, "content": text} for role, text in zip(roles, texts)]

    @property
    def sha256(self) -> str:
        """Hashes everything that is sent except the input."""
        return data.sha256(self.text("").encode())


def read_prompt(name: str, shots: int | None = None) -> Prompt:
    """Reads `prompts/NAME.txt`, or a folder's `prompt.txt`, and keeps the first `shots` of its
    demonstrations.

    0 means zero-shot (Limitations; Kojima et al., 2022): the prompt is the instruction, the label
    set and the form of the answer. UserError: the file is missing or malformed, or it has fewer
    demonstrations.
    """
    task = get_task(name)
    bundled = HERE / "prompts" / f"{'svamp' if name == 'asdiv' else name}.txt"
    path = bundled if name in TASKS else Path(task.folder, "prompt.txt")
    placeholder = "(a) CHOICE" if task.choices else "LABEL"
    form = data.format_answer(task, "", "84 / 2" if task.scorer == "arithmetic" else placeholder)
    prompt = Prompt("Answer the question.", ())
    if path.exists() or shots != 0:
        prompt = _parse_prompt(task, path, form)
    n = len(prompt.shots)
    if shots == 0:
        labels = f" The answer is one of: {', '.join(task.labels)}." if task.labels else ""
        asked = f" Write the explanation in your answer.{labels} Think step by step, then end in "
        prompt = replace(prompt, instruction=f"{prompt.instruction}{asked}this form: {form}")
    elif n < (shots or 1):
        wanted = "one or more" if shots is None else shots
        allowed = f"allowed: --shots 0 to {n}"
        raise UserError(f"--shots {wanted}: {path} holds {n} demonstrations; {allowed}")
    return replace(prompt, shots=prompt.shots[:shots])


def _parse_prompt(task: Task, path: Path, form: str) -> Prompt:
    """Parses a prompt file. Each line that starts with "Q:" starts a demonstration; the text above
    the first one, without comments, is the instruction.

    `form` is an example of how an answer ends, for the errors. The parser that reads the teacher's
    answers must find a rationale and an allowed label in each demonstration, or the teacher would
    be shown a form that cannot be read back. UserError with file and line for any other.
    """
    try:
        text = path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        hint = f"use --shots 0, or write it in UTF-8, in the form of {HERE}/prompts/*.txt"
        raise UserError(f"{path}: {error}; {hint}") from None
    head, *demonstrations = re.split(r"^Q:", text, flags=re.MULTILINE)
    line, shots = 1 + head.count("\n"), []
    if re.search("^A:", head, re.MULTILINE):
        raise UserError(f"{path}: 'A:' before the first 'Q:'; add that, or use --shots 0")
    for demonstration in demonstrations:
        question, _, answer = (part.strip() for part in demonstration.partition("\nA:"))
        rationale, label = parse_completion(task, answer, released=False) or ("", "")
        allowed = not_allowed(task, question, label) if label else ""
        # A blank line, "A:" or "#" in an answer: a "Q:" is missing, or a comment is not at the top.
        stray = re.search(r"^\s*$|^A:|^#", answer, re.MULTILINE)
        if allowed or not question or not rationale or stray:
            raise UserError(
                f"{path}:{line}: {demonstration[-60:]!r} is no demonstration: 'Q: ' and an input, "
                f"then 'A: ' and a rationale ending in {form!r}, then a blank line"
                f"{'; the label must be ' if allowed else ''}{allowed}"
            )
        shots.append((question, answer))
        line += demonstration.count("\n")
    instruction = re.sub(r"^#.*\n?", "", head, flags=re.MULTILINE).strip()
    names = re.fullmatch(r"(\w+): .*\n(\w+): .*", shots[0][0] if shots else "")
    return Prompt(instruction, tuple(shots), names.groups() if names else Prompt.names)


# ---- The raw log ---------------------------------------------------------------------------------

# The keys of a record that are read again, with their types.
FIELDS = {"id": str, "sample": int, "input_sha256": str, "model": str, "prompt_sha256": str}
FIELDS |= {"settings": dict, "completion": str | None, "usage": dict | None, "attempts": int}


def read_log(path: Path) -> Iterator[tuple[int, dict]]:
    """Yields (line number, record) of each line of a log. It skips the start of a line, which a
    crash left. UserError for anything else."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            record = read_json(line.decode("utf-8", "replace"))
            known = record if isinstance(record, dict) else {}
            if all(isinstance(known.get(key), kind) for key, kind in FIELDS.items()):
                yield number, record
            elif record is None and line.strip() and b'{"id": "'.startswith(line.strip()[:8]):
                say(f"{path}:{number}: a torn line of {len(line)} bytes is skipped")
            else:
                hint = "correct or remove it, or give another --out"
                raise UserError(f"{path}:{number}: no line of a raw log: {line[:80]!r}; {hint}")


# ---- From a log to training data -----------------------------------------------------------------

OPENING = re.compile(r"[<\[](?:think|thinking|thought)[>\]]", re.IGNORECASE)
CLOSING = re.compile(r"[<\[]/(?:think|thinking|thought)[>\]]", re.IGNORECASE)


# What a log's line says. state: answered, unparsed, truncated or failed.
Answer = namedtuple("Answer", "state rationale label", defaults=(None, None))
Answers = dict[str, dict[int, Answer]]  # by id and sample
COUNTS = ("failed", "truncated", "unparsed")  # of answers, and these of examples
COUNTS += ("labels_outside_the_set", "labels_without_rationale", "correct", "scored")


def ending_of(finish_reason: object) -> str:
    """Returns whole, cut, filtered or, for a word that the table lacks, unknown."""
    return ENDING.get(str(finish_reason or "").lower(), "unknown")


def read_answer(name: str | Task, record: dict) -> Answer:
    """Parses the completion in a record of the log.

    It never reads a label from the thoughts of a reasoning model (<think>, or the log's
    `reasoning`). They are the rationale of a whole answer that has a label and explains nothing.
    """
    ending = ending_of(record.get("finish_reason"))
    if record.get("error") or ending not in ("whole", "cut"):
        return Answer("failed")
    text, thoughts = record["completion"] or "", record.get("reasoning") or ""
    # The answer follows the last closing tag; the first opening tag may be the server's own.
    closed = list(CLOSING.finditer(text))
    if closed:
        thoughts, text = OPENING.sub("", text[: closed[-1].start()]), text[closed[-1].end() :]
    text = re.sub(r"^\s*A:", "", OPENING.split(text)[0]).strip()  # and ends where another opens
    found = parse_completion(name, text, released=False)
    # Cut by length, unless it had long gone on to questions of its own.
    cut = ending == "cut" and not data.INVENTED.search(text)
    if found is None:
        return Answer("truncated" if cut else "unparsed", text)
    rationale = found[0] or ("" if ending == "cut" else thoughts.strip())
    return Answer("truncated" if cut else "answered", rationale, found[1])


def vote(name: str | Task, example: Example, answers: list[Answer]) -> Answer:
    """Returns the answer with the majority's label; of several, the first, for its rationale
    (self-consistency, Wang et al., 2022).

    Equations of one value are one label. Whole answers vote, if there are any, and of these those
    with an allowed label, if there are any. Of equally many votes, the first answer's label counts.
    """
    task = get_task(name)
    votes = [a for a in answers if a.state == "answered"]
    votes = [a for a in votes if not not_allowed(task, example.input, a.label)] or votes
    if not votes:
        return max(answers, key=lambda a: bool(a.label))
    arithmetic = task.scorer == "arithmetic"
    values = [data.evaluate_arithmetic(a.label) if arithmetic else a.label for a in votes]
    return votes[values.index(Counter(values).most_common(1)[0][0])]


def derive(name: str, examples: list[Example], answers: Answers, keep: str) -> tuple[list, dict]:
    """Returns (the rows of NAME.jsonl, the report) of the answers.

    keep: "all" (cut and unparsed ones too, those without a label), "parsed" (whole answers), or
    "correct" (whole and right by the human label). accuracy: right answers among the settled
    examples (a failure, an unparsed or a cut answer is wrong), the paper's few-shot CoT.
    """
    task, rows, labels, n = get_task(name), [], Counter(), Counter()
    for example in examples:
        some = answers.get(example.id)
        if not some:
            continue
        chosen = vote(task, example, [some[sample] for sample in sorted(some)])
        whole, human = chosen.state == "answered", example.label
        right = whole and human is not None and data.is_correct(task, chosen.label, human)
        n.update(answer.state for answer in some.values())
        n.update(settled=len(some), scored=human is not None, correct=right)
        if whole:
            labels[chosen.label] += 1
            outside = bool(not_allowed(task, example.input, chosen.label))
            n.update(labels_outside_the_set=outside, labels_without_rationale=not chosen.rationale)
        if {"all": chosen.state != "failed", "parsed": whole, "correct": right}[keep]:
            row = {"id": example.id, "input": example.input, "label": human}
            rows.append(row | {"rationale": chosen.rationale, "teacher_label": chosen.label})
    report = {"settled": n["settled"], "answered": n["settled"] - n["failed"]}
    report |= {count: n[count] for count in COUNTS}
    report["label_counts"] = dict(labels.most_common(20))
    report["accuracy"] = n["correct"] / n["scored"] if n["scored"] else None
    return rows, report | {"kept": len(rows), "keep": keep}


# ---- What servers say ----------------------------------------------------------------------------


# What came back from one request, without the key. status: 0 where nothing came; headers: a dict;
# broken: the exception because of which nothing came, or the text ends early.
Reply = namedtuple("Reply", "status text headers broken")


def judge(reply: Reply, body: dict) -> tuple[str, str, dict]:
    """Returns (what a reply means, its words, the log's fields if it was paid for).

    This function looks at one reply only. Client.take decides what follows from its meaning, which
    also depends on what came before. The meanings:
    - answer: it goes to the log, and the parser reads it later (whole and cut answers alike)
    - failed: the server filters this example; asking again would not help
    - again: a passing fault; the same request is sent once more after a pause
    - pause: a rate limit; the same, and no worker sends anything until the pause is over
    - unreadable: status 200 and a body in no known form; such a server is asked three times
    - refused: a 4xx; the request is wrong before the first answer, this example is after it
    - denied: a wrong key or no credit; every other request would fail too
    - stop: a redirect or an exhausted quota; the run ends and can go on later
    - unreachable: no server at this address, or none with a valid certificate
    """
    value, status, fields, choice = read_body(reply.text), reply.status, {}, None
    known = value if isinstance(value, dict) else {}
    error = known.get("error")
    if 200 <= status < 300:
        fields, choice = read_choice(value)
        fields["usage"] = read_usage(known.get("usage"), fields, body, reply)
        if choice is None and error:  # some gateways send their errors with status 200
            code = error_object(value).get("code")
            status = code if isinstance(code, int) and code > 299 else 500
    if not 200 <= status < 300:
        what, words = judge_status(status, value, reply)
        return what, words, fields
    if choice is None:
        kind, start = reply.headers.get("Content-Type"), reply.text.strip()[:80]
        words = f"an answer in no known form ({kind}), which begins with {start!r}"
        return "again" if reply.broken else "unreadable", words, fields
    ending, error = ending_of(choice.get("finish_reason")), choice.get("error") or error
    words = f"an answer that ended in {choice.get('finish_reason')!r}"
    reason = said(error or reply.broken or fields["refusal"])
    words += f"; {reason}" if reason else ""
    if error or reply.broken or ending == "unknown":
        return "again", words, fields
    if fields["refusal"] or ending == "filtered":
        return "failed", words, fields
    if ending == "whole" and not (fields["completion"] + fields["reasoning"]).strip():
        return "again", "an answer without content", fields
    return "answer", "", fields


def judge_status(status: int, value: Any, reply: Reply) -> tuple[str, str]:
    """Returns (what it means, its words) of a reply that is an error. status is 0 where there was
    no reply."""
    if status == 0:
        never = ConnectionRefusedError, socket.gaierror, ssl.SSLCertVerificationError
        cause = getattr(reply.broken, "reason", reply.broken)  # of an URLError
        what = "unreachable" if isinstance(cause, never) else "again"
        return what, f"cannot reach it: {said(cause)}"
    code = str(error_object(value).get("code")).lower()
    what = STATUSES.get(status) or ("again" if status > 499 else "refused")
    words = f"HTTP {status}: {said(reply.text if value is None else value) or 'no words'}"
    if status < 400:
        what, words = "stop", f"{words}; it redirects to {reply.headers.get('Location')}"
    return CODES.get(code, what), words


def read_json(text: str) -> Any:
    """Returns the value of a JSON text; None for any other text."""
    with contextlib.suppress(ValueError, RecursionError):
        return json.loads(text)


def read_body(text: str) -> Any:
    """Returns the JSON of a body; None for a body in no known form.

    Some gateways stream the answer although the request does not ask for it: this function joins
    the `data:` lines to one answer. The last event has the usage. A stream without `[DONE]` and
    without a finish_reason was cut off: it gets an ending that ENDINGS lacks.
    """
    lines = [line[5:].strip() for line in text.split("\n") if line.startswith("data:")]
    if not lines:
        return read_json(text)
    message, joined = defaultdict(str), {}
    end = None if "[DONE]" in lines else "a stream without an end"
    choice = {"message": message, "finish_reason": end}
    for event in map(read_json, lines):
        event = event if isinstance(event, dict) else {}
        joined |= {key: event[key] for key in ("usage", "error") if event.get(key)}
        part = read_choice(event, "delta")[1] or {"message": {}}
        for key, piece in part["message"].items():
            message[key] += flat(piece)
        choice |= {key: part[key] for key in ("finish_reason", "error") if part.get(key)}
    return joined | ({"choices": [choice]} if message else {})


def read_choice(value: Any, key: str = "message") -> tuple[dict, dict | None]:
    """Returns (fields for the log, the first choice) of a reply; None for the choice where the
    reply is no completion.

    key: "message", or "delta" in the events of a stream. Thoughts have a key of their own, whose
    name depends on the server, or are parts of the content.
    """
    fields = {"completion": None, "reasoning": "", "refusal": "", "finish_reason": None}
    try:
        choice = value["choices"][0]
        message = choice.get(key) or {"content": choice.get("text")}  # the completions API's
        content = message.get("content")
    except (KeyError, IndexError, TypeError, AttributeError):
        return fields, None
    parts = [part for part in content if isinstance(part, dict)] if type(content) is list else []
    thoughts = [message.get(key) for key in THOUGHTS] + [[part.get("thinking") for part in parts]]
    fields |= {"completion": flat(content), "refusal": flat(message.get("refusal"))}
    fields["reasoning"] = next(filter(str.strip, map(flat, thoughts)), "")
    fields["finish_reason"] = choice.get("finish_reason")
    return fields, choice | {"message": message}


def flat(content: Any) -> str:
    """Returns the text of a message's content, which may be a list of parts, without thoughts."""
    if isinstance(content, list):
        return "".join(map(flat, content))
    if isinstance(content, dict):
        return flat(content.get("text")) if content.get("type") != "reasoning" else ""
    return content if isinstance(content, str) else ""


def read_usage(usage: Any, fields: dict, body: dict, reply: Reply) -> dict:
    """Returns the numbers in a reply's `usage`. Where it has no total, this estimates one, with
    four characters a token, from request and answer, so that --max-tokens-total holds there too."""
    usage = usage if isinstance(usage, dict) else {}
    usage = {key: number for key, number in usage.items() if isinstance(number, int)}
    if "total_tokens" in usage:
        return usage
    asked = body.get("prompt") or "".join(turn["content"] for turn in body["messages"])
    answer = reply.text if fields["completion"] is None else fields["completion"]
    return {"total_tokens": len(asked + answer + fields["reasoning"]) // 4, "estimated": 1}


def error_object(value: Any) -> dict:
    """Returns the object with `code` and `param` in an error's body, which may be in a list."""
    value = value[0] if isinstance(value, list) and value else value
    value = value if isinstance(value, dict) else {}
    return value["error"] if isinstance(value.get("error"), dict) else value


def said(value: Any) -> str:
    """Returns all the words of an error, whatever its shape, in one line.

    Servers put them in `error.message`, `detail`, `errors`, a list, a text, JSON within a text or
    HTML. This collects every text in the value, each once and in order, instead of knowing forms.
    """
    if isinstance(value, Exception):
        return f"{type(value).__name__}: {value}"
    if isinstance(value, str):
        inner = read_json(value)  # such as OpenRouter's metadata.raw
        if isinstance(inner, list | dict):
            return said(inner)
        text = re.sub(r"<[^>]*>", " ", value) if value.lstrip().startswith("<") else value  # HTML
        return " ".join(text.encode("utf-8", "replace").decode().split())
    if isinstance(value, dict):  # without the request, which FastAPI sends back as `input`
        value = [part for key, part in value.items() if key != "input"]
    parts = map(said, value if isinstance(value, list) else [])
    return "; ".join(dict.fromkeys(filter(None, parts)))


def wait_asked(reply: Reply, words: str) -> float:
    """Returns the seconds of Retry-After, which may be a date, or of "try again in 1m7.66s" in the
    words; the larger of both. 0 for none, a useless one or a date that has passed; at most a
    day."""
    value, seconds = reply.headers.get("Retry-After") or "0", 0.0
    try:
        seconds = float(value)
    except ValueError:
        with contextlib.suppress(ValueError, TypeError, OverflowError):
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
    units = {"ms": 0.001, "s": 1, "m": 60, "h": 3600}
    found = re.search(r"(?:again|retry) (?:in|after) ((?:[\d.]+ ?(?:ms|[hms])[a-z]* ?)+)", words)
    parts = re.findall(r"(\d+\.?\d*|\.\d+) ?(ms|[hms])", found[1] if found else "")
    seconds = max(seconds, sum(float(number) * units[unit] for number, unit in parts))
    return min(86_400.0, seconds) if seconds > 0 else 0.0  # NaN > 0 is false


# ---- The client ----------------------------------------------------------------------------------


@dataclass
class Job:
    """An answer to ask for: number `sample` of an example. Times are time.monotonic()'s seconds."""

    example: Example
    sample: int
    attempts: int = 0  # requests sent
    tries: int = 0  # those that count toward --max-retries
    ready: float = 0.0  # when to ask again
    sent: float = 0.0


class Client:
    """Asks for the answers of jobs, many at a time.

    Workers run `post` and nothing else; the main thread alone decides what to send, writes the
    log, counts and reports, so nothing here needs a lock. A job moves between four places:

        jobs -> flying -> the log (an answer, or a final failure)
                 |  ^
                 v  |
                waiting (asked again later)  or  held (refused before the first answer)

    A killed run leaves whole lines in the log and loses only what was in flight.
    """

    def __init__(self, args: argparse.Namespace, prompt: Prompt, file: FileIO, facts: dict):
        """file: the log, to append to; facts: what `read_answers` says of it."""
        self.args, self.prompt, self.file = args, prompt, file
        base = check_url(args.base_url or os.environ.get("OPENAI_BASE_URL") or OPENAI)
        self.url = base + ("/chat/completions" if args.api == "chat" else "/completions")
        key = check_key(base)
        self.headers = {"Content-Type": "application/json", "User-Agent": "dsbs"}
        self.headers |= {"Authorization": f"Bearer {key}"} if key else {}
        self.secret = key_pattern(key)
        proxies = proxies_for(base)
        proxy = re.sub("//.*@", "//", proxies.get(urllib.parse.urlsplit(base).scheme, ""))
        self.place = f" ({self.url}{f' through the proxy {proxy}' if proxy else ''})"
        # One TLS context for all requests: urllib loads the certificates again for each by default.
        context = ssl.create_default_context() if base.startswith("https") else None
        handlers = (
            urllib.request.ProxyHandler(proxies),
            urllib.request.HTTPHandler(),
            urllib.request.HTTPSHandler(context=context),
            urllib.request.UnknownHandler(),  # such as a SOCKS proxy
        )
        # With these handlers alone, errors are replies like others, and no redirect is followed: a
        # redirected POST becomes a GET, and takes the key to another host.
        self.opener = urllib.request.OpenerDirector()
        for handler in handlers:
            self.opener.add_handler(handler)
        self.asked = {"model": args.model, "prompt_sha256": prompt.sha256}
        self.settings = {name: getattr(args, name) for name in ("api", "temperature", "seed")}
        self.settings["body"] = without_limits(args.body)
        # What is merged into every request. A key that the server refuses becomes null.
        self.body = {"max_tokens": args.max_tokens} | args.body
        self.ever = facts["settings"] is not None  # whether the log holds an answer
        self.tokens = facts["cost"]["total_tokens"]
        self.answered = 0.0  # the time of this run's last answer
        self.failures: list[str] = []  # since then, their words without numbers
        self.failed = self.unreadable = 0
        self.shown: set[str] = set()  # what say_once said
        self.flying: dict[Future, tuple[Job, dict]] = {}
        self.waiting: list[Job] = []  # to be asked again
        self.held: list[tuple[Job, str]] = []  # refused; it is open whose fault that is
        self.pause_until, self.reason, self.fatal = 0.0, "", False

    def post(self, body: dict) -> Reply:
        """Sends one request and reads what comes back within --timeout. Runs in a worker."""
        request = urllib.request.Request(self.url, json.dumps(body).encode(), self.headers)
        deadline = time.monotonic() + self.args.timeout
        raw, status, headers, broken = b"", 0, {}, None
        try:
            with self.opener.open(request, timeout=self.args.timeout) as response:
                status, headers = response.status, response.headers
                for part in iter(lambda: response.read1(1 << 16), b""):
                    raw += part
                    if time.monotonic() > deadline or len(raw) > MAX_BODY:
                        raise TimeoutError("the answer was too slow or too long")
        except (OSError, http.client.HTTPException) as error:
            broken = error
        with contextlib.suppress(zlib.error):  # some servers compress the body without being asked
            raw = zlib.decompressobj(47).decompress(raw, MAX_BODY)
        text = raw.decode(json.detect_encoding(raw), "replace")
        headers = {name.title(): self.secret.sub("[key]", headers[name]) for name in headers}
        return Reply(status, self.secret.sub("[key]", text), headers, broken)

    def request(self, job: Job) -> dict:
        """Returns the JSON of a request: few keys, then --body's, without those that are null."""
        args, input = self.args, job.example.input
        body = {"model": args.model, "temperature": args.temperature}
        if args.api == "chat":
            body["messages"] = self.prompt.turns(input)
        else:  # in chat, `stop` would cut a reasoning model's thoughts
            body |= {"prompt": self.prompt.text(input), "stop": STOP}
        if args.seed is not None:
            body["seed"] = args.seed + job.sample
        return {key: value for key, value in (body | self.body).items() if value is not None}

    def run(self, jobs: deque[Job], bar: tqdm) -> str:
        """Asks until the jobs are done or something stops it; returns why, if something did.

        Ctrl-C and SIGTERM finish what is in flight. UserError: a refusal or a denial, before the
        log holds an answer.
        """
        self.bar, done = bar, queue.SimpleQueue()
        with contextlib.ExitStack() as stack:
            pool = stack.enter_context(ThreadPoolExecutor(self.args.concurrency))
            for number in (signal.SIGINT, signal.SIGTERM):
                stack.callback(signal.signal, number, signal.signal(number, self.note))
            while self.flying or ((jobs or self.waiting) and not self.reason):
                for job in iter(lambda: self.next_job(jobs), None):
                    body = self.request(job)
                    job.sent = time.monotonic()
                    future = pool.submit(self.post, body)
                    self.flying[future] = job, body
                    future.add_done_callback(done.put)
                with contextlib.suppress(queue.Empty):  # soon enough to see a signal or a job
                    future = done.get(timeout=0.02)
                    self.take(*self.flying.pop(future), future.result())
        if self.fatal and not self.ever:
            raise UserError(self.reason)
        return self.reason

    def note(self, number: int, _: object) -> None:
        """Handles a signal; the second Ctrl-C does not wait for what is in flight."""
        if self.reason and number == signal.SIGINT:
            os._exit(130)
        self.stop(f"stopped by {signal.Signals(number).name}")

    def next_job(self, jobs: deque[Job]) -> Job | None:
        """Returns the job to ask for now, or None. A job that waits keeps its place among the
        --concurrency, so that a failing server is asked less. As long as only bad replies came,
        this waits for those in flight."""
        if self.tokens >= (self.args.max_tokens_total or math.inf):
            self.stop(f"--max-tokens-total {self.args.max_tokens_total} is reached")
        now, busy = time.monotonic(), len(self.flying) + len(self.waiting)
        careful = self.held or (self.unreadable and not self.answered)
        if self.reason or now < self.pause_until or (careful and self.flying):
            return None
        self.waiting.sort(key=lambda job: job.ready)
        if self.waiting and self.waiting[0].ready <= now:
            return self.waiting.pop(0)
        return jobs.popleft() if jobs and busy < self.args.concurrency else None

    def take(self, job: Job, body: dict, reply: Reply) -> None:
        """Logs what was paid for, then does what the reply means: settles the job, asks it again
        later, or stops the run."""
        job.attempts += 1
        try:
            what, words, fields = judge(reply, body)
        except RecursionError:  # JSON that is nested too deeply is read as no JSON
            what, words, fields = judge(reply._replace(text=reply.text[:80]), body)
        words += self.place if words else ""
        if what == "unreachable":  # a server that has answered may come back
            what = "again" if self.answered else "stop"
        if what == "unreadable" and not (self.unreadable and self.flying):
            self.unreadable += 1  # replies that were in flight together count twice at most
            what = "stop" if self.unreadable >= UNREADABLE and not self.answered else what
        if fields and what not in ("answer", "failed"):
            self.write(job, fields | {"final": False, "error": words})
        if what in ("answer", "failed"):
            self.settle(job, words, fields)
        elif what in ("denied", "stop"):
            self.stop(words, fatal=what == "denied")
        elif what == "refused" and self.drop(body, error_object(read_json(reply.text))):
            self.waiting.append(job)
        elif what == "refused":
            self.held.append((job, words + self.advice(body, reply.status, words)))
        else:
            self.retry(job, what, words, wait_asked(reply, words))
        if self.ever or not self.flying:
            self.release()

    def release(self) -> None:
        """Decides about refusals: where the log holds an answer, each belongs to its example; else
        the request itself is wrong, and the run stops."""
        for job, words in self.held:
            if self.ever:
                self.settle(job, words, {})
            else:
                self.stop(words, fatal=True)
        self.held.clear()

    def retry(self, job: Job, what: str, words: str, least: float) -> None:
        """Asks again, after `least` seconds or more, until --max-retries.

        The pause doubles with each try and is drawn at random from its upper half, so that
        requests which failed together do not come back together.
        """
        # A rate limit that lets others through is not this request's fault.
        job.tries += what != "pause" or self.answered < job.sent
        if job.tries > self.args.max_retries:
            return self.settle(job, f"after {job.attempts} attempts: {words}", {})
        self.say_once(f"{words}; trying again")
        delay = min(LONGEST, BACKOFF * 2 ** max(0, job.tries - 1)) * random.uniform(0.5, 1)
        job.ready = time.monotonic() + max(delay, least)
        if what == "pause":
            self.pause_until = max(self.pause_until, job.ready)
        self.waiting.append(job)

    def settle(self, job: Job, error: str, fields: dict) -> None:
        """Logs an answer, or a final failure with its words. Many failures in a row stop the run:
        FIRST with the same words before the log's first answer, else GIVE_UP and one for each
        worker."""
        self.write(job, fields | ({"error": error} if error else {}))
        if error:
            self.failed += 1
            self.failures.append(re.sub(r"\d+", "N", error))
            self.say_once(f"{error}; {job.example.id!r} is left out")
        else:
            self.ever, self.answered, self.failures = True, time.monotonic(), []
        self.bar.set_postfix(failed=self.failed, tokens=self.tokens, refresh=False)
        self.bar.update()
        n, alike = len(self.failures), len(set(self.failures)) == 1
        if n >= GIVE_UP + self.args.concurrency or (n >= FIRST and alike and not self.ever):
            self.stop(f"{n} failures in a row, the last: {error}")

    def write(self, job: Job, fields: dict) -> None:
        """Appends a line to the log and counts what it cost. OSError: the disk is full.

        One call writes the line, so that no crash of ours leaves half of it. The log is never
        rewritten or truncated. It holds no key, and "?" for half a surrogate pair.
        """
        example = job.example
        record = {"id": example.id, "sample": job.sample, "input_sha256": input_sha256(example)}
        record |= self.asked | {"settings": self.settings, "body": self.body}
        record |= {"completion": None, "usage": None, **fields, "attempts": job.attempts}
        record["seconds"] = round(time.monotonic() - job.sent, 3)
        record["time"] = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime())
        line = self.secret.sub("[key]", json.dumps(record, ensure_ascii=False)) + "\n"
        raw = line.encode("utf-8", "replace")
        if self.file.write(raw) < len(raw):  # a full disk takes a part
            raise OSError(f"no space left for {self.file.name}")
        self.tokens += (record["usage"] or {}).get("total_tokens", 0)

    def drop(self, body: dict, error: dict) -> bool:
        """Sends a key no more where the server names it in the form that OpenAI documents; returns
        whether it does. With several requests in flight each comes here, and the user is told
        once."""
        key, named = error.get("param"), ("unsupported_parameter", "unsupported_value")
        sent = isinstance(key, str) and key in body.keys() - set(INPUTS)
        if error.get("code") not in named or not sent:
            return False
        if key == "max_tokens":
            self.body.setdefault("max_completion_tokens", body[key])
        self.body[key] = None
        self.say_once(f"{key}: {said(error)}; going on with {json.dumps(self.body)}")
        return True

    def advice(self, body: dict, status: int, words: str) -> str:
        """Returns what may help after a refusal: /v1 after a 404, and for each key of the request
        that the server's words name, the --body that leaves it out."""
        hint = "; most servers want a --base-url that ends in /v1" if status == 404 else ""
        for key in body.keys() - set(INPUTS):
            if re.search(rf"\b{re.escape(key)}\b", words):
                hint += f"; without {key}: --body '{json.dumps({**self.args.body, key: None})}'"
        return hint

    def say_once(self, words: str) -> None:
        """Prints words, but of those that differ in numbers or at their end only the first."""
        kind = re.sub(r"\d+", "N", words)[:60]
        if kind not in self.shown:
            say(words)
        self.shown.add(kind)

    def stop(self, reason: str, fatal: bool = False) -> None:
        """Sends nothing new from now on; the first reason stands. fatal: it is a user's mistake,
        unless the log holds an answer."""
        if not self.reason:
            self.reason, self.fatal = reason, fatal


def without_limits(body: dict) -> dict:
    """Returns the part of --body that a log's answers must agree in: cut answers are asked for
    again with a higher limit."""
    return {key: value for key, value in body.items() if key not in LIMITS}


def check_url(url: str) -> str:
    """Returns the base of an API as it is given; UserError for what is no base."""
    url, form = url.strip(), "like http://localhost:8000/v1, without a password or a query in it"
    if "api-version=" in url:
        form = "https://NAME.openai.azure.com/openai/v1/ on Azure, without ?api-version="
    path = r"(/(?:(?![@?#])[!-~])*)?"
    if not re.fullmatch(rf"https?://(\[[0-9a-fA-F:]+\]|[\w.-]+)(:\d{{1,5}})?{path}", url, re.ASCII):
        raise UserError(f"--base-url must be {form}; a key comes from OPENAI_API_KEY")
    return url.rstrip("/")


def check_key(base: str) -> str:
    """Returns the key of the environment, "" for none; UserError for a bad one, or for none where
    OpenAI needs one."""
    key = (os.environ.get("OPENAI_API_KEY") or "").strip()
    if not re.fullmatch(r"[!-~]*", key):
        raise UserError("OPENAI_API_KEY holds a space or another character that no key has")
    if not key and base == OPENAI:
        raise UserError("OPENAI_API_KEY is not set and OpenAI needs one; or give --base-url")
    return key


def key_pattern(key: str) -> re.Pattern:
    """Returns a pattern for a key as it is, JSON-escaped or percent-encoded; for a very short one,
    a pattern that matches nothing.

    A gateway may echo the key in an error, an answer or a redirect's Location, in any of these
    forms, and even mix them: each character is matched in all forms.
    """
    form = r"\\*(?:{0}|[uU]{1:04x}|[uU]{1:04X}|%(?:25)*{1:02x}|%(?:25)*{1:02X})"
    forms = "".join(form.format(re.escape(c), ord(c)) for c in key)
    return re.compile(forms if len(key) > 7 else "(?!)")


def proxies_for(base: str) -> dict[str, str]:
    """Returns the environment's proxies by scheme; {} for loopback addresses and no_proxy's."""
    parts = urllib.parse.urlsplit(base)
    local = re.fullmatch(r"(.+\.)?localhost|127\.[\d.]+|::1|0\.0\.0\.0", parts.hostname)
    bypass = local or urllib.request.proxy_bypass(parts.netloc)
    return {} if bypass else urllib.request.getproxies()


def input_sha256(example: Example) -> str:
    """Returns a hash that tells whether an id still stands for the same input."""
    text = example.input if isinstance(example.input, str) else "\n".join(example.input)
    return data.sha256(text.encode())


def say(words: str) -> None:
    """Prints words above the progress bar."""
    tqdm.write(words, file=sys.stderr)


# ---- Command line --------------------------------------------------------------------------------


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Parses all flags. The key comes from the environment and is none of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--dataset", required=True, help=f"{', '.join(TASKS)}, or a folder of *.jsonl")
    add("--split", default="train", choices=data.SPLITS)
    add("--data-root", default="datasets", help="the folder of the benchmarks; default datasets")
    add("--out", help="NAME of NAME.raw.jsonl and the rest; default teacher/DATASET.SPLIT")
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
    """Checks the flags and replaces those that follow from others; UserError for a bad value."""
    lowest = {"shots": 0, "max_retries": 0, "temperature": 0, "timeout": 0.001, "limit": 1}
    lowest |= dict.fromkeys(("samples", "max_tokens", "max_tokens_total", "concurrency"), 1)
    for name, least in lowest.items():
        value = getattr(args, name)
        if value is not None and not least <= value < math.inf:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be at least {least}")
    args.retry = set(filter(None, args.retry.split(",")))
    for state in args.retry - {"truncated", "failed", "unparsed"}:
        raise UserError(f"--retry {state!r} is unknown; allowed: truncated,failed,unparsed")
    body = read_json(args.body)
    if not isinstance(body, dict) or body.keys() & set(INPUTS):
        form = """a JSON object such as '{"reasoning_effort": "low", "max_tokens": null}'"""
        raise UserError(f"--body {args.body!r}: must be {form}, without {', '.join(INPUTS)}")
    args.body = body
    if args.temperature is None:
        args.temperature = 0.7 if args.samples > 1 else 0.0
    if args.samples > 1 and args.temperature == 0:
        same = f"--samples {args.samples} would be the same at --temperature 0"
        raise UserError(f"{same}; allowed: above 0, such as 0.7")
    if not (args.model or args.parse_only or args.completions):
        raise UserError("--model is missing; give the name that the server knows")
    if args.out or not args.completions:
        args.out = args.out or f"teacher/{Path(args.dataset).name}.{args.split}"
        args.out = re.sub(r"(\.raw)?\.jsonl$", "", args.out)


def read_answers(path: Path, name: str, examples: list[Example]) -> tuple[Answers, dict]:
    """Returns (answers, facts) of a log. A later line for the same example and sample replaces an
    earlier one, but a failure replaces nothing.

    facts: how the answers were asked for, unknown endings, and the cost of all lines. UserError: a
    line belongs to another input than the examples'.
    """
    inputs = {example.id: input_sha256(example) for example in examples}
    answers, endings, asked = {}, Counter(), {}
    cost = Counter(dict.fromkeys((*TOKENS, "retries"), 0))
    task = get_task(name)
    for number, record in read_log(path):
        id, finish = record["id"], record.get("finish_reason")
        if record["input_sha256"] != inputs.get(id):
            other = f"another input than in this split of {name}; if the data changed"
            raise UserError(f"{path}:{number}: {id!r} stands for {other}, give another --out")
        cost.update({key: (record["usage"] or {}).get(key) or 0 for key in TOKENS})
        if ending_of(finish) == "unknown":
            endings[str(finish)] += 1
        if record.get("final", True):
            cost["retries"] += record["attempts"] - 1
            answer, some = read_answer(task, record), answers.setdefault(id, {})
            if answer.state != "failed":
                some[record["sample"]], asked = answer, record
            some.setdefault(record["sample"], answer)
    facts = {key: asked.get(key) for key in ("model", "prompt_sha256", "settings")}
    return answers, facts | {"unknown_endings": dict(endings), "cost": dict(cost)}


def annotate(args: argparse.Namespace, examples: list[Example], path: Path) -> str:
    """Asks for what the log lacks; returns why it stopped early, "" if it did not.

    The lock on the log keeps a second process out. UserError: the log's answers came from other
    settings. One log mixes no models, prompts or temperatures.
    """
    prompt = read_prompt(args.dataset, args.shots)
    with data.lock(path) as file:
        answers, facts = read_answers(path, args.dataset, examples)
        client = Client(args, prompt, file, facts)
        if client.ever:
            before = {"body": {}} | facts | facts["settings"]
            before["body"] = without_limits(before["body"])
            now = client.asked | client.settings
            changed = [
                f"{k} {before.get(k)} there, {v} here" for k, v in now.items() if before.get(k) != v
            ]
            if changed:
                raise UserError(f"{path} has answers to {'; '.join(changed)}; give another --out")
        with open(path, "rb") as log:
            log.seek(max(0, path.stat().st_size - 1))
            if log.read() not in (b"", b"\n"):  # a crash tore the last line
                file.write(b"\n")
        jobs, total = deque(), len(examples[: args.limit]) * args.samples
        for example, sample in itertools.product(examples[: args.limit], range(args.samples)):
            known = answers.get(example.id, {}).get(sample)
            if known is None or known.state in args.retry:
                jobs.append(Job(example, sample))
        answers.clear()  # half a million rationales are not needed while asking
        about = f"prompt {prompt.sha256[:12]} with {len(prompt.shots)} demonstrations"
        print(f"{about}; asking {args.model} for {len(jobs):,} of {total:,} answers", flush=True)
        with tqdm(total=total, initial=total - len(jobs), unit="", disable=None) as bar:
            try:
                return client.run(jobs, bar)
            except OSError as error:  # such as a full disk
                return str(error)
            finally:
                os.fsync(file.fileno())


def show(report: dict) -> None:
    """Prints the report: its numbers in one line, then each table, then the accuracy."""
    tables = {"report": {key: value for key, value in report.items() if type(value) is int}}
    tables |= {key: report.get(key) for key in ("label_counts", "unknown_endings", "cost")}
    if len(report["label_counts"]) > 10:  # free text, or equations
        del tables["label_counts"]
    for name, table in tables.items():
        if table:
            # A server's or a model's own words: no control characters for the terminal.
            words = [f"{repr(key)[1:-1]} {value:,}" for key, value in table.items()]
            print(f"{name}: {', '.join(words)}")
    if report["accuracy"] is not None:
        right = f"{report['correct']:,} of {report['scored']:,}"
        print(f"accuracy {report['accuracy']:.4f} ({right}, human labels)")


def released(args: argparse.Namespace) -> tuple[list[Example], Answers, dict]:
    """Returns (examples, answers, facts) of released completions. Where our valid is a part of
    train's file, train means the whole file, as in the published figures."""
    both = args.split == "train" and get_task(args.dataset).cut
    splits, examples, answers = ["train", "valid"] if both else [args.split], [], {}
    for split in splits:
        examples += data.load_dataset(args.dataset, split, args.data_root, args.completions)
    for e in examples:  # the loader dropped labels outside the set
        state = "answered" if e.teacher_label else "unparsed"
        answers[e.id] = {0: Answer(state, e.rationale, e.teacher_label)}
    return examples, answers, {"completions": args.completions, "splits": splits}


def run(args: argparse.Namespace) -> int:
    """Annotates or derives, as the flags say, and prints what is left; returns the exit status."""
    check(args)
    why = ""
    if args.completions:
        examples, answers, facts = released(args)
    else:
        examples = data.load_dataset(args.dataset, args.split, args.data_root)
        path = Path(args.out + ".raw.jsonl")
        why = "" if args.parse_only else annotate(args, examples, path)
        answers, facts = read_answers(path, args.dataset, examples)
    rows, report = derive(args.dataset, examples, answers, args.keep)
    about = {"dataset": args.dataset, "split": args.split, "examples": len(examples)}
    report = about | report | facts
    show(report)
    if args.out:
        data.write_jsonl(Path(args.out + ".jsonl"), rows)
        data.write_json(Path(args.out + ".report.json"), report)
        files = f"{args.out}.jsonl, report in {args.out}.report.json"
        print(f"{len(rows):,} examples (--keep {args.keep}) in {files}")
    if args.parse_only or args.completions:
        return 0
    wanted = itertools.product(examples[: args.limit], range(args.samples))
    found = [answers.get(example.id, {}).get(sample) for example, sample in wanted]
    left, failed = found.count(None), sum(a is not None and a.state == "failed" for a in found)
    if left or failed:
        why = f" ({why})" if why else ""
        say(
            f"{left:,} not asked for{why}, {failed:,} failed; the same command goes on, and asks "
            "for failures again with --retry failed"
        )
    return 3 if left or failed else 0


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0 when all that was asked for is answered, 3 when something is left
    or failed, 2 for a user's mistake."""
    try:
        return run(parse_args(argv))
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # while nothing is asked
        return 130


if __name__ == "__main__":
    sys.exit(main())
