"""A student that is no T5: a decoder-only Transformer that reads and writes bytes.

    python tests/fork.py [flags of train.py]
    python tests/fork.py eval STUDENT_FOLDER [flags of eval.py]

This is all that a fork has to bring: a class with `forward`, `generate`, `from_pretrained`,
`save_pretrained` and `blocks`; here also a config and a tokenizer of its own.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that this file can be run as a script
import data  # noqa: E402
import eval as evaluation  # noqa: E402
import train  # noqa: E402


class Bytes(data.Tokenizer):
    """UTF-8 bytes, after PAD (0) and EOS (1). The decoder starts with PAD, as T5's does."""

    unk_id, vocab_size = -1, 258  # no byte is unknown

    def __init__(self):
        pass

    def ids(self, texts: list[str]) -> list[list[int]]:
        return [[2 + byte for byte in text.encode()] for text in texts]

    def decode(self, ids: list[int]) -> str:
        return bytes(id - 2 for id in ids if 2 <= id < 258).decode(errors="replace")

    def save(self, folder: Path) -> None:
        (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "Bytes"}')


class Causal(nn.Module):
    """Continues the source with the target; PAD between the two is never attended to."""

    def __init__(self, config: dict):
        super().__init__()
        self.settings = config
        self.embedding = nn.Embedding(config["vocab_size"], config["width"])
        self.positions = nn.Embedding(config["length"], config["width"])
        depth, width = config["depth"], config["width"]
        shape = dict(nhead=config["heads"], dim_feedforward=4 * width, dropout=0.0)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, **shape, batch_first=True, norm_first=True)
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, config["vocab_size"], bias=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, decoder_input_ids: Tensor):
        """(B, S), (B, S), (B, T) -> logits (B, T, V). N = S + T"""
        ids = torch.cat([input_ids, decoder_input_ids], dim=1)
        real = torch.cat([attention_mask, torch.ones_like(decoder_input_ids)], dim=1).bool()
        past = torch.ones_like(real[0]).expand(ids.shape[1], -1).tril()
        itself = torch.ones_like(real[0]).diag()  # so that no row is empty
        mask = (past & real[:, None, :] | itself).repeat_interleave(self.settings["heads"], dim=0)
        places = (real.cumsum(1) - 1).clamp(0, self.settings["length"] - 1)
        x = self.embedding(ids) + self.positions(places)
        for block in self.blocks:
            x = block(x, src_mask=~mask)  # true where a token may not look
        return self.head(self.norm(x[:, input_ids.shape[1] :]))

    @torch.no_grad()
    def generate(self, input_ids: Tensor, attention_mask: Tensor, max_new_tokens: int = 64):
        """Greedy: (B, S), (B, S) -> (B, at most max_new_tokens)"""
        tokens = torch.zeros_like(input_ids[:, :1])
        ended = tokens.bool()
        while tokens.shape[1] <= max_new_tokens and not ended.all():
            logits = self(input_ids, attention_mask, tokens)[:, -1:]
            tokens = torch.cat([tokens, logits.argmax(-1).masked_fill(ended, 0)], dim=1)
            ended = ended | (tokens[:, -1:] == 1)
        return tokens[:, 1:]

    @staticmethod
    def untrained_config(size: str, vocab_size: int) -> dict:
        """For `--weights random`; this class has one size, whatever `--size` says."""
        return dict(vocab_size=vocab_size, width=64, depth=2, heads=4, length=1536)

    @staticmethod
    def load_tokenizer(folder: Path) -> Bytes:
        return Bytes()

    @classmethod
    def from_pretrained(cls, folder):
        model = cls(json.loads(Path(folder, "config.json").read_text()))
        model.load_state_dict(load_file(Path(folder, "model.safetensors")))
        return model.eval()

    def save_pretrained(self, folder):
        save_file(self.state_dict(), Path(folder, "model.safetensors"))
        Path(folder, "config.json").write_text(json.dumps(self.settings))


evaluation.STUDENT = Causal
if __name__ == "__main__":
    asks = sys.argv[1:2] == ["eval"]
    sys.exit(evaluation.main(sys.argv[2:]) if asks else train.main(sys.argv[1:]))
