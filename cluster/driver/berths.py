"""Where a worker is and what that costs, for the books."""

from collections.abc import Mapping
from contextlib import suppress

from ray.exceptions import RayError

from cluster.runtime.nodes import Node, nodes
from cluster.runtime.prices import price_of, share_of
from cluster.telemetry.books import Berth


class Berths:
    """The machines of the cluster with their prices.

    Args:
        prices: `telemetry.prices` of the configuration.
    """

    def __init__(self, prices: Mapping[str, float]):
        self._prices, self._known = prices, dict[str, Node]()

    def of(self, where: str, resources: Mapping[str, float]) -> Berth:
        """The berth of a worker with these resources on a machine, named by Ray's id or its address; empty where it is not known yet."""
        if where and where not in self._known:
            with suppress(RayError):  # a cluster that does not answer now: no reason for a run to end
                there = nodes()
                self._known |= {node.id: node for node in there} | {node.address: node for node in there}
        if (node := self._known.get(where)) is None:
            return Berth("")
        price = price_of(node.labels, self._prices)
        return Berth(node.name, -1.0 if price is None else price, share_of(resources, node.total))
