"""The browser that tests look at pages with: what it refuses and reports, at two widths and in dark colours."""

from pathlib import Path

from tests.browser import browse, needs_browser

PAGE = """<!doctype html><title>A page</title>
<style>body { background: rgb(255, 255, 255) }
@media (prefers-color-scheme: dark) { body { background: rgb(0, 0, 0) } }</style>
<img src="https://example.com/outside.png"><p>Text</p>
<script>throw new Error("a script's error")</script>"""


@needs_browser
def test_browse_reports_what_a_page_wants_from_a_network_and_its_errors(tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    file.write_text(PAGE, encoding="utf-8")
    with browse(file, width=400, dark=True) as browsing:
        page = browsing.page
        assert browsing.refused == ["https://example.com/outside.png"]
        assert browsing.errors == ["a script's error"]
        assert page.title() == "A page" and page.inner_text("p") == "Text"
        assert page.evaluate("innerWidth") == 400
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(0, 0, 0)"
        picture = page.screenshot(path=tmp_path / "page.png")
    assert picture.startswith(b"\x89PNG")
