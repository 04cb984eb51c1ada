"""Renders README.md for the package index, which has no files beside it: links to files lead to the repository.

Everything else about the package is in pyproject.toml.
"""

import re
import tomllib
from pathlib import Path

from setuptools import setup

_ROOT = Path(__file__).parent
# What a link of README.md leads to, unless it is an address or a heading of the same page.
_TO_A_FILE = re.compile(r"(?<=\]\()(?!https?://|#)(?=[^)\s]+\))")


def readme() -> str:
    """Return README.md with links that work anywhere."""
    project = tomllib.loads((_ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    text = (_ROOT / "README.md").read_text(encoding="utf-8")
    return _TO_A_FILE.sub(f"{project['urls']['Repository']}/blob/main/", text)


setup(long_description=readme(), long_description_content_type="text/markdown")
