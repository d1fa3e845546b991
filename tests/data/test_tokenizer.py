"""Token ids: determinism, truncation, round trips, CLIP's vocabulary."""

import importlib.util

import pytest

from vlpfast.data.tokenizer import Tokenizer, find_clip_vocabulary

CAPTIONS = [
    "a red circle left of a blue square",
    "Two dogs, running on the beach!",
    "café ﬁne — 中文 😀",
    "a photo of the dogs' blue ball",
] * 5


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(CAPTIONS, 400)


def test_training_is_deterministic(tokenizer):
    again = Tokenizer.train(iter(CAPTIONS), 400)
    assert again.sha256 == tokenizer.sha256
    assert Tokenizer.train([*CAPTIONS, "zebra zebra"], 400).sha256 != tokenizer.sha256


def test_special_ids(tokenizer):
    ids = (tokenizer.pad_id, tokenizer.start_id, tokenizer.end_id, tokenizer.mask_id)
    assert ids == (0, 1, 2, 3)
    assert tokenizer.special_ids == (0, 1, 2, 3)
    assert 260 <= tokenizer.vocab_size <= 400


def test_save_and_load(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    assert loaded.sha256 == tokenizer.sha256
    assert loaded.encode(CAPTIONS, 32) == tokenizer.encode(CAPTIONS, 32)


@pytest.mark.parametrize("max_tokens", [2, 3, 5, 100])
def test_truncation_keeps_the_end_token(tokenizer, max_tokens):
    for ids, whole in zip(
        tokenizer.encode(CAPTIONS, max_tokens), tokenizer.encode(CAPTIONS, 1000), strict=True
    ):
        assert len(ids) == min(max_tokens, len(whole))
        assert ids[0] == 1
        assert ids[-1] == 2
        assert ids[:-1] == whole[: len(ids) - 1]


def test_round_trip(tokenizer):
    for text in ["two dogs, running", "fine — 中文 😀", "unseen zyx 123 ñ"]:
        assert tokenizer.decode(tokenizer.encode([text], 100)[0]) == text


def test_normalises(tokenizer):
    upper, plain = tokenizer.encode(["CAFÉ ﬁne", "café fine"], 100)
    assert upper == plain


def test_special_names_in_a_caption_are_text(tokenizer):
    (ids,) = tokenizer.encode(["a [MASK] and a [SEP]"], 100)
    assert not set(ids[1:-1]) & set(tokenizer.special_ids)
    assert tokenizer.decode(ids) == "a [mask] and a [sep]"


def test_word_starts(tokenizer):
    text = "two zyxwv, dogs"
    (ids,) = tokenizer.encode([text], 100)
    starts = tokenizer.word_starts[ids[1:-1]]
    # Words: two | zyxwv | , | dogs.
    assert starts.sum() == 4
    assert len(starts) > 4
    words, pieces = [], ids[1:-1]
    for start, piece in zip(starts, pieces, strict=True):
        words = [*words, [piece]] if start else [*words[:-1], [*words[-1], piece]]
    assert [tokenizer.decode(word) for word in words] == ["two", "zyxwv", ",", "dogs"]


def test_bytes_of_one_letter_are_one_word(tokenizer):
    (ids,) = tokenizer.encode(["ñandú"], 100)
    assert tokenizer.word_starts[ids[1:-1]].tolist() == [True] + [False] * (len(ids) - 3)


def test_bad_input_is_named(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="vocab_size must be >= 260"):
        Tokenizer.train(CAPTIONS, 100)
    with pytest.raises(ValueError, match="max_tokens"):
        tokenizer.encode(["a"], 1)
    with pytest.raises(ValueError, match="no such tokenizer file"):
        Tokenizer.load(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ValueError, match="not a tokenizer file"):
        Tokenizer.load(tmp_path / "bad.json")
    with pytest.raises(ValueError, match="no such CLIP vocabulary"):
        Tokenizer.clip(tmp_path / "none.txt.gz")
    (tmp_path / "short.txt").write_text("#version\na b\n")
    with pytest.raises(ValueError, match="48894 merges"):
        Tokenizer.clip(tmp_path / "short.txt")


@pytest.fixture(scope="module")
def clip() -> Tokenizer:
    if importlib.util.find_spec("open_clip") is None:
        pytest.skip("open_clip, whose wheel has the vocabulary file, is not installed")
    return Tokenizer.clip(find_clip_vocabulary())


def test_clip_ids(clip, tmp_path):
    assert (clip.vocab_size, clip.start_id, clip.end_id, clip.mask_id) == (
        49408,
        49406,
        49407,
        None,
    )
    # The well-known ids of "a photo of a cat".
    assert clip.encode(["a photo of a cat"], 77) == [[49406, 320, 1125, 539, 320, 2368, 49407]]
    assert clip.decode(clip.encode(["A photo of\n a cat"], 77)[0]) == "a photo of a cat"
    clip.save(tmp_path / "clip.json")
    assert Tokenizer.load(tmp_path / "clip.json").sha256 == clip.sha256


def test_clip_equals_open_clip(clip):
    for name in ("ftfy", "regex"):
        pytest.importorskip(name)
    path = find_clip_vocabulary().with_name("tokenizer.py")
    spec = importlib.util.spec_from_file_location("open_clip_tokenizer", path)
    peer = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(peer)
    reference = peer.SimpleTokenizer()
    texts = [
        *CAPTIONS[:4],
        "it's  the dog's 3rd\tball; we'll  see 2023!!",
        "&lt;b&gt;bold&lt;/b&gt; &amp;amp; more",
        "ÜBER naïve Straße Привет",
        'don\'t "quote" <tag> a_b-c',
        "the \u201ccurled\u201d dog\u2019s \uff57\uff49\uff44\uff45 \ufb02ower \u0149",
        " x" * 100,
    ]
    expected = reference(texts, context_length=77)
    for ids, row in zip(clip.encode(texts, 77), expected, strict=True):
        assert ids == row[: len(ids)].tolist()
        assert not row[len(ids) :].any()
