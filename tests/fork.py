"""A student that is no T5: what a fork has to bring, and nothing more. Run by test_train.py."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

import eval as evaluation
import train


class Recurrent(nn.Module):
    """A GRU reads, a GRU writes."""

    def __init__(self, config):
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, 32)
        self.reader, self.writer = (nn.GRU(32, 32, batch_first=True) for _ in range(2))
        self.head = nn.Linear(32, config.vocab_size)
        self.blocks = [self.reader, self.writer]

    def forward(self, input_ids, attention_mask, decoder_input_ids):
        read, _ = self.reader(self.embedding(input_ids))
        last = read[torch.arange(len(read)), attention_mask.sum(1).clamp(min=1) - 1]
        return self.head(self.writer(self.embedding(decoder_input_ids), last[None].contiguous())[0])

    @torch.no_grad()
    def generate(self, input_ids, attention_mask, max_new_tokens=64):
        ids = input_ids.new_zeros((len(input_ids), 1))
        for _ in range(min(max_new_tokens, 4)):
            token = self(input_ids, attention_mask, ids)[:, -1:].argmax(-1)
            ids = torch.cat([ids, token], 1)
        return ids[:, 1:]

    @classmethod
    def from_pretrained(cls, folder):
        weights = load_file(Path(folder) / "model.safetensors")
        model = cls(type("Config", (), {"vocab_size": len(weights["head.weight"])}))
        model.load_state_dict(weights)
        return model.eval()

    def save_pretrained(self, folder):
        save_file(self.state_dict(), Path(folder) / "model.safetensors")
        (Path(folder) / "config.json").write_text("{}")


evaluation.STUDENT = Recurrent
if __name__ == "__main__":
    evaluation.leave(train.main())
