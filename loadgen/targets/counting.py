"""How many tokens came when: by the server's `usage`, else by a tokenizer, never by messages."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from typing import Any

from tokenflow.loadgen.metrics import LEFT, StreamRecord


class TokenCounter:
    """Counts for one record.

    With a running usage each message's tokens are known as it comes. Otherwise they are set at the
    end: the final usage is spread over the messages by their share of the text; without any, a
    tokenizer counts.
    """

    NO_USAGE = "the server sends no usage; give --tokenizer to count its tokens"

    def __init__(self, record: StreamRecord, tokenizer: Any | None = None) -> None:
        self._record = record
        self._tokenizer = tokenizer
        self._pieces: list[tuple[float, str]] = []
        """(time, text) of messages with text but no count of their own."""
        self._total: int | None = None
        self.estimates = False
        """Whether how many tokens came with each message is an estimate."""
        self._counted = 0

    def event(self, at: float, text: str, usage: Mapping[str, Any] | None) -> None:
        """A message came at `at`. Raises KeyError or TypeError for a usage that is none."""
        self._record.text += text
        if usage:
            total = int(usage["completion_tokens"])
            self._record.prompt_tokens = usage.get("prompt_tokens", self._record.prompt_tokens)
            self._total = total
            if not self._pieces:
                if total > self._counted:
                    self._record.arrivals.append((at, total - self._counted))
                    self._counted = total
                return
        if text:
            self._pieces.append((at, text))
            # Text is at least a token: there is a first one now. `finish` sets the number right.
            self._record.arrivals.append((at, 1))

    def finish(self) -> None:
        """The stream is over, one way or the other."""
        if not self._pieces:
            return
        texts = [text for _, text in self._pieces]
        if self._total is not None:
            self.estimates = True
            counts = spread(self._total - self._counted, texts)
        elif self._tokenizer is not None:
            counts = _by_tokenizer(texts, self._tokenizer)
        else:
            if self._record.ok and self._record.finish_reason != LEFT:
                self._record.error = self.NO_USAGE
            return
        before = self._record.arrivals[: len(self._record.arrivals) - len(self._pieces)]
        times = [at for at, _ in self._pieces]
        self._record.arrivals = before + [
            (at, count) for at, count in zip(times, counts, strict=True) if count
        ]


def spread(total: int, texts: Seq[str]) -> list[int]:
    """`total` tokens over messages by their characters; while there are enough, one each at least,
    and the first message always has one."""
    least = 1 if total >= len(texts) else 0
    rest = total - least * len(texts)
    characters = sum(map(len, texts)) or 1
    counts, seen, given = [], 0, 0
    for text in texts:
        seen += len(text)
        due = rest * seen // characters
        counts.append(least + due - given)
        given = due
    if total > 0 and counts[0] == 0:
        counts[next(i for i, count in enumerate(counts) if count)] -= 1
        counts[0] = 1
    return counts


def _by_tokenizer(texts: Seq[str], tokenizer: Any) -> list[int]:
    """Tokens that end in each message; the first has one as soon as there is any."""
    ends = [end for _, end in tokenizer.encode("".join(texts), add_special_tokens=False).offsets]
    counts, seen, before = [], 0, 0
    for text in texts:
        seen += len(text)
        # A token that reaches into the next message came with that one.
        done = bisect_left(ends, seen + 1)
        counts.append(done - before)
        before = done
    if counts and not counts[0] and ends:
        counts[next(i for i, count in enumerate(counts) if count)] -= 1
        counts[0] = 1
    return counts
