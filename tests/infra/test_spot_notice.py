"""The notice of a spot machine reaches Ray: against a metadata service that answers as EC2's does, version 2."""

import datetime
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import yaml

from infra.aws.spot_notice import EVERY, notice, watch

pytestmark = pytest.mark.starts

END = "2026-11-28T12:02:00Z"


class Metadata(BaseHTTPRequestHandler):
    """404 while there is no notice; whoever has no token gets nothing."""

    server: "Service"

    def do_PUT(self) -> None:
        assert self.path == "/latest/api/token" and self.headers["X-aws-ec2-metadata-token-ttl-seconds"]
        self._answer(200, b"the token")

    def do_GET(self) -> None:
        assert self.path == "/latest/meta-data/spot/instance-action"
        if self.headers["X-aws-ec2-metadata-token"] != "the token":
            self._answer(401, b"")
        elif answers := self.server.answers:
            self._answer(*answers.pop(0))
        else:
            self._answer(404, b"Not Found")

    def _answer(self, code: int, body: bytes) -> None:
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


class Service(HTTPServer):
    answers: list[tuple[int, bytes]]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@pytest.fixture
def metadata() -> Iterator[Service]:
    with Service(("127.0.0.1", 0), Metadata) as service:
        service.answers = []
        thread = threading.Thread(target=service.serve_forever, daemon=True)
        thread.start()
        yield service
        service.shutdown()
        thread.join()


GOES = (200, f'{{"action": "terminate", "time": "{END}"}}'.encode())


def test_there_is_a_notice_once_ec2_gives_one(metadata: Service) -> None:
    assert notice(metadata.url) is None
    metadata.answers = [GOES]
    assert notice(metadata.url) == datetime.datetime(2026, 11, 28, 12, 2, tzinfo=datetime.UTC)


def test_it_is_looked_for_until_it_comes_and_the_cluster_is_told_the_seconds_that_are_left(metadata: Service) -> None:
    metadata.answers = [(404, b""), (500, b""), (404, b""), GOES]
    pauses, told = [], []
    now = datetime.datetime(2026, 11, 28, 12, 0, 5, tzinfo=datetime.UTC)
    watch(metadata.url, told.append, pauses.append, lambda: now)
    assert told == [115] and pauses == [EVERY] * 3


def test_a_cluster_that_does_not_take_it_is_told_again(metadata: Service) -> None:
    metadata.answers = [GOES, GOES]
    told = []

    def drain(seconds: int) -> None:
        told.append(seconds)
        if len(told) == 1:
            raise LookupError("no Ray runs on this machine")

    watch(metadata.url, drain, lambda seconds: None)
    assert len(told) == 2


def test_spot_machines_of_ray_config_watch_for_it() -> None:
    config = yaml.safe_load((Path(__file__).parents[2] / "ray_config.yaml").read_text())
    spot = config["available_node_types"]["gpu_spot"]
    assert spot["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot"
    commands = spot.get("worker_start_ray_commands") or config["worker_start_ray_commands"]
    assert any("infra/aws/spot_notice.py >" in command for command in commands)
