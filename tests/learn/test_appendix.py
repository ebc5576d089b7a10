"""The appendix: each function that it names for an equation or section of a paper is defined in the file it names."""

import ast
import re

import pytest

from tests.conftest import ROOT

PAGES = [ROOT / "docs" / "learn" / name for name in ("appendix.md", "zh/appendix.md")]


def defined(source: str) -> set[str]:
    """Names of the functions and classes of a file, and of their methods as Class.method."""
    names = set()
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
            names |= {f"{node.name}.{part.name}" for part in ast.walk(node) if isinstance(part, ast.FunctionDef)}
    return names


def rows(page) -> list[tuple[str, list[str]]]:
    """(file, names) of each row of the first table of a page."""
    found = re.findall(r"^\| .* \| \[`[^`]+`\]\(([^)]+)\): (.*) \|$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return [(str((page.parent / file).resolve()), re.findall(r"`([^`]+)`", names)) for file, names in found]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_equations_and_sections_lead_to_code(page):
    assert len(rows(page)) >= 30
    for file, names in rows(page):
        missing = set(names) - defined(open(file, encoding="utf-8").read())
        assert names and not missing, f"{file} does not define {missing}"


def test_both_languages_name_the_same_code():
    assert rows(PAGES[0]) == rows(PAGES[1])
