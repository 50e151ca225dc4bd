"""How fast it is, in a table and in bench.json: `python tests/bench.py [--quick] [NAME ...]`.

Ratios are against what a user would otherwise run (`transformers` with the released recipe),
medians of alternating runs: how many times as fast, or what part of the memory; or against what
could at best be had. Run it with nothing else running.
"""

import argparse
import gc
import hashlib
import json
import os
import platform
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from datetime import date
from importlib import metadata
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))

import data  # noqa: E402
import eval as evaluation  # noqa: E402
import train  # noqa: E402
from scripts import plan  # noqa: E402
from t5 import T5, T5Config  # noqa: E402

REAL = ROOT.parent / "shared" / "data" / "datasets"
GIB = 2**30


def teacher_command(url: str, *words: object) -> list[str]:
    """teacher.py as a user starts it."""
    python = [sys.executable, str(ROOT / "teacher.py"), "--model", "m", "--base-url", url]
    return [*python, *map(str, words)]


def watch(command: list[str], until=lambda: False) -> tuple[float, float | None, list[float]]:
    """(seconds to the end, seconds until `until()`, resident GiB every 20 ms) of a command."""
    start, reached, resident = time.perf_counter(), None, []
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as p:
        while p.poll() is None:
            lines = Path(f"/proc/{p.pid}/status").read_text().splitlines()
            sizes = [int(line.split()[1]) for line in lines if line.startswith("VmRSS")]
            resident += [size / (1 << 20) for size in sizes]
            if reached is None and until():
                reached = time.perf_counter() - start
            time.sleep(0.02)
        assert p.returncode == 0, p.stdout.read().decode()
    return time.perf_counter() - start, reached, resident


def until_written(command: list[str], path: Path) -> float:
    """Seconds until the command has written something there; then it is killed."""
    start = time.perf_counter()
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        while not (path.exists() and path.stat().st_size):
            assert process.poll() is None, f"{command} ended with {process.returncode}"
            time.sleep(0.02)
        process.kill()
    return time.perf_counter() - start


class Server:
    """tests/server.py as a process of its own."""

    def __init__(self, latency: float):
        command = [sys.executable, HERE / "server.py", "--port", "0", "--latency", str(latency)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.url = self.process.stdout.readline().split()[-1]

    def __enter__(self) -> str:
        return self.url

    def __exit__(self, *_) -> None:
        self.process.terminate()
        self.process.wait()


def teacher_speed(quick: bool, folder: Path) -> dict:
    """1,000 requests of 100 ms, 32 at a time: time over requests x latency / concurrency, from
    the first request on; the resident size in the last half over that in the first."""
    n, latency, concurrency = (320 if quick else 1000), 0.1, 32
    rows = ({"id": f"q{i}", "input": f"What is number {i}?"} for i in range(n * 10 // 9 + 1))
    write(folder / "train.jsonl", rows)
    (folder / "prompt.txt").write_text("Q: What?\nA: Because it is. So the answer is yes.\n")
    ratios, whole, growth = [], [], []
    with Server(latency) as url:
        for repeat in range(1 if quick else 3):
            out, log = folder / f"out{repeat}", folder / f"out{repeat}.raw.jsonl"
            command = teacher_command(url, "--dataset", folder, "--limit", n, "--concurrency",
                                      concurrency, "--out", out)  # fmt: skip
            seconds, started, resident = watch(command, lambda log=log: log.exists())
            assert sum(1 for _ in log.open()) == n
            ideal = n * latency / concurrency
            whole.append(seconds / ideal)
            ratios.append((seconds - started) / ideal)
            growth.append(max(resident[len(resident) // 2 :]) / max(resident[: len(resident) // 2]))
    return {"requests": n, "time over ideal": median(ratios), "with start and end": median(whole),
            "memory growth": median(growth)}  # fmt: skip


def teacher_resume(quick: bool, folder: Path) -> dict:
    """A log of e-SNLI's size (made up in its format) with all but the last answer: seconds to the
    first request, peak resident GiB, seconds to the end."""
    n, pick = (20_000 if quick else 549_367), random.Random(0)
    words = [f"word{i}" for i in range(3000)]
    sentence = lambda least: " ".join(pick.choices(words, k=least + pick.randrange(8)))  # noqa: E731
    (folder / "esnli").mkdir()
    pairs = [(sentence(8), sentence(5)) for _ in range(n)]
    rows = ({"premise": a, "hypothesis": b, "label": i % 3} for i, (a, b) in enumerate(pairs))
    write(folder / "esnli" / "esnli_train.json", rows)
    import teacher

    prompt = teacher.read_prompt("esnli").sha256
    settings = {"api": "chat", "temperature": 0.0, "seed": None, "body": {}}
    records = (
        {"id": f"esnli-train-{i}", "sample": 0, "prompt_sha256": prompt,
         "input_sha256": hashlib.sha256("\n".join(pair).encode()).hexdigest(), "model": "m",
         "settings": settings, "completion": f"Because {sentence(20)}.\nAnswer: neutral",
         "finish_reason": "stop", "usage": {"total_tokens": 900}, "attempts": 1, "seconds": 0.5,
         "time": "2026-01-01T00:00:00+00:00"} for i, pair in enumerate(pairs[:-1])
    )  # fmt: skip
    write(folder / "out.raw.jsonl", records)
    size = (folder / "out.raw.jsonl").stat().st_size
    with Server(0.0) as url:
        command = teacher_command(url, "--dataset", "esnli", "--data-root", folder, "--out",
                                  folder / "out", "--api", "chat")  # fmt: skip
        done = lambda: (folder / "out.raw.jsonl").stat().st_size > size  # noqa: E731
        seconds, asked, resident = watch(command, done)
    return {"examples": n, "seconds to the first answer": asked, "peak GiB": max(resident),
            "seconds to the end": seconds}  # fmt: skip


SHARDED = """
import sys, threading, time
from pathlib import Path
sys.path.insert(0, {root!r})
import torch, torch.distributed as dist
import torch.distributed.fsdp, train, eval as evaluation
def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) for x in lines if x.startswith("RssAnon")) / (1 << 20)
peak, measuring = 0.0, True
def watch():
    global peak
    while measuring:
        peak = max(peak, anonymous())
        time.sleep(0.005)
with evaluation.processes(torch.device("cpu")):
    rank, world = evaluation.rank_and_world()
    c = train.Config(weights={folder!r}, dataset="demo", device="cpu", precision="fp32",
                     parallel="fsdp" if world > 1 else "none")
    tokenizer = type("Tokenizer", (), {{"vocab_size": 1, "save": lambda self, folder: None}})()
    if world > 1:
        dist.init_device_mesh("cpu", (world,))
        dist.barrier()
    base = anonymous()
    threading.Thread(target=watch, daemon=True).start()
    start = time.perf_counter()
    model = train.build_model(c, tokenizer)
    loaded, seconds, peak = peak - base, time.perf_counter() - start, 0.0
    out = Path({folder!r} + "-out")
    train.save_student(c, model, tokenizer, out, 1, 0.5)
    exported, measuring = peak - base, False
    found = [None] * world
    if world > 1:
        dist.all_gather_object(found, (loaded, exported, seconds))
    else:
        found = [(loaded, exported, seconds)]
    if rank == 0:
        print("FOUND", *[max(x) for x in zip(*found)])
"""


def sharded_memory(quick: bool, folder: Path) -> dict:
    """Peak anonymous GiB of any rank, beyond the interpreter and its libraries, while pretrained
    weights are read and while a student is written: 1, 2 and 4 ranks, FSDP where several."""
    depth = 2 if quick else 12
    config = T5Config.preset("large", num_layers=depth, num_decoder_layers=depth)
    with torch.device("meta"):
        model = T5(config)
    model.to_empty(device="cpu").save_pretrained(folder / "weights")
    size = 4 * sum(p.numel() for p in model.parameters()) / (1 << 30)
    del model
    script = folder / "sharded.py"
    script.write_text(SHARDED.format(root=str(ROOT), folder=str(folder / "weights")))
    figures = {"weights, GiB": size}
    for ranks in (1, 2, 4):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                   f"--nproc_per_node={ranks}", script]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        found = [line for line in done.stdout.splitlines() if line.startswith("FOUND")]
        assert found, done.stdout + done.stderr
        loaded, exported, seconds = map(float, found[0].split()[1:])
        figures |= {f"{ranks} ranks: loading, GiB": loaded, f"{ranks} ranks: exporting": exported,
                    f"{ranks} ranks: seconds to load": seconds}  # fmt: skip
    return figures


# ---- Against transformers, on the same weights and data ------------------------------------------

THEIRS, OURS = "theirs", "ours"


def make_weights(folder: Path, quick: bool, **changes) -> Path:
    """A v1.1 small of random weights, as a folder that both load, with the bundled vocabulary."""
    changes |= dict(num_layers=2, num_decoder_layers=2) if quick else {}
    config = T5Config.preset(changes.pop("size", "small"), **changes)
    torch.manual_seed(0)
    T5(config).save_pretrained(folder)
    shutil.copyfile(ROOT / "demo" / "spiece.model", folder / "spiece.model")
    return folder


def load(who: str, folder: Path) -> torch.nn.Module:
    if who == OURS:
        return T5.from_pretrained(folder)
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers.T5ForConditionalGeneration.from_pretrained(folder)


def adamw(who: str, model: torch.nn.Module) -> torch.optim.Optimizer:
    fused = True if who == OURS else None
    return torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0, fused=fused)


def padded_batch() -> dict[str, torch.Tensor]:
    """16 rows of at most 64 + 32 tokens, a third of the places padding."""
    pick, rows = np.random.default_rng(0), []
    for longest, shortest in ((64, 20), (32, 6)):
        lengths = pick.integers(shortest, longest + 1, 16)
        lengths[0] = longest
        rows.append([pick.integers(3, 32_000, n) for n in lengths])
    offsets = [np.cumsum([0, *map(len, some)]) for some in rows]
    flat = [np.concatenate(some).astype(np.int32) for some in rows]
    made = data.TokenRows(np.zeros(16, np.uint8), flat[0], offsets[0], flat[1], offsets[1],
                          np.arange(16, dtype=np.int32), 16, 0, 0, 0, 1)  # fmt: skip
    return tensors(made, np.arange(16))


def tensors(rows, indices) -> dict[str, torch.Tensor]:
    return train.to_tensors(data.collate(rows, indices), torch.device("cpu"))


def config_of(folder: Path, quick: bool, method: str = "step-by-step") -> train.Config:
    """A run on SVAMP with PaLM's rationales where these are, else on the bundled task."""
    real = REAL.is_dir()
    return train.resolve(train.Config(
        size="small", weights=str(folder), dataset="svamp" if real else "demo", method=method,
        data_root=str(REAL), batch_size=8 if quick else 16, device="cpu",
    ))  # fmt: skip


def by_task(c: train.Config, rows, step: int) -> list[dict]:
    """A step's examples as the released recipe batches them: a padded batch for each task."""
    chosen = rows.rows_of(data.step_examples(rows.n_examples, c.batch_size, c.seed, step))
    tasks = [chosen[rows.tasks[chosen] == task] for task in (0, 1)]
    return [tensors(rows, some) for some in tasks if len(some)]


def optimizer_step(who: str, model, optimizer, batches: list[dict]) -> None:
    """Theirs is the released recipe: a padded forward pass for each task, unfused AdamW."""
    if who == OURS:
        c = train.Config(device="cpu", precision="fp32", parallel="none")
        for batch in batches:
            counts = torch.tensor([int((batch["labels"] >= 0).sum()), 0])
            train.forward_backward(model, batch, counts, c, 1)
    else:
        losses = [model(input_ids=b["input_ids"], attention_mask=b["attention_mask"],
                        labels=b["labels"]).loss for b in batches]  # fmt: skip
        (sum(losses) / len(losses)).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def alternate(calls: dict, repeats: int) -> dict[str, float]:
    """The median seconds of each, run in turn after a first run that is not counted."""
    seconds = {name: [] for name in calls}
    for repeat in range(repeats + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call(repeat)
            seconds[name].append(time.perf_counter() - start)
    return {name: median(some[1:]) for name, some in seconds.items()}


def faster(seconds: dict[str, float]) -> list[float]:
    """[theirs, ours, how many times as fast]"""
    return [seconds[THEIRS], seconds[OURS], seconds[THEIRS] / seconds[OURS]]


def step(quick: bool, folder: Path) -> dict:
    """An optimizer step on one padded batch; its share of the rate of this machine's products,
    counting the FLOPs of all padded places."""
    make_weights(folder, quick)
    models = {who: load(who, folder).train() for who in (THEIRS, OURS)}
    optimizers = {who: adamw(who, model) for who, model in models.items()}
    batch, a = padded_batch(), torch.randn(2048, 2048)
    calls = {who: lambda _, who=who: optimizer_step(who, models[who], optimizers[who], [batch])
             for who in models}  # fmt: skip
    seconds = alternate({**calls, "product": lambda _: a @ a}, 2 if quick else 9)
    rate = 2 * 2048**3 / seconds["product"]
    work = plan.flops(models[OURS].config, 16, 64, 32, recompute=False)
    share = {who: work / seconds[who] / rate for who in models}
    return {"optimizer step, s": faster(seconds), "matrix rate, GFLOP/s": rate / 1e9,
            "share of it": [share[THEIRS], share[OURS], share[OURS] / share[THEIRS]]}  # fmt: skip


def epoch(quick: bool, folder: Path) -> dict:
    """Steps of 16 examples, both tasks, with train.py's batching and with the released one: random
    order, each task's rows padded to the longest."""
    c = config_of(make_weights(folder, quick), quick)
    made = train.prepare(c)
    models = {who: load(who, folder).train() for who in (THEIRS, OURS)}
    optimizers = {who: adamw(who, model) for who, model in models.items()}

    def their_step(step: int) -> None:
        optimizer_step(THEIRS, models[THEIRS], optimizers[THEIRS], by_task(c, made.rows, step))

    def our_step(step: int) -> None:
        train.train_step(models[OURS], optimizers[OURS], c, made, step, torch.device("cpu"), 0)

    seconds = alternate({THEIRS: their_step, OURS: our_step}, 1 if quick else 3)
    theirs, ours = (c.batch_size / seconds[who] for who in (THEIRS, OURS))
    return {f"{c.dataset}, examples a second": [theirs, ours, ours / theirs]}


def decode(quick: bool, folder: Path) -> dict:
    """Greedy decoding: 24 tokens of 16 rows, encoder included; and the labels of a test set, by a
    student that has learnt for a while to write some."""
    models = {who: load(who, make_weights(folder, quick)).eval() for who in (THEIRS, OURS)}
    batch = padded_batch()
    inputs = dict(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])

    def theirs(inputs: dict, least: int, most: int) -> torch.Tensor:
        with torch.no_grad():
            return models[THEIRS].generate(**inputs, min_new_tokens=least, max_new_tokens=most,
                                           do_sample=False, num_beams=1)  # fmt: skip

    calls = {THEIRS: lambda _: theirs(inputs, 24, 24),
             OURS: lambda _: models[OURS].generate(**inputs, max_new_tokens=24)}  # fmt: skip
    seconds = alternate(calls, 2 if quick else 9)
    found = {"a token of 16 rows, s": [seconds[THEIRS] / 24, seconds[OURS] / 24,
                                       seconds[THEIRS] / seconds[OURS]]}  # fmt: skip

    c = config_of(folder, quick, "standard")
    c.lr, c.batch_size, c.steps = 1e-3, 8, 5 if quick else 50
    made = train.prepare(c)
    optimizer = adamw(OURS, models[OURS].train())
    for step in range(c.steps):
        train.train_step(models[OURS], optimizer, c, made, step, torch.device("cpu"), 0)
    models[OURS].eval().save_pretrained(folder)
    models[THEIRS] = load(THEIRS, folder).eval()
    sources = [e.input for e in made.test[: 16 if quick else None]]
    student = evaluation.Student(models[OURS], made.tokenizer, "standard", "paper", c.dataset)
    texts = {}

    def their_labels(_) -> None:  # in the order of the file, 64 at a time, padded to the longest
        texts[THEIRS] = []
        ids = made.tokenizer.encode_batch(sources, data.MAX_SOURCE)
        for i in range(0, len(ids), 64):
            some = ids[i : i + 64]
            masks = [[1] * len(row) for row in some]
            inputs = dict(input_ids=torch.from_numpy(data.pad(some, 0)),
                          attention_mask=torch.from_numpy(data.pad(masks, 0)))  # fmt: skip
            rows = theirs(inputs, 0, evaluation.LABEL_TOKENS)[:, 1:].tolist()
            texts[THEIRS] += map(made.tokenizer.decode, rows)

    def our_labels(_) -> None:
        texts[OURS] = evaluation.generate_texts(student, sources, evaluation.LABEL_TOKENS)

    seconds = alternate({THEIRS: their_labels, OURS: our_labels}, 1 if quick else 3)
    lengths = [len(made.tokenizer.encode(text)) for text in texts[OURS]]
    same = sum(map(str.__eq__, texts[THEIRS], texts[OURS]))
    found |= {f"labels of {c.dataset} test, s": faster(seconds), "labels": len(sources),
              "the same in both": same, "tokens in a label, mean": sum(lengths) / len(lengths),
              "tokens in a label, most": max(lengths)}  # fmt: skip
    return found


def deploy(quick: bool, folder: Path) -> dict:
    """Milliseconds of 8 tokens from 24-token inputs, by ways to run a student on a CPU."""
    import ctranslate2

    vocabulary = data.Tokenizer(ROOT / "demo" / "spiece.model")
    rows = np.random.default_rng(0).integers(260, vocabulary.pieces, (64, 24)).tolist()
    pieces = [vocabulary.model.IdToPiece(row) for row in rows]
    found = {}
    for size in ("tiny", "small"):
        vocab = T5.untrained_config(size, vocabulary.vocab_size).vocab_size
        path = make_weights(folder / size, quick, size=size, vocab_size=vocab)
        vocabulary.save(path)
        models = {who: load(who, path).eval() for who in (THEIRS, OURS)}
        for kind in ("float32", "int8"):
            converter = ctranslate2.converters.TransformersConverter(str(path))
            converter.convert(str(path / kind), quantization=kind)
        for threads, n in ((1, 1), (1, 64), (2, 1), (2, 64)):
            torch.set_num_threads(threads)
            ids = torch.tensor(rows[:n])

            def translate(kind: str, some=pieces[:n], path=path, threads=threads):
                translator = ctranslate2.Translator(str(path / kind), intra_threads=threads)
                options = dict(beam_size=1, min_decoding_length=8, max_decoding_length=8)
                return lambda _: translator.translate_batch(some, **options)

            def transformers(_, ids=ids, model=models[THEIRS]):
                with torch.no_grad():
                    model.generate(input_ids=ids, min_new_tokens=8, max_new_tokens=8)

            def ours(_, ids=ids, model=models[OURS]):
                assert model.generate(ids, torch.ones_like(ids), 8).shape[1] >= 8, "an early EOS"

            calls = {"transformers": transformers, OURS: ours, "CTranslate2": translate("float32")}
            seconds = alternate({**calls, "int8": translate("int8")}, 3 if quick else 15)
            for rival in ("transformers", "CTranslate2", "int8"):
                pair = [1e3 * seconds[rival], 1e3 * seconds[OURS]]
                name = f"{size}, {n} rows, {threads} threads, ms: {rival}"
                found[name] = [*pair, pair[0] / pair[1]]
    return found


def padding(quick: bool, folder: Path) -> dict:
    """Share of all source and target places that is padding, 10 steps of 64 examples of both tasks,
    with base's largest micro-batch: on a CPU or GPU, 1 rank or 16; and micro-batches of a rank."""
    make_esnli(folder, 1_000)
    found = {}
    for name, root in (("svamp", REAL), ("cqa", REAL), ("esnli", folder)):
        if not (root / name).is_dir():
            continue
        c = train.resolve(train.Config(size="base", weights="random", dataset=name, device="cpu",
                                       data_root=str(root)))  # fmt: skip
        rows = train.prepare(c).rows
        lengths = [np.diff(rows.source_offsets), np.diff(rows.target_offsets)]
        for device, ranks in (("cpu", 1), ("cpu", 16), ("cuda", 1), ("cuda", 16)):
            up = [data.round_up(x, evaluation.MULTIPLE[device]) for x in lengths]
            real, places, forwards = 0, 0, 0
            for step in range(10):
                chosen = rows.rows_of(data.step_examples(rows.n_examples, c.batch_size, 0, step))
                source, target = (x[chosen] for x in up)
                assigned = data.micro_batches(
                    source,
                    target,
                    rows.tasks[chosen],
                    c.micro_tokens,
                    ranks,
                    train.OVERHEAD[device],
                )
                real += sum(int(x[chosen].sum()) for x in lengths)
                places += sum(len(p) * (source[p].max() + target[p].max())
                              for p in sum(assigned, []) if len(p))  # fmt: skip
                forwards += len(assigned[0])
            found[f"{name}, {device}, {ranks} ranks: padding"] = float(1 - real / places)
            found[f"{name}, {device}, {ranks} ranks: forwards"] = forwards / 10
    return found


def resident() -> float:
    """GiB of this process in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / GIB


class Peak:
    """The most GiB that are resident while it is entered, beyond those at its start."""

    def __enter__(self):
        gc.collect()
        self.base, self.most, self.on = resident(), 0.0, True
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self) -> None:
        while self.on:
            self.most = max(self.most, resident() - self.base)
            time.sleep(0.001)

    def __exit__(self, *_) -> None:
        self.on = False
        self.thread.join()


def child(name: str, *words: object) -> dict:
    """One of the functions below in a process of its own that gives back what it frees."""
    settings = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, __file__, "--child", name, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, env=settings)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def make_moments(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """AdamW's, as after a first step, and nothing else that a step may leave."""
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def gradients(model: torch.nn.Module) -> float:
    """Their GiB, which every step takes and gives back."""
    return sum(p.nbytes for p in model.parameters()) / GIB


def child_step(who: str, folder: str) -> dict:
    """Memory of a second step, beyond weights, gradients, moments and interpreter."""
    model = load(who, Path(folder)).train()
    optimizer, batch = adamw(who, model), padded_batch()
    make_moments(model, optimizer)
    with Peak() as peak:
        optimizer_step(who, model, optimizer, [batch])
    return {"gib": peak.most - gradients(model)}


def child_load(who: str, folder: str) -> dict:
    """Until a first forward pass of one token has run: weights may be read as late as then."""
    if who == THEIRS:
        from transformers import T5ForConditionalGeneration  # noqa: F401
    one = torch.ones(1, 1, dtype=torch.long)
    with Peak() as peak:
        start = time.perf_counter()
        model = load(who, Path(folder))
        with torch.no_grad():
            model(input_ids=one, attention_mask=one, decoder_input_ids=one)
            sum(p.sum() for p in model.parameters())
        seconds = time.perf_counter() - start
    return {"seconds": seconds, "gib": peak.most}


def child_first_step(folder: str) -> dict:
    """What a user's own script with transformers does before and in its first step."""
    c = config_of(Path(folder), True)
    made = train.prepare(c)
    model = load(THEIRS, Path(folder)).train()
    optimizer_step(THEIRS, model, adamw(THEIRS, model), by_task(c, made.rows, 0))
    return {}


def child_first_prediction(folder: str) -> dict:
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSeq2SeqLM.from_pretrained(folder)
    model.generate(**tokenizer("What is 2 + 2?", return_tensors="pt"), max_new_tokens=64)
    return {}


def memory(quick: bool, folder: Path) -> dict:
    """Of a step on the padded batch, beyond weights, gradients, moments and interpreter."""
    make_weights(folder, quick)
    gib = {who: child("step", who, folder)["gib"] for who in (THEIRS, OURS)}
    return {"a step's, GiB": [gib[THEIRS], gib[OURS], gib[OURS] / gib[THEIRS]]}


def loading(quick: bool, folder: Path) -> dict:
    """A folder of pretrained weights, and host memory beyond the interpreter."""
    make_weights(folder, quick)
    found = {who: [] for who in (THEIRS, OURS)}
    for _ in range(1 if quick else 5):
        for who in found:
            found[who].append(child("load", who, folder))
    seconds = {who: median([one["seconds"] for one in some]) for who, some in found.items()}
    gib = {who: median([one["gib"] for one in some]) for who, some in found.items()}
    size = (folder / "model.safetensors").stat().st_size / GIB
    return {"weights, GiB": size, "time, s": faster(seconds),
            "host memory, GiB": [gib[THEIRS], gib[OURS], gib[OURS] / gib[THEIRS]]}  # fmt: skip


def starting(quick: bool, folder: Path) -> dict:
    """From the command to the first step, and to the first prediction."""
    make_weights(folder, quick)
    c, python = config_of(folder, True), sys.executable
    words = ["--size", "small", "--weights", folder, "--dataset", c.dataset, "--data-root", REAL,
             "--steps", "2", "--batch-size", c.batch_size, "--device", "cpu"]  # fmt: skip
    student = folder / "student"
    tokenizer = data.Tokenizer(folder / "spiece.model")
    train.save_student(c, load(OURS, folder), tokenizer, student, 1, 0.0)
    (folder / "one.txt").write_text("What is 2 + 2?\n")
    seconds = {name: [] for name in ("step", "prediction")}
    for repeat in range(1 if quick else 3):
        out = folder / f"run{repeat}"
        ours = until_written(
            [python, "train.py", *map(str, words), "--out", str(out)], out / "metrics.jsonl"
        )
        theirs = watch([python, __file__, "--child", "first_step", str(folder)])[0]
        seconds["step"].append((theirs, ours))
        ours = watch([python, "eval.py", str(student), "--predict", str(folder / "one.txt")])[0]
        theirs = watch([python, __file__, "--child", "first_prediction", str(student)])[0]
        seconds["prediction"].append((theirs, ours))
    found = {}
    for name, pairs in seconds.items():
        theirs, ours = (median(list(some)) for some in zip(*pairs))
        found[f"to the first {name}, s"] = [theirs, ours, theirs / ours]
    return found


# ---- How cost grows ------------------------------------------------------------------------------


def child_growth(size: str, rows: str, source: str, target: str) -> dict:
    """An optimizer step of rows without padding: median seconds, GiB beyond weights, gradients and
    moments, FLOPs of its matrix products."""
    rows, source, target = int(rows), int(source), int(target)
    model = T5(T5Config.preset(size)).train()
    optimizer, long = adamw(OURS, model), dict(dtype=torch.long)
    labels = torch.randint(3, 30_000, (rows, target))
    batch = dict(input_ids=torch.randint(3, 30_000, (rows, source)), labels=labels,
                 attention_mask=torch.ones(rows, source, **long),
                 tasks=torch.zeros(rows, **long))  # fmt: skip
    make_moments(model, optimizer)
    with Peak() as peak:
        optimizer_step(OURS, model, optimizer, [batch])
    call = {OURS: lambda _: optimizer_step(OURS, model, optimizer, [batch])}
    return {"seconds": alternate(call, 3)[OURS], "gib": peak.most - gradients(model),
            "flops": plan.flops(model.config, rows, source, target, recompute=False)}  # fmt: skip


def child_examples(n: str, folder: str) -> dict:
    """Reading and tokenising n examples in e-SNLI's format, both tasks."""
    c = train.Config(size="small", weights=folder, dataset="esnli", data_root=folder,
                     rationales="palm", device="cpu")  # fmt: skip
    with Peak() as peak:
        start = time.perf_counter()
        rows = train.prepare(train.resolve(c)).rows
        seconds = time.perf_counter() - start
    return {"seconds": seconds, "gib": peak.most, "flops": int(n), "rows": len(rows)}


def growth(quick: bool, folder: Path) -> dict:
    """Each column's cost over its first line's, and how its arithmetic grows: FLOPs of the
    step's matrix products, or examples."""
    tables = {
        "rows": [("small", n, 64, 32) for n in ((2, 4) if quick else (4, 8, 16, 32, 64))],
        "source length": [("small", 2, 2**n, 32) for n in range(6, 8 if quick else 11)],
        "size": [(s, 16, 64, 32) for s in (("tiny",) if quick else ("tiny", "small", "base"))],
    }
    at = {"rows": 1, "source length": 2, "size": 0}
    measured = {kind: [(row[at[kind]], child("growth", *row)) for row in rows]
                for kind, rows in tables.items()}  # fmt: skip
    weights, counts = make_weights(folder, True, size="tiny"), (1_000, 10_000, 100_000, 549_367)
    measured["examples"] = []
    for n in counts[: 1 if quick else None]:
        make_esnli(folder, n)
        measured["examples"].append((n, child("examples", n, weights)))
    found = {}
    for kind, lines in measured.items():
        first = lines[0][1]
        for value, line in lines:
            found |= {f"{kind} {value}: s": line["seconds"], f"{kind} {value}: GiB": line["gib"],
                      f"{kind} {value}: time grew": line["seconds"] / first["seconds"],
                      f"{kind} {value}: arithmetic": line["flops"] / first["flops"]}  # fmt: skip
    return found


def make_esnli(folder: Path, n: int) -> None:
    """n made-up training examples with completions, in the format of the released archive."""
    pick = random.Random(0)
    words = [a + b for a in ("man", "dog", "walk", "red", "play") for b in ("", "s", "ing", "er")]
    sentence = lambda least: " ".join(pick.choices(words, k=least + pick.randrange(8)))  # noqa: E731
    (folder / "esnli").mkdir(exist_ok=True)
    for split, count, files in (("train", n, 100), ("valid", 100, 2), ("test", 100, 2)):
        pairs = [(sentence(8), sentence(5)) for _ in range(count)]
        rows = ({"premise": a, "hypothesis": b, "label": i % 3} for i, (a, b) in enumerate(pairs))
        write(folder / "esnli" / f"esnli_{split}.json", rows)
        (folder / "esnli" / "llm").mkdir(exist_ok=True)
        answers = [f"{sentence(12)}.\nAnswer: neutral\n\nPremise: {a}" for a, _ in pairs]
        for i in range(files):
            part = answers[i * count // files : (i + 1) * count // files]
            (folder / "esnli" / "llm" / f"{split}_CoT_{i}.json").write_text(json.dumps(part))


def write(path: Path, rows) -> None:
    """A JSON object a line."""
    with path.open("w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


MEASURES = {"step": step, "epoch": epoch, "decode": decode, "memory": memory, "deploy": deploy,
            "padding": padding, "loading": loading,
            "start": starting, "growth": growth, "teacher-speed": teacher_speed,
            "teacher-resume": teacher_resume, "sharded-memory": sharded_memory}  # fmt: skip
AGAINST = ("step", "epoch", "decode", "deploy", "memory", "loading", "start")  # need transformers
CHILDREN = {"step": child_step, "load": child_load, "first_step": child_first_step,
            "first_prediction": child_first_prediction, "growth": child_growth,
            "examples": child_examples}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(MEASURES)}")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return print(json.dumps(CHILDREN[args.names[0]](*args.names[1:])))
    results = {"machine": f"{os.cpu_count()} x {processor()}", "date": str(date.today()),
               "python": platform.python_version(), "torch": torch.__version__,
               "transformers": version(), "threads": torch.get_num_threads(),
               "quick": args.quick}  # fmt: skip
    print(", ".join(f"{key} {value}" for key, value in results.items()))
    print(f"{'':<16}{'':<44}{'theirs':>12}{'ours':>12}{'ratio':>12}")
    for name in args.names or MEASURES:
        if name in AGAINST and not results["transformers"]:
            print(f"{name:<16}transformers is not installed (requirements-dev.txt)")
            continue
        with tempfile.TemporaryDirectory() as folder:
            results[name] = MEASURES[name](args.quick, Path(folder))
        for what, value in results[name].items():
            values = value if isinstance(value, list) else ["", value, ""]
            cells = (f"{v:>12.4g}" if v != "" else " " * 12 for v in values)
            print(f"{name:<16}{what:<44}{''.join(cells)}", flush=True)
    (ROOT / "bench.json").write_text(json.dumps(results, indent=1) + "\n")


def processor() -> str:
    """What the machine calls its processor."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def version() -> str | None:
    """Of transformers; None where it is not installed."""
    try:
        return metadata.version("transformers")
    except metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
