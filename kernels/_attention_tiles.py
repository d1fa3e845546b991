"""Tiles of the attention kernels, and their cases of the ahead-of-time gate."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton

from vlpfast.kernels import _attention_bwd as bwd
from vlpfast.kernels import _attention_fwd as fwd
from vlpfast.kernels._attention import TILE
from vlpfast.kernels._common import AotCase


class Blocks(NamedTuple):
    """Tile of one program, rows x keys, and how it is compiled."""

    m: int
    n: int
    num_warps: int
    num_stages: int


# Heads of up to 64, and up to 128; "+" for calls with a bias, block ids or dropout. The one pass of
# narrow heads holds q and dO as right operands, for which Ampere has registers at 32 rows.
_HALF = {
    "fwd": (Blocks(64, 64, 4, 3), Blocks(64, 64, 8, 2)),
    "fwd+": (Blocks(64, 32, 4, 2), Blocks(64, 64, 8, 2)),
    "fwd-tall": (Blocks(128, 64, 8, 3), Blocks(128, 32, 8, 2)),
    "fwd-short": (Blocks(32, 64, 4, 2), Blocks(32, 64, 8, 2)),
    "bwd": (Blocks(64, 64, 4, 2), Blocks(64, 32, 8, 2)),
    "bwd+": (Blocks(64, 32, 4, 2), Blocks(64, 32, 8, 2)),
    "bwd-short": (Blocks(32, 64, 4, 2), Blocks(32, 64, 8, 2)),
    "dq": (Blocks(64, 64, 4, 2), Blocks(64, 64, 8, 2)),
    "dq+": (Blocks(64, 32, 4, 2), Blocks(64, 64, 8, 2)),
    "dkdv": (Blocks(32, 64, 4, 2), Blocks(32, 64, 8, 2)),
    "dkdv+": (Blocks(64, 32, 4, 2), Blocks(32, 32, 8, 1)),
    "dbias+": (Blocks(32, 64, 4, 2), Blocks(32, 64, 8, 1)),
}


def blocks_for(
    kernel: str, dtype: torch.dtype, E: int, most_rows: int, *, extras: bool, hopper: bool
) -> Blocks:
    """Tiles that spill neither on sm_80 nor on sm_90 (AOT_CASES); no GPU has timed them.

    Args:
        kernel: "fwd", "bwd" (one pass), "dq", "dkdv" or "dbias".
        dtype: of q.
        E: head dim.
        most_rows: most rows of a query sequence, or of a tile of the plan.
        extras: whether there is a bias, block ids or dropout.
        hopper: for sm_90; else for sm_80.
    """
    wide = E > 64
    if dtype == torch.float32:
        if wide:
            return Blocks(16, 16, 4, 1)
        return Blocks(32, 32, 4, 2) if kernel in ("fwd", "dq") else Blocks(32, 16, 4, 1)
    name = kernel + "+" * extras
    if kernel in ("fwd", "bwd") and most_rows <= 32:
        name = f"{kernel}-short"
    elif kernel == "fwd" and most_rows > TILE and not extras:
        name = "fwd-tall"
    elif kernel == "bwd" and not wide and not hopper:
        name = "bwd-short"
    blocks = _HALF[name][wide]
    return blocks._replace(m=16) if most_rows <= 16 and name.endswith("short") else blocks


def block_e(E: int) -> int:
    return max(16, triton.next_power_of_2(E))


_I64 = ("kv_index_ptr", "seed_ptr")
_I32 = (
    "q_spans_ptr", "k_spans_ptr", "q_block_ptr", "k_block_ptr", "rows_ptr", "seqs_ptr",
    "tiles_ptr", "group_start_ptr",
)  # fmt: skip
_FP32 = ("bias_ptr", "lse_ptr", "delta_ptr", "dbias_ptr")
_OPTIONAL = {
    "grouped": ("rows_ptr", "seqs_ptr", "tiles_ptr", "group_start_ptr", "kv_index_ptr"),
    "blocks": ("q_block_ptr", "k_block_ptr"),
    "bias": ("bias_ptr",),
    "dropout": ("seed_ptr",),
}


def _aot_case(
    name: str, dtype: str, E: int = 64, most_rows: int = 64, options: str = "",
    causal: bool = False, capabilities: tuple[int, ...] = (80, 90),
) -> AotCase:  # fmt: skip
    """A kernel with the tiles that the launcher takes; `options` are words of _OPTIONAL."""
    kernel = {
        "fwd": fwd.attention_fwd_kernel,
        "bwd": bwd.attention_bwd_kernel,
        "dq": bwd.attention_bwd_dq_kernel,
        "dkdv": bwd.attention_bwd_dkdv_kernel,
        "dbias": bwd.attention_bwd_dbias_kernel,
    }[name]
    fp32 = dtype == "fp32"
    blocks = blocks_for(
        name, torch.float32 if fp32 else torch.bfloat16, E, most_rows,
        extras=options not in ("", "grouped"), hopper=90 in capabilities,
    )  # fmt: skip
    absent = {p for word, ps in _OPTIONAL.items() if word not in options for p in ps}
    constants = {
        "H": 12, "E": E, "CAUSAL": causal, "PRECISION": "tf32x3" if fp32 else "ieee",
        "BLOCK_M": blocks.m, "BLOCK_N": blocks.n, "BLOCK_E": block_e(E),
    }  # fmt: skip
    types = {}
    for argument in kernel.arg_names:
        if argument in absent:
            constants[argument] = None
        elif argument in ("scale", "keep_scale"):
            types[argument] = "fp32"
        elif argument.endswith("_ptr"):
            listed = {**dict.fromkeys(_I64, "*i64"), **dict.fromkeys(_I32, "*i32")}
            types[argument] = (listed | dict.fromkeys(_FP32, "*fp32")).get(argument, f"*{dtype}")
        elif argument not in constants:
            types[argument] = "i32"
    # A row of q, k and v is a multiple of 16 elements; the last stride of a bias is 1.
    divisible = [n for n in types if n.startswith("stride_") and not n.startswith("stride_b")]
    if "bias" in options:
        constants["stride_bn"] = types.pop("stride_bn") and 1
    words = "-".join(filter(None, ["causal" if causal else "", options.replace(" ", "-")]))
    label = f"{name}-{blocks.m}x{blocks.n}-E{E}-{dtype}"
    wide = not fp32 and (blocks.m >= 64 if name in ("fwd", "dq") else blocks.n >= 64)
    return AotCase(
        f"attention-{label}" + (f"-{words}" if words else ""), kernel, types, constants, divisible,
        num_warps=blocks.num_warps, num_stages=blocks.num_stages,
        instructions={80: ("HMMA",), 90: ("HGMMA",) if wide else ("HMMA",)},
        capabilities=capabilities,
    )  # fmt: skip


_ALL = "grouped blocks bias dropout"
_SELF = "blocks bias dropout"
AOT_CASES = [
    _aot_case("fwd", "bf16", most_rows=16),
    _aot_case("bwd", "bf16", most_rows=16, options=_SELF),
    _aot_case("fwd", "bf16", most_rows=32, options=_SELF),
    _aot_case("bwd", "bf16", most_rows=32, causal=True),
    _aot_case("bwd", "bf16", 128, most_rows=32, options=_SELF),
    _aot_case("dq", "bf16", causal=True),
    _aot_case("dkdv", "bf16", causal=True),
]
for _dtype, _E in (("bf16", 64), ("bf16", 128), ("fp32", 64)):
    for _options in ("grouped", _ALL):
        AOT_CASES += [
            _aot_case(_name, _dtype, _E, options=_options) for _name in ("fwd", "dq", "dkdv")
        ]
        # Narrow heads in 16 bits have tiles of their own on each generation.
        _capabilities = [(80,), (90,)] if (_dtype, _E) == ("bf16", 64) else [(80, 90)]
        AOT_CASES += [
            _aot_case("bwd", _dtype, _E, options=_options, capabilities=_c) for _c in _capabilities
        ]
    AOT_CASES.append(_aot_case("dbias", _dtype, _E, options="bias dropout"))
    if _dtype == "bf16":
        AOT_CASES.append(_aot_case("fwd", _dtype, _E, most_rows=197))
        AOT_CASES.append(_aot_case("fwd", _dtype, _E, most_rows=197, causal=True))
