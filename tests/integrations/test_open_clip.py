"""open_clip's signatures: loss and every gradient against its own classes, in one process."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests._peers import open_clip_losses
from vlpfast.integrations import open_clip as ours
from vlpfast.testing import assert_compiles, assert_within_budget, with_gradients

FP32 = {"rtol": 1e-5, "atol": 1e-5}
CLASSES = {
    "ClipLoss": {},
    "SigLipLoss": {},
    "CoCaLoss": {"caption_loss_weight": 2.0, "clip_loss_weight": 0.5, "pad_id": 3},
    "DistillClipLoss": {},
}


def unit(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator, dtype=torch.float64)
    return F.normalize(x, dim=-1).to(dtype)


def inputs_of(name: str, B: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Positional arguments of a class's forward; CoCa's labels hold padding."""
    image, text = unit(B, 24, seed=1, dtype=dtype), unit(B, 24, seed=2, dtype=dtype)
    scale = torch.tensor(14.3, dtype=dtype)
    if name == "SigLipLoss":
        return image, text, scale, torch.tensor(-9.0, dtype=dtype)
    if name == "CoCaLoss":
        logits = 3 * unit(B, 5, 11, seed=3, dtype=dtype)
        labels = torch.arange(B * 5).reshape(B, 5) % 11
        return image, text, logits, labels, scale
    if name == "DistillClipLoss":
        teacher = (unit(B, 16, seed=4, dtype=dtype), unit(B, 16, seed=5, dtype=dtype))
        return image, text, scale, *teacher, torch.tensor(20.0, dtype=dtype)
    return image, text, scale


def student_inputs(name: str) -> int:
    """How many of the floating inputs have a gradient: not the teacher's."""
    return 3 if name == "DistillClipLoss" else 4


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("B", [1, 2, 37])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_loss_and_gradients(name: str, B: int, dtype: torch.dtype) -> None:
    inputs = inputs_of(name, B, dtype)
    loss, grads = with_gradients(getattr(ours, name)(**CLASSES[name]), inputs)
    peer, peer_grads = with_gradients(getattr(open_clip_losses(), name)(**CLASSES[name]), inputs)
    tolerance = FP32 if dtype == torch.float32 else {"rtol": 1e-10, "atol": 1e-11}
    torch.testing.assert_close(loss, peer, **tolerance)
    compared = student_inputs(name)
    assert B == 1 or all(grad.abs().max() > 1e-3 for grad in peer_grads[:compared])
    torch.testing.assert_close(grads[:compared], peer_grads[:compared], **tolerance)
    # The teacher is a constant here, whether or not its forward ran under no_grad.
    assert all(grad is None for grad in grads[compared:])


def test_bias_of_a_siglip_model_under_a_softmax_loss() -> None:
    """It changes nothing but stays in the graph: an unused parameter stops DDP."""
    image, text, scale = inputs_of("ClipLoss", 7, torch.float32)
    inputs = (image, text, scale, torch.tensor([-10.0]))
    loss, grads = with_gradients(ours.ClipLoss(), inputs)
    peer, peer_grads = with_gradients(open_clip_losses().ClipLoss(), inputs)
    torch.testing.assert_close(loss, peer, **FP32)
    torch.testing.assert_close(grads, peer_grads, **FP32)
    assert grads[3] is not None
    assert grads[3].abs() < 1e-6


@pytest.mark.parametrize("name", CLASSES)
def test_dictionary(name: str) -> None:
    inputs = inputs_of(name, 7, torch.float32)
    module = getattr(ours, name)(**CLASSES[name])
    plain, found = module(*inputs), module(*inputs, output_dict=True)
    peer = getattr(open_clip_losses(), name)(**CLASSES[name])(*inputs, output_dict=True)
    assert list(found) == list(peer)
    plain = plain if isinstance(plain, tuple) else (plain,)
    assert [x.item() for x in found.values()] == [x.item() for x in plain]


@pytest.mark.parametrize("name", CLASSES)
def test_signatures(name: str) -> None:
    """Names, order and defaults are open_clip's; what is ours comes after, keyword-only."""
    mine, theirs = getattr(ours, name), getattr(open_clip_losses(), name)
    for method in ("__init__", "forward"):
        found = inspect.signature(getattr(mine, method)).parameters
        wanted = inspect.signature(getattr(theirs, method)).parameters
        positional = [p for p in found.values() if p.kind is not p.KEYWORD_ONLY]
        assert [p.name for p in positional] == list(wanted)
        for parameter in wanted.values():
            # SigLipLoss's bias has no default there; here None may be left out.
            if parameter.default is not parameter.empty:
                assert found[parameter.name].default == parameter.default


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", ["ClipLoss", "SigLipLoss", "DistillClipLoss"])
def test_half_features(name: str, dtype: torch.dtype) -> None:
    """The loss is fp32; no error, of gradients too, is above twice open_clip's in that dtype."""
    half = [x.to(dtype) if x.dim() else x for x in inputs_of(name, 37, torch.float32)]
    module, peer = getattr(ours, name)(), getattr(open_clip_losses(), name)()
    losses, grads = with_gradients(module, half)
    eager, eager_grads = with_gradients(peer, half)
    truth, true_grads = with_gradients(peer, [x.double() for x in half])
    for loss, plain, exact in zip(losses, eager, truth, strict=True):
        assert loss.dtype == torch.float32
        assert_within_budget(loss.to(plain.dtype), exact, plain, name="loss")
    compared = slice(student_inputs(name))
    for i, (grad, plain, exact) in enumerate(
        zip(grads[compared], eager_grads[compared], true_grads[compared], strict=True)
    ):
        assert_within_budget(grad, exact, plain, name=f"gradient {i}")


def test_coca_head_equals_logits() -> None:
    image, text, _, labels, scale = inputs_of("CoCaLoss", 7, torch.float64)
    hidden = unit(7, 5, 6, seed=8, dtype=torch.float64)
    head = unit(11, 6, seed=9, dtype=torch.float64)
    module = ours.CoCaLoss(**CLASSES["CoCaLoss"])
    plain, grads = with_gradients(
        lambda h, w: module(image, text, h @ w.T, labels, scale)[1], (hidden, head)
    )
    fused, fused_grads = with_gradients(
        lambda h, w: module(image, text, h, labels, scale, head=w)[1], (hidden, head)
    )
    torch.testing.assert_close(fused, plain)
    torch.testing.assert_close(fused_grads, grads)


@pytest.mark.parametrize("head", [False, True])
def test_coca_all_padding(head: bool) -> None:
    image, text, logits, labels, scale = inputs_of("CoCaLoss", 2, torch.float32)
    options = {"head": torch.ones(4, 11)} if head else {}
    module = ours.CoCaLoss(1.0, 1.0, pad_id=3)
    (loss,), grads = with_gradients(
        lambda z: module(image, text, z, torch.full_like(labels, 3), scale, **options)[1],
        (logits,),
    )
    assert loss == 0
    assert (grads[0] == 0).all()


def test_coca_without_contrast() -> None:
    inputs = inputs_of("CoCaLoss", 7, torch.float32)
    contrastive, caption = ours.CoCaLoss(1.0, 0, pad_id=3)(*inputs)
    assert contrastive == 0
    expected = F.cross_entropy(inputs[2].flatten(0, 1), inputs[3].flatten(), ignore_index=3)
    torch.testing.assert_close(caption, expected)


@pytest.mark.parametrize("name", CLASSES)
def test_compiles(name: str) -> None:
    inputs = [
        x.requires_grad_() if x.is_floating_point() else x
        for x in inputs_of(name, 7, torch.float32)
    ]
    assert_compiles(getattr(ours, name)(**CLASSES[name]), *inputs)


@pytest.mark.parametrize("width", [16, 24, 40])
def test_distillation_keeps_no_matrix(width: int) -> None:
    """Whatever the teacher's width, nothing of B x B is saved for the backward by its part."""
    B, saved = 512, []
    image, text, scale, *_ = (x.requires_grad_() for x in inputs_of("ClipLoss", B, torch.float32))
    teacher = (unit(B, width, seed=s, dtype=torch.float32) for s in (4, 5))
    module, loss = ours.DistillClipLoss(), None
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: saved.append(x.numel()) or x, lambda x: x
    ):
        loss = module._excess(image, text, scale, *teacher, torch.tensor(20.0), None)
    loss.backward()
    assert max(saved) <= B * 40


def test_bad_input() -> None:
    image, text, scale = inputs_of("ClipLoss", 4, torch.float32)
    for name, options in CLASSES.items():
        if name != "SigLipLoss":
            with pytest.raises(NotImplementedError, match="use_horovod=True"):
                getattr(ours, name)(**options, use_horovod=True)
        with pytest.raises(ValueError, match="init_process_group"):
            getattr(ours, name)(**options, world_size=2)(*inputs_of(name, 4, torch.float32))
    with pytest.raises(ValueError, match="dist_impl must be"):
        ours.SigLipLoss(dist_impl="ring")
    with pytest.raises(ValueError, match="one shape"):
        ours.ClipLoss()(image, text[:, 1:], scale)
    with pytest.raises(ValueError, match="logit_scale must have one element"):
        ours.ClipLoss()(image, text, torch.ones(2))
    with pytest.raises(ValueError, match="labels"):
        ours.CoCaLoss(1, 1)(image, text, torch.ones(4, 5, 9), torch.ones(4, 4).long(), scale)
    with pytest.raises(ValueError, match="dist_text_features must be"):
        ours.DistillClipLoss()(image, text, scale, image, text[1:], scale)
