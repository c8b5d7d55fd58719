"""Every command in README.md and docs/ is run, here or by a named test, or is marked *needs a cloud* and checked as far as that goes."""

import ast
import importlib
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from cluster.config.loading import load
from cluster.data.reader import Reader
from cluster.runs.saved import open_run
from cluster.storage import open_store
from tests.tiny import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]+\]\((?!https?:)([^)#\s]*)(#[^)\s]*)?\)")
PROSE = {"python", "yaml", "text", "promql"}
"""Languages of blocks that hold no commands."""

CLOUD = "needs a cloud"

TRAINS = "tests/jobs/test_train.py::test_a_run_ends_done_with_exports_scores_and_curves"
OTHER_RANKS = "tests/cluster/training/test_loop.py::test_saved_on_three_ranks_with_zero_3_goes_on_on_one_rank_with_zero_1"
LONGER = "tests/cluster/training/test_loop.py::test_a_longer_end_goes_on_as_if_it_had_been_longer_from_the_start"
NO_WAIT = "tests/jobs/test_train.py::test_a_run_that_another_driver_is_at_is_left_alone_with_no_wait"
WITHOUT = (
    "tests/cluster/data/test_quarantine.py::test_every_other_step_reads_the_bytes_it_would_have_read_and_the_item_is_missing_in_both_epochs"
)
SWEEP = "tests/jobs/test_tune.py::test_sweep_trains_every_trial_shares_latents_and_leaves_the_best_as_a_configuration"
GIVE_UP = "tests/cluster/studies/test_tuner.py::test_a_command_that_gives_trials_up_enters_them_as_failed_and_goes_on_without"
RETRAIN = "tests/jobs/test_retrain.py::test_a_grown_dataset_brings_a_candidate_that_the_gate_judges_on_the_champion_s_clips"
ROLLBACK = "tests/cluster/runs/test_registry.py::test_rolling_back_is_a_decision_that_goes_to_the_champion_before"
S3 = "tests/cluster/test_whole.py::test_shards_latents_checkpoints_and_runs_in_s3_give_the_weights_of_the_folder"
JOB = "tests/cluster/test_whole.py::test_ray_start_and_job_submit_bring_the_run_to_done"
AGAIN = "tests/infra/test_supervise.py::test_a_command_is_given_again_on_75_and_on_a_kill_and_its_last_code_comes_through"
PROMETHEUS = "tests/cluster/telemetry/test_prometheus.py::test_items_are_exact_over_a_restart_of_the_workers_and_of_the_driver"
MONITOR = "tests/cluster/telemetry/test_prometheus.py::test_monitor_says_where_it_is_and_when_a_sample_has_come"
PROVE = "tests/cluster/chaos/test_prove.py::test_five_kinds_of_faults_of_two_seeds_change_nothing"
INSTALLS = "tests/test_docs.py::test_the_page_installs_what_make_and_the_pins_say"
MAKE = "tests/test_docs.py::test_a_target_that_a_page_names_is_one_of_make"
CI = ".ci/run"
CARD = "tests/cluster/bench/test_card.py::test_all_parts_are_measured_where_hardly_anything_is_installed_and_each_is_kept"
GPUS = "tests/test_docs.py::test_make_asks_for_a_rank_on_each_of_so_many_gpus"
DEMO = "python jobs/train.py --config jobs/configs/demo.yaml data.url=work/shards"

ELSEWHERE = {
    "make train": CI,
    "make test": CI,
    "make train STORE=s3": S3,
    "make train GPU=1": GPUS,
    "make setup": MAKE,
    "python jobs/bench.py gpu": CARD,
    "make check": MAKE,
    DEMO: TRAINS,
    "ray start --head": JOB,
    "ray job submit --working-dir . -- python jobs/train.py --config jobs/configs/demo.yaml "
    "data.url=s3://BUCKET/shards run.store=s3://BUCKET/store workers.count=2": JOB,
    "ray stop": JOB,
    f"python infra/supervise.py -- {DEMO}": AGAIN,
    "python jobs/prove.py --config jobs/configs/demo.yaml data.url=work/shards --seed 0": PROVE,
    "python jobs/tune.py": SWEEP,
    "python jobs/tune.py --give-up 3": GIVE_UP,
    "python jobs/retrain.py": RETRAIN,
    "python jobs/retrain.py --rollback": ROLLBACK,
    f"{DEMO} workers.count=4 workers.zero=3 workers.micro_batch=1": OTHER_RANKS,
    f"{DEMO} optim.epochs.diffusion=12": LONGER,
    f"{DEMO} data.on_corrupt=quarantine": WITHOUT,
    f"{DEMO} --no-wait": NO_WAIT,
    ".venv/bin/pip install --index-url https://download.pytorch.org/whl/cpu torch==2.13.0": INSTALLS,
    ".venv/bin/pip install -c constraints.txt -e '.[dev]'": INSTALLS,
    "make monitor": MONITOR,
    "apt-get update && apt-get install -y --no-install-recommends prometheus": PROMETHEUS,
    "prometheus --config.file=infra/prometheus/prometheus.yml "
    "--storage.tsdb.path=work/prometheus-data --web.listen-address=127.0.0.1:9090": PROMETHEUS,
}
"""Commands that are too slow, or change the machine -> the test that runs the same thing."""

SMALL = {
    ("prepare", "simulate"): ["--clips", "train=8,val=4,gate=4,test=4", "--frames", "50"],
    ("generate",): ["--count", "1", "--split", "test"],
}
"""What makes a command that is run here a small one, appended to it."""


@dataclass(frozen=True)
class Command:
    """A command of a page, without its comment."""

    page: str
    text: str
    cloud: bool

    @property
    def words(self) -> list[str]:
        return shlex.split(self.text)

    @property
    def job(self) -> list[str]:
        """The words after `python jobs/`, the first one without `.py`; empty if it is no job. What a launcher runs comes last."""
        words = self.words
        last = max((at for at, word in enumerate(words) if word == "python"), default=len(words))
        if not (rest := words[last + 1 :]) or not rest[0].startswith("jobs/"):
            return []
        return [rest[0].removeprefix("jobs/").removesuffix(".py"), *rest[1:]]


def commands() -> list[Command]:
    found = []
    for page in PAGES:
        for language, block in FENCE.findall(page.read_text()):
            if language in PROSE:
                continue
            for line in block.replace("\\\n", " ").splitlines():
                text, _, comment = re.sub(r"\s+", " ", line).partition(" # ")
                if text.strip():
                    found.append(Command(page.name, text.strip(), CLOUD in comment))
    return found


COMMANDS = commands()
HERE = [command for command in COMMANDS if not command.cloud and command.text not in ELSEWHERE]


@pytest.fixture(scope="module")
def place(local_ray: object, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The current folder: one that looks like the project, with a small dataset of its own in `work/`."""
    folder = tmp_path_factory.mktemp("docs")
    for name in ("jobs", "infra", "tests", "ray_config.yaml", "Makefile"):
        (folder / name).symlink_to(ROOT / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        simulate = ["prepare", "simulate", "work/tree"]
        assert call(simulate, *small(simulate)) == call(["prepare", "react2024", "work/tree", "work/shards"]) == 0
        (folder / "work/demo").mkdir()
        (folder / "work/demo/shards").symlink_to(folder / "work/shards")
        yield folder


def call(job: list[str], *more: str) -> int:
    """The exit code of `python jobs/JOB.py ARGUMENTS`, in this process."""
    name, *arguments = job
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"jobs/{name}.py", *arguments, *more])
        try:
            return importlib.import_module(f"jobs.{name}").main()
        except SystemExit as error:  # of argparse
            return int(error.code or 0)


def filled(job: list[str], finished: Path) -> list[str]:
    """RUN and KEY replaced by a run and a clip that are there."""
    opened = open_run(str(finished), "")
    key = Reader(open_store(opened.experiment.data.url), opened.clips, "test").key(0)
    return [{"RUN": str(finished), "KEY": key}.get(word, word) for word in job]


def small(job: list[str]) -> list[str]:
    return next((more for start, more in SMALL.items() if tuple(job[: len(start)]) == start), [])


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize("command", HERE, ids=lambda command: command.text)
def test_a_command_does_what_the_page_says(command: Command, finished: Path) -> None:
    known = command.job and command.words[0] == "python"
    assert known, f"{command.page}: no test runs {command.text!r}: run it in {__name__}, map it in ELSEWHERE, or mark it '# {CLOUD}'"
    assert call(filled(command.job, finished), *small(command.job)) == 0


def test_what_is_left_to_ci_is_a_line_of_it() -> None:
    assert {command for command, test in ELSEWHERE.items() if test == CI} <= set((ROOT / CI).read_text().splitlines())


def test_the_page_installs_what_make_and_the_pins_say() -> None:
    installs = [command.words for command in COMMANDS if ELSEWHERE.get(command.text) == INSTALLS]
    assert "torch==2.13.0" in installs[0] and "torch==2.13.0" in (ROOT / "constraints.txt").read_text().splitlines()
    assert " ".join(installs[1][2:]).replace(".[dev]", "'.[dev]'") in (ROOT / "Makefile").read_text()


def test_a_target_that_a_page_names_is_one_of_make() -> None:
    targets = {words[1] for words in (command.words for command in COMMANDS) if words[0] == "make"}
    assert targets >= {"setup", "check", "test"}
    assert targets <= set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


@pytest.mark.starts
def test_make_asks_for_a_rank_on_each_of_so_many_gpus() -> None:
    said = subprocess.run(["make", "-n", "train", "GPU=2"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "jobs/train.py workers.gpu=true workers.count=2" in said


@pytest.mark.parametrize("test", sorted(set(ELSEWHERE.values()) - {CI}))
def test_a_test_that_runs_commands_exists(test: str) -> None:
    path, _, name = test.partition("::")
    functions = [node.name for node in ast.walk(ast.parse((ROOT / path).read_text())) if isinstance(node, ast.FunctionDef)]
    assert name in functions


def test_scores_that_are_kept_are_small_enough_for_a_repository() -> None:
    sizes = {file.name: file.stat().st_size for file in (ROOT / "docs" / "science").glob("*.json")}
    assert [name for name, size in sizes.items() if size >= 1_000_000] == []


def test_no_command_is_mapped_that_no_page_has() -> None:
    assert sorted(set(ELSEWHERE) - {command.text for command in COMMANDS}) == []


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.job and c not in HERE], ids=lambda command: command.text)
def test_a_job_that_is_not_run_here_has_known_options_keys_and_files(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    name, *arguments = command.job
    assert call([name], "--help") == 0
    known = capsys.readouterr().out
    assert [word for word in arguments if word.startswith("--") and word not in known] == []
    config = arguments[arguments.index("--config") + 1] if "--config" in arguments else ""
    assert not config or (ROOT / config).is_file()
    load(ROOT / "jobs/configs/demo.yaml" if name != "train" or not config else ROOT / config, [word for word in arguments if "=" in word])


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.cloud and not c.job], ids=lambda command: command.text)
def test_a_command_that_needs_a_cloud_names_a_verb_of_ray_and_a_cluster_file(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    from ray.scripts.scripts import cli

    tool, verb, file, *options = command.words
    assert tool == "ray" and "cluster_name" in yaml.safe_load((ROOT / file).read_text())
    known = {option for parameter in cli.commands[verb].params for option in parameter.opts}
    assert [word for word in options if word.startswith("--") and word not in known] == []


@pytest.mark.parametrize(("page", "of"), [("architecture", "*Identical* means"), ("running", "Any number of ranks at any ZeRO stage")])
def test_what_is_placement_and_changes_the_last_bits_is_named_where_runs_are_called_identical(page: str, of: str) -> None:
    (paragraph,) = (one for one in (ROOT / f"docs/{page}.md").read_text().split("\n\n") if one.startswith(of))
    said = " ".join(paragraph.split())
    assert all(what in said for what in ("`workers.compile`", "`workers.offload`", "kind of card", "release of torch"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target, anchor in LINK.findall(page.read_text()):
        there = (page.parent / target).resolve() if target else page
        assert there.exists(), f"{page.name} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", there.read_text(), re.MULTILINE)
            assert anchor[1:] in [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_of_the_project_that_a_page_names_exist(page: Path) -> None:
    named = re.findall(r"`([\w-]+/[\w./-]*\w)`", page.read_text())
    parents = {path.name: path.parent for folder in (ROOT, ROOT / "cluster") for path in folder.iterdir() if path.is_dir()}
    missing = [path for path in named if (first := path.partition("/")[0]) in parents and not (parents[first] / path).exists()]
    assert [path for path in missing if not path.startswith("work/")] == []
