"""Generated repair tasks: short files, and the repositories shipped with the project."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nemocascade.envs.words import NOUNS, SOME_NOUNS, VERBS
from nemocascade.swe.shipped import Steps, repository_task
from nemocascade.types import ToolCall


@dataclass(frozen=True)
class MadeTask:
    """An issue, the verifier's answer, and the turns of a correct solution with reasoning.

    tools: names of the tools that a short prompt lists.
    """

    issue: str
    answer: Mapping[str, Any]
    steps: Steps
    tools: tuple[str, ...] = ()


_REPOSITORIES = 0.1
"""Share of the easiest tasks that are bugs of shipped repositories, mostly too hard for `tiny`."""


def make_task(rng: random.Random, difficulty: int) -> MadeTask:
    """Make a task, see `SweAgentic.make`."""
    if difficulty >= 2:
        issue, answer, steps = repository_task(rng, name_file=difficulty == 2)
        return MadeTask(issue, answer, steps)
    if difficulty <= 0 and rng.random() < _REPOSITORIES:
        issue, answer, steps = repository_task(rng, name_file=False, brief=True)
        return MadeTask(issue, answer, steps, ("search", "read", "edit", "submit"))
    return _short_task(rng, search=difficulty == 1)


def _short_task(rng: random.Random, *, search: bool) -> MadeTask:
    """Make a function whose operation or number differs from what the issue asks for."""
    words, right, function = rng.choice(_OPERATIONS)
    most = 60 if search else 9
    k = rng.randint(2, most)
    wrong, wrong_k = right, k
    if rng.random() < 0.5:
        wrong = rng.choice([sign for _, sign, _ in _OPERATIONS if sign != right])
    else:
        wrong_k = rng.choice([n for n in range(2, most + 1) if n != k])
    file, other, *names = rng.sample(NOUNS if search else SOME_NOUNS, 4)
    name, second = names if search else rng.sample(VERBS[:6], 2)
    path = f"{file}.py"
    files = {path: _function(name, f"x {wrong} {wrong_k}")}
    if search:
        files[f"{other}.py"] = _function(second, f"x {rng.choice(_OPERATIONS)[1]} {k}")
    inputs = rng.sample(range(-9, 60), 3)
    tests = _test(file, name, [(x, function(x, k)) for x in inputs])
    answer = {
        "files": files,
        "tests": {f"test_{file}.py": tests},
        "fail_to_pass": [f"test_{file}.TestIssue.test_{name}"],
        "pass_to_pass": [],
        "framework": "unittest",
        "sealed": True,
    }
    look = [((ToolCall("read", {"path": path}),), f"read {path}")]
    if search:
        asked = f"def {name}"
        look.insert(0, ((ToolCall("search", {"text": asked}),), f"where is {name}"))
    old, new = f"x {wrong} {wrong_k}", f"x {right} {k}"
    repair = ToolCall("edit", {"path": path, "old": old, "new": new})
    end = ((repair, ToolCall("submit", {})), f"{words} {k}: {new}")
    where = "" if search else f" in {path}"
    tools = ("search", "read", "edit", "submit") if search else ("read", "edit", "submit")
    return MadeTask(f"{name}(x){where} must be x {words} {k}.", answer, (*look, end), tools)


def _function(name: str, expression: str) -> str:
    return f"def {name}(x):\n    return {expression}\n"


def _test(module: str, name: str, cases: Sequence[tuple[int, int]]) -> str:
    lines = [f"import unittest\n\nfrom {module} import {name}\n\n"]
    lines += ["class TestIssue(unittest.TestCase):", f"    def test_{name}(self):"]
    lines += [f"        self.assertEqual({name}({given}), {wanted})" for given, wanted in cases]
    return "\n".join(lines) + "\n"


_OPERATIONS: tuple[tuple[str, str, Callable[[int, int], int]], ...] = (
    ("plus", "+", lambda x, k: x + k),
    ("minus", "-", lambda x, k: x - k),
    ("times", "*", lambda x, k: x * k),
    ("modulo", "%", lambda x, k: x % k),
)
