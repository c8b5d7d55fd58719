"""The table of a comparison: what each row reaches over its seeds, beside oracles and baselines."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cluster.evaluation.rows import RANDOM, retrieval_name
from cluster.studies.kept_scores import ClipScores
from reactdiff.data.synthetic.oracles import frontier_names, oracle_name
from reactdiff.metrics.frontier import frontier_share, share_interval
from reactdiff.metrics.partial import ROUGHNESS
from reactdiff.metrics.report import gap_closed, largest

FRONTIER = ("FRCorr", "FRDiv")


@dataclass(frozen=True)
class TableRow:
    """A line of the table.

    Attributes:
        seeds: what it scored, by seed.
        chunk: frames in which a model reacts, 0 if it hears the whole clip; None if it is no model that was trained. A line of a model's
            draws with units cut has its chunk, and no size.
        size: parameters, GFLOP of training on one item of the last stage, and TFLOP of all its training, of such a model.
    """

    seeds: dict[int, ClipScores]
    chunk: int | None = None
    size: tuple[int, float, float] | None = None

    def mean_of_seeds(self) -> ClipScores:
        """The seeds' mean for every clip, whose clips are drawn anew to say what another test set would have given."""
        every = list(self.seeds.values())
        return ClipScores(np.mean([one.values for one in every], axis=0), every[0].predictions)


def beside(row: str, model: str) -> str:
    """The name of a line that stands beside one model alone, such as its draws with units cut."""
    return f"{row} ({model})"


def markdown(rows: Mapping[str, TableRow]) -> str:
    """The table in Markdown."""
    heads, lines = cells(rows)
    every = [["", *heads], ["---", *["---:"] * len(heads)], *([name, *line] for name, line in lines.items())]
    return "\n".join("| " + " | ".join(line) + " |" for line in every)


def cells(rows: Mapping[str, TableRow]) -> tuple[list[str], dict[str, list[str]]]:
    """Heads, and a line for each row, of its scores under every seed; a column of which no row has anything is left out."""
    found = {name: [one.metrics() for one in row.seeds.values()] for name, row in rows.items()}
    means = {name: float(np.mean([one["FRCorr"] for one in each])) for name, each in found.items()}
    whole = {name: row.mean_of_seeds() for name, row in rows.items()}
    bounds = {name: one.intervals() for name, one in whole.items()}

    def spread(name: str, value: Callable[[dict[str, float]], float], digits: int = 3) -> str:
        return _spread([value(one) for one in found[name]], digits)

    def interval(name: str, metric: str, digits: int) -> str:
        low, high = bounds[name][metric]
        return "–" if np.isnan(low) else f"{low:.{digits}f} .. {high:.{digits}f}"

    def share(name: str) -> str:
        chunk = rows[name].chunk
        if chunk is None or any(other not in rows for other in frontier_names(chunk)):
            return ""
        points = [(whole[other].metrics()["FRCorr"], whole[other].metrics()["FRDiv"]) for other in frontier_names(chunk)]
        mean = np.mean([frontier_share(one["FRCorr"], one["FRDiv"], points) for one in found[name]])
        low, high = share_interval(whole[name].columns(*FRONTIER), [whole[other].columns(*FRONTIER) for other in frontier_names(chunk)])
        return f"{mean:.0%} ({low:.0%} .. {high:.0%})"

    def energy(name: str, metric: str) -> str:
        chunk, said = rows[name].chunk, spread(name, lambda one: one[metric], 4)
        rival = None if chunk is None else found.get(retrieval_name(chunk))
        worse = rival and not np.mean([one[metric] for one in found[name]]) < np.mean([one[metric] for one in rival])
        return f"{said}, behind {retrieval_name(chunk or 0)}" if worse else said

    def counted(name: str, place: int) -> str:
        size = rows[name].size
        return f"{size[place]:,}" if size and place == 0 else f"{size[place]:.3g}" if size else ""

    def way(name: str) -> str:
        oracle = oracle_name(rows[name].chunk or 0)
        return f"{gap_closed(means[name], means[RANDOM], means[oracle]):.0%}" if {RANDOM, oracle} <= rows.keys() else ""

    columns: dict[str, Callable[[str], str]] = {
        "FRCorr ↑": lambda name: spread(name, lambda one: one["FRCorr"]),
        "95 % over clips": lambda name: interval(name, "FRCorr", 2),
        "energy score ↓": lambda name: energy(name, "EnergyScore"),
        "95 %": lambda name: interval(name, "EnergyScore", 3),
        "per frame ↓": lambda name: energy(name, "EnergyScore_frame"),
        "share of frontier (95 %)": share,
        "way to oracle": way,
        "FRCorr of mean": lambda name: spread(name, lambda one: one["FRCorr_of_mean"]),
        "without mouth": lambda name: spread(name, lambda one: one["FRCorr_no_mouth"]),
        "FRDist ↓": lambda name: spread(name, lambda one: one["FRDist"]),
        "FRDiv": lambda name: spread(name, lambda one: one["FRDiv"]),
        "FRVar": lambda name: spread(name, lambda one: one["FRVar"]),
        "steps inside": lambda name: spread(name, lambda one: one[ROUGHNESS[0]], 2),
        "at ends": lambda name: spread(name, lambda one: largest([one[step] for step in ROUGHNESS[1:]]), 2),
        "FRSyn, varying ↓": lambda name: spread(name, lambda one: one["FRSyn_varying"]),
        "parameters": lambda name: counted(name, 0),
        "GFLOP / item": lambda name: counted(name, 1),
        "TFLOP, all training": lambda name: counted(name, 2),
    }
    made = {head: [cell(name) for name in rows] for head, cell in columns.items()}
    made = {head: column for head, column in made.items() if any(column)}
    return list(made), {name: [column[number] for column in made.values()] for number, name in enumerate(rows)}


def _spread(values: Sequence[float], digits: int) -> str:
    """Mean and, over several seeds, their standard deviation; a dash where it is undefined."""
    if np.isnan(values).any():
        return "–"
    mean = float(np.mean(values))
    digits = digits if abs(mean) < 10 else 1
    spread = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 and np.std(values) > 0 else ""
    return f"{mean:.{digits}f}{spread}"
