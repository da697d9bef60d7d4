"""The report of a cascade contains all of a run, and no content of a run can break it."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from helpers.cascade_run import ALARM, DOMAINS, STAGES, digest, make_run
from helpers.html_page import check_page
from matplotlib.figure import Figure

from nemocascade.cascade.comparison import compare
from nemocascade.cascade.lineage import listed_in, report_text, score_table
from nemocascade.cascade.records import read_record
from nemocascade.cascade.report import ReportError, figures, view, words, write_report
from nemocascade.cascade.report.read import read_run, shortened
from nemocascade.cascade.report.scores import draw_domain
from nemocascade.cascade.report.write import panel_picture
from nemocascade.recipe import RecipeError
from nemocascade.recipe.commands import DiffSettings
from nemocascade.stages.domain_score import domain_score
from nemocascade.stages.scoring import VERSION, read_scores

HOSTILE = (
    "<script>alert(1)</script></textarea></pre></details><img src=x onerror=alert(2)>"
    '{{ 7 * 191 }}{% raw %}${7*191}"\' onmouseover="alert(3)" <svg onload=alert(4)> $\\frac{1}{0}$'
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run with its report."""
    run = make_run(tmp_path_factory.mktemp("cascade") / "whole")
    write_report(run)
    return run


def test_the_whole_run_is_in_the_report(finished: Path) -> None:
    page = check_page(finished / "report" / "index.html")
    text = " ".join(page.text.split())
    for name, *_ in STAGES:
        assert words.words(name) in text
        assert digest(name)[:12] in text
        score = json.loads((finished / "stages" / name / "scores.json").read_text())["scores"]
        for domain in DOMAINS:
            assert words.score(score[domain]["score"], points=True) in text
    for domain in DOMAINS:
        assert words.words(domain) in text
    assert "preference lost 9.0 points in IF RL (against SFT): 48.0 → 39.0" in text
    assert "teaches preference" in text
    assert "pinned" in text
    assert "2.13.0+cu130" in text
    assert "rollout.rollouts_per_prompt" in text
    assert "14 min 45 s" in text
    labels = [a.get("aria-label") or "" for _, a in page.elements]
    for measure in (
        "Reward",
        "Entropy",
        "Gradient norm",
        "Response tokens",
        "Reverse KL to",
    ):
        assert any(label.startswith(measure) and "mopd" in label for label in labels), measure
    assert any(label.startswith("KL to the start") and "rlhf" in label for label in labels)
    curricula = [label for label in labels if label.startswith("Curriculum's ")]
    assert len(curricula) == 2
    assert all("code_rl" in label for label in curricula)
    assert (finished / "report" / "index.html").stat().st_size < 8e6


def test_stages_have_the_numbers_of_the_progress_line(finished: Path) -> None:
    """Side branches are at the right, with their places in the order of the run."""
    run = read_run(finished)
    order = [words.words(name) for name, *_ in STAGES]
    page = (finished / "report" / "index.html").read_text()
    heads = re.findall(r'<th scope="col"[^>]*><span>(\d+)</span>([^<]+)', page)
    assert {name: int(number) for number, name in heads} == {
        name: place for place, name in enumerate(order, 1)
    }
    assert heads[-1] == ("4", "RLHF teacher")
    numbers = [number for number, _ in heads]
    first, listed = page.index("<tbody>"), page[page.index("phone stages") :]
    assert re.findall(r'data-label="(\d+)"', page[first : page.index("</tr>", first)]) == numbers
    assert re.findall(r'<li value="(\d+)">', listed) == numbers
    ax = Figure().add_subplot()
    draw_domain(ax, run, "math")
    show = ax.xaxis.get_major_formatter()
    assert [show(place, None) for place in range(1, len(order) + 1)] == numbers


def test_the_figures_are_written_as_png(finished: Path) -> None:
    names = sorted(path.name for path in (finished / "report").glob("*.png"))
    assert {"scores.png", "scores_heat_map.png", "time_and_tokens.png"} <= set(names)
    assert sum(name.startswith("stage_") for name in names) == len(STAGES)
    for name in names:
        assert (finished / "report" / name).read_bytes().startswith(b"\x89PNG")
    text = (finished / "report" / "index.html").read_text()
    assert all(name in text for name in names)


def test_alarms_and_training_are_marked_in_the_table(finished: Path) -> None:
    run = read_run(finished)
    cells = {(d, s.name): c for d, row in view.score_rows(run) for s, c in zip(
        [*run.main_line, *(s for s in run.scored if s.side)], row, strict=True)}  # fmt: skip
    marked = {key for key, cell in cells.items() if cell is not None and cell.alarm}
    assert marked == {(a.domain, a.stage) for a in run.alarms}
    assert all(a.before - a.after > ALARM for a in run.alarms)
    fallen = cells["preference", "if_rl"]
    assert fallen is not None
    assert (fallen.text, fallen.change) == ("39.0", "−9.0")
    # A side branch is compared with the stage that it started from, not with its neighbour.
    branch = cells["preference", "rlhf_teacher"]
    assert branch is not None
    assert (branch.text, branch.change, branch.trained) == ("72.0", "+24.0", True)
    other = cells["math", "code_rl"]
    assert other is not None
    assert not other.trained


def test_the_same_folder_gives_the_same_report(tmp_path: Path) -> None:
    run = make_run(tmp_path / "again", stages=1)
    first = write_report(run).read_bytes()
    pictures = {p.name: p.read_bytes() for p in (run / "report").glob("*.png")}
    panel_picture.cache_clear()
    assert write_report(run).read_bytes() == first
    assert {p.name: p.read_bytes() for p in (run / "report").glob("*.png")} == pictures


def test_panels_are_drawn_again_where_their_curves_have_changed(tmp_path: Path) -> None:
    run = make_run(tmp_path / "growing", stages=2)
    first = write_report(run, with_pictures=False).read_text()
    drawn = panel_picture.cache_info().misses
    assert write_report(run, with_pictures=False).read_text() == first
    assert panel_picture.cache_info().misses == drawn
    metrics = run / "stages" / "sft" / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    metrics.write_text("".join(lines[:-1]))
    assert write_report(run, with_pictures=False).read_text() != first
    assert 0 < panel_picture.cache_info().misses - drawn < drawn


def test_scores_of_samples_show_their_errors_and_passes(tmp_path: Path) -> None:
    run = make_run(tmp_path / "sampled", stages=1)
    path = run / "stages" / "sft" / "scores.json"
    found = json.loads(path.read_text()) | {"version": VERSION, "settings": ""}
    score = domain_score([[1.0, 0.0, 1.0, 1.0], [0.0] * 4, [1.0] * 4])
    found["scores"] = {"math": asdict(score), "code": found["scores"]["code"]}
    path.write_text(json.dumps(found))
    cells = {d: row[0] for d, row in view.score_rows(read_run(run))}
    sampled, single = cells["math"], cells["code"]
    assert sampled is not None
    assert single is not None
    assert sampled.text == "58.3"
    assert sampled.note == "3 tasks, avg@4, pass@2 0.667, pass@4 0.667, standard error 30.0"
    assert "avg@" not in single.note
    check_page(write_report(run))
    table = score_table(run, listed_in(run))
    row = table.splitlines()[1].split()
    assert row[0] == "sft"
    assert row[2] == "58.3±30.0"
    assert "±" not in row[1]


def test_what_a_model_writes_stays_text(tmp_path: Path) -> None:
    run = make_run(tmp_path / "hostile", stages=2)
    for name in ("sft", "if_rl"):
        path = run / "stages" / name / "scores.json"
        found = json.loads(path.read_text())
        for samples in found["samples"].values():
            samples[0]["prompt"][0] = {"role": HOSTILE, "content": HOSTILE}
            samples[0]["response"] = HOSTILE
            samples[1] |= {"reward": None, "error": HOSTILE}
        found["scores"][HOSTILE] = {"score": 0.5, "tasks": 4, "errors": 0, "samples": 2}
        found["scores"][HOSTILE]["pass_at"] = {HOSTILE: 0.5, "2": "x", "4": None}
        path.write_text(json.dumps(found))
    rollout = run / "stages" / "if_rl" / "rollouts" / "step_00000001.jsonl"
    row = json.loads(rollout.read_text().splitlines()[0])
    rollout.write_text(json.dumps(row | {"response": HOSTILE, "domain": HOSTILE}) + "\n")
    cascade = json.loads((run / "cascade.json").read_text())
    cascade["settings"] = {HOSTILE: HOSTILE}
    cascade["versions"] = {HOSTILE: HOSTILE}
    cascade["alarms"] = [
        {"domain": HOSTILE, "stage": "if_rl", "from_stage": "", "before": 0.9, "after": 0.1}
    ]
    (run / "cascade.json").write_text(json.dumps(cascade))
    page = check_page(write_report(run))
    assert "alert(1)" in page.text
    assert page.text.count("{{ 7 * 191 }}") >= 5
    assert "1337" not in page.text


def test_an_unfinished_run_shows_what_is_there(tmp_path: Path) -> None:
    run = make_run(tmp_path / "partly", stages=2)
    page = check_page(write_report(run))
    assert "Not finished: multi domain RL (running)" in page.text
    assert "10 of 30" in page.text
    labels = [str(a["aria-label"]) for _, a in page.elements if "aria-label" in a]
    assert "Reward over the steps of multi_domain_rl" in labels
    assert not any("of mopd" in label for label in labels)
    assert not (run / "report" / "stage_05_mopd.png").exists()
    assert "Missing or damaged" not in page.text


def test_a_run_that_has_not_begun_has_a_report(tmp_path: Path) -> None:
    stages = [{"name": "sft", "kind": "sft", "start": "", "side": False, "status": "pending"}]
    (tmp_path / "cascade.json").write_text(json.dumps({"version": 1, "stages": stages}))
    page = check_page(write_report(tmp_path))
    assert "0 of 1" in page.text
    assert not list((tmp_path / "report").glob("*.png"))


def test_a_run_of_side_branches_only_has_a_report(tmp_path: Path) -> None:
    """`interference` from an artifact makes such a run."""
    run = make_run(tmp_path / "branches", stages=3)
    state = json.loads((run / "cascade.json").read_text())
    state["stages"] = [s | {"side": True, "start": ""} for s in state["stages"]]
    (run / "cascade.json").write_text(json.dumps(state))
    page = check_page(write_report(run))
    columns = [str(a["class"]) for tag, a in page.elements if tag == "th" and "class" in a]
    assert columns
    assert "apart" not in columns, "a line apart from the main way, and there is none"


def test_damage_is_counted_and_shown(tmp_path: Path) -> None:
    run = make_run(tmp_path / "damaged", stages=2)
    stages = run / "stages"
    lines = (stages / "if_rl" / "metrics.jsonl").read_text().splitlines()
    lines[3] = lines[3][:40]
    lines[5] = "\x00\x00"
    lines[7] = json.dumps({"loss": 1.0})
    lines[9] = json.dumps({**json.loads(lines[9]), "grad_norm": float("nan")})
    lines.append(lines[12])
    (stages / "if_rl" / "metrics.jsonl").write_text("\n".join(lines))
    (stages / "sft" / "metrics.jsonl").unlink()
    (stages / "sft" / "scores.json").write_text('{"scores": {"math"')
    (stages / "multi_domain_rl" / "recipe.json").write_bytes(b"\xff\xfe")
    stale = json.loads((stages / "if_rl" / "scores.json").read_text()) | {"digest": "other"}
    (stages / "if_rl" / "scores.json").write_text(json.dumps(stale))
    found = {(f.file, f.what): f.count for f in read_run(run).faults}
    metrics = "stages/if_rl/metrics.jsonl"
    assert found == {
        (metrics, "damaged lines, skipped"): 2,
        (metrics, "lines without a step, skipped"): 1,
        (metrics, "values of grad_norm that are not finite, skipped"): 1,
        (metrics, "steps with two lines: the later one counts"): 1,
        ("stages/sft/metrics.jsonl", "missing"): 1,
        ("stages/sft/scores.json", "damaged, skipped"): 1,
        ("stages/multi_domain_rl/recipe.json", "damaged, skipped"): 1,
        ("stages/if_rl/scores.json", "the scores are of another artifact than the stage's"): 1,
    }
    page = check_page(write_report(run))
    assert all(file in page.text and what in page.text for file, what in found)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "name the run folder"), ("{", "is not JSON"), ('{"version": 9}', "this program reads")],
)
def test_a_folder_without_a_cascade_is_rejected(
    tmp_path: Path, content: str | None, message: str
) -> None:
    if content is not None:
        (tmp_path / "cascade.json").write_text(content)
    with pytest.raises(ReportError, match=message):
        write_report(tmp_path)


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        ({"stages": None}, "CascadeListing.stages cannot be 'None'"),
        ({"stages": 5}, "CascadeListing.stages cannot be '5'"),
        ({"stages": [{"name": "sft"}]}, "CascadeListing.stages.0 has no field 'kind'"),
        ({"teachers": {"math": "sft"}}, "CascadeListing.teachers.math cannot be 'sft'"),
        ({"teachers": {"math": {"stage": "sft"}}}, "CascadeListing.teachers.math has no"),
        ({"teachers": 0.5}, "CascadeListing.teachers cannot be '0.5'"),
        ({"alarms": [{"domain": "math"}]}, "CascadeListing.alarms.0 has no"),
        ({"alarms": {"a": 1}}, "CascadeListing.alarms cannot be"),
    ],
    ids=str,
)
def test_a_damaged_cascade_is_named(tmp_path: Path, damage: dict[str, Any], named: str) -> None:
    run = make_run(tmp_path / "run", stages=2)
    cascade = json.loads((run / "cascade.json").read_text())
    assert "without an artifact" in report_text(run)
    (run / "cascade.json").write_text(json.dumps({**cascade, **damage}))
    read_run(run)
    with pytest.raises(ReportError, match=rf"cascade.json is damaged \({named}"):
        report_text(run)


def test_settings_of_a_cascade_that_are_none_are_named(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", stages=1)
    (run / "cascade.json").write_text('{"version": 1, "settings": 5}')
    with pytest.raises(RecipeError, match=r"cascade.json holds no settings"):
        compare(DiffSettings(str(run), str(run)))


@pytest.mark.parametrize(
    "content",
    [b"[" * 3000, b"\xff", b'{"version": 1}', b'{"version": 1, "scores": {"math": null}}', b"5"],
)
def test_damaged_records_and_scores_are_none(tmp_path: Path, content: bytes) -> None:
    for name in ("stage.json", "scores.json"):
        (tmp_path / name).write_bytes(content)
    assert read_record(tmp_path) is None
    assert read_scores(tmp_path / "scores.json") is None


def test_numbers_beyond_floats_are_no_numbers(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", stages=1)
    folder = run / "stages" / "sft"
    (folder / "metrics.jsonl").write_text(f'{{"step": 1, "loss": {10**400}, "tokens": 3}}\n')
    (folder / "recipe.json").write_text('{"domains": 5}')
    found = read_run(run)
    assert found.stages[0].curves == {"tokens": [(1, 3.0)]}
    assert "values of loss that are not finite, skipped" in [f.what for f in found.faults]
    (folder / "recipe.json").write_text("[" * 3000)
    assert "damaged, skipped" in [f.what for f in read_run(run).faults]


def test_a_stage_cannot_name_a_folder_elsewhere(tmp_path: Path) -> None:
    make_run(tmp_path / "other", stages=1)
    run = make_run(tmp_path / "run", stages=1)
    cascade = json.loads((run / "cascade.json").read_text())
    cascade["stages"][0]["name"] = "../../other/stages/sft"
    (run / "cascade.json").write_text(json.dumps(cascade))
    found = read_run(run)
    assert not found.stages[0].scores
    assert len(found.faults) == 1
    cascade["stages"][0]["name"] = "a" * 300
    (run / "cascade.json").write_text(json.dumps(cascade))
    assert len(read_run(run).faults) == 1
    with pytest.raises(ReportError, match="which is not a folder of this run"):
        report_text(run)


def test_long_texts_and_long_curves_are_bounded() -> None:
    text = shortened("a" * 90_000 + "b" * 1_000, 4_000)
    assert "87,000 characters omitted" in text
    assert text.startswith("a" * 3_000)
    assert text.endswith("b" * 1_000)
    curve = [(step, float(step % 7)) for step in range(33_000)]
    steps, values = figures.thinned(curve)
    assert len(steps) == len(values) == figures.POINTS
    # Means over equal parts keep the mean of the curve.
    assert abs(figures.mean(values) - figures.mean([v for _, v in curve])) < 1e-6
    assert figures.running_mean([1.0, 2.0, 6.0], 1) == [1.5, 3.0, 4.0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (words.number(0.0314159), "0.0314"),
        (words.number(-84.13), "−84.1"),
        (words.number(2.04e-7), "2.0e−7"),
        (words.number(12_345), "12.3 k"),
        (words.count(812), "812"),
        (words.count(9_120), "9,120"),
        (words.count(1.234e9), "1.23 B"),
        (words.count(999_999), "1 M"),
        (words.duration(4.24), "4.2 s"),
        (words.duration(59.7), "1 min 00 s"),
        (words.duration(751), "12 min 31 s"),
        (words.duration(3 * 3600 + 300), "3 h 05 min"),
        (words.duration(200_000), "2 d 08 h"),
        (words.score(0.6249, points=True), "62.5"),
        (words.score(-0.0001, points=True, signed=True), "0.0"),
        (words.score(0.031, points=True, signed=True), "+3.1"),
        (words.score(3.5, points=False), "3.50"),
    ],
)
def test_numbers_are_written_for_people(text: str, expected: str) -> None:
    assert text == expected
