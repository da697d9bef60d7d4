"""Protected files: edits of them are ignored, and edits of other files count."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from helpers.sandbox import sandbox_or_skip

from nemocascade.recipe.envs import SandboxConfig
from nemocascade.sandbox.pool import SandboxPool
from nemocascade.swe.protected import Protected, file_of
from nemocascade.swe.repository import HiddenTests, judge
from nemocascade.swe.snapshots import misfit
from nemocascade.types import Verdict

WRONG, RIGHT = b"def double(x):\n    return x\n", b"def double(x):\n    return 2 * x\n"
TEST = b"""import unittest
from pack.calc import double

class CalcTest(unittest.TestCase):
    def test_double(self):
        self.assertEqual(double(3), 6)
"""
FAKE = TEST.replace(b"        self.assertEqual(double(3), 6)", b"        pass")
BESIDE = {
    "pack/__init__.py": b"",
    "pack/calc.py": WRONG,
    "pack/other_test.py": b"import unittest\n",
}


@pytest.fixture(scope="module")
def sandbox() -> Iterator[SandboxPool]:
    made = sandbox_or_skip(SandboxConfig(time_s=5.0, workers=1))
    yield made
    made.close()


def verdict(
    sandbox: SandboxPool, before: dict[str, bytes], edits: dict[str, bytes], path: str, *ids: str
) -> Verdict:
    """Verdict on edits, where the hidden test is at `path`; `ids` name others that must pass."""
    name = path.removesuffix(".py").removeprefix("src/").replace("/", ".")
    tests = HiddenTests({path: TEST}, (f"{name}.CalcTest.test_double",), ids)
    return judge(sandbox, before, before | edits, tests)


def test_a_repair_beside_the_test_counts(sandbox: SandboxPool) -> None:
    edits = {"pack/calc.py": RIGHT, "pack/other_test.py": b"x", "pack/calc_test.py": b"y"}
    found = verdict(sandbox, BESIDE, edits, "pack/calc_test.py")
    assert found.reward == 1.0, found
    assert found.details["ignored"] == ["pack/calc_test.py", "pack/other_test.py"]
    assert verdict(sandbox, BESIDE, {}, "pack/calc_test.py").reward == 0.0
    package = {"pack/__init__.py": b"from pack import calc\ncalc.double = lambda x: 2 * x\n"}
    assert verdict(sandbox, BESIDE, package, "pack/calc_test.py").reward == 1.0


IN_TESTS = {"pack/calc.py": WRONG, "tests/test_old.py": TEST}
IN_SRC = {"src/pack/__init__.py": b"", "src/pack/calc.py": WRONG}
PLACES = {
    "a package of the test's name, in the root": (
        IN_TESTS,
        "test_calc.py",
        {"test_calc/__init__.py": FAKE},
    ),
    "a package of the test's name, beside sources": (
        BESIDE,
        "pack/calc_test.py",
        {"pack/calc_test/__init__.py": FAKE},
    ),
    "a module of the test folder's name": (
        IN_TESTS,
        "tests/test_calc.py",
        {"tests.py": b"class test_calc:\n    " + FAKE.replace(b"\n", b"\n    ")},
    ),
    "a package of the test folder's name, in src": (
        IN_TESTS,
        "tests/test_calc.py",
        {"src/tests/__init__.py": b"", "src/tests/test_calc.py": FAKE},
    ),
    "a package of the sources' name, before src": (
        IN_SRC,
        "src/pack/calc_test.py",
        {"pack/__init__.py": b"", "pack/calc_test.py": FAKE},
    ),
    "a package where there was none": (
        {"pack/calc.py": WRONG},
        "pack/calc_test.py",
        {"pack/__init__.py": b"__path__ = ['fake']\n", "fake/calc_test.py": FAKE},
    ),
    "helpers of the tests, farther up": (
        {**IN_TESTS, "tests/helper.py": b"", "tests/unit/test_calc.py": TEST},
        "tests/unit/test_calc.py",
        {"tests/helper.py": b"import pack.calc\npack.calc.double = lambda x: 6\n"},
    ),
    "a folder that has nothing but tests": (
        {"pack/calc.py": WRONG, "checks/test_old.py": TEST},
        "checks/test_calc.py",
        {"checks/pack.py": b""},
    ),
    "a folder that there was not": (
        {"pack/calc.py": WRONG},
        "checks/test_calc.py",
        {"checks/pack.py": b""},
    ),
}


@pytest.mark.parametrize("name", PLACES)
def test_nothing_takes_the_place_of_a_test(sandbox: SandboxPool, name: str) -> None:
    before, path, edits = PLACES[name]
    found = verdict(sandbox, before, edits, path)
    assert found.reward == 0.0, found
    assert set(found.details["ignored"]) >= {edit for edit in edits if "fake/" not in edit}
    source = next(path for path in before if path.endswith("calc.py") and "test" not in path)
    assert verdict(sandbox, before, {**edits, source: RIGHT}, path).reward == 1.0


def test_a_test_of_the_snapshot_runs_as_it_was(sandbox: SandboxPool) -> None:
    """It is named, but its file is not among the hidden ones."""
    for old in ("checks/test_old.py", "old_test.py", "pack/old_test.py", "pack/old.py"):
        before = {"pack/calc.py": WRONG, "pack/x.py": b"", "checks/y.py": b"", old: TEST}
        module = old.removesuffix(".py").replace("/", ".")
        ids = (f"{module}.CalcTest.test_double",)
        fake = {old: FAKE}
        found = judge(sandbox, before, before | fake, HiddenTests({}, ids))
        assert (found.reward, found.details["ignored"]) == (0.0, [old])
        assert judge(
            sandbox, before, before | fake | {"pack/calc.py": RIGHT}, HiddenTests({}, ids)
        ).reward


def test_a_test_that_stands_nowhere_is_an_error(sandbox: SandboxPool) -> None:
    for name in ("tests.test_new.CalcTest.test_double", "tests/test_new.py::CalcTest::test_double"):
        with pytest.raises(ValueError, match=r"test_new.* is in neither .*\(1 of 2 tests\)"):
            verdict(sandbox, BESIDE, {"tests/test_new.py": FAKE}, "pack/calc_test.py", name)
    # A package is the file of its own tests alone: an edit could make the module below it.
    name = "pack.made.CalcTest"
    found = verdict(sandbox, BESIDE, {"pack/made.py": FAKE}, "pack/calc_test.py", name)
    assert found.details["ignored"] == ["pack/made.py"]
    assert found.reward == 0.0


def test_files_that_cannot_lie_beside_each_other_are_the_edits_fault(sandbox: SandboxPool) -> None:
    tests = "tests/test_calc.py"
    for path in ("pack/calc.py/x.py", "x" * 300, "\ud800", "pack"):
        found = verdict(sandbox, BESIDE, {path: b""}, tests)
        assert (found.reward, found.error) == (0.0, None)
        assert found.details["reason"]
    below = HiddenTests({"pack/calc.py/x": b""}, ("pack.calc",))
    with pytest.raises(ValueError, match=r"the repository with tests\.files: pack/calc\.py is a"):
        judge(sandbox, BESIDE, BESIDE, below)
    assert not misfit(["a/b", "a/c", "ab", "a/bc/d"])


def test_the_file_of_a_test() -> None:
    files = {"a/b.py", "src/c/__init__.py", "src/c/d.py", "tests/test_a.py"}
    for test, path in {
        "a.b.T.test": "a/b.py",
        "a.b": "a/b.py",
        "c.d.T": "src/c/d.py",
        "c.T.test": "src/c/__init__.py",
        "c.e.T.test": None,
        "./tests/test_a.py::T::test[x.py::y]": "tests/test_a.py",
        "tests/test_b.py::test": None,
        "x": None,
    }.items():
        assert file_of(test, files) == path


def test_metadata_and_settings_are_protected_wherever_they_stand() -> None:
    protected = Protected({}, {}, ())
    for path in (
        *("a/b.egg-info/x", "c.dist-info/entry_points.txt", "sitecustomize.py", "a/conftest.py"),
        *("usercustomize.py", ".pytest.ini", "pytest.toml", ".pytest.toml", "src/tox.ini"),
    ):
        assert path in protected
    assert "egg-info.py" not in protected
