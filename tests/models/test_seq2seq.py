"""An encoder of image and prompt with a decoder: both by brute force, what depends on what, kept
keys, one encoding for all that is written.
"""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from vlpfast.layers.keys import KeyCache
from vlpfast.models import VLPModel, create_model, preset_config
from vlpfast.models.config import VisionConfig
from vlpfast.ragged import Ragged

PROMPTS = Ragged.from_lists([[1, 5, 6, 2], [1, 7, 2], [1, 2]])
TEXTS = Ragged.from_lists([[1, 8, 9], [1, 3, 4, 5, 2], [1, 11]])
ROWS = torch.tensor([1, 0, 1])


def model() -> VLPModel:
    """An image tower of another width than the stacks'."""
    torch.manual_seed(0)
    config = preset_config("pali", "tiny", vocab_size=20, image_size=16)
    shape = {"dim": 32, "heads": 2}
    return VLPModel(
        replace(
            config,
            vision=VisionConfig(24, 1, 2, patch_size=8, class_token=False, pool="mean"),
            text=replace(config.text, **shape),
            fusion=replace(config.fusion, **shape, depth=2),
        )
    ).eval()


def images(count: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, 16, 16, 3), dtype=torch.uint8, generator=generator)


def image_keys(ours: VLPModel, pixels: torch.Tensor) -> Ragged:
    return ours.image_keys(ours.encode_image(pixels).tokens)


def mix(q, k, v, visible):
    """Attention of 2 heads over (M, D) and (N, D), keys one by one visible or not."""
    q, k, v = (t.unflatten(-1, (2, -1)) for t in (q, k, v))
    scores = torch.einsum("mhe,nhe->hmn", q, k) * q.shape[-1] ** -0.5
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    return torch.einsum("hmn,nhe->mhe", weights, v).flatten(1)


def by_brute_force(ours: VLPModel, image, prompt, text):
    """States of one text: T5's two stacks, written out."""
    tower, embedding = ours.fusion, ours.text.embedding
    normed = lambda x: x if embedding.norm is None else embedding.norm(x)[0]
    embed = lambda ids: normed(embedding.token[ids] + embedding.position[: len(ids)])
    words, places = embed(prompt), tower.connector(image)
    if tower.encoder.modality is not None:
        words, places = words + tower.encoder.modality[0], places + tower.encoder.modality[1]
    source = torch.cat([words, places])
    everything = torch.ones(len(source), len(source), dtype=torch.bool)
    for block in tower.encoder.blocks:
        q, k, v = block.attention.qkv(block.norm1(source)[0]).chunk(3, -1)
        source = source + block.attention.out(mix(q, k, v, everything))
        source = source + block.mlp(block.norm2(source)[0])
    kv = tower.decoder.image_kv(tower.encoder.norm(source)[0]).chunk(4, -1)
    x = embed(text)
    earlier = torch.ones(len(x), len(x), dtype=torch.bool).tril()
    for number, block in enumerate(tower.decoder.blocks):
        q, k, v = block.attention.qkv(block.norm1(x)[0]).chunk(3, -1)
        x = x + block.attention.out(mix(q, k, v, earlier))
        q, (k, v) = block.cross.q(block.norm_cross(x)[0]), kv[2 * number : 2 * number + 2]
        visible = torch.ones(len(x), len(source), dtype=torch.bool)
        x = x + block.cross.out(mix(q, k, v, visible))
        x = x + block.mlp(block.norm2(x)[0])
    return tower.decoder.norm(x)[0]


@pytest.mark.parametrize("prompted", [True, False])
@torch.no_grad()
def test_states_are_those_of_rows_one_by_one(prompted):
    ours, pixels = model(), images()
    prompts = PROMPTS if prompted else None
    out = ours.decode(TEXTS, image_keys(ours, pixels), ROWS, prompt=prompts)
    seen = ours.encode_image(pixels).tokens
    for row in range(3):
        one = torch.tensor([row])
        prompt = PROMPTS.select(one).values if prompted else torch.empty(0, dtype=torch.int64)
        expected = by_brute_force(ours, seen[ROWS[row]], prompt, TEXTS.select(one).values)
        torch.testing.assert_close(out.select(one).values, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_word_depends_on_its_image_its_prompt_and_the_words_before():
    ours = model()
    keys = image_keys(ours, images())
    whole = ours.decode(TEXTS, keys, ROWS, prompt=PROMPTS).values

    def same(text=TEXTS, rows=ROWS, prompt=PROMPTS) -> list[bool]:
        return (whole == ours.decode(text, keys, rows, prompt=prompt).values).all(1).tolist()

    ids, words = TEXTS.values.clone(), PROMPTS.values.clone()
    ids[5], words[5] = 15, 15  # the third token of the second text, the second of its prompt
    assert same() == [True] * 10
    assert same(text=TEXTS.with_values(ids)) == [True] * 5 + [False] * 3 + [True] * 2
    assert same(prompt=PROMPTS.with_values(words)) == [True] * 3 + [False] * 5 + [True] * 2
    assert same(rows=torch.tensor([1, 1, 1])) == [True] * 3 + [False] * 5 + [True] * 2


@torch.no_grad()
def test_the_first_word_of_a_prompt_sees_its_last_and_the_image():
    ours, seen = model(), []
    ours.fusion.encoder.register_forward_hook(lambda _m, _a, out: seen.append(out))
    keys = image_keys(ours, images())
    ours.read(keys, ROWS, PROMPTS)
    words = PROMPTS.values.clone()
    words[3] = 15  # the last of the first prompt
    ours.read(keys, ROWS, PROMPTS.with_values(words))
    ours.read(keys, torch.tensor([0, 0, 1]), PROMPTS)
    for changed in seen[1:]:
        texts = (changed.text.values != seen[0].text.values).any(1)
        assert texts.tolist() == [True] * 4 + [False] * 5
        places = (changed.image.values != seen[0].image.values).any(1)
        assert places.tolist() == [True] * 4 + [False] * 8


@pytest.mark.parametrize("prompted", [False, True])
@torch.no_grad()
def test_cached_states_are_those_of_the_whole(prompted):
    ours = model()
    keys = image_keys(ours, images())
    text = Ragged.from_lists([[1, 8, 9, 4], [1, 3, 4, 5], [1, 11, 2, 6]])
    prompt = PROMPTS if prompted else None
    whole = ours.decode(text, keys, ROWS, prompt=prompt).values.unflatten(0, (3, 4))
    sources, own = ours.read(keys, ROWS, prompt), torch.arange(3)
    cache, ids = KeyCache(3, 4), text.values.view(3, 4)
    for place in range(4):
        step = Ragged.from_dense(ids[:, place : place + 1])
        states = ours.decode(step, sources, own, cache=cache)
        cache.advance(1)
        torch.testing.assert_close(states.values, whole[:, place], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_texts_of_one_source_share_it():
    ours = model()
    keys = image_keys(ours, images())
    sources = ours.read(keys, ROWS, PROMPTS)
    shared = torch.tensor([2, 0, 2])
    out = ours.decode(TEXTS, sources, shared)
    expected = ours.decode(TEXTS, keys, ROWS[shared], prompt=PROMPTS.select(shared))
    torch.testing.assert_close(out.values, expected.values, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("beams", [1, 3])
def test_generation_encodes_once_and_keeps_what_it_computes_anew(beams):
    ours, calls = model(), []
    with torch.no_grad():
        # Words that differ, not the same one over and over.
        ours.lm_head.weight.mul_(30)
    modules = {"vision": ours.vision, "encoder": ours.fusion.encoder}
    modules["kv"] = ours.fusion.decoder.image_kv
    for name, module in modules.items():
        module.register_forward_hook(lambda *_, name=name: calls.append(name))
    options = {"start_id": 1, "end_id": 2, "max_tokens": 7, "num_beams": beams}
    prompt = Ragged.from_lists([[1, 5, 6, 2], [1, 7, 2]])
    kept = ours.generate(images(), prompt=prompt, **options)
    assert calls == ["vision", "encoder", "kv"]
    anew = ours.generate(images(), prompt=prompt, cached=False, **options)
    assert kept.text.values.tolist() == anew.text.values.tolist()
    torch.testing.assert_close(kept.scores, anew.scores)
    other = ours.generate(images(), prompt=prompt.select(torch.tensor([1, 0])), **options)
    assert not torch.equal(other.scores, kept.scores)


def test_the_loss_reaches_every_parameter():
    ours = model().train()
    states = ours.decode(TEXTS, image_keys(ours, images()), ROWS, prompt=PROMPTS)
    F.cross_entropy(ours.next_token_logits(states.values), TEXTS.values).backward()
    idle = [n for n, p in ours.named_parameters() if p.grad is None or not p.grad.any()]
    assert idle == []


@pytest.mark.slow
def test_compiles_whole_with_as_many_sources_as_the_prompts_make():
    """How many tokens the sources have is known to the device alone."""
    ours, pixels = model().train(), images()

    def states(prompts: Ragged, texts: Ragged) -> torch.Tensor:
        return ours.decode(texts, image_keys(ours, pixels), ROWS, prompt=prompts).values

    outs, grads = [], []
    for run in (states, torch.compile(states, fullgraph=True, backend="aot_eager")):
        ours.zero_grad()
        outs.append(run(PROMPTS, TEXTS))
        outs[-1].square().mean().backward()
        grads.append([p.grad for p in ours.fusion.parameters()])
    for one, two in zip((outs[0], *grads[0]), (outs[1], *grads[1]), strict=True):
        torch.testing.assert_close(one, two)


def test_base_has_the_weights_of_mt5_base():
    with torch.device("meta"):
        base = VLPModel(preset_config("pali", "base"))
    tower = base.fusion
    assert len(base.vision.blocks) == len(tower.encoder.blocks) == len(tower.decoder.blocks) == 12
    matrices = [p for s in (tower.encoder, tower.decoder) for p in s.parameters() if p.dim() == 2]
    # transformers' MT5ForConditionalGeneration of those sizes, without tables and biases.
    assert sum(p.numel() for p in matrices) == 198_180_864
    assert base.text.embedding.token.shape == base.lm_head.weight.shape == (250_112, 768)
    assert base.lm_head.weight is not base.text.embedding.token
    assert preset_config("pali").parts == (
        "a text decoder",
        "a prompt encoder",
        "a text tower",
    )


def test_what_does_not_fit_says_so():
    ours = model()
    keys = image_keys(ours, images())
    sources = ours.read(keys, ROWS, PROMPTS)
    with pytest.raises(ValueError, match="a prompt is part of the sources"):
        ours.decode(TEXTS, sources, ROWS, prompt=PROMPTS)
    with pytest.raises(ValueError, match=r"'seq2seq' is the decoder: fusion\.causal must be True"):
        replace(ours.config, fusion=replace(ours.config.fusion, causal=False))
    metalm = create_model("metalm", "tiny", vocab_size=20, image_size=16)
    with pytest.raises(ValueError, match=r"no prompt encoder; presets that have: 'pali'"):
        metalm.read(image_keys(metalm, images()), ROWS, PROMPTS)
    assert not ours.has_fusion
