"""A teacher for tests, and a bad one on purpose: a real HTTP server that speaks OpenAI's API.

    python tests/server.py --port 0 --faults 0.2 --seed 1 --latency 0.1     # prints its URL

Its answer is a function of the last question, its faults of (seed, question, attempt): threads
change neither. It keeps what it was asked, against which a client's log can be held.
"""

import argparse
import email.utils
import json
import random
import re
import socket
import struct
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COLOURS = {"sky": "blue", "grass": "green", "blood": "red", "snow": "white"}
FAULTS = ("429", "429 date", "500", "503", "half a body", "reset", "hang", "no choices",
          "null content", "wrong JSON", "a list")  # fmt: skip
USAGE = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
Reply = tuple[int, dict, object]  # status, headers, body: bytes, a text, or what becomes JSON


@dataclass
class Ask:
    """A request, and what came of it. `attempt` counts the requests for this question, from 1."""

    path: str
    headers: dict
    body: dict
    question: str
    attempt: int
    time: float
    status: int | str | None = None  # or the fault's name
    good: bool = False  # a right answer was sent to its last byte


def answer(question: str) -> str:
    """A rationale and a label: a colour, a sum of the two first numbers, or yes."""
    for thing, colour in COLOURS.items():
        if thing in question:
            return f"Because people say that {thing} looks {colour}. So the answer is {colour}."
    if len(numbers := re.findall(r"\b\d+\b", question)) > 1:
        return f"Both count. The answer is ({numbers[0]} + {numbers[1]})."
    return "Because we know it. So the answer is yes."


def completion(chat: bool, text: object, finish: str = "stop", **message: object) -> dict:
    """A reply in the right form."""
    content = {"message": {"role": "assistant", "content": text, **message}}
    choice = {"index": 0, "finish_reason": finish, **(content if chat else {"text": text})}
    return {"object": "completion", "choices": [choice], "usage": USAGE}


def question_of(body: dict) -> str:
    """What the prompt asks last."""
    if "prompt" in body:
        return f"\n\n{body['prompt']}".rpartition("\n\nQ: ")[2].removesuffix("\nA:")
    return body["messages"][-1]["content"].rpartition("\n\n")[2]  # a first one has an instruction


class Server:
    """`with Server() as server: ... server.url, server.seen`. `reply` may answer in its place."""

    def __init__(
        self, reply: Callable[[Ask], Reply | None] = lambda ask: None, faults: float = 0.0,
        seed: int = 0, latency: float = 0.0, hang: float = 4.0, base: str = "/v1",
        answer: Callable[[str], str] = answer, kinds: tuple[str, ...] = FAULTS, port: int = 0,
    ):  # fmt: skip
        self.reply, self.faults, self.seed, self.latency = reply, faults, seed, latency
        self.hang, self.base, self.answer, self.kinds = hang, base, answer, kinds
        self.lock, self.end, self.attempts = threading.Lock(), threading.Event(), Counter()
        self.seen: list[Ask] = []
        handler = type("Handler", (_Handler,), {"server_of_ours": self})
        self.http = _Http(("127.0.0.1", port), handler)
        self.root = f"http://127.0.0.1:{self.http.server_port}"
        self.url = self.root + base

    def __enter__(self) -> "Server":
        serve = threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True)
        serve.start()
        return self

    def __exit__(self, *_) -> None:
        self.end.set()
        self.http.shutdown()
        self.http.server_close()

    def asked(self) -> Counter:
        """Requests for each question."""
        return Counter(ask.question for ask in self.seen)

    def answered(self) -> Counter:
        """Right answers sent for each question."""
        return Counter(ask.question for ask in self.seen if ask.good)

    def fault(self, ask: Ask) -> str | None:
        draw = random.Random(f"{self.seed}/{ask.question}/{ask.attempt}")
        return draw.choice(self.kinds) if draw.random() < self.faults else None


class _Http(ThreadingHTTPServer):
    request_queue_size = 256

    def handle_error(self, *address) -> None:
        if not isinstance(sys.exc_info()[1], OSError):  # a client that was killed is no news
            super().handle_error(*address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version, server_of_ours = "HTTP/1.1", None

    def log_message(self, *_) -> None:
        pass

    def do_GET(self) -> None:  # a redirected POST would become one
        self.do_POST()

    def do_POST(self) -> None:
        ours = self.server_of_ours
        length = int(self.headers.get("Content-Length", 0))
        if len(raw := self.rfile.read(length)) < length:
            return  # a client killed before it had sent its body asked nothing
        body = json.loads(raw or "{}")
        question = question_of(body) if body else ""
        with ours.lock:
            ours.attempts[question] += 1
            ask = Ask(self.path, dict(self.headers), body, question, ours.attempts[question],
                      time.monotonic())  # fmt: skip
            ours.seen.append(ask)
        ours.end.wait(ours.latency)
        if reply := ours.reply(ask):
            return self.send(ask, *reply)
        routes = (ours.base + "/chat/completions", ours.base + "/completions")
        if self.path not in routes:
            return self.send(ask, 404, {}, {"detail": "Not Found"})
        chat = self.path == routes[0]
        good = completion(chat, ours.answer(question))
        if kind := ours.fault(ask):
            return self.fail(ask, kind, chat, good)
        ask.good = True  # before the client can know
        try:
            self.send(ask, 200, {}, good)
        except OSError:
            ask.good = False  # it was gone

    def send(self, ask: Ask, status: int, headers: dict, body: object, missing: int = 0) -> None:
        """`missing`: bytes that are announced and do not come."""
        raw = body if isinstance(body, bytes | str) else json.dumps(body)
        raw = raw.encode() if isinstance(raw, str) else raw
        ask.status = ask.status or status
        self.send_response(status)
        headers = {"Content-Type": "application/json", **headers}
        for name, value in (headers | {"Content-Length": len(raw)}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(raw[: len(raw) - missing])
        self.close_connection = bool(missing) or self.close_connection

    def fail(self, ask: Ask, kind: str, chat: bool, good: dict) -> None:
        ask.status = kind
        empty = completion(chat, None)
        if kind == "hang":
            self.server_of_ours.end.wait(self.server_of_ours.hang)
        if kind in ("hang", "reset"):
            linger = struct.pack("ii", 1, 0)  # closing sends RST
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.rfile.close()
            self.connection.close()
            self.close_connection = True
            return
        slow, html = {"error": {"message": "Slow down"}}, {"Content-Type": "text/html"}
        self.send(ask, *{
            "429": (429, {"Retry-After": "0.05"}, slow),
            "429 date": (429, {"Retry-After": email.utils.formatdate(usegmt=True)}, slow),
            "500": (500, html, "<html><body><h1>Internal Server Error</h1></body></html>"),
            "503": (503, {"Retry-After": "0"}, ""),
            "half a body": (200, {}, good, 40),
            "no choices": (200, {}, {**good, "choices": []}),
            "null content": (200, {}, empty),
            "wrong JSON": (200, {}, json.dumps(good)[:-1] + ",}"),
            "a list": (200, {}, [good]),
        }[kind])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--faults", type=float, default=0.0, help="the share of requests")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--latency", type=float, default=0.0, help="seconds")
    with Server(**vars(parser.parse_args())) as server:
        print(server.url, flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
