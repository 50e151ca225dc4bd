"""T5, an encoder-decoder Transformer, from scratch: T5 1.0, T5 v1.1 and Flan-T5.

This file owns the architecture, greedy decoding, and weights in and out in Hugging Face's
layout. Ids in, logits out: it knows nothing of text, tasks, losses or ranks.

What sets T5 apart from the Transformer of Vaswani et al. (2017), after Raffel et al. (2020,
https://arxiv.org/abs/1910.10683, Section 2.1):
  - norms only scale (RMSNorm), stand before each sublayer, and once more after each stack;
  - positions enter as one learned bias per head and distance bucket, added to the attention
    scores, shared by all blocks of a stack; there are no position embeddings;
  - scores are not divided by sqrt(d_kv): the initialisation of q takes care of that;
  - linear layers have no bias vectors.
v1.1 (and Flan-T5, which has its shapes) uses a gated GELU, a head of its own, and does not
scale the logits: https://github.com/google-research/text-to-text-transfer-transformer
/blob/main/released_checkpoints.md. The three are independent settings here.

Shapes: B rows, S source length, T target length, D d_model, H heads, K d_kv, F d_ff, V vocabulary.
Numbers: weights, norms and the residual stream are float32. Under autocast (or FSDP's mixed
precision) what stands between a norm and the stream, matrix products and attention, runs in
bfloat16: its "compute dtype". Softmax is computed in float32 inside the attention kernel.
"""

from __future__ import annotations  # fields' types as text

import functools
import hashlib
import json
import math
import os
import re
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from itertools import zip_longest
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

Cache = tuple[Tensor, ...]  # of a decoder block: see `DecoderBlock.start_cache`
MASKED = -1e9  # finite, in bfloat16 too: a fully masked row must not become NaN
MAX_SHARD_BYTES = 2_000_000_000  # of a saved file; a model of several processes is put together so
INDEX = "model.safetensors.index.json"  # of several files
MAX_OLD_BIN_BYTES = 5_000_000_000  # a .bin that cannot be memory-mapped is read whole up to here

# The published v1.1 checkpoints, and a tiny one for the bundled task.
PRESETS: dict[str, dict] = {
    "tiny": dict(d_model=128, d_kv=32, d_ff=256, num_layers=2, num_heads=4),
    "small": dict(d_model=512, d_kv=64, d_ff=1024, num_layers=8, num_heads=6),
    "base": dict(d_model=768, d_kv=64, d_ff=2048, num_layers=12, num_heads=12),
    "large": dict(d_model=1024, d_kv=64, d_ff=2816, num_layers=24, num_heads=16),
    "xl": dict(d_model=2048, d_kv=64, d_ff=5120, num_layers=24, num_heads=32),
    "xxl": dict(d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64),
}

# ---------------------------------------------------------------------------- configuration

# What else `transformers` may find in a T5 config.json and compute differently for: the one
# value that is implemented here. Any other key it writes does not touch the mathematics.
ONLY: dict[str, tuple] = {
    "model_type": ("t5",),
    "is_encoder_decoder": (True,),
    "is_decoder": (False,),
    "tie_encoder_decoder": (False,),
    "quantization_config": (None,),
    "pruned_heads": (None, {}),
}
ACTIVATIONS = {"relu": ("relu", False), "gated-gelu": ("gelu_new", True)}
SYNONYMS = {  # transformers' attribute_map
    "hidden_size": "d_model",
    "num_attention_heads": "num_heads",
    "num_hidden_layers": "num_layers",
    "head_dim": "d_kv",
}


@dataclass
class T5Config:
    """The keys of Hugging Face's `config.json` that change the mathematics, with its defaults."""

    vocab_size: int = 32128
    d_model: int = 512
    d_kv: int = 64
    d_ff: int = 2048
    num_layers: int = 6
    num_decoder_layers: int | None = None  # None: as many as num_layers
    num_heads: int = 8
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    dropout_rate: float = 0.1
    layer_norm_epsilon: float = 1e-6
    initializer_factor: float = 1.0
    feed_forward_proj: str = "relu"
    tie_word_embeddings: bool = True
    scale_decoder_outputs: bool | None = None  # None: scaled where tie_word_embeddings is true
    pad_token_id: int = 0
    eos_token_id: int = 1
    decoder_start_token_id: int = 0

    def __post_init__(self) -> None:
        if self.num_decoder_layers is None:
            self.num_decoder_layers = self.num_layers
        if self.scale_decoder_outputs is None:
            self.scale_decoder_outputs = self.tie_word_embeddings
        for field in fields(self):
            value, least = getattr(self, field.name), 0 if field.name.endswith("_id") else 1
            wanted = {"int": (int,), "float": (int, float), "bool": (bool,), "str": (str,)}
            if type(value) not in wanted[field.type.split(" ")[0]]:
                raise ValueError(f"{field.name} {value!r} in the config must be {field.type}")
            if type(value) is int and value < least:
                raise ValueError(f"{field.name} {value} in the config must be at least {least}")
        if self.feed_forward_proj not in ACTIVATIONS:
            what = f"feed_forward_proj {self.feed_forward_proj!r}"
            raise ValueError(f"{what} is not implemented; allowed: {', '.join(ACTIVATIONS)}")

    @classmethod
    def preset(cls, size: str, **changes) -> T5Config:
        """The v1.1 shape named `size` (a key of PRESETS), with `changes` to single fields."""
        v11 = dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False)
        return cls(**{**v11, **PRESETS[size], **changes})

    @classmethod
    def from_dict(cls, raw: dict) -> T5Config:
        """From a parsed `config.json`.

        Raises ValueError for a key that would change the mathematics and is not implemented;
        the dozens of others that `transformers` writes are passed over.
        """
        raw = {SYNONYMS.get(key, key): value for key, value in raw.items()}
        config = cls(**{f.name: raw[f.name] for f in fields(cls) if raw.get(f.name) is not None})
        act, gated = ACTIVATIONS[config.feed_forward_proj]
        for key, allowed in {**ONLY, "dense_act_fn": (act,), "is_gated_act": (gated,)}.items():
            if key in raw and raw[key] not in allowed:
                what = f"{key} {raw[key]!r} in the config"
                raise ValueError(f"{what} is not implemented; allowed: {allowed[0]!r}")
        return config

    def to_dict(self) -> dict:
        """What `save_pretrained` writes: the fields above and what `transformers` asks for."""
        return {
            "architectures": ["T5ForConditionalGeneration"],
            "model_type": "t5",
            "is_encoder_decoder": True,
            "dtype": "float32",
            **asdict(self),
        }


# ----------------------------------------------------------------------------- architecture


def compute_dtype(weight: Tensor) -> torch.dtype:
    """The dtype of a product with this weight: autocast's where that is on, else the weight's."""
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis. (..., D) -> (..., D)

    Computed in float32 and cast once, so that the two or three layers that read the result share
    one copy of it, in the dtype in which they multiply.
    """

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        normed = F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps)
        return normed.to(compute_dtype(self.weight))


Linear = functools.partial(nn.Linear, bias=False)


class RelativeBias(nn.Embedding):
    """One learned number per head and distance bucket, added to attention scores."""

    def __init__(self, config: T5Config, bidirectional: bool):
        super().__init__(config.relative_attention_num_buckets, config.num_heads)
        self.max_distance = config.relative_attention_max_distance
        self.bidirectional = bidirectional

    def bucket(self, distance: Tensor) -> Tensor:
        """Key position minus query position -> bucket, both integer tensors of one shape.

        Short distances have a bucket each. Longer ones share buckets that widen logarithmically
        up to max_distance. An encoder tells past from future; a decoder sees the past alone.
        https://github.com/tensorflow/mesh/blob/0cb87fe07da627bf0b7e60475d59f95ed6b5be3d/mesh_tensorflow/transformer/transformer_layers.py#L593
        """
        buckets, offset = self.num_embeddings, 0
        if self.bidirectional:
            buckets //= 2
            offset = (distance > 0).long() * buckets
            distance = distance.abs()
        else:
            distance = (-distance).clamp(min=0)
        exact = buckets // 2
        log_share = torch.log(distance.float() / exact) / math.log(self.max_distance / exact)
        far = exact + (log_share.clamp(min=0) * (buckets - exact)).long()  # cut, then add
        return offset + torch.where(distance < exact, distance, far.clamp(max=buckets - 1))

    def forward(self, length: int) -> Tensor:
        """(H, length, length), float32: heads, queries, keys.

        Only the 2 length - 1 distances are looked up; query i reads a window of them.
        """
        distance = torch.arange(1 - length, length, device=self.weight.device)
        values = super().forward(self.bucket(distance)).float()  # (2 length - 1, H)
        windows = values.t().contiguous().unfold(1, length, 1)  # a view: window w starts at w
        return windows.flip(1)  # query i starts at distance -i, in window length - 1 - i


class Attention(nn.Module):
    """Multi-head attention over given keys and values; H * K need not equal D."""

    def __init__(self, config: T5Config):
        super().__init__()
        inner = config.num_heads * config.d_kv
        self.heads = config.num_heads
        self.q = Linear(config.d_model, inner)
        self.k = Linear(config.d_model, inner)
        self.v = Linear(config.d_model, inner)
        self.o = Linear(inner, config.d_model)
        self.dropout = nn.Dropout(config.dropout_rate)

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, S, H*K) -> (B, H, S, K)

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, S, D) -> two of (B, H, S, K)"""
        return self.split(self.k(x)), self.split(self.v(x))

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        """x (B, T, D), keys and values (B, H, S, K), bias broadcast to (B, H, T, S) -> (B, T, D)"""
        dropout = self.dropout.p if self.training else 0.0
        mixed = F.scaled_dot_product_attention(
            self.split(self.q(x)), keys, values, attn_mask=bias, dropout_p=dropout, scale=1.0
        )  # (B, H, T, K)
        return self.o(mixed.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """T5 1.0: two layers with a ReLU between. (..., D) -> (..., F) -> (..., D)"""

    def __init__(self, config: T5Config):
        super().__init__()
        self.wi = Linear(config.d_model, config.d_ff)
        self.wo = Linear(config.d_ff, config.d_model)
        self.dropout = nn.Dropout(config.dropout_rate)

    def forward(self, x: Tensor) -> Tensor:
        return self.wo(self.dropout(F.relu(self.wi(x))))


class GatedFeedForward(nn.Module):
    """v1.1: GELU(x wi_0) * (x wi_1), then wo (Shazeer, 2020, https://arxiv.org/abs/2002.05202)."""

    def __init__(self, config: T5Config):
        super().__init__()
        self.wi_0 = Linear(config.d_model, config.d_ff)
        self.wi_1 = Linear(config.d_model, config.d_ff)
        self.wo = Linear(config.d_ff, config.d_model)
        self.dropout = nn.Dropout(config.dropout_rate)

    def forward(self, x: Tensor) -> Tensor:
        gate = F.gelu(self.wi_0(x), approximate="tanh")
        return self.wo(self.dropout(gate * self.wi_1(x)))


def feed_forward(config: T5Config) -> nn.Module:
    """The one that `feed_forward_proj` names."""
    return (GatedFeedForward if config.feed_forward_proj == "gated-gelu" else FeedForward)(config)


class EncoderBlock(nn.Module):
    """Self-attention, then feed-forward, each on a normed copy added back to the stream."""

    def __init__(self, config: T5Config):
        super().__init__()
        self.attention_norm = RMSNorm(config.d_model, config.layer_norm_epsilon)
        self.attention = Attention(config)
        self.ff_norm = RMSNorm(config.d_model, config.layer_norm_epsilon)
        self.ff = feed_forward(config)
        self.dropout = nn.Dropout(config.dropout_rate)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """x (B, S, D) float32, bias (B, H, S, S) -> (B, S, D) float32"""
        h = self.attention_norm(x)
        keys, values = self.attention.keys_values(h)
        x = x + self.dropout(self.attention(h, keys, values, bias))
        return x + self.dropout(self.ff(self.ff_norm(x)))


class DecoderBlock(nn.Module):
    """Causal self-attention, attention over the encoder's output, feed-forward."""

    def __init__(self, config: T5Config):
        super().__init__()
        self.attention_norm = RMSNorm(config.d_model, config.layer_norm_epsilon)
        self.attention = Attention(config)
        self.cross_norm = RMSNorm(config.d_model, config.layer_norm_epsilon)
        self.cross = Attention(config)
        self.ff_norm = RMSNorm(config.d_model, config.layer_norm_epsilon)
        self.ff = feed_forward(config)
        self.dropout = nn.Dropout(config.dropout_rate)

    def forward(
        self, x: Tensor, memory: Tensor, bias: Tensor, mask: Tensor, cache: Cache | None = None
    ) -> Tensor:
        """x (B, T, D) float32, the encoder's output (B, S, D), causal bias (1, H, T, T), padding
        mask (B, 1, 1, S) -> (B, T, D) float32.

        With a cache (`start_cache`), x is one new token of each row, (B, 1, D), and bias that
        token's row, (1, H, 1, tokens so far).
        """
        h = self.attention_norm(x)
        keys, values = self.attention.keys_values(h)
        if cache is not None:
            n = bias.shape[-1]  # tokens so far, with this one
            for past, new in zip(cache[:2], (keys, values)):
                past[:, :, n - 1 : n] = new
            keys, values = cache[0][:, :, :n], cache[1][:, :, :n]
        x = x + self.dropout(self.attention(h, keys, values, bias))
        keys, values = self.cross.keys_values(memory) if cache is None else cache[2:]
        x = x + self.dropout(self.cross(self.cross_norm(x), keys, values, mask))
        return x + self.dropout(self.ff(self.ff_norm(x)))

    def start_cache(self, memory: Tensor, length: int) -> Cache:
        """For generation: room for the keys and values of `length` tokens, 2 x (B, H, length, K),
        and the keys and values of the encoder's output, 2 x (B, H, S, K)."""
        keys, values = self.cross.keys_values(memory)
        room = (*keys.shape[:2], length, keys.shape[3])
        return keys.new_empty(room), keys.new_empty(room), keys, values


class Stack(nn.Module):
    """The blocks of the encoder or of the decoder with their shared bias and final norm."""

    def __init__(self, config: T5Config, block: type[nn.Module], depth: int, bidirectional: bool):
        super().__init__()
        self.bias = RelativeBias(config, bidirectional)
        self.blocks = nn.ModuleList(block(config) for _ in range(depth))
        self.norm = RMSNorm(config.d_model, config.layer_norm_epsilon)

    def score_bias(self, length: int, mask: Tensor) -> Tensor:
        """What every block adds to its scores: relative bias plus mask, in the mask's dtype and
        contiguous, as CUDA's attention kernels want it. (..., length or 1, length) -> (B or 1, H,
        length, length)"""
        return (self.bias(length).to(mask.dtype) + mask).contiguous()


class T5(nn.Module):
    """The encoder-decoder.

    A fork's own student needs `forward`, `generate`, `from_pretrained`, `save_pretrained` and
    `blocks`. It may have `untrained_config` (for `--weights random` and `--plan`); `read_config`
    and `load_weights`, to be sharded before its weights are read; and `load_tokenizer`.
    """

    usage = "`transformers`' AutoTokenizer and AutoModelForSeq2SeqLM"  # for the model card

    def __init__(self, config: T5Config):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.encoder = Stack(config, EncoderBlock, config.num_layers, bidirectional=True)
        self.decoder = Stack(config, DecoderBlock, config.num_decoder_layers, bidirectional=False)
        self.head = None  # tied: the embedding's matrix is used
        if not config.tie_word_embeddings:
            self.head = Linear(config.d_model, config.vocab_size)
        self.dropout = nn.Dropout(config.dropout_rate)
        if not self.embedding.weight.is_meta:  # else the weights come later
            self.init_weights(torch.initial_seed())

    def init_weights(self, seed: int) -> None:
        """T5's initialisation: unscaled scores and logits start out with a variance of about 1.

        Each parameter has a random stream of its own, seeded by (seed, name) and drawn on the CPU,
        so the weights are the same on any device and with any number of processes. A process keeps
        its shard of each parameter, and holds one whole parameter at a time.
        https://github.com/huggingface/transformers/blob/v4.28.1/src/transformers/models/t5/modeling_t5.py
        (its untied head, drawn with std 1, starts with logits sqrt(D) too wide; ours has D^-0.5)
        """
        c = self.config
        std = {
            "embedding": 1.0,
            "head": 1.0 if c.scale_decoder_outputs else c.d_model**-0.5,
            "q": (c.d_model * c.d_kv) ** -0.5,
            "o": (c.num_heads * c.d_kv) ** -0.5,
            "wo": c.d_ff**-0.5,
        }  # all others (k, v, wi, wi_0, wi_1, bias): D^-0.5
        for name, parameter in self.named_parameters():
            layer = name.split(".")[-2]
            drawn = torch.ones(parameter.shape, device="cpu")
            if not layer.endswith("norm"):
                stream = hashlib.sha256(f"{seed} {name}".encode()).digest()
                generator = torch.Generator().manual_seed(int.from_bytes(stream[:8], "big"))
                scale = c.initializer_factor * std.get(layer, c.d_model**-0.5)
                nn.init.normal_(drawn, std=scale, generator=generator)
            fill(parameter, drawn)

    @property
    def blocks(self) -> list[nn.Module]:
        """The repeated parts, in order: what is sharded, recomputed or compiled one by one."""
        return [*self.encoder.blocks, *self.decoder.blocks]

    def encode(self, x: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Embedded sources (B, S, D), their mask (B, S) -> the encoder's output (B, S, D) and the
        additive mask (B, 1, 1, S), both in the compute dtype."""
        mask = attention_mask[:, None, None, :].to(compute_dtype(self.encoder.norm.weight))
        mask = (1.0 - mask) * MASKED
        bias = self.encoder.score_bias(x.shape[1], mask)
        x = self.dropout(x)
        for block in self.encoder.blocks:
            x = block(x, bias)
        return self.dropout(self.encoder.norm(x)), mask

    def decode(self, x: Tensor, *rest: Tensor, caches: Sequence = ()) -> Tensor:
        """Embedded inputs (B, T, D); memory, bias and mask as DecoderBlock -> logits (B, T, V)"""
        x = self.dropout(x)
        for block, cache in zip_longest(self.decoder.blocks, caches):
            x = block(x, *rest, cache)
        x = self.dropout(self.decoder.norm(x))
        if self.config.scale_decoder_outputs:
            x = x * self.config.d_model**-0.5
        return F.linear(x, self.embedding.weight) if self.head is None else self.head(x)

    def causal_bias(self, length: int, dtype: torch.dtype) -> Tensor:
        """(1, H, length, length): the decoder's bias, MASKED where a key is in the future."""
        device = self.decoder.bias.weight.device
        future = torch.full((1, 1, length, length), MASKED, dtype=dtype, device=device).triu(1)
        return self.decoder.score_bias(length, future)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, decoder_input_ids: Tensor
    ) -> Tensor:
        """Logits (B, T, V) for source ids (B, S), their mask (B, S; 1 token, 0 padding) and
        decoder inputs (B, T), all integer tensors."""
        lengths = input_ids.shape[1], decoder_input_ids.shape[1]
        ids = torch.cat([input_ids, decoder_input_ids], dim=1)
        # One lookup for both: the embedding's gradient, (V, D), need not exist twice.
        x, y = self.embedding(ids).float().split(lengths, dim=1)
        memory, mask = self.encode(x, attention_mask)
        return self.decode(y, memory, self.causal_bias(lengths[1], mask.dtype), mask)

    @torch.no_grad()
    def generate(
        self, input_ids: Tensor, attention_mask: Tensor, max_new_tokens: int = 64
    ) -> Tensor:
        """Greedy decoding: (B, S), (B, S) -> (B, at most max_new_tokens) int64, without the start
        token, PAD after a row's EOS; it stops when every row has ended. Call `eval()` before."""
        c = self.config
        memory, mask = self.encode(self.embedding(input_ids).float(), attention_mask)
        room = -(-max_new_tokens // 8) * 8  # rows of the bias are aligned for CUDA's kernels
        bias = self.causal_bias(room, mask.dtype)
        caches = [block.start_cache(memory, room) for block in self.decoder.blocks]
        tokens = input_ids.new_full((len(input_ids), max_new_tokens), c.pad_token_id)
        token = torch.full_like(input_ids[:, :1], c.decoder_start_token_id)  # (B, 1)
        ended = torch.zeros_like(token, dtype=torch.bool)
        for t in range(max_new_tokens):
            now = bias[:, :, t : t + 1, : t + 1]
            logits = self.decode(self.embedding(token).float(), memory, now, mask, caches=caches)
            token = logits.argmax(-1).masked_fill(ended, c.pad_token_id)
            tokens[:, t : t + 1] = token
            ended = ended | (token == c.eos_token_id)
            if ended.all():  # the one value of a token that the host waits for
                return tokens[:, : t + 1]
        return tokens

    @classmethod
    def untrained_config(cls, size: str, vocab_size: int) -> T5Config:
        """The config of `--weights random`: the shape `size` (a key of PRESETS), with room for
        `vocab_size` tokens, rounded up to a multiple of 64 for the hardware."""
        return T5Config.preset(size, vocab_size=-(-vocab_size // 64) * 64)

    @classmethod
    def read_config(cls, folder: str | os.PathLike) -> T5Config:
        """The config of a Hugging Face folder with weights. ValueError where it is missing,
        malformed or not implemented."""
        path = Path(folder, "config.json")
        try:
            refuse_stand_in(path)
            config = T5Config.from_dict(json.loads(path.read_bytes()))
        except FileNotFoundError:
            raise ValueError(
                f"{folder} has no config.json: give a folder in Hugging Face's layout"
            ) from None
        except (OSError, ValueError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path}: {error}") from None
        # transformers >= 5 writes tie_word_embeddings = true whatever is true: ask the tensors.
        if config.tie_word_embeddings:
            tensors = read_checkpoint(Path(folder))
            head, embedding = tensors.get("lm_head.weight"), tensors.get("shared.weight")
            if head is not None and embedding is not None:
                config.tie_word_embeddings = equal(head, embedding)
        return config

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike) -> T5:
        """A model in `eval()` mode, float32, on the CPU, from a Hugging Face folder: `config.json`
        and `model.safetensors` or `pytorch_model.bin`, each single or sharded with an index.

        Raises ValueError, in one line, for a folder or file that is missing or damaged, an
        unsupported config, a wrong shape, and for tensors that are missing or left over.
        """
        with torch.device("meta"):
            model = cls(cls.read_config(folder))
        model.to_empty(device="cpu").load_weights(folder)
        return model.eval()

    @torch.no_grad()
    def load_weights(self, folder: str | os.PathLike) -> None:
        """Copies a folder's weights into the parameters; ValueError as in `from_pretrained`.

        The files are memory-mapped: where FSDP has sharded the model, each process reads its own
        shards from the disk and no process holds the whole.
        """
        tensors = match_names(self, read_checkpoint(Path(folder)), folder)
        for name, parameter in self.named_parameters():
            fill(parameter, tensors[hf_name(name)])

    def save_pretrained(self, folder: str | os.PathLike, write: bool = True) -> None:
        """Writes `config.json` and `model.safetensors` (above 2 GB several, with an index) in
        Hugging Face's layout, float32. Each file is complete before it gets its name.

        Where FSDP has sharded the model, all processes call this to gather its parameters, at most
        2 GB at a time; `write` is true in the one that writes, and the others keep nothing.
        """
        folder = Path(folder)
        parameters = {hf_name(name): p.detach() for name, p in self.named_parameters()}
        shards = split_into_shards(parameters)
        if write:
            folder.mkdir(parents=True, exist_ok=True)
        for file, names in shards.items():
            tensors = {}
            for name in names:
                p = parameters[name]
                p = p.full_tensor() if hasattr(p, "full_tensor") else p  # of all processes' shards
                if write:
                    tensors[name] = p.float().cpu().contiguous()
            if write:  # `transformers` asks for the format
                save_file(tensors, folder / f"{file}.tmp", metadata={"format": "pt"})
        if not write:
            return
        for file in shards:
            put_in_place(folder / file)
        current = {*shards}
        if len(shards) > 1:
            current.add(INDEX)
            weight_map = {name: file for file, names in shards.items() for name in names}
            size = sum(4 * p.numel() for p in parameters.values())
            index = {"metadata": {"total_size": size}, "weight_map": weight_map}
            write_json(folder / INDEX, index)
        # Last, when nothing needs them any more: the files of an earlier save.
        for old in ("model.safetensors", INDEX, *folder.glob("model-*-of-*.safetensors")):
            if Path(old).name not in current:
                Path(folder, old).unlink(missing_ok=True)
        write_json(folder / "config.json", self.config.to_dict())


def shift_right(labels: Tensor, start: int = 0, pad: int = 0) -> Tensor:
    """Decoder inputs for teacher forcing: (B, T) labels, -100 where there is none -> (B, T) ids
    that begin with the start token, lag by one, and hold PAD for -100."""
    shifted = labels.new_full(labels.shape, start)
    shifted[:, 1:] = labels[:, :-1]
    return shifted.masked_fill(shifted == -100, pad)


# --------------------------------------------------------------------- weights, in and out

# Ours and Hugging Face's names, at a name's start: the groups stand for the stack and the block.
BLOCK = r"(\w+)\.blocks\.(\d+)\."
RENAMES = {
    r"embedding\.": r"shared.",
    r"head\.": r"lm_head.",
    r"(\w+)\.bias\.": r"\1.block.0.layer.0.SelfAttention.relative_attention_bias.",
    r"(\w+)\.norm\.": r"\1.final_layer_norm.",
    BLOCK + r"attention\.": r"\1.block.\2.layer.0.SelfAttention.",
    BLOCK + r"attention_norm\.": r"\1.block.\2.layer.0.layer_norm.",
    BLOCK + r"cross\.": r"\1.block.\2.layer.1.EncDecAttention.",
    BLOCK + r"cross_norm\.": r"\1.block.\2.layer.1.layer_norm.",
    r"(encoder)\.blocks\.(\d+)\.ff\.": r"\1.block.\2.layer.1.DenseReluDense.",
    r"(encoder)\.blocks\.(\d+)\.ff_norm\.": r"\1.block.\2.layer.1.layer_norm.",
    r"(decoder)\.blocks\.(\d+)\.ff\.": r"\1.block.\2.layer.2.DenseReluDense.",
    r"(decoder)\.blocks\.(\d+)\.ff_norm\.": r"\1.block.\2.layer.2.layer_norm.",
}
# Other names under which checkpoints repeat "shared.weight" (the head where it is tied), and what
# old ones hold that is never used.
REPEATS = {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"}
IGNORED = {"decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"}


def hf_name(name: str) -> str:
    """A parameter's name in Hugging Face's layout: "decoder.blocks.3.cross.q.weight" ->
    "decoder.block.3.layer.1.EncDecAttention.q.weight"."""
    for ours, theirs in RENAMES.items():
        if match := re.match(ours, name):
            return match.expand(theirs) + name[match.end() :]
    raise AssertionError(f"no Hugging Face name for {name}: RENAMES lacks it")


def read_checkpoint(folder: Path) -> dict[str, Tensor]:
    """Hugging Face name -> memory-mapped tensor, for all that is in the folder's weight files.
    ValueError for a file that is missing, damaged or cannot be mapped."""
    tensors: dict[str, Tensor] = {}
    for path in weight_files(folder):
        refuse_stand_in(path)
        if not path.exists():
            raise ValueError(f"{path} is missing, though the index names it")
        # Only a .bin in the format of torch 1.6 and later, a zip, can be memory-mapped.
        mapped = path.suffix == ".safetensors" or zipfile.is_zipfile(path)
        if not mapped and path.stat().st_size > MAX_OLD_BIN_BYTES:
            raise ValueError(
                f"{path} is in torch's format before 1.6, which every process would read whole; "
                f"save it again once, with {path.stat().st_size / 1e9:.1f} GB of free host memory: "
                f"""`python -c "import os, torch; p = '{path}'; """
                "torch.save(torch.load(p, weights_only=True), p + '.new'); "
                "os.replace(p + '.new', p)\"`"
            )
        try:
            if path.suffix == ".safetensors":
                part = load_file(path)
            else:
                part = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
            if not all(isinstance(key, str) and isinstance(part[key], Tensor) for key in part):
                raise ValueError("not a mapping from names to tensors")
            tensors.update(part)
        except Exception as error:  # damaged bytes raise a dozen kinds
            reason = re.split(r"\.\s|\n", str(error))[0]  # torch goes on: turn the guard off
            raise ValueError(
                f"{path} is truncated, damaged or holds more than tensors; "
                f"fetch it again ({type(error).__name__}: {reason!r})"
            ) from None
    return tensors


def weight_files(folder: Path) -> list[Path]:
    """The file with a folder's weights, or the shards that its index names."""
    for single in ("model.safetensors", "pytorch_model.bin"):
        if os.path.lexists(folder / single):
            return [folder / single]
        index = folder / f"{single}.index.json"
        if index.exists():
            try:
                names = set(json.loads(index.read_text())["weight_map"].values())
                return [folder / Path(name).name for name in sorted(names)]
            except (ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:
                raise ValueError(f"{index} is damaged: {error!r}") from None
    raise ValueError(
        f"{folder} holds no weights: expected model.safetensors or pytorch_model.bin, "
        "or either with an .index.json and its shards"
    )


def refuse_stand_in(path: Path) -> None:
    """ValueError for a link to nothing and for a git-lfs pointer, with what fetches the file."""
    if path.is_symlink() and not path.exists():
        raise ValueError(f"{path} is a link to nothing; copy the folder with `cp -rL`, or fetch it")
    if path.is_file():
        with open(path, "rb") as file:
            if file.read(24).startswith(b"version https://git-lfs"):
                raise ValueError(f"{path} is a git-lfs pointer; fetch the file: `git lfs pull`")


def match_names(model: nn.Module, tensors: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint that are the model's parameters, by Hugging Face's names.

    Raises ValueError unless each tensor is a parameter, a repeated embedding (equal to it) or
    on the short ignore list, and each parameter is found, in its shape and as floats.
    """
    parameters = {hf_name(name): p for name, p in model.named_parameters()}
    found = {name: tensors[name] for name in parameters if name in tensors}
    repeats = sorted(REPEATS & tensors.keys() - parameters.keys())
    for name in repeats:
        found.setdefault("shared.weight", tensors[name])
    missing = sorted(parameters.keys() - found.keys())
    left_over = sorted(tensors.keys() - parameters.keys() - REPEATS - IGNORED)
    if missing or left_over:
        raise ValueError(
            f"{folder} does not fit its config.json: missing {show(missing)}; "
            f"left over {show(left_over)}"
        )
    for name, parameter in parameters.items():
        tensor, shape = found[name], tuple(parameter.shape)
        if tensor.shape != shape or not tensor.is_floating_point():
            what = f"{name} is {tensor.dtype} {tuple(tensor.shape)}"
            raise ValueError(f"{folder}: {what}, but its config.json asks for float {shape}")
    for name in repeats:
        if not equal(tensors[name], found["shared.weight"]):
            raise ValueError(f"{folder}: {name} differs from shared.weight, which it should repeat")
    return found


def equal(a: Tensor, b: Tensor) -> bool:
    """Do two tensors hold the same numbers in the same dtype?"""
    return a.dtype == b.dtype and torch.equal(a, b)


@torch.no_grad()
def fill(parameter: nn.Parameter, values: Tensor) -> None:
    """Copies the whole parameter's values into it, or this process's shard of them where FSDP made
    it a DTensor. Every process has the values: nothing is sent."""
    if hasattr(parameter, "placements"):
        from torch.distributed.tensor import distribute_tensor

        mesh, placements = parameter.device_mesh, parameter.placements
        values = distribute_tensor(values, mesh, placements, src_data_rank=None)
    parameter.copy_(values)


def split_into_shards(parameters: dict[str, Tensor]) -> dict[str, list[str]]:
    """File name -> the parameters that it holds as float32, at most MAX_SHARD_BYTES or one."""
    shards, room = [[]], MAX_SHARD_BYTES
    for name, parameter in parameters.items():
        size = 4 * parameter.numel()
        if shards[-1] and size > room:
            shards.append([])
            room = MAX_SHARD_BYTES
        shards[-1].append(name)
        room -= size
    n = len(shards)
    files = [f"model-{i:05}-of-{n:05}.safetensors" for i in range(1, n + 1)]
    return dict(zip(files if n > 1 else ["model.safetensors"], shards))


def show(names: list[str], most: int = 12) -> str:
    """Up to `most` names for an error message, and how many there are."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    listed = ", ".join(map(repr, names[:most]))
    return f"{len(names)} ({listed}{rest})" if names else "nothing"


def put_in_place(path: Path) -> None:
    """Waits until the new file PATH.tmp is on the disk and gives it its name: a reader sees the old
    file or the new one, never a part of it."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_json(path: Path, value: dict) -> None:
    """Writes a JSON file with `put_in_place`."""
    path.with_name(path.name + ".tmp").write_text(json.dumps(value, indent=2) + "\n")
    put_in_place(path)
