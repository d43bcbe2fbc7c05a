"""A teacher on an OpenAI-compatible server that has `prompt_logprobs` in /v1/completions, such as vLLM or ours."""

from __future__ import annotations

import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from stepjax.errors import ConfigError, TrainingError
from stepjax.infer.session import Session
from stepjax.train.config.tune import TeacherSettings
from stepjax.train.rollouts.sampler import Rollout
from stepjax.train.teachers.resident import Scored, prompt_with

FIRST_WAIT_S = 0.5  # before the second try; each further wait is twice as long
TOP_K = 20  # likeliest tokens that a server is asked for
RETRIED = (408, 409, 425, 429, 500, 502, 503, 504)


class Remote:
    """Scores sequences with a server: each is sent as a prompt, whose log-probabilities the server returns."""

    def __init__(self, settings: TeacherSettings, student: Session, *, name: str):
        """ConfigError: the key is not in the environment, or the URL is not valid."""
        self._settings, self._session, self._name = settings, student, f"teachers.{name}"
        if not settings.url.startswith(("http://", "https://")):
            raise ConfigError(f"{self._name}.url: is {settings.url!r}, expected http://HOST:PORT/v1")
        self._headers = {"Content-Type": "application/json"}
        if settings.key_variable:
            key = os.environ.get(settings.key_variable)
            if not key:
                raise ConfigError(f"{self._name}.key_variable: {settings.key_variable} is not in the environment")
            self._headers["Authorization"] = f"Bearer {key}"
        # No proxy of the environment is used: it could reach another server than the one in the settings.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    @property
    def top_k(self) -> int:
        """Likeliest tokens that a server is asked for."""
        return TOP_K

    def score(self, rollouts: Sequence[Rollout], *, top: int) -> list[Scored]:
        """As `stepjax.train.teachers.resident.Scorer.score`, with several requests at a time.

        Raises:
          TrainingError: the server does not answer, or its answer lacks the log-probabilities.
        """
        with ThreadPoolExecutor(self._settings.workers, thread_name_prefix="teacher") as pool:
            return list(pool.map(lambda rollout: self._score(rollout, top), rollouts))

    def _score(self, rollout: Rollout, top: int) -> Scored:
        prompt = prompt_with(self._session, rollout.prompt, self._settings.system)
        ids = [*prompt, *rollout.ids]
        body: dict[str, Any] = {"prompt": ids, "max_tokens": 1, "temperature": 0, "prompt_logprobs": top}
        if self._settings.model:
            body["model"] = self._settings.model
        answer = self._request(body)
        try:
            entries = answer["choices"][0]["prompt_logprobs"][len(prompt) :]
            if len(entries) != len(rollout.ids):
                raise ValueError
            return _read_scores(entries, rollout.ids, top)
        except (KeyError, IndexError, TypeError, ValueError):
            raise TrainingError(
                f"{self._name}: {self._settings.url} did not give prompt_logprobs of {len(ids)} tokens with the "
                f"{top} likeliest; the server must support prompt_logprobs in /v1/completions for token ids"
            ) from None

    def _request(self, body: dict[str, Any]) -> dict[str, Any]:
        """The server's answer. Temporary errors are retried after a wait."""
        request = urllib.request.Request(
            f"{self._settings.url.rstrip('/')}/completions", json.dumps(body).encode(), self._headers
        )
        wait, problem = FIRST_WAIT_S, ""
        for attempt in range(self._settings.retries + 1):
            if attempt:
                time.sleep(wait)
                wait *= 2
            try:
                with self._opener.open(request, timeout=self._settings.timeout_s) as answer:
                    return json.loads(answer.read())
            except urllib.error.HTTPError as error:
                problem = f"HTTP {error.code}: {error.read(500).decode('utf-8', 'replace')}"
                if error.code not in RETRIED:
                    break
            except (OSError, http.client.HTTPException, ValueError) as error:  # no connection, a timeout, half a body
                problem = str(error) or type(error).__name__
        raise TrainingError(
            f"{self._name}: no answer from {self._settings.url} in {attempt + 1} tries of {self._settings.timeout_s} s "
            f"({problem}). Check that the server runs; the same command resumes the run from its last checkpoint"
        )


def _read_scores(entries: Sequence[dict[str, Any]], ids: Sequence[int], top: int) -> Scored:
    """Scores from the server's form: for each position a table by token id, of the token and of the likeliest ones."""
    logprobs = np.asarray([entry[str(token)]["logprob"] for entry, token in zip(entries, ids, strict=True)], np.float32)
    if not top:
        return Scored(logprobs)
    top_ids, top_logprobs = np.zeros((len(ids), top), np.int32), np.zeros((len(ids), top), np.float32)
    for position, entry in enumerate(entries):
        ranked = sorted(((score["logprob"], -int(token)) for token, score in entry.items()), reverse=True)[:top]
        if len(ranked) < top:
            raise ValueError
        top_ids[position] = [-token for _, token in ranked]
        top_logprobs[position] = [logprob for logprob, _ in ranked]
    return Scored(logprobs, top_ids, top_logprobs)
