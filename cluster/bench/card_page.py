"""The parts one after the other, and the files with their figures: written anew with each one, for a card may be taken away."""

import json
import platform
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from cluster.bench.card import Card
from cluster.bench.card_parts import PARTS, CardFigures
from cluster.runtime.nvml import driver_version

PACKAGES = ("torch", "triton", "deepspeed", "numpy", "pydantic", "pyyaml", "rich", "safetensors")

LIMIT = 600.0
"""Seconds after which no other figure of a GPU is begun: who has one has it for ten minutes."""


def measure_card(card: Card, parts: Sequence[str], folder: Path, progress: Callable[[int, int], None]) -> dict[str, Any]:
    """Measure parts one after the other; after each figure, all so far are in `card.json` and `card.md` of a folder.

    A part that fails is told as such beside what it had found, and the next one begins. After LIMIT the rest is told not to be measured.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {"machine": _machine(card)}
    end = time.perf_counter() + (LIMIT if card.device.type == "cuda" else float("inf"))
    for number, part in enumerate(parts, start=1):
        begin, figures = time.perf_counter(), found.setdefault(part, {})
        try:
            for name, figure in _until(end, part, PARTS[part](card)):
                figures[name] = figure
                _keep(found, folder)
        except Exception as error:
            figures["failed"] = f"{type(error).__name__}: {error}"
        figures["seconds of this part"] = round(time.perf_counter() - begin, 1)
        _keep(found, folder)
        progress(number, len(parts))
    return found


def _until(end: float, part: str, figures: CardFigures) -> CardFigures:
    """A part's figures, none of which is begun after a time of `time.perf_counter`."""
    while time.perf_counter() < end:
        if (figure := next(figures, None)) is None:
            return
        yield figure
    yield "not measured", f"{LIMIT / 60:g} minutes are over: `--only {part}` measures the rest"


def page(found: dict[str, Any]) -> str:
    """All figures as tables of Markdown, a part each."""
    lines = []
    for part, figures in found.items():
        lines += [f"## {part}", ""]
        rows = {name: value for name, value in figures.items() if isinstance(value, dict)}
        columns = list(dict.fromkeys(column for row in rows.values() for column in row))
        if rows:
            lines += ["| | " + " | ".join(columns) + " |", "|---" * (1 + len(columns)) + "|"]
            lines += ["| " + " | ".join([name, *(_cell(row.get(column, "")) for column in columns)]) + " |" for name, row in rows.items()]
            lines.append("")
        lines += [f"- {name}: {_cell(value)}" for name, value in figures.items() if name not in rows]
        lines.append("")
    return "\n".join(lines)


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "-" if value is None else str(value)


def _machine(card: Card) -> dict[str, Any]:
    versions: dict[str, Any] = {}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    if card.device.type == "cuda":
        properties = torch.cuda.get_device_properties(card.device)
        device = f"{properties.name}, {properties.total_memory / 1e9:.0f} GB, CUDA {torch.version.cuda}"
        versions |= {
            "driver": driver_version(),
            "cudnn": torch.backends.cudnn.version(),
            "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        }
    else:
        device = platform.processor() or "CPU"
    return {"device": device, "python": platform.python_version(), **versions}


def _keep(found: dict[str, Any], folder: Path) -> None:
    _write(folder / "card.json", json.dumps(found, indent=1))
    _write(folder / "card.md", page(found))


def _write(path: Path, text: str) -> None:
    whole = path.with_suffix(f"{path.suffix}.part")
    whole.write_text(text)
    whole.replace(path)
