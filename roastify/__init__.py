"""Converts a PyTorch model: its large weights become tile-hashed views into a small trainable pool.

The method is ROAST hashing (Desai, Zhou, Shrivastava, ICML 2023) with the stability repairs of STABLE-RPS (Desai,
Shrivastava, ICLR 2024).
"""

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
from roastify.pool.plan import RoastPlan
from roastify.recovery.report import RecoveryReport

__version__ = "0.1.0"

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
    "VerifyReport",
    "bench",
    "convert",
    "densify",
    "load",
    "plain_operators",
    "plan",
    "recover",
    "save",
    "verify",
]
