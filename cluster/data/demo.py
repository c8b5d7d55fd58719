"""The demo's data: simulated dyads, packed into shards where a configuration expects them."""

from dataclasses import replace

from cluster.config.paths import base_folder
from cluster.data.manifest import CURRENT
from cluster.data.prepare import prepare
from cluster.runtime.ray_cluster import connect
from cluster.storage import open_store
from cluster.telemetry.display import Display
from reactdiff.data.react2024 import Tree
from reactdiff.data.synthetic import Simulation, write_tree

DYADS = Simulation(seed=0, frames=200, clips={"train": 400, "val": 24, "gate": 16, "test": 30})


def make_demo(url: str, display: Display, one_to_many: bool = False, train: int = DYADS.clips["train"]) -> None:
    """Simulate the demo's tree and pack it into shards at this URL, unless the dataset is there.

    Args:
        url: of the dataset.
        display: that is told how it goes.
        one_to_many: as `prepare`.
        train: training clips, the first ones of the demo's; its other splits stay as they are.
    """
    store = open_store(url)
    if store.exists(CURRENT):
        return
    dyads = replace(DYADS, clips=DYADS.clips | {"train": train})
    tree = base_folder() / "work" / "demo" / ("tree" if dyads == DYADS else f"tree-of-{train}")
    display.say(f"the demo's dataset is not at {url} yet: simulating dyads in {tree}, then packing them into shards")
    write_tree(dyads, tree, display.counter("simulate", "clips"))
    connect()
    progress = display.counter("prepare", "clips")
    made = prepare(Tree(tree), store, clips_per_shard=16, strict=True, progress=progress, one_to_many=one_to_many)
    display.end(f"dataset {made.manifest.hash} at {url}")
