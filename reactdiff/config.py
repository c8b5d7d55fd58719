"""The science's branch of the experiment: model, diffusion, optimiser; and the rules every branch of the tree obeys.

Each field is *identity* (it changes what is computed), *placement* (it changes where and how fast), or *end* (how long
training goes on; may only grow). A default lives here once and nowhere else.
"""

from typing import Any, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator

STAGES = ("autoencoder", "diffusion")
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
    """Widths and depths of the Multi-Modality Transformer and the denoiser; stream widths come from the dataset."""

    facial: tuple[str, ...] = field(("au", "fer", "va"), "Facial streams; the first asks, the others answer in this order.", min_length=1)
    acoustic: tuple[str, ...] = field(("w2v", "mfcc"), "Acoustic streams; the first asks, the others answer in this order.", min_length=1)
    hidden: int = field(1024, "Width of the attention units.", unit="features", gt=0)
    latent: int = field(256, "Width of one latent frame.", unit="features", gt=0)
    heads: int = field(4, "Attention heads of every unit and decoder layer.", gt=0)
    intra_depth: int = field(2, "Rounds of intra-class attention over the facial streams.", ge=0)
    inter_depth: int = field(2, "Rounds of inter-class attention from face to voice.", gt=0)
    dropout: float = field(0.1, "Dropout of the decoder layers while training.", unit="probability", ge=0, lt=1)
    channels: int = field(256, "Channels of the UNet's first level; a multiple of 32.", gt=0, multiple_of=32)
    multipliers: tuple[PositiveInt, ...] = field((1, 2, 4, 8), "Channel multiplier of each UNet level.", min_length=1)
    condition: int = field(1024, "Width of the speaker condition; a multiple of 32, at least 64.", unit="features", ge=64, multiple_of=32)


class Diffusion(Branch):
    """The diffusion process in latent space."""

    steps: int = field(20, "Diffusion steps T of the training process.", unit="steps", gt=0)
    schedule: Literal["cosine", "linear"] = field("cosine", "Noise schedule.")
    prediction: Literal["epsilon", "x0"] = field("epsilon", "What the denoiser predicts: the noise or the clean latent.")
    sampling_steps: int = field(20, "DDIM steps of one generation; at most diffusion.steps.", unit="steps", gt=0)
    normalisation: Literal["feature", "frame"] = field(
        "feature", "Latents are mapped to [-1, 1] by the training set's range per feature, or per frame and feature (the authors' choice)."
    )

    @model_validator(mode="after")
    def _enough_steps(self) -> "Diffusion":
        if self.sampling_steps > self.steps:
            raise ValueError(f"diffusion.sampling_steps is {self.sampling_steps}, but must be at most diffusion.steps ({self.steps})")
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
    precision: Literal["fp32", "bf16"] = field("fp32", "Arithmetic of forward and backward; master weights are always fp32.")

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
