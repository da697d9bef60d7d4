"""Selection of the implementation, by argument, variable or default; reasons for the others."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import nemocascade_kernels  # noqa: F401 - registers the ops
import pytest
import torch
from helpers.heads import make_head
from nemocascade_kernels import backends, linear_logprob
from nemocascade_kernels.backends import BackendUnavailableError, Op
from nemocascade_kernels.testing import without_interpreter

CPU = torch.zeros(1)


@pytest.fixture
def op() -> Iterator[Op]:
    """An op with three implementations, the best of which rejects vectors longer than 2."""
    op = Op("an_op_of_the_tests")
    op.register("native", "math", limit=lambda x: "too long" if len(x) > 2 else None)
    op.register("torch", "cmath")
    op.register("reference", "string")
    yield op
    del backends._OPS[op.name]


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(backends.VARIABLE, raising=False)
    monkeypatch.setattr(backends, "_native_limitation", lambda tensors: None)


def test_the_first_available_runs(op: Op) -> None:
    assert op.chosen(torch.zeros(2)) == "native"
    assert op.choose(torch.zeros(3)).__name__ == "cmath"


def test_argument_demands(op: Op) -> None:
    assert op.chosen(CPU, backend="reference") == "reference"
    with pytest.raises(BackendUnavailableError, match="'native' is unavailable: too long"):
        op.chosen(torch.zeros(3), backend="native")
    with pytest.raises(ValueError, match=r"no backend 'fast': choose one of \('native', 'torch'"):
        op.chosen(CPU, backend="fast")


def test_variable_demands(op: Op, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(backends.VARIABLE, "reference")
    assert op.chosen(CPU) == "reference"
    assert op.chosen(CPU, backend="torch") == "torch", "the argument wins"
    monkeypatch.setenv(backends.VARIABLE, f"reference, {op.name}=torch")
    assert op.chosen(CPU) == "torch", "the entry with a name wins"
    monkeypatch.setenv(backends.VARIABLE, "cuda")
    assert op.chosen(CPU) == "native", "a name that the op does not have speaks of other ops"
    monkeypatch.setenv(backends.VARIABLE, "native")
    with pytest.raises(BackendUnavailableError, match="too long"):
        op.chosen(torch.zeros(3))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("fast", "'fast' is not one of"),
        ("no_such_op=torch", r"no op is named \['no_such_op'\]"),
        ("an_op_of_the_tests=cuda", "demands an_op_of_the_tests=cuda, which the op does not have"),
    ],
)
def test_misspelt_variable_is_an_error(
    op: Op, monkeypatch: pytest.MonkeyPatch, value: str, message: str
) -> None:
    monkeypatch.setenv(backends.VARIABLE, value)
    with pytest.raises(ValueError, match=message):
        op.chosen(CPU)


def test_unavailable_because_has_a_line_for_each(op: Op) -> None:
    lines = op.unavailable_because(torch.zeros(3)).splitlines()
    assert [line.split()[1] for line in lines] == list(backends.ORDER)
    said = {line.split()[1]: " ".join(line.split()[2:]) for line in lines}
    assert said == {
        "cuda": "the op has no such implementation",
        "triton": "the op has no such implementation",
        "native": "too long",
        "fla": "the op has no such implementation",
        "quack": "the op has no such implementation",
        "torch": "runs",
        "reference": "available",
    }


def test_all_are_unavailable(op: Op, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Op, "_limitation", lambda self, name, tensors, demanded: f"{name} is out")
    with pytest.raises(BackendUnavailableError, match="torch is out"):
        op.chosen(CPU)


def test_one_op_one_object(op: Op) -> None:
    with pytest.raises(ValueError, match="registered twice"):
        Op(op.name)
    with pytest.raises(ValueError, match="already has"):
        op.register("torch", "math")
    with pytest.raises(ValueError, match="not one of"):
        op.register("fast", "math")


def test_interpreter_runs_only_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    ops = backends.ops()
    assert ops["linear_logprob"].chosen(CPU) != "triton"
    assert ops["linear_logprob"].chosen(CPU, backend="triton") == "triton"
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(BackendUnavailableError, match="set TRITON_INTERPRET=1"):
        ops["linear_logprob"].chosen(CPU, backend="triton")


def test_every_op_has_a_definition_and_serves_a_cpu() -> None:
    for name, op in backends.ops().items():
        assert "reference" in op.backends, name
        assert op.chosen(torch.zeros(1, 1)) in ("native", "torch", "reference"), name
    assert "linear_logprob" in backends.unavailable_because(CPU)


def test_the_variable_reaches_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    head = make_head(2, 3, 5)
    monkeypatch.setenv(backends.VARIABLE, "linear_logprob=triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(
        BackendUnavailableError, match="linear_logprob: backend 'triton' is unavailable"
    ):
        linear_logprob(head.hidden, head.weight, head.target)


def test_package_imports_without_triton() -> None:
    """And without a compiler: nothing but torch is needed until a kernel runs."""
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, nemocascade_kernels as k\n"
        "out = k.linear_logprob(torch.ones(2, 3), torch.ones(4, 3), torch.tensor([0, 3]))\n"
        "print(out.logprob.tolist(), k.backends.unavailable_because(torch.ones(1)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, check=True, env=without_interpreter(),
    )  # fmt: skip
    assert "triton cannot be imported" in result.stdout
