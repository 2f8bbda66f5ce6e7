"""Links of the documentation. Those between pages of the site are checked by scripts/site.sh."""

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HOOK = runpy.run_path(str(ROOT / "scripts/site_links.py"))
OUTSIDE_DOCS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "examples/README.md")]


@pytest.mark.parametrize(
    "page, to, path",
    [
        ("index.md", "../configs/digits.py", "configs/digits.py"),
        ("reference/index.md", "../../examples/", "examples"),
        ("index.md", "../README.md#install", "README.md"),
        ("reference/index.md", "../paper.md", None),
        ("index.md", "images.md#settings", None),
        ("index.md", "#install", None),
        ("index.md", "https://arxiv.org/abs/2006.11239", None),
    ],
)
def test_a_link_that_leaves_docs_is_known(page, to, path):
    assert HOOK["outside"](page, to) == path


TEXT = """See [`digits.py`](../configs/digits.py#L3) and [the paper](paper.md);
`[a](../b.py)` is code.
```
[c](../d.py)
```
"""


def test_links_out_of_docs_lead_to_the_repository():
    text, files = HOOK["rewritten"](TEXT, "index.md", "https://git.example/me/ddpm/")
    target = "https://git.example/me/ddpm/blob/main/configs/digits.py#L3"
    assert text == TEXT.replace("../configs/digits.py#L3", target)
    assert files == ["configs/digits.py"]


def test_links_out_of_docs_are_text_where_the_repository_is_unknown():
    text, files = HOOK["rewritten"](TEXT, "index.md", "")
    assert text == TEXT.replace("[`digits.py`](../configs/digits.py#L3)", "`digits.py`")
    assert files == ["configs/digits.py"]


HTML = """<a href="images.md#settings">images</a> <a href="#here">here</a> <img alt="a" src="a.png">
<a href="https://arxiv.org">arXiv</a> <a class="anchor-link" href="#x">x</a>
<a href="../configs/digits.py">digits</a> <a href="missing.md">missing</a>"""


def test_links_of_a_notebook_become_those_of_the_site():
    urls = {"images.md": "../images/", "a.png": "../a.png"}
    html, files = HOOK["rewritten_notebook"](HTML, "tutorial.ipynb", "https://git.example/d", urls)
    expected = HTML.replace("images.md#", "../images/#").replace('"a.png"', '"../a.png"')
    expected = expected.replace("../configs", "https://git.example/d/blob/main/configs")
    expected = expected.replace("missing.md", "https://git.example/d/blob/main/docs/missing.md")
    assert html == expected
    assert files == ["configs/digits.py", "docs/missing.md"]


@pytest.mark.parametrize("page", OUTSIDE_DOCS, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_of_pages_that_the_site_lacks_lead_to_files(page):
    links = re.findall(r"\]\(([^)#\s]+)", page.read_text())
    for link in links:
        assert "://" in link or (page.parent / link).exists(), link


def test_the_config_that_the_docs_show_is_the_shipped_one():
    assert (ROOT / "configs/digits.py").read_text() in (ROOT / "docs/configs.md").read_text()
