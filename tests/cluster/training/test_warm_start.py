"""Warm starts: from a finished run, from the authors' files, and what is refused before any work."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from cluster.config.loading import load
from cluster.config.paths import anchored
from cluster.config.schema import Experiment
from cluster.runs import checkpoint
from cluster.runs.export import load_weights
from cluster.runs.saved import open_run
from cluster.storage import StorageError, open_store
from cluster.training.warm_start import check_warm_start, first_weights
from reactdiff.data.sample import StreamSpec
from reactdiff.model.published import load_published
from reactdiff.stage import LATENT, Source, Stage, build, stage, stages_over
from tests.cluster.support.training import train_on
from tests.reactdiff.model.published import write_files
from tests.reactdiff.model.rule import DATA, Case
from tests.tiny import tiny

STAGES = ("autoencoder", "diffusion")


def kinds(experiment: Experiment, source: Source) -> Mapping[str, Stage]:
    return stages_over(source, experiment.model, experiment.diffusion)


def nothing_said(text: str) -> None:
    raise AssertionError(text)


def parameters(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def started(kind: Stage, name: str, experiment: Experiment, say: Callable[[str], None]) -> dict[str, torch.Tensor]:
    """What all parameters of a stage begin with."""
    weights = first_weights(kind, name, experiment, say)
    with torch.device("meta"):
        names = [name for name, _ in kind.module().named_parameters()]
    return {name: weights(name) for name in names}


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return bool(ours) and all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_every_weight_of_a_finished_run_is_taken_but_its_latents_range_is_not(finished: Path) -> None:
    parent, store = open_run(str(finished), ""), finished.parent.parent
    for where in (str(finished), "tiny"):
        experiment = tiny("shards", store, "seed=1", f"model.init_from=[{where}]")
        said: list[str] = []
        for name in STAGES:
            export = parent.export(name)
            theirs = load_weights(parent.store, export)
            assert same(started(export.kind, name, experiment, said.append), theirs)
            assert not same(started(export.kind, name, tiny("shards", store, "seed=1"), nothing_said), theirs)
            assert f"stage {name} starts from run {finished} at progress 40, weights {export.hash}" == said[-1]
        assert "minimum" in theirs and "minimum" not in started(export.kind, name, experiment, lambda _: None)
        source = Source(parent.clips.stream_specs, parent.clips.frames)
        assert check_warm_start(experiment, kinds(experiment, source)) == said and len(said) == 2


def test_training_begins_with_the_weights_and_resumes_from_its_own(finished: Path, shards: Path, tmp_path: Path) -> None:
    parent = open_run(str(finished), "")
    theirs = load_weights(parent.store, parent.export("autoencoder"))
    settings = (f"model.init_from=[{finished}]", "optim.weight_decay=0")

    def trained(folder: str, rate: str, epochs: float, life: int = 1) -> dict[str, torch.Tensor]:
        run = tmp_path / folder
        train_on(1, tiny(shards, run, *settings, f"optim.lr={rate}", f"optim.epochs={epochs}"), run, life)
        store = open_store(str(run))
        newest = checkpoint.read_manifest(store, checkpoint.list_checkpoints(store, "autoencoder")[0])
        return checkpoint.assemble(store, newest, "master")

    assert same(trained("still", "1e-30", 0.3), theirs)  # a rate too small to move a weight
    assert not same(trained("moved", "1e-2", 0.3), theirs)
    assert same(trained("moved", "1e-2", 0.6, life=2), trained("at once", "1e-2", 0.6))


@pytest.fixture(scope="module")
def authors(tmp_path_factory: pytest.TempPathFactory) -> tuple[Case, tuple[Path, Path, Path]]:
    """A parity fixture's widths, and the authors' files of them."""
    case = Case(DATA / "parity_small.npz")
    bound = torch.full((case.frames, case.latent), 3.0)
    return case, write_files(case, tmp_path_factory.mktemp("authors"), -bound, bound)


def experiment_of(case: Case, *files: Path, **model: object) -> Experiment:
    widths = {name: getattr(case.model, name) for name in ("hidden", "latent", "channels", "condition")} | model
    return load(None, [f"model.init_from=[{','.join(map(str, files))}]", *(f"model.{name}={value}" for name, value in widths.items())])


def kind_of(case: Case, experiment: Experiment, name: str) -> Stage:
    streams = case.streams if name == "autoencoder" else [StreamSpec(LATENT, "latent", case.latent)]
    return stage(name, experiment.model, experiment.diffusion, Source(streams, case.frames))


def test_the_authors_files_give_the_weights_of_their_import(authors: tuple[Case, tuple[Path, Path, Path]]) -> None:
    case, files = authors
    experiment = experiment_of(case, *files)
    process = experiment.diffusion.model_copy(update={"normalisation": "frame"})
    made = load_published(experiment.model, process, case.streams, *files)
    said: list[str] = []
    for name, theirs in zip(STAGES, (made.autoencoder, made.diffusion), strict=True):
        assert same(started(kind_of(case, experiment, name), name, experiment, said.append), parameters(theirs))
    assert (
        said
        == check_warm_start(experiment, kinds(experiment, Source(case.streams, case.frames)))
        == [
            f"stage autoencoder starts from the authors' {files[0]}",
            f"stage diffusion starts from the authors' {files[1]} and {files[2]}",
        ]
    )


def test_without_a_projector_the_condition_starts_untrained_and_this_is_said(authors: tuple[Case, tuple[Path, Path, Path]]) -> None:
    case, files = authors
    experiment = experiment_of(case, *files[:2])
    kind, said = kind_of(case, experiment, "diffusion"), list[str]()
    untouched = started(kind, "diffusion", load(None, [f"seed={experiment.seed}"]), nothing_said)
    for name, value in started(kind, "diffusion", experiment, said.append).items():
        if name.startswith(("condition.", "denoiser.")) and untouched[name].any():
            assert torch.equal(value, untouched[name]) == name.startswith("condition."), name
    assert "THE CONDITION IS UNTRAINED" in said[0]
    assert said == check_warm_start(experiment, kinds(experiment, Source(case.streams, case.frames)))[1:]


def test_a_stage_without_a_file_and_a_run_without_init_from_keep_their_initial_weights(
    authors: tuple[Case, tuple[Path, Path, Path]],
) -> None:
    case, files = authors
    experiment = experiment_of(case, files[0])
    kind, said = kind_of(case, experiment, "diffusion"), list[str]()
    without = started(kind, "diffusion", load(None), nothing_said)
    assert same(without, parameters(build(kind, load(None).seed)))
    assert same(started(kind, "diffusion", experiment, said.append), without)
    assert said == ["stage diffusion starts from its keyed initialisation: model.init_from has no STAGE2.pth"]
    assert check_warm_start(load(None), {}) == []


def test_weights_of_a_run_that_do_not_fit_are_refused_with_the_parameter_and_both_shapes(finished: Path) -> None:
    source = Source(open_run(str(finished), "").clips.stream_specs, 100)
    for override, rule in (
        ("model.latent=32", r"encoder\.map\.3\.weight of run .* has shape \(16, 64\), but here it is \(32, 64\)"),
        ("model.inter_depth=3", r"do not fit this model: \d+ missing \['encoder\.inter\.2\..*0 unknown"),
    ):
        experiment = tiny("shards", "store", f"model.init_from=[{finished}]", override)
        kind = stage("autoencoder", experiment.model, experiment.diffusion, source)
        with pytest.raises(ValueError, match=rule):
            first_weights(kind, "autoencoder", experiment, nothing_said)


def test_authors_weights_that_do_not_fit_are_refused_with_the_file_the_parameter_and_both_shapes(
    authors: tuple[Case, tuple[Path, Path, Path]],
) -> None:
    case, files = authors
    experiment = experiment_of(case, *files, latent=16)
    with pytest.raises(ValueError, match=rf"^{files[0]}: .*\.weight has shape \(32, 128\), but encoder\.map\.3\.weight is \(16, 128\)"):
        first_weights(kind_of(case, experiment, "autoencoder"), "autoencoder", experiment, nothing_said)


def test_damaged_weights_of_a_parent_are_refused(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, run := tmp_path / "runs" / "tiny", ignore=shutil.ignore_patterns("checkpoints", "evaluation"))
    export = open_run(str(run), "").export("autoencoder")
    save_file({"w": torch.zeros(1)}, run / "exports" / "autoencoder" / f"{export.hash}.safetensors")
    with pytest.raises(StorageError, match="it is damaged"):
        first_weights(export.kind, "autoencoder", tiny("shards", tmp_path, "model.init_from=[tiny]"), nothing_said)


def test_a_wrong_source_is_refused_before_any_work(authors: tuple[Case, tuple[Path, Path, Path]], tmp_path: Path) -> None:
    case, files = authors
    store, source = f"run.store={tmp_path}", Source(case.streams, case.frames)
    for names, rule in (
        (["none"], f"there is no run at {tmp_path}/runs/none"),
        ([files[0], tmp_path / "none.pth"], f"there is no file {tmp_path}/none.pth"),
        ([files[0], "run"], r"give it one finished run \(name, folder or URL\), or the authors' files STAGE1"),
        (["run", "other"], "give it one finished run"),
    ):
        with pytest.raises(ValueError, match=rule):
            experiment = load(None, [store, f"model.init_from=[{','.join(map(str, names))}]"])
            check_warm_start(experiment, kinds(experiment, source))
    (tmp_path / "cut.pth").write_bytes(files[0].read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"cut\.pth is cut off"):
        check_warm_start(cut := experiment_of(case, tmp_path / "cut.pth"), kinds(cut, source))
    with pytest.raises(ValueError, match=r"model\.blocks is 3, but the authors' weights are of 2"):
        check_warm_start(deeper := experiment_of(case, *files, blocks=3), kinds(deeper, source))


def test_an_autoencoder_that_is_taken_from_elsewhere_needs_none_of_the_parent(authors: tuple[Case, tuple[Path, Path, Path]]) -> None:
    case, files = authors
    experiment = experiment_of(case, *files)
    elsewhere = experiment.model_copy(update={"run": experiment.run.model_copy(update={"autoencoder": "another"})})
    over = kinds(experiment, Source(case.streams, case.frames))
    assert check_warm_start(elsewhere, over) == check_warm_start(experiment, over)[1:]


def test_files_and_folders_are_found_from_any_process_and_a_run_s_name_stays_a_name() -> None:
    for names in (["a.pth", "b/c.pth"], ["runs/tiny"], ["tiny"], ["s3://bucket/store/runs/tiny"]):
        absolute = anchored(load(None, [f"model.init_from=[{','.join(names)}]"])).model.init_from
        here = [name if name == "tiny" or "://" in name else str(Path.cwd() / name) for name in names]
        assert list(absolute) == here
