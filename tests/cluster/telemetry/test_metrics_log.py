"""Rows of metrics where lives, attempts and groups of the same numbers overlap, on both kinds of store."""

from cluster.storage import Store
from cluster.telemetry.metrics_log import MetricsLog, read_rows


def write(store: Store, life: int, attempt: int, rows: dict[int, float]) -> None:
    log = MetricsLog(store, life, attempt, "autoencoder")
    for progress, loss in rows.items():
        log.add(progress=progress, loss=loss)
    log.flush()


def losses(store: Store) -> dict[int, float]:
    return {row["progress"]: row["loss"] for row in read_rows(store, "autoencoder")}


def test_where_attempts_overlap_the_newest_one_s_rows_count_whoever_wrote_last(store: Store) -> None:
    write(store, 1, 10, {6: 0.5, 12: 0.5, 18: 0.5})
    write(store, 1, 9, {6: 0.9, 12: 0.9})
    write(store, 2, 0, {12: 0.2})
    write(store, 1, 11, {12: 0.3})
    assert losses(store) == {6: 0.5, 12: 0.2, 18: 0.5}


def test_a_group_that_meets_the_segment_of_its_twin_keeps_both(store: Store) -> None:
    for _ in range(3):
        write(store, 1, 0, {6: 0.5, 12: 0.25})
    write(store, 1, 0, {6: 0.5, 12: 0.25, 18: 0.125})
    assert losses(store) == {6: 0.5, 12: 0.25, 18: 0.125}
    assert len([entry for entry in store.list("metrics/000001.0/autoencoder-000000000000006")]) == 4
