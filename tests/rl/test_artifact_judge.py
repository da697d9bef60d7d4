"""Checks of a judge artifact: it must have the policy's shape and tokenizer."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemocascade.recipe import RecipeError
from nemocascade.recipe.judge import JudgeConfig
from nemocascade.stages import judge
from nemocascade.types import Artifact


def artifact(folder: Path, *, hidden: int = 64, tokenizer: str = "ids") -> Artifact:
    folder.mkdir()
    (folder / "tokenizer.model").write_text(tokenizer)
    return Artifact(
        folder=folder,
        digest="d",
        stage="x",
        step=0,
        model={"hidden_size": hidden, "vocab_size": 512},
        precision="fp32",
        recipe={},
        data={},
        parent=None,
        parent_digest=None,
        scores={},
        tokenizer="tokenizer.model",
    )


def test_another_shape_or_tokenizer_is_rejected_by_both_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = artifact(tmp_path / "policy")
    other = artifact(tmp_path / "other", hidden=96, tokenizer="words")
    monkeypatch.setattr(judge, "read_artifact", lambda folder: other)
    with pytest.raises(RecipeError) as caught:
        judge.open_judge(JudgeConfig(kind="artifact", artifact=str(other.folder)), policy)
    text = str(caught.value)
    assert "hidden_size 96 is not 64" in text
    assert "tokenizer is not the policy's" in text
    assert text.count(str(policy.folder)) == text.count(str(other.folder)) == 2


def test_the_same_model_may_judge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, other = artifact(tmp_path / "policy"), artifact(tmp_path / "other")
    monkeypatch.setattr(judge, "read_artifact", lambda folder: other)
    assert judge.open_judge(JudgeConfig(kind="artifact", artifact="x"), policy) is other
