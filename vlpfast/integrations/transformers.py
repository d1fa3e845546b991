"""Weights of Hugging Face transformers' models as vlpfast state dicts, without a model at hand.

`integrations.weights` does this and more for a model: checked against it, with a report, and back.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from vlpfast.integrations.layouts import transformers
from vlpfast.integrations.weights import convert


def vilt_state_dict(source: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State dict of preset `vilt` from transformers' `ViltModel.state_dict()`, without the heads,
    which ViltModel does not have.

    Raises:
        ValueError: `source` lacks weights of ViltModel, or holds some that have no place here;
            they are named.
    """
    layers = {name.split(".")[2] for name in source if name.startswith("encoder.layer.")}
    return convert(transformers.vilt(len(layers)), source)[0]


def clip_state_dict(source: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State dict of preset `clip` from transformers' `CLIPModel.state_dict()`.

    Raises:
        ValueError: `source` lacks weights of CLIPModel, or holds some that have no place here;
            they are named.
    """
    depths = [
        len({n.split(".")[3] for n in source if n.startswith(f"{tower}_model.encoder.layers.")})
        for tower in ("vision", "text")
    ]
    return convert(transformers.clip(*depths), source)[0]
