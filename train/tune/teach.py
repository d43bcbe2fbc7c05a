"""Scores a data set with a teacher and stores the scores."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from stepjax.errors import ConfigError, TrainingError
from stepjax.infer.session import num_tokens_of
from stepjax.program_cache import ProgramCache
from stepjax.startup import Startup
from stepjax.train.config.tune import TuneConfig
from stepjax.train.data.prompts import Prompt
from stepjax.train.data.sources import FileSource
from stepjax.train.rollouts.sampler import data_rollouts
from stepjax.train.teachers.resident import Resident, Scored
from stepjax.train.teachers.scoring import cut_to_rows
from stepjax.train.teachers.stored import FORM
from stepjax.train.tune.setup import open_model, open_teachers
from stepjax.weights.finite import not_finite
from stepjax.whole_file import whole_file

CHUNK = 256  # rows of one call of a teacher


def store(path: Path, rows: Iterable[tuple[Prompt, Sequence[int], Scored]], *, about: dict[str, str]) -> int:
    """Write the scores of completions, and return the number of rows. The file appears only once it is complete."""
    scored_rows = list(rows)
    scores = [score for *_, score in scored_rows]
    lengths = [len(ids) for _, ids, _ in scored_rows]
    arrays = {
        "index": np.asarray([prompt.index for prompt, _, _ in scored_rows], np.int64),
        "part": np.asarray([prompt.part for prompt, _, _ in scored_rows], np.int64),
        "offset": np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        "token": np.concatenate([np.asarray(ids, np.int32) for _, ids, _ in scored_rows]),
        "logprob": np.concatenate([score.logprobs for score in scores]),
        "top_id": np.concatenate([score.top_ids for score in scores if score.top_ids is not None]),
        "top_logprob": np.concatenate([score.top_logprobs for score in scores if score.top_logprobs is not None]),
    }
    if bad := not_finite(arrays):
        raise TrainingError(f"{path}: {bad} of the teacher has values that are not finite; nothing was written")
    with whole_file(path) as partial:
        save_file(arrays, partial, metadata={"form": FORM, "about": json.dumps(about)})
    return len(scored_rows)


def teach(
    config: TuneConfig,
    name: str,
    path: Path,
    *,
    top_k: int,
    cache: ProgramCache | None = None,
    startup: Startup | None = None,
) -> tuple[int, int]:
    """Score all rows of a source with its teacher, store the scores, and return the numbers of rows and tokens.

    Args:
      cache: executables of earlier runs.
      startup: shows how far it is.

    Raises:
      ConfigError: the teacher cannot score data, or a row has no completion or is longer than optim.length.
    """
    startup = startup or Startup()
    session = open_model(config.model, config.model.path, cache=cache, startup=startup)
    source = FileSource(name, config.data[name], session)
    num_rows = len(source.rows.survey)  # held out or not
    teachers = open_teachers(config, session, startup=startup)
    teacher_name = config.data[name].teacher or next(iter(teachers), "")
    if teacher_name not in teachers or config.teachers[teacher_name].kind == "stored":
        raise ConfigError(f"data.{name}.teacher: expected a teacher of kind base, checkpoint or remote")
    teacher, optim = teachers[teacher_name], config.optim
    tokens = 0

    def rows() -> Iterator[tuple[Prompt, Sequence[int], Scored]]:
        nonlocal tokens
        for begin in range(0, num_rows, CHUNK):
            stage.advance(begin, num_rows)
            numbers = range(begin, min(begin + CHUNK, num_rows))
            rollouts = [rollout for i in numbers for rollout in data_rollouts(source.line(i), group=i)]
            kept, lost = cut_to_rows(rollouts, optim.length)
            if lost:
                raise ConfigError(f"data.{name}: {lost} rows are longer than optim.length = {optim.length}; raise it")
            if isinstance(teacher, Resident):
                options = {"rows": optim.rows, "length": optim.length, "num_tokens": num_tokens_of(session)}
                scored = teacher.score(kept, top=top_k, **options)
            else:
                scored = teacher.score(kept, top=top_k)
            tokens += sum(len(rollout.ids) for rollout in kept)
            yield from ((rollout.prompt, rollout.ids, score) for rollout, score in zip(kept, scored, strict=True))

    with startup.stage("scoring", f"scoring data.{name}", unit="rows") as stage:
        count = store(path, rows(), about={"teacher": teacher_name, "source": name})
        stage.advance(count, count)
    return count, tokens
