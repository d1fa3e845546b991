"""Re-ranking grouped by image (vlpfast/eval/rerank.py) against ALBEF's retrieval evaluation, which
repeats the features of an image for each of its candidates and projects every copy.

Source: salesforce/ALBEF Retrieval.py, evaluation: texts padded to 30 tokens, images of 384 px.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.captions import caption_lens
from benchmarks.harness import Inputs, Run
from benchmarks.shapes import SHAPES as _SHAPES
from benchmarks.shapes import Rerank
from benchmarks.step.albef_eager import Towers
from benchmarks.step.albef_weights import eager_weights
from benchmarks.step.flops import fusion_flops, keys_flops
from benchmarks.step.steps import built_once, make_model
from benchmarks.timing import Call
from vlpfast.eval.rerank import score_pairs
from vlpfast.models import preset_config
from vlpfast.models.config import ModelConfig
from vlpfast.ragged import Ragged

OP = "step_rerank"
SHAPES = _SHAPES[OP]
DTYPES = ("fp32", "bf16")
DIRECTIONS = ("fwd",)
BASELINE = "albef_repeated"
TESTS = ("tests/eval/test_rerank.py", "tests/benchmarks/test_step.py")

_TEXT_LEN = 30


def _config(shape: Rerank) -> ModelConfig:
    return replace(preset_config("albef", shape.size), image_size=shape.image_size)


def setup(shape: Rerank, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Tokens of images (I, N, D) and of packed texts, and for each image a shortlist (I, k)."""
    config = _config(shape)
    lens = caption_lens(shape.num_texts)
    draw = lambda *size: torch.randn(*size, device=device)
    values = draw(sum(lens), config.text.dim)
    offsets = torch.tensor([0, *lens]).cumsum(0).to(device, torch.int32)
    ranked = draw(shape.num_images, shape.num_texts).argsort(dim=1)
    return {
        "config": config,
        "dtype": dtype,
        "image": draw(shape.num_images, config.num_patches + 1, config.vision.dim),
        "text": Ragged(values, offsets, max(lens)),
        "shortlist": ranked[:, : shape.num_candidates].contiguous(),
    }


def _own(inputs: Inputs) -> Call:
    image, shortlist = inputs["image"], inputs["shortlist"]
    model = make_model(inputs["config"], image.device).eval()
    rows = torch.arange(len(image), device=image.device)
    batches = [(rows, image)]
    pair_image = rows.repeat_interleave(shortlist.shape[1])

    def run() -> Tensor:
        with _autocast(inputs):
            scores = score_pairs(model, batches, inputs["text"], pair_image, shortlist.flatten())
        return scores.view_as(shortlist)

    return run


def _repeated(inputs: Inputs) -> Call:
    config, image, shortlist = inputs["config"], inputs["image"], inputs["shortlist"]
    towers = Towers(config).to(image.device).eval()
    weights = eager_weights(make_model(config, image.device).state_dict(), config)
    towers.load_state_dict(weights)
    text = replace(inputs["text"], max_len=_TEXT_LEN)
    text_feats, text_atts = text.pad()

    @torch.no_grad()
    def run() -> Tensor:
        scores = []
        with _autocast(inputs):
            for features, texts in zip(image, shortlist, strict=True):
                copies = features.repeat(len(texts), 1, 1)
                fused = towers.bert.fuse(text_feats[texts], text_atts[texts], copies)
                logits = towers.itm_head(fused[:, 0]).float()
                scores.append(logits[:, 1] - logits[:, 0])
        return torch.stack(scores)

    return run


def _autocast(inputs: Inputs) -> torch.autocast:
    kind = inputs["image"].device.type
    return torch.autocast(kind, torch.bfloat16, enabled=inputs["dtype"] == torch.bfloat16)


def impls(device: torch.device) -> dict[str, Run]:
    """Ours, and a copy of the image for every pair."""
    return {"vlpfast": built_once(_own), "albef_repeated": built_once(_repeated)}


def bytes(shape: Rerank, dtype: torch.dtype, direction: str) -> int:
    """Tokens of images and texts."""
    config = _config(shape)
    image = shape.num_images * (config.num_patches + 1) * config.vision.dim
    return 4 * (image + sum(caption_lens(shape.num_texts)) * config.text.dim)


def flops(shape: Rerank, direction: str) -> int:
    """Keys and values of an image once, and the mean text of every pair through the fusion."""
    config = _config(shape)
    mean = sum(caption_lens(shape.num_texts)) / shape.num_texts
    pairs = shape.num_images * shape.num_candidates
    return round(shape.num_images * keys_flops(config) + pairs * fusion_flops(config, [mean]))
