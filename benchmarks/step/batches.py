"""The batch of a step: captions of real lengths, in the library's form and in the peers'."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.captions import caption_lens
from benchmarks.step.albef_eager import EagerBatch
from vlpfast.data.batch import Batch
from vlpfast.models.config import ModelConfig
from vlpfast.ragged import Ragged

ALBEF_LEN, CLIP_LEN = 25, 77
_MASKED = 0.15


def num_masked(length: int) -> int:
    """Masked words of a caption of `length` tokens: 15 % of those between start and end, at least
    one.
    """
    return max(1, round(_MASKED * (length - 2)))


def make_batch(
    config: ModelConfig, size: int, *, device: torch.device | str = "cpu", seed: int = 0
) -> Batch:
    """`size` pairs of distinct random images with captions, some of whose words are masked. The
    last three ids of the vocabulary are mask, start and end.
    """
    generator = torch.Generator().manual_seed(seed)
    vocab, side, lens = config.text.vocab_size, config.image_size, caption_lens(size)
    mask, start, end = range(vocab - 3, vocab)
    words = [torch.randint(1, mask, (n - 2,), generator=generator).tolist() for n in lens]
    text = Ragged.from_lists([[start, *w, end] for w in words])
    hidden = torch.zeros(len(text.values), dtype=torch.bool)
    for first, n in zip(text.first().tolist(), lens, strict=True):
        words = torch.randperm(n - 2, generator=generator)[: num_masked(n)]
        hidden[first + 1 + words] = True
    batch = Batch(
        images=torch.randint(0, 256, (size, side, side, 3), generator=generator).to(torch.uint8),
        text=text,
        image_ids=torch.arange(size),
        sample_ids=torch.arange(size),
        positions=torch.arange(size),
        masked_text=text.with_values(text.values.masked_fill(hidden, mask)),
        mlm_labels=text.values.masked_fill(~hidden, -100),
    )
    return batch.to(device)


def normalised(images: Tensor, config: ModelConfig, dtype: torch.dtype = torch.float32) -> Tensor:
    """(B, 3, S, S), as the peers' loaders hand it over."""
    mean, std = (
        torch.tensor(values, dtype=dtype, device=images.device)
        for values in (config.image_mean, config.image_std)
    )
    pixels = (images.to(dtype) / 255 - mean) / std
    return pixels.permute(0, 3, 1, 2).contiguous()


def padded_ids(text: Ragged, length: int, value: int = 0) -> Tensor:
    """(B, length) int64."""
    padded, _ = text.pad(value)
    return F.pad(padded[:, :length], (0, max(0, length - padded.shape[1])), value=value)


def eager_batch(
    batch: Batch, config: ModelConfig, length: int = 0, dtype: torch.dtype = torch.float32
) -> EagerBatch:
    """The same batch for `AlbefEager`, texts padded to `length` (0: to the longest)."""
    length = length or batch.text.max_len
    valid = torch.arange(length, device=batch.image_ids.device) < batch.text.lens[:, None]
    return EagerBatch(
        images=normalised(batch.images, config, dtype),
        ids=padded_ids(batch.text, length),
        valid=valid,
        masked_ids=padded_ids(batch.masked_text, length),
        labels=padded_ids(batch.text.with_values(batch.mlm_labels), length, -100),
        image_ids=batch.image_ids,
    )
