"""Rollouts as text for people to read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from stepjax.infer.session import Session
from stepjax.train.rollouts.sampler import Rollout

UNLIKELY = 5  # least likely tokens that are listed for each answer


def write_transcripts(path: Path, rollouts: Sequence[Rollout], session: Session) -> None:
    """Write answers of a step as one text file. It appears only once it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text("\n".join(_transcript(rollout, session) for rollout in rollouts), encoding="utf-8")
    partial.replace(path)


def _transcript(rollout: Rollout, session: Session) -> str:
    assert session.tokenizer is not None
    decode = session.tokenizer.decode
    prompt, answer = (decode(ids, skip_special=False) for ids in (rollout.prompt.ids, rollout.ids))
    end = "cut off" if rollout.truncated else "ended"
    head = (
        f"## {rollout.prompt.source} row {rollout.prompt.index} · reward {_reward(rollout)} · "
        f"{rollout.num_answer_tokens} tokens, {end} · {rollout.turns} turns · policy of step {rollout.policy_step}"
    )
    tokens = zip(rollout.logprobs, rollout.ids, rollout.answer_mask, strict=True)
    scored = [(logprob, token) for logprob, token, in_answer in tokens if in_answer]
    least = [f"{decode([token], skip_special=False)!r} {logprob:.2f}" for logprob, token in sorted(scored)[:UNLIKELY]]
    return f"{head}\n\n{prompt}▶{answer}\n\nleast likely (log-probability): {', '.join(least)}\n"


def _reward(rollout: Rollout) -> str:
    """The reward with its parts, or why there is none."""
    if rollout.failure:
        return f"none ({rollout.failure})"
    parts = ", ".join(f"{name} {value:g}" for name, value in rollout.parts.items())
    return f"{rollout.reward:g}{f' ({parts})' if parts else ''}"
