"""The embedded data set: rendered shapes with captions, boxes, regions, questions, entailment and
image pairs. It needs no download and its chance levels are known.

Every sample is a pure function of (seed, split, number), and all of its truth is known exactly.
"""

from vlpfast.data.scenes.noise import noisy_captions
from vlpfast.data.scenes.pairs import image_pair
from vlpfast.data.scenes.render import Regions, regions, render
from vlpfast.data.scenes.siblings import sample_sibling, sample_siblings
from vlpfast.data.scenes.space import HELD_OUT, SPLITS, Object, Scene, sample_scene
from vlpfast.data.scenes.text import ANSWERS, blind_answer_accuracy, describe, misses, record
from vlpfast.data.scenes.write import encode_png, make, write_shards

__all__ = [
    "ANSWERS",
    "HELD_OUT",
    "SPLITS",
    "Object",
    "Regions",
    "Scene",
    "blind_answer_accuracy",
    "describe",
    "encode_png",
    "image_pair",
    "make",
    "misses",
    "noisy_captions",
    "record",
    "regions",
    "render",
    "sample_scene",
    "sample_sibling",
    "sample_siblings",
    "write_shards",
]
