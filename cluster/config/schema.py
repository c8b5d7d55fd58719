"""The experiment: the machinery's branch of the tree, and the tree itself."""

from typing import Any, Literal

from pydantic import PositiveInt, model_validator

from reactdiff.config import Branch, Diffusion, Model, Optim, PerStage, field, per_stage
from reactdiff.data.order import VERSION


class Data(Branch):
    """The dataset and the order in which it is used."""

    url: str = field("work/demo/shards", "Folder or s3://bucket/prefix of the dataset (made by jobs/prepare.py).", kind="placement")
    manifest: str = field("", "Hash of the dataset state to train on; empty: the current one at the run's first start.")
    split: str = field("train", "Split that is trained on.")
    order: int = field(VERSION, "Version of the order of items.")
    block: int = field(64, "Neighbouring items that are read together.", unit="items", ge=1)
    group: int = field(16, "Blocks whose items are mixed with each other.", unit="blocks", ge=1)
    read_ahead: int = field(
        512, "Memory of each rank for data read before it is needed; at least three steps'.", kind="placement", unit="MB", ge=1
    )
    readers: int = field(2, "Threads that read and decode on each rank.", kind="placement", ge=1)
    cache: str = field("", "Folder on each node's disk that keeps what was read for later epochs; empty: none.", kind="placement")
    cache_limit: float = field(100.0, "Most bytes of the cache folder, of all runs together.", kind="placement", unit="GB", gt=0)
    on_corrupt: Literal["stop", "quarantine"] = field(
        "stop",
        "An item of damaged bytes, or whose own loss or gradient is not finite, ends the run, or counts nothing from then on.",
        kind="placement",
    )

    @model_validator(mode="after")
    def _near(self) -> "Data":
        if "://" in self.cache:
            raise ValueError(
                f"data.cache is {self.cache!r}, but it is a folder on each node's own disk and no URL: "
                "set data.cache=/local/disk/reactdiff, for example"
            )
        return self


class Run(Branch):
    """Where a run lies, and how often it writes checkpoints and rows."""

    name: str = field("", "Name; empty: `<config>-<8 hex of its identity>`.", kind="placement", pattern=r"^[A-Za-z0-9._-]{0,100}$")
    store: str = field("work/store", "Folder or s3://bucket/prefix of runs, checkpoints and latents.", kind="placement")
    autoencoder: str = field(
        "", "A finished run (name, folder or URL) whose autoencoder is taken instead of training one.", kind="identity"
    )
    checkpoint_every: PerStage[int] = field(per_stage(0, 0), "Progress between checkpoints; 0: an epoch.", kind="placement", unit="items")
    log_every: int = field(10, "Steps between logged rows.", kind="placement", unit="steps", ge=1)
    keep: int = field(
        3,
        "Newest checkpoints kept of each stage. Others are deleted, but for those of run.keep_every, run.keep_best, diffusion.ema_every.",
        kind="placement",
        ge=1,
    )
    keep_every: PerStage[int] = field(
        per_stage(0, 0),
        "The first checkpoint at or after each multiple of it is kept for good; 0: none.",
        kind="placement",
        unit="items",
    )
    keep_best: int = field(
        0, "Checkpoints kept of those that `evaluation.watch` scored, the ones with the best FRCorr; 0: none.", kind="placement", ge=0
    )
    checkpoint_minutes: float = field(
        10, "Longest time between checkpoints, beside `checkpoint_every`; 0: none.", kind="placement", unit="minutes", ge=0
    )
    retries: int = field(
        3, "Times failed ranks are started again without having got further, for each class of failure.", kind="placement", ge=0
    )
    wait_minutes: float = field(0, "Longest wait for room for the ranks; 0: no limit.", kind="placement", unit="minutes", ge=0)


class Workers(Branch):
    """The ranks: how many, with what, and how DeepSpeed ZeRO divides the state among them."""

    count: int | tuple[int, int] = field(
        2, "Number of ranks; [LEAST, MOST]: with as many as there is room for, more when machines come.", kind="placement"
    )
    per_host: int = field(0, "Most ranks on one machine; 0: as many as it has room for.", kind="placement", ge=0)
    labels: dict[str, str] = field({}, "Labels of the Ray nodes that may hold ranks, such as {pool: gpu}.", kind="placement")
    gpu: bool = field(False, "One GPU for each rank (NCCL); otherwise CPU ranks (gloo).", kind="placement")
    cpus: float = field(1, "CPUs reserved for each rank.", kind="placement", unit="cores", gt=0)
    threads: int = field(1, "Compute threads of each rank (part of what makes two runs bitwise equal).", kind="placement", ge=1)
    zero: Literal[0, 1, 2, 3] = field(1, "ZeRO stage: 0 divides nothing, 1 optimiser, 2 gradients too, 3 weights too.", kind="placement")
    micro_batch: int = field(
        0, "Most items in one forward pass; 0: a rank's whole share of a step, with the most ranks.", kind="placement", unit="items", ge=0
    )

    recompute: bool = field(
        False, "Compute activations again in the backward pass instead of keeping them: less memory, a third slower.", kind="placement"
    )
    compile: bool = field(
        False,
        "Compile forward and backward into fewer kernels (torch.compile; on CPUs it needs g++, on GPUs gcc and Python.h): faster steps, "
        "after minutes at each start of the ranks. Not with workers.zero=3.",
        kind="placement",
    )

    offload: Literal["none", "optimizer", "all"] = field(
        "none",
        "What waits in host memory beside a GPU: nothing; the optimiser's weights, moments, averages and sums of gradients, which are "
        "then updated by the CPU; or each rank's part of the weights, too. Needs workers.zero=3.",
        kind="placement",
    )

    @property
    def least(self) -> int:
        """The least number of ranks that the run goes on with."""
        return self.count if isinstance(self.count, int) else self.count[0]

    @property
    def most(self) -> int:
        """The largest number of ranks."""
        return self.count if isinstance(self.count, int) else self.count[1]

    @model_validator(mode="after")
    def _counted(self) -> "Workers":
        if self.offload != "none" and self.zero != 3:
            raise ValueError(f"workers.offload is {self.offload} and workers.zero {self.zero}: set workers.zero=3, or workers.offload=none")
        if not 1 <= self.least <= self.most:
            raise ValueError(f"workers.count is {self.count}, but ranks are counted from 1, and LEAST is not above MOST: 8, or [1, 8]")
        if self.compile and self.zero == 3:
            raise ValueError("workers.compile=true, but with workers.zero=3 every layer waits for its weights: set workers.zero=2")
        return self


class Evaluation(Branch):
    """What is scored when training is done."""

    split: str = field("val", "Split that is scored.", kind="placement")
    predictions: int = field(10, "Reactions generated for each clip and direction (K).", kind="placement", ge=1)
    clips: int = field(0, "Clips that are scored, the first ones; 0: all.", kind="placement", unit="clips", ge=0)
    baselines: bool = field(True, "Score the baselines beside the model.", kind="placement")
    watch: int = field(
        0,
        "Clips of split val that are scored at every checkpoint while the last stage trains; 0: none.",
        kind="placement",
        unit="clips",
        ge=0,
    )
    rungs: tuple[PositiveInt, ...] = field(
        (),
        "Progress of stage diffusion at which the error of the predicted x0 is measured; trials of a sweep are compared there.",
        kind="placement",
        unit="items",
    )
    rung_clips: int = field(16, "Clips of split val on which it is measured, the first ones.", kind="placement", unit="clips", ge=1)


class Telemetry(Branch):
    """The Prometheus exporter beside the driver."""

    host: str = field("127.0.0.1", "Address the exporter binds to.", kind="placement")
    port: int = field(0, "Port of the exporter; 0: any free one.", kind="placement", ge=0, le=65535)
    targets: str = field("work/prometheus", "Folder that receives a Prometheus file_sd target while the run lives.", kind="placement")
    prices: dict[str, float] = field(
        {},
        "Price of a whole machine, by the value of one of its Ray node's labels, such as {g5.12xlarge: 2.3} or {gpu: 2.3}; `any`: of every "
        "other. Where none is given, the list price of cluster/runtime/prices.yaml by the label `instance-type`.",
        kind="placement",
        unit="dollars an hour",
    )
    budget: float = field(0, "What the run may cost before an alert says so; 0: no limit.", kind="placement", unit="dollars", ge=0)


class Experiment(Branch):
    """One experiment. A run's name stands for its identity fields; placement may change at any restart."""

    seed: int = field(0, "Seed of weights, order, diffusion times and noise.", ge=0)
    data: Data = Data()
    model: Model = Model()
    diffusion: Diffusion = Diffusion()
    optim: Optim = Optim()
    run: Run = Run()
    workers: Workers = Workers()
    evaluation: Evaluation = Evaluation()
    telemetry: Telemetry = Telemetry()

    def __reduce__(self) -> tuple[Any, ...]:
        """Travels as plain values: pydantic's generic classes do not pickle."""
        return Experiment.model_validate, (self.model_dump(mode="json"),)

    def ema_every(self, stage: str) -> int:
        """At each multiple of so many items a checkpoint stays that averages of any length are made of; 0: there are none."""
        return self.diffusion.ema_every if stage == "diffusion" else 0

    @model_validator(mode="after")
    def _supported(self) -> "Experiment":
        if self.optim.precision == "bf16" and self.workers.zero == 0:
            raise ValueError("workers.zero is 0, but optim.precision=bf16 needs the fp32 masters of ZeRO-1 and above: set workers.zero=1")
        if self.run.keep_best and not self.evaluation.watch:
            raise ValueError(
                f"run.keep_best is {self.run.keep_best}, but no checkpoint is scored: set evaluation.watch, or run.keep_best=0"
            )
        if self.model.family == "trans-vae" and self.run.autoencoder:
            raise ValueError("run.autoencoder would take the only stage of model.family=trans-vae and leave nothing to train: leave it out")
        if self.model.space == "attributes" and self.run.autoencoder:
            raise ValueError("run.autoencoder is of no use to model.space=attributes, which has no first stage: leave it out")
        if self.diffusion.stream_dropout and self.model.space != "attributes":
            raise ValueError(
                f"diffusion.stream_dropout is {self.diffusion.stream_dropout}, but latents are made of all streams together: "
                "set model.space=attributes, or diffusion.stream_dropout=0"
            )
        streams = (*self.model.facial, *self.model.acoustic)
        if unknown := [name for name in self.diffusion.hidden_streams if name not in streams]:
            raise ValueError(f"diffusion.hidden_streams names {unknown[0]!r}, but the model hears {', '.join(streams)}")
        if self.diffusion.history == "clean" and not (self.model.online and self.model.denoiser == "transformer"):
            raise ValueError("diffusion.history=clean needs an online transformer: set model.online=true model.denoiser=transformer")
        if self.diffusion.smoothing and self.model.denoiser != "transformer":
            raise ValueError("diffusion.smoothing is about tokens and chunks of a transformer: set model.denoiser=transformer")
        if self.diffusion.smoothing and self.model.patch == 1 and not self.model.online:
            raise ValueError(
                f"diffusion.smoothing is {self.diffusion.smoothing}, but tokens of one frame (model.patch=1) that are drawn all at once "
                "(model.online=false) meet nowhere: set diffusion.smoothing=0"
            )
        unused = [f"diffusion.{name}={value}" for name, value in Diffusion() if value != getattr(self.diffusion, name)]
        if self.model.family == "trans-vae" and unused:
            raise ValueError(
                f"model.family=trans-vae has no diffusion, and another one would change the run's name and nothing else: "
                f"set the defaults {' '.join(unused)}"
            )
        return self
