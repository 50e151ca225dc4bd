"""Distilling Step-by-Step, the paper, in a page: methods, task prefixes, rows, the loss.

Hsieh et al., 2023, https://arxiv.org/abs/2305.02301. From examples with a teacher's rationales
and labels this file makes what a student is trained on, and the loss it is trained with. It
knows nothing of files, ranks or flags.

Notation of Section 3.2: x input, y human label, y^ and r^ the teacher's label and
rationale, f student.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from data import Example, Row, format_answer

LABEL, RATIONALE = "label", "rationale"  # the two tasks; 0 and 1 in arrays


@dataclass(frozen=True)
class Method:
    """What a student learns from, and what it is told at test time."""

    equation: str
    learns: str
    explains: bool = False  # can it be asked for a rationale afterwards?
    prefixed: bool = False  # are tasks told apart by a prefix?


METHODS = {
    # Standard fine-tuning with human labels, task distillation with the teacher's.
    "standard": Method("Eq. 1", "f(x) -> y"),
    # The paper's method: two tasks, told apart by a prefix; a rationale is never needed at test.
    "step-by-step": Method("Eq. 3, 4", "f(x) -> y, f(x) -> r^", explains=True, prefixed=True),
    # Its ablation (Table 2): one target, the rationale and then the label, parsed back at test.
    "single-task": Method("Eq. 5", "f(x) -> [r^, y]", explains=True),
    # PINTO tuning (Section 4.2): the rationale is input, at test too, so the teacher is deployed.
    "rationale-input": Method("Eq. 2", "f(x, r^) -> y"),
}

# Section 3.2, and the released code's words:
# https://github.com/google-research/distilling-step-by-step/blob/main/run.py
PREFIXES = {
    "paper": {LABEL: "[label] ", RATIONALE: "[rationale] "},
    "released": {LABEL: "predict: ", RATIONALE: "explain: "},
}


def wanted_label(example: Example, labels: str) -> str | None:
    """The label to train on: y where `labels` is "human", y^ where it is "teacher"."""
    return example.label if labels == "human" else example.teacher_label


def make_source(
    example: Example, method: str, prefixes: str = "paper", task: str = LABEL
) -> str | tuple[str, ...]:
    """What the student reads: the input, prefixed for `step-by-step`, followed by the rationale
    as one more part for `rationale-input`. Parts are joined by EOS ids when encoded."""
    parts = (example.input,) if isinstance(example.input, str) else tuple(example.input)
    if METHODS[method].prefixed:
        parts = (PREFIXES[prefixes][task] + parts[0], *parts[1:])
    if method == "rationale-input" and example.rationale:
        parts = (*parts, example.rationale)
    return parts[0] if len(parts) == 1 else parts


def make_rows(
    examples: Iterable[Example],
    method: str = "step-by-step",
    labels: str = "human",
    prefixes: str = "paper",
    dataset: str | None = None,
) -> list[Row]:
    """Training rows (task, source, target), those of an example side by side, its label first.

    An example without a rationale still teaches its label; one without the wanted label is left
    out. `dataset` gives single-task's answer its form ("So the answer is ..."); its target is a
    pair (rationale, answer), so that a cut can spare the answer.
    """
    rows = []
    for example in examples:
        label = wanted_label(example, labels)
        if label is None:
            continue
        source, target = make_source(example, method, prefixes), label
        if method == "single-task":
            assert dataset is not None, "single-task needs the data set's answer form"
            target = (example.rationale or "", format_answer(dataset, example.input, label))
        rows.append(Row(LABEL, source, target))
        if method == "step-by-step" and example.rationale:
            source = make_source(example, method, prefixes, RATIONALE)
            rows.append(Row(RATIONALE, source, example.rationale))
    return rows


class Losses(NamedTuple):
    """Scalars, float32."""

    label: Tensor  # L_label
    rationale: Tensor  # L_rationale, before lambda
    total: Tensor  # L


def multitask_loss(
    logits: Tensor, labels: Tensor, tasks: Tensor, counts: Tensor, lam: float = 1.0
) -> Losses:
    """L = L_label + lambda L_rationale, for one micro-batch's part of an optimizer step.

    logits (B, T, V) of any float type, labels (B, T) int64 with -100 where there is no target,
    tasks (B,) 0 for label and 1 for rationale rows; or targets alone, (M, V), (M,) and (M,).
    counts (2,): each task's target tokens in the *whole* step. Three float32 scalars; over all
    micro-batches and ranks of a step they add up to the step's losses, and so do their gradients,
    however the step was split.

    The paper averages over examples (the 1/N of Eq. 1 and 4), where the released code's
    cross-entropy averages over target tokens. We do the latter, exactly: each task's sum over
    the step is divided by its number of tokens in the step, so long rationales weigh more than
    short ones but never drown the labels. lambda = 1 is the released code's alpha = 0.5 up to a
    factor of 2, which AdamW ignores and gradient clipping does not.
    """
    token_losses = F.cross_entropy(
        logits.float().flatten(0, -2), labels.flatten(), ignore_index=-100, reduction="none"
    )
    rows = token_losses.view(*labels.shape, 1).flatten(1)  # (B, T), or (M, 1), where M may be 0
    row_losses = rows.sum(1)  # l(f(x), .) of Eq. 1 and 4, summed
    zero = row_losses.new_zeros(())
    counts = counts.clamp(min=1)  # a step without a row of some task
    label = torch.where(tasks == 0, row_losses, zero).sum() / counts[0]  # Eq. 1 (2, 5: other rows)
    rationale = torch.where(tasks == 1, row_losses, zero).sum() / counts[1]  # Eq. 4
    return Losses(label, rationale, label + lam * rationale)  # Eq. 3
