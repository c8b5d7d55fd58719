"""A proxy before an S3 server that does to its next answers what networks and busy servers do."""

import http.client
import re
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

TAR_RANGE = r"GET \S+\.tar bytes="
"""What a request for a part of a shard looks like to `arm`."""

SAYS = {
    "busy": (503, "SlowDown"),
    "mangled": (400, "XAmzContentSHA256Mismatch"),
    "denied": (403, "AccessDenied"),
    "gone": (404, "NoSuchUpload"),
    "expired": (400, "ExpiredToken"),
}
"""Faults that are answers."""

DOES = {"cut", "endless", "stall", "trickle", "flip", "late", "lose", "down", "outage", "reset"}
"""The others."""


class FaultyProxy(ThreadingHTTPServer):
    """Faults are used up one an answer, an empty one is none; no bit is flipped twice, which would be a damaged object.

    "cut" half a body off; cut it and tell no length ("endless"); send half and "stall", or "trickle" the rest; "flip" a bit;
    come "late"; "lose" the answer to a request that was carried out; answer "busy", "denied", that what was sent came "mangled", that
    an upload is "gone", or that credentials have "expired" (for as long as `renewed` says no); be "down": close at once; begin an
    "outage": nobody listens for so many seconds; "reset" the connection amid what is sent.

    Attributes:
        faults: what is done to the next answers that are `armed` for it.
        happened: what was done.
        struck: the requests it was done to, as "METHOD path range".
        requests: all of them, as "METHOD range".
        handshakes: how many of the next connections end in the middle of their TLS handshake.
        delay: seconds that a late answer is late.
        outage: seconds of an outage.
        renewed: whether a client has new credentials by now.
    """

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, upstream: str, certificate: Path | None = None):
        self.tls: ssl.SSLContext | None = None
        if certificate:
            self.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self.tls.load_cert_chain(certificate)
        self.held = socket.socket()  # keeps the port while nobody listens
        self.held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.held.bind(("127.0.0.1", 0))
        super().__init__(self.held.getsockname(), _Handler)
        self.upstream = urlsplit(upstream).netloc
        self.faults: list[str] = []
        self.happened: list[str] = []
        self.struck: list[str] = []
        self.requests: list[str] = []
        self.handshakes = 0
        self.delay, self.outage = 0.2, 2.0
        self.renewed: Callable[[], bool] = lambda: True
        self.endpoint = f"http{'s' if certificate else ''}://127.0.0.1:{self.server_port}"
        self._aim, self._spared, self._expired = re.compile(""), 0, False
        self._flipped: set[str] = set()
        self._lock = threading.Lock()
        self._over, self._away = threading.Event(), threading.Event()

    def arm(self, faults: Iterable[str], aim: str = "", after: int = 0) -> None:
        """Do this to the requests that a pattern matches, after so many of them."""
        faults = list(faults)
        assert {*faults} <= {"", *SAYS, *DOES}, f"no such faults: {faults}"
        with self._lock:
            self.faults, self._aim, self._spared = faults, re.compile(aim), after

    def next_fault(self, request: str) -> str:
        """What is done to a request."""
        with self._lock:
            if self._away.is_set():
                return "down"
            if self._expired and not self.renewed():
                return "expired"
            self._expired = False
            if not self.faults or not self._aim.match(request):
                return ""
            if self.faults[0] == "flip" and _end(request) in self._flipped:
                return ""
            if self._spared:
                self._spared -= 1
                return ""
            if not (fault := self.faults.pop(0)):
                return ""
            self.happened.append(fault)
            self.struck.append(request)
            self._expired = fault == "expired"
            if fault == "flip":
                self._flipped.add(_end(request))
            if fault == "expired":
                self.renewed()  # it sees what the client has at this moment
            if fault == "outage":
                self._away.set()
            return fault

    def serve(self) -> None:
        """Answer until the proxy is stopped; an outage closes the socket that listens."""
        self.timeout = 0.05
        while not self._over.is_set():
            self.handle_request()
            if self._away.is_set():
                self.socket.close()
                self._over.wait(self.outage)
                self.socket = socket.socket(self.address_family, self.socket_type)
                self.server_bind()
                self.server_activate()
                self._away.clear()

    def stop(self) -> None:
        """End `serve`."""
        self._over.set()

    def server_close(self) -> None:
        super().server_close()
        self.held.close()

    def finish_request(self, request: Any, client_address: Any) -> None:
        """In the connection's own thread: a client that does not finish its handshake keeps no other one waiting."""
        if self.tls is None:
            super().finish_request(request, client_address)
            return
        with self._lock:
            breaks, self.handshakes = self.handshakes > 0, max(0, self.handshakes - 1)
        if breaks:
            self.happened.append("handshake")
            request.recv(65536)  # all that the client says first: to close with something unread would reset the connection
            return
        with self.tls.wrap_socket(request, server_side=True) as encrypted:
            super().finish_request(encrypted, client_address)

    def handle_error(self, request, client_address) -> None:
        """A connection that was cut on purpose is no news."""


def _end(request: str) -> str:
    """What of a request does not change when a range that broke off is continued; the bit that is flipped is there."""
    return re.sub(r"bytes=\d+", "", request)


class _Handler(BaseHTTPRequestHandler):
    server: FaultyProxy
    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 20  # head and content are one write: between two the thread may rest for longer than a client waits

    def log_message(self, *_: object) -> None:
        pass

    def handle_expect_100(self) -> bool:
        goes_on = super().handle_expect_100()
        self.wfile.flush()  # else the client waits a second until it sends the body
        return goes_on

    def handle_one_request(self) -> None:
        self.raw_requestline = self.rfile.readline(65537)
        if not self.raw_requestline or not self.parse_request():
            self.close_connection = True
            return
        self._forward()

    def _forward(self) -> None:
        wanted = self.headers.get("Range", "")
        self.server.requests.append(f"{self.command} {wanted}".strip())
        fault = self.server.next_fault(f"{self.command} {urlsplit(self.path).path} {wanted}")
        size = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(size // 2 if fault == "reset" else size)
        if fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # closing throws away what is unread
            self.close_connection = True
            return
        if fault in SAYS:
            status, code = SAYS[fault]
            self._answer(status, [], f"<Error><Code>{code}</Code><Message>a fault</Message></Error>".encode())
            return
        if fault in ("down", "outage"):
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
        if fault == "late":
            time.sleep(self.server.delay)
        if fault == "flip":
            content = content[:-1] + bytes([content[-1] ^ 1])
        half = content[: len(content) // 2]
        if fault == "endless":
            self._answer(answer.status, headers, half, None)
        elif fault == "trickle":
            self._answer(answer.status, headers, half, length)
            self._slowly(content[len(half) :])
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
        self.wfile.write(content if self.command != "HEAD" else b"")
        self.wfile.flush()

    def _slowly(self, content: bytes) -> None:
        for start in range(0, len(content), 100):
            self.wfile.write(content[start : start + 100])
            self.wfile.flush()
            time.sleep(0.05)


@contextmanager
def faulty_proxy(upstream: str, certificate: Path | None = None) -> Iterator[FaultyProxy]:
    """A running proxy before the server at this URL; with the file of a certificate and its key it speaks TLS."""
    with FaultyProxy(upstream, certificate) as proxy:
        thread = threading.Thread(target=proxy.serve)
        thread.start()
        try:
            yield proxy
        finally:
            proxy.stop()
            thread.join()
