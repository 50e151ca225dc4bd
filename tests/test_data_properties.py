"""Properties of arithmetic, splits, completions, tokens and batches, on generated cases."""

from fractions import Fraction

import numpy as np
import pytest

pytest.importorskip("hypothesis", reason="property tests need requirements-dev.txt")

from hypothesis import assume, example, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from data import (  # noqa: E402
    LETTERS,
    Tokenizer,
    evaluate_arithmetic,
    format_answer,
    is_correct,
    micro_batches,
    parse_completion,
    step_examples,
)

settings.register_profile("quick", deadline=None, max_examples=100, derandomize=True)
settings.load_profile("quick")

# ---- Arithmetic: expressions built as trees, whose value is known without parsing them

numbers = st.one_of(
    st.integers(0, 10**6).map(str),
    st.tuples(st.integers(0, 999), st.integers(0, 999)).map(lambda ab: f"{ab[0]}.{ab[1]:03}"),
)
spaces = st.sampled_from(["", " ", "  "])


def compound(inner: st.SearchStrategy) -> st.SearchStrategy:
    """(text, value) of `(a op b)`, `-a` and `(a)`; the value is None where it divides by zero."""

    def join(a, operation, b, space):
        x, y = a[1], b[1]
        value = None
        if x is not None and y is not None and not (operation == "/" and y == 0):
            value = {"+": lambda: x + y, "-": lambda: x - y, "*": lambda: x * y,
                     "/": lambda: x / y}[operation]()  # fmt: skip
        return f"({a[0]}{space}{operation}{space}{b[0]})", value

    return st.one_of(
        st.builds(join, inner, st.sampled_from("+-*/"), inner, spaces),
        inner.map(lambda a: (f"-{a[0]}", None if a[1] is None else -a[1])),
        inner.map(lambda a: (f"( {a[0]} )", a[1])),
    )


trees = st.recursive(numbers.map(lambda n: (n, Fraction(n))), compound, max_leaves=12)


@given(trees)
def test_arithmetic_has_the_value_of_the_tree(tree: tuple[str, Fraction | None]) -> None:
    text, value = tree
    assert evaluate_arithmetic(text) == value
    if value is not None:
        assert is_correct("svamp", text, text)
        near = abs(value) <= abs(value + 1) and 10**6 <= abs(value + 1)  # 1e-6 relative
        assert is_correct("svamp", f"{text} + 1", text) == (near or 10**6 <= abs(value))


@given(st.text(alphabet="0123456789.+-*/() e_,x", max_size=40) | st.text())
@example("(" * 2000)
def test_arithmetic_never_raises(text: str) -> None:
    value = evaluate_arithmetic(text)
    assert value is None or isinstance(value, Fraction)


words = st.text(alphabet="abcdefgh .,'()0123\n", max_size=60).map(lambda s: " ".join(s.split()))
# A label is never like a sentence's end: "a. b".
labels = st.text(alphabet="abcxyz '-.()01", min_size=1, max_size=20).map(
    lambda s: " ".join(s.replace(". ", " ").split())
)


@given(words, trees)
def test_answers_of_arithmetic_come_back(rationale: str, tree: tuple) -> None:
    text, value = tree
    assume(value is not None)
    parsed = parse_completion("svamp", f"{rationale} {format_answer('svamp', '', text)}".strip())
    assert parsed is not None and parsed[0] == rationale
    assert parsed[1] in (text, f"({text})") and is_correct("svamp", parsed[1], text)


@given(words, st.lists(labels.filter(bool), min_size=1, max_size=5), st.data())
def test_answers_of_choices_come_back(rationale: str, choices: list[str], data) -> None:
    assume(not any(f"({letter})" in choice for choice in choices for letter in LETTERS))
    choice = data.draw(st.sampled_from(choices))
    offered = "".join(f"\n({letter}) {c}" for letter, c in zip(LETTERS, choices))
    answer = format_answer("cqa", f"q\nAnswer Choices:{offered}", choice)
    assert parse_completion("cqa", f"{rationale} {answer}".strip()) == (rationale, choice)


@given(words, st.sampled_from(["entailment", "neutral", "contradiction"]), st.text(max_size=30))
def test_invented_continuations_change_nothing(rationale: str, label: str, junk: str) -> None:
    for name in ("esnli", "anli1"):
        text = f"{rationale} {format_answer(name, ('p', 'h'), label)}".strip()
        more = f"{text}\n\nPremise: {junk} Answer: neutral So the answer is neutral."
        assert parse_completion(name, text) == parse_completion(name, more) == (rationale, label)


pieces = ["The answer is ", "So the answer is ", "Answer: ", "(3)", "(a) x", "\n\n", "Q:", ".", "(",
          "neutral", " and ", "Premise:", "\0"]  # fmt: skip


@given(st.lists(st.sampled_from(pieces) | st.text(max_size=5), max_size=15).map("".join))
def test_completions_never_raise_nor_give_an_empty_label(text: str) -> None:
    for name in ("svamp", "cqa", "esnli", "anli1"):
        parsed = parse_completion(name, text)
        assert parsed is None or (parsed[0] == parsed[0].strip() and parsed[1].strip())


plain = st.text(alphabet="abcdefghijklmnopqrstuvwxyz 0123456789().", max_size=80)


@given(parts=st.lists(plain, min_size=1, max_size=4), room=st.integers(0, 60))
def test_truncation_keeps_every_parts_eos(tokenizer: Tokenizer, parts: list, room: int) -> None:
    limit = len(parts) + room
    whole = [tokenizer.encode(part)[:-1] for part in parts]
    ids = tokenizer.encode(tuple(parts), limit)
    ends = [i for i, id in enumerate(ids) if id == 1]
    assert len(ends) == len(parts) and ends[-1] == len(ids) - 1
    kept = [ids[a + 1 : b] for a, b in zip([-1, *ends], ends)]
    assert all(part == full[: len(part)] for part, full in zip(kept, whole))
    assert len(ids) == min(limit, sum(map(len, whole)) + len(parts)), "no room is wasted"
    cut = [len(part) for part, full in zip(kept, whole) if len(part) < len(full)]
    if cut:  # parts that were cut got the largest share, evenly
        assert min(cut) >= max(len(part) for part in kept) - 1


special_tokens = st.sampled_from(["</s>", "<pad>", "<unk>", "<extra_id_0>", "<extra_id_99>", "<"])


@given(text=st.lists(st.text(max_size=8) | special_tokens).map("".join))
def test_any_text_equals_sentencepiece_piece_by_piece(tokenizer: Tokenizer, text: str) -> None:
    top = tokenizer.vocab_size - 1
    special = {"</s>": 1, "<pad>": 0, "<unk>": 2}
    special |= {f"<extra_id_{n}>": top - n for n in range(100)}
    ids, rest = [], text
    while True:
        found = min(((rest.find(s), s) for s in special if s in rest), default=None)
        ids += tokenizer.model.Encode(rest[: found[0]] if found else rest)
        if not found:
            break
        ids.append(special[found[1]])
        rest = rest[found[0] + len(found[1]) :]
    assert tokenizer.encode(text) == [*ids, 1]


@given(st.integers(1, 40), st.integers(1, 50), st.integers(0, 2**31), st.integers(1, 3))
def test_every_epoch_has_every_example_once(n: int, batch: int, seed: int, epochs: int) -> None:
    steps = -(-n * epochs // batch)
    order = np.concatenate([step_examples(n, batch, seed, step) for step in range(steps)])
    for epoch in range(epochs):
        assert sorted(order[epoch * n : (epoch + 1) * n]) == list(range(n))
    assert step_examples(n, batch, seed, steps - 1).tolist() == order[-batch:].tolist(), "pure"
    if n >= 20 and epochs > 1:  # with fewer, two shuffled orders may be equal by chance
        assert order[:n].tolist() != order[n : 2 * n].tolist(), "another order in each epoch"


lengths = st.lists(st.tuples(st.integers(1, 50), st.integers(1, 20)), min_size=1, max_size=40)


def places(piece: np.ndarray, sources: np.ndarray, targets: np.ndarray) -> int:
    return len(piece) * int(sources[piece].max(initial=0) + targets[piece].max(initial=0))


@given(lengths, st.integers(30, 900), st.integers(1, 5), st.integers(0, 300), st.integers(0, 9))
def test_micro_batches(pairs: list, most: int, world: int, overhead: int, seed: int) -> None:
    """Every row once, one task a piece, no piece above the limit, equally many for all ranks."""
    sources, targets = np.array(pairs).T
    tasks = np.random.default_rng(seed).integers(0, 2, len(pairs))
    assigned = micro_batches(sources, targets, tasks, most, world, overhead)
    assert len(assigned) == world and len({len(rank) for rank in assigned}) == 1
    ordered = [piece for step in zip(*assigned) for piece in step]
    assert sorted(np.concatenate(ordered).tolist()) == list(range(len(pairs)))
    costs = [places(piece, sources, targets) for piece in ordered]
    assert all(c <= most or len(p) == 1 for c, p in zip(costs, ordered))
    assert all(len(set(tasks[p].tolist())) <= 1 for p in ordered)
    assert costs == sorted(costs, reverse=True), "like cost at one time, empty ones last"
    assert sum(len(rank[-1]) > 0 for rank in assigned) > 0, "no round without rows"
    again = micro_batches(sources, targets, tasks, most, world, overhead)
    assert all(np.array_equal(p, q) for a, b in zip(assigned, again) for p, q in zip(a, b)), "pure"
