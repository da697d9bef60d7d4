"""Code: all hidden tests must pass, and a program cannot cheat by changing its surroundings."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from nemocascade.envs.code import Code, program_of, same_output, same_value
from nemocascade.recipe.envs import SandboxConfig
from nemocascade.sandbox import launch
from nemocascade.types import Message, Prompt, SandboxUnavailable, Verdict

CALLS = {"function": "f", "inputs": [[1], [2], [5]], "outputs": [3, 5, 11]}
SCRIPT = {"function": "", "inputs": ["1\n", "2\n", "5\n"], "outputs": ["3\n", "5\n", "11\n"]}
RIGHT_CALL = "def f(x):\n    return 2 * x + 1"
RIGHT_SCRIPT = "print(2 * int(input()) + 1)"


@pytest.fixture(scope="module")
def code() -> Iterator[Code]:
    made = Code(SandboxConfig(time_s=3.0, workers=1))
    try:
        assert made.sandbox.size == 1
    except SandboxUnavailable as error:
        pytest.skip(str(error))
    yield made
    made.close()


def ask(code: Code, tests: dict[str, Any], source: str) -> Verdict:
    prompt = Prompt("x", "code", (Message("user", "go"),), tests)
    return code.score(prompt, [Message("assistant", source)])


@pytest.mark.parametrize(
    ("tests", "source", "reward", "passed"),
    [
        (CALLS, RIGHT_CALL, 1.0, 3),
        (CALLS, f"Here:\n```python\n{RIGHT_CALL}\n```\nDone.", 1.0, 3),
        (CALLS, "class Solution:\n    def f(self, x):\n        return 2 * x + 1", 1.0, 3),
        (CALLS, "def f(x):\n    return {1: 3, 2: 5}[x]", 0.0, 2),
        (CALLS, "def f(x):\n    return str(2 * x + 1)", 0.0, 0),
        (CALLS, "def g(x):\n    return 2 * x + 1", 0.0, 0),
        (
            CALLS,
            f"{RIGHT_CALL}\nimport threading, time\n"
            "threading.Thread(target=time.sleep, args=(30,)).start()",
            0.0,
            3,
        ),
        (CALLS, "def f(x:", 0.0, 0),
        (CALLS, "", 0.0, None),
        (SCRIPT, RIGHT_SCRIPT, 1.0, 3),
        (SCRIPT, "print(int(input()) + 2)", 0.0, 1),
        (SCRIPT, f"{RIGHT_SCRIPT}\nexit(1)", 0.0, 0),
        (SCRIPT, "while True: pass", 0.0, 0),
    ],
)
def test_all_tests_must_pass(
    code: Code, tests: dict[str, Any], source: str, reward: float, passed: int | None
) -> None:
    verdict = ask(code, tests, source)
    assert verdict.error is None
    assert verdict.reward == reward
    assert verdict.details.get("passed") == passed


FAKES = {
    "equal to everything": """
class Any(int):
    def __eq__(self, other): return True
    __hash__ = int.__hash__
def f(x): return Any(0)
""",
    "the harness is patched": """
import json, sys
json.dumps = lambda *a, **k: 'true'
for m in list(sys.modules.values()):
    for n in ('_plain', '_run_job', 'run', '_find', '_finish'):
        if hasattr(m, n): setattr(m, n, lambda *a: 0)
def f(x): return True
""",
    "the exit status is zero": "import os\nos._exit(0)",
    "it leaves on the first call": "def f(x):\n    raise SystemExit(0)",
    "results are written by hand": """
import os
os.write(3, b'true\\n' * 3)
os._exit(0)
""",
    "a status is sent on every descriptor": """
import os
for n in range(256):
    try: os.write(n, b'{"status": 0, "over_time": false, "cpu_s": 0, "wall_s": 0}')
    except OSError: pass
os._exit(0)
""",
    "expected values are looked for in the frames": """
import sys, gc
def f(x):
    frame = sys._getframe()
    while frame:
        for v in frame.f_locals.values():
            if isinstance(v, dict) and 'outputs' in v: return v['outputs'].pop(0)
        frame = frame.f_back
    return None
""",
    "expected values are looked for in memory": """
import gc
def f(x):
    for o in gc.get_objects():
        if isinstance(o, list) and o == [3, 5, 11]: return o[(1, 2, 5).index(x)]
""",
    "the job holds no outputs": """
import os
try: os.lseek(4, 0, 0)
except OSError: pass
def f(x): return None
""",
}


@pytest.mark.parametrize("name", FAKES)
def test_a_pass_cannot_be_faked(code: Code, name: str) -> None:
    verdict = ask(code, CALLS, FAKES[name])
    assert verdict.error is None
    assert (verdict.reward, verdict.details["passed"]) == (0.0, 0)
    assert ask(code, CALLS, RIGHT_CALL).reward == 1.0


def test_a_program_that_never_ends_is_the_answers_fault(code: Code) -> None:
    verdict = ask(code, SCRIPT, "import time\nwhile True: time.sleep(1)")
    assert (verdict.reward, verdict.fault) == (0.0, "answer")


def test_a_worker_that_dies_is_an_error_and_no_zero(code: Code) -> None:
    ask(code, CALLS, RIGHT_CALL)
    (worker,) = code.sandbox.process_ids()
    kill = threading.Timer(0.2, os.kill, (worker, signal.SIGKILL))
    kill.start()
    verdict = ask(code, CALLS, "import time\ntime.sleep(2.9)")
    kill.join()
    assert verdict.reward is None
    assert "SandboxError" in str(verdict.error)
    assert verdict.fault == "host"
    assert ask(code, CALLS, RIGHT_CALL).reward == 1.0


def test_a_host_without_isolation_stops_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error verdict for each of a million programs would help nobody."""
    monkeypatch.setattr(launch, "missing", lambda walls: "forbidden by this test")
    with pytest.raises(SandboxUnavailable):
        ask(Code(SandboxConfig()), CALLS, RIGHT_CALL)


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("```python\na\n```", "a\n"),
        ("```py\na\n```\n```\nb\n```", "b\n"),
        ("a", "a"),
        ("```python\na", "```python\na"),
        ("```python\na\n```\nNo:\n```python\nb", "```python\na\n```\nNo:\n```python\nb"),
        ("```python\na\n\nNo:\n```python\nb\n```", "b\n"),
        ("```text\na\n```\nthen\n```python\nb\n```\ndone", "b\n"),
        ("```python\na\n```\n```text\nb", "a\n"),
        ("So: ```python\na\n```\nand ```b``` too", "a\n"),
        ("```Python \r\na\r\n```\r\n", "a\r\n"),
        ("```python\na```", "a"),
    ],
)
def test_the_last_block_is_the_program(text: str, source: str) -> None:
    assert program_of(text) == source


@pytest.mark.parametrize(
    ("expected", "got", "same"),
    [
        ("1 2\n3\n", "1  2 \n3", True),
        ("1 2\n3", "1 2 3", False),
        ("1.0", "1.0000001", True),
        ("1.0", "1.001", False),
        ("1", "+1", True),
        ("100000000", "100000001", False),
        ("1", "1.0", True),
        ("yes", "Yes", False),
        ("nan", "nan", True),
        ("1e3", "1000", True),
        ("", "\n", True),
        ("9" * 5000, "8" * 5000, False),
    ],
)
def test_same_output(expected: str, got: str, same: bool) -> None:
    assert same_output(expected, got) == same


@pytest.mark.parametrize(
    ("expected", "got", "same"),
    [
        (1, 1, True),
        (1, True, False),
        (True, True, True),
        (False, 0, False),
        (1, 1.0, True),
        (0.1, 0.1 + 1e-9, True),
        (10**400, 1.0, False),
        (10**20, 10**20 + 1, False),
        ("a", "a", True),
        ("1", 1, False),
        ([1, [2.0]], [1, [2]], True),
        ([1], [1, 2], False),
        ({"a": 1}, {"a": 1.0}, True),
        ({"a": 1}, {"b": 1}, False),
        (None, None, True),
        (None, False, False),
        (float("nan"), float("nan"), False),
    ],
)
def test_same_value(expected: Any, got: Any, same: bool) -> None:
    assert same_value(expected, got) == same


def test_rows_with_calls() -> None:
    def parse(**tests: Any) -> Any:
        return Code().parse({"verifier_metadata": {"unit_tests": tests}})

    parsed = parse(fn_name="f", inputs=["1\n[2, 3]", [4, 5]], outputs=["7", 9])
    assert parsed == {"function": "f", "inputs": [[1, [2, 3]], [4, 5]], "outputs": [7, 9]}
    with pytest.raises(ValueError, match="must be a list"):
        parse(fn_name="f", inputs=[1], outputs=[1])
