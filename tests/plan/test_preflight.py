"""Preflight reports all problems at once, and the 30B recipes pass its dry run of 256 ranks."""

from __future__ import annotations

import gzip
import json
import re
import shutil
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Literal

import pytest

from nemocascade import recipe as recipes
from nemocascade.cascade.graph import cascade_problems
from nemocascade.cli import main
from nemocascade.megatron.world import start_world
from nemocascade.plan.devices import check_device, online
from nemocascade.plan.findings import Preflight
from nemocascade.plan.gpus import find_gpu
from nemocascade.plan.job import job_of_recipe
from nemocascade.plan.preflight import (
    check_recipe,
    check_rows,
    check_start,
    check_tokenizer,
    offline,
    problems_before,
)
from nemocascade.plan.settings import PreflightSettings
from nemocascade.recipe import (
    CascadeRecipe,
    CheckpointConfig,
    DomainConfig,
    EngineConfig,
    GrpoRecipe,
    ParallelConfig,
    Recipe,
    SftRecipe,
    StageRecipe,
    TokenizerConfig,
    load_any_recipe,
    load_recipe,
    nemotron3_nano_30b,
)
from nemocascade.recipe.changes import as_json
from nemocascade.recipe.paths import Names
from nemocascade.recipe.rules import hints_of

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
TINY = str(RECIPES / "tiny" / "sft.py")
NANO = "nemotron3_nano_30b"
LARGE_SCRIPTS = sorted((RECIPES / NANO).glob("*.py"))
# One recipe a stage; cascade.py is made of the others.
LARGE = [path for path in LARGE_SCRIPTS if path.stem != "cascade"]
GENRM = "nvidia/Qwen3-Nemotron-235B-A22B-GenRM"
JUDGES = {
    "rlhf": [GENRM],
    "mopd": [GENRM],
    "long_context_rl": ["Qwen/Qwen3-235B-A22B-Instruct-2507"],
    "swe_agentless_rl": ["openai/gpt-oss-120b"],
    "cascade": [GENRM, "Qwen/Qwen3-235B-A22B-Instruct-2507", "openai/gpt-oss-120b"],
}


def problems_of(recipe: Recipe) -> list[str]:
    """Broken rules on 256 ranks, as `preflight`, `--dry-run` and a start name them."""
    if isinstance(recipe, CascadeRecipe):
        return cascade_problems(recipe, 256)
    return recipe.problems(256)


def with_start(recipe: StageRecipe) -> StageRecipe:
    """The recipe with a start, and a server for its judge."""
    if isinstance(recipe, SftRecipe):
        return replace(recipe, init_from="base")
    judge = replace(recipe.envs.judge, url="http://host:8000")
    return replace(recipe, init_from="before", envs=replace(recipe.envs, judge=judge))


def test_the_tiny_recipe_passes(tmp_path: Path) -> None:
    recipe = replace(load_recipe(Path(TINY), SftRecipe), run_dir=str(tmp_path / "run"))
    found = Preflight()
    check_recipe(recipe, PreflightSettings(recipe=TINY, gpu="cpu"), found)
    assert found.problems == []
    checks = {f.check for f in found.findings}
    assert {"settings", "data files", "disk", "start", "tokenizer", "memory", "dry run"} <= checks
    assert json.loads(found.as_json())["passed"] is True
    assert "all checks passed" in found.text()


@pytest.mark.parametrize("path", LARGE, ids=lambda p: p.stem)
def test_the_30b_recipes_pass_as_256_ranks(path: Path, tmp_path: Path) -> None:
    """Every rank's model is built, and no problem is left but the data that is not here."""
    recipe = load_any_recipe(path)
    assert not isinstance(recipe, CascadeRecipe)
    recipe = replace(
        with_start(recipe), run_dir=str(tmp_path / "run"), checkpoint=CheckpointConfig(keep=1)
    )
    if isinstance(recipe, SftRecipe):
        data = replace(recipe.data, path=("synthetic:arithmetic",), non_thinking_path=())
        recipe = replace(recipe, data=data)
    job = job_of_recipe(recipe, find_gpu("h200"), 256, preset=NANO)
    found = Preflight()
    offline(recipe, job, 256, found, dry_run=True, ahead=True)
    has_space = shutil.disk_usage(tmp_path).free > 2**40
    missing = re.compile(r"(domains\.\d+|envs\.\w+)\.\w+: data/\S+ does not exist")
    problems = [p for p in found.problems if not missing.match(p)]
    assert [p for p in problems if has_space or "free some space" not in p] == []
    [built] = [f for f in found.findings if f.check == "dry run"]
    assert re.match(r"256 ranks of \d+ kinds built on the meta device", built.measured)
    assert found.seconds < 120


def test_all_problems_come_at_once(tmp_path: Path) -> None:
    """Five kinds of fault in one recipe, five findings, each with what to do."""
    bad = tmp_path / "broken"
    bad.mkdir()
    recipe = load_recipe(Path(TINY), SftRecipe)
    recipe = replace(
        recipe,
        run_dir=str(tmp_path / "run"),
        init_from=str(bad),
        data=replace(recipe.data, path=(str(tmp_path / "nowhere.jsonl"),), capacity=2049),
        tokenizer=TokenizerConfig(path=str(tmp_path / "nowhere.model")),
        parallel=ParallelConfig(tp=2, ep=3),
    )
    job = job_of_recipe(recipe, find_gpu("cpu"), 2)
    found = Preflight()
    offline(recipe, job, 2, found, dry_run=True)
    text = "\n".join(found.problems)
    for part in (
        "capacity(2049)",
        "ep(3)",
        "nowhere.jsonl does not exist",
        "manifest.json is missing",
        "nowhere.model does not exist",
    ):
        assert part in text
    assert "FAIL" in found.text()


def test_packs_that_cannot_be_scanned_are_found(tmp_path: Path) -> None:
    recipe = load_recipe(Path(TINY), SftRecipe)
    data = replace(recipe.data, capacity=2**31 - 256, sequences_per_step=1)
    recipe = replace(recipe, run_dir=str(tmp_path / "run"), data=data)
    choices: tuple[tuple[Literal["on", "auto"], bool], ...] = (("on", True), ("auto", False))
    for fla, expected in choices:
        chosen = replace(recipe, engine=replace(recipe.engine, fla=fla))
        found = Preflight()
        job = job_of_recipe(chosen, find_gpu("h200"), 1)
        offline(chosen, job, 1, found, dry_run=False)
        assert any("for a single head" in p for p in found.problems) == expected


def test_a_tokenizer_larger_than_the_embedding_is_found() -> None:
    recipe = load_recipe(Path(TINY), SftRecipe)
    found = Preflight()
    check_tokenizer(replace(recipe, tokenizer=TokenizerConfig(train_vocab_size=4096)), found)
    [problem] = found.problems
    assert problem.startswith("tokenizer.train_vocab_size(4096) is above model.vocab_size(2048)")


@pytest.mark.parametrize("path", LARGE_SCRIPTS, ids=lambda p: p.stem)
def test_a_recipe_of_a_published_model_names_its_start_and_its_judge(path: Path) -> None:
    """The script as it stands trains no random weights, and asks no placeholder."""
    recipe = load_any_recipe(path)
    problems = "\n".join(problems_of(recipe))
    if path.stem in ("sft", "cascade"):
        assert (
            "init_from is empty, and random weights are not base_model(nvidia/NVIDIA-Nemotron-3-"
            "Nano-30B-A3B-Base-BF16): convert its folder (nemocascade convert FOLDER ARTIFACT) "
            "and pass --init-from ARTIFACT"
        ) in problems
    elif path.stem != "mopd":
        assert "init_from is empty: name the artifact" in problems
    for judge in JUDGES.get(path.stem, ()):
        wanted = f"envs.judge.url('') must be http://host:port of a server: start one for {judge}"
        assert wanted in problems
    if not isinstance(recipe, CascadeRecipe):
        assert with_start(recipe).problems(256) == []


def test_a_recipe_without_a_published_model_may_start_at_random() -> None:
    sft = load_recipe(RECIPES / NANO / "sft.py", SftRecipe)
    assert replace(sft, base_model="").problems(256) == []
    assert load_recipe(Path(TINY), SftRecipe).problems(1) == []


def test_too_little_memory_and_disk_are_foreseen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe(Path(TINY), SftRecipe)
    recipe = replace(recipe, run_dir=str(tmp_path), model=nemotron3_nano_30b())
    usage = shutil._ntuple_diskusage(2**40, 2**40 - 2**30, 2**30)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    problems = problems_before(recipe, 1)
    assert any("GiB, a cpu gives" in p for p in problems)
    assert any("free some space" in p for p in problems)


def test_warnings_are_counted_in_the_conclusion() -> None:
    found = Preflight()
    found.add("servers", [], "1 named", ["nobody answers"])
    assert "warn servers: nobody answers" in found.text()
    assert "\n1 warning(s) in " in found.text()
    found.add("rows", ["empty", "gone"])
    assert "\n2 problem(s), 1 warning(s) in " in found.text()


def test_an_unknown_failure_is_a_finding() -> None:
    found = Preflight()
    with found.guarded("thing"):
        raise KeyError("what")
    found.add("next", [], "seen")
    assert found.problems == ["thing: KeyError: 'what'"]
    assert found.findings[1].measured == "seen"


def test_devices_are_timed(tmp_path: Path) -> None:
    recipe = load_recipe(Path(TINY), SftRecipe)
    job = job_of_recipe(recipe, find_gpu("cpu"), 1)
    world = start_world(ParallelConfig(), EngineConfig(precision="fp32"))
    try:
        found = Preflight()
        check_device(world, job, found)
        assert "TFLOP/s" in found.findings[0].measured
        assert online(world, job, tmp_path).problems == []
        assert list(tmp_path.iterdir()) == []
    finally:
        world.close()


def test_every_path_and_server_of_an_rl_recipe_is_checked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The recipe's settings follow the command's own, with or without `--`."""
    recipe = str(RECIPES / "tiny" / "if_rl.py")
    here = {"path": tmp_path / "rows.jsonl", "heldout-path": tmp_path / "gone.jsonl"}
    here["path"].write_text("{}\n")
    domain = [a for name, path in here.items() for a in (f"--domains.0.{name}", str(path))]
    judge = ["--envs.judge.kind", "server", "--envs.judge.model", "m"]
    judge += ["--envs.judge.url", "http://127.0.0.1:9", "--envs.judge.artifact", "no/artifact"]
    packages = ["--envs.sandbox.packages", "no/packages"]
    own = ["nemocascade", "preflight", recipe, "--gpu", "cpu", "--no-dry-run", "--json"]
    for between in ([], ["--"]):
        monkeypatch.setattr("sys.argv", [*own, *between, *domain, *judge, *packages])
        with pytest.raises(SystemExit) as caught:
            main()
        assert caught.value.code == 2
        found = json.loads(capsys.readouterr().out)["findings"]
        problems = "\n".join(f["problem"] for f in found)
        assert f"domains.0.heldout_path: {here['heldout-path']} does not exist" in problems
        assert "envs.sandbox.packages: no/packages does not exist" in problems
        assert "--envs.judge.artifact: no/artifact: 1 problem(s)" in problems
        assert str(here["path"]) not in problems
        warnings = "\n".join(f["warning"] for f in found)
        assert "envs.judge.url: nobody answers at http://127.0.0.1:9" in warnings


def test_rows_that_cannot_be_read_are_problems(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "notes.txt").write_text("no rows")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"a": 1}\n' * 99)[:20])
    (tmp_path / "rows.jsonl").write_text("{}\n")
    names = ("folder", "empty.jsonl", "notes.txt", "cut.jsonl.gz", "rows.jsonl", "none.jsonl")
    domain = DomainConfig(heldout_path=tuple(str(tmp_path / name) for name in names))
    recipe = GrpoRecipe(domains=(domain,), run_dir=str(tmp_path))
    found = Preflight()
    check_rows(recipe, found)
    # A missing file is a finding of `check_files`.
    assert len(found.problems) == 4
    for problem, part in zip(
        found.problems,
        ("holds no file of", "the file is empty", "unknown kind of file", "ended before"),
        strict=True,
    ):
        assert problem.startswith(f"domains.0.heldout_path: {tmp_path}")
        assert problem.endswith("fix --domains.0.heldout-path")
        assert part in problem


def test_every_setting_that_names_a_path_is_marked() -> None:
    def unmarked(kind: type) -> list[str]:
        found = []
        for f in fields(kind):
            marks = getattr(hints_of(kind)[f.name], "__metadata__", ())
            said = f.name.endswith(
                ("path", "dir", "from", "artifact", "url", "urls", "cache", "packages", "folder")
            ) or f.name in ("adapter", "announce", "workplace_data")
            if said != any(isinstance(m, Names) for m in marks):
                found.append(f"{kind.__name__}.{f.name}")
        return found

    kinds = [k for k in vars(recipes).values() if isinstance(k, type) and is_dataclass(k)]
    assert len(kinds) > 20
    assert [name for kind in kinds for name in unmarked(kind)] == []


def test_changed_settings_are_found_before_the_job(tmp_path: Path) -> None:
    recipe = replace(load_recipe(Path(TINY), SftRecipe), run_dir=str(tmp_path))
    folder = tmp_path / "checkpoints" / "step_00000002"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")
    (folder / "extra.json").write_text(json.dumps({"recipe": as_json(recipe)}))
    changed = replace(recipe, optimizer=replace(recipe.optimizer, lr=0.1))
    for one, count in ((recipe, 0), (changed, 1), (replace(changed, accept_changes=True), 0)):
        found = Preflight()
        check_start(one, found)
        assert len(found.problems) == count
