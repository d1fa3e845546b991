"""Co-attention: two streams that read each other, layer by layer (ViLBERT, LXMERT).

Both streams change in every layer, so an image's keys hold for one layer only. What comes before
the first one is computed once per image: its own layers, and its share of the first projection.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from vlpfast.layers.block import Block, Layout, Mlp, ResidualNorm, attend
from vlpfast.layers.recompute import run
from vlpfast.models.config import FusionConfig, StackConfig
from vlpfast.models.fusion import ConcatTower
from vlpfast.models.outputs import FusedOutput
from vlpfast.ops.seed import fold_seed
from vlpfast.ragged import Ragged


class Stream(NamedTuple):
    """State of one modality: what `Block` passes on, and how its packed tokens lie."""

    branch: Tensor | None
    residual: Tensor
    layout: Layout


class Reads(NamedTuple):
    """Which image each text reads, before there is a copy of it for each text.

    tokens (T,): packed index of every token of the copies; images (R,): the image of each text;
    layout: of the copies.
    """

    tokens: Tensor
    images: Tensor
    layout: Layout


class CoSide(nn.Module):
    """What a stream brings to co-attention: projections of width `width`, and back to its own."""

    def __init__(self, config: StackConfig, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(config.dim, 3 * width)
        self.out = nn.Linear(width, config.dim)
        self.norm = ResidualNorm(config.dim, config.norm_eps, config.dropout)


class CoMlp(nn.Module):
    """The MLP of a stream between co-attention and its own block (ViLBERT)."""

    def __init__(self, config: StackConfig) -> None:
        super().__init__()
        self.mlp = Mlp(config.dim, int(config.dim * config.mlp_ratio), config.activation)
        self.norm = ResidualNorm(config.dim, config.norm_eps, config.dropout)


class CoLayer(nn.Module):
    """Each stream attends to the other, then runs a block of its own:

        text'  = text  + out_t(attention(q_t(text), k_v(image), v_v(image)))
        image' = image + out_v(attention(q_v(image), k_t(text), v_t(text)))

    then, with `co_mlp`, an MLP of each, and each one's self-attention and MLP. Both directions read
    the streams as they were. Tied: one set of weights and one norm for both directions.

    Source: Lu et al. 2019 (ViLBERT), section 3.1, arXiv:1908.02265; Tan & Bansal 2019 (LXMERT),
    section 2.2, arXiv:1908.07490.
    """

    def __init__(self, text: FusionConfig, image: StackConfig) -> None:
        super().__init__()
        self.heads, self.post_norm = image.heads, text.norm == "post"
        self.dropout = text.attention_dropout
        sides = (text,) if text.tied else (text, image)
        self.cross = nn.ModuleList(CoSide(side, image.dim) for side in sides)
        self.mlps = nn.ModuleList(CoMlp(s) for s in (text, image)) if text.co_mlp else None
        self.own = nn.ModuleList(Block(**stream.block) for stream in (text, image))

    def forward(
        self, text: Stream, image: Stream, reads: Reads | None, seed: int
    ) -> tuple[Stream, Stream]:
        """`reads`: `image` holds each image once, and the images returned are those of the rows;
        None: it holds one for each row.
        """
        streams = self._cross(text, image, reads, seed)
        out = []
        for number, stream in enumerate(streams):
            if self.mlps is not None:
                part, site = self.mlps[number], fold_seed(seed, 5 + number)
                stream = self._branch(stream, part.norm, part.mlp, site)
            state = self.own[number](*stream, seed=fold_seed(seed, 7 + number))
            out.append(Stream(*state, stream.layout))
        return tuple(out)

    def _cross(
        self, text: Stream, image: Stream, reads: Reads | None, seed: int
    ) -> tuple[Stream, Stream]:
        sides = (self.cross[0], self.cross[-1])
        seeds = [fold_seed(seed, site) for site in (1, 2)]
        (x, text), (y, image) = (
            self._enter(stream, side.norm, site)
            for stream, side, site in zip((text, image), sides, seeds, strict=True)
        )
        q, k, v = self._project(sides[0], x)
        image_q, image_k, image_v = self._project(sides[1], y)
        dropout_p = self.dropout if self.training else 0.0
        options = {"dropout_p": dropout_p, "seed": fold_seed(seed, 3)}
        options |= {} if reads is None else {"kv_index": reads.images}
        mixed = [attend(q, image_k, image_v, text.layout, image.layout, **options)]
        if reads is not None:
            image_q = image_q[reads.tokens]
            image = Stream(None, image.residual[reads.tokens], reads.layout)
        options = {"dropout_p": dropout_p, "seed": fold_seed(seed, 4)}
        mixed.append(attend(image_q, k, v, image.layout, text.layout, **options))
        return tuple(
            self._leave(stream, side.norm, side.out(part), site)
            for stream, side, part, site in zip((text, image), sides, mixed, seeds, strict=True)
        )

    def _project(self, side: CoSide, x: Tensor) -> tuple[Tensor, ...]:
        return side.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(-3)

    def _branch(self, stream: Stream, norm: ResidualNorm, run: nn.Module, seed: int) -> Stream:
        x, stream = self._enter(stream, norm, seed)
        return self._leave(stream, norm, run(x), seed)

    def _enter(self, stream: Stream, norm: ResidualNorm, seed: int) -> tuple[Tensor, Stream]:
        """What a branch reads, and the stream with nothing left to add."""
        if self.post_norm:
            return stream.residual, stream
        x, rest = stream.branch, stream.residual
        normed, residual = norm(rest, None, seed) if x is None else norm(x, rest, seed)
        return normed, stream._replace(branch=None, residual=residual)

    def _leave(self, stream: Stream, norm: ResidualNorm, out: Tensor, seed: int) -> Stream:
        """The stream with a branch's output, which a pre-norm stack adds in its next norm."""
        if self.post_norm:
            return stream._replace(residual=norm(out, stream.residual, seed)[0])
        return stream._replace(branch=out)


class CoTower(nn.Module):
    """Layers of two streams; the text's shape is the fusion stack's, the image's the vision's."""

    image_keys = ConcatTower.image_keys

    def __init__(self, text: FusionConfig, image: StackConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(CoLayer(text, image) for _ in range(text.depth))
        norms = [ResidualNorm(s.dim, s.norm_eps, s.dropout) for s in (text, image)]
        self.norms = nn.ModuleList(norms) if text.norm == "pre" else None

    def forward(self, text: Ragged, keys: Ragged, kv_index: Tensor, seed: int = 0) -> FusedOutput:
        """As `ConcatTower.forward`; images' tokens (N, D_image) have a width of their own."""
        tokens, cu_seqlens = keys.token_ids_of(kv_index)
        copies = Layout(cu_seqlens, keys.max_len)
        reads = Reads(tokens, kv_index, copies)
        streams = tuple(
            Stream(None, part.values, Layout(part.cu_seqlens, part.max_len))
            for part in (text, keys)
        )
        for number, layer in enumerate(self.layers):
            first = reads if number == 0 else None
            streams = run(layer, *streams, first, fold_seed(seed, number))
        words, places = (
            s.residual if self.norms is None else norm(s.branch, s.residual, fold_seed(seed, -1))[0]
            for s, norm in zip(streams, self.norms or (None, None), strict=True)
        )
        return FusedOutput(text.with_values(words), Ragged(places, cu_seqlens, keys.max_len))
