"""t5.py against oracles that do not share its code: `transformers` where it is installed (those
tests skip without it), a naive decoding loop, a list of names and shapes, hand computation."""

import json
import os
import pickle
import random
import subprocess
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import t5
from t5 import T5, T5Config, shift_right

# Odd on purpose: heads * d_kv != d_model, decoder deeper than encoder, buckets of an odd number
# whose borders meet rounding, a maximum distance that the sequences exceed, an epsilon that shows.
ODD = dict(vocab_size=61, d_model=24, d_kv=5, d_ff=37, num_heads=3, num_layers=2)
ODD |= dict(num_decoder_layers=3, layer_norm_epsilon=1e-2)
ODD |= dict(relative_attention_num_buckets=17, relative_attention_max_distance=27)
# The keys of the published config.json of each family, shapes aside.
T5_10 = dict(architectures=["T5ForConditionalGeneration"], decoder_start_token_id=0)
T5_10 |= dict(dropout_rate=0.1, eos_token_id=1, initializer_factor=1.0, is_encoder_decoder=True)
T5_10 |= dict(model_type="t5", n_positions=512, output_past=True, pad_token_id=0)
T5_10 |= dict(task_specific_params={"summarization": {"num_beams": 4, "prefix": "summarize: "}})
V11 = {**T5_10, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
FLAN = {**V11, "classifier_dropout": 0.0, "dense_act_fn": "gelu_new", "is_gated_act": True}
FLAN |= dict(torch_dtype="float32", transformers_version="4.23.1", use_cache=True)
FAMILIES = {"t5-1.0": T5_10 | ODD, "v1.1": V11 | ODD, "flan": FLAN | ODD}

TIED = T5Config(**ODD)
UNTIED = T5Config(**ODD, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
BOTH = pytest.mark.parametrize("config", [TIED, UNTIED], ids=["tied", "untied"])
SHARED, HEAD = "shared.weight", "lm_head.weight"
COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
OLD_BIAS = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
FORMS = ["safetensors", "sharded safetensors", "bin", "sharded bin", "legacy", "sharded legacy"]


def scramble(tensors) -> None:
    """Random weights that hide nothing: fresh ones have all norms at 1, and repeat one token."""
    torch.manual_seed(0)
    with torch.no_grad():
        for tensor in tensors:
            tensor.normal_(std=1.0 if tensor.ndim == 1 or len(tensor) == ODD["vocab_size"] else 0.3)


def fresh(config: T5Config, **changes) -> T5:
    model = T5(replace(config, **changes)).eval()
    scramble(model.parameters())
    return model


def batch(rows: int = 5, source: int = 40, target: int = 35) -> tuple[Tensor, Tensor, Tensor]:
    """Source ids, mask, labels: full, padded right, padded left, with holes, of one token."""
    torch.manual_seed(1)
    ids = torch.randint(2, ODD["vocab_size"], (rows, source))
    labels = torch.randint(2, ODD["vocab_size"], (rows, target))
    mask = torch.ones_like(ids)
    mask[1, 11:], mask[2, :30], mask[3, 1::3], mask[4, 1:] = 0, 0, 0, 0
    labels[1, 9:], labels[2, 1:], labels[4, 20:] = -100, -100, -100
    return ids, mask, labels


def naive(model: T5, ids: Tensor, mask: Tensor, steps: int) -> Tensor:
    """Greedy decoding row by row, one whole forward per token, no cache."""
    c, rows = model.config, []
    for i, m in zip(ids, mask):
        row = [c.decoder_start_token_id]
        while len(row) <= steps and c.eos_token_id not in row[1:]:
            with torch.no_grad():
                row.append(model(i[None], m[None], torch.tensor([row]))[0, -1].argmax().item())
        rows.append(torch.tensor(row[1:]))
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=c.pad_token_id)


def layout(c: T5Config) -> dict[str, tuple[int, ...]]:
    """Hugging Face's names and shapes, written out independently of t5.py."""
    inner, wi = c.num_heads * c.d_kv, ["wi"] if c.feed_forward_proj == "relu" else ["wi_0", "wi_1"]
    shapes = dict.fromkeys((SHARED, HEAD)[: 2 - c.tie_word_embeddings], (c.vocab_size, c.d_model))
    attention = {**dict.fromkeys("qkv", (inner, c.d_model)), "o": (c.d_model, inner)}
    dense = {**dict.fromkeys(wi, (c.d_ff, c.d_model)), "wo": (c.d_model, c.d_ff)}
    layers = [("SelfAttention", attention), ("EncDecAttention", attention)]
    layers += [("DenseReluDense", dense)]
    for stack, depth in (("encoder", c.num_layers), ("decoder", c.num_decoder_layers)):
        shapes[f"{stack}.final_layer_norm.weight"] = (c.d_model,)
        bias = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        shapes[bias] = (c.relative_attention_num_buckets, c.num_heads)
        for b in range(depth):
            for i, (layer, parts) in enumerate(layers if stack == "decoder" else layers[::2]):
                prefix = f"{stack}.block.{b}.layer.{i}."
                shapes[prefix + "layer_norm.weight"] = (c.d_model,)
                shapes |= {f"{prefix}{layer}.{part}.weight": s for part, s in parts.items()}
    return shapes


def checkpoint(config: T5Config = TIED) -> dict[str, Tensor]:
    tensors = {name: torch.empty(shape) for name, shape in layout(config).items()}
    scramble(tensors.values())
    return tensors


def write(folder: Path, tensors: dict, form: str = FORMS[0], config: dict | None = None) -> Path:
    """A checkpoint folder without the help of t5.py, in one of FORMS."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config or asdict(TIED)))
    name = "model{}.safetensors" if "safe" in form else "pytorch_model{}.bin"
    shards = {name.format(""): list(tensors)}
    if "sharded" in form:
        shards = {name.format(f"-{i + 1:05}-of-00003"): list(tensors)[i::3] for i in range(3)}
        weight_map = {key: file for file, keys in shards.items() for key in keys}
        index = folder / (name.format("") + ".index.json")
        index.write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map}))
    for file, keys in shards.items():
        part, zipped = {key: tensors[key] for key in keys}, "legacy" not in form
        if "safe" in form:
            save_file(part, folder / file)
        else:
            torch.save(part, folder / file, _use_new_zipfile_serialization=zipped)
    return folder


def refused(folder: Path, *parts: str) -> None:
    """Loading raises ValueError in one printable line of readable length that holds `parts`."""
    with pytest.raises(ValueError) as info:
        T5.from_pretrained(folder)
    line = str(info.value)
    assert line.isprintable() and len(line) < 1200, line
    assert all(part in line for part in (str(folder), *parts)), (line, parts)


# ------------------------------------------------------------------- parity with transformers


@pytest.fixture(scope="module")
def hf():
    return pytest.importorskip("transformers", reason="transformers is the oracle of this test")


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, hf, tmp_path_factory):
    """(theirs, ours) from one folder, saved by transformers. It ties whatever it builds and says
    so whatever is true: untied here by hand, with config.json as the family was published."""
    folder, config = tmp_path_factory.mktemp("hf"), FAMILIES[request.param]
    built = hf.T5ForConditionalGeneration(hf.T5Config(**config))
    if request.param != "t5-1.0":
        built.lm_head.weight = nn.Parameter(torch.empty_like(built.shared.weight))
    scramble(built.parameters())
    built.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))
    theirs = hf.T5ForConditionalGeneration.from_pretrained(folder).eval()
    assert (theirs.lm_head.weight is theirs.shared.weight) == (request.param == "t5-1.0")
    return theirs, T5.from_pretrained(folder)


def their_logits(theirs) -> Tensor:
    ids, mask, labels = batch()
    with torch.no_grad():
        return theirs.eval()(input_ids=ids, attention_mask=mask, labels=labels).logits


def our_logits(ours: T5) -> Tensor:
    ids, mask, labels = batch()
    with torch.no_grad():
        return ours(ids, mask, shift_right(labels))


def test_logits_loss_and_gradients_match(pair):
    theirs, ours = pair
    ids, mask, labels = batch()
    expected = theirs(input_ids=ids, attention_mask=mask, labels=labels)
    logits = ours(ids, mask, shift_right(labels))
    torch.testing.assert_close(logits, expected.logits, atol=1e-4, rtol=0)
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    assert abs(loss.item() - expected.loss.item()) < 1e-4
    loss.backward()
    expected.loss.backward()
    grads = {name: p.grad for name, p in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, grads.pop(t5.hf_name(name)), atol=1e-4, rtol=0)
    assert not grads
    norm, expected = (nn.utils.get_total_norm([p.grad for p in m.parameters()]) for m in pair)
    assert norm > 0.1 and abs(norm - expected) < 1e-4


def test_greedy_tokens_match(pair):
    theirs, ours = pair
    ids, mask, _ = batch()
    eos = naive(ours, ids[:1], mask[:1], 9)[0, 3].item()  # a token that does occur
    ours.config.eos_token_id = theirs.generation_config.eos_token_id = eos
    options = dict(max_new_tokens=30, do_sample=False, num_beams=1)
    # the oracle's cached decoding fails where depths are unequal
    expected = theirs.generate(input_ids=ids, attention_mask=mask, use_cache=False, **options)
    assert (expected == eos).any() and len(expected.unique()) > 6
    assert torch.equal(ours.generate(ids, mask, 30), expected[:, 1:])


@pytest.mark.parametrize("limit", [t5.MAX_SHARD_BYTES, 9000])
def test_a_folder_saved_here_loads_there(pair, hf, tmp_path, monkeypatch, limit):
    theirs, ours = pair
    monkeypatch.setattr(t5, "MAX_SHARD_BYTES", limit)
    ours.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists() == (limit > 9000)
    load = hf.AutoModelForSeq2SeqLM.from_pretrained
    again, report = load(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert torch.equal(their_logits(again), their_logits(theirs))


@pytest.mark.parametrize("tie", [None, True, False])
@pytest.mark.parametrize("scale", [None, True, False])
@pytest.mark.parametrize("activation", ["relu", "gated-gelu"])
def test_tying_scaling_and_activation_are_independent(hf, tmp_path, tie, scale, activation):
    keys = {"tie_word_embeddings": tie, "scale_decoder_outputs": scale}
    raw = {**T5_10, **ODD, "feed_forward_proj": activation}
    raw |= {key: value for key, value in keys.items() if value is not None}
    tensors = checkpoint(replace(TIED, feed_forward_proj=activation))
    for head in (None, tensors[SHARED].clone(), tensors[SHARED].flip(1)):  # none, equal, its own
        given = tensors if head is None else {**tensors, HEAD: head}
        folder = write(tmp_path / "in", given, config=raw)
        if tie is False and head is None:  # transformers ties in silence
            refused(folder, f"missing 1 ('{HEAD}')")
            continue
        ours = T5.from_pretrained(folder)
        expected = their_logits(hf.T5ForConditionalGeneration.from_pretrained(folder))
        torch.testing.assert_close(our_logits(ours), expected, atol=1e-4, rtol=0)
        ours.save_pretrained(tmp_path / "out")  # it writes what is true
        again = T5.from_pretrained(tmp_path / "out")
        assert again.config == ours.config
        assert torch.equal(our_logits(again), our_logits(ours))


@pytest.mark.parametrize("bidirectional", [True, False])
def test_buckets_match(hf, bidirectional):
    oracle = hf.models.t5.modeling_t5.T5Attention._relative_position_bucket
    distance = torch.arange(-300, 301)
    for n, far in ((32, 128), (17, 27), (34, 27), (19, 196), (10, 17), (8, 20), (64, 300), (4, 9)):
        c = T5Config(relative_attention_num_buckets=n, relative_attention_max_distance=far)
        buckets = t5.RelativeBias(c, bidirectional).bucket(distance)
        assert torch.equal(buckets, oracle(distance, bidirectional, n, far)), (n, far)


def test_absent_keys_take_the_defaults_of_transformers(hf):
    theirs, ours = hf.T5Config(), T5Config.from_dict({})
    for field in fields(T5Config):
        if field.name != "decoder_start_token_id":  # theirs has none: T5 starts with PAD
            assert getattr(ours, field.name) == getattr(theirs, field.name), field.name
    assert ours.decoder_start_token_id == theirs.pad_token_id
    assert T5Config.from_dict(theirs.to_dict()) == ours  # and its dozens of others are ignored
    assert T5Config.from_dict({field.name: None for field in fields(T5Config)}) == ours
    for raw in (dict(num_layers=9, hidden_size=8, head_dim=5), dict(tie_word_embeddings=False)):
        theirs, ours = hf.T5Config(**raw), T5Config.from_dict(raw)
        for name in ("d_model", "d_kv", "num_decoder_layers", "scale_decoder_outputs"):
            assert getattr(ours, name) == getattr(theirs, name), (raw, name)


@pytest.mark.parametrize("activation", t5.ACTIVATIONS)
def test_fresh_weights_are_spread_as_in_transformers(hf, activation):
    shape = dict(vocab_size=300, d_model=64, d_kv=30, d_ff=200, num_layers=1, num_heads=4)
    shape |= dict(relative_attention_num_buckets=200, initializer_factor=0.7)
    config = T5Config(**shape, feed_forward_proj=activation)
    theirs = hf.T5ForConditionalGeneration(hf.T5Config(**asdict(config))).state_dict()
    for name, parameter in T5(config).named_parameters():
        if parameter.ndim == 2:
            assert 0.85 < parameter.std() / theirs[t5.hf_name(name)].std() < 1.15, name


# ------------------------------------------------------------------------------ architecture


def test_presets_have_the_published_parameter_count():
    sizes = dict(small=76961152, base=247577856, large=783150080, xl=2849757184, xxl=11135332352)
    for size, count in sizes.items():
        with torch.device("meta"):
            model = T5(T5Config.preset(size))
        assert sum(p.numel() for p in model.parameters()) == count, size


@BOTH
@pytest.mark.parametrize("source, steps", [(40, 25), (40, 1), (1, 25), (1, 1)])
def test_cached_decoding_equals_a_naive_loop(config, source, steps):
    """To the step in which the last row ends: the first row alone ends early."""
    model = fresh(config, decoder_start_token_id=2, pad_token_id=7)
    ids, mask, _ = batch()
    ids, mask = ids[:, -source:], mask[:, -source:]
    model.config.eos_token_id = naive(model, ids[:1], mask[:1], 9)[0, 3].item()
    first, expected = (naive(model, ids[:n], mask[:n], steps) for n in (1, 5))
    reads = []
    for module in (model.encoder.norm, model.decoder.blocks[1].cross.k):
        module.register_forward_hook(lambda module, *_: reads.append(module))
    assert torch.equal(model.generate(ids, mask, steps), expected)
    assert len(reads) == 2, "the source is read once"
    assert torch.equal(model.generate(ids[:1], mask[:1], steps), first) and first.shape[1] <= 4
    if source == 40 and steps == 25:  # or the test shows nothing
        assert len(expected.unique()) > 9 and len(set(expected.ne(7).sum(1).tolist())) > 1


def test_shift_right_starts_and_pads_with_the_given_ids():
    labels = torch.tensor([[5, 6, 1], [9, 1, -100], [1, -100, -100], [-100, -100, -100]])
    expected = [[3, 5, 6], [3, 9, 1], [3, 1, 4], [3, 4, 4]]
    assert shift_right(labels, start=3, pad=4).tolist() == expected


@BOTH
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=str)  # FSDP: latter
@pytest.mark.parametrize("autocast", [True, False])
def test_what_is_bfloat16_and_what_is_not(config, weights, autocast):
    """Under autocast, or with bfloat16 weights: products and attention, and what a norm gives
    them. What a norm reads, the residual stream, is float32."""
    computed = torch.bfloat16 if autocast else weights
    seen: dict[str, set] = {"residual": set(), "norm": set(), "mm": set(), "attention": set()}

    class Spy(TorchDispatchMode):  # sees what autocast made of each operation
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            out = op(*args, **(kwargs or {}))
            if op.name().split(".")[0] == "aten::mm":
                seen["mm"].add(out.dtype)
            if "attention" in op.name():
                seen["attention"].add(out[0].dtype)
            return out

    model = fresh(config).to(weights)
    for module in model.modules():
        if isinstance(module, t5.RMSNorm):
            module.register_forward_pre_hook(lambda _, args: seen["residual"].add(args[0].dtype))
            module.register_forward_hook(lambda _, args, out: seen["norm"].add(out.dtype))
    ids, mask, labels = batch()
    cast = torch.autocast("cpu", torch.bfloat16, enabled=autocast)
    with cast, Spy(), torch.no_grad():
        logits = model(ids, mask, shift_right(labels))
        model.generate(ids, mask, 3)
    others = {what: dtypes.copy() for what, dtypes in seen.items()}
    assert others.pop("residual") == {torch.float32}
    assert all(dtypes == {computed} for dtypes in others.values()), others
    error = (logits.float() - our_logits(model.float())).abs().mean()
    assert logits.isfinite().all() and error < 0.1 * logits.std()


@BOTH
def test_every_parameter_has_a_random_stream_of_its_own(config):
    """The same weights again from the same seed, whatever was drawn in between and however deep
    the model is; others from another seed; no two parameters alike."""
    torch.manual_seed(3)
    one = T5(config)
    torch.rand(5)
    deeper = replace(config, num_layers=config.num_layers + 1)
    other, again = dict(T5(deeper).named_parameters()), T5(config)
    again.init_weights(4)
    drawn = [p for name, p in one.named_parameters() if "norm" not in name]
    assert all(torch.equal(p, other[name]) for name, p in one.named_parameters())
    assert not any(torch.equal(p, q) for p, q in zip(drawn, drawn[1:]))
    again = dict(again.named_parameters())
    assert not any(torch.equal(p, again[name]) for name, p in one.named_parameters()
                   if "norm" not in name)  # fmt: skip


# -------------------------------------------------------------------------------- config.json

UNSUPPORTED = dict(feed_forward_proj="gated-silu", dense_act_fn="silu", is_gated_act=True)
UNSUPPORTED |= dict(is_decoder=True, is_encoder_decoder=False, tie_encoder_decoder=True)
UNSUPPORTED |= dict(model_type="mt5", pruned_heads={"0": [1]}, quantization_config={"a": "b\nc"})


@pytest.mark.parametrize("key", UNSUPPORTED)
def test_a_key_that_changes_the_mathematics_is_refused(tmp_path, key):
    write(tmp_path, checkpoint(), config={**asdict(TIED), key: UNSUPPORTED[key]})
    refused(tmp_path, "config.json", key, repr(UNSUPPORTED[key]), "allowed")


MALFORMED = ["", "{", "[]", "3", '"x"', "null", "\xff", "[" * 100_000, '{"d_model": "24"}']
MALFORMED += ['{"d_model": 2.5}', '{"d_model": true}', '{"d_model": 0}', '{"vocab_size": -1}']
MALFORMED += ['{"eos_token_id": [1]}', '{"tie_word_embeddings": "no"}', '{"feed_forward_proj": []}']
MALFORMED += ['{"layer_norm_epsilon": "small"}']


@pytest.mark.parametrize("text", MALFORMED, ids=range(len(MALFORMED)))
def test_a_malformed_config_is_refused(tmp_path, text):
    write(tmp_path, checkpoint())
    (tmp_path / "config.json").write_bytes(text.encode("latin1"))
    refused(tmp_path, "config.json")


# ------------------------------------------------------------------------------------ weights


@BOTH
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_form_of_checkpoint_loads_bit_for_bit(tmp_path, form, config, dtype):
    tensors = {name: t.to(dtype) for name, t in checkpoint(config).items()}
    model = T5.from_pretrained(write(tmp_path / "in", tensors, form, asdict(config)))
    assert not model.training and all(p.requires_grad for p in model.parameters())
    model.save_pretrained(tmp_path / "out")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"config.json", "model.safetensors"}
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert {name: tuple(t.shape) for name, t in saved.items()} == layout(config)
    assert all(saved[n].dtype == torch.float32 for n in tensors)
    assert all(torch.equal(saved[n], t.float()) for n, t in tensors.items())


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_large_file_in_the_old_format_is_refused_with_the_command_that_saves_it(
    tmp_path, monkeypatch
):
    folder = write(tmp_path, checkpoint(), "legacy")
    expected = T5.from_pretrained(folder).state_dict()
    monkeypatch.setattr(t5, "MAX_OLD_BIN_BYTES", 0)
    with pytest.raises(ValueError, match="before 1.6.* GB of free host memory") as info:
        T5.from_pretrained(folder)
    command = str(info.value).split("`")[1]
    subprocess.run(command.replace("python", sys.executable, 1), shell=True, check=True)
    assert {p.name for p in folder.iterdir()} == {"config.json", "pytorch_model.bin"}
    loaded = T5.from_pretrained(folder).state_dict()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_known_aliases_and_the_unused_bias_are_accepted(tmp_path, form):
    tensors = {**checkpoint(), OLD_BIAS: torch.randn(17, 3)}
    aliases = {name: tensors[SHARED].clone() for name in (*COPIES, HEAD)}
    lone = {name: t for name, t in tensors.items() if name != SHARED}
    expected = T5.from_pretrained(write(tmp_path, tensors)).state_dict()
    for given in ({**tensors, **aliases}, *({**lone, name: t} for name, t in aliases.items())):
        loaded = T5.from_pretrained(write(tmp_path / "alias", given, form)).state_dict()
        assert loaded.keys() == expected.keys()
        assert all(torch.equal(loaded[name], expected[name]) for name in expected)
    for name in COPIES:
        bad = {**tensors, **aliases, name: tensors[SHARED] + 1}
        refused(write(tmp_path / "alias", bad, form), name, "differs", SHARED)


@pytest.mark.parametrize("form", FORMS)
def test_missing_and_left_over_tensors_are_both_listed(tmp_path, form):
    lost, extra = "decoder.block.2.layer.1.EncDecAttention.q.weight", "encoder.block.2.odd.weight"
    missing, left_over = f"missing 1 ('{lost}')", f"left over 1 ('{extra}')"
    tensors = {name: t for name, t in checkpoint().items() if name != lost}
    refused(write(tmp_path, tensors, form), missing, "left over nothing")
    refused(write(tmp_path, {**tensors, extra: torch.ones(2)}, form), missing, left_over)
    whole = {**checkpoint(), extra: torch.ones(2)}
    refused(write(tmp_path, whole, form), "missing nothing", left_over)
    many = {f"extra.{i}": torch.ones(2) for i in range(100)}  # a line that can still be read
    refused(write(tmp_path, {**tensors, **many}, form), missing, "left over 100 (", "more)")


def test_a_wrong_shape_or_type_is_refused(tmp_path):
    name = "encoder.block.1.layer.0.SelfAttention.q.weight"  # (15, 24)
    for wrong in (torch.ones(24, 15), torch.ones(24), torch.ones(15, 24, dtype=torch.int64)):
        folder = write(tmp_path, {**checkpoint(), name: wrong})
        refused(folder, name, "(15, 24)", str(tuple(wrong.shape)), str(wrong.dtype))
    refused(write(tmp_path, checkpoint(UNTIED)), "missing", "wi.weight", "left over", "wi_0.weight")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("form", ["safetensors", "bin", "legacy"])
def test_truncated_and_corrupt_files_are_refused(tmp_path, form):
    path = next(write(tmp_path, checkpoint(), form).glob("*model.*"))
    good, dice = path.read_bytes(), random.Random(0)
    for cut in [0, 1, 3, 8, 100, len(good) - 1, *dice.sample(range(len(good)), 20)]:
        path.write_bytes(good[:cut])
        refused(tmp_path, path.name)
    path.write_bytes(dice.randbytes(5000))
    refused(tmp_path, path.name)
    for _ in range(60):  # damage that falls on a number cannot be told
        at = dice.randrange(5000)
        path.write_bytes(good[:at] + dice.randbytes(3) + good[at + 3 :])
        try:
            T5.from_pretrained(tmp_path)
        except ValueError:
            refused(tmp_path)


@pytest.mark.parametrize("form", ["bin", "legacy"])
def test_a_hostile_pickle_is_refused_and_not_run(tmp_path, form):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    write(tmp_path, {**checkpoint(), "evil": Evil()}, form)
    refused(tmp_path, "pytorch_model.bin")
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(), protocol=2))
    refused(tmp_path, "pytorch_model.bin")
    assert not (tmp_path / "ran").exists()
    pickle.loads(pickle.dumps(Evil()))
    assert (tmp_path / "ran").exists()  # so it would have run


@pytest.mark.parametrize("form", ["sharded safetensors", "sharded bin"])
def test_a_damaged_index_and_a_missing_shard_are_refused(tmp_path, form):
    index = next(write(tmp_path, checkpoint(), form).glob("*.index.json"))
    good = index.read_text()
    entries = ("[]", '{"a": 1}', '{"a": null}', '{"a": []}', '{"a": "x", "b": 1}')
    entries = [f'{{"weight_map": {entry}}}' for entry in entries]
    for text in ("", "{}", "[]", "[" * 100_000, good[:-9], *entries):
        index.write_text(text)
        refused(tmp_path, index.name)
    index.write_text(good)
    lost = next(tmp_path.glob("*-00002-of-00003.*"))
    lost.unlink()
    refused(tmp_path, lost.name, "missing")


def test_saving_shards_above_the_limit_and_leaves_nothing_stale(tmp_path, monkeypatch):
    model = fresh(UNTIED)
    bits = {t5.hf_name(name): p.detach() for name, p in model.named_parameters()}
    total = sum(t.nbytes for t in bits.values())
    (tmp_path / "spiece.model").write_text("kept")
    for limit in (total, 9000, 20000, total - 1, total):  # one file, many, fewer, two, one again
        monkeypatch.setattr(t5, "MAX_SHARD_BYTES", limit)
        model.save_pretrained(tmp_path)
        names = {p.name for p in tmp_path.iterdir()} - {"config.json", "spiece.model"}
        if limit == total:
            assert names == {"model.safetensors"}
        else:
            shards = [load_file(tmp_path / name) for name in names - {t5.INDEX}]
            assert 1 < len(shards) == len(names) - 1
            sizes = [[t.nbytes for t in shard.values()] for shard in shards]
            assert all(sum(size) <= limit or len(size) == 1 for size in sizes)
        again = T5.from_pretrained(tmp_path)
        assert again.config == model.config
        assert all(torch.equal(p, bits[t5.hf_name(n)]) for n, p in again.named_parameters())
    assert (tmp_path / "spiece.model").read_text() == "kept"
