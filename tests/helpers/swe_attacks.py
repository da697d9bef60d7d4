"""A small repository with tests, and edits that try to fake a pass of them."""

from __future__ import annotations

BUGGY = b"def double(x):\n    return x + x + 1\n\n\ndef check(x):\n    return x\n"
FIXED = BUGGY.replace(b"x + x + 1", b"x * 2").replace(
    b"    return x\n", b"    if x < 0:\n        raise ValueError(x)\n    return x\n"
)
VISIBLE = b"""import unittest
from pack.calc import double

class CalcTest(unittest.TestCase):
    def test_zero(self):
        self.assertEqual(double(0), 0)
"""
HIDDEN = b"""import unittest
from pack import calc

class CalcTest(unittest.TestCase):
    def setUp(self):
        self.start = 5

    def test_double(self):
        self.assertEqual(calc.double(self.start), 10)
        self.assertTrue(calc.double(1) > 1)

    def test_text(self):
        for text in "ab":
            with self.subTest(text):
                self.assertEqual(calc.double(text), text + text)

    def test_check(self):
        with self.assertRaises(ValueError):
            calc.check(-1)
"""
SNAPSHOT = {
    "pack/__init__.py": b"",
    "pack/calc.py": BUGGY,
    "tests/__init__.py": b"",
    "tests/test_calc.py": VISIBLE,
}
CASE = "tests.test_calc.CalcTest"
FORGED = '{"nonce": "%s", "name": "%s", "id": "%s", "outcome": "passed", "text": "", "values": []}'
ALL = [f"{CASE}.{name}" for name in ("test_double", "test_text", "test_check")]
WRONG = "def double(x): return 0\ndef check(x): return 0\n"
SHADOWS = ("unittest.py", "unittest/__init__.py", "json.py", "traceback.py", "sitecustomize.py")
REPLACED_ASSERTIONS = """
import contextlib, unittest
for name in dir(unittest.TestCase):
    if name.startswith("assert"):
        setattr(unittest.TestCase, name, lambda *a, **k: contextlib.nullcontext())
"""
REPLACED_CLASS = """
import unittest
class Lenient(unittest.TestCase):
    def assertEqual(self, *a): pass
    def assertTrue(self, *a): pass
    def assertRaises(self, *a): return self.subTest()
unittest.TestCase = Lenient
"""
REPLACED_CODE = """
import unittest
def nothing(self, *a, **k): pass
for name in ("assertEqual", "assertTrue", "fail", "_callTestMethod"):
    getattr(unittest.TestCase, name).__code__ = nothing.__code__
"""
WRITES_EVERYWHERE = f"""
import os
for n in range(64):
    for line in {[FORGED % ("", t, t) for t in ALL]!r}:
        try: os.write(n, line.encode() + b"\\n")
        except OSError: pass
"""
ATTACKS = {
    "test files": {"tests/test_calc.py": "def test(): pass\n"},
    "test files, at run time": {
        "pack/__init__.py": "for name in ('tests/test_calc.py', 'tests/__init__.py'):\n"
        "    open(name, 'w').close()\n"
    },
    "the test package": {
        "tests/__init__.py": "import unittest\n"
        "unittest.TestCase.run = lambda self, result: result.addSuccess(self)\n"
    },
    "modules of the runner's names": dict.fromkeys(SHADOWS, "class TestCase:\n    pass\n"),
    "results on every descriptor": {"pack/calc.py": WRITES_EVERYWHERE + WRONG},
    "assertions": {"pack/calc.py": REPLACED_ASSERTIONS + WRONG},
    "code of assertions": {"pack/calc.py": REPLACED_CODE + WRONG},
    "the way a test is run": {
        "pack/calc.py": "import unittest\n"
        "unittest.TestCase._callTestMethod = lambda self, method: None\n" + WRONG
    },
    "the class of test cases": {
        "pack/calc.py": REPLACED_CLASS + WRONG,
    },
    "the module of test cases": {
        "pack/calc.py": "import sys, types, unittest\n"
        "sys.modules['unittest.case'] = types.ModuleType('unittest.case')\n" + WRONG
    },
    "what runs a part of a test": {
        "pack/calc.py": "import unittest.case\n"
        "class Outcome(unittest.case._Outcome):\n"
        "    def testPartExecutor(self, *a, **k): return contextlib.suppress(BaseException)\n"
        "import contextlib\n"
        "unittest.case._Outcome = Outcome\n" + WRONG
    },
    "the main module": {"pack/calc.py": "import __main__\n__main__.main = print\n" + WRONG},
    "output that looks like success": {
        "pack/calc.py": "print('Ran 3 tests in 0.001s\\n\\nOK')\nimport os\nos._exit(0)\n"
    },
}
FIND_TESTS = """
import contextlib, gc, sys, unittest
def tests():
    for name in ("tests.test_calc", "test_calc"):
        if name in sys.modules:
            yield sys.modules[name]
def nothing(*a, **k): return contextlib.nullcontext()
def run():
"""
REMAINING = {
    "code": "for m in tests(): m.CalcTest.test_check.__code__ = (lambda self: None).__code__",
    "method": "for m in tests(): m.CalcTest.test_check = nothing",
    "set-up": "for m in tests(): m.CalcTest.setUp = lambda self: "
    "setattr(self, 'assertRaises', nothing)",
    "methods of instances": "for o in gc.get_objects():\n"
    "        if isinstance(o, unittest.TestCase): o.test_check = nothing",
    "assertions of instances": "for o in gc.get_objects():\n"
    "        if isinstance(o, unittest.TestCase): o.assertRaises = nothing",
    "assertions of a class": "for m in tests(): m.CalcTest.assertRaises = nothing",
    "a class beside its copy": "for m in tests():\n"
    "        kind = m.CalcTest\n"
    "        m.CalcTest = type('CalcTest', (unittest.TestCase,), dict(vars(kind)))\n"
    "        kind.test_check = nothing",
}
"""Replaced parts of tests that have not run; the first test calls `run`."""
RIGHT_CALLER = "def double(x):\n    run()\n    return x * 2\ndef check(x): return x\n"
ALL_BUT_CHECK = "import sys\ndef double(x): return x * 2\ndef check(x): return x\n"
BUILT = """
import builtins
real = builtins.__build_class__
def build(function, name, *bases, **k):
    made = real(function, name, *bases, **k)
    if name == "CalcTest": made.test_check = lambda self: None
    return made
builtins.__build_class__ = build
"""
REPLACED = {
    **{
        f"{k} of what remains": f"{FIND_TESTS}    {v}\n{RIGHT_CALLER}" for k, v in REMAINING.items()
    },
    "a class when it is made": BUILT + ALL_BUT_CHECK,
}
HONEST_TESTS = b"""import functools, unittest
from unittest import mock
from pack import calc

def double_of(x):
    return calc.double(x)

def wrapped(function):
    @functools.wraps(function)
    def inner(self):
        return function(self)
    return inner

class Base:
    def test_shared(self):
        self.maxDiff = None
        self.assertEqual(self.value(), 2)

@mock.patch("pack.calc.check", lambda x: x)
class A(Base, unittest.TestCase):
    def value(self):
        return double_of(1)
    @wrapped
    def test_wrapped(self):
        self.assertEqual(double_of(2), 4)
    def test_plain(self):
        with mock.patch.object(type(self), "value", lambda self: 3):
            self.assertEqual(self.value(), 3)

class B(A):
    def value(self):
        return double_of(1)
    test_alias = A.test_plain

if True:
    def test_function():
        pass

def make(n):
    def test(self):
        self.assertEqual(calc.double(n), 2 * n)
    return test

class Made(unittest.TestCase):
    pass

for n in range(3):
    setattr(Made, f"test_{n}", make(n))
"""
