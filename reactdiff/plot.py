"""Pictures of reactions (what the speaker shows, what the real listener did, what was generated) and of noise schedules."""

import io
from collections.abc import Mapping
from itertools import cycle
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from reactdiff import config
from reactdiff.clip import ACTION_UNITS, ATTRIBUTES, AU, EXPRESSION, EXPRESSIONS, FRAME_RATE
from reactdiff.diffusion.process import Process
from reactdiff.diffusion.schedule import SCHEDULES

SHOWN = {
    "valence": "valence",
    "arousal": "arousal",
    "AU4": "AU4\nfrown",
    "AU6": "AU6\ncheeks",
    "AU12": "AU12\nsmile",
    "AU25": "AU25\nlips part",
}
"""The listener's curves, by attribute, and their labels."""

# Okabe and Ito's eight colours, which colour-blind readers tell apart; the commonest expression is the quietest.
COLOURS = ("#c8c8c8", "#e69f00", "#0072b2", "#f0e442", "#56b4e9", "#009e73", "#d55e00", "#cc79a7")
REAL, GENERATED, INK, PALE = "#000000", "#5b7fa6", "#444444", "#999999"

BESIDE_TITLE: dict[str, Any] = {"loc": "lower right", "bbox_to_anchor": (1, 1), "ncols": 2, "frameon": False, "fontsize": 9}


def reactions_png(title: str, speaker: np.ndarray, listener: np.ndarray, reactions: np.ndarray) -> bytes:
    """A PNG of K reactions over the real one, below the speaker's visible behaviour, on one clock in seconds.

    Args:
        title: above it.
        speaker: attributes the reactions answer, (frames, 25).
        listener: the real reaction, (frames, 25).
        reactions: generated, (K, frames, 25).
    """
    count = len(reactions)
    strips = 0.15 * (count + 1) + 0.1
    heights = [0.3, 0.9, 1.9, *[0.62] * len(SHOWN), strips]
    figure = Figure(figsize=(11, sum(heights) + 2.3), layout="constrained")
    figure.suptitle(title, fontsize=13, x=0.01, ha="left")
    panels = figure.subplots(len(heights), sharex=True, height_ratios=heights)
    _strips(panels[0], speaker[None], ["expression"])
    panels[0].set_title("Speaker: what the listeners react to", loc="left", fontsize=11, fontweight="bold")
    panels[0].legend(handles=_affect(panels[1], speaker), **BESIDE_TITLE)
    _action_units(panels[2], speaker)
    for panel, name in zip(panels[3:], SHOWN, strict=False):
        _curves(panel, name, listener, reactions)
    panels[3].set_title(f"Listener: the real reaction and {count} generated", loc="left", fontsize=11, fontweight="bold")
    panels[3].legend(**BESIDE_TITLE)
    _strips(panels[-1], np.concatenate((listener[None], reactions)), ["real", *(str(k) for k in range(count))])
    panels[-1].axhline(0.5, color="white", linewidth=2)
    panels[-1].set_ylabel("expression", rotation=0, ha="right", va="center", fontsize=9)
    panels[-1].set_xlabel("seconds")
    panels[-1].set_xlim(0, speaker.shape[0] / FRAME_RATE)
    patches = [Patch(color=colour, label=name) for colour, name in zip(COLOURS, EXPRESSIONS, strict=True)]
    key: dict[str, Any] = {"title": "expression: the likeliest one, paler the less likely it is", "title_fontsize": 9}
    figure.legend(handles=patches, loc="outside lower center", ncols=len(patches), frameon=False, fontsize=9, **key)
    return _png(figure, dpi=100)  # a tall picture: pages show it no wider


def schedules_png(steps: int) -> bytes:
    """A PNG of every noise schedule: log-SNR, and sigma, over u; dots are the steps of a process."""
    figure = Figure(figsize=(7.4, 3), layout="constrained")
    snr, share = figure.subplots(1, 2)
    times, u = torch.arange(steps), np.arange(1, steps + 1) / steps
    fine = np.linspace(0.002, 0.998, 499)
    for (name, schedule), colour in zip(SCHEDULES.items(), ("#000000", *COLOURS[1:3], *COLOURS[5:]), strict=True):
        process = Process(config.Diffusion.model_validate({"schedule": name, "steps": steps}))
        curve, dots = torch.from_numpy(schedule.log_snr(fine)), process.log_snr(times)
        for panel, line, points in ((snr, curve, dots), (share, (-curve).sigmoid().sqrt(), (-dots).sigmoid().sqrt())):
            panel.plot(fine, line, color=colour, linewidth=1.2)
            panel.plot(u, points, ".", color=colour, markersize=5, label=name)
    snr.axhline(0, color=INK, linewidth=0.4)
    snr.set_ylim(-13, 13)
    snr.set_title("log-SNR", loc="left", fontsize=11)
    share.set_title("sigma, the amount of noise in x_t", loc="left", fontsize=11)
    share.legend(frameon=False, fontsize=9, loc="lower right")
    for panel in (snr, share):
        panel.set_xlabel(f"u; a dot is a step of {steps}")
        panel.set_xlim(0, 1.02)
        _quiet(panel)
    return _png(figure)


def _strips(panel: Axes, faces: np.ndarray, labels: list[str]) -> None:
    """A row for each face (rows, frames, 25): the colour of its likeliest expression, paler the less likely it is."""
    probabilities = faces[..., EXPRESSION]
    palette = np.array([to_rgb(colour) for colour in COLOURS])
    strength = np.clip(probabilities.max(-1, keepdims=True), 0, 1)
    image = 1 - strength * (1 - palette[probabilities.argmax(-1)])
    panel.imshow(image, aspect="auto", interpolation="nearest", extent=(0, faces.shape[1] / FRAME_RATE, len(faces) - 0.5, -0.5))
    panel.set_yticks(range(len(labels)), labels, fontsize=8 if len(labels) <= 12 else 5)
    _quiet(panel)


def _affect(panel: Axes, speaker: np.ndarray) -> list[Line2D]:
    """Valence and arousal of the speaker; returns the two lines."""
    columns = speaker[:, [ATTRIBUTES.index("valence"), ATTRIBUTES.index("arousal")]]
    lines = panel.plot(_seconds(speaker), columns, linewidth=1.2, label=["valence", "arousal"])
    for line, colour, style in zip(lines, (REAL, PALE), ("-", "--"), strict=True):
        line.set(color=colour, linestyle=style)
    panel.axhline(0, color=INK, linewidth=0.4)
    panel.set_ylim(-1.08, 1.08)
    panel.set_yticks((-1, 0, 1))
    panel.set_ylabel("affect", rotation=0, ha="right", va="center", fontsize=9)
    _quiet(panel)
    return lines


def _action_units(panel: Axes, speaker: np.ndarray) -> None:
    """A row for each action unit of the speaker: white is off, dark is on."""
    end = len(speaker) / FRAME_RATE
    rows = len(ACTION_UNITS)
    panel.imshow(speaker[:, AU].T, aspect="auto", interpolation="nearest", cmap="Greys", vmin=0, vmax=1, extent=(0, end, rows - 0.5, -0.5))
    panel.set_yticks(range(rows), ACTION_UNITS, fontsize=7)
    panel.set_ylabel("action\nunits,\ndark: on", rotation=0, ha="right", va="center", fontsize=9)
    _quiet(panel)


def _curves(panel: Axes, name: str, listener: np.ndarray, reactions: np.ndarray) -> None:
    """One attribute of the real and of all generated reactions."""
    column, seconds = ATTRIBUTES.index(name), _seconds(listener)
    lines = panel.plot(seconds, reactions[:, :, column].T, color=GENERATED, linewidth=0.8, alpha=0.6)
    lines[0].set_label("generated")
    panel.plot(seconds, listener[:, column], color=REAL, linewidth=1.1, label="real")
    low = -1 if name in ("valence", "arousal") else 0
    panel.set_ylim(low - 0.08, 1.08)
    panel.set_yticks((low, 1))
    panel.set_ylabel(SHOWN[name], rotation=0, ha="right", va="center", fontsize=9)
    _quiet(panel)


def _seconds(attributes: np.ndarray) -> np.ndarray:
    return np.arange(len(attributes)) / FRAME_RATE


def lags_png(profiles: Mapping[str, np.ndarray], piece: int, delays: tuple[float, float, float]) -> bytes:
    """A PNG of what `by_lag` found, a line for each model, each as a share of its own largest change.

    Args:
        profiles: name -> (2 pieces - 1,).
        piece: frames of a lag.
        delays: in seconds, the shortest, the commonest and the longest after which a real listener's reaction begins. It then lasts, and so
            does a model's change: its curve has its height after the band's.
    """
    figure = Figure(figsize=(7.4, 3.2), layout="constrained")
    panel = figure.subplots()
    shortest, usual, longest = delays
    panel.axvspan(shortest, longest, color="#eeeeee", label="when real reactions begin")
    panel.axvline(usual, color=PALE, linewidth=1, linestyle=":", label="most of them")
    for (name, profile), colour in zip(profiles.items(), cycle(("#000000", *COLOURS[1:3], *COLOURS[5:])), strict=False):
        lags = (np.arange(len(profile)) - len(profile) // 2) * piece / FRAME_RATE
        panel.plot(lags, profile / profile.max(), color=colour, linewidth=1.4, label=name)
    panel.set_xlim(-1, 4)
    panel.set_ylim(0, 1.05)
    panel.set_xlabel("seconds after a moment of the speaker that was replaced")
    panel.set_ylabel("change of the reaction")
    panel.set_title("Curves: a reaction from its beginning to its end. Band: only when real ones begin.", loc="left", fontsize=9)
    panel.legend(frameon=False, fontsize=9)
    _quiet(panel)
    return _png(figure)


def _png(figure: Figure, dpi: int = 130) -> bytes:
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=dpi)
    return picture.getvalue()


def _quiet(panel: Axes) -> None:
    """Take away what does not carry data."""
    panel.spines[["top", "right"]].set_visible(False)
    panel.tick_params(length=2, colors=INK)
