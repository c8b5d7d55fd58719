"""Every metric of a run, in one table: what Prometheus is told, and what the dashboard shows.

Nothing but the standard library is imported, since a rank's meter is built before anything heavy.
"""

from typing import Literal, NamedTuple

Kind = Literal["counter", "gauge", "histogram"]
Source = Literal["totals", "rank 0", "every rank", "driver"]


class MetricSpec(NamedTuple):
    """A metric: its name in Prometheus is `reactdiff_` and this, and `_total` for a counter.

    Attributes:
        name: without all that.
        kind: of Prometheus.
        help: a sentence.
        source: where its value comes from: the totals of ranks, summed; a gauge that rank 0 or every rank sets in its meter; the driver.
        unit: Grafana's name for it, of a counter's increase in a second.
        labels: beside run, life and trial.
        row: of the dashboard.
        key: in `Totals`, for those that come from there.
    """

    name: str
    kind: Kind
    help: str
    source: Source
    unit: str = "short"
    labels: tuple[str, ...] = ("stage",)
    row: str = "Training"
    key: str = ""


METRICS = (
    MetricSpec(
        "items_processed", "counter", "Items the ranks trained on, those replayed after a restart included.", "totals", "ops", key="items"
    ),
    MetricSpec(
        "progress_items", "gauge", "Progress of the training state in items; falls back to the checkpoint after a restart.", "rank 0"
    ),
    MetricSpec("loss", "gauge", "Loss of the latest step over the global batch.", "rank 0"),
    MetricSpec("gradient_norm", "gauge", "Norm of the latest step's gradient before clipping.", "rank 0"),
    MetricSpec("learning_rate", "gauge", "Learning rate of the latest step.", "rank 0", "sci"),
    MetricSpec("val_progress_items", "gauge", "Progress of the checkpoint last scored on clips of val.", "rank 0", row="Validation"),
    MetricSpec("val_frcorr", "gauge", "Its FRCorr there.", "rank 0", row="Validation"),
    MetricSpec("val_frdist", "gauge", "Its FRDist there.", "rank 0", row="Validation"),
    MetricSpec(
        "goodput_seconds",
        "counter",
        "Worker seconds that the run held, or waited for, each in exactly one state.",
        "driver",
        "short",
        ("stage", "state"),
        "Time and money",
    ),
    MetricSpec("cost_dollars", "gauge", "What the run has cost, earlier lives included.", "driver", "currencyUSD", (), "Time and money"),
    MetricSpec("budget_dollars", "gauge", "What the run may cost.", "driver", "currencyUSD", (), "Time and money"),
    MetricSpec(
        "step_seconds",
        "histogram",
        "Seconds of a rank in a phase of a step, of steps with that phase.",
        "driver",
        "s",
        ("stage", "phase"),
        "Speed",
    ),
    MetricSpec(
        "flops", "counter", "Floating point operations of the model, without recomputation.", "totals", "flops", row="Speed", key="flops"
    ),
    MetricSpec(
        "peak_flops", "gauge", "Peak operations per second of the rank's device.", "every rank", "flops", ("stage", "rank"), "Speed"
    ),
    MetricSpec("peak_memory_bytes", "gauge", "Peak device memory of the rank.", "every rank", "bytes", ("stage", "rank"), "Speed"),
    MetricSpec("power_watts", "gauge", "Power that the rank's GPU draws.", "every rank", "watt", ("stage", "rank"), "GPUs"),
    MetricSpec("temperature_celsius", "gauge", "Temperature of the rank's GPU.", "every rank", "celsius", ("stage", "rank"), "GPUs"),
    MetricSpec(
        "xid",
        "gauge",
        "The driver's number of the last error of the rank's GPU since it began; 0: none.",
        "every rank",
        "short",
        ("stage", "rank"),
        "GPUs",
    ),
    MetricSpec("read_bytes", "counter", "Bytes the ranks read from storage.", "totals", "Bps", row="Storage", key="bytes"),
    MetricSpec(
        "store_faults",
        "counter",
        "Requests of the ranks to storage that failed where to try again may help.",
        "totals",
        "ops",
        row="Storage",
        key="store_faults",
    ),
    MetricSpec(
        "checkpoint_time_seconds",
        "gauge",
        "Unix time of the latest checkpoint, or of when the ranks began.",
        "rank 0",
        "dateTimeFromNow",
        row="Storage",
    ),
    MetricSpec(
        "quarantined_items",
        "gauge",
        "Items that count nothing: damaged bytes, or a loss or gradient that is not finite.",
        "rank 0",
        row="Storage",
    ),
    MetricSpec("at", "gauge", "1 at the step that the run is at, 0 at those that it has left.", "driver", row="Workers"),
    MetricSpec("heartbeat_seconds", "gauge", "Unix time at which the driver told its numbers.", "driver", "dateTimeFromNow", (), "Workers"),
    MetricSpec("tasks_done", "counter", "Tasks that are done: shards of latents, parts of the evaluation.", "driver", "ops", row="Workers"),
    MetricSpec(
        "ranks", "gauge", "Ranks of the present worker group by what they are at.", "driver", "short", ("stage", "phase"), "Workers"
    ),
    MetricSpec(
        "rank_info",
        "gauge",
        "Where each rank of the present worker group is; 1.",
        "driver",
        "short",
        ("stage", "rank", "host", "pid"),
        "Workers",
    ),
    MetricSpec(
        "restarts", "counter", "Restarts of the worker group, by failure class, or `resized`.", "driver", "short", ("class",), "Workers"
    ),
    MetricSpec("waiting_seconds", "counter", "Seconds in which the run waited for room for its ranks.", "driver", "short", (), "Workers"),
    MetricSpec("failed", "gauge", "The class of the failure that ends the run; 1.", "driver", "short", ("class",), "Workers"),
)

NAMED = {metric.name: metric for metric in METRICS}
