"""Code: all hidden tests must pass, and a program cannot cheat by changing its surroundings."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from nemocascade.envs.code import Code
from nemocascade.envs.code_blocks import programs_of
from nemocascade.envs.code_outputs import same_output, same_value
from nemocascade.recipe.envs import CodeConfig, SandboxConfig
from nemocascade.sandbox import launch
from nemocascade.sandbox.pool import SandboxPool
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
        (SCRIPT, f"{RIGHT_SCRIPT}\nexit(1)", 1.0, 3),
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
    sandbox = code.sandbox
    assert isinstance(sandbox, SandboxPool)
    (worker,) = sandbox.process_ids()
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
    monkeypatch.setattr(launch, "missing", lambda isolation: "forbidden by this test")
    with pytest.raises(SandboxUnavailable):
        ask(Code(SandboxConfig()), CALLS, RIGHT_CALL)


BODY = 'def f(x):\n    """\n    ```python\n    f(1)\n    ```\n    """\n    return x'


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("```python\na\n```", "a"),
        ("a", "a"),
        ("```python\na", "a"),
        ("```python\na\n```\nNo:\n```python\nb", "b"),
        ("```python\na\n\nNo:\n```python\nb\n```", "b"),
        ("```text\na\n```\nthen\n```python\nb\n```\ndone", "b"),
        ("```python\na\n```\n```text\nb", "a"),
        ("```python\na\n```\nIt prints\n```\n8\n```", "a"),
        ('```json\n{"a": 1}\n```\n```python\na\n```', "a"),
        ("So: ```python\na\n```\nand ```b``` too", "a"),
        ("```python\na```", "a"),
        ("```python\na\n```\nI used a ```python block.", "a"),
        ("```python\r\na\r\nb\r\n```\r\n", "a\nb"),
        ("```Python \na\n```", "a"),
        ("``` PY\na\n```", "a"),
        ("```python3.11\na\n```\n```cpp\nb\n```", "a"),
        ("```python {cmd=true}\na\n```\n```\nb\n```", "a"),
        ("```{.python .numberLines}\na\n```\n```\nb\n```", "a"),
        ("```python:main.py\na\n```\n```\nb\n```", "a"),
        ("```python\na\n```\n```python-repl\n>>> b\n```", "a"),
        ("~~~python\na\n```\n~~~", "a\n```"),
        ("1. So:\n   ```python\n   a:\n       b\n   ```\n", "a:\n    b"),
        ("- ```python\n  a\n\n  b\n  ```", "a\n\nb"),
        ("```python\n    a\n    b\n```", "a\nb"),
        ("````python\n```\na\n````", "```\na"),
        ("````markdown\nUse\n```python\na\n```\n````", "a"),
        ("~~~text\n```py\na\n```\n~~~", "a"),
        (f"```python\n{BODY}\n```", BODY),
        ("```python\n```", ""),
    ],
)
def test_the_last_block_of_python_is_the_program(text: str, source: str) -> None:
    assert programs_of(text) == [source]


@pytest.mark.parametrize(
    ("text", "sources"),
    [
        ("```\na\n```\n```\nb\n```", ["a", "b"]),
        ("```\na\n```\n```json\n{}\n```", ["{}", "a"]),
        ("```cpp\na\n```\n```\n\n```", ["a"]),
    ],
)
def test_without_python_every_block_is_a_candidate(text: str, sources: list[str]) -> None:
    assert programs_of(text) == sources


@pytest.mark.parametrize(
    "text",
    [
        f"```\n{RIGHT_SCRIPT}\n```\nOn 1 it prints\n```\n3\n```\nand on 2 it prints\n```\n5 5\n```",
        f"```\nprint(\n```\n```\n{RIGHT_SCRIPT}\n```\n```\nyes\n```",
        f"```solution\n{RIGHT_SCRIPT}\n```\n```json\n{{}}\n```\n```\n3\n```",
    ],
)
def test_the_last_candidate_that_is_a_program_runs(code: Code, text: str) -> None:
    assert ask(code, SCRIPT, text).reward == 1.0


def test_candidates_that_no_parser_stands_are_no_error(code: Code) -> None:
    """The sandbox compiles them, so that the trainer's process does not."""
    deep = "(" * 10**5
    verdict = ask(code, SCRIPT, f"```\n{RIGHT_SCRIPT}\n```\n```\n{deep}\n```")
    assert (verdict.reward, verdict.error) == (1.0, None)


@pytest.mark.parametrize(
    ("expected", "got", "exact", "tolerance"),
    [
        ("1 2\n3\n", "1  2 \n3", True, True),
        ("1 2\n3", "1 2 3", False, False),
        ("1.0", "1.0000001", False, True),
        ("1.0", "1.001", False, False),
        ("1", "1.0000001", False, False),
        ("123456789", "123456790.0", False, False),
        ("123456789", "123456789.0", True, True),
        ("123456789.5", "123456790", False, True),
        ("0.30", ".3", True, True),
        ("1", "+1", True, True),
        ("100000000", "100000001", False, False),
        ("1", "1.0", True, True),
        ("yes", "Yes", False, False),
        ("nan", "nan", True, True),
        ("sNaN", "1", False, False),
        ("1e3", "1000", True, True),
        ("1e999999999", "2e999999999", False, True),
        ("", "\n", True, True),
        ("9" * 5000, "8" * 5000, False, False),
        ("9" * 5000, "9" * 5000 + ".0", True, True),
    ],
)
def test_same_output(expected: str, got: str, exact: bool, tolerance: bool) -> None:
    assert same_output(expected, got, "exact") == exact
    assert same_output(expected, got, "tolerance") == tolerance


@pytest.mark.parametrize(
    ("expected", "got", "exact", "tolerance"),
    [
        (1, 1, True, True),
        (1, True, True, True),
        (False, 0, True, True),
        (True, False, False, False),
        (1, 1.0, True, True),
        (123456789, 123456790.0, False, False),
        (0.1, 0.1 + 1e-9, False, True),
        ([0.1], [0.1 + 1e-9], False, True),
        (1, 1 + 1e-9, False, False),
        (1.5, 10**400, False, False),
        (10**400, 1.0, False, False),
        (10**20, 10**20 + 1, False, False),
        ("a", "a", True, True),
        ("1", 1, False, False),
        ([1, [2.0]], [1, [2]], True, True),
        ([1], [1, 2], False, False),
        ({"a": 1}, {"a": 1.0}, True, True),
        ({"a": 1}, {"b": 1}, False, False),
        (None, None, True, True),
        (None, False, False, False),
        (float("nan"), float("nan"), False, False),
    ],
)
def test_same_value(expected: Any, got: Any, exact: bool, tolerance: bool) -> None:
    assert same_value(expected, got, "exact") == exact
    assert same_value(expected, got, "tolerance") == tolerance


@pytest.fixture(scope="module")
def bench() -> Iterator[Code]:
    """The code domain set as LiveCodeBench is."""
    made = Code(
        SandboxConfig(time_s=5.0, workers=1, memory_mib=4096),
        CodeConfig(preamble="livecodebench", recursion_limit=50_000, numpy=True, decimals="exact"),
    )
    try:
        assert made.sandbox.size == 1
    except SandboxUnavailable as error:
        pytest.skip(str(error))
    yield made
    made.close()


LIVE = {
    "names of its imports": "print(2 * int(input()) + comb(4, 4) + len(Counter()))",
    "the modules themselves": "print(2 * int(input()) + math.gcd(2, 3) + 0 * random.random())",
    "its own future imports": "from __future__ import annotations\nprint(2 * int(input()) + 1)",
    "types in a signature": "def f(x: List[int]) -> int:\n    return x[0]\n"
    "print(2 * f([int(input())]) + 1)",
    "deep recursion": "def f(x):\n    return x and 1 + f(x - 1)\n"
    "print(2 * int(input()) + f(40000) // 40000)",
    "numpy": "import numpy as np\nprint(2 * int(input()) + int(np.linalg.norm([1, 0])))",
    "much memory": "import mmap\nx = mmap.mmap(-1, 2 << 30)\nprint(2 * int(input()) + 1)",
    "long integers": "print(len(str(10 ** 9000)) - 9000 + 2 * int(input()))",
}


@pytest.mark.parametrize("name", LIVE)
def test_what_livecodebench_gives_a_program(bench: Code, code: Code, name: str) -> None:
    assert ask(bench, SCRIPT, LIVE[name]).reward == 1.0
    plain = 1.0 if name == "its own future imports" else 0.0
    assert ask(code, SCRIPT, LIVE[name]).reward == plain


@pytest.mark.parametrize("name", ["add", "merge"])
def test_a_method_precedes_a_name_of_the_imports(bench: Code, name: str) -> None:
    """`operator` and `heapq` have functions of these names."""
    method = f"def {name}(self, x):\n        return 2 * x + 1"
    tests = {**CALLS, "function": name}
    assert ask(bench, tests, f"class Solution:\n    {method}").reward == 1.0
    assert ask(bench, tests, method.replace("self, ", "")).reward == 1.0
    assert ask(bench, tests, f"class Other:\n    {method}").reward == 0.0


def test_programs_do_not_inherit_the_harness_flags(code: Code) -> None:
    """`from __future__ import annotations` of this project would make them texts."""
    source = "def f(x: int) -> int:\n    return 2 * x + 1 if f.__annotations__['x'] is int else 0"
    assert ask(code, CALLS, source).reward == 1.0


def test_numpy_alone_is_visible(bench: Code) -> None:
    source = "import importlib.util\nprint(importlib.util.find_spec('torch'))"
    assert ask(bench, {**SCRIPT, "outputs": ["None"] * 3}, source).reward == 1.0


@pytest.mark.parametrize("end", ["exit(1)", "import sys\nsys.exit('done')", "raise SystemExit(3)"])
def test_an_exit_after_the_right_output_does_not_matter(code: Code, end: str) -> None:
    assert ask(code, SCRIPT, f"{RIGHT_SCRIPT}\n{end}").reward == 1.0
    assert ask(code, SCRIPT, f"print(4)\n{end}").reward == 0.0


@pytest.mark.parametrize("end", ["1 / 0", "import os\nos._exit(1)", "import os\nos.abort()"])
def test_a_crash_after_the_right_output_does(code: Code, end: str) -> None:
    assert ask(code, SCRIPT, f"import sys\n{RIGHT_SCRIPT}\nsys.stdout.flush()\n{end}").reward == 0.0


def test_rows_with_calls() -> None:
    def parse(**tests: Any) -> Any:
        return Code().parse({"unit_tests": tests})

    parsed = parse(fn_name="f", inputs=["1\n[2, 3]", [4, 5]], outputs=["7", 9])
    assert parsed == {"function": "f", "inputs": [[1, [2, 3]], [4, 5]], "outputs": [7, 9]}
    with pytest.raises(ValueError, match="must be a list"):
        parse(fn_name="f", inputs=[1], outputs=[1])
