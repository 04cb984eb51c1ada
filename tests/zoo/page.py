"""Writes the zoo's results as `docs/coverage.md`: our own models, and other packages' models from their raw results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from zoo.examine import LARGE, Row

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "coverage.md"
# What `python -m zoo.outside` wrote on a machine that has the packages.
OUTSIDE = ROOT / "benchmarks" / "results" / "zoo.json"
_BEGIN = "<!-- other packages: written by `python -m zoo.outside` -->"
_END = "<!-- end -->"


def markdown(rows: list[Row], unbuilt: list[str]) -> str:
    """Return the page: our own models, then the other packages' as they are in the raw results."""
    import transformers

    lines = [
        "# Coverage",
        "",
        "Written by `make zoo`. Every model is converted at ratio 10 and verified (signature, outputs in eval and",
        "train mode, deep copy, state dict, gradients), turned back into a dense one, and converted at ratio 1 with",
        "`project`, which must give equal outputs in both modes. Models with over a million parameters must share",
        "98 % of them, and tracing must take under 30 s.",
        "",
        f"{_verdict(rows)} with torch {torch.__version__} and transformers",
        f"{transformers.__version__}, on two threads. {_extremes(rows)}",
        "",
        "`traced` and `opaque` count the regions of the FX forest; `layer`, `operation` and `attribute` the tensors",
        "read by the layer's own operation, by operations in the module's code, and by materialising on access.",
        "`all`: vectors are shared too.",
        "",
        *_table(rows),
        *_not_run(unbuilt),
    ]
    return "\n".join(lines) + "\n" + (outside(load(OUTSIDE)) if OUTSIDE.exists() else "")


def load(path: Path) -> dict[str, Any]:
    """Return raw results, their rows as `Row`."""
    results = json.loads(path.read_text(encoding="utf-8"))
    return {**results, "rows": [Row(**row) for row in results["rows"]]}


def outside(results: dict[str, Any]) -> str:
    """Return the part of the page on other packages."""
    rows = results["rows"]
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    lines = [
        "",
        _BEGIN,
        "## Other packages",
        "",
        f"The same examination of models of other packages. {_verdict(rows)} with {versions}, on one thread",
        f"each ({results['date']}). {_extremes(rows)}",
        "",
        *_table(rows),
        *_not_run(results["unbuilt"]),
        _END,
    ]
    return "\n".join(lines) + "\n"


def write_outside(results: dict[str, Any]) -> None:
    """Write the part on other packages into the page, in place of the old part."""
    page = DOCUMENT.read_text(encoding="utf-8").partition("\n" + _BEGIN)[0]
    DOCUMENT.write_text(page + outside(results), encoding="utf-8")


def own_part(page: str) -> str:
    """Return the page without the part on other packages."""
    return page.partition(_BEGIN)[0]


def _verdict(rows: list[Row]) -> str:
    return f"**{sum(not row.failure for row in rows)} of {len(rows)} models pass**"


def _extremes(rows: list[Row]) -> str:
    least = min((row.shared for row in rows if row.parameters >= LARGE), default=1.0)
    longest = max((row.trace_s for row in rows), default=0.0)
    return (
        f"The least that a model of over a million parameters shares is\n{least:.1%}; the longest tracing took "
        f"{longest:.1f} s."
    )


def _table(rows: list[Row]) -> list[str]:
    heads = "model family parameters traced opaque layer operation attribute shared all ratio kept".split()
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for row in rows:
        kept = f"**fails**: {row.failure.replace('|', '/')}" if row.failure else row.kept
        lines.append(
            f"| {row.name} | {row.family} | {row.parameters:,} | {row.traced} | {row.opaque} | {row.layer} | "
            f"{row.operation} | {row.attribute} | {row.shared:.1%} | {'yes' if row.share == 'all' else ''} | "
            f"{row.ratio:.2f} | {kept} |"
        )
    return lines


def _not_run(unbuilt: list[str]) -> list[str]:
    if not unbuilt:
        return []
    return ["", "Not run:", "", *(f"- {line}" for line in unbuilt)]
