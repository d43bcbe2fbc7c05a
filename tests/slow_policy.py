"""Losses of the policy objectives as their papers read: answer by answer, token by token, in float64.

`loss_of_batch` takes every log-probability twice: the first is differentiated, the second stands in for it where a
formula has a constant. Gradients are central differences, so nothing here shares code with what it checks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

STEP = 1e-6  # of the central differences, whose error is about STEP² and the rounding 1e-16 / STEP


@dataclass(frozen=True)
class Answer:
    """One answer of n tokens."""

    mu: np.ndarray  # log-probabilities of the sampler [n]
    reference: np.ndarray  # of the base [n]
    teacher: np.ndarray  # of the teacher [n]
    advantage: float


@dataclass(frozen=True)
class Terms:
    """The settings, in the words of the papers."""

    formula: str
    low: float = -math.inf  # bounds of the ratio
    high: float = math.inf
    average: str = "tokens"
    longest: int = 1  # of "constant"
    cap: float = math.inf
    inside: tuple[float, float] = (-math.inf, math.inf)  # of a token's ratio
    means: tuple[float, float] = (-math.inf, math.inf)  # of the geometric mean of an answer's ratios
    beta: float = 0.0
    estimator: str = "k3"
    teacher_weight: float = 0.0


def loss_of_answer(answer: Answer, pi: np.ndarray, fixed: np.ndarray, terms: Terms) -> list[float]:
    """The loss of each token. ``pi`` is differentiated, ``fixed`` is the same as a constant."""
    count, losses = len(pi), []
    for t in range(count):
        advantage = answer.advantage + terms.teacher_weight * (answer.teacher[t] - answer.mu[t])
        if terms.formula == "ppo":
            ratio = math.exp(pi[t] - answer.mu[t])
            if not terms.inside[0] <= math.exp(fixed[t] - answer.mu[t]) <= terms.inside[1]:
                ratio = 0.0
            if math.exp(fixed[t] - answer.mu[t]) > terms.cap:
                ratio = terms.cap * math.exp(pi[t] - fixed[t])
            loss = -min(ratio * advantage, min(max(ratio, terms.low), terms.high) * advantage)
        elif terms.formula == "gspo":
            ratio = math.exp(sum(pi[i] - answer.mu[i] for i in range(count)) / count)
            loss = -min(ratio * advantage, min(max(ratio, terms.low), terms.high) * advantage)
        elif terms.formula == "cispo":
            weight = min(max(math.exp(fixed[t] - answer.mu[t]), terms.low), terms.high)
            loss = -weight * advantage * pi[t]
        else:
            mean = math.exp(sum(fixed[i] - answer.mu[i] for i in range(count)) / count)
            kept = terms.means[0] <= mean <= terms.means[1]
            kept = kept and terms.inside[0] <= math.exp(fixed[t] - answer.mu[t]) <= terms.inside[1]
            loss = -advantage * pi[t] if kept else 0.0
        if terms.beta:
            loss += terms.beta * penalty(pi[t], fixed[t], answer.mu[t], answer.reference[t], terms.estimator)
        losses.append(loss)
    return losses


def penalty(pi: float, fixed: float, mu: float, reference: float, estimator: str) -> float:
    difference = pi - reference
    if estimator == "k1":
        constant = fixed - reference
        return constant + math.exp(fixed - mu) * constant * (pi - fixed)
    if estimator == "k2":
        return difference**2 / 2
    return math.exp(-difference) - 1 + difference


def loss_of_batch(answers: list[Answer], pi: list[np.ndarray], fixed: list[np.ndarray], terms: Terms) -> float:
    """The mean that the settings name."""
    losses = [loss_of_answer(answer, x, same, terms) for answer, x, same in zip(answers, pi, fixed, strict=True)]
    if terms.average == "tokens":
        return sum(map(sum, losses)) / sum(map(len, losses))
    if terms.average == "answers":
        return sum(sum(tokens) / len(tokens) for tokens in losses) / len(losses)
    return sum(sum(tokens) / terms.longest for tokens in losses) / len(losses)


def gradient(answers: list[Answer], pi: list[np.ndarray], terms: Terms) -> list[np.ndarray]:
    """Of `loss_of_batch` by each log-probability."""
    slopes = [np.zeros(len(values)) for values in pi]
    for number, values in enumerate(pi):
        for t in range(len(values)):
            ends = []
            for step in (STEP, -STEP):
                moved = [each.copy() for each in pi]
                moved[number][t] += step
                ends.append(loss_of_batch(answers, moved, pi, terms))
            slopes[number][t] = (ends[0] - ends[1]) / (2 * STEP)
    return slopes
