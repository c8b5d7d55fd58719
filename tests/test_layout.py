"""The architecture as tests: who may import whom, and what every dependency owes its reader."""

import ast
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MACHINERY = {"ray", "deepspeed", "boto3", "botocore", "prometheus_client", "webdataset"}
BELOW = {"reactdiff": {"cluster", "jobs", "infra"}, "cluster": {"jobs", "infra"}}
WRITTEN = ["*.py", "*.md", "*.yaml", "*.yml", "*.toml", "*.json", "*.txt", "Makefile", ".ci/run"]
OUTSIDE = re.compile(r"\.\./shared|(?<![\w.~}:/])/(?:home|root|Users|work)/\w")


def _imports(folder: str) -> dict[Path, set[str]]:
    """The top-level packages that each module of a folder imports, wherever in the module."""
    found = {}
    for path in sorted((ROOT / folder).rglob("*.py")):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
        names += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom) and not node.level]
        found[path.relative_to(ROOT)] = {name.partition(".")[0] for name in names}
    assert found, f"{folder}/ holds no module"
    return found


def _dependencies() -> list[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return [re.split(r"[\[=<>~! ]", text)[0] for text in project["dependencies"] + project["optional-dependencies"]["dev"]]


def test_the_science_imports_no_machinery() -> None:
    assert {str(path): names & MACHINERY for path, names in _imports("reactdiff").items() if names & MACHINERY} == {}


@pytest.mark.parametrize("folder", BELOW)
def test_imports_run_from_jobs_to_cluster_to_reactdiff(folder: str) -> None:
    upward = {str(path): names & BELOW[folder] for path, names in _imports(folder).items() if names & BELOW[folder]}
    assert upward == {}


@pytest.mark.parametrize("package", sorted(MACHINERY - {"ray"}))
def test_a_package_of_the_machinery_is_imported_in_one_module_of_cluster(package: str) -> None:
    modules = [str(path) for folder in ("cluster", "jobs") for path, names in _imports(folder).items() if package in names]
    assert len(modules) <= 1 and all(module.startswith("cluster/") for module in modules)


@pytest.mark.parametrize("module", ["engine", "stream", "worker"])
def test_ray_stays_out_of_what_runs_without_it(module: str) -> None:
    assert "ray" not in _imports("cluster")[Path(f"cluster/{module}.py")]


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
    assert [line for line in lines if not re.fullmatch(r"[\w.-]+==[\w.]+", line)] == [], "a pin is name==version, without a build tag"
    pinned = {re.sub(r"[-_.]+", "-", line.partition("==")[0]).lower() for line in lines}
    assert set(_dependencies()) <= pinned
