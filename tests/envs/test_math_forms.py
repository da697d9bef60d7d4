"""Right answers are right in every form that models write, and wrong ones stay wrong."""

from __future__ import annotations

from itertools import product
from typing import Any

import math_verify
import pytest

from nemocascade.envs.checks import mathematics
from nemocascade.envs.checks.mathematics import equal

RIGHT: dict[str, tuple[str, ...]] = {
    "5": (
        *("5.", "5,", "5;", "$5$", r"\(5\)", "**5**", r"{5}", r"\ 5\ ", r"\displaystyle 5"),
        *(r"\text{5}", r"\mathbf{5}", r"\boldsymbol{5}", "x=5", "x = 5", "5 = x", "f(2) = 5"),
        *("5 cm", r"5\text{ cm}", r"5\,\text{cm}", r"5~\mathrm{cm}", r"5\text{ cm}^2"),
        *("5 apples", r"\text{5 apples}", r"5\ \mathrm{km/h}", "5 km/h", "5 square units"),
        *(r"\$5", "$5", "€5", "5 dollars", r"\text{\$}5", r"\approx 5", r"5^{\text{th}}"),
        *(r"5\%", "5%", "5 percent", r"\text{The answer is } 5", "5.0", "05"),
    ),
    "90": (r"90^\circ", r"90^{\circ}", "90°", r"90\degree", "90 degrees"),
    "1000": ("1,000", "1{,}000", r"1\,000", "1 000", r"1,\!000", "10^3", r"\$1,000", "1e3"),
    "12345.67": ("12,345.67", r"12\,345.67"),
    "7/2": (
        *(r"3\frac{1}{2}", r"3\frac12", "3 1/2", r"3\dfrac{1}{2}", r"3 \tfrac{1}{2}", "3.5"),
        *(r"\frac{7}{2}", r"\dfrac72", r"\frac 7 2", r"{7 \over 2}", r"\left(\frac{7}{2}\right)"),
    ),
    "-1/2": (r"-\frac{1}{2}", r"\frac{-1}{2}", "-0.5", "-.5", "−1/2", "–0.5"),
    "10%": ("0.1", r"10\%", "10"),
    "1,2": (r"\{1, 2\}", "2, 1", "1 and 2", r"1 \text{ and } 2", r"x=1 \text{ or } x=2"),
    "(1,2)": ("(1, 2)", r"\left(1,2\right)", r"(x,y)=(1,2)", "1 < x < 2"),
    "[1,2]": (r"x \in [1,2]", r"1 \le x \le 2", "2 >= x >= 1", r"1\leqslant x\leqslant 2"),
    "(1,2]": (r"1 < x \leq 2", r"2 \geq x > 1", "(1, 2]"),
    r"(-\infty,2)": ("x<2", "2 > x", r"x \lt 2"),
    r"[2,\infty)": (r"x \ge 2", r"[2,+\infty)", "2 ≤ x"),
    r"(-\infty,1)\cup(2,\infty)": (r"x<1 \text{ or } x>2", "x < 1 or x > 2"),
    r"\text{Yes}": ("yes", "Yes.", r"\textbf{Yes}"),
    "true": (r"\text{True}",),
    "No solution": (r"\text{no solution}",),
    "y=2x+1": ("2x+1", "y = 1 + 2x"),
    "x^2": ("x**2", "x^{2}"),
    r"\sin x": ("sin(x)", r"\sin(x)"),
    r"\emptyset": (r"\varnothing", r"\{\}"),
    r"5\pi": (r"5\pi\text{ cm}^2", r"5\pi cm^2"),
    r"\text{5 cm}": ("5", "5 cm"),
    r"\begin{pmatrix}1\\2\end{pmatrix}": (r"\begin{bmatrix} 1 \\ 2 \end{bmatrix}",),
}
WRONG: dict[str, tuple[str, ...]] = {
    "5": ("6 cm", "-5", "5x", r"5\sin x", "5 pi", "5 or 6", r"5\text{ or }6", "x=6", "5e1", "5!"),
    "25": ("5 cm^2", r"5\text{ cm}^2"),
    "1": ("1 or 2", r"1\text{ or }2"),
    "1000": ("1 001", "1,00"),
    "7/2": ("3 1/3", "3 1 2"),
    "[1,2]": (r"1 < x \le 2", "(1,2]", r"1 \le x \ge 2"),
    r"(2,\infty)": ("x<2", r"x \ge 2", "2 > x"),
    r"5\text{ or }6": ("5", "6"),
    r"\text{Yes}": ("no", r"\text{Yes or no}"),
    "10": ("1 0",),
    "x<2": ("x>2",),
}


@pytest.mark.parametrize("expected", RIGHT)
def test_right_answers(expected: str) -> None:
    assert not [form for form in (expected, *RIGHT[expected]) if not equal(expected, form)]


@pytest.mark.parametrize("expected", WRONG)
def test_wrong_answers(expected: str) -> None:
    assert not [form for form in WRONG[expected] if equal(expected, form)]


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """The pairs of readings that algebra compares."""
    pairs: list[tuple[str, str]] = []

    def record(gold: list[Any], found: list[Any], **settings: Any) -> bool:
        pairs.extend((repr(a), repr(b)) for a, b in product(gold, found))
        return bool(math_verify.verify(gold, found, **settings))

    monkeypatch.setattr(mathematics, "verify", record)
    return pairs


@pytest.mark.parametrize("answer", [r"\frac{1}{7}", r"\[ \frac{1}{7} \]", r"$\frac{1}{7}$"])
def test_equal_texts_need_no_algebra(compared: list[tuple[str, str]], answer: str) -> None:
    assert equal(r"\(\frac{1}{7}\)", answer)
    assert not compared
    assert not equal("5", r"5 \\[ 1")


def test_algebra_compares_readings_once(compared: list[tuple[str, str]]) -> None:
    """Each comparison of large numbers can take seconds, and their sum is limited."""
    assert not equal(r"\(2^{100} + 1\)", r"\(2^{100}\)\,")
    assert equal(r"\(1000\)", "1 000")
    assert len(compared) == len(set(compared)) > 2
