"""How an engine trains a stage: from the configuration, for a number of ranks."""

from dataclasses import dataclass

from cluster.config.schema import Experiment
from reactdiff.averages import LENGTHS, average_kind, decay

MOMENTS = ("exp_avg", "exp_avg_sq")
KINDS = ("master", *MOMENTS, "average")
"""What a checkpoint keeps of each parameter: fp32 weight, Adam's two moments, averaged weight (EMA).

With `diffusion.ema_every` there are averages of `LENGTHS`, too (`average_kind`).
"""


@dataclass(frozen=True)
class EngineSettings:
    """How one engine trains; every value is explicit, since DeepSpeed's defaults change results (clipping is 1.0)."""

    zero: int
    precision: str
    micro_batches: int
    betas: tuple[float, float]
    weight_decay: float
    clip: float
    ema: float
    recompute: bool
    compile_for: int
    """Items of the largest micro-batch, for which forward and backward are compiled; 0: they are not."""

    offload: str
    """What lies in host memory: "none", "optimizer" or "all"."""

    lengths: tuple[float, ...]
    """Relative lengths of averages that are kept beside that of `ema`."""

    @property
    def kinds(self) -> tuple[str, ...]:
        """What is kept of each parameter."""
        return *KINDS, *map(average_kind, self.lengths)

    @property
    def averages(self) -> bool:
        """Whether DeepSpeed divides gradients by the number of ranks: ZeRO-2 would do so in bf16, before they are summed in fp32."""
        return self.precision != "bf16" or self.zero == 3

    def decays(self, step: int) -> dict[str, float]:
        """What each average keeps of itself when step `step` (from 1) enters it."""
        return {"average": self.ema, **{average_kind(length): decay(length, step) for length in self.lengths}}


def engine_settings(experiment: Experiment, stage: str, ranks: int) -> EngineSettings:
    """How an experiment trains a stage on so many ranks."""
    optim, workers = experiment.optim, experiment.workers
    whole_share = -(-optim.batch[stage] // workers.most) if workers.least < workers.most else 0
    parts = micro_batches(optim.batch[stage], ranks, workers.micro_batch or whole_share)
    return EngineSettings(
        zero=zero_stage(workers.zero, optim.precision, ranks, workers.offload),
        precision=optim.precision,
        micro_batches=parts,
        betas=optim.betas,
        weight_decay=optim.weight_decay,
        clip=optim.clip,
        ema=optim.ema[stage],
        recompute=workers.recompute,
        compile_for=-(-optim.batch[stage] // (ranks * parts)) if workers.compile else 0,
        offload=workers.offload,
        lengths=LENGTHS if experiment.ema_every(stage) else (),
    )


def zero_stage(asked: int, precision: str, ranks: int, offload: str = "none") -> int:
    """The ZeRO stage that is used: one rank has nobody to divide anything with, and weights that are not bf16 are their own masters."""
    return 0 if ranks == 1 and precision != "bf16" and offload == "none" else asked


def micro_batches(batch: int, ranks: int, largest: int) -> int:
    """Forward passes of one step on each rank: the rank's largest share over the largest micro-batch."""
    share = -(-batch // ranks)
    return -(-share // largest) if largest else 1
