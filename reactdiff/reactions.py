"""Generated reactions as files that other programs read: NumPy arrays, and tables like the official ones."""

import io

import numpy as np

from reactdiff.clip import ATTRIBUTES, COEFFICIENTS


def to_npz(attributes: np.ndarray, coefficients: np.ndarray | None = None) -> bytes:
    """An .npz file of K reactions, without pickles; equal reactions give equal bytes.

    Args:
        attributes: (K, frames, 25).
        coefficients: (K, frames, 58), from a model that makes them.

    Returns:
        A file of them and of the names of their columns, `attribute_names` (25,) and `coefficient_names` (58,).
    """
    arrays = {"attributes": attributes, "attribute_names": np.array(ATTRIBUTES)}
    if coefficients is not None:
        arrays |= {"coefficients": coefficients, "coefficient_names": np.array(COEFFICIENTS)}
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


def to_csv(attributes: np.ndarray) -> bytes:
    """One reaction (frames, 25) in the layout of the official tree's `Emotion/*.csv`, six significant digits."""
    table = io.StringIO()
    np.savetxt(table, attributes, fmt="%.6g", delimiter=",", header=",".join(ATTRIBUTES), comments="")
    return table.getvalue().encode()
