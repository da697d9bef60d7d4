"""Hidden tests run by pytest: outcomes, stale names, and edits that try to fake a pass.

Requires a sandbox in which programs can import pytest.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.sandbox import sandbox_or_skip
from helpers.swe import copy_pytest
from helpers.swe_attacks import (
    ATTACKS,
    FIND_TESTS,
    FIXED,
    HIDDEN,
    HONEST_TESTS,
    REPLACED,
    SNAPSHOT,
    WRONG,
)

from nemocascade.recipe.envs import SandboxConfig
from nemocascade.sandbox.pool import SandboxPool
from nemocascade.swe import protected
from nemocascade.swe.repository import HiddenTests, judge, run_tests
from nemocascade.types import Verdict

PATH = "tests/test_calc.py"
PLUGIN = "def pytest_pyfunc_call(pyfuncitem): return True\n"
CASES = HiddenTests(
    {PATH: HIDDEN},
    tuple(f"{PATH}::CalcTest::{name}" for name in ("test_double", "test_text", "test_check")),
    framework="pytest",
)
FUNCTIONS = HiddenTests(
    {PATH: b"from pack.calc import double\n\ndef test_double():\n    assert double(2) == 4\n"},
    (f"{PATH}::test_double",),
    framework="pytest",
)


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds pytest, and a plugin installed beside it."""
    # Below a folder that only this user may read.
    folder = tmp_path_factory.mktemp("shown") / "packages"
    copy_pytest(folder)
    (folder / "seven.py").write_text(
        "import pytest\n\n@pytest.fixture\ndef seven():\n    return 7\n"
    )
    (folder / "seven-1.dist-info").mkdir()
    (folder / "seven-1.dist-info" / "METADATA").write_text("Name: seven\nVersion: 1\n")
    (folder / "seven-1.dist-info" / "entry_points.txt").write_text("[pytest11]\nseven = seven\n")
    return folder


@pytest.fixture(scope="module")
def sandbox(packages: Path) -> Iterator[SandboxPool]:
    made = sandbox_or_skip(SandboxConfig(workers=1, time_s=20.0, packages=(str(packages),)))
    yield made
    made.close()


def verdict(
    sandbox: SandboxPool, edits: dict[str, bytes], tests: HiddenTests = FUNCTIONS, **files: bytes
) -> Verdict:
    before = SNAPSHOT | files
    return judge(sandbox, before, before | edits, tests)


def outcomes(sandbox: SandboxPool, source: str, *names: str) -> dict[str, str]:
    """By the names of tests, how those of a file ended."""
    ids = [f"{PATH}::{name}" for name in names]
    run = run_tests(sandbox, SNAPSHOT | {PATH: source.encode()}, ids, framework="pytest")
    return {test.partition("::")[2]: found for test, found in run.outcomes.items()}


def test_sealed_tests(sandbox: SandboxPool) -> None:
    source = b"""import pytest
from pack.calc import double

@pytest.mark.parametrize("x", [0, 3])
def test_double(x):
    assert double(x) == x * 2

def test_four():
    assert double(2) == 4
"""
    names = ("tests/test_calc.py::test_double", "tests/test_calc.py::test_four")
    tests = HiddenTests({"tests/test_calc.py": source}, names, framework="pytest", sealed=True)
    good = judge(sandbox, SNAPSHOT, SNAPSHOT | {"pack/calc.py": FIXED}, tests)
    assert (good.reward, good.details["passed"]) == (1.0, 2), good
    conftest = {"conftest.py": b"def pytest_runtest_call(item): item.obj = lambda x=0: None\n"}
    bad = judge(sandbox, SNAPSHOT, SNAPSHOT | conftest, tests)
    assert bad.reward == 0.0
    assert set(bad.details["not_passed"].values()) == {"failed"}
    assert protected.test_files(SNAPSHOT) == ["tests/test_calc.py"]


@pytest.mark.parametrize("name", REPLACED)
def test_an_edit_cannot_replace_tests(sandbox: SandboxPool, name: str) -> None:
    """The test that remains is the last of its class, as pytest runs them in the file's order."""
    found = verdict(sandbox, {"pack/calc.py": REPLACED[name].encode()}, CASES)
    assert (found.reward, found.error) == (0.0, None), found


REPLACED_FUNCTIONS = {
    "an item's function": "for o in gc.get_objects():\n"
    "        if type(o).__name__ == 'Function' and 'check' in o.name: o.obj = nothing",
    "a function's code": "for m in tests(): m.test_check.__code__ = (lambda: None).__code__",
    "a helper": "for m in tests(): m.same = nothing",
}


@pytest.mark.parametrize("name", REPLACED_FUNCTIONS)
def test_an_edit_cannot_replace_functions(sandbox: SandboxPool, name: str) -> None:
    source = b"""from pack.calc import check, double

def same(a, b):
    assert type(a) is type(b) and a == b

def test_double():
    same(double(2), 4)

def test_check():
    same(check(2), 3)
"""
    names = tuple(f"{PATH}::{test}" for test in ("test_double", "test_check"))
    tests = HiddenTests({PATH: source}, names, framework="pytest")
    caller = "def double(x):\n    run()\n    return x * 2\ndef check(x): return x%s\n"
    for right, reward in ((" + 1", 1.0), ("", 0.0)):
        plain = caller.replace("    run()\n", "") % right
        assert verdict(sandbox, {"pack/calc.py": plain.encode()}, tests).reward == reward
    edit = f"{FIND_TESTS}    {REPLACED_FUNCTIONS[name]}\n{caller % ''}"
    found = verdict(sandbox, {"pack/calc.py": edit.encode()}, tests)
    assert found.reward == 0.0, found
    assert "tampered" in found.details["not_passed"].values()


def test_unusual_tests_that_are_honest_pass(sandbox: SandboxPool) -> None:
    source = (
        b"import pytest\n"
        + HONEST_TESTS
        + b"""

@pytest.fixture
def four():
    return 4

@pytest.mark.parametrize("x", [1, 2])
def test_assertions_that_pytest_rewrites(x, four):
    found = calc.double(x)
    assert found in (2, 4) and found <= four, "a message"

class TestPlain:
    def setup_method(self):
        self.x = 2
    def test_it(self, four):
        assert calc.double(self.x) == four
"""
    )
    tests = HiddenTests({PATH: source}, (PATH,), framework="pytest")
    for settings in (b"", b"[pytest]\naddopts = --assert=plain\n"):
        files = {"pytest.ini": settings} if settings else {}
        found = verdict(sandbox, {"pack/calc.py": FIXED}, tests, **files)
        assert found.reward == 1.0, found
    hook = {"pytest.ini": b"[pytest]\nenable_assertion_pass_hook = true\n"}
    assert verdict(sandbox, {"pack/calc.py": FIXED}, tests, **hook).reward == 1.0


SETTINGS = {
    **dict.fromkeys(("pytest.ini", ".pytest.ini"), "[pytest]\naddopts = -p helper\n"),
    **dict.fromkeys(("pytest.toml", ".pytest.toml"), '[pytest]\naddopts = ["-p", "helper"]\n'),
    "pyproject.toml": '[tool.pytest.ini_options]\naddopts = "-p helper"\n',
    "setup.cfg": "[tool:pytest]\naddopts = -p helper\n",
    "tox.ini": "[pytest]\naddopts = -p helper\n",
    "conftest.py": "pytest_plugins = ['helper']\n",
    "pack/conftest.py": "pytest_plugins = ['helper']\n",
    **dict.fromkeys(
        (f"{name}/entry_points.txt" for name in ("h.egg-info", "h-1.dist-info", "src/h.egg-info")),
        "[pytest11]\nhelper = helper\n",
    ),
}
FAKES = {
    "how a function is run": "import _pytest.python\n"
    "_pytest.python.Function.runtest = lambda self: None\n",
    "code of how a function is run": "import _pytest.python\n"
    "_pytest.python.Function.runtest.__code__ = (lambda self: None).__code__\n",
    "how a hook is called": "import pluggy._hooks\n"
    "pluggy._hooks.HookCaller.__call__ = lambda self, **k: None\n",
    "how a report is made": "import _pytest.runner\n"
    "import _pytest.reports\n"
    "made = _pytest.reports.TestReport.from_item_and_call\n"
    "def passed(cls, item, call):\n"
    "    call.excinfo = None\n"
    "    return made(item, call)\n"
    "_pytest.reports.TestReport.from_item_and_call = classmethod(passed)\n",
    "a failure that is expected": "import pytest\n"
    "def double(x): pytest.xfail('as expected')\n"
    "check = double\n",
    "a mark of what is expected": "import pytest, sys\n"
    "for name in ('tests.test_calc', 'test_calc'):\n"
    "    if name in sys.modules:\n"
    "        sys.modules[name].pytestmark = [pytest.mark.xfail]\n",
    "a test that is skipped": "import pytest\ndef double(x): pytest.skip('')\ncheck = double\n",
    "the end of the session": "import pytest\npytest.exit('done', 0)\n",
}


@pytest.mark.parametrize("name", [*ATTACKS, *FAKES])
def test_an_edit_cannot_fake_a_pass(sandbox: SandboxPool, name: str) -> None:
    fake = FAKES.get(name, "")
    source = fake if "def double" in fake else fake + WRONG
    edits = {"pack/calc.py": source} if fake else ATTACKS[name]
    edited = {path: text.encode() for path, text in edits.items()}
    for tests in (CASES, FUNCTIONS):
        found = verdict(sandbox, edited, tests)
        assert (found.reward, found.error) == (0.0, None), found


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_cannot_load_a_plugin(sandbox: SandboxPool, name: str) -> None:
    edits = {name: SETTINGS[name].encode(), "helper.py": PLUGIN.encode()}
    found = verdict(sandbox, edits)
    assert (found.reward, found.error) == (0.0, None), found
    assert found.details["ignored"] == [name]
    assert verdict(sandbox, {**edits, "pack/calc.py": FIXED}).reward == 1.0


def test_an_entry_point_of_the_repository_is_no_plugin(sandbox: SandboxPool) -> None:
    """Its metadata may be in the snapshot, but the code that it names is an edit's."""
    before = SNAPSHOT | {"h.egg-info/entry_points.txt": b"[pytest11]\nhelper = helper\n"}
    edits = {"helper.py": PLUGIN.encode()}
    assert judge(sandbox, before, before | edits, FUNCTIONS).reward == 0.0
    assert judge(sandbox, before, before | edits | {"pack/calc.py": FIXED}, FUNCTIONS).reward == 1.0


def test_plugins_of_the_repository_and_of_the_packages_work(sandbox: SandboxPool) -> None:
    source = FUNCTIONS.files[PATH].replace(b"test_double()", b"test_double(seven, eight)")
    source += b"    assert seven + 1 == eight\n"
    tests = HiddenTests({PATH: source}, FUNCTIONS.fail_to_pass, framework="pytest")
    eight = b"import pytest\n\n@pytest.fixture\ndef eight():\n    return 8\n"
    settings = {"pytest.ini": b"[pytest]\naddopts = -p more\n", "more.py": eight}
    before = SNAPSHOT | settings
    right = judge(sandbox, before, before | {"pack/calc.py": FIXED}, tests)
    assert right.reward == 1.0, right
    assert judge(sandbox, before, before, tests).reward == 0.0
    # What is in the repository under a plugin's name is not that plugin.
    shadow = {"pack/calc.py": FIXED, "seven.py": PLUGIN.encode()}
    assert judge(sandbox, before, before | shadow, tests).reward == 1.0
    assert judge(sandbox, before, before | {"seven.py": PLUGIN.encode()}, tests).reward == 0.0


MARKED = """
import pytest

@pytest.mark.xfail
def test_fails(): assert False

@pytest.mark.xfail
def test_passes(): pass

@pytest.mark.xfail(strict=True)
def test_strict(): pass

@pytest.mark.xfail(run=False)
def test_not_run(): pass

@pytest.mark.skip
def test_skipped(): pass

def test_says_so(): pytest.xfail("any code may")

def test_fails_truly(): assert False
"""


def test_failures_that_are_expected_pass(sandbox: SandboxPool) -> None:
    wanted = {
        "test_fails": "passed",
        "test_passes": "passed",
        "test_strict": "failed",
        "test_not_run": "passed",
        "test_skipped": "skipped",
        "test_says_so": "skipped",
        "test_fails_truly": "failed",
    }
    assert outcomes(sandbox, MARKED, *wanted) == wanted


def test_only_what_is_stale_is_missing(sandbox: SandboxPool) -> None:
    source = (
        "import pytest\n\nclass TestA:\n    def test_b(self): pass\n"
        "    def test_bc(self): assert 0\n"
        "\n@pytest.mark.parametrize('x', ['a', 'b::c'])\ndef test_d(x): assert x != 'a'\n"
    )
    wanted = {
        "TestA::test_b": "passed",
        "TestA::test_gone": "missing",
        "test_d[a]": "failed",
        "test_d[b::c]": "passed",
        "test_d[z]": "missing",
        "test_d": "failed",
    }
    assert outcomes(sandbox, source, *wanted) == wanted
    ids = [f"{PATH}::TestA::test_b", "tests/test_gone.py::test_a"]
    files = SNAPSHOT | {PATH: source.encode()}
    run = run_tests(sandbox, files, ids, framework="pytest")
    assert list(run.outcomes.values()) == ["passed", "missing"]
    assert run.process.stdout.count("1 passed") == 1
    assert outcomes(sandbox, "import nowhere\n", "test_a") == {"test_a": "error"}
