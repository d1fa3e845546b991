"""Which objectives are trained, with what weight, and their settings."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from vlpfast.objectives.table import OBJECTIVES
from vlpfast.ops.seed import fold_seed
from vlpfast.rules import check_rules

# See `vlpfast.rules`.
_RULES = (
    *(f"{{{name} must be >= 0}}" for name in (*OBJECTIVES, "hinge_margin", "hinge_sum_steps")),
    "{mrm_probability must be in (0, 1]}",
    "{mim_probability must be in (0, 1]}",
    "{mtm_probability must be in (0, 1]}",
    "{momentum must be in [0, 1)}",
    "[itm] with [itm_negatives 'hard' or 'hard-global'] draws its negatives from itc's "
    "similarities: set {itc > 0} or objectives.itm_negatives 'random'",
    "[wra] aligns the pairs of random matching: set {itm > 0} and {itm_negatives 'random'}",
    "objectives.mim, mvm and mpp hide patches ([hides_patches]), which a tokenizer in training "
    "must see: one after the other, {vqkd 0} and {kmeans 0}",
    "{qa_targets must be 'one' or 'scores'}",
    "[mlm_causal] is how objectives.mlm reads texts, without a teacher: set {mlm > 0} and "
    "{momentum 0}",
    "the candidates of [queue_size] need a teacher: set {momentum > 0}",
    "targets weighted by [alpha] need a teacher: set {momentum > 0}",
)


@dataclass(frozen=True)
class ObjectivesConfig:
    """Weights of the losses (0: off) and their settings.

    Attributes:
        itc: image-text contrast.
        sigmoid: image-text contrast pair by pair (SigLIP).
        hinge: triplets with a margin, summed over the batch (VSE++); `hinge_margin` in units of
            cosine. `hinge_hardest` counts the hardest negative of each query, else all (VSE0);
            also in the first `hinge_sum_steps` all count: from random weights the hardest alone
            draw all embeddings to one point.
        itm: image-text matching. `itm_negatives` "hard": one hard negative image and one hard
            negative text per pair, of the rank's; "hard-global": of the pairs of all ranks (BLIP's
            retrieval, VLMo); "random": half of the pairs get another image of the batch.
        mlm: masked language modelling on the text that reads its image; with `mlm_causal` a word
            sees earlier words only, and an image no words (BEiT-3's captioning).
        mtm: masked text modelling: the same on texts alone, `mtm_probability` of whose tokens are
            masked, by the one stack of both modalities (VLMo's second stage, BEiT-3) or by the text
            tower (FLAVA).
        lm: each next token of a caption, by the decoder that reads the image; `lm_label_smoothing`
            of its targets.
        wra: word-region alignment of the pairs that random matching sees, by optimal transport;
            `wra_tokens` "all" as UNITER, "inner" as ViLT (`objectives.regions.aligned_masks`).
        mrfr, mrc, mrckl: hidden regions' features, classes, and class distributions.
            `mrm_probability` is the share of regions hidden, `mrm_reduction` what features and
            distributions are averaged over (`objectives.regions`).
        mra: regions' attributes by confidence, as `mrc` with `mrc_weighted` (LXMERT).
        qa: which of the data's answers answers the question that the text is, where it is one and
            the image is its own (`data.answers`); of a question about two images alone.
        qa_targets: "one" answer (LXMERT), or the "scores" of all that people gave (fine-tuning for
            VQA).
        mrfr_loss: "mse" (UNITER) or "smooth_l1" (LXMERT).
        mrc_weighted: each region's class counts by the detector's confidence in it (LXMERT), with
            `mrm_reduction` "code" also of regions that are not hidden.
        masking: "apart" shows hidden regions with the whole text and masked words with all regions,
            and matches clean pairs: rows of their own each (UNITER's conditional masking).
            "together" has one row of each pair, with masked words, hidden regions and the image
            that matching shows: one pass for all objectives (LXMERT, ViLBERT).
        mim: masked image modelling: a frozen tokenizer's codes of hidden patches (BEiT);
            `mim_probability` is the share of patches hidden, with `mim_mask` "blocks" in
            rectangles; "even" hides as many as a number that is uniform from 1 to all says, any
            patches (X-LXMERT).
        mvm: masked vision modelling: the same where the image's text can be seen (BEiT-3).
        mpp: masked patch prediction: the mean colour of hidden patches, each channel one of 256
            values, from the image with its text where one stack reads both (ViLT), else alone.
        vqkd: a tokenizer's own training: a frozen teacher's features of each patch from its code;
            `commitment` weighs the distance of vectors from their codes.
        kmeans: k-means centres of the features of a CNN's cells, beside another objective, from
            which alone the CNN learns.
        guide: run folder of the frozen model that gives these targets: of mim and mvm a tokenizer's
            (preset "vqkd" or "kmeans"), of vqkd one's with as many patches.
        classify: which of the data's class names an image's class is, by similarity to the names
            (Uni-Perceiver).
        mix: ((objective, ratio), ...) of all that are enabled: each step trains one, drawn by the
            ratios (WRA goes with ITM); empty trains all in every step.
        label_smoothing: of the targets of `itc` and `classify`.
        mlm_probability: share of tokens masked; `mlm_whole_word` masks whole words.
        momentum: decay of the teacher's weights per step; 0 trains without a teacher.
        queue_size: momentum embeddings kept as further contrastive candidates; needs a teacher.
        alpha: weight of the teacher's soft targets in ITC and MLM, reached linearly over
            `alpha_ramp_steps`.
    """

    itc: float = 1.0
    itm: float = 0.0
    mlm: float = 0.0
    sigmoid: float = 0.0
    hinge: float = 0.0
    hinge_margin: float = 0.2
    hinge_hardest: bool = True
    hinge_sum_steps: int = 0
    wra: float = 0.0
    mrfr: float = 0.0
    mrc: float = 0.0
    mrckl: float = 0.0
    mra: float = 0.0
    qa: float = 0.0
    qa_targets: Literal["one", "scores"] = "one"
    mtm: float = 0.0
    mtm_probability: float = 0.15
    mlm_causal: bool = False
    lm: float = 0.0
    lm_label_smoothing: float = 0.0
    mim: float = 0.0
    mvm: float = 0.0
    mpp: float = 0.0
    vqkd: float = 0.0
    kmeans: float = 0.0
    mim_mask: Literal["blocks", "even"] = "blocks"
    mim_probability: float = 75 / 196
    commitment: float = 1.0
    guide: str = ""
    classify: float = 0.0
    itm_negatives: Literal["hard", "hard-global", "random"] = "hard"
    wra_tokens: Literal["all", "inner"] = "all"
    mrm_probability: float = 0.15
    mrm_reduction: Literal["paper", "code"] = "code"
    mrfr_loss: Literal["mse", "smooth_l1"] = "mse"
    mrc_weighted: bool = False
    masking: Literal["apart", "together"] = "apart"
    mix: tuple[tuple[str, float], ...] = ()
    label_smoothing: float = 0.0
    mlm_probability: float = 0.15
    mlm_whole_word: bool = False
    momentum: float = 0.0
    queue_size: int = 0
    alpha: float = 0.0
    alpha_ramp_steps: int = 0

    def __post_init__(self) -> None:
        check_rules(self, _RULES, "objectives.")
        if not self.weights:
            raise ValueError(f"objectives: at least one of {', '.join(OBJECTIVES)} must be > 0")
        if self.kmeans and (self.mix or self.weights.keys() == {"kmeans"}):
            raise ValueError(
                "objectives.kmeans has no gradient: train another objective beside it in every "
                "step, and freeze the CNN (train.freeze) where its features are to stay"
            )
        together = {name for name, objective in OBJECTIVES.items() if objective.together}
        others = sorted(self.weights.keys() - together)
        if self.masking == "together" and (others or self.momentum):
            raise ValueError(
                f"objectives.masking 'together' is one row of each pair, for {sorted(together)}; "
                f"{', '.join(others) or 'a teacher (objectives.momentum)'} needs 'apart'"
            )
        mixed = {name for name, _ in self.mix}
        if self.mix and mixed != self.weights.keys() - {"wra"}:
            raise ValueError(
                "objectives.mix must name the enabled objectives (not wra, which goes with itm) "
                f"{sorted(self.weights.keys() - {'wra'})}, got {sorted(mixed)}"
            )
        if any(ratio <= 0 for _, ratio in self.mix):
            raise ValueError(f"objectives.mix must have ratios > 0, got {self.mix}")
        if self.momentum and not (self.itc or self.mlm):
            raise ValueError("objectives.momentum: only itc and mlm learn from a teacher")

    @property
    def weights(self) -> dict[str, float]:
        """Weight of each enabled objective."""
        return {name: w for name in OBJECTIVES if (w := getattr(self, name)) > 0}

    @property
    def mixes_pairs(self) -> bool:
        """Whether matching shows other images of the batch, drawn at random."""
        return bool(self.itm) and self.itm_negatives == "random"

    @property
    def masks_regions(self) -> bool:
        """Whether an objective predicts hidden regions."""
        return any(OBJECTIVES[name].hides == "regions" for name in self.weights)

    @property
    def hides_patches(self) -> bool:
        """Whether an objective predicts something of hidden patches."""
        return any(OBJECTIVES[name].hides == "patches" for name in self.weights)

    def at(self, step: int, seed: int) -> ObjectivesConfig:
        """What optimizer step `step` trains: all, or the one of `mix` that (seed, step) draw."""
        if not self.mix:
            return self
        place = fold_seed(seed, step) / 2**63 * sum(ratio for _, ratio in self.mix)
        for name, ratio in self.mix:
            chosen, place = name, place - ratio
            if place < 0:
                break
        kept = {chosen, "wra"} if chosen == "itm" else {chosen}
        return replace(self, mix=(), **{n: 0.0 for n in OBJECTIVES if n not in kept})

    def alpha_at(self, step: int) -> float:
        """Weight of the teacher's targets at optimizer step `step` (ALBEF ramps it over the first
        epoch).
        """
        return (
            self.alpha * min(1.0, step / self.alpha_ramp_steps)
            if self.alpha_ramp_steps
            else self.alpha
        )
