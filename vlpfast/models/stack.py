"""A stack of blocks: how it is made, ended and initialised."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from vlpfast.layers.block import Block, CrossKeys, Layout, Leaving, ResidualNorm
from vlpfast.layers.drop_path import path_rates
from vlpfast.layers.experts import Modality, PairLayout, Streams
from vlpfast.layers.moe import MoeBlock
from vlpfast.layers.recompute import run
from vlpfast.models.config import StackConfig
from vlpfast.ops.seed import fold_seed

# What `Block` passes on: the last branch, not yet added, and the sum of all before it.
State = tuple[Tensor | None, Tensor] | tuple[Streams | None, Streams]
# Of the names of parameters, which expert has them.
_EXPERT = re.compile(r"\.(text|image|joint)(?=\.)")
_OF_FRONT_ENDS = ("feature.weight", "box.weight", "cell.weight", "hidden_feature")


def make_blocks(
    config: StackConfig,
    *,
    cross: bool = False,
    mlp_between: bool = False,
    first: int = 0,
    of: int = 0,
) -> nn.ModuleList:
    """`first` and `of` as `path_rates`."""
    rates = path_rates(config.drop_path_rate, config.depth, first, of)
    experts = getattr(config, "moe_experts", 0)
    routed = {"num_experts": experts, "top_k": config.moe_top_k} if experts else {}
    return nn.ModuleList(
        (MoeBlock if experts and number % 2 == 0 else Block)(
            **config.block,
            cross=cross,
            mlp_between=mlp_between,
            drop_path=rates[number],
            **(routed if number % 2 == 0 else {}),
        )
        for number in range(config.depth)
    )


def run_blocks(
    blocks: Sequence[nn.Module],
    state: State,
    layout: Layout | Sequence[Layout] | Sequence[PairLayout],
    seed: int,
    *,
    first: int = 0,
    read: Callable[[int], CrossKeys] | None = None,
    leaving: Leaving | Iterable[Modality] | None = None,
) -> State:
    """The state of `Block`, or by streams of `ExpertBlock`, after `blocks`.

    Args:
        blocks: some of a stack.
        state: (branch, residual) before them; of tokens as they are embedded (None, tokens).
        layout: of all layers of the stack, or of each.
        seed: keys dropout.
        first: number of the first of them in the stack.
        read: what the layer of a number reads by cross-attention.
        leaving: the only tokens, or streams, that the last of `blocks` makes; None: all.
    """
    for number, block in enumerate(blocks, start=first):
        here = layout if isinstance(layout, Layout) else layout[number]
        keys = () if read is None else (read(number),)
        ends = leaving is not None and number == first + len(blocks) - 1
        options = {"leaving": leaving} if ends else {}
        state = run(block, *state, here, *keys, seed=fold_seed(seed, number), **options)
    return state


def final_norm(config: StackConfig) -> ResidualNorm | None:
    if config.norm == "post" or not config.depth:
        return None
    return ResidualNorm(config.dim, config.norm_eps, config.dropout)


def finish(
    norm: ResidualNorm | None,
    branch: Tensor | None,
    residual: Tensor,
    seed: int,
    *,
    bare: bool = False,
) -> Tensor:
    """What a stack gives: its last sum, which the norm of a stack that has one normalises, unless
    it is wanted `bare`.
    """
    if norm is None:
        return residual
    normed, summed = norm(branch, residual, fold_seed(seed, -1))
    return summed if bare else normed


@torch.no_grad()
def init_tower(tower: nn.Module, config: StackConfig) -> None:
    """Initial weights: pre-norm stacks by width and depth as CLIP, post-norm stacks N(0, 0.02) as
    BERT.

    Source: Radford et al. 2021, section 2.5 and open_clip transformer.py `init_parameters`; Devlin
    et al. 2019; for "sub" see `_init_sub_norm`.
    """
    post, width, depth = config.norm == "post", config.dim, max(config.depth, 1)
    inputs = lambda parameter: parameter.shape[-1] ** -0.5
    stds: dict[tuple[str, ...], float | Callable[[Tensor], float]] = {
        ("qkv.weight", "q.weight", "kv.weight"): 0.02 if post else width**-0.5,
        ("out.weight", "fc2.weight"): 0.02 if post else (2 * depth * width) ** -0.5,
        ("fc1.weight",): 0.02 if post else (2 * width) ** -0.5,
        ("tag.weight", "expert.weight", "_map.weight"): inputs,
        ("embedding.token", "token_type", "class_token", "mask_token", "modality"): 0.02,
        (".kind", "probe", "start"): 0.02,
        (".query",): 1.0,
        ("position",): getattr(config, "position_scale", 1.0) * (0.02 if post else 0.01),
        ("embedding.weight",): lambda patches: patches[0].numel() ** -0.5,
        _OF_FRONT_ENDS: 0.02 if post else inputs,
        (".bias",): 0.0,
    }
    for full_name, parameter in tower.named_parameters():
        name = _EXPERT.sub("", full_name)
        std = next((std for endings, std in stds.items() if name.endswith(endings)), None)
        if std == 0:
            nn.init.zeros_(parameter)
        elif std is not None:
            nn.init.normal_(parameter, std=std(parameter) if callable(std) else std)
        elif ".cnn." in name and parameter.dim() == 4:
            nn.init.kaiming_normal_(parameter, mode="fan_out", nonlinearity="relu")
        if config.norm == "sub":
            _init_sub_norm(name, parameter, config)


def _init_sub_norm(name: str, parameter: Tensor, config: StackConfig) -> None:
    """Xavier's weights, those of values, outputs and MLPs times sqrt(log(2 * depth)).

    Source: Wang et al. 2022 (Magneto), figure 2, arXiv:2210.06423.
    """
    gain = math.log(2 * max(config.depth, 1)) ** 0.5
    if name.endswith(("out.weight", "fc1.weight", "fc2.weight")):
        nn.init.xavier_normal_(parameter, gain)
    elif name.endswith("qkv.weight"):
        # Queries and keys keep dim ** -0.5, which is Xavier's.
        parameter[2 * config.dim :].mul_(gain)
