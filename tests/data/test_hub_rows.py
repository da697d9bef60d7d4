"""Data sets by hub name: exported once, read like files, identified by content."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from helpers.integrations import installed

from nemocascade.cli import main
from nemocascade.data.cache import cache_key
from nemocascade.data.tokenizer_training import train_tokenizer
from nemocascade.recipe import (
    CascadeRecipe,
    DataConfig,
    DomainConfig,
    GrpoRecipe,
    ScoreConfig,
    ScoredDomain,
    SftRecipe,
    StageConfig,
)
from nemocascade.runtime.hub_rows import HubSplit, hub_file, parse_hub_name, with_hub_files
from nemocascade.runtime.row_errors import DataError
from nemocascade.runtime.row_files import read_rows

ROWS = [{"question": f"{n} + 1?", "answer": str(n + 1)} for n in range(5)]


class Fake:
    """Stands for the package datasets: reads `SPLIT.jsonl` of a local folder, and counts calls."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str | None, str, str | None]] = []

    def load_dataset(
        self, name: str, config: str | None, *, split: str, revision: str | None
    ) -> Any:
        self.asked.append((name, config, split, revision))
        rows = [json.loads(line) for line in Path(name, f"{split}.jsonl").read_text().splitlines()]
        table = pyarrow.Table.from_pylist(rows)
        return SimpleNamespace(
            num_rows=len(rows), to_parquet=lambda path: pyarrow.parquet.write_table(table, path)
        )


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Fake:
    made = Fake()
    monkeypatch.setitem(sys.modules, "datasets", made)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    return made


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    found = tmp_path / "set"
    found.mkdir()
    write(found, "train", ROWS)
    write(found, "test", ROWS[:2])
    return found


def write(folder: Path, split: str, rows: list[dict[str, str]]) -> None:
    (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def rows_of(file: str) -> list[dict[str, Any]]:
    return [dict(row) for _, row in read_rows(file)]


def test_names() -> None:
    assert parse_hub_name("org/name:train") == HubSplit("org/name", "", "", "train")
    assert parse_hub_name("o/n:main:train[:2%]") == HubSplit("o/n", "main", "", "train[:2%]")
    assert parse_hub_name("o/n:train[5:9]") == HubSplit("o/n", "", "", "train[5:9]")
    assert parse_hub_name("org/name@v1:test") == HubSplit("org/name", "", "v1", "test")
    for wrong in ("org/name", "a:b:c:d", ":train", "name:", "name:a/b", ""):
        with pytest.raises(DataError, match="not of the form NAME:SPLIT"):
            parse_hub_name(wrong)


def test_a_split_is_exported_once_and_anew_when_its_folder_changes(
    fake: Fake, folder: Path, tmp_path: Path
) -> None:
    file = hub_file(f"{folder}:train")
    assert rows_of(file) == ROWS
    assert file.startswith(str(tmp_path / "home" / "nemocascade"))
    assert hub_file(f"{folder}:train") == file
    assert len(fake.asked) == 1
    assert rows_of(hub_file(f"{folder}:test")) == ROWS[:2]
    write(folder, "train", ROWS[:3])
    changed = hub_file(f"{folder}:train")
    assert changed != file
    assert rows_of(changed) == ROWS[:3]
    assert not list((tmp_path / "home" / "nemocascade").glob("*.part"))


def test_config_and_revision_are_asked_for(
    fake: Fake, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parent)
    write(folder, "train", ROWS)
    # A name with a revision is one of the hub, even where a folder has it.
    hub_file("set@v2:main:train")
    assert fake.asked == [("set", "main", "train", "v2")]


def test_recipes_of_every_kind_get_the_files(fake: Fake, folder: Path) -> None:
    train, test = hub_file(f"{folder}:train"), hub_file(f"{folder}:test")
    named, heldout = (f"{folder}:train",), (f"{folder}:test",)
    sft = SftRecipe(data=DataConfig(path=("a.jsonl",), hub=named, heldout_hub=heldout))
    rl = GrpoRecipe(domains=(DomainConfig("math", hub=named, heldout_hub=heldout),))
    scores = ScoreConfig(domains=(ScoredDomain("math", heldout_hub=heldout),))
    whole = CascadeRecipe(stages=(StageConfig("sft", sft), StageConfig("rl", rl)), scores=scores)
    found = with_hub_files(whole)
    first, second = (stage.recipe for stage in found.stages)
    assert isinstance(first, SftRecipe)
    assert isinstance(second, GrpoRecipe)
    assert first.data.path == ("a.jsonl", train)
    assert first.data.heldout_path == (test,)
    assert first.data.hub == named
    assert second.domains[0].path == (train,)
    assert second.domains[0].heldout_path == (test,)
    assert found.scores.domains[0].heldout_path == (test,)
    assert with_hub_files(found) == found


def test_a_measurement_of_stages_reads_them(
    fake: Fake, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[Any] = []
    module = SimpleNamespace(print_interference=lambda recipe, _: measured.append(recipe))
    monkeypatch.setitem(sys.modules, "nemocascade.cascade.interference", module)
    script = Path(__file__).parents[2] / "recipes/tiny/cascade.py"
    named = ("--stages.if-rl.domains.0.hub", f"{folder}:train")
    monkeypatch.setattr(sys, "argv", ["nemocascade", "interference", str(script), *named])
    main()
    (stage,) = (s.recipe for s in measured[0].stages if s.name == "if_rl")
    assert hub_file(f"{folder}:train") in stage.domains[0].path


def test_rows_are_identified_as_those_of_files(fake: Fake, folder: Path, tmp_path: Path) -> None:
    config = with_hub_files(DataConfig(hub=(f"{folder}:train",), format="qa"))
    tokenizer = train_tokenizer(
        DataConfig(path=("synthetic:arithmetic",), max_rows=200), 384, str(tmp_path / "t.model")
    )
    (source,) = cache_key(config, config.path, tokenizer)["sources"]
    assert source["path"] == str(Path(config.path[0]).resolve())
    write(folder, "train", ROWS[:4])
    again = with_hub_files(DataConfig(hub=(f"{folder}:train",), format="qa"))
    assert cache_key(again, again.path, tokenizer)["sources"] != [source]


def test_what_cannot_be_loaded(fake: Fake, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"cannot be loaded: FileNotFoundError.*check the name"):
        hub_file(f"{folder}:validation")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="which is not installed: pip install datasets"):
        hub_file(f"{folder}:validation")


@pytest.mark.integration
def test_the_package_datasets_reads_a_local_folder(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed("datasets")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setitem(os.environ, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    assert rows_of(hub_file(f"{folder}:train")) == ROWS
    assert rows_of(hub_file(f"{folder}:test")) == ROWS[:2]
