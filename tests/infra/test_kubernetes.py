"""What the manifests say. No API server and no schema of KubeRay is asked: what is held here are the facts that decide what is lost."""

import json
import re
import shlex
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml

from infra.supervise import repeated
from tests.tiny import ROOT

Manifest = dict[str, Any]
FOLDER = ROOT / "infra/kubernetes"


@pytest.fixture
def cluster() -> Manifest:
    return rayjob()["rayClusterSpec"]


def rayjob() -> Manifest:
    return yaml.safe_load((FOLDER / "rayjob.yaml").read_text())["spec"]


def group(cluster: Manifest, name: str) -> Manifest:
    (found,) = [one for one in cluster["workerGroupSpecs"] if one["groupName"] == name]
    return found


def test_the_command_is_given_again_by_supervise_and_by_nobody_else() -> None:
    words = shlex.split(rayjob()["entrypoint"])
    assert words[:9] == ["cd", "/reactdiff", "&&", "exec", "python", "infra/supervise.py", "--", "python", "jobs/train.py"]
    assert (ROOT / words[words.index("--config") + 1]).is_file()
    assert rayjob()["backoffLimit"] == 0


def test_the_driver_lands_on_a_pod_of_its_own_that_is_neither_the_head_nor_spot(cluster: Manifest) -> None:
    (asked,) = json.loads(rayjob()["entrypointResources"])
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    (one,) = [one for one in groups if asked in one.get("resources", {})]
    assert one is group(cluster, "driver") and one["labels"] == {"pool": "driver"} and one["minReplicas"] == one["maxReplicas"] == 1
    assert "spot" not in str(one)


def test_the_operator_s_prometheus_keeps_what_that_on_a_head_keeps() -> None:
    (endpoint,) = yaml.safe_load((FOLDER / "podmonitor.yaml").read_text())["spec"]["podMetricsEndpoints"]
    (config,) = yaml.safe_load((ROOT / "infra/prometheus/ray.yml").read_text())["scrape_configs"]
    *there, dropped = endpoint["metricRelabelings"]
    *here, also = config["metric_relabel_configs"]
    snake = [{{"sourceLabels": "source_labels", "targetLabel": "target_label"}.get(key, key): rule[key] for key in rule} for rule in there]
    assert snake == here
    assert set(also["regex"].split("|")) < set(dropped["regex"].split("|")) and dropped["action"] == also["action"]


def test_no_rank_lands_on_the_head_or_beside_the_driver(cluster: Manifest) -> None:
    assert cluster["headGroupSpec"]["resources"]["CPU"] == group(cluster, "driver")["resources"]["CPU"] == "0"
    assert not any("resources" in group(cluster, name) for name in ("gpu-spot", "gpu-on-demand")), "KubeRay takes what the pod has"


def test_every_pod_can_be_given_keys_and_an_endpoint_and_ranks_tolerate_the_taint_of_gpus(cluster: Manifest) -> None:
    for one in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = one["template"]["spec"]
        assert pod["containers"][0]["envFrom"] == [{"secretRef": {"name": "reactdiff-s3", "optional": True}}]
        assert ("tolerations" in pod) == (one.get("labels", {})["pool"] == "gpu")


@pytest.mark.parametrize("name", ["gpu-spot", "gpu-on-demand"])
def test_a_pod_that_is_evicted_tells_ray_and_has_time_for_a_checkpoint(cluster: Manifest, name: str) -> None:
    pod = group(cluster, name)["template"]["spec"]
    (container,) = pod["containers"]
    python, script, seconds = container["lifecycle"]["preStop"]["exec"]["command"]
    assert python == "python" and (ROOT / script.removeprefix("/reactdiff/")).is_file()
    assert 30 < int(seconds) < pod["terminationGracePeriodSeconds"]


def test_the_labels_are_those_of_the_cluster_on_aws(cluster: Manifest) -> None:
    kinds = yaml.safe_load((ROOT / "ray_config.yaml").read_text())["available_node_types"]
    names = {"driver": "driver", "gpu-spot": "gpu_spot", "gpu-on-demand": "gpu_on_demand"}
    labels = {ours: dict(kinds[theirs]["labels"]) for ours, theirs in names.items()}
    for machine in ("gpu-spot", "gpu-on-demand"):
        assert labels[machine].pop("instance-type"), "a pod does not know on which type of machine it is"
    assert {ours: group(cluster, ours)["labels"] for ours in names} == labels
    assert cluster["headGroupSpec"]["labels"] == kinds["head"]["labels"]


def test_a_head_that_restarts_has_its_state_and_autoscaling_leaves_restarts_to_kuberay(cluster: Manifest) -> None:
    assert cluster["gcsFaultToleranceOptions"]["backend"] == "rocksdb"
    assert cluster["autoscalerOptions"]["version"] == "v2"
    assert "restartPolicy" not in str(cluster), "with autoscaler v2 KubeRay refuses any but Never"
    assert "RAY_gcs_storage" not in str(cluster), "KubeRay sets it and refuses ours"


def test_the_cluster_has_a_token_and_the_ray_of_the_project(cluster: Manifest) -> None:
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["rayVersion"] == version("ray")


def test_a_tick_starts_again_after_75_and_kills_and_after_nothing_else_and_never_beside_another() -> None:
    cron = yaml.safe_load((FOLDER / "retrain.yaml").read_text())["spec"]
    job = cron["jobTemplate"]["spec"]
    assert cron["concurrencyPolicy"] == "Forbid" and job["template"]["spec"]["restartPolicy"] == "Never"
    (container,) = job["template"]["spec"]["containers"]
    disruption, codes = job["podFailurePolicy"]["rules"]
    assert disruption == {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    assert (codes["action"], codes["onExitCodes"]["operator"], codes["onExitCodes"]["containerName"]) == ("Ignore", "In", container["name"])
    assert codes["onExitCodes"]["values"] == [code for code in range(144) if repeated(code)]
    assert job["backoffLimit"] == 0, "no other failure is tried again"
    assert (ROOT / container["command"][1]).is_file() and (ROOT / container["command"][3]).is_file()


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.name)
def test_no_secret_stands_in_a_manifest(path: Path) -> None:
    text = path.read_text()
    assert not re.search(r"(?i)(AUTH_TOKEN|SECRET|PASSWORD|ACCESS_KEY)[\w\"':, {}]*value", text)
    assert "kind: Secret" not in text
