"""The architecture as tests: who may import whom, and what every dependency owes its reader."""

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.runtime import failures

ROOT = Path(__file__).parents[1]
ORDER = ("config", "storage", "runtime", "telemetry", "data", "runs", "evaluation", "training", "driver", "studies", "proof")
"""The packages of cluster/: each imports those before it, `reactdiff` and itself."""

TOP = ("bench", "cli")
"""What stands on all of them and is imported by jobs/ alone."""

PLAIN = {"storage", "runtime", "telemetry"}
"""Packages that would serve any training: they import nothing of `reactdiff`."""

RAY = {
    "runtime/autoscaler",
    *("runtime/jobs", "runtime/nodes", "runtime/placement", "runtime/postmortem", "runtime/ray_cluster", "runtime/remote_machine"),
    "runtime/tasks",
    *("driver/berths", "driver/board", "driver/board_client", "driver/group", "driver/launch", "driver/ray_metrics", "driver/ray_train"),
    *("studies/tuner", "bench/empty_loop", "bench/recovery"),
}
"""The modules of cluster/ that place work, and so may import Ray."""

MODULES = {
    "config": "identity loading paths schema spec",
    "storage": "base deadline folder hashing multipart parallel retry s3",
    "runtime": (
        "after_import autoscaler device failures faults hosts jobs machines nodes nvml placement poller postmortem prices ray_cluster "
        "remote_machine run_watch scratch stuck tasks"
    ),
    "telemetry": "accounts books books_log display exporter meter metrics metrics_log monitor receipt reminder repeating tensorboard",
    "data": (
        "build_shard cache cache_file cache_space checksums demo index_tars manifest other_targets prepare quarantine ranges reader "
        "sequential shards stream tar_scan verify"
    ),
    "runs": (
        "averages build_latents checkpoint checkpoint_writer environment export inventory latents lease lineage logs published registry "
        "retention saved snapshot state upkeep"
    ),
    "evaluation": "evaluate gate ground_truth html picture plan report rows rung validation",
    "training": (
        "agreement ahead beside_steps compile engine examine gradient job late_compiler looks loop memory rehearsal reporting requests "
        "resume settings spread stacks warm_start zero"
    ),
    "driver": "berths board board_client group interruption launch pin plan pretrained ray_metrics ray_train run suspects watchdog",
    "studies": (
        "best comparison comparison_pairs comparison_report comparison_table first_stage halving importance kept_scores lags ledger "
        "marked_page retrain search searchers space sweep sweep_report sweep_table trial tuner"
    ),
    "proof": "comparison disturbed_run experiment page prove script site",
    "bench": (
        "card card_page card_parts challenge checkpoint empty_loop loading metrics noise_dataset oracles overhead recovery rival scrape "
        "startup sweeping tables training"
    ),
}
"""Package -> its modules."""

ACROSS = {
    "driver/test_hangs.py",
    "driver/test_books_close.py",
    "driver/test_card.py",
    "driver/test_machines_come_and_go.py",
    "driver/test_told_to_end.py",
    "data/test_stream_faults.py",
    "storage/test_storage.py",
    "telemetry/test_alerts.py",
    "telemetry/test_prometheus.py",
    "studies/test_pages_in_a_browser.py",
}
"""Tests of a package that are about more than one of its modules."""

MACHINERY = {"ray", "deepspeed", "boto3", "botocore", "prometheus_client", "webdataset"}
BELOW = {"reactdiff": {"cluster", "jobs", "infra"}, "cluster": {"jobs", "infra"}}
WRITTEN = ["*.py", "*.md", "*.yaml", "*.yml", "*.toml", "*.json", "*.txt", "Makefile", ".ci/run"]
OUTSIDE = re.compile(r"\.\./shared|(?<![\w.~}:/])/(?:home|root|Users|work)/\w")


def _imports(folder: str) -> dict[Path, set[str]]:
    """The full names of what each module of a folder imports, wherever in the module."""
    found = {}
    for path in sorted((ROOT / folder).rglob("*.py")):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        froms = [node for node in nodes if isinstance(node, ast.ImportFrom)]
        assert not [node for node in froms if node.level], f"{path} imports relative to itself; imports are absolute"
        names |= {f"{node.module}.{alias.name}" for node in froms for alias in node.names}
        found[path.relative_to(ROOT)] = names
    assert found, f"{folder}/ holds no module"
    return found


def _roots(folder: str) -> dict[Path, set[str]]:
    """The top-level packages that each module of a folder imports."""
    return {path: {name.partition(".")[0] for name in names} for path, names in _imports(folder).items()}


def _packages(names: set[str]) -> set[str]:
    """`reactdiff`, and the packages of cluster/, among the names that a module imports."""
    parts = [name.split(".") for name in names]
    return {name[1] for name in parts if name[0] == "cluster" and len(name) > 1} | {name[0] for name in parts if name[0] == "reactdiff"}


def _named(folder: str) -> Iterator[tuple[str, Path]]:
    """Each public class, function and alias of a type that a folder's modules define at their top, and where."""
    for path in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.parse(path.read_text()).body:
            names = [node.name] if isinstance(node, (ast.ClassDef, ast.FunctionDef)) else []
            if isinstance(node, ast.Assign):  # an alias of a type, not a constant
                names = [one.id for one in node.targets if isinstance(one, ast.Name) and not one.id.isupper()]
            for name in names:
                if not name.startswith("_") and name != "log":
                    yield name, path.relative_to(ROOT / folder)


def _dependencies() -> list[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return [re.split(r"[\[=<>~! ]", text)[0] for text in project["dependencies"] + project["optional-dependencies"]["dev"]]


def test_the_science_imports_no_machinery() -> None:
    assert {str(path): names & MACHINERY for path, names in _roots("reactdiff").items() if names & MACHINERY} == {}


@pytest.mark.parametrize("folder", BELOW)
def test_imports_run_from_jobs_to_cluster_to_reactdiff(folder: str) -> None:
    upward = {str(path): names & BELOW[folder] for path, names in _roots(folder).items() if names & BELOW[folder]}
    assert upward == {}


def test_every_module_of_cluster_is_in_a_package_of_the_order() -> None:
    found = {path.parts[1].removesuffix(".py") for path in _imports("cluster")} - {"__init__"}
    assert found == {*ORDER, *TOP}, "a new package has a place in ORDER; a module lies in a package"
    assert [path for path in (ROOT / "cluster").glob("*.py") if path.stem not in ("__init__", *TOP)] == []
    assert len(ast.parse((ROOT / "cluster/__init__.py").read_text()).body) == 1, "cluster/__init__ is one docstring"


@pytest.mark.parametrize("package", [*ORDER, *TOP])
def test_a_package_of_cluster_imports_only_those_before_it(package: str) -> None:
    before = ORDER if package in TOP else ORDER[: ORDER.index(package)]
    allowed = {package, *before} | ({"reactdiff"} - ({"reactdiff"} if package in PLAIN else set()))
    mine = {path: names for path, names in _imports("cluster").items() if path.parts[1].removesuffix(".py") == package}
    assert {str(path): sorted(_packages(names) - allowed) for path, names in mine.items() if _packages(names) - allowed} == {}


@pytest.mark.parametrize("package", ORDER + TOP[:1])
def test_a_package_says_what_it_imports_and_its_init_is_nothing_else(package: str) -> None:
    init = ROOT / "cluster" / package / "__init__.py"
    tree, names = ast.parse(init.read_text()), (*ORDER, "reactdiff", *TOP)
    said = {name for name in re.findall(r"\w+", (ast.get_docstring(tree) or "").splitlines()[-1]) if name in names}
    mine = set().union(*(found for path, found in _imports("cluster").items() if path.parts[1] == package))
    assert said == _packages(mine) - {package}, f"the last line of {init.relative_to(ROOT)} names what the package imports"
    assert package == "storage" or len(tree.body) == 1, "only storage/__init__ has code: a facade would make everybody import everything"


def test_ray_is_imported_only_where_work_is_placed() -> None:
    found = {**_roots("cluster"), **_roots("jobs")}
    importers = {str(path.with_suffix("")).removeprefix("cluster/") for path, names in found.items() if "ray" in names}
    assert importers == RAY


def test_every_job_ends_in_the_lines_that_say_errors_in_a_paragraph() -> None:
    jobs = [path for path in (ROOT / "jobs").glob("*.py") if path.stem != "__init__"]
    assert len(jobs) > 5
    assert [job.name for job in jobs if not job.read_text().endswith('\nif __name__ == "__main__":\n    sys.exit(cli.run(main))\n')] == []


def test_a_public_name_of_cluster_means_one_thing() -> None:
    where: dict[str, list[str]] = {}
    for name, path in _named("cluster"):
        where.setdefault(name, []).append(str(path))
    assert {name: paths for name, paths in where.items() if len(paths) > 1} == {}


@pytest.mark.parametrize("package", sorted(MACHINERY - {"ray"}))
def test_a_package_of_the_machinery_is_imported_in_one_module_of_cluster(package: str) -> None:
    modules = [str(path) for folder in ("cluster", "jobs") for path, names in _roots(folder).items() if package in names]
    assert len(modules) == 1 and modules[0].startswith("cluster/")


def test_tests_of_cluster_lie_as_its_modules_do() -> None:
    folder = ROOT / "tests" / "cluster"
    assert {path.name for path in folder.iterdir() if path.is_dir()} - {"__pycache__"} == {*ORDER, TOP[0], "chaos", "multihost", "support"}
    tests = [path for package in (*ORDER, TOP[0]) for path in (folder / package).glob("test_*.py")]
    homeless = [path for path in tests if not (ROOT / "cluster" / path.parent.name / path.name.removeprefix("test_")).exists()]
    assert {f"{path.parent.name}/{path.name}" for path in homeless} == ACROSS


def test_every_module_of_cluster_is_where_the_table_has_it() -> None:
    """Imports alone cannot tell where a module belongs that imports nothing of ours."""
    found = {package: sorted(path.stem for path in (ROOT / "cluster" / package).glob("*.py")) for package in (*ORDER, TOP[0])}
    assert {package: " ".join(name for name in names if name != "__init__") for package, names in found.items()} == MODULES


def test_an_error_that_names_its_failure_names_a_row_of_the_table() -> None:
    table = {failure.name for failure in failures.TABLE}
    named = {
        node.value.value
        for path in (ROOT / "cluster").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and ast.unparse(node.targets[0]) == "failure"
    }
    assert named and named <= table
    page = (ROOT / "docs/architecture.md").read_text().partition("## Failure classes")[2].partition("\n## ")[0]
    assert set(re.findall(r"^\|[^|]*\| `(\w+)` \|", page, re.MULTILINE)) == table | {failures.LOST.name}


def test_no_file_mentions_a_path_outside_the_project() -> None:
    folders = ["cluster", "docs", "infra", "jobs", "reactdiff", "tests"]
    files = [path for glob in WRITTEN for path in [*ROOT.glob(glob), *(f for name in folders for f in (ROOT / name).rglob(glob))]]
    assert len(files) > 50
    assert [f"{path.relative_to(ROOT)}: {hit[0]}" for path in files if (hit := OUTSIDE.search(path.read_text()))] == []


def test_every_dependency_is_explained_in_docs() -> None:
    rows = re.findall(r"^\| ([\w-]+)(?:\[.*?\])? \|", (ROOT / "docs/dependencies.md").read_text(), re.MULTILINE)
    assert sorted(set(rows) - {"package"}) == sorted(_dependencies())


def test_every_dependency_is_pinned_exactly() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert [line for line in lines if not re.fullmatch(r"[\w.-]+==(\d+!)?[\w.]+", line)] == [], "a pin is name==version, no build tag"
    pinned = {re.sub(r"[-_.]+", "-", line.partition("==")[0]).lower() for line in lines}
    assert set(_dependencies()) <= pinned
