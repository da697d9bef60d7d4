"""Prints what a Ray cluster is: `python -m nemocascade.runtime.ray_description HOST:PORT`.

It runs in a process of its own, because Ray ends one whose cluster does not answer, and imports ray
alone. It needs no raylet on its host, and starts nothing on the cluster.
"""

from __future__ import annotations

import json
import sys
from pkgutil import resolve_name


def main() -> None:
    """Print versions and nodes of the cluster as a line of JSON."""
    from ray._common.usage.usage_lib import get_cluster_metadata

    # A class of Ray's compiled module, which has no types.
    client = resolve_name("ray._raylet:GcsClient")(address=sys.argv[1])
    metadata = get_cluster_metadata(client)
    nodes = [
        # As `ray.nodes()` describes them.
        {
            "NodeID": node.node_id.hex(),
            "NodeManagerHostname": node.node_manager_hostname,
            "Alive": node.state == 0,
            "Resources": dict(node.resources_total),
        }
        for node in client.get_all_node_info().values()
    ]
    versions = {"ray": metadata["ray_version"], "python": metadata["python_version"]}
    print(json.dumps({**versions, "nodes": nodes}))


if __name__ == "__main__":
    main()
