"""A hook of mkdocs: links from docs/ to files outside of it, and the changelog as a page.

Pages link to ../configs/digits.py and the like, which a browser of the repository follows. The site
holds no such file: there the link leads to the repository, or is plain text where its address
(`repo_url`) is not known.
"""

import logging
import posixpath
import re
from pathlib import Path

logger = logging.getLogger("mkdocs.hooks.site_links")  # mkdocs counts its warnings

# Code first, so that a link in it stays as it is.
CODE_OR_LINK = re.compile(
    r"(?P<code>^```.*?^```|(?<!\[)`[^`\n]+`)|(?P<link>(?<!!)\[(?P<text>[^\]]+)\]\((?P<to>[^)\s]+)\))",
    re.MULTILINE | re.DOTALL,
)


def outside(page: str, to: str) -> str | None:
    """The file of the repository that the link `to` of docs/`page` names, if it is not in docs/."""
    if "://" in to or to.startswith(("#", "/", "mailto:")):
        return None
    path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), to.split("#")[0]))
    return None if path.startswith("docs/") else path


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
        anchor = match["to"].partition("#")[2]
        address = f"{repository.rstrip('/')}/blob/main/{path}"
        return f"[{match['text']}]({address}{'#' + anchor if anchor else ''})"

    return CODE_OR_LINK.sub(replace, markdown), files


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
    root = Path(config.config_file_path).parent
    for path in named:
        if not (root / path).exists():
            logger.warning("%s links to %s, which is not there", page.file.src_uri, path)
    return text
