"""What only a GPU would show, seen on a CPU: waiting for the device, mixed devices, casts of
weights, copies of biases, memory kept for the backward pass, ranks that hang after an error."""

import json
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, a_batch, run
from torch.utils._python_dispatch import TorchDispatchMode

import eval as evaluation
import train
from data import Example
from scripts import plan
from t5 import T5, T5Config

FAKE_GPU = ROOT.parent / "shared" / "fakegpu" / "gpu_cost.py"
TINY = dict(vocab_size=1280, num_layers=2, num_decoder_layers=3)


class Waits(TorchDispatchMode):
    """Counts operations for whose result a program on a GPU waits."""

    names = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal", "bincount")

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        name = op.name().removeprefix("aten::").split(".")[0]
        places = args[1] if name in ("index", "index_put_") else ()  # by a mask?
        by_mask = any(x is not None and x.dtype == torch.bool for x in places)
        if name in self.names or by_mask:
            self.seen.append(name)
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_micro_batch_waits_for_nothing_and_a_token_once(precision):
    torch.manual_seed(0)
    model, batch = T5(T5Config.preset("tiny", **TINY)).train(), a_batch()
    c = train.Config(device="cpu", precision=precision, parallel="none")
    with Waits() as waits:
        train.forward_backward(model, batch, torch.tensor([5, 5]), c, 1)
    assert waits.seen == []
    with Waits() as waits:
        tokens = model.eval().generate(batch["input_ids"], batch["attention_mask"], 9)
    assert len(waits.seen) <= tokens.shape[1]


@pytest.fixture
def setup(small_task):
    """The arguments of `train_step`, for the first one of a small run."""
    c = train.resolve(train.Config(dataset=str(small_task), device="cpu", micro_tokens=300))
    data = train.prepare(c)
    model = train.build_model(c, data.tokenizer).train()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    return model, optimizer, c, data, 0, torch.device("cpu"), 0


def test_a_step_waits_at_most_three_times(setup, monkeypatch):
    lists = []
    to_list = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda x: lists.append(1) or to_list(x))
    with Waits() as waits:
        train.train_step(*setup)
    assert 1 <= len(waits.seen) + len(lists) <= 3, waits.seen


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("length", [13, 16])
def test_biases_are_contiguous_in_the_compute_dtype_and_one_a_stack(monkeypatch, autocast, length):
    seen = []
    attention = F.scaled_dot_product_attention

    def spy(q, k, v, attn_mask, **more):
        seen.append((q, k, attn_mask))
        return attention(q, k, v, attn_mask=attn_mask, **more)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    model, batch = T5(T5Config.preset("tiny", **TINY)), a_batch(source=length)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        model(batch["input_ids"], batch["attention_mask"], batch["labels"].clamp(min=0))
        assert len(seen) == 2 + 2 * 3
        for q, k, bias in seen:
            assert q.dtype == k.dtype == bias.dtype and bias.is_contiguous()
        encoder, own, cross = seen[:2], seen[2::2], seen[3::2]
        for some in (encoder, own, cross):
            assert len({bias.data_ptr() for *_, bias in some}) == 1
        seen.clear()
        model.eval().generate(batch["input_ids"], batch["attention_mask"], 12)
    for *_, bias in seen[2::2]:  # CUDA would copy one whose rows do not start at a multiple of 8
        assert bias.stride(-1) == 1 and all(n % 8 == 0 for n in bias.stride()[:-1])


def test_lengths_are_rounded_up_for_cuda(setup, monkeypatch):
    model, rows, shapes = setup[0], setup[3].rows, []
    model.register_forward_pre_hook(lambda _, inputs: shapes.extend(x.shape[1] for x in inputs))
    monkeypatch.setitem(evaluation.MULTIPLE, "cpu", evaluation.MULTIPLE["cuda"])
    train.train_step(*setup)
    assert shapes and all(length % 8 == 0 for length in shapes)
    batch = train.collate(rows, np.arange(5), evaluation.MULTIPLE["cuda"])
    plain = train.collate(rows, np.arange(5))
    for key, values in batch.items():
        if values.ndim == 2:
            assert values.shape[1] % 8 == 0 and values.shape[1] - plain[key].shape[1] < 8
            assert np.array_equal(values[:, : plain[key].shape[1]], plain[key])
    assert (batch["labels"][:, plain["labels"].shape[1] :] == -100).all()


class Casts(TorchDispatchMode):
    """Counts float32 tensors of two dimensions that become bfloat16: weights, above all."""

    def __init__(self, parameters):
        super().__init__()
        self.weights = {p.untyped_storage()._cdata for p in parameters}
        self.count = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        if op.name().startswith("aten::_to_copy") and out.dtype == torch.bfloat16:
            self.count += args[0].untyped_storage()._cdata in self.weights
        return out


def test_an_evaluation_casts_each_weight_once_and_leaves_training_s_as_they_are(tmp_path):
    """In training's own evaluation, and in eval.py, whose student is loaded in bfloat16."""
    torch.manual_seed(0)
    tokenizer = train.Tokenizer(train.DEMO_VOCABULARY)
    model = T5(T5.untrained_config("tiny", tokenizer.vocab_size))
    c = train.resolve(train.Config(device="cpu", precision="bf16"))
    student = evaluation.Student(model, tokenizer, "standard", "paper", "demo", precision="bf16")
    before = {name: (p, p.detach().clone()) for name, p in model.named_parameters()}
    examples = [Example(str(i), f"Order {i} arrived broken.", "refund") for i in range(80)]
    with Casts(model.parameters()) as casts:
        texts = [row["prediction"] for row in evaluation.evaluate(student, examples)[1]]
    assert casts.count == len(before), "two batches, many tokens"
    for name, p in model.named_parameters():
        assert p is before[name][0] and torch.equal(p, before[name][1]) and p.requires_grad
    train.save_student(c, model, tokenizer, tmp_path / "student", 1, 0.0)
    loaded = evaluation.load_student(tmp_path / "student", torch.device("cpu"), "bf16")
    kept = list(loaded.model.parameters())
    assert {p.dtype for p in kept} == {torch.bfloat16}, "2 bytes a parameter: 22 GB of XXL"
    loaded.method, loaded.dataset = "standard", "demo"
    with Casts(kept) as casts:
        again = [row["prediction"] for row in evaluation.evaluate(loaded, examples)[1]]
    assert casts.count == 0 and again == texts


def test_what_is_kept_for_the_backward_pass():
    """Base, rows of 1,024 + 256 tokens, bf16: bytes a token and layer, as CUDA's kernels keep
    them, cast weights included: 59 kB. Unfused attention and a cast for each reader kept 157."""
    found = []
    for depth in (1, 3):
        config = T5Config.preset("base", num_layers=depth, num_decoder_layers=depth)
        c = train.Config(precision="bf16", batch_size=1, micro_tokens=10**4, recompute=False,
                         parallel="none")  # fmt: skip
        found.append(plan.simulate(c, config, 1, 1024, 256)["parts_gib"]["activations"])
    a_layer = (found[1] - found[0]) / 2 * 2**30 / (2 * 1280)
    assert 50e3 < a_layer < 65e3


HANGING = """
import os, sys, time
import torch, torch.distributed as dist
sys.path.insert(0, {root!r})
import eval as evaluation, train
dist.destroy_process_group = lambda *_: time.sleep(3600)  # as under NCCL, with others still in it
def fail(*_):
    if os.environ["RANK"] == "1":
        raise {error}
    dist.barrier()
train.train = fail
evaluation.exit_process(train.main())
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "error",
    ["torch.cuda.OutOfMemoryError('CUDA out of memory: 7')", "OSError(28, 'No space left')"],
)
def test_a_rank_that_fails_alone_says_so_and_leaves(small_task, tmp_path, error):
    """It never takes the group down, which would wait for the others."""
    script = tmp_path / "hanging.py"
    script.write_text(HANGING.format(root=str(ROOT), error=error))
    words = ["--dataset", small_task, "--steps", "2", "--out", tmp_path / "run"]
    start = time.monotonic()
    done = run(script, *words, processes=2, check=1)
    assert time.monotonic() - start < 60
    message = error.split("'")[1]
    assert message in done.stderr, "its own error, whole"
    assert "lost another" not in done.stderr
    if "OSError" not in error:
        assert "Traceback" in done.stderr and "rank 1 failed" in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(not FAKE_GPU.exists(), reason="needs ../shared/fakegpu")
def test_on_a_simulated_gpu():
    """No mixed devices, no waiting, no scores in float32; fused attention; few launches."""
    pytest.importorskip("transformers")
    shape = ["--size", "base", "--layers", "2", "--rows", "2", "--source", "64", "--json"]
    ask = lambda *more: json.loads(run(FAKE_GPU, *shape, *more).stdout)["ours"]  # noqa: E731
    step = ask("--target", "32", "--no-eager", "--fill", "0.8")
    assert step["mixed_devices"] == {} and step["host_syncs"] == 0 and step["fp32_scores"] == 0
    assert step["attention_kernels"] == {
        "_scaled_dot_product_efficient_attention": 6,
        "_scaled_dot_product_efficient_attention_backward": 6,
    }
    assert step["launches"] < 560, "445 of them; 800 when each norm was cast by those who read it"
    token = ask("--decode", "--bf16-weights")
    assert token["mixed_devices"] == {} and token["host_syncs"] <= 1
    assert token["weight_casts"] <= 7, "norms, to float32"
