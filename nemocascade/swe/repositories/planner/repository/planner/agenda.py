"""Tasks put into the free time of a day."""

from planner.order import arrange
from planner.spans import free


def plan(minutes, needs, busy, day):
    """The span of each task, one after the other, each whole, in the order of `arrange`.

    minutes: how long each task takes. A task for which no room is left is missing.
    """
    taken, out = list(busy), {}
    earliest = day[0]
    for name in arrange(needs):
        for start, end in free(taken, day):
            start = max(start, earliest)
            if end - start >= minutes[name]:
                out[name] = (start, start + minutes[name])
                taken.append(out[name])
                earliest = out[name][1]
                break
    return out
