"""What a proof runs: a configuration, shortened to the length of a script of faults."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.config.loading import load
from cluster.config.paths import anchored
from cluster.config.schema import Experiment
from cluster.data.manifest import Manifest, load_manifest
from cluster.driver.pin import stage_end
from cluster.proof.site import Site
from cluster.storage import Store, open_store
from reactdiff.stage import stages_of

CHECKPOINT = 20
"""Steps between the checkpoints of the runs that are compared."""

LARGEST = 4 << 30
"""Bytes of the largest dataset that is copied: the hosts' S3 server lies in memory."""


@dataclass(frozen=True)
class Case:
    """A configuration whose runs are compared.

    Attributes:
        config: its file.
        overrides: of the user.
        experiment: what both make.
        dataset: where its data are.
        manifest: their state.
    """

    config: Path
    overrides: tuple[str, ...]
    experiment: Experiment
    dataset: Store
    manifest: Manifest

    @classmethod
    def read(cls, config: Path, overrides: Sequence[str], copied: bool) -> "Case":
        """The case of a file.

        Args:
            config: the file.
            overrides: of it.
            copied: whether its data will be copied to hosts of namespaces.

        Raises:
            ConfigError, ValueError: if it cannot be run, or its data are too many to be copied.
            NoDataset: if its data are not there.
        """
        experiment = anchored(load(config, overrides))
        dataset = open_store(experiment.data.url)
        manifest = load_manifest(dataset, experiment.data.manifest)
        if copied and (size := sum(entry.size for entry in dataset.list())) > LARGEST:
            raise ValueError(
                f"{dataset.url} holds {size / 1e9:.1f} GB, and the hosts' S3 server lies in memory: at most {LARGEST / 1e9:.1f} GB are "
                "copied. Prove it on a part of the data, or on simulated data (python jobs/prepare.py simulate)"
            )
        return cls(config.resolve(), tuple(overrides), experiment, dataset, manifest)

    @property
    def stages(self) -> tuple[str, ...]:
        """Of its runs."""
        return tuple(stages_of(self.experiment.model))

    @property
    def batches(self) -> dict[str, int]:
        """Stage -> items of a step."""
        return {stage: self.experiment.optim.batch[stage] for stage in self.stages}

    def steps(self) -> dict[str, int]:
        """Stage -> steps of the configuration as it is."""
        return {stage: math.ceil(stage_end(self.experiment, stage, self.manifest) / self.batches[stage]) for stage in self.stages}

    def shortened(self, steps: Mapping[str, int]) -> list[str]:
        """Overrides that make the stages so long, with frequent checkpoints and a row for each step."""
        items = 2 * int(self.manifest.counts(self.experiment.data.split).sum())
        epochs = {stage: (count * self.batches[stage] + 0.5) / items for stage, count in steps.items()}
        every = {stage: CHECKPOINT * self.batches[stage] for stage in steps}
        return [
            f"optim.epochs={_mapping(epochs)}",
            f"run.checkpoint_every={_mapping(every)}",
            "run.log_every=1",
            "data.on_corrupt=stop",
            "data.read_ahead=1",
            "data.cache=",
            "evaluation.clips=2",
            "evaluation.predictions=2",
            "evaluation.baselines=false",
            "evaluation.watch=0",
        ]

    def command(self, steps: Mapping[str, int], site: Site) -> list[str]:
        """What a driver is started with."""
        places = (f"data.url={site.data}", f"run.store={site.store}", f"telemetry.targets={site.targets}", "telemetry.port=0")
        placement = ("workers.per_host=1", "workers.labels={}") if site.hosts else ()
        command = ("python", "jobs/train.py", "--config", site.config(self.config))
        return [*command, *self.overrides, "run.name=proof", *self.shortened(steps), *placement, *places]

    def run_folder(self, site: Site) -> Store:
        """Where its run is."""
        return open_store(f"{site.store}/runs/proof")


def _mapping(values: Mapping[str, float]) -> str:
    return "{" + ", ".join(f"{name}: {value}" for name, value in values.items()) + "}"
