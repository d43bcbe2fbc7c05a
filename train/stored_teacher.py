"""A teacher's likeliest tokens in a file: written once for the rows of a data set, read by any number of runs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from stepjax.errors import CheckpointError, ConfigError, TrainingError
from stepjax.train.batch import Scored, fitting
from stepjax.train.data import JsonLines, Prompt
from stepjax.train.rollout import Rollout, written
from stepjax.train.teacher import Resident
from stepjax.train.tune_config import TuneConfig
from stepjax.train.update import num_tokens_of

FORM = "stepjax teacher scores 1"
CHUNK = 256  # rows that are scored together


class Stored:
    """Scores of completions by the number of their row: safetensors with ``index`` [N], ``offset`` [N + 1], and for all
    tokens laid end to end ``token``, ``logprob``, ``top_id`` [·, K] and ``top_logprob`` [·, K].
    """

    def __init__(self, path: Path):
        """Raises CheckpointError if the file is none of ours."""
        self._path = path
        try:
            with safe_open(str(path), "numpy") as file:
                if (file.metadata() or {}).get("form") != FORM:
                    raise CheckpointError(f"{path}: holds no teacher's scores; write them with stepjax teach")
                self._arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: cannot be read ({error})") from None
        self._place = {int(index): at for at, index in enumerate(self._arrays["index"])}

    def score(self, rollouts: Sequence[Rollout], *, top: int) -> list[Scored]:
        return [self._score(each, top) for each in rollouts]

    def _score(self, rollout: Rollout, top: int) -> Scored:
        arrays, index = self._arrays, rollout.prompt.index
        if index not in self._place:
            raise TrainingError(f"{self._path}: has no scores of row {index}; write them for the whole file")
        at = self._place[index]
        span = slice(int(arrays["offset"][at]), int(arrays["offset"][at + 1]))
        span = slice(span.start, min(span.stop, span.start + len(rollout.ids)))
        if arrays["token"][span].tolist() != list(rollout.ids):
            raise TrainingError(f"{self._path}: row {index} was scored with another completion; write the scores again")
        if top > arrays["top_id"].shape[1]:
            raise TrainingError(f"{self._path}: holds {arrays['top_id'].shape[1]} tokens a place, but top_k is {top}")
        return Scored(arrays["logprob"][span], arrays["top_id"][span, :top], arrays["top_logprob"][span, :top])

    @property
    def top_k(self) -> int:
        return int(self._arrays["top_id"].shape[1])


def store(path: Path, rows: Iterable[tuple[Prompt, Sequence[int], Scored]], *, about: dict[str, str]) -> int:
    """Write scores of completions; returns how many rows. The file is there whole or not at all."""
    found = list(rows)
    lengths = [len(ids) for _, ids, _ in found]
    arrays = {
        "index": np.asarray([prompt.index for prompt, _, _ in found], np.int64),
        "offset": np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        "token": np.concatenate([np.asarray(ids, np.int32) for _, ids, _ in found]),
        "logprob": np.concatenate([each.logprobs for *_, each in found]),
        "top_id": np.concatenate([each.top_ids for *_, each in found if each.top_ids is not None]),
        "top_logprob": np.concatenate([each.top_logprobs for *_, each in found if each.top_logprobs is not None]),
    }
    partial = path.with_suffix(".partial")
    save_file(arrays, partial, metadata={"form": FORM, "about": json.dumps(about)})
    partial.replace(path)
    return len(found)


def teach(config: TuneConfig, name: str, path: Path, *, top_k: int) -> tuple[int, int]:
    """Score all rows of a jsonl source with its teacher and store them; returns rows and tokens.

    Raises:
      ConfigError: the teacher cannot score this, or a row has no completion or no room in optim.length.
    """
    from stepjax.train.tune_setup import open_model, open_teachers

    session = open_model(config.model, config.model.path)
    source = JsonLines(name, Path(config.data[name].path), session)
    teachers = open_teachers(config, session)
    chosen = config.data[name].teacher or next(iter(teachers), "")
    if chosen not in teachers or isinstance(teachers[chosen], Stored):
        raise ConfigError(f"data.{name}.teacher: expected a teacher that can score, a checkpoint, base or remote one")
    teacher, optim = teachers[chosen], config.optim
    tokens = 0

    def rows() -> Iterator[tuple[Prompt, Sequence[int], Scored]]:
        nonlocal tokens
        for begin in range(0, len(source), CHUNK):
            rollouts = [written(source.at(i), group=i) for i in range(begin, min(begin + CHUNK, len(source)))]
            kept, lost = fitting(rollouts, optim.length)
            if lost:
                raise ConfigError(f"data.{name}: {lost} rows have no room in optim.length = {optim.length}; raise it")
            if isinstance(teacher, Resident):
                options = {"rows": optim.rows, "length": optim.length, "num_tokens": num_tokens_of(session)}
                scored = teacher.score(kept, top=top_k, **options)
            else:
                scored = teacher.score(kept, top=top_k)
            tokens += sum(len(each.ids) for each in kept)
            yield from ((each.prompt, each.ids, found) for each, found in zip(kept, scored, strict=True))

    return store(path, rows(), about={"teacher": chosen, "source": name}), tokens
