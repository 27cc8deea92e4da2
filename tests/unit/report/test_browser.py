"""The page in a real browser: nothing asked for, nothing complained of, charts drawn and used."""

import pytest

from preftune.report.page import write_report
from tests.browser import CHROMIUM, Browser
from tests.reports import full_run, healthy_lines, manifest, write_run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed"),
]
LOSS = "document.querySelector('#chart-loss svg')"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    return write_report([full_run(root / "run")])


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("browser")) as browser:
        yield browser


def is_silent(browser, *paths):
    """Whether nothing but the pages was asked for, and nothing said."""
    assert browser.said == []
    assert set(browser.requests) <= {path.resolve().as_uri() for path in paths}
    return True


def place_of_loss(browser):
    """Left, top and width of the chart of the loss, which is brought to the window's top."""
    browser.run(f"{LOSS}.scrollIntoView({{behavior: 'instant'}})")
    place = "(({left, top, width}) => [left, top, width])"
    return browser.run(f"{place}({LOSS}.getBoundingClientRect())")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_it_opens_at_every_width_with_all_charts_drawn(browser, page, width, dark):
    browser.open(page, width, dark=dark)
    assert browser.run("innerWidth") == width
    assert browser.run("document.documentElement.scrollWidth") <= width
    assert browser.run(
        "[...document.querySelectorAll('figure[data-chart]')].every(figure =>"
        " [...figure.querySelectorAll('path.line')].some(p => p.getTotalLength() > 100))"
    )
    background = browser.run("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(255, 255, 255)") is not dark
    assert is_silent(browser, page)


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_text_stands_out_from_what_is_behind_it(browser, page, dark):
    """WCAG 2.2: 4.5 to 1 for text, 3 to 1 for curves and marks."""
    browser.open(page, 1280, dark=dark)
    contrast = """(() => {
      const style = getComputedStyle(document.documentElement);
      const light = name => {
        let hex = style.getPropertyValue(name).trim().slice(1);
        if (hex.length === 3) hex = [...hex].map(c => c + c).join('');
        const [r, g, b] = [0, 2, 4].map(i => parseInt(hex.slice(i, i + 2), 16) / 255)
          .map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
      };
      const ratio = (a, b) => (Math.max(light(a), light(b)) + .05)
        / (Math.min(light(a), light(b)) + .05);
      const least = (names, backs) => Math.min(...names.flatMap(n => backs.map(b => ratio(n, b))));
      return [least(['--text', '--faint', '--link'], ['--back', '--card']),
        least(['--c0','--c1','--c2','--c3','--c4','--c5','--c6','--c7','--good','--note','--warning'],
          ['--back', '--card'])];
    })()"""
    text, curves = browser.run(contrast)
    assert text >= 4.5
    assert curves >= 3


def test_values_are_read_with_mouse_and_keys(browser, page):
    browser.open(page, 1280)
    lines = healthy_lines()
    browser.run(f"{LOSS}.focus()")
    browser.key("Home")
    said = browser.run(f"{LOSS}.getAttribute('aria-valuetext')")
    assert said.startswith("step 1: training ")
    assert float(said.split()[3].rstrip(",")) == pytest.approx(lines[0]["loss"], rel=1e-3)
    for _ in range(2):
        browser.key("ArrowRight")
    assert browser.run(f"{LOSS}.getAttribute('aria-valuenow')") == "3"
    left, top, width = place_of_loss(browser)
    browser.mouse("mouseMoved", left + width / 2, top + 50)
    at = int(browser.run(f"{LOSS}.getAttribute('aria-valuenow')"))
    assert 40 < at < 60
    # All charts show the same step.
    assert browser.run("document.querySelector('#chart-memory .legend .note').textContent") == (
        f"step {at}"
    )
    assert is_silent(browser, page)


def test_a_curve_is_hidden_steps_are_zoomed_into_and_curves_smoothed(browser, page):
    browser.open(page, 1280)
    count = "document.querySelectorAll('#chart-loss path.line').length"
    assert browser.run(count) == 2
    browser.run("document.querySelector('#chart-loss .legend button').click()")
    assert browser.run(count) == 1
    left, top, width = place_of_loss(browser)
    button = {"button": "left", "clickCount": 1}
    browser.mouse("mousePressed", left + width / 2, top + 50, **button)
    browser.mouse("mouseMoved", left + width * 0.75, top + 50, button="left")
    browser.mouse("mouseReleased", left + width * 0.75, top + 50, **button)
    shown = [int(browser.run(f"document.getElementById('{end}').value")) for end in ("from", "to")]
    assert 40 < shown[0] < 60 < 65 < shown[1] < 80
    browser.run("document.querySelector('#chart-loss .legend button').click()")
    browser.run("document.getElementById('reset').click()")
    assert browser.run("document.getElementById('to').value") == "100"
    before = browser.run("document.querySelector('#chart-loss path.line').getAttribute('d')")
    browser.run(
        "(s => { s.value = 0.9; s.dispatchEvent(new Event('input')); })"
        "(document.getElementById('smooth'))"
    )
    # Of the training curve; five evaluations are shown as they are.
    assert browser.run("document.querySelectorAll('#chart-loss path.raw').length") == 1
    assert before != browser.run(
        "document.querySelector('#chart-loss path.line').getAttribute('d')"
    )
    assert is_silent(browser, page)


def test_runs_beside_each_other_are_hidden_together(browser, tmp_path):
    named = manifest()["config"] | {"run_name": "hot"}
    roots = [
        write_run(tmp_path / "one", healthy_lines()),
        write_run(tmp_path / "two", healthy_lines(), config=named),
    ]
    path = write_report(roots, str(tmp_path / "compare.html"))
    browser.open(path, 390)
    assert browser.run("document.documentElement.scrollWidth") <= 390
    count = "document.querySelectorAll('#chart-grad_norm path.line').length"
    assert browser.run(count) == 2
    browser.run("document.querySelector('input[data-run=\"1\"]').click()")
    assert browser.run(count) == 1
    assert browser.said == []


def test_ten_thousand_steps_are_drawn_as_bands(browser, tmp_path):
    path = write_report([write_run(tmp_path / "run", healthy_lines(10_000, 100))])
    browser.open(path, 1280)
    assert browser.run("document.querySelectorAll('#chart-loss path.band').length") == 1
    assert browser.said == []


def test_scripts_in_the_data_do_not_run(browser, page):
    browser.open(page, 1280)
    injected = (
        "document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.bad=1\">')"
    )
    before = len(browser.said)
    browser.run(f"{injected}, new Promise(done => setTimeout(done, 200))")
    # Even one that were not escaped: the page's policy refuses it, and says so.
    assert browser.run("window.bad") is None
    assert "Content Security Policy" in "".join(browser.said[before:])
    browser.said.clear()
