"""A hook of mkdocs: links out of docs/, links of notebooks, and the changelog as a page.

Pages link to ../configs/digits.py and the like, which a browser of the repository follows. The site
holds no such file: there the link leads to the repository, or is plain text where its address
(`repo_url`) is not known. The links of a notebook, which mkdocs leaves as they are, become those of
the site.
"""

import logging
import posixpath
import re
from pathlib import Path

logger = logging.getLogger("mkdocs.hooks.site_links")  # mkdocs counts its warnings

# Code first, so that a link in it stays as it is.
CODE_OR_LINK = re.compile(
    r"(?P<code>^```.*?^```|`[^`\n]+`)|(?P<link>(?<!!)\[(?P<text>[^\]]+)\]\((?P<to>[^)\s]+)\))",
    re.MULTILINE | re.DOTALL,
)


IN_NOTEBOOK = re.compile(
    r'<a href="(?P<to>[^":]+)"[^>]*>(?P<text>.*?)</a>'
    r'|(?P<img><img[^>]*? src=")(?P<src>[^":]+)(?=")',
    re.DOTALL,
)


def within(page: str, to: str) -> str:
    """The path in the repository of the file that the link `to` of docs/`page` names."""
    return posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), to.split("#")[0]))


def outside(page: str, to: str) -> str | None:
    """The file of the repository that the link `to` of docs/`page` names, if it is not in docs/."""
    if "://" in to or to.startswith(("#", "/", "mailto:")):
        return None
    path = within(page, to)
    return None if path.startswith("docs/") else path


def address(repository: str, path: str, to: str) -> str:
    """Where a browser of the `repository` shows the file `path`, at the anchor of the link `to`."""
    _, sharp, anchor = to.partition("#")
    return f"{repository.rstrip('/')}/blob/main/{path}{sharp}{anchor}"


def rewritten(markdown: str, page: str, repository: str) -> tuple[str, list[str]]:
    """`markdown` of docs/`page` with links that hold on the site, and the files that they name."""
    files = []

    def replace(match: re.Match) -> str:
        path = match["link"] and outside(page, match["to"])
        if not path:
            return match[0]
        files.append(path)
        if not repository:
            return match["text"]
        return f"[{match['text']}]({address(repository, path, match['to'])})"

    return CODE_OR_LINK.sub(replace, markdown), files


def rewritten_notebook(
    html: str, page: str, repository: str, urls: dict[str, str]
) -> tuple[str, list[str]]:
    """The same of the `html` of a notebook; `urls` are those of the files of docs/."""
    files = []

    def replace(match: re.Match) -> str:
        to = match["to"] or match["src"]
        if to.startswith(("#", "/")):
            return match[0]
        path = within(page, to)
        url = urls.get(path.removeprefix("docs/")) if path.startswith("docs/") else None
        if url is None:
            files.append(path)
        if match["img"]:
            return f"{match['img']}{url or to}"
        if url is not None:
            _, sharp, anchor = to.partition("#")
            return f'<a href="{url}{sharp}{anchor}">{match["text"]}</a>'
        if not repository:
            return match["text"]
        return f'<a href="{address(repository, path, to)}">{match["text"]}</a>'

    return IN_NOTEBOOK.sub(replace, html), files


def on_files(files, config):
    """Adds the changelog, which lies at the root, as a page."""
    from mkdocs.structure.files import File

    root = Path(config.config_file_path).parent
    text = (root / "CHANGELOG.md").read_text()
    files.append(File.generated(config, "changelog.md", content=text))
    return files


def on_page_markdown(markdown, page, config, files):
    """Rewrites the links of a page, and warns of those that lead nowhere."""
    text, named = rewritten(markdown, page.file.src_uri, config.repo_url or "")
    _warn(named, page, config)
    return text


def on_page_content(html, page, config, files):
    """The same for a notebook."""
    if not page.file.src_uri.endswith(".ipynb"):
        return html
    urls = {file.src_uri: file.url_relative_to(page.file) for file in files}
    html, named = rewritten_notebook(html, page.file.src_uri, config.repo_url or "", urls)
    _warn(named, page, config)
    return html


def _warn(named, page, config):
    root = Path(config.config_file_path).parent
    for path in named:
        if path.startswith("docs/") or not (root / path).exists():
            logger.warning("%s links to %s, which is not there", page.file.src_uri, path)
