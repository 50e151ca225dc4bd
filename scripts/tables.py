"""What a grid of runs says: rows of `results.csv` in; `table.md`, `figure.png`, `report.md` out.

This file owns the paper's printed numbers, tables, sentences and plots. It knows nothing of how
runs are found or started: `reproduce.py` hands it rows.
"""

import contextlib
import csv
import io
import json
import os
import re
import shlex
import sys
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev

from data import UserError

RESULTS, INPUTS = Path("results"), Path("results/inputs")
BOTH = ("standard", "step-by-step")
BESIDE_TEACHER = ("figure6", "figure7", "figure8", "figure9")  # students and few-shot CoT
NAMES = ["figure4", "figure5", *BESIDE_TEACHER, "table1", "table2", "noise"]

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


# ---------------------------------------------------------------------------- tables and sentences


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
        Entry(p, {r.get("seed", ""): float(r["accuracy"]) for r in found}, found)
        for p, found in points.items()
    ]


def find(all_of: list[Entry], **wanted) -> list[Entry]:
    """Those whose points have these fields."""
    return [e for e in all_of if all(getattr(e.point, k) == v for k, v in wanted.items())]


def printed(name: str, p: Point) -> str:
    """The paper's number for a point of Tables 1 and 2, which is of T5 base (220M); Table 2's are
    with PaLM's rationales."""
    if name not in ("table1", "table2") or p.dataset not in PRINTED:
        return ""
    if name == "table2" and p.rationales not in ("", "palm"):
        return ""
    key = p.rationales if p.method == "step-by-step" else p.method
    number = PRINTED[p.dataset].get(key)
    return f"{number / 100:.4f}" if number else ""


def source(p: Point) -> str:
    """Whose rationales a point uses, in words."""
    named = {"": "none", "own": "the data's own"}
    whose = named.get(p.rationales) or ", ".join(Path(r).stem for r in p.rationales.split())
    if p.pool and p.dataset != "demo":
        whose += ", of asdiv the teacher's in its file"
    return whose + ", of another example" * p.shuffled


def table(name: str, all_of: list[Entry]) -> str:
    """All entries; a column that would say the same on each line is left out."""
    heads = ["data set", "size", "parameters", "method", "labels", "rationales", "examples",
             "steps", "seeds", "accuracy", "standard error", "scored on", "training tokens",
             "the paper's (T5 220M)"]  # fmt: skip
    lines = []
    for e in all_of:
        p, first = e.point, e.rows[0]
        share = f"{100 * p.fraction:g} % ({int(first['examples']):,})"
        if p.pool:
            share += f", with {100 * p.pool:g} % of the unlabelled"
        trained = bool(first.get("run"))
        tokens = [float(r["tokens"]) for r in e.rows] if trained else []
        lines.append([
            p.dataset, p.size, (f"{e.parameters:.3g}" if e.parameters >= 1e9
            else f"{int(e.parameters):,}") + " and the teacher" * (p.method == "rationale-input"),
            p.method, p.labels, source(p), share if trained else "none",
            str(first.get("steps", "")), str(len(e.rows)) if trained else "", f"{e.mean:.3f}",
            "" if e.error is None else f"{e.error:.3f}", first["scored_on"],
            f"{mean(tokens):,.0f}" if tokens else "",
            printed(name, p),
        ])  # fmt: skip
    several = any(len(e.scores) > 1 for e in all_of)
    always = ("accuracy", "standard error") if several else ("accuracy",)
    shown = [i for i, head in enumerate(heads) if head in always
             or len({line[i] for line in lines}) > 1]  # fmt: skip
    same = [f"{heads[i]} {lines[0][i]}" for i in range(len(heads))
            if i not in shown and lines[0][i]]  # fmt: skip
    text = [" | ".join(cells[i] for i in shown) for cells in [heads, ["---"] * len(heads), *lines]]
    common = f"\n\nAll: {', '.join(same)}." if same else ""
    return "\n".join(f"| {line} |" for line in text) + common


def words(name: str, all_of: list[Entry]) -> list[str]:
    """What the numbers of one data set say, in plain sentences."""
    said = []
    plain = next(iter(find(all_of, method="standard", fraction=1.0, pool=0.0)), None)
    if name in ("figure4", "figure5"):
        ours = find(all_of, method="step-by-step")
        for b in ours:
            for a in find(all_of, method="standard", fraction=b.point.fraction):
                said.append(f"with {100 * b.point.fraction:g} % of the examples, step-by-step less "
                            f"standard: {b - a}")  # fmt: skip
        passing = [e for e in ours if plain and e.mean > plain.mean]
        if passing:
            least = min(passing, key=lambda e: e.point.fraction)
            said.append(f"the least part with which the mean of step-by-step is above that of "
                        f"standard on all data ({plain.mean:.3f}) is {100 * least.point.fraction:g}"
                        f" % of the examples, by {least - plain}")  # fmt: skip
        elif plain:
            said.append(f"at no fraction is the mean of step-by-step above that of standard on all "
                        f"data ({plain.mean:.3f})")  # fmt: skip
    if name in ("figure6", "figure7"):
        for b in find(all_of, method="step-by-step"):
            size, pool = b.point.size, b.point.pool
            for a in find(all_of, method="standard", size=size, pool=pool):
                said.append(f"at {size}{', with the unlabelled examples' * (pool > 0)}, "
                            f"step-by-step less standard: {b - a}")  # fmt: skip
    if name in BESIDE_TEACHER:
        said += beside_teacher(all_of, "human" if name in ("figure6", "figure8") else "teacher")
    if name in ("table1", "table2", "noise"):
        for e in all_of:
            if plain and e is not plain:
                said.append(f"{e.point.method}, rationales {source(e.point)}, less standard: "
                            f"{e - plain}")  # fmt: skip
    if name == "noise" and len(all_of) == 3:
        _, wrong, right = all_of
        said.append(f"right rationales less another example's: {right - wrong}")
        tokens = [mean(float(r["tokens"]) for r in e.rows) for e in (plain, right)]
        said.append(f"training with rationales reads and writes {tokens[1] / tokens[0]:.1f} times "
                    "the tokens of labels alone")  # fmt: skip
    return said


def beside_teacher(all_of: list[Entry], labels: str) -> list[str]:
    """Which students pass the teacher's few-shot CoT, and PINTO tuning."""
    few = find(all_of, method="few-shot-cot")
    if not few:
        return ["the teacher's answers to the test split are not there, so no few-shot CoT"]
    said, bar = [], f"the teacher's few-shot CoT ({few[0].mean:.3f})"
    for method in BOTH:
        passing = [e for e in find(all_of, method=method, labels=labels) if e.mean > few[0].mean]
        if not passing:
            said.append(f"no {method} student's mean is above {bar}")
            continue
        least = min(passing, key=lambda e: (e.parameters, e.point.fraction, e.point.pool))
        p, error = least.point, least.error
        more = f" and {100 * p.pool:g} % of the unlabelled" if p.pool else ""
        said.append(f"the smallest {method} student, on the least data, whose mean is above {bar} "
                    f"is {p.size} with {100 * p.fraction:g} % of the examples{more}: "
                    f"{least.mean:.3f}"
                    + ("" if error is None else f" (standard error {error:.3f})"))  # fmt: skip
    for pinto in find(all_of, method="rationale-input"):
        ours = find(all_of, method="step-by-step")
        passing = [e.point.size for e in ours if e.mean > pinto.mean] or ["no size"]
        said.append(f"PINTO tuning, for which the teacher is deployed too, reaches "
                    f"{pinto.mean:.3f}; step-by-step is above it at {passing[0]}")  # fmt: skip
    if unanswered := int(few[0].rows[0]["unanswered"]):
        said.append(f"{unanswered} of the teacher's {few[0].rows[0]['n_test']} answers are "
                    "missing or cannot be read, and count as wrong")  # fmt: skip
    return said


# ----------------------------------------------------------------------------------------- figures


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
            label = e.point.method + "\nshuffled" * e.point.shuffled
            if e.point.rationales and name == "table1":
                label += f"\n{Path(e.point.rationales).stem}"
            axes.bar(i, e.mean, yerr=e.error or 0, capsize=3, color=colours[e.point.method])
            axes.text(i, 0.02, label, ha="center", va="bottom", fontsize=7, color="white",
                      transform=axes.get_xaxis_transform())  # fmt: skip
        axes.set_xticks([])
        return
    by_size, search = name in ("figure6", "figure7"), name in ("figure8", "figure9")
    pooled = search and any(e.point.pool for e in all_of)
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
        axes.set_xlim(-5, 105)
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


# ------------------------------------------------------------------------------------------- files


def write_text(path: Path, text: str) -> None:
    """Beside, and renamed; a file that is like this already, and may be in use, is left alone."""
    if path.exists() and path.read_text() == text:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    beside.write_text(text)
    os.replace(beside, path)


def read_csv(path: Path) -> list[dict]:
    """Its rows, all values as texts; none where there is no file."""
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def write_csv(path: Path, rows: list[dict]) -> None:
    """A row a dict, with a column for each key that any of them has."""
    text = io.StringIO()
    heads = list(dict.fromkeys(key for row in rows for key in row))
    writer = csv.DictWriter(text, heads, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def provenance(rows: list[dict]) -> list[str]:
    """Versions, seeds, and what was read, of trained rows."""
    trained = [row for row in rows if row.get("run")]
    files: dict[str, str] = {}
    for row in trained:
        with contextlib.suppress(OSError, ValueError):
            files |= json.loads(Path(row["run"], "run.json").read_text())["data_sha256"]
    several = lambda key: ", ".join(sorted({str(row[key]) for row in trained}))  # noqa: E731
    weights = sorted({without_seed(row["weights"]) for row in trained})
    drawn = any((row["dataset"], row["size"]) == ("demo", "teacher") for row in rows)
    untrained = any(w == "random" or Path(w).is_relative_to(INPUTS) for w in weights)
    return [
        f"- {len(trained)} runs, seeds {several('seed')}; torch {several('torch')}; commit "
        f"{several('git_sha')}; {sum(float(row['seconds']) for row in trained) / 3600:.2f} hours "
        "of runs in all, pauses included",
        f"- started from: {', '.join(weights)}"
        + " (random and `results/inputs/*`: untrained)" * untrained,
        "- sha256 of the data, first 12 digits: "
        + ", ".join(f"{near(path)} {str(digest)[:12]}" for path, digest in sorted(files.items())),
        *["- the bundled task's teacher is a script without parameters; its place on the axis of "
          "sizes is only drawn"] * drawn,
    ]  # fmt: skip


def near(path: str) -> str:
    """From here, where it lies below."""
    return os.path.relpath(path) if Path(path).is_relative_to(Path.cwd()) else path


def without_seed(weights: str) -> str:
    """Untrained weights in `results/inputs` are named after their size and seed."""
    return re.sub(r"-seed-\d+$", "", weights)


def write_results(
    name: str, grids: dict[tuple[str, str], list[Point]], rows: list[dict], not_run: list[str]
) -> Path:
    """results.csv, table.md, figure.png and report.md. Rows that an earlier command left for other
    data sets are kept, and told with these. Nothing is written where nothing finished."""
    folder = RESULTS / name
    if not any(row.get("run") for row in rows):
        return folder
    now = {data for _, data in grids}
    earlier = [row for row in read_csv(folder / "results.csv") if row["dataset"] not in now]
    write_csv(folder / "results.csv", earlier + rows)
    rows = read_csv(folder / "results.csv")
    part = next(iter(grids))[0]
    for e in entries(earlier):
        grids.setdefault((part, e.point.dataset), []).append(e.point)

    panels, found = [], {e.point: e for e in entries(rows)}
    for (part, data), points in sorted(grids.items(), key=lambda item: NAMES.index(item[0][0])):
        chosen = [found[p] for p in dict.fromkeys(points) if p in found]
        if part in BESIDE_TEACHER:
            teacher = find([*found.values()], method="few-shot-cot", dataset=data)
            chosen += [e for e in teacher if e not in chosen]
        if any(e.rows[0].get("run") for e in chosen):
            panels.append((part, chosen, f"{part}, {data}: {TITLES[part]}"))
    tables = [f"## {title}\n\n{table(part, chosen)}\n" for part, chosen, title in panels]
    write_text(folder / "table.md", "\n".join(tables))
    drawn = figure(folder / "figure.png", panels)
    write_text(folder / "report.md", report(name, panels, tables, rows, not_run, drawn))
    return folder


def report(
    name: str, panels: list, tables: list[str], rows: list[dict], not_run: list[str], drawn: bool
) -> str:
    """The page of a figure or table: what was run, what the numbers say, what was not run."""
    again = shlex.join(["python", "scripts/reproduce.py", *sys.argv[1:]])
    page = [
        f"# {name}", "", f"`{again}`, {time.strftime('%Y-%m-%d')}", "",
        *(["![accuracies](figure.png)", ""] if drawn else []),
        "Each student is the one of its run that was best on valid, scored once. Means over seeds "
        "with their standard error, which is of seeds alone: n test examples add about "
        "sqrt(p (1 - p) / n). Differences are paired by seed. Numbers called the paper's are "
        "copied from it (pretrained T5; PaLM 540B, or GPT-NeoX 20B) and were not measured here.",
        "",
        *provenance(rows), "",
    ]  # fmt: skip
    for (part, chosen, _), told in zip(panels, tables):
        page += [told, *(f"- {line}." for line in words(part, chosen)), ""]
        page += [f"The paper: {CLAIMS[part]}", ""] if part in CLAIMS else []
    notes = not_run or ["nothing that this command asks for"]
    return "\n".join([*page, "## What was not run", "", *(f"- {line}" for line in notes), ""])


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
