"""Configuration: one typed tree, dotted overrides, and an identity that placement does not touch."""

from pathlib import Path

import pytest

from cluster.config.identity import digest, ends, identity
from cluster.config.loading import ConfigError, fields, help_text, load, to_yaml


def test_overrides_reach_any_leaf_and_a_bare_value_sets_both_stages(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("optim: {lr: {diffusion: 2e-3}}\nmodel: {hidden: 64}\n")
    experiment = load(file, ["optim.batch=4", "optim.lr.autoencoder=1e-3", "diffusion.schedule=linear", "run.name=first"])
    assert (experiment.optim.lr["autoencoder"], experiment.optim.lr["diffusion"]) == (1e-3, 2e-3)
    assert (experiment.optim.batch["autoencoder"], experiment.optim.batch["diffusion"]) == (4, 4)
    assert (experiment.model.hidden, experiment.diffusion.schedule, experiment.run.name) == (64, "linear", "first")


def test_what_was_written_is_what_is_read(tmp_path: Path) -> None:
    experiment = load(None, ["optim.lr=1e-4", "model.multipliers=[1,2]", "workers.zero=3"])
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(experiment))
    assert load(file) == experiment


def test_identity_changes_with_science_and_not_with_placement() -> None:
    base = digest(identity(load(None)))
    for change in ("seed=1", "optim.lr=1e-3", "model.inter_depth=1", "data.block=8", "optim.precision=bf16"):
        assert digest(identity(load(None, [change]))) != base, change
    for change in ("workers.count=8", "workers.zero=3", "data.url=s3://b/x", "run.store=far", "evaluation.split=test", "optim.epochs=3"):
        assert digest(identity(load(None, [change]))) == base, change
    assert ends(load(None, ["optim.epochs=3"]))["optim.epochs"] == {"autoencoder": 3, "diffusion": 3}


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("optim.warm_up=3", r"no key optim.warm_up; did you mean optim.warmup\?"),
        ("modle.hidden=3", r"no key modle; did you mean model\?"),
        ("optim.lr.autoencodr=1", "did you mean optim.lr.autoencoder"),
        ("optim.lr=-1", r"optim.lr.autoencoder is -1.0, but must be greater than 0"),
        ("optim.lr=fast", "optim.lr.autoencoder = 'fast'"),
        ("workers.zero=4", "workers.zero = 4: Input should be 0, 1, 2 or 3"),
        ("data=3", "data is a branch with keys url"),
        ("optim.precision=bf16 workers.zero=0", "set workers.zero=1"),
        ("diffusion.autoguidance=2", r"weak_progress 0, but the one needs the other"),
        ("diffusion.weak_progress=800", r"autoguidance is 1\.0 and diffusion\.weak_progress 800"),
        (
            "diffusion.autoguidance=2 diffusion.weak_progress=800 diffusion.guidance=2 diffusion.condition_dropout=0.1",
            "use one of them",
        ),
        ("diffusion.ema_length=0.1", r"ema_length is 0\.1, but .* set diffusion\.ema_every, a tenth of the stage's items"),
        ("diffusion.guidance=3", r"never trained without the speaker cannot be guided: set diffusion\.condition_dropout"),
        ("model.family=perfrdiff", "online by construction: set model.online=true"),
        ("model.family=perfrdiff model.online=true model.bounded=true", "no heads to bound"),
        ("model.denoiser=transformer model.space=attributes model.bounded=true", r"no heads to bound: set model\.bounded=false"),
        ("diffusion.weighting=elbo diffusion.times=log-normal", r"only where all times are alike: set diffusion\.times=uniform"),
        ("model.family=trans-vae model.online=true", "hears the whole clip"),
        ("model.family=trans-vae model.denoiser=transformer", "no choice of denoiser"),
        ("model.family=trans-vae diffusion.sampler=ddpm diffusion.steps=50", "defaults diffusion.steps=20 diffusion.sampler=ddim"),
        ("model.chunk=10", r"model\.chunk is 10, which only the transformer denoiser takes: set model\.denoiser=transformer"),
        (
            "model.family=perfrdiff model.online=true model.bounded=false model.chunk=10",
            r"takes: set model\.family=reactdiff model\.denoiser=transformer",
        ),
        ("diffusion.level=1", r"diffusion\.level is 1\.0, but uniform times have no such level: set diffusion\.times=log-normal"),
        ("model.space=attributes", r"model\.space is attributes, which only the transformer denoiser takes"),
        ("model.denoiser=transformer model.chunk=10", r"has no chunks: set model\.online=true"),
        ("model.denoiser=transformer model.online=true model.chunk=20", "must divide the 50 frames of a window: 1, 2, 5, 10, 25 or 50"),
        ("model.denoiser=transformer model.online=true model.chunk=10 model.patch=4", "must divide the 10 frames"),
        ("model.denoiser=transformer model.patch=5 model.lags=[7]", r"must be multiples of model\.patch=5"),
        ("diffusion.smoothing=0.6", r"of a transformer: set model\.denoiser=transformer"),
        ("model.denoiser=transformer diffusion.smoothing=0.6", r"tokens of one frame .* meet nowhere: set diffusion\.smoothing=0"),
        ("model.denoiser=transformer diffusion.history=clean", r"set model\.online=true"),
        ("diffusion.history_swap=0.1", r"only a clean history has: set diffusion\.history=clean"),
        ("diffusion.hidden_streams=[mfcc]", r"always heard all streams cannot do without one: set diffusion\.stream_dropout"),
        (
            "model.denoiser=transformer model.space=attributes diffusion.stream_dropout=0.2 diffusion.hidden_streams=[ears]",
            r"names 'ears', but the model hears",
        ),
        ("diffusion.stream_dropout=0.1", r"set model\.space=attributes, or"),
        ("model.denoiser=transformer model.space=attributes run.autoencoder=a", "no first stage: leave it out"),
        ("model.facial=[] model.acoustic=[]", "name at least one stream"),
        ("data.cache=s3://bucket/cache", r"data\.cache is 's3://bucket/cache', but .* set data\.cache=/local/disk/reactdiff"),
        ("data.cache=file:///tmp/cache", "on each node's own disk"),
        ("seed", "write key=value"),
        ("workers.labels={pool:", r"'workers\.labels=\{pool:' is no override: .* needs quotes around spaces"),
    ],
)
def test_a_wrong_override_is_refused_in_a_sentence_that_names_it(override: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        load(None, override.split())
    assert "\n" not in str(caught.value)


def test_a_wrong_key_in_a_file_names_the_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("optim: {learning: 3}\n")
    with pytest.raises(ConfigError, match=r"mine.yaml: there is no key optim.learning"):
        load(file)
    with pytest.raises(ConfigError, match="no configuration file"):
        load(tmp_path / "absent.yaml")
    file.write_text("- 1\n")
    with pytest.raises(ConfigError, match="is a mapping of branches"):
        load(file)


def test_help_explains_every_field_with_a_sentence() -> None:
    text = help_text()
    for name, info, _ in fields():
        assert f"  {name} = " in text
        assert info.description.endswith("."), name
        assert info.json_schema_extra["kind"] in ("identity", "placement", "end"), name
