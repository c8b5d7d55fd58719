"""A Prometheus beside the runs of this machine, and a Grafana where one is installed, until Ctrl-C.

  python infra/monitor.py [--targets work/prometheus] [--data work/prometheus-data] [--port 9090]

It says the address, and tells when the first sample of a run has come. Both listen on loopback.
"""

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

INFRA = Path(__file__).resolve().parent
LOOPBACK = "127.0.0.1"
POLL = 0.5
"""Seconds between two questions to Prometheus."""

GRAFANA_PORT = 3000


def main() -> int:
    """Start the servers and watch for samples."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", type=Path, default=Path("work/prometheus"), help="folder of the runs' targets (telemetry.targets)")
    parser.add_argument("--data", type=Path, default=Path("work/prometheus-data"), help="folder that Prometheus keeps its data in")
    parser.add_argument("--port", type=int, default=9090, help="port of Prometheus; 0: any free one")
    arguments = parser.parse_args()
    if (program := shutil.which("prometheus")) is None:
        print("prometheus is not installed: apt-get install -y --no-install-recommends prometheus", file=sys.stderr)
        return 1
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    port = arguments.port or _free_port()
    url = f"http://{LOOPBACK}:{port}"
    config = _configuration(arguments.targets.resolve(), arguments.data)
    flags = [f"--config.file={config}", f"--storage.tsdb.path={arguments.data}", f"--web.listen-address={LOOPBACK}:{port}"]
    servers = [subprocess.Popen([program, *flags, "--log.level=error"], start_new_session=True)]
    try:
        print(f"Prometheus: {url}, data in {arguments.data}, watching {arguments.targets}/*.json", flush=True)
        servers += _grafana(url, arguments.data)
        _watch(servers[0], url)
        return servers[0].wait()
    except KeyboardInterrupt:
        return 0
    finally:
        for server in servers:
            server.terminate()
        for server in servers:
            server.wait()


def _configuration(targets: Path, data: Path) -> Path:
    """The project's configuration, for this folder of targets."""
    text = (INFRA / "prometheus" / "prometheus.yml").read_text()
    shipped, rules = "../../work/prometheus/*.json", "rule_files: [rules.yml]"
    assert shipped in text and rules in text
    data.mkdir(parents=True, exist_ok=True)
    targets.mkdir(parents=True, exist_ok=True)
    path = data / "prometheus.yml"
    path.write_text(text.replace(shipped, f"{targets}/*.json").replace(rules, f"rule_files: [{INFRA}/prometheus/rules.yml]"))
    return path


def _grafana(prometheus: str, data: Path) -> list["subprocess.Popen[bytes]"]:
    program = shutil.which("grafana") or shutil.which("grafana-server")
    if program is None:
        print(f"Grafana is not installed here; any Grafana can import {INFRA}/grafana/reactdiff.json", flush=True)
        return []
    folder = (data / "grafana").resolve()
    settings = {
        "GF_PATHS_DATA": str(folder),
        "GF_PATHS_LOGS": str(folder),
        "GF_PATHS_PROVISIONING": str(INFRA / "grafana" / "provisioning"),
        "GF_SERVER_HTTP_ADDR": LOOPBACK,
        "GF_SERVER_HTTP_PORT": str(GRAFANA_PORT),
        "GF_AUTH_ANONYMOUS_ENABLED": "true",
        "PROMETHEUS_URL": prometheus,
        "REACTDIFF_DASHBOARDS": str(INFRA / "grafana"),
    }
    command = [program, *(["server"] if Path(program).name == "grafana" else []), "--homepath", "/usr/share/grafana"]
    print(f"Grafana: http://{LOOPBACK}:{GRAFANA_PORT}/d/reactdiff", flush=True)
    return [subprocess.Popen(command, env={**os.environ, **settings}, stdout=subprocess.DEVNULL, start_new_session=True)]


def _watch(prometheus: "subprocess.Popen[bytes]", url: str) -> None:
    """Tell each run of which a first sample has come."""
    told: set[str] = set()
    query = f"{url}/api/v1/query?{urllib.parse.urlencode({'query': 'reactdiff_cost_dollars'})}"
    while prometheus.poll() is None:
        try:
            with urllib.request.urlopen(query) as answer:
                rows = json.load(answer)["data"]["result"]
        except (urllib.error.URLError, ConnectionError):  # it starts
            rows = []
        for run in sorted({row["metric"]["run"] for row in rows} - told):
            told.add(run)
            print(f"a sample of run {run} has come: {url}/graph?g0.expr=run:reactdiff_items_processed:rate1m", flush=True)
        time.sleep(POLL)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind((LOOPBACK, 0))
        return free.getsockname()[1]


if __name__ == "__main__":
    sys.exit(main())
