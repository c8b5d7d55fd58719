"""The bucket's rule against a simulated S3, which takes what Amazon's takes."""

import json

import boto3
import pytest
from moto import mock_aws

from tests.tiny import ROOT


def test_the_bucket_is_told_to_forget_unfinished_uploads(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ENDPOINT_URL", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    with mock_aws():
        client = boto3.client("s3", "us-east-1")
        client.create_bucket(Bucket="bucket")
        rules = json.loads((ROOT / "infra/aws/lifecycle.json").read_text())
        client.put_bucket_lifecycle_configuration(Bucket="bucket", LifecycleConfiguration=rules)
        (rule,) = client.get_bucket_lifecycle_configuration(Bucket="bucket")["Rules"]
    assert rule["Status"] == "Enabled" and rule["AbortIncompleteMultipartUpload"] == {"DaysAfterInitiation": 2}
    assert "Expiration" not in rule, "it deletes no object"
