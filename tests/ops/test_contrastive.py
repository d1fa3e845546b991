"""contrastive_loss and hinge_loss against open_clip, ALBEF's step and loops written out here."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from tests._peers import open_clip_losses
from vlpfast.ops.contrastive import contrastive_loss, hinge_loss
from vlpfast.testing import assert_compiles, assert_same, assert_within_budget, with_gradients

IDS = torch.tensor([3, 1, 3, 7, 1, 3, 9])


def unit(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator, dtype=torch.float64)
    return F.normalize(x, dim=-1).to(dtype)


def pair(B: int = 7, D: int = 5, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return unit(B, D, seed=1, dtype=dtype), unit(B, D, seed=2, dtype=dtype)


def full_options(B: int = 7, D: int = 5, K: int = 4) -> dict:
    """A queue with one id of the batch in it and empty slots, a teacher, smoothing."""
    return {
        "ids": IDS[:B],
        "image_keys": unit(K, D, seed=3),
        "text_keys": unit(K, D, seed=4),
        "key_ids": torch.tensor([-100, 3, 42, -100]),
        "teacher": (unit(B, D, seed=5), unit(B, D, seed=6)),
        "alpha": 0.4,
        "label_smoothing": 0.1,
    }


@pytest.mark.parametrize("B", [1, 2, 7, 64])
def test_matches_open_clip_softmax(B: int) -> None:
    peer = open_clip_losses().ClipLoss()
    inputs = (*pair(B), torch.tensor(14.3, dtype=torch.float64))
    ours, our_grads = with_gradients(lambda i, t, s: contrastive_loss(i, t, s).loss, inputs)
    theirs, their_grads = with_gradients(peer, inputs)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(our_grads, their_grads, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("B", [1, 2, 7, 64])
def test_matches_open_clip_sigmoid(B: int) -> None:
    peer = open_clip_losses().SigLipLoss()
    scalars = (torch.tensor(10.0, dtype=torch.float64), torch.tensor(-9.0, dtype=torch.float64))
    inputs = (*pair(B), *scalars)
    ours, our_grads = with_gradients(
        lambda i, t, s, b: contrastive_loss(i, t, s, b, kind="sigmoid").loss, inputs
    )
    theirs, their_grads = with_gradients(peer, inputs)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(our_grads, their_grads, rtol=1e-11, atol=1e-13)


def albef_itc(image, text, temp, image_m, text_m, image_queue, text_queue, alpha, ids, key_ids):
    """ALBEF's image-text contrastive step in its own order, with the retrieval model's ids."""
    with torch.no_grad():
        image_all = torch.cat([image_m.t(), image_queue.t()], dim=1)
        text_all = torch.cat([text_m.t(), text_queue.t()], dim=1)
        pos = torch.zeros(len(ids), len(ids) + len(key_ids), dtype=torch.float64)
        for i, one in enumerate(ids.tolist()):
            for j, other in enumerate(ids.tolist() + key_ids.tolist()):
                pos[i, j] = float(one == other)
        targets = pos / pos.sum(1, keepdim=True)
        i2t_targets = alpha * F.softmax(image_m @ text_all / temp, 1) + (1 - alpha) * targets
        t2i_targets = alpha * F.softmax(text_m @ image_all / temp, 1) + (1 - alpha) * targets
    loss_i2t = -torch.sum(F.log_softmax(image @ text_all / temp, 1) * i2t_targets, 1).mean()
    loss_t2i = -torch.sum(F.log_softmax(text @ image_all / temp, 1) * t2i_targets, 1).mean()
    return loss_i2t, loss_t2i


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("with_ids", [False, True])
def test_matches_albef(alpha: float, with_ids: bool) -> None:
    options = full_options()
    image_m, text_m = options["teacher"]
    ids = options["ids"] if with_ids else torch.arange(7)
    key_ids = options["key_ids"] if with_ids else torch.full((4,), -100)
    queues = {name: options[name] for name in ("image_keys", "text_keys", "teacher")}
    if with_ids:
        queues |= {"ids": ids, "key_ids": key_ids}

    def ours(image, text, temp):
        return contrastive_loss(image, text, 1 / temp, alpha=alpha, **queues)

    def theirs(image, text, temp):
        arguments = (image_m, text_m, queues["image_keys"], queues["text_keys"])
        parts = albef_itc(image, text, temp, *arguments, alpha, ids, key_ids)
        return (parts[0] + parts[1]) / 2, parts[0].detach(), parts[1].detach()

    inputs = (*pair(), torch.tensor(0.07, dtype=torch.float64))
    output, our_grads = with_gradients(ours, inputs)
    expected, their_grads = with_gradients(theirs, inputs)
    torch.testing.assert_close(output[:3], expected, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(our_grads, their_grads, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize("full", [False, True], ids=["plain", "full"])
def test_gradcheck(kind: str, full: bool) -> None:
    options = full_options() if full else {}
    scalars = [torch.tensor([x], dtype=torch.float64) for x in (5.0, -2.0)]
    # The teacher's targets follow scale and bias but are constants for the gradient.
    alpha = {"alpha": 0.0} if full else {}

    def loss(image, text, scale, bias):
        return contrastive_loss(image, text, scale, bias, kind=kind, **(options | alpha)).loss

    inputs = [x.clone().requires_grad_() for x in (*pair(), *scalars)]
    assert torch.autograd.gradcheck(loss, inputs)
    if full:
        towers = lambda image, text: contrastive_loss(image, text, 5.0, kind=kind, **options).loss
        assert torch.autograd.gradcheck(towers, inputs[:2])


def test_sigmoid_targets() -> None:
    """Queue, several positives, smoothing and teacher by a loop over pairs."""
    options = full_options()
    image, text = pair()
    total = 0.0
    for query, teacher, batch, keys in (
        (image, options["teacher"][0], options["teacher"][1], options["text_keys"]),
        (text, options["teacher"][1], options["teacher"][0], options["image_keys"]),
    ):
        for i in range(7):
            for j, candidate in enumerate(torch.cat([batch, keys])):
                other = torch.cat([options["ids"], options["key_ids"]])[j]
                y = 0.9 * float(options["ids"][i] == other) + 0.1 / 2
                p = torch.sigmoid(6 * teacher[i] @ candidate - 3)
                t = 0.4 * p + 0.6 * y
                q = torch.sigmoid(6 * query[i] @ candidate - 3)
                total -= (t * q.log() + (1 - t) * (1 - q).log()) / 7 / 2
    output = contrastive_loss(image, text, 6.0, -3.0, kind="sigmoid", **options)
    torch.testing.assert_close(output.loss, total, rtol=1e-12, atol=0)
    assert output.image_lse is None


def test_label_smoothing_is_torchs() -> None:
    image, text = pair()
    logits, diagonal = 8 * image @ text.T, torch.arange(7)
    output = contrastive_loss(image, text, 8.0, label_smoothing=0.2)
    rows = F.cross_entropy(logits, diagonal, label_smoothing=0.2)
    columns = F.cross_entropy(logits.T, diagonal, label_smoothing=0.2)
    torch.testing.assert_close(output.image_to_text, rows, rtol=1e-12, atol=0)
    torch.testing.assert_close(output.text_to_image, columns, rtol=1e-12, atol=0)


def test_statistics() -> None:
    image, text = pair()
    keys = unit(4, 5, seed=4)
    output = contrastive_loss(image, text, 8.0, text_keys=keys)
    torch.testing.assert_close(
        output.image_lse, torch.logsumexp(8 * image @ torch.cat([text, keys]).T, 1)
    )
    torch.testing.assert_close(output.text_lse, torch.logsumexp(8 * text @ image.T, 1))
    assert output.hard_text.shape == output.hard_image.shape == (7, 0)
    assert output.hard_text.dtype == torch.int64


def test_keys_and_teacher_have_no_gradient() -> None:
    options = full_options()
    constants = [options["image_keys"], options["text_keys"], *options["teacher"]]
    for constant in constants:
        constant.requires_grad_()
    image, text = (x.requires_grad_() for x in pair())
    contrastive_loss(image, text, 8.0, **options).loss.backward()
    assert all(constant.grad is None for constant in constants)
    assert image.grad.abs().max() > 0


def test_scale_as_number_or_tensor() -> None:
    image, text = pair()
    losses = [
        contrastive_loss(image, text, scale).loss
        for scale in (8.0, torch.tensor(8.0), torch.tensor([8.0]))
    ]
    assert losses[0] == losses[1] == losses[2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_low_precision(dtype: torch.dtype, kind: str) -> None:
    """The reference rounds features, not the loss: fp32 arithmetic on what was given. What "auto"
    may round besides is in test_contrastive_chunked.py; fp32 and fp16 on a CPU meet this too.
    """
    impl = "reference" if dtype == torch.bfloat16 else "auto"
    inputs = pair(13, 32, dtype)
    loss = lambda i, t: contrastive_loss(i, t, 100.0, kind=kind, impl=impl).loss
    output, grads = with_gradients(loss, inputs)
    truth, true_grads = with_gradients(loss, [x.double() for x in inputs])
    assert output[0].dtype == torch.float32
    torch.testing.assert_close(output[0].double(), truth[0], rtol=1e-5, atol=1e-5)
    for grad, true_grad in zip(grads, true_grads, strict=True):
        if dtype == torch.float32:
            torch.testing.assert_close(grad.double(), true_grad, rtol=1.3e-6, atol=1e-5)
        else:
            # The best that can be: the exact gradient, rounded once.
            assert_within_budget(grad, true_grad, true_grad.to(dtype), name="gradient")


def test_autocast_does_not_reach_it() -> None:
    image, text = pair(dtype=torch.float32)
    expected = contrastive_loss(image, text, 50.0).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert contrastive_loss(image, text, 50.0).loss == expected


def test_large_logits() -> None:
    image, text = (x.requires_grad_() for x in pair(dtype=torch.float32))
    output = contrastive_loss(image, text, 1e4, hard_negatives=1, seed=0)
    output.loss.backward()
    assert output.loss.isfinite()
    assert image.grad.isfinite().all()
    assert (output.hard_text >= 0).all()


def test_empty_batch() -> None:
    image = torch.zeros(0, 5, requires_grad=True)
    output = contrastive_loss(image, torch.zeros(0, 5), 8.0, hard_negatives=2, seed=0)
    output.loss.backward()
    assert output.loss == 0
    assert output.image_lse.shape == (0,)
    assert output.hard_text.shape == (0, 2)


def test_non_contiguous_and_not_mutated() -> None:
    image, text = pair()
    expected = contrastive_loss(image, text, 8.0, **full_options())
    strided = torch.stack([image, text], 2).unbind(2)
    before = [x.clone() for x in strided]
    assert_same(contrastive_loss(*strided, 8.0, **full_options()), expected)
    assert_same(list(strided), before)


def test_repeat_call_is_bit_equal() -> None:
    image, text = pair(dtype=torch.float32)
    call = lambda: contrastive_loss(image, text, 8.0, hard_negatives=3, seed=5, ids=IDS)
    assert_same(call(), call())


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_compiles(kind: str) -> None:
    image, text = (x.requires_grad_() for x in pair(dtype=torch.float32))
    scale = torch.tensor(8.0, requires_grad=True)
    options = {"kind": kind, "ids": IDS, "hard_negatives": 2, "seed": torch.tensor(3)}
    assert_compiles(contrastive_loss, image, text, scale, -1.0, **options)


@settings(deadline=None, max_examples=25)
@given(
    B=st.integers(1, 6),
    K=st.integers(0, 3),
    kind=st.sampled_from(["softmax", "sigmoid"]),
    seed=st.integers(0, 100),
)
def test_symmetries(B: int, K: int, kind: str, seed: int) -> None:
    """Swapping the towers swaps the directions; permuting the pairs permutes the rows."""
    torch.manual_seed(seed)
    image, text = unit(B, 4, seed=seed), unit(B, 4, seed=seed + 1)
    image_keys, text_keys = unit(K, 4, seed=seed + 2), unit(K, 4, seed=seed + 3)
    ids, key_ids = torch.randint(0, 3, (B,)), torch.randint(0, 3, (K,))
    options = {"kind": kind, "key_ids": key_ids, "label_smoothing": 0.1}
    one = contrastive_loss(
        image, text, 9.0, -2.0, ids=ids, image_keys=image_keys, text_keys=text_keys, **options
    )
    swapped = contrastive_loss(
        text, image, 9.0, -2.0, ids=ids, image_keys=text_keys, text_keys=image_keys, **options
    )
    torch.testing.assert_close(swapped.loss, one.loss)
    torch.testing.assert_close(swapped.image_to_text, one.text_to_image)
    order = torch.randperm(B)
    permuted = contrastive_loss(
        image[order], text[order], 9.0, -2.0, ids=ids[order],
        image_keys=image_keys, text_keys=text_keys, **options,
    )  # fmt: skip
    torch.testing.assert_close(permuted.loss, one.loss)
    if kind == "softmax":
        torch.testing.assert_close(permuted.image_lse, one.image_lse[order])


def test_negatives_follow_softmax() -> None:
    """6,400 draws per direction against the softmax without the pair itself, chi-square."""
    B, scale, num_seeds = 64, 4.0, 100
    image, text = pair(B, 8, torch.float32)
    logits = scale * image @ text.T
    for name, similarity in (("hard_text", logits), ("hard_image", logits.T)):
        p = similarity.double().fill_diagonal_(-math.inf).softmax(1)
        counts = torch.zeros(B, B, dtype=torch.float64)
        for seed in range(num_seeds):
            output = contrastive_loss(image, text, scale, hard_negatives=1, seed=seed)
            counts[torch.arange(B), getattr(output, name)[:, 0]] += 1
        assert counts.diagonal().sum() == 0
        # Columns of each row are pooled by rank of probability, so that no cell is too small.
        order = p.argsort(1, descending=True)
        observed = counts.gather(1, order).sum(0)
        expected = num_seeds * p.gather(1, order).sum(0)
        keep = expected > 5
        assert keep.sum() > 20
        statistic = ((observed - expected)[keep] ** 2 / expected[keep]).sum()
        assert stats.chi2.sf(float(statistic), int(keep.sum()) - 1) > 1e-3
        uniform = observed.sum() / (B - 1)
        assert stats.chi2.sf(float(((observed - uniform) ** 2 / uniform).sum()), B - 1) < 1e-12


def test_negatives_have_another_id() -> None:
    image, text = pair()
    for seed in range(50):
        output = contrastive_loss(image, text, 3.0, ids=IDS, hard_negatives=6, seed=seed)
        for drawn in (output.hard_text, output.hard_image):
            for i, row in enumerate(drawn.tolist()):
                valid = {j for j in range(7) if IDS[j] != IDS[i]}
                assert set(row[: len(valid)]) == valid
                assert row[len(valid) :] == [-1] * (6 - len(valid))


def test_negatives_where_none_is_left() -> None:
    image, text = pair()
    same = contrastive_loss(image, text, 3.0, ids=torch.zeros(7).long(), hard_negatives=2, seed=0)
    alone = contrastive_loss(image[:1], text[:1], 3.0, hard_negatives=2, seed=0)
    for output in (same, alone):
        assert (output.hard_text == -1).all()
        assert (output.hard_image == -1).all()
    assert alone.loss == 0


def test_negatives_depend_on_seed_and_direction() -> None:
    image, _ = pair(64, 8)
    draw = lambda seed: contrastive_loss(image, image, 1.0, hard_negatives=1, seed=seed)
    first, second = draw(0), draw(1)
    # Independent draws from 63 candidates agree in about one row; all streams here are independent.
    assert (first.hard_text == second.hard_text).sum() < 12
    assert (first.hard_text == first.hard_image).sum() < 12
    more = contrastive_loss(image, image, 1.0, hard_negatives=5, seed=0)
    assert_same(more.hard_text[:, :1], first.hard_text)
    assert_same(draw(torch.tensor(0)).hard_text, first.hard_text)


def test_negatives_with_teacher_come_from_its_features() -> None:
    """As in ALBEF, the similarity that draws is the student's to the teacher's candidates."""
    image, text = pair()
    teacher_text = image[torch.tensor([1, 2, 3, 4, 5, 6, 0])]
    output = contrastive_loss(
        image, text, 1e4, teacher=(image, teacher_text), hard_negatives=1, seed=0
    )
    assert output.hard_text[:, 0].tolist() == [6, 0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"kind": "tanh"}, ValueError, "kind must be 'softmax' or 'sigmoid', got 'tanh'"),
        ({"label_smoothing": 1.0}, ValueError, r"label_smoothing must be in \[0, 1\), got 1.0"),
        ({"hard_negatives": -1}, ValueError, "hard_negatives must be >= 0, got -1"),
        ({"hard_negatives": 1}, ValueError, "hard_negatives needs a seed"),
        ({"ids": torch.arange(6)}, ValueError, r"ids must be \(B,\) = \(7,\), got \(6,\)"),
        ({"ids": torch.zeros(7)}, TypeError, "ids must be integers, got torch.float32"),
        ({"image_keys": torch.zeros(4, 6)}, ValueError, r"image_keys must be \(K, D=5\)"),
        (
            {"text_keys": torch.zeros(4, 5), "key_ids": torch.zeros(3), "ids": IDS},
            ValueError,
            r"key_ids must be \(K,\) = \(4,\) for text_keys, got \(3,\)",
        ),
        ({"key_ids": torch.zeros(4)}, ValueError, "key_ids needs ids"),
        ({"key_ids": torch.zeros(4), "ids": IDS}, ValueError, "key_ids needs image_keys or"),
        ({"alpha": 0.4}, ValueError, "alpha=0.4 needs a teacher"),
        ({"alpha": 1.4}, ValueError, r"alpha must be in \[0, 1\], got 1.4"),
        (
            {"teacher": (torch.zeros(7, 5), torch.zeros(6, 5))},
            ValueError,
            r"teacher\[1\] must have image's shape \(7, 5\), got \(6, 5\)",
        ),
        ({"logit_bias": torch.zeros(2)}, ValueError, r"logit_bias must have one element.*\(2,\)"),
        ({"impl": "cuda"}, ValueError, "contrastive: impl must be 'auto' or one of"),
    ],
)
def test_errors(options: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        contrastive_loss(*pair(), 8.0, **options)


@pytest.mark.parametrize("loss", [lambda i, t: contrastive_loss(i, t, 8.0), hinge_loss])
def test_feature_errors(loss) -> None:
    image, text = pair()
    with pytest.raises(ValueError, match=r"one shape, got \(7, 5\) and \(6, 5\)"):
        loss(image, text[:6])
    with pytest.raises(ValueError, match=r"image must be \(B, D\), got shape \(7, 5, 1\)"):
        loss(image[..., None], text)
    with pytest.raises(TypeError, match="text must be floating point"):
        loss(image, text.long())


def loop_hinge(image: Tensor, text: Tensor, margin: float, hardest: bool, ids: Tensor) -> Tensor:
    """The triplet sums, one triplet at a time."""
    total = image.new_zeros(())
    for i in range(len(image)):
        texts, images = [image.new_zeros(())], [image.new_zeros(())]
        for j in range(len(image)):
            if ids[i] != ids[j]:
                texts.append((margin + image[i] @ text[j] - image[i] @ text[i]).clamp(min=0))
                images.append((margin + image[j] @ text[i] - image[i] @ text[i]).clamp(min=0))
        reduce = (lambda x: torch.stack(x).max()) if hardest else (lambda x: torch.stack(x).sum())
        total = total + reduce(texts) + reduce(images)
    return total


@pytest.mark.parametrize("hardest", [False, True], ids=["vse0", "vse++"])
@pytest.mark.parametrize("ids", [None, IDS], ids=["alone", "ids"])
def test_hinge_matches_loop(hardest: bool, ids: Tensor | None) -> None:
    inputs = pair()
    ours = with_gradients(lambda i, t: hinge_loss(i, t, hardest=hardest, ids=ids), inputs)
    names = torch.arange(7) if ids is None else ids
    theirs = with_gradients(lambda i, t: loop_hinge(i, t, 0.2, hardest, names), inputs)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
    inputs = [x.clone().requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(lambda i, t: hinge_loss(i, t, hardest=hardest, ids=ids), inputs)


def test_hinge_sums_and_ends() -> None:
    image = torch.eye(3)
    text = torch.eye(3)
    assert hinge_loss(image, text, margin=0.5) == 0
    # Each of 3 rows and 3 columns has two negatives at the pair's own similarity minus 1.
    assert hinge_loss(image, text, margin=1.5, hardest=True) == 6 * 0.5
    assert hinge_loss(image, text, margin=1.5, hardest=False) == 12 * 0.5
    assert hinge_loss(image[:1], text[:1], margin=1.5) == 0
    assert hinge_loss(image[:0], text[:0]) == 0
    assert hinge_loss(image.bfloat16(), text.bfloat16(), margin=1.5).dtype == torch.float32
