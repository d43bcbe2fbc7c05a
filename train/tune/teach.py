"""Score a data set by a teacher and store the scores."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from stepjax.errors import ConfigError
from stepjax.infer.session import num_tokens_of
from stepjax.train.config.tune import TuneConfig
from stepjax.train.data.sources import JsonLinesSource, Prompt
from stepjax.train.rollouts.batch import Scored, fitting
from stepjax.train.rollouts.sampler import written
from stepjax.train.teachers.resident import Resident
from stepjax.train.teachers.stored import FORM, Stored
from stepjax.train.tune.setup import open_model, open_teachers

CHUNK = 256  # rows that are scored together


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
    session = open_model(config.model, config.model.path)
    source = JsonLinesSource(name, Path(config.data[name].path), session)
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
