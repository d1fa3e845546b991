"""A CNN's grid as image tokens: ResNet-50's size, which cells are seen when, gradients."""

import pytest
import torch

from tests._batches import make_batch
from vlpfast.layers.cnn import ResNet
from vlpfast.layers.grid import GridEmbedding
from vlpfast.models import VLPModel, create_model, preset_config
from vlpfast.objectives import ObjectivesConfig, PretrainStep

PIXEL_BERT = ObjectivesConfig(itc=0.0, itm=1.0, mlm=1.0, itm_negatives="random")
PIXELS = {"mean": (0.5,) * 3, "std": (0.5,) * 3}


def pixel_bert_step() -> PretrainStep:
    torch.manual_seed(0)
    return PretrainStep(create_model("pixel-bert", "tiny", vocab_size=50), PIXEL_BERT)


def test_resnet50_has_the_published_size():
    with torch.device("meta"):
        cnn = ResNet("resnet50")
        model = VLPModel(preset_config("pixel-bert", "base"))
    # torchvision's resnet50 has 25,557,032, of which the classifier's 2,049,000 are not here.
    assert sum(p.numel() for p in cnn.parameters()) == 25_557_032 - 2_049_000
    assert cnn(torch.empty(1, 3, 768, 768, device="meta")).shape == (1, 2048, 24, 24)
    assert model.config.num_patches == (768 // 64) ** 2
    assert model.config.vision.num_kept(144) == 100


@torch.no_grad()
def test_cells_are_those_of_the_image_alone_and_kept_ones_stay_what_they_are():
    torch.manual_seed(0)
    grid = GridEmbedding(16, "small", patch_size=16, **PIXELS)
    images = torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8)
    torch.nn.init.normal_(grid.kind)
    every = grid(images)
    assert every.shape == (3, 4, 16)
    for number in range(3):
        torch.testing.assert_close(grid(images[number : number + 1])[0], every[number])
    kept = torch.tensor([[0, 3], [1, 2], [2, 3]])
    expected = torch.stack([every[row][ids] for row, ids in enumerate(kept)])
    torch.testing.assert_close(grid(images, kept), expected)


def test_cells_are_sampled_in_training_and_all_there_in_evaluation():
    step, batch = pixel_bert_step(), make_batch(image_size=64)
    seen = []
    step.model.vision.register_forward_hook(lambda _m, args, out: seen.append((args[1], out)))
    step.train()(batch, seed=0, step=0)
    step.train()(make_batch(image_size=64, seed=1), seed=0, step=0)
    first = step.eval()(batch, seed=0, step=0)
    again = step(batch, seed=7, step=9)
    assert [tokens.shape[1] for _, tokens in seen] == [27, 27, 64, 64]
    assert not seen[0][0].equal(seen[1][0])
    assert seen[2][0] is None
    for name, (total, _) in first.losses.items():
        assert total.equal(again.losses[name][0])


def test_every_parameter_gets_a_gradient_down_to_the_first_convolution():
    step = pixel_bert_step().train()
    out = step(make_batch(image_size=64), seed=0, step=0)
    sum(total for total, _ in out.losses.values()).backward()
    assert [name for name, p in step.named_parameters() if p.grad is None] == []
    assert step.model.vision.embedding.cnn.layers[0].weight.grad.abs().max() > 0


def test_a_grid_that_does_not_fit_says_so():
    with pytest.raises(ValueError, match=r"multiple of the CNN's stride 8, got 12"):
        GridEmbedding(16, "small", patch_size=12, **PIXELS)
