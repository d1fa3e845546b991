"""Losses on words."""

from __future__ import annotations

import torch
from torch import Tensor

from vlpfast.models.vlp import VLPModel
from vlpfast.objectives.passes import Loss, Passes, teacher_fused
from vlpfast.objectives.table import Rows
from vlpfast.ops.linear_cross_entropy import linear_cross_entropy
from vlpfast.ops.seed import fold_seed
from vlpfast.ragged import Ragged


def mlm(passes: Passes) -> Loss:
    """Masked language modelling: cross-entropy at masked positions only, mixed with the teacher's
    distribution there.
    """
    labels, distillation = passes.batch.mlm_labels, {}
    masked = (labels != -100).nonzero().squeeze(1)
    if passes.teacher is not None and passes.alpha > 0:
        with torch.no_grad():
            hidden = teacher_fused(passes).values[masked]
            distillation = {
                "teacher": passes.teacher.model.token_head_inputs(hidden),
                "alpha": passes.alpha,
            }
    hidden = _fused_words(passes, Rows.MASKED, masked)
    return _word_loss(passes, hidden, labels[masked], **distillation)


def mtm(passes: Passes) -> Loss:
    """Masked text modelling: the same on texts alone, by the stack that reads them alone."""
    labels = passes.batch.alone_labels
    masked = (labels != -100).nonzero().squeeze(1)
    if passes.model.config.one_stack:
        hidden = _fused_words(passes, Rows.MASKED_TEXT_ALONE, masked)
    else:
        tokens, before = passes.student.text.tokens, passes.plan.texts.index("masked_alone")
        start = tokens.cu_seqlens[before * len(passes.batch)]
        hidden = passes.model.text_states(tokens.values[start + masked])
    return _word_loss(passes, hidden, labels[masked])


def _fused_words(passes: Passes, rows: Rows, places: Tensor) -> Tensor:
    """Fused tokens (n, D) at `places` (n,) of the texts of `rows`."""
    fused = passes.fused.text
    start = fused.cu_seqlens[passes.plan.first_sequence(rows, len(passes.batch))]
    return fused.values[start + places]


def _word_loss(passes: Passes, hidden: Tensor, target: Tensor, **options) -> Loss:
    """Cross-entropy of what states (n, D) predict with the ids `target` (n,)."""
    hidden, weight, bias = passes.model.token_head_inputs(hidden)
    loss = linear_cross_entropy(hidden, weight, target, bias, reduction="sum", **options)
    return loss, torch.tensor(target.shape[0], device=loss.device)


def lm(passes: Passes) -> Loss:
    """Each caption's next tokens, from its start token to its end token, by the decoder on the
    caption's image; the text tower's pass is the one that the contrast has. Images that are drawn
    are written from their prompts alone.
    """
    size, text, drawn = len(passes.batch), passes.batch.text, passes.batch.drawn
    own = torch.arange(size, device=text.values.device)
    tokens, keys, shown = passes.student.text.tokens, passes.student.keys, own
    if drawn is not None:
        keys = Ragged.cat([keys, Ragged.empty(keys.values)])
        shown = own.index_fill(0, drawn, size)
    states = passes.model.decode(
        text,
        keys,
        shown,
        prompt=passes.batch.prompt,
        tokens=tokens if len(tokens) == size else tokens.select(own),
        seed=fold_seed(passes.seed, 5),
    )
    return next_token_loss(passes.model, states, text, passes.config.lm_label_smoothing)


def next_token_loss(
    model: VLPModel, states: Ragged, text: Ragged, label_smoothing: float = 0.0
) -> Loss:
    """-log p(token t + 1 | states t), all but the last of each sequence, as (sum, count).

    Args:
        model: with `lm_head_inputs`.
        states: packed (T, D), of `VLPModel.decode`.
        text: packed ids (T,) of the same sequences; -100 where a token is not to be predicted.
        label_smoothing: of the targets.
    """
    seen = states.but_last()
    target = text.values[seen + 1]
    hidden, weight, bias = model.lm_head_inputs(states.values[seen])
    loss = linear_cross_entropy(
        hidden,
        weight,
        target,
        bias,
        label_smoothing=label_smoothing,
        reduction="sum",
        max_rows=target.shape[0],
    )
    return loss, (target != -100).sum()
