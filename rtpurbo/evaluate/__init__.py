"""Needles and text, dense and sparse side by side: `evaluate` and its `EvalReport`."""

from rtpurbo.evaluate.report import EvalReport, EvalRow
from rtpurbo.evaluate.run import evaluate

__all__ = ["EvalReport", "EvalRow", "evaluate"]
