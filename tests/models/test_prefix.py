"""Text written after an image and a prompt in one sequence: masks by brute force, later words and
other rows do not matter, cached states are those of the whole.
"""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from vlpfast.layers.keys import KeyCache
from vlpfast.models import VLPModel, preset_config
from vlpfast.models.config import FusionConfig, TextConfig, VisionConfig
from vlpfast.models.generate import SearchOptions, generate
from vlpfast.ragged import Ragged


def prefix_model() -> VLPModel:
    """An image tower of another width, a connector, a causal decoder."""
    base = preset_config("clip", "tiny", image_size=16)
    text = {"vocab_size": 20, "context_length": 16}
    config = replace(
        base,
        embed_dim=0,
        vision=VisionConfig(24, 1, 2, patch_size=8),
        text=TextConfig(32, 0, 2, **text),
        fusion=FusionConfig(32, 2, 2, kind="prefix", causal=True),
        lm_head="linear",
        match_head=False,
    )
    return VLPModel(config)


def shared_model(preset: str) -> VLPModel:
    config = preset_config(preset, "tiny", vocab_size=20, image_size=16)
    shape = {"dim": 32, "heads": 2}
    parts = {"vision": config.vision, "text": config.text}
    parts = {name: replace(part, **shape) for name, part in parts.items()}
    return VLPModel(replace(config, **parts, fusion=replace(config.fusion, **shape, depth=2)))


KINDS = ["prefix", "uni-perceiver", "uni-perceiver-moe"]


def model(kind: str) -> VLPModel:
    torch.manual_seed(0)
    return (prefix_model() if kind == "prefix" else shared_model(kind)).eval()


def images(count: int = 2) -> torch.Tensor:
    return torch.randint(0, 256, (count, 16, 16, 3), dtype=torch.uint8)


def image_keys(ours: VLPModel, pixels: torch.Tensor) -> Ragged:
    return ours.image_keys(ours.encode_image(pixels, num_embedded=0).tokens)


PROMPTS = Ragged.from_lists([[1, 5, 6, 2], [1, 7, 2], [1, 2]])
TEXTS = Ragged.from_lists([[1, 8, 9], [1, 3, 4, 5, 2], [1, 11]])
ROWS = torch.tensor([1, 0, 1])


@torch.no_grad()
def test_mask_is_semi_causal_by_brute_force():
    """The published blocks of one row at a time: image, prompt, then one word after the other."""
    ours = model("prefix")
    tower, keys = ours.fusion, image_keys(ours, images())
    out = ours.decode(TEXTS, keys, ROWS, prompt=PROMPTS)
    embedding = ours.text.embedding
    for row in range(3):
        one = torch.tensor([row])
        p, t = (part.select(one).values for part in (PROMPTS, TEXTS))
        ids = torch.cat([p, t])
        places = keys.select(ROWS[row : row + 1]).values
        x = torch.cat([places, embedding.token[ids] + embedding.position[: len(ids)]])
        n, m = len(places), len(places) + len(p)
        visible = torch.zeros(len(x), len(x), dtype=torch.bool)
        for query in range(len(x)):
            for key in range(len(x)):
                in_image, in_span = key < n, key < m
                visible[query, key] = in_image or (query >= n and in_span) or m <= key <= query
        for block in tower.blocks:
            normed = block.norm1(x)[0]
            q, k, v = block.attention.qkv(normed).unflatten(-1, (3, 2, -1)).unbind(1)
            scores = torch.einsum("mhe,nhe->hmn", q, k) * q.shape[-1] ** -0.5
            weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
            x = x + block.attention.out(torch.einsum("hmn,nhe->mhe", weights, v).flatten(1))
            x = x + block.mlp(block.norm2(x)[0])
        expected = tower.norm(x)[0][m:]
        torch.testing.assert_close(out.select(one).values, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_word_depends_on_what_comes_before_it_only(kind):
    ours = model(kind)
    keys = image_keys(ours, images())
    whole = ours.decode(TEXTS, keys, ROWS, prompt=PROMPTS).values
    ids = TEXTS.values.clone()
    ids[5] = 15  # the third token of the second text
    changed = ours.decode(TEXTS.with_values(ids), keys, ROWS, prompt=PROMPTS).values
    same = (whole == changed).all(1)
    assert same.tolist() == [True] * 5 + [False] * 3 + [True] * 2
    words = PROMPTS.values.clone()
    words[5] = 15  # the second prompt
    prompted = PROMPTS.with_values(words)
    changed = ours.decode(TEXTS, keys, ROWS, prompt=prompted).values
    assert (whole == changed).all(1).tolist() == [True] * 3 + [False] * 5 + [True] * 2
    other = ours.decode(TEXTS, keys, torch.tensor([1, 1, 1]), prompt=PROMPTS).values
    assert (whole == other).all(1).tolist() == [True] * 3 + [False] * 5 + [True] * 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prompted", [False, True])
@torch.no_grad()
def test_cached_states_are_those_of_the_whole(kind, prompted):
    ours = model(kind)
    keys = image_keys(ours, images())
    text = Ragged.from_lists([[1, 8, 9, 4], [1, 3, 4, 5], [1, 11, 2, 6]])
    prompt = Ragged.from_lists([[1, 5, 2], [1, 7, 2], [1, 9, 2]]) if prompted else None
    whole = ours.decode(text, keys, ROWS, prompt=prompt).values.unflatten(0, (3, 4))
    cache, ids = KeyCache(3, 8), text.values.view(3, 4)
    for place in range(4):
        step = Ragged.from_dense(ids[:, place : place + 1])
        states = ours.decode(step, keys, ROWS, prompt=prompt, cache=cache)
        cache.advance(1)
        torch.testing.assert_close(states.values, whole[:, place], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS[:2])
@pytest.mark.parametrize("beams", [1, 2])
@torch.no_grad()
def test_what_is_written_after_a_prompt_is_kept_or_computed_anew(kind, beams):
    ours, pixels = model(kind), images()
    options = {"start_id": 1, "end_id": 2, "max_tokens": 6, "min_tokens": 6, "num_beams": beams}
    keys, own = image_keys(ours, pixels), torch.arange(2)
    search = SearchOptions(**options)
    for prompt in ([[1, 5, 2], [1, 7, 2]], [[1, 9, 2], [1, 5, 2]]):
        prompt = Ragged.from_lists(prompt)
        kept = generate(ours, keys, 2, search, prompt)
        anew = generate(ours, keys, 2, replace(search, cached=False), prompt)
        assert kept.text.values.tolist() == anew.text.values.tolist()
        torch.testing.assert_close(kept.scores, anew.scores)
    assert kept.text.max_len == 6
    # The score is that of the words after the prompt, by `decode` of the whole.
    states = ours.decode(kept.text, keys, own, prompt=prompt)
    log_p = ours.next_token_logits(states.values).log_softmax(-1).view(2, 6, -1)
    log_p[:, :4, 2] = -torch.inf
    ids = kept.text.values.view(2, 6)
    said = log_p[:, :-1].gather(2, ids[:, 1:, None]).sum((1, 2)) / 5
    torch.testing.assert_close(kept.scores, said)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_model_writes_what_the_search_finds(kind):
    ours = model(kind)
    options = {"start_id": 1, "end_id": 2, "max_tokens": 5}
    pixels = images()
    found = ours.generate(pixels, **options)
    search = SearchOptions(**options, banned=ours.config.text.task_ids)
    expected = generate(ours, image_keys(ours, pixels), 2, search)
    assert found.text.values.tolist() == expected.text.values.tolist()
    torch.testing.assert_close(found.scores, expected.scores)


def test_the_loss_reaches_the_image_and_every_parameter():
    ours = model("prefix").train()
    states = ours.decode(TEXTS, image_keys(ours, images()), ROWS, prompt=PROMPTS)
    F.cross_entropy(ours.next_token_logits(states.values), TEXTS.values).backward()
    assert [name for name, p in ours.named_parameters() if p.grad is None] == []
    assert ours.fusion.connector.weight.grad.abs().sum() > 0


def test_metalm_is_two_stacks_and_a_connector():
    with torch.device("meta"):
        base = VLPModel(preset_config("metalm", "base"))
    assert len(base.vision.blocks) == len(base.fusion.blocks) == 12
    assert len(base.text.blocks) == 0
    assert base.fusion.connector.weight.shape == (768, 768)
    tiny = preset_config("metalm", "tiny")
    assert tiny.parts == ("a text decoder", "a text tower")


def test_what_does_not_fit_says_so():
    ours = model("prefix")
    keys = image_keys(ours, images())
    with pytest.raises(ValueError, match="prompts must be of one length"):
        ours.decode(TEXTS, keys, ROWS, prompt=PROMPTS, cache=KeyCache(3, 16))
    with pytest.raises(ValueError, match=r"fusion\.causal must be True"):
        replace(ours.config, fusion=replace(ours.config.fusion, causal=False))
    torch.manual_seed(0)
    coca = VLPModel(preset_config("coca", "tiny", vocab_size=20, image_size=16))
    keys = coca.image_keys(coca.encode_image(images()).tokens)
    with pytest.raises(ValueError, match="it takes no prompt"):
        coca.decode(TEXTS, keys, ROWS, prompt=PROMPTS)
