"""The registry of a model: who is champion, and every decision that made it so.

`decisions/<n>.json` is immutable and its number is taken by create, so of two ticks at once exactly one decides n, and the other
has to look at what was decided. `champion.json` shows what the newest decision says, for deployment; it only goes forward.
"""

import json
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from cluster.storage import AlreadyExists, NotFound, Permanent, Stale, Store

CHAMPION = "champion.json"


@dataclass(frozen=True)
class Version:
    """A trained model: a run at its end.

    Attributes:
        run: name of the run, below `runs/` of the store.
        manifest: hash of the dataset state it was trained on.
        progress: of its export of each stage, in items.
        weights: hash of its export of each stage.
    """

    run: str
    manifest: str
    progress: dict[str, int]
    weights: dict[str, str]


@dataclass(frozen=True)
class Decision:
    """What was decided, and on which grounds.

    Attributes:
        outcome: what happened.
        champion: who is champion from now on; None while no candidate was good enough.
        why: in a sentence, for people.
        candidate: who was compared with the champion before; None when rolled back.
        before: who was champion before; None at the first decision.
        compared: the numbers: split, clips, predictions, rule, scores of both.
        at: time, for people.
        number: of this decision; 0 until it is taken.
    """

    outcome: Literal["promoted", "kept", "rolled back"]
    champion: Version | None
    why: str
    candidate: Version | None = None
    before: Version | None = None
    compared: dict[str, Any] = field(default_factory=dict)
    at: str = ""
    number: int = 0


def newest_decision(store: Store) -> Decision | None:
    """The decision that counts, None before the first."""
    numbers = _numbers(store)
    return read_decision(store, numbers[-1]) if numbers else None


def read_decision(store: Store, number: int) -> Decision:
    """The decision of this number.

    Raises:
        ValueError: if another version of this program took it.
    """
    values = json.loads(store.read(_key(number)))
    if unknown := sorted(values.keys() - {field.name for field in fields(Decision)}):
        raise ValueError(
            f"{store.url}/{_key(number)} has {', '.join(unknown)}, which this program does not know: go on with the newer one that wrote it"
        )
    versions = {name: Version(**values[name]) if values[name] else None for name in ("champion", "candidate", "before")}
    return Decision(**{**values, **versions})


def decision_on(store: Store, manifest: str) -> Decision | None:
    """The newest decision about a candidate trained on this dataset state."""
    every = (read_decision(store, number) for number in reversed(_numbers(store)))
    return next((one for one in every if one.candidate and one.candidate.manifest == manifest), None)


def append_decision(store: Store, decision: Decision, after: Decision | None) -> Decision:
    """Take a decision that was made in the knowledge of `after`, the newest one then, and show its champion.

    Raises:
        AlreadyExists: if another was taken since; look at it and decide again.
    """
    taken = Decision(**{**vars(decision), "number": after.number + 1 if after else 1})
    store.create(_key(taken.number), json.dumps(asdict(taken), indent=1).encode())
    show_champion(store)
    return taken


def show_champion(store: Store) -> None:
    """Bring `champion.json` up to the newest decision; after a crash in `append_decision` the next tick does it."""
    while (decision := newest_decision(store)) is not None and decision.champion is not None:
        data = json.dumps({"decision": decision.number, **asdict(decision.champion)}, indent=1).encode()
        try:
            shown, etag = store.get(CHAMPION)
            if json.loads(shown)["decision"] >= decision.number:
                return
            store.replace(CHAMPION, data, etag)
        except NotFound:
            try:
                store.create(CHAMPION, data)
            except AlreadyExists:
                continue
        except Stale:
            continue


def roll_back(store: Store, at: str) -> Decision:
    """Make the champion before the present one champion again, as a decision of its own.

    Raises:
        StorageError: if there was none before, or another decision is taken at this moment.
    """
    last = newest_decision(store)
    every = (read_decision(store, number) for number in reversed(_numbers(store)))
    promoted = next((one for one in every if last and one.outcome == "promoted" and one.champion == last.champion), None)
    if promoted is None or promoted.champion is None or promoted.before is None:
        raise Permanent(f"{store.url} has no champion before the present one to go back to")
    why = f"by hand: {promoted.champion.run}, promoted by decision {promoted.number}, gives way to the champion before it"
    return append_decision(store, Decision("rolled back", promoted.before, why, before=promoted.champion, at=at), last)


def _numbers(store: Store) -> list[int]:
    return [int(entry.key.removeprefix("decisions/").removesuffix(".json")) for entry in store.list("decisions/")]


def _key(number: int) -> str:
    return f"decisions/{number:06d}.json"
