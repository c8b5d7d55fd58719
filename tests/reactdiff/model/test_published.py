"""The authors' files: every name they hold is known, and both models out of them compute what the authors' modules do."""

import ast
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from reactdiff.clip import WINDOW
from reactdiff.config import Diffusion, Model
from reactdiff.model.autoencoder import Autoencoder
from reactdiff.model.init import initialise
from reactdiff.model.latent_diffusion import LatentDiffusion
from reactdiff.model.pth import read_pth
from reactdiff.model.published import (
    UNUSED,
    autoencoder_sources,
    denoiser_sources,
    load_authors,
    load_published,
    projector_of,
    projector_sources,
)
from reactdiff.model.shapes import parameters_by_module
from tests.reactdiff.model.published import UNUSED as UNUSED_NAMES
from tests.reactdiff.model.published import authors_state, write_files
from tests.reactdiff.model.rule import DATA, Case, authors_streams
from tests.reactdiff.model.small import MODEL, STREAMS, latent_diffusion
from tests.reactdiff.model.small import autoencoder as small_autoencoder
from tests.reactdiff.model.test_parity import CONDITION_TOLERANCE

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


def test_a_denoiser_is_filled_from_the_authors_names() -> None:
    theirs, ours = latent_diffusion().denoiser, LatentDiffusion(MODEL, Diffusion(), 50).denoiser
    sources = denoiser_sources(ours)
    state = authors_state(theirs, sources)
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


PROCESS = Diffusion(normalisation="frame")


@pytest.fixture(scope="module")
def case() -> Case:
    return Case(DATA / "parity_small.npz")


@pytest.fixture(scope="module")
def files(case: Case, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """The authors' three files by the rule, for latents that lie in [-1, 1] already."""
    bound = torch.ones(case.frames, case.latent)
    return write_files(case, tmp_path_factory.mktemp("authors"), -bound, bound)


@torch.no_grad()
def test_models_out_of_the_files_compute_what_the_authors_modules_compute(case: Case, files: tuple[Path, Path, Path]) -> None:
    """Widths are not told: they are the files'."""
    made = load_published(Model(), PROCESS, case.streams, *files)
    assert made.projector and made.ignored == list(UNUSED_NAMES)
    outputs = {"latent": made.autoencoder.encode({s.name: case.input(s.name, 1, case.frames, s.width) for s in case.streams})}
    outputs |= made.autoencoder.decode(outputs["latent"])
    speaker, noise = (case.input(name, case.frames // WINDOW, WINDOW, case.latent) for name in ("speaker_latent", "noise"))
    outputs["condition"] = condition = projector_of(made.diffusion)(speaker)
    for time in (0, 7, 19):
        outputs[f"epsilon_t{time}"] = made.diffusion.denoiser(noise, torch.full((len(noise),), time), condition)
    sample = made.diffusion.sample(speaker.reshape(1, case.frames, case.latent), lambda _: noise[None, None])
    distance = {name: float(np.abs(output.numpy() - case.expected[name]).max()) for name, output in outputs.items()}
    assert distance.pop("condition") < CONDITION_TOLERANCE
    assert distance == pytest.approx(dict.fromkeys(distance, 0), abs=1e-5) and len(distance) == 6
    assert np.abs(sample.numpy().reshape(noise.shape) - case.expected["ddim20_sample"]).max() < 1e-3  # as in test_parity


def test_the_latents_range_is_that_of_the_statistics(case: Case, tmp_path: Path) -> None:
    low = case.input("speaker_latent", case.frames, case.latent)
    files = write_files(case, tmp_path, low, low + 2)
    diffusion = load_published(Model(), PROCESS, case.streams, *files).diffusion
    assert torch.equal(diffusion.minimum, low) and torch.equal(diffusion.maximum, low + 2)


def test_without_a_projector_the_condition_has_the_keyed_initial_weights_and_the_import_says_so(
    case: Case, files: tuple[Path, Path, Path]
) -> None:
    made = load_published(Model(), PROCESS, case.streams, *files[:2], seed=3)
    untrained = LatentDiffusion(case.model, PROCESS, case.frames)
    initialise(untrained, 3)
    assert not made.projector
    assert all(
        torch.equal(value, untrained.state_dict()[name]) for name, value in made.diffusion.state_dict().items() if "condition" in name
    )


def test_names_of_data_parallel_are_read_without_their_prefix(case: Case, files: tuple[Path, Path, Path], tmp_path: Path) -> None:
    paths = []
    for path in files:
        state = {f"module.{name}": value for name, value in read_pth(path).weights.items()}
        torch.save(dict(read_pth(path).content) | {"state_dict": state}, tmp_path / path.name)
        paths.append(tmp_path / path.name)
    made, plain = (load_published(Model(), PROCESS, case.streams, *which) for which in (paths, files))
    for ours, theirs in ((made.autoencoder, plain.autoencoder), (made.diffusion, plain.diffusion)):
        assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in ours.state_dict().items())


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_file_that_only_unpickling_could_read_is_refused_and_runs_nothing(tmp_path: Path, zipped: bool) -> None:
    class Surprise:
        def __reduce__(self) -> tuple:
            return os.mkdir, (str(tmp_path / "ran"),)

    path = tmp_path / "STAGE1.pth"
    torch.save({"state_dict": {"a": torch.zeros(1)}, "config": Surprise()}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=rf"{path} holds posix.mkdir objects, and only tensors and plain values are read"):
        read_pth(path)
    assert not (tmp_path / "ran").exists()


def test_files_that_are_missing_cut_off_or_hold_no_weights_are_refused_by_name(files: tuple[Path, Path, Path], tmp_path: Path) -> None:
    path, data = tmp_path / "file.pth", files[2].read_bytes()
    with pytest.raises(ValueError, match=rf"there is no file {path}"):
        read_pth(path)
    for size in (0, 1, 100, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:size])
        with pytest.raises(ValueError, match=rf"^{path} (is cut off, damaged|holds no weights of PyTorch)"):
            read_pth(path)
    flipped = bytearray(data)
    weights = read_pth(files[2]).weights
    at = data.index(weights["linear.1.weight"].numpy().tobytes()[:64])
    flipped[at] ^= 1
    path.write_bytes(flipped)
    with pytest.raises(ValueError, match=rf"^{path} is cut off, damaged"):
        read_pth(path)
    for content in ({"epoch": 3}, {"state_dict": {}}, {"state_dict": {"a": 3}}, torch.zeros(2)):
        torch.save(content, path)
        with pytest.raises(ValueError, match=rf"^{path} holds .*but weights are a mapping of names to tensors"):
            read_pth(path)


def test_files_that_do_not_fit_are_refused_by_name(case: Case, files: tuple[Path, Path, Path], tmp_path: Path) -> None:
    stage1, stage2, projector = files
    with pytest.raises(ValueError, match=rf"^{stage1} has no matrix time_embed.*STAGE1.pth STAGE2.pth \[PROJECTOR.pth\] in this order"):
        load_published(Model(), PROCESS, case.streams, stage2, stage1)
    with pytest.raises(ValueError, match=rf"^{stage1}: the authors' weights do not fit this Sequential: 4 missing"):
        load_published(Model(), PROCESS, case.streams, stage1, stage2, stage1)
    with pytest.raises(ValueError, match=rf"^{stage1}: .*fusion_0.q.weight .*give model.\* and the dataset's streams the widths"):
        load_published(Model(), PROCESS, authors_streams(au=95, w2v=48), *files)
    content = dict(read_pth(stage1).content)
    for statistics in (None, {}, {"min": torch.zeros(100, 31), "max": torch.zeros(100, 31)}):
        torch.save(content | {"statistics": statistics}, tmp_path / "s.pth")
        with pytest.raises(ValueError, match=r"s\.pth should hold `statistics` with min and max of the latents, tensors \(frames, 32\)"):
            load_published(Model(), PROCESS, case.streams, tmp_path / "s.pth", stage2, projector)


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"denoiser": "transformer"}, "model.denoiser is 'transformer', but the authors' weights are of 'unet'"),
        ({"intra": False}, "model.intra is False"),
        ({"bounded": True}, "model.bounded is True"),
        ({"blocks": 3}, "model.blocks is 3, but the authors' weights are of 2: set model.blocks to it"),
        ({"multipliers": (1, 2)}, r"model.multipliers is \(1, 2\)"),
        ({"acoustic": ()}, "fuse face and voice by attention: name streams of both"),
    ],
)
def test_a_model_that_the_authors_weights_are_not_of_is_refused_by_field(
    case: Case, files: tuple[Path, Path, Path], change: dict, rule: str
) -> None:
    with pytest.raises(ValueError, match=rule):
        load_published(Model(**change), PROCESS, case.streams, *files)


def test_a_process_that_the_authors_weights_are_not_of_is_refused_by_field(case: Case, files: tuple[Path, Path, Path]) -> None:
    for name, value in (("normalisation", "feature"), ("prediction", "v"), ("steps", 50), ("schedule", "linear")):
        with pytest.raises(ValueError, match=f"diffusion.{name} is {value!r}, but the authors' weights are of"):
            load_published(Model(), PROCESS.model_copy(update={name: value}), case.streams, *files)
