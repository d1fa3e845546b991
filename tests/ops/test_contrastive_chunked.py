"""The chunked contrastive loss (C++ and Triton passes) against the fp64 reference."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from benchmarks.timing import peak_bytes
from tests._peers import open_clip_losses
from vlpfast.ops import _contrastive_chunked, _contrastive_passes, _contrastive_tiles
from vlpfast.ops.contrastive import contrastive_loss
from vlpfast.ops.reference import contrastive as reference
from vlpfast.testing import assert_compiles, assert_same, routes, with_gradients

BF16 = torch.bfloat16
# Kept and recomputed similarities; tiles of 8 rows, so that small batches have several.
PLANS = {"keep": {"keep": 256 << 20}, "recompute": {"keep": 0}, "tiles": {"keep": 0, "rows": 8}}
# Row groups of 64 rows at least: the teacher's directions with a small budget.
CASES = {
    "softmax": {},
    "ids": {"ids": True, "label_smoothing": 0.1},
    "queue": {"ids": True, "queue": True, "label_smoothing": 0.2},
    "queue-without-ids": {"queue": True},
    "albef": {"ids": True, "queue": True, "teacher": True, "alpha": 0.4},
    "teacher-smoothing": {"teacher": True, "alpha": 0.7, "label_smoothing": 0.1},
    "teacher-alpha-0": {"ids": True, "queue": True, "teacher": True, "alpha": 0.0},
    "sigmoid": {"kind": "sigmoid"},
    "sigmoid-ids": {"kind": "sigmoid", "ids": True, "label_smoothing": 0.1},
    "sigmoid-queue": {"kind": "sigmoid", "ids": True, "queue": True},
    "sigmoid-albef": {
        "kind": "sigmoid", "ids": True, "queue": True, "teacher": True, "alpha": 0.4,
        "label_smoothing": 0.1,
    },
}  # fmt: skip


def back_ends() -> list:
    """Both back ends of the passes; Triton's is skipped where its kernels are missing."""
    reason = _contrastive_passes.triton_missing()
    return routes("cpp") if reason is not None else routes("cpp", "triton")


def unit(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)


def make_inputs(B: int, D: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """image, text whose pairs are similar, scale, bias."""
    image, noise = unit(B, D, seed=1), unit(B, D, seed=2)
    text = F.normalize(image + 0.7 * noise, dim=-1)
    scalars = (torch.tensor(12.0), torch.tensor(-3.0))
    return (image.to(dtype), text.to(dtype), *scalars)


def make_options(case: dict, B: int, D: int, dtype: torch.dtype, K: int = 5) -> dict:
    options = {x: case[x] for x in ("kind", "label_smoothing", "alpha") if x in case}
    if case.get("ids"):
        options["ids"] = (torch.arange(B) * 7 % max(1, B - B // 4)) + (1 << 40)
    if case.get("queue"):
        options["image_keys"] = unit(K, D, seed=3).to(dtype)
        options["text_keys"] = unit(K + 2, D, seed=4)[:K].to(dtype)
        if case.get("ids"):
            options["key_ids"] = torch.tensor([-100, 1 << 40, 3, (1 << 40) + 2, -100])[:K]
    if case.get("teacher"):
        options["teacher"] = (unit(B, D, seed=5).to(dtype), unit(B, D, seed=6).to(dtype))
    return options


def set_plan(monkeypatch: pytest.MonkeyPatch, keep: int, rows: int | None = None) -> None:
    monkeypatch.setattr(_contrastive_chunked, "_KEEP_BYTES", {"cpu": keep, "cuda": keep})
    if rows is not None:
        monkeypatch.setattr(_contrastive_tiles, "_MIN_TILE_ROWS", rows)
        monkeypatch.setattr(_contrastive_tiles, "_MAX_TILE_ROWS", {"cpu": rows, "cuda": rows})


def widen(value: object, dtype: torch.dtype) -> object:
    if isinstance(value, tuple):
        return tuple(widen(x, dtype) for x in value)
    is_float = isinstance(value, Tensor) and value.is_floating_point()
    return value.to(dtype) if is_float else value


def eager(options: dict, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> tuple:
    """The reference's formula in the features' own dtype, as code in that dtype computes it: the
    first five fields of its output.
    """
    ids, kind = options.get("ids"), options.get("kind", "softmax")
    image_batch, text_batch = options.get("teacher", (image, text))
    rows = reference.contrastive(
        image, text, image_batch, text_batch, scale, bias,
        kind=kind,
        batch_ids=torch.arange(image.shape[0]) if ids is None else ids,
        first_row=0,
        label_smoothing=options.get("label_smoothing", 0.0),
        image_keys=options.get("image_keys"),
        text_keys=options.get("text_keys"),
        key_ids=options.get("key_ids"),
        teacher=options.get("teacher"),
        alpha=options.get("alpha", 0.0),
        hard_negatives=0,
        seed=0,
    )  # fmt: skip
    parts = rows.image_loss.mean(), rows.text_loss.mean()
    lses = () if kind == "sigmoid" else (rows.image_lse.detach(), rows.text_lse.detach())
    return ((parts[0] + parts[1]) / 2, parts[0].detach(), parts[1].detach(), *lses)


def assert_close_to(
    actual: Tensor, truth: Tensor, plain: Tensor, dtype: torch.dtype, terms: float, name: str
) -> None:
    """error <= 2 (eager error + one rounding in `dtype`, the features' + one fp32 rounding of the
    terms, whose size may be larger than that of what they sum to).
    """
    truth = truth.detach()
    plain_error = (plain.detach().double() - truth).abs().max()
    error = (actual.detach().cpu().double() - truth).abs().max()
    band = torch.finfo(dtype).eps * truth.abs().max() + torch.finfo(torch.float32).eps * terms
    assert error <= 2 * (plain_error + band), f"{name}: {error} over 2 * ({plain_error} + {band})"


def check(case: dict, B: int, D: int, dtype: torch.dtype, impl: str, device) -> None:
    """Outputs and gradients against the reference in fp64, within twice the eager error."""
    inputs, options = make_inputs(B, D, dtype), make_options(case, B, D, dtype)
    wide_options = {name: widen(x, torch.float64) for name, x in options.items()}
    truth, true_grads = with_gradients(
        lambda *x: contrastive_loss(*x, impl="reference", **wide_options),
        [x.double() for x in inputs],
    )
    plain, plain_grads = with_gradients(lambda *x: eager(options, *x), inputs)
    on_device = {name: move(x, device) for name, x in options.items()}
    output, grads = with_gradients(
        lambda *x: contrastive_loss(*x, impl=impl, **on_device), [x.to(device) for x in inputs]
    )
    assert output[0].dtype == torch.float32
    scale = float(inputs[2])
    fields = ("loss", "image_to_text", "text_to_image", "image_lse", "text_lse")
    for name, actual, true, rough in zip(fields, output, truth, plain, strict=False):
        # A loss is a difference of logits.
        assert_close_to(actual, true, rough, dtype, scale, name)
    names = ("image", "text", "scale", "bias")
    for name, grad, true, rough in zip(names, grads, true_grads, plain_grads, strict=True):
        if name == "bias" and case.get("kind") != "sigmoid":
            # Softmax does not feel it; eager code leaves rounding there.
            assert grad == 0
            continue
        assert grad.dtype == rough.dtype
        # A gradient is a difference of probabilities, times what they weigh.
        terms = scale / B if name in ("image", "text") else 1.0
        assert_close_to(grad, true, rough, dtype, terms, f"{name} gradient")


def move(value: object, device: torch.device) -> object:
    if isinstance(value, tuple):
        return tuple(x.to(device) for x in value)
    return value.to(device) if isinstance(value, Tensor) else value


# 1: alone; 7: a prime below a vector; 255, 256, 257: around a strip of columns.
@pytest.mark.parametrize("B", [1, 7, 255, 256, 257])
@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("impl", "device"), back_ends())
def test_matches_reference(impl, device, name: str, dtype: torch.dtype, B: int) -> None:
    if impl == "triton" and device.type == "cpu" and (B > 7 or dtype != torch.float32):
        pytest.skip("Triton's interpreter: tiny shapes in fp32")
    # 123: an odd width.
    check(CASES[name], B, 123 if B < 256 else 16, dtype, impl, device)


@pytest.mark.parametrize("plan", ["recompute", "tiles"])
@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("impl", "device"), back_ends())
def test_plans(monkeypatch, impl, device, name: str, dtype: torch.dtype, plan: str) -> None:
    """Recomputed similarities and many tiles give the same. 70: over the least group of rows."""
    if impl == "triton" and device.type == "cpu" and (plan != "tiles" or dtype != torch.float32):
        pytest.skip("Triton's interpreter: tiny shapes in fp32")
    set_plan(monkeypatch, **PLANS[plan])
    check(CASES[name], 19 if impl == "triton" else 70, 16, dtype, impl, device)


@settings(deadline=None, max_examples=25)
@given(
    B=st.integers(1, 40),
    name=st.sampled_from(list(CASES)),
    rows=st.sampled_from([8, 16, 32]),
    keep=st.sampled_from([0, 1 << 12, 1 << 28]),
)
def test_any_plan(B: int, name: str, rows: int, keep: int) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        set_plan(monkeypatch, keep, rows)
        check(CASES[name], B, 9, torch.float32, "cpp", torch.device("cpu"))


@pytest.mark.parametrize(("impl", "device"), back_ends())
@pytest.mark.parametrize("name", ["softmax", "ids", "albef", "sigmoid", "sigmoid-albef"])
def test_draws_are_the_references(impl, device, name: str) -> None:
    B = 33 if impl == "triton" else 300
    inputs, options = make_inputs(B, 16, torch.float32), make_options(
        CASES[name], B, 16, torch.float32
    )  # fmt: skip
    # Triton makes one pass for each draw, slowly if interpreted.
    for seed, k in ((0, 1), (5_000_000_000, 2 if impl == "triton" else 4)):
        draw = {"hard_negatives": k, "seed": seed}
        expected = contrastive_loss(*inputs, impl="reference", **options, **draw)
        actual = contrastive_loss(
            *(x.to(device) for x in inputs),
            impl=impl,
            **{name: move(x, device) for name, x in options.items()},
            **draw,
        )
        assert torch.equal(actual.hard_text.cpu(), expected.hard_text)
        assert torch.equal(actual.hard_image.cpu(), expected.hard_image)


@pytest.mark.parametrize(("impl", "device"), back_ends())
def test_more_negatives_than_candidates(impl, device) -> None:
    inputs = [x.to(device) for x in make_inputs(4, 8, torch.float32)]
    ids = torch.tensor([0, 0, 1, 2], device=device)
    output = contrastive_loss(*inputs, ids=ids, hard_negatives=6, seed=1, impl=impl)
    for drawn in (output.hard_text, output.hard_image):
        for i, row in enumerate(drawn.tolist()):
            valid = {j for j in range(4) if ids[j] != ids[i]}
            assert set(row[: len(valid)]) == valid
            assert row[len(valid) :] == [-1] * (6 - len(valid))


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("keep", [0, 1 << 28])
def test_extreme_scales(monkeypatch, kind: str, dtype: torch.dtype, keep: int) -> None:
    """Random features at scale 100 leave every exponential of a fixed maximum at 0."""
    set_plan(monkeypatch, keep)
    image, text = unit(64, 512, seed=1).to(dtype), unit(64, 512, seed=2).to(dtype)
    for scale in (100.0, 1e4, -100.0, 0.0):
        output, grads = with_gradients(
            lambda i, t, s: contrastive_loss(i, t, s, kind=kind, impl="cpp").loss,
            (image, text, torch.tensor(scale)),
        )
        assert output[0].isfinite()
        assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("name", ["softmax", "ids", "albef", "sigmoid"])
@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=["fp32", "bf16"])
def test_nan_reaches_the_loss(name: str, dtype: torch.dtype) -> None:
    inputs, options = make_inputs(20, 8, dtype), make_options(CASES[name], 20, 8, dtype)
    inputs[0][11, 3] = torch.nan
    assert contrastive_loss(*inputs, impl="cpp", **options).loss.isnan()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("trained", [(0,), (1,), (2,), (0, 1), (2, 3), ()])
def test_partial_gradients(name: str, trained: tuple[int, ...]) -> None:
    inputs, options = (
        make_inputs(20, 8, torch.float32),
        make_options(CASES[name], 20, 8, torch.float32),
    )
    _, expected = with_gradients(lambda *x: contrastive_loss(*x, impl="cpp", **options), inputs)
    leaves = [x.clone().requires_grad_(i in trained) for i, x in enumerate(inputs)]
    loss = contrastive_loss(*leaves, impl="cpp", **options).loss
    assert loss.requires_grad == bool(trained)
    if trained:
        loss.backward()
    for i, leaf in enumerate(leaves):
        if i in trained:
            # Products of other shapes may be summed in another order.
            torch.testing.assert_close(leaf.grad, expected[i])
        else:
            assert leaf.grad is None


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_no_grad_gives_the_same_loss(kind: str) -> None:
    inputs = [x.requires_grad_() for x in make_inputs(20, 8, torch.float32)]
    with_grad = contrastive_loss(*inputs, kind=kind, impl="cpp")
    with torch.no_grad():
        without = contrastive_loss(*inputs, kind=kind, impl="cpp")
    assert not without.loss.requires_grad
    torch.testing.assert_close(without.loss, with_grad.loss.detach())


def test_upstream_gradients() -> None:
    """Any upstream factor, and more than one backward."""
    inputs = [x.requires_grad_() for x in make_inputs(20, 8, torch.float32)]
    loss = contrastive_loss(*inputs, impl="cpp").loss
    once = torch.autograd.grad(loss, inputs, retain_graph=True)
    twice = torch.autograd.grad(-3 * loss, inputs, retain_graph=True)
    again = torch.autograd.grad(loss, inputs)
    assert_same(again, once)
    torch.testing.assert_close(twice, tuple(-3 * x for x in once))


def test_scalars_in_any_form() -> None:
    image, text, _, _ = make_inputs(9, 8, BF16)
    expected = contrastive_loss(image, text, 8.0, -1.0, kind="sigmoid", impl="cpp").loss
    for make in (torch.tensor, lambda x: torch.tensor([x])):
        scale, bias = (torch.nn.Parameter(make(x)) for x in (8.0, -1.0))
        loss = contrastive_loss(image, text, scale, bias, kind="sigmoid", impl="cpp").loss
        assert loss == expected
        loss.backward()
        assert scale.grad.shape == scale.shape
        assert scale.grad.dtype == bias.grad.dtype == torch.float32
        assert scale.grad.abs() > 0


def test_mixed_dtypes_are_multiplied_in_fp32() -> None:
    image, text, scale, _ = make_inputs(9, 8, torch.float32)
    image = image.to(BF16).requires_grad_()
    text.requires_grad_()
    loss = contrastive_loss(image, text, scale, impl="cpp").loss
    loss.backward()
    assert loss == contrastive_loss(image.detach().float(), text, scale, impl="cpp").loss
    assert image.grad.dtype == BF16
    assert text.grad.dtype == torch.float32


@pytest.mark.parametrize("name", ["softmax", "albef", "sigmoid"])
def test_saved_bytes(name: str) -> None:
    """What waits for the backward is the gradients alone, not B x B."""
    B, D = 300, 8
    inputs = [x.requires_grad_() for x in make_inputs(B, D, torch.float32)]
    saved = []
    pack = lambda x: (saved.append(x.untyped_storage().nbytes()), x)[1]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        contrastive_loss(*inputs, impl="cpp", **make_options(CASES[name], B, D, torch.float32)).loss  # noqa: B018
    assert 2 * B * D * 4 <= sum(saved) <= 2 * B * D * 4 + 64 < B * B * 4 / 8


@pytest.mark.parametrize("name", ["softmax", "albef", "sigmoid"])
def test_peak_memory(monkeypatch, name: str) -> None:
    """Forward and backward hold features' size and a tile, not B x B."""
    B, D, rows = 2048, 8, 64
    set_plan(monkeypatch, 0, rows)
    inputs = [x.requires_grad_() for x in make_inputs(B, D, torch.float32)]
    options = make_options(CASES[name], B, D, torch.float32)

    def step() -> object:
        loss = contrastive_loss(*inputs, impl="cpp", **options).loss
        return torch.autograd.grad(loss, inputs, allow_unused=True)

    step()
    tiles = 2 * rows * (B + 5) * 4
    vectors = 40 * B * 4
    assert peak_bytes(step, torch.device("cpu")) < tiles + vectors + 6 * B * D * 4 < B * B * 4 / 8


@pytest.mark.slow
def test_peak_memory_against_open_clip() -> None:
    """Forward and backward of a batch of 16384: a tenth of what open_clip holds (some 4 GiB)."""
    inputs = [x.requires_grad_() for x in make_inputs(16384, 512, torch.float32)[:3]]
    losses = {
        "ours": lambda *x: contrastive_loss(*x, impl="cpp").loss,
        "open_clip": open_clip_losses().ClipLoss(),
    }
    peaks = {
        name: peak_bytes(
            lambda loss=loss: torch.autograd.grad(loss(*inputs), inputs), torch.device("cpu")
        )
        for name, loss in losses.items()
    }
    assert peaks["ours"] <= peaks["open_clip"] / 10


def test_repeat_call_is_bit_equal() -> None:
    inputs, options = make_inputs(300, 8, BF16), make_options(CASES["albef"], 300, 8, BF16)
    call = lambda: with_gradients(
        lambda *x: contrastive_loss(*x, hard_negatives=2, seed=1, impl="cpp", **options), inputs
    )
    assert_same(call(), call())


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=["fp32", "bf16"])
def test_strided_inputs_and_no_mutation(dtype: torch.dtype) -> None:
    inputs, options = make_inputs(20, 8, dtype), make_options(CASES["albef"], 20, 8, dtype)
    expected = contrastive_loss(*inputs, impl="cpp", **options)
    strided = torch.stack(inputs[:2], 2).unbind(2)
    before = [x.clone() for x in strided]
    assert_same(contrastive_loss(*strided, *inputs[2:], impl="cpp", **options), expected)
    assert_same(list(strided), before)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize(("impl", "device"), back_ends())
def test_empty_batch(impl, device, kind: str) -> None:
    image = torch.zeros(0, 5, requires_grad=True, device=device)
    text = torch.zeros(0, 5, device=device)
    keys = torch.ones(3, 5, device=device)
    for options in ({}, {"text_keys": keys}, {"teacher": (text, text), "alpha": 0.5}):
        output = contrastive_loss(
            image, text, 8.0, kind=kind, hard_negatives=2, seed=0, impl=impl, **options
        )
        output.loss.backward()
        assert output.loss == 0
        assert output.hard_text.shape == (0, 2)


@pytest.mark.parametrize("name", ["softmax", "albef", "sigmoid", "sigmoid-queue"])
def test_compiles(name: str) -> None:
    inputs = [x.requires_grad_() for x in make_inputs(20, 8, torch.float32)]
    options = make_options(CASES[name], 20, 8, torch.float32)
    draw = {"hard_negatives": 2, "seed": torch.tensor(3)}
    assert_compiles(contrastive_loss, *inputs, impl="cpp", **options, **draw)


def test_dtype_it_does_not_take() -> None:
    image, text, scale, _ = make_inputs(4, 8, torch.float64)
    with pytest.raises(NotImplementedError, match=r"takes torch.float32, torch.bfloat16, got"):
        contrastive_loss(image, text, scale, impl="cpp")
