"""Noisy scenes: how many, which, and that what they say is false.

As in `test_scenes`, truth is what a sentence says and the boxes show, not the generator's own.
"""

from __future__ import annotations

import itertools
import json
import re
import tarfile
from collections import Counter
from pathlib import Path

import pytest

from vlpfast.data.scenes import (
    describe,
    misses,
    noisy_captions,
    record,
    sample_scene,
    write_shards,
)

RELATION = re.compile("a (.*) (left of|right of|above|below) a (.*)")


def is_true(caption: str, objects: list[dict]) -> bool:
    """Whether a scene's third or fourth caption, colors and shapes or a relation, is true."""
    if found := RELATION.fullmatch(caption):
        first, relation, second = found.groups()
        axis, sign = {
            "left of": (0, 1),
            "right of": (0, -1),
            "above": (1, 1),
            "below": (1, -1),
        }[relation]
        return any(
            fits(first, a)
            and fits(second, b)
            and sign * round(3 * middle(b, axis) - 3 * middle(a, axis)) > 0
            for a, b in itertools.product(objects, objects)
        )
    named = Counter(re.findall(r"a (\w+ \w+)", caption))
    return named <= Counter(f"{o['color']} {o['shape']}" for o in objects)


def fits(phrase: str, o: dict) -> bool:
    words = phrase.split()
    return words[-2:] == [o["color"], o["shape"]] and set(words[:-2]) <= {o["size"], o["texture"]}


def middle(o: dict, axis: int) -> float:
    """The middle of the object's cell; a cell is a third of the image."""
    return (int((o["box"][axis] + o["box"][axis + 2]) * 1.5) + 0.5) / 3


def test_misses_where_no_caption_holds() -> None:
    scenes = [sample_scene(0, "train", i) for i in range(120)]
    records = {s.number: record(s) for s in scenes}
    counts: Counter[bool] = Counter()
    for told, scene in itertools.product(scenes, scenes):
        captions = records[told.number]["captions"][2:]
        false = not any(is_true(c, records[scene.number]["objects"]) for c in captions)
        assert misses(told, scene) == false, (captions, records[scene.number]["objects"])
        counts[false] += 1
    # Every scene's captions are true of itself, and single objects' of some others.
    assert counts[False] > 130


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_share_of_noisy_captions(share: float) -> None:
    scenes = [sample_scene(3, "train", i) for i in range(2000)]
    given = [noisy_captions(scene, share, len(scenes)) for scene in scenes]
    num_noisy = sum(captions is not None for captions in given)
    # Five standard deviations of a binomial share.
    assert abs(num_noisy - share * 2000) <= 5 * (2000 * share * (1 - share)) ** 0.5
    own = {tuple(describe(scene)) for scene in scenes}
    for scene, captions in zip(scenes, given, strict=True):
        if captions is not None:
            assert tuple(captions) in own
            assert not any(is_true(c, record(scene)["objects"]) for c in captions[2:])


def test_noisy_captions_depend_on_seed_and_number_alone() -> None:
    def noisy(numbers, seed=0, num_samples=500, share=0.3):
        scenes = [sample_scene(seed, "train", i) for i in numbers]
        return {s.number: noisy_captions(s, share, num_samples) for s in scenes}

    def flags(found):
        return [captions is not None for captions in found.values()]

    whole = noisy(range(500))
    part = noisy(reversed(range(200, 300)))
    assert part == {i: whole[i] for i in range(200, 300)}
    # A longer set has noise in the same samples, a larger share in more.
    assert flags(noisy(range(500), num_samples=900)) == flags(whole)
    more = flags(noisy(range(500), share=0.5))
    assert all(a <= b for a, b in zip(flags(whole), more, strict=True))
    assert flags(noisy(range(500), seed=1)) != flags(whole)


def test_noisy_shards(tmp_path: Path) -> None:
    options = {"num_samples": 60, "num_pairs": 10, "progress": False}
    clean = write_shards(tmp_path / "clean", **options)
    noisy = write_shards(tmp_path / "noisy", noise=0.3, samples_per_shard=25, **options)
    assert (clean["noise"], clean["num_noisy"], noisy["noise"]) == (0.0, 0, 0.3)
    records = [json.loads(data) for data in members(tmp_path / "noisy", ".json")]
    assert sum(r.pop("noisy") for r in records) == noisy["num_noisy"] > 0
    for i, found in enumerate(records):
        scene = sample_scene(0, "train", i)
        captions = noisy_captions(scene, 0.3, 60) or describe(scene)
        assert found == json.loads(json.dumps(record(scene) | {"captions": captions}))
    # Images are those of a set without noise, whose records do not speak of it.
    assert members(tmp_path / "noisy", ".png") == members(tmp_path / "clean", ".png")
    assert all("noisy" not in json.loads(data) for data in members(tmp_path / "clean", ".json"))


def members(folder: Path, suffix: str) -> list[bytes]:
    found = []
    for shard in sorted(folder.glob("*.tar")):
        with tarfile.open(shard) as tar:
            found += [tar.extractfile(m).read() for m in tar if m.name.endswith(suffix)]
    return found


def test_bad_noise(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"noise: expected a share in \[0, 1\], got 1.5"):
        write_shards(tmp_path, num_samples=2, noise=1.5, progress=False)
    with pytest.raises(ValueError, match="num_samples: 1 images are too few"):
        noisy_captions(sample_scene(0, "train", 0), 1.0, 1)
