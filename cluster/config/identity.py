"""What an experiment is, beside where and how long it runs: its identity, and the digests by which runs are named."""

import hashlib
import json
from typing import Any

from cluster.config.loading import fields, value_of
from cluster.config.schema import Experiment
from reactdiff.config import Kind

ORIGINAL_FIELDS = frozenset(
    """
    seed data.manifest data.split data.order data.block data.group
    model.family model.facial model.acoustic model.online model.hidden model.latent model.heads model.intra model.intra_depth model.inter
    model.inter_depth model.dropout model.bounded model.denoiser model.channels model.multipliers model.blocks model.condition model.width
    model.layers model.context model.init_from
    diffusion.steps diffusion.schedule diffusion.prediction diffusion.weighting diffusion.condition_dropout diffusion.sampler
    diffusion.sampling_steps diffusion.guidance diffusion.normalisation
    optim.batch optim.lr optim.warmup optim.decay optim.betas optim.weight_decay optim.clip optim.ema optim.precision optim.epochs
    run.autoencoder
    """.split()
)
"""The fields that every name has stood for from the beginning. Never add to them: a field that is not here enters a name only
where it is not its default, so that the same command finds its run after an update. The default of such a field must never change:
another one would give old names another meaning."""


def identity(experiment: Experiment) -> dict[str, Any]:
    """What is computed: the identity fields by dotted name."""
    return _of_kind(experiment, "identity")


def placement(experiment: Experiment) -> dict[str, Any]:
    """Where and how fast it is computed: the placement fields by dotted name."""
    return _of_kind(experiment, "placement")


def ends(experiment: Experiment) -> dict[str, Any]:
    """How long training goes on: the fields that may only grow."""
    return _of_kind(experiment, "end")


def name_fields(experiment: Experiment, kind: Kind = "identity") -> dict[str, Any]:
    """What names and digests stand for: the fields of this kind, without those that were added later and have their default."""
    defaults = type(experiment)()
    values = _of_kind(experiment, kind)
    return {name: value for name, value in values.items() if name in ORIGINAL_FIELDS or value != value_of(defaults, name)}


def differing(before: dict[str, Any], experiment: Experiment) -> list[str]:
    """The identity fields in which an experiment is another one than before, each with both values; empty if it is the same.

    Args:
        before: `identity` of the other one. A field that it lacks was added since: it had what is now the default.
        experiment: as it is now.
    """
    was, now = identity(type(experiment)()) | before, identity(experiment)
    return [f"{name} (was {json.dumps(was[name])}, now {json.dumps(now.get(name))})" for name in was if was[name] != now.get(name)]


def digest(values: Any) -> str:
    """32 hex digits that stand for any JSON value."""
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _of_kind(experiment: Experiment, kind: Kind) -> dict[str, Any]:
    chosen = (name for name, info, _ in fields(type(experiment)) if info.json_schema_extra["kind"] == kind)
    return {name: value_of(experiment, name) for name in chosen}
