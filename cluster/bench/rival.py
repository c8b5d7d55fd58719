"""A step of training, and reactions to a clip, against the published code's way to them, each in a process of its own, in turns.

The rival is that way written plainly: the same module, equal to the published one in what it computes; float32; torch's AdamW; an averaged
copy that is moved parameter by parameter; in stage 2 the frozen encoder over raw features in every step; one reaction after the other. It
neither clips nor is it deterministic, reads nothing and writes nothing; nor do we here.
"""

import multiprocessing
import resource
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cluster.bench.training import alone, engine_step, random_batch
from cluster.config.schema import Experiment
from cluster.training.engine import Engine
from cluster.training.settings import engine_settings
from reactdiff.data.keyed import normal
from reactdiff.determinism import make_deterministic
from reactdiff.generate import Reactor
from reactdiff.model.codec import Codec
from reactdiff.model.init import initial_weights
from reactdiff.model.latent_diffusion import LatentDiffusion
from reactdiff.stage import Source, build, build_without_memory, stages_over

ROLES = ("ours", "published")

SAMPLED = 2
"""Sampling steps that are measured; what all of them take is scaled from there."""


@dataclass(frozen=True)
class Cost:
    """What one step, or one clip, took: seconds by the clock, of the processor, and the most bytes that the process held."""

    wall: float
    cpu: float
    memory: int


@dataclass(frozen=True)
class Rivalry:
    """What is measured of an experiment: a stage's step, or the generation of reactions (stage "generation").

    Attributes:
        experiment: its configuration; one rank.
        source: what a dataset of clips would hold.
        stage: "autoencoder", "diffusion" or "generation".
        repeats: measured steps, or clips.
    """

    experiment: Experiment
    source: Source
    stage: str
    repeats: int

    def measure(self, role: str) -> Cost:
        """Measure one of ROLES in this process."""
        torch.set_num_threads(self.experiment.workers.threads)
        if self.stage == "generation":
            return self._timed(self._our_reactions() if role == "ours" else self._published_reactions(), scaled=True)
        return self._timed(self._our_step() if role == "ours" else self._published_step(), scaled=False)

    def _timed(self, work: Callable[[int], None], scaled: bool) -> Cost:
        """The least of all repeats after one that warms up; with `scaled`, work does so many sampling steps, and all are wanted."""
        walls, cpus = [], []
        for _ in range(self.repeats + 1):
            wall, cpu = time.perf_counter(), time.process_time()
            work(SAMPLED)
            walls.append(time.perf_counter() - wall)
            cpus.append(time.process_time() - cpu)
        factor = 1.0
        if scaled:  # encoding and decoding come once, whatever the steps
            wall, cpu = time.perf_counter(), time.process_time()
            work(2 * SAMPLED)
            more = (self.experiment.diffusion.sampling_steps - SAMPLED) / SAMPLED
            factor = 1 + more * max(0.0, time.process_time() - cpu - min(cpus[1:])) / min(cpus[1:])
        unit = 1 if sys.platform == "darwin" else 1024
        return Cost(factor * min(walls[1:]), factor * min(cpus[1:]), unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)

    def _our_step(self) -> Callable[[int], None]:
        experiment, items = self.experiment, self.experiment.optim.batch[self.stage]
        make_deterministic(experiment.workers.threads)
        device = torch.device("cpu")
        alone(device)
        kind = stages_over(self.source, experiment.model, experiment.diffusion)[self.stage]
        module = build_without_memory(kind)
        settings = engine_settings(experiment, self.stage, ranks=1)
        engine = Engine(module, initial_weights(module, experiment.seed), settings, device)
        step = engine_step(engine, random_batch(kind, items, device), items, settings.micro_batches)
        return lambda _: step()

    def _published_step(self) -> Callable[[int], None]:
        experiment, optim, items = self.experiment, self.experiment.optim, self.experiment.optim.batch[self.stage]
        kinds = stages_over(self.source, experiment.model, experiment.diffusion)
        module = build(kinds[self.stage], experiment.seed)
        average = build(kinds[self.stage], experiment.seed)
        adam = torch.optim.AdamW(module.parameters(), lr=1e-4, betas=optim.betas, weight_decay=optim.weight_decay)
        batch, encode = random_batch(kinds[self.stage], items, torch.device("cpu")), list[Callable[[], None]]()
        if self.stage == "diffusion":
            frozen = build(kinds["autoencoder"], experiment.seed).eval()
            assert isinstance(frozen, Codec)
            features = self._features(frozen, items)
            encode = [lambda person=person: batch.update({person: frozen.encode(features)}) for person in ("speaker", "listener")]  # type: ignore[misc]

        def step(_: int) -> None:
            with torch.no_grad():
                for person in encode:
                    person()
            adam.zero_grad()
            module(batch).mean().backward()
            adam.step()
            with torch.no_grad():
                for mean, parameter in zip(average.parameters(), module.parameters(), strict=True):
                    mean.mul_(optim.ema[self.stage]).add_(parameter, alpha=1 - optim.ema[self.stage])

        return step

    def _our_reactions(self) -> Callable[[int], None]:
        make_deterministic(self.experiment.workers.threads)
        reactor, count = self._reactor(), self.experiment.evaluation.predictions
        streams = self._features(reactor.codec, 1)

        def react(steps: int) -> None:
            assert reactor.diffusion is not None
            reactor.diffusion.sampling_steps = steps
            with torch.no_grad():
                latent = reactor.codec.encode(streams).half().numpy()
            reactor.react(latent, [("clip", 0)], count, 0)

        return react

    def _published_reactions(self) -> Callable[[int], None]:
        reactor, count = self._reactor(), self.experiment.evaluation.predictions
        streams = self._features(reactor.codec, 1)

        def react(steps: int) -> None:
            assert reactor.diffusion is not None
            reactor.diffusion.sampling_steps = steps
            for _ in range(count):
                with torch.no_grad():
                    latent = reactor.codec.encode(streams).numpy()
                reactor.react(latent, [("clip", 0)], 1, 0)

        return react

    def _reactor(self) -> Reactor:
        kinds = stages_over(self.source, self.experiment.model, self.experiment.diffusion)
        codec, diffusion = (build(kind, self.experiment.seed).eval() for kind in kinds.values())
        assert isinstance(codec, Codec) and isinstance(diffusion, LatentDiffusion)
        return Reactor(codec, diffusion)

    def _features(self, codec: nn.Module, items: int) -> dict[str, Tensor]:
        """Raw features of so many persons."""
        assert isinstance(codec, Codec)
        shape = (items, self.source.frames)
        return {name: torch.from_numpy(normal((*shape, self.source.width(name)), "bench", name)) for name in codec.inputs}


def in_turns(rivalry: Rivalry, rounds: int, progress: Callable[[int, int], None]) -> dict[str, list[Cost]]:
    """Measure both as often as there are rounds, one after the other."""
    found: dict[str, list[Cost]] = {role: [] for role in ROLES}
    spawn = multiprocessing.get_context("spawn")
    for number in range(rounds):
        for place, role in enumerate(found):
            with ProcessPoolExecutor(1, mp_context=spawn) as own:
                found[role].append(own.submit(rivalry.measure, role).result())
            progress(2 * number + place + 1, 2 * rounds)
    return found
