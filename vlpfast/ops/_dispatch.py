"""Choice of an op's implementation. An op lists what it has; a caller names one or lets "auto"
choose.

"auto" walks a fixed order per device type and takes the first that fits; a named implementation
runs or raises with its reason.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch

Reason = str | None


def _fits_always(**_: object) -> Reason:
    return None


def _is_here() -> Reason:
    return None


class Implementation(NamedTuple):
    """One way to run an op.

    Attributes:
        run: the implementation, called with the op's arguments.
        missing: why this machine cannot run it at all, or None (a module not built, no GPU); shown
            by `vlpfast env`.
        rejects: why it cannot take these arguments, or None; called with `device` and the arguments
            given to `choose`.
    """

    run: Callable
    missing: Callable[[], Reason] = _is_here
    rejects: Callable[..., Reason] = _fits_always


class Op(NamedTuple):
    """An op's implementations by name, and for each device type the order in which "auto" tries
    them.
    """

    name: str
    implementations: Mapping[str, Implementation]
    auto: Mapping[str, Sequence[str]]

    def choose(self, impl: str, device: torch.device, **arguments: object) -> Callable:
        """The callable to run.

        Raises:
            ValueError: `impl` is not a name this op knows.
            NotImplementedError: the named implementation cannot run here or cannot take these
                arguments.
        """
        if impl == "auto":
            for name in self.auto.get(device.type, ("reference",)):
                if self.reason(name, device, **arguments) is None:
                    return self.implementations[name].run
            raise NotImplementedError(
                f"{self.name}: no implementation fits; {self._reasons(device, **arguments)}"
            )
        if impl not in self.implementations:
            known = sorted(self.implementations)
            raise ValueError(f"{self.name}: impl must be 'auto' or one of {known}, got {impl!r}")
        reason = self.reason(impl, device, **arguments)
        if reason is not None:
            raise NotImplementedError(f"{self.name}: impl={impl!r} cannot run: {reason}")
        return self.implementations[impl].run

    def reason(self, name: str, device: torch.device, **arguments: object) -> Reason:
        """Why implementation `name` cannot run these arguments, or None if it can."""
        implementation = self.implementations[name]
        return implementation.missing() or implementation.rejects(device=device, **arguments)

    def _reasons(self, device: torch.device, **arguments: object) -> str:
        return "; ".join(
            f"{name}: {self.reason(name, device, **arguments)}" for name in self.implementations
        )


def reference_only(name: str, run: Callable) -> Op:
    """An op that has only its eager reference."""
    return Op(
        name, {"reference": Implementation(run)}, {"cpu": ("reference",), "cuda": ("reference",)}
    )
