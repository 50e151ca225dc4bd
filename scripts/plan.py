"""What `train.py --plan` prints: memory, steps and time of a run that is not started.

Memory is not a formula: the real model and loss run on tensors without contents (`FakeTensorMode`),
as rank 0 of a process group without other ranks, and torch's own trackers
(`torch.distributed._tools`) count every storage from when it is made until it is freed. The result
holds for a GPU because the model names its dtypes, and because dropout and attention are replaced
by CUDA's kernels, which keep other tensors for the backward pass than the CPU's do.
Time is an estimate from FLOPs and bytes.
"""

import json
from collections import Counter
from dataclasses import replace
from itertools import chain
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed._tools.mem_tracker import MemTracker
from torch.nn import functional as F
from torch.testing._internal.distributed.fake_pg import FakeStore

import data
import train
from data import MAX_SOURCE, MAX_TARGET, TokenRows, UserError
from eval import LABEL_TOKENS, MAX_TOKENS, MULTIPLE, autocast, ready, shown_to_user
from t5 import T5, T5Config

GIB = 2**30
CARDS = {"fits_40gb": 39.4, "fits_80gb": 79.2}  # GiB that a program can use of an A100
LEFT_OUT = 2.0  # GiB that the simulation does not see: CUDA context, NCCL's buffers, fragmentation
PEAK_FLOPS, UTILISATION = 312e12, 0.4  # an A100's peak in bf16; the share that a good run reaches
BANDWIDTH = 200e9  # bytes a second that a GPU sends to the others while it receives as much
ESNLI = 549_367  # training examples: assumed where there are no data to count
# The names of our parts, and of the kinds of tensor that torch's two trackers distinguish.
PARTS = {
    "weights": ("Parameter", "Sharded Param"),
    "gathered_weights": ("Unsharded Param",),
    "gather_outputs": ("All Gather",),
    "reduce_scatter_inputs": ("Reduce Scatter",),
    "gradients": ("Gradient", "Sharded Grad"),
    "unsharded_gradients": ("Unsharded Grad",),
    "optimizer": ("Optstate", "OptState"),
    "activations": ("Activation", "Temp", "Inputs", "Buffer"),
}


# ---- Memory --------------------------------------------------------------------------------------


def cuda_dropout(x: Tensor, p: float, training: bool = True, inplace: bool = False) -> Tensor:
    """F.dropout as CUDA runs it: it keeps one byte for each element, where the CPU keeps a mask in
    the input's dtype."""
    return torch.native_dropout(x, p, training)[0]


def cuda_attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor, dropout_p: float, scale: float
) -> Tensor:
    """F.scaled_dot_product_attention by CUDA's memory-efficient kernel, which never holds the
    scores. CUDA chooses it for a bias with a gradient; its other fused kernels take no such bias.
    q, k, v (B, H, T or S, K), mask broadcast to (B, H, T, S) -> (B, H, T, K)."""
    bias = attn_mask.expand(*q.shape[:3], k.shape[2])
    kernel = torch.ops.aten._scaled_dot_product_efficient_attention
    return kernel(q, k, v, bias, torch.is_grad_enabled(), dropout_p, scale=scale)[0]


def simulate(c: train.Config, config: T5Config, gpus: int, sources: int, targets: int) -> dict:
    """The memory of one of `gpus` devices, in GiB, after the first step (so with AdamW's moments)
    and with rows of `sources` + `targets` tokens.

    peak_gib, in training, and parts_gib, the kinds of tensors it consists of; evaluation_peak_gib;
    rows, in the largest micro-batch; parameters, of the whole model.
    """
    of_a_rank = -(-2 * c.batch_size // gpus)  # two rows for each example
    rows = max(1, min(c.micro_tokens // (sources + targets), of_a_rank))
    rounds = -(-2 * c.batch_size // (rows * gpus))
    sharded = c.parallel == "fsdp"
    cuda = {"dropout": cuda_dropout, "scaled_dot_product_attention": cuda_attention}
    dist.init_process_group("fake", rank=0, world_size=gpus, store=FakeStore())
    try:
        with torch.device("meta"):
            model = T5(config).train()
        # DDP's buckets hold the gradients themselves, so that a rank needs what one process needs.
        train.parallelize(model, c if sharded else replace(c, parallel="none"))
        with FakeTensorMode(allow_non_fake_inputs=True), mock.patch.multiple(F, **cuda):
            model.to_empty(device="cpu")
            optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0, fused=True)
            train.empty_moments(model, optimizer, 1)
            tracker = FSDPMemTracker(model, optimizer) if sharded else MemTracker()
            tracker.track_external(model, optimizer)  # FSDP's tracker knows them already
            shape = (rows, sources, targets)
            training = peak_in_training(tracker, model, shape, min(rounds, 2), c, gpus)
            # The optimizer's step is not run: it works in place and adds nothing.
            optimizer.zero_grad(set_to_none=True)
            shape = (max(1, MAX_TOKENS // sources), sources, LABEL_TOKENS)
            evaluation = peak_in_evaluation(tracker, model, shape, c.precision)
    finally:
        dist.destroy_process_group()
    parameters = train.parameters(model)
    # DDP keeps its buckets, float32 for each parameter, after the gradients are gone.
    buckets = 4 * parameters if c.parallel == "ddp" else 0
    parts = {
        part: sum(size for kind, size in training.items() if kind in kinds) / GIB
        for part, kinds in PARTS.items()
    }
    return {
        "parameters": parameters,
        "peak_gib": training["Total"] / GIB,
        "parts_gib": {part: gib for part, gib in parts.items() if gib},
        "evaluation_peak_gib": (evaluation["Total"] + buckets) / GIB,
        "rows": rows,
    }


def fake_batch(rows: int, sources: int, targets: int) -> dict[str, Tensor]:
    """A micro-batch of rows of equal length; under FakeTensorMode it has no contents."""
    shapes = {"input_ids": (rows, sources), "attention_mask": (rows, sources)}
    shapes |= {"labels": (rows, targets), "tasks": (rows,)}
    return {name: torch.empty(shape, dtype=torch.long) for name, shape in shapes.items()}


def peak_in_training(
    tracker: MemTracker, model: nn.Module, shape: tuple, rounds: int, c: train.Config, gpus: int
) -> dict:
    """Bytes of each kind at the peak of some micro-batches' passes; from the second on, they run
    while the gradients of those before are there."""
    with tracker:
        for _ in range(rounds):
            train.forward_backward(model, fake_batch(*shape), torch.ones(2), c, gpus)
            tracker.reset_mod_stats()  # without this, the tracker refuses a second pass
    return tracker.get_tracker_snapshot("peak")[torch.device("cpu")]


def peak_in_evaluation(tracker: MemTracker, model: nn.Module, shape: tuple, precision: str) -> dict:
    """Bytes of each kind at the peak of a forward pass with the weights made ready for decoding."""
    model.eval()
    with tracker, ready(model, precision), torch.no_grad():
        batch = fake_batch(*shape)
        with autocast(torch.device("cpu"), precision):
            model(batch["input_ids"], batch["attention_mask"], batch["labels"])
    return tracker.get_tracker_snapshot("peak")[torch.device("cpu")]


# ---- Work ----------------------------------------------------------------------------------------


def flops(config: T5Config, rows: int, sources: int, targets: int, recompute: bool) -> float:
    """Floating-point operations of the matrix products of a training step over padded rows: two
    for each multiplication in the forward pass, twice as many in the backward pass, and once more
    the blocks' forward pass where they are recomputed."""
    c = config
    inner, ff = c.num_heads * c.d_kv, 3 if "gated" in c.feed_forward_proj else 2
    position_wise = ff * c.d_model * c.d_ff
    encoder = sources * (4 * c.d_model * inner + position_wise) + 2 * sources**2 * inner
    decoder = targets * (6 * c.d_model * inner + position_wise) + 2 * targets**2 * inner
    decoder += sources * 2 * c.d_model * inner + 2 * sources * targets * inner
    blocks = c.num_layers * encoder + c.num_decoder_layers * decoder
    head = targets * c.d_model * c.vocab_size
    return 2.0 * rows * ((4 if recompute else 3) * blocks + 3 * head)


def longest_rows(c: train.Config) -> TokenRows:
    """A step's examples, each with two rows that are as long as they may be."""
    n = 2 * c.batch_size
    sources, targets = np.arange(n + 1) * MAX_SOURCE, np.arange(n + 1) * MAX_TARGET
    ids, rows = np.zeros(sources[-1], np.int32), np.arange(n)
    return TokenRows(rows % 2, ids, sources, ids, targets, rows // 2, c.batch_size, 0, 0, 0, 1, 0)


def work_of(c: train.Config, config: T5Config, gpus: int, rows: TokenRows) -> dict:
    """What a step needs on GPUs, as a mean over a run's first steps, at most 20: tokens with and
    without padding, FLOPs, and micro-batches of a GPU."""
    sums, steps = Counter(), min(c.steps, 20)
    for step in range(steps):
        row_ids = rows.rows_of(data.step_examples(rows.n_examples, c.batch_size, c.seed, step))
        ranks = train.divide(c, rows, row_ids, "cuda", gpus)
        sums["micro_batches_per_step"] += len(ranks[0])
        sums["real_tokens_per_step"] += sum(int(x.sum()) for x in rows.lengths(row_ids))
        for part in chain.from_iterable(ranks):
            longest = [
                data.round_up(int(x.max(initial=0)), MULTIPLE["cuda"]) for x in rows.lengths(part)
            ]
            sums["padded_tokens_per_step"] += len(part) * sum(longest)
            sums["flops_per_step"] += flops(config, len(part), *longest, c.recompute)
    return {name: total / steps for name, total in sums.items()}


def bytes_sent(parallel: str, parameters: int, micro_batches: float) -> float:
    """What a GPU sends in a step. For each micro-batch FSDP gathers bf16 weights, forward and
    backward, and scatters float32 gradients; DDP sums float32 gradients in a ring (which sends each
    twice), once a step."""
    return {"none": 0, "ddp": 8, "fsdp": 8 * micro_batches}[parallel] * parameters


# ---- The plan ------------------------------------------------------------------------------------


def settings(given: dict, gpus: int) -> train.Config:
    """The configuration that these flags would give on `gpus` GPUs."""
    c = train.Config(**{"precision": "bf16", **given, "device": "cpu"})
    return replace(train.resolve(c, gpus), compile=False)  # a compiled block's memory is not known


def shape_of(c: train.Config, assumed: list[str]) -> T5Config:
    """The student's shape: that of its weights where they are here, else that of its size, which
    is added to what is assumed."""
    if c.weights == "random":
        return T5.untrained_config(c.size, data.Tokenizer(train.DEMO_VOCABULARY).vocab_size)
    if Path(c.weights, "config.json").is_file():
        with shown_to_user():
            return T5.read_config(c.weights)
    assumed.append(f"no {c.weights}/config.json: the shape of T5 v1.1 {c.size}")
    return T5Config.preset(c.size)


def plan(given: dict, gpus: int) -> dict:
    """All figures of a run with these flags on so many GPUs, by name; `assumed` lists what was
    assumed for want of files. UserError where the run would refuse its flags."""
    c, assumed = settings(given, gpus), []
    config = shape_of(c, assumed)
    try:
        rows = train.prepare(c).rows
        examples = rows.n_examples
    except UserError as error:
        rows, examples = longest_rows(c), ESNLI
        lengths = f"{MAX_SOURCE:,} and {MAX_TARGET} tokens"
        assumed.append(f"{error}: every row at {lengths}, {ESNLI:,} examples")
    memory = simulate(c, config, gpus, MAX_SOURCE, MAX_TARGET)
    needed = max(memory["peak_gib"], memory["evaluation_peak_gib"]) + LEFT_OUT
    work = work_of(c, config, gpus, rows)
    computing = work["flops_per_step"] / (gpus * PEAK_FLOPS * UTILISATION)
    sent = bytes_sent(c.parallel, memory["parameters"], work["micro_batches_per_step"])
    seconds = max(computing, sent / BANDWIDTH)  # they overlap: the longer hides the other
    names = ("size", "parallel", "precision", "recompute", "micro_tokens", "steps", "batch_size")
    return {
        **{name: getattr(c, name) for name in names},
        **memory,
        **work,
        **{card: needed <= room for card, room in CARDS.items()},
        "gpus": gpus,
        "examples": examples,
        "epochs": c.steps * c.batch_size / examples,
        "truncated_share": (rows.truncated_sources + rows.truncated_targets) / len(rows),
        "compute_seconds": computing,
        "communication_seconds": sent / BANDWIDTH,
        "seconds_per_step": seconds,
        "hours": seconds * c.steps / 3600,
        "assumed": assumed,
    }


def show(p: dict) -> str:
    """The plan's figures as text for people."""
    parts = ", ".join(f"{part.replace('_', ' ')} {gib:.2f}" for part, gib in p["parts_gib"].items())
    fits = {card: "fits" if p[card] else "does not fit" for card in CARDS}
    recomputed = ", activations recomputed" if p["recompute"] else ""
    text = f"""\
{p["size"]}: {p["parameters"]:,} parameters; {p["precision"]}, {p["parallel"]} on {p["gpus"]} \
GPU(s), micro-batches of at most {p["micro_tokens"]:,} tokens{recomputed}
memory of a GPU (simulated, {p["rows"]} rows of {MAX_SOURCE:,} + {MAX_TARGET} tokens in a \
micro-batch): peak {p["peak_gib"]:.2f} GiB in training, {p["evaluation_peak_gib"]:.2f} GiB in \
evaluation
in training: {parts}
with {LEFT_OUT} GiB for what is not counted (CUDA context, NCCL, fragmentation) it \
{fits["fits_40gb"]} a 40 GB card and {fits["fits_80gb"]} an 80 GB one
against fragmentation: export PYTORCH_ALLOC_CONF=expandable_segments:True
steps: {p["steps"]:,} of {p["batch_size"]} examples, {p["epochs"]:.2f} epochs of \
{p["examples"]:,}; a step has {p["real_tokens_per_step"]:,.0f} tokens, \
{p["padded_tokens_per_step"]:,.0f} with padding; {p["truncated_share"]:.2%} of rows cut
work: {p["flops_per_step"]:.3g} FLOPs a step in {p["micro_batches_per_step"]:.1f} micro-batches \
a GPU: {p["compute_seconds"]:.2f} s at {UTILISATION:.0%} of an A100's \
{PEAK_FLOPS / 1e12:.0f} TFLOP/s; communication {p["communication_seconds"]:.2f} s at \
{BANDWIDTH / 1e9:.0f} GB/s
time: {p["seconds_per_step"]:.2f} s a step (the longer of the two), {p["hours"]:.1f} h in all, \
without evaluation and saving"""
    return "\n".join([text, *(f"assumed: {reason}" for reason in p["assumed"])])


def run(given: dict, gpus: int, as_json: bool) -> int:
    """Prints the plan, as text or one JSON object; returns exit status 0."""
    if gpus < 1:
        raise UserError(f"--gpus {gpus}: must be at least 1")
    figures = plan(given, gpus)
    print(json.dumps(figures) if as_json else show(figures))
    return 0
