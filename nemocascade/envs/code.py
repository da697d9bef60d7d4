"""Code domain: reward 1 for a program that passes all hidden tests, else 0."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from nemocascade.envs.base import final_text
from nemocascade.envs.sandboxed import SandboxedDomain
from nemocascade.runtime.strict_json import parse_field
from nemocascade.runtime.turns import kind_of
from nemocascade.sandbox.pool import SandboxPool
from nemocascade.types import Message, Outcome, Program, Prompt, Row, Verdict

TOLERANCE = 1e-6
"""Relative and absolute tolerance of numbers with a point or exponent; integers are exact."""

_FENCE = "```"
_PYTHON = ("", "python", "py", "python3")
"""Languages of fences around a program."""
_INTEGER = re.compile(r"[+-]?\d+")


class Code(SandboxedDomain):
    """Strict binary reward. Programs run in the sandbox; outputs are compared outside of it.

    Two styles of tests: text on standard input and output, and function calls. Expected values
    never enter the sandbox, so a program that rewrites its harness gains nothing.
    """

    domain = "code"

    def claims(self, row: Row) -> bool:
        return "unit_tests" in (row.get("verifier_metadata") or {})

    def parse(self, row: Row) -> Mapping[str, Any]:
        """Parse `unit_tests`: `inputs`, `outputs`, and `fn_name` for calls.

        A call's input is a list of arguments, or text with one JSON argument per line.
        """
        tests = row["verifier_metadata"]["unit_tests"]
        tests = parse_field(tests, "unit_tests") if isinstance(tests, str) else tests
        inputs, outputs = list(tests["inputs"]), list(tests["outputs"])
        if not inputs or len(inputs) != len(outputs):
            raise ValueError(f"{len(inputs)} inputs have {len(outputs)} outputs")
        function = tests.get("fn_name") or ""
        if not isinstance(function, str):
            raise ValueError(f"fn_name must be a text, it is {kind_of(function)}")
        if function:
            inputs = [_arguments(given) for given in inputs]
            outputs = [parse_field(o, "outputs") if isinstance(o, str) else o for o in outputs]
        elif others := [text for text in (*inputs, *outputs) if not isinstance(text, str)]:
            raise ValueError(
                f"without fn_name, inputs and outputs are texts; one is {kind_of(others[0])}"
            )
        return {"function": function, "inputs": inputs, "outputs": outputs}

    def check(self, prompt: Prompt, response: Sequence[Message]) -> Verdict:
        source = program_of(final_text(response))
        if not source.strip():
            return Verdict(0.0, details={"reason": "no program"})
        tests = prompt.answer
        passed, reason = (_calls if tests["function"] else _scripts)(self.sandbox, source, tests)
        wanted = len(tests["outputs"])
        details = {"passed": passed, "tests": wanted, "reason": reason}
        stopped = reason.partition(":")[0] in ("time", "output")
        right = passed == wanted and not reason
        return Verdict(float(right), details=details, fault="answer" if stopped else None)

    def forms(self, prompt: Prompt) -> Collection[str]:
        return ("calls" if prompt.answer["function"] else "standard input",)

    def dummy(self, prompt: Prompt) -> Sequence[Message]:
        name = prompt.answer["function"] or "dummy"
        return (Message("assistant", f"def {name}(*values):\n    return None"),)

    def make(self, rng: random.Random, difficulty: int) -> Prompt:
        """Make a task. 0: one operation on x. 1: two. 2: a choice, or a loop over a list. 3: I/O.

        Programs of level 3 read a line and print; the others define a function of one argument.
        """
        text, expression, function = _LEVELS[min(max(difficulty, 0), 2)](rng)
        many = "xs" in expression
        name = "xs" if many else "x"
        inputs: list[Any] = rng.sample(range(-20, 50), 6)
        if many:
            inputs = [rng.choices(range(-9, 30), k=4) for _ in range(6)]
        outputs = [function(given) for given in inputs]
        answer: dict[str, Any]
        if difficulty >= 3:
            ask = f"Read numbers xs. Print {text}." if many else f"Read x. Print {text}."
            source = f"{_READ[name]}\nprint({expression})"
            lines = [" ".join(map(str, given)) if many else str(given) for given in inputs]
            careless = f"{_READ[name]}\n{expression}"
            answer = {
                "function": "",
                "inputs": [f"{line}\n" for line in lines],
                "outputs": [f"{out}\n" for out in outputs],
            }
        else:
            called = rng.choice("fghp")
            ask = f"{rng.choice(_ASKS)} {called}({name}): {text}."
            source, careless = (
                f"def {called}({name}):\n    {how}"
                for how in (f"return {expression}", f"print({expression})")
            )
            answer = {"function": called, "inputs": [[i] for i in inputs], "outputs": outputs}
        return self._made(ask, answer, source, f"{text}: {expression}", careless)


def program_of(text: str) -> str:
    """Return the last fenced block of Python, or the whole text if there is none.

    The last opening decides: if that block is never closed, the whole text counts, fences included.
    """
    program: str | None = None
    lines: list[str] | None = None  # those of the open block
    is_python = False
    for line in text.split("\n"):
        before, fence, after = line.partition(_FENCE)
        language = after.strip("` \t\r").lower()
        opens = bool(fence) and _FENCE not in after
        if opens and (lines is None or (language and not before.strip())):
            lines, is_python = [], language in _PYTHON
            program = None if is_python else program
        elif lines is not None and fence and not language:
            if is_python:
                program = "\n".join([*lines, before])
            lines = None
        elif lines is not None:
            lines.append(line)
    return text if program is None else program


def same_output(expected: str, got: str) -> bool:
    """Return True if two outputs have the same words in the same lines, numbers by value."""
    ours, theirs = expected.strip().splitlines(), got.strip().splitlines()
    return len(ours) == len(theirs) and all(map(_same_line, ours, theirs))


def same_value(expected: Any, got: Any) -> bool:
    """Return True if JSON types and values agree, floats within the tolerance."""
    if isinstance(expected, bool) or isinstance(got, bool):
        return expected is got
    if isinstance(expected, int) and isinstance(got, int):
        return expected == got
    if isinstance(expected, int | float) and isinstance(got, int | float):
        return _close(expected, got)
    if isinstance(expected, list) and isinstance(got, list):
        return len(expected) == len(got) and all(map(same_value, expected, got))
    if isinstance(expected, dict) and isinstance(got, dict):
        return expected.keys() == got.keys() and all(
            same_value(value, got[key]) for key, value in expected.items()
        )
    return type(expected) is type(got) and bool(expected == got)


def _calls(sandbox: SandboxPool, source: str, tests: Mapping[str, Any]) -> tuple[int, str]:
    """Run all calls in one process; return the tests passed and what stopped the rest."""
    outcome = sandbox.run(Program(source, function=tests["function"], calls=tuple(tests["inputs"])))
    results = outcome.results[: len(tests["outputs"])]
    passed = sum(same_value(e, g) for e, g in zip(tests["outputs"], results, strict=False))
    complete = passed == len(tests["outputs"]) and outcome.status == "ok"
    return passed, "" if complete else _reason(outcome)


def _scripts(sandbox: SandboxPool, source: str, tests: Mapping[str, Any]) -> tuple[int, str]:
    """Run one process per test, up to the first failure."""
    for passed, (given, wanted) in enumerate(zip(tests["inputs"], tests["outputs"], strict=True)):
        outcome = sandbox.run(Program(source, stdin=given))
        if outcome.status != "ok" or not same_output(wanted, outcome.stdout):
            return passed, _reason(outcome)
    return len(tests["outputs"]), ""


def _reason(outcome: Outcome) -> str:
    if outcome.status == "ok":
        return "wrong output"
    said = outcome.stderr.strip().splitlines()
    return f"{outcome.status}: {said[-1][:200]}" if said else outcome.status


def _arguments(given: Any) -> list[Any]:
    if isinstance(given, str):
        return [parse_field(line, "inputs") for line in given.splitlines() if line.strip()]
    if not isinstance(given, list):
        raise ValueError(f"the input of a call must be a list or lines of JSON, it is {given!r}")
    return given


def _same_line(expected: str, got: str) -> bool:
    ours, theirs = expected.split(), got.split()
    return len(ours) == len(theirs) and all(map(_same_word, ours, theirs))


def _same_word(expected: str, got: str) -> bool:
    if expected == got:
        return True
    if _INTEGER.fullmatch(expected) and _INTEGER.fullmatch(got):
        return expected.lstrip("+") == got.lstrip("+")
    try:
        return _close(float(expected), float(got))
    except ValueError:
        return False


def _close(a: float, b: float) -> bool:
    try:
        return math.isclose(a, b, rel_tol=TOLERANCE, abs_tol=TOLERANCE)
    except OverflowError:  # an integer too large for a float
        return False


_READ = {"x": "x = int(input())", "xs": "xs = list(map(int, input().split()))"}
_Task = tuple[str, str, Callable[[Any], Any]]


def _one(rng: random.Random) -> _Task:
    return rng.choice(_OPERATIONS)(rng.randint(1, 15), "x", "x", lambda x: x)


def _two(rng: random.Random) -> _Task:
    first = rng.choice((_times, _plus))(rng.randint(2, 12), "x", "x", lambda x: x)
    other = rng.choice((_plus, _minus))
    return other(rng.randint(1, 20), *first)


def _branch(rng: random.Random) -> _Task:
    k, a, b = rng.randint(1, 20), rng.randint(1, 20), rng.randint(1, 20)
    if rng.random() < 0.5:
        text = f"x plus {a} if x is above {k}, else x minus {b}"
        return text, f"x + {a} if x > {k} else x - {b}", lambda x: x + a if x > k else x - b
    name, reduce = rng.choice((("sum", sum), ("max", max), ("min", min)))
    text = f"the {name} of all in xs plus {a} times {b}"
    return text, f"{name}(xs) + {a} * {b}", lambda xs: reduce(xs) + a * b


def _times(k: int, text: str, code: str, f: Callable[[Any], Any]) -> _Task:
    return f"{text} times {k}", f"{code} * {k}", lambda x: f(x) * k


def _plus(k: int, text: str, code: str, f: Callable[[Any], Any]) -> _Task:
    return f"{text} plus {k}", f"{code} + {k}", lambda x: f(x) + k


def _minus(k: int, text: str, code: str, f: Callable[[Any], Any]) -> _Task:
    return f"{text} minus {k}", f"{code} - {k}", lambda x: f(x) - k


def _modulo(k: int, text: str, code: str, f: Callable[[Any], Any]) -> _Task:
    return f"the rest of {text} by {k}", f"{code} % {k}", lambda x: f(x) % k


_ASKS = ("Write", "Define", "Code", "Make", "Give", "Build", "Add", "Program")
_OPERATIONS = (_times, _plus, _minus, _modulo)
_LEVELS = (_one, _two, _branch)
