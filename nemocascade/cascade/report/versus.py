"""Two runs side by side: scores, time, training curves and settings."""

from __future__ import annotations

from dataclasses import dataclass, replace

from nemocascade.cascade.report import curves, words
from nemocascade.cascade.report.figures import Panel
from nemocascade.cascade.report.phases import Share, phases_of_run
from nemocascade.cascade.report.record import Run, Stage
from nemocascade.cascade.report.scores import difference_error, is_noise, standard_error
from nemocascade.stages.domain_score import DomainScore

COMPARED = frozenset(
    (
        *("Loss", "Reward", "Response tokens", "Truncated, share", "Repeated text, share"),
        *("Entropy, nats", "Gradient norm", "Reverse KL to teacher, nats", "KL to the start, nats"),
        "Tokens a second",
    )
)
"""Titles of the panels that are drawn for both runs."""


@dataclass(frozen=True)
class ScorePair:
    """The scores of a domain in both runs, as text. difference: second minus first, with its
    standard error. noise: the difference is within noise."""

    name: str
    first: str
    second: str
    difference: str
    noise: bool


def last_scores(first: Run, second: Run) -> list[ScorePair]:
    """The scores of every domain at the end of both main lines."""
    one, two = (run.main_line[-1] if run.main_line else None for run in (first, second))
    return _pairs(first, second, [(domain, one, two) for domain in _domains(first, second)])


def stage_scores(first: Run, second: Run) -> list[tuple[str, list[ScorePair]]]:
    """The stages that both runs have scored, with the domains that they train; after SFT all."""
    found = []
    for stage in first.scored:
        other = second.stage(stage.name)
        if other is None or not other.scores:
            continue
        domains = [d for d in _domains(first, second) if stage.kind == "sft" or d in stage.domains]
        found.append((stage.name, _pairs(first, second, [(d, stage, other) for d in domains])))
    return found


def _domains(first: Run, second: Run) -> list[str]:
    return list(dict.fromkeys([*first.domains, *second.domains]))


def _pairs(
    first: Run, second: Run, wanted: list[tuple[str, Stage | None, Stage | None]]
) -> list[ScorePair]:
    pairs = []
    for domain, *stages in wanted:
        one, two = (None if s is None else s.scores.get(domain) for s in stages)
        points = first.in_points(domain) and second.in_points(domain)
        difference = ""
        if one and two and one.score is not None and two.score is not None:
            error = difference_error(one, two)
            difference = words.score(two.score - one.score, points=points, signed=True)
            difference += "" if error is None else f" ± {words.score(error, points=points)}"
        texts = _text(one, points), _text(two, points)
        pairs.append(ScorePair(domain, *texts, difference, is_noise(one, two)))
    return pairs


def _text(score: DomainScore | None, points: bool) -> str:
    if score is None or score.score is None:
        return "–"
    error = standard_error(score)
    text = words.score(score.score, points=points)
    return text if error is None else f"{text} ± {words.score(error, points=points)}"


def cost_pairs(first: Run, second: Run) -> list[tuple[str, list[str], list[str]]]:
    """Stages of either run with the time and the tokens of each; the last row is their sum."""
    names = dict.fromkeys([s.name for run in (first, second) for s in run.stages])
    rows = [(name, [run.stage(name) for run in (first, second)]) for name in names]
    found = [
        (
            words.words(name),
            [words.duration(s.seconds) if s and s.seconds else "–" for s in pair],
            [words.count(s.tokens) if s and s.tokens else "–" for s in pair],
        )
        for name, pair in rows
    ]
    seconds = [sum(s.seconds or 0 for s in run.stages) for run in (first, second)]
    tokens = [sum(s.tokens or 0 for s in run.stages) for run in (first, second)]
    whole = ("all stages", [*map(words.duration, seconds)], [*map(words.count, tokens)])
    return [*found, whole]


def phase_pairs(first: Run, second: Run) -> list[tuple[str, list[Share]]]:
    """Time of each run, by phase."""
    pairs = [(name, phases_of_run(run)) for name, run in (("first", first), ("second", second))]
    return [(name, shares) for name, shares in pairs if shares]


def both_panels(first: Run, second: Run) -> list[tuple[Stage, list[Panel]]]:
    """The stages of both runs, with the measures that both recorded: a line for each run."""
    found = []
    for stage in first.stages:
        other = second.stage(stage.name)
        if other is None:
            continue
        theirs = {panel.title: panel for panel in curves.panels(second, other)}
        panels = []
        for panel in curves.panels(first, stage):
            if panel.title in COMPARED and panel.title in theirs:
                lines = (panel.lines[0], theirs[panel.title].lines[0])
                named = zip(lines, ("first", "second"), strict=True)
                both = [replace(x, label=n, style=i) for i, (x, n) in enumerate(named)]
                panels.append(replace(panel, lines=tuple(both)))
        if panels:
            found.append((stage, panels))
    return found
