"""The commands plan, preflight and submit, as people type them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from nemocascade import cli

TINY = str(Path(__file__).resolve().parents[2] / "recipes" / "tiny" / "sft.py")
Command = Callable[..., str]


@pytest.fixture
def nemocascade(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Command:
    """Run a command and give what it prints."""

    def command(*arguments: str) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["nemocascade", *arguments])
        cli.main()
        return capsys.readouterr().out

    return command


def test_plan(nemocascade: Command) -> None:
    text = nemocascade("plan", TINY, "--gpus", "4", "--gpu", "cpu", "--", "--data.capacity", "1024")
    assert "packs of 1,024 tokens" in text
    assert "The recipe's layout:" in text
    report = json.loads(nemocascade("plan", TINY, "--gpus", "4", "--gpu", "cpu", "--json"))
    assert len(report["best"]) == 10


def test_plan_names_an_unknown_accelerator(
    nemocascade: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        nemocascade("plan", TINY, "--gpu", "h2000")
    assert caught.value.code == 2
    assert "h200" in capsys.readouterr().err


def test_preflight(nemocascade: Command, capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(nemocascade("preflight", TINY, "--gpu", "cpu", "--ranks", "4", "--json"))
    assert found["passed"] is True
    with pytest.raises(SystemExit) as caught:
        nemocascade("preflight", TINY, "--gpu", "cpu", "--", "--parallel.tp", "3")
    assert caught.value.code == 2
    assert "FAIL settings: tp(3)" in capsys.readouterr().out


def test_submit(nemocascade: Command) -> None:
    text = nemocascade("submit", TINY, TINY, "--nodes", "2", "--dry-run", "--", "--steps", "3")
    assert text.count("--nnodes=2") == 2
    assert text.count("--steps 3 &") == 2
