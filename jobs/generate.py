"""Generate reactions to a clip with a finished run, or with the authors' published weights: arrays, tables and a picture.

  python jobs/generate.py demo-1a2b3c4d --clip KEY                   10 reactions of the listener, in reactions/
  python jobs/generate.py demo-1a2b3c4d --clip KEY --direction both  of each person to the other
  python jobs/generate.py s3://bucket/store/runs/demo-1a2b3c4d --clip KEY --split val --count 3 --out s3://bucket/reactions
  python jobs/generate.py --import-checkpoint STAGE1.pth STAGE2.pth PROJECTOR.pth --clip KEY data.url=work/react2024/shards

In direction 0 person a speaks and b listens, in direction 1 the other way round. For each direction you get
  KEY-0.npz     attributes (K, frames, 25) and coefficients (K, frames, 58), with the names of their columns; PerFRDiff and
                BeLFusion make no coefficients
  KEY-0-3.csv   the attributes of reaction 3 in the official layout
  KEY-0.png     all of them over the real listener's, below what the speaker does

Which reactions come depends on the run's weights and seed, the clip, the direction and the number of the reaction: the same
command writes the same files again, and they are the ones that jobs/evaluate.py scores. An unknown KEY is answered with the nearest
ones. No cluster is started; a GPU is used if there is one.

--import-checkpoint takes the authors' files as they are, {"state_dict", "statistics", ...} of stage 1 and {"state_dict", ...} of
stage 2. They are read as tensors and never unpickled. Widths come from the files; streams, dataset, split and seed from --config
and KEY=VALUE, whose model and process must be the authors'. Their stage 2 file lacks the projector of the speaker: without a third
file (linear.1.weight, linear.1.bias, linear.2.weight, linear.2.bias) it is random, and reactions do not follow the speaker.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from cluster import cli
from cluster.config.loading import load
from cluster.config.paths import absolute, anchored
from cluster.data.reader import Reader
from cluster.evaluation.picture import clip_picture, read_faces
from cluster.runs.latents import encode_clip
from cluster.runs.published import PublishedWeights, open_published
from cluster.runs.saved import SAMPLING, SavedRun, open_run
from cluster.storage import open_store
from reactdiff.clip import speaker_listener
from reactdiff.determinism import make_deterministic
from reactdiff.model.published import FILES
from reactdiff.reactions import to_csv, to_npz

PUBLISHED = Path(__file__).parent / "configs" / "react2024.yaml"
DIRECTIONS = {"0": (0,), "1": (1,), "both": (0, 1)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, draw the reactions, and write them."""
    options = _options(arguments)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read by the first product on a GPU
    if options.import_checkpoint:
        files = [Path(absolute(file)) for file in options.import_checkpoint]
        source: SavedRun | PublishedWeights = open_published(anchored(load(options.config, options.overrides)), files)
    else:
        source = open_run(options.run, options.store).with_sampling(options.overrides)
    experiment = source.experiment
    make_deterministic(experiment.workers.threads)
    reader = Reader(source.dataset, source.clips, options.split or experiment.evaluation.split)
    clip = reader.clip_number(options.clip)
    model = source.model()
    latents, faces = encode_clip(model.codec, reader, clip), read_faces(reader, clip)
    out, console = open_store(absolute(options.out)), Console(markup=False, highlight=False, soft_wrap=True)
    for direction in DIRECTIONS[options.direction]:
        speaker, listener = speaker_listener(direction)
        # Each direction by itself: what is drawn beside it must not change the rounding.
        drawn = model.react(latents[speaker][None], [(options.clip, direction)], options.count, experiment.seed)
        reactions = {target: array[0] for target, array in drawn.items()}
        attributes = reactions["attributes"]
        name = f"{options.clip}-{direction}"
        out.put(f"{name}.npz", to_npz(**reactions))
        for k, reaction in enumerate(attributes):
            out.put(f"{name}-{k}.csv", to_csv(reaction))
        whose = "the authors' weights" if options.import_checkpoint else f"run {experiment.run.name}"
        out.put(f"{name}.png", clip_picture(options.clip, faces, direction, attributes, whose))
        console.print(f"{out.url}/{name}.npz, .png and {options.count} tables {name}-*.csv: {speaker} speaks, {listener} listens")
    return 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_run(parser, optional=True)
    parser.add_argument("--import-checkpoint", nargs="+", metavar="FILE", help=f"instead of RUN, the authors' files in this order: {FILES}")
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="YAML of model and dataset for --import-checkpoint (default: react2024.yaml)"
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help=f"change one key of it, for example data.url=URL; of a RUN diffusion.{', '.join(SAMPLING)}",
    )
    parser.add_argument("--clip", required=True, metavar="KEY", help="key of the clip")
    parser.add_argument("--split", help="split that holds the clip (default: evaluation.split of the run or the configuration)")
    parser.add_argument("--direction", choices=DIRECTIONS, default="0", help="0: a speaks, b listens; 1: the other way round (default: 0)")
    parser.add_argument("--count", type=cli.positive, default=10, metavar="K", help="reactions in each direction (default: 10)")
    parser.add_argument("--out", default="reactions", metavar="URL", help="folder or s3://bucket/prefix of the files (default: reactions)")
    options = parser.parse_intermixed_args(arguments)
    if not options.clip.strip():
        raise ValueError(
            "KEY is empty: give --clip the key of a clip; python jobs/prepare.py inspect URL --split S --keys lists those of split S "
            "in the dataset at URL (data.url in the config.yaml of a run's folder)"
        )
    if options.import_checkpoint:
        # What follows the option may be overrides too, and without RUN the first of them stands in its place.
        words = [*options.import_checkpoint, *filter(None, [options.run]), *options.overrides]
        files = [word for word in words if "=" not in word or Path(absolute(word)).is_file()]
        options.import_checkpoint, options.overrides = files, [word for word in words if word not in files]
        options.config = options.config or PUBLISHED
        if not 2 <= len(options.import_checkpoint) <= 3:
            parser.error(f"--import-checkpoint takes {FILES} instead of RUN, not {' '.join(options.import_checkpoint)}")
    elif not options.run:
        parser.error(f"name a RUN to generate with, or --import-checkpoint {FILES}")
    elif options.config:
        parser.error("a run has its own configuration; --config goes with --import-checkpoint")
    return options


if __name__ == "__main__":
    sys.exit(cli.run(main))
