"""Headless Chromium for tests of pages: what a reader sees, and what a page asks the network for.

Playwright drives the browser that is installed already; it downloads none. On Debian: `apt-get install chromium`.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Page, Route

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def find_browser() -> str | None:
    """Return the path of an installed Chromium or Chrome, or None."""
    return next(filter(None, map(shutil.which, NAMES)), None)


needs_browser = pytest.mark.skipif(find_browser() is None, reason="no Chromium here: apt-get install chromium")


@dataclass(frozen=True)
class Browsing:
    """A page in the browser, and what went wrong on it so far.

    `refused` holds the addresses that the page wanted from a network, all of which were refused. `errors` holds the
    messages of its scripts' errors.
    """

    page: "Page"
    refused: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


@contextmanager
def browse(source: Path | str, *, width: int = 1280, height: int = 900, dark: bool = False) -> Iterator[Browsing]:
    """Open a file, or an address of this machine, in headless Chromium.

    Anything outside the directories and servers of this machine is refused, as it is without a network. The page has
    loaded when this yields; `page.screenshot(path=..., full_page=True)` makes a picture of it.

    Args:
        source: a file, or an address such as `http://127.0.0.1:8000/`.
        width, height: the window, in CSS pixels.
        dark: whether the reader's system prefers dark colours.
    """
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_browser(), args=["--disable-dev-shm-usage"])
        try:
            page = browser.new_page(
                viewport={"width": width, "height": height}, color_scheme="dark" if dark else "light"
            )
            browsing = Browsing(page)

            def answer(route: "Route") -> None:
                address = route.request.url
                if address.startswith(("file:", "data:", "blob:", "http://127.0.0.1:", "http://localhost:")):
                    route.continue_()
                else:
                    browsing.refused.append(address)
                    route.abort()

            page.route("**/*", answer)
            page.on("pageerror", lambda error: browsing.errors.append(str(error)))
            page.goto(source.resolve().as_uri() if isinstance(source, Path) else source)
            yield browsing
        finally:
            browser.close()
