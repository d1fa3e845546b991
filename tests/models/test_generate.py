"""Greedy and beam search equal a computation of everything again, plain loops, and all texts."""

import itertools

import pytest
import torch

from tests.models.test_caption import WRITERS, images, small
from vlpfast.layers.keys import KeyCache
from vlpfast.models import VLPModel
from vlpfast.models.generate import nucleus_draw
from vlpfast.ragged import Ragged

START, END = 1, 2


@pytest.fixture(params=WRITERS)
def writer(request):
    """With weights that say something: fresh logits are almost equal."""
    model = small(request.param)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def search(model: VLPModel, count: int = 3, **options) -> tuple[list[list[int]], torch.Tensor]:
    options = {"max_tokens": 9, "start_id": START, "end_id": END} | options
    out = model.generate(images(count), **options)
    return [out.text.select(torch.tensor([r])).values.tolist() for r in range(count)], out.scores


def log_p(model: VLPModel, image: int, text: list[int]) -> torch.Tensor:
    """(len, V) of what follows each token."""
    keys = model.image_keys(model.encode_image(images()[image : image + 1]).tokens)
    states = model.decode(Ragged.from_lists([text]), keys, torch.tensor([0]))
    rows = model.next_token_logits(states.values).log_softmax(-1)
    rows[:, list(model.config.text.task_ids)] = -torch.inf
    return rows


@torch.no_grad()
def test_greedy_takes_the_most_probable_token(writer):
    texts, scores = search(writer, length_penalty=0.0)
    assert len({tuple(text) for text in texts}) > 1
    for number, text in enumerate(texts):
        rows = log_p(writer, number, text)
        assert rows[:-1].argmax(-1).tolist() == text[1:]
        assert text.index(END) == len(text) - 1 if END in text else len(text) == 9
        written = rows[torch.arange(len(text) - 1), text[1:]]
        torch.testing.assert_close(scores[number], written.sum(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_beams", [1, 2, 5])
def test_kept_keys_are_keys_computed_again(writer, num_beams):
    kept, scores = search(writer, num_beams=num_beams)
    again, expected = search(writer, num_beams=num_beams, cached=False)
    assert kept == again
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-5)


def test_each_step_reads_one_token_of_each_beam_and_one_copy_of_the_keys(writer):
    seen, tower = [], writer.decoder or writer.fusion
    tower.register_forward_pre_hook(
        lambda _, args: seen.append((len(args[0].values), args[1].kv.shape[0], args[2].tolist()))
    )
    search(writer, num_beams=4)
    assert seen[0] == (12, 3, [0] * 4 + [1] * 4 + [2] * 4)
    assert set(map(str, seen)) == {str(seen[0])}


@torch.no_grad()
def test_a_prompt_of_several_tokens_goes_into_the_cache_at_once(writer):
    """Three tokens, one, two: the states are those of all six together."""
    whole = torch.tensor([[1, 7, 8, 9, 30, 5], [1, 9, 9, 4, 8, 7]])
    keys, rows = writer.image_keys(writer.encode_image(images(2)).tokens), torch.arange(2)
    expected = writer.decode(Ragged.from_dense(whole), keys, rows).values.unflatten(0, (2, 6))
    cache, states = KeyCache(2, 6), []
    for part in whole.split([3, 1, 2], dim=1):
        out = writer.decode(Ragged.from_dense(part), keys, rows, cache=cache)
        states.append(out.values.unflatten(0, part.shape))
        cache.advance(part.shape[1])
    torch.testing.assert_close(torch.cat(states, 1), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_a_batch_of_images_is_each_alone(writer, num_beams):
    together, _ = search(writer, num_beams=num_beams)
    assert search(writer, 1, num_beams=num_beams)[0] == together[:1]


@torch.no_grad()
def test_beams_find_the_best_of_all_texts(writer):
    """Four words, five tokens: 3 + 9 + 27 + 27 texts, and beams for all of them."""
    words = (5, 6, 7)
    banned = tuple(set(range(50)) - {END, *words})
    found, scores = search(writer, max_tokens=5, num_beams=90, banned=banned)
    candidates = [
        [START, *body, *([END] if len(body) < 4 else [])]
        for length in range(5)
        for body in itertools.product(words, repeat=length)
    ]
    for number in range(3):
        keys = writer.image_keys(writer.encode_image(images()[number : number + 1]).tokens)
        text = Ragged.from_lists(candidates)
        states = writer.decode(text, keys, torch.zeros(len(text), dtype=torch.int64))
        places = text.but_last()
        rows = writer.next_token_logits(states.values[places]).log_softmax(-1)
        written = rows[torch.arange(len(places)), text.values[places + 1]]
        totals = torch.zeros(len(text)).index_add(0, text.row_ids()[places], written)
        ranked = totals / (text.lens - 1)
        assert found[number] == candidates[int(ranked.argmax())]
        torch.testing.assert_close(scores[number], ranked.max(), rtol=1e-5, atol=1e-5)


def beam_loop(model: VLPModel, image: int, num_beams: int, max_tokens: int, penalty: float):
    """Beam search over Python lists."""
    live, ended = [([START], 0.0)], []
    for length in range(1, max_tokens):
        grown = []
        for text, total in live:
            rows = log_p(model, image, text)[-1]
            grown += [([*text, word], total + float(p)) for word, p in enumerate(rows)]
        grown = sorted(grown, key=lambda t: -t[1])[: 2 * num_beams]
        ended += [(text, total / length**penalty) for text, total in grown if text[-1] == END]
        live = [t for t in grown if t[0][-1] != END][:num_beams]
        ended = sorted(ended, key=lambda t: -t[1])[:num_beams]
    ended += [(text, total / (max_tokens - 1) ** penalty) for text, total in live]
    return max(ended, key=lambda t: t[1])


@torch.no_grad()
@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_beams_are_those_of_a_plain_loop(writer, penalty):
    """Ended texts leave the beams early here: the end token is made likely."""
    if writer.config.lm_head == "tied":
        writer.lm_head.bias[END] += 3
    else:
        writer.lm_head.weight[END] *= 2
    found, scores = search(writer, num_beams=3, max_tokens=7, length_penalty=penalty)
    for number in range(3):
        text, score = beam_loop(writer, number, 3, 7, penalty)
        assert found[number] == text
        assert scores[number].item() == pytest.approx(score, rel=1e-4)


def test_length_bounds_and_banned_tokens(writer):
    for num_beams in (1, 3):
        free, _ = search(writer, num_beams=num_beams)
        words = {word for text in free for word in text[1:]} - {END}
        texts, _ = search(
            writer, num_beams=num_beams, min_tokens=6, max_tokens=6, banned=tuple(words)
        )
        assert all(len(text) == 6 for text in texts)
        assert all(END not in text[1:-1] for text in texts)
        assert not words & {word for text in texts for word in text[1:]}


def test_errors(writer):
    with pytest.raises(ValueError, match="num_beams must be >= 1, got 0"):
        search(writer, num_beams=0)
    with pytest.raises(ValueError, match="2 <= min_tokens <= max_tokens, got 8 and 4"):
        search(writer, min_tokens=8, max_tokens=4)
    with pytest.raises(ValueError, match=r"max_tokens must be <= text.context_length 12, got 13"):
        search(writer, max_tokens=13)
    with pytest.raises(ValueError, match=r"banned must not hold end_id 2"):
        search(writer, banned=(END,))
    with pytest.raises(ValueError, match="'albef' has no text decoder"):
        search(small("albef"))


def nucleus(p: list[float], top_p: float) -> list[float]:
    """The distribution that is drawn from, by a plain loop."""
    out, held = [0.0] * len(p), 0.0
    for token in sorted(range(len(p)), key=lambda t: (-p[t], t)):
        if held < top_p:
            out[token], held = p[token], held + p[token]
    return [x / held for x in out]


@pytest.mark.parametrize("top_p", [1e-9, 0.3, 0.5, 0.9, 1.0])
def test_draws_share_the_unit_interval_as_the_nucleus_does(top_p):
    p = [0.02, 0.41, 0.07, 0.0, 0.23, 0.27]
    steps = 10_007
    uniform = (torch.arange(steps, dtype=torch.float64) + 0.5) / steps
    log_p = torch.tensor(p, dtype=torch.float64).log().expand(steps, -1)
    share = nucleus_draw(log_p, top_p, uniform).bincount(minlength=len(p)).double() / steps
    expected = torch.tensor(nucleus(p, top_p), dtype=torch.float64)
    torch.testing.assert_close(share, expected, rtol=0, atol=1.5 / steps)
    assert share[expected == 0].sum() == 0


def test_the_last_draw_is_of_the_nucleus():
    log_p = torch.tensor([[-torch.inf, 0.0, -1.0, -torch.inf]])
    assert nucleus_draw(log_p, 1.0, torch.tensor([1 - 2.0**-53], dtype=torch.float64)) == 2


@torch.no_grad()
def test_sampled_words_have_the_nucleus_distribution(writer):
    """Chi-square of the first word of 500 seeds; words expected less than 5 times are one."""
    total, top_p = 500, 0.8
    pictures = images(1).repeat(total, 1, 1, 1)
    out = writer.generate(
        pictures, max_tokens=2, start_id=START, end_id=END, seeds=tuple(range(total)), top_p=top_p
    )
    words = out.text.values.unflatten(0, (total, 2))[:, 1]
    p = log_p(writer, 0, [START])[0].softmax(-1, dtype=torch.float64).tolist()
    expected = torch.tensor(nucleus(p, top_p), dtype=torch.float64) * total
    drawn = words.bincount(minlength=len(p)).double()
    assert drawn[expected == 0].sum() == 0
    often = expected >= 5
    bins = [(drawn[often], expected[often])]
    if expected[~often].sum() > 0:
        bins.append((drawn[~often].sum()[None], expected[~often].sum()[None]))
    seen, wanted = (torch.cat(parts) for parts in zip(*bins, strict=True))
    freedom = max(len(seen) - 1, 1)
    # Six standard deviations of chi-square above its mean.
    assert ((seen - wanted) ** 2 / wanted).sum() < freedom + 6 * (2 * freedom) ** 0.5


def test_a_sampled_text_is_its_seeds(writer):
    together, _ = search(writer, seeds=(7, 8, 9), top_p=0.9)
    assert search(writer, 1, seeds=(7,), top_p=0.9)[0] == together[:1]
    assert search(writer, seeds=(7, 1, 2), top_p=0.9)[0][0] == together[0]
    assert search(writer, seeds=(7, 8, 9), top_p=0.9, cached=False)[0] == together
    assert search(writer, seeds=(17, 18, 19), top_p=0.9)[0] != together


def test_a_nucleus_of_one_word_is_greedy(writer):
    greedy, scores = search(writer)
    drawn, same = search(writer, seeds=(1, 2, 3), top_p=1e-9)
    assert drawn == greedy
    assert torch.equal(scores, same)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_p": 0.0, "seeds": (1, 2, 3)}, r"top_p must be in \(0, 1\], got 0.0"),
        ({"top_p": 0.9}, "top_p 0.9 needs seeds"),
        ({"seeds": (1, 2, 3), "num_beams": 2}, "num_beams must be 1 with seeds, got 2"),
        ({"seeds": (1, 2)}, "seeds must be one for each of 3 images, got 2"),
    ],
)
def test_bad_sampling(options, message):
    with pytest.raises(ValueError, match=message):
        search(small(WRITERS[0]), **options)
