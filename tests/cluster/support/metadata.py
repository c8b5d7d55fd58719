"""A metadata service, as on a machine in a cloud, that hands out the credentials of its role; now and then it is too busy."""

import datetime
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from infra.objectstore import ObjectStore


class MetadataService(ThreadingHTTPServer):
    """Credentials of an S3 server's one user. They last five minutes, which is so short that a container's client asks for
    new ones at each request.

    Attributes:
        busy: how many of the next requests are answered 503.
        asked: how many there were.
        endpoint: its URL.
    """

    daemon_threads = True

    def __init__(self, server: ObjectStore):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.busy = self.asked = 0
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        end = datetime.datetime.now(datetime.UTC) + datetime.timedelta(minutes=5)
        keys = {"AccessKeyId": server.access_key, "SecretAccessKey": server.secret_key, "Token": ""}
        self.credentials = json.dumps(keys | {"Expiration": end.strftime("%Y-%m-%dT%H:%M:%SZ")})


class _Handler(BaseHTTPRequestHandler):
    server: MetadataService

    def log_message(self, *_: object) -> None:
        pass

    def do_PUT(self) -> None:
        self._answer("a token")

    def do_GET(self) -> None:
        self._answer("a-role" if self.path.endswith("/") else self.server.credentials)

    def _answer(self, content: str) -> None:
        self.server.asked += 1
        busy, self.server.busy = self.server.busy > 0, max(0, self.server.busy - 1)
        self.send_response(503 if busy else 200)
        self.end_headers()
        self.wfile.write(b"" if busy else content.encode())


@contextmanager
def metadata_service(server: ObjectStore) -> Iterator[MetadataService]:
    """A running service with the credentials for this server."""
    with MetadataService(server) as service:
        thread = threading.Thread(target=service.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield service
        finally:
            service.shutdown()
            thread.join()
