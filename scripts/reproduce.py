"""The paper's figures and tables, one command each:
`python scripts/reproduce.py table2 --dataset svamp --size base`.

This file owns the grids of Section 4 (which runs make a figure or a table) and starts the runs
that are missing. Four words recur:

- a grid is the list of points of a figure or table on one data set;
- a point is one setting, a mark in a figure or an entry of a table (`tables.Point`);
- a run is a point with a seed: a `train.py` process in a folder named after its settings, so that
  figures share runs, and the same command continues where it was stopped;
- a place is what one run at a time uses: a GPU, all GPUs, or a share of the CPU cores.

Before anything starts, `train.py`'s own check compares each existing folder with the settings and
data that its run would have. Nothing is deleted. `tables.py` writes the results.
"""

import sys

if sys.platform == "win32" or sys.version_info < (3, 10):
    sys.exit("error: this program needs Linux or macOS and Python 3.10 or newer")

import argparse
import functools
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from statistics import mean

import numpy as np
import torch
from tqdm import tqdm

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
    sha256,
    write_jsonl,
    write_text,
)
from eval import rationale_source  # noqa: E402
from scripts import tables  # noqa: E402
from scripts.tables import BOTH, INPUTS, TITLES, WITH_TEACHER, Point  # noqa: E402

# Relative, since it becomes part of configurations, which run.json and results pages record.
DEMO = Path(os.path.relpath(HERE / "demo"))
BENCHMARKS = ["esnli", "anli1", "cqa", "svamp"]

# Most of the paper's fractions are only in its pictures; its text has e-SNLI's 12.5 and 0.1 %.
FRACTIONS = {
    "esnli": (0.001, 0.01, 0.125, 0.25, 0.5, 0.75, 1.0),
    "demo": (0.25, 0.5, 0.75, 1.0),  # fewer, so that the whole grid fits two hours on two cores
}
OTHERS = (0.125, 0.25, 0.5, 0.75, 1.0)
# Smallest first. The bundled task's: two shapes below `tiny`, each a third of the next.
SIZES = {"demo": ("nano", "micro", "tiny")}
PAPER_SIZES = ("base", "large", "xxl")
SHAPES = {"nano": dict(d_model=32, d_kv=8, d_ff=64), "micro": dict(d_model=64, d_kv=16, d_ff=128)}
# Shares of the unlabelled examples that are added: ASDiv for SVAMP, `demo/pool.jsonl` for the demo.
POOLS = {"svamp": (0.25, 0.5, 0.75, 1.0), "demo": (1.0,)}
# The teacher's answers to ASDiv, as `teacher.py --dataset asdiv` names the file.
ASDIV = "teacher/asdiv.train.jsonl"
# Whose rationales, the first for all grids and each of them for table1. "own": the examples' own.
TEACHERS = {"demo": ("own", str(DEMO / "weak.jsonl"))}
PAPER_TEACHERS = ("palm", "neox")
BY_SIZE = (*WITH_TEACHER, "demo")  # grids of several sizes
# Seeds of the bundled task's first table; all other grids have 4.
HEADLINE_SEEDS = 8
# --quick asks whether everything runs; accuracies after so few steps mean nothing.
QUICK = {"steps": 40, "eval_every": 20}
# Flags of train.py that a grid sets for each run, or that mean nothing in one.
NOT_FOR_A_GRID = "method labels fraction seed augment augment-fraction parallel".split()
NOT_FOR_A_GRID += "out resume plan gpus json timeout".split()


# ---- The grids -----------------------------------------------------------------------------------


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
        """Returns a point on this data set, at the base size unless another is named. Standard
        fine-tuning on human labels reads no rationales, so all teachers share its point."""
        point = Point(self.dataset, size or self.base, method, labels, **more)
        unused = method == "standard" and labels == "human"
        return replace(point, rationales="" if unused else point.rationales or self.teachers[0])


def grid(name: str, s: Scale, score: Callable[[Point | None], float | None]) -> list[Point]:
    """The points of a figure or table of Section 4. Figures 8 and 9 are a search: the later points
    follow from the accuracies of earlier ones. `score(point)` is a point's mean accuracy, and
    `score(None)` the teacher's; both are None as long as they are not known."""
    if name == "headline":  # the claims of README's first screen
        whole = [s.point(m) for m in ("standard", "step-by-step", "single-task")]
        less = [s.point(BOTH[1], fraction=f) for f in s.fractions if 0.5 <= f < 1]
        pool = [s.point(m, "teacher", pool=1.0) for m in BOTH if s.pools]
        return [*whole, s.point(BOTH[1], shuffled=True), *less, *pool]
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


# ---- Inputs that are made here -------------------------------------------------------------------


def untrained(size: str, seed: int) -> Path:
    """Writes weights of one of SHAPES, drawn from the seed, with the bundled vocabulary. A fresh
    start for each seed, as `--weights random` gives it to the sizes that train.py knows."""
    folder = INPUTS / f"{size}-seed-{seed}"
    if not (folder / "spiece.model").exists():
        folder.mkdir(parents=True, exist_ok=True)
        tiny = t5.T5.untrained_config("tiny", Tokenizer(train.DEMO_VOCABULARY).vocab_size)
        torch.manual_seed(seed)
        t5.T5(replace(tiny, **SHAPES[size])).save_pretrained(folder)
        shutil.copyfile(train.DEMO_VOCABULARY, folder / "spiece.model")  # last: all is there
    return folder


def with_pool(share: float) -> Path:
    """Writes the bundled task with that share of its unlabelled examples in the training set: a
    data set of its own, since train.py's --augment is for ASDiv alone. The teacher has answered
    them; with --labels teacher its labels are used."""
    folder = INPUTS / f"demo-pool-{share:g}"
    own, more = ((DEMO / name).read_text().splitlines() for name in ("train.jsonl", "pool.jsonl"))
    order = np.random.default_rng(0).permutation(len(more))[: round(share * len(more))]
    write_text(folder / "train.jsonl", "\n".join(own + [more[i] for i in np.sort(order)]) + "\n")
    for other in ("valid.jsonl", "test.jsonl", "task.json"):
        write_text(folder / other, (DEMO / other).read_text())
    return folder


@functools.cache  # the same for all seeds
def shuffled(dataset: str, rationales: str, root: str) -> Path:
    """Writes a teacher's file in which each training example has another one's rationale, and its
    own label. No example keeps its rationale: the random order is one cycle. The name has a hash of
    what was read, so that another teacher's file is another file."""
    read = sha256(f"{dataset} {rationales} {root}".encode())[:8]
    path = INPUTS / f"{Path(dataset).name}-shuffled-{read}.jsonl"
    examples = load_dataset(dataset, "train", root, joined(rationales, dataset))
    examples = [e for e in examples if e.rationale]
    order = np.random.default_rng(0).permutation(len(examples))
    other = {order[i]: examples[order[i - 1]].rationale for i in range(len(order))}
    rows = []
    for i, e in enumerate(examples):
        rows.append({"id": e.id, "rationale": other[i], "teacher_label": e.teacher_label})
    write_jsonl(path, rows)
    return path


def joined(rationales: str, dataset: str) -> str | list[str] | None:
    """A point's `rationales` in the form that `load_dataset` takes."""
    words = rationales.split()
    return None if words in ([], ["own"]) else rationale_source(words, dataset, True)


def configure(p: Point, seed: int, given: dict) -> train.Config:
    """The configuration of a point's run; UserError where files are missing. `given`: flags of
    `train.py` that hold for all runs, and win over the point's (--weights above all).

    Writes the inputs that are made here, such as shuffled rationales, since their names are part of
    the configuration."""
    root = given.get("data_root", train.Config.data_root)
    flags = {name: getattr(p, name) for name in ("dataset", "method", "labels", "fraction")}
    flags["seed"] = seed
    if p.size not in SHAPES:
        flags["size"] = p.size
    else:  # smaller than any size that train.py knows
        flags["weights"] = str(untrained(p.size, seed))
    if p.shuffled:
        flags["rationales"] = [str(shuffled(p.dataset, p.rationales, root))]
    elif p.rationales not in ("", "own"):
        flags["rationales"] = p.rationales.split()
    if p.pool and p.dataset == "demo":
        flags["dataset"] = str(with_pool(p.pool))
    elif p.pool:
        flags |= {"augment": "asdiv", "augment_fraction": p.pool}
        flags["rationales"] = [*flags["rationales"], ASDIV]
    config = train.resolve(train.Config(**{**flags, **given}))
    train.check_files(config)
    return config


# ---- The runs ------------------------------------------------------------------------------------


@dataclass
class Run:
    """A point with a seed; config and out are None where files are missing for it. What is known of
    its progress is read from its folder each time, since another process writes it."""

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

    def result(self) -> dict:
        return json.loads((self.out / "result.json").read_text())

    def accuracy(self) -> float:
        """On test; on valid where there is no test split."""
        got = self.result()
        return got["valid_accuracy"] if got["test_accuracy"] is None else got["test_accuracy"]


class Runs:
    """All runs of a grid, each looked up once, and what keeps some of them from being started.

    Problems are collected rather than raised: a user who lacks weights and two data sets reads so
    at once, and not in three attempts."""

    def __init__(self, seeds: int, given: dict):
        self.seeds, self.given = range(seeds), given
        self.headline, self.more_seeds = frozenset(), range(HEADLINE_SEEDS)
        self.problems: dict[str, None] = {}  # missing files above all; a dict keeps their order
        self.found: dict[tuple[Point, int], Run] = {}
        self.teachers: dict[str, dict] = {}  # by data set: its row of results.csv
        self.hashes: dict[tuple, dict] = {}

    def of(self, point: Point) -> list[Run]:
        seeds = self.more_seeds if point in self.headline else self.seeds
        return [self.get(point, seed) for seed in seeds]

    def unique(self, grids: dict) -> list[Run]:
        """Each run once, in the grids' order."""
        points = dict.fromkeys(chain.from_iterable(grids.values()))
        return [run for point in points for run in self.of(point)]

    def get(self, point: Point, seed: int) -> Run:
        """The run with its configuration and folder; where files are missing, without them."""
        if (point, seed) not in self.found:
            run = self.found[point, seed] = Run(point, seed)
            try:
                run.config = configure(point, seed, self.given)
                run.out = Path(train.run_name(run.config))
                if (run.out / "run.json").exists():
                    self.check(run)
            except UserError as error:
                self.problems |= dict.fromkeys(str(error).split("; and "))
        return self.found[point, seed]

    def check(self, run: Run) -> None:
        """UserError where the run's folder is of other settings or data. Files are hashed once for
        all runs that read the same."""
        c = run.config
        read = (c.dataset, c.labels, c.method, str(c.rationales), c.augment, c.weights)
        if read not in self.hashes:
            self.hashes[read] = train.provenance(c)
        try:
            train.open_run(c, run.out, self.hashes[read], [], resume=True)
        except UserError as error:
            reason = str(error).replace("give another --out", "move the folder away")
            raise UserError(reason) from None

    def find_teacher(self, s: Scale) -> None:
        """Scores the teacher's own answers to a data set."""
        try:
            root = self.given.get("data_root", train.Config.data_root)
            row = teacher_row(s.dataset, root, s.teachers[0])
            if row:
                self.teachers[s.dataset] = row
        except UserError as error:
            self.problems[str(error)] = None

    def score(self, dataset: str, point: Point | None) -> float | None:
        """What `grid` searches with: a point's mean accuracy, or for None the teacher's."""
        if point is None:
            return self.teachers.get(dataset, {}).get("accuracy")
        runs = self.of(point)
        return mean(r.accuracy() for r in runs) if all(r.finished for r in runs) else None


# ---- The processes -------------------------------------------------------------------------------


def gpus() -> list[str]:
    """The GPUs that may be used, by the names that CUDA_VISIBLE_DEVICES takes."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    return named.split(",")[:count] if named else [str(i) for i in range(count)]


def flags_of(c: train.Config) -> list[str]:
    """The flags of train.py that give these settings. All are named, also those that equal a
    default, so that the run has the configuration that was checked here."""
    words = []
    for name, value in vars(c).items():
        flag = name.replace("_", "-")
        if value is None or name == "parallel":  # it follows from the number of processes
            continue
        if name == "size" and value == train.Config.size:  # our smaller shapes have no size's name
            continue
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", *map(str, value if isinstance(value, list) else [value])]
    return words


def start(run: Run, devices: list[str], threads: int, log: Path) -> str:
    """Runs train.py to its end on these GPUs (none: on the CPU); returns why it failed, or an empty
    string. What it prints is appended to `log`.

    A run folder is locked while a process trains in it. Where it is, because a grid was killed and
    its run goes on, or another grid does this run, this waits and then finds the run finished."""
    words = [sys.executable]
    if len(devices) > 1:
        words += ["-m", "torch.distributed.run", "--standalone", "--shutdown-timeout=600"]
        words += [f"--nproc_per_node={len(devices)}"]
    words += [str(HERE / "train.py"), *flags_of(run.config), "--resume", "--out", str(run.out)]
    env = os.environ | {"OMP_NUM_THREADS": str(threads)}
    if devices:
        env["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
    log.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with open(log, "a") as file:  # a run whose grid was killed may write to it still
            before = file.tell()
            streams = {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": file}
            done = subprocess.run(words, env=env, **streams)
        if done.returncode == 0:
            return ""
        lines = log.read_bytes()[before:].decode(errors="replace").splitlines()
        errors = [line for line in lines if line.startswith("error:")]
        if not any("in use by another process" in line for line in errors):
            why = (errors or lines or ["no output"])[-1]
            return f"status {done.returncode}: {why} (all of it: {log})"
        time.sleep(5)


def work(todo: list[Run], workers: int | None, logs: Path) -> dict[Path, str]:
    """Does the runs, one on each GPU or core, then those that need all GPUs; returns the folders of
    those that failed with the reasons. A model that train.py would shard does not fit one GPU."""
    every, cores = gpus(), len(os.sched_getaffinity(0))
    large = [r for r in todo if len(every) > 1 and train.default_parallel(r.config.size) == "fsdp"]
    small = [r for r in todo if r not in large]
    places = [[gpu] for gpu in every][:workers] or [[]] * (workers or cores)
    return side_by_side(small, places, logs) | side_by_side(large, [every], logs)


def side_by_side(runs: list[Run], places: list[list[str]], logs: Path) -> dict[Path, str]:
    """Does as many runs at once as there are places, which are lists of GPUs; returns the folders
    of those that failed with the reasons. A failure stops no other run. After Ctrl-C, runs that
    have not started never start, and those that have save their state: KeyboardInterrupt goes on
    to the caller once they have ended."""
    if not runs:
        return {}
    failed, free = {}, list(places)
    threads = max(1, len(os.sched_getaffinity(0)) // len(places))

    def job(run: Run) -> str:
        place = free.pop()  # never empty: there are as many threads as places
        try:
            return start(run, place, threads, logs / f"{run.out.name}.log")
        finally:
            free.append(place)

    with ThreadPoolExecutor(len(places)) as pool, tqdm(total=len(runs), unit="run") as bar:
        jobs = {pool.submit(job, run): run for run in runs}
        try:
            for done in as_completed(jobs):
                run, why = jobs[done], done.result()
                if why:
                    failed[run.out] = why
                bar.write(f"{run.out}: " + (f"FAILED: {why}" if why else f"{run.accuracy():.4f}"))
                bar.update()
        except KeyboardInterrupt:  # a terminal's Ctrl-C has reached the runs too
            pool.shutdown(wait=False, cancel_futures=True)
            bar.write("stopping; the runs save their state first")
            raise
    return failed


# ---- Results -------------------------------------------------------------------------------------


@functools.cache
def n_examples(dataset: str, root: str) -> int:
    """Of the whole training split."""
    return len(load_dataset(dataset, "train", root))


def row_of(run: Run) -> dict:
    """A finished run's line of results.csv: the point, what came out, and what it cost.

    `tokens` are those that training read and wrote without padding: a fair measure of cost, since
    step-by-step has two rows for an example where standard fine-tuning has one."""
    c, got = run.config, run.result()
    about = json.loads((run.out / "run.json").read_text())
    lines = map(json.loads, (run.out / "metrics.jsonl").read_text().splitlines())
    steps = [line for line in lines if "loss" in line]  # the others are evaluations
    tokens_an_example = [step["tokens_per_second"] / step["examples_per_second"] for step in steps]
    examples = round(c.fraction * n_examples(c.dataset, c.data_root))
    if c.augment:
        examples += round(c.augment_fraction * n_examples(c.augment, c.data_root))
    split = "valid" if got["test_accuracy"] is None else "test"
    return {
        **asdict(run.point),
        **{name: got[name] for name in ("valid_accuracy", "test_accuracy", "n_test", "best_step")},
        "seed": run.seed,
        "accuracy": run.accuracy(),
        "scored_on": f"{split}, {got['labels']} labels",
        "parameters": got["parameters"],
        "examples": max(1, examples),
        "steps": c.steps,
        "tokens": round(sum(tokens_an_example) * c.batch_size),
        "weights": c.weights,
        "run": str(run.out),
        "git_sha": about["git_sha"],
        "torch": about["versions"]["torch"],
    }


def teacher_row(dataset: str, root: str, rationales: str) -> dict | None:
    """The line of few-shot CoT in results.csv: the teacher's own accuracy on test, where an answer
    that cannot be parsed counts as wrong; None where there are no answers."""
    if not has_split(dataset, "test", root):
        return None
    test = load_dataset(dataset, "test", root, joined(rationales, dataset))
    test = [e for e in test if e.label is not None]
    answered = [e for e in test if e.teacher_label]
    if not answered:
        return None
    task = get_task(dataset)
    right = sum(is_correct(task, e.teacher_label, e.label) for e in answered)
    return {
        **asdict(Point(dataset, "teacher", "few-shot-cot", "none", rationales)),
        "accuracy": right / len(test),
        "n_test": len(test),
        "scored_on": "test, human labels",
    }


# ---- Command line --------------------------------------------------------------------------------


def parse_args(argv: list[str] | None) -> tuple[argparse.Namespace, dict]:
    """This script's flags, and those of `train.py` that hold for all runs, by name; only those that
    were given. UserError for one that a grid sets itself."""
    about = "Any other flag is train.py's and holds for all runs, such as --weights or --steps."
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog=about, allow_abbrev=False
    )
    add = parser.add_argument
    add("name", choices=[*TITLES, "demo"])
    add("--dataset", nargs="+", help=f"default {' '.join(BENCHMARKS)}; demo, or a folder")
    add("--size", nargs="+", help="default base; several for figures 6 to 9: base large xxl")
    add("--seeds", type=int, help="how many; default 4")
    teacher = "a teacher: palm, neox or files; once for each teacher of table1"
    add("--rationales", nargs="+", action="append", help=teacher)
    add("--workers", type=int, help="runs side by side; default one a GPU, or one a CPU core")
    add("--dry-run", action="store_true", help="say what would be run, and stop")
    add("--quick", action="store_true", help="one seed, two fractions, 40 steps: does it run")
    args, rest = parser.parse_known_args(argv)
    flags, unused = vars(train.parse_args(rest)), vars(train.parse_args([]))
    for flag in NOT_FOR_A_GRID:
        name = flag.replace("-", "_")
        if flags.get(name) != unused.get(name):
            raise UserError(f"--{flag} is not for a grid; allowed: train.py's other flags")
    given = {name: value for name, value in flags.items() if name not in unused}
    for flag in ("seeds", "workers"):
        value = getattr(args, flag)
        if value is not None and value < 1:
            raise UserError(f"--{flag} {value}: must be positive")
    return args, given


def scales(args: argparse.Namespace) -> list[Scale]:
    """How far the grid reaches on each data set; UserError for a flag that does not fit it."""
    if args.name == "demo" and args.dataset:
        raise UserError("demo is for the bundled task; for other data name a figure or table")
    for flag, names in (("size", BY_SIZE), ("rationales", ("table1", "demo"))):
        if len(getattr(args, flag) or ()) > 1 and args.name not in names:
            allowed = ", ".join(names)
            raise UserError(f"--{flag} several times: {args.name} is for one; allowed: {allowed}")
    datasets = ["demo"] if args.name == "demo" else args.dataset or BENCHMARKS
    return [scale_of(dataset, args) for dataset in datasets]


def scale_of(dataset: str, args: argparse.Namespace) -> Scale:
    """How far the grid reaches on this data set: what the flags ask for, else what the paper did,
    else, on the bundled task, what fits two hours."""
    get_task(dataset)
    known = [*(SHAPES if dataset == "demo" else ()), *train.RECIPES]  # smallest first
    for size in args.size or ():
        if size not in known:
            raise UserError(f"--size {size!r} is unknown; allowed: {', '.join(known)}")
    sizes = sorted(set(args.size or SIZES.get(dataset, PAPER_SIZES)), key=known.index)
    base = sizes[-1] if dataset == "demo" else sizes[0]
    asked = [" ".join(r for r in words if r != ASDIV) for words in args.rationales or ()]
    own = PAPER_TEACHERS if dataset in TASKS else ("own",)
    teachers = tuple(filter(None, asked)) or TEACHERS.get(dataset, own)
    if dataset in BENCHMARKS and "own" in teachers:
        raise UserError(f"--rationales own: {dataset} has none of its own; allowed: palm, neox")
    fractions = (0.5, 1.0) if args.quick else FRACTIONS.get(dataset, OTHERS)
    pools = POOLS.get(dataset, ())[-1 if args.quick else None :]
    return Scale(dataset, tuple(sizes), base, teachers, fractions, pools)


def check_flags(args: argparse.Namespace, given: dict, where: list[Scale]) -> None:
    """UserError for train.py's flags that no run could have, before anything is planned."""
    weights = given.get("weights")
    for s in where:
        train.resolve(train.Config(dataset=s.dataset, **given))
        sizes = s.sizes if args.name in BY_SIZE else [s.base]
        made_here = not SHAPES.keys().isdisjoint(sizes)
        if weights and (made_here or (len(sizes) > 1 and weights != "random")):
            raise UserError(f"--weights {weights} for several sizes; give one --size with it")


def describe(grids: dict, runs: Runs) -> None:
    """Prints what will be run and what is there."""
    for (part, data), points in grids.items():
        print(f"{part}, {data}: {TITLES[part]}")
        for point in points:
            print(f"  {point}: {count(runs.of(point))}")
        if part in ("figure8", "figure9"):
            print("  then, at the smallest size that passes the teacher: the other fractions")
    every = runs.unique(grids)
    left = sum(not run.finished for run in every)
    print(f"{count(every)}; {left} to run", flush=True)


def count(runs: list[Run]) -> str:
    """How many runs there are, finished and begun."""
    finished, begun = sum(run.finished for run in runs), sum(run.begun for run in runs)
    return f"{len(runs)} runs, {finished} finished, {begun} begun"


def reproduce(args: argparse.Namespace, given: dict) -> int:
    """Plans, runs what is missing, writes results; returns the exit status.

    The grids are asked for again after each round of runs: once all sizes are finished, figures 8
    and 9 know at which size to go on with less data. Results are written after Ctrl-C and after
    failures too, with a list of what is not there."""
    given = (QUICK if args.quick else {}) | given
    where, runs = scales(args), Runs(args.seeds or (1 if args.quick else 4), given)
    check_flags(args, given, where)
    for s in where if args.name in BY_SIZE else ():
        runs.find_teacher(s)
    parts = [*TITLES] if args.name == "demo" else [args.name]
    if "headline" in parts and args.seeds is None and not args.quick:
        runs.headline = frozenset(grid("headline", where[0], lambda point: None))
    name = args.name + "-quick" * args.quick

    def grids() -> dict[tuple[str, str], list[Point]]:
        score = {s.dataset: functools.partial(runs.score, s.dataset) for s in where}
        return {(part, s.dataset): grid(part, s, score[s.dataset]) for s in where for part in parts}

    describe(grids(), runs)
    if runs.problems:
        print("missing:", *runs.problems, sep="\n  ", file=sys.stderr)
    if runs.problems or args.dry_run:
        return 0 if args.dry_run else 2
    failed, stopped = {}, False
    try:  # again and again, for what the search of figures 8 and 9 adds
        while True:
            todo = [r for r in runs.unique(grids()) if not r.finished and r.out not in failed]
            if not todo:
                break
            failed |= work(todo, args.workers, tables.RESULTS / name / "logs")
    except KeyboardInterrupt:
        stopped = True
    every = runs.unique(grids())
    rows = [row_of(run) for run in every if run.finished]
    left = [f"{r.out}: {failed.get(r.out, 'not finished')}" for r in every if not r.finished]
    folder = tables.write_results(name, grids(), rows + [*runs.teachers.values()], left)
    print(f"{len(rows)} of {len(every)} runs are finished" + f"; see {folder}/" * bool(rows))
    if stopped:
        print("stopped; the same command goes on")
        return 130
    print((folder / "table.md").read_text() if rows else "", end="")
    for out, why in failed.items():
        print(f"FAILED {out}: {why}", file=sys.stderr)
    return 1 if left else 0


def main(argv: list[str] | None = None) -> int:
    """Returns 0; 1 where a run failed, 2 for a user's mistake or missing files, 130 after
    Ctrl-C."""
    try:
        return reproduce(*parse_args(argv))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # before or after the runs
        return 130


if __name__ == "__main__":
    sys.exit(main())
