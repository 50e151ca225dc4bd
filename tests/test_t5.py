"""t5.py against oracles that do not share its code: `transformers` where it is installed (those
tests skip without it), a naive decoding loop, a list of names and shapes, hand computation."""

import json
import os
import pickle
import random
from dataclasses import asdict, fields
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import t5
from t5 import PRESETS, T5, T5Config, shift_right

# Odd on purpose: heads * d_kv != d_model, more decoder blocks than encoder blocks, an odd number
# of buckets, and a distance that the sequences below exceed.
ODD = dict(
    vocab_size=61,
    d_model=24,
    d_kv=5,
    d_ff=37,
    num_layers=2,
    num_decoder_layers=3,
    num_heads=3,
    relative_attention_num_buckets=17,
    relative_attention_max_distance=27,
)
# What the published config.json of each family holds, shapes aside.
COMMON = {
    "architectures": ["T5ForConditionalGeneration"],
    "decoder_start_token_id": 0,
    "dropout_rate": 0.1,
    "eos_token_id": 1,
    "initializer_factor": 1.0,
    "is_encoder_decoder": True,
    "layer_norm_epsilon": 1e-06,
    "model_type": "t5",
    "n_positions": 512,
    "output_past": True,
    "pad_token_id": 0,
    "task_specific_params": {"summarization": {"num_beams": 4, "prefix": "summarize: "}},
}
V11 = {**COMMON, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
FLAN = {
    **V11,
    "classifier_dropout": 0.0,
    "dense_act_fn": "gelu_new",
    "is_gated_act": True,
    "torch_dtype": "float32",
    "transformers_version": "4.23.1",
    "use_cache": True,
}
FAMILIES = {"t5-1.0": {**COMMON, **ODD}, "v1.1": {**V11, **ODD}, "flan": {**FLAN, **ODD}}
TIED = T5Config(**ODD)
UNTIED = T5Config(**ODD, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
SHARED = "shared.weight"
COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
OLD = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"


def scramble(tensors) -> None:
    """Random weights that hide nothing: fresh ones have all norms at 1, and repeat one token."""
    torch.manual_seed(0)
    with torch.no_grad():
        for tensor in tensors:
            tensor.normal_(std=1.0 if tensor.ndim == 1 or len(tensor) == ODD["vocab_size"] else 0.3)


def fresh(config: T5Config) -> T5:
    model = T5(config).eval()
    scramble(model.parameters())
    return model


def batch(rows: int = 5, source: int = 40, target: int = 35) -> tuple[Tensor, Tensor, Tensor]:
    """Source ids, mask, labels: full, padded right, padded left, with holes, of one token."""
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(2, ODD["vocab_size"], (rows, source), generator=g)
    labels = torch.randint(2, ODD["vocab_size"], (rows, target), generator=g)
    mask = torch.ones(rows, source, dtype=torch.long)
    mask[1, 11:], mask[2, :30], mask[3, ::3], mask[4, 1:] = 0, 0, 0, 0
    labels[1, 9:], labels[2, 1:], labels[4, 20:] = -100, -100, -100
    return ids, mask, labels


def naive(model: T5, ids: Tensor, mask: Tensor, steps: int) -> Tensor:
    """Greedy decoding row by row, one whole forward per token, no cache."""
    rows = []
    for i, m in zip(ids, mask):
        row = [model.config.decoder_start_token_id]
        while len(row) <= steps and model.config.eos_token_id not in row[1:]:
            with torch.no_grad():
                row.append(model(i[None], m[None], torch.tensor([row]))[0, -1].argmax().item())
        rows.append(torch.tensor(row[1:]))
    pad = model.config.pad_token_id
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)


def layout(config: T5Config) -> dict[str, tuple[int, ...]]:
    """Hugging Face's names and shapes, written out independently of t5.py."""
    c, inner = config, config.num_heads * config.d_kv
    shapes = {SHARED: (c.vocab_size, c.d_model)}
    if not c.tie_word_embeddings:
        shapes["lm_head.weight"] = (c.vocab_size, c.d_model)
    wi = ("wi_0", "wi_1") if c.feed_forward_proj == "gated-gelu" else ("wi",)
    dense = {**{name: (c.d_ff, c.d_model) for name in wi}, "wo": (c.d_model, c.d_ff)}
    attention = {**dict.fromkeys("qkv", (inner, c.d_model)), "o": (c.d_model, inner)}
    layers = [("SelfAttention", attention), ("EncDecAttention", attention), ("DenseReluDense", dense)]
    for stack, depth in (("encoder", c.num_layers), ("decoder", c.num_decoder_layers)):
        shapes[f"{stack}.final_layer_norm.weight"] = (c.d_model,)
        bias = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        shapes[bias] = (c.relative_attention_num_buckets, c.num_heads)
        for b in range(depth):
            for i, (layer, parts) in enumerate(layers if stack == "decoder" else layers[::2]):
                prefix = f"{stack}.block.{b}.layer.{i}."
                shapes[prefix + "layer_norm.weight"] = (c.d_model,)
                shapes.update({f"{prefix}{layer}.{k}.weight": v for k, v in parts.items()})
    return shapes


def checkpoint(config: T5Config = TIED) -> dict[str, Tensor]:
    tensors = {name: torch.empty(shape) for name, shape in layout(config).items()}
    scramble(tensors.values())
    return tensors


def write(folder: Path, tensors: dict, form: str = "safetensors", config: dict | None = None):
    """A checkpoint folder: `form` is safetensors, bin (zip) or legacy, and maybe "sharded"."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(asdict(TIED) if config is None else config))
    stem, ext = ("model", "safetensors") if "safe" in form else ("pytorch_model", "bin")
    shards = {f"{stem}.{ext}": list(tensors)}
    if "sharded" in form:
        shards = {f"{stem}-{i + 1:05}-of-00003.{ext}": list(tensors)[i::3] for i in range(3)}
        weight_map = {name: file for file, names in shards.items() for name in names}
        index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
        (folder / f"{stem}.{ext}.index.json").write_text(json.dumps(index))
    for file, names in shards.items():
        part = {name: tensors[name] for name in names}
        if ext == "bin":
            zipped = "legacy" not in form
            torch.save(part, folder / file, _use_new_zipfile_serialization=zipped)
        else:
            save_file(part, folder / file)
    return folder


def refused(folder: Path, *parts: str) -> str:
    """Loading raises ValueError in one printable line of readable length that holds `parts`."""
    with pytest.raises(ValueError) as info:
        T5.from_pretrained(folder)
    line = str(info.value)
    assert line.isprintable() and len(line) < 1000, line
    for part in (str(folder), *parts):
        assert part in line, line
    return line


# ------------------------------------------------------------------- parity with transformers


@pytest.fixture(scope="module")
def hf():
    return pytest.importorskip("transformers", reason="transformers is the oracle of this test")


def hf_folder(hf, folder: Path, config: dict) -> Path:
    """Random weights saved by transformers, which ties whatever it builds: untied by hand."""
    model = hf.T5ForConditionalGeneration(hf.T5Config(**config))
    if not config.get("tie_word_embeddings", True):
        model.lm_head.weight = nn.Parameter(torch.empty_like(model.shared.weight))
    scramble(model.parameters())
    model.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))  # as published, not as saved
    return folder


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, hf, tmp_path_factory):
    """(theirs, ours), loaded from one folder."""
    folder = hf_folder(hf, tmp_path_factory.mktemp("hf"), FAMILIES[request.param])
    theirs = hf.T5ForConditionalGeneration.from_pretrained(folder).eval()
    untied = theirs.lm_head.weight is not theirs.shared.weight
    assert untied == (request.param != "t5-1.0")  # or the oracle would hide a missing head
    return theirs, T5.from_pretrained(folder)


def logits_of(theirs, ids: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
    with torch.no_grad():
        return theirs(input_ids=ids, attention_mask=mask, labels=labels).logits


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
        grad = grads.pop(t5.hf_name(name))
        torch.testing.assert_close(parameter.grad, grad, atol=1e-4, rtol=0, msg=lambda m: name + m)
    assert not grads
    norms = [nn.utils.get_total_norm([p.grad for p in m.parameters()]) for m in pair]
    assert norms[0] > 0.1 and abs(norms[0] - norms[1]) < 1e-4


def test_greedy_tokens_match(pair):
    theirs, ours = pair
    ids, mask, _ = batch()
    eos = naive(ours, ids[:1], mask[:1], 6)[0, 3].item()  # a token that does occur
    ours.config.eos_token_id = theirs.generation_config.eos_token_id = eos
    options = dict(max_new_tokens=30, do_sample=False, num_beams=1)
    # with unequal depths the oracle's cached decoding fails
    expected = theirs.generate(input_ids=ids, attention_mask=mask, use_cache=False, **options)
    assert (expected == eos).any() and len(expected.unique()) > 9
    assert torch.equal(ours.generate(ids, mask, 30), expected[:, 1:])


@pytest.mark.parametrize("limit", [t5.MAX_SHARD_BYTES, 9000])
def test_a_folder_saved_here_loads_there(pair, hf, tmp_path, monkeypatch, limit):
    theirs, ours = pair
    monkeypatch.setattr(t5, "MAX_SHARD_BYTES", limit)
    ours.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors.index.json").exists() == (limit == 9000)
    load = hf.AutoModelForSeq2SeqLM.from_pretrained
    again, report = load(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert torch.equal(logits_of(again.eval(), *batch()), logits_of(theirs, *batch()))


def test_a_folder_saved_again_by_transformers_loads(pair, tmp_path):
    theirs, ours = pair
    theirs.save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    assert raw["tie_word_embeddings"] is True  # whatever was true
    again = T5.from_pretrained(tmp_path)
    assert (again.head is None) == (ours.head is None)
    ids, mask, labels = batch()
    inputs = ids, mask, shift_right(labels)
    assert torch.equal(again(*inputs), ours(*inputs))


@pytest.mark.parametrize("tie", [None, True, False])
@pytest.mark.parametrize("scale", [None, True, False])
@pytest.mark.parametrize("activation", ["relu", "gated-gelu"])
def test_tying_scaling_and_activation_are_independent(hf, tmp_path, tie, scale, activation):
    keys = {"tie_word_embeddings": tie, "scale_decoder_outputs": scale}
    raw = {**COMMON, **ODD, "feed_forward_proj": activation}
    raw.update({key: value for key, value in keys.items() if value is not None})
    tensors = checkpoint(T5Config(**ODD, feed_forward_proj=activation))
    heads = {"equal": tensors[SHARED].clone(), "own": torch.randn_like(tensors[SHARED])}
    for head in ("none", *heads):
        extra = {"lm_head.weight": heads[head]} if head in heads else {}
        folder = write(tmp_path / head, {**tensors, **extra}, config=raw)
        if tie is False and not extra:
            refused(folder, "missing 1 (lm_head.weight)")
            continue
        ours = T5.from_pretrained(folder)
        expected = logits_of(hf.T5ForConditionalGeneration.from_pretrained(folder).eval(), *batch())
        ids, mask, labels = batch()
        logits = ours(ids, mask, shift_right(labels))
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
        assert ours.config.scale_decoder_outputs == (tie is not False if scale is None else scale)
        ours.save_pretrained(tmp_path / "saved")  # it writes what is true
        again = T5.from_pretrained(tmp_path / "saved")
        assert again.config == ours.config
        assert torch.equal(again(ids, mask, shift_right(labels)), logits)


V11_SIZES = dict(small=76961152, base=247577856, large=783150080, xl=2849757184, xxl=11135332352)


@pytest.mark.parametrize("size", PRESETS)
def test_presets_have_the_oracles_parameter_count(hf, size):
    config = T5Config.preset(size)
    with torch.device("meta"):
        theirs = hf.T5ForConditionalGeneration(hf.T5Config(**asdict(config)))
        theirs.lm_head.weight = nn.Parameter(torch.empty_like(theirs.shared.weight))
        ours = T5(config)
    assert ours.embedding.weight.is_meta
    count = sum(p.numel() for p in ours.parameters())
    assert count == sum(p.numel() for p in theirs.parameters())


@pytest.mark.parametrize("size", V11_SIZES)
def test_presets_have_the_published_parameter_count(size):
    with torch.device("meta"):
        model = T5(T5Config.preset(size))
    assert sum(p.numel() for p in model.parameters()) == V11_SIZES[size]


BUCKETS = [(32, 128), (17, 27), (34, 27), (19, 196), (10, 17), (8, 20), (64, 300)]


@pytest.mark.parametrize("buckets, max_distance", BUCKETS)
@pytest.mark.parametrize("bidirectional", [True, False])
def test_buckets_match(hf, buckets, max_distance, bidirectional):
    oracle = hf.models.t5.modeling_t5.T5Attention._relative_position_bucket
    config = T5Config(
        relative_attention_num_buckets=buckets, relative_attention_max_distance=max_distance
    )
    distance = torch.arange(-300, 301)
    expected = oracle(distance, bidirectional, buckets, max_distance)
    assert torch.equal(t5.RelativeBias(config, bidirectional).bucket(distance), expected)


def test_defaults_are_those_of_transformers(hf):
    theirs, ours = hf.T5Config(), T5Config.from_dict({})
    for field in fields(T5Config):
        if field.name != "decoder_start_token_id":  # theirs has none: T5 starts with PAD
            assert getattr(ours, field.name) == getattr(theirs, field.name), field.name
    assert ours.decoder_start_token_id == theirs.pad_token_id
    assert T5Config.from_dict({"num_layers": 9}).num_decoder_layers == 9
    assert T5Config.from_dict(theirs.to_dict()) == ours  # its dozens of other keys are ignored
    assert T5Config.from_dict({f.name: None for f in fields(T5Config)}) == ours
    renamed = dict(hidden_size=24, num_attention_heads=3, num_hidden_layers=2, head_dim=5)
    assert T5Config.from_dict(renamed).to_dict() == T5Config.from_dict(
        {k: getattr(hf.T5Config(**renamed), k) for k in ("d_model", "num_heads", "num_layers", "d_kv")}
    ).to_dict()


def test_fresh_weights_are_spread_as_in_transformers(hf):
    shape = dict(vocab_size=300, d_model=64, d_kv=30, d_ff=200, num_layers=1, num_heads=4)
    shape.update(relative_attention_num_buckets=200, initializer_factor=0.7)
    for activation in t5.ACTIVATIONS:
        config = T5Config(**shape, feed_forward_proj=activation)
        theirs = hf.T5ForConditionalGeneration(hf.T5Config(**asdict(config))).state_dict()
        for name, parameter in T5(config).named_parameters():
            if parameter.ndim == 2:
                ratio = parameter.std() / theirs[t5.hf_name(name)].std()
                assert 0.85 < ratio < 1.15, (name, ratio)


# ------------------------------------------------------------------------------ architecture


@pytest.mark.parametrize("config", [TIED, UNTIED], ids=["tied", "untied"])
@pytest.mark.parametrize("steps", [1, 25])
@pytest.mark.parametrize("source", [1, 40])
def test_cached_decoding_equals_a_naive_loop(config, steps, source):
    model = fresh(T5Config(**asdict(config)))
    ids, mask, _ = batch()
    ids, mask = ids[:, :source], mask[:, :source]
    mask[2:4, 0] = 1
    model.config.eos_token_id = naive(model, ids[:1], mask[:1], 9)[0, 5].item()
    expected = naive(model, ids, mask, steps)
    assert torch.equal(model.generate(ids, mask, steps), expected)
    if steps == 25 and source == 40:  # or the test shows nothing
        assert len(expected.unique()) > 9 and len(set(expected.ne(0).sum(1).tolist())) > 1


def test_decoding_stops_when_every_row_has_ended_and_reads_the_source_once():
    model = fresh(T5Config(**asdict(UNTIED)))
    ids, mask, _ = batch(rows=5)
    ids, mask = ids[[0, 0, 1]], mask[[0, 0, 1]]
    free = naive(model, ids, mask, 20)
    model.config.eos_token_id = next(t for t in free[0].tolist()[3:] if t in free[2, 1:])
    model.config.pad_token_id = 7
    calls = []
    for module in (model.encoder.norm, model.decoder.norm, model.decoder.blocks[1].cross.k):
        module.register_forward_hook(lambda module, *_: calls.append(module))
    tokens = model.generate(ids, mask, 64)
    ends = [row.tolist().index(model.config.eos_token_id) for row in tokens]
    assert ends[0] != ends[2] and tokens.shape == (3, max(ends) + 1) and max(ends) < 20
    for row, end in zip(tokens, ends):
        assert (row[end + 1 :] == 7).all()
    assert calls.count(model.decoder.norm) == max(ends) + 1
    assert calls.count(model.encoder.norm) == calls.count(model.decoder.blocks[1].cross.k) == 1


def test_shift_right():
    labels = torch.tensor([[5, 6, 1], [9, 1, -100], [1, -100, -100], [-100, -100, -100]])
    expected = torch.tensor([[0, 5, 6], [0, 9, 1], [0, 1, 0], [0, 0, 0]])
    assert torch.equal(shift_right(labels), expected)
    expected = torch.tensor([[3, 5, 6], [3, 9, 1], [3, 1, 4], [3, 4, 4]])
    assert torch.equal(shift_right(labels, start=3, pad=4), expected)
    assert labels[3, 0] == -100  # its argument is left alone
    assert shift_right(labels[:, :1]).tolist() == [[0]] * 4


def test_buckets_by_hand():
    known = {0: 0, -1: 1, -7: 7, -8: 8, -11: 8, -12: 9, -16: 10, -64: 14, -91: 15, -5000: 15}
    known.update({1: 17, 7: 23, 8: 24, 11: 24, 12: 25, 16: 26, 64: 30, 91: 31, 5000: 31})
    both = t5.RelativeBias(T5Config(), bidirectional=True)
    assert both.bucket(torch.tensor(list(known))).tolist() == list(known.values())
    known = {9: 0, 1: 0, 0: 0, -1: 1, -15: 15, -16: 16, -32: 21, -64: 26, -113: 30, -128: 31, -999: 31}
    past = t5.RelativeBias(T5Config(), bidirectional=False)
    assert past.bucket(torch.tensor(list(known))).tolist() == list(known.values())


def test_neither_padding_nor_later_tokens_nor_other_rows_are_seen():
    model = fresh(TIED)
    ids, mask, labels = batch()
    inputs = shift_right(labels)
    logits = model(ids, mask, inputs)
    other = torch.where(mask.bool(), ids, 60 - ids)
    assert torch.equal(model(other, mask, inputs), logits)
    later = torch.cat([inputs[:, :20], 60 - inputs[:, 20:]], dim=1)
    torch.testing.assert_close(model(ids, mask, later)[:, :20], logits[:, :20], atol=1e-4, rtol=0)
    torch.testing.assert_close(model(ids[:2], mask[:2], inputs[:2]), logits[:2], atol=1e-4, rtol=0)


@pytest.mark.parametrize("config", [TIED, UNTIED], ids=["tied", "untied"])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("source, target", [(40, 35), (1, 1)])
def test_fully_masked_rows_are_finite(config, autocast, source, target):
    model = fresh(config)
    ids, mask, labels = batch(source=source, target=target)
    mask[[0, 3]] = 0
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = model(ids, mask, shift_right(labels))
        tokens = model.generate(ids, mask, 3)
    F.cross_entropy(logits.float().flatten(0, 1), labels.flatten()).backward()
    assert logits.isfinite().all() and tokens.shape[0] == 5
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert model.encoder.blocks[0].attention.q.weight.grad.any() or source == 1


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])  # the latter as under FSDP
@pytest.mark.parametrize("config", [TIED, UNTIED], ids=["tied", "untied"])
def test_under_autocast_products_alone_are_bfloat16(config, weights):
    seen: dict[str, set] = {"residual": set(), "norm": set()}

    class Spy(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            out = op(*args, **(kwargs or {}))
            name = op.name().split(".")[0]
            if name in ("aten::mm", "aten::bmm", "aten::_softmax", "aten::addmm", "aten::baddbmm"):
                seen.setdefault(name, set()).add(out.dtype)
            return out

    model = fresh(config).to(weights)
    for module in model.modules():
        kind = "norm" if isinstance(module, t5.RMSNorm) else "residual"
        if kind == "norm" or module in model.blocks:
            module.register_forward_hook(lambda m, i, out, kind=kind: seen[kind].add(out.dtype))
            module.register_forward_pre_hook(
                lambda m, args: seen["residual"].add(args[0].dtype)
            )
    ids, mask, labels = batch()
    with torch.autocast("cpu", torch.bfloat16), Spy():
        logits = model(ids, mask, shift_right(labels))
        model.generate(ids, mask, 3)
    products = {name: seen.pop(name) for name in ("aten::mm", "aten::bmm")}
    assert products == dict.fromkeys(products, {torch.bfloat16})
    assert seen == dict.fromkeys(("residual", "norm", "aten::_softmax"), {torch.float32})
    assert logits.isfinite().all()
    with torch.no_grad():
        exact = model.float()(ids, mask, shift_right(labels))
    assert (logits.float() - exact).abs().mean() < 0.1 * exact.std()


# -------------------------------------------------------------------------------- config.json

UNSUPPORTED = {
    "feed_forward_proj": "gated-silu",
    "is_decoder": True,
    "is_encoder_decoder": False,
    "model_type": "mt5",
    "quantization_config": {"bits": 8, "why": "two\nlines"},
    "pruned_heads": {"0": [1]},
    "tie_encoder_decoder": True,
    "dense_act_fn": "silu",
    "is_gated_act": True,
}


@pytest.mark.parametrize("key", UNSUPPORTED)
def test_a_key_that_changes_the_mathematics_is_refused(tmp_path, key):
    folder = write(tmp_path, checkpoint(), config={**asdict(TIED), key: UNSUPPORTED[key]})
    refused(folder, "config.json", key, repr(UNSUPPORTED[key]), "allowed")


@pytest.mark.parametrize("activation", t5.ACTIVATIONS)
def test_other_keys_are_ignored(activation):
    raw = {**FAMILIES["flan"], "feed_forward_proj": activation}
    raw.update(dense_act_fn="gelu_new" if activation != "relu" else "relu")
    raw.update(is_gated_act=activation != "relu", id2label={"0": "a"}, temperature=0.3, dtype="x")
    config = T5Config.from_dict(raw)
    assert config == T5Config(**ODD, feed_forward_proj=activation, tie_word_embeddings=False)
    assert T5Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


MALFORMED = ["", "{", "[]", "3", '"x"', "null", "\xff", "[" * 100_000, '{"d_model": "24"}']
MALFORMED += ['{"d_model": 2.5}', '{"d_model": true}', '{"d_model": 0}', '{"vocab_size": -1}']
MALFORMED += ['{"eos_token_id": [1]}', '{"tie_word_embeddings": "no"}', '{"feed_forward_proj": []}']
MALFORMED += ['{"layer_norm_epsilon": "small"}', '{"dropout_rate": 2.0}']


@pytest.mark.parametrize("text", MALFORMED, ids=range(len(MALFORMED)))
def test_a_malformed_config_is_refused(tmp_path, text):
    write(tmp_path, checkpoint())
    (tmp_path / "config.json").write_bytes(text.encode("latin1"))
    refused(tmp_path, "config.json")


def test_a_folder_without_config_or_weights_is_refused(tmp_path):
    write(tmp_path, checkpoint())
    (tmp_path / "model.safetensors").unlink()
    refused(tmp_path, "no weights", "model.safetensors", "pytorch_model.bin")
    (tmp_path / "config.json").unlink()
    refused(tmp_path, "no config.json")
    refused(tmp_path / "nowhere", "no config.json")


# ------------------------------------------------------------------------------------ weights

FORMS = ["safetensors", "sharded safetensors", "bin", "sharded bin", "legacy", "sharded legacy"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("config", [TIED, UNTIED], ids=["tied", "untied"])
def test_every_form_of_checkpoint_loads_bit_for_bit(tmp_path, form, config):
    tensors = checkpoint(config)
    model = T5.from_pretrained(write(tmp_path / "in", tensors, form, asdict(config)))
    assert not model.training and all(p.requires_grad for p in model.parameters())
    model.save_pretrained(tmp_path / "out")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"config.json", "model.safetensors"}
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert {name: tuple(t.shape) for name, t in saved.items()} == layout(config)
    assert all(torch.equal(saved[name], tensors[name]) for name in tensors)


def test_half_precision_checkpoints_load_as_float32(tmp_path):
    for dtype in (torch.bfloat16, torch.float16):
        tensors = {name: t.to(dtype) for name, t in checkpoint().items()}
        model = T5.from_pretrained(write(tmp_path, tensors))
        assert model.embedding.weight.dtype == torch.float32
        assert torch.equal(model.embedding.weight, tensors[SHARED].float())


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_known_aliases_and_the_unused_bias_are_accepted(tmp_path, form):
    tensors = {**checkpoint(), OLD: torch.randn(17, 3)}
    shared = tensors[SHARED]
    aliases = {name: shared.clone() for name in (*COPIES, "lm_head.weight")}
    expected = T5.from_pretrained(write(tmp_path, tensors)).state_dict()
    without = {name: t for name, t in tensors.items() if name != SHARED}
    for given in ({**tensors, **aliases}, *({**without, name: t} for name, t in aliases.items())):
        loaded = T5.from_pretrained(write(tmp_path / "alias", given, form)).state_dict()
        assert loaded.keys() == expected.keys()
        assert all(torch.equal(loaded[name], expected[name]) for name in expected)
    for name in COPIES:
        bad = {**tensors, **aliases, name: shared + 1}
        refused(write(tmp_path / "alias", bad, form), name, "differs", SHARED)


@pytest.mark.parametrize("form", FORMS)
def test_missing_and_left_over_tensors_are_both_listed(tmp_path, form):
    tensors = checkpoint()
    lost = "decoder.block.2.layer.1.EncDecAttention.q.weight"
    del tensors[lost]
    refused(write(tmp_path, tensors, form), f"missing 1 ({lost})", "left over nothing")
    tensors["encoder.block.0.extra.weight"] = torch.ones(2)
    extra = "left over 1 (encoder.block.0.extra.weight)"
    refused(write(tmp_path, tensors, form), f"missing 1 ({lost})", extra)
    tensors = {**checkpoint(), "encoder.block.0.extra.weight": torch.ones(2)}
    refused(write(tmp_path, tensors, form), "missing nothing", extra)


def test_a_wrong_shape_or_type_is_refused(tmp_path):
    name = "encoder.block.1.layer.0.SelfAttention.q.weight"  # (15, 24)
    for wrong in (torch.ones(24, 15), torch.ones(15), torch.ones(15, 24, dtype=torch.int64)):
        folder = write(tmp_path, {**checkpoint(), name: wrong})
        refused(folder, name, "(15, 24)", str(tuple(wrong.shape)), str(wrong.dtype))
    refused(write(tmp_path, checkpoint(UNTIED)), "missing", "wi.weight", "left over", "wi_0.weight")


@pytest.mark.parametrize("form", ["safetensors", "bin", "legacy"])
def test_truncated_and_corrupt_files_are_refused(tmp_path, form):
    path = write(tmp_path, checkpoint(), form) / ("model.safetensors" if form[0] == "s" else "pytorch_model.bin")
    good, dice = path.read_bytes(), random.Random(0)
    header = 2000 if form != "bin" else len(good)
    cuts = [0, 1, 3, 8, 100, len(good) // 2, len(good) - 1, *dice.sample(range(len(good)), 20)]
    for cut in cuts:
        path.write_bytes(good[:cut])
        refused(tmp_path, path.name)
    path.write_bytes(dice.randbytes(5000))
    refused(tmp_path, path.name)
    for _ in range(60):  # a damaged byte may fall on a number, where nobody can tell
        at = dice.randrange(header)
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
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Evil()))
    refused(tmp_path, "pytorch_model.bin")
    assert not (tmp_path / "ran").exists()
    pickle.loads(pickle.dumps(Evil()))  # it would have
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [[1, 2], {"model": {"a": torch.ones(1)}}, {1: torch.ones(1)}])
def test_a_file_that_holds_no_tensors_by_name_is_refused(tmp_path, content):
    write(tmp_path, checkpoint(), "bin")
    torch.save(content, tmp_path / "pytorch_model.bin")
    refused(tmp_path, "pytorch_model.bin")


@pytest.mark.parametrize("form", ["sharded safetensors", "sharded bin"])
def test_a_damaged_index_is_refused(tmp_path, form):
    index = next(write(tmp_path, checkpoint(), form).glob("*.index.json"))
    good = index.read_text()
    damaged = ["", "{}", "[]", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "[" * 100_000]
    damaged += ['{"weight_map": {"a": null}}', '{"weight_map": {"a": []}}', good[:-9]]
    for text in damaged:
        index.write_text(text)
        refused(tmp_path, index.name)
    index.write_text('{"weight_map": {}}')
    refused(tmp_path, "missing", SHARED)
    index.write_text(good)
    lost = next(tmp_path.glob("*-00002-of-00003.*"))
    lost.unlink()
    refused(tmp_path, lost.name, "missing")


def test_save_pretrained_shards_above_the_limit_and_leaves_nothing_stale(tmp_path, monkeypatch):
    model = fresh(UNTIED)
    bits = {t5.hf_name(name): p.detach() for name, p in model.named_parameters()}
    total = sum(t.nbytes for t in bits.values())
    (tmp_path / "spiece.model").write_text("kept")
    for limit in (total, 9000, 20000, total - 1, total):  # single, many, fewer, two, single again
        monkeypatch.setattr(t5, "MAX_SHARD_BYTES", limit)
        model.save_pretrained(tmp_path)
        names = {p.name for p in tmp_path.iterdir()} - {"config.json", "spiece.model"}
        if limit == total:
            assert names == {"model.safetensors"}
        else:
            index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
            shards = set(index["weight_map"].values())
            assert names == shards | {"model.safetensors.index.json"} and len(shards) > 1
            assert index["metadata"]["total_size"] == total
            for shard in shards:
                held = load_file(tmp_path / shard)
                assert all(index["weight_map"][name] == shard for name in held)
                assert len(held) == 1 or sum(t.nbytes for t in held.values()) <= limit
        again = T5.from_pretrained(tmp_path)
        assert again.config == model.config
        assert all(torch.equal(p, bits[t5.hf_name(n)]) for n, p in again.named_parameters())
    assert (tmp_path / "spiece.model").read_text() == "kept"


@pytest.mark.parametrize("limit", [t5.MAX_SHARD_BYTES, 20000])
def test_a_save_that_fails_leaves_the_old_weights(tmp_path, monkeypatch, limit):
    old, new = T5(TIED), fresh(TIED)
    monkeypatch.setattr(t5, "MAX_SHARD_BYTES", limit)
    old.save_pretrained(tmp_path)
    last = sorted(tmp_path.glob("*.safetensors"))[-1].name

    def full(tensors: dict, path: Path, **options) -> None:
        Path(path).write_bytes(b"half a file")
        if last in str(path):
            raise OSError(28, "No space left on device")
        save_file(tensors, path, **options)

    monkeypatch.setattr(t5, "save_file", full)
    with pytest.raises(OSError, match="No space"):
        new.save_pretrained(tmp_path)
    again = T5.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in old.state_dict().items())
