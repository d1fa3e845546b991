"""Named real workloads. A benchmark takes its shapes from here by name and never types one.

Letters: B batch, P patches, K kept patches, D embedding, H heads, E head dim, M queries, N keys, T
text tokens, R regions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class Shape:
    """A workload.

    Attributes:
        name: what rows, tables and `--shape` call it.
        gpu_only: too large to be a fair use of a CPU's time; skipped there unless asked for by
            name.
    """

    name: str
    gpu_only: bool


@dataclass(frozen=True)
class KeepIds(Shape):
    """Random kept patches: `num_keep` of `num_patches`, for each of `batch` images."""

    batch: int
    num_patches: int
    num_keep: int


@dataclass(frozen=True)
class PatchEmbed(Shape):
    """uint8 images (B, S, S, 3) to tokens (B, K, D); K = P where nothing is dropped."""

    batch: int
    image_size: int
    patch_size: int
    num_keep: int
    dim: int


@dataclass(frozen=True)
class Contrastive(Shape):
    """Image and text (B, D), with `kind` "softmax" or "sigmoid"; "albef" is softmax with a teacher,
    ids, hard negatives and `num_keys` further keys from a queue on each side.
    """

    kind: str
    batch: int
    dim: int
    num_keys: int


@dataclass(frozen=True)
class LinearCrossEntropy(Shape):
    """Hidden states (T, D) against a vocabulary (V, D); `num_kept` rows have a target, and a
    momentum teacher of the same size adds soft ones where `distilled`."""

    num_tokens: int
    num_kept: int
    vocab: int
    dim: int
    distilled: bool


@dataclass(frozen=True)
class Transport(Shape):
    """Text (B, T, D) aligned with image regions (B, R, D) by `iters` steps; with `varied`, texts
    and images of different lengths, padded to T and R."""

    batch: int
    text_len: int
    num_regions: int
    dim: int
    iters: int
    varied: bool


@dataclass(frozen=True)
class Attention(Shape):
    """`batch` sequences of captions' lengths, padded to `num_queries`, or of exactly `num_queries`
    tokens, in `heads` of `head_dim`.

    kind: "dense" (no padding), "text" (captions), "causal" (captions, each token sees those before
    it) or "cross": captions, `readers` of which read one of batch / readers images of `num_keys`
    tokens, keys and values projected on the way.
    """

    kind: str
    batch: int
    num_queries: int
    num_keys: int
    heads: int
    head_dim: int
    readers: int


@dataclass(frozen=True)
class ResidualNorm(Shape):
    """x (T, D), after dropout, added to its residual and normalised."""

    num_tokens: int
    dim: int
    dropout_p: float


@dataclass(frozen=True)
class BiasGelu(Shape):
    """Hidden layer of an MLP (T, D), dropout after its activation."""

    num_tokens: int
    dim: int
    dropout_p: float


@dataclass(frozen=True)
class ClipStep(Shape):
    """A contrastive training step of preset "clip" in `size` with square patches of `patch_size`
    pixels on `batch` pairs; `patch_dropout` is the share of patches dropped.
    """

    size: str
    batch: int
    patch_size: int
    patch_dropout: float


@dataclass(frozen=True)
class AlbefStep(Shape):
    """A pre-training step of preset "albef" in `size` on `batch` pairs, with a full queue."""

    size: str
    batch: int
    queue_size: int


@dataclass(frozen=True)
class Rerank(Shape):
    """For each of `num_images` images of `image_size` pixels, `num_candidates` of `num_texts` texts
    through the fusion layers of preset "albef" in `size`.
    """

    size: str
    image_size: int
    num_images: int
    num_texts: int
    num_candidates: int


def _named(*shapes: Shape) -> Mapping[str, Shape]:
    named = {shape.name: shape for shape in shapes}
    if len(named) != len(shapes):
        raise ValueError("two shapes of one op have the same name")
    return MappingProxyType(named)


_WRA = (
    Transport("wra-256x32x196", False, 256, 32, 196, 768, 50, False),
    Transport("wra-256x32x196-varied", False, 256, 32, 196, 768, 50, True),
    Transport("uniter-96x60x36", False, 96, 60, 36, 768, 50, True),
    Transport("vilt-64x40x200", False, 64, 40, 200, 768, 50, True),
    Transport("wra-1024x64x577", True, 1024, 64, 577, 768, 50, False),
)


# Of each op the first shape is its headline: the one in the README table.
SHAPES: Mapping[str, Mapping[str, Shape]] = MappingProxyType(
    {
        # FLIP drops half or three quarters of a ViT's patches (Li et al. 2023, table 1); MAE keeps
        # a quarter.
        "keep_ids": _named(
            KeepIds("flip-b16-b256-keep98", False, 256, 196, 98),
            KeepIds("flip-l14-b1024-keep64", False, 1024, 256, 64),
            KeepIds("flip-l14-b1024-keep128", False, 1024, 256, 128),
            KeepIds("mae-l16-b4096-keep49", False, 4096, 196, 49),
        ),
        "patch_embed": _named(
            PatchEmbed("flip-b16-b32-keep98", False, 32, 224, 16, 98, 768),
            PatchEmbed("flip-b16-b32-keep49", False, 32, 224, 16, 49, 768),
            PatchEmbed("vit-b16-b256", False, 256, 224, 16, 196, 768),
            PatchEmbed("flip-b16-b256-keep98", False, 256, 224, 16, 98, 768),
            PatchEmbed("flip-l14-b1024-keep64", True, 1024, 224, 14, 64, 1024),
            PatchEmbed("albef-b16-384-b32", False, 32, 384, 16, 576, 768),
        ),
        # CLIP B/16 (D 512) and L/14 (D 768) at local and published global batches, SigLIP at the
        # same; the queues of ALBEF (65,536 keys) and BLIP (57,600).
        "contrastive": _named(
            Contrastive("clip-b16-b4096", False, "softmax", 4096, 512, 0),
            Contrastive("siglip-b16-b4096", False, "sigmoid", 4096, 512, 0),
            Contrastive("albef-b64-queue65536", False, "albef", 64, 256, 65536),
            Contrastive("clip-b16-b512", False, "softmax", 512, 512, 0),
            Contrastive("clip-b16-b1024", True, "softmax", 1024, 512, 0),
            Contrastive("clip-b16-b8192", True, "softmax", 8192, 512, 0),
            Contrastive("clip-b16-b16384", True, "softmax", 16384, 512, 0),
            Contrastive("clip-b16-b32768", True, "softmax", 32768, 512, 0),
            Contrastive("clip-l14-b32768", True, "softmax", 32768, 768, 0),
            Contrastive("clip-l14-b65536", True, "softmax", 65536, 768, 0),
            Contrastive("clip-l14-b131072", True, "softmax", 131072, 768, 0),
            Contrastive("siglip-b16-b16384", True, "sigmoid", 16384, 768, 0),
            Contrastive("siglip-b16-b32768", True, "sigmoid", 32768, 768, 0),
            Contrastive("siglip-b16-b65536", True, "sigmoid", 65536, 768, 0),
            Contrastive("siglip-b16-b131072", True, "sigmoid", 131072, 768, 0),
            Contrastive("albef-b512-queue65536", True, "albef", 512, 256, 65536),
            Contrastive("blip-b64-queue57600", True, "albef", 64, 256, 57600),
        ),
        # BERT's vocabulary under 15 % masking of 30, 40 and 70 tokens a text, with ALBEF's teacher;
        # BLIP's captions of 35 tokens and CoCa's of 76 over 64,000 words; the head of an 8B Llama.
        "linear_cross_entropy": _named(
            LinearCrossEntropy("mlm-1024x30522x768", False, 1024, 154, 30522, 768, False),
            LinearCrossEntropy("albef-mlm-1024x30522x768", False, 1024, 154, 30522, 768, True),
            LinearCrossEntropy("blip-caption-560x30522x768", False, 560, 560, 30522, 768, False),
            LinearCrossEntropy("albef-mlm-64x30", True, 1920, 288, 30522, 768, True),
            LinearCrossEntropy("mlm-256x40", True, 10240, 1536, 30522, 768, False),
            LinearCrossEntropy("mlm-512x70", True, 35840, 5376, 30522, 768, False),
            LinearCrossEntropy("albef-mlm-512x70", True, 35840, 5376, 30522, 768, True),
            LinearCrossEntropy("blip-caption-64x35", True, 2240, 2240, 30522, 768, False),
            LinearCrossEntropy("coca-caption-64x76", True, 4864, 4864, 64000, 768, False),
            LinearCrossEntropy("clip-caption-256x76", True, 19456, 19456, 49408, 768, False),
            LinearCrossEntropy("llama-4096x128256x4096", True, 4096, 4096, 128256, 4096, False),
        ),
        # ViLT aligns up to 40 words with patches; UNITER up to 60 words with 36 detector regions.
        "transport": _named(*_WRA),
        "transport_cost": _named(*_WRA),
        "transport_sinkhorn": _named(*_WRA[:2]),
        "attention": _named(
            Attention("albef-cross-257x30", False, "cross", 128, 30, 257, 12, 64, 4),
            Attention("albef-text-30", False, "text", 128, 30, 30, 12, 64, 1),
            Attention("vit-b16-b16", False, "dense", 16, 197, 197, 12, 64, 1),
            Attention("clip-text-77", False, "causal", 128, 77, 77, 8, 64, 1),
            Attention("albef-cross-577x30-b256", True, "cross", 1024, 30, 577, 12, 64, 4),
            Attention("vit-l14-b256", True, "dense", 256, 257, 257, 16, 64, 1),
        ),
        # ALBEF's text and fusion layers drop a tenth (256 texts of 30 tokens); its ViT drops none.
        "residual_norm": _named(
            ResidualNorm("albef-text-b256", False, 256 * 30, 768, 0.1),
            ResidualNorm("vit-b16-b256", False, 256 * 197, 768, 0.0),
            ResidualNorm("vit-l14-b256", True, 256 * 257, 1024, 0.0),
        ),
        # UNITER's and LXMERT's heads and some MLPs drop after the activation; BERT's blocks do not.
        "bias_gelu": _named(
            BiasGelu("bert-text-b256", False, 256 * 30, 4 * 768, 0.0),
            BiasGelu("bert-text-b256-dropout", False, 256 * 30, 4 * 768, 0.1),
            BiasGelu("vit-l14-b256", True, 256 * 257, 4 * 1024, 0.0),
        ),
        # Whole steps. On a CPU a batch that takes seconds; on a GPU the published batch per device
        # (CLIP 32768 on 256, FLIP 65536 on 64, ALBEF 512 on 8).
        "step_clip": _named(
            ClipStep("clip-b32-b16", False, "base", 16, 32, 0.0),
            ClipStep("clip-b32-b128", True, "base", 128, 32, 0.0),
            ClipStep("clip-b16-b128", True, "base", 128, 16, 0.0),
        ),
        "step_flip": _named(
            ClipStep("flip-b16-b8-drop75", False, "base", 8, 16, 0.75),
            ClipStep("flip-b16-b8-drop50", False, "base", 8, 16, 0.5),
            ClipStep("flip-b16-b256-drop75", True, "base", 256, 16, 0.75),
            ClipStep("flip-b16-b256-drop50", True, "base", 256, 16, 0.5),
        ),
        "step_albef": _named(
            AlbefStep("albef-small-b32", False, "small", 32, 65536),
            AlbefStep("albef-base-b4", False, "base", 4, 65536),
            AlbefStep("albef-base-b64", True, "base", 64, 65536),
        ),
        # ALBEF's evaluation at 384 px; the published shortlists are 128 (Flickr30K) and 256 (COCO).
        "step_rerank": _named(
            Rerank("albef-base-384-2x16", False, "base", 384, 2, 64, 16),
            Rerank("albef-small-128-16x64", False, "small", 128, 16, 256, 64),
            Rerank("albef-base-384-16x256", True, "base", 384, 16, 1024, 256),
        ),
    }
)


def samples_per_s(op: str, name: str, ms: float) -> float | None:
    """Image-text pairs a second of a training step of `ms`; None for any other workload."""
    shape = SHAPES.get(op, {}).get(name)
    return 1e3 * shape.batch / ms if isinstance(shape, (ClipStep, AlbefStep)) else None


def select(op: str, names: Sequence[str], device_type: str) -> list[Shape]:
    """The shapes of `op` called `names`, or all that suit the device if no name is given.

    Raises:
        ValueError: the op or a name is unknown.
    """
    if op not in SHAPES:
        raise ValueError(f"unknown op {op!r}: expected one of {', '.join(SHAPES)}")
    known = SHAPES[op]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"{op} has no shape {unknown[0]!r}: expected one of {', '.join(known)}")
    if names:
        return [known[name] for name in names]
    return [shape for shape in known.values() if device_type == "cuda" or not shape.gpu_only]
