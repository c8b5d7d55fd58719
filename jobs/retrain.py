"""One tick of scheduled retraining: if the dataset has grown, train a candidate on it; it becomes champion only if it is better.

  python jobs/retrain.py                                           (jobs/configs/retrain.yaml, over the demo's data)
  python jobs/retrain.py --config jobs/configs/retrain.yaml data.url=s3://bucket/shards run.store=s3://bucket/store
  python jobs/retrain.py --rollback                                (the champion before the present one again)

Candidate and champion are judged on the same clips of the gate split. Everything is in <run.store>/registry/<name>/:
champion.json names the run to deploy, decisions/ says what was compared and why. Kill it at any time and type it again. Exit
code 0: promoted, kept, nothing new, or another tick is at work: of ticks that overlap the second one says so and ends.
"""

import sys
from pathlib import Path

from cluster import cli
from cluster.config.paths import anchored
from cluster.runs import registry
from cluster.runs.lease import Held
from cluster.storage import open_store
from cluster.studies.retrain import Retraining, now, registry_folder, tick
from cluster.telemetry.display import Display

CONFIG = Path(__file__).parent / "configs" / "retrain.yaml"


def main() -> int:
    """Parse the command line and do one tick, or roll back."""
    parser = cli.study_parser(__doc__, "retraining", CONFIG)
    parser.add_argument("--rollback", action="store_true", help="take back the last promotion; trains nothing")
    arguments = parser.parse_args()
    retraining, overrides = Retraining.read(arguments.config), arguments.overrides
    store = registry_folder(retraining, open_store(anchored(retraining.load(overrides)).run.store))
    with Display() as display:
        try:
            decision = registry.roll_back(store, now()) if arguments.rollback else tick(retraining, overrides, display)
        except Held as held:
            display.say(str(held))
            return 0
    if decision is not None:
        print(f"decision {decision.number}: {decision.outcome}, {decision.why}")
        print(f"champion of {store.url} is {decision.champion.run if decision.champion else 'nobody'}")
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
