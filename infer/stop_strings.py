"""Finds the stop strings of a request in text that arrives in pieces."""

from __future__ import annotations

from collections.abc import Sequence

from stepjax.text.reasoning import held_length


class StopScan:
    """Passes text on up to the first stop string, and holds back what may become one.

    The stop string that is complete first counts, and of two that end together the one that began first. The result
    does not depend on the pieces in which the text arrives.
    """

    def __init__(self, stops: Sequence[str], *, include: bool = False):
        """``include`` passes the stop string on, too."""
        self.match: str | None = None  # the stop string that ended the text
        self.surplus = ""  # text behind the end, and the stop string unless ``include``
        self._stops, self._include = tuple(stops), include
        self._held = ""
        self._ignored = 0  # characters of _held in which no stop string may end

    def push(self, text: str, *, ignore: bool = False) -> str:
        """The text that is certain now. After a match, all text is surplus.

        Args:
          ignore: no stop string may end in this text; one may begin in it.
        """
        if self.match is not None:
            self.surplus += text
            return ""
        if not self._stops:
            return text
        self._held += text
        if ignore:
            self._ignored = len(self._held)
        matches = [(begin + len(stop), begin, stop) for stop in self._stops if (begin := self._find(stop)) >= 0]
        if not matches:
            return self._release(held_length(self._held, self._stops))
        end, begin, self.match = min(matches)
        cut = end if self._include else begin
        self.surplus = self._held[cut:]
        return self._held[:cut]

    def flush(self) -> str:
        """The text that was held back, since what follows does not continue it."""
        return "" if self.match is not None else self._release(0)

    def _find(self, stop: str) -> int:
        return self._held.find(stop, max(0, self._ignored - len(stop) + 1))

    def _release(self, keep: int) -> str:
        end = len(self._held) - keep
        released, self._held = self._held[:end], self._held[end:]
        self._ignored = max(0, self._ignored - end)
        return released
