"""The caption probe on writers whose captions are known."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tests._batches import make_batch
from vlpfast.data.tokenizer import Tokenizer
from vlpfast.eval.caption import caption_probe
from vlpfast.models import create_model
from vlpfast.models.generate import Generated
from vlpfast.ragged import Ragged

CAPTIONS = ["a red circle", "a blue star", "a red star", "two rings", "two rings"]
TOKENIZER = Tokenizer.train(CAPTIONS * 3, 300)


class Writer(nn.Module):
    """Knows the caption of each image of `make_batch`, or, blind, always says the same."""

    device = torch.device("cpu")
    config = SimpleNamespace(
        parts=("a text decoder",), vision=SimpleNamespace(front="patches"), preset="known"
    )

    def __init__(self, blind: bool = False) -> None:
        super().__init__()
        self.blind = blind

    def encode_image(self, images):
        return SimpleNamespace(
            tokens=torch.zeros(len(images), dtype=torch.int64)
            + 3 * self.blind
            + torch.arange(len(images)) * (not self.blind)
        )

    def image_keys(self, tokens):
        return tokens

    def texts(self, rows) -> Ragged:
        return Ragged.from_lists(TOKENIZER.encode([CAPTIONS[r] for r in rows.tolist()], 32))

    def generate(self, images, **options) -> Generated:
        return Generated(self.texts(self.encode_image(images).tokens), torch.zeros(len(images)))

    def decode(self, text, keys, kv_index):
        known = self.texts(keys[kv_index])
        vectors = torch.zeros(len(text.values), TOKENIZER.vocab_size)
        for row in range(len(text)):
            start, end = text.cu_seqlens[row : row + 2].tolist()
            ids = known.select(torch.tensor([row])).values[1:][: end - start]
            vectors[torch.arange(start, start + len(ids)), ids] = 1
        return text.with_values(vectors)

    def next_token_logits(self, states):
        return states


def probe(model: nn.Module):
    captions = lambda sample: [CAPTIONS[sample].upper(), "a wrong one"][:1]
    return caption_probe(model, [make_batch()], captions, TOKENIZER, max_tokens=32)


def test_a_writer_that_sees_is_right_only_about_the_true_image():
    result = probe(Writer())
    assert result.metrics["exact_match"] == 100
    assert result.metrics["next_token_accuracy"] == 100
    assert result.metrics["shuffled_exact_match"] == 0
    assert result.metrics["shuffled_next_token_accuracy"] < 80
    # Images 3 and 4 are of one id and have the same caption.
    assert result.chance["exact_match"] == 40
    assert result.counts["num_samples"] == 5


class Asked(Writer):
    """Writes where each row's prompt is the one it knows, else nothing."""

    PROMPT = TOKENIZER.encode(["a red"], 32)[0]

    def generate(self, images, *, prompt, **options) -> Generated:
        assert prompt.values.tolist() == self.PROMPT * len(images)
        return super().generate(images, **options)

    def decode(self, text, keys, kv_index, *, prompt):
        assert prompt.values.tolist() == self.PROMPT * len(text)
        return super().decode(text, keys, kv_index)


def test_a_writer_that_is_asked_gets_the_prompt_in_every_row():
    captions = lambda sample: [CAPTIONS[sample]]
    options = {"max_tokens": 32, "prompt": "a red"}
    result = caption_probe(Asked(), [make_batch()], captions, TOKENIZER, **options)
    assert result.metrics == probe(Writer()).metrics


def test_a_blind_writer_scores_alike_with_both():
    metrics = probe(Writer(blind=True)).metrics
    assert metrics["exact_match"] == metrics["shuffled_exact_match"] == 40
    assert metrics["next_token_accuracy"] == metrics["shuffled_next_token_accuracy"]


def test_a_model_that_does_not_write_says_so():
    with pytest.raises(ValueError, match="caption: preset 'clip' has no text decoder"):
        probe(create_model("clip", "tiny", vocab_size=50, image_size=16))
