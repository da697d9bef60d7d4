"""Parts of a network that hang together."""

from roads.ways import distances


def regions(network):
    """Lists of towns that can reach each other, the largest first, then by name."""
    left, out = set(network.towns), []
    while left:
        region = sorted(distances(network, min(left)))
        out.append(region)
        left -= set(region)
    return sorted(out, key=lambda region: (-len(region), region))


def bridges(network):
    """Pairs of towns whose road nothing can replace, in order."""
    out = []
    for one in sorted(network.towns):
        for other in network.near(one):
            if one < other:
                length = network.towns[one][other]
                network.close(one, other)
                if other not in distances(network, one):
                    out.append((one, other))
                network.link(one, other, length)
    return out
