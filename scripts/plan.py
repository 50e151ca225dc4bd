"""What `train.py --plan` prints: memory, steps and time of a run that is not started.

Memory is not a formula: the real model, loss and optimizer step run on tensors without contents
(`FakeTensorMode`), in rank 0 of a process group that is not there, and torch's own trackers count
every storage from when it is made until it is freed. It stands for a GPU because the model names
its dtypes, and because dropout and attention are replaced by the operations that CUDA runs, which
keep other things for the backward pass than a CPU's. Time is an estimate from FLOPs and bytes.
"""

import contextlib
import functools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed._tools.mem_tracker import MemTracker
from torch.nn import functional as F
from torch.testing._internal.distributed.fake_pg import FakeStore

import train
from data import Tokenizer, TokenRows, UserError, micro_batches, round_up, step_examples
from eval import LABEL_TOKENS, MAX_SOURCE, MAX_TOKENS, MULTIPLE, ready
from t5 import T5, T5Config, read_config

GIB = 2**30
CARDS = {"fits_40gb": 39.4, "fits_80gb": 79.2}  # GiB that an A100 has for a program
LEFT_OUT = 2.0  # GiB: CUDA context, NCCL's buffers, fragmentation
# Host bytes a parameter in a save, over the ranks that write: a copy of weights and moments, and
# the bytes of the file that they are written to.
SAVE_BYTES = 24
PEAK_FLOPS, UTILISATION = 312e12, 0.4  # an A100's bf16 products; what a good run makes of them
BANDWIDTH = 200e9  # bytes a second that a GPU sends to the others while it receives as much
ESNLI = 549_367  # examples, where there are no data to count
NAMES = {  # of what torch's trackers tell apart, ours
    "Sharded Param": "weights", "Parameter": "weights", "Unsharded Param": "gathered_weights",
    "All Gather": "gather_outputs", "Reduce Scatter": "reduce_scatter_inputs",
    "Sharded Grad": "gradients", "Gradient": "gradients", "Unsharded Grad": "unsharded_gradients",
    "Optstate": "optimizer", "OptState": "optimizer", "Activation": "activations",
    "Temp": "activations", "Inputs": "activations", "Buffer": "activations",
}  # fmt: skip


# ---- Memory --------------------------------------------------------------------------------------


@contextlib.contextmanager
def cuda_operations() -> Iterator[None]:
    """Dropout keeps one byte a place, and attention is CUDA's memory-efficient kernel, as it is for
    a bias with a gradient: it never holds the scores."""
    dropout, attention = F.dropout, F.scaled_dot_product_attention

    def cuda_dropout(x: Tensor, p: float, training: bool = True, inplace: bool = False) -> Tensor:
        return torch.native_dropout(x, p, training)[0]

    def cuda_attention(q, k, v, attn_mask, dropout_p: float, scale: float) -> Tensor:
        bias = attn_mask.expand(*q.shape[:3], k.shape[2])
        kernel = torch.ops.aten._scaled_dot_product_efficient_attention
        return kernel(q, k, v, bias, torch.is_grad_enabled(), dropout_p, scale=scale)[0]

    F.dropout, F.scaled_dot_product_attention = cuda_dropout, cuda_attention
    try:
        yield
    finally:
        F.dropout, F.scaled_dot_product_attention = dropout, attention


def rows_in_a_forward(c: train.Config, gpus: int, sources: int, targets: int) -> int:
    """Of one length, in the largest micro-batch."""
    most = c.micro_tokens // (sources + targets)
    return max(1, min(most, -(-2 * c.batch_size // gpus)))


def simulate(c: train.Config, config: T5Config, gpus: int, sources: int, targets: int) -> dict:
    """Peak GiB on one of `gpus` devices, in training and in evaluation, and what they are made of,
    with rows of so many tokens and AdamW's moments there already."""
    rows = rows_in_a_forward(c, gpus, sources, targets)
    rounds = -(-2 * c.batch_size // (rows * gpus))
    dist.init_process_group("fake", rank=0, world_size=gpus, store=FakeStore())
    make_mesh = dist.init_device_mesh
    mesh = make_mesh("cpu", (gpus,))  # real: made outside of the fake mode
    dist.init_device_mesh = lambda *_: mesh
    try:
        with FakeTensorMode(), cuda_operations():
            model = T5(config).train()
            if c.parallel != "ddp":
                train.parallelize(model, c)
            elif c.recompute:
                train.parallelize(model, train.Config(recompute=True))
            optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0, fused=True)
            train.empty_moments(model, optimizer, 1)
            if c.parallel == "fsdp":
                tracker = FSDPMemTracker(model, optimizer)
            else:
                tracker = MemTracker()
                tracker.track_external(model, optimizer)
            with tracker:
                for _ in range(min(rounds, 2)):  # the second meets the first's gradients
                    batch = fake_batch(rows, sources, targets)
                    train.forward_backward(model, batch, torch.ones(2), c, gpus)
                    tracker.reset_mod_stats()  # which a second pass asks for
            optimizer.zero_grad(set_to_none=True)  # the step itself is in place: it adds nothing
            training = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]
            model.eval()
            with tracker, ready(model, c.precision), torch.no_grad():
                batch = fake_batch(max(1, MAX_TOKENS // sources), sources, LABEL_TOKENS)
                with train.autocast(torch.device("cpu"), c.precision):
                    model(batch["input_ids"], batch["attention_mask"], batch["labels"])
            evaluating = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]
    finally:
        dist.init_device_mesh = make_mesh
        dist.destroy_process_group()
    buckets = 4 * sum(p.numel() for p in model.parameters()) if c.parallel == "ddp" else 0
    parts: dict[str, float] = {}
    for kind, size in training.items():
        if (name := getattr(kind, "value", kind)) != "Total" and size:
            parts[NAMES[name]] = parts.get(NAMES[name], 0.0) + size / GIB
    return {"peak_gib": training["Total"] / GIB, "rows": rows, "rounds": rounds,
            "evaluation_peak_gib": (evaluating["Total"] + buckets) / GIB,
            "parts_gib": parts}  # fmt: skip


def fake_batch(rows: int, sources: int, targets: int) -> dict[str, Tensor]:
    """A micro-batch without contents."""
    long = functools.partial(torch.empty, dtype=torch.long)
    return {"input_ids": long(rows, sources), "attention_mask": long(rows, sources),
            "labels": long(rows, targets), "tasks": long(rows)}  # fmt: skip


# ---- Work ----------------------------------------------------------------------------------------


def flops(config: T5Config, rows: int, sources: int, targets: int, recompute: bool) -> float:
    """Floating-point operations of the matrix products of a training step over padded rows: two
    for each multiplication in the forward pass, twice that backward, once more to recompute."""
    c = config
    inner, ff = c.num_heads * c.d_kv, 3 if "gated" in c.feed_forward_proj else 2
    position_wise = ff * c.d_model * c.d_ff
    encoder = sources * (4 * c.d_model * inner + position_wise) + 2 * sources**2 * inner
    decoder = targets * (6 * c.d_model * inner + position_wise) + 2 * targets**2 * inner
    decoder += sources * 2 * c.d_model * inner + 2 * sources * targets * inner
    blocks = c.num_layers * encoder + c.num_decoder_layers * decoder
    head = targets * c.d_model * c.vocab_size
    return 2.0 * rows * ((4 if recompute else 3) * blocks + 3 * head)


@dataclass
class Work:
    """What a run's data ask for, a step."""

    examples: int
    flops: float
    real_tokens: float
    padded_tokens: float
    micro_batches: float  # of a rank
    truncated_share: float


def work_of(
    c: train.Config, config: T5Config, gpus: int, rows: TokenRows | None, rounds: int
) -> Work:
    """From the data's first steps; without data, every row at the caps in so many micro-batches."""
    if rows is None:
        shape = (2 * c.batch_size, MAX_SOURCE, train.MAX_TARGET)
        tokens = shape[0] * (shape[1] + shape[2])
        return Work(ESNLI, flops(config, *shape, c.recompute), tokens, tokens, rounds, 0.0)
    sources, targets = np.diff(rows.source_offsets), np.diff(rows.target_offsets)
    real, padded, total, forwards, steps = 0, 0, 0.0, 0, min(c.steps, 20)
    for step in range(steps):
        mine = rows.rows_of(step_examples(rows.n_examples, c.batch_size, c.seed, step))
        lengths = [round_up(x[mine], MULTIPLE["cuda"]) for x in (sources, targets)]
        dealt = micro_batches(
            *lengths, rows.tasks[mine], c.micro_tokens, gpus, train.OVERHEAD["cuda"]
        )
        forwards += len(dealt[0])
        real += int(sources[mine].sum() + targets[mine].sum())
        for part in sum(dealt, []):
            shape = len(part), *(int(x[part].max(initial=0)) for x in lengths)
            padded += shape[0] * (shape[1] + shape[2])
            total += flops(config, *shape, c.recompute)
    truncated = (rows.truncated_sources + rows.truncated_targets) / len(rows)
    real, padded, forwards = real / steps, padded / steps, forwards / steps
    return Work(rows.n_examples, total / steps, real, padded, forwards, truncated)


def bytes_sent(parallel: str, parameters: int, micro_batches: float) -> float:
    """By a GPU in a step. FSDP gathers bf16 weights forward and backward and scatters float32
    gradients, for each micro-batch; DDP sums float32 gradients once, in a ring (twice each)."""
    return {"none": 0, "ddp": 8, "fsdp": 8 * micro_batches}[parallel] * parameters


# ---- The plan ------------------------------------------------------------------------------------


def plan(given: dict, gpus: int) -> dict:
    """All figures of a run with these flags on so many devices, and what was assumed for them."""
    precision, assumed = given.get("precision", "bf16"), []
    c = train.resolve(train.Config(**{**given, "device": "cpu", "precision": precision}))
    c.parallel, c.compile = given.get("parallel"), False  # which nobody knows beforehand
    if c.parallel == "none" and gpus > 1:
        raise UserError(f"--parallel none on {gpus} GPUs would train {gpus} models; allowed: ddp, "
                        "fsdp")  # fmt: skip
    weights = Path(c.weights)
    if c.weights == "random":
        config = train.untrained_config(c.size, Tokenizer(train.DEMO_VOCABULARY))
    elif (weights / "config.json").is_file():
        try:
            config = read_config(weights)
        except ValueError as error:
            raise UserError(str(error)) from None
    else:
        config = T5Config.preset(c.size)
        assumed.append(f"no {weights / 'config.json'}: the shape of T5 v1.1 {c.size}")
    with torch.device("meta"):
        parameters = sum(p.numel() for p in T5(config).parameters())
    c.parallel = "none" if gpus == 1 else c.parallel or train.default_parallel(c.size)
    rows = None
    try:
        rows = train.prepare(c).rows
    except UserError as error:
        assumed.append(f"{error}: every row at {MAX_SOURCE:,} and {train.MAX_TARGET} tokens, "
                       f"{ESNLI:,} examples")  # fmt: skip
    memory = simulate(c, config, gpus, MAX_SOURCE, train.MAX_TARGET)
    work = work_of(c, config, gpus, rows, memory["rounds"])
    computing = work.flops / (gpus * PEAK_FLOPS * UTILISATION)
    sending = bytes_sent(c.parallel, parameters, work.micro_batches) / BANDWIDTH
    seconds = max(computing, sending)  # they overlap: the longer hides the other
    return {
        "size": c.size, "gpus": gpus, "parallel": c.parallel, "precision": c.precision,
        "recompute": c.recompute, "micro_tokens": c.micro_tokens, "parameters": parameters,
        **memory,
        **{card: needs(memory) <= room for card, room in CARDS.items()},
        "steps": c.steps, "batch_size": c.batch_size, "examples": work.examples,
        "epochs": c.steps * c.batch_size / work.examples,
        "real_tokens_per_step": work.real_tokens, "padded_tokens_per_step": work.padded_tokens,
        "truncated_share": work.truncated_share, "flops_per_step": work.flops,
        "micro_batches_per_step": work.micro_batches,
        "compute_seconds": computing, "communication_seconds": sending,
        "seconds_per_step": seconds, "hours": seconds * c.steps / 3600,
        "state_gb": 12 * parameters / 1e9, "student_gb": 4 * parameters / 1e9,
        "save_host_gb": SAVE_BYTES * parameters / (gpus if c.parallel == "fsdp" else 1) / 1e9,
        "assumed": assumed,
    }  # fmt: skip


def needs(memory: dict) -> float:
    """GiB, with what the simulation leaves out."""
    return max(memory["peak_gib"], memory["evaluation_peak_gib"]) + LEFT_OUT


def show(p: dict) -> str:
    """The plan, for people."""
    parts = ", ".join(f"{kind.replace('_', ' ')} {gib:.2f}" for kind, gib in p["parts_gib"].items())
    fits = {True: "fits", False: "does not fit"}
    lines = [
        f"{p['size']}: {p['parameters']:,} parameters; {p['precision']}, {p['parallel']} on "
        f"{p['gpus']} GPU(s), micro-batches of at most {p['micro_tokens']:,} tokens"
        + (", activations recomputed" if p["recompute"] else ""),
        f"memory a GPU (simulated, every row at {MAX_SOURCE:,} + {train.MAX_TARGET} tokens, "
        f"{p['rows']} in a micro-batch): peak {p['peak_gib']:.2f} GiB in training ({parts}), "
        f"{p['evaluation_peak_gib']:.2f} GiB in evaluation",
        f"with {LEFT_OUT} GiB more for what it leaves out (CUDA context, NCCL, fragmentation) it "
        f"{fits[p['fits_40gb']]} a 40 GB card and {fits[p['fits_80gb']]} an 80 GB one",
        "against fragmentation: export PYTORCH_ALLOC_CONF=expandable_segments:True",
        f"steps: {p['steps']:,} of {p['batch_size']} examples, {p['epochs']:.2f} epochs of "
        f"{p['examples']:,}; a step has {p['real_tokens_per_step']:,.0f} tokens, "
        f"{p['padded_tokens_per_step']:,.0f} with padding; {p['truncated_share']:.2%} of rows cut",
        f"work: {p['flops_per_step']:.3g} FLOPs a step in {p['micro_batches_per_step']:.1f} "
        f"micro-batches a GPU: {p['compute_seconds']:.2f} s at {UTILISATION:.0%} of an A100's "
        f"{PEAK_FLOPS / 1e12:.0f} TFLOP/s; communication {p['communication_seconds']:.2f} s at "
        f"{BANDWIDTH / 1e9:.0f} GB/s",
        f"time: {p['seconds_per_step']:.2f} s a step (the longer of the two), {p['hours']:.1f} h "
        "in all, without evaluation and saving",
        f"disk: a state {p['state_gb']:.2f} GB (two while one replaces the other), best and last "
        f"{p['student_gb']:.2f} GB each; a save needs {p['save_host_gb']:.1f} GB of host memory in "
        "each process that writes",
        *(f"assumed: {reason}" for reason in p["assumed"]),
    ]
    return "\n".join(lines)


def run(given: dict, gpus: int, as_json: bool) -> int:
    """Prints the plan; for `train.py --plan`."""
    if gpus < 1:
        raise UserError(f"--gpus {gpus}: must be at least 1")
    figures = plan(given, gpus)
    print(json.dumps(figures) if as_json else show(figures))
    return 0
