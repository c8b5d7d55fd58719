"""What is asked of pages that open from disk."""

from html.parser import HTMLParser

EMPTY = {"meta", "img", "link", "br", "path", "use", "rect", "circle"}


class Tags(HTMLParser):
    """Every tag with its attributes, and that each is closed."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        assert self.open == [], "every tag is closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in EMPTY:
            assert self.open.pop() == tag


def assert_asks_for_nothing(page: str) -> None:
    """It is whole, has no script, and asks nobody for anything; what looks like a tag in a name stays text."""
    tags = Tags(page)
    assert {tag for tag, _ in tags.found} & {"script", "link", "iframe", "b", "i"} == set()
    asked = [value for _, values in tags.found for name, value in values.items() if name in ("src", "href", "xlink:href")]
    assert [value for value in asked if not (value or "").startswith(("#", "data:"))] == []
    assert "url(http" not in page and "@import" not in page
