"""What a machine costs an hour: as the configuration says, or by one dated table."""

from collections.abc import Mapping
from functools import cache
from pathlib import Path

import yaml

INSTANCE = ("instance-type", "node.kubernetes.io/instance-type")
"""Labels that say which type of machine a Ray node is."""

MARKET = ("market-type", "ray.io/market-type")
"""Labels that say how a node is paid for: ray_config.yaml's, and Ray's own, which KubeRay sets."""

ANY = "any"
"""Key of a price for every machine that has none of its own."""


def price_of(labels: Mapping[str, str], prices: Mapping[str, float]) -> float | None:
    """Dollars an hour of a whole machine, None where nobody knows it.

    Args:
        labels: of its Ray node.
        prices: those of the configuration, by type of machine, by the value of any other label, or `any`.
    """
    kind = next((labels[name] for name in INSTANCE if name in labels), "")
    for key in (kind, *labels.values(), ANY):
        if key in prices:
            return prices[key]
    spot = any(labels.get(name) == "spot" for name in MARKET)
    return None if spot else _table().get(kind)


def share_of(resources: Mapping[str, float], total: Mapping[str, float]) -> float:
    """Share of a machine that a worker holds: of its GPUs or of its CPUs, whichever is more, in [0, 1]."""
    shares = (resources.get(name, 0.0) / total[name] for name in ("CPU", "GPU") if total.get(name))
    return min(1.0, max(shares, default=0.0))


@cache
def _table() -> dict[str, float]:
    return yaml.safe_load(Path(__file__).with_name("prices.yaml").read_text())["on_demand"]
