"""Floating-point operations of what a training step must compute: no padding, keys and values of an
image once, the vocabulary at masked positions only, of a tower that is only pooled the last layer's
keys, values and one token. Products alone, 2 a multiply-add.

Letters: N image tokens, T text tokens, D width, E joint width, B batch.
"""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.step.batches import num_masked
from vlpfast.models.config import ModelConfig, StackConfig

# A product costs one in the forward and two in the backward: for its input and for its weight.
_TRAIN = 3


def _linear(config: StackConfig) -> float:
    """Per token of a layer: q, k, v, output and MLP."""
    return 2 * config.dim**2 * (4 + 2 * config.mlp_ratio)


def _attention(config: StackConfig, lens: Sequence[int], causal: bool = False) -> float:
    """Scores and mixing of one layer over sequences of these lengths."""
    pairs = sum(n * (n + 1) / 2 if causal else n * n for n in lens)
    return 4 * config.dim * pairs


def _stack(
    config: StackConfig, lens: Sequence[int], causal: bool = False, *, pooled: bool = False
) -> float:
    """Of `pooled` sequences one token leaves the last layer."""
    layer = _linear(config) * sum(lens) + _attention(config, lens, causal)
    if not pooled:
        return config.depth * layer
    keys = 2 * 2 * config.dim**2 * sum(lens)
    one = (_linear(config) - 2 * 2 * config.dim**2) * len(lens) + 4 * config.dim * sum(lens)
    return (config.depth - 1) * layer + keys + one


def vision_flops(
    config: ModelConfig, num_kept: int, *, pooled: bool = False
) -> tuple[float, float]:
    """Forward of the patch projection and of the layers with the joint projection, one image."""
    vision = config.vision
    patches = 2 * num_kept * 3 * vision.patch_size**2 * vision.dim
    layers = _stack(vision, [num_kept + 1], pooled=pooled)
    return patches, layers + 2 * vision.dim * config.embed_dim


def text_flops(config: ModelConfig, lens: Sequence[int], *, pooled: bool = False) -> float:
    """Forward of the text layers."""
    return _stack(config.text, lens, config.text.causal, pooled=pooled)


def keys_flops(config: ModelConfig) -> float:
    """Forward of the keys and values of all fusion layers, one image."""
    fusion = config.fusion
    return fusion.depth * 2 * 2 * (config.num_patches + 1) * config.vision.dim * fusion.dim


def fusion_flops(config: ModelConfig, lens: Sequence[int]) -> float:
    """Forward of the fusion layers over text rows, keys and values given."""
    fusion = config.fusion
    cross = 4 * fusion.dim**2 + 4 * fusion.dim * (config.num_patches + 1)
    return _stack(fusion, lens) + fusion.depth * cross * sum(lens)


def clip_step_flops(config: ModelConfig, lens: Sequence[int], num_kept: int) -> float:
    """Forward and backward of a contrastive step on captions of these lengths."""
    size = len(lens)
    patches, layers = vision_flops(config, num_kept, pooled=True)
    text = text_flops(config, lens, pooled=True) + size * 2 * config.text.dim * config.embed_dim
    contrast = 2 * size**2 * config.embed_dim
    # Pixels need no gradient.
    return size * (2 * patches + _TRAIN * layers) + _TRAIN * (text + contrast)


def albef_step_flops(config: ModelConfig, lens: Sequence[int], queue_size: int) -> float:
    """Forward and backward of the student, forward of the teacher, on captions of these lengths."""
    size = len(lens)
    patches, layers = vision_flops(config, config.num_patches)
    text = 2 * text_flops(config, lens) + size * 2 * config.text.dim * config.embed_dim
    words = (
        sum(map(num_masked, lens))
        * 2
        * config.text.dim
        * (config.text.dim + config.text.vocab_size)
    )
    both = size * (layers + keys_flops(config)) + text + words
    # The student fuses matched, two kinds of unmatched and masked rows, the teacher masked ones.
    student = (_TRAIN - 1) * size * patches + _TRAIN * (both + 4 * fusion_flops(config, lens))
    teacher = size * patches + both + fusion_flops(config, lens)
    # Two directions: the student's similarities and their gradient, and the teacher's.
    contrast = 2 * 3 * 2 * size * (size + queue_size) * config.embed_dim
    return student + teacher + contrast


def step_bytes(num_parameters: int, *, teacher: bool) -> int:
    """Fewest bytes to move for the state: weights, gradients and both moments of Adam read, weights
    and moments written, the teacher read and written; all fp32.
    """
    return 4 * num_parameters * (7 + 2 * teacher)
