"""Small random batches for tests."""

import torch

from vlpfast.data.batch import Batch
from vlpfast.ragged import Ragged
from vlpfast.regions import Regions


def make_batch(
    size: int = 5, *, image_size: int = 16, vocab_size: int = 50, seed: int = 0, masked: bool = True
) -> Batch:
    """Random images and texts of 3 to 8 tokens; the last two pairs show the same image where there
    are enough.
    """
    generator = torch.Generator().manual_seed(seed)

    def randint(low: int, high: int, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator)

    texts = [[1, *randint(4, vocab_size, (int(n),)).tolist(), 2] for n in randint(1, 7, (size,))]
    text = Ragged.from_lists(texts)
    image_ids = torch.arange(size) + 100 * seed
    if size > 2:
        image_ids[-1] = image_ids[-2]
    masked_values, labels = text.values.clone(), torch.full_like(text.values, -100)
    hidden = text.first() + 1
    labels[hidden], masked_values[hidden] = text.values[hidden], 3
    return Batch(
        images=randint(0, 256, (size, image_size, image_size, 3)).to(torch.uint8),
        text=text,
        image_ids=image_ids,
        sample_ids=torch.arange(size),
        positions=torch.arange(size) + 1000 * seed,
        masked_text=text.with_values(masked_values) if masked else None,
        mlm_labels=labels if masked else None,
    )


def make_regions(size: int = 5, *, dim: int = 64, classes: int = 65, seed: int = 0) -> Regions:
    """1 to 4 random regions of each image, with boxes and class distributions."""
    generator = torch.Generator().manual_seed(seed)
    lens = torch.randint(1, 5, (size,), generator=generator)
    count = int(lens.sum())
    corners = torch.rand(count, 2, 2, generator=generator).sort(1).values
    labels = torch.randn(count, classes, generator=generator).softmax(1)
    features = torch.randn(size, 4, dim, generator=generator)
    return Regions(Ragged.from_padded(features, lens), corners.flatten(1), labels)
