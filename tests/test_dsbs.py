"""The methods' rows and the loss of the paper, against numbers computed by hand and naive code."""

import math

import pytest
import torch

from data import Example, parse_completion
from dsbs import METHODS, make_rows, make_source, multitask_loss
from t5 import T5, T5Config, shift_right

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
    labels = torch.tensor([[0, 0], [0, -100]])
    losses = multitask_loss(x, labels, torch.tensor([0, 1]), torch.tensor([2, 1]), lam=0.5)
    assert losses.label.item() == pytest.approx((math.log(2) + math.log(4)) / 2)
    assert losses.rationale.item() == pytest.approx(math.log(8))
    total = 1.5 * math.log(2) + 0.5 * math.log(8)
    assert losses.total.item() == pytest.approx(total)
    low = multitask_loss(x.bfloat16(), labels, torch.tensor([0, 1]), torch.tensor([2, 1]))
    assert low.total.dtype == torch.float32


def ragged_batch(rows=12):
    torch.manual_seed(0)
    lengths = torch.randint(1, 9, (rows,))
    labels = torch.randint(2, 40, (rows, 8)).masked_fill(torch.arange(8) >= lengths[:, None], -100)
    source = torch.randint(2, 40, (rows, 10))
    mask = (torch.arange(10) < torch.randint(1, 11, (rows, 1))).long()
    tasks = torch.arange(rows) % 3 % 2  # two label rows for every rationale row
    counts = torch.stack([(labels[tasks == t] != -100).sum() for t in (0, 1)])
    return source, mask, labels, tasks, counts


def gradients(model, pieces, batch, lam=1.0):
    source, mask, labels, tasks, counts = batch
    model.zero_grad()
    sums = torch.zeros(3)  # L_label, L_rationale, L
    for piece in pieces:
        logits = model(source[piece], mask[piece], shift_right(labels[piece]))
        losses = multitask_loss(logits, labels[piece], tasks[piece], counts, lam)
        losses.total.backward()
        sums += torch.cat([losses.each, losses.total[None]]).detach()
    return sums, torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.fixture
def model():
    torch.manual_seed(0)
    shape = dict(vocab_size=40, d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4)
    return T5(T5Config(**shape)).eval()


def test_any_split_gives_the_same_gradients(model):
    """Whole, one by one, uneven, and pieces that lack a task: equal to 1e-6 (float32)."""
    batch = ragged_batch()
    everything = torch.arange(12)
    whole, expected = gradients(model, [everything], batch)
    assert batch[-1].min() > 0
    by_task = [everything[batch[3] == task] for task in (0, 1)]
    for pieces in (everything.split(1), everything.split(5), by_task):
        sums, got = gradients(model, pieces, batch)
        assert (got - expected).abs().max() < 1e-6
        assert torch.allclose(sums, whole, atol=1e-6)


def test_the_loss_of_three_tasks(model):
    """Cross-entropy of each, the label's weight 1 and lambda for both others."""
    source, mask, labels, _, _ = ragged_batch()
    tasks = torch.arange(12) % 3
    counts = torch.stack([(labels[tasks == t] != -100).sum() for t in range(3)])
    logits = model(source, mask, shift_right(labels))
    losses = multitask_loss(logits, labels, tasks, counts, lam=0.3)
    for task in range(3):
        own = logits[tasks == task].flatten(0, 1), labels[tasks == task].flatten()
        alone = torch.nn.functional.cross_entropy(*own, ignore_index=-100)
        assert torch.allclose(losses.each[task], alone)
    assert torch.allclose(losses.total, losses.each @ torch.tensor([1, 0.3, 0.3]))
    with torch.autocast("cpu", torch.bfloat16):
        again = multitask_loss(logits, labels, tasks, counts, lam=0.3)
    assert torch.equal(again.each, losses.each), "float32 under autocast too"
    logits = logits.detach().masked_fill((tasks == 2)[:, None, None], math.nan)
    assert multitask_loss(logits, labels, tasks, counts).each.isfinite().tolist() == [1, 1, 0]


def test_a_missing_task_is_zero_not_nan(model):
    source, mask, labels, tasks, _ = ragged_batch()
    logits = model(source, mask, shift_right(labels))
    count = (labels != -100).sum()
    losses = multitask_loss(logits, labels, tasks * 0, torch.stack([count, count * 0]))
    assert losses.rationale.item() == 0 and torch.isfinite(losses.total)
    empty = multitask_loss(logits, labels * 0 - 100, tasks, torch.tensor([5, 5]))
    empty.total.backward()
    assert empty.total.item() == 0 and all(torch.isfinite(p.grad).all() for p in model.parameters())
    none = logits[:0, 0]  # targets alone, and there are none: (0, V), a rank's dummy row
    empty = multitask_loss(none, labels[:0, 0], tasks[:0], torch.tensor([5, 5]))
    assert empty.total.item() == 0 and empty.total.requires_grad
