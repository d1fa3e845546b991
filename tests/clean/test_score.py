"""Scores of a whole data set: against pairs taken one by one, resumed, shared out, and refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests._clean import SIDE, data_of, make_run
from tests._images import encode, picture, write_set, write_tar
from vlpfast import cli
from vlpfast.clean import score as score_module
from vlpfast.clean.score import ScoreOptions, score
from vlpfast.data import sidecar
from vlpfast.data.index import Index
from vlpfast.data.loader import make_loader, open_index
from vlpfast.data.scenes import make
from vlpfast.data.scores import iter_scores, kept, scores_in, write_scores
from vlpfast.data.tokenizer import Tokenizer
from vlpfast.ragged import Ragged
from vlpfast.train.run import data_identity

MATCHING = {"itm": 1.0, "itc": 0.0, "itm_negatives": "random"}


@torch.inference_mode()
def one_by_one(model, index, run, metric, config, places=()) -> list[float]:
    """The mean over a sample's captions, each with its image alone."""
    tokenizer = Tokenizer.load(run / "tokenizer.json")
    loader = make_loader(
        index, config, tokenizer=tokenizer, image_size=SIDE, batch_size=1, seed=0, train=False
    )
    found = []
    for i, batch in enumerate(loader):
        visual = batch.visual(model.config.vision.front)
        texts = [c for n, c in enumerate(index.captions(i)) if not places or n in places]
        scores = []
        for text in texts or index.captions(i):
            packed = Ragged.from_lists(tokenizer.encode([text], config.max_tokens))
            if metric == "similarity":
                embeddings = (
                    model.encode_image(visual).embedding,
                    model.encode_text(packed).embedding,
                )
                scores.append(torch.cosine_similarity(*embeddings).item())
            else:
                keys = model.image_keys(model.encode_image(visual).tokens)
                tokens = model.encode_text(packed).tokens
                fused = model.fuse_pairs(tokens, keys, torch.zeros(1, dtype=torch.int64))
                scores.append(model.match(fused).softmax(-1)[0, 1].item())
        found.append(float(np.mean(scores)))
    loader.close()
    return found


def read(folder: Path, index: Index) -> np.ndarray:
    return np.concatenate([found for _, found in iter_scores(scores_in(folder), index)])


@pytest.mark.parametrize(
    ("preset", "metric"),
    [
        ("clip", "similarity"),
        ("vlmo", "similarity"),
        ("uni-perceiver", "similarity"),
        ("albef", "match"),
        ("blip", "match"),
        ("vlmo", "match"),
        ("flava", "match"),
    ],
)
def test_scores_are_those_of_single_pairs(tmp_path, monkeypatch, preset, metric):
    monkeypatch.setattr(sidecar, "PART_ROWS", 5)
    path = write_set(tmp_path, 12)
    index, config = Index.open(path), data_of(path)
    model = make_run(tmp_path / "run", index, preset, config, itm=1.0)
    options = ScoreOptions(metric, batch_size=4, pairs_per_call=3)
    done = score(tmp_path / "run", path, tmp_path / "out", options)
    found = read(tmp_path / "out", index)
    wanted = one_by_one(model, index, tmp_path / "run", metric, config)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-5)
    assert found.std() > 1e-3
    assert (done["finished"], done["num_parts"], done["num_scored"]) == (True, 3, 12)


def test_match_of_images_of_unlike_sizes(tmp_path):
    path = write_set(tmp_path, 6, width=64, height=40)
    index, config = Index.open(path), data_of(path, max_aspect=2.0, size_multiple=8)
    model = make_run(tmp_path / "run", index, "vilt", config, **MATCHING)
    score(tmp_path / "run", path, tmp_path / "out", ScoreOptions("match", batch_size=4))
    wanted = one_by_one(model, index, tmp_path / "run", "match", config)
    found = read(tmp_path / "out", index)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-5)


@pytest.mark.parametrize("preset", ["uniter", "lxmert"])
def test_match_of_regions(tmp_path, preset):
    make(tmp_path / "scenes", 8, val_samples=0, heldout_samples=0, progress=False)
    path = tmp_path / "scenes" / "train"
    index, config = Index.open(path), data_of(path, regions="scenes")
    model = make_run(tmp_path / "run", index, preset, config, **MATCHING)
    score(tmp_path / "run", path, tmp_path / "out", ScoreOptions("match", batch_size=3))
    wanted = one_by_one(model, index, tmp_path / "run", "match", config)
    found = read(tmp_path / "out", index)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-5)


def test_captions_that_count(tmp_path):
    """Those at the places asked for, else those that the run was trained on."""
    path = write_set(tmp_path, 9)
    index, config = Index.open(path), data_of(path, captions=(1,))
    model = make_run(tmp_path / "run", index, "clip", config)
    score(tmp_path / "run", path, tmp_path / "own")
    score(tmp_path / "run", path, tmp_path / "asked", ScoreOptions(captions=(0, 2)))
    for name, places in {"own": (1,), "asked": (0, 2)}.items():
        wanted = one_by_one(model, index, tmp_path / "run", "similarity", config, places)
        np.testing.assert_allclose(read(tmp_path / name, index), wanted, rtol=0, atol=2e-5)
        assert scores_in(tmp_path / name).description()["captions"] == list(places)


@pytest.fixture
def shards(tmp_path):
    """Three shards of 5, 4 and 3 samples, of which one each does not decode; and a run."""
    folder = tmp_path / "data"
    folder.mkdir()
    for shard, count in enumerate((5, 4, 3)):
        members = []
        for i in range(count):
            image = encode(picture(10 * shard + i), "PNG")
            # Header and end stand, and between them is nothing to decode.
            image = image[:60] + bytes(len(image) - 80) + image[-20:] if i == 1 else image
            members += [(f"{i}.png", image), (f"{i}.txt", f"picture {i} of {shard}".encode())]
        write_tar(folder / f"{shard}.tar", members)
    index = Index.open(folder)
    assert index.num_samples == 12
    make_run(tmp_path / "run", index, "clip", data_of(folder))
    return tmp_path, index


def test_corrupt_samples_are_named(shards):
    folder, index = shards
    done = score(folder / "run", index.source, folder / "out")
    scores = read(folder / "out", index)
    assert np.isnan(scores).nonzero()[0].tolist() == [1, 6, 10]
    assert (done["num_scored"], done["num_corrupt"]) == (9, 3)
    assert list(done["corrupt"]) == ["0.tar/1.png", "1.tar/1.png", "2.tar/1.png"]
    assert all(done["corrupt"].values())
    assert kept(index, folder / "out").num_samples == 9


def test_a_stopped_call_goes_on(shards, monkeypatch):
    folder, index = shards
    score(folder / "run", index.source, folder / "whole")
    written = []

    def stop_at_second(out, part, *rest):
        if written:
            raise KeyboardInterrupt
        written.append(part.name)
        write_scores(out, part, *rest)

    monkeypatch.setattr(score_module, "write_scores", stop_at_second)
    with pytest.raises(KeyboardInterrupt):
        score(folder / "run", index.source, folder / "out")
    with pytest.raises(ValueError, match=r"has no 1.npy"):
        read(folder / "out", index)

    def note(out, part, *rest):
        written.append(part.name)
        write_scores(out, part, *rest)

    monkeypatch.setattr(score_module, "write_scores", note)
    assert score(folder / "run", index.source, folder / "out")["finished"]
    assert written == ["0", "1", "2"]
    for name in ("0.npy", "1.npy", "2.npy", "0.json", "1.json", "2.json"):
        assert (folder / "out" / name).read_bytes() == (folder / "whole" / name).read_bytes()
    assert scores_in(folder / "out").description() == scores_in(folder / "whole").description()


def test_processes_take_shards_in_turn(shards, monkeypatch):
    folder, index = shards
    score(folder / "run", index.source, folder / "one")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, names in (("1", {"1"}), ("0", {"0", "1", "2"})):
        monkeypatch.setenv("RANK", rank)
        done = score(folder / "run", index.source, folder / "two")
        assert {p.stem for p in (folder / "two").glob("[!.]*.npy")} == names
        assert done["finished"] == (rank == "0")
    assert scores_in(folder / "two").description() == scores_in(folder / "one").description()
    assert np.array_equal(read(folder / "two", index), read(folder / "one", index), equal_nan=True)


def test_bf16(shards):
    folder, index = shards
    score(folder / "run", index.source, folder / "fp32")
    score(folder / "run", index.source, folder / "bf16", ScoreOptions(precision="amp_bf16"))
    exact, rounded = (read(folder / name, index) for name in ("fp32", "bf16"))
    np.testing.assert_allclose(rounded, exact, rtol=0, atol=0.03)
    assert not np.array_equal(rounded, exact, equal_nan=True)


def test_what_a_model_cannot_score(shards):
    folder, index = shards
    with pytest.raises(ValueError, match=r"'clip' has no matching head") as caught:
        score(folder / "run", index.source, folder / "out", ScoreOptions("match"))
    assert "'albef', 'blip', 'flava'" in str(caught.value)
    assert not (folder / "out").exists()
    make_run(
        folder / "vilt",
        index,
        "vilt",
        data_of(index.source),
        itm=1.0,
        itc=0.0,
        itm_negatives="random",
    )
    with pytest.raises(ValueError, match="metric 'similarity' needs a joint space") as caught:
        score(folder / "vilt", index.source, folder / "out")
    assert "'clip'" in str(caught.value)
    make_run(folder / "untrained", index, "albef", data_of(index.source))
    with pytest.raises(ValueError, match=r"trained: objectives.itm was 0"):
        score(folder / "untrained", index.source, folder / "out", ScoreOptions("match"))


def test_another_run_does_not_mix_in(shards):
    folder, index = shards
    score(folder / "run", index.source, folder / "out")
    with pytest.raises(ValueError, match=r"captions \[\], expected \[0\]"):
        score(folder / "run", index.source, folder / "out", ScoreOptions(captions=(0,)))


def test_broken_weights_are_no_scores(shards):
    folder, index = shards
    run = folder / "run"
    weights = load_file(run / "model.safetensors")
    weights["image_projection.weight"][0, 0] = torch.nan
    save_file(weights, run / "model.safetensors")
    with pytest.raises(ValueError, match=r"0.tar/0.png a score that is not finite"):
        score(run, index.source, folder / "out")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metric": "cosine"}, "metric must be one of"),
        ({"batch_size": 0}, "batch_size must be >= 1"),
        ({"captions": (-1,)}, "captions must be places >= 0"),
        ({"precision": "fp16"}, "precision must be"),
    ],
)
def test_bad_options(shards, options, message):
    folder, index = shards
    with pytest.raises(ValueError, match=message):
        score(folder / "run", index.source, folder / "out", ScoreOptions(**options))


def test_command_line(shards, capsys):
    folder, index = shards
    args = ["data", "score", str(folder / "run"), "--data", str(index.source)]
    assert cli.main([*args, "--out", str(folder / "out"), "--json", "--batch-size=4"]) == 0
    done = json.loads(capsys.readouterr().out)
    assert (done["metric"], done["num_scored"], done["num_corrupt"]) == ("similarity", 9, 3)
    assert cli.main([*args, "--out", str(folder / "out")]) == 0
    assert "num_corrupt: 3\n" in capsys.readouterr().out
    assert cli.main([*args, "--out", str(folder / "out"), "--metric=match"]) == 1
    assert "presets that have: 'albef', 'blip'" in capsys.readouterr().err
    evaluate = ["eval", str(folder / "run"), "--data", str(index.source), "--json"]
    assert cli.main([*evaluate, f"--scores={folder / 'out'}", "--keep-fraction=0.5"]) == 0
    assert json.loads(capsys.readouterr().out)["counts"]["num_images"] == 5


def test_a_run_is_resumed_by_the_same_filter(shards):
    """What decides which samples a run reads is part of its identity; where scores lie is not."""
    folder, index = shards
    score(folder / "run", index.source, folder / "out")
    score(folder / "run", index.source, folder / "bf16", ScoreOptions(precision="amp_bf16"))
    shutil.copytree(folder / "out", folder / "moved")

    def identity(**options):
        config = data_of(index.source, **options)
        return data_identity(open_index(config), config)

    own = identity(scores=str(folder / "out"), min_score=-0.99)
    assert own == identity(scores=str(folder / "moved"), min_score=-0.99)
    others = {
        identity(),
        identity(scores=str(folder / "out"), min_score=-0.98),
        identity(scores=str(folder / "out"), min_score=-0.99, keep_fraction=0.999),
        identity(scores=str(folder / "bf16"), min_score=-0.99),
    }
    assert len(others | {own}) == 5
