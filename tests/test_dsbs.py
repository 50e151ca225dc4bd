"""The methods' rows and the loss of the paper, against numbers computed by hand and naive code."""

import math

import pytest
import torch

from data import Example, parse_completion
from dsbs import METHODS, make_rows, make_source, multitask_loss

PLAIN = Example("a", "2 apples and 3 more?", "( 2.0 + 3.0 )", "2 + 3 = 5.", "(2 + 3)")
PAIR = Example("b", ("It rains.", "It is dry."), "contradiction", "Rain wets.", "neutral")


def test_step_by_step_has_two_prefixed_rows():
    assert make_rows([PLAIN], "step-by-step") == [
        ("label", "[label] 2 apples and 3 more?", "( 2.0 + 3.0 )"),
        ("rationale", "[rationale] 2 apples and 3 more?", "2 + 3 = 5."),
    ]
    assert make_rows([PAIR], "step-by-step", "teacher", "released") == [
        ("label", ("predict: It rains.", "It is dry."), "neutral"),
        ("rationale", ("explain: It rains.", "It is dry."), "Rain wets."),
    ]


def test_other_methods_rows():
    assert make_rows([PAIR], "standard") == [("label", PAIR.input, "contradiction")]
    assert make_rows([PLAIN], "rationale-input", "teacher") == [
        ("label", (PLAIN.input, "2 + 3 = 5."), "(2 + 3)")
    ]
    (row,) = make_rows([PLAIN], "single-task", dataset="svamp")
    assert row.target == ("2 + 3 = 5.", "The answer is ( 2.0 + 3.0 ).")
    assert parse_completion("svamp", " ".join(row.target)) == (PLAIN.rationale, PLAIN.label)


def test_no_rationale_still_teaches_and_no_label_is_left_out():
    bare = Example("c", "x", "yes")
    for method in METHODS:
        rows = make_rows([bare], method, dataset="demo")
        assert [row.task for row in rows] == ["label"]
        assert rows[0].source == make_source(bare, method)
        assert make_rows([bare], method, "teacher", dataset="demo") == []


def test_loss_by_hand():
    """Two label tokens of probability 1/2 and 1/4, one rationale token of 1/8; V = 4."""

    def logits(p):  # the target is token 0; the others share the rest
        return [math.log(p)] + [math.log((1 - p) / 3)] * 3

    x = torch.tensor([[logits(0.5), logits(0.25)], [logits(0.125), logits(0.9)]])
    labels, tasks = torch.tensor([[0, 0], [0, -100]]), torch.tensor([0, 1])
    counts = torch.tensor([2, 1])
    losses = multitask_loss(x, labels, tasks, counts, lam=0.5)
    assert losses.label.item() == pytest.approx((math.log(2) + math.log(4)) / 2)
    assert losses.rationale.item() == pytest.approx(math.log(8))
    total = 1.5 * math.log(2) + 0.5 * math.log(8)
    assert losses.total.item() == pytest.approx(total)
    low = multitask_loss(x.bfloat16(), labels, tasks, counts)
    assert low.total.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        again = multitask_loss(x, labels, tasks, counts, lam=0.5)
    assert torch.equal(again.each, losses.each), "float32 under autocast too"
    # Half of a step, in micro-batches of one row: the counts are the whole step's.
    rows = [(x[i : i + 1], labels[i : i + 1], tasks[i : i + 1]) for i in (0, 1)]
    parts = [multitask_loss(*row, 2 * counts, lam=0.5).total.item() for row in rows]
    assert sum(parts) == pytest.approx(total / 2)
    x[1] = math.nan
    assert multitask_loss(x, labels, tasks, counts).each.isfinite().tolist() == [True, False]


def test_a_missing_task_is_zero_not_nan():
    logits = torch.randn(3, 5, 7, requires_grad=True)
    labels, tasks = torch.randint(7, (3, 5)), torch.tensor([0, 1, 0])
    losses = multitask_loss(logits, labels, tasks * 0, torch.tensor([15, 0]))
    assert losses.rationale.item() == 0 and losses.total > 0
    empty = multitask_loss(logits, labels * 0 - 100, tasks, torch.tensor([5, 5]))
    empty.total.backward()
    assert empty.total.item() == 0 and not logits.grad.any()
    none = logits[:0, 0]  # targets alone, and there are none: (0, V), a rank's dummy row
    empty = multitask_loss(none, labels[:0, 0], tasks[:0], torch.tensor([5, 5]))
    assert empty.total.item() == 0 and empty.total.requires_grad
