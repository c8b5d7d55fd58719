"""`best.yaml`: the experiment of the best trial, under a comment that says which ledger it answers, and whether it may still change."""

from cluster.storage import NotFound
from cluster.studies.search import Search
from cluster.studies.sweep import OpenSweep

BEST = "best.yaml"


def delete_other_best(opened: OpenSweep) -> None:
    """Delete the answer to another question: the space, the metrics or the data were others then."""
    try:
        there = opened.store.read(BEST).decode()
    except NotFound:
        return
    if not there.startswith(_question(opened)):
        opened.store.delete(BEST)


def write_best(search: Search) -> None:
    """Keep the best trial's experiment, unless no trial has a score yet."""
    if (leader := search.leader()) is None:
        return
    left = ", ".join(map(str, search.unsettled()))
    standing = f"provisional, trials not settled yet: {left}; the best so far" if left else "the best"
    text = f"{_question(search.opened)}{standing} is trial {leader.number}\n{search.opened.winner(leader.point)}"
    search.opened.store.put(BEST, text.encode())


def _question(opened: OpenSweep) -> str:
    return f"# sweep {opened.sweep.name}, ledger {opened.ledger.name}: "
