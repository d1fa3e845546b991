"""Which parameters decay, at which rate each one learns, and the optimizer that updates them."""

from __future__ import annotations

import fnmatch
import importlib
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import nn

from vlpfast.train.config import OptimConfig

_APEX = {"apex_adam": "FusedAdam", "apex_lamb": "FusedLAMB"}


def decays(name: str, parameter: nn.Parameter, no_decay: Iterable[str] = ()) -> bool:
    """Whether weight decay acts on a parameter.

    Not on vectors and scalars (biases, norm weights, class tokens, the temperature), nor on what is
    named `...bias`, `logit_scale` or one of `no_decay`. Matrices decay, embedding tables and
    learned positions too.

    Source: open_clip, `open_clip_train/main.py`. timm (so ALBEF) also spares `pos_embed`: name it
    in `no_decay`.
    """
    if parameter.ndim < 2 or name.endswith("bias") or "logit_scale" in name:
        return False
    return not any(part in name for part in no_decay)


def freeze(module: nn.Module, patterns: Iterable[str]) -> None:
    """Parameters whose names fit one of `patterns` ("vision.*") take no gradient.

    Raises:
        ValueError: a pattern fits no parameter, or nothing is left to train.
    """
    parameters = dict(module.named_parameters())
    for pattern in patterns:
        fitting = fnmatch.filter(parameters, pattern)
        if not fitting:
            raise ValueError(
                f"train.freeze: no parameter fits {pattern!r}; known: {', '.join(parameters)}"
            )
        for name in fitting:
            parameters[name].requires_grad_(False)
    if not any(p.requires_grad for p in parameters.values()):
        raise ValueError(f"train.freeze {tuple(patterns)} leaves nothing to train")


def param_groups(
    module: nn.Module, config: OptimConfig, lr_scale: Callable[[str], float] = lambda name: 1.0
) -> list[dict[str, object]]:
    """Trained parameters of `module`, grouped by weight decay and learning-rate factor.

    Args:
        module: parameters that need no gradient are left out.
        config: weight decay, exclusions and `lr_multipliers`.
        lr_scale: a further factor for each parameter name (layer-wise decay).

    Returns:
        Groups in order of first appearance, each with `params`, `weight_decay` and `lr_scale`.

    Raises:
        ValueError: a prefix of `lr_multipliers` fits no parameter.
    """
    names = [name for name, _ in module.named_parameters()]
    for prefix, _ in config.lr_multipliers:
        if not any(name.startswith(prefix) for name in names):
            parts = sorted({name.partition(".")[0] for name in names})
            raise ValueError(
                f"optim.lr_multipliers: no parameter starts with {prefix!r}; known: {parts}"
            )
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            weight_decay = config.wd if decays(name, parameter, config.no_decay) else 0.0
            key = (weight_decay, lr_scale(name) * _multiplier(name, config.lr_multipliers))
            groups.setdefault(key, []).append(parameter)
    return [{"params": p, "weight_decay": wd, "lr_scale": s} for (wd, s), p in groups.items()]


def create_optimizer(
    groups: list[dict[str, object]], config: OptimConfig, device: torch.device
) -> torch.optim.Optimizer:
    """The optimizer of `config` over `param_groups`.

    Raises:
        NotImplementedError: an apex optimizer where apex or a GPU is missing.
    """
    common = {"lr": config.lr, "betas": (config.beta1, config.beta2), "eps": config.eps}
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, fused=device.type in ("cpu", "cuda"), **common)
    if device.type != "cuda":
        raise NotImplementedError(
            f"optim.optimizer={config.optimizer!r} needs a CUDA GPU; use 'adamw'"
        )
    try:
        apex = importlib.import_module("apex.optimizers")
    except ImportError as error:
        raise NotImplementedError(
            f"optim.optimizer={config.optimizer!r} needs NVIDIA apex ({error}); use 'adamw'"
        ) from error
    return getattr(apex, _APEX[config.optimizer])(groups, **common)


def moments_by_name(optimizer: torch.optim.Optimizer, module: nn.Module) -> dict[str, object]:
    """What `load_moments` takes: the state of each trained parameter of `module` by its name, and
    how many steps apex's optimizers, which count them by group, have taken.
    """
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    moments = {names[id(parameter)]: dict(own) for parameter, own in optimizer.state.items()}
    steps = max((group.get("step", 0) for group in optimizer.param_groups), default=0)
    return {"moments": moments, "steps": steps}


def load_moments(
    optimizer: torch.optim.Optimizer, module: nn.Module, state: Mapping[str, object]
) -> None:
    """Each parameter takes up its own moments, however they are grouped; decay, betas and all else
    of the groups stay as `optimizer` was made.

    Raises:
        ValueError: names or shapes are others than of the trained parameters; names them.
    """
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    own = [p for group in optimizer.param_groups for p in group["params"]]
    shapes = {names[id(p)]: p.shape for p in own}
    moments = state["moments"]
    found = {
        name: next(
            (t.shape for t in m.values() if torch.is_tensor(t) and t.dim()), shapes.get(name)
        )
        for name, m in moments.items()
    }
    odd = sorted(name for name in {*shapes, *found} if shapes.get(name) != found.get(name))
    if moments and odd:
        raise ValueError(
            f"the optimizer's state is not of the parameters that are trained; they differ in "
            f"{', '.join(odd[:5])}{' and others' if odd[5:] else ''}"
        )
    whole = optimizer.state_dict()
    whole["state"] = {
        number: moments[names[id(p)]] for number, p in enumerate(own) if names[id(p)] in moments
    }
    if state["steps"]:
        for group in whole["param_groups"]:
            group["step"] = state["steps"]
    optimizer.load_state_dict(whole)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Gives each group `lr` times its `lr_scale`."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def _multiplier(name: str, multipliers: Iterable[tuple[str, float]]) -> float:
    fitting = [(len(prefix), factor) for prefix, factor in multipliers if name.startswith(prefix)]
    return max(fitting)[1] if fitting else 1.0
