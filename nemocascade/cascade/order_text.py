"""The advice on an order, as text."""

from __future__ import annotations

from collections.abc import Sequence

from nemocascade.cascade.effects import Effect
from nemocascade.cascade.order import OrderAdvice, RankedOrder
from nemocascade.cascade.order_mopd import MopdAdvice, MopdPlace


def order_text(advice: OrderAdvice) -> str:
    """The advice in words, with the model behind it and its fit."""
    parts = [
        "model: score = start + effects of the stages alone + recoveries of their pairs; what "
        "three stages do beyond their pairs is taken as 0",
        "value of an order: mean over " + _weights(advice),
    ]
    if advice.other_scales:
        parts.append(
            f"rewards of {', '.join(advice.other_scales)} are not in 0..1: --weights says what "
            "they count"
        )
    if advice.fit is None:
        parts.append(
            "order: nothing can be said. The effects of stages alone add up to the same scores in "
            "every order. Measure what later stages win back: nemocascade interference RECIPE "
            "--pairs"
        )
    else:
        parts += [_fit(advice), *_orders(advice)]
    return "\n".join([*parts, *_mopd(advice.mopd)])


def _weights(advice: OrderAdvice) -> str:
    weights = {d: w for d, w in advice.domains.items() if w > 0}
    equal = len({round(w, 9) for w in weights.values()}) == 1
    return ", ".join(d if equal else f"{d} ({w:.2f})" for d, w in weights.items())


def _fit(advice: OrderAdvice) -> str:
    assert advice.fit is not None
    fit = advice.fit
    verdict = (
        "no more than noise is missing"
        if fit.misfit < 1.2
        else "what is missing are the recoveries, on which the order depends"
    )
    return (
        f"fit: additive effects explain {100 * fit.explained:.0f} % of the pairs' squared changes; "
        f"their misfit is {fit.misfit:.2f} (1 = noise alone): {verdict}"
    )


def _orders(advice: OrderAdvice) -> list[str]:
    own = advice.own
    assert own is not None
    best = advice.orders[0]
    if not advice.is_decided:
        return [
            f"order: these {advice.total} orders do not differ: the largest distance is within "
            "noise. Keep the recipe's own, or measure more tasks, samples or seeds",
            f"  the recipe's own: {_line(own)}",
            *_precedences(advice),
        ]
    lines = [
        f"order: {_arrows(advice.proposed)}",
        f"best orders, of {advice.total}; {_count(advice.tied)}:",
        *(f"  {_line(order)}" for order in advice.orders),
    ]
    lines += _precedences(advice)
    far, near = advice.distance
    if own.differs:
        lines.append(
            f"the recipe's own order is {_points(own.behind)} behind the best, "
            f"{far} of its pairs of stages are reversed, {near} if the nearest of those that do "
            f"not differ is taken: {_line(own)}"
        )
    else:
        lines.append(
            f"the recipe's own order does not differ from the best ({_points(own.behind)} behind, "
            f"{far} pairs of stages are reversed), so it is the one proposed: {_line(own)}"
        )
    return [
        *lines,
        f"best order by domain: {_scores(best)}",
        f"own order by domain: {_scores(own)}",
    ]


def _count(tied: int) -> str:
    if tied == 1:
        return "the first differs from all others"
    return f"{tied} do not differ from the first"


def _precedences(advice: OrderAdvice) -> list[str]:
    if not advice.precedences:
        return ["no single pair of stages has an order that matters beyond noise"]
    return [
        f"  {p.first} before {p.second}: {_points(p.gain)} of the mean" for p in advice.precedences
    ]


def _mopd(advice: MopdAdvice) -> list[str]:
    """Where MOPD has something to win, by its teachers."""
    if not advice.places:
        lines = [
            "MOPD: not worth its place by these data: nowhere in this order does a measured "
            "artifact are above the student by more than noise"
        ]
    else:
        best = advice.places[0]
        lines = [f"MOPD: {_place(best)}"]
        lines += [
            f"  {t.domain} from {' then '.join(t.teacher) or 'the start artifact'}: "
            f"{_points(t.gap)} above the student"
            for t in best.taught
        ]
        if advice.tied > 1:
            others = ", ".join(p.after[-1] for p in advice.places[1 : advice.tied])
            lines.append(f"  places after {others} do not differ from it")
    if advice.own is not None:
        lines.append(f"  the recipe has MOPD after {advice.own} RL stages")
    if advice.recovered is not None:
        lines.append(
            f"  the run's MOPD closed {100 * advice.recovered:.0f} % of the gaps to its teachers"
        )
    return lines


def _place(place: MopdPlace) -> str:
    return f"after {place.after[-1]} it can win at most {_points(place.gain)} of the mean"


def _line(order: RankedOrder) -> str:
    mark = ", differs" if order.differs else ""
    value, share = f"{100 * order.value:.1f}", f"best in {100 * order.share:.0f} % of draws"
    behind = f"behind {_points(order.behind)}"
    return f"{_arrows(order.stages)}  {value}, {behind}, {share}{mark}"


def _scores(order: RankedOrder) -> str:
    worst = min(order.scores, key=lambda d: order.scores[d])
    found = ", ".join(f"{d} {100 * s:.0f}" for d, s in order.scores.items())
    return f"{found}; worst {worst}"


def _arrows(stages: Sequence[str]) -> str:
    return " > ".join(stages)


def _points(effect: Effect) -> str:
    return f"{100 * effect.change:.1f} ± {100 * effect.standard_error:.1f} points"
