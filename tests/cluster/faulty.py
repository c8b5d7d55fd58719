"""A proxy before an S3 server that does to its next answers what networks and busy servers do."""

import http.client
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit


class FaultyProxy(ThreadingHTTPServer):
    """Faults are used up one an answer.

    "cut" half a body off; cut it and tell no length ("endless"); send half and "stall"; "trickle" a few bytes at a time; "flip" a bit;
    "lose" the answer to a request that was carried out; answer "busy", or that credentials have "expired"; be "down": close at once.
    """

    daemon_threads = True

    def __init__(self, upstream: str):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream = urlsplit(upstream).netloc
        self.faults: list[str] = []
        self.happened: list[str] = []
        self.requests: list[str] = []
        self.endpoint = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address) -> None:
        """A connection that was cut on purpose is no news."""


class _Handler(BaseHTTPRequestHandler):
    server: FaultyProxy
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def handle_one_request(self) -> None:
        self.raw_requestline = self.rfile.readline(65537)
        if not self.raw_requestline or not self.parse_request():
            self.close_connection = True
            return
        self._forward()

    def _forward(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.requests.append(f"{self.command} {self.headers.get('Range', '')}".strip())
        fault = self.server.faults.pop(0) if self.server.faults else ""
        if fault:
            self.server.happened.append(fault)
        if fault == "busy":
            self._answer(503, [], b"<Error><Code>SlowDown</Code><Message>later</Message></Error>")
            return
        if fault == "expired":
            self._answer(400, [], b"<Error><Code>ExpiredToken</Code><Message>over</Message></Error>")
            return
        if fault == "down":
            self.close_connection = True
            return
        upstream = http.client.HTTPConnection(self.server.upstream, timeout=10)
        upstream.request(self.command, self.path, body, dict(self.headers))  # the signed Host header goes through as it came
        answer = upstream.getresponse()
        content = answer.read()
        upstream.close()
        if fault == "lose":
            self.close_connection = True
            return
        headers = [
            (name, value)
            for name, value in answer.getheaders()
            if name.lower() not in ("connection", "transfer-encoding", "content-length")
        ]
        length = answer.getheader("Content-Length", str(len(content)))
        if fault == "flip":
            content = content[:-1] + bytes([content[-1] ^ 1])
        half = content[: len(content) // 2]
        if fault == "endless":
            self._answer(answer.status, headers, half, None)
        elif fault == "trickle":
            self._answer(answer.status, headers, b"", length)
            self._slowly(content)
        else:
            self._answer(answer.status, headers, half if fault in ("cut", "stall") else content, length)
        if fault == "stall":
            self.connection.recv(1)  # until the other side gives up
        self.close_connection = fault in ("cut", "endless", "trickle", "stall")

    def _answer(self, status: int, headers: list[tuple[str, str]], content: bytes, length: str | None = "") -> None:
        """An answer that says how long its content is, or this length, or nothing of it."""
        self.send_response_only(status)
        for name, value in [*headers, *([] if length is None else [("Content-Length", length or str(len(content)))])]:
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)
        self.wfile.flush()

    def _slowly(self, content: bytes) -> None:
        for start in range(0, len(content), 100):
            self.wfile.write(content[start : start + 100])
            self.wfile.flush()
            time.sleep(0.05)


@contextmanager
def faulty_proxy(upstream: str) -> Iterator[FaultyProxy]:
    """A running proxy before the server at this URL."""
    with FaultyProxy(upstream) as proxy:
        thread = threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield proxy
        finally:
            proxy.shutdown()
            thread.join()
