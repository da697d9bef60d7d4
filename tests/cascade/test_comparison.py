"""`nemocascade diff`: settings that differ between runs, recipes and artifacts."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from nemocascade.cascade.comparison import compare
from nemocascade.cli import main
from nemocascade.megatron.checkpoint import CheckpointError
from nemocascade.megatron.checkpoint.folder import digest_of
from nemocascade.recipe import DomainConfig, RecipeError, load_any_recipe, tiny
from nemocascade.recipe.commands import DiffSettings

TINY = Path(__file__).resolve().parents[2] / "recipes" / "tiny"


def run_of(folder: Path, **changes: Any) -> Path:
    folder.mkdir()
    recipe: Any = replace(load_any_recipe(TINY / "if_rl.py"), **changes)
    (folder / "recipe.json").write_text(json.dumps(asdict(recipe)))
    return folder


def artifact_of(folder: Path, lr: float, **facts: Any) -> Path:
    folder.mkdir()
    manifest: dict[str, Any] = {"format": "nemocascade", "version": 1, "kind": "artifact"}
    manifest |= {"stage": "sft", "step": 9, "recipe": {"optimizer": {"lr": lr}}, "data": {}}
    manifest |= {"scores": {}, "parent": None, "parent_digest": None, "tokenizer": None}
    manifest |= {"model": asdict(tiny()), "model_sha256": "", "precision": "fp32", "layout": {}}
    manifest |= {"files": {}, **facts}
    text = json.dumps({**manifest, "digest": digest_of(manifest)})
    (folder / "manifest.json").write_text(text)
    return folder


def test_runs_and_recipes_are_compared_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    script = str(TINY / "if_rl.py")
    run = run_of(
        tmp_path / "a",
        steps=7,
        domains=(
            DomainConfig("math", share=2.0),
            DomainConfig("instruction_following", difficulty=1),
        ),
    )
    monkeypatch.setattr("sys.argv", ["nemocascade", "diff", script, str(run)])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 1
    lines = capsys.readouterr().out.splitlines()
    assert "steps 25 -> 7" in lines
    assert "domains.math.share none -> 2.0" in lines
    assert "domains.instruction_following.difficulty 0 -> 1" in lines
    assert not any("share" in line and "instruction" in line for line in lines)
    monkeypatch.setattr("sys.argv", ["nemocascade", "diff", script, script])
    main()
    assert capsys.readouterr().out == "no setting differs\n"


def test_artifacts_are_compared_with_their_facts(tmp_path: Path) -> None:
    changes = [{"step": 5, "changes": {"optimizer.lr": [0.1, 0.2]}}]
    first = artifact_of(tmp_path / "a", 0.1)
    second = artifact_of(tmp_path / "b", 0.2, step=10, changes=changes)
    found = compare(DiffSettings(str(first), str(second)))
    assert "optimizer.lr 0.1 -> 0.2" in found
    assert "artifact.step 9 -> 10" in found
    assert any(line.startswith("artifact.digest ") for line in found)
    assert any(line.startswith("artifact.changes.0.changes.optimizer.lr ") for line in found)


def test_what_is_neither_is_rejected(tmp_path: Path) -> None:
    script = str(TINY / "sft.py")
    with pytest.raises(RecipeError, match="is not a recipe, run folder or artifact"):
        compare(DiffSettings(script, str(tmp_path)))
    (tmp_path / "recipe.json").write_text("[" * 9000)
    with pytest.raises(RecipeError, match="holds no settings"):
        compare(DiffSettings(script, str(tmp_path)))
    (artifact_of(tmp_path / "a", 0.1) / "manifest.json").write_text('{"digest": 1}')
    with pytest.raises(CheckpointError):
        compare(DiffSettings(script, str(tmp_path / "a")))
