"""The page about a comparison has its table, and where its rows lie between variety and agreement."""

from pathlib import Path

from cluster.evaluation.rows import CUT
from cluster.storage import open_store
from cluster.studies.comparison_report import comparison_report, write_comparison_report
from cluster.studies.comparison_table import TableRow, beside
from reactdiff.data.synthetic.oracles import frontier_names
from tests.cluster.studies.test_comparison_table import scored
from tests.cluster.support.html import assert_asks_for_nothing


def test_the_page_has_the_table_the_models_and_the_oracles_between_which_they_lie(tmp_path: Path) -> None:
    models = {"a<b>": TableRow({1: scored(1, 0.5), 2: scored(2, 0.6)}, 0, (12, 0.5, 2.5)), "online": TableRow({1: scored(1, 0.7)}, 50)}
    oracles = {name: TableRow({1: scored(1, noise)}) for name, noise in zip(frontier_names(), (0.5, 0.4, 0.3, 0.2, 0.1), strict=True)}
    page = comparison_report("mine", models | oracles)
    assert_asks_for_nothing(page)
    assert page.count("<svg") == 1 and "<td>a&lt;b&gt;</td>" in page and "share of frontier" in page
    figure = page[page.index("<svg") : page.index("</svg>")]
    assert "a&lt;b&gt;" in figure and ">oracle<" in figure and "oracle mean of 2" not in figure, "of a curve the single draws are named"
    cut = comparison_report("mine", models | oracles | {beside(CUT, "online"): TableRow({1: scored(1, 0.6)}, 50)})
    assert CUT in cut and CUT not in cut[cut.index("<svg") : cut.index("</svg>")], "the picture has the draws as they are"
    alone = comparison_report("mine", models)
    assert alone.count('id="line2d') == page.count('id="line2d') - 2, "without its oracles there is neither a curve nor a point"
    url = write_comparison_report(open_store(str(tmp_path)), "mine", models)
    assert url == f"{tmp_path}/comparisons/mine/report.html" and Path(url).read_text() == alone
