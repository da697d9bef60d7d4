"""Code domain: reward 1 for a program that passes all hidden tests, else 0."""

from __future__ import annotations

import json
import random
import secrets
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from nemocascade.envs.base import final_text
from nemocascade.envs.benchmark_rows import humaneval_row, is_of
from nemocascade.envs.code_blocks import joined_source, programs_of
from nemocascade.envs.code_outputs import same_output, same_value
from nemocascade.envs.row_forms import RowForm
from nemocascade.envs.sandboxed import SandboxedDomain
from nemocascade.recipe.envs import CodeConfig, SandboxConfig
from nemocascade.runtime.strict_json import parse_field
from nemocascade.runtime.turns import kind_of
from nemocascade.types import Message, Outcome, Program, Prompt, Row, Verdict

_STAR = (
    *("string", "re", "datetime", "collections", "heapq", "bisect", "copy", "math", "random"),
    *("statistics", "itertools", "functools", "operator", "io", "sys", "json"),
)
"""Modules whose names LiveCodeBench imports before a program, and then the modules themselves."""
_LONGEST_INTEGER = 50_000
"""Digits of an integer that LiveCodeBench converts to text and back."""

# The last source that compiles and does more than state values, which sample output does too.
_CHOOSE = """
import ast, json, sys
best = -1
for number, source in enumerate(json.load(sys.stdin)):
    try:
        tree = ast.parse(source)
        compile(source, "program.py", "exec", dont_inherit=True)
    except Exception:
        continue
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) or isinstance(node, ast.stmt) and type(node) is not ast.Expr:
            best = number
            break
print(best)
"""


class Code(SandboxedDomain):
    """Strict binary reward. Programs run in the sandbox; outputs are compared outside of it.

    Two styles of tests: text on standard input and output, and function calls. Expected values
    never enter the sandbox, so a program that rewrites its harness gains nothing. An exit by
    `sys.exit` after the right output does not matter, whatever its status. HumanEval's tests are
    programs, which run after the answer in its process: they suit an evaluation, not a training.
    """

    domain = "code"
    answered_tools = ()
    row_forms = (
        RowForm(
            "unit tests (NeMo Gym)",
            read={
                "unit_tests.inputs": "standard inputs, or arguments of calls",
                "unit_tests.outputs": "what each input must give",
                "unit_tests.fn_name": "function to call; without it, programs",
            },
            rejected=dict.fromkeys(
                ("checker", "generated_checker", "special_judge"),
                "a program that judges outputs cannot be run",
            ),
        ),
        RowForm(
            "HumanEval, as published",
            read={
                "test": "defines `check`, which is called with the function",
                "entry_point": "name of the function that the `prompt` begins",
            },
            ignored={"canonical_solution": "only the tests decide"},
        ),
    )

    def __init__(
        self, sandbox: SandboxConfig | None = None, settings: CodeConfig | None = None
    ) -> None:
        self.settings = settings or CodeConfig()
        super().__init__(sandbox, modules=("numpy",) if self.settings.numpy else ())

    def claims(self, row: Row) -> bool:
        return "unit_tests" in row or is_of("humaneval", row)

    def prepare(self, row: Row, folder: Path) -> Row:
        return row if "unit_tests" in row else {**row, **humaneval_row(row)}

    def parse(self, row: Row) -> Mapping[str, Any]:
        """Parse `unit_tests`: `inputs`, `outputs`, and `fn_name` for calls.

        A call's input is a list of arguments, or text with one JSON argument per line.
        """
        if "unit_tests" not in row:
            return {"function": row["entry_point"], "start": row["start"], "check": row["test"]}
        tests = row["unit_tests"]
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
        source = self._program(final_text(response))
        if not source.strip():
            return Verdict(0.0, details={"reason": "no program"})
        tests = prompt.answer
        if "check" in tests:
            return self._checked(source, tests)
        passed, reason = (self._calls if tests["function"] else self._scripts)(source, tests)
        wanted = len(tests["outputs"])
        details = {"passed": passed, "tests": wanted, "reason": reason}
        stopped = reason.partition(":")[0] in ("time", "output")
        right = passed == wanted and not reason
        return Verdict(float(right), details=details, fault="answer" if stopped else None)

    def _checked(self, source: str, tests: Mapping[str, Any]) -> Verdict:
        """Run the row's own test program after the answer; what it prints at its end is a secret,
        so a program that exits before has not passed."""
        passed = secrets.token_hex(16)
        parts = (
            *(tests["start"], source, tests["check"]),
            f"check({tests['function']})\nprint({passed!r})\n",
        )
        outcome = self.sandbox.run(self._prepared(Program(joined_source(parts))))
        right = outcome.status == "ok" and outcome.stdout.strip().endswith(passed)
        stopped = outcome.status in ("time", "output")
        details = {"reason": "" if right else _reason(outcome)}
        return Verdict(float(right), details=details, fault="answer" if stopped else None)

    def _program(self, text: str) -> str:
        """Return the program of an answer. Only the sandbox compiles text of unknown origin."""
        candidates = programs_of(text)
        if len(candidates) == 1:
            return candidates[0]
        said = self.sandbox.run(Program(_CHOOSE, stdin=json.dumps(candidates))).stdout.strip()
        return candidates[int(said) if said.isdecimal() else -1]

    def _calls(self, source: str, tests: Mapping[str, Any]) -> tuple[int, str]:
        """Run all calls in one process; return the tests passed and what stopped the rest."""
        wanted = tests["outputs"]
        program = Program(source, function=tests["function"], calls=tuple(tests["inputs"]))
        outcome = self.sandbox.run(self._prepared(program))
        pairs = zip(wanted, outcome.results[: len(wanted)], strict=False)
        passed = sum(same_value(e, g, self.settings.decimals) for e, g in pairs)
        complete = passed == len(wanted) and outcome.status in ("ok", "failed")
        return passed, "" if complete else _reason(outcome)

    def _scripts(self, source: str, tests: Mapping[str, Any]) -> tuple[int, str]:
        """Run one process per test, up to the first failure; side by side where slots are free."""

        def fails(test: int, outcome: Outcome) -> bool:
            wanted = tests["outputs"][test]
            right = same_output(wanted, outcome.stdout, self.settings.decimals)
            return outcome.status != "ok" or not right

        programs = [
            self._prepared(Program(source, stdin=given, any_exit=True)) for given in tests["inputs"]
        ]
        outcomes = self.sandbox.run_until(programs, fails)
        last = len(outcomes) - 1
        if fails(last, outcomes[last]):
            return last, _reason(outcomes[last])
        return len(outcomes), ""

    def _prepared(self, program: Program) -> Program:
        return replace(program, preamble=_preamble(self.settings))

    def forms(self, prompt: Prompt) -> Collection[str]:
        if "check" in prompt.answer:
            return ("test program",)
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


def _preamble(settings: CodeConfig) -> str:
    """Return the source that runs before a program, in its namespace."""
    lines = []
    if settings.preamble == "livecodebench":
        lines += [f"from {name} import *" for name in (*_STAR, "builtins", "typing")]
        lines += [f"import {name}" for name in _STAR]
        lines.append(f"sys.set_int_max_str_digits({_LONGEST_INTEGER})")
    if settings.recursion_limit:
        lines.append(f"__import__('sys').setrecursionlimit({settings.recursion_limit})")
    return "\n".join(lines)


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
