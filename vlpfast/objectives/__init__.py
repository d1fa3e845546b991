"""Objectives: the losses of a run, and the step that computes them all from one pass."""

from vlpfast.objectives.config import ObjectivesConfig
from vlpfast.objectives.plan import Plan
from vlpfast.objectives.step import PretrainStep, StepOutput

__all__ = ["ObjectivesConfig", "Plan", "PretrainStep", "StepOutput"]
