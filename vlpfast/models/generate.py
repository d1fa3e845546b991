"""Writing texts about images: greedy and beam search, and sampling, over a model's `decode`.

Each step runs one token of every text: its earlier self-attention keys are kept, and the images'
keys are read by index, one copy for all beams. Nothing waits for the device but the question, every
few steps, whether all texts have ended.

Letters: K beams, R = B * K texts, L tokens at most.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vlpfast.layers.keys import KeyCache
from vlpfast.ops.reference.counter import draw, stream, uniform
from vlpfast.ragged import Ragged
from vlpfast.rules import check_rules

# Steps between the questions.
_ASK_EVERY = 4
# See `vlpfast.rules`.
_RULES = (
    "{num_beams must be >= 1}",
    "{length_penalty must be >= 0}",
    "{top_p must be in (0, 1]}",
    "{num_beams must be 1} with [seeds]",
)


@dataclass(frozen=True)
class Generated:
    """text: packed ids of B texts, start token first; the end token is last unless the text was cut
    at its bound. scores (B,): what the search ordered by.
    """

    text: Ragged
    scores: Tensor


@dataclass(frozen=True)
class SearchOptions:
    """How texts are sought.

    Attributes:
        start_id, end_id: token ids a text starts and ends with.
        max_tokens, min_tokens: bounds of a text's length, start and end token included.
        num_beams: 1 is greedy.
        length_penalty: p >= 0 of the score, sum of log-probabilities / (tokens written ** p).
        banned: ids that are never written (padding, masks).
        allowed: (low, high): but for the end token, only ids from low up to high - 1 are written,
            as a box is of location tokens alone. Scores stay those of the whole vocabulary.
        seeds: one for each image: its text is drawn, not searched, and is a function of its seed
            whatever the batch, but for a draw that rounding of the logits moves.
        top_p: in (0, 1], a token is drawn of the fewest most probable ones that hold at least it.
        cached: keep keys; else each step computes all tokens again (for tests).
    """

    start_id: int
    end_id: int
    max_tokens: int
    min_tokens: int = 2
    num_beams: int = 1
    length_penalty: float = 1.0
    banned: tuple[int, ...] = ()
    allowed: tuple[int, int] = (0, 2**62)
    seeds: tuple[int, ...] = ()
    top_p: float = 1.0
    cached: bool = True

    def __post_init__(self) -> None:
        check_rules(self, _RULES)
        if not 2 <= self.min_tokens <= self.max_tokens:
            raise ValueError(
                "min_tokens and max_tokens must be 2 <= min_tokens <= max_tokens, got "
                f"{self.min_tokens} and {self.max_tokens}"
            )
        if not 0 <= self.allowed[0] < self.allowed[1]:
            raise ValueError(f"allowed must be 0 <= low < high, got {self.allowed}")
        if self.end_id in self.banned:
            raise ValueError(f"banned must not hold end_id {self.end_id}")
        if self.top_p < 1 and not self.seeds:
            raise ValueError(f"top_p {self.top_p} needs seeds, one for each image, got none")


@torch.no_grad()
def generate(
    model: nn.Module,
    keys: object,
    num_images: int,
    options: SearchOptions,
    prompt: Ragged | None = None,
) -> Generated:
    """One text for each image.

    Args:
        model: in eval mode, with `decode` and `next_token_logits`.
        keys: `model.image_keys` of the images.
        num_images: B.
        options: of the search.
        prompt: packed token ids of B prompts, as `VLPModel.decode` takes them.

    Source: beam search as Wu et al. 2016, section 7, arXiv:1609.08144, with the score of
        transformers' `length_penalty`; a search ends where no live beam can pass the ended ones.
        Nucleus sampling as Holtzman et al. 2020, section 3.1, arXiv:1904.09751.
    """
    if options.seeds and len(options.seeds) != num_images:
        raise ValueError(
            f"seeds must be one for each of {num_images} images, got {len(options.seeds)}"
        )
    search = _one_text if options.num_beams == 1 else _beams
    return search(_Writer(model, keys, num_images, options, prompt), options)


class _Writer:
    """log p of the next token of B * K texts; text b * K + k reads image b."""

    def __init__(
        self,
        model: nn.Module,
        keys: object,
        size: int,
        options: SearchOptions,
        prompt: Ragged | None,
    ) -> None:
        self.model, self.keys, self.options, self.size = model, keys, options, size
        rows, device = size * options.num_beams, model.device
        self.kv_index = torch.arange(size, device=device).repeat_interleave(options.num_beams)
        self.prompted = {} if prompt is None else {"prompt": prompt.select(self.kv_index)}
        self.cache, self.written = None, 0
        if options.cached:
            self.cache = KeyCache(rows, options.max_tokens)
        self.banned = torch.tensor(options.banned, dtype=torch.int64, device=device)
        self.start = torch.full((rows, options.max_tokens), options.end_id, device=device)
        self.start[:, 0] = options.start_id

    def log_p(self, tokens: Tensor) -> Tensor:
        """(R, V) from the texts so far (R, n); with a cache all but the last token are in it."""
        fresh = tokens[:, self.written :]
        text = Ragged.from_dense(fresh)
        states = self.model.decode(
            text, self.keys, self.kv_index, cache=self.cache, **self.prompted
        )
        if self.cache is not None:
            self.cache.advance(fresh.shape[1])
            self.written = tokens.shape[1]
        log_p = self.model.next_token_logits(states.values[text.last()]).log_softmax(-1)
        log_p = log_p.index_fill(1, self.banned, -torch.inf)
        (low, high), ended = self.options.allowed, log_p[:, self.options.end_id].clone()
        log_p[:, :low] = log_p[:, high:] = -torch.inf
        log_p[:, self.options.end_id] = ended
        if tokens.shape[1] + 1 < self.options.min_tokens:
            log_p[:, self.options.end_id] = -torch.inf
        return log_p

    def follow(self, rows: Tensor) -> None:
        """Text r goes on from what was text `rows[r]` (R,)."""
        if self.cache is not None:
            self.cache.select(rows)


def nucleus_draw(log_p: Tensor, top_p: float, aim: Tensor) -> Tensor:
    """One token of each row of log_p (R, V), -inf where none may be: (R,) int64.

    Of p = softmax(log_p), sorted from the most probable (ties by id), the fewest tokens whose sum
    is at least `top_p` share the unit interval by their p; the token where aim (R,) in [0, 1) falls
    is drawn. Computed in fp64.
    """
    p, order = log_p.softmax(-1, dtype=torch.float64).sort(stable=True, dim=-1, descending=True)
    ends = p.cumsum(-1)
    # Tokens of no probability are no part of the nucleus, though rounding leaves ends below 1.
    kept = ((ends - p < top_p) & (p > 0)).sum(-1, keepdim=True).clamp(min=1)
    aim = aim.double()[:, None] * ends.gather(1, kept - 1)
    place = torch.minimum((ends <= aim).sum(-1, keepdim=True), kept - 1)
    return order.gather(1, place)[:, 0]


def _uniforms(options: SearchOptions, device: torch.device) -> Tensor:
    """(B, L) of [0, 1): token t of the text with seed s is drawn at place t of the stream s."""
    keys = stream(0, torch.tensor(options.seeds, device=device))
    return uniform(draw(keys[:, None], torch.arange(options.max_tokens, device=device)))


def _one_text(writer: _Writer, options: SearchOptions) -> Generated:
    tokens = writer.start
    uniforms = _uniforms(options, tokens.device) if options.seeds else None
    ended = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
    lens, total = torch.ones_like(tokens[:, 0]), torch.zeros_like(tokens[:, 0], dtype=torch.float32)
    for length in range(1, options.max_tokens):
        if length % _ASK_EVERY == 0 and bool(ended.all()):
            break
        log_p = writer.log_p(tokens[:, :length])
        if uniforms is None:
            best, word = log_p.max(-1)
        else:
            word = nucleus_draw(log_p, options.top_p, uniforms[:, length])
            best = log_p.gather(1, word[:, None])[:, 0]
        tokens[:, length] = torch.where(ended, options.end_id, word)
        total = torch.where(ended, total, total + best)
        lens += ~ended
        ended = ended | (word == options.end_id)
    scores = total / (lens - 1).to(total) ** options.length_penalty
    return Generated(Ragged.from_padded(tokens, lens), scores)


def _beams(writer: _Writer, options: SearchOptions) -> Generated:
    beams, size = options.num_beams, writer.size
    tokens = writer.start.unflatten(0, (size, beams))
    first_row = torch.arange(size, device=tokens.device)[:, None] * beams
    # All beams start alike: only the first is live.
    live = torch.zeros(tokens.shape[:2], device=tokens.device)
    live[:, 1:] = -torch.inf
    done = _Ended(tokens, options)
    for length in range(1, options.max_tokens):
        if length % _ASK_EVERY == 0 and bool(done.surpass(live)):
            break
        log_p = writer.log_p(tokens[:, :, :length].flatten(0, 1)).unflatten(0, (size, beams))
        # Of 2K candidates at most K end, one of each beam.
        total, place = (live[:, :, None] + log_p).flatten(1).topk(2 * beams)
        parent, word = place // log_p.shape[-1], place % log_p.shape[-1]
        ends = word == options.end_id
        grown = _rows(tokens, parent)
        grown[:, :, length] = word
        done.add(grown, total.masked_fill(~ends, -torch.inf), length + 1)
        live, chosen = total.masked_fill(ends, -torch.inf).topk(beams)
        tokens = _rows(grown, chosen)
        writer.follow((first_row + parent.gather(1, chosen)).flatten())
    done.add(tokens, live, options.max_tokens)
    best = done.scores.argmax(1, keepdim=True)
    lens = done.lens.gather(1, best)[:, 0]
    return Generated(
        Ragged.from_padded(_rows(done.tokens, best)[:, 0], lens),
        done.scores.gather(1, best)[:, 0],
    )


class _Ended:
    """The K best texts of each image that have ended."""

    def __init__(self, tokens: Tensor, options: SearchOptions) -> None:
        self.tokens, self.lens = tokens, torch.ones_like(tokens[:, :, 0])
        self.scores = torch.full(tokens.shape[:2], -torch.inf, device=tokens.device)
        self.options = options

    def add(self, tokens: Tensor, total: Tensor, length: int) -> None:
        """Texts (B, n, L) of `length` tokens with sums of log-probabilities `total` (B, n)."""
        scores = torch.cat([self.scores, total / (length - 1) ** self.options.length_penalty], 1)
        lens = torch.cat([self.lens, torch.full_like(tokens[:, :, 0], length)], 1)
        self.scores, kept = scores.topk(self.options.num_beams)
        self.lens = lens.gather(1, kept)
        self.tokens = _rows(torch.cat([self.tokens, tokens], 1), kept)

    def surpass(self, live: Tensor) -> Tensor:
        """Whether no live text can pass them: sums only fall, and count most when longest."""
        bound = live.amax(1) / (self.options.max_tokens - 1) ** self.options.length_penalty
        return (self.scores.amin(1) >= bound).all()


def _rows(tokens: Tensor, rows: Tensor) -> Tensor:
    """tokens (B, n, L) and rows (B, m) -> (B, m, L)."""
    return tokens.gather(1, rows[:, :, None].expand(-1, -1, tokens.shape[2]))
