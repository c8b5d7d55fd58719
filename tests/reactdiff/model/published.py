"""The authors' files, made by the rule: containers as they publish them, with names of theirs that nothing reads."""

from pathlib import Path

import torch
from torch import Tensor, nn

from reactdiff.model.published import Sources, autoencoder_sources, denoiser_sources, projector_of, projector_sources
from tests.reactdiff.model.rule import Case

UNUSED = ("Behaviour_features_fusion.video_audio_fusion.0.norm2.weight", "reaction_decoder.encoder.MLP.0.bias")


def authors_state(module: nn.Module, sources: Sources) -> dict[str, Tensor]:
    """A module's parameters under the authors' names; their 1x1 convolutions of the UNet have an axis more."""
    state = {}
    for name, parameter in module.named_parameters():
        for part, source in zip(parameter.detach().chunk(len(sources[name])), sources[name], strict=True):
            convolution = source.endswith(("qkv.weight", "proj_out.weight"))
            state[source] = part[:, :, None].clone() if convolution else part.clone()
    return state


def write_files(case: Case, folder: Path, minimum: Tensor, maximum: Tensor) -> tuple[Path, Path, Path]:
    """STAGE1.pth with this range, (frames, latent) each, STAGE2.pth and PROJECTOR.pth."""
    autoencoder, diffusion = case.autoencoder(), case.latent_diffusion()
    projector, denoiser = projector_of(diffusion), diffusion.denoiser
    stages: list[dict[str, Tensor]] = []
    for module, sources, prefix in (
        (autoencoder, autoencoder_sources(autoencoder), "stage1"),
        (denoiser, denoiser_sources(denoiser), "stage2"),
        (projector, projector_sources({}), "projector"),
    ):
        case.fill(module, sources, prefix)
        stages.append(authors_state(module, sources))
    stages[0] |= {name: torch.zeros(3) for name in UNUSED}
    optimizer = {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 1e-4, "params": [0]}]}
    statistics = {"min": minimum, "max": maximum} | {name: torch.zeros_like(minimum) for name in ("mean", "std", "var")}
    contents = (
        {"epoch": 200, "state_dict": stages[0], "optimizer": optimizer, "statistics": statistics},
        {"epoch": 200, "state_dict": stages[1], "optimizer": optimizer},
        {f"linear.{name}": value for name, value in stages[2].items()},
    )
    paths = (folder / "STAGE1.pth", folder / "STAGE2.pth", folder / "PROJECTOR.pth")
    for path, content in zip(paths, contents, strict=True):
        torch.save(content, path)
    return paths
