"""A stage of a cascade on a folder of `nemocascade data build`: its key, and what reads rows."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from helpers.cascade_jobs import sft, small_cascade
from helpers.data import qa_rows, sentencepiece_tokenizer, write_jsonl
from helpers.ranks import run_ranks

from nemocascade.cascade.comparison import compare
from nemocascade.cascade.graph import StageChoice
from nemocascade.cascade.inputs import FileHashes, recipe_files, stage_inputs
from nemocascade.cascade.preflight import check_cascade
from nemocascade.cascade.run import dry_run, run_cascade
from nemocascade.data.building import join_shards, plan_build, tokenize_shard, work_folder
from nemocascade.data.cache_files import CacheDamagedError
from nemocascade.megatron.artifact import read_artifact
from nemocascade.megatron.checkpoint import CheckpointError
from nemocascade.plan.findings import Preflight
from nemocascade.plan.preflight import check_rows
from nemocascade.plan.settings import PreflightSettings
from nemocascade.recipe import (
    CascadeRecipe,
    DataConfig,
    DemonstrationConfig,
    DomainConfig,
    RecipeError,
    StageConfig,
    TokenizerConfig,
)
from nemocascade.recipe.commands import DiffSettings
from nemocascade.runtime.row_errors import DataError
from nemocascade.runtime.row_files import find_files


def built(output: Path, config: DataConfig) -> Path:
    """The folder that `nemocascade data build` makes of the rows."""
    plan = plan_build(output, config, sentencepiece_tokenizer(), seed=1, size=2000)
    for number in range(len(plan.shards)):
        tokenize_shard(work_folder(output), number)
    join_shards(work_folder(output), output)
    return output


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "rows.jsonl", qa_rows(60))


def config_of(path: Path) -> DataConfig:
    return DataConfig(path=(str(path),), capacity=512, sequences_per_step=2, heldout_rows=4)


def cascade_on(folder: Path, tokenizer: str, run_dir: str) -> CascadeRecipe:
    """Two SFT stages on a built folder; the second has the tokenizer of its start."""
    recipe = sft(
        steps=1,
        seed=1,
        data=config_of(folder),
        demonstrations=DemonstrationConfig(),
        tokenizer=TokenizerConfig(path=tokenizer),
    )
    more = replace(recipe, tokenizer=TokenizerConfig())
    found = small_cascade(run_dir, stages=(StageConfig("sft", recipe), StageConfig("more", more)))
    scored = replace(found.scores, domains=found.scores.domains[:1], tasks=2)
    return replace(found, scores=scored)


def run_and_decide(folder: str, tokenizer: str, run_dir: str) -> tuple[str, str, int]:
    """The decisions before and after a run of the cascade, and the exit code if the file server of
    its artifacts does not answer."""
    cascade = cascade_on(Path(folder), tokenizer, run_dir)
    before = dry_run(cascade, StageChoice())
    run_cascade(cascade)
    after = dry_run(cascade, StageChoice())
    read = Path.read_text

    def silent(path: Path, *args: Any, **kwargs: Any) -> str:
        if path.parent.name == "artifact":
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return read(path, *args, **kwargs)

    with mock.patch.object(Path, "read_text", silent), pytest.raises(CheckpointError) as caught:
        dry_run(cascade, StageChoice())
    return before, after, caught.value.exit_code


def test_a_cascade_trains_on_a_built_folder(tmp_path: Path, rows: Path) -> None:
    folder, run_dir = built(tmp_path / "tokens", config_of(rows)), tmp_path / "run"
    tokenizer = str(sentencepiece_tokenizer().path)
    arguments = {"folder": str(folder), "tokenizer": tokenizer, "run_dir": str(run_dir)}
    [(before, after, code)] = run_ranks(run_and_decide, 1, arguments, timeout_s=550)
    assert "sft: run" in before
    assert "sft: keep" in after
    assert "more: keep" in after
    assert code == 75, "an artifact that cannot be read now is not a reason to train again"
    for stage in ("sft", "more"):
        assert read_artifact(run_dir / "stages" / stage / "artifact").data["path"] == [str(folder)]


def test_the_key_of_a_built_folder_is_that_of_its_tokens(tmp_path: Path, rows: Path) -> None:
    config = replace(config_of(rows), non_thinking_path=(str(rows),), thinking=True)
    folder = built(tmp_path / "tokens", config)
    files = FileHashes(tmp_path / "files.json")

    def digest(path: Path) -> str:
        return files.of([str(path)])[str(path)]

    first = digest(folder)
    assert not (tmp_path / "files.json").exists(), "no file of tokens is hashed again"
    moved = folder.rename(tmp_path / "moved")
    assert digest(moved) == first
    # Rows that were copied have another time, and the same tokens.
    os.utime(rows, ns=(7, 7))
    assert digest(built(tmp_path / "again", config)) == first
    other = write_jsonl(tmp_path / "other.jsonl", qa_rows(61))
    assert digest(built(tmp_path / "other", config_of(other))) != first
    # The folder alone suffices: rows that are gone change no key.
    stage = sft(data=replace(config, path=(str(moved),)), demonstrations=DemonstrationConfig())
    assert recipe_files(stage) == [str(moved)]
    key = stage_inputs(stage, "", {}, files)
    rows.unlink()
    assert stage_inputs(stage, "", {}, files) == key
    manifest = json.loads((moved / "manifest.json").read_text())
    del manifest["shards"]
    (moved / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CacheDamagedError, match="not a complete token cache"):
        digest(moved)


def test_a_folder_with_a_manifest_of_another_kind_is_hashed(tmp_path: Path) -> None:
    folder = tmp_path / "downloaded"
    folder.mkdir()
    (folder / "manifest.json").write_text('{"files": ["rows.jsonl"]}')
    (folder / "rows.jsonl").write_text("{}\n")
    files = FileHashes(tmp_path / "files.json")
    first = files.of([str(folder)])
    (folder / "rows.jsonl").write_text("{} \n")
    assert files.of([str(folder)]) != first


def test_preflight_reads_a_built_folder_with_the_tokenizer_that_will_be_there(
    tmp_path: Path, rows: Path
) -> None:
    folder = built(tmp_path / "tokens", config_of(rows))
    tokenizer = str(sentencepiece_tokenizer().path)

    def problems(cascade: CascadeRecipe) -> list[str]:
        found = Preflight()
        check_cascade(cascade, PreflightSettings("", ranks=1, gpu="cpu", dry_run=False), found)
        return found.problems

    cascade = cascade_on(folder, tokenizer, str(tmp_path / "run"))
    assert problems(cascade) == []
    os.utime(folder / "offsets.bin", ns=(7, 7))
    [problem] = problems(cascade)
    assert "were written or copied after they were hashed" in problem


def test_where_rows_are_read_a_built_folder_is_rejected(tmp_path: Path, rows: Path) -> None:
    folder = built(tmp_path / "tokens", config_of(rows))
    with pytest.raises(DataError, match="holds tokens, no rows: where rows are read, name"):
        find_files(folder)
    made = DemonstrationConfig(domains=(DomainConfig("math", heldout_path=(str(folder),)),))
    found = Preflight()
    check_rows(sft(data=config_of(folder), demonstrations=made), found)
    [problem] = found.problems
    assert problem.startswith("demonstrations.domains.0.heldout_path: ")
    with pytest.raises(RecipeError, match="holds no recipe: its settings are the key in"):
        compare(DiffSettings(str(folder), str(folder)))
