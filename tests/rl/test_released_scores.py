"""Released rows of every form through `nemocascade score`: read, rendered, answered, verified."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from helpers.ranks import run_ranks
from helpers.released import FORMS, workplace
from helpers.start_policy import start_policy

# Rows of preference need a judge that knows language: a server, or an artifact of the run.
SCORED = {name: domain for name, (domain, _) in FORMS.items() if domain != "preference"}


def score(folder: str, paths: dict[str, list[str]]) -> dict[str, Any]:
    from dataclasses import asdict

    from nemocascade.recipe import EngineConfig, EnvConfig, SandboxConfig, ScoreConfig, ScoredDomain
    from nemocascade.stages.score import run_scoring
    from nemocascade.stages.settings import ScoreSettings

    config = ScoreConfig(
        domains=tuple(
            ScoredDomain(name, heldout_path=tuple(files), tasks=20, max_bad_rows=1)
            for name, files in paths.items()
        ),
        max_prompt_tokens=8192,
        max_response_tokens=8,
        max_turns=2,
        slots=4,
        envs=EnvConfig(if_language_check="letters", sandbox=SandboxConfig(workers=1)),
        engine=EngineConfig(precision="fp32"),
    )
    artifact = start_policy(f"{folder}/sft")
    found = run_scoring(ScoreSettings(artifact, work_dir=f"{folder}/score", scores=config))
    return {name: asdict(domain) for name, domain in found.scores.items()}


def test_every_form_is_scored(tmp_path: Path) -> None:
    """An untrained model's answers are wrong, and none of their verdicts is an error."""
    paths: dict[str, list[str]] = {}
    counts: dict[str, int] = {}
    for number, (form, name) in enumerate(SCORED.items()):
        rows = [r.row for r in (workplace(2) if name == "tool_calling" else FORMS[form][1])]
        broken: list[dict[str, Any]] = [{"expected_answer": []}] if name == "math" else []
        path = tmp_path / f"{number}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, *broken]))
        paths.setdefault(name, []).append(str(path))
        counts[name] = counts.get(name, 0) + len(rows)
    (found,) = run_ranks(score, 1, {"folder": str(tmp_path), "paths": paths}, timeout_s=300)
    assert {name: domain["tasks"] for name, domain in found.items()} == counts
    assert counts["structured_output"] == 10
    for name, domain in found.items():
        assert domain["errors"] == 0, name
        assert domain["score"] is not None, name
        assert domain["score"] < 0.5, name
