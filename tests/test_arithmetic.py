"""Arithmetic of model text: exact, never executed, and hostile text is wrong at once."""

import time
from fractions import Fraction

import pytest

from data import evaluate_arithmetic, is_correct

HOSTILE = {
    "power": "9**9**9",
    "parentheses": "(" * 20_000 + "1" + ")" * 20_000,
    "nested": "(" * 300 + "1" + ")" * 300,
    "zero": "1/0",
    "digits": "9" * 100_000,
    "products": "*".join(["99999999"] * 100_000),
    "code": '__import__("os").system("true")',
    "empty": "",
    "nul": "1\0",
    "unicode digits": "٤٢",
    "two numbers": "1 2",
    "underscore": "1_000",
    "comma": "1,000",
    "floor": "7 // 2",
    "closed": "1)",
    "not closed": "(1",
    "infinity": "inf",
    "not a number": "nan",
    "surrogate": "\ud800",
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_text_is_wrong_at_once(text: str) -> None:
    start = time.process_time()
    assert evaluate_arithmetic(text) is None
    assert not is_correct("svamp", text, "( 84.0 / 2.0 )")
    assert not is_correct("svamp", text, text), "what has no value is never right"
    assert time.process_time() - start < 0.5


def test_a_costly_expression_within_the_limits_is_quick() -> None:
    start = time.process_time()
    evaluate_arithmetic("*".join(["9" * 90] * 21) + "/7")
    evaluate_arithmetic("+".join(f"1/{p}" for p in range(101, 500)))
    assert time.process_time() - start < 0.5


@pytest.mark.parametrize("text, value", [
    ("( 84.0 / 2.0 )", 42), ("42", 42), ("0.1+0.2", Fraction(3, 10)), ("2 + 3 * 4", 14),
    ("20 - 3 - 2", 15), ("24 / 4 / 2", 3), ("-(3 - 5) * -2", -4), ("8.", 8),
    (".5", Fraction(1, 2)), (" 1\n+\t1 ", 2),
])  # fmt: skip
def test_values(text: str, value: Fraction) -> None:
    assert evaluate_arithmetic(text) == value


def test_equality_of_values() -> None:
    for a in ("( 84.0 / 2.0 )", "(84 / 2)", "42"):
        for b in ("( 84.0 / 2.0 )", "(84 / 2)", "42"):
            assert is_correct("svamp", a, b)
    assert is_correct("svamp", "0.3", "0.1+0.2")
    assert is_correct("svamp", "1 - 1", "0")
    assert is_correct("svamp", "1000000", "1000001"), "1e-6 relative"
    assert not is_correct("svamp", "1000000", "1000002")
    assert not is_correct("svamp", "0.0000001", "0"), "relative, not absolute"
    assert not is_correct("svamp", "-42", "42")
    assert not is_correct("svamp", None, "42")
