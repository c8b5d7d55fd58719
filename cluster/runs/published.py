"""The authors' files, opened over a dataset as a run is."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.config.schema import Experiment
from cluster.data.manifest import Manifest, load_manifest
from cluster.runtime.device import best_device
from cluster.storage import Store, open_store
from reactdiff.generate import Reactor
from reactdiff.model.published import UNTRAINED, load_published


@dataclass(frozen=True)
class PublishedWeights:
    """The authors' files, opened over a dataset as a run is.

    Attributes:
        experiment: names the streams, the dataset and the seed.
        dataset: that it reads.
        clips: the dataset's state.
        files: stage 1, stage 2 and, where it is known, the projector.
    """

    experiment: Experiment
    dataset: Store
    clips: Manifest
    files: Sequence[Path]

    def model(self) -> Reactor:
        """What generates reactions, on the GPU if there is one; what the files lack is said on stderr.

        Raises:
            ValueError: if the files are not the authors', or do not fit the configuration or the dataset.
        """
        model, diffusion, streams = self.experiment.model, self.experiment.diffusion, self.clips.stream_specs
        stage1, stage2, *projector = self.files
        made = load_published(model, diffusion, streams, stage1, stage2, projector[0] if projector else None, self.experiment.seed)
        if (known := len(made.diffusion.minimum)) < self.clips.frames:
            raise ValueError(
                f"{stage1} has the latents' range of {known} frames, but clips of {self.experiment.data.url} have {self.clips.frames}: "
                f"give a dataset (data.url) with clips of at most {known} frames"
            )
        if made.ignored:
            print(f"ignored {len(made.ignored)} weights that the authors' model never uses: {made.ignored[0]}, ...", file=sys.stderr)
        if not made.projector:
            print(f"WARNING: {UNTRAINED}", file=sys.stderr)
        return Reactor(made.autoencoder.to(best_device()), made.diffusion.to(best_device()))


def open_published(experiment: Experiment, files: Sequence[Path]) -> PublishedWeights:
    """The authors' files over the dataset that an experiment names.

    Raises:
        ValueError: if there is no such dataset.
    """
    dataset = open_store(experiment.data.url)
    return PublishedWeights(experiment, dataset, load_manifest(dataset, experiment.data.manifest), files)
