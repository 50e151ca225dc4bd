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
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev

from data import write_text

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
PRINTED = {
    "esnli": {"standard": 88.38, "single-task": 88.88, "palm": 89.51, "neox": 89.12},
    "anli1": {"standard": 43.58, "single-task": 43.50, "palm": 49.58, "neox": 48.15},
    "cqa": {"standard": 62.19, "single-task": 61.37, "palm": 63.29, "neox": 63.25},
    "svamp": {"standard": 62.63, "single-task": 63.00, "palm": 65.50, "neox": 63.00},
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

    def __str__(self) -> str:
        words = [self.dataset, self.size, self.method, f"{self.labels} labels"]
        if self.rationales:
            words.append(f"{'shuffled ' * self.shuffled}rationales {self.rationales}")
        words.append(f"{100 * self.fraction:g} %")
        if self.pool:
            words.append(f"pool {100 * self.pool:g} %")
        return ", ".join(words)


# ---- Tables --------------------------------------------------------------------------------------


@dataclass
class Entry:
    """A point with the accuracies of its seeds, and their rows of results.csv. Few-shot CoT, which
    is not trained, has one row and no seed."""

    point: Point
    scores: dict[str, float]  # by seed
    rows: list[dict]

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
        return bool(self.rows[0].get("run"))


def standard_error(values: list[float]) -> float | None:
    """The standard error of the values' mean, from their sample deviation; None for fewer than two
    values."""
    return stdev(values) / len(values) ** 0.5 if len(values) > 1 else None


def entries(rows: Iterable[dict]) -> list[Entry]:
    """Groups rows by point, in the rows' order. Values may be strings, as csv gives them, or not
    yet written."""
    kinds = {f: type(v) for f, v in asdict(Point("", "", "")).items()}
    read = {str: str, bool: lambda v: str(v) == "True", float: float}
    points = defaultdict(list)
    for row in rows:
        points[Point(**{f: read[kind](row[f]) for f, kind in kinds.items()})].append(row)
    return [
        Entry(p, {r.get("seed", ""): float(r["accuracy"]) for r in found}, found)
        for p, found in points.items()
    ]


def gain(e: Entry, all_of: list[Entry]) -> str:
    """The accuracy minus that of standard fine-tuning with the same data and size: the mean
    of the differences over the seeds that both have, and its standard error; empty where there is
    nothing to compare with. Runs of equal seeds have the same examples in the same order."""
    same = ("dataset", "size", "labels", "fraction", "pool")
    for other in all_of:
        if e.point.method == "standard" or other.point.method != "standard":
            continue
        if any(getattr(e.point, name) != getattr(other.point, name) for name in same):
            continue
        pairs = [score - other.scores[s] for s, score in e.scores.items() if s in other.scores]
        if pairs:
            error = standard_error(pairs)
            return f"{mean(pairs):+.3f}" + ("" if error is None else f" ({error:.3f})")
    return ""


def printed(name: str, p: Point) -> str:
    """The paper's number for a point of Tables 1 and 2, which are of T5 base (220M); Table 2 uses
    PaLM's rationales. Empty where the paper prints none."""
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
        "steps": first.get("steps", ""),
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
        line["parameters"] = f"{int(first['parameters']):,}{too}"
        line["examples"] = f"{100 * p.fraction:g} % ({int(first['examples']):,}){pool}"
        line["training tokens"] = f"{mean(float(row['tokens']) for row in e.rows):,.0f}"
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


# The column of results.csv that is the horizontal axis; a table's plot has the entries' names.
AXES = {
    **dict.fromkeys(["figure4", "figure5", "figure8", "figure9"], "examples"),
    **dict.fromkeys(["figure6", "figure7"], "parameters"),
}
COLOURS = {
    "standard": "tab:blue",
    "step-by-step": "tab:orange",
    "few-shot-cot": "tab:green",
    "rationale-input": "tab:purple",
    "single-task": "tab:gray",
}


def draw(axes, name: str, all_of: list[Entry], title: str) -> None:
    """Draws one panel: a line for each method (in figures 8 and 9 for each method and size), with
    standard errors, and few-shot CoT across. A size has the same marker on every line; runs with
    unlabelled examples are a line of their own where the axis does not show them."""
    column, by_size, lines = AXES.get(name), name in ("figure8", "figure9"), defaultdict(list)
    sizes = list(dict.fromkeys(e.point.size for e in all_of))
    for e in all_of:
        pooled = ", with unlabelled" * (e.point.pool > 0 and not by_size)
        lines[e.point.method + f", {e.point.size}" * by_size + pooled].append(e)
    for label, found in lines.items():
        style = {"color": COLOURS[found[0].point.method], "label": label}
        if not found[0].trained:
            axes.axhline(found[0].mean, linestyle="--", linewidth=1, **style)
            continue
        x = [f"{e.point.method}\n{source(e.point)}" for e in found]
        if column:
            found.sort(key=lambda e: float(e.rows[0][column]))
            x = [float(e.rows[0][column]) for e in found]
        style["fmt"] = "os^Dv<"[sizes.index(found[0].point.size)] + "-" * bool(column)
        errors = [e.error or 0 for e in found]
        axes.errorbar(x, [e.mean for e in found], errors, capsize=3, markersize=4, **style)
    axes.set_title(title, fontsize=9)
    axes.set_xlabel(column or "", fontsize=8)
    axes.set_ylabel("test accuracy", fontsize=8)
    if column == "parameters":
        axes.set_xscale("log")
    axes.tick_params(labelsize=6)
    axes.legend(fontsize=6)


def figure(path: Path, panels: list[tuple[str, list[Entry], str]]) -> bool:
    """Draws the panels (grid's name, entries, title), three in a row; False where matplotlib, which
    the project does not require, is not installed. The file has no date or version in it, so that
    equal results give equal bytes."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    size = (3.6 * columns, 2.9 * lines)
    drawing, axes = pyplot.subplots(
        lines, columns, figsize=size, squeeze=False, layout="constrained"
    )
    for place, panel in zip(axes.flat, panels):
        draw(place, *panel)
    for place in axes.flat[len(panels) :]:
        place.set_visible(False)
    drawing.savefig(path, dpi=130, metadata={"Software": None})
    pyplot.close(drawing)
    return True


# ---- Files ---------------------------------------------------------------------------------------


def read_csv(path: Path) -> list[dict]:
    """The file's rows, with all values as strings; no rows where there is no file."""
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def write_csv(path: Path, rows: list[dict]) -> None:
    """Writes a line for each row, with a column for each key that any row has."""
    text = io.StringIO()
    heads = list(dict.fromkeys(key for row in rows for key in row))
    writer = csv.DictWriter(text, heads, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def write_results(
    name: str, grids: dict[tuple[str, str], list[Point]], rows: list[dict], not_run: list[str]
) -> Path:
    """Writes results.csv, table.md, figure.png and report.md; returns their folder.

    `grids` has the points by name and data set, `rows` what is finished, `not_run` a line for each
    run that is not. Rows that an earlier command left for other data sets stay, and are shown with
    these: `table2 --dataset svamp` and then `--dataset cqa` fill one table. Nothing is written
    where nothing finished."""
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
    for part, data in sorted(grids, key=lambda key: [*TITLES].index(key[0])):
        points = dict.fromkeys(grids[part, data])
        if part in WITH_TEACHER:
            points |= dict.fromkeys(
                p for p in found if (p.method, p.dataset) == ("few-shot-cot", data)
            )
        chosen = [found[p] for p in points if p in found]
        if any(e.trained for e in chosen):
            panels.append((part, chosen, f"{part}, {data}: {TITLES[part]}"))
    tables = [f"## {title}\n\n{table(part, chosen)}\n" for part, chosen, title in panels]
    write_text(folder / "table.md", "\n".join(tables))
    drawn = figure(folder / "figure.png", panels)
    write_text(folder / "report.md", report(name, tables, rows, not_run, drawn))
    return folder


def report(name: str, tables: list[str], rows: list[dict], not_run: list[str], drawn: bool) -> str:
    """The page of a figure or table: what was run, the numbers, what was not run."""
    trained = [row for row in rows if row.get("run")]
    weights = {re.sub(r"-seed-\d+$", "", row["weights"]) for row in trained}
    values = {key: {row[key] for row in trained} for key in ("seed", "torch", "git_sha")}
    seeds, torch, commits = (", ".join(sorted(found)) for found in values.values())
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

- {len(trained)} runs, seeds {seeds}; torch {torch}; commit {commits}
- started from: {", ".join(sorted(weights))} (random and `results/inputs/*` are untrained)
- the data's sha256: in each run's run.json

{contents}
## What was not run

{notes}
"""
