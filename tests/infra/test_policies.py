"""What the roles of the machines may do, as far as a simulated IAM and the configuration of the cluster can tell."""

import json
from typing import Any

import boto3
import pytest
import yaml
from moto import mock_aws

from tests.tiny import ROOT

Statement = dict[str, Any]
OURS = {"StringEquals": {"aws:ResourceTag/project": "reactdiff"}}


def statements(role: str, action: str) -> list[Statement]:
    policy = json.loads((ROOT / f"infra/aws/{role}-policy.json").read_text())
    return [one for one in policy["Statement"] if action in ([one["Action"]] if isinstance(one["Action"], str) else one["Action"])]


@pytest.mark.parametrize("role", ["head", "worker"])
def test_iam_takes_the_policy(role: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ENDPOINT_URL", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    text = (ROOT / f"infra/aws/{role}-policy.json").read_text()
    with mock_aws():
        client = boto3.client("iam", "us-east-1")
        assert client.create_policy(PolicyName=role, PolicyDocument=text)["Policy"]["PolicyName"] == role
        with pytest.raises(client.exceptions.MalformedPolicyDocumentException):
            client.create_policy(PolicyName="x", PolicyDocument=text.replace("Allow", "Alow", 1))


def test_the_head_gives_its_machines_the_role_of_workers_and_no_other() -> None:
    (passed,) = statements("head", "iam:PassRole")
    assert passed["Resource"] == "arn:aws:iam::ACCOUNT:role/reactdiff-worker"
    assert passed["Condition"] == {"StringEquals": {"iam:PassedToService": "ec2.amazonaws.com"}}


def test_the_head_starts_only_the_machines_of_the_configuration_and_each_with_our_tag() -> None:
    kinds = yaml.safe_load((ROOT / "ray_config.yaml").read_text())["available_node_types"]
    types = {kind["node_config"]["InstanceType"] for name, kind in kinds.items() if name != "head"}
    starts = {str(one["Resource"]): one.get("Condition", {}).get("StringEquals", {}) for one in statements("head", "ec2:RunInstances")}
    instance = starts["arn:aws:ec2:*:*:instance/*"]
    assert set(instance["ec2:InstanceType"]) == types
    assert instance["aws:RequestTag/project"] == starts["arn:aws:ec2:*:*:volume/*"]["aws:RequestTag/project"] == "reactdiff"


def test_the_head_ends_and_tags_no_machine_but_ours() -> None:
    (ends,) = statements("head", "ec2:TerminateInstances")
    assert ends["Condition"] == OURS
    tags = [one["Condition"] for one in statements("head", "ec2:CreateTags")]
    assert [one for one in tags if one != OURS and one["StringEquals"].get("ec2:CreateAction") != "RunInstances"] == []


def test_the_head_reads_no_bucket_and_workers_do_nothing_else() -> None:
    head, worker = ((ROOT / f"infra/aws/{role}-policy.json").read_text() for role in ("head", "worker"))
    assert "s3:" not in head
    assert "ec2:" not in worker and "iam:" not in worker
