"""ALBEF's pre-training step in plain eager PyTorch, in the order of its published code.

It is what the step benchmark compares with and what the parity test holds `PretrainStep` against,
so it shares no code with the library: text is padded, keys and values are projected in every layer
of every pass, the fusion layers run once for matched pairs, once for the negatives (whose image
tokens are copied) and once for masked text, every position meets the vocabulary, and target
matrices over the whole queue are formed. `eager_weights` gives it a `VLPModel`'s weights.

Three deviations from the published code: the teacher runs without dropout, candidates of the queue
are those pushed so far instead of a random start, and pairs of one image are positives of each
other (as in the authors' model_retrieval.py).

Source: Li et al. 2021 (ALBEF), arXiv:2107.07651; salesforce/ALBEF models/model_pretrain.py,
models/xbert.py, models/vit.py.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlpfast.models.config import ModelConfig, StackConfig


@dataclass(frozen=True)
class EagerBatch:
    """What ALBEF's loader and its `mask` give: images (B, 3, S, S) normalised; ids, masked_ids and
    labels (B, L) int64 padded to one length, valid (B, L) True on tokens; image_ids (B,) int64.
    """

    images: Tensor
    ids: Tensor
    valid: Tensor
    masked_ids: Tensor
    labels: Tensor
    image_ids: Tensor


class Attention(nn.Module):
    """Attention written out, scores and all. Vision projects q, k, v by one linear map (vit.py),
    text by three (xbert.py); `sdpa` hands the middle to torch's fused operator.
    """

    def __init__(self, dim: int, heads: int, dropout: float, *, joint: bool, source_dim: int = 0):
        super().__init__()
        self.heads, self.dropout, self.sdpa = heads, dropout, False
        if joint:
            self.qkv = nn.Linear(dim, 3 * dim)
        else:
            self.query = nn.Linear(dim, dim)
            self.key, self.value = (nn.Linear(source_dim or dim, dim) for _ in range(2))
        self.joint, self.dense = joint, nn.Linear(dim, dim)

    def forward(self, x: Tensor, source: Tensor | None = None, mask: Tensor | None = None):
        source = x if source is None else source
        parts = (
            self.qkv(x).chunk(3, -1)
            if self.joint
            else (self.query(x), self.key(source), self.value(source))
        )
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        dropout = self.dropout if self.training else 0.0
        if self.sdpa:
            mask = None if mask is None else mask.to(q.dtype)
            mixed = F.scaled_dot_product_attention(q, k, v, mask, dropout_p=dropout)
        else:
            scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
            scores = scores if mask is None else scores + mask
            mixed = F.dropout(F.softmax(scores, dim=-1), dropout) @ v
        return self.dense(mixed.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """A transformer layer; BERT normalises after each residual sum, ViT before each branch."""

    def __init__(self, config: StackConfig, *, joint: bool, image_dim: int = 0) -> None:
        super().__init__()
        dim, hidden = config.dim, int(config.dim * config.mlp_ratio)
        shape = (dim, config.heads, config.attention_dropout)
        self.post, self.dropout = config.norm == "post", nn.Dropout(config.dropout)
        self.attention = Attention(*shape, joint=joint)
        self.norm1, self.norm2 = (nn.LayerNorm(dim, config.norm_eps) for _ in range(2))
        if image_dim:
            self.cross = Attention(*shape, joint=False, source_dim=image_dim)
            self.norm_cross = nn.LayerNorm(dim, config.norm_eps)
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor, mask: Tensor | None = None, image: Tensor | None = None) -> Tensor:
        x = self._add(x, self.norm1, lambda y: self.attention(y, mask=mask))
        if image is not None:
            x = self._add(x, self.norm_cross, lambda y: self.cross(y, image))
        return self._add(x, self.norm2, lambda y: self.fc2(F.gelu(self.fc1(y))))

    def _add(self, x: Tensor, norm: nn.LayerNorm, branch) -> Tensor:
        if self.post:
            return norm(x + self.dropout(branch(x)))
        return x + self.dropout(branch(norm(x)))


def _final_norm(config: StackConfig) -> nn.Module:
    return nn.LayerNorm(config.dim, config.norm_eps) if config.norm == "pre" else nn.Identity()


class Vision(nn.Module):
    """vit.py: a convolution over normalised images, class token, positions, layers."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        vision = config.vision
        size = vision.patch_size
        self.patch = nn.Conv2d(3, vision.dim, size, size)
        self.class_token = nn.Parameter(torch.zeros(vision.dim))
        self.position = nn.Parameter(torch.zeros(1 + config.num_patches, vision.dim))
        self.layers = nn.ModuleList(Layer(vision, joint=True) for _ in range(vision.depth))
        self.norm = _final_norm(vision)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token.expand(len(x), 1, -1), x], dim=1) + self.position
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


class Bert(nn.Module):
    """xbert.py: embeddings, text layers, fusion layers, prediction head with tied vocabulary."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        text, fusion = config.text, config.fusion
        self.word = nn.Embedding(text.vocab_size, text.dim)
        self.position = nn.Embedding(text.context_length, text.dim)
        self.token_type = nn.Embedding(text.token_types, text.dim)
        self.embed_norm, self.dropout = (
            nn.LayerNorm(text.dim, text.norm_eps),
            nn.Dropout(text.dropout),
        )
        self.text_layers = nn.ModuleList(Layer(text, joint=False) for _ in range(text.depth))
        self.text_norm = _final_norm(text)
        self.fusion_layers = nn.ModuleList(
            Layer(fusion, joint=False, image_dim=config.vision.dim) for _ in range(fusion.depth)
        )
        self.fusion_norm = _final_norm(fusion)
        self.head_dense = nn.Linear(text.dim, text.dim)
        self.head_norm = nn.LayerNorm(text.dim, text.norm_eps)
        self.head_bias = nn.Parameter(torch.zeros(text.vocab_size))

    def encode(self, ids: Tensor, valid: Tensor) -> Tensor:
        """mode="text"."""
        places = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        x = self.word(ids) + self.position(places) + self.token_type(torch.zeros_like(ids))
        x, mask = self.dropout(self.embed_norm(x)), _additive(valid)
        for layer in self.text_layers:
            x = layer(x, mask)
        return self.text_norm(x)

    def fuse(self, x: Tensor, valid: Tensor, image: Tensor) -> Tensor:
        """mode="fusion": text row r reads image row r."""
        mask = _additive(valid)
        for layer in self.fusion_layers:
            x = layer(x, mask, image)
        return self.fusion_norm(x)

    def token_logits(self, ids: Tensor, valid: Tensor, image: Tensor) -> Tensor:
        """BertForMaskedLM: vocabulary logits of every position."""
        x = self.fuse(self.encode(ids, valid), valid, image)
        x = self.head_norm(F.gelu(self.head_dense(x)))
        return F.linear(x, self.word.weight, self.head_bias)


def _additive(valid: Tensor) -> Tensor:
    return (1.0 - valid[:, None, None].float()) * -10000.0


class Towers(nn.Module):
    """All that has a momentum copy, and the matching head."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.vision, self.bert = Vision(config), Bert(config)
        self.vision_proj = nn.Linear(config.vision.dim, config.embed_dim)
        self.text_proj = nn.Linear(config.text.dim, config.embed_dim)
        self.itm_head = nn.Linear(config.fusion.dim, 2)
        self.temp = nn.Parameter(torch.tensor(0.07))

    def image_features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (B, N, D) and features (B, E)."""
        tokens = self.vision(images)
        return tokens, F.normalize(self.vision_proj(tokens[:, 0]), dim=-1)

    def text_features(self, ids: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (B, L, D) and features (B, E)."""
        tokens = self.bert.encode(ids, valid)
        return tokens, F.normalize(self.text_proj(tokens[:, 0]), dim=-1)


class AlbefEager(nn.Module):
    """model_pretrain.py's ALBEF: student, teacher, queue.

    Args:
        config: of preset "albef".
        momentum: decay of the teacher's weights.
        queue_size: candidates kept; 0 has none.
        sdpa: attention by torch's fused operator instead of written out.
    """

    def __init__(
        self, config: ModelConfig, *, momentum: float, queue_size: int, sdpa: bool = False
    ) -> None:
        super().__init__()
        self.student, self.momentum, self.queue_size = Towers(config), momentum, queue_size
        self.teacher = copy.deepcopy(self.student).requires_grad_(False).eval()
        for module in self.modules():
            if isinstance(module, Attention):
                module.sdpa = sdpa
        self.register_buffer("image_queue", torch.zeros(config.embed_dim, queue_size))
        self.register_buffer("text_queue", torch.zeros(config.embed_dim, queue_size))
        self.register_buffer("id_queue", torch.zeros(queue_size, dtype=torch.int64))
        self.pushed = 0

    def train(self, mode: bool = True) -> AlbefEager:
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(
        self,
        batch: EagerBatch,
        alpha: float,
        negatives: tuple[Tensor, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Losses "itc", "itm", "mlm", each a mean.

        Args:
            alpha: weight of the teacher's targets.
            negatives: for each image a text and for each text an image, (B,) int64; None draws
                them.
        """
        model, size = self.student, len(batch.ids)
        with torch.no_grad():
            model.temp.clamp_(0.001, 0.5)
        image_embeds, image_feat = model.image_features(batch.images)
        text_embeds, text_feat = model.text_features(batch.ids, batch.valid)
        with torch.no_grad():
            self.momentum_update()
            image_embeds_m, image_feat_m = self.teacher.image_features(batch.images)
            _, text_feat_m = self.teacher.text_features(batch.ids, batch.valid)
        itc, sim_i2t, sim_t2i = self._contrast(
            batch.image_ids, (image_feat, text_feat), (image_feat_m, text_feat_m), alpha
        )
        self.enqueue(image_feat_m, text_feat_m, batch.image_ids)
        hard_text, hard_image = negatives or _draw_negatives(
            sim_i2t[:, :size], sim_t2i[:, :size], batch.image_ids
        )
        itm = self._match(image_embeds, text_embeds, batch.valid, hard_text, hard_image)
        logits = model.bert.token_logits(batch.masked_ids, batch.valid, image_embeds)
        with torch.no_grad():
            logits_m = self.teacher.bert.token_logits(batch.masked_ids, batch.valid, image_embeds_m)
        return {"itc": itc, "itm": itm, "mlm": _masked(logits, logits_m, batch.labels, alpha)}

    @torch.no_grad()
    def momentum_update(self) -> None:
        """teacher = momentum * teacher + (1 - momentum) * student, one parameter at a time."""
        pairs = zip(self.student.parameters(), self.teacher.parameters(), strict=True)
        for param, param_m in pairs:
            param_m.data = param_m.data * self.momentum + param.data * (1.0 - self.momentum)

    @torch.no_grad()
    def enqueue(self, image: Tensor, text: Tensor, ids: Tensor) -> None:
        """Overwrites the oldest entries by features (B, E), (B, E) and ids (B,)."""
        if not self.queue_size:
            return
        slots = (self.pushed + torch.arange(len(ids), device=ids.device)) % self.queue_size
        self.image_queue[:, slots] = image.T.to(self.image_queue.dtype)
        self.text_queue[:, slots] = text.T.to(self.text_queue.dtype)
        self.id_queue[slots] = ids
        self.pushed += len(ids)

    def _contrast(
        self,
        ids: Tensor,
        feats: tuple[Tensor, Tensor],
        feats_m: tuple[Tensor, Tensor],
        alpha: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, and similarities of images to texts and of texts to images, (B, B + queue)."""
        temp, filled = self.student.temp, min(self.pushed, self.queue_size)
        with torch.no_grad():
            all_ids = torch.cat([ids, self.id_queue[:filled]])
            positive = torch.eq(ids[:, None], all_ids[None]).to(temp.dtype)
            positive = positive / positive.sum(1, keepdim=True)
            image_all, text_all = (
                torch.cat([feat.t(), queue[:, :filled].clone().detach()], dim=1)
                for feat, queue in zip(feats_m, (self.image_queue, self.text_queue), strict=True)
            )
            sims_m = feats_m[0] @ text_all / temp, feats_m[1] @ image_all / temp
            targets = [alpha * F.softmax(s, dim=1) + (1 - alpha) * positive for s in sims_m]
        sims = feats[0] @ text_all / temp, feats[1] @ image_all / temp
        losses = [
            -torch.sum(F.log_softmax(sim, dim=1) * target, dim=1).mean()
            for sim, target in zip(sims, targets, strict=True)
        ]
        return sum(losses) / 2, *sims

    def _match(
        self,
        image_embeds: Tensor,
        text_embeds: Tensor,
        valid: Tensor,
        hard_text: Tensor,
        hard_image: Tensor,
    ) -> Tensor:
        """Matched pairs in one call, then both kinds of negatives in another."""
        bert = self.student.bert
        matched = bert.fuse(text_embeds, valid, image_embeds)
        image_embeds_neg = torch.stack([image_embeds[i] for i in hard_image.tolist()])
        text_embeds_neg = torch.stack([text_embeds[i] for i in hard_text.tolist()])
        valid_neg = torch.stack([valid[i] for i in hard_text.tolist()])
        unmatched = bert.fuse(
            torch.cat([text_embeds, text_embeds_neg]),
            torch.cat([valid, valid_neg]),
            torch.cat([image_embeds_neg, image_embeds]),
        )
        logits = self.student.itm_head(torch.cat([matched[:, 0], unmatched[:, 0]]))
        labels = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
        labels[: len(valid)] = 1
        return F.cross_entropy(logits, labels)


@torch.no_grad()
def _draw_negatives(sim_i2t: Tensor, sim_t2i: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """A text for each image and an image for each text, one `multinomial` and `item` each."""
    same = torch.eq(ids[:, None], ids[None])
    drawn = []
    for sim in (sim_i2t, sim_t2i):
        weights = F.softmax(sim, dim=1) + 1e-4
        weights.masked_fill_(same, 0)
        rows = [torch.multinomial(row, 1).item() for row in weights]
        drawn.append(torch.tensor(rows, device=ids.device))
    return drawn[0], drawn[1]


def _masked(logits: Tensor, logits_m: Tensor, labels: Tensor, alpha: float) -> Tensor:
    """Cross-entropy with the hidden words and with the teacher's distribution over words."""
    hard = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
    soft = -torch.sum(F.log_softmax(logits, dim=-1) * F.softmax(logits_m, dim=-1), dim=-1)
    return (1 - alpha) * hard + alpha * soft[labels != -100].mean()
