"""Converts a PyTorch model: its large weights become tile-hashed views into a small trainable pool.

The method is ROAST hashing (Desai, Zhou, Shrivastava, ICML 2023) with the stability repairs of STABLE-RPS (Desai,
Shrivastava, ICLR 2024).
"""

from typing import TYPE_CHECKING, Any

from roastify.api import bench, convert, densify, load, plan, recover, save, verify
from roastify.checks.interface import VerifyReport
from roastify.checks.model_bench import BenchReport
from roastify.config import RoastConfig
from roastify.deployment import plain_operators
from roastify.errors import (
    BenchError,
    CheckpointError,
    ConfigError,
    ConversionError,
    OutputMismatch,
    PlanError,
    RecoveryError,
    RoastError,
    SignatureMismatch,
    SourceError,
)
from roastify.integrations.on_import import register_with_transformers
from roastify.pool.plan import RoastPlan
from roastify.ratio_sweep import SweepReport, sweep
from roastify.recovery.report import RecoveryReport
from roastify.shown import show_results_with

if TYPE_CHECKING:
    from roastify.integrations.transformers import RoastifyConfig as RoastifyConfig

__version__ = "0.2.0"

__all__ = [
    "BenchError",
    "BenchReport",
    "CheckpointError",
    "ConfigError",
    "ConversionError",
    "OutputMismatch",
    "PlanError",
    "RecoveryError",
    "RecoveryReport",
    "RoastConfig",
    "RoastError",
    "RoastPlan",
    "SignatureMismatch",
    "SourceError",
    "SweepReport",
    "VerifyReport",
    "bench",
    "convert",
    "densify",
    "load",
    "plain_operators",
    "plan",
    "recover",
    "save",
    "sweep",
    "verify",
]

register_with_transformers()


def _written(result: object, html: bool) -> str:
    # Here, because `import roastify` does not import rich.
    from roastify.report import as_html, as_text

    return as_html(result) if html else as_text(result)


show_results_with(_written)


def __getattr__(name: str) -> Any:
    """Return `RoastifyConfig`, which needs transformers."""
    if name != "RoastifyConfig":
        raise AttributeError(f"module 'roastify' has no attribute {name!r}")
    try:
        from roastify.integrations.transformers import RoastifyConfig
    except ModuleNotFoundError as error:
        raise ImportError(
            "roastify.RoastifyConfig needs transformers; install it with: pip install 'roastify[integrations]'"
        ) from error
    return RoastifyConfig
