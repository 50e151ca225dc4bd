"""What a grid of runs gives: rows of `results.csv` in; `table.md`, `figure.png`, `report.md` out.

This file owns the paper's printed numbers, the tables and the plots. It knows nothing of how runs
are found or started: `reproduce.py` hands it rows.
"""

import contextlib
import csv
import io
import json
import re
import shlex
import sys
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev

from data import UserError, write_text

RESULTS, INPUTS = Path("results"), Path("results/inputs")
BOTH = ("standard", "step-by-step")
BESIDE_TEACHER = ("figure6", "figure7", "figure8", "figure9")  # students and few-shot CoT
NAMES = ["figure4", "figure5", *BESIDE_TEACHER, "table1", "table2", "noise"]

# What the paper prints: Tables 1 and 2, T5 of 220M, human labels.
PRINTED = {
    "esnli": {"standard": 88.38, "single-task": 88.88, "palm": 89.51, "neox": 89.12},
    "anli1": {"standard": 43.58, "single-task": 43.50, "palm": 49.58, "neox": 48.15},
    "cqa": {"standard": 62.19, "single-task": 61.37, "palm": 63.29, "neox": 63.25},
    "svamp": {"standard": 62.63, "single-task": 63.00, "palm": 65.50, "neox": 63.00},
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


# ---- Tables --------------------------------------------------------------------------------------


@dataclass
class Entry:
    """A point with the accuracies of its seeds."""

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
    """The standard error of the values' mean; None for fewer than two."""
    return stdev(values) / len(values) ** 0.5 if len(values) > 1 else None


def entries(rows: Iterable[dict]) -> list[Entry]:
    """Groups rows, as csv gives them, by point."""
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
    """Gives the accuracy minus that of standard fine-tuning with the same data and size: the mean
    of the differences over the seeds that both have, and its standard error."""
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
    """Gives the paper's number for a point of Tables 1 and 2, which are of T5 base (220M); Table
    2's numbers are with PaLM's rationales."""
    if name not in ("table1", "table2") or p.dataset not in PRINTED:
        return ""
    if name == "table2" and p.rationales not in ("", "palm"):
        return ""
    key = p.rationales if p.method == "step-by-step" else p.method
    number = PRINTED[p.dataset].get(key)
    return f"{number / 100:.4f}" if number else ""


def source(p: Point) -> str:
    """Says whose rationales a point uses."""
    named = {"": "none", "own": "the data's own"}
    whose = named.get(p.rationales) or ", ".join(Path(r).stem for r in p.rationales.split())
    if p.pool and p.dataset != "demo":
        whose += ", of asdiv the teacher's in its file"
    return whose + ", of another example" * p.shuffled


def cells(name: str, e: Entry, all_of: list[Entry]) -> dict[str, str]:
    """Gives an entry's line of the table, by column."""
    p, first = e.point, e.rows[0]
    line = {"data set": p.dataset, "size": p.size, "parameters": "", "method": p.method,
            "labels": p.labels, "rationales": source(p), "examples": "none", "steps": "",
            "seeds": "", "accuracy": f"{e.mean:.3f}",
            "standard error": "" if e.error is None else f"{e.error:.3f}",
            "minus standard (standard error)": gain(e, all_of), "scored on": first["scored_on"],
            "training tokens": "", "the paper's (T5 220M)": printed(name, p)}  # fmt: skip
    if e.trained:
        teacher_too = " and the teacher" * (p.method == "rationale-input")
        more = f", with {100 * p.pool:g} % of the unlabelled" if p.pool else ""
        line |= {
            "parameters": f"{int(first['parameters']):,}{teacher_too}",
            "examples": f"{100 * p.fraction:g} % ({int(first['examples']):,}){more}",
            "steps": str(first["steps"]), "seeds": str(len(e.rows)),
            "training tokens": f"{mean(float(r['tokens']) for r in e.rows):,.0f}",
        }  # fmt: skip
    return line


def table(name: str, all_of: list[Entry]) -> str:
    """Writes all entries; a column that says the same on each line is told once, below."""
    lines = [cells(name, e, all_of) for e in all_of]
    shown = [head for head in lines[0]
             if head == "accuracy" or len({line[head] for line in lines}) > 1]  # fmt: skip
    rows = [shown, ["---"] * len(shown), *([line[head] for head in shown] for line in lines)]
    text = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    same = [f"{head} {value}" for head, value in lines[0].items() if value and head not in shown]
    return text + (f"\n\nAll: {', '.join(same)}." if same else "")


# ---- Figures -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plot:
    """How a figure's entries are drawn; accuracy is always the other axis."""

    column: str = ""  # of results.csv; "" for the entries' names
    label: str = ""
    scale: str = "linear"
    by_size: bool = False  # each size has a line of its own


PLOTS = {
    **dict.fromkeys(["figure4", "figure5"], Plot("examples", "training examples")),
    **dict.fromkeys(["figure6", "figure7"], Plot("parameters", "student's parameters", "log")),
    **dict.fromkeys(["figure8", "figure9"], Plot("examples", "training examples", by_size=True)),
    **dict.fromkeys(["table1", "table2", "noise"], Plot()),
}
COLOURS = {"standard": "tab:blue", "step-by-step": "tab:orange", "few-shot-cot": "tab:green",
           "rationale-input": "tab:purple", "single-task": "tab:gray"}  # fmt: skip


def draw(axes, name: str, all_of: list[Entry], title: str) -> None:
    """Draws one panel: a line a method, with standard errors, and few-shot CoT across."""
    plot, lines = PLOTS[name], defaultdict(list)
    sizes = list(dict.fromkeys(e.point.size for e in all_of))
    for e in all_of:
        pooled = ", with unlabelled" * (e.point.pool > 0 and not plot.by_size)
        lines[e.point.method + f", {e.point.size}" * plot.by_size + pooled].append(e)
    for label, found in lines.items():
        style = dict(color=COLOURS[found[0].point.method], label=label)
        if not found[0].trained:
            axes.axhline(found[0].mean, linestyle="--", linewidth=1, **style)
            continue
        if plot.column:
            found.sort(key=lambda e: float(e.rows[0][plot.column]))
            x = [float(e.rows[0][plot.column]) for e in found]
        else:
            x = [f"{e.point.method}\n{source(e.point)}" for e in found]
        fmt = "os^Dv<"[sizes.index(found[0].point.size)] + "-" * bool(plot.column)
        axes.errorbar(x, [e.mean for e in found], [e.error or 0 for e in found], fmt=fmt,
                      capsize=3, markersize=4, **style)  # fmt: skip
    axes.set_title(title, fontsize=9)
    axes.set_xlabel(plot.label, fontsize=8)
    axes.set_ylabel("test accuracy", fontsize=8)
    if plot.column:
        axes.set_xscale(plot.scale)
    axes.tick_params(labelsize=6)
    axes.legend(fontsize=6)


def figure(path: Path, panels: list[tuple[str, list[Entry], str]]) -> bool:
    """Draws the panels, three a row; False where matplotlib is not installed."""
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


# ---- Files ---------------------------------------------------------------------------------------


def read_csv(path: Path) -> list[dict]:
    """Reads the rows, all values as texts; none where there is no file."""
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def write_csv(path: Path, rows: list[dict]) -> None:
    """Writes a line a row, with a column for each key that any row has."""
    text = io.StringIO()
    heads = list(dict.fromkeys(key for row in rows for key in row))
    writer = csv.DictWriter(text, heads, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def provenance(rows: list[dict]) -> list[str]:
    """Lists versions, seeds, and what was read, of trained rows."""
    trained = [row for row in rows if row.get("run")]
    several = lambda key: ", ".join(sorted({str(row[key]) for row in trained}))  # noqa: E731
    files: dict[str, str] = {}
    for row in trained:
        with contextlib.suppress(OSError, ValueError):
            files |= json.loads(Path(row["run"], "run.json").read_text())["data_sha256"]
    weights = sorted({re.sub(r"-seed-\d+$", "", row["weights"]) for row in trained})
    data = [f"{path} {str(digest)[:12]}" for path, digest in sorted(files.items())]
    return [
        f"- {len(trained)} runs, seeds {several('seed')}; torch {several('torch')}; commit "
        f"{several('git_sha')}; {sum(float(row['seconds']) for row in trained) / 3600:.2f} hours "
        "of runs in all, pauses included",
        f"- started from: {', '.join(weights)} (random and `results/inputs/*` are untrained)",
        f"- sha256 of the data, first 12 digits: {', '.join(data)}",
    ]


def write_results(
    name: str, grids: dict[tuple[str, str], list[Point]], rows: list[dict], not_run: list[str]
) -> Path:
    """Writes results.csv, table.md, figure.png and report.md. Rows that an earlier command left for
    other data sets stay, and are shown with these. Nothing is written where nothing finished."""
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
            chosen += [e for p, e in found.items() if e not in chosen
                       and (p.method, p.dataset) == ("few-shot-cot", data)]  # fmt: skip
        if any(e.trained for e in chosen):
            panels.append((part, chosen, f"{part}, {data}: {TITLES[part]}"))
    tables = [f"## {title}\n\n{table(part, chosen)}\n" for part, chosen, title in panels]
    write_text(folder / "table.md", "\n".join(tables))
    drawn = figure(folder / "figure.png", panels)
    write_text(folder / "report.md", report(name, tables, rows, not_run, drawn))
    return folder


def report(name: str, tables: list[str], rows: list[dict], not_run: list[str], drawn: bool) -> str:
    """Writes the page of a figure or table: what was run, the numbers, what was not run."""
    again = shlex.join(["python", "scripts/reproduce.py", *sys.argv[1:]])
    page = [
        f"# {name}", "", f"`{again}`, {time.strftime('%Y-%m-%d')}", "",
        *(["![accuracies](figure.png)", ""] if drawn else []),
        "Each student is the one of its run that was best on valid, scored once. Means over seeds "
        "with their standard error, which is of seeds alone: n test examples add about "
        "sqrt(p (1 - p) / n). Minus standard: the mean over equal seeds of the accuracy minus that "
        "of standard fine-tuning on the same examples at the same size. Numbers called the "
        "paper's are copied from it (pretrained T5; PaLM 540B, or GPT-NeoX 20B) and were not "
        "measured here.",
        "",
        *provenance(rows), "",
    ]  # fmt: skip
    notes = not_run or ["nothing that this command asks for"]
    return "\n".join(
        [*page, *tables, "## What was not run", "", *(f"- {line}" for line in notes), ""]
    )


def gather() -> int:
    """Writes all reports on one page, `results/report.md`."""
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
