"""DataConfig: which data a run reads and how each image and caption is drawn."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from vlpfast.data.prompts import ANSWER, LOCATED, TASKS, needs_captions

# No score of a pair is lower: similarities are cosines, matches probabilities.
LOWEST_SCORE = -1.0


@dataclass(frozen=True)
class DataConfig:
    """Data of a run.

    Attributes:
        path: folder of *.tar shards, .tar, .jsonl, .json, .csv or .tsv.
        loader: "dali", "torch" (Pillow in threads), or "auto": DALI where it is installed and
            there is a GPU, else torch. Both draw the same crops; pixels differ by rounding.
        where: "field=value" conditions on the records; several values of one field are
            alternatives.
        recaptions: folder of captions (`vlpfast data capfilt`) in the place of the data's own;
            samples that have none there are left out.
        scores: folder of the pairs' scores (`vlpfast data score`), by which samples are left out;
            empty: none are.
        min_score: of a sample that stays.
        keep_fraction: share of the samples that stay, those of the highest scores; those that tie
            with the last of them stay too.
        id_key: record field that tells which samples show the same thing; empty: each sample its
            own (or the record's `image_id`).
        image_key, caption_key: column names in a table; empty: image | filepath, captions | caption
            | title.
        index_dir: folder of the index; empty: `<path>.index`.
        verify: "header" or "decode": how each image is checked when the index is built.
        tokenizer: "train" on this data, "clip", or path of a tokenizer file (.json) or a CLIP
            vocabulary (.txt.gz).
        vocab_size: upper bound for "train".
        max_tokens: longest caption with start and end token; longer ones lose their tail.
        regions: what the model reads in place of pixels, where it reads regions: "scenes" makes
            them from the truth of generated scenes, "files" are those in `<path>.regions`
            (`data.regions`); "" is none. Crops and flips do not apply to them.
        tasks: what images are asked, each sample one of these by chance, a name that is repeated
            as often as it is: "caption", "vqa", "entailment"; "nlvr", whether a sentence holds of
            two images; "box", where an object is; "region", what is somewhere; "image", a caption
            asks for the image's codes (`data.prompts`); empty: captions without a prompt. With
            "caption" and "image" every sample must have a caption.
        answers: of how many answers, the most frequent, the text is a question's: with `tasks`, a
            sample's text is what it is asked, or its caption, and the answer is a label (LXMERT);
            0: prompts are of their own, and texts answer them. VQA v2's 3129 are those that at
            least nine questions have (`answers_at_least`).
        answers_at_least: of how many questions an answer must be the answer.
        questions: how many of its record's questions an image is asked in a step of training, each
            a text of its own (around from the first where it has fewer); more than 1 with `answers`
            and without captions among `tasks`.
        locations: location tokens in the vocabulary, bins of an image's width and height
            (Unified-IO: 1000); 0: none. `<loc17>` in a text is one of them.
        classes: class names of the images: the record field that holds one or a list of them;
            "scenes" names the objects of generated scenes, "scenes-heldout" those of held-out
            combinations; "" is none.
        captions: places of the captions that training draws from; empty: all. A sample that has
            none of these draws from all it has.
        crop_scale: area of a training crop as a share of the image; (1, 1) takes the evaluation
            crop.
        crop_ratio: width / height of a training crop before it is resized to a square.
        eval_crop: "center" square or "squash" of the whole image.
        max_aspect: longest side over shortest of images that keep their aspect ratio: the model's
            `image_size` is then the shorter side, and sides are rounded down to `size_multiple`,
            the model's patches (ViLT: 1333 / 800); 1: squares. Torch loader, no augmentation but
            crops.
        zoom_out: largest factor by which a training crop is shrunk and placed on white; 1 is off.
            For drawings on white, which fill more of the image in one source than in another.
        hflip: probability of a horizontal flip.
        color_jitter: strength s of brightness, contrast and saturation, factors in [1 - s, 1 + s].
        grayscale: probability of losing all colour.
        interpolation: resize filter, antialiased.
        window: 0 shuffles everything; else samples of a block of this many neighbours stay
            together.
        workers: loading threads; 0 takes half of this process's cores, at most 8.
        prefetch: batches made ahead of the step.
        cache_gib: memory for decoded images (torch loader); 0 decodes at each draw.
    """

    path: str
    loader: Literal["auto", "dali", "torch"] = "auto"
    where: tuple[str, ...] = ()
    recaptions: str = ""
    scores: str = ""
    min_score: float = LOWEST_SCORE
    keep_fraction: float = 1.0
    id_key: str = ""
    image_key: str = ""
    caption_key: str = ""
    index_dir: str = ""
    verify: Literal["header", "decode"] = "header"
    tokenizer: str = "train"
    vocab_size: int = 4096
    max_tokens: int = 32
    regions: Literal["", "scenes", "files"] = ""
    tasks: tuple[str, ...] = ()
    answers: int = 0
    answers_at_least: int = 1
    questions: int = 1
    locations: int = 0
    classes: str = ""
    captions: tuple[int, ...] = ()
    crop_scale: tuple[float, float] = (0.5, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    eval_crop: Literal["center", "squash"] = "center"
    max_aspect: float = 1.0
    size_multiple: int = 32
    zoom_out: float = 1.0
    hflip: float = 0.0
    color_jitter: float = 0.0
    grayscale: float = 0.0
    interpolation: Literal["bicubic", "linear"] = "bicubic"
    window: int = 0
    workers: int = 0
    prefetch: int = 4
    cache_gib: float = 0.0

    def __post_init__(self) -> None:
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise ValueError(f"crop_scale must be 0 < low <= high <= 1, got {self.crop_scale}")
        if not 0 < self.crop_ratio[0] <= self.crop_ratio[1]:
            raise ValueError(f"crop_ratio must be 0 < low <= high, got {self.crop_ratio}")
        for name in ("zoom_out", "max_aspect", "size_multiple"):
            if not getattr(self, name) >= 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        changes = self.hflip or self.color_jitter or self.grayscale or self.zoom_out > 1
        if self.max_aspect > 1 and (changes or self.loader == "dali"):
            raise ValueError(
                "max_aspect > 1 is of images of unlike sizes: hflip, color_jitter, grayscale must "
                "be 0, zoom_out 1 and loader not 'dali'"
            )
        for name in ("hflip", "grayscale", "color_jitter"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        for name, least in (
            ("workers", 0),
            ("prefetch", 1),
            ("cache_gib", 0),
            ("window", 0),
            ("answers", 0),
            ("answers_at_least", 1),
            ("questions", 1),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be >= {least}, got {getattr(self, name)}")
        if any(place < 0 for place in self.captions):
            raise ValueError(f"captions must be places >= 0, got {self.captions}")
        if self.max_tokens < 2:
            raise ValueError(f"max_tokens must be >= 2, got {self.max_tokens}")
        choices = {
            "loader": ("auto", "dali", "torch"),
            "verify": ("header", "decode"),
            "eval_crop": ("center", "squash"),
            "interpolation": ("bicubic", "linear"),
            "regions": ("", "scenes", "files"),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {known}, got {getattr(self, name)!r}")
        self._check_tasks()
        if not 0 < self.keep_fraction <= 1:
            raise ValueError(f"keep_fraction must be in (0, 1], got {self.keep_fraction}")
        if not self.scores and (self.min_score > LOWEST_SCORE or self.keep_fraction < 1):
            raise ValueError(
                "min_score and keep_fraction choose by scores: name their folder in scores"
            )
        for condition in self.where:
            if "=" not in condition:
                raise ValueError(f"where must be 'field=value', got {condition!r}")

    def _check_tasks(self) -> None:
        if unknown := set(self.tasks) - set(TASKS):
            *others, last = TASKS
            raise ValueError(f"tasks must be {', '.join(others)} or {last}, got {sorted(unknown)}")
        asking = set(self.tasks) - {"caption"}
        if self.answers and (not asking or asking - ANSWER.keys()):
            names = ", ".join(ANSWER)
            raise ValueError(f"answers needs tasks that ask ({names}), got {self.tasks}")
        if self.questions > 1 and (not self.answers or needs_captions(self.tasks)):
            raise ValueError(
                f"questions {self.questions} an image need answers > 0 and tasks that all ask, got "
                f"{self.answers} and {self.tasks}"
            )
        if self.locations < 0 or self.locations == 1:
            raise ValueError(f"locations must be 0 or >= 2, got {self.locations}")
        located = sorted(set(LOCATED) & set(self.tasks))
        if located and not self.locations:
            raise ValueError(f"tasks {located} need location tokens: set locations (1000)")
        if located and (self.hflip or self.zoom_out > 1):
            raise ValueError(
                f"tasks {located} ask for places, which hflip and zoom_out would move: they must "
                f"be 0 and 1, got {self.hflip} and {self.zoom_out}"
            )
        if located and self.max_tokens < 6:
            raise ValueError(f"max_tokens of a box must be >= 6, got {self.max_tokens}")

    def unfiltered(self) -> DataConfig:
        """The same without conditions, other captions and scores: all samples as they are."""
        changed = {"where": (), "recaptions": "", "scores": ""}
        return replace(self, **changed, min_score=LOWEST_SCORE, keep_fraction=1.0)

    @property
    def conditions(self) -> dict[str, list[str]]:
        """`where` as field -> alternatives."""
        found: dict[str, list[str]] = {}
        for condition in self.where:
            field, _, value = condition.partition("=")
            found.setdefault(field, []).append(value)
        return found
