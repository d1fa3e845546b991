"""Writing what answers a prompt: the loss, and how often each module runs in a step."""

from dataclasses import replace

import pytest
import torch

from tests._batches import make_batch
from vlpfast.models import create_model
from vlpfast.objectives import ObjectivesConfig, PretrainStep
from vlpfast.ragged import Ragged

PROMPTS = Ragged.from_lists([[1, 5, 2], [1, 2], [1, 7, 8, 9, 2], [1, 5, 2], [1, 9, 2]])
CONFIG = ObjectivesConfig(itc=0.0, lm=1.0)


def step_of(dtype=torch.float32) -> PretrainStep:
    torch.manual_seed(0)
    return PretrainStep(create_model("pali", "tiny", vocab_size=50, image_size=16), CONFIG).to(
        dtype
    )


def batch(prompted: bool = True):
    plain = make_batch(masked=False)
    return replace(plain, prompt=PROMPTS) if prompted else plain


@pytest.mark.parametrize("prompted", [True, False])
def test_lm_is_the_mean_over_each_next_token_after_its_prompt(prompted):
    step, drawn = step_of(torch.float64).eval(), batch(prompted)
    total, count = step(drawn, seed=0, step=0).losses["lm"]
    model, expected = step.model, []
    for row in range(5):
        one = torch.tensor([row])
        keys = model.image_keys(model.encode_image(drawn.images[row : row + 1]).tokens)
        text = drawn.text.select(one)
        prompt = PROMPTS.select(one) if prompted else None
        states = model.decode(text, keys, torch.tensor([0]), prompt=prompt).values
        for place in range(len(text.values) - 1):
            log_p = model.next_token_logits(states[place : place + 1]).log_softmax(1)
            expected.append(-log_p[0, text.values[place + 1]])
    assert count == len(expected)
    torch.testing.assert_close(total, torch.stack(expected).sum(), rtol=1e-10, atol=0)


def test_a_step_runs_each_module_once_and_trains_all():
    step, calls = step_of().train(), []
    fusion = step.model.fusion
    modules = {"vision": step.model.vision, "encoder": fusion.encoder, "decoder": fusion.decoder}
    modules["keys"] = fusion.decoder.image_kv
    for name, module in modules.items():
        module.register_forward_hook(lambda *_, name=name: calls.append(name))
    total, count = step(batch(), seed=0, step=0).losses["lm"]
    assert calls == ["vision", "encoder", "keys", "decoder"]
    (total / count).backward()
    idle = [n for n, p in step.model.named_parameters() if p.grad is None or not p.grad.any()]
    assert idle == []
    assert not step.has_idle_parameters


def test_what_a_decoder_cannot_do_says_so():
    with pytest.raises(ValueError, match=r"objectives\.mlm needs a fusion tower; preset 'pali' "):
        PretrainStep(step_of().model, ObjectivesConfig(itc=0.0, mlm=1.0))
