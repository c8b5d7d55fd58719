"""A page of documentation with something between two equal marks, such as `<!-- table -->`, that a command makes."""

from pathlib import Path


def assert_marked(page: Path, mark: str) -> None:
    """Before any work.

    Raises:
        ValueError: if the page is not there or has not exactly two of these marks.
    """
    if not page.is_file() or page.read_text().count(mark) != 2:
        raise ValueError(f"{page} is no file with two lines {mark}: make it, the table goes between them")


def put_between(page: Path, mark: str, text: str) -> None:
    """Replace what is between the marks."""
    before, _, rest = page.read_text().partition(mark)
    _, _, after = rest.partition(mark)
    page.write_text(f"{before}{mark}\n{text}\n{mark}{after}")
