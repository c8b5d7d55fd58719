"""The science's branch of the experiment: model, diffusion, optimiser; and the rules every branch of the tree obeys.

Each field is *identity* (it changes what is computed), *placement* (it changes where and how fast), or *end* (how long
training goes on; may only grow). A default lives here once and nowhere else.
"""

from typing import Any, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator

from reactdiff.averages import LONGEST
from reactdiff.clip import WINDOW

STAGES = ("autoencoder", "diffusion")
ENCODING = (
    *("family", "space", "facial", "acoustic", "online", "chunk", "hidden", "latent", "heads"),
    *("intra", "intra_depth", "inter", "inter_depth", "dropout", "bounded"),
)
"""Fields of the model that decide what stage 1 of a model with a second stage is; the others are about stage 2."""
Kind = Literal["identity", "placement", "end"]
T = TypeVar("T")


class Branch(BaseModel):
    """A node of the experiment tree: unknown keys are refused and nothing changes after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def field(default: Any, what: str, *, kind: Kind = "identity", unit: str = "", **rules: Any) -> Any:
    """A field with its default, one sentence of meaning, its unit, and its kind."""
    return Field(default, description=what, json_schema_extra={"kind": kind, "unit": unit}, validate_default=True, **rules)


class PerStage(Branch, Generic[T]):
    """One value for each training stage; a bare value sets both (`optim.lr=1e-4`)."""

    autoencoder: T
    diffusion: T

    @model_validator(mode="before")
    @classmethod
    def _both(cls, value: Any) -> Any:
        return value if isinstance(value, (dict, PerStage)) else dict.fromkeys(STAGES, value)

    def __getitem__(self, stage: str) -> T:
        return getattr(self, stage)


def per_stage(autoencoder: Any, diffusion: Any) -> dict[str, Any]:
    """The default of a per-stage field."""
    return {"autoencoder": autoencoder, "diffusion": diffusion}


class Model(Branch):
    """Which model, its widths and depths; stream widths come from the dataset."""

    family: Literal["reactdiff", "perfrdiff", "trans-vae", "belfusion"] = field(
        "reactdiff", "The model: ReactDiff, or a peer it is compared with (PerFRDiff's window denoiser, Trans-VAE, BeLFusion)."
    )
    space: Literal["latent", "attributes"] = field(
        "latent",
        "What ReactDiff denoises: latents of a first stage, or, without such a stage, attributes and coefficients themselves, under the "
        "speaker's streams as they are.",
    )
    facial: tuple[str, ...] = field(
        ("au", "fer", "va"), "Facial streams; the first asks, the others answer in this order. Empty: voice only."
    )
    acoustic: tuple[str, ...] = field(
        ("w2v", "mfcc"), "Acoustic streams; the first asks, the others answer in this order. Empty: face only."
    )
    online: bool = field(False, "A reaction frame sees of the speaker only the chunks before its own.")
    chunk: int = field(
        WINDOW, f"Frames of a chunk, in which an online listener hears and reacts; divides {WINDOW}. 10 are 0.4 s.", unit="frames", gt=0
    )
    hidden: int = field(1024, "Width of the attention units, and of BeLFusion's recurrent states.", unit="features", gt=0)
    latent: int = field(256, "Width of one latent frame.", unit="features", gt=0)
    heads: int = field(4, "Attention heads of every unit and layer but the UNet's.", gt=0)
    intra: bool = field(True, "Intra-class attention; without it the projected streams of a class are added.")
    intra_depth: int = field(2, "Rounds of intra-class attention over the facial streams.", ge=0)
    inter: bool = field(True, "Inter-class attention; without it face and voice are added.")
    inter_depth: int = field(2, "Rounds of inter-class attention from face to voice.", gt=0)
    dropout: float = field(0.1, "Dropout of decoder layers while training.", unit="probability", ge=0, lt=1)
    bounded: bool = field(
        False, "Action units in [0, 1], valence and arousal in [-1, 1], expressions that sum to 1; the authors' heads are linear."
    )
    denoiser: Literal["unet", "transformer"] = field(
        "unet", "ReactDiff's denoiser: the authors' UNet, window by window, or a transformer over all frames."
    )
    channels: int = field(256, "Channels of the UNet's first level; a multiple of 32.", gt=0, multiple_of=32)
    multipliers: tuple[PositiveInt, ...] = field((1, 2, 4, 8), "Channel multiplier of each UNet level.", min_length=1)
    blocks: int = field(2, "Residual blocks at each UNet level on the way down; one more on the way up.", gt=0)
    condition: int = field(
        1024, "Width of the UNet's speaker condition; a multiple of 32, at least 64.", unit="features", ge=64, multiple_of=32
    )
    width: int = field(512, "Width of the transformer denoiser, and of a peer's networks.", unit="features", gt=0, multiple_of=4)
    layers: int = field(8, "Layers of the transformer denoiser, and of a peer's networks.", gt=0)
    patch: int = field(1, "Frames of one token of the transformer denoiser; divides a chunk.", unit="frames", gt=0)
    lags: tuple[int, ...] = field(
        (),
        "What the speaker did so many frames before is added to each token of the transformer denoiser, once it was heard; attention then "
        "sees an online speaker at the true time. Multiples of model.patch.",
        unit="frames",
    )
    context: int = field(
        2, "Windows that a frame of the transformer denoiser sees beside its own, before and (offline) after.", unit="windows", gt=0
    )
    init_from: tuple[str, ...] = field(
        (),
        "Weights to start from: a finished run (name, folder or URL), or the authors' files [STAGE1.pth, STAGE2.pth, PROJECTOR.pth].",
        max_length=3,
    )

    @model_validator(mode="after")
    def _sensible(self) -> "Model":
        if not self.facial and not self.acoustic:
            raise ValueError("model.facial and model.acoustic are both empty: name at least one stream")
        if self.family == "perfrdiff" and not self.online:
            raise ValueError(
                "model.family=perfrdiff generates from the window before, so it is online by construction: set model.online=true"
            )
        if self.family != "reactdiff" and not (self.intra and self.inter and self.denoiser == "unet"):
            raise ValueError(
                f"model.family={self.family} has no such attention and no choice of denoiser: leave model.intra, model.inter and "
                "model.denoiser as they are, or set model.family=reactdiff"
            )
        if self.family == "perfrdiff" and self.bounded:
            raise ValueError("model.family=perfrdiff denoises attributes themselves and has no heads to bound: set model.bounded=false")
        if self.space == "attributes" and self.bounded:
            raise ValueError("model.space=attributes denoises attributes themselves and has no heads to bound: set model.bounded=false")
        if self.family == "trans-vae" and self.online:
            raise ValueError("model.family=trans-vae hears the whole clip before it reacts: set model.online=false")
        return self

    @model_validator(mode="after")
    def _divided(self) -> "Model":
        transformer = self.family == "reactdiff" and self.denoiser == "transformer"
        for name, default in (("chunk", WINDOW), ("patch", 1), ("lags", ()), ("space", "latent")):
            if not transformer and (value := getattr(self, name)) != default:
                family = "" if self.family == "reactdiff" else "model.family=reactdiff "
                raise ValueError(
                    f"model.{name} is {value}, which only the transformer denoiser takes: set {family}model.denoiser=transformer"
                )
        if self.chunk != WINDOW and not self.online:
            raise ValueError(f"model.chunk is {self.chunk}, but a model that hears the whole clip has no chunks: set model.online=true")
        if WINDOW % self.chunk:
            raise ValueError(f"model.chunk is {self.chunk}, but must divide the {WINDOW} frames of a window: 1, 2, 5, 10, 25 or {WINDOW}")
        if self.chunk_frames % self.patch:
            raise ValueError(f"model.patch is {self.patch}, but must divide the {self.chunk_frames} frames that are denoised at one time")
        if any(lag < 0 or lag % self.patch for lag in self.lags):
            raise ValueError(f"model.lags are {list(self.lags)}, but must be multiples of model.patch={self.patch}, none below 0")
        return self

    @property
    def chunk_frames(self) -> int:
        """Frames that have one diffusion time: those of a chunk online, of a window offline."""
        return self.chunk if self.online else WINDOW


class Diffusion(Branch):
    """The diffusion process."""

    steps: int = field(20, "Diffusion steps T of the training process.", unit="steps", gt=0)
    schedule: Literal["cosine", "linear", "sqrt", "sigmoid", "karras", "flow"] = field("cosine", "Noise schedule.")
    prediction: Literal["epsilon", "x0", "v", "flow"] = field(
        "epsilon",
        "What the denoiser predicts: the noise, the clean latent, v between them (with normalisation=variance this is EDM's "
        "preconditioning), or flow matching's velocity.",
    )
    times: Literal["uniform", "log-normal"] = field(
        "uniform",
        "Diffusion times in training: every step alike, or the ratio of noise to signal log-normal, as EDM has it.",
    )
    level: float = field(0.7, "With times=log-normal, the mean of the logarithm of noise over signal.")
    level_deviation: float = field(1.5, "With times=log-normal, its standard deviation.", gt=0)
    loss: Literal["absolute", "squared"] = field(
        "absolute", "Error of a prediction in the loss: the authors' absolute one, or the squared one; PerFRDiff's is always squared."
    )
    history: Literal["noisy", "clean"] = field(
        "noisy",
        "What an online denoiser sees in training of the chunks before: them at diffusion times of their own, or, as in sampling, finished "
        "(twice the listener's tokens).",
    )
    history_noise: float = field(
        0.0,
        "With history=clean, the largest deviation of noise on it, drawn anew for each item; on the scale of normalisation, where only "
        "variance makes every feature's own deviation 1.",
        ge=0,
    )
    history_swap: float = field(
        0.0,
        "With history=clean, probability that an item's history is of other moments of its clip, lest the model trust its own too much.",
        unit="probability",
        ge=0,
        lt=1,
    )
    weighting: Literal["uniform", "min-snr", "elbo"] = field(
        "uniform", "How the loss is weighted over diffusion times; the mean weight of uniform times is 1."
    )
    condition_dropout: float = field(
        0.0,
        "Probability that the speaker is hidden in training, which guidance needs: from an item by a transformer, else from a window.",
        unit="probability",
        ge=0,
        lt=1,
    )
    stream_dropout: float = field(
        0.0,
        "Probability that a stream of the speaker is hidden from an item in training, each by itself; for model.space=attributes.",
        unit="probability",
        ge=0,
        lt=1,
    )
    other_target: float = field(
        0.0,
        "Probability that an item's target is not its own listener's, but that of another clip's who reacted appropriately to the same "
        "speaker; the dataset must say who did (jobs/prepare.py --one-to-many).",
        unit="probability",
        ge=0,
        le=1,
    )
    sampler: Literal["ddim", "ddpm", "dpm++"] = field("ddim", "Sampler of a generation; dpm++ is DPM-Solver++(2M).")
    sampling_steps: int = field(20, "Calls of the denoiser in one generation; any number.", unit="steps", gt=0)
    smoothing: float = field(
        0.0,
        "Share that is taken from the jump where tokens of a transformer, or chunks, meet, and spread over the frames beside it; 0: none.",
        unit="share",
        ge=0,
        lt=1,
    )
    hidden_streams: tuple[str, ...] = field(
        (), "Streams of the speaker that a generation takes no notice of, whatever a dead camera or microphone gives; needs stream_dropout."
    )
    guidance: float = field(1.0, "Classifier-free guidance: 1 is none, above it the speaker counts for more.", ge=0)
    autoguidance: float = field(
        1.0, "Guidance by an earlier export of the run: 1 is none, above it a sample moves away from what that one would draw.", ge=1
    )
    weak_progress: int = field(0, "With autoguidance, the progress of that export.", unit="items", ge=0)
    ema_every: int = field(
        0,
        "At each multiple of so many items a checkpoint stays for good that also holds two averages of weights, from which one of any "
        "length is made afterwards; 0: none.",
        unit="items",
        ge=0,
    )
    ema_length: float = field(
        0.0,
        "With ema_every, the length of the averaged weights that draw, relative to the stage's training; 0: those of optim.ema.",
        unit="share",
        ge=0,
        le=LONGEST,
    )
    normalisation: Literal["feature", "frame", "variance"] = field(
        "feature",
        "What is denoised is mapped to [-1, 1] by the training set's range per feature, or per frame and feature (the authors' choice), or "
        "to mean 0 and variance 1 per feature.",
    )

    @model_validator(mode="after")
    def _guidable(self) -> "Diffusion":
        if self.guidance != 1 and self.condition_dropout == 0:
            raise ValueError(
                f"diffusion.guidance is {self.guidance}, but a denoiser that was never trained without the speaker cannot be guided: "
                "set diffusion.condition_dropout, 0.1 for example, or diffusion.guidance=1"
            )
        if self.hidden_streams and not self.stream_dropout:
            raise ValueError(
                f"diffusion.hidden_streams is {', '.join(self.hidden_streams)}, but a denoiser that always heard all streams cannot do "
                "without one: set diffusion.stream_dropout, 0.2 for example, or diffusion.hidden_streams=[]"
            )
        if (self.autoguidance != 1) != (self.weak_progress > 0):
            raise ValueError(
                f"diffusion.autoguidance is {self.autoguidance} and diffusion.weak_progress {self.weak_progress}, but the one needs the "
                "other: the progress of the export that is to guide, or 1 and 0"
            )
        if self.guidance != 1 and self.autoguidance != 1:
            raise ValueError(f"diffusion.guidance is {self.guidance} and diffusion.autoguidance {self.autoguidance}: use one of them")
        if self.ema_length and not self.ema_every:
            raise ValueError(
                f"diffusion.ema_length is {self.ema_length}, but an average of any length is made of what training kept for it: set "
                "diffusion.ema_every, a tenth of the stage's items for example, in a new run"
            )
        for name in ("history_noise", "history_swap"):
            if getattr(self, name) and self.history != "clean":
                raise ValueError(f"diffusion.{name} is {getattr(self, name)}, which only a clean history has: set diffusion.history=clean")
        if self.weighting == "elbo" and self.times != "uniform":
            raise ValueError(
                f"diffusion.weighting is elbo and diffusion.times {self.times}, but the weights are those of the ELBO only where all times "
                "are alike: set diffusion.times=uniform, or another weighting"
            )
        for name in ("level", "level_deviation"):
            if self.times == "uniform" and (value := getattr(self, name)) != type(self).model_fields[name].default:
                raise ValueError(f"diffusion.{name} is {value}, but uniform times have no such level: set diffusion.times=log-normal")
        return self


class Optim(Branch):
    """AdamW and what is scheduled over progress; a per-stage field takes one value or `{autoencoder: .., diffusion: ..}`."""

    epochs: PerStage[float] = field(per_stage(200, 200), "Passes over the training items; may only grow.", kind="end", unit="epochs")
    batch: PerStage[int] = field(per_stage(16, 16), "Items of one optimiser step over all ranks.", unit="items")
    lr: PerStage[float] = field(per_stage(1e-4, 5e-5), "Peak learning rate of AdamW.", unit="1/step")
    warmup: PerStage[int] = field(per_stage(0, 0), "Progress over which the learning rate rises linearly from 0.", unit="items")
    decay: PerStage[int] = field(per_stage(0, 0), "Progress at which a cosine decay ends at 1 % of the peak; 0: constant.", unit="items")
    betas: tuple[float, float] = field((0.9, 0.999), "AdamW's moment decays.")
    weight_decay: float = field(5e-4, "AdamW's decoupled weight decay.", unit="1/step", ge=0)
    clip: float = field(0.0, "Largest gradient norm, 0 for none.", ge=0)
    ema: PerStage[float] = field(per_stage(0.999, 0.999), "Decay of the averaged weights used for evaluation.", unit="1/step")
    precision: Literal["fp32", "tf32", "bf16"] = field(
        "fp32",
        "Arithmetic of forward and backward: fp32 on any device, tf32 (fp32 whose products a GPU rounds to 10 bits), bf16; "
        "weights that are trained, sums of gradients and moments are always fp32.",
    )

    @model_validator(mode="after")
    def _sane(self) -> "Optim":
        for name, low in (("epochs", 0), ("batch", 0), ("lr", 0)):
            for stage in STAGES:
                if not (value := getattr(self, name)[stage]) > low:
                    raise ValueError(f"optim.{name}.{stage} is {value}, but must be greater than {low}")
        for stage in STAGES:
            if not 0 <= self.ema[stage] < 1:
                raise ValueError(f"optim.ema.{stage} is {self.ema[stage]}, but must lie in [0, 1)")
            if self.decay[stage] and self.decay[stage] <= self.warmup[stage]:
                raise ValueError(
                    f"optim.decay.{stage} is {self.decay[stage]}, but must lie after optim.warmup.{stage} ({self.warmup[stage]})"
                )
        return self
