"""What `train.py --plan` prints: memory, steps and time of a run that is not started.

Memory is not a formula: the real model, loss and optimizer step run on tensors without contents
(`FakeTensorMode`) in rank 0 of a process group that is not there, and every storage is counted from
when it is made until it is freed. It stands for a GPU because the model names its dtypes, and
because dropout is made to keep one byte a mask, as CUDA's does. Without contents nothing says where
padding is, so every place counts as a token. It knows flags and figures, and trains nothing.
"""

import functools
import json
import weakref
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import t5
import train
from data import Tokenizer, TokenRows, UserError, micro_batches, step_examples
from eval import LABEL_TOKENS, MAX_SOURCE, MAX_TOKENS, gathered
from t5 import T5, T5Config, read_config

GIB = 2**30
CARDS = {"fits_40gb": 39.4, "fits_80gb": 79.2}  # GiB that an A100 has for a program
LEFT_OUT = 2.0  # GiB: CUDA context, NCCL's buffers, fragmentation
PEAK_FLOPS, UTILISATION = 312e12, 0.4  # an A100's bf16 products; what a good run makes of them
ESNLI = 549_367  # examples, where there are no data to count


SHAPES = "_propagate_tensor_meta_non_cached"  # the method that asks for results' shapes


# ---- Memory --------------------------------------------------------------------------------------


class Memory(TorchDispatchMode):
    """Counts the bytes of every storage that an operation makes, by kind, and keeps the peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.peak, self.at_peak = Counter(), 0, {}
        self.live: dict[int, list] = {}  # of a storage: [kind, bytes]
        self.ignoring = False

    def see(self, tensor: Tensor, kind: str) -> None:
        """A tensor's storage is counted under `kind` from now on, until it is freed."""
        if isinstance(tensor, DTensor):
            tensor = tensor.to_local()
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.live:
            self.live[key] = [kind, 0]
            weakref.finalize(storage, self.free, key)
        self.count(key, kind, storage.nbytes())

    def count(self, key: int, kind: str, size: int) -> None:
        record = self.live[key]
        self.now[record[0]] -= record[1]
        record[:] = kind, size
        self.now[kind] += size
        if (total := sum(self.now.values())) > self.peak:
            self.peak, self.at_peak = total, dict(self.now)

    def free(self, key: int) -> None:
        kind, size = self.live.pop(key)
        self.now[kind] -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if DTensor in types:
            return NotImplemented  # its local operations come back here
        out = func(*args, **(kwargs or {}))
        kind = "gather_buffers" if func.namespace in ("c10d", "fsdp") else "activations"
        for value in tree_leaves(out):
            if isinstance(value, Tensor) and not self.ignoring:
                fresh = value.untyped_storage()._cdata not in self.live
                self.see(value, kind) if fresh else None
        return out

    def __enter__(self):
        self.resize = torch.UntypedStorage.resize_
        self.shapes = getattr(ShardingPropagator, SHAPES)
        self.dropout, self.find = nn.functional.dropout, t5.Places.__init__

        def resize(storage, size):  # how FSDP frees gathered weights, and gets them again
            self.resize(storage, size)
            if storage._cdata in self.live:
                self.count(storage._cdata, "gather_buffers", size)

        def shapes(*args):  # DTensor asks for the shape of results with whole tensors, not there
            self.ignoring = True
            try:
                return self.shapes(*args)
            finally:
                self.ignoring = False

        torch.UntypedStorage.resize_ = resize
        setattr(ShardingPropagator, SHAPES, shapes)
        nn.functional.dropout = lambda x, p, on=True, _=False: torch.native_dropout(x, p, on)[0]
        t5.Places.__init__ = lambda self, taken: vars(self).update(shape=taken.shape, index=None)
        return super().__enter__()

    def __exit__(self, *error):
        torch.UntypedStorage.resize_, nn.functional.dropout = self.resize, self.dropout
        setattr(ShardingPropagator, SHAPES, self.shapes)
        t5.Places.__init__ = self.find
        return super().__exit__(*error)


def simulate(c: train.Config, config: T5Config, gpus: int, sources: int, targets: int) -> dict:
    """Peak bytes on one of `gpus` devices, in training and in evaluation, and what they are made
    of, with rows of so many tokens: one optimizer step, AdamW's moments there already."""
    rows = max(1, min(c.micro_batch, -(-2 * c.batch_size // gpus)))
    steps = -(-2 * c.batch_size // (rows * gpus))
    dist.init_process_group("fake", rank=0, world_size=gpus, store=FakeStore())
    make_mesh = dist.init_device_mesh
    mesh = make_mesh("cpu", (gpus,))  # real: made outside of the fake mode
    dist.init_device_mesh = lambda *_: mesh
    try:
        with FakeTensorMode():
            model = T5(config)
            if c.parallel == "fsdp":
                train.parallelize(model, c)
            elif c.recompute:
                train.parallelize(model, train.Config(recompute=True))
            model.train()
            optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0, fused=True)
            memory, parameters = Memory(), list(model.parameters())
            with memory:
                for p in parameters:
                    memory.see(p.detach(), "weights")
                train.empty_moments(model, optimizer, 1)
                for state in optimizer.state.values():
                    for moment in ("exp_avg", "exp_avg_sq"):
                        memory.see(state[moment], "optimizer")
                for _ in range(min(steps, 2)):  # the second has the first's gradients beside it
                    batch = fake_batch(rows, sources, targets)
                    train.forward_backward(model, batch, torch.ones(2), c, gpus)
                    for p in parameters:
                        memory.see(p.grad, "gradients")
                nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                training, parts = memory.peak, memory.at_peak
                memory.peak = 0
                model.eval()
                batch = fake_batch(max(1, MAX_TOKENS // sources), sources, LABEL_TOKENS)
                cast = train.autocast(torch.device("cpu"), c.precision)
                with gathered(model), torch.no_grad(), cast:
                    model(batch["input_ids"], batch["attention_mask"], batch["labels"])
    finally:
        dist.init_device_mesh = make_mesh
        dist.destroy_process_group()
    if c.parallel == "ddp":  # its buckets stay
        memory.peak += 4 * sum(p.numel() for p in parameters)
    return {"peak_gib": training / GIB, "evaluation_peak_gib": memory.peak / GIB, "rows": rows,
            "parts_gib": {kind: size / GIB for kind, size in parts.items() if size}}  # fmt: skip


def fake_batch(rows: int, sources: int, targets: int) -> dict[str, Tensor]:
    """A micro-batch without contents."""
    long = functools.partial(torch.empty, dtype=torch.long)
    return {"input_ids": long(rows, sources), "attention_mask": long(rows, sources),
            "labels": long(rows, targets), "tasks": long(rows),
            "wanted": long(rows * targets)}  # fmt: skip


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
    truncated_share: float


def work_of(c: train.Config, config: T5Config, gpus: int, rows: TokenRows | None) -> Work:
    """From the data's first steps; without data, every row at the caps."""
    if rows is None:
        shape = (2 * c.batch_size, MAX_SOURCE, train.MAX_TARGET)
        tokens = shape[0] * (shape[1] + shape[2])
        return Work(ESNLI, flops(config, *shape, c.recompute), tokens, tokens, 0.0)
    sources, targets = np.diff(rows.source_offsets), np.diff(rows.target_offsets)
    real, padded, total, steps = 0, 0, 0.0, min(c.steps, 20)
    for step in range(steps):
        mine = rows.rows_of(step_examples(rows.n_examples, c.batch_size, c.seed, step))
        for dealt in micro_batches(sources[mine], targets[mine], c.micro_batch, gpus):
            for part in dealt:
                shape = len(part), *(int(x[mine[part]].max(initial=0)) for x in (sources, targets))
                real += int(sources[mine[part]].sum() + targets[mine[part]].sum())
                padded += shape[0] * (shape[1] + shape[2])
                total += flops(config, *shape, c.recompute)
    truncated = (rows.truncated_sources + rows.truncated_targets) / len(rows)
    return Work(rows.n_examples, total / steps, real / steps, padded / steps, truncated)


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
    small, medium = (16 * parameters < 0.8 * room * GIB for room in CARDS.values())
    if gpus > 1 and c.parallel is None and medium and not small:
        assumed.append("fsdp, as on 40 GB cards; with 80 GB a run would choose ddp")
    c.parallel = "none" if gpus == 1 else c.parallel or ("ddp" if small else "fsdp")
    rows = None
    try:
        rows = train.prepare(c).rows
    except UserError as error:
        assumed.append(f"{error}: every row at {MAX_SOURCE:,} and {train.MAX_TARGET} tokens, "
                       f"{ESNLI:,} examples")  # fmt: skip
    memory = simulate(c, config, gpus, MAX_SOURCE, train.MAX_TARGET)
    work = work_of(c, config, gpus, rows)
    seconds = work.flops / (gpus * PEAK_FLOPS * UTILISATION)
    figures = {
        "size": c.size, "gpus": gpus, "parallel": c.parallel, "precision": c.precision,
        "recompute": c.recompute, "micro_batch": memory.pop("rows"), "parameters": parameters,
        **memory,
        **{card: needs(memory) <= room for card, room in CARDS.items()},
        "steps": c.steps, "batch_size": c.batch_size, "examples": work.examples,
        "epochs": c.steps * c.batch_size / work.examples,
        "real_tokens_per_step": work.real_tokens, "padded_tokens_per_step": work.padded_tokens,
        "truncated_share": work.truncated_share, "flops_per_step": work.flops,
        "seconds_per_step": seconds, "hours": seconds * c.steps / 3600,
        "state_gb": 12 * parameters / 1e9, "student_gb": 4 * parameters / 1e9,
        "assumed": assumed,
    }  # fmt: skip
    for card, room in CARDS.items():
        if not figures[card]:
            figures[f"to_{card}"] = remedy(c, config, gpus, room)
    return figures


def needs(memory: dict) -> float:
    """GiB, with what the simulation leaves out."""
    return max(memory["peak_gib"], memory["evaluation_peak_gib"]) + LEFT_OUT


def remedy(c: train.Config, config: T5Config, gpus: int, room: float) -> str:
    """The first change that makes it fit: fewer rows at a time, FSDP, more GPUs."""
    tries: list[tuple[str, dict, int]] = []
    micro = c.micro_batch
    while micro > 1:
        micro //= 2
        tries.append((f"--micro-batch {micro}", {"micro_batch": micro}, gpus))
    if not c.recompute:
        words = "--micro-batch 1 --recompute"
        tries.append((words, {"micro_batch": 1, "recompute": True}, gpus))
    sharded = {"micro_batch": 1, "recompute": True, "parallel": "fsdp"}
    while gpus < 64:
        gpus *= 2
        words = "--micro-batch 1 --recompute --parallel fsdp"
        tries.append((f"{words} on {gpus} GPUs", sharded, gpus))
    for words, changes, n in tries:
        if needs(simulate(replace(c, **changes), config, n, MAX_SOURCE, train.MAX_TARGET)) <= room:
            return words
    return "nothing up to 64 GPUs"


def show(p: dict) -> str:
    """The plan, for people."""
    parts = ", ".join(f"{kind.replace('_', ' ')} {gib:.2f}" for kind, gib in p["parts_gib"].items())
    fits = {True: "fits", False: "does not fit"}
    lines = [
        f"{p['size']}: {p['parameters']:,} parameters; {p['precision']}, {p['parallel']} on "
        f"{p['gpus']} GPU(s), micro-batches of {p['micro_batch']} rows"
        + (", activations recomputed" if p["recompute"] else ""),
        f"memory a GPU (simulated, every row at {MAX_SOURCE:,} + {train.MAX_TARGET} tokens): peak "
        f"{p['peak_gib']:.2f} GiB in training ({parts}), {p['evaluation_peak_gib']:.2f} GiB in "
        "evaluation",
        f"with {LEFT_OUT} GiB more for what it leaves out (CUDA context, NCCL, fragmentation) it "
        f"{fits[p['fits_40gb']]} a 40 GB card and {fits[p['fits_80gb']]} an 80 GB one",
        *(f"to fit {card[-4:]}: {p[f'to_{card}']}" for card in CARDS if f"to_{card}" in p),
        f"steps: {p['steps']:,} of {p['batch_size']} examples, {p['epochs']:.2f} epochs of "
        f"{p['examples']:,}; a step has {p['real_tokens_per_step']:,.0f} tokens, "
        f"{p['padded_tokens_per_step']:,.0f} with padding; {p['truncated_share']:.2%} of rows cut",
        f"work: {p['flops_per_step']:.3g} FLOPs a step; assuming {UTILISATION:.0%} of an A100's "
        f"{PEAK_FLOPS / 1e12:.0f} TFLOP/s, {p['seconds_per_step']:.2f} s a step, {p['hours']:.1f} "
        "h in all, without evaluation and saving",
        f"disk: a state {p['state_gb']:.2f} GB (two while one replaces the other), best and last "
        f"{p['student_gb']:.2f} GB each",
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
