"""x-lxmert: hidden cells of a grid, told by their codes in the image stream that read the text."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from tests._batches import make_batch
from vlpfast.data.batch import Batch
from vlpfast.data.masking import mask_patches, mask_patches_evenly
from vlpfast.models import VLPModel, preset_config
from vlpfast.objectives import ObjectivesConfig, PretrainStep
from vlpfast.recipes.x_lxmert import OBJECTIVES

SIDE, CODES, BATCH = 32, 11, 4
CELLS = (SIDE // 8) ** 2


def small() -> VLPModel:
    torch.manual_seed(0)
    config = preset_config("x-lxmert", "tiny", vocab_size=50, image_size=SIDE, codes=CODES)
    shape = {"dim": 32, "heads": 2, "depth": 2}
    parts = {n: replace(getattr(config, n), **shape) for n in ("vision", "text", "fusion")}
    model = VLPModel(replace(config, **parts))
    torch.nn.init.normal_(model.vision.embedding.mask_token)
    return model


def hidden_batch(how: str = "blocks") -> Batch:
    batch = make_batch(BATCH, image_size=SIDE)
    codes = torch.randint(0, CODES, (BATCH, CELLS), generator=torch.Generator().manual_seed(1))
    hidden = mask_patches(CELLS // 2, SIDE // 8, seed=0, positions=batch.positions)
    if how == "even":
        hidden = mask_patches_evenly(CELLS, seed=0, positions=batch.positions)
        assert len(set((hidden >= 0).sum(1).tolist())) > 1
    return replace(batch, hidden_patches=hidden, codes=codes)


def mask_of(batch: Batch) -> torch.Tensor:
    return (torch.arange(CELLS) == batch.hidden_patches[..., None]).any(1)


def test_base_is_lxmert_on_a_grid():
    with torch.device("meta"):
        model = VLPModel(preset_config("x-lxmert", "base"))
        regions = VLPModel(preset_config("lxmert", "base"))
    assert model.config.num_patches == 64
    for name in ("text", "fusion", "pooler"):
        ours, theirs = (getattr(m, name).state_dict() for m in (model, regions))
        assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
    assert len(model.vision.blocks) == len(regions.vision.blocks) == 5
    assert model.code_head.weight.shape == (10_000, 768)


@torch.no_grad()
def test_no_token_sees_the_pixels_of_hidden_cells():
    model, batch = small().eval(), hidden_batch()
    mask = mask_of(batch)
    pixels = mask.view(BATCH, SIDE // 8, SIDE // 8)
    pixels = pixels.repeat_interleave(8, 1).repeat_interleave(8, 2)[..., None]
    others = torch.where(pixels, 255 - batch.images, batch.images)
    first, second = (model.encode_image(x, hidden=mask).tokens for x in (batch.images, others))
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    seen = model.encode_image(others).tokens
    assert not torch.equal(seen, model.encode_image(batch.images).tokens)
    # A hidden cell is told by its place alone.
    embedding = model.vision.embedding
    cells = embedding(batch.images, None, mask)[mask]
    expected = embedding.mask_token + embedding.position.expand(BATCH, -1, -1)[mask]
    torch.testing.assert_close(cells, expected + embedding.kind)


@torch.no_grad()
@pytest.mark.parametrize("how", ["blocks", "even"])
def test_loss_is_that_of_pairs_alone(how):
    model, batch = small(), hidden_batch(how)
    objectives = ObjectivesConfig(itc=0.0, mvm=1.0)
    total, count = PretrainStep(model, objectives).eval()(batch, seed=0, step=0).losses["mvm"]
    mask, expected = mask_of(batch), 0.0
    assert int(count) == int(mask.sum())
    assert how == "even" or int(count) == BATCH * CELLS // 2
    for row in range(BATCH):
        one = torch.tensor([row])
        tokens = model.encode_image(batch.images[one], hidden=mask[one]).tokens
        text = model.encode_text(batch.text.select(one)).tokens
        fused = model.fuse_pairs(text, model.image_keys(tokens), torch.zeros_like(one))
        ids = batch.hidden_patches[row]
        ids = ids[ids >= 0]
        logits = model.code_logits(fused.image.values[ids])
        expected += F.cross_entropy(logits, batch.codes[row, ids], reduction="sum")
    torch.testing.assert_close(total, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("how", ["blocks", "even"])
def test_every_parameter_gets_a_gradient(how):
    step = PretrainStep(small(), OBJECTIVES).train()
    out = step(hidden_batch(how), seed=0, step=0)
    assert out.losses.keys() == {"itm", "mlm", "mvm"}
    sum(total for total, _ in out.losses.values()).backward()
    assert [name for name, p in step.named_parameters() if p.grad is None] == []


def test_what_does_not_fit_says_so():
    with pytest.raises(ValueError, match=r"codes are of patches or cells: .* got 'regions'"):
        preset_config("lxmert", "tiny", codes=9)
    with pytest.raises(ValueError, match=r"preset 'lxmert' has no code head; .*'x-lxmert'"):
        PretrainStep(VLPModel(preset_config("lxmert", "tiny")), ObjectivesConfig(itc=0.0, mvm=1.0))
