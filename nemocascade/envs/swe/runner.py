"""Runs tests of the repository in the current folder. The sandbox executes this file's text.

It reads an order from standard input, `{"nonce", "framework", "tests"}`, and writes a JSON line for
each test on the result pipe, `{"nonce", "name", "id", "outcome", "text", "values"}`; or one line
`{"nonce", "unable"}` where it cannot work. Standard library only. What it loads is not trusted: see
`repository.py` for what follows from that.
"""

from __future__ import annotations

import builtins
import hashlib
import json
import os
import sys
import traceback
import types
import unittest
from collections.abc import Callable
from typing import Any

RESULT_FD = 3
VALUE = "__nemocascade_value__"
"""Built-in function that sealed tests hand their values to."""
LONGEST_TEXT = 4000
"""Characters of a failure that are kept: its end, where the reason stands."""
LONGEST_VALUE = 1000

_Report = Callable[[str, str, str, str], None]
_Function = tuple[type, str, Any]


def show(value: Any) -> str:
    """The same text for values that are equal and of built-in types; no text equals another type's.

    A subclass counts as its base, numbers compare as numbers: `True == 1 == 1.0`.
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
    return f"<{type(value).__name__}>"


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
    """Run what is ordered. Never raises for what the repository does."""
    order = json.loads(sys.stdin.read())
    nonce = order["nonce"]
    channel = os.dup(RESULT_FD)
    os.close(RESULT_FD)
    if order["framework"] == "pytest":
        try:  # before anything of the repository could be found in its place
            import pytest  # type: ignore[import-not-found,unused-ignore]  # noqa: F401
        except ImportError as error:
            os.write(channel, json.dumps({"nonce": nonce, "unable": str(error)}).encode() + b"\n")
            return
    values: list[tuple[int, str]] = []
    tampered = _watch()

    def report(name: str, test: str, outcome: str, text: str) -> None:
        line = {
            "nonce": nonce,
            "name": name,
            "id": test,
            "outcome": "tampered" if tampered() else outcome,
            "text": text[-LONGEST_TEXT:],
            "values": list(values),
        }
        values.clear()
        data = json.dumps(line).encode() + b"\n"
        while data:
            data = data[os.write(channel, data) :]

    setattr(builtins, VALUE, lambda key, value: values.append((key, show(value))))
    root = os.getcwd()
    sys.path[:0] = [root, *([f"{root}/src"] if os.path.isdir("src") else [])]
    # A compiled file beside a source would be taken in its place.
    sys.dont_write_bytecode, sys.pycache_prefix = True, "/dev/null/none"
    sys.modules["__main__"] = types.ModuleType("__main__")
    run = _with_pytest if order["framework"] == "pytest" else _with_unittest
    run(order["tests"], report)


def _watch() -> Callable[[], bool]:
    """A function that says whether a function of unittest has been replaced since."""
    parts = (unittest.case, unittest.suite, unittest.result, unittest.loader)
    owners = [v for m in parts for v in vars(m).values() if isinstance(v, type)]
    functions: list[tuple[type, str, Any, Any]] = []
    for owner in owners:
        for name, value in vars(owner).items():
            plain = getattr(value, "__func__", value)
            if isinstance(plain, types.FunctionType):
                functions.append((owner, name, value, plain.__code__))
    case, names = unittest.TestCase, set(dir(unittest.TestCase))

    def tampered() -> bool:
        new = set(dir(case)) - names
        if any(name.startswith("__") for name in new):
            return True
        for owner, name, value, code in functions:
            found = vars(owner).get(name)
            if found is not value or getattr(found, "__func__", found).__code__ is not code:
                return True
        return False

    return tampered


class _Recorder(unittest.TestResult):
    """Reports each test when it has ended."""

    def __init__(self, name: str, report: _Report) -> None:
        super().__init__()
        self._name, self._report = name, report
        self._outcome, self._text = "", ""

    def startTest(self, test: Any) -> None:  # noqa: N802 - unittest's name
        super().startTest(test)
        self._outcome = self._text = ""

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
        else:  # of a class or a module, outside of any test
            self._report(self._name, str(test), "error", text)

    def addSubTest(self, test: Any, subtest: Any, err: Any) -> None:  # noqa: N802
        if err is not None:
            self._note("failed", _failure(err))

    def stopTest(self, test: Any) -> None:  # noqa: N802
        super().stopTest(test)
        self._report(self._name, test.id(), self._outcome or "error", self._text)


def _failure(err: Any) -> str:
    """A failure as Python shows it, without unittest's own lines."""
    kind, value, trace = err
    while trace is not None and "__unittest" in trace.tb_frame.f_globals:
        trace = trace.tb_next
    frames = [
        frame
        for frame in traceback.extract_tb(trace)
        if "unittest" not in frame.filename.replace("\\", "/").split("/")
    ]
    return "".join([*traceback.format_list(frames), *traceback.format_exception_only(kind, value)])


def _with_unittest(names: list[str], report: _Report) -> None:
    for name in names:
        try:
            suite = unittest.defaultTestLoader.loadTestsFromName(name)
            suite.run(_Recorder(name, report))
        except BaseException:  # SystemExit of a module that is imported, too
            report(name, name, "error", traceback.format_exc())


def _with_pytest(names: list[str], report: _Report) -> None:
    import pytest

    class Recorder:
        def __init__(self) -> None:
            self.outcome, self.text = "passed", ""

        def pytest_collectreport(self, report: Any) -> None:
            if report.failed:
                tell(report.nodeid, report.nodeid, "error", str(report.longrepr))

        def pytest_runtest_logreport(self, report: Any) -> None:
            if report.outcome != "passed" and self.outcome == "passed":
                self.outcome, self.text = report.outcome, str(report.longrepr)

        def pytest_runtest_logfinish(self, nodeid: str, location: Any) -> None:
            tell(nodeid, nodeid, self.outcome, self.text)
            self.outcome, self.text = "passed", ""

    tell = report
    options = ["-q", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    pytest.main([*options, "--rootdir", os.getcwd(), *names], plugins=[Recorder()])


if __name__ == "__main__":
    main()
