"""Pages of runs, sweeps and comparisons in a real browser: they fit a telephone. That they ask for nothing is seen in their text."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from cluster.evaluation.report import report
from cluster.storage import Store
from cluster.studies.comparison_report import comparison_report
from cluster.studies.comparison_table import TableRow
from cluster.studies.sweep_report import sweep_report
from tests.cluster.evaluation.test_report import run
from tests.cluster.studies.test_comparison_table import scored
from tests.cluster.support.sweeps import rung, search_in

__all__ = ["run"]

pytestmark = pytest.mark.slow

QUIET = "--disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync".split()

ALONE = ["--window-size=1500,1000", "--virtual-time-budget=10000", "--host-resolver-rules=MAP * ~NOTFOUND"]
"""A window that is wide enough, time for scripts, and no network."""

ASKED = """<script>
onload = () => {
const wide = document.documentElement.scrollWidth, inner = document.documentElement.clientWidth;
const flat = [...document.querySelectorAll("svg, img")].filter(one => one.getBoundingClientRect().height < 20).length;
parent.postMessage(JSON.stringify({wide, inner, flat}), "*");
};
</script>"""
"""What a page looks like from inside, told to the one around it."""

AROUND = """<!doctype html><title></title><script>onmessage = event => document.title = event.data</script>
<iframe src="page.html" style="border: 0; width: %dpx; height: 1000px"></iframe>"""
"""A page as wide as it is asked for: no window of the browser is narrower than half a screen."""


def seen(page: str, width: int, folder: Path) -> dict[str, Any]:
    browser = shutil.which("chromium")
    assert browser, "these tests need Debian's chromium: make test-cluster installs it"
    file = folder / "page.html"
    file.write_text(page.replace("</html>", f"{ASKED}</html>"))
    (around := folder / "around.html").write_text(AROUND % width)
    profile = f"--user-data-dir={folder / 'profile'}"
    command = [browser, "--headless", "--no-sandbox", *QUIET, *ALONE, profile, "--dump-dom", around.as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    (title,) = re.findall(r"<title>(\{.*?\})</title>", shown)
    return json.loads(title)


def pages(run: Store, folder: Path) -> dict[str, str]:
    search = search_in(folder / "sweep")
    for number, worse in enumerate((0.0, 0.05, 0.0)):
        search.ledger.enter_rung(number, 0, rung(12, worse))
    search.refresh()
    for number in (0, 2):
        search.ledger.enter_end(number, "DONE", scores={"FRDist": 1.25 + number, "FRCorr": 0.5 - number, "FRDiv": 0.1 * number})
    search.refresh()
    models = {"a model of a long name": TableRow({1: scored(1, 0.5), 2: scored(2, 0.6)}, 0, (12, 0.5, 2.5))}
    models["noise"] = TableRow({1: scored(1, 3)})
    return {"run": report(run), "sweep": sweep_report(search, {}), "comparison": comparison_report("mine", models)}


def test_pages_fit_a_telephone_and_a_screen(run: Store, tmp_path: Path) -> None:
    for name, page in pages(run, tmp_path).items():
        for width in (1400, 420):
            told = seen(page, width, tmp_path)
            assert width - 20 <= told["inner"] <= width and told["wide"] == told["inner"], f"{name} scrolls sideways at {width}: {told}"
            assert told["flat"] == 0, f"figures of {name} are there: {told}"
    wide = seen('<!doctype html><img src="x.png"><div style="width: 900px">wide</div></html>', 420, tmp_path)
    assert (wide["wide"], wide["flat"]) == (908, 1), f"what this test looks for is seen: {wide}"
