"""The public operations. Each is an ordinary function with checks; `impl=` names an implementation.

`OPS` maps each operation's name to its implementations, which `vlpfast env` prints.
"""

from vlpfast.ops import attention as _attention
from vlpfast.ops import bias_gelu as _bias_gelu
from vlpfast.ops import contrastive as _contrastive
from vlpfast.ops import keep_ids as _keep_ids
from vlpfast.ops import linear_cross_entropy as _linear_cross_entropy
from vlpfast.ops import patch_embed as _patch_embed
from vlpfast.ops import residual_norm as _residual_norm
from vlpfast.ops import transport as _transport
from vlpfast.ops._dispatch import Op

_MODULES = (
    _attention,
    _bias_gelu,
    _contrastive,
    _keep_ids,
    _linear_cross_entropy,
    _patch_embed,
    _residual_norm,
    _transport,
)
OPS: dict[str, Op] = {
    op.name: op for module in _MODULES for op in vars(module).values() if isinstance(op, Op)
}

attention = _attention.attention
attention_map = _attention.attention_map
gradcam = _attention.gradcam
bias_gelu = _bias_gelu.bias_gelu
ContrastiveOutput = _contrastive.ContrastiveOutput
contrastive_loss = _contrastive.contrastive_loss
hinge_loss = _contrastive.hinge_loss
KeepIds = _keep_ids.KeepIds
keep_ids = _keep_ids.keep_ids
linear_cross_entropy = _linear_cross_entropy.linear_cross_entropy
patch_embed = _patch_embed.patch_embed
residual_norm = _residual_norm.residual_norm
TransportOutput = _transport.TransportOutput
ipot = _transport.ipot
ipot_from_cost = _transport.ipot_from_cost
sinkhorn = _transport.sinkhorn
wra_loss = _transport.wra_loss

__all__ = [
    "OPS",
    "ContrastiveOutput",
    "KeepIds",
    "TransportOutput",
    "attention",
    "attention_map",
    "bias_gelu",
    "contrastive_loss",
    "gradcam",
    "hinge_loss",
    "ipot",
    "ipot_from_cost",
    "keep_ids",
    "linear_cross_entropy",
    "patch_embed",
    "residual_norm",
    "sinkhorn",
    "wra_loss",
]
