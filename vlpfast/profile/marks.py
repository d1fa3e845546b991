"""Marks: ranges in a profiler's record that say which part of a training step runs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import wraps

from torch import nn
from torch.autograd.profiler import record_function
from torch.optim import Optimizer

PREFIX = "vlpfast: "
# What is no module's: the forward outside of them, and the step outside of everything marked.
LOSSES, REST = "losses", "rest"


def mark(part: str) -> record_function:
    """A context in which `part` runs."""
    return record_function(PREFIX + part)


def marked(part: str, function: Callable) -> Callable:
    """`function`, which runs as `part`."""

    @wraps(function)
    def run(*args: object, **kwargs: object) -> object:
        with mark(part):
            return function(*args, **kwargs)

    return run


def part_of(module_name: str) -> str:
    """The part that a module of a step belongs to: its path without "model" and the numbers of a
    list's members; "" is the step itself.

    >>> part_of("teacher.model.vision.blocks.3.mlp")
    'teacher.vision.blocks.mlp'
    """
    return ".".join(p for p in module_name.split(".") if p != "model" and not p.isdigit())


@contextlib.contextmanager
def modules_marked(step: nn.Module, depth: int) -> Iterator[None]:
    """Inside, every call of a module of `step` is marked that is at most `depth` names deep; a
    deeper one runs as what holds it.
    """
    handles = []
    for name, module in step.named_modules():
        part = part_of(name) or LOSSES
        levels = part.removeprefix("teacher.").count(".") + 1
        if levels <= depth:
            handles += _mark_calls(module, part)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def optimizer_marked(optimizer: Optimizer) -> Iterator[None]:
    """Inside, the optimizer's steps are marked."""
    open_: list[record_function] = []
    handles = [
        optimizer.register_step_pre_hook(lambda *_: open_.append(mark("optimizer").__enter__())),
        optimizer.register_step_post_hook(lambda *_: open_.pop().__exit__(None, None, None)),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _mark_calls(module: nn.Module, part: str) -> list:
    # A stack: a module may call itself.
    open_: list[record_function] = []

    def before(*_: object) -> None:
        open_.append(mark(part).__enter__())

    def after(*_: object) -> None:
        open_.pop().__exit__(None, None, None)

    return [
        module.register_forward_pre_hook(before),
        module.register_forward_hook(after, always_call=True),
    ]
