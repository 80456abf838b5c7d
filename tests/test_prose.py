"""Docstrings, messages and documents are in plain English.

`python -m tests.test_prose [ROOM ...]` prints every offender as `file:line: rule: text`; a room is a package of
`megatron_ds`, a module at its top, `bench`, or `examples`.
"""

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "megatron_ds"

OPENINGS = re.compile(
    r"(What|Which|Who|Whom|Whose|Where|Whether|When|Why|How|That|Such"  # relative clauses and questions
    r"|Is|Are|Can|Does"
    r"|Of|By|As|With|Within|Without|From|In|For|To|Until|Behind|Beside|Before|After|On|At"  # prepositions
    r"|Raises|Refuses|Returns|Sets|Says|Gives|Makes|Takes|Writes|Reads|Puts|Tells)\b"  # third person
)
PRIVATE_WORDS = re.compile(
    r"\b(anew|(go|goes|going|gone|went) on|for people|(is|are) none|told|said|beside|(sit|sat) out|together)\b"
)
LONGEST_WITHOUT_DOCSTRING = 8  # lines of a public function
NUM_SHOWN = 100  # characters

Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Offender:
    """A line that breaks a rule."""

    path: Path
    line: int
    rule: str
    text: str

    def __str__(self) -> str:
        return f"{self.path.relative_to(ROOT)}:{self.line}: {self.rule}: {self.text[:NUM_SHOWN]}"


def docstring_node(node: Documented) -> ast.Constant | None:
    first = node.body[0] if node.body else None
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
        return first.value
    return None


def public_functions(node: ast.Module | ast.ClassDef) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Yield the public functions of a module or class and of its public classes, without nested functions."""
    for child in node.body:
        if isinstance(child, (ast.ClassDef, *FUNCTIONS)) and not child.name.startswith("_"):
            if isinstance(child, ast.ClassDef):
                yield from public_functions(child)
            else:
                yield child


def broken_rules(tree: ast.Module) -> Iterator[tuple[int, str, str]]:
    """Yield (line, rule, text) for each violation in a file."""
    docstrings = set()
    for node in ast.walk(tree):
        if isinstance(node, Documented) and (docstring := docstring_node(node)) is not None:
            docstrings.add(docstring)
            first_line = docstring.value.strip().partition("\n")[0]
            if OPENINGS.match(first_line):
                yield docstring.lineno, "opening", first_line
    for function in public_functions(tree):
        num_lines = (function.end_lineno or function.lineno) - function.lineno + 1
        if docstring_node(function) is None and num_lines > LONGEST_WITHOUT_DOCSTRING:
            yield function.lineno, "no docstring", function.name
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield from private_words(node.value, node.lineno, prose=node in docstrings)


def private_words(text: str, line: int, *, prose: bool) -> Iterator[tuple[int, str, str]]:
    """Yield the private words in a docstring or message; a string without a space is neither."""
    for offset, words in enumerate(text.splitlines()):
        found = PRIVATE_WORDS.search(words)
        if found is not None and (prose or " " in text.strip()):
            yield line + offset, f"'{found[0]}'", words.strip()


def sources() -> Iterator[Path]:
    for folder in (PACKAGE, ROOT / "bench", ROOT / "examples"):
        yield from sorted(folder.rglob("*.py"))


def room_of(path: Path) -> str:
    base = PACKAGE if path.is_relative_to(PACKAGE) else ROOT
    return path.relative_to(base).parts[0].removesuffix(".py")


def offenders() -> dict[str, list[Offender]]:
    """Return the offenders of each room, in the order of files and lines."""
    by_room: dict[str, list[Offender]] = {}
    for path in sources():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        found = [Offender(path, *broken) for broken in sorted(broken_rules(tree))]
        by_room.setdefault(room_of(path), []).extend(found)
    return by_room


OFFENDERS = offenders()


@pytest.mark.parametrize("room", OFFENDERS)
def test_prose_of(room: str) -> None:
    assert not OFFENDERS[room], "\n".join(map(str, OFFENDERS[room]))


PAGES = sorted(
    [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "bench" / "RESULTS.md"]
    + [*(ROOT / "docs").glob("*.md"), *(ROOT / "examples").rglob("*.md")]
)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix().replace("/", "-"))
def test_page_has_no_private_words(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    text = re.sub(r"```.*?```", lambda block: "\n" * block[0].count("\n"), text, flags=re.DOTALL)  # programs' output
    assert list(private_words(text, 1, prose=True)) == []


@pytest.mark.parametrize(
    ("code", "rule"),
    [
        ('"""What a shard is."""', "opening"),
        ('class A:\n    """Of a model."""', "opening"),
        ('def f():\n    """Whether it fits."""', "opening"),
        ("def f():\n" + "    x = 1\n" * 8, "no docstring"),
        ("class A:\n    def f(self):\n" + "        x = 1\n" * 8, "no docstring"),
        ('def f():\n    """Return x.\n\n    It begins anew.\n    """', "'anew'"),
        ('raise ValueError("what was told twice")', "'told'"),
        ('log(f"the run {x} goes on after {y}")', "'goes on'"),
    ],
)
def test_a_broken_rule_is_found(code: str, rule: str) -> None:
    assert [found for _, found, _ in broken_rules(ast.parse(code))] == [rule]


@pytest.mark.parametrize(
    "code",
    [
        '"""Whatever-named modules are nouns."""',
        'def f():\n    """Return x."""\n' + "    x = 1\n" * 8,
        "def _f():\n" + "    x = 1\n" * 8,
        "def f():\n    def inner():\n" + "        x = 1\n" * 4,
        'column = table["told"]',
        'print("besides, untold")',
    ],
)
def test_plain_code_is_accepted(code: str) -> None:
    assert list(broken_rules(ast.parse(code))) == []


if __name__ == "__main__":
    rooms = sys.argv[1:] or list(OFFENDERS)
    for room in rooms:
        for offender in OFFENDERS[room]:
            print(offender)
    for room in rooms:
        print(f"{room}: {len(OFFENDERS[room])} left", file=sys.stderr)
