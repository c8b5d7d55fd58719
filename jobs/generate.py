"""Generate reactions to a clip with a finished run: arrays, tables and a picture.

  python jobs/generate.py demo-1a2b3c4d --clip KEY                   10 reactions of the listener, in reactions/
  python jobs/generate.py demo-1a2b3c4d --clip KEY --direction both  of each person to the other
  python jobs/generate.py s3://bucket/store/runs/demo-1a2b3c4d --clip KEY --split val --count 3 --out s3://bucket/reactions

In direction 0 person a speaks and b listens, in direction 1 the other way round. For each direction you get
  KEY-0.npz     attributes (K, frames, 25) and coefficients (K, frames, 58), with the names of their columns
  KEY-0-3.csv   the attributes of reaction 3 in the official layout
  KEY-0.png     all of them over the real listener's, below what the speaker does

Which reactions come depends on the run's weights and seed, the clip, the direction and the number of the reaction: the same
command writes the same files again, and they are the ones that jobs/evaluate.py scores. An unknown KEY is answered with the nearest
ones. No cluster is started; a GPU is used if there is one.
"""

import argparse
import difflib
import os
import sys
from collections.abc import Sequence

from rich.console import Console

from cluster import command
from cluster.config import Run
from cluster.latents import encode
from cluster.opened import open_run
from cluster.reader import Reader
from cluster.storage import open_store
from reactdiff.clip import PERSONS, speaker_listener
from reactdiff.determinism import make_deterministic
from reactdiff.generate import react
from reactdiff.plot import reactions_png
from reactdiff.reactions import to_csv, to_npz

DIRECTIONS = {"0": (0,), "1": (1,), "both": (0, 1)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, draw the reactions, and write them."""
    options = _parser().parse_args(arguments)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read by the first product on a GPU
    run = open_run(options.run, options.store)
    make_deterministic(run.experiment.workers.threads)
    reader = Reader(open_store(run.experiment.data.url), run.clips, options.split or run.experiment.evaluation.split)
    clip = find(reader, options.clip)
    autoencoder, diffusion = run.models()
    latents = encode(autoencoder, reader, clip)
    faces = reader.read(clip, [(person, "attributes") for person in PERSONS]).arrays
    out, console = open_store(command.absolute(options.out)), Console(markup=False, highlight=False, soft_wrap=True)
    for direction in DIRECTIONS[options.direction]:
        speaker, listener = speaker_listener(direction)
        # Each direction by itself: what is drawn beside it must not change the rounding.
        drawn = react(autoencoder, diffusion, latents[speaker][None], [(options.clip, direction)], options.count, run.experiment.seed)
        attributes, coefficients = drawn["attributes"][0], drawn["coefficients"][0]
        name = f"{options.clip}-{direction}"
        out.put(f"{name}.npz", to_npz(attributes, coefficients))
        for k, reaction in enumerate(attributes):
            out.put(f"{name}-{k}.csv", to_csv(reaction))
        title = f"{options.clip}: {speaker} speaks, {listener} listens (run {run.experiment.run.name})"
        out.put(f"{name}.png", reactions_png(title, faces[speaker, "attributes"], faces[listener, "attributes"], attributes))
        console.print(f"{out.url}/{name}.npz, .png and {options.count} tables {name}-*.csv: {speaker} speaks, {listener} listens")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN", help="name of a run, or its folder or URL (.../runs/NAME)")
    parser.add_argument("--clip", required=True, metavar="KEY", help="key of the clip")
    parser.add_argument("--split", help="split that holds the clip (default: the run's evaluation.split)")
    parser.add_argument("--direction", choices=DIRECTIONS, default="0", help="0: a speaks, b listens; 1: the other way round (default: 0)")
    parser.add_argument("--count", type=command.positive, default=10, metavar="K", help="reactions in each direction (default: 10)")
    parser.add_argument("--out", default="reactions", metavar="URL", help="folder or s3://bucket/prefix of the files (default: reactions)")
    parser.add_argument("--store", default=Run().store, metavar="URL", help="where a run's mere name is looked up (default: %(default)s)")
    return parser


def find(reader: Reader, key: str) -> int:
    """The number of a clip.

    Raises:
        ValueError: if the split has none of this key, with the nearest ones.
    """
    clip = reader.find(key)
    if clip is None:
        keys = [reader.key(number) for number in range(reader.clips)]
        near = difflib.get_close_matches(key, keys, cutoff=0)
        raise ValueError(
            f"none of the {len(keys)} clips of the split has the key {key!r}; the nearest: {', '.join(near)} (or choose --split)"
        )
    return clip


if __name__ == "__main__":
    sys.exit(command.run(main))
