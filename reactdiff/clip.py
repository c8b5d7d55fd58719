"""What a clip is: two persons, feature streams and targets on one 25 Hz clock, and the names everybody uses."""

FRAME_RATE = 25
"""Video frames per second; every stream has one row per frame."""

WINDOW = 50
"""Frames of one diffusion sample (2 s)."""

ACTION_UNITS = tuple(f"AU{n}" for n in (1, 2, 4, 6, 7, 9, 10, 12, 14, 15, 17, 23, 24, 25, 26))
AFFECT = ("valence", "arousal")
EXPRESSIONS = ("Neutral", "Happy", "Sad", "Surprise", "Fear", "Disgust", "Anger", "Contempt")

ATTRIBUTES = ACTION_UNITS + AFFECT + EXPRESSIONS
"""The 25 reaction attributes in the official column order: occurrences in [0, 1], affect in [-1, 1], probabilities."""

AU = slice(0, 15)
VALENCE_AROUSAL = slice(15, 17)
EXPRESSION = slice(17, 25)
MOUTH = (13, 14)
"""AU25 and AU26, lips and jaw: whoever knows whose turn it is to speak knows them."""

COEFFICIENTS = tuple(f"expression_{i}" for i in range(52)) + tuple(
    f"{kind}_{axis}" for kind in ("rotation", "translation") for axis in "xyz"
)
"""The 58 FaceVerse 3DMM coefficients: 52 expression, 3 rotation, 3 translation, minus the mean face."""

PERSONS = ("a", "b")
"""The two persons of a clip. Direction 0: a speaks, b listens; direction 1 is the mirrored pair."""

TARGETS = {"attributes": len(ATTRIBUTES), "coefficients": len(COEFFICIENTS)}
"""The two float32 targets of every person and their widths; every other stream is an input."""


def speaker_listener(direction: int) -> tuple[str, str]:
    """The (speaker, listener) persons of a direction, 0 or 1."""
    return (PERSONS[0], PERSONS[1]) if direction == 0 else (PERSONS[1], PERSONS[0])


def windows_of(frames: int) -> int:
    """How many windows a clip of this many frames has.

    Raises:
        ValueError: if the length is not a positive multiple of the window.
    """
    if frames <= 0 or frames % WINDOW:
        raise ValueError(f"a clip of {frames} frames does not divide into windows of {WINDOW}; use a multiple of {WINDOW}")
    return frames // WINDOW
