"""Damage to a dataset on disk: a bit of a member is flipped, as disks and careless tools do."""

from pathlib import Path

from cluster.data.manifest import load_manifest
from cluster.data.shards import read_index
from cluster.storage import open_store


def flip(dataset: Path, split: str, clip: int, member: str) -> str:
    """Flip a bit in the middle of a member of a clip, or flip it back; returns the clip's key."""
    store = open_store(str(dataset))
    manifest = load_manifest(store)
    shard, row = 0, clip
    while row >= (count := manifest.splits[split].shards.clips[shard]):
        shard, row = shard + 1, row - count
    name, place = manifest.shard(split, shard), manifest.members.index(member)
    entry = read_index(store, name)[row]
    with open(dataset / f"{name}.tar", "r+b") as file:
        at = int(entry["offset"][place] + entry["size"][place] // 2)
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))
    return bytes(entry["key"]).decode()
