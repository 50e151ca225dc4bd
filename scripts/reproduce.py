"""The paper's figures and tables, one command each:
`python scripts/reproduce.py table2 --dataset svamp --size base`.

This file owns the grids of Section 4 (which runs make a figure or a table) and starting those runs
that are not there yet. A run is a `train.py` process; how it works inside is not known here, and
nothing is deleted. What comes out is written by `tables.py`.

name -> points (a setting each) x seeds -> runs, recognised by configuration and contents of the
data -> processes -> rows of results.csv -> results/NAME/.
"""

import argparse
import contextlib
import ctypes
import fcntl
import functools
import hashlib
import json
import os
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
from statistics import mean, median

import numpy as np
import torch

HERE = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(HERE))

import t5  # noqa: E402
import train  # noqa: E402
from data import (  # noqa: E402
    TASKS,
    Tokenizer,
    UserError,
    get_task,
    has_split,
    is_correct,
    load_dataset,
)
from eval import rationale_source  # noqa: E402
from scripts.tables import (  # noqa: E402
    BESIDE_TEACHER,
    BOTH,
    INPUTS,
    NAMES,
    RESULTS,
    TITLES,
    Point,
    gather,
    without_seed,
    write_results,
    write_text,
)

DEMO = Path(os.path.relpath(HERE / "demo"))
BENCHMARKS = ["esnli", "anli1", "cqa", "svamp"]

# Most of the paper's fractions are only in its pictures; its text has e-SNLI's 12.5 and 0.1 %.
FRACTIONS = {
    "esnli": (0.001, 0.01, 0.125, 0.25, 0.5, 0.75, 1.0),
    "demo": (0.125, 0.25, 0.5, 1.0),  # so that all of it fits two hours on two cores
}
OTHERS = (0.125, 0.25, 0.5, 0.75, 1.0)
# Smallest first. The bundled task's: two shapes below `tiny`, each a third of the next.
SIZES = {"demo": ("nano", "micro", "tiny")}
PAPER_SIZES = ("base", "large", "xxl")
SHAPES = {"nano": dict(d_model=32, d_kv=8, d_ff=64), "micro": dict(d_model=64, d_kv=16, d_ff=128)}
# Shares of the unlabelled examples that are added: ASDiv for SVAMP, `demo/pool.jsonl` for the demo.
POOLS = {"svamp": (0.25, 0.5, 0.75, 1.0), "demo": (1.0,)}
ASDIV = "teacher/asdiv.train.jsonl"
TEACHERS = {"demo": ("own", str(DEMO / "weak.jsonl"))}
PAPER_TEACHERS = ("palm", "neox")
BY_SIZE = (*BESIDE_TEACHER, "demo")  # grids of several sizes


# ----------------------------------------------------------------------------------- the grids


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


def untrained(size: str, seed: int) -> Path:
    """Weights of one of SHAPES, drawn from the seed, with the bundled vocabulary."""
    folder = INPUTS / f"{size}-seed-{seed}"
    if not folder.exists():
        beside = folder.with_name(f"{folder.name}.{os.getpid()}.new")
        beside.mkdir(parents=True)
        tiny = train.untrained_config("tiny", Tokenizer(train.DEMO_VOCABULARY))
        torch.manual_seed(seed)
        t5.T5(replace(tiny, **SHAPES[size])).save_pretrained(beside)
        shutil.copyfile(train.DEMO_VOCABULARY, beside / "spiece.model")
        with contextlib.suppress(OSError):  # another grid was faster
            os.replace(beside, folder)
    return folder


def with_pool(share: float) -> Path:
    """The bundled task with that share of its unlabelled examples in the training set."""
    folder = INPUTS / f"demo-pool-{share:g}"
    own, more = ((DEMO / name).read_text().splitlines() for name in ("train.jsonl", "pool.jsonl"))
    order = np.random.default_rng(0).permutation(len(more))[: round(share * len(more))]
    write_text(folder / "train.jsonl", "\n".join(own + [more[i] for i in np.sort(order)]) + "\n")
    for other in ("valid.jsonl", "test.jsonl", "task.json"):
        write_text(folder / other, (DEMO / other).read_text())
    return folder


def shuffled(dataset: str, rationales: str, root: str) -> Path:
    """A teacher's file in which each training example has another one's rationale."""
    told_apart = hashlib.sha256(f"{dataset} {rationales} {root}".encode()).hexdigest()[:8]
    path = INPUTS / f"{Path(dataset).name}-shuffled-{told_apart}.jsonl"
    examples = load_dataset(dataset, "train", root, joined(rationales, dataset))
    examples = [e for e in examples if e.rationale]
    order = np.random.default_rng(0).permutation(len(examples))
    other = {order[i]: examples[order[i - 1]].rationale for i in range(len(order))}  # one cycle
    rows = [{"id": e.id, "rationale": other[i], "teacher_label": e.teacher_label}
            for i, e in enumerate(examples)]  # fmt: skip
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
    return path


def joined(rationales: str, dataset: str) -> str | list[str] | None:
    """What `load_dataset` shall join for a point's `rationales`."""
    words = rationales.split()
    return None if words in ([], ["own"]) else rationale_source(words, dataset, True)


def flags_of(c: train.Config) -> list[str]:
    """The flags of train.py that give these settings."""
    words = []
    for name, value in vars(c).items():
        flag = name.replace("_", "-")
        if value is None or name == "parallel":  # it follows from the number of processes
            continue
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", *map(str, value if isinstance(value, list) else [value])]
    return words


def configure(p: Point, seed: int, given: dict, shuffle: Callable = shuffled) -> train.Config:
    """The run's resolved configuration; UserError where files are missing. `given`: flags of
    `train.py` that hold for all runs."""
    root = given.get("data_root", train.Config.data_root)
    flags = dict(size="tiny" if p.size in SHAPES else p.size, dataset=p.dataset, method=p.method,
                 labels=p.labels, fraction=p.fraction, seed=seed)  # fmt: skip
    if p.size in SHAPES:
        flags["weights"] = str(untrained(p.size, seed))
    if p.shuffled:
        flags["rationales"] = [str(shuffle(p.dataset, p.rationales, root))]
    elif p.rationales not in ("", "own"):
        flags["rationales"] = p.rationales.split()
    if p.pool and p.dataset == "demo":
        flags["dataset"] = str(with_pool(p.pool))
    elif p.pool:
        flags |= dict(augment="asdiv", augment_fraction=p.pool)
        flags["rationales"] = [*flags["rationales"], ASDIV]
    config = train.resolve(train.Config(**{**flags, **given}))
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
        self.shuffled = functools.cache(shuffled)  # the same for all seeds

    def of(self, point: Point) -> list[Run]:
        return [self.get(point, seed) for seed in self.seeds]

    def get(self, point: Point, seed: int) -> Run:
        if (point, seed) not in self.found:
            run = self.found[point, seed] = Run(point, seed)
            try:
                run.config = configure(point, seed, self.given, self.shuffled)
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
    """Of a finished run: its `result.json`."""
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
        size, dataset = (config["size"], without_seed(config["weights"])), config["dataset"]
        return [(*size, dataset, config["method"]), (*size, config["method"]), size]

    def add(self, config: dict, out: Path) -> None:
        for kind in self.kinds(config):
            self.times[kind].append(seconds(out) / config["steps"])

    def cost(self, run: Run) -> float | None:
        if run.config is None:
            return None
        kinds = [kind for kind in self.kinds(asdict(run.config)) if kind in self.times]
        return median(self.times[kinds[0]]) * run.config.steps if kinds else None

    def left(self, runs: list[Run], shares: list[float]) -> str:
        """In words; `shares`: what part of the machine each run takes."""
        costs = [self.cost(run) for run in runs]
        known = [cost * share for cost, share in zip(costs, shares) if cost is not None]
        if not known:
            return "time unknown, since no run of these sizes has finished here"
        guess = sum(known) * len(costs) / len(known)
        return f"about {duration(guess)}" + ", guessed in part" * (len(known) < len(costs))


def duration(seconds: float) -> str:
    """In words."""
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


def end_with_parent() -> None:
    """A run whose grid was killed saves and leaves, so that its GPU is free (Linux alone)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def kill(pid: int) -> None:
    """SIGKILL to a process and all that it started, torchrun's sessions too."""
    with contextlib.suppress(OSError):
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            kill(int(child))
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


class Pool:
    """Starts runs side by side, one a GPU (or a CPU worker), and sees them through."""

    TRIES = 3

    def __init__(self, workers: int | None, clock: Clock, logs: Path):
        cores = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))
        cores = len(cores(0))
        self.free = devices() or [""] * (workers or cores)
        self.places = len(self.free)
        self.workers = min(workers or self.places, self.places)
        self.threads = max(1, cores // self.workers)
        self.clock, self.logs = clock, logs
        self.tries, self.failed, self.logged = Counter(), {}, {}
        self.signal = 0

    def needs(self, run: Run) -> int:
        """Places: all GPUs for a model that does not fit one."""
        on_gpu = run.config is not None and run.config.device == "cuda"
        return self.places if on_gpu and train.default_parallel(run.config.size) == "fsdp" else 1

    def left(self, runs: list[Run]) -> str:
        """How long these may take, in words."""
        shares = [max(self.needs(run) / self.places, 1 / self.workers) for run in runs]
        return self.clock.left(runs, shares)

    def start(self, run: Run) -> tuple[subprocess.Popen, list[str]]:
        taken = [self.free.pop(0) for _ in range(self.needs(run))]
        words = [sys.executable, str(HERE / "train.py"), *flags_of(run.config), "--resume",
                 "--out", str(run.out)]  # fmt: skip
        if len(taken) > 1:
            words[1:1] = ["-m", "torch.distributed.run", "--standalone", "--shutdown-timeout=600",
                          f"--nproc_per_node={len(taken)}"]  # fmt: skip
        env = os.environ | {"OMP_NUM_THREADS": str(self.threads)}
        if taken[0]:
            env["CUDA_VISIBLE_DEVICES"] = ",".join(taken)
        self.logs.mkdir(parents=True, exist_ok=True)
        with open(self.log(run), "a") as log:  # a session of its own: Ctrl-C is ours to pass on
            self.logged[run.out] = log.tell()
            process = subprocess.Popen(words, env=env, stdin=subprocess.DEVNULL, stdout=log,
                                       stderr=log, start_new_session=True,
                                       preexec_fn=end_with_parent)  # fmt: skip
        self.tries[run.out] += 1
        return process, taken

    def log(self, run: Run) -> Path:
        return self.logs / f"{run.out.name}.log"

    def ended(self, run: Run, status: int) -> str:
        """One line for a process that has ended; puts its run back where that may help."""
        if run.finished:
            self.clock.add(asdict(run.config), run.out)
            return f"{accuracy(run):.4f}  {run.out} ({duration(seconds(run.out))})"
        said = self.log(run).read_bytes()[self.logged[run.out] :]
        lines = said.decode(errors="replace").splitlines()
        why = next((line for line in reversed(lines) if line.startswith("error:")), None)
        why = why or (lines[-1] if lines else "no output")
        if "in use by another process" in why:
            self.todo.append(run)
            return f"is run by another process: {run.out}"
        if status != 2 and self.tries[run.out] < self.TRIES:
            self.todo.append(run)
            return f"ended with status {status}, is started again: {run.out} ({why})"
        self.failed[run.out] = f"status {status}: {why}"
        return f"FAILED with status {status}: {run.out}: {why}; all of it is in {self.log(run)}"

    def say(self, line: str) -> None:
        left = self.todo + [run for run, _ in self.running.values()]
        time_left = f"; left: {self.left(left)}" if left else ""
        print(f"[{self.total - len(left)}/{self.total}] {line}{time_left}", flush=True)

    def start_some(self) -> None:
        """As many as there is room for; others may run, or have run, some of them meanwhile."""
        for run in list(self.todo):
            if run.finished:
                self.todo.remove(run)
                self.say(f"finished by another process: {run.out}")
            elif in_use(run.out):
                if run.out not in self.waiting:
                    self.say(f"is run by another process: {run.out}")
                self.waiting.add(run.out)
            elif len(self.running) == self.workers or self.needs(run) > len(self.free):
                break
            else:
                self.todo.remove(run)
                process, taken = self.start(run)
                self.running[process] = run, taken
                if self.signal:  # it came while the process was started
                    process.terminate()

    def note(self, number: int, _) -> None:
        """The first signal lets the runs save their state and leave; a second does not wait."""
        first, self.signal = not self.signal, self.signal or number
        for process in self.running:
            with contextlib.suppress(ProcessLookupError):
                if first:
                    process.terminate()
                else:
                    kill(process.pid)
        if first and self.running:
            print("stopping; the runs save their state first", flush=True)

    def work(self, runs: list[Run]) -> None:
        """Until all have finished or failed, or a signal has come."""
        self.todo, self.total, self.running, self.waiting = list(runs), len(runs), {}, set()
        before = {s: signal.signal(s, self.note) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            while self.running or (self.todo and not self.signal):
                if not self.signal:
                    self.start_some()
                for process in [p for p in self.running if p.poll() is not None]:
                    run, taken = self.running.pop(process)
                    self.free += taken
                    if run.finished or not self.signal:
                        self.say(self.ended(run, process.returncode))
                time.sleep(0.1)
        finally:  # whatever happened, no run is left behind
            for process in self.running:
                process.terminate()
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
    """Of the whole training split."""
    return len(load_dataset(dataset, "train", root))


def few_shot(dataset: str, root: str, rationales: str) -> tuple[float, int, int] | None:
    """The teacher's own accuracy on test, few-shot chain of thought, the number of examples, and of
    those without an answer that can be read, which are wrong; None where none has one."""
    if not has_split(dataset, "test", root):
        return None
    test = load_dataset(dataset, "test", root, joined(rationales, dataset))
    scored = [e for e in test if e.label is not None]
    if not scored or not any(e.teacher_label for e in scored):
        return None
    given = [(e.teacher_label, e.label) for e in scored]
    task = get_task(dataset)
    right = sum(bool(answer) and is_correct(task, answer, label) for answer, label in given)
    return right / len(scored), len(scored), sum(not answer for answer, _ in given)


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
        "valid_accuracy": got["valid_accuracy"], "test_accuracy": got["test_accuracy"],
        "accuracy": accuracy(run),
        "scored_on": ("valid" if got["test_accuracy"] is None else "test")
        + f", {got['labels']} labels",
        "n_test": got["n_test"], "best_step": got["best_step"],
        "tokens": round(sum(speeds) * c.batch_size), "seconds": round(seconds(run.out), 1),
        "run": str(run.out), "git_sha": about["git_sha"], "torch": about["versions"]["torch"],
    }  # fmt: skip


def teacher_row(s: Scale, root: str, parameters: float) -> dict | None:
    """The few-shot CoT baseline, which is asked and not trained."""
    got = few_shot(s.dataset, root, s.teachers[0])
    return got and {
        **asdict(Point(s.dataset, "teacher", "few-shot-cot", "none", s.teachers[0])),
        "parameters": parameters, "examples": 0, "accuracy": got[0], "n_test": got[1],
        "unanswered": got[2], "scored_on": "test, human labels",
    }  # fmt: skip


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
    add("--size", nargs="+", help="default base; several for figures 6 to 9: base large xxl")
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
            "plan", "gpus", "json", "timeout", "parallel"} & given.keys()  # fmt: skip
    if ours:
        flag = min(ours).replace("_", "-")
        raise UserError(f"--{flag} is not for a grid, which sets it or does without; allowed: "
                        "train.py's other flags")  # fmt: skip
    for flag in ("seeds", "workers", "teacher_params"):
        if getattr(args, flag) is not None and not getattr(args, flag) > 0:
            raise UserError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: must be positive")
    return args, given


def scales(args: argparse.Namespace) -> list[Scale]:
    """What is asked for, on each data set."""
    datasets = ["demo"] if args.name == "demo" else args.dataset or BENCHMARKS
    for flag, names in (("size", BY_SIZE), ("rationales", ("table1", "demo"))):
        if len(set(map(str, getattr(args, flag) or ()))) > 1 and args.name not in names:
            raise UserError(f"--{flag} several times: {args.name} is for one; several are for "
                            + ", ".join(names))
    if args.name == "demo" and args.dataset:
        raise UserError("demo is all of it on the bundled task; for another data set give a figure "
                        "or table, such as `table2 --dataset svamp`")  # fmt: skip
    made = []
    for data in datasets:
        get_task(data)
        known = [*(SHAPES if data == "demo" else ()), *train.RECIPES]  # smallest first
        for size in args.size or ():
            train.one_of("size", size, known)
        sizes = tuple(sorted(set(args.size), key=known.index)) if args.size else SIZES.get(
            data, PAPER_SIZES
        )
        base = sizes[-1] if data == "demo" else sizes[0]
        own = PAPER_TEACHERS if data in TASKS else ("own",)
        asked = [" ".join(r for r in words if r != ASDIV) for words in args.rationales or ()]
        teachers = tuple(filter(None, asked)) or TEACHERS.get(data, own)
        if data in BENCHMARKS and "own" in teachers:
            raise UserError(f"--rationales own: {data} has none of its own; allowed: palm, neox, "
                            "files")  # fmt: skip
        fractions = (0.5, 1.0) if args.quick else FRACTIONS.get(data, OTHERS)
        pools = POOLS.get(data, ())[-1 if args.quick else None :]
        made.append(Scale(data, sizes, base, teachers, fractions, pools))
    return made


def describe(grids: dict, runs: Runs, pool: Pool) -> None:
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
          f"begun; {len(left)} to run, {pool.workers} side by side"
          + (f": {pool.left(left)}" if left else ""), flush=True)  # fmt: skip


def unique(grids: dict, runs: Runs) -> Iterable[Run]:
    """Each run once, in the grids' order."""
    for point in dict.fromkeys(chain.from_iterable(grids.values())):
        yield from runs.of(point)


def reproduce(args: argparse.Namespace, given: dict) -> int:
    """Plans, runs what is missing, writes results; the exit status."""
    quick = dict(steps=40, eval_every=20) if args.quick else {}
    runs = Runs(args.seeds or (1 if args.quick else 4), quick | given)
    where = scales(args)
    for s in where:  # a mistake in train.py's flags is told before anything is planned
        train.resolve(train.Config(dataset=s.dataset, **quick | given))
    for s in where if "weights" in given else ():
        sizes = s.sizes if args.name in BY_SIZE else [s.base]
        if set(sizes) & SHAPES.keys() or (len(sizes) > 1 and given["weights"] != "random"):
            raise UserError(f"--weights {given['weights']} for several sizes; give one --size "
                            "with it")  # fmt: skip
    names = NAMES if args.name == "demo" else [args.name]
    name = args.name + "-quick" * args.quick
    root = given.get("data_root", train.Config.data_root)
    teachers = {}
    if args.name in BY_SIZE:
        for s in where:
            try:
                teachers[s.dataset] = teacher_row(s, root, args.teacher_params)
            except UserError as error:
                runs.missing |= {str(error): None}

    def grids() -> dict[tuple[str, str], list[Point]]:
        def score(s: Scale, point: Point | None) -> float | None:
            row = teachers.get(s.dataset)
            return runs.score(point) if point else row and row["accuracy"]

        return {(n, s.dataset): grid(n, s, functools.partial(score, s))
                for s in where for n in names}  # fmt: skip

    pool = Pool(args.workers, Clock(), RESULTS / name / "logs")
    describe(grids(), runs, pool)
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
    if left and args.name in ("demo", "figure8", "figure9"):
        left.append("perhaps more: the search of figures 8 and 9 waits for all sizes on all data")
    folder = write_results(name, grids(), rows + [r for r in teachers.values() if r], left)
    print(f"{len(rows)} of {len(every)} runs are finished"
          + (f"; {folder}/ has results.csv, table.md, report.md and, where matplotlib is "
             "installed, figure.png" if rows else ""))  # fmt: skip
    if pool.signal:
        print("stopped; the same command goes on")
        return 128 + pool.signal
    print((folder / "table.md").read_text() if rows else "", end="")
    for out, why in pool.failed.items():
        print(f"FAILED {out}: {why}", file=sys.stderr)
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
