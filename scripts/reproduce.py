"""The paper's figures and tables, one command each:
`python scripts/reproduce.py table2 --dataset svamp --size base`.

This file owns the grids of Section 4 (which runs make a figure or a table) and starts the runs
that are missing. A run is a `train.py` process, in a folder named after its settings; `train.py`
itself checks that a folder there has these settings and these data. Nothing is deleted.
`tables.py` writes the results.
"""

import argparse
import functools
import json
import os
import queue
import shutil
import subprocess
import sys
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
from scripts.tables import (  # noqa: E402
    BESIDE_TEACHER,
    BOTH,
    INPUTS,
    NAMES,
    RESULTS,
    TITLES,
    Point,
    gather,
    write_results,
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
        point = Point(self.dataset, size or self.base, method, labels, **more)
        unused = method == "standard" and labels == "human"
        return replace(point, rationales="" if unused else point.rationales or self.teachers[0])


def grid(name: str, s: Scale, score: Callable[[Point | None], float | None]) -> list[Point]:
    """Lists the points of a figure or table of Section 4. `score` is a point's mean accuracy, None
    as long as it is not known, and for None the teacher's: Figures 8 and 9 are a search, whose
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


# ---- Inputs that are made here -------------------------------------------------------------------


def untrained(size: str, seed: int) -> Path:
    """Writes weights of one of SHAPES, drawn from the seed, with the bundled vocabulary."""
    folder = INPUTS / f"{size}-seed-{seed}"
    if not (folder / "spiece.model").exists():
        folder.mkdir(parents=True, exist_ok=True)
        tiny = train.untrained_config("tiny", Tokenizer(train.DEMO_VOCABULARY))
        torch.manual_seed(seed)
        t5.T5(replace(tiny, **SHAPES[size])).save_pretrained(folder)
        shutil.copyfile(train.DEMO_VOCABULARY, folder / "spiece.model")  # last: all is there
    return folder


def with_pool(share: float) -> Path:
    """Writes the bundled task with that share of its unlabelled examples in the training set."""
    folder = INPUTS / f"demo-pool-{share:g}"
    own, more = ((DEMO / name).read_text().splitlines() for name in ("train.jsonl", "pool.jsonl"))
    order = np.random.default_rng(0).permutation(len(more))[: round(share * len(more))]
    write_text(folder / "train.jsonl", "\n".join(own + [more[i] for i in np.sort(order)]) + "\n")
    for other in ("valid.jsonl", "test.jsonl", "task.json"):
        write_text(folder / other, (DEMO / other).read_text())
    return folder


@functools.cache  # the same for all seeds
def shuffled(dataset: str, rationales: str, root: str) -> Path:
    """Writes a teacher's file in which each training example has another one's rationale."""
    told_apart = sha256(f"{dataset} {rationales} {root}".encode())[:8]
    path = INPUTS / f"{Path(dataset).name}-shuffled-{told_apart}.jsonl"
    examples = load_dataset(dataset, "train", root, joined(rationales, dataset))
    examples = [e for e in examples if e.rationale]
    order = np.random.default_rng(0).permutation(len(examples))
    other = {order[i]: examples[order[i - 1]].rationale for i in range(len(order))}  # one cycle
    rows = [{"id": e.id, "rationale": other[i], "teacher_label": e.teacher_label}
            for i, e in enumerate(examples)]  # fmt: skip
    write_jsonl(path, rows)
    return path


def joined(rationales: str, dataset: str) -> str | list[str] | None:
    """Gives what `load_dataset` joins for a point's `rationales`."""
    words = rationales.split()
    return None if words in ([], ["own"]) else rationale_source(words, dataset, True)


def configure(p: Point, seed: int, given: dict) -> train.Config:
    """Resolves the configuration of a run; UserError where files are missing. `given`: flags of
    `train.py` that hold for all runs."""
    root = given.get("data_root", train.Config.data_root)
    flags = dict(size="tiny" if p.size in SHAPES else p.size, dataset=p.dataset, method=p.method,
                 labels=p.labels, fraction=p.fraction, seed=seed)  # fmt: skip
    if p.size in SHAPES:
        flags["weights"] = str(untrained(p.size, seed))
    if p.shuffled:
        flags["rationales"] = [str(shuffled(p.dataset, p.rationales, root))]
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


# ---- The runs ------------------------------------------------------------------------------------


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

    def result(self) -> dict:
        return json.loads((self.out / "result.json").read_text())

    def accuracy(self) -> float:
        """Gives the accuracy on test; on valid where there is no test split."""
        got = self.result()
        return got["valid_accuracy"] if got["test_accuracy"] is None else got["test_accuracy"]

    def seconds(self) -> float:
        """Counts from the start of a finished run to its end, pauses included."""
        ends = [(self.out / name).stat().st_mtime for name in ("run.json", "result.json")]
        return ends[1] - ends[0]


class Runs:
    """All runs of a grid, and what keeps them from being started."""

    def __init__(self, seeds: int, given: dict):
        self.seeds, self.given = range(seeds), given
        self.problems: dict[str, None] = {}  # missing files above all, in the order of asking
        self.found: dict[tuple[Point, int], Run] = {}
        self.hashes: dict[tuple, dict] = {}

    def of(self, point: Point) -> list[Run]:
        return [self.get(point, seed) for seed in self.seeds]

    def unique(self, grids: dict) -> list[Run]:
        """Lists each run once, in the grids' order."""
        points = dict.fromkeys(chain.from_iterable(grids.values()))
        return [run for point in points for run in self.of(point)]

    def get(self, point: Point, seed: int) -> Run:
        """Finds the run's configuration and folder, and checks a folder that is there."""
        if (point, seed) not in self.found:
            run = self.found[point, seed] = Run(point, seed)
            try:
                run.config = configure(point, seed, self.given)
                run.out = Path(train.run_name(run.config))
                if any(r.out == run.out and r.config != run.config for r in self.found.values()):
                    raise UserError(f"two runs would be {run.out}; rename a data set or file")
                self.check(run)
            except UserError as error:
                self.problems |= dict.fromkeys(str(error).split("; and "))
        return self.found[point, seed]

    def check(self, run: Run) -> None:
        """Lets train.py compare a folder's settings and data with the run's."""
        if not (run.out / "run.json").exists():
            return
        c = run.config
        read = (c.dataset, c.labels, c.method, str(c.rationales), c.augment, c.weights)
        if read not in self.hashes:
            self.hashes[read] = train.provenance(c)
        try:
            train.open_run(c, run.out, self.hashes[read], [], resume=True)
        except UserError as error:
            reason = str(error).replace("give another --out", "move the folder away")
            raise UserError(reason) from None

    def score(self, point: Point) -> float | None:
        runs = self.of(point)
        return mean(r.accuracy() for r in runs) if all(r.finished for r in runs) else None


# ---- The processes -------------------------------------------------------------------------------


def gpus() -> list[str]:
    """Names the GPUs that may be used, as CUDA_VISIBLE_DEVICES does."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    return named.split(",")[:count] if named else [str(i) for i in range(count)]


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


def start(run: Run, devices: list[str], threads: int, log: Path) -> str:
    """Runs train.py to its end on these GPUs; returns why it failed, or nothing."""
    words = [sys.executable, str(HERE / "train.py"), *flags_of(run.config), "--resume",
             "--out", str(run.out)]  # fmt: skip
    if len(devices) > 1:
        words[1:1] = ["-m", "torch.distributed.run", "--standalone", "--shutdown-timeout=600",
                      f"--nproc_per_node={len(devices)}"]  # fmt: skip
    env = os.environ | {"OMP_NUM_THREADS": str(threads)}
    if devices:
        env["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
    log.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with open(log, "a") as file:  # a run whose grid was killed may write to it still
            before = file.tell()
            done = subprocess.run(words, env=env, stdin=subprocess.DEVNULL, stdout=file,
                                  stderr=subprocess.STDOUT)  # fmt: skip
        if done.returncode == 0:
            return ""
        lines = log.read_bytes()[before:].decode(errors="replace").splitlines()
        errors = [line for line in lines if line.startswith("error:")]
        if not any("in use by another process" in line for line in errors):
            why = (errors or lines or ["no output"])[-1]
            return f"status {done.returncode}: {why} (all of it: {log})"
        time.sleep(5)  # a grid was killed and its run goes on, or another grid does this run


def work(todo: list[Run], workers: int | None, logs: Path) -> dict[Path, str]:
    """Starts the runs, one a GPU or core, then those that need all GPUs; returns the reasons of
    those that failed."""
    every, cores = gpus(), len(os.sched_getaffinity(0))
    large = [r for r in todo if len(every) > 1 and train.default_parallel(r.config.size) == "fsdp"]
    small = [r for r in todo if r not in large]
    places = [[gpu] for gpu in every][:workers] or [[]] * (workers or cores)
    return side_by_side(small, places, logs) | side_by_side(large, [every], logs)


def side_by_side(runs: list[Run], places: list[list[str]], logs: Path) -> dict[Path, str]:
    """Starts as many runs at once as there are places; returns the reasons of failures."""
    if not runs:
        return {}
    failed, free = {}, queue.SimpleQueue()
    for place in places:
        free.put(place)
    threads = max(1, len(os.sched_getaffinity(0)) // len(places))

    def job(run: Run) -> str:
        place = free.get()
        try:
            return start(run, place, threads, logs / f"{run.out.name}.log")
        finally:
            free.put(place)

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


def n_parameters(student: Path) -> int:
    """Counts the student's parameters: what is deployed."""
    with torch.device("meta"), t5.Uninitialised():
        return sum(p.numel() for p in t5.T5(t5.read_config(student)).parameters())


@functools.cache
def n_examples(dataset: str, root: str) -> int:
    """Counts the whole training split."""
    return len(load_dataset(dataset, "train", root))


def row_of(run: Run) -> dict:
    """Gives a line of results.csv."""
    c, got, p = run.config, run.result(), run.point
    about = json.loads((run.out / "run.json").read_text())
    with open(run.out / "metrics.jsonl") as file:
        rows = [json.loads(line) for line in file]
    steps = [row for row in rows if "loss" in row]  # the others are evaluations
    speeds = [row["tokens_per_second"] / row["examples_per_second"] for row in steps]
    examples = round(c.fraction * n_examples(c.dataset, c.data_root))
    if c.augment:
        examples += round(c.augment_fraction * n_examples(c.augment, c.data_root))
    return {
        **asdict(p), "seed": run.seed, "parameters": n_parameters(run.out / "best"),
        "examples": max(1, examples), "steps": c.steps, "weights": c.weights,
        "valid_accuracy": got["valid_accuracy"], "test_accuracy": got["test_accuracy"],
        "accuracy": run.accuracy(),
        "scored_on": ("valid" if got["test_accuracy"] is None else "test")
        + f", {got['labels']} labels",
        "n_test": got["n_test"], "best_step": got["best_step"],
        "tokens": round(sum(speeds) * c.batch_size), "seconds": round(run.seconds(), 1),
        "run": str(run.out), "git_sha": about["git_sha"], "torch": about["versions"]["torch"],
    }  # fmt: skip


def teacher_row(dataset: str, root: str, rationales: str) -> dict | None:
    """Gives the line of few-shot CoT: the teacher's own accuracy on test, where an answer that
    cannot be read is wrong; None where it has no answers."""
    if not has_split(dataset, "test", root):
        return None
    test = load_dataset(dataset, "test", root, joined(rationales, dataset))
    given = [(e.teacher_label, e.label) for e in test if e.label is not None]
    if not any(answer for answer, _ in given):
        return None
    task = get_task(dataset)
    right = sum(bool(answer) and is_correct(task, answer, label) for answer, label in given)
    return asdict(Point(dataset, "teacher", "few-shot-cot", "none", rationales)) | {
        "examples": 0, "accuracy": right / len(given), "n_test": len(given),
        "unanswered": sum(not answer for answer, _ in given), "scored_on": "test, human labels",
    }  # fmt: skip


# ---- Command line --------------------------------------------------------------------------------


def parse_args(argv: list[str] | None) -> tuple[argparse.Namespace, dict]:
    """Reads our flags, and those for `train.py`, which hold for all runs."""
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
    args, rest = parser.parse_known_args(argv)
    given = vars(train.parse_args(rest))
    ours = {"method", "labels", "fraction", "seed", "augment", "augment_fraction", "out", "resume",
            "plan", "gpus", "json", "timeout", "parallel"} & given.keys()  # fmt: skip
    if ours:
        flag = min(ours).replace("_", "-")
        raise UserError(f"--{flag} is not for a grid, which sets it or does without; allowed: "
                        "train.py's other flags")  # fmt: skip
    for flag in ("seeds", "workers"):
        if getattr(args, flag) is not None and not getattr(args, flag) > 0:
            raise UserError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: must be positive")
    return args, given


def scales(args: argparse.Namespace) -> list[Scale]:
    """Reads what is asked for, on each data set."""
    datasets = ["demo"] if args.name == "demo" else args.dataset or BENCHMARKS
    for flag, names in (("size", BY_SIZE), ("rationales", ("table1", "demo"))):
        if len(set(map(str, getattr(args, flag) or ()))) > 1 and args.name not in names:
            raise UserError(f"--{flag} several times: {args.name} is for one; several are for "
                            + ", ".join(names))  # fmt: skip
    if args.name == "demo" and args.dataset:
        raise UserError("demo is all of it on the bundled task; for another data set give a figure "
                        "or table, such as `table2 --dataset svamp`")  # fmt: skip
    made = []
    for data in datasets:
        get_task(data)
        known = [*(SHAPES if data == "demo" else ()), *train.RECIPES]  # smallest first
        for size in args.size or ():
            train.one_of("size", size, known)
        sizes = sorted(set(args.size or SIZES.get(data, PAPER_SIZES)), key=known.index)
        base = sizes[-1] if data == "demo" else sizes[0]
        own = PAPER_TEACHERS if data in TASKS else ("own",)
        asked = [" ".join(r for r in words if r != ASDIV) for words in args.rationales or ()]
        teachers = tuple(filter(None, asked)) or TEACHERS.get(data, own)
        if data in BENCHMARKS and "own" in teachers:
            raise UserError(f"--rationales own: {data} has none of its own; allowed: palm, neox, "
                            "files")  # fmt: skip
        fractions = (0.5, 1.0) if args.quick else FRACTIONS.get(data, OTHERS)
        pools = POOLS.get(data, ())[-1 if args.quick else None :]
        made.append(Scale(data, tuple(sizes), base, teachers, fractions, pools))
    return made


def describe(grids: dict, runs: Runs) -> None:
    """Prints what will be run and what is there."""
    for (part, data), points in grids.items():
        print(f"{part}, {data}: {TITLES[part]}")
        for point in points:
            found = runs.of(point)
            finished, begun = sum(r.finished for r in found), sum(r.begun for r in found)
            print(f"  {point}: {len(found)} seeds, {finished} finished, {begun} begun")
        if part in ("figure8", "figure9"):
            print("  then, where a student passes the teacher: the other fractions at the smallest "
                  "that does")  # fmt: skip
    every = runs.unique(grids)
    left = [run for run in every if not run.finished]
    print(f"{len(every)} runs, {len(every) - len(left)} finished, {sum(r.begun for r in left)} "
          f"begun; {len(left)} to run", flush=True)  # fmt: skip


def check_weights(args: argparse.Namespace, given: dict, where: list[Scale]) -> None:
    """Refuses one folder of weights for several sizes."""
    for s in where if "weights" in given else ():
        sizes = s.sizes if args.name in BY_SIZE else [s.base]
        if set(sizes) & SHAPES.keys() or (len(sizes) > 1 and given["weights"] != "random"):
            raise UserError(f"--weights {given['weights']} for several sizes; give one --size "
                            "with it")  # fmt: skip


def reproduce(args: argparse.Namespace, given: dict) -> int:
    """Plans, runs what is missing, writes results; returns the exit status."""
    given = (dict(steps=40, eval_every=20) if args.quick else {}) | given
    runs, where = Runs(args.seeds or (1 if args.quick else 4), given), scales(args)
    for s in where:  # a mistake in train.py's flags is told before anything is planned
        train.resolve(train.Config(dataset=s.dataset, **given))
    check_weights(args, given, where)
    names = NAMES if args.name == "demo" else [args.name]
    name = args.name + "-quick" * args.quick
    teachers = {}
    for s in where if args.name in BY_SIZE else ():
        try:
            root = given.get("data_root", train.Config.data_root)
            teachers[s.dataset] = teacher_row(s.dataset, root, s.teachers[0])
        except UserError as error:
            runs.problems |= {str(error): None}

    def grids() -> dict[tuple[str, str], list[Point]]:
        def score(s: Scale, point: Point | None) -> float | None:
            row = teachers.get(s.dataset)
            return runs.score(point) if point else row and row["accuracy"]

        return {(n, s.dataset): grid(n, s, functools.partial(score, s))
                for s in where for n in names}  # fmt: skip

    describe(grids(), runs)
    if runs.problems:
        print("missing:", *runs.problems, sep="\n  ", file=sys.stderr)
    if runs.problems or args.dry_run:
        return 0 if args.dry_run else 2
    failed, stopped = {}, False
    try:  # again for what the search of figures 8 and 9 adds
        while todo := [r for r in runs.unique(grids()) if not r.finished and r.out not in failed]:
            failed |= work(todo, args.workers, RESULTS / name / "logs")
    except KeyboardInterrupt:
        stopped = True
    every = runs.unique(grids())
    rows = [row_of(run) for run in every if run.finished]
    left = [f"{run.out}: {failed.get(run.out, 'not finished')}" for run in every
            if not run.finished]  # fmt: skip
    if left and args.name in ("demo", "figure8", "figure9"):
        left.append("perhaps more: the search of figures 8 and 9 waits for all sizes on all data")
    folder = write_results(name, grids(), rows + [r for r in teachers.values() if r], left)
    print(f"{len(rows)} of {len(every)} runs are finished"
          + (f"; {folder}/ has results.csv, table.md, report.md and, where matplotlib is "
             "installed, figure.png" if rows else ""))  # fmt: skip
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
        args, given = parse_args(argv)
        return gather() if args.name == "report" else reproduce(args, given)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # before or after the runs
        return 130


if __name__ == "__main__":
    sys.exit(main())
