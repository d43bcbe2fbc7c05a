"""How many rows of a batch each of several sources gives."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

MARK = 4096  # rows between two states that are kept


class Quotas:
    """Shares of several sources among successive rows, exact and without chance.

    Row after row goes to one source, so that after any number of rows each source has given its share to within less
    than one row. The rule is Tijdeman's (The chairman assignment problem, Discrete Mathematics 32, 1980): of the
    sources whose claim is at least 1 / (2m − 2), the one that must be served soonest. Claims are integers, so nothing
    drifts, and the sequence begins again after as many rows as the reduced weights add up to.
    """

    def __init__(self, weights: Sequence[float]):
        """
        Args:
          weights: of the sources, each above 0. A decimal such as 0.1 counts as the decimal.
        """
        fractions = [Fraction(str(weight)) for weight in weights]
        scale = math.lcm(*(fraction.denominator for fraction in fractions))
        parts = [int(fraction * scale) for fraction in fractions]
        self._parts = [part // math.gcd(*parts) for part in parts]
        self.period = sum(self._parts)
        self._marks = [[0] * len(parts)]  # rows of each source after 0, MARK, 2 MARK, … rows
        self._latest = (0, [0] * len(parts))  # rows, and those of each source: a step goes on from the one before

    def after(self, rows: int) -> list[int]:
        """How many of the first ``rows`` rows each source has given. They add up to ``rows``."""
        periods, rest = divmod(rows, self.period)
        mark = min(rest // MARK, len(self._marks) - 1)
        start, given = mark * MARK, list(self._marks[mark])
        if start < self._latest[0] <= rest:
            start, given = self._latest[0], list(self._latest[1])
        for number in range(start, rest):
            if number % MARK == 0 and number // MARK == len(self._marks):
                self._marks.append(list(given))
            given[self._next(number + 1, given)] += 1
        self._latest = (rest, list(given))
        return [count + periods * part for count, part in zip(given, self._parts, strict=True)]

    def most(self, rows: int) -> list[int]:
        """The most that each source gives of ``rows`` successive rows."""
        spare = 2 - Fraction(1, max(len(self._parts) - 1, 1))  # twice the largest distance from a share
        return [min(rows, math.floor(Fraction(rows * part, self.period) + spare)) for part in self._parts]

    def _next(self, number: int, given: Sequence[int]) -> int:
        """The source of row ``number``, counted from 1."""
        if len(given) == 1:
            return 0
        period, scale = self.period, 2 * len(given) - 2
        best, soonest = 0, math.inf
        for source, part in enumerate(self._parts):
            claim = scale * (part * number - given[source] * period)
            if claim >= period:
                time = ((scale - 1) * period - claim) / part
                if time < soonest:
                    best, soonest = source, time
        return best
