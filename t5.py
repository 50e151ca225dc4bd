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

Shapes: B rows, S source length, T target length, D d_model, H heads, K d_kv, F d_ff, V vocabulary;
N the tokens of a padded batch (of B*S or B*T places), which is all that most layers see.
Numbers: weights, norms, residual stream and softmax are float32; under autocast (or FSDP's
mixed precision) the matrix products, and nothing else, run in bfloat16.
"""

from __future__ import annotations  # fields' types as text

import json
import math
import mmap
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

MASKED = -1e9  # finite, in bfloat16 too: a fully masked row must not become NaN
MAX_SHARD_BYTES = 5_000_000_000
MAX_LEGACY_BYTES = 5_000_000_000
PART_BYTES, REOPEN_BYTES = 4_000_000, 16_000_000  # read at once; read before it is mapped anew

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
            value, kind = getattr(self, field.name), type(getattr(self, field.name))
            want = {"int": (int,), "float": (int, float), "bool": (bool,), "str": (str,)}
            if kind not in want[field.type.split(" ")[0]]:
                raise ValueError(f"{field.name} {value!r} in the config must be {field.type}")
            if kind is int and value < (0 if field.name.endswith("_id") else 1):
                raise ValueError(f"{field.name} {value} in the config must be positive")
        if self.feed_forward_proj not in ACTIVATIONS:
            raise ValueError(
                f"feed_forward_proj {self.feed_forward_proj!r} is not implemented; "
                f"allowed: {', '.join(ACTIVATIONS)}"
            )

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
                raise ValueError(
                    f"{key} {raw[key]!r} in the config is not implemented; allowed: {allowed[0]!r}"
                )
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


class Places:
    """Which places of a padded batch (B, S) hold tokens. Norms, linear layers and dropout treat
    each token by itself, so they run on the N tokens alone, (N, D), without the padding; attention
    needs rows, (B, S, D)."""

    def __init__(self, taken: Tensor):
        self.shape = taken.shape  # (B, S), bool
        index = taken.flatten().nonzero()[:, 0]
        self.index = index if len(index) < taken.numel() else None  # (N,); None: all of them

    def pack(self, x: Tensor) -> Tensor:
        """(B, S, ...) -> (N, ...)"""
        x = x.flatten(0, 1)
        return x if self.index is None else x.index_select(0, self.index)

    def unpack(self, x: Tensor) -> Tensor:
        """(N, D) -> (B, S, D), zero where there is no token"""
        if self.index is not None:
            padded = x.new_zeros((self.shape.numel(), x.shape[1]))
            x = padded.index_copy(0, self.index, x)
        return x.unflatten(0, self.shape)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, in float32. (..., D) -> (..., D)"""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight.float()


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T: (..., in), (out, in) -> (..., out).

    To predict, a CPU has two faster ways: oneDNN, whose tensors have a layout of their own, where
    the product is large enough to repay the copies; and for the few rows of a decoding step
    weights first.
    """
    if x.dim() == 2 and x.device.type == "cpu" and not torch.is_grad_enabled():
        if len(x) * weight.numel() >= 2**23 and one_dnn(x, weight):
            return F.linear(x.to_mkldnn(), weight).to_dense()
        if len(x) <= 64:
            return (weight @ x.t()).t()
    return F.linear(x, weight)


def one_dnn(x: Tensor, weight: Tensor) -> bool:
    """Can oneDNN multiply them, and does it pay? Not for narrow weights, not under bf16, nor for
    tensors without contents, as in a plan."""
    float32 = x.dtype == weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    wide = weight.shape[1] > 256
    return wide and float32 and type(x) is Tensor and torch.backends.mkldnn.is_available()


class Linear(nn.Linear):
    """Without a bias vector. (..., in) -> (..., out)"""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)


class Dropout(nn.Dropout):
    """Zeroes with probability p, scales the others by 1 / (1 - p), in training. (...) -> (...)

    On a CPU drawing the numbers is what takes the time, so four of 16 bits come from one draw;
    and the backward pass keeps a byte for each, not a float.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0 or x.device.type != "cpu":
            return super().forward(x)
        dropped = min(round(self.p * 2**16), 2**16 - 1)  # of 2^16 equally likely numbers
        draws = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
        zero = draws.view(torch.int16)[: x.numel()].view(x.shape) < dropped - 2**15
        return (x * (2**16 / (2**16 - dropped))).masked_fill(zero, 0.0)


class RelativeBias(nn.Embedding):
    """One learned number per head and distance bucket, added to attention scores."""

    def __init__(self, config: T5Config, bidirectional: bool):
        super().__init__(config.relative_attention_num_buckets, config.num_heads)
        self.max_distance = config.relative_attention_max_distance
        self.bidirectional = bidirectional

    def bucket(self, distance: Tensor) -> Tensor:
        """Key position minus query position -> bucket, both integer tensors of one shape.

        Short distances have a bucket each, longer ones share buckets that widen
        logarithmically up to max_distance; encoders tell past from future, decoders see none.
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
        """(1, H, length, length), float32: queries by keys."""
        position = torch.arange(length, device=self.weight.device)
        buckets = self.bucket(position[None, :] - position[:, None])  # (length, length)
        return super().forward(buckets).permute(2, 0, 1)[None].float()


class Attention(nn.Module):
    """Multi-head attention of tokens over given keys and values; H * K need not equal D."""

    def __init__(self, config: T5Config):
        super().__init__()
        inner = config.num_heads * config.d_kv
        self.heads = config.num_heads
        self.q = Linear(config.d_model, inner)
        self.k = Linear(config.d_model, inner)
        self.v = Linear(config.d_model, inner)
        self.o = Linear(inner, config.d_model)
        self.dropout = Dropout(config.dropout_rate)

    def split(self, x: Tensor, places: Places) -> Tensor:
        x = places.unpack(x).unflatten(-1, (self.heads, -1))  # (N, H*K) -> (B, S, H, K)
        return x.transpose(1, 2)  # (B, H, S, K)

    def keys_values(self, x: Tensor, places: Places) -> tuple[Tensor, Tensor]:
        return self.split(self.k(x), places), self.split(self.v(x), places)  # 2 x (B, H, S, K)

    def forward(
        self, x: Tensor, places: Places, keys: Tensor, values: Tensor, *biases: Tensor
    ) -> Tensor:
        scores = self.split(self.q(x), places) @ keys.transpose(-1, -2)  # (B, H, T, S)
        for bias in biases:  # in place: one tensor of this size, not one per bias
            scores += bias
        weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(values.dtype)
        mixed = self.dropout(weights) @ values  # (B, H, T, K)
        return self.o(places.pack(mixed.transpose(1, 2).flatten(2)))  # (N, D)


class FeedForward(nn.Module):
    """T5 1.0: two layers with a ReLU between. (..., D) -> (..., F) -> (..., D)"""

    def __init__(self, config: T5Config):
        super().__init__()
        self.wi = Linear(config.d_model, config.d_ff)
        self.wo = Linear(config.d_ff, config.d_model)
        self.dropout = Dropout(config.dropout_rate)

    def forward(self, x: Tensor) -> Tensor:
        return self.wo(self.dropout(F.relu(self.wi(x))))


class GatedFeedForward(nn.Module):
    """v1.1: GELU(x wi_0) * (x wi_1), then wo (Shazeer, 2020, https://arxiv.org/abs/2002.05202)."""

    def __init__(self, config: T5Config):
        super().__init__()
        self.wi_0 = Linear(config.d_model, config.d_ff)
        self.wi_1 = Linear(config.d_model, config.d_ff)
        self.wo = Linear(config.d_ff, config.d_model)
        self.dropout = Dropout(config.dropout_rate)

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
        self.dropout = Dropout(config.dropout_rate)

    def forward(self, x: Tensor, places: Places, bias: Tensor, mask: Tensor) -> Tensor:
        """x (N, D), bias (1, H, S, S), mask (B, 1, 1, S) -> (N, D)"""
        h = self.attention_norm(x)
        keys, values = self.attention.keys_values(h, places)
        x = x + self.dropout(self.attention(h, places, keys, values, bias, mask))
        return x + self.dropout(self.ff(self.ff_norm(x)))


class Cache:
    """Keys and values of one decoder block while tokens are generated one by one."""

    def __init__(self, max_length: int):
        self.max_length, self.length = max_length, 0
        self.keys = self.values = None  # of the tokens so far: (B, H, max_length, K)
        self.memory = None  # of the encoder's output, computed once: 2 x (B, H, S, K)

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        if self.keys is None:
            shape = (*keys.shape[:2], self.max_length, keys.shape[3])
            self.keys, self.values = keys.new_empty(shape), values.new_empty(shape)
        self.keys[:, :, self.length] = keys[:, :, 0]
        self.values[:, :, self.length] = values[:, :, 0]
        self.length += 1
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def keep(self, rows: Tensor) -> None:
        self.keys, self.values = self.keys[rows], self.values[rows]
        self.memory = [t[rows] for t in self.memory]


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
        self.dropout = Dropout(config.dropout_rate)

    def forward(
        self,
        x: Tensor,
        places: Places,
        memory: Tensor,
        memory_places: Places,
        bias: Tensor,
        mask: Tensor,
        cache: Cache | None = None,
    ) -> Tensor:
        """x (N, D), memory (its N, D), causal bias (1, H, T, T), mask (B, 1, 1, S) -> (N, D)

        With a cache, x is one new token of each row (B, D), bias its row (1, H, 1, tokens so far).
        """
        h = self.attention_norm(x)
        keys, values = self.attention.keys_values(h, places)
        if cache is not None:
            keys, values = cache.append(keys, values)
        x = x + self.dropout(self.attention(h, places, keys, values, bias))

        h = self.cross_norm(x)
        if cache is None:
            keys, values = self.cross.keys_values(memory, memory_places)
        else:
            if cache.memory is None:  # contiguous once, or every product copies them again
                both = self.cross.keys_values(memory, memory_places)
                cache.memory = [t.contiguous() for t in both]
            keys, values = cache.memory
        x = x + self.dropout(self.cross(h, places, keys, values, mask))
        return x + self.dropout(self.ff(self.ff_norm(x)))


class Stack(nn.Module):
    """The blocks of the encoder or of the decoder with their shared bias and final norm."""

    def __init__(self, config: T5Config, block: type[nn.Module], depth: int, bidirectional: bool):
        super().__init__()
        self.bias = RelativeBias(config, bidirectional)
        self.blocks = nn.ModuleList(block(config) for _ in range(depth))
        self.norm = RMSNorm(config.d_model, config.layer_norm_epsilon)


class T5(nn.Module):
    """The encoder-decoder. What training and evaluation need of a student is `forward`,
    `generate`, `from_pretrained`, `save_pretrained` and `blocks`; a fork's own model has these."""

    def __init__(self, config: T5Config):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.encoder = Stack(config, EncoderBlock, config.num_layers, bidirectional=True)
        self.decoder = Stack(config, DecoderBlock, config.num_decoder_layers, bidirectional=False)
        self.head = None  # tied: the embedding's matrix is used
        if not config.tie_word_embeddings:
            self.head = Linear(config.d_model, config.vocab_size)
        self.dropout = Dropout(config.dropout_rate)
        self.init_weights()

    def init_weights(self) -> None:
        """T5's initialisation: unscaled scores and logits start out with a variance of about 1.

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
            if not layer.endswith("norm"):
                scale = c.initializer_factor * std.get(layer, c.d_model**-0.5)
                nn.init.normal_(parameter, std=scale)

    @property
    def blocks(self) -> list[nn.Module]:
        """The repeated parts, in order: what is sharded, recomputed or compiled one by one."""
        return [*self.encoder.blocks, *self.decoder.blocks]

    def embed(self, ids: Tensor) -> Tensor:
        """(N,) -> (N, D) float32"""
        return self.dropout(self.embedding(ids).float())

    def encode(self, x: Tensor, places: Places, mask: Tensor) -> Tensor:
        """Embedded sources (N, D), (B, 1, 1, S) additive mask -> (N, D) float32"""
        bias = self.encoder.bias(places.shape[1])
        for block in self.encoder.blocks:
            x = block(x, places, bias, mask)
        return self.dropout(self.encoder.norm(x))

    def decode(self, x: Tensor, places: Places, *rest: Any, caches: list | None = None) -> Tensor:
        """Embedded inputs (N, D), memory, its places, causal bias (1, H, T, T), mask -> (N, D)"""
        for block, cache in zip(self.decoder.blocks, caches or [None] * len(self.decoder.blocks)):
            x = block(x, places, *rest, cache)
        return self.dropout(self.decoder.norm(x))

    def logits(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., V)"""
        if self.config.scale_decoder_outputs:
            x = x * self.config.d_model**-0.5
        return linear(x, self.embedding.weight) if self.head is None else self.head(x)

    def causal_bias(self, length: int) -> Tensor:
        """(1, H, length, length): the decoder's bias, MASKED where a key is in the future"""
        bias = self.decoder.bias(length)
        return bias + torch.full_like(bias[0, 0], MASKED).triu(1)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        decoder_input_ids: Tensor,
        wanted: Tensor | None = None,
    ) -> Tensor:
        """Logits (B, T, V) for source ids (B, S), their mask (B, S; 1 token, 0 padding) and
        decoder inputs (B, T), all integer tensors. Where the decoder input is trailing PAD the
        logits are unspecified.

        `wanted`, M places of the flattened (B * T), asks for the logits there and nowhere else:
        (M, V). In training these are the targets, and logits are the largest tensor there is.
        """
        mask = additive_mask(attention_mask)
        sources = Places(attention_mask != 0)
        needed = torch.full_like(decoder_input_ids, wanted is None, dtype=torch.bool)
        if wanted is not None:  # tokens see the past alone: a row's last wanted one ends it
            needed.view(-1).index_fill_(0, wanted, True)
            needed = needed.flip(1).cumsum(1).flip(1) > 0
            needed[:, 0] = True  # and no row is empty
        places, bias = Places(needed), self.causal_bias(decoder_input_ids.shape[1])
        # Looked up at once: the embedding's gradient, (V, D), need not exist twice.
        ids = [sources.pack(input_ids), places.pack(decoder_input_ids)]
        x, y = self.embed(torch.cat(ids)).split([len(part) for part in ids])
        memory = self.encode(x, sources, mask)
        y = places.unpack(self.decode(y, places, memory, sources, bias, mask))
        return self.logits(y if wanted is None else y.flatten(0, 1).index_select(0, wanted))

    @torch.no_grad()
    def generate(
        self, input_ids: Tensor, attention_mask: Tensor, max_new_tokens: int = 64
    ) -> Tensor:
        """Greedy decoding: (B, S), (B, S) -> (B, at most max_new_tokens) int64, without the start
        token, PAD after a row's EOS; it stops when every row has ended. Call `eval()` before."""
        c, row = self.config, torch.arange(len(input_ids), device=input_ids.device)
        mask, sources = additive_mask(attention_mask), Places(attention_mask != 0)
        memory = self.encode(self.embed(sources.pack(input_ids)), sources, mask)
        bias = self.causal_bias(max_new_tokens)
        caches = [Cache(max_new_tokens) for _ in self.decoder.blocks]
        token = torch.full_like(row, c.decoder_start_token_id)
        ended = torch.zeros_like(row, dtype=torch.bool)
        places = Places(~ended[:, None])  # one token a row
        tokens = input_ids.new_full((len(row), max_new_tokens), c.pad_token_id)
        for t in range(max_new_tokens):
            now = bias[:, :, t : t + 1, : t + 1]
            x = self.decode(self.embed(token), places, memory, sources, now, mask, caches=caches)
            token = self.logits(x).argmax(-1).masked_fill(ended, c.pad_token_id)
            tokens[row, t] = token
            ended = ended | (token == c.eos_token_id)
            if (left := len(row) - int(ended.sum())) == 0:
                return tokens[:, : t + 1]
            if left <= len(row) // 2:  # the others leave: each time the caches are copied
                going = (~ended).nonzero()[:, 0]
                row, token, ended, mask = (x[going] for x in (row, token, ended, mask))
                places = Places(~ended[:, None])
                for cache in caches:
                    cache.keep(going)
        return tokens

    @classmethod
    def from_pretrained(
        cls, folder: str | os.PathLike, prepare: Callable[[T5], Own] | None = None
    ) -> T5:
        """A model in `eval()` mode, float32, on the CPU, from a Hugging Face folder: `config.json`
        and `model.safetensors` or `pytorch_model.bin`, each single or sharded with an index.

        `prepare` may turn the model, still without memory, into one that holds a part of each
        parameter; it says which (`Own`), and only that part is read.

        Raises ValueError, in one line, for a folder or file that is missing or damaged, an
        unsupported config, a wrong shape, and for tensors that are missing or left over.
        """
        folder = Path(folder)
        config = read_config(folder)
        readers = open_checkpoint(folder)
        head, shared = readers.get("lm_head.weight"), readers.get("shared.weight")
        # transformers >= 5 writes tie_word_embeddings = true whatever is true: ask the tensors.
        if config.tie_word_embeddings and head and shared:
            config.tie_word_embeddings = same(head, shared)
        with torch.device("meta" if prepare else "cpu"), Uninitialised():
            model = cls(config)
        load_weights(model, readers, folder, prepare(model) if prepare else whole)
        return model.eval()

    def save_pretrained(
        self,
        folder: str | os.PathLike,
        fetch: Callable[[Tensor], Tensor] = Tensor.detach,
        write: bool = True,
    ) -> None:
        """Writes `config.json` and `model.safetensors` (above 5 GB shards with an index) in Hugging
        Face's layout. Each file is written beside and renamed; the folder's other files stay.

        One tensor at a time is fetched, in one order everywhere: where `fetch` puts a parameter
        together from the parts that several processes hold, all of them call this, and one writes.
        """
        folder = Path(folder)
        if not write:
            for parameter in self.parameters():
                fetch(parameter)
            return
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {hf_name(name): p for name, p in self.named_parameters()}
        shards: list[list[str]] = [[]]
        room = MAX_SHARD_BYTES
        for name, tensor in tensors.items():
            if shards[-1] and tensor.nbytes > room:
                shards.append([])
                room = MAX_SHARD_BYTES
            shards[-1].append(name)
            room -= tensor.nbytes
        single = len(shards) == 1
        names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
        names = ["model.safetensors"] if single else names
        for name, shard in zip(names, shards):
            write_tensors(folder / (name + ".tmp"), {key: tensors[key] for key in shard}, fetch)
        for name in names:
            os.replace(folder / (name + ".tmp"), folder / name)
        index = folder / "model.safetensors.index.json"
        if single:
            index.unlink(missing_ok=True)
        else:
            weight_map = {key: name for name, shard in zip(names, shards) for key in shard}
            size = sum(t.nbytes for t in tensors.values())
            write_json(index, {"metadata": {"total_size": size}, "weight_map": weight_map})
        # Last, when nothing needs them any more: the files of an earlier save.
        for old in {folder / "model.safetensors", *folder.glob("model-*-of-*.safetensors")}:
            if old.name not in names:
                old.unlink(missing_ok=True)
        write_json(folder / "config.json", self.config.to_dict())


def additive_mask(attention_mask: Tensor) -> Tensor:
    """(B, S), 1 for a token and 0 for padding -> (B, 1, 1, S) float32, added to scores"""
    return (1.0 - attention_mask[:, None, None, :].float()) * MASKED


def shift_right(labels: Tensor, start: int = 0, pad: int = 0) -> Tensor:
    """Decoder inputs for teacher forcing: (B, T) labels, -100 where there is none -> (B, T) ids
    that begin with the start token, lag by one, and hold PAD for -100."""
    shifted = labels.new_full(labels.shape, start)
    shifted[:, 1:] = labels[:, :-1]
    return shifted.masked_fill(shifted == -100, pad)


# --------------------------------------------------------------------- weights, in and out

# Ours and Hugging Face's names; {} stands for the number of a block.
RENAMES = {
    "embedding.": "shared.",
    "head.": "lm_head.",
    "encoder.bias.": "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.",
    "encoder.blocks.{}.attention.": "encoder.block.{}.layer.0.SelfAttention.",
    "encoder.blocks.{}.attention_norm.": "encoder.block.{}.layer.0.layer_norm.",
    "encoder.blocks.{}.ff.": "encoder.block.{}.layer.1.DenseReluDense.",
    "encoder.blocks.{}.ff_norm.": "encoder.block.{}.layer.1.layer_norm.",
    "encoder.norm.": "encoder.final_layer_norm.",
    "decoder.bias.": "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.",
    "decoder.blocks.{}.attention.": "decoder.block.{}.layer.0.SelfAttention.",
    "decoder.blocks.{}.attention_norm.": "decoder.block.{}.layer.0.layer_norm.",
    "decoder.blocks.{}.cross.": "decoder.block.{}.layer.1.EncDecAttention.",
    "decoder.blocks.{}.cross_norm.": "decoder.block.{}.layer.1.layer_norm.",
    "decoder.blocks.{}.ff.": "decoder.block.{}.layer.2.DenseReluDense.",
    "decoder.blocks.{}.ff_norm.": "decoder.block.{}.layer.2.layer_norm.",
    "decoder.norm.": "decoder.final_layer_norm.",
}
# Other names under which checkpoints repeat a tensor, and what old ones hold that is never used.
ALIASES = {
    "encoder.embed_tokens.weight": "shared.weight",
    "decoder.embed_tokens.weight": "shared.weight",
    "lm_head.weight": "shared.weight",  # where tied
}
IGNORED = {"decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"}


def hf_name(name: str) -> str:
    """A parameter's name in Hugging Face's layout: "decoder.blocks.3.cross.q.weight" ->
    "decoder.block.3.layer.1.EncDecAttention.q.weight"."""
    number = re.search(r"\d+", name.partition(".ff.")[0])
    number = number.group() if number else ""
    for ours, theirs in RENAMES.items():
        if name.startswith(prefix := ours.replace("{}", number)):
            return theirs.replace("{}", number) + name.removeprefix(prefix)
    raise AssertionError(f"no Hugging Face name for {name}: RENAMES lacks it")


def read_config(folder: Path) -> T5Config:
    """`folder/config.json`; ValueError where it is missing, malformed or not implemented."""
    try:
        raw = json.loads((folder / "config.json").read_text())
        return T5Config.from_dict(raw)
    except FileNotFoundError:
        raise ValueError(
            f"{folder} has no config.json: give a folder in Hugging Face's layout"
        ) from None
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from None


class Uninitialised(TorchFunctionMode):
    """Modules are made without drawing their weights, which will be read; on the meta device torch
    would import its compiler for it (0.7 s)."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (nn.init.normal_, nn.init.kaiming_uniform_):
            return (*args, *kwargs.values())[0]
        return function(*args, **(kwargs or {}))


@dataclass
class Stored:
    """A tensor in a file: read(first, end) gives these rows, and touches no others."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[int, int], Tensor]

    def parts(self, first: int, end: int) -> Iterator[tuple[int, Tensor]]:
        """(where they begin, the rows) from first to end, a few at a time."""
        row_bytes = self.dtype.itemsize * math.prod(self.shape[1:])
        rows = max(1, PART_BYTES // max(1, row_bytes))
        for i in range(first, end, rows):
            yield i, self.read(i, min(end, i + rows))


class OldFormat(ValueError):
    """A large file that must be converted first."""


# What a process holds of a parameter: a tensor to fill, and which rows it is (first, end).
Own = Callable[[nn.Parameter], tuple[Tensor, int, int]]


def whole(parameter: nn.Parameter) -> tuple[Tensor, int, int]:
    """All of it."""
    return parameter, 0, parameter.shape[0]


def same(a: Stored, b: Stored) -> bool:
    """Are two stored tensors equal? Read up to the first difference."""
    return a.shape == b.shape and all(
        torch.equal(rows, b.read(i, i + len(rows))) for i, rows in a.parts(0, a.shape[0])
    )


def open_checkpoint(folder: Path) -> dict[str, Stored]:
    """Hugging Face name -> what is stored, for every tensor in the folder's weight files."""
    for single in ("model.safetensors", "pytorch_model.bin"):
        if (folder / single).exists():
            shards = [single]
            break
        index = folder / f"{single}.index.json"
        if index.exists():
            try:
                named = set(json.loads(index.read_text())["weight_map"].values())
                shards = sorted(Path(name).name for name in named)
            except (ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:
                raise ValueError(f"{index} is damaged: {error!r}") from None
            break
    else:
        raise ValueError(
            f"{folder} holds no weights: expected model.safetensors or pytorch_model.bin, "
            "or either with an .index.json and its shards"
        )
    readers: dict[str, Stored] = {}
    for shard in shards:
        try:
            readers.update(read_file(folder / shard))
        except FileNotFoundError:
            raise ValueError(f"{folder / shard} is missing, though the index names it") from None
        except OldFormat:
            raise
        except Exception as error:  # damaged bytes raise a dozen kinds
            reason = re.split(r"\.\s|\n", str(error))[0]  # torch goes on: turn the guard off
            raise ValueError(
                f"{folder / shard} is truncated, damaged or holds more than tensors; "
                f"fetch it again ({type(error).__name__}: {reason!r})"
            ) from None
    return readers


def read_file(path: Path) -> Iterator[tuple[str, Stored]]:
    """(name, what is stored) of each tensor in one weight file."""
    if path.suffix == ".safetensors":
        handle, used = safe_open(path, framework="pt"), 0

        def rows(name: str, i: int, j: int) -> Tensor:
            nonlocal handle, used
            if used > REOPEN_BYTES:  # what was mapped and read counts as used memory
                handle, used = safe_open(path, framework="pt"), 0
            part = handle.get_slice(name)[i:j]
            used += part.nbytes
            return part

        for name in handle.keys():
            part = handle.get_slice(name)
            shape = tuple(part.get_shape())
            dtype = (part[:1] if shape else handle.get_tensor(name)).dtype
            yield name, Stored(shape, dtype, partial(rows, name))
        return
    with open(path, "rb") as file:
        zipped = file.read(4) == b"PK\x03\x04"  # torch >= 1.6; only these can be memory-mapped
    if not zipped and path.stat().st_size > MAX_LEGACY_BYTES:
        raise OldFormat(
            f"{path} is in torch's old format, which every process would read whole; convert it "
            f"once with `python -c \"import t5; t5.convert('{path.parent}')\"`"
        )
    tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(t, Tensor) for name, t in tensors.items()
    ):
        raise ValueError("not a mapping from names to tensors")
    for name, tensor in tensors.items():
        read = lambda i, j, tensor=tensor: tensor[i:j]  # noqa: E731
        yield name, Stored(tuple(tensor.shape), tensor.dtype, read)


def load_weights(
    model: nn.Module, readers: dict[str, Stored], folder: Path, own: Own = whole
) -> None:
    """Copies every tensor of a checkpoint into the model, a few rows at a time, or what is its own.

    Raises ValueError unless each tensor is a parameter, a known alias (equal to what it repeats)
    or on the short ignore list, and each parameter is found.
    """
    wanted = {hf_name(name): p for name, p in model.named_parameters()}
    found: dict[str, str] = {}  # parameter -> the name it is read under
    for name in readers:
        if name in wanted:
            found[name] = name
    repeats = [(n, ALIASES[n]) for n in readers if n in ALIASES and n not in wanted]
    for name, original in repeats:
        found.setdefault(original, name)
    missing = sorted(wanted.keys() - found.keys())
    left_over = sorted(readers.keys() - wanted.keys() - ALIASES.keys() - IGNORED)
    if missing or left_over:
        raise ValueError(
            f"{folder} does not fit its config.json: missing {show(missing)}; "
            f"left over {show(left_over)}"
        )
    for name, source in found.items():
        stored, parameter = readers[source], wanted[name]
        if stored.shape != parameter.shape or not stored.dtype.is_floating_point:
            raise ValueError(
                f"{folder}: {source} is {stored.dtype} {stored.shape}, but its config.json "
                f"asks for float {tuple(parameter.shape)}"
            )
        tensor, first, end = own(parameter)
        with torch.no_grad():
            for i, rows in stored.parts(first, end):
                tensor[i - first : i - first + len(rows)] = rows
    for name, original in repeats:
        if name != found[original] and not same(readers[name], readers[found[original]]):
            raise ValueError(f"{folder}: {name} differs from {original}, which it should repeat")


def show(names: list[str], most: int = 12) -> str:
    """A list for an error message: "nothing", or its first names and how many there are."""
    if not names:
        return "nothing"
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{len(names)} ({', '.join(map(repr, names[:most]))}{rest})"


def convert(folder: str | os.PathLike) -> None:
    """Turns a folder's pytorch_model*.bin in torch's old format into safetensors shards beside
    them, one tensor in memory at a time; from then on those are read."""
    folder, weight_map = Path(folder), {}
    shards = sorted(folder.glob("pytorch_model*.bin"))
    for i, path in enumerate(shards, 1):
        tensors = map_old_format(path)
        name = f"model-{i:05}-of-{len(shards):05}.safetensors"
        write_tensors(folder / (name + ".tmp"), tensors, Tensor.detach)
        os.replace(folder / (name + ".tmp"), folder / name)
        weight_map |= dict.fromkeys(tensors, name)
    write_json(folder / "model.safetensors.index.json", {"weight_map": weight_map})


def map_old_format(path: Path) -> dict[str, Tensor]:
    """The tensors of a file from before torch 1.6, memory-mapped: pickles, read as `weights_only`
    reads them, say which part of which storage a tensor is; the storages follow, one after the
    other, each after its number of elements.
    https://github.com/pytorch/pytorch/blob/v2.13.0/torch/serialization.py (_legacy_save)"""
    from torch._weights_only_unpickler import Unpickler

    promised: dict[str, torch.UntypedStorage] = {}  # by key, without memory

    def promise(saved: tuple) -> torch.TypedStorage:
        _, kind, key, _, count, _ = saved
        size = count * torch.empty(0, dtype=kind.dtype).element_size()
        storage = promised.setdefault(key, torch.UntypedStorage(size, device="meta"))
        return torch.TypedStorage(wrap_storage=storage, dtype=kind.dtype, _internal=True)

    with open(path, "rb") as file:
        for _ in range(3):  # a magic number, the format's, the system's
            Unpickler(file, encoding="utf-8").load()
        unpickler = Unpickler(file, encoding="utf-8")
        unpickler.persistent_load = promise
        tensors, begins = unpickler.load(), {}
        keys = Unpickler(file, encoding="utf-8").load()
        place = file.tell()
        for key in keys:
            begins[promised[key]._cdata] = place + 8
            place += 8 + promised[key].nbytes()
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    mapped = {}
    for name, t in tensors.items():
        storage, start = t.untyped_storage(), begins[t.untyped_storage()._cdata]
        count = storage.nbytes() // t.element_size()
        flat = torch.frombuffer(data, dtype=t.dtype, count=count, offset=start)
        mapped[name] = flat.as_strided(t.shape, t.stride(), t.storage_offset())
    return mapped


def write_tensors(path: Path, tensors: dict[str, Tensor], fetch: Callable) -> None:
    """A safetensors file of float32, written one fetched tensor at a time: the library's own writer
    asks for all of them at once. https://github.com/huggingface/safetensors#format"""
    header, end = {"__metadata__": {"format": "pt"}}, 0  # transformers asks for the format
    for name, tensor in tensors.items():
        start, end = end, end + 4 * tensor.numel()
        shape = list(tensor.shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    described = json.dumps(header).encode()
    described += b" " * (-len(described) % 8)
    with open(path, "wb") as file:
        file.write(len(described).to_bytes(8, "little") + described)
        for tensor in tensors.values():
            file.write(fetch(tensor).detach().float().cpu().contiguous().numpy())


def write_json(path: Path, value: dict) -> None:
    """Beside, then renamed: a reader sees the old file or the new one, never a part of it."""
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(beside, path)
