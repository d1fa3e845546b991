"""The loader that Pillow decodes for: batches drawn from the plan, made ahead in threads."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vlpfast.data import augment
from vlpfast.data.batch import Batch
from vlpfast.data.classes import open_classes
from vlpfast.data.config import DataConfig
from vlpfast.data.decode import crop_resize, decode_rgb
from vlpfast.data.index import Index
from vlpfast.data.plan import StreamPlan, share
from vlpfast.data.regions import open_regions
from vlpfast.data.texts import Texts
from vlpfast.data.tokenizer import Tokenizer
from vlpfast.ops.seed import fold_seed
from vlpfast.ragged import Ragged

_MAX_REDRAWS = 16
_DECODE_ERRORS = (OSError, ValueError)
# Pillow keeps RGB in four bytes a pixel.
_CACHED_BYTES_PER_PIXEL = 4


@dataclass
class Draws:
    """What one batch takes from the data, before any image is opened.

    Attributes:
        positions (B,): places in the stream.
        samples (B,): rows of the index.
        boxes (B, 4): x, y, width, height of the crops.
        others (B, 4): the same of second images; None where there are none.
        captions (B,): caption ids in the token table; -1 where a sample has no caption.
    """

    positions: np.ndarray
    samples: np.ndarray
    boxes: np.ndarray
    captions: np.ndarray
    others: np.ndarray | None = None

    def select(self, rows: np.ndarray) -> Draws:
        """The draws of `rows` only."""
        columns = (getattr(self, f.name) for f in fields(self))
        return Draws(*(None if a is None else a[rows] for a in columns))


class TorchLoader:
    """Batches of one rank, decoded by Pillow in threads.

    Training (`train=True`) never ends and starts at `start_step`. Evaluation passes once over this
    rank's share, takes the evaluation crop and the first caption, and its last batch may be
    smaller.

    A sample that does not decode is named in `corrupt`. In training another sample, drawn by (seed,
    position), takes its place; in evaluation its row is missing.

    Attributes:
        corrupt: name -> reason of samples that did not decode.
    """

    def __init__(
        self,
        index: Index,
        config: DataConfig,
        *,
        tokenizer: Tokenizer,
        image_size: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        train: bool = True,
        start_step: int = 0,
        num_codes: int = 0,
    ) -> None:
        if index.has_pairs and (config.regions or config.max_aspect > 1):
            raise ValueError(
                "texts about two images are read with squares of pixels: data.regions must be '' "
                f"and data.max_aspect 1, got {config.regions!r} and {config.max_aspect}"
            )
        self.index, self.config, self.tokenizer = index, config, tokenizer
        self.image_size, self.batch_size, self.seed = image_size, batch_size, seed
        self.train, self.start_step = train, start_step
        self.corrupt: dict[str, str] = {}
        self.plan = StreamPlan(index.num_samples, batch_size, seed, rank, world, config.window)
        self._share = None if train else share(index.num_samples, rank, world)
        self._regions = open_regions(index, config.regions)
        self._classes = open_classes(index, config.classes)
        self._second = index.second if index.has_pairs else None
        self._class_names = (
            Ragged.from_lists(tokenizer.encode(self._classes.names, config.max_tokens))
            if self._classes
            else None
        )
        self._texts = Texts(index, config, tokenizer, train=train, seed=seed, num_codes=num_codes)
        self.num_workers = config.workers or max(1, min(8, len(os.sched_getaffinity(0)) // 2))
        self._pool = ThreadPoolExecutor(self.num_workers, thread_name_prefix="vlpfast-data")
        self._pin = torch.cuda.is_available()
        # By sample, and whether it is the second image.
        self._cache: dict[tuple[int, bool], Image.Image] = {}
        self._cache_left = int(config.cache_gib * 2**30)
        self._cache_lock = threading.Lock()
        self._undecodable: set[int] = set()

    def __len__(self) -> int:
        """Number of batches of one evaluation pass or one training epoch, begun ones counted."""
        num_samples = self.index.num_samples if self.train else len(self._share)
        per_batch = self.batch_size * (self.plan.world if self.train else 1)
        return -(-num_samples // per_batch)

    def __iter__(self) -> Iterator[Batch]:
        steps = iter(range(self.start_step, 2**62) if self.train else range(len(self)))
        ahead: deque[Future[Batch]] = deque()
        try:
            while True:
                # A batch is one task: `prefetch` are under way or ready while the step runs.
                while len(ahead) < self.config.prefetch + 1:
                    step = next(steps, None)
                    if step is None:
                        break
                    ahead.append(self._pool.submit(self.load, step))
                if not ahead:
                    return
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()

    def close(self) -> None:
        """Stops the threads."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def load(self, step: int) -> Batch:
        """The batch of one step; the same whenever and in whatever thread it is made."""
        draws = self.draws(step)
        images, draws = self._images(draws)
        positions = keys = torch.from_numpy(draws.positions)
        if self._second is not None:
            # The changes of a pair are the same: left and right are told of both.
            images, keys = images.transpose(0, 1).flatten(0, 1), positions.repeat(2)
        images = self._augment(images, keys.to(images.device))
        text, more = self._texts.of(draws)
        own, count = torch.arange(len(positions)), self._texts.questions
        shown = own.repeat_interleave(count)[None]
        if self._second is not None:
            shown = torch.cat([shown, shown + len(own)])
        image_ids = torch.from_numpy(np.array(self.index.at("image_ids", draws.samples)))
        return Batch(
            images=images.pin_memory() if self._pin and not images.is_cuda else images,
            sizes=torch.from_numpy(self._sizes(draws.boxes)) if self._unlike else None,
            text=text,
            image_ids=image_ids.repeat_interleave(count),
            sample_ids=torch.from_numpy(draws.samples).repeat_interleave(count),
            positions=positions.repeat_interleave(count),
            shown=None if len(shown) == count == 1 else shown,
            regions=(
                self._regions.at(self.index.rows_of(draws.samples)) if self._regions else None
            ),
            class_ids=(
                self._classes.draw(self.index.rows_of(draws.samples), self.seed, positions)
                if self._classes
                else None
            ),
            class_names=self._class_names,
            **more,
        )

    def draws(self, step: int) -> Draws:
        """Samples, crops and captions of one step."""
        if self.train:
            positions = self.plan.positions(step)
            return self._draws_of(positions, self.plan.samples(positions))
        samples = self._share[step * self.batch_size : (step + 1) * self.batch_size]
        return self._draws_of(samples, samples)

    def _draws_of(self, positions: np.ndarray, samples: np.ndarray) -> Draws:
        boxes = self._boxes(self.index, positions, samples, self.seed)
        others = None
        if self._second is not None:
            others = self._boxes(self._second, positions, samples, fold_seed(self.seed, 1))
        first, count = (torch.from_numpy(a) for a in self.index.caption_ranges(samples))
        if self.train:
            first = first + self._caption_places(torch.from_numpy(positions), count)
        elif "image" in self.config.tasks and self.config.captions:
            # Images are asked for as in training.
            place = min(self.config.captions)
            first = first + torch.where(place < count, place, 0)
        captions = torch.where(count > 0, first, -1)
        return Draws(positions, samples, boxes, captions.numpy(), others)

    def _boxes(
        self, index: Index, positions: np.ndarray, samples: np.ndarray, seed: int
    ) -> np.ndarray:
        """(B, 4) crops of the images of `index`."""
        config = self.config
        sides = [index.at(name, samples) for name in ("width", "height")]
        if self.train and config.crop_scale != (1.0, 1.0):
            drawn = {"scale": config.crop_scale, "ratio": config.crop_ratio}
            return augment.crop_boxes(*sides, positions, seed=seed, **drawn)
        return augment.eval_boxes(*sides, "squash" if self._unlike else config.eval_crop)

    def _caption_places(self, positions: Tensor, count: Tensor) -> Tensor:
        """(B,) which of its `count` (B,) captions each sample shows in training."""
        places = torch.tensor(sorted(self.config.captions), dtype=torch.int64)
        fitting = (places < count[:, None]).sum(1)
        choices = torch.where(fitting > 0, fitting, count)
        place = augment.integers(self.seed, positions, augment.CAPTION, choices)
        if not len(places):
            return place
        return torch.where(fitting > 0, places[place.clamp(max=len(places) - 1)], place)

    def _images(self, draws: Draws) -> tuple[Tensor, Draws]:
        """uint8 crops (B, S, S, 3), and the draws with corrupt samples replaced or left out."""
        images = self._empty(len(draws.samples))
        images, draws = self._fill(images, draws, np.arange(len(draws.samples)))
        if self._unlike and len(images):
            rows, columns = self._sizes(draws.boxes).max(0).tolist()
            images = images[:, :rows, :columns].contiguous()
        return images, draws

    @property
    def _unlike(self) -> bool:
        """Whether images keep their aspect ratio."""
        return self.config.max_aspect > 1

    def _sizes(self, boxes: np.ndarray) -> np.ndarray:
        """(B, 2) int64 height and width that crops (B, 4) are resized to."""
        if not self._unlike:
            return np.full((len(boxes), 2), self.image_size)
        return augment.aspect_sizes(
            boxes[:, 2],
            boxes[:, 3],
            shorter=self.image_size,
            max_aspect=self.config.max_aspect,
            multiple=self.config.size_multiple,
        )

    def _empty(self, num_images: int) -> Tensor:
        if self._unlike:
            side = int(self.image_size * self.config.max_aspect)
            return torch.zeros(num_images, side, side, 3, dtype=torch.uint8)
        shape = (num_images, self.image_size, self.image_size, 3)
        shape = shape if self._second is None else (num_images, 2, *shape[1:])
        return torch.empty(shape, dtype=torch.uint8)

    def _fill(self, images: Tensor, draws: Draws, rows: np.ndarray) -> tuple[Tensor, Draws]:
        """Decodes `rows` of the batch into `images`; see `_images` for what it returns."""
        pixels = images.numpy()
        kept = np.ones(len(draws.samples), np.bool_)
        for row in rows:
            crop = self._crop(draws, row)
            if crop is None and self.train:
                crop = self._redraw(draws, row)
            kept[row] = crop is not None
            if crop is not None:
                pixels[row][tuple(slice(n) for n in crop.shape)] = crop
        if kept.all():
            return images, draws
        return images[torch.from_numpy(kept)], draws.select(kept)

    def _redraw(self, draws: Draws, row: int) -> np.ndarray:
        """Puts another sample, a function of the position, in the place of a corrupt one."""
        position = draws.positions[row : row + 1]
        for attempt in range(_MAX_REDRAWS):
            counter = augment.REDRAW + attempt
            key = torch.from_numpy(position)
            sample = augment.integers(self.seed, key, counter, self.index.num_samples)
            other = self._draws_of(position, sample.numpy())
            crop = self._crop(other, 0)
            if crop is not None:
                draws.samples[row], draws.captions[row] = other.samples[0], other.captions[0]
                draws.boxes[row] = other.boxes[0]
                if other.others is not None:
                    draws.others[row] = other.others[0]
                return crop
        name, reason = next(reversed(self.corrupt.items()))
        raise RuntimeError(
            f"{self.index.source}: a corrupt sample and {_MAX_REDRAWS} drawn in its place are "
            f"corrupt; {len(self.corrupt)} so far, last {name}: {reason}"
        )

    def _crop(self, draws: Draws, row: int) -> np.ndarray | None:
        """Crop (S, S, 3) of a sample, or (2, S, S, 3) of both its images; None if one does not
        decode.
        """
        sample = int(draws.samples[row])
        crop = self._decode(sample, draws.boxes[row])
        if crop is None or self._second is None:
            return crop
        other = self._decode(sample, draws.others[row], second=True)
        return None if other is None else np.stack([crop, other])

    def _decode(self, sample: int, box: np.ndarray, second: bool = False) -> np.ndarray | None:
        """Crop of one sample; None, and an entry in `corrupt`, if it does not decode."""
        index = self._second if second else self.index
        try:
            image = self._cache.get((sample, second)) or self._open(sample, second)
            size = self._sizes(box[None])[0]
            return crop_resize(image, box, tuple(size.tolist()), self.config.interpolation)
        except _DECODE_ERRORS as error:
            self.corrupt[index.name(sample)] = str(error)
            self._undecodable.add(sample)
            return None

    def _open(self, sample: int, second: bool) -> Image.Image:
        index, key = self._second if second else self.index, (sample, second)
        image = decode_rgb(index.image_bytes(sample))
        width, height = (int(index.at(n, np.array([sample]))[0]) for n in ("width", "height"))
        if image.size != (width, height):
            raise ValueError(f"image is {image.size}, the index says {(width, height)}")
        if self._cache_left > 0:
            with self._cache_lock:
                if key not in self._cache:
                    self._cache[key] = image
                    self._cache_left -= width * height * _CACHED_BYTES_PER_PIXEL
        return image

    def _augment(self, images: Tensor, positions: Tensor) -> Tensor:
        if not self.train:
            return images
        config, key = self.config, {"seed": self.seed, "positions": positions}
        if config.zoom_out > 1:
            images = augment.zoom_out(images, **key, factor=config.zoom_out)
        if config.hflip > 0:
            images = augment.hflip(images, **key, probability=config.hflip)
        if config.color_jitter > 0:
            images = augment.color_jitter(images, **key, strength=config.color_jitter)
        if config.grayscale > 0:
            images = augment.grayscale(images, **key, probability=config.grayscale)
        return images
