"""What the site's build adds to MkDocs: addresses of the project, and links to files that are no pages."""

from __future__ import annotations

import posixpath
import re
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
# A link or a picture of Markdown whose address is no anchor and has no scheme.
_LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)\s#]+)")


def on_config(config: Any) -> Any:
    """Take description and addresses from pyproject.toml, their one home."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    config.site_description = project["description"]
    config.repo_url = project["urls"]["Repository"]
    config.repo_name = config.repo_url.removeprefix("https://github.com/")
    return config


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Let links out of docs/, which lead to files in a checkout, lead to the repository on the site."""

    def outside(match: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page.file.src_uri), match[1]))
        if path.startswith("docs/"):
            return match[1]
        kind = "tree" if (ROOT / path).is_dir() else "blob"
        return f"{config.repo_url}/{kind}/main/{path}"

    return _LINK.sub(outside, markdown)
