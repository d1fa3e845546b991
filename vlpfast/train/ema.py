"""Exponential moving average of weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


@torch.no_grad()
def lerp_(averages: Sequence[Tensor], values: Sequence[Tensor], decay: float) -> None:
    """average = decay * average + (1 - decay) * value, in place, all tensors in one launch."""
    if averages:
        torch._foreach_lerp_(list(averages), list(values), 1.0 - decay)


class Ema:
    """Averages of a module's trained parameters. Its buffers are not averaged."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self._values = {n: p for n, p in module.named_parameters() if p.requires_grad}
        self._averages = {n: p.detach().clone() for n, p in self._values.items()}

    def update(self) -> None:
        """Takes the module's present weights into the averages."""
        lerp_(
            list(self._averages.values()), [p.detach() for p in self._values.values()], self.decay
        )

    def averaged_state_dict(self, module: nn.Module) -> dict[str, Tensor]:
        """`module.state_dict()` with averages in place of weights, under tied names too."""
        by_identity = {id(p): self._averages[n] for n, p in self._values.items()}
        state = module.state_dict(keep_vars=True)
        return {name: by_identity.get(id(t), t).detach() for name, t in state.items()}

    def state_dict(self) -> dict[str, Tensor]:
        """The averages by parameter name (not copied)."""
        return dict(self._averages)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Takes the averages that `state_dict` gave."""
        if state.keys() != self._averages.keys():
            odd = sorted(state.keys() ^ self._averages.keys())
            raise ValueError(f"averaged weights do not fit the model; they differ in {odd[:5]}")
        for name, average in self._averages.items():
            average.copy_(state[name])
