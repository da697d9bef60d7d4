"""Generated small repositories with a bug, an issue and tests.

The tests' expected values come from the correct code, run once when the task is made.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nemocascade.envs.words import NOUNS, VERBS
from nemocascade.swe.edits import Edit
from nemocascade.swe.repository import HiddenTests

_FOLDER = "app"
_NAMES = [f"{verb}_{noun}" for verb in VERBS for noun in NOUNS]
_HARDEST = 10
"""Maximum difficulty: there are no distinct names for more files and functions."""


@dataclass(frozen=True)
class Bug:
    """files: with the bug, without the tests. edit: the repair; `reasoning` explains it."""

    files: Mapping[str, str]
    issue: str
    edit: Edit
    reasoning: str
    tests: HiddenTests


@dataclass(frozen=True)
class _Function:
    """A function of one argument, with a correct source and perhaps a wrong one.

    lines, wrong: sources without line ends. inputs: arguments on which they differ.
    """

    name: str
    lines: tuple[str, ...]
    wrong: tuple[str, ...]
    inputs: tuple[Any, ...]

    def values(self, lines: Sequence[str]) -> list[Any]:
        space: dict[str, Any] = {}
        exec("\n".join(lines), space)
        return [space[self.name](given) for given in self.inputs]


def make_bug(rng: random.Random, difficulty: int) -> Bug:
    """Make a repository with a bug.

    Difficulty 0: two files with one short function each; the issue states the expected result of
    one. Difficulty d >= 1: `2 d + 2` files of at least `d` functions; the issue has wrong results.
    From 2 on, these come from a function that calls the broken one through `d - 1` other files. 10
    is the maximum.
    """
    return _easy(rng) if difficulty <= 0 else _repository(rng, min(difficulty, _HARDEST))


def _easy(rng: random.Random) -> Bug:
    # Excludes x and letters that look like digits.
    name, other = rng.sample("abcdefghjkmnpqrstuvw", 2)
    k = rng.randint(2, 9)
    said, right, wrong = *rng.choice(_SIGNS), rng.choice(_SIGNS)[1]
    while wrong == right:
        wrong = rng.choice(_SIGNS)[1]
    function = _Function(
        name,
        (f"def {name}(x):", f"    return x {right} {k}"),
        (f"def {name}(x):", f"    return x {wrong} {k}"),
        (3, 5, 11),
    )
    distractor = f"def {other}(x):\n    return x {rng.choice(_SIGNS)[1]} {rng.randint(2, 9)}\n"
    files = {f"{name}.py": _text(function.wrong), f"{other}.py": distractor}
    path = f"{name}.py"
    return Bug(
        files=dict(sorted(files.items())),
        issue=f"{name}(x) must be x {said} {k}.",
        edit=_repair(path, files[path], function),
        reasoning=f"{path}: x {said} {k} is x {right} {k}.",
        tests=_hidden({path: [function]}, {name}, "test_app.py"),
    )


def _repository(rng: random.Random, difficulty: int) -> Bug:
    names = rng.sample(_NAMES, (2 * difficulty + 3) * difficulty + 1)
    paths = [f"{_FOLDER}/{noun}.py" for noun in rng.sample(NOUNS, 2 * difficulty + 2)]
    parts = {path: [_function(rng, names.pop()) for _ in range(difficulty)] for path in paths}
    home, *others = paths
    broken = parts[home][0] = _broken(rng, names.pop())
    asked, failing = broken, {broken.name}
    tested = {home: list(parts[home])}
    imports: dict[str, list[str]] = {path: [] for path in paths}
    below = home
    for path in others[: difficulty - 1]:
        imports[path].append(f"from {_module(below)} import {asked.name}")
        lines = (f"def {names[-1]}(given):", f"    return {asked.name}(given)")
        asked, below = _Function(names.pop(), lines, lines, broken.inputs), path
        parts[path].append(asked)
        tested[path] = [asked]
        failing.add(asked.name)
    files = {}
    for path in paths:
        blocks = ["\n".join(imports[path])] if imports[path] else []
        order = rng.sample(parts[path], len(parts[path]))
        blocks += ["\n".join(f.wrong) for f in order]
        files[path] = "\n\n\n".join(blocks) + "\n"
    wanted, got = broken.values(broken.lines), broken.values(broken.wrong)
    shown = [i for i in range(len(wanted)) if wanted[i] != got[i]][:2]
    issue = " ".join(
        f"`{asked.name}({broken.inputs[i]!r})` returns {got[i]!r}, it should return {wanted[i]!r}."
        for i in shown
    )
    edit = _repair(home, files[home], broken)
    reasoning = f"{asked.name} " + (f"calls {broken.name} " if asked is not broken else "")
    reasoning += f"in {home}; the line {edit.search[-1].strip()!r} is wrong."
    # A caller returns the result of what it calls.
    values = dict.fromkeys(failing, wanted)
    tests = _hidden(tested, failing, "tests/test_app.py", values=values)
    return Bug(files, issue, edit, reasoning, tests)


def _repair(path: str, text: str, function: _Function) -> Edit:
    """Return the shortest edit: the wrong line, with enough lines above to make it unique."""
    lines = text.split("\n")
    start = next(
        i for i in range(len(lines)) if tuple(lines[i : i + len(function.wrong)]) == function.wrong
    )
    (at,) = (i for i, line in enumerate(function.wrong) if line != function.lines[i])
    for above in range(at + 1):
        first = at - above
        search = list(function.wrong[first : at + 1])
        size = len(search)
        if sum(lines[i : i + size] == search for i in range(len(lines))) == 1:
            break
    assert lines[start + first] == search[0]
    return Edit(path, tuple(search), function.lines[first : at + 1])


def _hidden(
    parts: Mapping[str, Sequence[_Function]],
    failing: set[str],
    path: str,
    *,
    values: Mapping[str, Sequence[Any]] | None = None,
) -> HiddenTests:
    """Build a test of each function in `parts`. values: results of those that cannot run alone."""
    lines = ["import unittest", ""]
    lines += [f"from {_module(p)} import {f.name}" for p, part in parts.items() for f in part]
    lines += ["", "", "class TestApp(unittest.TestCase):"]
    names = []
    for function in (f for part in parts.values() for f in part):
        names.append(function.name)
        found = (values or {}).get(function.name) or function.values(function.lines)
        lines.append(f"    def test_{function.name}(self):")
        lines += [
            f"        self.assertEqual({function.name}({given!r}), {value!r})"
            for given, value in zip(function.inputs, found, strict=True)
        ]
        lines.append("")
    prefix = f"{_module(path)}.TestApp.test_"
    return HiddenTests(
        files={path: "\n".join(lines).encode()},
        fail_to_pass=tuple(prefix + n for n in names if n in failing),
        pass_to_pass=tuple(prefix + n for n in names if n not in failing),
        sealed=True,
    )


def _module(path: str) -> str:
    return path.removesuffix(".py").replace("/", ".")


def _text(lines: Sequence[str]) -> str:
    return "\n".join(lines) + "\n"


_SIGNS = (("times", "*"), ("plus", "+"), ("minus", "-"))


def _function(rng: random.Random, name: str, *, is_broken: bool = False) -> _Function:
    """Make a random function."""
    body, at, wrong, inputs = rng.choice(_BODIES)(rng)
    lines = (f"def {name}({'x' if isinstance(inputs[0], int) else 'xs'}):", *body)
    spoilt = (*lines[: at + 1], wrong, *lines[at + 2 :]) if is_broken else lines
    return _Function(name, lines, spoilt, tuple(inputs))


def _broken(rng: random.Random, name: str) -> _Function:
    """Make a function whose bug changes a result."""
    while True:
        made = _function(rng, name, is_broken=True)
        if made.values(made.lines) != made.values(made.wrong):
            return made


_Body = tuple[list[str], int, str, list[Any]]
"""Lines, index of the line to break, its broken form, and inputs."""


def _numbers(rng: random.Random) -> list[int]:
    return rng.choices(range(-9, 30), k=rng.randint(3, 6))


def _scaled(rng: random.Random) -> _Body:
    k, m = rng.randint(2, 20), rng.randint(1, 50)
    inputs = rng.sample(range(-20, 50), 4)
    return [f"    return x * {k} + {m}"], 0, f"    return (x + {m}) * {k}", inputs


def _clipped(rng: random.Random) -> _Body:
    low, high = rng.randint(-20, 0), rng.randint(10, 40)
    inputs = [low - rng.randint(1, 9), high + rng.randint(1, 9), rng.randint(1, 9)]
    return [f"    return min(max(x, {low}), {high})"], 0, f"    return max(x, {low})", inputs


def _sum_above(rng: random.Random) -> _Body:
    k = rng.randint(0, 15)
    body = [
        "    total = 0",
        "    for x in xs:",
        f"        if x > {k}:",
        "            total += x",
        "    return total",
    ]
    at, wrong = rng.choice(((2, f"        if x >= {k}:"), (3, "            total = x")))
    return body, at, wrong, [[*_numbers(rng), k], _numbers(rng), []]


def _largest(rng: random.Random) -> _Body:
    k = rng.randint(1, 9)
    body = [
        "    best = xs[0]",
        "    for x in xs[1:]:",
        "        if x > best:",
        "            best = x",
        f"    return best + {k}",
    ]
    at, wrong = rng.choice(((2, "        if x < best:"), (1, "    for x in xs[2:]:")))
    return body, at, wrong, [_numbers(rng) for _ in range(3)]


def _count_multiples(rng: random.Random) -> _Body:
    k = rng.randint(2, 5)
    body = [
        "    count = 0",
        "    for x in xs:",
        f"        if x % {k} == 0:",
        "            count += 1",
    ]
    body.append("    return count")
    at, wrong = rng.choice(((0, "    count = 1"), (2, f"        if x % {k} == 1:")))
    return body, at, wrong, [_numbers(rng) for _ in range(3)]


_BODIES: tuple[Callable[[random.Random], _Body], ...] = (
    _scaled,
    _clipped,
    _sum_above,
    _largest,
    _count_multiples,
)
