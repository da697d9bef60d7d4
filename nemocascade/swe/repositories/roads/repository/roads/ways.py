"""Ways through a network."""

import heapq


def distances(network, start):
    """The length of the shortest way to each town that can be reached."""
    found, queue = {}, [(0, start)]
    while queue:
        length, town = heapq.heappop(queue)
        if town in found:
            continue
        found[town] = length
        for other, road in network.towns[town].items():
            if other not in found:
                heapq.heappush(queue, (length + road, other))
    return found


def shortest(network, start, goal):
    """The towns along a shortest way, both ends included; None where there is none."""
    found = distances(network, start)
    if goal not in found:
        return None
    way = [goal]
    while way[-1] != start:
        here = way[-1]
        for other in network.near(here):
            if other in found and found[other] + network.towns[here][other] == found[here]:
                way.append(other)
                break
        else:
            raise LookupError(f"no road leads on to {here}")
    return way[::-1]
