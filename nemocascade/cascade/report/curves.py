"""Panels of a stage's measures, in display order. A measure without data has no panel."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from nemocascade.cascade.report.figures import Line, Panel
from nemocascade.cascade.report.record import Curve, Run, Stage
from nemocascade.cascade.report.words import label

# Title, names of the curves, True if the axis includes 0. `*` matches every domain.
MEASURES: tuple[tuple[str, tuple[str, ...], bool], ...] = (
    ("Loss", ("loss", "heldout_loss"), False),
    ("Reward", ("reward",), False),
    ("Reward by domain", ("reward/*",), False),
    ("Held-out score", ("heldout/*",), False),
    ("Curriculum's target, 0 easiest to 1", ("curriculum/*",), True),
    ("Curriculum's running pass rate", ("curriculum_pass_rate/*",), True),
    ("Response tokens", ("response_tokens",), True),
    ("Truncated, share", ("truncated",), True),
    ("Repeated text, share", ("repetition",), True),
    ("Turns", ("turns",), True),
    ("Entropy, nats", ("entropy",), True),
    ("Gradient norm", ("grad_norm",), True),
    ("KL to the start, nats", ("kl",), True),
    ("Reverse KL to teacher, nats", ("reverse_kl",), True),
    ("Reverse KL by domain", ("reverse_kl/*",), True),
    ("Size of the advantage", ("advantage_abs",), True),
    ("Importance weight", ("ratio",), False),
    ("Importance weight by domain", ("importance/*",), False),
    ("Gate rate", ("gated_low", "gated_high"), True),
    ("Gate rate by domain", ("gated/*",), True),
    ("Even groups", ("groups_all_right", "groups_all_wrong"), True),
    ("Verifier errors", ("verifier_errors",), True),
    ("Unfinished checks by cause", ("faults/answer", "faults/row", "faults/host"), True),
    ("Mismatch, train / rollout", ("mismatch_mean",), True),
    ("Learning rate", ("lr",), True),
    ("Tokens a second", ("tokens_per_s",), True),
    ("Busiest expert's load", ("moe_max_load",), False),
)
LABELS = {
    "loss": "training",
    "heldout_loss": "held out",
    "faults/answer": "the answer",
    "faults/row": "the row",
    "faults/host": "the host",
    "gated_low": "below",
    "gated_high": "above",
    "groups_all_right": "all right",
    "groups_all_wrong": "all wrong",
}
STYLES = {
    **dict.fromkeys(("heldout_loss", "gated_high", "groups_all_wrong", "faults/row"), 1),
    "faults/host": 2,
}
# Measures of held-out evaluations, which have few points.
DOTS = ("heldout_loss", "heldout/")
# Measures that are hidden if they never change: settings and other panels show them.
QUIET = (
    "turns",
    "verifier_errors",
    "truncated",
    "repetition",
    "lr",
    "gated_low",
    "gated_high",
    "faults/answer",
    "faults/row",
    "faults/host",
)


def panels(run: Run, stage: Stage) -> list[Panel]:
    """The panels of a stage. A domain has the same colour in every panel of the report."""
    curves = dict(stage.curves)
    if stage.kind == "mopd" and "advantage" in curves:
        # a_t = log pi_teacher - log pi on the student's own tokens: its mean is -KL(pi || teacher).
        curves.setdefault("reverse_kl", [(step, -value) for step, value in curves["advantage"]])
    found = []
    for title, names, from_zero in MEASURES:
        lines = [line for name in names for line in _lines(run, name, curves)]
        if lines:
            found.append(Panel(title, tuple(lines), from_zero, by_domain=names[0].endswith("*")))
    return found


def _lines(run: Run, name: str, curves: Mapping[str, Curve]) -> Iterator[Line]:
    stem = name.removesuffix("*")
    if stem == name:
        if name in curves and not _is_quiet(name, curves[name]):
            curve = tuple(curves[name])
            yield Line(LABELS.get(name, ""), curve, STYLES.get(name, 0), dots=name in DOTS)
        return
    found = sorted(
        n.removeprefix(stem) for n in curves if n.startswith(stem) and not _is_quiet(n, curves[n])
    )
    order = domain_styles(run)
    for number, domain in enumerate(found):
        style = order.get(domain, len(order) + number)
        yield Line(label(domain), tuple(curves[stem + domain]), style, dots=stem in DOTS)


def domain_styles(run: Run) -> dict[str, int]:
    """Colour number of each domain."""
    named = [d for s in run.stages for d in s.domains]
    return {domain: n for n, domain in enumerate(dict.fromkeys([*run.domains, *named]))}


def _is_quiet(name: str, curve: Curve) -> bool:
    """True if a curve has nothing to show. A single evaluation is in the score table already."""
    constant = all(value == curve[0][1] for _, value in curve)
    return (name in QUIET and constant) or (name.startswith("heldout/") and len(curve) < 2)
