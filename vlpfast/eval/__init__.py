"""Evaluation: retrieval, re-ranking by matching, probes of what the image adds, reports."""

from vlpfast.eval.probe import mlm_probe, swap_probe
from vlpfast.eval.report import EvalResult
from vlpfast.eval.rerank import rerank
from vlpfast.eval.retrieval import retrieval_metrics
from vlpfast.eval.run import TASKS, EvalOptions, evaluate, evaluate_model

__all__ = [
    "TASKS",
    "EvalOptions",
    "EvalResult",
    "evaluate",
    "evaluate_model",
    "mlm_probe",
    "rerank",
    "retrieval_metrics",
    "swap_probe",
]
