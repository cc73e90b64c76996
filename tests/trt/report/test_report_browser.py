"""The report's page in a real browser: headless Chromium, which `make browser` brings."""

import os
import shutil
from pathlib import Path

import pytest

from tests.trt.report.test_report import PICTURES, html, make_run

browsing = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
ACCURACY, SPEED = 1, 2  # which tables of the page
DESKTOP, PHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 844}


def chromium() -> str | None:
    """The browser that the environment variable CHROMIUM names, that of `make browser`, or an installed one."""
    local = Path(__file__).resolve().parents[3] / ".browser" / "chromium"
    named = os.environ.get("CHROMIUM", str(local))
    return next(
        (path for path in (named, *map(shutil.which, ("chromium", "google-chrome"))) if path and Path(path).is_file()),
        None,
    )


@pytest.fixture(scope="module")
def browser():
    executable = chromium()
    if executable is None:
        pytest.skip("no Chromium here; make browser brings one")
    with browsing.sync_playwright() as playwright:
        flags = ["--no-sandbox", "--disable-gpu", "--headless=shell"]
        started = playwright.chromium.launch(executable_path=executable, args=flags)
        yield started
        started.close()


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """The page of a run."""
    run = make_run(tmp_path_factory.mktemp("report") / "x")
    path = run / "report.html"
    path.write_text(html(run))
    return path


@pytest.fixture(params=[DESKTOP, PHONE], ids=["desktop", "phone"])
def page(browser, request, file):
    """The page opened; `problems` are errors of the console and whatever it asked the network for."""
    opened = browser.new_page(viewport=request.param)
    opened.problems = []
    opened.on("console", lambda message: opened.problems.append(message.text))
    opened.on("pageerror", lambda error: opened.problems.append(str(error)))
    opened.on("request", lambda asked: asked.url.startswith(("file:", "data:")) or opened.problems.append(asked.url))
    opened.goto(file.as_uri())
    yield opened
    opened.close()


@pytest.fixture(params=["light", "dark"])
def axe(page, request):
    """The page with axe-core in it, which `make browser` brings, in a light and a dark form."""
    library = Path(chromium()).parent / "node_modules" / "axe-core" / "axe.min.js"
    if not library.is_file():
        pytest.skip("no axe-core beside the browser; make browser brings it")
    page.emulate_media(color_scheme=request.param)
    page.evaluate(library.read_text())
    return page


def column(page, table: int, cell: int) -> list[str]:
    rows = page.locator("table").nth(table).locator("tbody tr")
    return [rows.nth(i).locator("td").nth(cell).inner_text() for i in range(rows.count())]


def test_it_opens_without_errors_and_shows_its_pictures(page):
    sizes = page.evaluate("[...document.images].map(image => [image.complete, image.naturalWidth, image.clientWidth])")
    assert len(sizes) == PICTURES
    assert all(complete and natural > 0 and shown > 0 for complete, natural, shown in sizes)
    assert page.problems == []


def test_clicks_on_a_heading_sort_down_and_up(page):
    ms = page.locator("table").nth(SPEED).locator("th").nth(3)
    assert column(page, SPEED, 3) == ["1", "8"]
    ms.click()
    assert column(page, SPEED, 3) == ["8", "1"]
    ms.click()
    assert column(page, SPEED, 3) == ["1", "8"]
    assert page.problems == []


def test_the_keyboard_sorts_too(page):
    ms = page.locator("table").nth(SPEED).locator("th").nth(3)
    ms.press("Enter")
    assert column(page, SPEED, 3) == ["8", "1"]
    ms.press("Enter")
    assert column(page, SPEED, 3) == ["1", "8"]
    assert page.problems == []


def test_numbers_sort_by_value_and_texts_by_letters(page):
    page.evaluate(
        """([table, values]) => {
            const body = document.querySelectorAll("table")[table].tBodies[0], row = body.rows[0];
            body.replaceChildren(...values.map(value => {
                const copy = row.cloneNode(true);
                copy.cells[3].dataset.value = copy.cells[3].textContent = value;
                return copy;
            }));
        }""",
        [ACCURACY, ["10", "-", "9", "9.5", "b", "a"]],
    )
    page.locator("table").nth(ACCURACY).locator("th").nth(3).click()
    down = column(page, ACCURACY, 3)
    page.locator("table").nth(ACCURACY).locator("th").nth(3).click()
    up = column(page, ACCURACY, 3)
    assert [value for value in up if value[0].isdigit()] == ["9", "9.5", "10"]
    assert [value for value in up if value.isalpha()] == ["a", "b"]
    assert down == up[::-1]


def test_nothing_is_wider_than_the_window(page):
    """Wide tables scroll inside of their own frames."""
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert page.evaluate(
        "[...document.images].every(image => image.getBoundingClientRect().right <= window.innerWidth)"
    )


def test_an_accessibility_checker_finds_nothing(axe):
    found = axe.evaluate("axe.run().then(result => result.violations)")
    assert [(each["impact"], each["id"], [node["html"][:200] for node in each["nodes"][:3]]) for each in found] == []


def test_what_is_folded_opens_by_keyboard(page):
    page.evaluate(
        """() => {
            document.body.insertAdjacentHTML("beforeend", "<details><summary>21 rows</summary><p>all</p></details>");
        }"""
    )
    inner = page.locator("details p").last
    assert not inner.is_visible()
    page.locator("summary").last.press("Enter")
    assert inner.is_visible()
