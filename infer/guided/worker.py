"""The child process that compiles grammars first: `stepjax.infer.guided.compiler` starts it as a script.

Compiling an untrusted expression may take any amount of time and memory. In this process the system limits memory and
processor time, and the parent limits the time until a reply; each limit kills the process. A grammar that passes is
compiled again where it is used, and is then known to be cheap. Messages are JSON, one object a line. First {} (a check
that it runs) and {"tokens", "special", "eos"}, answered by {"ok"}; then {"grammar"}, answered by {"ok"} or {"error"}.
"""

import base64
import contextlib
import json
import signal
import sys
from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

_MAX_ERROR_CHARS = 1000
_MAX_FORCED = 16  # tokens


class Vocabulary:
    """A tokenizer with the interface that llguidance expects. Bytes by id; ids without an entry are empty."""

    def __init__(self, tokens: list[bytes], special: list[int], eos: int):
        self.tokens, self.special_token_ids, self.eos_token_id, self.bos_token_id = tokens, special, eos, None
        self._id_of = {token: i for i, token in enumerate(tokens) if len(token) == 1}

    def __call__(self, text: str) -> list[int]:
        """Ids of a text that the grammar forces. No token is sampled in this process, so any ids will do."""
        if not isinstance(text, str):
            raise TypeError("expected a text")  # tells llguidance that it may not pass bytes
        data = text.encode()
        return [self._id_of[data[i : i + 1]] for i in range(len(data)) if data[i : i + 1] in self._id_of]


def confine(memory_bytes: int) -> None:
    """Give up the rights that compiling does not need."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal reaches the group; the parent decides
    if hasattr(signal, "SIGPROF"):
        signal.signal(signal.SIGPROF, signal.SIG_DFL)  # ends the process when its time is used up
    with contextlib.suppress(ImportError):
        import resource

        for name, bound in (("RLIMIT_AS", memory_bytes), ("RLIMIT_FSIZE", 0), ("RLIMIT_CORE", 0)):
            with contextlib.suppress(AttributeError, ValueError, OSError):
                resource.setrlimit(getattr(resource, name), (bound, bound))


def set_timers(cpu_s: float, wall_s: float) -> None:
    """Seconds after which the system ends this process, 0 for none. Wall time is limited in case the parent died."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, cpu_s)
        signal.setitimer(signal.ITIMER_REAL, wall_s)


def tokenizer_of(request: dict[str, Any], kind: type[Vocabulary] = Vocabulary) -> LLTokenizer:
    tokens = [base64.b64decode(token) for token in request["tokens"]]
    eos = request["eos"]
    return LLTokenizer(TokenizerWrapper(kind(tokens, request["special"], eos[0])), eos_token=eos)


def fault(tokenizer: LLTokenizer, grammar: str, limits: LLParserLimits) -> str:
    """The error of a grammar; "" if an answer can begin."""
    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=limits)
    for _ in range(_MAX_FORCED):  # forced tokens do not show whether the rest can be compiled
        if matcher.is_error():
            break
        mask = int.from_bytes(matcher.compute_bitmask(), "little")
        if matcher.is_error() or mask.bit_count() != 1:
            break
        matcher.consume_token(mask.bit_length() - 1)
    error = matcher.get_error()
    return "no text matches it" if error.startswith("NoExtension") else error


def main() -> None:
    """Serve requests until the parent closes the pipe.

    Arguments: processor seconds per grammar, bytes of memory, wall seconds per request, limits as JSON.
    """
    cpu_s, memory_bytes, wall_s = float(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    confine(memory_bytes)
    limits = LLParserLimits(**json.loads(sys.argv[4]))
    tokenizer: LLTokenizer | None = None
    for line in sys.stdin.buffer:
        request = json.loads(line)
        set_timers(cpu_s if "grammar" in request else 0, wall_s)  # a vocabulary takes longer, and is trusted
        reply: dict[str, Any] = {"ok": True}
        if "tokens" in request:
            tokenizer = tokenizer_of(request)
        elif "grammar" in request:
            assert tokenizer is not None, "the vocabulary comes first"
            if error := fault(tokenizer, request["grammar"], limits):
                reply = {"error": error[:_MAX_ERROR_CHARS]}
        set_timers(0, 0)
        sys.stdout.buffer.write(json.dumps(reply).encode() + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
