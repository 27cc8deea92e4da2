"""The page: whole, escaped, small, and true to the files that it was made from."""

import json
import math
import re
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preftune.cli.main import main
from preftune.errors import CheckpointError, ConfigError
from preftune.report.charts import charts_of, points, spread
from preftune.report.page import as_json, distinct_names, report_page, write_report
from preftune.report.runs import Curve, read_run
from preftune.report.tables import duration, number, slowest
from tests.reports import HOSTILE, full_run, healthy_lines, manifest, write_run

VOID = {"meta", "link", "input", "br", "img"}
PAGE_LIMIT = 3_000_000


class Page(HTMLParser):
    """A page taken apart; fails where an element is not closed in its place."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.ids, self.links = [], [], [], []
        self.texts, self.events = {}, []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        given = dict(attrs)
        self.events += [name for name in given if name.startswith("on")]
        self.links += [given[name] for name in ("src", "href", "action", "data") if name in given]
        self.ids += [given["id"]] if "id" in given else []
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        for tag in set(self.open):
            self.texts[tag] = self.texts.get(tag, "") + data


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    full_run(root / "full")
    write_run(
        root / "other",
        healthy_lines(),
        config=manifest()["config"] | {"run_name": "hot", "learning_rate": 1e-4},
    )
    return root


@pytest.fixture(scope="module")
def page(runs):
    return report_page([read_run(runs / "full")])


def data_of(text):
    """What the page's script draws."""
    return json.loads(re.search(r'id="report-data">(.*?)</script>', text).group(1))


def test_every_section_is_there_and_every_link_leads_somewhere(page):
    parsed = Page(page)
    for anchor in ["verdict", "charts", "samples", "data", "metrics", "config", "environment"]:
        assert parsed.ids.count(anchor) == 1
    assert len(set(parsed.ids)) == len(parsed.ids)
    for link in parsed.links:
        assert link == "data:," or link.removeprefix("#") in parsed.ids
    assert "SmolLM2-135M-Instruct (134,515,008 parameters, all trained)" in parsed.texts["p"]
    assert "12 empty answer, 8 over length" in parsed.texts["td"]
    assert "-0.03 (worse)" in parsed.texts["td"]
    assert "62.0% (95 %: 52.0% to 71.0%; 90 pairs)" in parsed.texts["td"]
    assert "Looked for and not found: divergence" in parsed.texts["p"]


def test_each_kind_of_curve_has_its_chart(page):
    drawn = data_of(page)["charts"]
    for key in [
        "loss",
        "margins",
        "accuracy",
        "rewards",
        "logps",
        "logratios",
        "kl",
        "grad_norm",
        "throughput",
        "memory",
    ]:
        assert drawn[key]["lines"], key
        assert f'id="chart-{key}"' in page
    labels = [line["label"] for line in drawn["loss"]["lines"]]
    assert labels == ["training", "held out"]
    assert [line["label"] for line in drawn["source_accuracy"]["lines"]] == ["helpful", "polite"]


def test_hostile_data_stay_text(page):
    parsed = Page(page)
    assert "img" not in parsed.tags
    assert parsed.tags.count("script") == 2
    assert parsed.events == []
    assert HOSTILE in parsed.texts["div"]
    assert "onerror=alert(1)>" not in page.replace("&gt;", "")


def test_no_other_script_or_style_may_run_and_nothing_may_be_fetched(page):
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page).group(1)
    assert "default-src &#39;none&#39;" in policy
    assert "unsafe" not in policy
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "").replace("http-equiv", "")


@given(st.lists(st.text("</script!-&>\u2028 ab"), max_size=3))
def test_json_in_a_script_cannot_end_it(value):
    text = as_json(value)
    assert not set("<>&") & set(text)  # so no "</script", no "<!--"
    assert json.loads(text) == value


def test_a_run_of_ten_thousand_lines_stays_small_and_keeps_its_extremes(tmp_path):
    lines = healthy_lines(10_000, 100)
    lines[4321]["grad_norm"] = 1234.5
    for line in lines:  # 30 metrics
        line |= {f"extra_{i}": line["loss"] * i for i in range(12)}
    path = write_report([write_run(tmp_path / "run", lines)])
    text = path.read_text("utf-8")
    assert path.stat().st_size < PAGE_LIMIT
    (curve,) = data_of(text)["charts"]["grad_norm"]["lines"]
    assert max(curve["hi"]) == 1234.5
    assert curve["s"][0] < 50
    assert curve["s"][-1] > 9950
    assert "the mean of each stretch is drawn" in text
    assert "extra_7" in text


@given(
    st.lists(st.floats(-1e5, 1e5) | st.just(math.nan), min_size=1, max_size=200),
    st.integers(1, 50),
)
def test_fewer_points_have_the_same_extremes_and_mean(values, most):
    curve = Curve(list(range(len(values))), values)
    drawn = points(curve, most)
    finite = [value for value in values if math.isfinite(value)]
    assert len(drawn["s"]) <= most or len(values) <= most
    assert drawn["s"] == sorted(set(drawn["s"]))
    low = [v for v in drawn.get("lo", drawn["v"]) if v is not None]
    high = [v for v in drawn.get("hi", drawn["v"]) if v is not None]
    assert len(low) == len(high)
    if finite:
        assert min(low) == pytest.approx(min(finite), rel=1e-4)
        assert max(high) == pytest.approx(max(finite), rel=1e-4)
    for mean, lo, hi in zip(drawn["v"], drawn.get("lo", []), drawn.get("hi", []), strict=False):
        assert mean is None or lo - 1e-4 * abs(lo) - 1e-9 <= mean <= hi + 1e-4 * abs(hi) + 1e-9


def test_the_table_beside_a_chart_has_the_values_of_the_file(runs):
    (chart, *_) = charts_of([read_run(runs / "full")], ["full"])
    heads, rows = spread(chart, 11)
    assert heads == ["step", "training", "held out"]
    lines = {line["step"]: line for line in healthy_lines()}
    assert [row[0] for row in rows][:: len(rows) - 1] == [1, 100]
    for step, training, held_out in rows:
        assert training == lines[step]["loss"]
        assert held_out == lines[step].get("eval/loss")


def test_several_runs_are_laid_over_each_other(runs, tmp_path, capsys):
    path = tmp_path / "compare.html"
    assert main(["report", str(runs / "full"), str(runs / "other"), "--output", str(path)]) == 0
    assert capsys.readouterr().out == f"{path}\n"
    text = path.read_text("utf-8")
    parsed = Page(text)
    data = data_of(text)
    assert data["runs"] == ["polite__42", "hot"]
    loss = data["charts"]["loss"]["lines"]
    assert [(line["label"], line["run"]) for line in loss[::2]] == [("polite__42", 0), ("hot", 1)]
    assert data["charts"]["rewards"]["title"] == "Implicit rewards: chosen"
    differences = text[text.index('id="differences"') : text.index('id="samples"')]
    assert re.findall(r'<th scope="row">([^<]*)', differences) == ["learning_rate"]
    assert "polite__42, after step 100" in parsed.texts["h4"]


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ([], "report needs a run first"),
        (["{root}/nowhere"], "is not the folder of a run"),
        (["{root}"], "run.json cannot be read there"),
        (["{root}/full", "{root}/other"], "give --output FILE.html"),
        (["{root}/full", "{root}/full", "--output", "x.html"], "a run is given twice"),
        (["{root}/full", "--output", "{root}"], "which is a folder"),
        (["{root}/full", "--output", "{root}/no/x.html"], "a folder that does not exist"),
        (["{root}/full", "--out", "x"], "--out is not an option; did you mean --output?"),
    ],
)
def test_mistakes_end_with_exit_2(runs, capsys, words, text):
    assert main(["report", *(word.format(root=runs) for word in words)]) == 2
    assert text in capsys.readouterr().err


def test_a_document_of_another_program_is_no_run(tmp_path):
    (tmp_path / "run.json").write_text("[1]")
    with pytest.raises(CheckpointError, match="not written by preftune"):
        read_run(tmp_path)


def test_a_run_that_goes_on_is_read_as_far_as_it_is_written(tmp_path):
    root = write_run(tmp_path / "run", healthy_lines(), status="running", steps=200, seconds=None)
    with (root / "metrics.jsonl").open("a") as file:
        file.write('{"step": 101, "loss": 0.')
    (root / "evaluation").mkdir()
    (root / "evaluation" / "results.json").write_text("[{")
    run = read_run(root)
    assert run.last_step == 100
    text = report_page([run])
    assert "1 of the lines of metrics.jsonl cannot be read" in text
    assert "evaluation/results.json cannot be read and is left out" in text
    assert "100 of 200 steps" in text


def test_a_run_without_a_line_has_a_page_too(tmp_path):
    root = write_run(tmp_path / "run", [], data={}, model=None, seconds=None)
    parsed = Page(report_page([read_run(root)]))
    assert "verdict" in parsed.ids
    assert "charts" not in parsed.ids


def test_what_is_no_number_leaves_a_gap(tmp_path):
    lines = [{"step": 1, "loss": 1.0}, {"step": 2, "loss": math.nan}, {"step": 3, "loss": 3.0}]
    text = report_page([read_run(write_run(tmp_path / "run", lines))])
    assert data_of(text)["charts"]["loss"]["lines"][0]["v"] == [1.0, None, 3.0]


def test_runs_are_told_apart_by_name_then_folder_then_path(tmp_path):
    a, b = (read_run(write_run(tmp_path / name, [])) for name in ("a", "b"))
    assert distinct_names([a]) == ["polite__42"]
    assert distinct_names([a, b]) == ["a", "b"]
    with pytest.raises(ConfigError, match="given twice"):
        distinct_names([a, a])


def test_the_slowest_steps_come_first_with_their_numbers(tmp_path):
    lines = [
        {"step": 10 * i, "perf/step_seconds": s, "num_tokens": 1000.0 * i}
        for i, s in enumerate([1.0, 5.0, 1.0, 2.0], 1)
    ]
    table = slowest(read_run(write_run(tmp_path / "run", lines)))
    assert table.rows[0] == ["11–20", "5", "3.33", "100"]
    assert table.rows[1] == ["31–40", "2", "1.33", "100"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (3, "3"), (12345.0, "12,345"), (0.123456, "0.1235"), (1e-7, "1e-07"), ("a", "a")],
)
def test_numbers_for_people(value, text):
    assert number(value) == text


def test_durations_for_people():
    assert [duration(s) for s in (1.234, 75, 7300)] == ["1.23 s", "1 min 15 s", "2 h 1 min"]
