"""Captions to token ids: a byte-level BPE trained on the data, or CLIP's from its file."""

from __future__ import annotations

import functools
import gzip
import hashlib
import html
import unicodedata
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers

PAD, START, END, MASK = "[PAD]", "[CLS]", "[SEP]", "[MASK]"
_CLIP_START, _CLIP_END = "<|startoftext|>", "<|endoftext|>"
_CLIP_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_CLIP_MERGES = 49152 - 256 - 2


class Tokenizer:
    """Token ids with a start and an end token; made by `train`, `clip` or `load`.

    Attributes:
        vocab_size: number of token ids.
        pad_id, start_id, end_id: special ids.
        mask_id: id of the mask token; None for CLIP's vocabulary, which has none.
        special_ids: all special ids, ascending.
        locations: ids of the location tokens; empty where there are none.
        sha256: hash of the whole definition.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend
        # A caption that spells "[MASK]" is text, not the mask token.
        backend.encode_special_tokens = True
        start = backend.token_to_id(START)
        self.is_clip = start is None
        self.start_id = backend.token_to_id(_CLIP_START) if self.is_clip else start
        self.end_id = backend.token_to_id(_CLIP_END if self.is_clip else END)
        if self.start_id is None or self.end_id is None:
            raise ValueError(
                f"tokenizer has neither {START} and {END} nor {_CLIP_START} and {_CLIP_END}"
            )
        self.pad_id = 0 if self.is_clip else backend.token_to_id(PAD)
        self.mask_id = backend.token_to_id(MASK)
        self.vocab_size = backend.get_vocab_size()
        special = {self.start_id, self.end_id}
        if not self.is_clip:
            special |= {self.pad_id, self.mask_id}
        self.special_ids = tuple(sorted(special))
        first = backend.token_to_id("<loc0>")
        self.locations = range(0) if first is None else range(first, self.vocab_size)

    @classmethod
    def train(cls, captions: Iterable[str], vocab_size: int) -> Tokenizer:
        """Byte-level BPE over NFKC lower-case text, specials [PAD] [CLS] [SEP] [MASK] = 0..3.

        The same captions in the same order give the same ids. `vocab_size` is an upper bound, at
        least 260.
        """
        if vocab_size < 260:
            raise ValueError(
                f"vocab_size must be >= 260 (4 specials + 256 bytes), got {vocab_size}"
            )
        backend = tokenizers.Tokenizer(models.BPE())
        backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            special_tokens=[PAD, START, END, MASK],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        backend.train_from_iterator(captions, trainer)
        return cls(backend)

    @classmethod
    def clip(cls, vocab_file: str | Path) -> Tokenizer:
        """CLIP's lower-case BPE (49,408 ids) from its merges file, `bpe_simple_vocab_16e6.txt.gz`.

        Ids equal open_clip's SimpleTokenizer, except on mis-decoded text ("Ã©"), which ftfy repairs
        there.
        Source: Radford et al. 2021 (CLIP), section 2.4, arXiv:2103.00020.
        """
        vocab_file = Path(vocab_file)
        if not vocab_file.exists():
            raise ValueError(f"{vocab_file}: no such CLIP vocabulary file")
        opener = gzip.open if vocab_file.suffix == ".gz" else open
        with opener(vocab_file, "rt", encoding="utf-8") as file:
            lines = file.read().split("\n")[1 : _CLIP_MERGES + 1]
        merges = [tuple(line.split()) for line in lines]
        if len(merges) != _CLIP_MERGES or any(len(merge) != 2 for merge in merges):
            raise ValueError(f"{vocab_file}: expected {_CLIP_MERGES} merges of two parts")
        letters = list(_byte_letters().values())
        tokens = [*letters, *(v + "</w>" for v in letters), *("".join(m) for m in merges)]
        tokens += [_CLIP_START, _CLIP_END]
        vocabulary = {token: i for i, token in enumerate(tokens)}
        backend = tokenizers.Tokenizer(models.BPE(vocabulary, merges, end_of_word_suffix="</w>"))
        backend.normalizer = normalizers.Sequence(
            [
                normalizers.NFC(),
                normalizers.Replace(Regex(r"\s+"), " "),
                normalizers.Strip(),
                normalizers.Lowercase(),
            ]
        )
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_CLIP_WORDS), behavior="removed", invert=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        backend.decoder = decoders.Sequence([decoders.Replace("</w>", "Ġ"), decoders.ByteLevel()])
        backend.add_special_tokens([_CLIP_START, _CLIP_END])
        return cls(backend)

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """The tokenizer that `save` wrote to `path`."""
        if not Path(path).is_file():
            raise ValueError(f"{path}: no such tokenizer file")
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the backend raises bare Exception
            raise ValueError(f"{path}: not a tokenizer file: {error}") from error
        return cls(backend)

    def with_locations(self, count: int) -> Tokenizer:
        """This tokenizer with `count` location tokens `<loc0>`, `<loc1>`, ... behind its own.

        Raises:
            ValueError: it has another number of them.
        """
        if self.locations and len(self.locations) != count:
            raise ValueError(
                f"locations is {count}, and the tokenizer has {len(self.locations)} of them"
            )
        if self.locations or not count:
            return self
        backend = tokenizers.Tokenizer.from_str(self._backend.to_str())
        backend.add_tokens(
            [
                AddedToken(f"<loc{i}>", normalized=False, lstrip=True, rstrip=True)
                for i in range(count)
            ]
        )
        return Tokenizer(backend)

    def save(self, path: str | Path) -> None:
        """Writes the whole definition as one JSON file."""
        Path(path).write_text(self._backend.to_str(), encoding="utf-8")

    @cached_property
    def sha256(self) -> str:
        """Hash of the definition, hexadecimal."""
        return hashlib.sha256(self._backend.to_str().encode()).hexdigest()

    def encode(self, texts: list[str], max_tokens: int) -> list[list[int]]:
        """Ids of each text between start and end token; a long text loses its tail."""
        if max_tokens < 2:
            raise ValueError(f"max_tokens must be >= 2 (start and end token), got {max_tokens}")
        if self.is_clip:
            plain = _plain_letters()
            texts = [html.unescape(html.unescape(text)).translate(plain) for text in texts]
        encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        return [[self.start_id, *e.ids[: max_tokens - 2], self.end_id] for e in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`, without special tokens other than the mask token."""
        skip = {i for i in self.special_ids if i != self.mask_id}
        text = self._backend.decode(
            [int(i) for i in ids if i not in skip], skip_special_tokens=False
        )
        return text.strip()

    @cached_property
    def word_starts(self) -> np.ndarray:
        """(V,) bool: True where a token begins a word; all True for CLIP, which marks word ends.

        A word begins with a space or with an ASCII character that is neither letter nor digit.
        """
        starts = np.ones(self.vocab_size, np.bool_)
        if self.is_clip:
            return starts
        letter_bytes = {letter: byte for byte, letter in _byte_letters().items()}
        for token, i in self._backend.get_vocab().items():
            first = letter_bytes.get(token[0], 0)
            starts[i] = i in self.special_ids or (first < 0x80 and not chr(first).isalnum())
        return starts


def find_clip_vocabulary() -> Path:
    """CLIP's vocabulary file in an installed open_clip, found without importing it."""
    import importlib.util

    spec = importlib.util.find_spec("open_clip")
    if spec is None or spec.origin is None:
        raise ValueError(
            "tokenizer 'clip' needs bpe_simple_vocab_16e6.txt.gz: give its path, or install "
            "open_clip_torch"
        )
    return Path(spec.origin).with_name("bpe_simple_vocab_16e6.txt.gz")


@functools.cache
def _plain_letters() -> dict[int, str]:
    """Straight quotes for curled ones, and letters for ligatures and wide forms, as ftfy mends."""
    ligatures = (*range(0x132, 0x134), 0x149, *range(0x1C4, 0x1CD), *range(0x1F1, 0x1F4))
    forms = (*ligatures, *range(0xFB00, 0xFB07), 0x3000, *range(0xFF01, 0xFFF0))
    return {
        **{f: unicodedata.normalize("NFKC", chr(f)).replace("\u02bc", "'") for f in forms},
        **dict.fromkeys((0x2BC, *range(0x2018, 0x201C)), "'"),
        **dict.fromkeys(range(0x201C, 0x2020), '"'),
    }


def _byte_letters() -> dict[int, str]:
    """The letter that stands for each byte in byte-level BPE, in the order of CLIP's ids.

    Source: Radford et al. 2019 (GPT-2), encoder.py, `bytes_to_unicode`.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {byte: chr(byte) for byte in printable}
    hidden = (byte for byte in range(256) if byte not in letters)
    return letters | {byte: chr(256 + n) for n, byte in enumerate(hidden)}
