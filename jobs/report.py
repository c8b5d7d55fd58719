"""Make the page about a run, report.html in its folder, from what the folder holds now: also of a run that goes on, or failed."""

import argparse
import sys

from cluster import cli
from cluster.evaluation.report import write_report
from cluster.runs.saved import open_folder


def main() -> int:
    """Parse the command line and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    cli.add_run(parser)
    arguments = parser.parse_args()
    print(write_report(open_folder(arguments.run, arguments.store).store))
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
