"""VLPModel: every system of the field is a configuration of it.

It holds no loss and knows no data set.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from vlpfast.images import Images
from vlpfast.layers.block import Block
from vlpfast.layers.experts import ExpertBlock
from vlpfast.layers.keys import KeyCache
from vlpfast.models.co import CoLayer, CoTower
from vlpfast.models.config import ModelConfig, TextConfig
from vlpfast.models.encoders import CnnTower, GruTower
from vlpfast.models.experts import ExpertTower
from vlpfast.models.fusion import (
    ClassTower,
    ConcatTower,
    FusionTower,
    ImageKeys,
    share_text,
    tied_decoder,
)
from vlpfast.models.generate import Generated, SearchOptions, generate
from vlpfast.models.heads import Heads, unit
from vlpfast.models.outputs import FusedOutput, ImageOutput, TextOutput
from vlpfast.models.prefix import PrefixTower, decode_in_sequence
from vlpfast.models.presets import preset_config
from vlpfast.models.seq2seq import Seq2SeqTower, SourceKeys, decode_after_source, read_source
from vlpfast.models.shared import Kind, SharedTower
from vlpfast.models.stack import init_tower
from vlpfast.models.towers import TextTower, VisionTower
from vlpfast.ops.seed import fold_seed
from vlpfast.ragged import Ragged
from vlpfast.regions import Regions


class VLPModel(Heads):
    """Vision tower, text tower, optional fusion tower, poolers and heads.

    Args:
        config: see `ModelConfig`; build one by `preset_config` or use `create_model`.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        vision, text, fusion = config.vision, config.text, config.fusion
        self.vision = (CnnTower if vision.front == "cnn" else VisionTower)(vision, config)
        self.text = _text_tower(text, bare=fusion.class_token)
        self.fusion = _fusion_tower(config)
        self.decoder = None
        if fusion.shares_text:
            share_text(self.fusion, self.text)
            if config.decoder:
                self.decoder = tied_decoder(self.fusion, fusion, vision.dim)
        self.make_heads()
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draws fresh weights from torch's default generator; see `init_tower`."""
        for tower, stack in ((self.vision, self.config.vision), (self.text, self.config.text)):
            if isinstance(tower, CnnTower | GruTower):
                tower.init_weights()
            elif tower is not None:
                init_tower(tower, stack)
        for tower in (self.fusion, self.decoder):
            if tower is not None:
                init_tower(tower, self.config.fusion)
        self.init_heads()

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether each block keeps its inputs alone in training and runs again in the backward: of
        a stack's memory one block's activations remain, for about a third more time.

        Dropout is a function of seeds, so losses and gradients are the same to the bit.
        """
        for module in self.modules():
            if isinstance(module, Block | ExpertBlock | CoLayer):
                module.recomputes = enable

    @property
    def has_fusion(self) -> bool:
        """Whether image and text meet in a fusion tower that reads both ways."""
        return "a fusion tower" in self.config.parts

    @property
    def has_joint_space(self) -> bool:
        """Whether images and texts are embedded where they can be compared."""
        return self.config.embed_dim > 0

    @property
    def _packs_images(self) -> bool:
        config = self.config
        plain = config.fusion.kind == "concat" and not config.fusion.relative_bias
        return plain and config.fusion.depth > 0 and not self.has_joint_space

    @property
    def device(self) -> torch.device:
        """Where the parameters lie."""
        return next(self.parameters()).device

    def encode_image(
        self,
        images: Tensor | Images | Regions,
        keep_ids: Tensor | None = None,
        *,
        seed: int = 0,
        hidden: Tensor | None = None,
        num_embedded: int | None = None,
        with_tokens: bool = True,
    ) -> ImageOutput:
        """Image tower and its projection; where one stack serves both modalities, that stack on
        images alone is the tower, and the tokens are what enters it.

        Args:
            images (B, S, S, 3): uint8, S = config.image_size; or images of unlike sizes, where
                fusion has text and patches in one sequence (ViLT); or what a detector saw in B
                images, where `config.vision.front` is "regions".
            keep_ids (B, K): int64 ascending ids of the patches to embed; None keeps all.
            seed: keys dropout in training.
            hidden (B, P): bool, the patches for which the mask token stands; of all patches, so
                without `keep_ids`.
            num_embedded: of how many images, the first ones, an embedding is wanted; None: all.
            with_tokens: whether tokens are wanted beside the embedding. Without them the tower's
                last block runs for the class token alone, where that is what is pooled, and the
                output's `tokens` may be None.
        """
        side, wants_regions = self.config.image_size, self.config.vision.front == "regions"
        if isinstance(images, Regions) != wants_regions:
            raise TypeError(
                f"preset {self.config.preset!r} reads {'regions' if wants_regions else 'pixels'}, "
                f"got {type(images).__name__}"
            )
        if isinstance(images, Images):
            if self.config.vision.front != "patches" or not self._packs_images:
                raise ValueError(
                    f"preset {self.config.preset!r} reads images of one size; of unlike sizes read "
                    "patches that share a sequence with the text, without a joint space: 'vilt'"
                )
        elif not wants_regions and images.shape[1:] != (side, side, 3):
            raise ValueError(f"images must be (B, {side}, {side}, 3), got {tuple(images.shape)}")
        elif not wants_regions and images.dtype != torch.uint8:
            raise TypeError(
                "images must be uint8 in 0..255 (the model normalises them), got "
                f"{str(images.dtype).removeprefix('torch.')}"
            )
        class_head = None
        if hidden is None:
            options = self._pooled_only(self.vision, with_tokens or num_embedded == 0)
            tokens = self.vision(images, keep_ids, seed, **options)
        else:
            if not self.config.hides_patches:
                self._need("a code head")
            tokens, class_head = self.vision.masked(images, hidden, seed)
        if not self.has_joint_space or num_embedded == 0:
            return ImageOutput(tokens, None, class_head)
        embedded = tokens[:num_embedded] if isinstance(tokens, Tensor) else tokens
        if self.config.shared:
            return ImageOutput(tokens, self.fusion.encode_image(embedded, fold_seed(seed, 1)))
        if self.config.one_stack:
            packed = self.fusion.image_keys(embedded)
            own, joint = self._embed_alone(packed, "image", seed)
            return ImageOutput(tokens, own, joint_embedding=joint)
        # Pooling comes before a norm only where it takes the class token.
        pooled = self.image_states(self.vision.pool(embedded))
        if self.config.vision.unit_features:
            pooled = unit(pooled).to(pooled.dtype)
        embedding = unit(self.image_projection(pooled))
        return ImageOutput(tokens if with_tokens else None, embedding, class_head)

    def encode_text(
        self,
        text: Ragged,
        *,
        seed: int = 0,
        num_embedded: int | None = None,
        with_tokens: bool = True,
    ) -> TextOutput:
        """Text tower and its projection; where one stack serves both modalities as `encode_image`.

        Args:
            text: packs int64 token ids with their start and end tokens.
            seed: keys dropout in training.
            num_embedded: of how many texts, the first ones, an embedding is wanted; None: all.
            with_tokens: as `encode_image`.
        """
        self._need("a text tower")
        config, fused = self.config, None
        embeds = self.has_joint_space and num_embedded != 0
        if config.fusion.shares_text:
            # Fusion's blocks are the tower's and read what the tower reads.
            fused = self._embedded(text, config.text.task_ids[1])
            if not embeds:
                return TextOutput(fused, None)
        options = self._pooled_only(self.text, fused is None and (with_tokens or not embeds))
        tokens = self.text(text, seed, **options)
        if fused is None:
            fused = tokens.without_last() if config.text.pool == "appended" else tokens
        if not embeds:
            return TextOutput(fused, None)
        if num_embedded is not None and num_embedded < len(tokens):
            tokens = tokens.select(torch.arange(num_embedded, device=tokens.values.device))
        if config.shared:
            return TextOutput(fused, self.fusion.encode_text(tokens, fold_seed(seed, 1)))
        if config.one_stack:
            return TextOutput(fused, *self._embed_alone(tokens, "text", seed))
        places = tokens.first() if config.text.pool == "first" else tokens.last()
        embedding = unit(self.text_projection(self.text_states(tokens.values[places])))
        return TextOutput(fused if with_tokens else None, embedding)

    def _pooled_only(self, tower: nn.Module, wants_tokens: bool) -> dict[str, bool]:
        """Options of a tower whose tokens nothing reads but its pooling."""
        apart = self.has_joint_space and not (self.config.shared or self.config.one_stack)
        can = apart and isinstance(tower, VisionTower | TextTower)
        return {"pooled_only": True} if can and not wants_tokens else {}

    def image_states(self, tokens: Tensor) -> Tensor:
        """What the image tower makes of images (B, N, D), from `encode_image`'s tokens: themselves,
        or normalised where fusion reads them before the last norm (any (..., D) then), or where one
        stack serves both modalities its states on images alone.
        """
        if self.config.fusion.class_token:
            return self.vision.norm.plain(tokens)
        if not self.config.one_stack:
            return tokens
        alone = self.fusion.alone(self.fusion.image_keys(tokens), "image")
        return alone.values.unflatten(0, tokens.shape[:2])

    def text_states(self, tokens: Tensor) -> Tensor:
        """What the text tower makes of texts, any (..., D) of `encode_text`'s tokens: as
        `image_states`, of a model with a stack of its own for texts.
        """
        return self.text.norm.plain(tokens) if self.config.fusion.class_token else tokens

    def _embed_alone(
        self, part: Ragged, modality: Literal["text", "image"], seed: int
    ) -> tuple[Tensor, Tensor | None]:
        """Embeddings (R, E) of the first states of the stack on one modality alone; the second is
        None where there are no joint heads.
        """
        project = self.text_projection if modality == "text" else self.image_projection
        seed, first = fold_seed(seed, 1), part.first()
        if self.joint_heads is None:
            return unit(project(self.fusion.alone(part, modality, seed).values[first])), None
        own, joint = self.fusion.alone_twice(part, modality, seed)
        head = getattr(self.joint_heads, modality)
        return unit(project(own.values[first])), unit(head(joint.values[first]))

    def image_keys(self, image_tokens: Tensor | Ragged) -> ImageKeys | Ragged:
        """What `fuse` reads of images (B, N, D) or packed, once for any number of texts: keys and
        values of all fusion layers by one GEMM, or ("concat") the packed tokens.
        """
        if self.fusion is None:
            self._need("a fusion tower")
        return self.fusion.image_keys(image_tokens)

    def fuse(
        self, text_tokens: Ragged, keys: ImageKeys | Ragged, kv_index: Tensor, *, seed: int = 0
    ) -> Ragged:
        """Text row r of `text_tokens` reads image `kv_index[r]` (int64) of `keys` -> packed fused
        tokens (T, D).
        """
        return self.fuse_pairs(text_tokens, keys, kv_index, seed=seed, images=False).text

    def fuse_pairs(
        self,
        text_tokens: Ragged,
        keys: ImageKeys | Ragged,
        kv_index: Tensor,
        *,
        seed: int = 0,
        text_blocks: Tensor | None = None,
        images: bool = True,
    ) -> FusedOutput:
        """`fuse` with the fused image tokens too, unless `images` says that they are not wanted;
        `text_blocks` as `ConcatTower.forward`, where one stack serves both modalities.
        """
        if self.fusion is None:
            self._need("a fusion tower")
        options: dict[str, Tensor | bool] = {}
        if text_blocks is not None:
            self._need("one stack for both")
            options["text_blocks"] = text_blocks
        if not images and self.config.fusion.experts != "shared":
            options["images"] = False
        return self.fusion(text_tokens, keys, kv_index, seed, **options)

    def decode(
        self,
        text: Ragged,
        keys: ImageKeys | Ragged | SourceKeys,
        kv_index: Tensor,
        *,
        prompt: Ragged | None = None,
        tokens: Ragged | None = None,
        cache: KeyCache | None = None,
        seed: int = 0,
    ) -> Ragged:
        """Packed states (T, D), each of which predicts the token after its own: it has seen the
        text up to itself, and its image.

        Args:
            text: packed token ids of R texts, or with a `cache` what follows the tokens in it.
            keys: `image_keys` of the images, or what `read` makes of them.
            kv_index (R,): int64, the image each text reads, or the source.
            prompt: packed token ids of R texts that come before; all that follow see them whole,
                and they see themselves both ways (MetaLM, PaLI; not where fusion is "cross").
            tokens: `encode_text(text).tokens` where it has run already and is what the decoder
                reads (CoCa).
            cache: keys of the tokens so far, of R texts; the caller advances it.
            seed: keys dropout in training.
        """
        self._need("a text decoder")
        if (kind := self.config.fusion.kind) != "cross":
            decode = decode_after_source if kind == "seq2seq" else decode_in_sequence
            return decode(self.text, self.fusion, text, keys, kv_index, prompt, tokens, cache, seed)
        if prompt is not None:
            raise ValueError(f"preset {self.config.preset!r} writes captions: it takes no prompt")
        if self.decoder is not None:
            start = 0 if cache is None else cache.length
            tokens = self._embedded(text, self.config.text.task_ids[0], start)
            return self.decoder(tokens, keys, kv_index, seed, cache).text
        if cache is not None:
            tokens = self.text(text, seed, cache)
        elif tokens is None:
            tokens = self.encode_text(text, seed=seed).tokens
        return self.fusion(tokens, keys, kv_index, seed, cache).text

    def read(
        self, keys: Ragged | None, kv_index: Tensor, prompt: Ragged | None, *, seed: int = 0
    ) -> SourceKeys:
        """Encodes image `kv_index[r]` of `image_keys` with prompt r (packed ids; None: alone), once
        for any number of texts: what `decode` reads as its `keys` (PaLI). Without `keys`, prompt r
        alone.
        """
        self._need("a prompt encoder")
        return read_source(self.text, self.fusion, keys, kv_index, prompt, seed)

    def generate(
        self,
        images: Tensor | Regions | None,
        *,
        start_id: int,
        end_id: int,
        max_tokens: int,
        prompt: Ragged | None = None,
        **options,
    ) -> Generated:
        """A text about each of the images, without a gradient; arguments as
        `generate.SearchOptions`, and `prompt`, packed ids of what each image is asked, where the
        model takes prompts. The model should be in eval mode.

        Of a vocabulary with image codes, words alone are written unless `allowed` says other ids.
        Without `images` each prompt alone is answered, by a model that has an encoder for it: with
        `allowed` the codes, (vocab_size, num_ids) of `config.text`, an image is written.

        Example: `model.generate(images, start_id=1, end_id=2, max_tokens=32, num_beams=3).text`.
        """
        banned = (*options.pop("banned", ()), *self.config.text.task_ids)
        options.setdefault("allowed", (0, self.config.text.vocab_size))
        search = SearchOptions(start_id, end_id, max_tokens, banned=banned, **options)
        self._need("a text decoder")
        if max_tokens > self.config.text.context_length:
            raise ValueError(
                f"max_tokens must be <= text.context_length {self.config.text.context_length}, "
                f"got {max_tokens}"
            )
        if images is None and prompt is None:
            raise ValueError("generate: neither images nor a prompt")
        size = len(prompt if images is None else images)
        with torch.no_grad():
            keys = None
            if images is not None:
                keys = self.image_keys(self.encode_image(images).tokens)
            if images is None or self.config.fusion.kind == "seq2seq":
                own = torch.arange(size, device=self.device)
                keys, prompt = self.read(keys, own, prompt), None
            return generate(self, keys, size, search, prompt)

    def encode_words(self) -> Tensor:
        """Features (V, E) of the vocabulary's words, each a text of its own (Uni-Perceiver)."""
        words = torch.arange(self.config.text.vocab_size, device=self.device)
        # The first of the two is a start token, whichever it is.
        text = Ragged.from_dense(torch.stack([words.new_zeros(len(words)), words], 1))
        return self.fusion.encode_text(self.text(text), kind=Kind.WORD)

    def _embedded(self, text: Ragged, task_id: int, start: int = 0) -> Ragged:
        """Embedded tokens of `text`, whose sequences go on at position `start`; at position 0
        stands the task token.
        """
        if start == 0:
            text = text.with_values(text.values.index_fill(0, text.first(), task_id))
        return text.with_values(self.text.embedding(text, start))


def _text_tower(config: TextConfig, bare: bool) -> TextTower | GruTower | None:
    if config.kind == "none":
        return None
    return GruTower(config) if config.kind == "gru" else TextTower(config, bare)


def _fusion_tower(model: ModelConfig) -> FusionTower | ConcatTower | CoTower | None:
    config = model.fusion
    if not config.depth:
        return None
    if config.kind == "shared":
        return SharedTower(config, model.embed_dim)
    if config.experts != "shared":
        return ExpertTower(config, model)
    if config.kind == "co":
        return CoTower(config, model.vision)
    if config.kind == "seq2seq":
        return Seq2SeqTower(config, model.vision)
    if config.kind == "prefix":
        return PrefixTower(config, model.vision.dim)
    if config.class_token:
        return ClassTower(config, model.vision.dim, model.text.dim)
    return ConcatTower(config) if config.kind == "concat" else FusionTower(config, model.vision.dim)


def create_model(preset: str, size: str = "tiny", **overrides) -> VLPModel:
    """A freshly initialised model; arguments as `preset_config`.

    Example: `create_model("albef", size="tiny", vocab_size=4096, image_size=64)`.
    """
    return VLPModel(preset_config(preset, size, **overrides))
