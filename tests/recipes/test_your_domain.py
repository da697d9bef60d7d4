"""The domain of docs/your_domain.md: its files are read from the page, and run."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nemocascade.envs.base import Domain
from nemocascade.envs.registry import close_environments, domain_problems, make_environments
from nemocascade.recipe import EnvConfig, RecipeError
from nemocascade.runtime.row_errors import DataError
from nemocascade.types import Message

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "recipes" / "own_domain"
PAGE = (ROOT / "docs" / "your_domain.md").read_text(encoding="utf-8")


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> str:
    """The file of the domain; what it adds to Python's path is taken back."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "sorting", raising=False)
    return str(FOLDER / "sorting.py")


def sorting_of(module: str) -> Domain:
    environments = make_environments(EnvConfig(modules=(module,)))
    close_environments(environments)
    return environments["sorting"]


def test_the_page_shows_the_files() -> None:
    blocks = re.findall(r"`(\w+\.py)`[^\n]*\n```python\n(.*?)```", PAGE, re.DOTALL)
    assert dict(blocks) == {file.name: file.read_text() for file in FOLDER.glob("*.py")}


def test_the_domain_makes_reads_and_scores(
    module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    domain = sorting_of(module)
    [task] = domain.prompts(seed=1, count=1, difficulty=1)
    digits = task.messages[0].content.removeprefix("Sort ").split()
    assert len(digits) == 4
    assert domain.score(task, task.demonstration).reward == 1.0
    assert domain.score(task, [Message("assistant", "0 1 2 3 4 5")]).reward == 0.0
    monkeypatch.setattr(domain, "check", lambda prompt, response: 1.0)
    verdict = domain.score(task, task.demonstration)
    assert verdict.reward is None
    assert "check of sorting returned 1.0, which is not a Verdict" in str(verdict.error)
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "Sort 7 3 5", "digits": "7 3 5"}))
    domain = sorting_of(module)
    [read] = domain.read(rows)
    assert domain.score(read, [Message("assistant", "3 5 7")]).reward == 1.0
    with pytest.raises(DataError, match=r"244 held-out tasks .*lower eval\.prompts"):
        list(domain.prompts(seed=1, count=256, heldout=True))


def test_names_are_known_where_the_module_is_named(module: str) -> None:
    assert domain_problems("domains", ["sorting", "math"], [module]) == []
    [problem] = domain_problems("domains", ["sorting"], [])
    assert "'sorting'" in problem
    assert "envs.modules" in problem


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("import nothing_like_this", "cannot be imported: ModuleNotFoundError"),
        ("1 / 0", "cannot be imported: ZeroDivisionError"),
        ("raise SystemExit(3)", "cannot be imported: SystemExit: 3"),
        ("x = 1", "holds no class marked with @environment"),
        ("@environment\nclass A:\n    domain = 'a'", "not a subclass of"),
        ("@environment\nclass A(Domain):\n    domain = 'a'", "A has no check, claims, make, parse"),
        ("@environment\nclass A(Mathematics):\n    pass", "'math' exists already"),
        ("@environment\nclass A(Mathematics):\n    domain = 'a b'", "A.domain is 'a b'"),
    ],
)
def test_modules_that_offer_nothing_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, reason: str
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    file = tmp_path / "own_domain.py"
    file.write_text(
        "from nemocascade.envs.base import Domain, environment\n"
        f"from nemocascade.envs.mathematics import Mathematics\n{text}\n"
    )
    try:
        with pytest.raises(RecipeError, match=re.escape(reason)) as caught:
            make_environments(EnvConfig(modules=(str(file),)))
    finally:
        sys.modules.pop("own_domain", None)
    assert f"envs.modules({file})" in str(caught.value)


@pytest.mark.usefixtures("module")
def test_entry_points_offer_domains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    meta = tmp_path / "sorting-1.dist-info"
    meta.mkdir()
    (meta / "METADATA").write_text("Metadata-Version: 2.1\nName: sorting\nVersion: 1\n")
    points = meta / "entry_points.txt"
    points.write_text("[nemocascade.environments]\nsorting = sorting:Sorting\n")
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.syspath_prepend(str(tmp_path))
    assert domain_problems("domains", ["sorting"], []) == []
    points.write_text("[nemocascade.environments]\nsorting = sorting:Nothing\n")
    [problem] = domain_problems("domains", ["sorting"], [])
    assert "entry point sorting = sorting:Nothing" in problem


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_tiny_model_learns_the_domain(tmp_path: Path) -> None:
    def run(*command: str) -> str:
        done = subprocess.run(
            [sys.executable, *command],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "kernels")))},
            capture_output=True,
            text=True,
            check=False,
            timeout=900,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        return done.stdout

    # The page's commands start in the repository's folder.
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    for script in re.findall(r"^python (\S+)", PAGE, re.MULTILINE):
        run(script, "--log.tensorboard", "False")
    rl = tmp_path / "runs" / "own_domain" / "sorting_rl"
    before = json.loads((rl / "heldout_start.json").read_text())["heldout/sorting"]
    *_, last = (json.loads(line) for line in (rl / "metrics.jsonl").read_text().splitlines())
    assert last["heldout/sorting"] > before + 0.3
    [command] = re.findall(r"^nemocascade (score .*?)\n```", PAGE, re.DOTALL | re.MULTILINE)
    told = run("-m", "nemocascade.cli", *command.replace("\\\n", " ").split())
    assert json.loads(told)["scores"]["sorting"]["score"] > before + 0.3
