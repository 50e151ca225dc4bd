"""The tokenizer against SentencePiece and transformers' T5Tokenizer, and rows of tokens."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import CORPUS, train_vocabulary

from data import Tokenizer, TokenRows, UserError, collate, tokenize_rows
from dsbs import Row

TEXTS = [
    *CORPUS,
    "",
    " ",
    "two  spaces\nand\ta line ",
    "a\u00a0b\u3000c\u200bd",
    "ﬁne ① café cafe\u0301",
    "の 😀 \0 {x} <y> a < b > c",
    "▁",
    "</s",
    "<extra_id_100> <extra_id_> <extra_id_007>",
]


def test_equals_transformers(vocabulary: Path, tokenizer: Tokenizer) -> None:
    transformers = pytest.importorskip("transformers", reason="the oracle is in requirements-dev")
    config = {"tokenizer_class": "T5Tokenizer", "extra_ids": 100}
    (vocabulary.parent / "tokenizer_config.json").write_text(json.dumps(config))
    theirs = transformers.AutoTokenizer.from_pretrained(str(vocabulary.parent))
    assert len(theirs) == tokenizer.vocab_size
    special = ["a man</s>on", "a<extra_id_0> ladder <extra_id_99>", "<pad> a<unk>b"]
    for text in [*TEXTS, *special]:
        ids = theirs(text).input_ids
        assert tokenizer.encode(text) == ids, text
        # After an unknown first token they keep a space, which scoring strips.
        words = theirs.decode(ids, skip_special_tokens=True).strip()
        assert tokenizer.decode(ids).strip() == words, text


def test_decode_gives_the_text_back(tokenizer: Tokenizer) -> None:
    for text in CORPUS:
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.decode([0, *tokenizer.encode(text), 0, tokenizer.vocab_size - 1]) == text
    assert tokenizer.decode(np.array([tokenizer.vocab_size + 27, 2, 1, 0])) == ""
    assert tokenizer.decode([]) == ""


def test_batches_give_the_same_ids(tokenizer: Tokenizer) -> None:
    texts = [*TEXTS, tuple(CORPUS[:2]), tuple(CORPUS[:3]), "a</s>b"]
    for limit in (None, 12):
        expected = [tokenizer.encode(text, limit) for text in texts]
        assert tokenizer.encode_batch(texts, limit) == expected


def test_a_vocabulary_with_other_special_ids(tmp_path: Path) -> None:
    path = train_vocabulary(tmp_path, pad_id=3, unk_id=0, bos_id=2)
    with pytest.raises(UserError, match=r"\(3, 1, 0\).*\(0, 1, 2\)"):
        Tokenizer(path)


def rows_of_three(tokenizer: Tokenizer, **limits) -> TokenRows:
    rows = [
        Row("label", "[label] a man", "neutral"),
        Row("rationale", "[rationale] a man", "nobody is sleeping の"),
        Row("label", ("a man", CORPUS[2]), "a"),
        Row("label", "on", ("a rationale of some words", "So the answer is neutral.")),
    ]
    return tokenize_rows(rows, tokenizer, **limits)


def test_rows_of_tokens(tokenizer: Tokenizer) -> None:
    rows = rows_of_three(tokenizer)
    assert len(rows) == 4 and rows.n_examples == 3
    assert rows.tasks.tolist() == [0, 1, 0, 0] and rows.example.tolist() == [0, 0, 1, 2]
    assert rows.rows_of(np.array([2, 0])).tolist() == [3, 0, 1]
    assert rows.source(0).tolist() == tokenizer.encode("[label] a man")
    assert rows.source(2).tolist() == tokenizer.encode(("a man", CORPUS[2]))
    assert rows.target(1).tolist() == tokenizer.encode("nobody is sleeping の")
    whole = tokenizer.encode("a rationale of some words So the answer is neutral.")
    assert rows.target(3).tolist() == whole
    assert rows.truncated_sources == rows.truncated_targets == 0
    assert rows.unknown_tokens == 1
    assert rows.total_tokens == sum(len(rows.source(i)) + len(rows.target(i)) for i in range(4))
    with pytest.raises(UserError, match="label"):
        tokenize_rows([], tokenizer)


def test_a_cut_spares_the_answer(tokenizer: Tokenizer) -> None:
    whole = rows_of_three(tokenizer)
    answer = tokenizer.encode("So the answer is neutral.")
    rows = rows_of_three(tokenizer, max_source=12, max_target=len(answer) + 4)
    assert rows.target(3).tolist() == [*whole.target(3)[:4], *answer]
    assert rows.source(2).tolist() == tokenizer.encode(("a man", CORPUS[2]), 12)
    assert rows.truncated_sources == sum(len(whole.source(i)) > 12 for i in range(4)) > 0
    assert 0 < rows.truncated_targets < 4
    rows = rows_of_three(tokenizer, max_target=3)
    assert rows.target(3).tolist() == answer, "the answer is never cut"


def test_collate_pads_and_masks(tokenizer: Tokenizer) -> None:
    rows = rows_of_three(tokenizer)
    batch = collate(rows, np.array([3, 1]))
    assert batch["tasks"].tolist() == [0, 1]
    assert {array.dtype for array in batch.values()} == {np.dtype(np.int64)}
    for row, i in enumerate((3, 1)):
        source, target = rows.source(i), rows.target(i)
        assert batch["input_ids"][row, : len(source)].tolist() == source.tolist()
        assert not batch["input_ids"][row, len(source) :].any()
        assert batch["attention_mask"][row].sum() == len(source)
        assert batch["attention_mask"][row, : len(source)].all()
        assert batch["labels"][row, : len(target)].tolist() == target.tolist()
        assert (batch["labels"][row, len(target) :] == -100).all()
    assert batch["input_ids"].shape[1] == max(len(rows.source(i)) for i in (1, 3))
    empty = collate(rows, np.array([], int))
    assert {key: value.tolist() for key, value in empty.items()} == {
        "input_ids": [[1]], "attention_mask": [[1]], "labels": [[-100]], "tasks": [0],
    }  # fmt: skip
