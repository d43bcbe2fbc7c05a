"""The experts that sampled sequences were sent to, on disk, so that training can send their tokens to the same ones.

Router replay (arXiv 2507.18071 calls it Routing Replay): a token near the border between two experts may be sent to
another one by a program that rounds otherwise, which changes its log-probability far more than rounding does.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from stepjax.infer.steps.state import NO_EXPERT
from stepjax.train.service.wire.calls import Span
from stepjax.train.service.wire.tensors import bad
from stepjax.whole_file import whole_file

KEPT_S = 86400.0  # at most, also of a session that has not ended
_SEQUENCE = re.compile(r"(([0-9a-f]{1,40}):sample:\d{1,19}):\d{1,19}:\d{1,9}")


@dataclass(frozen=True)
class SequenceExperts:
    """One prompt and answer."""

    tokens: np.ndarray  # int32 [P + N]
    num_prompt: int  # P
    experts: np.ndarray  # uint16 [P + N, L, A]; `NO_EXPERT` where a token did not run


class RecordedExperts:
    """Sequences by their ids, which sample requests get and provenance spans name. Any thread may call."""

    def __init__(self, folder: Path):
        self._folder = folder

    def write(self, id: str, sequence: SequenceExperts) -> None:
        """Keep a sequence until its session is forgotten."""
        path = self._path(id)
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as partial:
            arrays = {"tokens": sequence.tokens, "experts": sequence.experts}
            save_file(arrays, partial, metadata={"prompt": str(sequence.num_prompt)})

    def read(self, id: str) -> SequenceExperts | None:
        """A sequence; None: it is not here, or no longer."""
        try:
            with safe_open(str(self._path(id)), "numpy") as file:
                about = file.metadata() or {}
                return SequenceExperts(file.get_tensor("tokens"), int(about["prompt"]), file.get_tensor("experts"))
        except (OSError, SafetensorError):
            return None

    def of_tokens(self, tokens: np.ndarray, spans: tuple[Span, ...], what: str) -> np.ndarray | None:
        """The experts of tokens that spans say the origin of, uint16 [N, L, A]; None: nothing is known of any.

        Args:
          spans: tile the tokens; only of sequences that the caller may read.
          what: name of the tokens, for errors.

        Raises:
          ApiError: a span names other tokens than those that it covers.
        """
        out: np.ndarray | None = None
        start = 0
        for number, span in enumerate(spans):
            sequence, end = self.read(span.sequence_id), start + span.length
            if sequence is not None and span.length:
                first = span.offset + (sequence.num_prompt if span.sampled else 0)
                part = slice(first, first + span.length)
                if not np.array_equal(sequence.tokens[part], tokens[start:end]):
                    raise bad(
                        f"{what}_spans[{number}]",
                        f"says that tokens {start} to {end - 1} are those of {span.sequence_id[:120]} from "
                        f"{span.offset} on, but they are others",
                    )
                if out is None:
                    out = np.full((len(tokens), *sequence.experts.shape[1:]), NO_EXPERT, np.uint16)
                out[start:end] = sequence.experts[part]
            start = end
        return out

    def sweep(self) -> None:
        """Remove what was sampled long ago."""
        latest = time.time() - KEPT_S
        for path in self._folder.glob("*/*.safetensors"):
            with contextlib.suppress(OSError):  # its session has ended meanwhile
                if path.stat().st_mtime < latest:
                    path.unlink()

    def forget(self, session: str) -> None:
        """Remove what a session sampled."""
        shutil.rmtree(self._folder / session, ignore_errors=True)

    def _path(self, id: str) -> Path:
        session = id.partition(":")[0]
        return self._folder / session / f"{hashlib.sha256(id.encode()).hexdigest()[:32]}.safetensors"


def sampler_of(sequence_id: str) -> str | None:
    """The sampling session of a sequence's id; None: it is none of this service."""
    found = _SEQUENCE.fullmatch(sequence_id)
    return None if found is None else found[1]
