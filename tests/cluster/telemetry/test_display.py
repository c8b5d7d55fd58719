"""The display on a terminal and in a log, and the TensorBoard events."""

import io
import os
import re
import subprocess
import sys
import threading

import pytest

from cluster.telemetry.display import Display
from cluster.telemetry.tensorboard import EventWriter


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def run(display, clock, steps, seconds):
    with display:
        display.stage("autoencoder", total=2000, start=1000)
        for step in range(1, steps + 1):
            clock.now += seconds
            display.update(1000 + step, loss=1 / step, items_per_second=10.0, data_wait_share=0.03)
        display.say("checkpoint [bold] at 1 004 :smile:")


@pytest.fixture
def terminal(monkeypatch):
    """A real pseudo-terminal: the file to write to, and a function that closes it and returns what was shown."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    leader, follower = os.openpty()
    shown = []

    def read():
        while True:
            try:
                shown.append(os.read(leader, 1 << 16))
            except OSError:  # the other side has closed
                return

    reader = threading.Thread(target=read)
    reader.start()
    stream = os.fdopen(follower, "w")

    def result():
        stream.close()
        reader.join()
        return b"".join(shown).decode()

    yield stream, result
    if not stream.closed:
        result()
    os.close(leader)


def test_a_log_gets_plain_lines_at_most_every_ten_seconds_and_the_last_state():
    clock, log = Clock(), io.StringIO()
    run(Display(log, clock), clock, steps=7, seconds=3.0)
    assert log.getvalue().splitlines() == [
        "autoencoder: 2 000 items, going on at 1 000",
        "autoencoder: 1 004 of 2 000 items, 50%, loss 0.25, 10 items/s, data wait 3%, 0:01:40 left",
        "checkpoint [bold] at 1 004 :smile:",
        "autoencoder: 1 007 of 2 000 items, 50%, loss 0.1429, 10 items/s, data wait 3%, 0:01:39 left",
    ]


def test_a_state_that_was_said_is_not_said_again_at_the_end():
    clock, log = Clock(), io.StringIO()
    run(Display(log, clock), clock, steps=1, seconds=10.0)
    assert log.getvalue().count("1 001 of 2 000") == 1


def test_a_next_stage_says_how_the_one_before_ended():
    clock, log = Clock(), io.StringIO()
    with Display(log, clock) as display:
        display.stage("autoencoder", total=10)
        display.update(10, loss=0.5, items_per_second=0.0, data_wait_share=0.0)
        display.stage("diffusion", total=20)
    assert log.getvalue().splitlines() == [
        "autoencoder: 10 items",
        "autoencoder: 10 of 10 items, 100%, loss 0.5, 0 items/s, data wait 0%, unknown time left",
        "diffusion: 20 items",
    ]


def test_a_terminal_gets_a_bar_and_the_same_lines_around_it(terminal):
    stream, result = terminal
    clock = Clock()
    run(Display(stream, clock), clock, steps=5, seconds=1.0)
    shown = result()
    assert "\x1b[" in shown and "━" in shown
    for line in (
        "autoencoder: 2 000 items, going on at 1 000",
        "checkpoint [bold] at 1 004 :smile:",
        "autoencoder: 1 005 of 2 000 items, 50%, loss 0.2, 10 items/s, data wait 3%, 0:01:40 left",
    ):
        assert f"\x1b[2K{line}\r\n" in shown
    assert re.search("━.* 50%, loss 0.2, 10 items/s, data wait 3%, 0:01:40 left", shown), "bar and state fit into 80 columns"
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h") == 1, "the cursor is hidden once and shown again"


def points(folder, stage, name):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / stage))
    events.Reload()
    return [(point.step, point.value) for point in events.Scalars(name)]


def test_events_have_progress_as_their_step_and_a_resumed_life_supersedes_the_rows_after_it(tmp_path):
    with EventWriter(tmp_path) as events:
        for progress in (8, 16, 24):
            events.row("autoencoder", progress, {"loss": 0.5, "learning_rate": 0.25})
            events.row("diffusion", progress, {"loss": 1.0})
    with EventWriter(tmp_path) as events:
        events.row("autoencoder", 16, {"loss": 0.125, "learning_rate": 0.25})
    assert points(tmp_path, "autoencoder", "loss") == [(8, 0.5), (16, 0.125)]
    assert points(tmp_path, "autoencoder", "learning_rate") == [(8, 0.25), (16, 0.25)]
    assert points(tmp_path, "diffusion", "loss") == [(8, 1.0), (16, 1.0), (24, 1.0)]


@pytest.mark.starts
def test_the_display_does_not_import_torch():
    code = "import sys, cluster.telemetry.display; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "False\n"
