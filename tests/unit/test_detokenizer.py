"""Text shown token by token is the text of all tokens, and never holds half a character."""

from __future__ import annotations

import pytest
import transformers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from tokenflow.cluster.config import embedded_model
from tokenflow.replicas.detokenizer import IncrementalDetokenizer
from tokenflow.replicas.tokenizer import load_tokenizer

BROKEN = "\ufffd"
HELD_TOKENS = 12
TOKENIZER = load_tokenizer(embedded_model())
SPECIAL = sorted(TOKENIZER.all_special_ids)
UNPRINTABLE = [i for i in range(4096) if BROKEN in TOKENIZER.decode([i])]

text_ids = st.text(max_size=60).map(lambda s: TOKENIZER.encode(s, add_special_tokens=False))
any_ids = st.lists(st.integers(0, 4095), max_size=60)
mixed_ids = st.lists(
    st.one_of(
        text_ids,
        st.lists(st.sampled_from(UNPRINTABLE), max_size=30),
        st.lists(st.sampled_from(SPECIAL), max_size=2),
    ),
    max_size=6,
).map(lambda parts: [i for part in parts for i in part])


def whole(ids: list[int], skip: bool, tokenizer=TOKENIZER) -> str:
    return tokenizer.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)


def deltas(ids: list[int], skip: bool = True, tokenizer=TOKENIZER) -> list[str]:
    """What each token adds, and last what flush adds."""
    detokenizer = IncrementalDetokenizer(tokenizer, skip)
    return [*(detokenizer.add(i) for i in ids), detokenizer.flush()]


@settings(deadline=None)
@given(text_ids, st.booleans())
def test_unicode_text_comes_out_whole(ids, skip):
    parts = deltas(ids, skip)
    assert "".join(parts) == whole(ids, skip)


@settings(deadline=None)
@given(any_ids, st.booleans())
def test_random_tokens_come_out_whole(ids, skip):
    assert "".join(deltas(ids, skip)) == whole(ids, skip)


@settings(deadline=None)
@given(mixed_ids, st.booleans())
def test_text_among_broken_bytes_and_special_tokens_comes_out_whole(ids, skip):
    assert "".join(deltas(ids, skip)) == whole(ids, skip)


@settings(deadline=None)
@given(st.text(max_size=60).filter(lambda s: BROKEN not in s))
def test_valid_text_never_shows_half_a_character(text):
    ids = TOKENIZER.encode(text, add_special_tokens=False)
    parts = deltas(ids)
    assert not any(BROKEN in part for part in parts)
    assert parts[-1] == "", "whole characters were held back"


@settings(deadline=None)
@given(text_ids | any_ids, st.integers(0, 60), st.booleans())
def test_priming_and_going_on_equals_running_through(ids, at, skip):
    primed = IncrementalDetokenizer(TOKENIZER, skip)
    through = deltas(ids, skip)
    assert [primed.add(i) for i in ids[:at]] == through[: len(ids[:at])]
    rest = [*(primed.add(i) for i in ids[at:]), primed.flush()]
    assert rest == through[len(ids[:at]) :]


@pytest.mark.parametrize(
    "text", ["😀", "👩‍👩‍👧 and 🇪🇺", "日本語のテキスト。", "a😀b日c", "naïve café", "한국어", "𝔘𝔫𝔦"]
)
def test_a_character_is_shown_with_its_last_byte(text):
    ids = TOKENIZER.encode(text, add_special_tokens=False)
    assert len(ids) > 1
    parts = deltas(ids)
    assert "".join(parts) == text
    for n in range(1, len(ids) + 1):
        assert "".join(parts[:n]) == whole(ids[:n], True).rstrip(BROKEN)


def test_the_end_of_a_cut_character_is_shown_only_at_the_end():
    ids = TOKENIZER.encode("ok 😀", add_special_tokens=False)[:-1]
    parts = deltas(ids)
    assert "".join(parts[:-1]) == "ok "
    assert parts[-1] == BROKEN


def test_flushing_twice_adds_nothing():
    detokenizer = IncrementalDetokenizer(TOKENIZER)
    for i in TOKENIZER.encode("ok 😀", add_special_tokens=False)[:-1]:
        detokenizer.add(i)
    detokenizer.flush()
    assert detokenizer.flush() == ""


def test_special_tokens_are_shown_only_when_asked():
    ids = [*TOKENIZER.encode("a b", add_special_tokens=False), SPECIAL[0]]
    assert "".join(deltas(ids, skip=True)) == "a b"
    assert "".join(deltas(ids, skip=False)) == "a b" + TOKENIZER.decode([SPECIAL[0]])


def test_a_skipped_token_inside_a_character_does_not_break_it():
    ids = TOKENIZER.encode("😀", add_special_tokens=False)
    ids.insert(1, SPECIAL[0])
    assert "".join(deltas(ids, skip=True)) == "😀"


def test_endless_broken_bytes_are_not_held_forever():
    ids = [UNPRINTABLE[0]] * 100
    parts = deltas(ids)
    assert max(len(part) for part in parts) <= HELD_TOKENS
    assert "".join(parts) == whole(ids, True)


def test_a_character_after_many_broken_bytes_is_whole():
    emoji = TOKENIZER.encode("😀", add_special_tokens=False)
    ids = [emoji[-1]] * (HELD_TOKENS - 1) + emoji
    assert len(emoji) == 4
    assert "".join(deltas(ids)) == whole(ids, True)


@pytest.fixture(scope="module")
def word_tokenizer():
    """Words that carry their space, like SentencePiece: the first word of a text loses it."""
    vocab = {"<eos>": 0, "▁Hello": 1, "▁world": 2}
    plain = Tokenizer(models.WordLevel(vocab, unk_token="<eos>"))
    plain.decoder = decoders.Metaspace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<eos>")


def test_spaces_between_words_are_kept(word_tokenizer):
    assert deltas([1, 2, 1], True, word_tokenizer) == ["Hello", " world", " Hello", ""]


def test_the_space_after_a_skipped_token_is_kept(word_tokenizer):
    ids = [1, 0, 2]
    assert whole(ids, True, word_tokenizer) == "Hello world"
    assert "".join(deltas(ids, True, word_tokenizer)) == "Hello world"


CHUNKS = [
    b"a",
    b"\x80",
    b"\xa9",
    b"\xf0",
    b"\x9f",
    b"\x98",
    b"\x80\xc3",
    b"\xc3\xf0",
    b"\x9f\x98\x80",
]


@pytest.fixture(scope="module")
def chunk_tokenizer():
    """Tokens that end in the middle of a character, as large vocabularies have them."""
    letters = bytes_to_letters()
    vocab = {"".join(letters[b] for b in chunk): i for i, chunk in enumerate(CHUNKS)}
    plain = Tokenizer(models.WordLevel(vocab, unk_token="a"))
    plain.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=plain)


def bytes_to_letters() -> dict[int, str]:
    """The alphabet of byte-level vocabularies: printable bytes are themselves."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in shown]
    return {b: chr(b) for b in shown} | {b: chr(256 + i) for i, b in enumerate(hidden)}


@settings(deadline=None)
@given(st.lists(st.integers(0, len(CHUNKS) - 1), max_size=40))
@example([1] * 8 + [3, 4, 5, 6, 2])
def test_characters_split_over_large_tokens_come_out_whole(chunk_tokenizer, ids):
    data = b"".join(CHUNKS[i] for i in ids)
    assert whole(ids, True, chunk_tokenizer) == data.decode(errors="replace")
    assert "".join(deltas(ids, True, chunk_tokenizer)) == data.decode(errors="replace")
