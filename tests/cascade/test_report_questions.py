"""The report answers: is a change real, where did the time go, is the reward hacked, which run is
better, which stages are stale."""

from __future__ import annotations

import json
import math
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers.cascade_run import digest, make_run
from helpers.html_page import check_page

from nemocascade.cascade.launch import run_comparison, run_report
from nemocascade.cascade.lineage import listed_in, report_text, score_table
from nemocascade.cascade.report import (
    ReportError,
    phases,
    scores,
    signs,
    versus,
    view,
    write_report,
)
from nemocascade.cascade.report.read import read_run
from nemocascade.cascade.report.record import Stage
from nemocascade.cascade.report.scores import difference_error, is_noise
from nemocascade.cascade.report.write import comparison_name, replace_page
from nemocascade.cascade.staleness import stale_stages
from nemocascade.cascade.watch import status_lines, watch
from nemocascade.recipe import RecipeError
from nemocascade.recipe.commands import WatchSettings
from nemocascade.stages.domain_score import DomainScore, domain_score


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "first")


def made_again(run: Path, stage: str) -> None:
    """Change the run as `--only STAGE` does: the stage has another artifact."""
    for path in (run / "stages" / stage / "stage.json", run / "stages" / stage / "scores.json"):
        found = json.loads(path.read_text())
        name = "artifact_digest" if path.name == "stage.json" else "digest"
        path.write_text(json.dumps(found | {name: digest(f"{stage} again")}))
    cascade = json.loads((run / "cascade.json").read_text())
    for entry in cascade["stages"]:
        if entry["name"] == stage:
            entry["artifact_digest"] = digest(f"{stage} again")
    (run / "cascade.json").write_text(json.dumps(cascade))


def scored(share: float, tasks: int = 100) -> DomainScore:
    right = round(share * tasks)
    return domain_score([[1.0]] * right + [[0.0]] * (tasks - right))


def test_the_error_of_a_difference() -> None:
    before, after = scored(0.5), scored(0.6)
    expected = math.sqrt(0.5 * 0.5 / 99 + 0.6 * 0.4 / 99)
    assert difference_error(before, after) == pytest.approx(expected)
    assert is_noise(before, after)
    assert not is_noise(before, scored(0.65))
    # More tasks make the same change real.
    assert not is_noise(scored(0.5, 1000), scored(0.6, 1000))


def test_equal_rewards_are_no_certainty() -> None:
    """All of 20 answers wrong does not mean that one right answer is a real gain."""
    assert is_noise(scored(0.0, 20), scored(0.05, 20))
    assert is_noise(scored(0.0, 20), scored(0.0, 20))
    assert not is_noise(scored(0.0, 20), scored(1.0, 20))
    unknown = DomainScore(None, 4, 4)
    assert not is_noise(unknown, scored(0.5))
    assert not is_noise(None, scored(0.5))


def test_failed_verdicts_are_counted_by_sample() -> None:
    """With 20 of 80 verdicts lost, at least eight of ten tasks have some."""
    wrong = domain_score([[0.0] * 6 + [None] * 2] * 10)
    assert wrong.errors == 20
    expected = math.sqrt(2 * 0.1 * 0.9 / 8)
    assert difference_error(wrong, wrong) == pytest.approx(expected)
    assert is_noise(wrong, replace(wrong, score=0.05))


def test_the_table_shows_errors_and_greys_noise(run: Path) -> None:
    found = read_run(run)
    rows = dict(view.score_rows(found))
    columns = [s.name for s in scores.ordered(found)]
    gain = rows["instruction_following"][columns.index("if_rl")]
    drift = rows["code"][columns.index("if_rl")]
    assert gain is not None
    assert drift is not None
    assert (gain.change, gain.noise) == ("+27.0", False)
    assert drift.noise
    assert gain.error == "2.9"
    assert view.tasks_of(found, "code") == "n 256"
    page = check_page(write_report(run, with_pictures=False))
    classes = [a.get("class") for tag, a in page.elements if tag == "small"]
    noisy = sum(c.noise and not c.alarm for row in rows.values() for c in row if c)
    assert classes.count("noise") == noisy > 0


def test_where_the_time_went(run: Path) -> None:
    found = read_run(run)
    stage = next(s for s in found.stages if s.name == "mopd")
    seconds = phases.phase_seconds(stage)
    whole = stage.seconds
    assert whole is not None
    expected = {"rollout": 0.45, "wait": 0.05, "verify": 0.1, "teacher": 0.1, "train": 0.25}
    for name, share in expected.items():
        assert seconds[name] == pytest.approx(share * whole), name
    assert seconds["score"] == 6.5
    # Nothing is counted twice, and nothing is lost.
    assert sum(seconds.values()) == pytest.approx(whole + 6.5)
    sft = phases.phase_seconds(found.stages[0])
    assert sft["train"] == pytest.approx(found.stages[0].seconds or 0.0)
    assert sum(s.share for s in phases.phases_of_run(found)) == pytest.approx(1.0)
    assert {name for name, _ in phases.PHASES} >= set(seconds)


def test_lines_of_every_tenth_step_stand_for_all() -> None:
    curves = {"step_time_s": [(10, 2.0), (20, 2.0)]}
    stage = Stage("a", "sft", "", False, "done", "", 50.0, 1, curves=curves)
    assert phases.phase_seconds(stage)["train"] == pytest.approx(40.0)
    assert phases.phase_seconds(stage)["rest"] == pytest.approx(10.0)
    assert phases.phase_seconds(replace(stage, curves={})) == {}


def with_curves(run: Path, name: str, **curves: tuple[float, float]) -> Stage:
    """The stage with curves that go from one value to another."""
    stage = next(s for s in read_run(run).stages if s.name == name)
    changed = {
        key: [(n + 1, a + (b - a) * n / 19) for n in range(20)] for key, (a, b) in curves.items()
    }
    return replace(stage, curves={**stage.curves, **changed})


@pytest.mark.parametrize(
    ("curves", "said"),
    [
        ({"truncated": (0.0, 0.5)}, "of the responses are truncated"),
        ({"response_tokens": (100.0, 300.0)}, "responses went from"),
        ({"response_tokens": (300.0, 60.0)}, "responses went from"),
        ({"repetition": (0.05, 0.6)}, "of the text repeats itself"),
        ({"reward": (0.3, 0.9)}, ""),  # if_rl's held-out score rose as well
        ({"truncated": (0.3, 0.3), "repetition": (0.5, 0.4)}, ""),
        ({"response_tokens": (100.0, 120.0)}, ""),
    ],
)
def test_signs_of_reward_hacking(
    run: Path, curves: dict[str, tuple[float, float]], said: str
) -> None:
    found = read_run(run)
    stage = with_curves(run, "if_rl", **curves)
    changed = replace(found, stages=tuple(stage if s.name == "if_rl" else s for s in found.stages))
    sentences = [text for name, text in signs.flagged(changed) if name == "if_rl"]
    assert len(sentences) == bool(said)
    assert all(said in text for text in sentences)


def test_a_reward_without_a_held_out_gain_is_flagged(run: Path) -> None:
    """The RLHF stage of the made-up run gains 5 points, within noise, while its reward doubles."""
    assert [name for name, _ in signs.flagged(read_run(run))] == ["rlhf"]
    page = check_page(write_report(run, with_pictures=False))
    assert "no held-out score beyond noise" in page.text
    assert "repeated text" in page.text


def test_two_runs_side_by_side(run: Path, tmp_path: Path) -> None:
    other = make_run(tmp_path / "second", seed=7)
    recipe = other / "stages" / "if_rl" / "recipe.json"
    cascade = json.loads((other / "cascade.json").read_text())
    cascade["settings"]["heldout_tasks"] = 512
    (other / "cascade.json").write_text(json.dumps(cascade))
    assert recipe.exists()
    path = run_comparison(run, other)
    assert path.name == comparison_name("second", other)
    page = check_page(path)
    assert "heldout_tasks" in page.text
    assert "512" in page.text
    first, second = read_run(run), read_run(other)
    pairs = {p.name: p for p in versus.last_scores(first, second)}
    assert list(pairs) == list(first.domains)
    one, two = (r.main_line[-1].scores["math"].score for r in (first, second))
    assert one is not None
    assert two is not None
    assert pairs["math"].difference.startswith(
        f"{100 * (two - one):+.1f}".replace("-", "−").replace("+0.0", "0.0").replace("−0.0", "0.0")
    )
    assert " ± 4." in pairs["math"].difference
    labels = [str(a["aria-label"]) for _, a in page.elements if "aria-label" in a]
    assert "Reward of both runs over the steps of if_rl" in labels
    assert [name for name, _ in versus.stage_scores(first, second)][:2] == ["sft", "if_rl"]


def test_runs_of_one_name_have_pages_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = {comparison_name("run 1", Path(path)) for path in ("a/run 1", "b/run 1")}
    assert len(names) == 2
    assert all(re.fullmatch(r"versus_run_1_[0-9a-f]{8}\.html", name) for name in names)
    assert comparison_name("run 1", tmp_path / "a" / "run 1") in names


def test_a_run_is_compared_with_a_run(run: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ReportError, match="name the run folder"):
        run_comparison(run, tmp_path / "empty")
    shorter = make_run(tmp_path / "shorter", stages=1)
    page = check_page(run_comparison(run, shorter))
    assert "after SFT" in page.text
    assert "after MOPD" not in page.text


def test_the_table_is_in_the_cascades_order(run: Path) -> None:
    lines = score_table(run, listed_in(run)).splitlines()
    names = [line.split()[0] for line in lines[:12]]
    stages = [s.name for s in listed_in(run).stages]
    first = names.index("sft")
    assert names[first : first + len(stages)] == stages
    # Domains are in the order in which stages train them.
    assert lines[first - 1].split()[:3] == ["stage", "following", "choice"]
    assert lines[first - 2].split()[:2] == ["instruction", "multiple"]
    row = next(line for line in lines if line.startswith("if_rl")).split()
    assert row[1].startswith("[68.0")
    assert not any(cell.startswith("[") for cell in row[2:])
    assert "[ ] the stage trains this domain" in lines[-1]
    assert max(map(len, lines)) < 120
    assert "stale" not in "\n".join(lines)


def test_scores_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    run = make_run(tmp_path / "damaged", stages=2)
    path = run / "stages" / "if_rl" / "scores.json"
    path.write_text("{")
    table = score_table(run, listed_in(run))
    assert table.splitlines()[-1] == f"damaged, or of another version: {path}"
    assert not any(line.startswith("if_rl") for line in table.splitlines())


def test_what_is_stale_after_a_stage_was_made_again_is_said(tmp_path: Path) -> None:
    run = make_run(tmp_path / "again")
    stages = listed_in(run).stages
    assert stale_stages(run, stages) == {}
    made_again(run, "rlhf_teacher")
    found = stale_stages(run, listed_in(run).stages)
    # The student of the teacher, and what follows the student.
    assert list(found) == ["mopd", "rlhf", "long_context_rl", "code_rl", "swe_agentic_rl"]
    assert found["mopd"] == "made from an earlier rlhf_teacher"
    assert found["rlhf"] == "made from mopd, which is stale"
    text = report_text(run)
    assert "mopd is made from an earlier rlhf_teacher" in text
    assert next(x for x in text.splitlines() if x.startswith("mopd ")).endswith("stale")
    page = check_page(write_report(run, with_pictures=False))
    assert "MOPD is made from an earlier rlhf_teacher" in page.text
    lines = status_lines(read_run(run), width=200)
    assert "stale" in next(line for line in lines if line.startswith("  mopd"))


def test_a_stage_that_is_being_made_again_makes_its_followers_stale(tmp_path: Path) -> None:
    run = make_run(tmp_path / "again", stages=3)
    path = run / "stages" / "if_rl" / "stage.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"status": "running", "artifact_digest": ""}))
    assert list(stale_stages(run, listed_in(run).stages)) == ["multi_domain_rl"]


def test_the_page_of_an_unfinished_run_reloads_itself(tmp_path: Path, run: Path) -> None:
    def reloads(page: Path) -> bool:
        return any(a.get("http-equiv") == "refresh" for _, a in check_page(page).elements)

    assert reloads(write_report(make_run(tmp_path / "partly", stages=2), with_pictures=False))
    assert not reloads(write_report(run, with_pictures=False))


def test_watch_rebuilds_the_report_until_the_run_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "night", stages=1)
    page = run / "report" / "index.html"
    texts: list[str] = []

    def sleep(seconds: float) -> None:
        """The run advances while `watch` sleeps."""
        assert seconds == 0.5
        texts.append(page.read_text())
        if len(texts) == 2:
            assert texts[0] == texts[1], "nothing has changed"
            make_run(tmp_path / "done", stages=9)
            run.rename(tmp_path / "old")
            (tmp_path / "done").rename(run)

    monkeypatch.setattr("nemocascade.cascade.watch.time.sleep", sleep)
    assert watch(WatchSettings(str(run), every_s=0.5)) == page
    assert len(texts) == 2
    assert "Finished: 9 stages" in page.read_text()
    assert (page.parent / "scores.png").exists()
    said = capsys.readouterr().out
    assert "night: 1 of 9 stages done" in said
    assert "no job owns this run now" in said
    assert "night: 9 of 9 stages done" in said


def test_watch_ends_at_ctrl_c(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "night", stages=1)
    (run / "lock").write_text("{}")

    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("nemocascade.cascade.watch.time.sleep", interrupt)
    watch(WatchSettings(str(run)))
    assert "no job owns" not in capsys.readouterr().out
    with pytest.raises(ReportError, match="name the run folder"):
        watch(WatchSettings(str(tmp_path)))


@pytest.mark.parametrize("width", [9, 30, 60, 120])
def test_the_lines_of_a_run_fit_the_terminal(run: Path, width: int) -> None:
    lines = status_lines(read_run(run), width=width)
    assert len(lines) == 10
    assert all(len(line) <= width for line in lines)


def test_two_processes_may_write_a_page_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`watch` sees the end of a run in the moment in which the run writes its own page."""
    page, own, replaced = tmp_path / "index.html", os.getpid(), os.replace

    def overtaken(draft: Path, target: Path) -> None:
        if os.getpid() == own:
            monkeypatch.setattr(os, "getpid", lambda: own + 1)
            replace_page(page, "the other's")
            assert page.read_text() == "the other's"
        replaced(draft, target)

    monkeypatch.setattr(os, "replace", overtaken)
    replace_page(page, "mine")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


def test_a_stage_of_its_own_has_a_report(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "alone"
    (run / "stages" / "if_rl").rename(folder)
    try:
        page = check_page(run_report(folder))
        lines = status_lines(read_run(folder), width=100)
    finally:
        folder.rename(run / "stages" / "if_rl")
    assert "Reward" in page.text
    assert "report:" in capsys.readouterr().out
    assert len(lines) == 2
    assert "done" in lines[1]


def test_every_cell_of_a_wide_table_has_the_name_of_its_column(run: Path) -> None:
    """On a phone rows become blocks, whose cells are known by their labels."""
    page: Any = check_page(write_report(run, with_pictures=False))
    unrolled, missing = False, 0
    for tag, attributes in page.elements:
        if tag == "div" and "scroll" in str(attributes.get("class")):
            unrolled = "unrolled" in str(attributes["class"])
        if tag == "td" and unrolled and "data-label" not in attributes:
            missing += "left" not in str(attributes.get("class"))
    assert missing == 0


def test_settings_that_cannot_be_read_are_named(run: Path, tmp_path: Path) -> None:
    other = make_run(tmp_path / "other", stages=1)
    (other / "cascade.json").write_text('{"version": 1, "settings": 5}')
    with pytest.raises(RecipeError, match="holds no settings"):
        run_comparison(run, other)
