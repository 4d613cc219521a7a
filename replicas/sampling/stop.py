"""Stop strings over a stream of text: holds back what may be the start of one."""

from __future__ import annotations


class StopChecker:
    """Feed it text deltas; it returns the text that is safe to show.

    Only the longest suffix that could begin a stop string is held back.
    """

    __slots__ = ("_held", "_include", "_stops")

    def __init__(self, stop: tuple[str, ...], include_stop_str: bool = False) -> None:
        self._stops = stop
        self._include = include_stop_str
        self._held = ""

    def feed(self, delta: str, armed: bool = True) -> tuple[str, str | None]:
        """(text to show, the stop string that was met or None). After a match nothing follows.

        The stop string that is complete first counts, of several the longest, so that the result
        does not depend on how the text is cut. Those that end in a delta that is not `armed` are
        passed over.
        """
        text = self._held + delta
        hits = []
        if armed:
            for stop in self._stops:
                at = text.find(stop, max(0, len(self._held) - len(stop) + 1))
                if at >= 0:
                    hits.append((at, stop))
        if hits:
            at, stop = min(hits, key=lambda hit: (hit[0] + len(hit[1]), -len(hit[1])))
            self._held = ""
            return text[: at + len(stop)] if self._include else text[:at], stop
        keep = max(self._overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], None

    def flush(self) -> str:
        """What was held back, once it is clear that no stop string follows."""
        held, self._held = self._held, ""
        return held

    @staticmethod
    def _overlap(text: str, stop: str) -> int:
        """Length of the longest proper prefix of `stop` that ends `text`."""
        for n in range(min(len(stop) - 1, len(text)), 0, -1):
            if text.endswith(stop[:n]):
                return n
        return 0
