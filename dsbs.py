"""Distilling Step-by-Step, the paper, in a page: methods, tasks, rows, the loss.

Hsieh et al., 2023, https://arxiv.org/abs/2305.02301. This file knows nothing of files, ranks or
flags. Notation of Section 3.2: x input, y human label, y^ and r^ the teacher's label and
rationale, f student.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from data import Example, Text, format_answer, get_task

LABEL, RATIONALE = "label", "rationale"
# The tasks of `step-by-step`: what the student writes for an example and its label, or None. A
# task's number in arrays is its place here. A third task is an entry here and in PREFIXES.
TARGETS = {
    LABEL: lambda example, label: label,
    RATIONALE: lambda example, label: example.rationale or None,
}
PREFIXES = {  # https://github.com/google-research/distilling-step-by-step/blob/main/run.py
    "paper": {LABEL: "[label] ", RATIONALE: "[rationale] "},  # Section 3.2
    "released": {LABEL: "predict: ", RATIONALE: "explain: "},
}


class Method(NamedTuple):
    """What the code asks about a method."""

    explains: bool = False  # can its student write a rationale afterwards?
    prefixed: bool = False  # does it learn all of TARGETS, each with its prefix?


METHODS = {
    "standard": Method(),  # Eq. 1: f(x) -> y; task distillation where y is the teacher's
    "step-by-step": Method(explains=True, prefixed=True),  # Eq. 3, 4: f(x) -> y, f(x) -> r^
    "single-task": Method(explains=True),  # Eq. 5: f(x) -> [r^, y], parsed at test (Table 2)
    "rationale-input": Method(),  # Eq. 2: f(x, r^) -> y, PINTO: needs the teacher at test
}


class Row(NamedTuple):
    """One thing that a student learns: what it reads, and what it should write."""

    task: str  # a key of TARGETS
    source: Text
    target: str | tuple[str, str]  # a pair is single-task's (rationale, answer)
    number = property(lambda self: list(TARGETS).index(self.task))


class Losses(NamedTuple):
    """each: (tasks,) float32, L_label, L_rationale before lambda, ...; total: L, a scalar."""

    each: Tensor
    total: Tensor
    label = property(lambda self: self.each[0])
    rationale = property(lambda self: self.each[1])


def wanted_label(example: Example, labels: str) -> str | None:
    """The label to train on: y where `labels` is "human", y^ where it is "teacher"."""
    return example.label if labels == "human" else example.teacher_label


def make_source(example: Example, method: str, prefixes: str = "paper", task: str = LABEL) -> Text:
    """What the student reads: the input, prefixed for `step-by-step`, followed by the rationale
    as one more part for `rationale-input`. The tokenizer joins parts by EOS ids."""
    parts = (example.input,) if isinstance(example.input, str) else tuple(example.input)
    if METHODS[method].prefixed:
        parts = (PREFIXES[prefixes][task] + parts[0], *parts[1:])
    if method == "rationale-input" and example.rationale:
        parts = (*parts, example.rationale)
    return parts[0] if len(parts) == 1 else parts


def make_rows(
    examples: Iterable[Example], method: str = "step-by-step", labels: str = "human",
    prefixes: str = "paper", dataset: str | None = None,
) -> list[Row]:  # fmt: skip
    """Returns the training rows, those of an example side by side, its label first. An example
    without a rationale still teaches its label; one without the wanted label is left out. The
    `dataset` gives single-task's answer its form ("So the answer is ..."). Its target is a pair
    (rationale, answer), so that a cut can spare the answer."""
    rows, single = [], method == "single-task"
    assert dataset is not None or not single, "single-task needs the data set's answer form"
    form = get_task(dataset) if single else None
    for example in examples:
        if (label := wanted_label(example, labels)) is None:
            continue
        for task in TARGETS if METHODS[method].prefixed else [LABEL]:
            target = TARGETS[task](example, label)
            if single:
                target = (example.rationale or "", format_answer(form, example.input, label))
            if target is not None:
                rows.append(Row(task, make_source(example, method, prefixes, task), target))
    return rows


def multitask_loss(
    logits: Tensor, labels: Tensor, tasks: Tensor, counts: Tensor, lam: float = 1.0
) -> Losses:
    """L = L_label + lambda L_rationale (+ lambda times a further task's), Eq. 3.

    logits (B, T, V) of any float type, labels (B, T) int64 with -100 where there is no target,
    tasks (B,) int64, numbers in TARGETS; or targets alone, (M, V), (M,) and (M,). counts (tasks,):
    each task's target tokens in the *whole* step. Over all micro-batches and ranks of a step the
    losses add up to the step's, and so do their gradients, however the step was split.

    The paper averages over examples, the released code over target tokens. We do the latter,
    exactly, so long rationales weigh more than short ones but never drown the labels. lambda = 1
    is its alpha = 0.5 up to a factor of 2, which AdamW ignores and gradient clipping does not.
    """
    token_losses = F.cross_entropy(
        logits.float().flatten(0, -2), labels.flatten(), ignore_index=-100, reduction="none"
    )
    # l(f(x), .) of Eq. 1 and 4, summed: (B, T) -> (B,); (M,) stays, and M may be 0.
    per_row = token_losses.view(*labels.shape, 1).flatten(1).sum(1)
    one_hot = tasks[:, None] == torch.arange(len(counts), device=tasks.device)  # (B, tasks)
    # per_row @ one_hot, but float32 under autocast too, and no 0 x infinity.
    sums = torch.where(one_hot, per_row[:, None], 0).sum(0)
    losses = sums / counts.clamp(min=1)  # Eq. 1 (2, 5: other rows), Eq. 4; a step may lack a task
    weights = losses.new_ones(len(counts))
    weights[1:] = lam
    return Losses(losses, (weights * losses).sum())
