"""All stages of the tiny cascade, run as by a user, each for a step or two on few tasks."""

from __future__ import annotations

import json
import re
from pathlib import Path

from helpers.commands import run_command

from nemocascade.cascade.graph import StageGraph
from nemocascade.recipe import CascadeRecipe, MopdRecipe, PolicyRecipe, load_recipe

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = "recipes/tiny/cascade.py"


def small(cascade: CascadeRecipe) -> list[str]:
    """Arguments that leave a moment's work of every stage."""
    changes: dict[str, object] = {
        "scores.tasks": 2,
        "scores.max-response-tokens": 12,
        "scores.envs.check-workers": 1,
    }
    for number, domain in enumerate(cascade.scores.domains):
        if domain.max_response_tokens:
            changes[f"scores.domains.{number}.max-response-tokens"] = 24
    for stage in cascade.stages:
        name = f"stages.{stage.name.replace('_', '-')}"
        changes[f"{name}.log.tensorboard"] = False
        if isinstance(stage.recipe, PolicyRecipe):
            changes |= {
                f"{name}.steps": 1,
                f"{name}.envs.check-workers": 1,
                f"{name}.rollout.prompts-per-step": 2,
                f"{name}.rollout.rollouts-per-prompt": 2,
                f"{name}.rollout.max-draws": 1,
                f"{name}.rollout.max-response-tokens": 12,
            }
            domains = stage.recipe.domains
            prefix = f"{name}.domains"
        else:
            changes |= {
                f"{name}.steps": 2,
                f"{name}.model.hidden-size": 64,
                f"{name}.demonstrations.heldout": 2,
            }
            domains = stage.recipe.demonstrations.domains
            prefix = f"{name}.demonstrations.domains"
        changes |= {f"{prefix}.{i}.tasks": 40 for i in range(len(domains))}
    return [part for name, value in changes.items() for part in (f"--{name}", str(value))]


def nemocascade(*arguments: str) -> tuple[str, str]:
    """The command's output and its log."""
    done = run_command(["-m", "nemocascade.cli", *arguments], timeout_s=550)
    assert done.returncode == 0, done.stderr[-4000:]
    return str(done.stdout), str(done.stderr)


def test_every_stage_runs_and_is_scored(tmp_path: Path) -> None:
    cascade = load_recipe(ROOT / SCRIPT, CascadeRecipe)
    run_dir = tmp_path / "run"
    arguments = ("run", SCRIPT, "--run-dir", str(run_dir), *small(cascade))
    printed, log = nemocascade(*arguments)
    # All stages have one layout: its accelerators and its preflight are shown for the first alone.
    for heading in (" accelerators:\n", " preflight:\n"):
        assert log.count(heading) == 1, heading
    assert len(re.findall(r"^.*(?:all checks passed|warning\(s\)) in \d", log, re.M)) == 1
    found = json.loads((run_dir / "cascade.json").read_text())
    assert [s["name"] for s in found["stages"]] == StageGraph(cascade).names
    scored = {d.domain for d in cascade.scores.domains}
    assert f"report: {run_dir / 'report' / 'index.html'}" in printed
    trained: set[str] = set()
    for stage in cascade.stages:
        entry = next(s for s in found["stages"] if s["name"] == stage.name)
        assert entry["status"] == "done", stage.name
        scores = json.loads((run_dir / "stages" / stage.name / "scores.json").read_text())
        assert scores["digest"] == entry["artifact_digest"]
        assert set(scores["scores"]) == scored
        failed = {d: s["errors"] for d, s in scores["scores"].items() if s["errors"]}
        assert not failed, (stage.name, failed)
        # The table at the end has a row for each stage.
        assert any(line.split()[0] == stage.name for line in printed.splitlines() if line.strip())
        if isinstance(stage.recipe, PolicyRecipe):
            trained |= {d.domain for d in stage.recipe.domains}
        if isinstance(stage.recipe, MopdRecipe):
            taught = {d.domain for d in stage.recipe.domains}
            assert set(found["teachers"]) == taught
            assert {found["teachers"][d]["stage"] for d in taught} <= set(StageGraph(cascade).names)
    assert trained <= scored, "a stage trains a domain that nothing scores"
    again, _ = nemocascade(*arguments, "--dry-run")
    assert again.count(": keep") == len(cascade.stages)
