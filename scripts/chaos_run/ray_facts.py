"""Print what Ray holds of a cluster, as JSON: named actors by kind, living placement groups.

    python scripts/chaos_run/ray_facts.py CLUSTER

A process of its own: Ray reads its environment once per process, and a driver's threads are no
company for clients that are timed. Called by: resources.
"""

from __future__ import annotations

import json
import sys
from collections import Counter

from cluster.launcher import local_ray, running
from cluster.settings import ray_namespace


def main() -> None:
    cluster = sys.argv[1]
    with local_ray.connected(running.choose(cluster)):
        import ray
        from ray.util import list_named_actors, placement_group_table

        names = [
            entry["name"]
            for entry in list_named_actors(all_namespaces=True)
            if entry["namespace"] == ray_namespace(cluster)
        ]
        groups = [
            group for group in placement_group_table().values() if group["state"] != "REMOVED"
        ]
        assert ray.is_initialized()
    kinds = Counter(name.partition(":")[0] for name in names)
    print(json.dumps({"actors": dict(kinds), "placement_groups": len(groups)}))


if __name__ == "__main__":
    main()
