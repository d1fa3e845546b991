"""The loader that DALI decodes for, on CPU or GPU ("mixed") by one pipeline, fed by the plan.

Samples whose pixels depend on the decoder (alpha, CMYK, more than 8 bits) go through Pillow into
the same batch. Pixels equal Pillow's within 2 grey levels, except in the rows and columns next to
the crop's border, where DALI repeats the border and Pillow renormalises the filter.
"""

from __future__ import annotations

import logging
import threading

import numpy as np
import torch
from nvidia.dali import backend, fn, pipeline_def, types
from torch import Tensor

from vlpfast.data.loader_torch import Draws, TorchLoader

_LOG = logging.getLogger("vlpfast.data")
_MAX_FAILURES = 8
_FILTERS = {"bicubic": types.INTERP_CUBIC, "linear": types.INTERP_LINEAR}


class DaliLoader(TorchLoader):
    """Like `TorchLoader`, with the same crops, captions and order.

    Images lie on the GPU of this process where there is one. A batch that DALI fails on is decoded
    sample by sample by Pillow, so that one corrupt image costs no other.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        gpu = backend.GetCUDADeviceCount() > 0 and torch.cuda.is_available()
        self.device = (
            torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu")
        )
        self._stream = torch.cuda.Stream(self.device) if gpu else None
        self._pipeline_lock = threading.Lock()
        self._pipeline = self._build()
        self._num_failures, self._error = 0, ""

    def _build(self):
        pipeline = _decode_crop_resize(
            mixed=self._stream is not None,
            size=self.image_size,
            filter=_FILTERS[self.config.interpolation],
            batch_size=self.batch_size,
            num_threads=self.num_workers,
            device_id=self.device.index,
            prefetch_queue_depth=1,
        )
        pipeline.build()
        return pipeline

    def _images(self, draws: Draws) -> tuple[Tensor, Draws]:
        plain = np.array(self.index.at("plain", draws.samples))
        rows = self._decodable(draws, np.flatnonzero(plain))
        crops = self._run(draws, rows)
        if crops is None:
            # Which rows it failed on is asked of Pillow; the pixels of the others must not depend
            # on whether that was known before.
            for row in rows:
                self._decode(int(draws.samples[row]), draws.boxes[row])
            good = self._decodable(draws, rows)
            crops = self._run(draws, good) if len(good) < len(rows) else None
            rows = good
            if crops is None:
                self._blame()
                rows = rows[:0]
        if len(rows) == len(plain):
            return crops, draws
        images = self._empty(len(plain))
        if len(rows):
            images[torch.from_numpy(rows)] = crops.cpu()
        others = np.setdiff1d(np.arange(len(plain)), rows)
        images, draws = self._fill(images, draws, others)
        return images.to(self.device), draws

    def _decodable(self, draws: Draws, rows: np.ndarray) -> np.ndarray:
        """Those of `rows` whose sample is not known to be corrupt."""
        known = [int(sample) in self._undecodable for sample in draws.samples[rows]]
        return rows[~np.array(known, np.bool_)]

    def _blame(self) -> None:
        """Counts a batch that failed though each of its samples decodes by Pillow."""
        self._num_failures += 1
        _LOG.warning("DALI failed on a batch that Pillow decodes: %s", self._error)
        if self._num_failures >= _MAX_FAILURES:
            raise RuntimeError(
                f"DALI failed on {_MAX_FAILURES} batches that Pillow decodes; use loader='torch'. "
                f"Last error: {self._error}"
            )

    def _run(self, draws: Draws, rows: np.ndarray) -> Tensor | None:
        """Crops of `rows` by DALI; None if it failed on one of them."""
        if not len(rows):
            return self._empty(0)
        try:
            encoded = [
                np.frombuffer(self.index.image_bytes(int(s)), np.uint8) for s in draws.samples[rows]
            ]
            boxes = draws.boxes[rows].astype(np.int32)
            with self._pipeline_lock:
                return self._run_pipeline(encoded, boxes)
        except OSError as error:
            self._error = str(error)
            return None

    def _run_pipeline(self, encoded: list[np.ndarray], boxes: np.ndarray) -> Tensor | None:
        # DALI counts rows before columns.
        self._pipeline.feed_input("encoded", encoded)
        self._pipeline.feed_input("anchor", np.ascontiguousarray(boxes[:, [1, 0]]))
        self._pipeline.feed_input("shape", np.ascontiguousarray(boxes[:, [3, 2]]))
        try:
            (output,) = self._pipeline.run()
        except RuntimeError as error:
            self._error = str(error).strip()
            # A pipeline that has failed is no longer valid.
            self._pipeline = self._build()
            return None
        if self._stream is None:
            return torch.from_dlpack(output.as_tensor()).clone()
        with torch.cuda.stream(self._stream):
            crops = torch.from_dlpack(output.as_tensor()).clone()
        self._stream.synchronize()
        return crops


@pipeline_def
def _decode_crop_resize(*, mixed: bool, size: int, filter: types.DALIInterpType):
    encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
    anchor = fn.external_source(name="anchor", dtype=types.INT32, ndim=1)
    shape = fn.external_source(name="shape", dtype=types.INT32, ndim=1)
    images = fn.decoders.image_slice(
        encoded,
        anchor,
        shape,
        axes=(0, 1),
        normalized_anchor=False,
        normalized_shape=False,
        device="mixed" if mixed else "cpu",
        output_type=types.RGB,
        # As libjpeg does, without which the GPU's pixels differ.
        jpeg_fancy_upsampling=True,
    )
    if filter != types.INTERP_CUBIC:
        return fn.resize(images, size=(size, size), interp_type=filter, antialias=True)
    # Columns first, rounded to uint8 between, as Pillow does: one call would keep the overshoot of
    # the first direction, up to 30 grey levels beside a sharp edge.
    heights = fn.cast(shape[0:1], dtype=types.FLOAT)
    half = fn.cat(heights, types.Constant([float(size)], device="cpu"))
    images = fn.resize(images, size=half, interp_type=filter, antialias=True)
    return fn.resize(images, size=(size, size), interp_type=filter, antialias=True)
