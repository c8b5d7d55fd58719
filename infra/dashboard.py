"""The Grafana dashboard, made of the table of metrics and of the recorded series. `make dashboard` writes infra/grafana/reactdiff.json."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from grafana_foundation_sdk.builders.dashboard import Dashboard, DatasourceVariable, QueryVariable, Row
from grafana_foundation_sdk.builders.prometheus import Dataquery
from grafana_foundation_sdk.builders.timeseries import Panel
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import DataSourceRef

from cluster.telemetry.metrics import METRICS, MetricSpec

UID = "reactdiff"
FILE = Path(__file__).parent / "grafana" / "reactdiff.json"

CHOSEN = 'run=~"$run"'
"""Selects the runs that are chosen at the top of the dashboard."""

RATE = "$__rate_interval"


class Curve(NamedTuple):
    """A panel: a query in which CHOSEN stands, what a line is called, and a unit of Grafana's."""

    row: str
    title: str
    query: str
    legend: str
    unit: str


FIRST = (
    Curve("Overview", "Items a second", f"run:reactdiff_items_processed:rate1m{{{CHOSEN}}}", "{{run}} {{trial}} {{stage}}", "ops"),
    Curve("Overview", "Share of each state", f"run:reactdiff_goodput:share5m{{{CHOSEN}}}", "{{run}} {{trial}} {{state}}", "percentunit"),
    Curve("Overview", "Slow steps (95 %)", f"run:reactdiff_step_seconds:p95_5m{{{CHOSEN}}}", "{{run}} {{trial}} {{phase}}", "s"),
    Curve("Overview", "Model FLOPs utilisation", f"run:reactdiff_mfu:ratio_rate5m{{{CHOSEN}}}", "{{run}} {{stage}}", "percentunit"),
    Curve("Overview", "Alerts", f'ALERTS{{alertstate="firing", {CHOSEN}}}', "{{alertname}} {{run}}", "short"),
)
"""What comes before the metrics themselves."""


def curves() -> Iterator[Curve]:
    """All panels, a row after the other, each metric in one."""
    yield from FIRST
    for row in dict.fromkeys(metric.row for metric in METRICS):
        for metric in METRICS:
            if metric.row == row:
                yield _curve(metric)


def dashboard() -> str:
    """The dashboard as Grafana imports it, in JSON."""
    source = DataSourceRef(type_val="prometheus", uid="${datasource}")
    made = Dashboard("ReactDiff").uid(UID).tags(["reactdiff"]).refresh("10s").time("now-1h", "now").timezone("browser")
    made.with_variable(DatasourceVariable("datasource").label("Prometheus").type("prometheus"))
    runs = QueryVariable("run").label("Run").datasource(source).query("label_values(reactdiff_cost_dollars, run)")
    made.with_variable(runs.multi(True).include_all(True))
    row = ""
    for number, curve in enumerate(curves(), start=1):
        if curve.row != row:
            row = curve.row
            made.with_row(Row(row).id(1000 + number))
        query = Dataquery().ref_id("A").expr(curve.query).legend_format(curve.legend)
        panel = Panel().id(number).title(curve.title).unit(curve.unit).datasource(source).height(8).span(8)
        made.with_panel(panel.with_target(query))
    return JSONEncoder(sort_keys=True, indent=1).encode(made.build()) + "\n"


def _curve(metric: MetricSpec) -> Curve:
    if metric.name == "restarts":  # whole ones, and only the classes that there were
        query = f"run:reactdiff_restarts:increase1h{{{CHOSEN}}} > 0"
        return Curve(metric.row, "Restarts in an hour", query, "{{run}} {{trial}} {{class}}", metric.unit)
    name, by = f"reactdiff_{metric.name}", ", ".join(("run", "trial", *metric.labels))
    if metric.kind == "counter":
        query = f"sum by ({by}) (rate({name}_total{{{CHOSEN}}}[{RATE}]))"
    elif metric.kind == "histogram":
        query = f"histogram_quantile(0.5, sum by ({by}, le) (rate({name}_bucket{{{CHOSEN}}}[{RATE}])))"
    else:
        query = f"{name}{{{CHOSEN}}}"
    title = metric.name.replace("_", " ").capitalize() + (" a second" if metric.kind == "counter" else "")
    legend = " ".join(f"{{{{{label}}}}}" for label in ("run", "trial", *metric.labels))
    return Curve(metric.row, title, query, legend, metric.unit)


if __name__ == "__main__":
    FILE.write_text(dashboard())
    print(f"{FILE}: {sum(1 for _ in curves())} panels", file=sys.stderr)
