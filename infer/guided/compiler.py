"""The one gateway through which grammars are compiled, and matchers that follow an answer through one.

A grammar comes from a stranger. It is compiled in a child process first, with its time and memory bounded, and refused
if that fails. A matcher must live where answers are sampled; what the child has compiled within its limits is compiled
here again, in the same time at most, and llguidance's own limits bound every step that a matcher takes afterwards.
"""

from __future__ import annotations

import base64
import json
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from stepjax.infer.guided.schema_grammar import GrammarError
from stepjax.infer.guided.worker import Vocabulary, tokenizer_of
from stepjax.text.sandbox import ChildProcess
from stepjax.text.tokenizer import Tokenizer

_WORKER = Path(__file__).with_name("worker.py")


@dataclass(frozen=True)
class GrammarLimits:
    """What one grammar may use."""

    compile_s: float = 2.0  # of processor time; real ones take milliseconds
    wall_s: float = 30.0  # until one is compiled, on a machine that does much else
    start_s: float = 60.0  # of the child, with its vocabulary; about 2 s for 128,000 entries
    memory_bytes: int = 2 << 30  # address space of the child
    kept: int = 32  # compiled grammars, and refusals
    refused_s: float = 60.0  # before a refused grammar is tried again
    lexer_states: int = 50_000  # 1 to 2 kB each, made as answers go on
    step_fuel: int = 200_000  # of the lexer at one token: about 15 ms
    step_items: int = 50_000  # of the parser at one token

    @property
    def parser(self) -> dict[str, int | bool]:
        """In llguidance's terms."""
        return {
            "max_lexer_states": self.lexer_states,
            "step_lexer_fuel": self.step_fuel,
            "step_max_items": self.step_items,
            "verbose_errors": False,
        }


class Matcher:
    """Where an answer is in its grammar. One thread at a time."""

    def __init__(self, inner: LLMatcher, eos: frozenset[int]):
        self._inner, self._eos = inner, eos

    def copy(self) -> Matcher:
        return Matcher(self._inner.deep_copy(), self._eos)

    def allowed(self, num_words: int) -> np.ndarray:
        """The tokens that may follow, a bit each: uint32 [num_words].

        Raises:
          GrammarError: a limit was reached.
        """
        found = np.frombuffer(self._inner.compute_bitmask(), np.uint32)
        self._check()
        words = np.zeros((num_words,), np.uint32)
        words[: len(found)] = found[:num_words]
        return words

    def push(self, token: int) -> None:
        """Take a token.

        Raises:
          GrammarError: it does not follow.
        """
        if not self._inner.consume_token(token):
            self._check()
            raise GrammarError(f"token {token} does not follow")

    def pop(self, count: int) -> None:
        """Forget the last ``count`` tokens."""
        if count:
            self._inner.rollback(count)
            self._check()

    @property
    def complete(self) -> bool:
        """Whether nothing can follow."""
        return self._inner.is_stopped()

    def ends_with(self, token: int) -> bool:
        """Whether a token would end the answer here."""
        return token in self._eos and self._inner.is_accepting()

    def _check(self) -> None:
        if self._inner.is_error():
            raise GrammarError(_told(self._inner.get_error()))


class _Refusal(NamedTuple):
    reason: str
    until_s: float  # by the monotonic clock; another time the memory may be there, or the time


class Grammars:
    """Compiles grammars over one tokenizer. Safe to share between threads."""

    def __init__(self, tokenizer: Tokenizer, eos_ids: Sequence[int], *, limits: GrammarLimits | None = None):
        """Starts nothing yet."""
        self.limits = limits or GrammarLimits()
        size = len(tokenizer)
        # Ends that no token is stand for none; then the end of a turn says that an answer is complete.
        self.eos_ids = [each for each in eos_ids if 0 <= each < size] or [tokenizer.special.im_end]
        self._vocabulary = {
            "tokens": [base64.b64encode(tokenizer.token_bytes([at])).decode() for at in range(size)],
            "special": sorted(tokenizer.controls.values()),
            "eos": self.eos_ids,
        }
        self._kind = _spelling_as(tokenizer)
        self._child = _Compiler(self._vocabulary, self.limits)
        self._lock = threading.Lock()
        self._tokenizer: LLTokenizer | None = None
        self._kept: OrderedDict[str, Matcher | _Refusal] = OrderedDict()

    def warm(self) -> None:
        """Start the child and read the vocabulary."""
        self.compile('start: "a"')

    def compile(self, grammar: str, *, name: str = "grammar") -> Matcher:
        """A matcher at the beginning of an answer. Takes its time: not for an event loop.

        Raises:
          GrammarError: it is none, has no match, or is too large.
        """
        with self._lock:
            found = self._kept.get(grammar)
            if isinstance(found, _Refusal) and found.until_s < time.monotonic():
                found = None
        if found is None:
            try:
                found = self._compiled(grammar)
            except GrammarError as error:
                found = _Refusal(str(error), time.monotonic() + self.limits.refused_s)
        with self._lock:
            self._kept[grammar] = found
            self._kept.move_to_end(grammar)
            while len(self._kept) > self.limits.kept:
                self._kept.popitem(last=False)
            if isinstance(found, Matcher):
                return found.copy()
        raise GrammarError(f"{name}: {found.reason}")

    def close(self) -> None:
        self._child.close()

    def _compiled(self, grammar: str) -> Matcher:
        self._child.check(grammar)
        with self._lock:
            if self._tokenizer is None:
                self._tokenizer = tokenizer_of(self._vocabulary, self._kind)
        inner = LLMatcher(
            self._tokenizer,
            grammar,
            log_level=0,
            limits=LLParserLimits(**self.limits.parser),  # type: ignore[arg-type]
        )
        matcher = Matcher(inner, frozenset(self.eos_ids))
        matcher.allowed(1)
        return matcher


def _spelling_as(tokenizer: Tokenizer) -> type[Vocabulary]:
    """A vocabulary that spells forced text as the model was taught to, and not by the letter."""

    class Spelling(Vocabulary):
        def __call__(self, text: str) -> list[int]:
            if not isinstance(text, str):
                return super().__call__(text)
            return tokenizer.encode(text)

    return Spelling


class _Compiler(ChildProcess):
    """The child."""

    _work = "the process that compiles grammars"

    def __init__(self, vocabulary: dict[str, object], limits: GrammarLimits):
        self._vocabulary, self._limits = vocabulary, limits
        arguments = [str(limits.memory_bytes), str(2 * max(limits.wall_s, limits.start_s)), json.dumps(limits.parser)]
        super().__init__(_WORKER, arguments, start_s=limits.start_s, cpu_s=limits.compile_s)

    def check(self, grammar: str) -> None:
        """Raise GrammarError unless it compiles within the limits."""
        with self._turn():
            self._ensure_started()
            reply = self._ask({"grammar": grammar}, seconds=self._limits.wall_s, max_chars=4096)
        if "ok" not in reply:
            raise GrammarError(_told(str(reply.get("error"))))

    def _prepare(self) -> None:
        self._ask(self._vocabulary, seconds=self._limits.start_s, max_chars=0)

    def _error(self, text: str) -> GrammarError:
        return GrammarError(text)

    def _gone(self, limit: str) -> str:
        return f"takes more than {limit} to compile" if limit else "takes too much memory to compile"


def _told(error: str) -> str:
    """llguidance's message, without the grammar that it prints after it."""
    reason = re.search(r"(?m)^error: (.+)", error)
    first = reason[1] if reason else error.split("\n<", 1)[0].split("\n   ", 1)[0]
    return " ".join(first.split())[:300] or "cannot be compiled"
