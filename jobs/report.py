"""Make the page about a run, report.html in its folder, from what the folder holds now: also of a run that goes on, or failed."""

import argparse
import sys

from cluster import cli
from cluster.config.schema import Run
from cluster.evaluation.report import write_report
from cluster.runs.saved import open_folder


def main() -> int:
    """Parse the command line and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", metavar="RUN", help="name, folder or URL of a run")
    parser.add_argument("--store", default=Run().store, help="folder or URL that a mere name is looked up in")
    arguments = parser.parse_args()
    print(write_report(open_folder(arguments.run, arguments.store).store))
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
