"""What a grid of runs gives: rows of `results.csv` in; `table.md`, `figure.png`, `report.md` out.

This file owns the paper's printed numbers, the tables and the plots. It knows nothing of how runs
are found or started: `reproduce.py` hands it rows, one for each finished run and one for each
teacher (few-shot CoT), and the points that a figure or table consists of. `results.csv` keeps all
of them; everything else here is derived from it.
"""

import csv
import io
import re
import shlex
import sys
import time
from collections import defaultdict
from dataclasses import dataclass, fields, replace
from pathlib import Path
from statistics import mean, stdev

import numpy as np

from data import write_json, write_text

RESULTS, INPUTS = Path("results"), Path("results/inputs")
BOTH = ("standard", "step-by-step")
WITH_TEACHER = ("figure6", "figure7", "figure8", "figure9")  # they show few-shot CoT too
TITLES = {
    "headline": "the main comparisons",
    "figure4": "human labels, fewer examples",
    "figure5": "teacher's labels, fewer examples",
    "figure6": "human labels, deployed size",
    "figure7": "teacher's labels, deployed size",
    "figure8": "human labels, least data and size",
    "figure9": "teacher's labels, least data and size",
    "table1": "teachers",
    "table2": "one task or two",
    "noise": "what the rationales say",
}

# What the paper prints: Tables 1 and 2, T5 of 220M, human labels.
SETTINGS = ("standard", "single-task palm", "step-by-step palm", "step-by-step neox")
PRINTED = {
    "esnli": (88.38, 88.88, 89.51, 89.12),
    "anli1": (43.58, 43.50, 49.58, 48.15),
    "cqa": (62.19, 61.37, 63.29, 63.25),
    "svamp": (62.63, 63.00, 65.50, 63.00),
}


@dataclass(frozen=True)
class Point:
    """A mark in a figure or an entry of a table: a setting that is run with several seeds. Its
    fields are columns of results.csv."""

    dataset: str
    size: str
    method: str
    labels: str = "human"
    rationales: str = ""  # whose: palm, neox, own (the folder's lines), files; "" where unused
    shuffled: bool = False  # each example has another one's rationale
    fraction: float = 1.0
    pool: float = 0.0  # the share of the unlabelled examples that is added


# ---- Tables --------------------------------------------------------------------------------------


@dataclass
class Entry:
    """A point with its seeds' rows of results.csv. Few-shot CoT, which is not trained, has one row
    and no seed."""

    point: Point
    rows: list[dict]

    @property
    def scores(self) -> dict[int | None, float]:
        """Accuracies by seed."""
        return {row.get("seed"): row["accuracy"] for row in self.rows}

    @property
    def mean(self) -> float:
        return mean(self.scores.values())

    @property
    def error(self) -> float | None:
        """The standard error of the mean; None for a single seed."""
        return standard_error([*self.scores.values()])

    @property
    def trained(self) -> bool:
        """A student is trained; few-shot CoT is not."""
        return "run" in self.rows[0]


def standard_error(values: list[float]) -> float | None:
    """The standard error of the values' mean, from their sample deviation; None for fewer than two
    values."""
    return stdev(values) / len(values) ** 0.5 if len(values) > 1 else None


def entries(rows: list[dict]) -> list[Entry]:
    """Groups rows by point, in the rows' order."""
    found = defaultdict(list)
    for row in rows:
        found[Point(**{f.name: row[f.name] for f in fields(Point)})].append(row)
    return [Entry(point, rows) for point, rows in found.items()]


def gain(e: Entry, all_of: list[Entry]) -> str:
    """The accuracy minus that of standard fine-tuning with the same data and size: the mean
    of the differences over the seeds that both have, and its standard error; empty where there is
    nothing to compare with. Runs of equal seeds have the same examples in the same order."""
    same = replace(e.point, method="standard", rationales="", shuffled=False)
    others = [other for other in all_of if replace(other.point, rationales="") == same]
    if e.point.method == "standard" or not others:
        return ""
    theirs = others[0].scores
    pairs = [score - theirs[seed] for seed, score in e.scores.items() if seed in theirs]
    if not pairs:
        return ""
    error = standard_error(pairs)
    return f"{mean(pairs):+.3f}" + ("" if error is None else f" ({error:.3f})")


def printed(name: str, p: Point) -> str:
    """The paper's number for a point of Tables 1 and 2; empty where it prints none."""
    setting = f"{p.method} {p.rationales}".strip()
    if name not in ("table1", "table2") or p.dataset not in PRINTED or setting not in SETTINGS:
        return ""
    return f"{PRINTED[p.dataset][SETTINGS.index(setting)] / 100:.4f}"


def source(p: Point) -> str:
    """Whose rationales a point uses, in words."""
    named = {"": "none", "own": "the data's own"}
    whose = named.get(p.rationales) or ", ".join(Path(r).stem for r in p.rationales.split())
    if p.pool and p.dataset != "demo":
        whose += ", of asdiv the teacher's in its file"
    return whose + ", of another example" * p.shuffled


def cells(name: str, e: Entry, all_of: list[Entry]) -> dict[str, str]:
    """An entry's line of the table, by column; few-shot CoT trains nothing, so some are
    empty."""
    p, first = e.point, e.rows[0]
    pool = f", with {100 * p.pool:g} % of the unlabelled" if p.pool else ""
    line = {
        "data set": p.dataset,
        "size": p.size,
        "parameters": "",
        "method": p.method,
        "labels": p.labels,
        "rationales": source(p),
        "examples": "none",
        "steps": str(first.get("steps", "")),
        "seeds": str(len(e.rows)) if e.trained else "",
        "accuracy": f"{e.mean:.3f}",
        "standard error": "" if e.error is None else f"{e.error:.3f}",
        "minus standard (standard error)": gain(e, all_of),
        "scored on": first["scored_on"],
        "training tokens": "",
        "the paper's (T5 220M)": printed(name, p),
    }
    if e.trained:
        too = " and the teacher" * (p.method == "rationale-input")
        line["parameters"] = f"{first['parameters']:,}{too}"
        line["examples"] = f"{100 * p.fraction:g} % ({first['examples']:,}){pool}"
        line["training tokens"] = f"{mean(row['tokens'] for row in e.rows):,.0f}"
    return line


def table(name: str, all_of: list[Entry]) -> str:
    """All entries as a Markdown table. A column with the same value on each line is left out, and
    named with its value below the table; accuracy always is a column."""
    lines = [cells(name, e, all_of) for e in all_of]
    alike = {head for head in lines[0] if len({line[head] for line in lines}) == 1} - {"accuracy"}
    shown = [head for head in lines[0] if head not in alike]
    rows = [shown, ["---"] * len(shown), *([line[head] for head in shown] for line in lines)]
    text = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    same = [f"{head} {value}" for head, value in lines[0].items() if value and head in alike]
    return text + (f"\n\nAll: {', '.join(same)}." if same else "")


# ---- Figures -------------------------------------------------------------------------------------

# The column of results.csv on the horizontal axis. Tables have no picture.
AXES = {
    **dict.fromkeys(["figure4", "figure5", "figure8", "figure9"], "examples"),
    **dict.fromkeys(["figure6", "figure7"], "parameters"),
}
# Okabe and Ito's colours, which colour-blind readers can tell apart.
COLOURS = {
    "standard": "#0072B2",
    "step-by-step": "#D55E00",
    "few-shot-cot": "#444444",
    "rationale-input": "#CC79A7",
}
NAMES = {"standard": "labels alone", "few-shot-cot": "the teacher", "rationale-input": "PINTO"}


def informative(name: str, chosen: list[Entry]) -> bool:
    """Figures 8 and 9 say more than 6 and 7 only where a size passed the teacher, so that less data
    was tried."""
    less = [e for e in chosen if e.point.fraction < 1 or 0 < e.point.pool < 1]
    return name in AXES and (name not in ("figure8", "figure9") or bool(less))


def draw(axes, column: str, chosen: list[Entry]) -> None:
    """Draws a line for each method, with a band of one standard error, and few-shot CoT across.
    Names stand beside the lines' ends. Where examples are the axis, each size has its own line, and
    a size of a single amount has none; else runs with unlabelled examples are points of their own.
    """
    lines, ends = defaultdict(list), []
    sizes = {e.point.size for e in chosen if e.trained}
    for e in chosen:
        label = NAMES.get(e.point.method, e.point.method)
        if column == "examples":
            label += f", {e.point.size}" * (e.trained and len(sizes) > 1)
        elif e.point.pool:
            label += ", with unlabelled"
        lines[label].append(e)
    for label, found in lines.items():
        colour = COLOURS[found[0].point.method]
        if not found[0].trained:
            axes.axhline(found[0].mean, linestyle="--", linewidth=1, color=colour)
        elif column == "examples" and len(found) == 1:
            continue
        else:
            found.sort(key=lambda e: e.rows[0][column])
            x = [e.rows[0][column] for e in found]
            y, errors = np.array([(e.mean, e.error or 0) for e in found]).T
            axes.errorbar(x, y, errors, fmt="o-", markersize=4, capsize=2, color=colour)
            axes.fill_between(x, y - errors, y + errors, color=colour, alpha=0.15, linewidth=0)
        ends.append((found[-1].mean, label, colour))
    if column == "parameters":
        axes.set_xscale("log")
    below = -1.0
    for y, label, colour in sorted(ends):  # each name above the one below it
        y = max(y, below + 0.06 * (axes.get_ylim()[1] - axes.get_ylim()[0]))
        where = axes.get_yaxis_transform()  # x is a share of the axes' width
        axes.text(1.02, y, label, color=colour, transform=where, va="center", fontsize=8)
        below = y


def figure(path: Path, panels: list[tuple[str, list[Entry], str]]) -> bool:
    """Draws the panels (column of the horizontal axis, entries, title), at most three in a row;
    False where there are none, or matplotlib, which the project does not require, is not installed.
    The file has no date or version in it, so that equal results give equal bytes."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    if not panels:
        return False
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    drawing = Figure(figsize=(4.2 * columns, 3 * lines), layout="constrained")
    axes = drawing.subplots(lines, columns, squeeze=False)
    for place, (column, chosen, title) in zip(axes.flat, panels):
        place.set_title(title, fontsize=9)
        place.tick_params(labelsize=7)
        place.spines[["top", "right"]].set_visible(False)
        place.set_xlabel(column, fontsize=8)
        place.set_ylabel("test accuracy", fontsize=8)
        draw(place, column, chosen)
    for place in axes.flat[len(panels) :]:
        place.set_visible(False)
    drawing.savefig(path, dpi=130, metadata={"Software": None})
    return True


def first_screen(folder: Path, shown: dict[str, list[Entry]]) -> None:
    """Writes README's picture and results.json, the means that train.py shows beside a run's own
    accuracy: the bundled task's, from the entries of its figures."""
    human = shown["figure4"]
    more = [e for e in shown["figure7"] if e.point.pool or not e.trained]
    teacher = shown["figure5"] + more
    panels = [
        ("examples", human, "People's labels, fewer examples"),
        ("examples", teacher, "The teacher's labels; the last point adds unlabelled inputs"),
    ]
    figure(folder / "first.png", panels)
    means = {}
    for e in human:
        if e.point.fraction == 1:
            about = {"accuracy": e.mean, "standard_error": e.error, "seeds": len(e.scores)}
            means[e.point.method] = about
    write_json(folder / "results.json", means)


# ---- Files ---------------------------------------------------------------------------------------


def write_csv(path: Path, rows: list[dict]) -> None:
    """Writes a line for each row; the first has all columns."""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def write_results(
    name: str, grids: dict[tuple[str, str], list[Point]], rows: list[dict], not_run: list[str]
) -> Path:
    """Writes results.csv, table.md, figure.png and report.md; returns their folder.

    `grids` has the points by name and data set, `rows` what is finished, runs first, `not_run` a
    line for each run that is not. Nothing is written where no run is finished."""
    folder = RESULTS / name
    if not any("run" in row for row in rows):
        return folder
    write_csv(folder / "results.csv", rows)
    shown, found = {}, {e.point: e for e in entries(rows)}
    for (part, data), points in grids.items():
        shown[part, data] = [found[p] for p in points if p in found]
        if part in WITH_TEACHER:
            shown[part, data] += [
                e for e in found.values() if e.point.dataset == data and not e.trained
            ]
    texts, panels = [], []
    for (part, data), chosen in shown.items():
        title = f"{part}, {data}: {TITLES[part]}"
        if any(e.trained for e in chosen):
            texts.append(f"## {title}\n\n{table(part, chosen)}\n")
            if informative(part, chosen):
                panels.append((AXES[part], chosen, title))
    write_text(folder / "table.md", "\n".join(texts))
    drawn = figure(folder / "figure.png", panels)
    if name == "demo":
        first_screen(folder, {part: chosen for (part, _), chosen in shown.items()})
    write_text(folder / "report.md", report(name, texts, rows, not_run, drawn))
    return folder


def report(name: str, tables: list[str], rows: list[dict], not_run: list[str], drawn: bool) -> str:
    """The page of a figure or table: what was run, the numbers, what was not run."""
    trained = [row for row in rows if "run" in row]
    weights = {re.sub(r"-seed-\d+$", "", row["weights"]) for row in trained}
    picture = "![accuracies](figure.png)\n\n" if drawn else ""
    contents = "\n".join(tables)
    notes = "\n".join(f"- {line}" for line in not_run or ["nothing that this command asks for"])
    return f"""\
# {name}

`{shlex.join(["python", "scripts/reproduce.py", *sys.argv[1:]])}`, {time.strftime("%Y-%m-%d")}

{picture}\
Each student is the one of its run that was best on valid, scored once. Means over seeds with their
standard error, which is of seeds alone: n test examples add about sqrt(p (1 - p) / n). Minus
standard: the mean over equal seeds of the accuracy minus that of standard fine-tuning on the same
examples at the same size. Numbers called the paper's are copied from it (pretrained T5; PaLM 540B,
or GPT-NeoX 20B) and were not measured here.

- {len(trained)} runs; seeds, torch's versions and commits: `results.csv`
- started from: {", ".join(sorted(weights))} (random and `results/inputs/*` are untrained)
- the data's sha256: in each run's run.json

{contents}
## What was not run

{notes}
"""
