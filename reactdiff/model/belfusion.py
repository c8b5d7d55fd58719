"""The challenges' baseline BeLFusion: a Gaussian latent for each window of behaviour, and an MLP that denoises it given the speaker's.

After Barquero et al. (ICCV 2023), as the REACT challenges set it up. Stage 1 is a recurrent variational autoencoder of windows of
50 frames of attributes; stage 2 draws the listener's latent of a window given the speaker's of the same one (online: of the one before).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from reactdiff import config
from reactdiff.clip import TARGETS, WINDOW, windows_of
from reactdiff.data.sample import StreamSpec
from reactdiff.model.codec import Codec
from reactdiff.model.decoder import bounded
from reactdiff.model.layers import ZeroLinear, divergence, last_state, reparameterised, unrolled
from reactdiff.model.unet import sinusoid

KL_WEIGHT = 1e-3
"""Weight of the divergence, a mean over the latent's features, beside 10 times the error of the reconstruction."""


class BehaviourVAE(Codec):
    """Stage 1: a variational autoencoder (GRU each way) of windows of 50 frames of attributes.

    The latent of a window has 50 `model.latent` features; an encoded frame is its share of them, so the latent of a window is one with
    those of a frame in any other family. What is kept is the mean of the posterior.

    Args:
        model: the state's width (`model.hidden`), the latent's, and whether attributes are bounded.
        streams: not read; the targets are all that it needs.

    Attributes:
        width: of one frame of the encoding.
    """

    def __init__(self, model: config.Model, streams: Sequence[StreamSpec]):
        super().__init__()
        features = TARGETS["attributes"]
        self.widths, self.width, self.bounded = {"attributes": features}, model.latent, model.bounded
        self.encoder = nn.GRUCell(features, model.hidden)
        self.mean = nn.Linear(model.hidden, WINDOW * model.latent)
        self.log_variance = nn.Linear(model.hidden, WINDOW * model.latent)
        self.memory = nn.Linear(WINDOW * model.latent, model.hidden)
        self.decoder = nn.GRUCell(model.hidden, model.hidden)
        self.out = nn.Linear(model.hidden, features)

    def encode(self, streams: dict[str, Tensor]) -> Tensor:
        """The attributes (batch, frames, 25) to means of the posterior (batch, frames, latent), float32.

        Raises:
            ValueError: if the frames do not divide into windows.
        """
        mean, _ = self._posterior(streams["attributes"])
        return mean.unflatten(2, (WINDOW, -1)).flatten(1, 2)

    def decode(self, encoding: Tensor) -> dict[str, Tensor]:
        """Encodings (batch, frames, latent) to attributes (batch, frames, 25); there are no coefficients."""
        latent = encoding.unflatten(1, (windows_of(encoding.shape[1]), WINDOW)).flatten(2)
        return {"attributes": self._reconstruct(latent)}

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """10 MSE of the attributes + KL_WEIGHT KL(q || N(0, 1)) of each item, in float32.

        Args:
            batch: `attributes` (batch, frames, 25), and `noise` (batch, windows, 50 latent), standard normal.

        Returns:
            (batch,); an empty batch has an empty loss, through which zeros flow back.
        """
        mean, log_variance = self._posterior(batch["attributes"])
        output = self._reconstruct(reparameterised(mean, log_variance, batch["noise"]))
        error = (output.float() - batch["attributes"].float()).square().mean((1, 2))
        return 10 * error + KL_WEIGHT * divergence(mean, log_variance).mean((1, 2))

    forward = loss

    def _posterior(self, attributes: Tensor) -> tuple[Tensor, Tensor]:
        """(batch, frames, 25) -> mean and log-variance of each window's latent, (batch, windows, 50 latent) float32."""
        windows = attributes.to(self.out.weight.dtype).unflatten(1, (windows_of(attributes.shape[1]), WINDOW))
        state = last_state(self.encoder, windows.flatten(0, 1)).unflatten(0, windows.shape[:2])
        return self.mean(state).float(), self.log_variance(state).float()

    def _reconstruct(self, latent: Tensor) -> Tensor:
        """(batch, windows, 50 latent) -> attributes (batch, frames, 25)."""
        heard = self.memory(latent.to(self.out.weight.dtype)).flatten(0, 1)
        frames = self.out(unrolled(self.decoder, heard, WINDOW)).unflatten(0, latent.shape[:2]).flatten(1, 2)
        return bounded(frames) if self.bounded else frames


class WindowMLP(nn.Module):
    """Stage 2's denoiser: an MLP over the latent of a window, after Preechakul et al. (2022).

    Every layer sees the latent again beside the layer before. Each is Linear, LayerNorm, a factor from time and speaker, SiLU; the output
    starts at zero.

    Args:
        model: widths of latent and layers, and their number.
    """

    def __init__(self, model: config.Model):
        super().__init__()
        features, self.width = WINDOW * model.latent, model.width
        self.time = nn.Sequential(nn.Linear(model.width, model.width), nn.SiLU(), nn.Linear(model.width, model.width))
        self.first = nn.Linear(features, model.width)
        self.layers = nn.ModuleList(nn.Linear(model.width + features, model.width) for _ in range(model.layers - 1))
        self.norms = nn.ModuleList(nn.LayerNorm(model.width) for _ in range(model.layers))
        self.factors = nn.ModuleList(nn.Linear(model.width, model.width) for _ in range(model.layers))
        self.out = ZeroLinear(model.width + features, features)

    def forward(self, noisy: Tensor, times: Tensor, speaker: Tensor) -> Tensor:
        """Denoise each window.

        Args:
            noisy: (batch, 50, latent).
            times: (batch,), integers or fractions.
            speaker: what `speaker_window` makes of the speaker's window, (batch, model.width).

        Returns:
            The prediction, (batch, 50, latent), in the precision of the weights.
        """
        dtype = self.out.weight.dtype
        told = nn.functional.silu(self.time(sinusoid(times, self.width).to(dtype)) + speaker.to(dtype))
        latent = noisy.to(dtype).flatten(1)
        state = self.first(latent)
        for number, (norm, factor) in enumerate(zip(self.norms, self.factors, strict=True)):
            if number:
                state = self.layers[number - 1](torch.cat((state, latent), dim=1))
            state = nn.functional.silu(norm(state) * (1 + factor(told)))
        return self.out(torch.cat((state, latent), dim=1)).view_as(noisy)


def speaker_window(model: config.Model) -> nn.Sequential:
    """The condition: the latent of the speaker's window (batch, 50, latent) to (batch, model.width)."""
    return nn.Sequential(nn.Flatten(), nn.Linear(WINDOW * model.latent, model.width))
