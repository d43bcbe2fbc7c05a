"""The README and the pages of docs/: code runs or says why not, links resolve, names exist."""

from __future__ import annotations

import ast
import itertools
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("stepjax", "sharding", "infer", "train")
PAGES = {
    path.relative_to(ROOT).as_posix(): path for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
}
LINKED = (
    PAGES
    | {f"{room}/README.md": ROOT / room / "README.md" for room in ROOMS}
    | {"CONTRIBUTING.md": ROOT / "CONTRIBUTING.md"}
)
BLOCK = re.compile(
    r"(?:<!-- (?P<mark>[^\n]*) -->\n)?```(?P<language>[\w{}-]+)\n(?P<code>.*?)^```$", re.DOTALL | re.MULTILINE
)
MARK = re.compile(r"ci: (test|generate)|(client|agent): \w+|output|not run: .+|slow: tests/test_\w+\.py")
SLOW = "slow: "  # the block runs with --slow, and what it shows has the quick tests of the file that is named
LINK = re.compile(r"\]\((?P<target>[^)\s]+)\)")
NAMED = re.compile(r"`(?P<path>[\w/.-]+\.py)`(?: `(?P<name>[A-Za-z_][\w.]*)`)?")
HEADING_OF = re.compile(r"docs/architecture\.md,\s+([^.;:)\n]+)")


class Block(NamedTuple):
    """A fenced block, its language and what the comment above it says."""

    mark: str
    language: str
    code: str


def blocks(page: str) -> list[Block]:
    text = PAGES[page].read_text(encoding="utf-8")
    return [Block(match["mark"] or "", match["language"], match["code"]) for match in BLOCK.finditer(text)]


def runnable(page: str) -> list[Block]:
    return [block for block in blocks(page) if block.language in ("bash", "python") and runs(block)]


def runs(block: Block) -> bool:
    return not block.mark or block.mark.startswith(SLOW)


RUN = [(page, block) for page in PAGES for block in runnable(page)]


class Reader:
    """Runs the blocks of a page in a folder, one after the other; ``stepjax`` there is this checkout's."""

    def __init__(self, folder: Path):
        self.folder, self.done = folder, []
        command = folder / "bin" / "stepjax"
        command.parent.mkdir()
        command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m stepjax "$@"\n')
        command.chmod(0o755)

    def run(self, block: Block) -> None:
        path = f"{self.folder / 'bin'}:{os.environ['PATH']}"
        done = subprocess.run(
            [*(["bash", "-euo", "pipefail"] if block.language == "bash" else [sys.executable]), "-c", block.code],
            capture_output=True,
            text=True,
            cwd=self.folder,
            env={**os.environ, "PYTHONPATH": str(ROOT), "PATH": path},
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout
        self.done.append(block)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Reader]:
    """A reader of each page."""
    return {page: Reader(tmp_path_factory.mktemp("reader")) for page in PAGES}


@pytest.mark.parametrize("page", PAGES)
def test_every_block_runs_or_says_why_not(page):
    marks = [block.mark for block in blocks(page) if block.mark]
    assert [mark for mark in marks if not MARK.fullmatch(mark)] == []
    assert {block.language for block in blocks(page)} <= {
        "bash",
        "python",
        "js",
        "text",
        "json",
        "toml",
        "{eval-rst}",
        "{toctree}",
    }
    for mark in marks:
        for name in re.findall(r"tests/test_\w+\.py", mark):
            assert (ROOT / name).exists(), mark


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page not in ("README.md", "docs/index.md", "docs/reference.md")]
)
def test_a_page_begins_with_a_command_that_runs(page):
    first = blocks(page)[0]
    assert first.language in ("bash", "python")
    assert runs(first)
    assert BLOCK.match(PAGES[page].read_text(encoding="utf-8").partition("\n\n")[2])


@pytest.mark.parametrize(
    ("page", "block"),
    [
        pytest.param(
            page,
            block,
            id=f"{page} {i}: {block.code.splitlines()[0][:40]}",
            marks=pytest.mark.slow if block.mark else (),
        )
        for i, (page, block) in enumerate(RUN)
    ],
)
def test_a_block_runs(folders, page, block):
    """After the blocks above it, whose files it may use; a quick one uses files of quick ones only."""
    above = itertools.takewhile(lambda other: other is not block, [other for name, other in RUN if name == page])
    for one in [*(other for other in above if block.mark or not other.mark), block]:
        if one not in folders[page].done:
            folders[page].run(one)


def slug(heading: str) -> str:
    """The anchor that GitHub and the site give a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def headings(path: Path) -> list[str]:
    text = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return re.findall(r"^#+ (.+)$", text, re.MULTILINE)


@pytest.mark.parametrize("page", LINKED)
def test_every_relative_link_resolves(page):
    path = LINKED[page]
    text = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for match in LINK.finditer(text):
        target, _, anchor = match["target"].partition("#")
        if re.match(r"\w+:", target):
            continue
        other = (path.parent / target).resolve() if target else path
        assert other.exists(), f"{page} links to {target}"
        assert other.is_relative_to(ROOT), f"{page} links to {target}"
        if anchor:
            assert anchor in map(slug, headings(other)), f"{page} links to {target}#{anchor}"


def test_every_page_is_in_the_readme_and_in_the_index():
    for start, prefix in (("README.md", "docs/"), ("docs/index.md", "")):
        text = PAGES[start].read_text(encoding="utf-8")
        for page in PAGES:
            if page not in ("README.md", "docs/index.md"):
                assert f"{prefix}{Path(page).name}" in text or Path(page).stem in text.split(), f"{start}: {page}"


def test_the_readme_is_short():
    assert len(PAGES["README.md"].read_bytes()) <= 6144


def defined(path: Path) -> set[str]:
    """Names at the top of a module, and ``Class.name`` of what its classes hold."""
    found: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        names = list(bound(node))
        found |= set(names)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{name}" for inner in ast.walk(node) for name in bound(inner)}
    return found


def bound(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        yield node.name
    elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        yield node.target.id
    elif isinstance(node, ast.Assign):
        yield from (target.id for target in node.targets if isinstance(target, ast.Name))


@pytest.mark.parametrize("page", PAGES)
def test_every_file_and_function_that_a_page_names_exists(page):
    text = PAGES[page].read_text(encoding="utf-8")
    for match in NAMED.finditer(text):
        if "/" not in match["path"]:
            continue  # a user's own file
        path = ROOT / match["path"]
        assert path.is_file(), f"{page} names {match['path']}"
        if match["name"]:
            assert match["name"] in defined(path), f"{page} names {match['name']} in {match['path']}"


def test_the_walks_name_functions():
    for page, least in (("docs/walks.md", 40), ("docs/extending.md", 6)):
        text = PAGES[page].read_text(encoding="utf-8")
        assert sum(bool(match["name"]) for match in NAMED.finditer(text)) >= least


def test_docstrings_point_to_headings_that_exist():
    known = headings(ROOT / "docs" / "architecture.md")
    for room in (*ROOMS, "tests", "benchmarks"):
        for path in (ROOT / room).rglob("*.py"):
            if path != path.resolve() or path == Path(__file__).resolve():
                continue
            for reference in HEADING_OF.findall(path.read_text(encoding="utf-8")):
                place = reference.strip().strip("`\"'")
                assert any(place.startswith(heading) for heading in known), f"{path}: docs/architecture.md, {place}"
