"""The documentation as a site: every page is in it, every link leads to a heading, and it looks right in a browser."""

import fnmatch
import functools
import http.server
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from tests.browser import browse, needs_browser
from tests.docs.test_readme import PAGES as PAGES_OF_TASKS

if TYPE_CHECKING:
    import griffe

ROOT = Path(__file__).parents[2]
PAGES = sorted({*PAGES_OF_TASKS, *ROOT.glob("*.md"), *ROOT.glob("bench/*.md")})
SEEN = ("index.html", "docs/run_file.html", "docs/families.html", "api/interface.html", "api/megatron_ds.engine.html")
"""Pages that are opened: lists and a picture, long tables, a very long table, and two from docstrings."""


def settings() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))


def leaves(entry: Any) -> Iterator[str]:
    """Yield the pages of an entry of `nav`."""
    if isinstance(entry, str):
        yield entry
    else:
        for inner in entry.values() if isinstance(entry, dict) else entry:
            yield from leaves(inner)


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub names them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_every_page_is_in_the_navigation() -> None:
    """Data of examples is described where the data is, and reached by links."""
    patterns = list(leaves(settings()["nav"]))
    pages = [page.relative_to(ROOT).as_posix() for page in PAGES if page.parent.name != "data"]
    missing = [page for page in pages if not any(fnmatch.fnmatch(page, pattern) for pattern in patterns)]
    assert not missing, "add them to `nav` in mkdocs.yml"
    gone = [one for one in patterns if "*" not in one and not one.startswith("api/") and one not in pages]
    assert not gone and len(patterns) == len(set(patterns))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix().replace("/", "-"))
def test_links_lead_to_a_heading(page: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#:\s]*)#([^)]*)\)", page.read_text(encoding="utf-8")):
        assert anchor in anchors(page.parent / target if target else page), f"{target}#{anchor}"


def test_docstrings_are_read_without_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    """A warning would end `make docs`, which reads them by the same library with the same options."""
    import griffe

    (plugin,) = (one["mkdocstrings"] for one in settings()["plugins"] if isinstance(one, dict))
    options = plugin["handlers"]["python"]["options"]
    package = griffe.load("megatron_ds", search_paths=[ROOT])
    with caplog.at_level("WARNING", logger="griffe"):
        read = [
            one.docstring.parse(options["docstring_style"], **options["docstring_options"])
            for one in documented(package)
        ]
    assert len(read) > 1000
    assert not caplog.messages


def documented(one: "griffe.Object") -> Iterator["griffe.Object"]:
    """Yield an object and what is in it, of what has a docstring and is shown."""
    if one.docstring:
        yield one
    for name, member in one.members.items():
        if not member.is_alias and not name.startswith("_"):
            yield from documented(member)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the site, built without a warning."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stderr == "", done.stdout + done.stderr
    return folder


@pytest.mark.sweep
@needs_browser
@pytest.mark.parametrize(("width", "dark"), [(1400, False), (400, True)])
def test_site_opens_from_a_disk_without_a_network(site: Path, width: int, dark: bool) -> None:
    for name in SEEN:
        with browse(site / name, width=width, dark=dark) as browsing:
            page = browsing.page
            assert browsing.refused == [] and browsing.errors == [], name
            assert page.evaluate("document.documentElement.scrollWidth") <= width, f"{name} is wider than its window"
            colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
            assert (colour == "rgb(255, 255, 255)") is not dark


@pytest.mark.sweep
@needs_browser
def test_site_is_searched_when_it_is_served(site: Path) -> None:
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            with browse(f"http://127.0.0.1:{server.server_port}/index.html") as browsing:
                browsing.page.get_by_placeholder("Search").first.fill("offload_activations")
                browsing.page.locator(".md-search-result__link").first.wait_for()
                titles = browsing.page.locator(".md-search-result__link").all_inner_texts()
                assert browsing.refused == [] and browsing.errors == []
        finally:
            server.shutdown()
    assert any("train" in title or "recompute" in title.lower() for title in titles), titles
