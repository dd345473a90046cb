"""The report as a browser shows it: every figure there, the theme the reader's own, nothing beside the page."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_the_report_is_one_page import INSPECTION, run

from evals.report import build

pytestmark = pytest.mark.slow
CHROMIUM = shutil.which("chromium")

# brightness of a figure's corner, after drawing it: what the reader's theme made of it
CORNER = """img => {const c = document.createElement('canvas'); c.width = c.height = 2;
  const g = c.getContext('2d'); g.drawImage(img, 0, 0, 2, 2, 0, 0, 2, 2); return g.getImageData(0, 0, 1, 1).data[0]}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine (Debian: apt-get install chromium)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [1200, 420])
def test_the_page_shows_whole_figures_in_the_readers_theme(
    browser: Any, theme: str, width: int, tmp_path: Path
) -> None:
    report = build(run(inspection=INSPECTION), str(tmp_path))
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=theme)
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(f"file://{tmp_path}/index.html")
    figures = page.query_selector_all("figure img")
    assert len(figures) == len(report.pictures)
    assert all(figure.evaluate("img => img.complete && img.naturalWidth > 500") for figure in figures)
    corners = [figure.evaluate(CORNER) for figure in figures]
    assert all(c > 240 for c in corners) if theme == "light" else all(c < 60 for c in corners)
    assert page.evaluate("document.documentElement.scrollWidth") <= width  # tables scroll, the page does not
    assert [url for url in asked if not url.startswith(("file://", "data:"))] == []
    page.close()
