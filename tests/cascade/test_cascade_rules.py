"""Rules of a cascade without a run: order, teachers, alarms, keys of stages, overrides."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nemocascade.cascade.decide import choose_teachers
from nemocascade.cascade.errors import CascadeError
from nemocascade.cascade.graph import StageChoice, StageGraph, cascade_problems
from nemocascade.cascade.inputs import FileHashes, differences, key_of, recipe_files, stage_inputs
from nemocascade.cascade.launch import parse_cascade
from nemocascade.cascade.records import find_alarms
from nemocascade.recipe import (
    AlarmConfig,
    CascadeRecipe,
    DataConfig,
    DemonstrationConfig,
    DomainConfig,
    EnvConfig,
    GrpoConfig,
    GrpoRecipe,
    LogConfig,
    MopdConfig,
    MopdRecipe,
    ParallelConfig,
    RolloutConfig,
    ScoreConfig,
    ScoredDomain,
    SftRecipe,
    StageConfig,
    TeacherChoice,
    TeacherConfig,
    TokenizerConfig,
    tiny,
)
from nemocascade.recipe.changes import at_default
from nemocascade.recipe.envs import SandboxConfig, ToolCallingConfig
from nemocascade.recipe.judge import JudgeConfig
from nemocascade.stages.domain_score import DomainScore
from nemocascade.stages.scoring import Scores
from nemocascade.stages.teacher_scores import TaughtDomain, teacher_warning

ROLLOUT = RolloutConfig(
    max_prompt_tokens=96, max_response_tokens=32, dynamic_filtering=False, rollouts_per_prompt=4
)
SFT = SftRecipe(
    model=tiny(),
    data=DataConfig(path=("synthetic:arithmetic",), capacity=512, sequences_per_step=2),
)
RL = GrpoRecipe(
    rollout=ROLLOUT, grpo=GrpoConfig(capacity=128), domains=(DomainConfig(domain="math"),)
)
MOPD = MopdRecipe(
    rollout=ROLLOUT,
    mopd=MopdConfig(capacity=128),
    domains=(DomainConfig(domain="math"), DomainConfig(domain="code")),
)


def cascade(**changes: Any) -> CascadeRecipe:
    recipe = CascadeRecipe(
        run_dir="run",
        stages=(
            StageConfig("sft", SFT),
            StageConfig("rl", RL),
            StageConfig("aside", RL, start="sft", side=True),
            StageConfig("mopd", MOPD),
            StageConfig("last", RL),
        ),
        scores=ScoreConfig(domains=(ScoredDomain("math"), ScoredDomain("code"))),
    )
    return replace(recipe, **changes)


def scores(**by_domain: float | None) -> Scores:
    found = {domain: DomainScore(value, 8, 0) for domain, value in by_domain.items()}
    return Scores("digest", "settings", found, {}, 1.0)


def test_a_stage_starts_from_the_main_line_unless_it_says_otherwise() -> None:
    recipe = cascade()
    graph = StageGraph(recipe)
    starts = {name: graph.start_of(name) for name in graph.names}
    assert starts == {"sft": "", "rl": "sft", "aside": "sft", "mopd": "rl", "last": "mopd"}
    assert cascade_problems(recipe, 1) == []
    resolved = graph.resolved("aside")
    assert resolved.init_from == "run/stages/sft/artifact"
    assert resolved.run_dir == "run/stages/aside"
    assert graph.model_of("last") == tiny()


def test_everything_wrong_is_named_at_once() -> None:
    stages = (
        StageConfig("sft", SFT, side=True),
        StageConfig("rl", RL, start="rl2"),
        StageConfig("rl2", RL, start="rl"),
        StageConfig("rl3", RL, start="nowhere"),
        StageConfig("rl4", RL, start="rl5"),
        StageConfig("rl5", RL),
    )
    found = "\n".join(cascade_problems(cascade(stages=stages, alarm=AlarmConfig(drop=0)), 1))
    for part in (
        "alarm.drop(0)",
        "sft is first, so it cannot be a side branch",
        "stages.rl.start('rl2'): the two start from each other (rl <- rl2 <- rl)",
        "stages.rl3.start('nowhere') is not a stage: use one before it (sft, rl, rl2)",
        "stages.rl4.start('rl5') runs after it: move rl5 before rl4",
    ):
        assert part in found, found


def test_names_are_unique_folders() -> None:
    stages = (StageConfig("sft", SFT), StageConfig("sft", RL), StageConfig("a/b", RL))
    found = "\n".join(cascade_problems(cascade(stages=stages), 1))
    assert "'sft' occurs twice" in found
    assert "'a/b' must be up to 100 letters" in found
    assert cascade_problems(cascade(stages=()), 1) == ["stages is empty: name at least one"]


def test_each_stage_is_checked_on_its_own_layout() -> None:
    three = replace(RL, parallel=ParallelConfig(tp=3))
    recipe = cascade(stages=(StageConfig("sft", SFT), StageConfig("rl", three)))
    found = cascade_problems(recipe, 2)
    assert any(p.startswith("stages.rl: tp(3)") for p in found), found
    assert not any(p.startswith("stages.sft") for p in found), found


def test_a_cascade_may_start_from_an_artifact_but_not_from_nothing() -> None:
    nothing = cascade_problems(cascade(stages=(StageConfig("rl", RL),)), 1)
    assert any("stages.rl: init_from is empty" in p for p in nothing), nothing
    artifact = replace(RL, init_from="base/artifact")
    recipe = cascade(stages=(StageConfig("rl", artifact),))
    assert cascade_problems(recipe, 1) == []
    assert StageGraph(recipe).resolved("rl").init_from == "base/artifact"
    assert StageGraph(recipe).model_of("rl") is None


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"scores": ScoreConfig(domains=(ScoredDomain("math"),))}, "teacher of code cannot be"),
        (
            {"scores": ScoreConfig(domains=(ScoredDomain("math"), ScoredDomain("code", name="h")))},
            "teacher of code cannot be chosen, for no score has that name",
        ),
        ({"teachers": TeacherChoice({"code": "last"})}, "pinned to 'last', which is not a stage"),
        ({"teachers": TeacherChoice({"tool_calling": "sft"})}, "names tool_calling, which no MOPD"),
        ({"stages": (StageConfig("mopd", MOPD),)}, "no artifact can teach math, code"),
    ],
)
def test_teachers_that_cannot_be_chosen(changes: dict[str, Any], expected: str) -> None:
    found = cascade_problems(cascade(**changes), 1)
    assert any(expected in p for p in found), found


def test_the_best_score_teaches_side_branches_included() -> None:
    found = choose_teachers(
        cascade(),
        "mopd",
        {
            "sft": scores(math=0.5, code=0.2),
            "rl": scores(math=0.3, code=0.4),
            "aside": scores(math=0.2, code=0.6),
            "last": scores(math=0.9, code=0.9),
        },
    )
    assert {d: (t.stage, t.score, t.pinned) for d, t in found.items()} == {
        "math": ("sft", 0.5, False),
        "code": ("aside", 0.6, False),
    }
    assert found["code"].artifact == "run/stages/aside/artifact"


def test_of_equal_teachers_the_start_wins_then_the_latest() -> None:
    equal = {name: scores(math=0.5, code=0.5) for name in ("sft", "rl", "aside")}
    assert choose_teachers(cascade(), "mopd", equal)["math"].stage == "rl"
    equal["rl"] = scores(math=0.1, code=0.1)
    assert choose_teachers(cascade(), "mopd", equal)["math"].stage == "aside"


def test_a_pinned_teacher_needs_no_score() -> None:
    recipe = cascade(teachers=TeacherChoice({"math": "sft"}))
    found = choose_teachers(recipe, "mopd", {"rl": scores(math=0.9, code=0.1)})
    assert (found["math"].stage, found["math"].score, found["math"].pinned) == ("sft", None, True)
    assert found["code"].stage == "rl"


def test_a_domain_whose_verifiers_all_failed_has_no_teacher() -> None:
    with pytest.raises(CascadeError, match="no artifact before it has a score of code"):
        choose_teachers(cascade(), "mopd", {"sft": scores(math=0.5, code=None)})


def taught(domain: str, teacher: float | None, student: float | None, **also: Any) -> TaughtDomain:
    return TaughtDomain(domain, 0.25, f"{domain}_teacher", teacher, student, **also)


def test_teachers_that_cannot_raise_the_student_are_named_with_a_remedy() -> None:
    found = teacher_warning(
        (
            taught("code", 0.02, 0.0),
            taught("math", 0.4, 0.4),
            taught("preference", 0.5, 0.1),
            taught("tool_calling", 0.9, 0.9, is_start=True),
        ),
        "--teachers.pinned DOMAIN STAGE",
    )
    assert "75% of the prompts" in found
    assert "- code, 25%: code_teacher scores 0.020, near 0" in found
    assert "- math, 25%: math_teacher scores 0.400, not above the student's 0.400" in found
    assert "- tool_calling, 25%: tool_calling_teacher, 0.900, is the student's own start" in found
    assert "preference" not in found
    assert "--teachers.pinned DOMAIN STAGE" in found
    assert "side stage" in found


def test_a_better_teacher_or_one_without_a_score_is_not_named() -> None:
    assert teacher_warning((taught("math", 0.5, 0.4), taught("code", None, 0.4)), "") == ""
    # A resumed stage does not score its start again.
    assert teacher_warning((taught("math", 0.5, None),), "") == ""


def test_a_named_teacher_is_left_alone() -> None:
    named = replace(MOPD, teachers=(TeacherConfig("math", "elsewhere/artifact"),))
    stages = (StageConfig("sft", SFT), StageConfig("mopd", named))
    recipe = cascade(stages=stages)
    graph = StageGraph(recipe)
    assert graph.open_teachers("mopd") == ["code"]
    resolved = graph.resolved("mopd", teachers={"code": "run/stages/sft/artifact"})
    assert isinstance(resolved, MopdRecipe)
    assert {t.domain: t.artifact for t in resolved.teachers} == {
        "math": "elsewhere/artifact",
        "code": "run/stages/sft/artifact",
    }


def test_an_alarm_names_domain_stage_and_size() -> None:
    by_stage = {
        "sft": scores(math=0.50, code=0.50),
        "rl": scores(math=0.40, code=0.46),
        "aside": scores(math=0.50, code=None),
        "mopd": scores(math=0.34, code=0.10),
    }
    alarms = find_alarms(cascade(), by_stage)
    assert [(a.stage, a.from_stage, a.domain, round(a.drop, 6)) for a in alarms] == [
        ("rl", "sft", "math", 10.0),
        ("mopd", "rl", "math", 6.0),
        ("mopd", "rl", "code", 36.0),
    ]
    assert "rl has lost 10.0 points of math: 50.0 after sft, 40.0 now" in alarms[0].text()
    assert find_alarms(cascade(alarm=AlarmConfig(drop=40.0)), by_stage) == []
    # Scores of other settings are of other tasks.
    by_stage["rl"] = replace(by_stage["rl"], settings="others")
    assert find_alarms(cascade(), by_stage) == []


def test_the_key_holds_what_makes_the_artifact(tmp_path: Path) -> None:
    files = FileHashes(tmp_path / "files.json")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("one\n")
    recipe = replace(RL, domains=(DomainConfig("math", path=(str(rows),)),))
    base = stage_inputs(recipe, "parent", {}, files)
    same = (
        replace(recipe, run_dir="elsewhere", init_from="moved", log=LogConfig(every=9)),
        replace(recipe, parallel=ParallelConfig(tp=2)),
    )
    for other in same:
        assert key_of(stage_inputs(other, "parent", {}, files)) == key_of(base)
    changed = stage_inputs(replace(recipe, steps=7), "other", {"math": "t"}, files)
    assert differences(base, changed) == [
        "start parent -> other",
        "steps 100 -> 7",
        "teachers.math none -> t",
    ]
    # A judge that moved to another host, as with every job of a cluster, judges alike.
    judges = [JudgeConfig(kind="server", url=f"http://host{i}:8000", model="m") for i in (1, 2)]
    moved, served = (
        replace(recipe, envs=replace(recipe.envs, judge=judge)) for judge in reversed(judges)
    )
    moved = replace(
        moved, envs=replace(moved.envs, judge=replace(moved.envs.judge, retries=9, deadline_s=9.0))
    )
    first, second = (stage_inputs(r, "parent", {}, files) for r in (served, moved))
    assert key_of(first) == key_of(second)
    assert differences(first, second) == []
    # As an older program kept it.
    first["recipe"]["envs"]["judge"]["url"] = "http://host1:8000"
    assert differences(first, second) == []
    other = replace(moved, envs=replace(moved.envs, judge=replace(judges[0], model="n")))
    assert differences(first, stage_inputs(other, "parent", {}, files)) == [
        "envs.judge.model m -> n"
    ]
    rows.write_text("two\n")
    [line] = differences(base, stage_inputs(recipe, "parent", {}, FileHashes(tmp_path / "f.json")))
    assert line.startswith(f"files.{rows} ")


def test_every_file_that_a_recipe_names_is_part_of_the_key() -> None:
    envs = EnvConfig(
        sandbox=SandboxConfig(packages=("packages",)),
        tool_calling=ToolCallingConfig(workplace_data="tables"),
        judge=JudgeConfig(kind="artifact", artifact="judge"),
    )
    assert recipe_files(replace(RL, envs=envs)) == ["judge", "packages", "tables"]
    made = DemonstrationConfig(domains=(DomainConfig("math", heldout_path=("h",)),))
    data = DataConfig(path=("a", "synthetic:arithmetic"), non_thinking_path=("a",))
    sft = SftRecipe(data=data, demonstrations=made, tokenizer=TokenizerConfig(path="t.model"))
    assert recipe_files(sft) == ["a", "h", "t.model"]
    assert recipe_files(replace(sft, init_from="start")) == ["a", "h"]


def test_settings_that_a_newer_program_adds_change_nothing_at_their_defaults(
    tmp_path: Path,
) -> None:
    files = FileHashes(tmp_path / "files.json")
    recipe = replace(RL, domains=(DomainConfig("math", tasks=9), DomainConfig("code")))
    new = stage_inputs(recipe, "parent", {}, files)
    old = json.loads(json.dumps(new))
    del old["recipe"]["envs"]["sandbox"]
    del old["recipe"]["domains"][1]["difficulty"]
    assert differences(old, new, at_default(recipe)) == []
    assert differences(old, new) != []
    # A setting that is set, or was there before, does count.
    del old["recipe"]["domains"][0]["tasks"]
    old["recipe"]["domains"][0]["share"] = 0.5
    assert differences(old, new, at_default(recipe)) == [
        "domains.0.share 0.5 -> 1.0",
        "domains.0.tasks none -> 9",
    ]


def test_files_are_hashed_by_content_and_remembered(tmp_path: Path) -> None:
    memory, path = tmp_path / "files.json", tmp_path / "rows.jsonl"
    path.write_text("one\n")
    first = FileHashes(memory).of([str(path), str(tmp_path / "none")])
    assert first[str(tmp_path / "none")] == "missing"
    assert str(path) in memory.read_text()
    path.touch()
    assert FileHashes(memory).of([str(path)])[str(path)] == first[str(path)]
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.jsonl").write_text("a\n")
    before = FileHashes(memory).of([str(folder)])
    (folder / "b.jsonl").write_text("b\n")
    assert FileHashes(memory).of([str(folder)]) != before


def test_overrides_go_by_the_names_of_stages() -> None:
    arguments = [
        *("--stages.rl.steps", "7", "--stages.mopd.mopd.keep", "disk", "--scores.tasks", "9"),
        *("--alarm.stop", "True", "--teachers.pinned", "math", "sft", "--from", "rl", "--dry-run"),
    ]
    found, choice, dry = parse_cascade(cascade(), arguments)
    graph = StageGraph(found)
    assert graph.stage("rl").recipe.steps == 7
    assert graph.stage("last").recipe.steps == RL.steps
    mopd = graph.stage("mopd").recipe
    assert isinstance(mopd, MopdRecipe)
    assert mopd.mopd.keep == "disk"
    assert (found.scores.tasks, found.alarm.stop) == (9, True)
    assert found.teachers.pinned == {"math": "sft"}
    assert graph.stage("aside").side
    assert (choice, dry) == (StageChoice(begin="rl"), True)
    assert parse_cascade(cascade(), []) == (cascade(), StageChoice(), False)


def test_an_unknown_override_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_cascade(cascade(), ["--stages.rl.stepss", "7"])
    assert "--stages.rl.steps" in capsys.readouterr().err


def test_what_cannot_be_meant() -> None:
    both = StageChoice(begin="sft", only="rl3").problems(cascade())
    assert len(both) == 2
    assert "--only 'rl3' is not a stage: use one of sft, rl" in both[0]
    assert StageChoice(again=True).problems(cascade())[0].startswith("--again needs")
    assert StageChoice(begin="mopd").stages(cascade()) == ["mopd", "last"]
    assert StageChoice(only="aside").stages(cascade()) == ["aside"]


def test_an_sft_stage_in_mid_cascade_keeps_the_tokenizer() -> None:
    stages = (StageConfig("sft", SFT), StageConfig("more", SFT))
    resolved = StageGraph(cascade(stages=stages)).resolved("more", tokenizer="a/tokenizer.model")
    assert isinstance(resolved, SftRecipe)
    assert resolved.tokenizer.path == "a/tokenizer.model"
    own = replace(SFT, tokenizer=TokenizerConfig(path="own.model"))
    stages = (StageConfig("sft", SFT), StageConfig("more", own))
    resolved = StageGraph(cascade(stages=stages)).resolved("more", tokenizer="a/tokenizer.model")
    assert isinstance(resolved, SftRecipe)
    assert resolved.tokenizer.path == "own.model"
