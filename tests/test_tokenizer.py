"""The tokenizer against SentencePiece and transformers' T5Tokenizer, and rows of tokens."""

import json
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from data import Tokenizer, TokenRows, UserError, collate, tokenize_rows
from dsbs import Row

CORPUS = [
    "Luke scored 84 points after playing 2 rounds of a trivia game.",
    "How many points did he score per round? The answer is (84 / 2).",
    "A man in a blue shirt stands on a ladder; nobody is sleeping outdoors.",
    "[label] premise [rationale] hypothesis. So the answer is neutral, a café.",
]


def train_vocabulary(folder: Path, **options) -> Path:
    options = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1} | options
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 20),
        model_prefix=str(folder / "spiece"),
        vocab_size=150,
        hard_vocab_limit=False,
        model_type="unigram",
        num_threads=1,
        minloglevel=2,
        **options,
    )
    return folder / "spiece.model"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_vocabulary(tmp_path_factory.mktemp("vocabulary"))


@pytest.fixture(scope="module")
def tokenizer(path: Path) -> Tokenizer:
    return Tokenizer(path)


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


def test_plain_text_gives_sentencepiece_ids_and_eos(path: Path, tokenizer: Tokenizer) -> None:
    plain = sentencepiece.SentencePieceProcessor(model_file=str(path))
    for text in TEXTS:
        assert tokenizer.encode(text) == [*plain.Encode(text), 1]


def test_special_tokens_split_the_text(path: Path, tokenizer: Tokenizer) -> None:
    plain = sentencepiece.SentencePieceProcessor(model_file=str(path))
    top = tokenizer.vocab_size - 1
    assert tokenizer.vocab_size == plain.GetPieceSize() + 100
    ids = tokenizer.encode("a man<extra_id_0> on</s> <pad>a<unk><extra_id_99>")
    a, on = plain.Encode("a man"), plain.Encode(" on")
    assert ids == [*a, top, *on, 1, *plain.Encode(" "), 0, *plain.Encode("a"), 2, top - 99, 1]


def test_equals_transformers(path: Path, tokenizer: Tokenizer) -> None:
    transformers = pytest.importorskip("transformers", reason="the oracle is in requirements-dev")
    config = {"tokenizer_class": "T5Tokenizer", "extra_ids": 100}
    (path.parent / "tokenizer_config.json").write_text(json.dumps(config))
    theirs = transformers.AutoTokenizer.from_pretrained(str(path.parent))
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


def test_truncation_shares_the_budget(tokenizer: Tokenizer) -> None:
    long, short = CORPUS[2], "a man"
    whole = tokenizer.encode(long)
    assert tokenizer.encode(long, max_length=7) == [*whole[:6], 1]
    assert tokenizer.encode(long, max_length=len(whole)) == whole
    n = len(tokenizer.encode(short))
    for pair in ((long, short), (short, long)):
        ids = tokenizer.encode(pair, max_length=n + 10)
        parts = [tokenizer.encode(part) for part in pair]
        expected = [part if len(part) == n else [*part[:9], 1] for part in parts]
        assert ids == expected[0] + expected[1], "the short part is whole, the long one cut"
    ids = tokenizer.encode((long, long, long), max_length=20)
    assert len(ids) == 20 and ids.count(1) == 3 and ids[-1] == 1
    assert [len(part) for part in np.split(ids, np.flatnonzero(np.array(ids) == 1) + 1)] == [
        6,
        7,
        7,
        0,
    ]
    assert tokenizer.encode((long, long), max_length=2) == [1, 1]
    assert tokenizer.encode((long,)) == whole


def test_batches_give_the_same_ids(tokenizer: Tokenizer) -> None:
    texts = [*TEXTS, tuple(CORPUS[:2]), tuple(CORPUS[:3]), "a</s>b"]
    for limit in (None, 12):
        expected = [tokenizer.encode(text, limit) for text in texts]
        assert tokenizer.encode_batch(texts, limit) == expected


@pytest.mark.parametrize("content", [None, b"", b"garbage", b"\0" * 1000, "half"])
def test_a_vocabulary_that_is_none(content, path: Path, tmp_path: Path) -> None:
    bad = tmp_path / "spiece.model"
    if content is not None:
        bad.write_bytes(path.read_bytes()[:5000] if content == "half" else content)
    with pytest.raises(UserError, match="spiece.model") as error:
        Tokenizer(bad)
    assert "\n" not in str(error.value)


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
    lengths = [len(whole.source(i)) for i in range(4)]
    assert rows.truncated_sources == sum(length > 12 for length in lengths) > 0
    lengths = [len(whole.target(i)) for i in range(4)]
    assert rows.truncated_targets == sum(length > len(answer) + 4 for length in lengths) > 0
    rows = rows_of_three(tokenizer, max_target=3)
    assert rows.target(3).tolist() == answer, "the answer is never cut"
    assert rows.target(1).tolist() == [*whole.target(1)[:2], 1]


def test_more_rows_than_a_chunk(tokenizer: Tokenizer) -> None:
    rows = tokenize_rows([Row("label", f"{i} points", str(i)) for i in range(9000)], tokenizer)
    for i in (0, 4095, 4096, 8999):
        assert rows.source(i).tolist() == tokenizer.encode(f"{i} points")
        assert rows.target(i).tolist() == tokenizer.encode(str(i))


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
