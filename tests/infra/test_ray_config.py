"""What `ray up ray_config.yaml` would ask EC2 for: Ray's own checks, and a simulated EC2, without a network."""

import copy
import json
import re
import shlex
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
import yaml
from botocore.exceptions import ParamValidationError
from jsonschema import ValidationError
from moto import mock_aws
from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
from ray.autoscaler._private.commands import _bootstrap_config
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.tags import NODE_KIND_HEAD, NODE_KIND_WORKER, TAG_RAY_NODE_KIND, TAG_RAY_NODE_NAME, TAG_RAY_USER_NODE_TYPE

from cluster.studies.tuner import DRIVER

ROOT = Path(__file__).parents[2]
Config = dict[str, Any]


@pytest.fixture
def config() -> Config:
    return yaml.safe_load((ROOT / "ray_config.yaml").read_text())


@pytest.fixture
def ec2(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A simulated EC2 with the instance profiles and the security group that the configuration names; nothing else answers."""

    def refuse(*_: Any) -> None:
        raise AssertionError("a test of the cloud configuration tried to reach a network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    for name, value in {"HOME": str(tmp_path), "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)  # of a server that other tests of this process have started
    (tmp_path / ".ssh").mkdir()
    with mock_aws():
        region = config["provider"]["region"]
        client, iam = boto3.client("ec2", region), boto3.client("iam", region)
        vpc = client.describe_vpcs()["Vpcs"][0]["VpcId"]
        group = client.create_security_group(GroupName="reactdiff", Description="all within", VpcId=vpc)["GroupId"]
        for profile in ("reactdiff-head", "reactdiff-worker"):
            iam.create_instance_profile(InstanceProfileName=profile)
        image = client.describe_images()["Images"][0]["ImageId"]
        for kind in config["available_node_types"].values():
            kind["node_config"] |= {"SecurityGroupIds": [group], "ImageId": image}
        yield client


def started(config: Config, ec2: Any, kind: str) -> Config:
    """The instance that EC2 describes after Ray has started one of this node type."""
    ready = _bootstrap_config(prepare_config(copy.deepcopy(config)), no_config_cache=True)
    role = NODE_KIND_HEAD if kind == config["head_node_type"] else NODE_KIND_WORKER
    tags = {TAG_RAY_NODE_KIND: role, TAG_RAY_USER_NODE_TYPE: kind, TAG_RAY_NODE_NAME: f"ray-{kind}"}
    AWSNodeProvider(ready["provider"], config["cluster_name"]).create_node(ready["available_node_types"][kind]["node_config"], tags, 1)
    return ec2.describe_instances()["Reservations"][0]["Instances"][0]


def test_ray_accepts_the_configuration(config: Config) -> None:
    validate_config(prepare_config(config))


def test_ray_refuses_a_misspelt_key(config: Config) -> None:
    config["available_node_types"]["gpu_spot"]["max_worker"] = 8
    with pytest.raises(ValidationError, match="max_worker"):
        validate_config(prepare_config(config))


def test_everything_that_is_mounted_lies_here(config: Config) -> None:
    here = [source for source in config["file_mounts"].values() if not source.startswith("~/")]
    assert [source for source in here if not (ROOT / source).exists()] == []
    assert {"constraints.txt", "pyproject.toml"} <= {path.name for path in (ROOT / config["file_mounts"]["~/reactdiff"]).iterdir()}


def test_every_node_has_one_token_that_no_file_of_the_project_holds(config: Config) -> None:
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    for starts in ("head_start_ray_commands", "worker_start_ray_commands"):
        *_, last = config[starts]
        assert "export RAY_AUTH_MODE=token " in last and "RAY_AUTH_TOKEN" not in last


def test_drivers_have_a_machine_of_their_own_that_is_neither_the_head_nor_spot_and_takes_no_ranks(config: Config) -> None:
    kinds = config["available_node_types"]
    (kind,) = [name for name, kind in kinds.items() if kind["labels"]["pool"] == "driver"]
    assert kind != config["head_node_type"]
    assert "InstanceMarketOptions" not in kinds[kind]["node_config"]
    assert kinds[kind]["min_workers"] == 1, "it is there before a job asks for it, and not taken down between two"
    assert kinds[kind]["resources"] == {"CPU": 0, DRIVER: 1}, "a rank or task asks for a CPU at least"


@pytest.mark.parametrize("page", ["README.md", "infra/aws/README.md"])
def test_a_job_is_submitted_to_the_machine_of_drivers_and_started_again_there(page: str, config: Config) -> None:
    text = re.sub(r"\\\n\s*", "", (ROOT / page).read_text())
    (line,) = [line for line in text.splitlines() if line.startswith("RAY_AUTH_MODE=token ray job submit")]
    words = shlex.split(line)
    assert json.loads(words[words.index("--entrypoint-label-selector") + 1]) == config["available_node_types"]["driver"]["labels"]
    after = words[words.index("--") + 1 :]
    assert after[:5] == ["python", "infra/supervise.py", "--", "python", "jobs/train.py"]


def test_a_head_that_comes_back_has_its_state_and_finds_the_others_waiting(config: Config) -> None:
    head, worker = config["head_start_ray_commands"][-1], config["worker_start_ray_commands"][-1]
    assert "RAY_gcs_storage=rocksdb RAY_gcs_storage_path=~/" in head
    waits = [re.findall(r"RAY_gcs_rpc_server_reconnect_timeout_s=(\d+)", line) for line in (head, worker)]
    assert waits == [["3600"], ["3600"]]


def test_only_gpu_workers_train(config: Config) -> None:
    kinds = config["available_node_types"]
    assert kinds["head"]["resources"] == {"CPU": 0}
    assert kinds["gpu_spot"]["resources"] == kinds["gpu_on_demand"]["resources"]
    assert kinds["gpu_spot"]["resources"]["GPU"] > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "profile", "lifecycle"),
    [
        ("head", "reactdiff-head", None),
        ("driver", "reactdiff-worker", None),
        ("gpu_spot", "reactdiff-worker", "spot"),
        ("gpu_on_demand", "reactdiff-worker", None),
    ],
)
def test_ec2_starts_each_machine_with_its_role_its_market_and_our_tags(
    config: Config, ec2: Any, kind: str, profile: str, lifecycle: str | None
) -> None:
    instance = started(config, ec2, kind)
    assert instance["InstanceType"] == config["available_node_types"][kind]["node_config"]["InstanceType"]
    assert instance["IamInstanceProfile"]["Arn"].endswith(f"/{profile}")
    assert instance.get("InstanceLifecycle") == lifecycle
    assert instance["MetadataOptions"]["HttpTokens"] == "required"
    assert [group["GroupName"] for group in instance["SecurityGroups"]] == ["reactdiff"]
    assert {"Key": "project", "Value": "reactdiff"} in instance["Tags"]
    volume = ec2.describe_volumes()["Volumes"][0]
    assert (volume["VolumeType"], volume["Size"]) == ("gp3", 200)
    assert {"Key": "project", "Value": "reactdiff"} in volume["Tags"]


@pytest.mark.slow
def test_ec2_refuses_a_misspelt_key_of_a_machine(config: Config, ec2: Any) -> None:
    config["available_node_types"]["gpu_spot"]["node_config"]["InstanceTyp"] = "g5.xlarge"
    with pytest.raises(ParamValidationError, match="InstanceTyp"):
        started(config, ec2, "gpu_spot")


@pytest.mark.slow
def test_the_offered_resources_are_those_of_the_machine(config: Config, ec2: Any) -> None:
    kind = config["available_node_types"]["gpu_spot"]
    machine = ec2.describe_instance_types(InstanceTypes=[kind["node_config"]["InstanceType"]])["InstanceTypes"][0]
    gpu = machine["GpuInfo"]["Gpus"][0]
    assert kind["resources"] == {"CPU": machine["VCpuInfo"]["DefaultVCpus"], "GPU": gpu["Count"], f"accelerator_type:{gpu['Name']}": 1}
