"""Writes docs/settings.md from configs/default.toml and the settings of `recover`: `python docs/site/settings.py`."""

from __future__ import annotations

import dataclasses
import re
import textwrap
from pathlib import Path

from roastify.recovery.options import RecoverOptions

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "settings.md"
_HEAD = """# Settings

Written by `python docs/site/settings.py` from [`configs/default.toml`](../configs/default.toml), which
`roastify settings` prints. Every setting of a conversion is a key of such a file, which `--config` takes, and a keyword
of `roastify.convert`, `plan` and `bench`: `roastify.convert(model, 50, fold=4, sign="element")`. A setting that is left
out keeps its default. The command line has options for the most common settings; `roastify --help` lists them.

## Conversion
"""
_RECOVERY = """## Recovery

Keywords of [`roastify.recover`](recovery.md), with the options of `roastify recover` where it has one.

| setting | default | meaning | option |
|---|---|---|---|
"""


def _conversion() -> list[str]:
    """Return a section for each run of settings that one comment of the file explains."""
    lines: list[str] = []
    _, _, body = (ROOT / "configs" / "default.toml").read_text(encoding="utf-8").partition("\n\n")
    for block in body.strip().split("\n\n"):
        comment = [line.removeprefix("# ") for line in block.splitlines() if line.startswith("#")]
        keys = [line for line in block.splitlines() if not line.startswith("#")]
        names = [key.partition(" = ")[0].strip("[]") for key in keys]
        # An example in a comment is indented.
        words = " ".join(line for line in comment if not line.startswith(" "))
        example = [line.strip("# ") for line in comment if line.startswith("#  ") or line.startswith("  ")]
        lines += ["", "### " + ", ".join(f"`{name}`" for name in names), ""]
        lines += ["Default: " + ", ".join(f"`{key.partition(' = ')[2] or 'none'}`" for key in keys) + ".", ""]
        words = re.sub(r'"[^"]+"|\b[a-z]+_[a-z]+\b', r"`\g<0>`", words)
        words = re.sub(r"docs/([a-z]+\.md)", r"[\1](\1)", words)
        lines += textwrap.wrap(words, 120, break_long_words=False, break_on_hyphens=False)
        if example:
            lines += ["", "```toml", *example, "```"]
    return lines


def _default(value: object) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value)


def markdown() -> str:
    """Return the page."""
    rows = [
        f"| `{each.name}` | `{_default(each.default)}` | {each.metadata['meaning']} | "
        + (f"`{each.metadata['flag']}` |" if each.metadata["flag"] else "|")
        for each in dataclasses.fields(RecoverOptions)
    ]
    return "\n".join([_HEAD.rstrip(), *_conversion(), "", _RECOVERY + "\n".join(rows), ""])


if __name__ == "__main__":
    DOCUMENT.write_text(markdown(), encoding="utf-8")
