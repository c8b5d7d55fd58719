"""The challenge's baseline Trans-VAE: a whole clip of the speaker to one Gaussian latent, and that to a listener's clip."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from reactdiff import config
from reactdiff.clip import TARGETS
from reactdiff.data.sample import StreamSpec
from reactdiff.model.autoencoder import widths_of
from reactdiff.model.codec import Codec
from reactdiff.model.decoder import bounded
from reactdiff.model.layers import check_heads, divergence, mlp, reparameterised
from reactdiff.model.unet import sinusoid

KL_WEIGHT = 2e-3
"""Weight of the divergence, a mean over the latent's features: the challenge's 2e-4, times the 10 of the reconstruction."""


class TransVAE(Codec):
    """A variational autoencoder (Kingma and Welling, 2014) from speaker to listener, trained in one stage.

    The posterior q(z | speaker) never sees the listener, so training and generation draw from the same distribution.

    Args:
        model: which streams to read, and the width, layers, heads, dropout and latent of the networks.
        streams: the streams the dataset has; they say how wide each one is.

    Attributes:
        width: of one frame of the encoding: mean and log-variance of the clip's latent.

    Raises:
        ValueError: if the dataset lacks a stream that `model` names, or the width does not divide into heads.
    """

    def __init__(self, model: config.Model, streams: Sequence[StreamSpec]):
        super().__init__()
        check_heads("model.width", model.width, model.heads)
        self.widths, self.model_width = widths_of(model, streams), model.width
        self.width = 2 * model.latent
        self.bounded = model.bounded
        self.embed = nn.ModuleList(nn.Linear(width, model.width) for width in self.widths.values())
        self.queries = nn.Embedding(2, model.width)
        sizes = model.width, model.heads, 2 * model.width, model.dropout
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(*sizes, batch_first=True), model.layers, enable_nested_tensor=False)
        self.mean = nn.Linear(model.width, model.latent)
        self.log_variance = nn.Linear(model.width, model.latent)
        self.memory = nn.Linear(model.latent, model.width)
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(*sizes, batch_first=True), model.layers)
        self.heads = nn.ModuleDict({name: mlp(model.width, 2 * model.width, width) for name, width in TARGETS.items()})

    def encode(self, streams: dict[str, Tensor]) -> Tensor:
        """Stream name -> (batch, frames, width), to [mean | log-variance] (batch, frames, 2 latent) float32, the same at every frame."""
        frames = streams[self.inputs[0]].shape[1]
        return torch.cat(self._posterior(streams), dim=-1)[:, None].repeat(1, frames, 1)

    @torch.no_grad()
    def react(self, encoding: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """K reactions to each speaker, each from a latent of its own.

        Args:
            encoding: of the speaker, (batch, frames, 2 latent).
            noise: (batch, K, latent), standard normal.

        Returns:
            attributes (batch, K, frames, 25) and coefficients (batch, K, frames, 58).
        """
        mean, log_variance = encoding[:, 0].float().chunk(2, dim=-1)
        latent = reparameterised(mean[:, None], log_variance[:, None], noise)
        reactions = self._decode(latent.flatten(0, 1), encoding.shape[1])
        return {name: reaction.unflatten(0, noise.shape[:2]) for name, reaction in reactions.items()}

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """10 MSE(attributes) + 10 MSE(coefficients) + KL_WEIGHT KL(q || N(0, 1)) of each item, in float32.

        Args:
            batch: the speaker's input streams (batch, frames, width), the listener's attributes (batch, frames, 25) and
                coefficients (batch, frames, 58), and `noise` (batch, latent), standard normal.

        Returns:
            (batch,); an empty batch has an empty loss, through which zeros flow back.
        """
        mean, log_variance = self._posterior(batch)
        output = self._decode(reparameterised(mean, log_variance, batch["noise"]), batch["attributes"].shape[1])
        errors = [(output[name].float() - batch[name].float()).square().mean((1, 2)) for name in TARGETS]
        return 10 * sum(errors) + KL_WEIGHT * divergence(mean, log_variance).mean(1)

    forward = loss

    def _posterior(self, streams: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the clip's latent, each (batch, latent) float32."""
        dtype = self.memory.weight.dtype
        frames = torch.stack([embed(streams[name].to(dtype)) for embed, name in zip(self.embed, self.inputs, strict=True)]).sum(0)
        frames = frames + self._positions(frames.shape[1])
        # Called, not read: ZeRO-3 gathers a weight where its layer is called.
        queries = self.queries(torch.arange(2, device=frames.device)).expand(len(frames), -1, -1)
        mean, log_variance = self.encoder(torch.cat([queries, frames], dim=1))[:, :2].unbind(1)
        return self.mean(mean).float(), self.log_variance(log_variance).float()

    def _decode(self, latent: Tensor, frames: int) -> dict[str, Tensor]:
        """(batch, latent) -> attributes (batch, frames, 25) and coefficients (batch, frames, 58); every frame's position asks."""
        memory = self.memory(latent.to(self.memory.weight.dtype))[:, None]
        decoded = self.decoder(self._positions(frames).expand(len(memory), -1, -1), memory)
        targets = {name: head(decoded) for name, head in self.heads.items()}
        return targets | {"attributes": bounded(targets["attributes"])} if self.bounded else targets

    def _positions(self, frames: int) -> Tensor:
        """A sinusoid for each frame, (frames, model.width)."""
        weight = self.memory.weight
        return sinusoid(torch.arange(frames, device=weight.device), self.model_width).to(weight.dtype)
