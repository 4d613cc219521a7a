"""Text stops exactly where a stop condition is met, however it arrives in pieces."""

from __future__ import annotations

from typing import Any

from hypothesis import example, given, settings
from hypothesis import strategies as st

from tokenflow.replicas.request import FinishReason
from tokenflow.replicas.sampling.params import SamplingParams
from tokenflow.replicas.sampling.stop import StopChecker
from tokenflow.replicas.text import TextStream

EOS = 0


class PieceTokenizer:
    """Token i reads as piece i; token 0 is the end of sequence and reads as nothing."""

    def __init__(self, pieces: list[str]) -> None:
        self.pieces = ["", *pieces]

    def decode(self, ids: list[int], **_: object) -> str:
        return "".join(self.pieces[i] for i in ids)


def stream(pieces: list[str], tokens: list[int] | None = None, **params: Any) -> tuple[str, str]:
    """Push tokens (by default every piece once) until one ends it; (text, finish reason)."""
    tokens = tokens if tokens is not None else list(range(1, len(pieces) + 1))
    params.setdefault("max_tokens", len(tokens))
    text = TextStream(PieceTokenizer(pieces), SamplingParams(**params), (EOS,))
    shown = ""
    for token in tokens:
        delta, reason = text.push(token)
        shown += delta
        if reason is not None:
            return shown, reason.value
    return shown, "none"


def cut(text: str, stops: list[str], include: bool = False) -> tuple[str, bool]:
    """The text as read one character at a time until a stop string is complete."""
    for end in range(1, len(text) + 1):
        met = [s for s in stops if text[:end].endswith(s)]
        if met:
            return text[: end if include else end - max(map(len, met))], True
    return text, False


letters = st.text("abc ", max_size=30)
stop_lists = st.lists(st.text("abc ", min_size=1, max_size=5), min_size=1, max_size=4)


def split(text: str, cuts: list[int]) -> list[str]:
    """The text in pieces, some of them possibly empty."""
    places = sorted(min(c, len(text)) for c in cuts)
    return [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]


cut_places = st.lists(st.integers(0, 30), max_size=12)


@settings(deadline=None)
@given(letters, stop_lists, st.booleans())
def test_text_in_single_characters_ends_before_the_first_stop_string(text, stops, include):
    checker = StopChecker(tuple(stops), include)
    shown, match = "", None
    for character in text:
        delta, match = checker.feed(character)
        shown += delta
        if match is not None:
            break
    shown += checker.flush()
    assert (shown, match is not None) == cut(text, stops, include)
    assert include or not any(s in shown for s in stops)


@settings(deadline=None)
@given(letters, cut_places, stop_lists, st.booleans())
@example("abcab", [], ["bca", "c"], False)
def test_text_in_any_pieces_ends_before_the_first_stop_string(text, cuts, stops, include):
    shown, reason = stream(split(text, cuts), stop=tuple(stops), include_stop_str_in_output=include)
    expected, stopped = cut(text, stops, include)
    assert shown == expected
    assert reason == ("stop" if stopped else "length")


@settings(deadline=None)
@given(letters, cut_places, stop_lists)
def test_no_stop_string_is_ever_shown(text, cuts, stops):
    shown, _ = stream(split(text, cuts), stop=tuple(stops))
    assert not any(s in shown for s in stops)
    assert text.startswith(shown)


@settings(deadline=None)
@given(letters, cut_places, st.text("abc ", min_size=1, max_size=5), st.booleans())
def test_one_stop_string_is_found_in_any_pieces(text, cuts, stop, include):
    shown, reason = stream(split(text, cuts), stop=(stop,), include_stop_str_in_output=include)
    at = text.find(stop)
    end = at + len(stop) * include if at >= 0 else len(text)
    assert shown == text[:end]
    assert reason == ("stop" if at >= 0 else "length")


@settings(deadline=None)
@given(letters, cut_places, stop_lists)
def test_only_what_may_begin_a_stop_string_is_held_back(text, cuts, stops):
    checker = StopChecker(tuple(stops))
    shown = seen = ""
    for piece in split(text, cuts):
        delta, match = checker.feed(piece)
        if match is not None:
            return
        shown += delta
        seen += piece
        held = seen.removeprefix(shown)
        assert shown + held == seen
        assert not held or any(s.startswith(held) and s != held for s in stops)
    assert shown + checker.flush() == seen
    assert checker.flush() == ""


def test_a_stop_string_across_three_pieces():
    assert stream(["one S", "TO", "P two"], stop=("STOP",)) == ("one ", "stop")
    assert stream(["one S", "TO", "P two"], stop=("STOP",), include_stop_str_in_output=True) == (
        "one STOP",
        "stop",
    )


def test_a_false_start_is_shown_as_soon_as_it_is_one():
    text = TextStream(
        PieceTokenizer(["ab", "ST", "x"]), SamplingParams(max_tokens=9, stop=("STOP",)), ()
    )
    assert [text.push(i) for i in (1, 2, 3)] == [("ab", None), ("", None), ("STx", None)]


def test_a_false_start_is_shown_at_the_end():
    assert stream(["ab", "ST"], stop=("STOP",)) == ("abST", "length")
    assert stream(["ab", "ST"], tokens=[1, 2, EOS], stop=("STOP",)) == ("abST", "stop")


def test_a_stop_string_in_the_last_allowed_token_is_a_stop():
    assert stream(["ab", "cd"], stop=("cd",), max_tokens=2) == ("ab", "stop")


def test_a_stop_string_completed_by_held_bytes_is_found():
    class Broken(PieceTokenizer):
        def decode(self, ids: list[int], **_: object) -> str:
            return "ab\ufffd" if ids else ""

    text = TextStream(Broken([""]), SamplingParams(max_tokens=1, stop=("\ufffd",)), ())
    assert text.push(1) == ("ab", FinishReason.STOP)


def test_max_tokens_ends_with_length():
    assert stream(["a", "b", "c"], max_tokens=2) == ("ab", "length")
    assert stream(["a"], max_tokens=1) == ("a", "length")


def test_the_end_of_sequence_ends_and_shows_nothing():
    assert stream(["a", "b"], tokens=[1, EOS, 2]) == ("a", "stop")
    assert stream(["a", "b"], tokens=[1, 2, EOS], max_tokens=3) == ("ab", "stop")


def test_the_end_of_sequence_can_be_ignored():
    assert stream(["a", "b"], tokens=[1, EOS, 2], ignore_eos=True) == ("ab", "length")


def test_stop_token_ids_end_even_where_the_end_of_sequence_is_ignored():
    tokens = [1, EOS, 2, 3]
    pieces = ["a", "b", "c"]
    assert stream(pieces, tokens, stop_token_ids=(2,), ignore_eos=True) == ("ab", "stop")
    assert stream(pieces, tokens, stop_token_ids=(EOS,), ignore_eos=True) == ("a", "stop")
    assert stream(pieces, tokens, stop_token_ids=(3,)) == ("a", "stop")


def test_min_tokens_delays_the_end_of_sequence_and_stop_ids():
    tokens = [1, EOS, 2, 1, EOS, 1]
    assert stream(["a", "b"], tokens, min_tokens=3) == ("aba", "stop")
    assert stream(["a", "b"], tokens, min_tokens=3, stop_token_ids=(2,)) == ("ab", "stop")
    assert stream(["a", "b"], tokens, min_tokens=4, stop_token_ids=(2,)) == ("aba", "stop")


def test_min_tokens_delays_stop_strings():
    pieces = ["x", "y", "x", "y"]
    assert stream(pieces, stop=("y",)) == ("x", "stop")
    assert stream(pieces, stop=("y",), min_tokens=3) == ("xyx", "stop")


def test_a_stop_string_that_begins_before_min_tokens_counts_when_it_is_complete_after():
    assert stream(["a", "ST", "OP", "b"], stop=("STOP",), min_tokens=3) == ("a", "stop")


def test_ids_that_would_end_too_early_are_suppressed():
    params = SamplingParams(max_tokens=9, min_tokens=2, stop_token_ids=(5,))
    text = TextStream(PieceTokenizer(["a", "b"]), params, (EOS,))
    assert sorted(text.suppressed_ids()) == [EOS, 5]
    text.push(1)
    assert sorted(text.suppressed_ids()) == [EOS, 5]
    text.push(1)
    assert text.suppressed_ids() == ()


def test_an_ignored_end_of_sequence_is_not_suppressed():
    params = SamplingParams(max_tokens=9, min_tokens=2, ignore_eos=True)
    assert TextStream(PieceTokenizer([]), params, (EOS,)).suppressed_ids() == ()


@settings(deadline=None)
@given(letters, cut_places, stop_lists, st.integers(0, 12), st.integers(0, 12))
def test_a_primed_stream_goes_on_where_the_first_one_was(text, cuts, stops, min_tokens, at):
    pieces = split(text, cuts)
    params = SamplingParams(
        max_tokens=len(pieces), min_tokens=min(min_tokens, len(pieces)), stop=tuple(stops)
    )

    def run(primed: int) -> list[tuple[str, FinishReason | None]]:
        stream = TextStream(PieceTokenizer(pieces), params, (EOS,))
        stream.prime(range(1, primed + 1))
        out = []
        for token in range(primed + 1, len(pieces) + 1):
            out.append(stream.push(token))
            if out[-1][1] is not None:
                break
        return out

    whole = run(0)
    at = min(at, len(whole) - 1)
    assert run(at) == whole[at:]
