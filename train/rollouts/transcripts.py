"""Rollouts for people to read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from stepjax.infer.session import Session
from stepjax.train.rollouts.sampler import Rollout

UNLIKELY = 5  # tokens of an answer that are listed, the least likely first


def write_transcripts(path: Path, rollouts: Sequence[Rollout], session: Session) -> None:
    """The first answers of a step as one text file, whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text("\n".join(_one(each, session) for each in rollouts), encoding="utf-8")
    partial.replace(path)


def _one(rollout: Rollout, session: Session) -> str:
    assert session.tokenizer is not None
    decode = session.tokenizer.decode
    prompt, answer = (decode(ids, skip_special=False) for ids in (rollout.prompt.ids, rollout.ids))
    end = "cut off" if rollout.truncated else "ended"
    head = (
        f"## {rollout.prompt.source} row {rollout.prompt.index} · reward {rollout.reward:g} · "
        f"{rollout.num_own} tokens, {end} · {rollout.turns} turns · policy of step {rollout.policy_step}"
    )
    own = [(value, at) for at, (value, mine) in enumerate(zip(rollout.logprobs, rollout.own, strict=True)) if mine]
    least = [f"{decode([rollout.ids[at]], skip_special=False)!r} {value:.2f}" for value, at in sorted(own)[:UNLIKELY]]
    return f"{head}\n\n{prompt}▶{answer}\n\nleast likely (log-probability): {', '.join(least)}\n"
