"""Clean pairs told from noisy ones: areas and shares against brute force, and whole evaluations."""

import numpy as np
import pytest
import torch

from tests._images import encode, picture, write_jsonl
from vlpfast.data.config import DataConfig
from vlpfast.data.loader import make_loader, open_index
from vlpfast.data.tokenizer import Tokenizer
from vlpfast.eval import EvalOptions, evaluate_model
from vlpfast.eval.noise import auc, auc_error, kept_clean
from vlpfast.eval.pairs import pair_scores
from vlpfast.models import create_model
from vlpfast.objectives import ObjectivesConfig
from vlpfast.ragged import Ragged

# 0.1 and 0.5 tie across kinds, and 0.5 is at the border of the five best.
SCORES = torch.tensor([0.9, 0.5, 0.5, 0.1, 0.7, 0.1, 0.5, 0.8, 0.2])
CLEAN = torch.tensor([1, 1, 0, 1, 1, 0, 0, 0, 1]).bool()


def test_auc_counts_pairs():
    pairs = [(a > b).double() + (a == b) / 2 for a in SCORES[CLEAN] for b in SCORES[~CLEAN]]
    assert auc(SCORES, CLEAN) == pytest.approx(torch.stack(pairs).mean().item(), abs=1e-12)
    assert auc(SCORES, ~CLEAN) == pytest.approx(1 - auc(SCORES, CLEAN), abs=1e-12)
    assert auc(torch.zeros(9), CLEAN) == 0.5
    assert auc(CLEAN.float(), CLEAN) == 1.0


def test_auc_error_covers():
    """Areas of many samples of one distribution are as far apart as it says."""
    rng = np.random.default_rng(0)
    clean = torch.arange(150) < 100
    areas = [
        auc(torch.from_numpy(rng.normal(size=150)) + clean.double(), clean) for _ in range(400)
    ]
    assert np.std(areas) == pytest.approx(auc_error(np.mean(areas), 100, 50), rel=0.15)


def test_kept_clean():
    """0.9, 0.8 and 0.7 are kept, and two of the three of 0.5, of which one is clean."""
    assert kept_clean(SCORES, CLEAN) == pytest.approx((2 + 2 / 3) / 5)
    assert kept_clean(torch.zeros(9), CLEAN) == pytest.approx(5 / 9)
    assert kept_clean(CLEAN.float(), CLEAN) == 1.0


@pytest.fixture
def data(tmp_path):
    rows = []
    for i in range(9):
        (tmp_path / f"{i}.png").write_bytes(encode(picture(i), "PNG"))
        captions = [f"picture {i}", f"number {i * 7}"][: 1 + i % 2]
        rows.append({"image": f"{i}.png", "captions": captions, "noisy": i % 3 == 0})
    path = write_jsonl(tmp_path / "set.jsonl", rows)
    return DataConfig(path=str(path), loader="torch", max_tokens=12, workers=1)


def probe(data, preset, objectives, **options):
    index = open_index(data)
    tokenizer = Tokenizer.train(index.iter_captions(), 300)
    torch.manual_seed(1)
    model = create_model(
        preset, vocab_size=tokenizer.vocab_size, context_length=16, image_size=32
    ).eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.15)
    options = EvalOptions(batch_size=4, pairs_per_call=3, **options)
    result = evaluate_model(
        model, index, tokenizer, ("noise",), data=data, options=options, objectives=objectives
    )["noise"]
    return result, model, index, tokenizer


def test_noise_of_both_metrics(data):
    result, model, index, tokenizer = probe(data, "albef", ObjectivesConfig(itm=1.0))
    clean = torch.tensor([i % 3 != 0 for i in range(9)])
    loader = make_loader(
        index, data, tokenizer=tokenizer, image_size=32, batch_size=1, seed=0, train=False
    )
    images = [batch.images for batch in loader]
    loader.close()
    for metric, prefix in (("similarity", ""), ("match", "itm_")):
        scores = []
        for i, image in enumerate(images):
            text = Ragged.from_lists(tokenizer.encode(index.captions(i), 12))
            own = torch.zeros(len(text), dtype=torch.int64)
            with torch.inference_mode():
                scores.append(pair_scores(model, metric, image, text, own).mean())
        scores = torch.stack(scores)
        assert result.metrics[f"{prefix}noise_auc"] == pytest.approx(100 * auc(scores, clean))
        wanted = 100 * kept_clean(scores, clean)
        assert result.metrics[f"{prefix}kept_clean"] == pytest.approx(wanted)
    assert result.chance == {"noise_auc": 50.0, "kept_clean": pytest.approx(100 * 6 / 9)}
    assert result.counts == {"num_samples": 9, "num_noisy": 3}
    assert "itm" in result.table()


def test_an_untrained_matching_head_has_no_row(data):
    result = probe(data, "albef", ObjectivesConfig())[0]
    assert sorted(result.metrics) == ["kept_clean", "noise_auc"]


def test_a_model_without_a_joint_space(data):
    objectives = ObjectivesConfig(itm=1.0, itc=0.0, itm_negatives="random")
    result = probe(data, "vilt", objectives)[0]
    assert sorted(result.metrics) == ["itm_kept_clean", "itm_noise_auc"]
    assert "noise_auc" in result.table()


def test_errors(data, tmp_path):
    with pytest.raises(ValueError, match="needs a joint space; preset 'metalm'"):
        probe(data, "metalm", ObjectivesConfig(lm=1.0, itc=0.0))
    with pytest.raises(ValueError, match="clean and noisy samples, got 1 and 0"):
        probe(
            DataConfig(**{**vars(data), "where": ("noisy=false",)}),
            "clip",
            ObjectivesConfig(),
            max_samples=1,
        )
    (tmp_path / "plain.png").write_bytes(encode(picture(0), "PNG"))
    path = write_jsonl(tmp_path / "plain.jsonl", [{"image": "plain.png", "captions": ["one"]}])
    with pytest.raises(ValueError, match=r"plain.png has no field 'noisy'"):
        probe(DataConfig(**{**vars(data), "path": str(path)}), "clip", ObjectivesConfig())
