"""Weights of Hugging Face transformers' CLIPModel as a vlpfast state dict, without a model at hand.

`integrations.weights` does this and more for a model: checked against it, with a report, and back.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from vlpfast.integrations.layouts import transformers_clip
from vlpfast.integrations.weights import convert


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
    return convert(transformers_clip(*depths), source)[0]
