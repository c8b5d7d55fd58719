"""One autoencoder for many trials: those whose stage 1 is the same take it from one run, which trains it and makes its latents once."""

import json
import time
from collections.abc import Callable

from cluster.config.identity import digest, name_fields
from cluster.config.schema import Experiment
from cluster.driver.interruption import Enough, never
from cluster.driver.pin import Pinned, pin, stage_end
from cluster.driver.run import STEPS, execute
from cluster.runs.export import read_export
from cluster.runs.lease import Held
from cluster.runs.state import read_state
from cluster.storage import NotFound
from cluster.telemetry.display import Display
from reactdiff.config import ENCODING, STAGES
from reactdiff.stage import stages_of

FIRST_STEPS = STEPS[:2]
"""Autoencoder and latents."""

LOOK_AGAIN = 5.0
"""Seconds between two looks whether another trial has trained what this one needs."""


def first_stage(experiment: Experiment, study: str) -> Experiment | None:
    """The experiment of a run that only trains the autoencoder of this one, the same for all whose autoencoder is the same.

    What is not about stage 1 has its default there. None where there is nothing to share: the model has one stage only, the autoencoder
    is another run's already, or weights to start from come for both stages together.

    Args:
        experiment: with `run.autoencoder` empty.
        study: the name that the run's begins with.
    """
    if experiment.run.autoencoder or experiment.model.init_from or stages_of(experiment.model) != STAGES:
        return None
    tree, defaults = (json.loads(one.model_dump_json()) for one in (experiment, type(experiment)()))
    tree["model"] = {name: tree["model"][name] if name in ENCODING else value for name, value in defaults["model"].items()}
    tree["diffusion"] = defaults["diffusion"]
    for name, value in defaults["optim"].items():
        if isinstance(value, dict):  # a value for each stage
            tree["optim"][name][STAGES[1]] = value[STAGES[1]]
    tree["run"] |= {"name": "", "keep_best": 0}
    tree["evaluation"] = defaults["evaluation"]
    shared = type(experiment).model_validate(tree)
    name = f"{study}-autoencoder-{digest(name_fields(shared))[:8]}"
    return shared.model_copy(update={"run": shared.run.model_copy(update={"name": name})})


def finished(pinned: Pinned, experiment: Experiment) -> bool:
    """Whether such a run has nothing left to do, and has said so."""
    if (state := read_state(pinned.store)) is None or state.status != "STOPPED":
        return False
    try:
        read_export(pinned.store, STAGES[0], stage_end(experiment, STAGES[0], pinned.manifest))
        pinned.saved(experiment).latents().manifest()
    except (NotFound, ValueError):
        return False
    return True


def train_first_stage(
    experiment: Experiment,
    display: Display,
    enough: Callable[[], str] = never,
    pause: Callable[[float], None] = time.sleep,
) -> None:
    """Bring such a run to its end, unless it is there; while another driver is at it, it is waited for.

    Args:
        experiment: of `first_stage`.
        display: shows progress.
        enough: asked all the time; says why the trial has come far enough, once it has.
        pause: waits so many seconds.

    Raises:
        ConfigError, StageFailed, Superseded, Enough, KeyboardInterrupt: as `cluster.driver.run.execute`.
    """
    said = False
    while not finished(pinned := pin(experiment, experiment.run.name), experiment):
        try:
            execute(experiment, pinned, FIRST_STEPS, display, wait=False, enough=enough)  # of no trial: it may change hands
        except Held:
            if not said:
                display.say(f"waiting for the autoencoder of run {pinned.name}, which another trial trains")
            said = True
            if why := enough():
                raise Enough(why) from None
            pause(LOOK_AGAIN)
