"""Spans of time: pairs of a start and an end in minutes, the end not included."""


def overlap(one, other):
    """Whether two spans share a minute."""
    return one[0] < other[1] and other[0] < one[1]


def merge(spans):
    """The spans in order, where those that touch or overlap have become one."""
    out = []
    for start, end in sorted(spans):
        if out and start <= out[-1][1]:
            out[-1] = (out[-1][0], max(out[-1][1], end))
        else:
            out.append((start, end))
    return out


def free(spans, day):
    """What is left of the span `day`."""
    out, at = [], day[0]
    for start, end in merge(spans):
        if start > at:
            out.append((at, min(start, day[1])))
        at = max(at, end)
    if at < day[1]:
        out.append((at, day[1]))
    return [span for span in out if span[0] < span[1]]
