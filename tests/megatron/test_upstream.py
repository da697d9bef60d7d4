"""Importing Megatron-Core changes nothing else in the process; its developer notes are hidden."""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest
import torch

from nemocascade.megatron.upstream import hide_notes, without_compiler
from nemocascade.megatron.world import start_world
from nemocascade.recipe import EngineConfig, ParallelConfig

IMPORT_ALL = """
import importlib, logging, pkgutil, sys, warnings
import torch

def state():
    loggers = [logging.getLogger(), *map(logging.getLogger, logging.root.manager.loggerDict)]
    filtered = {log.name: list(log.filters) for log in loggers if log.filters}
    return torch.compile, list(warnings.filters), warnings.showwarning, filtered

before = state()
import nemocascade.megatron
assert state() == before, "after the import of the package"
for module in pkgutil.walk_packages(nemocascade.megatron.__path__, "nemocascade.megatron."):
    importlib.import_module(module.name)
assert state() == before, "after the import of its modules"
assert "torch._inductor.compile_fx" not in sys.modules, "the compiler was loaded"
"""
COUNT = """
from nemocascade.megatron.parameters import count_parameters
from nemocascade.recipe import nemotron3_nano_30b
print(count_parameters(nemotron3_nano_30b()).active)
"""


def test_importing_and_counting_change_no_global_and_show_no_warning() -> None:
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL + COUNT], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 10**9
    assert "Warning" not in done.stderr


def test_the_compiler_is_back_after_an_error() -> None:
    compiler = torch.compile

    def fail() -> None:
        with without_compiler():
            assert torch.compile(len) is len
            assert torch.compile(dynamic=True)(len) is len
            raise RuntimeError("import failed")

    with pytest.raises(RuntimeError, match="import failed"):
        fail()
    assert torch.compile is compiler


def test_notes_of_upstream_are_hidden_and_ours_are_shown() -> None:
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        hide_notes()
        for module in ("megatron.core.optimizer", "nemocascade.train.trainer"):
            warnings.warn_explicit("said", UserWarning, "file.py", 1, module=module)
    assert len(shown) == 1


def test_an_error_names_its_rank_once(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cascade starts a world for each of its stages."""
    monkeypatch.setattr("sys.excepthook", sys.__excepthook__)
    for _ in range(3):
        start_world(ParallelConfig(), EngineConfig()).close()
    error = ValueError("what went wrong")
    sys.excepthook(type(error), error, None)
    assert capsys.readouterr().err == "[rank0]: ValueError: what went wrong\n"
