"""VSE++'s `ContrastiveLoss` with its own signature, on `ops.hinge_loss`."""

from __future__ import annotations

from torch import Tensor, nn

from vlpfast import ops


class ContrastiveLoss(nn.Module):
    """Hinge loss of B image-sentence pairs, summed over the batch; see `ops.hinge_loss`.

    Args:
        margin: in units of similarity. The class default is VSE++'s 0; its training default is 0.2.
        measure: "cosine", or False as in VSE++'s class default, which means the same. "order"
            (order embeddings) is not offered: it is no function of one matrix product, which the
            op is built on.
        max_violation: the hardest negative of each query (VSE++) or the sum over all (VSE0).

    Raises:
        NotImplementedError: measure="order".

    Source: Faghri et al. 2018 (VSE++), eq. 4 and 6, arXiv:1707.05612; model.py of fartashf/vsepp.
    """

    def __init__(
        self, margin: float = 0, measure: str | bool = False, max_violation: bool = False
    ) -> None:
        super().__init__()
        if measure == "order":
            raise NotImplementedError(
                "measure='order' (order embeddings) is no function of the matrix product of the "
                "embeddings, which ops.hinge_loss is built on; keep VSE++'s own class for it"
            )
        if measure not in (False, None, "cosine"):
            raise ValueError(f"measure must be False or 'cosine', got {measure!r}")
        self.margin, self.max_violation = margin, max_violation

    def forward(self, im: Tensor, s: Tensor, ids: Tensor | None = None) -> Tensor:
        """The loss of images `im` (B, D) and sentences `s` (B, D), which VSE++ normalises before.

        Args:
            im (B, D): image embeddings.
            s (B, D): sentence embeddings, row b belongs to image b.
            ids (B,): integers; pairs with equal ids are no negatives of each other (VSE++ has no
                such argument and counts a second caption of an image as a negative).

        Returns:
            scalar, fp32 (fp64 for fp64 inputs).
        """
        return ops.hinge_loss(im, s, margin=self.margin, hardest=self.max_violation, ids=ids)
