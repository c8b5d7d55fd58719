"""Prove that a run survives: run it undisturbed, then under a seeded script of faults, and compare what both leave.

python jobs/prove.py --config jobs/configs/demo.yaml --seed 3
python jobs/prove.py --config jobs/configs/demo.yaml --kinds kill,s3_30s
python jobs/prove.py --config jobs/configs/demo.yaml --kinds all --seed 0,1,2 --write docs/reliability.md
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from cluster import cli
from cluster.proof.experiment import Case
from cluster.proof.page import ProofsPage
from cluster.proof.prove import Prover, own_prefix
from cluster.proof.script import FAULT_KINDS, choose_kinds, kind_name, script, steps_of_scripts
from cluster.runtime.failures import PERSON
from cluster.runtime.machines import MachineError, NamespacesForbidden
from cluster.telemetry.display import Display

EPILOG = """what it does
  It makes hosts of its own on this machine, of Linux namespaces: a head, a machine for the driver, one for each rank, and an S3
  server with a copy of the dataset. It needs root or user namespaces, and nothing outside of them is touched. The configuration is
  shortened to the script, which is said. Each fault comes at a step of the run's own and is shown to have happened. Where the run
  stops, the fault is lifted and the same command given again, as a supervisor would.

what it says
  For each fault: when the ranks or the driver were started again, when training went on, the items that were trained on again, and
  whether that was by itself or by the same command. Then whether the weights are identical (workers.count=[1,3]: of another
  placement, with the largest difference of a loss) and the ledger equal, or at which positions it differs. A script that fails
  is shortened until leaving out any one of its faults lets it pass, and that one is printed. Exit code 0: proven. 1: not.

on a cluster
  With RAY_ADDRESS set it runs on that cluster, with the data.url and run.store of the configuration, and does only what needs no
  root. It lists what it will do and asks. It touches processes of its own runs, and objects below <run.store>/proofs/, which stay.

kinds of faults
"""


SEED = "of the script: which kinds, when, on which hosts (default: 0); 0,1,2: one script after the other, beside one undisturbed run"


def main() -> int:
    """Parse the command line and prove."""
    kinds = "\n".join(f"  {name:<15}{kind.means}" for name, kind in FAULT_KINDS.items())
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, epilog=EPILOG + kinds, formatter_class=formatter)
    parser.add_argument("--config", type=Path, required=True, help="YAML file of the experiment; its dataset must be there")
    parser.add_argument("--seed", type=_seeds, default=[0], help=SEED)
    parser.add_argument("--kinds", default="", help="kinds with commas, or all; default: five that the seed chooses")
    what = "put each fault into proofs.csv beside this file, and tables over all seeds there between the <!-- proofs --> marks of this file"
    parser.add_argument("--write", type=Path, metavar="FILE.md", help=what)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="change one key of the experiment")
    parser.add_argument("--yes", action="store_true", help="on a cluster: do not ask")
    arguments = parser.parse_intermixed_args()
    address = os.environ.get("RAY_ADDRESS", "").removeprefix("local")  # `local` means no cluster, as everywhere
    scripts = {seed: choose_kinds(arguments.kinds, seed, hosts=not address) for seed in arguments.seed}
    keep = ProofsPage(arguments.write).keep if arguments.write else None
    case = Case.read(arguments.config, arguments.overrides, copied=not address)
    folder = Path(tempfile.mkdtemp(prefix="proof-"))
    if address and not _agreed(arguments.yes, address, folder, case, scripts):
        return PERSON
    try:
        with Display() as display:
            display.say(f"logs of hosts and drivers: {folder}")
            return Prover(case, folder, display, on_cluster=bool(address)).prove(scripts, keep)
    except (MachineError, NamespacesForbidden) as error:
        print(f"error: {error}", file=sys.stderr)
        return PERSON


def _seeds(text: str) -> list[int]:
    return [int(seed) for seed in text.split(",")]


def _agreed(yes: bool, address: str, folder: Path, case: Case, scripts: Mapping[int, Sequence[str]]) -> bool:
    """Say what will be done to a cluster, and ask."""
    experiment, steps = case.experiment, steps_of_scripts(scripts, case.stages)
    print(f"on the cluster {address}, to runs of this command and to nothing else:")
    print(f"  train {steps} steps undisturbed, with drivers on this machine and objects in {experiment.run.store}/{own_prefix(folder)}")
    for seed, kinds in scripts.items():
        print(f"  the same again, in which, by seed {seed} (later, if its steps are fast):")
        for fault in script(seed, kinds, steps, experiment.workers.most):
            print(f"    {fault.stage} {fault.step}: {FAULT_KINDS[kind_name(fault)].means} (rank {fault.rank})")
    print("  if it fails: the same with parts of these faults")
    try:
        return yes or input("go on? [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:  # nobody is there to ask
        print("nobody answered; --yes goes on without asking")
        return False


if __name__ == "__main__":
    sys.exit(cli.run(main))
