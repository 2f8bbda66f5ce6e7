"""The committed notebook: run from top to bottom, small, and without traces of a machine."""

import json
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"
TUTORIAL = DOCS / "tutorial.ipynb"
CELLS = json.loads(TUTORIAL.read_text())["cells"]
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]
PROSE = "\n".join("".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "markdown")


def outputs(kind):
    """The outputs of a kind, of all cells in their order."""
    return [each for cell in CODE for each in cell["outputs"] if each["output_type"] == kind]


def test_every_cell_was_run_once_and_in_order():
    assert [cell["execution_count"] for cell in CODE] == list(range(1, len(CODE) + 1))


def test_every_cell_that_shows_something_has_its_output():
    for cell in CODE:
        source = "".join(cell["source"])
        calls = re.findall(r"^ *(?:print|show|plt\.show)\(", source, flags=re.MULTILINE)
        defines = "def show(" in source or "raise SystemExit" in source
        assert bool(cell["outputs"]) == bool(calls and not defines), source


def test_nothing_failed_or_warned():
    assert not outputs("error")
    assert {each["name"] for each in outputs("stream")} == {"stdout"}


def test_all_sections_have_a_picture():
    sections = re.findall(r"^## \d+\. ", PROSE, flags=re.MULTILINE)
    assert len(sections) == 11
    pictures = [each for each in outputs("display_data") if "image/png" in each["data"]]
    assert len(pictures) >= len(sections)


def test_every_equation_has_its_place():
    """Eq. 1 to 15 of the paper are named, one by one or as a range."""
    named = {int(number) for number in re.findall(r"Eq\. (\d+)", PROSE)}
    ranges = re.findall(r"(?:Eq\. )?(\d+) (?:and|to) (\d+)", PROSE)
    for first, last in ranges:
        named |= set(range(int(first), int(last) + 1)) if int(last) <= 15 else set()
    assert named >= set(range(1, 16))


def test_it_is_small_and_names_no_place_of_a_machine():
    text = TUTORIAL.read_text()
    assert len(text) < 2e6
    said = re.sub(r'"image/png": "[^"]*"', "", text)
    assert not re.findall(r"/(?:tmp|work|root|home)/[^\"\\ ]*", said)
    assert "execution" not in {key for cell in CODE for key in cell["metadata"]}
    assert json.loads(text)["metadata"]["kernelspec"]["name"] == "python3"


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(([^)#]+\.md)", PROSE))))
def test_its_links_lead_somewhere(link):
    assert (DOCS / link).exists()
