"""`train.py --plan`: its memory against a real process's, its FLOPs against torch's counter."""

import json
import sys
import time

import pytest
import torch
from conftest import run
from torch.utils.flop_counter import FlopCounterMode

import train
from scripts import plan
from t5 import T5, T5Config, shift_right

KEYS = ("parameters", "peak_gib", "fits_40gb", "fits_80gb", "steps", "flops_per_step",
        "truncated_share")  # fmt: skip


def planned(*words) -> dict:
    return json.loads(run("train.py", "--plan", "--json", *words).stdout)


@pytest.mark.slow
def test_xxl_on_sixteen_gpus():
    start = time.monotonic()
    p = planned("--size", "xxl", "--gpus", 16)
    assert time.monotonic() - start < 120 and all(key in p for key in KEYS)
    assert p["parameters"] == 11_135_332_352 and p["parallel"] == "fsdp" and p["recompute"]
    assert 12 < p["peak_gib"] <= 16 and p["fits_40gb"] and p["fits_80gb"]
    shard = 4 * p["parameters"] / 16 / 2**30
    assert p["micro_batches_per_step"] == 1, "FSDP gathers the whole model for each"
    sent = 8 * p["parameters"] / plan.BANDWIDTH
    assert p["communication_seconds"] == pytest.approx(sent)
    assert p["seconds_per_step"] == max(p["compute_seconds"], sent) <= 1.9
    parts = p["parts_gib"]
    assert parts["weights"] == pytest.approx(shard, rel=0.01)
    assert parts["gradients"] == pytest.approx(shard, rel=0.06), "the embedding's is the last"
    assert parts["optimizer"] == pytest.approx(2 * shard, rel=0.01)
    assert p["steps"] == 4000 and len(p["assumed"]) == 2, "no weights and no data are here"


def test_a_run_with_data_is_counted_from_them(tmp_path):
    p = planned("--gpus", 2)
    assert p["examples"] == 600 and p["epochs"] == pytest.approx(700 * 32 / 600)
    assert p["truncated_share"] == 0 and not p["assumed"] and p["parallel"] == "ddp"
    assert 0.5 * p["padded_tokens_per_step"] < p["real_tokens_per_step"]
    assert p["real_tokens_per_step"] <= p["padded_tokens_per_step"] < 32 * 2 * 300
    flags = ("--out", tmp_path / "r", "--resume", "--timeout", 60)  # of the run, nothing is written
    said = run("train.py", "--plan", *flags).stdout
    assert not (tmp_path / "r").exists()
    assert all(words in said for words in ("952,064 parameters", "peak", "FLOPs a step"))


@pytest.mark.parametrize("recompute", [False, True])
def test_flops_are_those_of_the_matrix_products(recompute):
    """All of them but one: nothing is propagated into token ids."""
    config = T5Config.preset("tiny", vocab_size=640, num_decoder_layers=3)
    model = T5(config).train()
    if recompute:
        for block in model.blocks:
            train.recompute(block)
    ids, labels = torch.ones(3, 50, dtype=torch.long), torch.ones(3, 20, dtype=torch.long)
    with FlopCounterMode(display=False) as counted:
        model(ids, ids, shift_right(labels)).sum().backward()
    ours = plan.flops(config, 3, 50, 20, recompute)
    assert ours == pytest.approx(counted.get_total_flops(), rel=1e-6)


REAL = """
import sys, threading, time
from pathlib import Path
import torch, train
from t5 import T5, T5Config
def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) for x in lines if x.startswith("RssAnon")) / (1 << 20)
config = T5Config.preset("small", dropout_rate=0.0, num_layers=3, num_decoder_layers=3)
c = train.Config(device="cpu", precision="fp32", recompute=False, parallel="none")
peak, base = 0.0, anonymous()
def watch():
    global peak
    while True:
        peak = max(peak, anonymous())
        time.sleep(0.01)
threading.Thread(target=watch, daemon=True).start()
model = train.parallelize(T5(config).train(), c)
optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0, fused=True)
ids, labels = torch.ones(2, 512, dtype=torch.long), torch.ones(2, 128, dtype=torch.long)
batch = dict(input_ids=ids, attention_mask=ids, labels=labels, tasks=torch.zeros(2, dtype=int))
for step in range(2):
    for _ in range(2):
        train.forward_backward(model, batch, torch.ones(2), c, 1)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
print(peak - base)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_simulated_memory_is_a_real_process_s():
    """Within a tenth, without dropout (whose masks the CPU keeps in four bytes, CUDA in one)."""
    done = run("-c", REAL, MALLOC_MMAP_THRESHOLD_="65536")
    config = T5Config.preset("small", dropout_rate=0.0, num_layers=3, num_decoder_layers=3)
    c = train.Config(precision="fp32", recompute=False, micro_tokens=2000, batch_size=2,
                     parallel="none")  # fmt: skip
    simulated = plan.simulate(c, config, 1, 512, 128)["peak_gib"]
    assert simulated == pytest.approx(float(done.stdout), rel=0.1)
