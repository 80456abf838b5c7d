"""The pages of the documentation site, as a hook of MkDocs: those of the repository, and one for each Python package.

The pages keep their paths in the repository, so that links between them work on the site as they do in a clone.
"""

import fnmatch
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from markdown import Extension, Markdown
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "megatron_ds"
PAGES = ("*.md", "docs/*.md", "docs/images/*", "bench/*.md", "bench/*.png", "examples/**/*.md")


class ListsOfTwoSpaces(Extension):
    """What belongs to an item of a list is indented by 2 spaces, as on GitHub, not by 4."""

    def extendMarkdown(self, md: Markdown) -> None:
        md.tab_length = 2
        md.build_parser()  # again: its processors read the length when they are made


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    config.markdown_extensions.insert(0, ListsOfTwoSpaces())  # type: ignore[arg-type]
    config.nav = _with_stars(config.nav, _pages() - set(_leaves(config.nav)))
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for pattern in PAGES:
        for path in sorted(ROOT.glob(pattern)):
            files.append(File.generated(config, _name(path), abs_src_path=str(path)))
    files.append(File.generated(config, "api/interface.md", content=_interface()))
    for package, modules in _packages():
        introduction = f"::: {package}\n    options: {{heading_level: 1, members: false}}"
        text = "\n\n".join([introduction, *(f"::: {module}" for module in modules)])
        files.append(File.generated(config, _page(package), content=text))
    return files


def _pages() -> set[str]:
    paths = {_name(path) for pattern in PAGES for path in ROOT.glob(pattern)}
    return paths | {_page(package) for package, _ in _packages()}


def _leaves(entry: Any) -> Iterator[str]:
    if isinstance(entry, str):
        yield entry
    else:
        for inner in entry.values() if isinstance(entry, dict) else entry:
            yield from _leaves(inner)


def _with_stars(entry: Any, unlisted: set[str]) -> Any:
    """Return an entry of `nav` in which the unlisted pages that match a pattern stand in its place."""
    if isinstance(entry, dict):
        return {title: _with_stars(inner, unlisted) for title, inner in entry.items()}
    if isinstance(entry, str):
        return entry
    found: list[Any] = []
    for one in entry:
        if isinstance(one, str) and "*" in one:
            found += [_titled(page) for page in fnmatch.filter(sorted(unlisted), one)]
        else:
            found.append(_with_stars(one, unlisted))
    return found


def _titled(page: str) -> Any:
    """Return the entry of a page, with a short title if it is that of a package in the package."""
    _, inside, package = page.removesuffix(".md").partition("megatron_ds.")
    return {package: page} if inside else page


def _name(path: Path) -> str:
    """Return the path of a page in the repository, which is its path on the site too."""
    return path.relative_to(ROOT).as_posix()


def _page(package: str) -> str:
    return f"api/{package}.md"


def _packages() -> Iterator[tuple[str, list[str]]]:
    """Yield each package with its modules."""
    for init in sorted(PACKAGE.rglob("__init__.py")):
        modules = sorted(path for path in init.parent.glob("*.py") if not path.stem.startswith("__"))
        yield _dotted(init.parent), list(map(_dotted, modules))


def _dotted(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def _interface() -> str:
    """Return the page of the names that `import megatron_ds as mds` offers."""
    import megatron_ds

    lines = [
        "# Interface",
        "These are the names of `import megatron_ds as mds`; [docs/python.md](../docs/python.md) shows their use.",
    ]
    for name, module in megatron_ds._PUBLIC.items():
        options = f"    options: {{heading: mds.{name}, toc_label: mds.{name}, skip_local_inventory: true}}"
        lines.append(f"::: {module}.{name}\n{options}")
    return "\n\n".join(lines)
