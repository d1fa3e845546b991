"""One loss over words, places and codes: by loops, and what a tokenizer of images fills in."""

from dataclasses import replace

import pytest
import torch

from tests._batches import make_batch
from tests.models.test_unified_io import model
from vlpfast.data.batch import Batch
from vlpfast.models import VLPModel, create_model, preset_config
from vlpfast.objectives import ObjectivesConfig, PretrainStep
from vlpfast.objectives.guide import Guide
from vlpfast.ragged import Ragged

WORDS, CODES, PATCHES = 50, 256, 4
PROMPTS = Ragged.from_lists([[1, 5, 2], [1, 2], [1, 7, 8, 9, 2], [1, 5, 2], [1, 9, 2]])
CONFIG = ObjectivesConfig(itc=0.0, lm=1.0)
DRAWN = [1, 4]


def unified(codes: int = CODES) -> VLPModel:
    return model(1, words=WORDS, codes=codes).train()


def tokenizer(image_size: int = 16) -> VLPModel:
    torch.manual_seed(1)
    config = preset_config("vqkd", "tiny", image_size=image_size)
    patch = 8 * image_size // 16
    vision = replace(config.vision, dim=32, heads=2, depth=1, patch_size=patch)
    return VLPModel(replace(config, vision=vision))


def batch(drawn: list[int]) -> Batch:
    """Rows of `drawn` hold places for codes."""
    plain = make_batch(masked=False, vocab_size=WORDS)
    texts = [plain.text.select(torch.tensor([row])).values.tolist() for row in range(5)]
    for row in drawn:
        texts[row] = [1, *[0] * PATCHES, 2]
    rows = torch.tensor(drawn, dtype=torch.int64)
    return replace(plain, text=Ragged.from_lists(texts), prompt=PROMPTS, drawn=rows)


@pytest.mark.parametrize("side", [16, 32])
def test_codes_stand_in_raster_order_in_drawn_rows_alone(side):
    guide, plain = Guide(tokenizer(side), True, draws=True), batch(DRAWN)
    filled = guide.fill(plain, first_code=WORDS)
    assert filled.text.cu_seqlens.equal(plain.text.cu_seqlens)
    for row in range(5):
        one = torch.tensor([row])
        got = filled.text.select(one).values.tolist()
        if row not in DRAWN:
            assert got == plain.text.select(one).values.tolist()
            continue
        pixels = plain.images[row : row + 1]
        if side == 32:
            pixels = torch.nn.functional.interpolate(
                pixels.movedim(3, 1).float(), (32, 32), mode="bilinear", antialias=True
            )
            pixels = pixels.round().to(torch.uint8).movedim(1, 3)
        codes = guide.model.image_codes(pixels)[0].tolist()
        assert got == [1, *(WORDS + code for code in codes), 2]
    nothing = batch([])
    assert guide.fill(nothing, first_code=WORDS) is nothing


def test_lm_is_the_mean_over_words_with_their_image_and_codes_without():
    guide = Guide(tokenizer(), True, draws=True)
    drawn = guide.fill(batch(DRAWN), first_code=WORDS)
    step = PretrainStep(unified().double(), CONFIG).eval()
    total, count = step(drawn, seed=0, step=0).losses["lm"]
    model, expected = step.model, []
    for row in range(5):
        one = torch.tensor([row])
        prompt, text = PROMPTS.select(one), drawn.text.select(one)
        keys = None
        if row not in DRAWN:
            keys = model.image_keys(model.encode_image(drawn.images[row : row + 1]).tokens)
        first = torch.tensor([0])
        states = model.decode(text, model.read(keys, first, prompt), first).values
        for place in range(len(text.values) - 1):
            log_p = model.next_token_logits(states[place : place + 1]).log_softmax(1)
            expected.append(-log_p[0, text.values[place + 1]])
    assert count == len(expected)
    torch.testing.assert_close(total, torch.stack(expected).sum(), rtol=1e-10, atol=0)


def test_a_drawn_image_is_not_seen():
    step, filled = PretrainStep(unified(), CONFIG).eval(), batch(DRAWN)
    other = filled.images.clone()
    other[DRAWN] = 255 - other[DRAWN]
    loss = lambda b: step(b, seed=0, step=0).losses["lm"][0]
    assert loss(filled).equal(loss(replace(filled, images=other)))
    other[0] = 255 - other[0]
    assert not loss(filled).equal(loss(replace(filled, images=other)))


@pytest.mark.parametrize("drawn", [[], DRAWN, [0, 1, 2, 3, 4]], ids=["none", "some", "all"])
def test_the_parameters_are_the_same_whatever_the_tasks(drawn):
    step = PretrainStep(unified(), CONFIG).train()
    expected = {n: p.shape for n, p in unified().named_parameters()}
    assert {n: p.shape for n, p in step.model.named_parameters()} == expected
    assert not step.has_idle_parameters
    total, count = step(batch(drawn), seed=0, step=0).losses["lm"]
    (total / count).backward()
    assert [n for n, p in step.model.named_parameters() if p.grad is None] == []


def test_a_step_runs_each_module_once():
    step, calls = PretrainStep(unified(), CONFIG).train(), []
    fusion = step.model.fusion
    modules = {"vision": step.model.vision, "encoder": fusion.encoder, "decoder": fusion.decoder}
    for name, module in modules.items():
        module.register_forward_hook(lambda *_, name=name: calls.append(name))
    step(batch(DRAWN), seed=0, step=0)
    assert calls == ["vision", "encoder", "decoder"]


def test_the_vocabulary_becomes_that_of_the_tokenizer():
    config = unified(8).config
    fitted = Guide(tokenizer(), True, draws=True).fit(config)
    assert fitted.text.image_codes == CODES
    assert fitted == replace(config, text=replace(config.text, image_codes=CODES))
    short = replace(config, text=replace(config.text, context_length=5))
    with pytest.raises(ValueError, match=r"context_length must be >= 6 for the codes .* got 5"):
        Guide(tokenizer(), True, draws=True).fit(short)


def test_what_a_guide_cannot_serve_says_so(tmp_path):
    device = torch.device("cpu")
    with pytest.raises(ValueError, match=r"'image' needs objectives\.guide, the run folder of a t"):
        Guide.open(CONFIG, device, draws=True)
    with pytest.raises(ValueError, match=r"gives targets of mim, mvm, vqkd only, and of data"):
        Guide.open(replace(CONFIG, guide=str(tmp_path)), device)
    with pytest.raises(ValueError, match=r"serves objectives\.mim or data\.tasks 'image', not bo"):
        Guide.open(replace(CONFIG, mim=1.0, guide=str(tmp_path)), device, draws=True)
    pali = create_model("pali", "tiny", vocab_size=WORDS, image_size=16)
    with pytest.raises(ValueError, match=r"'image' needs image codes .* have: 'unified-io'"):
        Guide(tokenizer(), True, draws=True).fit(pali.config)
    with pytest.raises(ValueError, match=r"of data\.tasks 'image' is a tokenizer's run .* 'pali'"):
        Guide(pali, True, draws=True)
