"""The authors' files: every name they hold is known, and filling from them is filling by the rule."""

import ast

import pytest
import torch

from reactdiff.config import Diffusion, Model
from reactdiff.model.authors import UNUSED, Sources, autoencoder_sources, denoiser_sources, load_authors, projector_sources
from reactdiff.model.autoencoder import Autoencoder
from reactdiff.model.latent_diffusion import LatentDiffusion
from reactdiff.model.shapes import parameters_by_module
from tests.reactdiff.model.rule import DATA, authors_streams
from tests.reactdiff.model.small import MODEL, STREAMS, latent_diffusion
from tests.reactdiff.model.small import autoencoder as small_autoencoder

UNUSED_PARAMETERS = 280_320


def authors_shapes(stage: str) -> dict[str, tuple[int, ...]]:
    lines = [line.split(" ", 2) for line in (DATA / "state_dict_keys.txt").read_text().splitlines()]
    return {name: ast.literal_eval(shape) for prefix, name, shape in lines if prefix == stage}


@pytest.fixture(scope="module")
def full() -> tuple[Autoencoder, LatentDiffusion]:
    with torch.device("meta"):
        return Autoencoder(Model(), authors_streams()), LatentDiffusion(Model(), Diffusion(), 750)


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_parameters_at_the_authors_widths_are_as_many_as_theirs(full: tuple[Autoencoder, LatentDiffusion]) -> None:
    autoencoder, diffusion = full
    assert count(autoencoder) == 124_986_707 - UNUSED_PARAMETERS == 124_706_387
    assert count(diffusion.denoiser) == 404_312_626
    assert count(diffusion.condition) == 13_110_272


def test_parameters_by_module_add_up(full: tuple[Autoencoder, LatentDiffusion]) -> None:
    for module in full:
        parts = dict(parameters_by_module(module))
        assert sum(parts.values()) == count(module)
    assert parts["denoiser.middle"] == count(full[1].denoiser.middle) and parts["condition.1"] == 50 * 256 * 1024 + 1024


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_every_name_in_the_authors_files_is_used_once_or_known_to_be_unused(full: tuple[Autoencoder, LatentDiffusion], stage: str) -> None:
    module, sources = (
        (full[0], autoencoder_sources(full[0])) if stage == "stage1" else (full[1].denoiser, denoiser_sources(full[1].denoiser))
    )
    theirs = authors_shapes(stage)
    unused = [name for name in theirs if UNUSED.fullmatch(name)]
    assert sorted(name for names in sources.values() for name in names) == sorted(set(theirs) - set(unused))
    assert sum(torch.empty(theirs[name], device="meta").numel() for name in unused) == (UNUSED_PARAMETERS if stage == "stage1" else 0)
    for name, parameter in module.named_parameters():
        stacked = [theirs[source] for source in sources[name]]
        shape = (sum(shape[0] for shape in stacked), *stacked[0][1:])
        assert shape in (tuple(parameter.shape), (*parameter.shape, 1)), name


def authors_state(module: torch.nn.Module, sources: Sources) -> dict[str, torch.Tensor]:
    state = {}
    for name, parameter in module.named_parameters():
        for part, source in zip(parameter.detach().chunk(len(sources[name])), sources[name], strict=True):
            state[source] = part.clone()
    return state


def test_a_denoiser_is_filled_from_the_authors_names() -> None:
    theirs, ours = latent_diffusion().denoiser, LatentDiffusion(MODEL, Diffusion(), 50).denoiser
    sources = denoiser_sources(ours)
    state = authors_state(theirs, sources)
    state |= {name: state[name][:, :, None] for name in state if name.endswith(("qkv.weight", "proj_out.weight"))}
    assert load_authors(ours, sources, state) == []
    assert all(torch.equal(parameter, theirs.get_parameter(name)) for name, parameter in ours.named_parameters())


@pytest.mark.parametrize("prefix", ["", "linear."])
def test_a_projector_is_filled_under_either_of_its_names(prefix: str) -> None:
    theirs, ours = latent_diffusion().condition, LatentDiffusion(MODEL, Diffusion(), 50).condition
    state = {f"{prefix}{name}": parameter for name, parameter in theirs.state_dict().items()}
    load_authors(ours, projector_sources(state), state)
    assert all(torch.equal(parameter, theirs.get_parameter(name)) for name, parameter in ours.named_parameters())


def test_weights_the_authors_never_use_are_ignored_with_a_word() -> None:
    ours = small_autoencoder()
    sources = autoencoder_sources(ours)
    unused = ["Behaviour_features_fusion.video_audio_fusion.0.norm2.weight", "reaction_decoder.encoder.MLP.0.bias"]
    state = authors_state(ours, sources) | {name: torch.zeros(3) for name in unused}
    assert load_authors(Autoencoder(MODEL, STREAMS), sources, state) == unused


def test_a_file_that_does_not_fit_is_refused_by_name() -> None:
    denoiser = latent_diffusion().denoiser
    sources = denoiser_sources(denoiser)
    state = authors_state(denoiser, sources)
    with pytest.raises(ValueError, match=r"1 missing \['out\.2\.bias'\], 1 unknown \['surprise'\]"):
        load_authors(
            denoiser, sources, {name: value for name, value in state.items() if name != "out.2.bias"} | {"surprise": torch.zeros(1)}
        )
    with pytest.raises(ValueError, match=r"out\.2\.bias has shape \(3,\), but out\.bias is \(50,\)"):
        load_authors(denoiser, sources, state | {"out.2.bias": torch.zeros(3)})
