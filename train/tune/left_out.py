"""What a run leaves out or cuts because it is longer than a row of a batch: counted, and said."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from stepjax.train.rollouts.sampler import Rollout
from stepjax.train.teachers.scoring import Prepared


class LeftOut:
    """Counts of one run. The first answer of each kind is named when it happens, and the sums at the end."""

    def __init__(self, length: int, tell: Callable[[str], None]):
        """
        Args:
          length: tokens of a row.
          tell: writes a line to the terminal.
        """
        self._length, self._tell = length, tell
        self.num_left_out, self.num_cut, self._num_answers = 0, 0, 0

    def count(self, step: int, rollouts: Sequence[Rollout], parts: Sequence[Prepared]) -> int:
        """Count the answers of a step, and return how many of the data's were cut."""
        left_out = [rollout for part in parts for rollout in part.left_out]
        prepared = (rollout for part in parts for rollout in part.rollouts)
        cut = [rollout for rollout in prepared if rollout.truncated and rollout.writer == "data"]
        if left_out and not self.num_left_out:
            self._say(step, left_out[0], "is left out")
        if cut and not self.num_cut:
            self._say(step, cut[0], "is cut")
        self.num_left_out += len(left_out)
        self.num_cut += len(cut)
        self._num_answers += len(rollouts)
        return len(cut)

    def close(self) -> None:
        """Say the sums, if there is anything to say."""
        if self.num_left_out or self.num_cut:
            self._tell(
                f"{self.num_left_out:,} of {self._num_answers:,} answers were left out and {self.num_cut:,} of the "
                f"data were cut, because they are longer than optim.length = {self._length} tokens"
            )

    def _say(self, step: int, rollout: Rollout, what: str) -> None:
        prompt = rollout.prompt
        where = prompt.where or f"data.{prompt.source}, row {prompt.index}"
        self._tell(
            f"step {step}: {where} {what}: it is longer than optim.length = {self._length} tokens; others are counted "
            "as left_out and cut in the metrics"
        )
