"""One vocabulary for words, places and image codes: both stacks by brute force, images written from
prompts alone, what is allowed to be written, no parameter of a task's own.
"""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from tests.models.test_seq2seq import PROMPTS, ROWS, TEXTS, by_brute_force, image_keys, images
from vlpfast.models import VLPModel, create_model, preset_config
from vlpfast.models.generate import SearchOptions, generate
from vlpfast.ragged import Ragged

WORDS, CODES = 20, 8


def model(depth: int = 2, *, words: int = WORDS, codes: int = CODES) -> VLPModel:
    torch.manual_seed(0)
    config = preset_config("unified-io", "tiny", vocab_size=words, image_size=16)
    shape = {"dim": 32, "heads": 2}
    return VLPModel(
        replace(
            config,
            vision=replace(config.vision, **shape),
            text=replace(config.text, **shape, image_codes=codes),
            fusion=replace(config.fusion, **shape, depth=depth),
        )
    ).eval()


def lively() -> VLPModel:
    """Large weights: what is written differs from row to row, and from what was read before, which
    a table that reads and writes would repeat.
    """
    ours = model()
    with torch.no_grad():
        for parameter in ours.fusion.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
        torch.nn.init.normal_(ours.fusion.decoder.norm.weight)
        ours.text.embedding.token.mul_(30)
    return ours


def patches(ours: VLPModel, pixels):
    """Raw patches by a matrix product, and the norm of the embeddings."""
    embedding = ours.vision.embedding
    mean, std = (255 * torch.tensor(t) for t in (embedding.mean, embedding.std))
    x = ((pixels - mean) / std).unfold(1, 8, 8).unfold(2, 8, 8).flatten(1, 2).flatten(2)
    x = x @ embedding.weight.flatten(1).T + embedding.bias + embedding.position
    return ours.vision.embed_norm(x)[0]


@torch.no_grad()
def test_states_are_those_of_rows_one_by_one_with_and_without_their_image():
    ours, pixels = model(), images()
    keys = image_keys(ours, pixels)
    keys = Ragged.cat([keys, Ragged.empty(keys.values)])
    # The second row reads no image.
    shown = torch.tensor([1, 2, 1])
    out = ours.decode(TEXTS, keys, shown, prompt=PROMPTS)
    seen = [*patches(ours, pixels), torch.empty(0, 32)]
    for row in range(3):
        one = torch.tensor([row])
        prompt, text = PROMPTS.select(one).values, TEXTS.select(one).values
        expected = by_brute_force(ours, seen[shown[row]], prompt, text)
        torch.testing.assert_close(out.select(one).values, expected, rtol=1e-4, atol=1e-5)
    alone = ours.decode(TEXTS, ours.read(None, torch.arange(3), PROMPTS), torch.arange(3))
    row = torch.tensor([1])
    torch.testing.assert_close(alone.select(row).values, out.select(row).values)


def test_positions_of_patches_begin_as_wide_as_what_they_tell():
    torch.manual_seed(0)
    small = VLPModel(preset_config("unified-io", "tiny", vocab_size=WORDS))
    assert float(small.vision.embedding.position.detach().std()) == pytest.approx(1.0, rel=0.05)
    assert float(small.text.embedding.position.detach().std()) == pytest.approx(0.01, rel=0.05)


@torch.no_grad()
def test_one_table_reads_and_writes_all_ids():
    ours = model()
    assert ours.text.embedding.token.shape == (WORDS + CODES, 32)
    states = torch.randn(3, 32)
    logits = ours.next_token_logits(states)
    torch.testing.assert_close(logits, states @ ours.text.embedding.token.T)
    assert not [name for name, _ in ours.named_parameters() if "head" in name]


@pytest.mark.parametrize("beams", [1, 3])
@torch.no_grad()
def test_what_is_written_lies_in_the_allowed_range(beams):
    ours = lively()
    # Left free, codes would be written: one of the two has the largest logit.
    codes = ours.text.embedding.token[WORDS : WORDS + 2]
    codes.copy_(torch.stack([9 * codes[0], -9 * codes[0]]))
    prompt = PROMPTS.select(torch.arange(2))
    options = {"start_id": 1, "end_id": 2, "max_tokens": 6, "num_beams": beams, "prompt": prompt}
    words = ours.generate(images(), **options).text.values
    assert int(words.max()) < WORDS
    places = ours.generate(images(), allowed=(12, 16), min_tokens=6, **options).text
    assert places.lens.tolist() == [6, 6]
    inner = places.values.view(2, 6)[:, 1:5]
    assert ((inner >= 12) & (inner < 16)).all()
    free = SearchOptions(1, 2, 6, num_beams=beams)
    sources = ours.read(image_keys(ours, images()), torch.arange(2), prompt)
    assert (generate(ours, sources, 2, free).text.values >= WORDS).any()


@torch.no_grad()
def test_an_image_is_written_token_by_token_from_its_prompt():
    ours = lively()
    options = {"start_id": 1, "end_id": 2, "max_tokens": 6, "min_tokens": 6}
    codes = (WORDS, WORDS + CODES)
    written = ours.generate(None, prompt=PROMPTS, allowed=codes, **options).text.values.view(3, 6)
    for row in range(3):
        ids, prompt = [1], PROMPTS.select(torch.tensor([row])).values
        for _ in range(4):
            states = by_brute_force(ours, torch.empty(0, 32), prompt, torch.tensor(ids))
            logits = ours.next_token_logits(states[-1])
            ids.append(WORDS + int(logits[WORDS:].argmax()))
        assert written[row, :5].tolist() == ids
    assert len({tuple(row) for row in written.tolist()}) > 1
    with pytest.raises(ValueError, match="neither images nor a prompt"):
        ours.generate(None, **options)
    with pytest.raises(ValueError, match="allowed must be 0 <= low < high"):
        ours.generate(images(), allowed=(3, 3), **options)


def test_every_parameter_is_of_every_task():
    """Each of a word, a place and a code: the same parameters, all with a gradient; of a task that
    draws, those of patches have none, for it reads none.
    """
    reached = []
    for target, shows in ((5, True), (15, True), (WORDS + 3, True), (WORDS + 3, False)):
        ours = model().train()
        keys = image_keys(ours, images()) if shows else None
        sources = ours.read(keys, ROWS, PROMPTS)
        states = ours.decode(TEXTS, sources, torch.arange(3)).values
        F.cross_entropy(ours.next_token_logits(states), torch.full((10,), target)).backward()
        names = [n for n, p in ours.named_parameters() if p.grad is not None and p.grad.any()]
        reached.append(names)
    everything = [name for name, _ in model().named_parameters()]
    assert reached[0] == reached[1] == reached[2] == everything
    assert [n for n in everything if n not in reached[3]] == [
        n for n in everything if n.startswith("vision.")
    ]


def test_base_has_the_published_sizes():
    with torch.device("meta"):
        base = VLPModel(preset_config("unified-io", "base"))
    assert not list(base.vision.blocks)
    assert len(base.fusion.encoder.blocks) == len(base.fusion.decoder.blocks) == 12
    assert base.text.embedding.token.shape == (33_152 + 16_384, 768)
    assert base.config.num_patches == 576
    # Of allenai/unified-io-inference's network: 12 + 12 layers, the table, patches, positions.
    layers = 12 * (4 + 3 * 8 / 3) + 12 * (8 + 3 * 8 / 3)
    matrices = int(layers * 768**2) + (33_152 + 16_384 + 768) * 768
    ours = sum(p.numel() for n, p in base.named_parameters() if p.dim() > 1 and "position" not in n)
    assert ours - 2 * 768 == matrices
    assert "image codes in its vocabulary" in base.config.parts


def test_what_does_not_fit_says_so():
    config = preset_config("metalm", "tiny")
    coded = replace(config.text, image_codes=8)
    with pytest.raises(ValueError, match=r"fusion\.kind must be 'seq2seq', got 'prefix'"):
        replace(config, text=coded)
    pali = create_model("pali", "tiny", vocab_size=20, image_size=16)
    assert "image codes in its vocabulary" not in pali.config.parts
