"""Region tables: those of generated scenes are the scenes', files are read as they are, batches
follow the index.
"""

import json

import numpy as np
import pytest
import torch

from tests._images import write_set
from vlpfast.data.config import DataConfig
from vlpfast.data.loader import make_loader, make_tokenizer, open_index
from vlpfast.data.regions import RegionTable, open_regions
from vlpfast.data.scenes import regions as scene_regions
from vlpfast.data.scenes import sample_sibling, write_shards
from vlpfast.data.scenes.space import SIZES, TEXTURES


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes") / "train"
    write_shards(folder, num_samples=12, image_size=32, siblings=0.5, seed=3, progress=False)
    return folder


def load(config: DataConfig, **options):
    index = open_index(config)
    tokenizer = make_tokenizer(config, index)
    loader = make_loader(
        index, config, tokenizer=tokenizer, image_size=32, batch_size=5, seed=0, **options
    )
    try:
        return index, next(iter(loader))
    finally:
        loader.close()


@pytest.mark.parametrize("train", [True, False])
def test_scenes_show_their_own_regions(scenes, train):
    config = DataConfig(path=str(scenes), regions="scenes", vocab_size=300)
    index, batch = load(config, train=train)
    for row, sample in enumerate(batch.sample_ids.tolist()):
        scene = sample_sibling(3, "train", index.record(sample)["number"], 0.5)
        expected, found = scene_regions(scene), batch.regions[[row]]
        # Stored in 16 bits.
        features, labels = (torch.from_numpy(a) for a in (expected.features, expected.soft_labels))
        torch.testing.assert_close(found.features.values, features, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(found.labels.roll(-1, 1), labels, rtol=1e-3, atol=1e-3)
        attributes = torch.from_numpy(expected.soft_attributes)
        torch.testing.assert_close(found.attributes.roll(-1, 1), attributes, rtol=1e-3, atol=1e-3)
        # Each object's size and texture are the likeliest by far, without noise surely.
        exact = scene_regions(scene, noise=0.0)
        for source, each in zip(exact.sources, exact.soft_attributes, strict=True):
            o = scene.objects[source]
            own = 3 * SIZES.index(o.size) + TEXTURES.index(o.texture) if source >= 0 else 6
            assert each.argmax() == own

        assert found.boxes.equal(torch.from_numpy(expected.boxes))
        background = torch.from_numpy(expected.sources < 0)
        assert (found.labels.argmax(1) == 0).equal(background)


def test_a_selection_keeps_its_regions(scenes):
    everything = DataConfig(path=str(scenes), regions="scenes", vocab_size=300)
    index = open_index(everything)
    wanted = str(index.record(7)["number"])
    _, batch = load(
        DataConfig(path=str(scenes), regions="scenes", vocab_size=300, where=(f"number={wanted}",)),
        train=False,
    )
    expected = open_regions(index, "scenes").at(np.array([7]))
    assert batch.regions.features.values.equal(expected.features.values)


def test_a_table_without_attributes_is_made_again(scenes):
    index = open_index(DataConfig(path=str(scenes)))
    whole = open_regions(index, "scenes").at(np.arange(12))
    (index.folder / "scene_regions" / "attributes.npy").unlink()
    again = open_regions(index, "scenes").at(np.arange(12))
    assert again.attributes.equal(whole.attributes)
    assert again.features.values.equal(whole.features.values)


def test_files_are_read_in_the_order_of_the_index(tmp_path):
    source = write_set(tmp_path, 6)
    folder = tmp_path / f"{source.name}.regions"
    folder.mkdir()
    lens = np.array([1, 0, 3, 2, 1, 4])
    offsets = np.concatenate([[0], lens.cumsum()])
    features = np.arange(offsets[-1])[:, None].repeat(3, 1).astype(np.float16)
    for name, array in (("features", features), ("offsets", offsets)):
        np.save(folder / f"{name}.npy", array)
    config = DataConfig(path=str(source), regions="files", vocab_size=300)
    index, batch = load(config)
    rows = index.rows_of(batch.sample_ids.numpy())
    # Image 1 has none and is left out.
    assert sorted(rows) == [0, 2, 3, 4, 5]
    assert batch.regions.boxes is None
    assert batch.regions.features.lens.tolist() == lens[rows].tolist()
    expected = [value for r in rows for value in range(offsets[r], offsets[r + 1])]
    assert batch.regions.features.values[:, 0].tolist() == expected


def test_no_regions_by_default(scenes):
    assert load(DataConfig(path=str(scenes), vocab_size=300))[1].regions is None


def test_errors_say_what_is_missing(tmp_path, scenes):
    source = write_set(tmp_path, 3)
    with pytest.raises(FileNotFoundError, match=r"holds no regions: features\.npy is missing"):
        load(DataConfig(path=str(source), regions="files", vocab_size=300))
    with pytest.raises(ValueError, match="not a generated set"):
        load(DataConfig(path=str(source), regions="scenes", vocab_size=300))
    index = open_index(DataConfig(path=str(scenes)))
    open_regions(index, "scenes")
    with pytest.raises(ValueError, match="expected regions of 13 images, found 12"):
        RegionTable.open(index.folder / "scene_regions", 13)
    with pytest.raises(ValueError, match="regions must be one of"):
        DataConfig(path="x", regions="boxes")


def test_another_set_under_the_same_name_is_refused(tmp_path):
    folder = tmp_path / "val"
    write_shards(folder, num_samples=2, split="val", image_size=32, seed=1, progress=False)
    info = folder / "val.info.json"
    info.write_text(json.dumps(json.loads(info.read_text()) | {"seed": 2}))
    with pytest.raises(ValueError, match="is another scene"):
        load(DataConfig(path=str(folder), regions="scenes", vocab_size=300))
