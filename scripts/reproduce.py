"""The paper's figures and tables, one command each:
`python scripts/reproduce.py table2 --dataset svamp --size base`.

This file owns the grids of Section 4 (which runs make a figure or a table), starting those runs
that are not there yet, and what is written of them in `results/NAME/`. A run is a `train.py`
process; how it works inside is not known here, and nothing is deleted.

name -> points (a setting each) x seeds -> runs, recognised by configuration and contents of the
data -> processes -> rows of results.csv -> table.md, figure.png, report.md.
"""

import argparse
import contextlib
import csv
import fcntl
import functools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from itertools import chain, count
from pathlib import Path
from statistics import mean, median, stdev

import numpy as np
import torch

HERE = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(HERE))

import t5  # noqa: E402
import train  # noqa: E402
from data import TASKS, Tokenizer, UserError, is_correct, load_dataset  # noqa: E402
from eval import rationale_source, write_jsonl  # noqa: E402

RESULTS, INPUTS = Path("results"), Path("results/inputs")
DEMO = Path(os.path.relpath(HERE / "demo"))
BENCHMARKS = ["esnli", "anli1", "cqa", "svamp"]
BOTH = ("standard", "step-by-step")
NAMES = [f"figure{i}" for i in range(4, 10)] + ["table1", "table2", "noise"]

# The paper's fractions are only in its pictures. 12.5 % and 0.1 % of e-SNLI are in its text.
FRACTIONS = {"esnli": (0.001, 0.01, 0.125, 0.25, 0.5, 0.75, 1.0)}
OTHERS = (0.125, 0.25, 0.5, 0.75, 1.0)
# Smallest first. The bundled task's: two shapes below `tiny`, each a third of the next.
SIZES = {"demo": ("nano", "micro", "tiny")}
PAPER_SIZES = ("base", "large", "xxl")
SHAPES = {"nano": dict(d_model=32, d_kv=8, d_ff=64), "micro": dict(d_model=64, d_kv=16, d_ff=128)}
# Shares of the unlabelled examples that are added: ASDiv for SVAMP, `demo/pool.jsonl` for the demo.
POOLS = {"svamp": (0.25, 0.5, 0.75, 1.0), "demo": (0.5, 1.0)}
ASDIV = "teacher/asdiv.train.jsonl"
TEACHERS = {"demo": ("own", str(DEMO / "weak.jsonl"))}
PAPER_TEACHERS = ("palm", "neox")

# What the paper prints: Tables 1 and 2, T5 of 220M, human labels; and Section 4's sentences.
PRINTED = {
    "esnli": {"standard": 88.38, "single-task": 88.88, "palm": 89.51, "neox": 89.12},
    "anli1": {"standard": 43.58, "single-task": 43.50, "palm": 49.58, "neox": 48.15},
    "cqa": {"standard": 62.19, "single-task": 61.37, "palm": 63.29, "neox": 63.25},
    "svamp": {"standard": 62.63, "single-task": 63.00, "palm": 65.50, "neox": 63.00},
}
CLAIMS = {
    "figure4": "12.5 % of e-SNLI suffice to pass standard fine-tuning on all of it; on ANLI, CQA "
    "and SVAMP 75, 25 and 20 % fewer examples do.",
    "figure5": "12.5 % of the unlabelled e-SNLI examples suffice to pass task distillation on all.",
    "figure6": "Few-shot CoT of PaLM 540B is passed at 220M on e-SNLI, 770M on ANLI and SVAMP, 11B "
    "on CQA, also where PaLM has PINTO tuning.",
    "figure7": "Few-shot CoT is passed at 11B or below on three of four, on SVAMP reached with "
    "ASDiv.",
    "figure8": "Few-shot CoT is passed with 0.1 % of e-SNLI at 220M and 80 % of ANLI at 770M.",
    "figure9": "Few-shot CoT is passed on ANLI with 50 % of the unlabelled examples at 11B.",
    "table1": "A teacher of 20B lifts the student too, less than one of 540B.",
    "table2": "One task instead of two lifts less, and at times lowers.",
}
TITLES = {
    "figure4": "human labels, fewer examples", "figure5": "teacher's labels, fewer examples",
    "figure6": "human labels, deployed size", "figure7": "teacher's labels, deployed size",
    "figure8": "human labels, least data and size",
    "figure9": "teacher's labels, least data and size",
    "table1": "teachers", "table2": "one task or two", "noise": "what the rationales say",
}  # fmt: skip


# ----------------------------------------------------------------------------------- the grids


@dataclass(frozen=True)
class Point:
    """A mark in a figure or an entry of a table: a setting that is run with several seeds."""

    dataset: str
    size: str
    method: str
    labels: str = "human"
    rationales: str = ""  # whose: palm, neox, own (the folder's lines), files; "" where unused
    shuffled: bool = False  # each example has another one's rationale
    fraction: float = 1.0
    pool: float = 0.0  # the share of the unlabelled examples that is added

    def __str__(self) -> str:
        said = [self.dataset, self.size, self.method, f"{self.labels} labels"]
        if self.rationales:
            said.append(f"{'shuffled ' * self.shuffled}rationales {self.rationales}")
        said.append(f"{100 * self.fraction:g} %")
        return ", ".join(said + [f"pool {100 * self.pool:g} %"] * (self.pool > 0))


@dataclass
class Scale:
    """How far a grid reaches on one data set."""

    dataset: str
    sizes: tuple[str, ...]  # of figures 6 to 9, smallest first
    base: str  # of the others
    teachers: tuple[str, ...]  # the first is the teacher, where there is one
    fractions: tuple[float, ...]
    pools: tuple[float, ...]

    def point(self, method: str, labels: str = "human", size: str = "", **more) -> Point:
        point = Point(self.dataset, size or self.base, method, labels, **more)
        unused = method == "standard" and labels == "human"
        return replace(point, rationales="" if unused else point.rationales or self.teachers[0])


def grid(name: str, s: Scale, score: Callable[[Point | None], float | None]) -> list[Point]:
    """The points of a figure or table of Section 4. `score` is a point's mean accuracy, None as
    long as it is not known, and for None the teacher's: Figures 8 and 9 are a search, whose
    points follow from earlier ones."""
    labels = "human" if name in ("figure4", "figure6", "figure8") else "teacher"
    if name in ("figure4", "figure5"):  # Section 4.1
        return [s.point(m, labels, fraction=f) for f in s.fractions for m in BOTH]
    if name in ("figure6", "figure7"):  # Section 4.2
        points = [s.point(m, labels, size) for size in s.sizes for m in BOTH]
        if name == "figure6":
            return points + [s.point("rationale-input", size=s.base)]  # PINTO tuning
        return points + [s.point(m, labels, s.sizes[-1], pool=1.0) for m in BOTH if s.pools]
    if name in ("figure8", "figure9"):  # Section 4.3: the smallest size that passes, then less data
        points = grid("figure6" if labels == "human" else "figure7", s, score)
        points = [p for p in points if p.method in BOTH]
        for method in BOTH:
            if labels == "teacher" and s.pools:
                points += [s.point(method, labels, s.sizes[-1], pool=f) for f in s.pools[:-1]]
                continue
            full = [s.point(method, labels, size) for size in s.sizes]
            teacher, scores = score(None), [score(point) for point in full]
            if teacher is not None and None not in scores:
                passing = [point for point, got in zip(full, scores) if got > teacher]
                points += [replace(p, fraction=f) for p in passing[:1] for f in s.fractions[:-1]]
        return points
    if name == "table1":
        return [s.point("standard"), *(s.point(BOTH[1], rationales=t) for t in s.teachers)]
    if name == "table2":  # Section 4.4
        return [s.point(m) for m in ("standard", "single-task", "step-by-step")]
    assert name == "noise", name
    return [s.point("standard"), s.point(BOTH[1], shuffled=True), s.point(BOTH[1])]


# ------------------------------------------------------------------------------------- the runs


@dataclass
class Run:
    """A point with a seed; without a configuration as long as files are missing for it."""

    point: Point
    seed: int
    config: train.Config | None = None
    out: Path | None = None

    @property
    def finished(self) -> bool:
        return self.out is not None and (self.out / "result.json").exists()

    @property
    def begun(self) -> bool:
        return self.out is not None and (self.out / "run.json").exists() and not self.finished


def make_inputs(p: Point, seed: int, root: str) -> dict:
    """Those flags of `train.py` that name what this grid needs and had to write first: untrained
    weights in the bundled task's shapes, training sets with the pool, shuffled rationales."""
    flags = {}
    if p.size in SHAPES:
        folder = INPUTS / f"{p.size}-seed-{seed}"
        flags["weights"] = str(folder)
        if not folder.exists():
            beside = folder.with_name(folder.name + ".new")
            shutil.rmtree(beside, ignore_errors=True)
            beside.mkdir(parents=True)
            torch.manual_seed(seed)
            vocabulary = train.DEMO_VOCABULARY
            shape = asdict(train.untrained_config("tiny", Tokenizer(vocabulary)))
            t5.T5(t5.T5Config(**{**shape, **SHAPES[p.size]})).save_pretrained(beside)
            shutil.copyfile(vocabulary, beside / "spiece.model")
            os.replace(beside, folder)
    if p.pool and p.dataset == "demo":
        folder = INPUTS / f"demo-pool-{p.pool:g}"
        folder.mkdir(parents=True, exist_ok=True)
        own = (DEMO / "train.jsonl").read_text().splitlines()
        more = (DEMO / "pool.jsonl").read_text().splitlines()
        order = np.random.default_rng(0).permutation(len(more))[: round(p.pool * len(more))]
        lines = own + [more[i] for i in np.sort(order)]
        write_jsonl(folder / "train.jsonl", [json.loads(line) for line in lines])
        for other in ("valid.jsonl", "test.jsonl", "task.json"):
            shutil.copyfile(DEMO / other, folder / other)
        flags["dataset"] = str(folder)
    if p.shuffled:
        path = INPUTS / f"{Path(p.dataset).name}-{Path(p.rationales).name}-shuffled.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        examples = load_dataset(p.dataset, "train", root, joined(p.rationales, p.dataset))
        with_rationale = [e for e in examples if e.rationale]
        order = np.random.default_rng(0).permutation(len(with_rationale))
        others = {order[i]: with_rationale[order[i - 1]] for i in range(len(order))}  # one cycle
        write_jsonl(path, [
            {"id": e.id, "rationale": others[i].rationale, "teacher_label": e.teacher_label}
            for i, e in enumerate(with_rationale)
        ])  # fmt: skip
        flags["rationales"] = [str(path)]
    return flags


def joined(rationales: str, dataset: str) -> str | list[str] | None:
    """What `load_dataset` shall join for a point's `rationales`."""
    words = rationales.split()
    return None if words in ([], ["own"]) else rationale_source(words, dataset, True)


def configure(p: Point, seed: int, given: dict) -> train.Config:
    """The run's resolved configuration; UserError where files are missing. `given`: flags of
    `train.py` that hold for all runs."""
    root = given.get("data_root", train.Config.data_root)
    flags = dict(size="tiny" if p.size in SHAPES else p.size, dataset=p.dataset, method=p.method,
                 labels=p.labels, fraction=p.fraction, seed=seed)  # fmt: skip
    if p.rationales not in ("", "own"):
        flags["rationales"] = p.rationales.split()
    if p.pool and p.dataset != "demo":
        flags |= dict(augment="asdiv", augment_fraction=p.pool)
        flags["rationales"] = [*flags["rationales"], ASDIV]
    config = train.resolve(train.Config(**{**flags, **make_inputs(p, seed, root), **given}))
    train.check_files(config)
    return config


def identity(config: dict, data: dict, weights: dict) -> str:
    """What makes two runs the same: the settings that change a result, and the contents."""
    kept = {k: v for k, v in config.items() if k not in train.MAY_CHANGE}
    return json.dumps([kept, data, weights], sort_keys=True)


def known_runs() -> dict[str, Path]:
    """Folders in `runs/` by their identity; a finished one before one that is not."""
    known = {}
    for path in sorted(Path("runs").glob("*/run.json")):
        with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
            run = json.loads(path.read_text())
            key = identity(run["config"], run["data_sha256"], run["weights_sha256"])
            if key not in known or (path.parent / "result.json").exists():
                known[key] = path.parent
    return known


class Runs:
    """All runs of a grid, as far as they are known and can be found."""

    def __init__(self, seeds: int, given: dict):
        self.seeds, self.given = range(seeds), given
        self.missing: dict[str, None] = {}  # what files are missing, in the order of asking
        self.found: dict[tuple[Point, int], Run] = {}
        self.known, self.hashes = known_runs(), {}

    def of(self, point: Point) -> list[Run]:
        return [self.get(point, seed) for seed in self.seeds]

    def get(self, point: Point, seed: int) -> Run:
        if (point, seed) not in self.found:
            run = self.found[point, seed] = Run(point, seed)
            try:
                run.config = configure(point, seed, self.given)
                run.out = self.folder(run.config)
            except UserError as error:
                self.missing |= dict.fromkeys(str(error).split("; and "))
        return self.found[point, seed]

    def folder(self, c: train.Config) -> Path:
        """Where this run is, or shall be."""
        read = (c.dataset, c.labels, c.method, str(c.rationales), c.augment, c.weights)
        if read not in self.hashes:
            self.hashes[read] = train.provenance(c)
        about = self.hashes[read]
        key = identity(asdict(c), about["data_sha256"], about["weights_sha256"])
        if key not in self.known:  # a folder of that name may hold a run with other contents
            taken, name = set(self.known.values()), train.run_name(c)
            names = (Path(name + end) for end in chain([""], map("-{}".format, count(2))))
            self.known[key] = next(p for p in names if p not in taken and not p.exists())
        return self.known[key]

    def score(self, point: Point) -> float | None:
        runs = self.of(point)
        return mean(map(accuracy, runs)) if all(run.finished for run in runs) else None


def result(run: Run) -> dict:
    return json.loads((run.out / "result.json").read_text())


def accuracy(run: Run) -> float:
    """On test; on valid where there is no test split."""
    got = result(run)
    return got["valid_accuracy"] if got["test_accuracy"] is None else got["test_accuracy"]


def seconds(out: Path) -> float:
    """From the start of a finished run to its end, and any time it lay still between."""
    return (out / "result.json").stat().st_mtime - (out / "run.json").stat().st_mtime


class Clock:
    """What runs cost, from those of the same kind that have finished."""

    def __init__(self) -> None:
        self.times = defaultdict(list)  # seconds a step
        for path in Path("runs").glob("*/result.json"):
            with contextlib.suppress(OSError, ValueError, KeyError):
                self.add(json.loads((path.parent / "run.json").read_text())["config"], path.parent)

    def kinds(self, config: dict) -> list[tuple]:
        """From the closest to the widest."""
        weights = re.sub(r"-seed-\d+$", "", config["weights"])
        size, dataset = (config["size"], weights), config["dataset"]
        return [(*size, dataset, config["method"]), (*size, config["method"]), size]

    def add(self, config: dict, out: Path) -> None:
        for kind in self.kinds(config):
            self.times[kind].append(seconds(out) / config["steps"])

    def cost(self, run: Run) -> float | None:
        if run.config is None:
            return None
        kinds = [kind for kind in self.kinds(asdict(run.config)) if kind in self.times]
        return median(self.times[kinds[0]]) * run.config.steps if kinds else None

    def left(self, runs: list[Run], workers: int) -> str:
        costs = [self.cost(run) for run in runs]
        known = [cost for cost in costs if cost is not None]
        if not known:
            return "time unknown, since no run of these sizes has finished here"
        guess = sum(known) * len(costs) / len(known) / workers
        return f"about {duration(guess)}" + ", guessed in part" * (len(known) < len(costs))


def duration(seconds: float) -> str:
    if seconds < 3600:
        return f"{seconds / 60:.0f} min" if seconds >= 100 else f"{seconds:.0f} s"
    return f"{seconds / 3600:.1f} h"


# -------------------------------------------------------------------------------- the processes


def devices() -> list[str]:
    """The GPUs that may be used, as CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    return named.split(",")[:count] if named else [str(i) for i in range(count)]


def in_use(out: Path) -> bool:
    """Does a process hold the run's folder? (Of another grid, or one whose parent was killed.)"""
    try:
        with open(out / ".lock") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        pass
    return False


class Pool:
    """Starts runs side by side, one a GPU (or a CPU worker), and sees them through."""

    TRIES = 3

    def __init__(self, workers: int | None, clock: Clock, logs: Path):
        gpus = devices()
        cores = len(os.sched_getaffinity(0))
        self.workers = workers or len(gpus) or cores
        self.free = gpus[: self.workers] if gpus else [""] * self.workers
        self.workers = len(self.free)
        self.threads = max(1, cores // self.workers)
        self.clock, self.logs = clock, logs
        self.tries, self.failed = Counter(), {}
        self.signal = 0

    def needs(self, run: Run) -> int:
        """Workers: all GPUs for a model that does not fit one."""
        on_gpu = run.config.device == "cuda"
        return self.workers if on_gpu and not train.fits(run.config, torch.device("cuda")) else 1

    def start(self, run: Run) -> tuple[subprocess.Popen, list[str]]:
        taken = [self.free.pop(0) for _ in range(self.needs(run))]
        words = shlex.split(train.command(run.config, str(run.out), resume=True))
        words = [sys.executable, str(HERE / "train.py"), *words[words.index("train.py") + 1 :]]
        if len(taken) > 1:
            words[1:1] = ["-m", "torch.distributed.run", f"--nproc_per_node={len(taken)}"]
        env = os.environ | {"OMP_NUM_THREADS": str(self.threads)}
        if taken[0]:
            env["CUDA_VISIBLE_DEVICES"] = ",".join(taken)
        self.logs.mkdir(parents=True, exist_ok=True)
        with open(self.log(run), "a") as log:  # a session of its own: Ctrl-C is ours to pass on
            process = subprocess.Popen(words, env=env, stdin=subprocess.DEVNULL, stdout=log,
                                       stderr=log, start_new_session=True)  # fmt: skip
        self.tries[run.out] += 1
        return process, taken

    def log(self, run: Run) -> Path:
        return self.logs / f"{run.out.name}.log"

    def ended(self, run: Run, status: int, todo: list[Run]) -> str:
        """One line for a process that has ended; puts its run back where that may help."""
        if run.finished:
            return f"{accuracy(run):.4f}  {run.out} ({duration(seconds(run.out))})"
        lines = self.log(run).read_text(errors="replace").splitlines()
        why = next((line for line in reversed(lines) if line.startswith("error:")), None)
        why = why or (lines[-1] if lines else "no output")
        if in_use(run.out) or "in use by another process" in why:
            todo.append(run)
            return f"is run by another process: {run.out}"
        if status != 2 and self.tries[run.out] < self.TRIES:
            todo.append(run)
            return f"ended with status {status}, is started again: {run.out} ({why})"
        self.failed[run.out] = f"status {status}: {why}"
        return f"FAILED with status {status}: {run.out}: {why}; all of it is in {self.log(run)}"

    def work(self, todo: list[Run]) -> None:
        """Until all are finished or have failed, or a signal has come: then the runs save their
        state and leave; a second signal does not wait for that."""
        todo, total, done, running = list(todo), len(todo), 0, {}

        def note(number: int, _) -> None:
            for process in running:
                with contextlib.suppress(ProcessLookupError):
                    if self.signal:
                        os.killpg(process.pid, signal.SIGKILL)
                    else:
                        process.terminate()
            if not self.signal and running:
                print("stopping; the runs save their state first", flush=True)
            self.signal = self.signal or number

        before = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
        while running or (todo and not self.signal):
            for run in [] if self.signal else list(todo):
                if run.finished or in_use(run.out):
                    if run.finished:
                        todo.remove(run)
                        done += 1
                elif self.needs(run) > len(self.free):
                    break
                else:
                    todo.remove(run)
                    process, taken = self.start(run)
                    running[process] = run, taken
                    if self.signal:  # it came while the process was started
                        process.terminate()
            for process in [p for p in running if p.poll() is not None]:
                run, taken = running.pop(process)
                self.free += taken
                if self.signal and not run.finished:
                    continue
                line = self.ended(run, process.returncode, todo)
                if run.finished:
                    self.clock.add(asdict(run.config), run.out)
                done += run not in todo
                left = todo + [run for run, _ in running.values()]
                print(f"[{done}/{total}] {line}; left: {self.clock.left(left, self.workers)}"
                      if left else f"[{done}/{total}] {line}", flush=True)  # fmt: skip
            time.sleep(0.1)
        for number, handler in before.items():
            signal.signal(number, handler)


# -------------------------------------------------------------------------------------- results


@functools.cache
def n_parameters(size: str, weights: str) -> int:
    """Of the student: what is deployed."""
    if weights == "random":
        config = train.untrained_config(size, Tokenizer(train.DEMO_VOCABULARY))
    else:
        config = t5.read_config(Path(weights))
    with torch.device("meta"), t5.Uninitialised():
        return sum(p.numel() for p in t5.T5(config).parameters())


@functools.cache
def n_examples(dataset: str, root: str) -> int:
    return len(load_dataset(dataset, "train", root))


def few_shot(dataset: str, root: str, rationales: str) -> tuple[float, int] | None:
    """The teacher's own accuracy on test, few-shot chain of thought, and the number of examples;
    None where it did not answer any. An answer that cannot be read is wrong."""
    test = load_dataset(dataset, "test", root, joined(rationales, dataset))
    scored = [e for e in test if e.label is not None]
    if not scored or not any(e.teacher_label for e in scored):
        return None
    given = [(e.teacher_label, e.label) for e in scored]
    right = sum(bool(answer) and is_correct(dataset, answer, label) for answer, label in given)
    return right / len(scored), len(scored)


def row_of(run: Run) -> dict:
    """A line of results.csv."""
    c, got, p = run.config, result(run), run.point
    about = json.loads((run.out / "run.json").read_text())
    with open(run.out / "metrics.jsonl") as file:
        steps = [json.loads(line) for line in file]
    speeds = [s["tokens_per_second"] / s["examples_per_second"] for s in steps]
    examples = round(c.fraction * n_examples(c.dataset, c.data_root))
    if c.augment:
        examples += round(c.augment_fraction * n_examples(c.augment, c.data_root))
    return {
        **asdict(p), "seed": run.seed, "parameters": n_parameters(c.size, c.weights),
        "examples": max(1, examples), "steps": c.steps, "weights": c.weights,
        "valid_accuracy": got["valid_accuracy"], "test_accuracy": accuracy(run),
        "n_test": got["n_test"], "best_step": got["best_step"],
        "tokens": round(sum(speeds) * c.batch_size), "seconds": round(seconds(run.out), 1),
        "run": str(run.out), "git_sha": about["git_sha"], "torch": about["versions"]["torch"],
    }  # fmt: skip


def teacher_row(s: Scale, root: str, parameters: float) -> dict | None:
    """The few-shot CoT baseline, which is asked and not trained."""
    got = few_shot(s.dataset, root, s.teachers[0])
    return got and {
        **asdict(Point(s.dataset, "teacher", "few-shot-cot", "none", s.teachers[0])),
        "parameters": parameters, "examples": 0, "test_accuracy": got[0], "n_test": got[1],
    }  # fmt: skip


@dataclass
class Entry:
    """A point with what its seeds gave, in their order."""

    point: Point
    scores: dict[str, float]  # by seed
    rows: list[dict]

    @property
    def mean(self) -> float:
        return mean(self.scores.values())

    @property
    def error(self) -> float | None:
        """The mean's standard error; None for a single seed."""
        n = len(self.scores)
        return stdev(self.scores.values()) / n**0.5 if n > 1 else None

    @property
    def parameters(self) -> float:
        return float(self.rows[0]["parameters"])

    def __sub__(self, other: "Entry") -> str:
        """The difference of the means, with its standard error, paired by seed."""
        pairs = [self.scores[s] - other.scores[s] for s in self.scores if s in other.scores]
        if len(pairs) < 2:
            return f"{self.mean - other.mean:+.3f}"
        return f"{mean(pairs):+.3f} (standard error {stdev(pairs) / len(pairs) ** 0.5:.3f})"


def entries(rows: Iterable[dict]) -> list[Entry]:
    """Rows, as csv gives them, by point."""
    kinds = {f: type(v) for f, v in asdict(Point("", "", "")).items()}
    read = {str: str, bool: lambda v: str(v) == "True", float: float}
    points = defaultdict(list)
    for row in rows:
        points[Point(**{f: read[kind](row[f]) for f, kind in kinds.items()})].append(row)
    return [
        Entry(p, {r.get("seed", ""): float(r["test_accuracy"]) for r in found}, found)
        for p, found in points.items()
    ]


def find(all_of: list[Entry], **wanted) -> list[Entry]:
    return [e for e in all_of if all(getattr(e.point, k) == v for k, v in wanted.items())]


def printed(name: str, p: Point) -> str:
    """The paper's number for a point of Tables 1 and 2, which is of T5 base (220M)."""
    if name not in ("table1", "table2") or p.dataset not in PRINTED:
        return ""
    key = p.rationales if p.method == "step-by-step" else p.method
    number = PRINTED[p.dataset].get(key)
    return f"{number:.2f} %" if number else ""


def table(name: str, all_of: list[Entry]) -> str:
    """All entries; a column that would say the same on each line is left out."""
    heads = ["data set", "size", "parameters", "method", "labels", "rationales", "examples",
             "steps", "seeds", "test accuracy", "standard error", "training tokens",
             "paper's (T5 220M)"]  # fmt: skip
    lines = []
    for e in all_of:
        p, first = e.point, e.rows[0]
        whose = ("another example's, " if p.shuffled else "") + (p.rationales or "none")
        share = f"{100 * p.fraction:g} % ({int(first['examples']):,})"
        if p.pool:
            share += f", with {100 * p.pool:g} % of the unlabelled"
        trained = bool(first.get("run"))
        tokens = [float(r["tokens"]) for r in e.rows] if trained else []
        lines.append([
            p.dataset, p.size, f"{e.parameters:.3g}" if e.parameters >= 1e9
            else f"{int(e.parameters):,}", p.method, p.labels, whose, share if trained else "none",
            str(first.get("steps", "")), str(len(e.rows)) if trained else "", f"{e.mean:.3f}",
            "" if e.error is None else f"{e.error:.3f}", f"{mean(tokens):,.0f}" if tokens else "",
            printed(name, p),
        ])  # fmt: skip
    shown = [i for i, head in enumerate(heads) if head == "test accuracy"
             or len({line[i] for line in lines}) > 1]  # fmt: skip
    same = [f"{heads[i]} {lines[0][i]}" for i in range(len(heads))
            if i not in shown and lines[0][i]]  # fmt: skip
    text = [" | ".join(cells[i] for i in shown) for cells in [heads, ["---"] * len(heads), *lines]]
    common = f"\n\nAll: {', '.join(same)}." if same else ""
    return "\n".join(f"| {line} |" for line in text) + common


def words(name: str, all_of: list[Entry]) -> list[str]:
    """What the numbers of one data set say, in plain sentences."""
    said = []
    few = find(all_of, method="few-shot-cot")
    labels = "human" if name in ("figure4", "figure6", "figure8") else "teacher"
    full = find(all_of, fraction=1.0, pool=0.0)

    def one(method: str, **more) -> Entry | None:
        return next(iter(find(full, method=method, shuffled=False, **more)), None)

    if name in ("figure4", "figure5"):
        plain, ours = find(all_of, method="standard"), find(all_of, method="step-by-step")
        for a, b in zip(plain, ours):
            said.append(f"at {100 * a.point.fraction:g} % step-by-step is {b - a} from standard")
        best = one("standard")
        passing = [e.point.fraction for e in ours if best and e.mean > best.mean]
        if best and passing:
            said.append(f"step-by-step passes standard on all data ({best.mean:.3f}) with "
                        f"{100 * min(passing):g} % of the examples")  # fmt: skip
        elif best:
            said.append(f"at no fraction does step-by-step pass standard on all data "
                        f"({best.mean:.3f})")  # fmt: skip
    if name in ("figure6", "figure7"):
        for a in find(full, method="standard"):
            if b := one("step-by-step", size=a.point.size):
                said.append(f"at {a.point.size} step-by-step is {b - a} from standard")
        for a, b in zip(find(all_of, method="standard", pool=1.0),
                        find(all_of, method="step-by-step", pool=1.0)):  # fmt: skip
            said.append(f"with the unlabelled examples at {a.point.size}: standard {a.mean:.3f}, "
                        f"step-by-step {b.mean:.3f}, {b - a}")  # fmt: skip
    if name in ("figure6", "figure7", "figure8", "figure9") and few:
        teacher, bar = few[0].mean, f"the teacher's few-shot CoT ({few[0].mean:.3f})"
        for method in BOTH:
            passing = [e for e in find(all_of, method=method, labels=labels) if e.mean > teacher]
            passing.sort(key=lambda e: (e.parameters, e.point.fraction, e.point.pool))
            if not passing:
                said.append(f"no {method} student passes {bar}")
                continue
            p = passing[0].point
            said.append(f"{method} passes {bar} at {p.size} with {100 * p.fraction:g} % of the "
                        "examples"
                        + f" and {100 * p.pool:g} % of the unlabelled" * (p.pool > 0))  # fmt: skip
        for pinto in find(all_of, method="rationale-input"):
            ours = find(all_of, method="step-by-step")
            passing = [e.point.size for e in ours if e.mean > pinto.mean] or ["no size"]
            said.append(f"PINTO tuning, for which the teacher is deployed too, reaches "
                        f"{pinto.mean:.3f}; step-by-step passes it at {passing[0]}")  # fmt: skip
    elif name in ("figure6", "figure7", "figure8", "figure9"):
        said.append("the teacher's answers to the test split are not there, so no few-shot CoT")
    if name in ("table1", "table2", "noise"):
        plain = one("standard")
        for e in all_of:
            if plain and e is not plain and e.point.method in train.METHODS:
                whose = ("another example's " if e.point.shuffled else "") + "rationales"
                said.append(f"{e.point.method}, {whose} of {e.point.rationales}: {e - plain} "
                            "from labels alone")  # fmt: skip
    if name == "noise" and len(all_of) == 3:
        plain, wrong, right = all_of
        said.append(f"right rationales are {right - wrong} from another example's")
        tokens = [mean(float(r["tokens"]) for r in e.rows) for e in (plain, right)]
        said.append(f"they cost {tokens[1] / tokens[0]:.1f} times the tokens of labels alone")
    return said


def draw(axes, name: str, all_of: list[Entry], title: str) -> None:
    """One panel: accuracy against examples, deployed size, fraction, or a bar for each entry."""
    axes.set_title(title, fontsize=9)
    axes.set_ylabel("test accuracy", fontsize=8)
    axes.tick_params(labelsize=7)
    colours = {"standard": "tab:blue", "step-by-step": "tab:orange", "few-shot-cot": "tab:green",
               "rationale-input": "tab:purple", "single-task": "tab:gray"}  # fmt: skip
    few = find(all_of, method="few-shot-cot")
    if name in ("table1", "table2", "noise"):
        for i, e in enumerate(all_of):
            label = e.point.method + ("\nshuffled" if e.point.shuffled else "")
            if name == "table1" and e.point.rationales:
                label += f"\n{Path(e.point.rationales).stem}"
            axes.bar(i, e.mean, yerr=e.error or 0, capsize=3, color=colours[e.point.method])
            axes.text(i, 0.02, label, ha="center", va="bottom", fontsize=7, color="white",
                      transform=axes.get_xaxis_transform())  # fmt: skip
        axes.set_xticks([])
        low = min(e.mean for e in all_of)
        axes.set_ylim(max(0, low - 0.15))
        return
    by_size, search = name in ("figure6", "figure7"), name in ("figure8", "figure9")
    pooled = search and any(0 < e.point.pool < 1 for e in all_of)
    for method in BOTH:
        found = [e for e in find(all_of, method=method) if not (by_size and e.point.pool)]
        if by_size:
            found.sort(key=lambda e: e.parameters)
            x = [e.parameters for e in found]
            more = [e for e in find(all_of, method=method) if e.point.pool]
            axes.errorbar([e.parameters for e in more], [e.mean for e in more],
                          [e.error or 0 for e in more], fmt="^", color=colours[method], capsize=3,
                          label=f"{method}, and unlabelled" if more else None)  # fmt: skip
        else:
            found.sort(key=lambda e: (e.point.size, e.point.fraction, e.point.pool))
            share = lambda e: e.point.pool if pooled else e.point.fraction  # noqa: E731
            x = [100 * share(e) if search else float(e.rows[0]["examples"]) for e in found]
        style = dict(color=colours[method], label=method, capsize=3, markersize=4)
        y, error = [e.mean for e in found], [e.error or 0 for e in found]
        axes.errorbar(x, y, error, fmt="o" if search else "o-", **style)
        if search:
            sizes = sorted({e.parameters for e in found})
            area = [30 * (1 + sizes.index(e.parameters)) ** 2 for e in found]
            axes.scatter(x, y, area, color=colours[method], alpha=0.25)
    if name in ("figure4", "figure5"):
        for e in find(all_of, method="standard", fraction=1.0):
            axes.axhline(e.mean, color=colours["standard"], linestyle=":", linewidth=1)
        axes.set_xlabel("training examples", fontsize=8)
    elif by_size:
        for e in few:
            axes.plot(e.parameters, e.mean, "*", color=colours["few-shot-cot"], markersize=10)
            for pinto in find(all_of, method="rationale-input"):  # the teacher is deployed with it
                axes.errorbar(e.parameters, pinto.mean, pinto.error or 0, fmt="s", capsize=3,
                              color=colours["rationale-input"], label="PINTO tuning")  # fmt: skip
        axes.set_xscale("log")
        axes.set_xlabel("deployed parameters", fontsize=8)
    else:
        axes.set_xlabel(f"% of the {'unlabelled' if pooled else 'training'} examples; area: size",
                        fontsize=8)  # fmt: skip
    for e in few:
        axes.axhline(e.mean, color=colours["few-shot-cot"], linestyle="--", linewidth=1,
                     label="few-shot CoT")  # fmt: skip
    axes.legend(fontsize=6)


def figure(path: Path, panels: list[tuple[str, list[Entry], str]]) -> bool:
    """Writes the panels, three a row; False where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    drawing, axes = pyplot.subplots(lines, columns, figsize=(3.6 * columns, 2.9 * lines),
                                    squeeze=False, layout="constrained")  # fmt: skip
    for place, panel in zip(axes.flat, panels):
        draw(place, *panel)
    for place in axes.flat[len(panels) :]:
        place.set_visible(False)
    drawing.savefig(path, dpi=130, metadata={"Software": None})
    pyplot.close(drawing)
    return True


# --------------------------------------------------------------------------------------- output


def write_text(path: Path, text: str) -> None:
    """Beside, and renamed."""
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(text)
    os.replace(beside, path)


def read_csv(path: Path) -> list[dict]:
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def write_csv(path: Path, rows: list[dict]) -> None:
    heads = list(dict.fromkeys(key for row in rows for key in row))
    beside = path.with_name(path.name + ".tmp")
    with open(beside, "w", newline="") as file:
        writer = csv.DictWriter(file, heads)
        writer.writeheader()
        writer.writerows(rows)
    os.replace(beside, path)


def provenance(rows: list[dict]) -> list[str]:
    """Versions, seeds, and what was read, of trained rows."""
    trained = [row for row in rows if row.get("run")]
    files: dict[str, str] = {}
    for row in trained:
        with contextlib.suppress(OSError, ValueError):
            files |= json.loads(Path(row["run"], "run.json").read_text())["data_sha256"]
    several = lambda key: ", ".join(sorted({str(row[key]) for row in trained}))  # noqa: E731
    weights = sorted({re.sub(r"-seed-\d+$", "", row["weights"]) for row in trained})
    return [
        f"- {len(trained)} runs, seeds {several('seed')}; torch {several('torch')}; commit "
        f"{several('git_sha')}; {sum(float(row['seconds']) for row in trained) / 3600:.1f} hours "
        "of runs in all",
        f"- started from: {', '.join(weights)}"
        + (" (random and `results/inputs/*`: untrained)" if untrained(trained) else ""),
        "- sha256 of the data, first 12 digits: "
        + ", ".join(f"{path} {str(digest)[:12]}" for path, digest in sorted(files.items())),
    ]


def untrained(rows: list[dict]) -> bool:
    return any(row.get("weights", "").startswith((str(INPUTS), "random")) for row in rows)


def write_results(
    name: str, grids: dict[tuple[str, str], list[Point]], rows: list[dict], not_run: list[str]
) -> Path:
    """results.csv, table.md, figure.png and report.md; rows of other data sets that an earlier
    command left in results.csv are kept, and told with these."""
    folder = RESULTS / name
    folder.mkdir(parents=True, exist_ok=True)
    now = {data for _, data in grids}
    earlier = [row for row in read_csv(folder / "results.csv") if row["dataset"] not in now]
    rows = earlier + rows
    write_csv(folder / "results.csv", rows)
    rows = read_csv(folder / "results.csv")
    part = next(iter(grids))[0]
    for data in dict.fromkeys(row["dataset"] for row in earlier):
        grids[part, data] = [e.point for e in entries(rows) if e.point.dataset == data]

    panels, tables, sections = [], [], []
    for (part, data), points in sorted(grids.items(), key=lambda item: NAMES.index(item[0][0])):
        found = {e.point: e for e in entries(rows)}
        chosen = [found[p] for p in points if p in found]
        if part in ("figure6", "figure7", "figure8", "figure9"):
            chosen += [e for e in found.values()
                       if e.point.method == "few-shot-cot" and e.point.dataset == data
                       and e.point not in points]  # fmt: skip
        if not any(e.rows[0].get("run") for e in chosen):
            continue
        title = f"{part}, {data}: {TITLES[part]}"
        panels.append((part, chosen, title))
        tables.append(f"## {title}\n\n{table(part, chosen)}\n")
        said = "\n".join(f"- {line}." for line in words(part, chosen))
        claim = f"\n\nThe paper: {CLAIMS[part]}" if part in CLAIMS else ""
        sections.append(f"## {title}\n\n{table(part, chosen)}\n\n{said}{claim}\n")
    if not panels:  # nothing has finished
        return folder
    write_text(folder / "table.md", "\n".join(tables))
    drawn = figure(folder / "figure.png", panels)
    again = shlex.join(["python", "scripts/reproduce.py", *sys.argv[1:]])
    notes = not_run or ["nothing that this command asks for"]
    write_text(folder / "report.md", "\n".join([
        f"# {name}", "", f"`{again}`, {time.strftime('%Y-%m-%d')}", "",
        *(["![accuracies](figure.png)", ""] if drawn else []),
        "Accuracy is on test, once, by the student that was best on valid; means over seeds with "
        "their standard error; differences are paired by seed. Numbers called the paper's are "
        "copied from it (T5 pretrained, PaLM 540B) and were not measured here.", "",
        *provenance(rows), "", *sections, "## What was not run", "",
        *(f"- {line}" for line in notes), "",
    ]))  # fmt: skip
    return folder


def gather() -> int:
    """All reports on one page, `results/report.md`."""
    reports = sorted(RESULTS.glob("*/report.md"))
    if not reports:
        raise UserError(f"no {RESULTS}/*/report.md yet; run a figure or table first")
    page = ["# Reproduction of Distilling Step-by-Step (Hsieh et al., 2023)\n"]
    for path in reports:
        text = re.sub(r"^#", "##", path.read_text(), flags=re.MULTILINE)
        page.append(text.replace("](figure.png)", f"]({path.parent.name}/figure.png)"))
    write_text(RESULTS / "report.md", "\n".join(page))
    print(f"{len(reports)} reports in {RESULTS / 'report.md'}")
    return 0


# --------------------------------------------------------------------------------- command line


def parse_args(argv: list[str] | None) -> tuple[argparse.Namespace, dict]:
    """Our flags, and those for `train.py`, which hold for all runs."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], allow_abbrev=False,
        epilog="Any other flag is train.py's and holds for all runs, such as --weights or --steps.",
    )  # fmt: skip
    add = parser.add_argument
    add("name", choices=[*NAMES, "demo", "report"])
    add("--dataset", nargs="+", help=f"default {' '.join(BENCHMARKS)}; demo, or a folder")
    add("--size", nargs="+", help="smallest first; default base, of figures 6 to 9 base large xxl")
    add("--seeds", type=int, help="how many; default 4")
    add("--rationales", nargs="+", action="append",
        help="a teacher: palm, neox or files; once for each teacher of table1")  # fmt: skip
    add("--workers", type=int, help="runs side by side; default one a GPU, or one a CPU core")
    add("--dry-run", action="store_true", help="say what would be run, and stop")
    add("--quick", action="store_true", help="one seed, two fractions, 40 steps: does it run")
    add("--teacher-params", type=float, default=540e9, help="of figures 6 and 7; default 540e9")
    args, rest = parser.parse_known_args(argv)
    given = vars(train.parse_args(rest))
    ours = {"method", "labels", "fraction", "seed", "augment", "augment_fraction", "out", "resume",
            "plan", "gpus", "json", "timeout"} & given.keys()  # fmt: skip
    if ours:
        flag = min(ours).replace("_", "-")
        raise UserError(f"--{flag} is set by the grid itself; allowed: train.py's other flags")
    for flag in ("seeds", "workers", "teacher_params"):
        if getattr(args, flag) is not None and not getattr(args, flag) > 0:
            raise UserError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: must be positive")
    return args, given


def scales(args: argparse.Namespace) -> list[Scale]:
    """What is asked for, on each data set."""
    datasets = ["demo"] if args.name == "demo" else args.dataset or BENCHMARKS
    if args.name == "demo" and args.dataset:
        raise UserError("demo is all of it on the bundled task; for another data set give a figure "
                        "or table, such as `table2 --dataset svamp`")  # fmt: skip
    made = []
    for data in datasets:
        sizes = tuple(args.size or SIZES.get(data, PAPER_SIZES))
        for size in sizes:
            train.one_of("size", size, [*train.RECIPES, *(SHAPES if data == "demo" else ())])
        base = sizes[-1] if data == "demo" and not args.size else sizes[0]
        own = PAPER_TEACHERS if data in TASKS else ("own",)
        teachers = tuple(map(" ".join, args.rationales or ())) or TEACHERS.get(data, own)
        fractions = (0.5, 1.0) if args.quick else FRACTIONS.get(data, OTHERS)
        pools = POOLS.get(data, ())[-1 if args.quick else None :]
        made.append(Scale(data, sizes, base, teachers, fractions, pools))
    return made


def describe(grids: dict, runs: Runs, clock: Clock, workers: int) -> None:
    """What will be run, what is there, and how long the rest may take."""
    for (part, data), points in grids.items():
        print(f"{part}, {data}: {TITLES[part]}")
        for point in points:
            found = runs.of(point)
            states = [f"{sum(r.finished for r in found)} finished",
                      f"{n} begun" if (n := sum(r.begun for r in found)) else ""]  # fmt: skip
            print(f"  {point}: {len(found)} seeds, {', '.join(filter(None, states))}")
        if part in ("figure8", "figure9"):
            print("  then, where a student passes the teacher: the other fractions at the smallest "
                  "that does")  # fmt: skip
    every = list(unique(grids, runs))
    left = [run for run in every if not run.finished]
    print(f"{len(every)} runs, {len(every) - len(left)} finished, {sum(r.begun for r in left)} "
          f"begun; {len(left)} to run, {workers} side by side"
          + (f": {clock.left(left, workers)}" if left else ""), flush=True)  # fmt: skip


def unique(grids: dict, runs: Runs) -> Iterable[Run]:
    """Each run once, in the grids' order."""
    for point in dict.fromkeys(chain.from_iterable(grids.values())):
        yield from runs.of(point)


def reproduce(args: argparse.Namespace, given: dict) -> int:
    """Plans, runs what is missing, writes results; the exit status."""
    quick = dict(steps=40, eval_every=20) if args.quick else {}
    runs = Runs(args.seeds or (1 if args.quick else 4), quick | given)
    where = scales(args)
    if "weights" in given and any(len(s.sizes) > 1 for s in where) and given["weights"] != "random":
        raise UserError(f"--weights {given['weights']} for several sizes; give one --size with it")
    names = NAMES if args.name == "demo" else [args.name]
    name = args.name + "-quick" * args.quick
    root = given.get("data_root", train.Config.data_root)
    teachers = {}
    if not {"demo", "figure6", "figure7", "figure8", "figure9"}.isdisjoint([args.name]):
        for s in where:
            try:
                teachers[s.dataset] = teacher_row(s, root, args.teacher_params)
            except UserError as error:
                runs.missing |= {str(error): None}

    def grids() -> dict[tuple[str, str], list[Point]]:
        def score(s: Scale, point: Point | None) -> float | None:
            row = teachers.get(s.dataset)
            return runs.score(point) if point else row and row["test_accuracy"]

        return {(n, s.dataset): grid(n, s, functools.partial(score, s))
                for s in where for n in names}  # fmt: skip

    clock = Clock()
    pool = Pool(args.workers, clock, RESULTS / name / "logs")
    describe(grids(), runs, clock, pool.workers)
    if runs.missing:
        print("missing:", *runs.missing, sep="\n  ", file=sys.stderr)
        return 0 if args.dry_run else 2
    if args.dry_run:
        return 0
    while not pool.signal:
        todo = [r for r in unique(grids(), runs) if not r.finished and r.out not in pool.failed]
        if not todo:
            break
        pool.work(todo)
    every = list(unique(grids(), runs))
    rows = [row_of(run) for run in every if run.finished]
    left = [f"{run.out}: {pool.failed.get(run.out, 'not finished')}" for run in every
            if not run.finished]  # fmt: skip
    folder = write_results(name, grids(), rows + [r for r in teachers.values() if r], left)
    print(f"{len(rows)} of {len(every)} runs are finished; {folder}/ has results.csv, table.md, "
          "report.md and, where matplotlib is installed, figure.png")  # fmt: skip
    if pool.signal:
        print("stopped; the same command goes on")
        return 128 + pool.signal
    print((folder / "table.md").read_text() if rows else "", end="")
    for line in left:
        print(f"FAILED {line}", file=sys.stderr)
    return 1 if left else 0


def main(argv: list[str] | None = None) -> int:
    """Exit status 0; 1 where a run failed, 2 for a user's mistake or missing files, 130 or 143
    after a signal."""
    try:
        args, given = parse_args(argv)
        return gather() if args.name == "report" else reproduce(args, given)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # before or after the runs
        return 130


if __name__ == "__main__":
    sys.exit(main())
