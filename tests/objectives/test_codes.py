"""Masked image modelling and VQ-KD by straight-line computations, their passes, and what a guide
gives.
"""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from tests._batches import make_batch
from vlpfast.data.batch import Batch
from vlpfast.data.masking import mask_patches, mask_patches_evenly
from vlpfast.models import VLPModel, create_model, preset_config
from vlpfast.objectives import ObjectivesConfig, PretrainStep
from vlpfast.objectives.guide import Guide
from vlpfast.objectives.plan import Plan, Rows

MIM, VQKD = ObjectivesConfig(itc=0.0, mim=1.0), ObjectivesConfig(itc=0.0, vqkd=1.0)
SIDE = 32


def small(preset: str, **model: object) -> VLPModel:
    torch.manual_seed(0)
    config = preset_config(preset, "tiny", image_size=SIDE, vocab_size=50, **model)
    shape = {"dim": 32, "heads": 2}
    return VLPModel(replace(config, vision=replace(config.vision, **shape)))


def hidden_batch(size: int = 5, *, codes: int = 256, width: int = 128) -> Batch:
    """With five of 16 patches hidden, random codes and features."""
    batch = make_batch(size, image_size=SIDE)
    generator = torch.Generator().manual_seed(3)
    return replace(
        batch,
        hidden_patches=mask_patches(5, 4, seed=0, positions=batch.positions),
        codes=torch.randint(0, codes, (size, 16), generator=generator),
        features=torch.randn(size, 16, width, generator=generator),
    )


def test_plans_of_images_alone_read_nothing_else():
    assert Plan.of(MIM) == Plan((), ("masked_image",))
    assert Plan.of(VQKD) == Plan((), ("image",))
    both = Plan.of(replace(MIM, itc=1.0))
    assert (both.texts, both.images) == (("text",), ("image", "masked_image"))
    step, batch = PretrainStep(small("beit2"), MIM).train(), hidden_batch()
    seen = []
    step.model.vision.embedding.register_forward_hook(lambda _m, args, _o: seen.append(args))
    step(batch, seed=0, step=0)
    assert len(seen) == 1
    assert seen[0][0] is batch.images
    assert seen[0][2].sum(1).tolist() == [5] * 5


@pytest.mark.parametrize("head", [False, True], ids=["tower", "class-head"])
def test_mim_by_loops(head):
    layers = {} if head else {"head_layers": 0, "early_layers": 0}
    model = small("beit2")
    model = VLPModel(replace(model.config, vision=replace(model.config.vision, **layers)))
    step, batch = PretrainStep(model, MIM).eval(), hidden_batch()
    out = step(batch, seed=0, step=0)
    expected = 0.0
    for row in range(5):
        mask = torch.zeros(1, 16, dtype=torch.bool)
        mask[0, batch.hidden_patches[row]] = True
        image = model.encode_image(batch.images[row : row + 1], hidden=mask)
        for tokens in [image.tokens, image.class_head] if head else [image.tokens]:
            for patch in batch.hidden_patches[row].tolist():
                logits = F.linear(
                    tokens[0, 1 + patch], model.code_head.weight, model.code_head.bias
                )
                expected = expected - logits.log_softmax(0)[batch.codes[row, patch]]
    total, count = out.losses["mim"]
    assert out.losses.keys() == {"mim"}
    assert int(count) == 25
    torch.testing.assert_close(total, expected, rtol=1e-4, atol=1e-3)
    ours, theirs = (
        torch.autograd.grad(loss, model.vision.embedding.mask_token) for loss in (total, expected)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_mim_goes_with_contrast_in_one_call():
    """A dual-tower model with a code head: each loss is what it is alone."""
    model = small("clip", codes=256)
    batch = hidden_batch()
    calls = []
    model.vision.embedding.register_forward_hook(lambda _m, args, _o: calls.append(len(args[0])))
    both = PretrainStep(model, replace(MIM, itc=1.0)).eval()(batch, seed=0, step=0)
    assert calls == [10]
    for name, config in (("mim", MIM), ("itc", ObjectivesConfig())):
        alone = PretrainStep(model, config).eval()(batch, seed=0, step=0)
        torch.testing.assert_close(both.losses[name], alone.losses[name], rtol=1e-4, atol=1e-4)


def test_mvm_reads_pairs():
    """Hidden patches told with the text, in one call of a joint stack with what else is trained."""
    torch.manual_seed(0)
    config = preset_config("vilt", "tiny", image_size=SIDE, vocab_size=50, codes=256)
    model = VLPModel(replace(config, vision=replace(config.vision, max_patches=0)))
    pair = replace(MIM, mim=0.0, mvm=1.0)
    plan = Plan(("text",), ("masked_image",), (Rows.MASKED_IMAGE,))
    assert Plan.of(pair, one_stack=True) == plan
    step, batch = PretrainStep(model, replace(pair, mlm=1.0)).eval(), hidden_batch()
    calls = []
    model.fusion.register_forward_hook(lambda _m, args, _o: calls.append(len(args[0])))
    out = step(batch, seed=0, step=0)
    assert calls == [10]
    assert out.losses.keys() == {"mvm", "mlm"}
    expected = 0.0
    for row in range(5):
        mask = torch.zeros(1, 16, dtype=torch.bool)
        mask[0, batch.hidden_patches[row]] = True
        tokens = model.encode_image(batch.images[row : row + 1], hidden=mask).tokens
        text = model.encode_text(batch.text.select(torch.tensor([row]))).tokens
        fused = model.fuse_pairs(text, model.image_keys(tokens), torch.zeros(1, dtype=torch.int64))
        logits = model.code_logits(fused.image.values[1:][batch.hidden_patches[row]])
        target = batch.codes[row, batch.hidden_patches[row]]
        expected = expected + F.cross_entropy(logits, target, reduction="sum")
    torch.testing.assert_close(out.losses["mvm"][0], expected, rtol=1e-4, atol=1e-3)
    alone = PretrainStep(model, pair).eval()(batch, seed=0, step=0).losses["mvm"]
    torch.testing.assert_close(alone, out.losses["mvm"], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("even", [False, True])
@pytest.mark.parametrize("preset", ["clip", "vilt"])
def test_mpp_by_loops(preset, even):
    """From the image alone, or where one stack reads both, with its text."""
    torch.manual_seed(0)
    config = preset_config(preset, "tiny", image_size=SIDE, vocab_size=50, color_head=True)
    vision = replace(config.vision, max_patches=0, depth=min(config.vision.depth, 1))
    model = VLPModel(replace(config, vision=vision))
    objectives = ObjectivesConfig(itc=0.0, mpp=1.0)
    batch = hidden_batch()
    if even:
        hidden = mask_patches_evenly(16, seed=0, positions=batch.positions)
        batch = replace(batch, hidden_patches=hidden)
    total, count = PretrainStep(model, objectives).eval()(batch, seed=0, step=0).losses["mpp"]
    assert int(count) == (int((hidden >= 0).sum()) if even else 25)
    mask = (torch.arange(16) == batch.hidden_patches[..., None]).any(1)
    tokens = model.encode_image(batch.images, hidden=mask).tokens
    if preset == "vilt":
        text = model.encode_text(batch.text).tokens
        fused = model.fuse_pairs(text, model.image_keys(tokens), torch.arange(5))
        tokens = fused.image.values.unflatten(0, (5, 17))
    expected = 0.0
    for row in range(5):
        for patch in [p for p in batch.hidden_patches[row].tolist() if p >= 0]:
            y, x = 8 * (patch // 4), 8 * (patch % 4)
            color = batch.images[row, y : y + 8, x : x + 8].double().mean((0, 1)).floor().long()
            logits = model.color_head(tokens[row, 1 + patch]).view(3, 256)
            for channel in range(3):
                expected = expected - logits[channel].log_softmax(0)[color[channel]] / 3
    torch.testing.assert_close(total, expected, rtol=1e-4, atol=1e-3)


def test_vqkd_by_loops():
    step, batch = PretrainStep(small("vqkd"), replace(VQKD, commitment=0.5)), hidden_batch()
    model = step.model
    model.tokenizer.codebook(torch.randn(300, 16))
    step.finish_step()
    out = step(batch, seed=0, step=0)
    narrow = model.tokenizer.encode(model.encode_image(batch.images).tokens[:, 1:])
    unit = F.normalize(narrow, dim=-1)
    vectors = model.tokenizer.codebook.vectors
    codes = (unit @ vectors.T).argmax(-1)
    features = model.tokenizer.decode(model.tokenizer.decoder(vectors[codes]))
    expected = 0.0
    for row in range(5):
        for patch in range(16):
            a, b = features[row, patch], batch.features[row, patch]
            expected = expected + 1 - a @ b / (a.norm() * b.norm())
            expected = (
                expected + 0.5 * (unit[row, patch] - vectors[codes[row, patch]]).square().mean()
            )
    total, count = out.losses["vqkd"]
    assert int(count) == 80
    torch.testing.assert_close(total, expected, rtol=1e-4, atol=1e-3)
    before = vectors.clone()
    step.finish_step()
    moved = (vectors != before).any(1)
    assert moved[codes.unique()].all()
    assert int(model.tokenizer.codebook.steps) == 2
    assert 0 < out.metrics["codes_in_use"] <= 1


@pytest.mark.parametrize(("preset", "config"), [("beit2", MIM), ("vqkd", VQKD)])
def test_every_parameter_gets_a_gradient(preset, config):
    step = PretrainStep(small(preset), config).train()
    out = step(hidden_batch(), seed=0, step=0)
    sum(total for total, _ in out.losses.values()).backward()
    idle = [name for name, p in step.named_parameters() if p.grad is None]
    # The last class token of a tokenizer is read by nothing, but it is one of the last norm's rows.
    assert idle == []
    assert all(p.grad.isfinite().all() for p in step.parameters())


def test_a_guide_gives_codes_of_clean_images():
    tokenizer, batch = small("vqkd"), hidden_batch()
    guide = Guide(tokenizer, gives_codes=True)
    assert guide.fill(batch).codes.equal(tokenizer.image_codes(batch.images))
    assert not any(p.requires_grad for p in tokenizer.parameters())
    fitted = guide.fit(preset_config("beit2", "tiny", image_size=SIDE, codes=7))
    assert fitted.codes == 256
    same = guide.sha256
    with torch.no_grad():
        tokenizer.vision.norm.bias[0] += 1
    assert guide.sha256 != same


@pytest.mark.parametrize("preset", ["clip", "siglip", "albef"])
def test_a_guide_gives_features_of_patches(preset):
    torch.manual_seed(0)
    teacher, batch = create_model(preset, "tiny", image_size=SIDE).eval(), hidden_batch()
    guide = Guide(teacher, gives_codes=False)
    features = guide.fill(batch).features
    tokens = teacher.encode_image(batch.images).tokens[:, -16:]
    expected = tokens if preset == "siglip" else teacher.image_projection(tokens)
    torch.testing.assert_close(features, expected)
    fitted = guide.fit(preset_config("vqkd", "tiny", image_size=SIDE))
    assert fitted.codebook.target_dim == features.shape[2]


def test_guides_that_do_not_fit_say_so():
    clip, vilt = small("clip"), create_model("vilt", "tiny", vocab_size=50, image_size=SIDE)
    with pytest.raises(ValueError, match=r"guide of mim is a tokenizer's run .* preset 'clip'"):
        Guide(clip, gives_codes=True)
    with pytest.raises(
        ValueError, match=r"guide of vqkd is a run with a vision tr.* preset 'vilt'"
    ):
        Guide(vilt, gives_codes=False)
    with pytest.raises(
        ValueError, match=r"16 patches of images of 32 pixels; the model has 64 of 64"
    ):
        Guide(small("vqkd"), gives_codes=True).fit(preset_config("beit2", "tiny"))
    device = torch.device("cpu")
    with pytest.raises(ValueError, match=r"mim needs objectives\.guide, the run folder of a token"):
        Guide.open(MIM, device)
    with pytest.raises(
        ValueError, match=r"vqkd needs objectives\.guide, the run folder of a teach"
    ):
        Guide.open(VQKD, device)
    with pytest.raises(ValueError, match="guide 'x' gives targets of mim, mvm, vqkd only"):
        Guide.open(ObjectivesConfig(guide="x"), device)
    with pytest.raises(FileNotFoundError, match="nowhere is not a run folder"):
        Guide.open(replace(MIM, guide="nowhere"), device)
    assert Guide.open(ObjectivesConfig(), device) is None


@pytest.mark.parametrize(
    ("preset", "config", "message"),
    [
        (
            "clip",
            MIM,
            "mim needs a code head; preset 'clip' has no code head; presets that have: 'b",
        ),
        ("beit2", replace(MIM, mvm=1.0), "mvm needs image tokens that read the text; pre"),
        ("beit2", VQKD, "vqkd needs a codebook; preset 'beit2' has no codebook; .*'vqkd'"),
        ("beit2", ObjectivesConfig(), "itc needs a joint space; preset 'beit2' has no joint space"),
    ],
    ids=str,
)
def test_objectives_a_preset_cannot_serve_are_named(preset, config, message):
    with pytest.raises(ValueError, match=message):
        PretrainStep(small(preset), config)


def test_settings_that_do_not_fit_say_so():
    with pytest.raises(ValueError, match="one after the other"):
        ObjectivesConfig(itc=0.0, mim=1.0, vqkd=1.0)
    with pytest.raises(ValueError, match=r"mim_probability must be in \(0, 1\], got 0"):
        ObjectivesConfig(itc=0.0, mim=1.0, mim_probability=0.0)
    dropping = small("clip", codes=256).config
    dropping = replace(dropping, vision=replace(dropping.vision, patch_dropout=0.5))
    with pytest.raises(
        ValueError, match=r"objectives\.mim, mvm and mpp hide patches of whole images"
    ):
        PretrainStep(VLPModel(dropping), MIM)


def cells() -> PretrainStep:
    """K-means of a small CNN's cells, beside a contrast."""
    torch.manual_seed(0)
    config = preset_config("kmeans", "tiny", image_size=SIDE, vocab_size=50)
    text = replace(config.text, dim=32, heads=2, depth=1)
    book = replace(config.codebook, size=7, decay=1.0, revive_below=0.0)
    return PretrainStep(VLPModel(replace(config, text=text, codebook=book)), KMEANS)


KMEANS = ObjectivesConfig(itc=1.0, kmeans=1.0)


def test_kmeans_measures_cells_and_moves_no_weight():
    step, batch = cells().train(), make_batch(image_size=SIDE)
    model, plain = step.model, PretrainStep(cells().model, ObjectivesConfig()).train()
    out, other = (s(batch, seed=0, step=0) for s in (step, plain))
    features = model.encode_image(batch.images).tokens
    assert features.shape == (5, 16, 128)
    distance = torch.cdist(features, model.tokenizer.codebook.vectors.expand(5, -1, -1)).square()
    total, count = out.losses["kmeans"]
    torch.testing.assert_close(total, distance.min(2).values.sum(), rtol=1e-4, atol=1e-3)
    assert int(count) == 5 * 16
    assert not total.requires_grad
    for each in (out, other):
        sum(total for total, _ in each.losses.values()).backward()
    gradients = {name: p.grad for name, p in plain.model.named_parameters()}
    for name, p in model.named_parameters():
        assert p.grad.equal(gradients[name]), name
    # After the step the centres are inputs of it; then each is the mean of what is nearest.
    step.finish_step()
    vectors = model.tokenizer.codebook.vectors
    flat = features.detach().flatten(0, 1)
    assert (vectors[:, None] - flat).norm(dim=2).min(1).values.max() < 1e-4
    codes = model.image_codes(batch.images)
    assert codes.equal((flat[:, None] - vectors).norm(dim=2).argmin(1).view(5, 16))
    step(batch, seed=0, step=1)
    step.finish_step()
    for code in range(7):
        chosen = features[codes == code]
        torch.testing.assert_close(vectors[code], chosen.mean(0), rtol=1e-4, atol=1e-4)


def test_centres_guide_a_grid_of_as_many_cells():
    model = VLPModel(preset_config("kmeans", "tiny", vocab_size=50))
    guide = Guide(model, gives_codes=True)
    fitted = guide.fit(preset_config("x-lxmert", "tiny"))
    assert fitted.codes == model.config.codebook.size == 256
    batch = make_batch(3, image_size=64)
    codes = guide.fill(batch).codes
    assert codes.shape == (3, 64)
    assert codes.equal(model.image_codes(batch.images))
    with torch.device("meta"):
        base = VLPModel(preset_config("kmeans", "base"))
    assert base.tokenizer.codebook.vectors.shape == (10_000, 2048)
    grid = preset_config("x-lxmert", "base")
    sizes = [(c.image_size, c.num_patches) for c in (base.config, grid)]
    assert sizes[0] == sizes[1] == (256, 64)


def test_kmeans_says_what_it_needs():
    with pytest.raises(ValueError, match="kmeans has no gradient: train another objective"):
        ObjectivesConfig(itc=0.0, kmeans=1.0)
    with pytest.raises(ValueError, match="has no gradient"):
        ObjectivesConfig(itc=1.0, kmeans=1.0, mix=(("itc", 1.0), ("kmeans", 1.0)))
    with pytest.raises(ValueError, match="kmeans needs a codebook; preset 'clip' has no codebook"):
        PretrainStep(VLPModel(preset_config("clip", "tiny")), KMEANS)
    config = preset_config("kmeans", "tiny")
    with pytest.raises(ValueError, match=r"kind 'kmeans' is of a CNN's cells: .*dim 128, .* 5$"):
        replace(config, codebook=replace(config.codebook, dim=5))
    wrong = VLPModel(replace(config, vision=replace(config.vision, patch_size=16)))
    with pytest.raises(ValueError, match=r"feature map has 64 cells, .* say 16: set vision\.patch"):
        wrong.image_codes(make_batch(2, image_size=64).images)
