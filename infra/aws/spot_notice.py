"""Tell Ray of this machine's spot interruption notice, so that the runs on it write a checkpoint and go elsewhere.

  python infra/aws/spot_notice.py

Runs beside Ray on a spot machine, from `ray_config.yaml`. EC2 gives two minutes' notice in the machine's metadata (the item
`spot/instance-action`, https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/spot-instance-termination-notices.html) and tells nobody else.
Ray is told by infra/drain.py.
"""

import argparse
import datetime
import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # it is run as a script, with whatever Python runs Ray

from infra.drain import drain

METADATA = "http://169.254.169.254"
EVERY = 5.0
"""Seconds between two looks, as EC2 advises."""


def notice(metadata: str) -> datetime.datetime | None:
    """When this machine will be taken away, None while it will not.

    Args:
        metadata: URL of the metadata service, asked in its version 2, with a token.

    Raises:
        OSError: if the service does not answer.
    """
    ask = urllib.request.Request(f"{metadata}/latest/api/token", method="PUT", headers={"X-aws-ec2-metadata-token-ttl-seconds": "60"})
    token = urllib.request.urlopen(ask, timeout=5).read().decode()
    look = urllib.request.Request(f"{metadata}/latest/meta-data/spot/instance-action", headers={"X-aws-ec2-metadata-token": token})
    try:
        said = json.loads(urllib.request.urlopen(look, timeout=5).read())
    except urllib.error.HTTPError as error:
        if error.code == 404:  # no notice
            return None
        raise
    return datetime.datetime.fromisoformat(said["time"])


def _utc() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


def watch(
    metadata: str,
    drain: Callable[[int], None],
    pause: Callable[[float], None] = time.sleep,
    now: Callable[[], datetime.datetime] = _utc,
) -> None:
    """Look for the notice until it comes, then tell the cluster, until that has worked.

    Args:
        metadata: URL of the metadata service.
        drain: tells the cluster that this machine goes in so many seconds.
        pause: waits so many seconds.
        now: the time, as the notice counts it.
    """
    while True:
        try:
            if (end := notice(metadata)) is not None:
                left = max(1, round((end - now()).total_seconds()))
                print(f"spot interruption notice: this machine will be taken away in {left} s", flush=True)
                drain(left)
                return
        except (OSError, ValueError, LookupError, subprocess.CalledProcessError) as error:
            print(f"asked again in {EVERY:g} s: {error}", file=sys.stderr, flush=True)
        pause(EVERY)


def main() -> int:
    """Parse the command line and watch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--metadata", default=METADATA, help="URL of the metadata service (default: EC2's)")
    arguments = parser.parse_args()
    watch(arguments.metadata, lambda seconds: drain(seconds, "spot interruption notice"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
