"""The only place where grammars are compiled, and the matchers that follow an answer through a grammar.

A grammar is untrusted input. A child process with limited time and memory compiles it first; if that fails, the grammar
is refused. Matchers are needed in the process that samples, so a grammar that passed is compiled again here, in at most
the same time. Afterwards llguidance's own limits bound every step of a matcher.
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
    wall_s: float = 30.0  # until a grammar is compiled, on a busy machine
    start_s: float = 60.0  # start of the child, which reads the vocabulary: about 2 s for 128,000 entries
    memory_bytes: int = 2 << 30  # address space of the child
    kept: int = 32  # cached results, compiled grammars and refusals
    refused_s: float = 60.0  # before a refused grammar is tried again
    lexer_states: int = 50_000  # 1 to 2 kB each, made as answers grow
    step_fuel: int = 200_000  # of the lexer at one token: about 15 ms
    step_items: int = 50_000  # of the parser at one token

    @property
    def parser(self) -> dict[str, int | bool]:
        """The limits by llguidance's names."""
        return {
            "max_lexer_states": self.lexer_states,
            "step_lexer_fuel": self.step_fuel,
            "step_max_items": self.step_items,
            "verbose_errors": False,
        }


class Matcher:
    """The position of an answer in its grammar. Not thread-safe."""

    def __init__(self, inner: LLMatcher, eos: frozenset[int]):
        self._inner, self._eos = inner, eos

    def copy(self) -> Matcher:
        return Matcher(self._inner.deep_copy(), self._eos)

    def allowed(self, num_words: int) -> np.ndarray:
        """The tokens that may follow, one bit per token: uint32 [num_words].

        Raises:
          GrammarError: a limit was reached.
        """
        bits = np.frombuffer(self._inner.compute_bitmask(), np.uint32)
        self._check()
        words = np.zeros((num_words,), np.uint32)
        words[: len(bits)] = bits[:num_words]
        return words

    def push(self, token: int) -> None:
        """Take a token.

        Raises:
          GrammarError: the grammar does not allow it.
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
    until_s: float  # of the monotonic clock; a later attempt may have enough memory or time


class Grammars:
    """Compiles grammars over one tokenizer. Safe to share between threads."""

    def __init__(self, tokenizer: Tokenizer, eos_ids: Sequence[int], *, limits: GrammarLimits | None = None):
        """Starts no process; the first grammar does."""
        self.limits = limits or GrammarLimits()
        size = len(tokenizer)
        # Without an end-of-sequence id inside the vocabulary, the end of a turn marks a complete answer.
        self.eos_ids = [token for token in eos_ids if 0 <= token < size] or [tokenizer.special.im_end]
        self._vocabulary = {
            "tokens": [base64.b64encode(tokenizer.token_bytes([token])).decode() for token in range(size)],
            "special": sorted(tokenizer.controls.values()),
            "eos": self.eos_ids,
        }
        self._kind = _spelling_as(tokenizer)
        self._child = _Compiler(self._vocabulary, self.limits)
        self._lock = threading.Lock()
        self._tokenizer: LLTokenizer | None = None
        self._kept: OrderedDict[str, Matcher | _Refusal] = OrderedDict()

    def warm(self) -> None:
        """Start the child process and give it the vocabulary."""
        self.compile('start: "a"')

    def compile(self, grammar: str, *, name: str = "grammar") -> Matcher:
        """A matcher at the beginning of an answer. May take seconds: do not call it in an event loop.

        Raises:
          GrammarError: the grammar is not valid, matches no text, or is too large.
        """
        with self._lock:
            result = self._kept.get(grammar)
            if isinstance(result, _Refusal) and result.until_s < time.monotonic():
                result = None
        if result is None:
            try:
                result = self._compiled(grammar)
            except GrammarError as error:
                result = _Refusal(str(error), time.monotonic() + self.limits.refused_s)
        with self._lock:
            self._kept[grammar] = result
            self._kept.move_to_end(grammar)
            while len(self._kept) > self.limits.kept:
                self._kept.popitem(last=False)
            if isinstance(result, Matcher):
                return result.copy()
        raise GrammarError(f"{name}: {result.reason}")

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
    """A vocabulary that encodes forced text with the tokenizer, as in training, and not byte by byte."""

    class Spelling(Vocabulary):
        def __call__(self, text: str) -> list[int]:
            if not isinstance(text, str):
                return super().__call__(text)
            return tokenizer.encode(text)

    return Spelling


class _Compiler(ChildProcess):
    """The child process that compiles grammars."""

    _work = "the process that compiles grammars"

    def __init__(self, vocabulary: dict[str, object], limits: GrammarLimits):
        self._vocabulary, self._limits = vocabulary, limits
        arguments = [str(limits.memory_bytes), str(2 * max(limits.wall_s, limits.start_s)), json.dumps(limits.parser)]
        super().__init__(_WORKER, arguments, start_s=limits.start_s, cpu_s=limits.compile_s)

    def check(self, grammar: str) -> None:
        """Raise GrammarError unless the grammar compiles within the limits."""
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
    """llguidance's message, without the grammar printed after it."""
    reason = re.search(r"(?m)^error: (.+)", error)
    first = reason[1] if reason else error.split("\n<", 1)[0].split("\n   ", 1)[0]
    return " ".join(first.split())[:300] or "cannot be compiled"
