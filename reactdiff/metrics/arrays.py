"""The arrays of an evaluation: read from a file, and checked before any work is done on them."""

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from reactdiff.clip import ATTRIBUTES
from reactdiff.metrics.synchrony import LARGEST_LAG

ARRAYS = ("pred", "target", "speaker", "appropriate")
"""Names of the arrays of an evaluation, in the order in which `score` takes them."""

Targets = np.ndarray | Mapping[int, np.ndarray]
"""Real reactions (frames, 25) by clip: one array (clips, frames, 25), or a mapping that holds at least those in use."""


def load_arrays(path: str | Path) -> dict[str, np.ndarray]:
    """The four arrays of an evaluation, `pred`, `target`, `speaker` and `appropriate`, from an .npz file.

    Raises:
        ValueError: if the file is missing, is no .npz file, lacks one of them, or holds a pickled object, which is never read.
    """
    try:
        with open(path, "rb") as raw:
            if not zipfile.is_zipfile(raw):
                raise ValueError(f"{path} is not a whole .npz file: write it again with numpy.savez")
            raw.seek(0)
            with np.load(raw, allow_pickle=False) as file:
                return {name: _member(file, name, path) for name in ARRAYS}
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist: give the .npz file with the arrays {', '.join(ARRAYS)}") from None


def _member(file: Mapping[str, np.ndarray], name: str, path: str | Path) -> np.ndarray:
    if name not in file:
        raise ValueError(
            f"{path} has no array '{name}': an evaluation needs {', '.join(ARRAYS)}, and it holds {', '.join(file) or 'nothing'}"
        )
    try:
        return file[name]
    except (ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: the array '{name}' cannot be read ({error}): write it again, plain numbers only") from None


def check_whole(pred: np.ndarray, target: np.ndarray, speaker: np.ndarray, appropriate: np.ndarray) -> np.ndarray:
    """Refuses arrays of a whole split that do not fit together; the reactions themselves are checked by `check_part`.

    Returns:
        (clips, clips) bool, the appropriateness matrix.

    Raises:
        ValueError: naming the array, the row or value at fault, and the rule.
    """
    _check_shape("target", target, ("clips", "frames", len(ATTRIBUTES)))
    clips = len(target)
    for name, array in (("pred", pred), ("speaker", speaker)):
        if len(array) != clips:
            raise ValueError(f"{name} has {len(array)} clips and target has {clips}: all arrays must hold the same clips in the same order")
    if appropriate.shape != (clips, clips):
        raise ValueError(
            f"appropriate has the shape {appropriate.shape}, but must be square with one row for each of the {clips} clips: "
            "rows are (clip, direction) pairs, all plain ones before all mirrored ones"
        )
    matrix = appropriate == 1
    if (odd := ~matrix & (appropriate != 0)).any():
        row, column = np.argwhere(odd)[0]
        raise ValueError(f"appropriate[{row}, {column}] is {appropriate[row, column]}, but must be 0 or 1")
    if (empty := ~matrix.any(axis=1)).any():
        raise ValueError(
            f"row {empty.argmax()} of appropriate holds no 1: at least the clip's own reaction is appropriate; set the diagonal to 1"
        )
    return matrix


def check_part(
    pred: np.ndarray, targets: Targets, speaker: np.ndarray, neighbours: Sequence[np.ndarray], own: Sequence[int] | None = None
) -> None:
    """Refuses some clips' predictions, and the real reactions they are compared with, if they cannot be scored.

    Raises:
        ValueError: naming the array, the clip (as counted in this call) and attribute at fault, and the rule.
    """
    _check_shape("pred", pred, ("clips", "predictions", "frames", len(ATTRIBUTES)))
    _check_shape("speaker", speaker, ("clips", "frames", len(ATTRIBUTES)))
    clips, _, frames, _ = pred.shape
    if not len(speaker) == len(neighbours) == clips:
        raise ValueError(f"pred has {clips} clips, speaker {len(speaker)} and neighbours {len(neighbours)}: they must be the same clips")
    if frames <= LARGEST_LAG:
        raise ValueError(f"pred has {frames} frames, but FRSyn shifts by up to {LARGEST_LAG}: use clips of more than {LARGEST_LAG} frames")
    if speaker.shape[1] != frames:
        raise ValueError(f"pred has {frames} frames and speaker has {speaker.shape[1]}: cut both to the same length")
    for clip in range(clips):
        _check_finite("pred", clip, pred[clip])
        _check_finite("speaker", clip, speaker[clip])
        if len(neighbours[clip]) == 0:
            raise ValueError(f"clip {clip} has no neighbours: at least its own reaction is appropriate")
    if own is not None and len(own) != clips:
        raise ValueError(f"pred has {clips} clips and own {len(own)}: name the real reaction of each clip of pred")
    for clip in np.unique(np.concatenate(neighbours)).tolist():
        _check_target(targets, clip, frames, "is a neighbour")
    for clip in () if own is None else own:
        _check_target(targets, clip, frames, "is a clip's own reaction")


def _check_target(targets: Targets, clip: int, frames: int, role: str) -> None:
    if not (clip in targets if isinstance(targets, Mapping) else 0 <= clip < len(targets)):
        raise ValueError(f"clip {clip} {role}, but targets has no reaction for it: pass the reactions of all of them")
    reaction = targets[clip]
    _check_shape(f"target of clip {clip}", reaction, ("frames", len(ATTRIBUTES)))
    if len(reaction) != frames:
        raise ValueError(f"pred has {frames} frames and target of clip {clip} has {len(reaction)}: cut both to the same length")
    _check_finite("target", clip, reaction)


def _check_shape(name: str, array: np.ndarray, rule: tuple[str | int, ...]) -> None:
    if not np.issubdtype(array.dtype, np.floating):
        raise ValueError(f"{name} holds {array.dtype}, but must hold floating-point numbers: convert it with astype(numpy.float32)")
    if array.ndim != len(rule) or array.shape[-1] != rule[-1] or 0 in array.shape:
        wanted = ", ".join(map(str, rule))
        raise ValueError(f"{name} has the shape {array.shape}, but must be ({wanted}) with at least one of each")


def _check_finite(name: str, clip: int, array: np.ndarray) -> None:
    if np.isfinite(array).all():
        return
    place = tuple(np.argwhere(~np.isfinite(array))[0])
    prediction = f", prediction {place[0]}" if array.ndim == 3 else ""
    raise ValueError(
        f"{name} of clip {clip}{prediction} is {array[place]} at frame {place[-2]} in attribute {ATTRIBUTES[place[-1]]}, "
        "but every value must be finite: repair or regenerate this clip"
    )
