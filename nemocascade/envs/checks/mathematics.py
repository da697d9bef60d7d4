"""Equality of mathematical answers by `math-verify`, in more forms than it reads by itself."""

from __future__ import annotations

import re
from collections.abc import Callable

from math_verify import parse, verify

Rule = tuple[str, str | Callable[[re.Match[str]], str]]


def equal(expected: str, answer: str) -> bool:
    """Return True if two LaTeX or plain expressions are equal, as written or in their plain form.

    The caller's process limit bounds the time, so the library's own alarms are disabled.
    Raises ValueError if `expected` cannot be parsed.
    """
    gold = _parsed(expected)
    if not gold:
        raise ValueError(f"the expected answer {expected!r} cannot be read as mathematics")
    # Equal words need no algebra, which can take long.
    if _words(expected) == _words(answer):
        return True
    found = _parsed(answer)
    if _verified(gold, found):
        return True
    other_gold, other_found = _other_readings(expected, gold), _other_readings(answer, found)
    return _verified(gold, other_found) or _verified(other_gold, [*found, *other_found])


def _parsed(text: str) -> list[object]:
    return list(parse(f"\\boxed{{{text}}}", parsing_timeout=None))


def _other_readings(text: str, known: list[object]) -> list[object]:
    """Parse the plain forms of a text, without readings that are in `known`."""
    forms = dict.fromkeys((_plain(text), _interval(_plain(text))))
    readings = [reading for form in forms if form and form != text for reading in _parsed(form)]
    return [new for new in readings if not any(type(new) is type(k) and new == k for k in known)]


def _verified(gold: list[object], found: list[object]) -> bool:
    return bool(gold) and bool(found) and bool(verify(gold, found, timeout_seconds=None))


_WRAPPER = re.compile(
    r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|mathsf|boldsymbol|bm|mbox)\s*"
    r"\{([^{}]*)\}(\s*\^\s*(?:\{\s*-?\d\s*\}|\d))?"
)
_DELIMITERS = re.compile(r"(?<!\\)(?:\\[()\[\]]|\$)")
"""Marks of formulas; `\\\\[` breaks a line, and `\\$` is a dollar."""
_NUMBER = r"[+-]?(?:\d[\d,]*(?:\.\d+)?|\.\d+|\d+/\d+|\\[dtc]?frac\{\d+\}\{\d+\})(?:\s*\\pi)?"
_MATHS = r"(?:and|or|to|mod|pi|sqrt|sin|cos|tan|cot|log|ln|exp|inf|infinity)\b"
_MARKS: tuple[Rule, ...] = (
    ("[\u2212\u2013]", "-"),
    ("\u00b0|\\^\\s*\\{?\\s*\\\\(?:circ|degree)\\s*\\}?|\\\\degree(?![A-Za-z])", " "),
    (r"\\(?:[,;:!> ]|q?quad(?![A-Za-z]))|~", " "),  # spaces
    (r"\\(?:displaystyle|left|right)(?![A-Za-z])", ""),
    # Currencies, and the marks of formulas and of bold type around the answer.
    ("\\\\?\\$|\\\\[()\\[\\]]|[\u20ac\u00a3\u00a5]|^\\s*\\*\\*|\\*\\*\\s*$", ""),
    (r"\*\*", "^"),
    (r"[\s.,;:]+$", ""),
)
_FORMS: tuple[Rule, ...] = (
    (r"\^\s*\{\s*(?:st|nd|rd|th)?\s*\}", ""),
    # 1 000, 1.5e3 and 3 1/2
    (r"(?<![\d.])\d{1,3}(?:\s\d{3})+(?!\d)", lambda found: re.sub(r"\s", "", found[0])),
    (r"^\s*([+-]?\d+(?:\.\d+)?)[eE]([+-]?\d+)\s*$", r"\1 \\times 10^{\2}"),
    (r"^\s*([+-]?)(\d+)\s+(\d+)\s*/\s*(\d+)\s*$", r"\1(\2 + \\frac{\3}{\4})"),
    # A number with its unit in words, names of functions, and 5 = x
    (rf"^\s*({_NUMBER})\s+(?!{_MATHS})[A-Za-z]{{2,}}[A-Za-z/ ^\d.]*$", r"\1"),
    (r"(?<![\\A-Za-z])(sin|cos|tan|cot|log|ln)(?![A-Za-z])", r"\\\1"),
    (r"\\varnothing(?![A-Za-z])", r"\\emptyset "),
    (r"^\s*([^=<>]+?)\s*=\s*([A-Za-z])\s*$", r"\2 = \1"),
)


def _plain(text: str) -> str:
    """Return an answer without units, currencies, degrees, spaces in numbers and outer marks."""
    text = _WRAPPER.sub(_unwrapped, _applied(_MARKS, text))
    return _applied(_FORMS, text).strip()


def _applied(rules: tuple[Rule, ...], text: str) -> str:
    for pattern, replacement in rules:
        text = re.sub(pattern, replacement, text)
    return text


def _unwrapped(found: re.Match[str]) -> str:
    """Return a wrapper's content; nothing for a unit at the end, or words before the answer."""
    inner, before, after = found[1], found.string[: found.start()], found.string[found.end() :]
    is_unit = not after.strip(" }") and not re.search(r"\d", inner) and len(inner.strip()) > 1
    is_lead = not before.strip() and re.search(r"(?i)answer|about|approx", inner)
    if (is_unit and before.strip() and not re.search(_MATHS, inner)) or (is_lead and after.strip()):
        return " "
    return f" {inner} {found[2] or ''}"


_SIGNS: tuple[Rule, ...] = (
    (r"\\leq?(?:slant)?(?![A-Za-z])|\u2264", "<="),
    (r"\\geq?(?:slant)?(?![A-Za-z])|\u2265", ">="),
    (r"\\lt(?![A-Za-z])", "<"),
    (r"\\gt(?![A-Za-z])", ">"),
)
_OR = re.compile(r"\bor\b|\\cup|\\lor|\\vee")
_VARIABLE = re.compile(r"[A-Za-z]")


def _interval(text: str) -> str:
    r"""Return inequalities of one variable as intervals: `1 < x \le 2` as `(1, 2]`."""
    parts = [_one_interval(part) for part in _OR.split(_applied(_SIGNS, text))]
    return r" \cup ".join(parts) if all(parts) else text


def _one_interval(text: str) -> str:
    """Return the interval of an inequality; empty if the text is none."""
    terms = [term.strip() for term in re.split("([<>]=?)", text)]
    if len(terms) == 3:
        sign, is_last = terms[1][0], bool(_VARIABLE.fullmatch(terms[2]))
        end = r"\infty" if (sign == "<") == is_last else r"-\infty"
        terms = [*terms, sign, end] if is_last else [end, sign, *terms]
    if len(terms) != 5 or not all(terms) or not _VARIABLE.fullmatch(terms[2]):
        return ""
    if terms[1][0] != terms[3][0]:
        return ""
    low, left, _, right, high = terms if terms[1][0] == "<" else terms[::-1]
    return f"{'[' if '=' in left else '('}{low}, {high}{']' if '=' in right else ')'}"


def _words(text: str) -> str:
    """Return a text in one case, without wrappers, delimiters, further spaces and a full stop."""
    bare = _DELIMITERS.sub("", _WRAPPER.sub(r"\1\2", text))
    return " ".join(bare.split()).rstrip(".").casefold()
