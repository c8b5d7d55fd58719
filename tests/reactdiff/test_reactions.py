import io
from pathlib import Path

import numpy as np

from reactdiff.clip import ATTRIBUTES, COEFFICIENTS
from reactdiff.data.files import read_csv
from reactdiff.plot import reactions_png
from reactdiff.reactions import to_csv, to_npz
from tests.tiny import ROOT


def test_a_table_has_the_official_header_and_is_read_back_to_six_digits(tmp_path: Path) -> None:
    reaction = np.random.default_rng(0).uniform(-1, 1, (60, 25)).astype(np.float32)
    (tmp_path / "1.csv").write_bytes(to_csv(reaction))
    assert (tmp_path / "1.csv").read_text().splitlines()[0].split(",") == list(ATTRIBUTES)
    np.testing.assert_allclose(read_csv(tmp_path / "1.csv"), reaction, rtol=5e-6)


def test_arrays_are_read_back_bit_for_bit_without_pickle_and_name_their_columns() -> None:
    rng = np.random.default_rng(0)
    attributes, coefficients = (rng.normal(size=(3, 50, width)).astype(np.float32) for width in (25, 58))
    content = to_npz(attributes, coefficients)
    file = np.load(io.BytesIO(content), allow_pickle=False)
    assert np.array_equal(file["attributes"], attributes) and np.array_equal(file["coefficients"], coefficients)
    assert tuple(file["attribute_names"]) == ATTRIBUTES and tuple(file["coefficient_names"]) == COEFFICIENTS
    assert to_npz(attributes, coefficients) == content
    alone = np.load(io.BytesIO(to_npz(attributes)), allow_pickle=False)
    assert sorted(alone) == ["attribute_names", "attributes"] and np.array_equal(alone["attributes"], attributes)


def test_a_picture_of_one_or_many_reactions_of_any_length_is_a_png_and_always_the_same() -> None:
    rng = np.random.default_rng(0)
    for count, frames in ((1, 50), (13, 150)):
        speaker, listener, reactions = (rng.uniform(-0.5, 1.5, (*shape, frames, 25)) for shape in ((), (), (count,)))
        picture = reactions_png("title", speaker, listener, reactions)
        assert picture.startswith(b"\x89PNG") and picture == reactions_png("title", speaker, listener, reactions)


def test_the_readme_shows_a_picture_of_the_demo_that_loads_in_a_moment() -> None:
    assert "](docs/reactions.png)" in (ROOT / "README.md").read_text()
    assert len((ROOT / "docs/reactions.png").read_bytes()) <= 300_000
