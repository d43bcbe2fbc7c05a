"""An engine whose answers are written beforehand, for tests of what a server makes of them.

A request's ``top_k`` says which script its answers follow. The tokens come in groups, as with drafts.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence

from serving import CONFIG

from stepjax.infer.engine.answer import Answer, TokenScore
from stepjax.infer.engine.engine import Engine, Update
from stepjax.infer.session import Session
from stepjax.text.tokenizer import Tokenizer

CALL = "<tool_call>\n<function=get_weather>\n<parameter=city>\nSão 1\n</parameter>\n</function>\n</tool_call>"
LINES = "<tool_call>\n<function=get_weather>\n<parameter=city>\na\n</parameter>\n<parameter=x>\n2\n</parameter>\n"
CUSTOM = "<tool_call>\n<function=run>\n<parameter=input>\n82 é\n{}\n</parameter>\n</function>\n</tool_call>\n"
# What the answers say. "</think>" and the like are control tokens; a text in a list is spelled byte by byte.
SCRIPTS: dict[str, list[str | list[str] | list[bytes]]] = {
    "plain": ["7+8+0=5 carry 1\n", "</think>", "\n825 is the sum.\nIt is 825", "<|im_end|>"],
    "letters": ["é 你好", "</think>", "\n", ["Çé 你好 😀\nx"], " a😀b", "<|im_end|>"],
    "call": ["think\n", "</think>", "\nI look.\n", CALL, "\n", "<|im_end|>"],
    "calls": ["think", CALL, "\n", [CALL], "and\n82 then", CALL, CALL, "\nso 825.", "<|im_end|>"],
    "a custom call": ["t", "</think>", "\n", CUSTOM, CALL.replace("get_weather", "files__get_weather"), "<|im_end|>"],
    "a call ends the thinking": ["a 82\n", "<tool_call>", CALL.removeprefix("<tool_call>"), "<|im_end|>"],
    "an open call": ["x", "</think>", "\nHi 82 ", LINES, "82"],
    "markers": ["a", "</think>", "\nb</", "</think>", "\nc <tool 8", "</think>", "2 <", "<think>", "d\n", "<|im_end|>"],
    "bytes": ["t", "</think>", [b"a\xf0\x9f", b"b\xe4\xbd", b"\x82\xff\xc3"], "825", [b"\xf0\x9f\x98"]],
    "only thinking": ["it goes on\n82 and 825 and on"] * 3,
    "object": ["so", "</think>", '\n{"city": "82\n5", "x": 1}', "<|im_end|>"],
    "nothing": ["</think>", "<|im_end|>"],
    "no thinking": ["825", "<|im_end|>"],
}


def encode(tokenizer: Tokenizer, script: Sequence[str | list[str] | list[bytes]]) -> list[int]:
    """The ids of a script."""
    by_bytes = {tokenizer.token_bytes([token]): token for token in reversed(range(len(tokenizer)))}
    ids: list[int] = []
    for piece in script:
        if isinstance(piece, list):
            data = b"".join(part.encode() if isinstance(part, str) else part for part in piece)
            ids += [by_bytes[bytes([byte])] for byte in data]
            continue
        while piece:
            marker = min((name for name in tokenizer.controls if name in piece), key=piece.index, default="")
            text, _, piece = piece.partition(marker) if marker else (piece, "", "")
            ids += tokenizer.encode(text) + ([tokenizer.controls[marker]] if marker else [])
    return ids


class ScriptedEngine(Engine):
    """Runs no model. Later answers are heard of first."""

    def __init__(self, session: Session):
        super().__init__(session, CONFIG)
        assert session.tokenizer is not None
        self.most = 4  # tokens that come in a step
        self.reader: asyncio.AbstractEventLoop | None = None  # the loop that reads each step before the next
        self._scripts = [encode(session.tokenizer, script) for script in SCRIPTS.values()]
        self._said: dict[str, int] = {}

    def start(self, *, progress: object = None) -> None:
        """Nothing is compiled."""

    def step(self) -> list[Update]:
        if self.reader is not None:
            asyncio.run_coroutine_threadsafe(_turns(4), self.reader).result(60)
        return [self._say(id, answer) for id, answer in reversed(list(self._answers.items()))]

    def _say(self, id: str, answer: Answer) -> Update:
        params, said = answer.sequence.params, self._said.setdefault(id, 0)
        script = self._scripts[(params.top_k - 1 + int(id.partition("/")[2] or 0)) % len(self._scripts)]
        count = random.Random(said + len(script)).randint(1, self.most)
        tokens = script[said : said + count][: params.max_tokens - said]
        end = next((at for at, token in enumerate(tokens) if token in answer.ends), None)
        tokens = tuple(tokens if end is None else tokens[: end + 1])
        reason = "stop" if end is not None else "length" if said + len(tokens) >= params.max_tokens else None
        if not tokens:  # the script ends without an end
            reason = "length"
        places, top = range(said, said + len(tokens)), params.logprobs
        scores = () if top is None else tuple(_score(place, top) for place in places)
        num_prompt = len(answer.sequence.prompt)
        prompt = () if params.prompt_logprobs is None or said else _prompt_scores(num_prompt, params.prompt_logprobs)
        self._said[id] = said + len(tokens)
        if reason:
            self.finish(id, reason)
        return Update(id, tokens, reason, scores, prompt, num_cached=num_prompt // 2)


async def _turns(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


def _score(position: int, top: int) -> TokenScore:
    likeliest = tuple((40 + (position * 7 + rank) % 300, -0.5 - rank) for rank in range(top))
    return TokenScore(-0.125 * (1 + position % 8), likeliest)


def _prompt_scores(count: int, top: int) -> tuple[TokenScore, ...]:
    return tuple(_score(1000 + position, top) for position in range(1, count))
