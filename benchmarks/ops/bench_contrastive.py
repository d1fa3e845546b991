"""contrastive_loss against what the public code does, by the shape's kind.

`published` is the baseline: open_clip's ClipLoss (softmax) and SigLipLoss (sigmoid), and ALBEF's
step with queue, momentum targets and hard negatives, whose lines are quoted because its library
buries them in the model. `gemm_unit` is one similarity product of the batch and nothing else: the
unit in which an implementation's time says how far it is from its matrix products (three of them
with similarities kept, four with them computed again, `cpp_recompute`).

Gradients are made in the forward here, so only forward and backward together compare.
"""

from __future__ import annotations

import importlib

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Inputs, Run, own_impls
from benchmarks.shapes import SHAPES as _SHAPES
from benchmarks.shapes import Contrastive

OP = "contrastive"
SHAPES = _SHAPES[OP]
DTYPES = ("fp32", "bf16")
DIRECTIONS = ("both",)
BASELINE = "published"

# Eager code holds about ten matrices of this many similarities.
_MAX_EAGER_SIMS = 1 << 31


def setup(shape: Contrastive, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Normalised features and scalars with gradients; for ALBEF also its teacher, ids and queue, in
    its own layout (D, K) and in ours (K, D)."""
    unit = lambda n: F.normalize(torch.randn(n, shape.dim, device=device), dim=1).to(dtype)
    image, noise = unit(shape.batch), unit(shape.batch)
    text = F.normalize(image + noise, dim=1)
    # SigLIP starts at (10, -10); CLIP and ALBEF at a temperature of 0.07.
    scale, bias = (10.0, -10.0) if shape.kind == "sigmoid" else (1 / 0.07, None)
    inputs = {
        "shape": shape,
        "image": image.requires_grad_(),
        "text": text.requires_grad_(),
        "scale": torch.tensor(scale, device=device, requires_grad=True),
    }
    if bias is not None:
        inputs["bias"] = torch.tensor(bias, device=device, requires_grad=True)
    if shape.kind == "albef":
        queues = unit(shape.num_keys), unit(shape.num_keys)
        inputs |= {
            "teacher": (unit(shape.batch), unit(shape.batch)),
            "queues": queues,
            "albef_queues": tuple(queue.T.contiguous() for queue in queues),
            "ids": torch.arange(shape.batch, device=device) // 2,
            "key_ids": torch.arange(shape.num_keys, device=device) // 4,
        }
    return inputs


def _published(inputs: Inputs) -> Tensor:
    shape = inputs["shape"]
    if shape.batch * (shape.batch + shape.num_keys) > _MAX_EAGER_SIMS:
        raise NotImplementedError("eager code does not fit this batch")
    if shape.kind == "albef":
        return _albef(inputs)
    losses = importlib.import_module("tests._peers").open_clip_losses()
    if shape.kind == "sigmoid":
        loss = losses.SigLipLoss()
        return loss(inputs["image"], inputs["text"], inputs["scale"], inputs["bias"])
    return losses.ClipLoss()(inputs["image"], inputs["text"], inputs["scale"])


def _albef(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """salesforce/ALBEF, models/model_retrieval.py, forward: ITA and the sampling of negatives."""
    image_feat, text_feat, temp = inputs["image"], inputs["text"], 1 / inputs["scale"]
    image_feat_m, text_feat_m = inputs["teacher"]
    image_queue, text_queue = inputs["albef_queues"]
    alpha, bs = 0.4, image_feat.shape[0]
    idx, idx_all = inputs["ids"].view(-1, 1), torch.cat([inputs["ids"], inputs["key_ids"]])
    pos_idx = torch.eq(idx, idx_all.view(1, -1)).float()
    sim_targets = pos_idx / pos_idx.sum(1, keepdim=True)
    with torch.no_grad():
        image_feat_all = torch.cat([image_feat_m.t(), image_queue.clone().detach()], dim=1)
        text_feat_all = torch.cat([text_feat_m.t(), text_queue.clone().detach()], dim=1)
        sim_i2t_m = image_feat_m @ text_feat_all / temp
        sim_t2i_m = text_feat_m @ image_feat_all / temp
        sim_i2t_targets = alpha * F.softmax(sim_i2t_m, dim=1) + (1 - alpha) * sim_targets
        sim_t2i_targets = alpha * F.softmax(sim_t2i_m, dim=1) + (1 - alpha) * sim_targets
    sim_i2t = image_feat @ text_feat_all / temp
    sim_t2i = text_feat @ image_feat_all / temp
    loss_i2t = -torch.sum(F.log_softmax(sim_i2t, dim=1) * sim_i2t_targets, dim=1).mean()
    loss_t2i = -torch.sum(F.log_softmax(sim_t2i, dim=1) * sim_t2i_targets, dim=1).mean()
    with torch.no_grad():
        weights_i2t = F.softmax(sim_i2t[:, :bs] + 1e-4, dim=1)
        weights_t2i = F.softmax(sim_t2i[:, :bs] + 1e-4, dim=1)
        mask = torch.eq(idx, idx.T)
        weights_i2t.masked_fill_(mask, 0)
        weights_t2i.masked_fill_(mask, 0)
        hard_image = [torch.multinomial(weights_t2i[b], 1).item() for b in range(bs)]
        hard_text = [torch.multinomial(weights_i2t[b], 1).item() for b in range(bs)]
    return (loss_i2t + loss_t2i) / 2, torch.tensor(hard_image), torch.tensor(hard_text)


def _own(name: str) -> Run:
    contrastive_loss = importlib.import_module("vlpfast.ops.contrastive").contrastive_loss

    def run(inputs: Inputs) -> object:
        shape = inputs["shape"]
        num_sims = shape.batch * (shape.batch + shape.num_keys)
        if name == "reference" and num_sims > _MAX_EAGER_SIMS:
            raise NotImplementedError("eager code does not fit this batch")
        options = {}
        if shape.kind == "albef":
            options = {
                "ids": inputs["ids"],
                "image_keys": inputs["queues"][0],
                "text_keys": inputs["queues"][1],
                "key_ids": inputs["key_ids"],
                "teacher": inputs["teacher"],
                "alpha": 0.4,
                "hard_negatives": 1,
                "seed": 0,
            }
        return contrastive_loss(
            inputs["image"],
            inputs["text"],
            inputs["scale"],
            inputs.get("bias"),
            kind="sigmoid" if shape.kind == "sigmoid" else "softmax",
            impl=name,
            **options,
        ).loss

    return run


def _recompute(run: Run) -> Run:
    """`run` with no similarity kept, as in batches whose similarities do not fit."""
    chunked = importlib.import_module("vlpfast.ops._contrastive_chunked")

    def recompute(inputs: Inputs) -> object:
        if inputs["shape"].kind != "softmax":
            raise NotImplementedError("keeps no similarities anyway, or those of a few rows")
        before, chunked._KEEP_BYTES = chunked._KEEP_BYTES, {"cpu": 0, "cuda": 0}
        try:
            return run(inputs)
        finally:
            chunked._KEEP_BYTES = before

    return recompute


class _Unit(torch.autograd.Function):
    @staticmethod
    def forward(ctx, image: Tensor, text: Tensor, *scalars: Tensor) -> Tensor:
        ctx.shapes = [image.shape, text.shape, *(x.shape for x in scalars)]
        return (image @ text.T)[0, 0]

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple[Tensor, ...]:
        return tuple(upstream.expand(shape) for shape in ctx.shapes)


def _gemm_unit(inputs: Inputs) -> Tensor:
    """2 B B D operations; for ALBEF 2 B (B + K) D would be the unit, which is not measured."""
    if inputs["shape"].kind == "albef":
        raise NotImplementedError("its products are with the queue")
    scalars = [inputs[name] for name in ("scale", "bias") if name in inputs]
    return _Unit.apply(inputs["image"], inputs["text"], *scalars)


def _torch_compile() -> Run:
    compiled = torch.compile(_published)

    def run(inputs: Inputs) -> object:
        if inputs["shape"].kind == "albef":
            raise NotImplementedError("its negatives are drawn on the host")
        return compiled(inputs)

    return run


def _siglip_kernel(inputs: Inputs) -> Tensor:
    """siglip-kernel 0.1.2, its own choice of backend; it takes the temperature's logarithm."""
    if inputs["shape"].kind != "sigmoid":
        raise NotImplementedError("sigmoid only")
    loss = importlib.import_module("siglip_kernel").fused_siglip_loss
    return loss(inputs["image"], inputs["text"], inputs["scale"].log(), inputs["bias"])


def impls(device: torch.device) -> dict[str, Run]:
    """Ours, then the peers; those that need a GPU only on one."""
    op = importlib.import_module("vlpfast.ops.contrastive")._OP
    runs = {name: _own(name) for name in own_impls(op, device)}
    for name in ("cpp", "triton"):
        if name in runs:
            runs[f"{name}_recompute"] = _recompute(runs[name])
    runs |= {"published": _published, "gemm_unit": _gemm_unit}
    if device.type == "cuda":
        runs |= {"torch_compile": _torch_compile(), "siglip_kernel": _siglip_kernel}
    return runs


def bytes(shape: Contrastive, dtype: torch.dtype, direction: str) -> int:
    """Features, teacher and queues read once, both towers' gradients written once."""
    per_tower = 2 if shape.kind != "albef" else 3
    return 2 * (per_tower * shape.batch + shape.num_keys) * shape.dim * dtype.itemsize


def flops(shape: Contrastive, direction: str) -> int:
    """Three products: similarities and two gradients; ALBEF's directions share nothing, and each
    has the teacher's similarities and one gradient."""
    if shape.kind == "albef":
        return 2 * 3 * 2 * shape.batch * (shape.batch + shape.num_keys) * shape.dim
    return 3 * 2 * shape.batch * shape.batch * shape.dim
