"""Make the paper's figures and tables, one command each.

    python scripts/reproduce.py table2 --dataset svamp --size base

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
from dataclasses import asdict, dataclass, fields, replace
from itertools import chain
from pathlib import Path
from statistics import mean

import numpy as np
import torch
from tqdm import tqdm

HERE = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(HERE))

import data  # noqa: E402
import t5  # noqa: E402
import train  # noqa: E402
from data import UserError  # noqa: E402
from eval import rationale_source  # noqa: E402
from scripts import tables  # noqa: E402
from scripts.tables import BOTH, INPUTS, TITLES, WITH_TEACHER, Point  # noqa: E402

# Relative, since it becomes part of configurations, which run.json and results pages record.
DEMO = Path(os.path.relpath(HERE / "demo"))
# The teacher's answers to ASDiv, as `teacher.py --dataset asdiv` names the file.
ASDIV = "teacher/asdiv.train.jsonl"
# Shapes below train.py's smallest size, for the bundled task; each a third of the next.
SHAPES = {"nano": dict(d_model=32, d_kv=8, d_ff=64), "micro": dict(d_model=64, d_kv=16, d_ff=128)}
SIZES = [*SHAPES, *train.RECIPES]  # smallest first
BY_SIZE = (*WITH_TEACHER, "demo")  # grids of several sizes
# The second for the headline's points.
SEEDS, HEADLINE_SEEDS = 4, 8
# --quick asks whether everything runs; accuracies after so few steps mean nothing.
QUICK = {"steps": 40, "eval_every": 20}
# Settings of train.py that a grid chooses for each run; all others hold for all runs.
CHOSEN = "size dataset method labels rationales fraction seed augment augment_fraction".split()
CHOSEN += ["parallel"]  # follows from the number of processes


# ---- The grids -----------------------------------------------------------------------------------


@dataclass
class Scale:
    """How far a grid reaches on one data set; by default as far as the paper's. Most of its
    fractions are only in its pictures; its text has e-SNLI's 12.5 and 0.1 %."""

    dataset: str
    sizes: tuple[str, ...] = ("base", "large", "xxl")  # of figures 6 to 9, smallest first
    base: int = 0  # which of the sizes the others have
    # Whose rationales: the first for all grids, each of them for table1. "own": the examples' own.
    teachers: tuple[str, ...] = ("palm", "neox")
    fractions: tuple[float, ...] = (0.125, 0.25, 0.5, 0.75, 1.0)
    # Shares of the unlabelled examples that are added.
    pools: tuple[float, ...] = ()

    def point(self, method: str, labels: str = "human", size: str = "", **more) -> Point:
        """Returns a point on this data set, at the base size unless another is named. Standard
        fine-tuning on human labels reads no rationales, so all teachers share its point."""
        point = Point(self.dataset, size or self.sizes[self.base], method, labels, **more)
        unused = method == "standard" and labels == "human"
        return replace(point, rationales="" if unused else point.rationales or self.teachers[0])

    @property
    def teacher(self) -> Point:
        """The teacher's own answers, which no run gives."""
        return Point(self.dataset, "teacher", "few-shot-cot", "none", self.teachers[0])


BENCHMARKS = [
    Scale("esnli", fractions=(0.001, 0.01, 0.125, 0.25, 0.5, 0.75, 1.0)),
    Scale("anli1"),
    Scale("cqa"),
    Scale("svamp", pools=(0.25, 0.5, 0.75, 1.0)),  # of ASDiv
]
BUNDLED = Scale(
    "demo",
    sizes=(*SHAPES, "tiny"),
    base=-1,
    teachers=("own", str(DEMO / "weak.jsonl")),
    fractions=(0.25, 0.5, 0.75, 1.0),  # fewer, so that the whole grid fits two hours on two cores
    pools=(1.0,),  # of `demo/pool.jsonl`
)


def grid(name: str, s: Scale, score: Callable[[Point], float | None]) -> list[Point]:
    """The points of a figure or table of Section 4. Figures 8 and 9 are a search: their later
    points follow from `score(point)`, a point's mean accuracy, or None as long as it is not
    known."""
    standard, ours, single = (s.point(m) for m in (*BOTH, "single-task"))
    shuffled = s.point("step-by-step", shuffled=True)
    labels = "human" if name in ("figure4", "figure6", "figure8") else "teacher"
    if name in ("figure4", "figure5"):  # Section 4.1
        return [s.point(m, labels, fraction=f) for f in s.fractions for m in BOTH]
    if name in WITH_TEACHER:  # Sections 4.2 and 4.3
        pools = {"figure7": s.pools[-1:], "figure9": s.pools}.get(name, ())
        points = [s.point(m, labels, size) for size in s.sizes for m in BOTH]
        points += [s.point(m, labels, s.sizes[-1], pool=f) for f in pools for m in BOTH]
        if name == "figure6":
            points += [s.point("rationale-input")]  # PINTO tuning
        if name in ("figure8", "figure9") and not pools:
            points += less_data(s, labels, score)
        return points
    less = [replace(ours, fraction=f) for f in s.fractions if 0.5 <= f < 1]
    pool = [s.point(m, "teacher", pool=1.0) for m in BOTH if s.pools]
    return {
        "headline": [standard, ours, single, shuffled, *less, *pool],  # README's first screen
        "table1": [standard, *(replace(ours, rationales=teacher) for teacher in s.teachers)],
        "table2": [standard, single, ours],  # Section 4.4
        "noise": [standard, shuffled, ours],
    }[name]


def less_data(s: Scale, labels: str, score: Callable[[Point], float | None]) -> list[Point]:
    """The search of Section 4.3: for each method the smaller fractions, at the smallest size that
    passes the teacher. Nothing is added before the accuracies of all sizes are known."""
    points = []
    for method in BOTH:
        full = [s.point(method, labels, size) for size in s.sizes]
        scores = [score(point) for point in full]
        if None not in scores:
            teacher = score(s.teacher)
            passing = [p for p, got in zip(full, scores) if teacher is not None and got > teacher]
            points += [replace(p, fraction=f) for p in passing[:1] for f in s.fractions[:-1]]
    return points


# ---- Inputs that are made here -------------------------------------------------------------------


def untrained(size: str, seed: int) -> Path:
    """Writes weights of one of SHAPES, drawn from the seed, with the bundled vocabulary. A fresh
    start for each seed, as `--weights random` gives it to the sizes that train.py knows."""
    folder = INPUTS / f"{size}-seed-{seed}"
    if not (folder / "spiece.model").exists():
        folder.mkdir(parents=True, exist_ok=True)
        tiny = t5.T5.untrained_config("tiny", data.Tokenizer(train.DEMO_VOCABULARY).vocab_size)
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
    lines = own + [more[i] for i in np.sort(order)]
    data.write_text(folder / "train.jsonl", "\n".join(lines) + "\n")
    for other in ("valid.jsonl", "test.jsonl", "task.json"):
        data.write_text(folder / other, (DEMO / other).read_text())
    return folder


@functools.cache  # the same for all seeds
def write_shuffled(path: Path, dataset: str, rationales: str, root: str) -> None:
    """Writes a teacher's file in which each training example has another one's rationale, and its
    own label. No example keeps its rationale: the random order is one cycle."""
    examples = data.load_dataset(dataset, "train", root, joined(rationales, dataset))
    examples = [e for e in examples if e.rationale]
    order = np.random.default_rng(0).permutation(len(examples))
    other = {order[i]: examples[order[i - 1]].rationale for i in range(len(order))}
    rows = []
    for i, e in enumerate(examples):
        rows.append({"id": e.id, "rationale": other[i], "teacher_label": e.teacher_label})
    data.write_jsonl(path, rows)


def joined(rationales: str, dataset: str) -> str | list[str] | None:
    """A point's `rationales` in the form that `load_dataset` takes."""
    return None if rationales == "own" else rationale_source(rationales.split(), dataset, True)


# ---- The runs ------------------------------------------------------------------------------------


def flags_of(p: Point, seed: int, given: dict) -> dict:
    """The flags of train.py for a point's run, by name. `given`: those that hold for all runs."""
    flags = {name: getattr(p, name) for name in ("dataset", "method", "labels", "fraction")}
    flags["seed"] = seed
    if p.size not in SHAPES:
        flags["size"] = p.size
    else:  # smaller than any size that train.py knows
        flags["weights"] = str(untrained(p.size, seed))
    if p.shuffled:
        # The name has a hash of what is read, so that another teacher's file is another file.
        read = data.sha256(f"{p.dataset} {p.rationales} {given['data_root']}".encode())[:8]
        flags["rationales"] = [str(INPUTS / f"{Path(p.dataset).name}-shuffled-{read}.jsonl")]
    elif p.rationales and (p.rationales != "own" or data.get_task(p.dataset).palm):
        # A benchmark has none of its own: train.py will say that there is no such file.
        flags["rationales"] = p.rationales.split()
    if p.pool and p.dataset == "demo":
        flags["dataset"] = str(with_pool(p.pool))
    elif p.pool:
        flags |= {"augment": "asdiv", "augment_fraction": p.pool}
        flags["rationales"] = [*flags["rationales"], ASDIV]
    return {**given, **flags}


class Run:
    """A point with a seed. Its progress is read from its folder each time, since another process
    writes it."""

    def __init__(self, point: Point, seed: int, given: dict):
        self.point, self.seed = point, seed
        self.flags = flags_of(point, seed, given)
        self.config = train.resolve(train.Config(**self.flags))
        self.out = Path(train.run_name(self.config))

    @property
    def finished(self) -> bool:
        return (self.out / "result.json").exists()

    def result(self) -> dict:
        return json.loads((self.out / "result.json").read_text())

    def accuracy(self) -> float:
        """Returns the accuracy on test; on valid where there is no test split."""
        got = self.result()
        return got["valid_accuracy"] if got["test_accuracy"] is None else got["test_accuracy"]

    def check(self) -> None:
        """UserError where files are missing, or where the run's folder is of other settings or
        data."""
        p, c = self.point, self.config
        if p.shuffled:
            write_shuffled(Path(c.rationales[0]), p.dataset, p.rationales, c.data_root)
        train.check_files(c)
        if (self.out / "run.json").exists():
            train.open_run(c, self.out, train.provenance(c), [], resume=True)


class Runs:
    """The grids that a command asks for, with all their runs."""

    def __init__(self, args: argparse.Namespace):
        self.scales = scales(args)
        self.parts = [*TITLES] if args.name == "demo" else [args.name]
        default = {"data_root": train.Config.data_root, **(QUICK if args.quick else {})}
        self.given = default | train.config_flags(args)
        self.seeds = args.seeds or (1 if args.quick else SEEDS)
        self.headline_seeds = args.seeds or (1 if args.quick else HEADLINE_SEEDS)
        self.found: dict[Point, list[Run]] = {}
        points = [grid("headline", s, self.score) for s in self.scales if "headline" in self.parts]
        self.headline = {*chain.from_iterable(points)}
        with_teacher = {*self.parts} & {*WITH_TEACHER}
        self.teachers = [s.teacher for s in self.scales if with_teacher]

    def grids(self) -> dict[tuple[str, str], list[Point]]:
        """The points by figure or table and data set; with those that a search has come to."""
        pairs = [(part, s) for s in self.scales for part in self.parts]
        return {(part, s.dataset): grid(part, s, self.score) for part, s in pairs}

    def of(self, point: Point) -> list[Run]:
        if point not in self.found:
            seeds = self.headline_seeds if point in self.headline else self.seeds
            self.found[point] = [Run(point, seed, self.given) for seed in range(seeds)]
        return self.found[point]

    def all(self) -> list[Run]:
        """Each run once, in the grids' order."""
        points = dict.fromkeys(chain.from_iterable(self.grids().values()))
        return [run for point in points for run in self.of(point)]

    def score(self, point: Point) -> float | None:
        """The point's mean accuracy; None as long as it is not known."""
        if point.method == "few-shot-cot":
            row = teacher_row(point, self.given["data_root"])
            return row["accuracy"] if row else None
        runs = self.of(point)
        return mean(r.accuracy() for r in runs) if all(r.finished for r in runs) else None

    def problems(self) -> list[str]:
        """What keeps some runs from being started, missing files above all. All is collected: a
        user who lacks weights and two data sets reads so at once, and not in three attempts."""
        problems = {}  # a dict keeps their order
        for run in self.all():
            try:
                run.check()
            except UserError as error:
                words = str(error).replace("give another --out", "move the folder away")
                problems |= dict.fromkeys(words.split("; and "))
        for teacher in self.teachers:
            try:
                teacher_row(teacher, self.given["data_root"])
            except UserError as error:
                problems[str(error)] = None
        return [*problems]


# ---- The processes -------------------------------------------------------------------------------


def gpus() -> list[str]:
    """The GPUs that may be used, by the names that CUDA_VISIBLE_DEVICES takes."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    return named.split(",")[:count] if named else [str(i) for i in range(count)]


def words_of(flags: dict) -> list[str]:
    """These flags of train.py as words of a command line."""
    words = []
    for name, value in flags.items():
        flag = name.replace("_", "-")
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
    words += [str(HERE / "train.py"), *words_of(run.flags), "--resume", "--out", str(run.out)]
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
    """Returns the size of the whole training split."""
    return len(data.load_dataset(dataset, "train", root))


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


@functools.cache
def teacher_row(p: Point, root: str) -> dict | None:
    """The line of few-shot CoT in results.csv: the teacher's own accuracy on test, where an answer
    that cannot be parsed counts as wrong; None where there are no answers."""
    if not data.has_split(p.dataset, "test", root):
        return None
    test = data.load_dataset(p.dataset, "test", root, joined(p.rationales, p.dataset))
    test = [e for e in test if e.label is not None]
    answered = [e for e in test if e.teacher_label]
    if not answered:
        return None
    task = data.get_task(p.dataset)
    right = sum(data.is_correct(task, e.teacher_label, e.label) for e in answered)
    return {
        **asdict(p),
        "accuracy": right / len(test),
        "n_test": len(test),
        "scored_on": "test, human labels",
    }


# ---- Command line --------------------------------------------------------------------------------


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """This script's flags, and those of train.py that hold for all runs."""
    # Without abbreviations: --seed, which a grid chooses, would be taken for --seeds.
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    names = [s.dataset for s in BENCHMARKS]
    add("name", choices=[*TITLES, "demo"])
    add("--dataset", nargs="+", dest="datasets", help=f"default {' '.join(names)}; demo, a folder")
    more = "default base; several for figures 6 to 9: base large xxl"
    add("--size", nargs="+", dest="sizes", choices=SIZES, metavar="SIZE", help=more)
    add("--seeds", type=int, help="how many; default 4; headline 8")
    more = "a teacher: palm, neox or files; once for each teacher of table1"
    add("--rationales", nargs="+", dest="teachers", action="append", help=more)
    add("--workers", type=int, help="runs side by side; default one a GPU, or one a CPU core")
    add("--dry-run", action="store_true", help="say what would be run, and stop")
    add("--quick", action="store_true", help="one seed, two fractions, 40 steps: does it run")
    group = parser.add_argument_group("flags of train.py, for all runs")
    for setting in fields(train.Config):
        if setting.name not in CHOSEN:
            train.add_flag(group, setting)
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> None:
    """UserError for flags that do not fit each other."""
    sizes, teachers = args.sizes or [], args.teachers or []
    for flag in ("seeds", "workers"):
        value = getattr(args, flag)
        if value is not None and value < 1:
            raise UserError(f"--{flag} {value}: must be positive")
    if args.name == "demo" and args.datasets:
        raise UserError("demo is for the bundled task; for other data name a figure or table")
    if len(sizes) > 1 and args.name not in BY_SIZE:
        raise UserError(f"--size: {args.name} is for one; several are for {', '.join(BY_SIZE)}")
    if len(teachers) > 1 and args.name not in ("table1", "demo"):
        raise UserError(f"--rationales: {args.name} is for one; several are for table1, demo")
    small = {*sizes} & {*SHAPES}
    if small and args.name != "demo" and args.datasets != ["demo"]:
        raise UserError(f"--size {' '.join(small)}: these are for --dataset demo")
    weights = getattr(args, "weights", "random")
    several = args.name in BY_SIZE and len(sizes) != 1
    if weights != "random" and (several or small):
        raise UserError(f"--weights {weights}: not for several sizes; name its --size")


def scales(args: argparse.Namespace) -> list[Scale]:
    """How far the grids reach on each data set: what the flags ask for, else what the paper did,
    else, on the bundled task, what fits two hours."""
    check(args)
    known = {s.dataset: s for s in (*BENCHMARKS, BUNDLED)}
    default = [BUNDLED] if args.name == "demo" else BENCHMARKS
    asked = {}
    if args.sizes:
        asked["sizes"] = tuple(size for size in SIZES if size in args.sizes)
    if args.teachers:
        asked["teachers"] = tuple(map(" ".join, args.teachers))
    if args.quick:
        asked["fractions"] = (0.5, 1.0)
    names = args.datasets or [s.dataset for s in default]
    found = [known.get(name, Scale(name, teachers=("own",))) for name in names]
    return [replace(s, **asked) for s in found]


def describe(runs: Runs) -> None:
    """Prints what will be run and what is there."""
    for (part, dataset), points in runs.grids().items():
        print(f"{part}, {dataset}: {TITLES[part]}")
        for point in points:
            folder = str(runs.of(point)[0].out).removesuffix("0")
            print(f"  {folder}*: {count(runs.of(point))}")
        if part in ("figure8", "figure9"):
            print("  then, at the smallest size that passes the teacher: the other fractions")
    print(f"in all: {count(runs.all())}", flush=True)


def count(runs: list[Run]) -> str:
    """Says how many runs there are, and how many are finished."""
    return f"{len(runs)} runs, {sum(run.finished for run in runs)} finished"


def reproduce(args: argparse.Namespace) -> int:
    """Plans, runs what is missing, writes results; returns the exit status.

    The grids are asked for again after each round of runs: once all sizes are finished, figures 8
    and 9 know at which size to go on with less data. Results are written after Ctrl-C and after
    failures too, with a list of what is not there."""
    runs = Runs(args)
    problems = runs.problems()
    describe(runs)
    if problems:
        print("missing:", *problems, sep="\n  ", file=sys.stderr)
    if problems or args.dry_run:
        return 0 if args.dry_run else 2
    name = args.name + "-quick" * args.quick
    failed, stopped = {}, False
    try:  # again and again, for what the search of figures 8 and 9 adds
        while True:
            todo = [r for r in runs.all() if not r.finished and r.out not in failed]
            if not todo:
                break
            failed |= work(todo, args.workers, tables.RESULTS / name / "logs")
    except KeyboardInterrupt:
        stopped = True
    every = runs.all()
    rows = [row_of(run) for run in every if run.finished]
    left = [f"{r.out}: {failed.get(r.out, 'not finished')}" for r in every if not r.finished]
    if rows:
        teachers = [teacher_row(teacher, runs.given["data_root"]) for teacher in runs.teachers]
        rows += [row for row in teachers if row]
    folder = tables.write_results(name, runs.grids(), rows, left)
    finished = len(every) - len(left)
    print(f"{finished} of {len(every)} runs are finished" + f"; see {folder}/" * bool(rows))
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
        return reproduce(parse_args(argv))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # before or after the runs
        return 130


if __name__ == "__main__":
    sys.exit(main())
