"""Where the time of a training step goes: by part of the model and by operator."""

from vlpfast.profile.report import Operator, Part, StepProfile
from vlpfast.profile.run import ProfileOptions, profile

__all__ = ["Operator", "Part", "ProfileOptions", "StepProfile", "profile"]
