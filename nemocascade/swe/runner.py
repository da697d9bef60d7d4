"""Runs tests of the repository in the current folder. The sandbox executes this file's text.

It reads an order from standard input, `{"nonce", "framework", "tests", "files"}` with the paths of
the tests' files, and writes JSON lines to the result pipe. The first is `{"nonce", "started"}`,
before anything of the repository is loaded, or `{"nonce", "unable"}` if it cannot run. Then each
test gives `{"nonce", "id", "outcome"}`, with `name` if it was requested by something other than its
id, `text` if it did not pass, and `values` if it did. Only the standard library is used. The loaded
code is not trusted: see `repository.py` for the consequences.
"""

from __future__ import annotations

import builtins
import hashlib
import importlib
import importlib.metadata
import inspect
import json
import math
import os
import sys
import traceback
import types
import unittest
from collections.abc import Callable, Iterable
from decimal import Decimal
from fractions import Fraction
from typing import Any

from nemocascade.swe.watched_code import TestCode, case_is_tampered, framework_parts, watch

RESULT_FD = 3
VALUE = "__nemocascade_value__"
"""Built-in function to which sealed tests pass their values."""
LONGEST_TEXT = 4000
"""Maximum characters of a failure; its end is kept, since that has the reason."""
LONGEST_TEXTS = 64_000
"""Maximum characters of all failures; later ones are reported without a reason."""
LONGEST_VALUE = 1000

_Report = Callable[..., None]
"""Takes the requested name, the test's id, its outcome and text, and if the test was replaced."""


def show(value: Any) -> str:
    """Return the same text for equal values of built-in types; other types' text differs.

    A subclass counts as its base, numbers compare by value: `True == 1 == 1.0`. Exact numbers,
    views of dictionaries and NumPy's scalars count as the built-in values that they equal.
    """
    text = _show(value)
    if len(text) > LONGEST_VALUE:
        return "sha256:" + hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()
    return text


def _show(value: Any) -> str:
    if value is None:
        return "None"
    for kind, method in _SCALARS.items():
        if isinstance(value, kind):
            return method(value)
    if isinstance(value, list):
        return f"[{','.join(_show(v) for v in list.__iter__(value))}]"
    if isinstance(value, tuple):
        return f"({','.join(_show(v) for v in tuple.__iter__(value))})"
    if isinstance(value, dict):
        items = sorted(f"{_show(k)}:{_show(v)}" for k, v in dict.items(value))
        return f"{{{','.join(items)}}}"
    if isinstance(value, set):
        return f"set({','.join(sorted(_show(v) for v in set.__iter__(value)))})"
    if isinstance(value, frozenset):
        return f"set({','.join(sorted(_show(v) for v in frozenset.__iter__(value)))})"
    for types_, built_in in _EQUAL_TO_BUILT_INS:
        if isinstance(value, types_):
            return _show(built_in(value))
    if type(value).__module__ == "numpy" and callable(getattr(value, "item", None)):
        return _show(value.item())
    return f"<{type(value).__name__}>"


def _number(value: Decimal | Fraction) -> int | float | str:
    """Return the built-in number that equals an exact one; text that equals none without it."""
    if not math.isfinite(value):
        return float(value)
    exact = Fraction(value)
    if exact.denominator == 1:
        return exact.numerator
    return float(exact) if Fraction(float(exact)) == exact else f"<{exact}>"


_EQUAL_TO_BUILT_INS: tuple[tuple[Any, Callable[[Any], Any]], ...] = (
    (bytearray, bytes),
    ((type({}.keys()), type({}.items())), set),
    (types.MappingProxyType, dict),
    ((Decimal, Fraction), _number),
)


def _float(value: float) -> str:
    return int.__repr__(int(value)) if float.is_integer(value) else float.__repr__(value)


_SCALARS: dict[type, Callable[[Any], str]] = {
    int: lambda value: int.__repr__(int.__add__(value, 0)),
    float: _float,
    str: str.__repr__,
    bytes: bytes.__repr__,
    complex: complex.__repr__,
}


def main() -> None:
    """Run the ordered tests. Never raises because of the repository's code."""
    order = json.loads(sys.stdin.read())
    nonce = order["nonce"]
    channel = os.dup(RESULT_FD)
    os.close(RESULT_FD)

    def write(**line: Any) -> None:
        data = json.dumps({"nonce": nonce, **line}, separators=(",", ":")).encode() + b"\n"
        while data:
            data = data[os.write(channel, data) :]

    run: Callable[[list[str], _Report, TestCode], None] = _with_unittest
    if order["framework"] == "pytest":
        try:  # import before the repository's code can shadow it
            plugins = _load_pytest()
        except ImportError as error:
            write(unable=str(error))
            return
        run = _pytest_runner(plugins)
    values: list[tuple[int, str]] = []
    tampered = watch(framework_parts())
    codes = TestCode(order["files"], with_pytest=order["framework"] == "pytest")
    left_chars = LONGEST_TEXTS

    def report(name: str, test: str, outcome: str, text: str, replaced: bool = False) -> None:
        nonlocal left_chars
        fraud = tampered() or (replaced and outcome == "passed")
        line: dict[str, Any] = {"id": test, "outcome": "tampered" if fraud else outcome}
        if name != test:
            line["name"] = name
        if line["outcome"] != "passed":
            line["text"] = text[-min(LONGEST_TEXT, left_chars) :] if left_chars else ""
            left_chars -= len(line["text"])
        elif values:
            line["values"] = list(values)
        values.clear()
        write(**line)

    setattr(builtins, VALUE, lambda key, value: values.append((key, show(value))))
    write(started=True)
    root = os.getcwd()
    sys.path[:0] = [root, *([f"{root}/src"] if os.path.isdir("src") else [])]
    # A compiled file beside a source would be loaded instead of it.
    sys.dont_write_bytecode, sys.pycache_prefix = True, "/dev/null/none"
    sys.modules["__main__"] = types.ModuleType("__main__")
    run(order["tests"], report, codes)


class _Recorder(unittest.TestResult):
    """Reports each test when it has ended."""

    def __init__(self, name: str, report: _Report, codes: TestCode) -> None:
        super().__init__()
        self._name, self._report, self._codes = name, report, codes
        self._outcome, self._text, self._replaced = "", "", False

    def startTest(self, test: Any) -> None:  # noqa: N802 - unittest's name
        super().startTest(test)
        self._replaced = case_is_tampered(test, self._codes)

    def _note(self, outcome: str, text: str = "") -> None:
        if self._outcome in ("", "passed", "skipped"):
            self._outcome, self._text = outcome, text

    def addSuccess(self, test: Any) -> None:  # noqa: N802
        self._note(self._outcome or "passed")

    def addExpectedFailure(self, test: Any, err: Any) -> None:  # noqa: N802
        self._note(self._outcome or "passed")

    def addUnexpectedSuccess(self, test: Any) -> None:  # noqa: N802
        self._note("failed", "this test was expected to fail")

    def addSkip(self, test: Any, reason: str) -> None:  # noqa: N802
        self._note("skipped", reason)

    def addFailure(self, test: Any, err: Any) -> None:  # noqa: N802
        self._note("failed", _failure(err))

    def addError(self, test: Any, err: Any) -> None:  # noqa: N802
        text = _failure(err)
        if isinstance(test, unittest.TestCase):
            self._note("error", text)
        else:  # failure of a class or a module, outside of any test
            self._report(self._name, str(test), "error", text)

    def addSubTest(self, test: Any, subtest: Any, err: Any) -> None:  # noqa: N802
        if err is not None:
            self._note("failed", _failure(err))

    def stopTest(self, test: Any) -> None:  # noqa: N802
        super().stopTest(test)
        replaced = self._replaced or case_is_tampered(test, self._codes)
        self._report(self._name, test.id(), self._outcome or "error", self._text, replaced)
        # A skipped test may end without having started.
        self._outcome, self._text, self._replaced = "", "", False


def _failure(err: Any) -> str:
    """Format a failure like Python, without unittest's own frames."""
    kind, value, trace = err
    while trace is not None and "__unittest" in trace.tb_frame.f_globals:
        trace = trace.tb_next
    frames = [
        frame
        for frame in traceback.extract_tb(trace)
        if "unittest" not in frame.filename.replace("\\", "/").split("/")
    ]
    return "".join([*traceback.format_list(frames), *traceback.format_exception_only(kind, value)])


def _with_unittest(names: list[str], report: _Report, codes: TestCode) -> None:
    suites: dict[str, unittest.TestSuite] = {}
    for name in names:
        try:
            suites[name] = unittest.defaultTestLoader.loadTestsFromName(name)
            for test in _cases(suites[name]):
                kind = type(test)
                function = inspect.getattr_static(kind, test._testMethodName, None)
                codes.keep(test.id(), function, kind)
        except BaseException:  # includes SystemExit of an imported module
            report(name, name, "error", traceback.format_exc())
    for name, suite in suites.items():
        try:
            suite.run(_Recorder(name, report, codes))
        except BaseException:
            report(name, name, "error", traceback.format_exc())


def _cases(suite: Iterable[Any]) -> Iterable[unittest.TestCase]:
    for test in suite:
        if isinstance(test, unittest.TestCase):
            yield test
        else:
            yield from _cases(test)


def _load_pytest() -> list[str]:
    """Load pytest and its installed plugins, and return the plugins' names.

    Plugins are not searched for later: a repository with an entry point would add its own. Raises
    ImportError.
    """
    importlib.import_module("pytest")
    for name in importlib.import_module("_pytest.config").default_plugins:
        importlib.import_module(f"_pytest.{name}")
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    installed = importlib.metadata.entry_points(group="pytest11")
    for plugin in installed:
        plugin.load()
    return sorted({plugin.name for plugin in installed})


def _pytest_runner(plugins: list[str]) -> Callable[[list[str], _Report, TestCode], None]:
    """Return a runner by pytest with `plugins`; the repository's settings may disable them."""

    def run(names: list[str], report: _Report, codes: TestCode) -> None:
        import pytest

        # One missing id would abort the whole run, so request files, not ids.
        files = dict.fromkeys(name.partition("::")[0] for name in names)
        there = [path for path in files if os.path.exists(path)]
        if not there:
            return
        recorder = _pytest_recorder(pytest, set(names), _speaking_of_xfail(there), report, codes)
        options = ["-q", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
        options += ["--rootdir", os.getcwd()]
        pytest.main([*options, *there], plugins=[*plugins, recorder])

    return run


def _speaking_of_xfail(paths: Iterable[str]) -> set[str]:
    """Return the files that mention xfail, read before any code of the repository runs."""
    found = set()
    for path in paths:
        with open(path, "rb") as file:
            if b"xfail" in file.read():
                found.add(path)
    return found


def _pytest_recorder(
    pytest: Any, wanted: set[str], may_fail: set[str], tell: _Report, codes: TestCode
) -> Any:
    """Return a plugin that deselects unwanted tests and reports each outcome."""

    class Recorder:
        def __init__(self) -> None:
            self.outcome, self.text = "passed", ""
            self.expected: set[str] = set()
            self.replaced = False

        @pytest.hookimpl(trylast=True)  # type: ignore[untyped-decorator]
        def pytest_collection_modifyitems(self, items: list[Any]) -> None:
            items[:] = [item for item in items if _is_wanted(item.nodeid, wanted)]

        def pytest_collection_finish(self, session: Any) -> None:
            # Only tests with the mark: any code under test may call pytest.xfail.
            for item in session.items:
                owner = getattr(item, "cls", None)
                codes.keep(item.nodeid, getattr(item, "obj", None), owner)
                marked = item.get_closest_marker("xfail") is not None
                if marked and item.nodeid.partition("::")[0] in may_fail:
                    self.expected.add(item.nodeid)

        def pytest_collectreport(self, report: Any) -> None:
            if report.failed:
                tell(report.nodeid, report.nodeid, "error", str(report.longrepr))

        def pytest_runtest_logreport(self, report: Any) -> None:
            failed_as_expected = hasattr(report, "wasxfail") and report.nodeid in self.expected
            if report.outcome == "passed" or (report.skipped and failed_as_expected):
                return
            if self.outcome in ("passed", "skipped"):
                self.outcome, self.text = report.outcome, str(report.longrepr)

        @pytest.hookimpl(tryfirst=True)  # type: ignore[untyped-decorator]
        def pytest_runtest_call(self, item: Any) -> None:
            self.replaced = self.replaced or _item_is_replaced(item, codes)

        @pytest.hookimpl(tryfirst=True)  # type: ignore[untyped-decorator]
        def pytest_runtest_teardown(self, item: Any) -> None:
            self.replaced = self.replaced or _item_is_replaced(item, codes)

        def pytest_runtest_logfinish(self, nodeid: str, location: Any) -> None:
            tell(nodeid, nodeid, self.outcome, self.text, self.replaced)
            self.outcome, self.text, self.replaced = "passed", "", False

    return Recorder()


def _is_wanted(test: str, wanted: set[str]) -> bool:
    """Return True if a test, or something that contains it, is wanted."""
    ends = [i for i in range(len(test)) if test[i] == "[" or test.startswith("::", i)]
    return test in wanted or any(test[:end] in wanted for end in ends)


def _item_is_replaced(item: Any, codes: TestCode) -> bool:
    """Return True if an item of pytest does not run what its file says."""
    path, owner = item.nodeid.partition("::")[0], getattr(item, "cls", None)
    case = getattr(item, "_instance", None) or getattr(item, "_testcase", None)
    if isinstance(case, unittest.TestCase) and case_is_tampered(case, codes):
        return True
    function = getattr(item, "obj", None)
    if function is not None and codes.is_replaced(item.nodeid, function):
        return True
    return codes.differs(path, getattr(item, "module", None), owner, item.name.partition("[")[0])


if __name__ == "__main__":
    main()
