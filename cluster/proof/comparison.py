"""Whether two runs are the same, by what they left; and what is told of the faults that one of them got over."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cluster.proof.script import kind_name
from cluster.runs.export import newest_export
from cluster.runtime.faults import Fault
from cluster.storage import Store
from cluster.telemetry.metrics_log import every_row, read_rows

NAMED = 10
"""Differing positions that are told one by one."""

HEAD = ("fault", "where", "when", "noticed after", "went on after", "work lost", "went on")


@dataclass(frozen=True)
class Trace:
    """What a finished run left.

    Attributes:
        weights: stage -> content hash of its exported weights.
        rows: stage -> progress after a step -> (ledger, loss) of the step.
    """

    weights: Mapping[str, str]
    rows: Mapping[str, Mapping[int, tuple[float, float]]]


@dataclass(frozen=True)
class Endured:
    """A fault that happened, and how the run got over it.

    Attributes:
        fault: of the script.
        host: where it happened.
        step: that the run had told last.
        detail: what shows that it happened.
        noticed: seconds until ranks or driver were started again, infinite where nothing was.
        going: seconds until the run trained (again), infinite where it was not seen to.
        items: that were trained on again.
        how: "by itself", or "same command" and its exit code.
    """

    fault: Fault
    host: str
    step: int
    detail: str
    noticed: float
    going: float
    items: int
    how: str


@dataclass(frozen=True)
class Sameness:
    """What came of comparing two runs.

    Attributes:
        proven: it is what was promised.
        sentences: that say so.
        steps: whose ledgers were compared.
        weights: stage -> content hash of the weights of the run that was compared.
    """

    proven: bool
    sentences: list[str]
    steps: int
    weights: Mapping[str, str]


def read_trace(run: Store, stages: Sequence[str]) -> Trace:
    """What the run in this folder left.

    Raises:
        StorageError: if a stage is not finished.
    """
    rows = {stage: {row["progress"]: (row["ledger"], row["loss"]) for row in read_rows(run, stage)} for stage in stages}
    return Trace({stage: newest_export(run, stage).hash for stage in stages}, rows)


def steps_a_second(run: Store, stages: Sequence[str]) -> float:
    """Of the fastest stage of an undisturbed run with a row for each step, checkpoints included."""
    speeds = [0.0]
    for stage in stages:
        times = sorted(row["time"] for _, row in every_row(run, stage))
        if len(times) > 1 and times[-1] > times[0]:
            speeds.append((len(times) - 1) / (times[-1] - times[0]))
    return max(speeds)


def compare_traces(whole: Trace, disturbed: Trace, placement: bool) -> Sameness:
    """Compare a disturbed run with the undisturbed one.

    Args:
        whole: the undisturbed one.
        disturbed: the other.
        placement: whether both were placed in the same way, so that the weights have to be identical.
    """
    stages = _on_the_same_data(whole, disturbed)
    differing = _ledger_differences(whole, disturbed, stages)
    steps = sum(len(whole.rows[stage]) for stage in stages)
    identical = whole.weights == disturbed.weights
    if identical:
        said = [f"weights: identical ({', '.join(f'{stage} {digest}' for stage, digest in whole.weights.items())})"]
    elif placement:
        pairs = ((stage, digest, disturbed.weights.get(stage, "nothing")) for stage, digest in whole.weights.items())
        both = [f"{stage} {other} and not {digest}" for stage, digest, other in pairs if other != digest]
        said = [f"weights: NOT identical ({', '.join(both)})"]
    else:
        largest = _largest_difference(whole, disturbed, stages)
        said = [f"weights: of another placement; the largest difference of a step's loss is {largest:.2g} of it"]
    if differing:
        more = [f"and {len(differing) - NAMED} more"] if len(differing) > NAMED else []
        said += [f"ledger: differs in {len(differing)} of {steps} steps:", *(f"  {line}" for line in [*differing[:NAMED], *more])]
    else:
        said.append(f"ledger: equal in all {steps} steps; every item was used exactly as often as without faults")
    for stage in [stage for stage in whole.rows if stage not in stages]:
        said.append(f"stage {stage} was trained on latents of other last bits: its ledger says nothing")
    return Sameness(steps > 0 and not differing and (identical or not placement), said, steps, disturbed.weights)


def faults_table(endured: Sequence[Endured]) -> str:
    """A line for each fault, in Markdown."""
    lines = [HEAD, tuple("---" for _ in HEAD), *map(_line, endured)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEAD))]
    return "\n".join("| " + " | ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) + " |" for line in lines)


def _line(one: Endured) -> tuple[str, ...]:
    seconds = [f"{value:.1f} s" if value < math.inf else "–" for value in (one.noticed, one.going)]
    return (kind_name(one.fault), one.host, f"{one.fault.stage} {one.step}", *seconds, f"{one.items} items", one.how)


def _on_the_same_data(whole: Trace, disturbed: Trace) -> list[str]:
    """The stages up to the first whose weights differ: what comes after it is trained on what that has made."""
    stages = []
    for stage in whole.rows:
        stages.append(stage)
        if whole.weights.get(stage) != disturbed.weights.get(stage):
            break
    return stages


def _ledger_differences(whole: Trace, disturbed: Trace, stages: Sequence[str]) -> list[str]:
    """The steps whose ledgers differ, by the positions in them."""
    found = []
    for stage in stages:
        rows = whole.rows[stage]
        others, before = disturbed.rows.get(stage, {}), 0
        for progress in sorted({*rows, *others}):
            one, other = (_ledger(side, progress) for side in (rows, others))
            if one != other:
                found.append(f"{stage}, positions {before} to {progress - 1}: {other} and not {one}")
            before = progress
    return found


def _ledger(rows: Mapping[int, tuple[float, float]], progress: int) -> str:
    return f"{rows[progress][0]:.0f}" if progress in rows else "no step"


def _largest_difference(whole: Trace, disturbed: Trace, stages: Sequence[str]) -> float:
    """Of the losses of a step, relative to the undisturbed one."""
    pairs = [
        (loss, disturbed.rows[stage][progress][1])
        for stage in stages
        for progress, (_, loss) in whole.rows[stage].items()
        if progress in disturbed.rows.get(stage, {})
    ]
    return max((abs(other - one) / abs(one) for one, other in pairs if one), default=math.inf)
