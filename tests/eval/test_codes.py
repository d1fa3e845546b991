"""Probes of models of images alone, by loops and on models whose answers are known."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from tests._batches import make_batch
from vlpfast.data.masking import mask_patches
from vlpfast.eval.codes import area_under_roc, codes_probe, linear_probe, mim_probe
from vlpfast.models import create_model, preset_config
from vlpfast.models.outputs import ImageOutput


@pytest.mark.parametrize(("n", "values"), [(9, 3), (40, 1000), (4, 1)])
def test_area_under_roc_by_loops(n, values):
    torch.manual_seed(n)
    scores = torch.randint(0, values, (n, 3)).double()
    labels = torch.rand(n, 3) < 0.5
    labels[0], labels[1] = True, False
    for column in range(3):
        wins = [
            float(p > q) + 0.5 * float(p == q)
            for p in scores[labels[:, column], column]
            for q in scores[~labels[:, column], column]
        ]
        area = area_under_roc(scores, labels)[column]
        assert float(area) == pytest.approx(sum(wins) / len(wins))


class Known(nn.Module):
    """A patch's code is the mean of its pixels; hidden ones are told from what the first row of
    patches says, if it is the image's own.
    """

    def __init__(self) -> None:
        super().__init__()
        self.config = replace(preset_config("beit2", "tiny", image_size=32), codes=16)
        self.device = torch.device("cpu")

    def image_codes(self, images):
        return images.unfold(1, 8, 8).unfold(2, 8, 8).float().mean((3, 4, 5)).flatten(1).long() % 16

    def encode_image(self, images, hidden=None):
        codes = nn.functional.one_hot(self.image_codes(images), 16).float()
        return ImageOutput(torch.cat([codes[:, :1], codes], 1), None, None)

    def image_states(self, tokens):
        return tokens

    def patches(self, tokens):
        return tokens[:, 1:]

    def code_logits(self, hidden):
        return hidden


def test_codes_and_hidden_codes_of_a_known_model():
    model, batches = Known(), [make_batch(6, image_size=32, seed=s) for s in range(3)]
    codes = torch.cat([model.image_codes(b.images) for b in batches])
    model.config = replace(model.config, codebook=replace(model.config.codebook, size=16))
    use = codes_probe(model, batches)
    assert use.metrics["codebook_use"] == pytest.approx(100 * len(codes.unique()) / 16)
    share = codes.flatten().bincount(minlength=16) / codes.numel()
    entropy = -sum(float(p) * float(p.log()) for p in share if p > 0)
    assert use.metrics["codebook_perplexity"] == pytest.approx(100 / 16 * 2.718281828**entropy)
    told = mim_probe(model, batches, model, probability=0.4, seed=4)
    assert told.metrics["mim_accuracy"] == 100
    assert "class_head_mim_accuracy" not in told.metrics
    assert told.metrics["shuffled_mim_accuracy"] < 60
    assert told.counts == {"num_images": 18, "num_hidden": 18 * 6}
    hidden = torch.cat(
        [
            model.image_codes(b.images).gather(
                1, mask_patches(6, 4, seed=4, positions=b.sample_ids)
            )
            for b in batches
        ]
    )
    most = int(hidden.flatten().bincount().max())
    assert told.chance["mim_accuracy"] == pytest.approx(100 * most / hidden.numel())
    with pytest.raises(ValueError, match="mim: the data is empty"):
        mim_probe(model, [], model, probability=0.4)


class Truth:
    """Records that say what the images show: their first pixel's brightness, as a colour."""

    def __init__(self, batches) -> None:
        self.bright = {
            int(i): bool(image[0, 0, 0] > 127)
            for batch in batches
            for i, image in zip(batch.sample_ids, batch.images, strict=True)
        }

    def record(self, sample_id):
        color = "bright" if self.bright[sample_id] else "dark"
        return {"objects": [{"shape": "square", "color": color}]}


def test_linear_probe_reads_what_is_there():
    """Whole images of one brightness: any tower's patches tell it; a blind one's do not."""
    batches = []
    for seed in range(4):
        batch = make_batch(16, image_size=16, seed=seed)
        level = torch.randint(0, 256, (16, 1, 1, 1), generator=torch.Generator().manual_seed(seed))
        images = level.expand(-1, 16, 16, 3).to(torch.uint8).contiguous()
        batches.append(replace(batch, images=images, sample_ids=torch.arange(16) + 16 * seed))
    torch.manual_seed(0)
    model, blind = (create_model("clip", "tiny", image_size=16).eval() for _ in range(2))
    with torch.no_grad():
        blind.vision.embedding.weight.zero_()
    result = linear_probe(model, blind, batches, Truth(batches))
    assert result.counts == {"num_images": 64, "num_labels": 2}
    assert result.metrics["linear_auc"] > 90
    assert result.metrics["random_linear_auc"] == pytest.approx(50, abs=1e-3)

    class Nothing:
        def record(self, sample_id):
            return {}

    with pytest.raises(ValueError, match="linear reads generated scenes"):
        linear_probe(model, blind, batches, Nothing())
