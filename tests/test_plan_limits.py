"""Plans with a limit on the time to the first token, and racks whose devices NVLink joins."""

from __future__ import annotations

from typing import Any

from stepjax.config import ModelConfig
from stepjax.sharding.dispatch import dispatch_seconds
from stepjax.sharding.expert_group import Group
from stepjax.sharding.expert_traffic import domain_size
from stepjax.sharding.mesh import MeshSpec
from stepjax.sharding.planner.candidate import Candidate
from stepjax.sharding.planner.exchanges import StepShape, serving_exchanges
from stepjax.sharding.planner.hardware import parse
from stepjax.sharding.planner.options import Choice, Goal, Option, PlanRequest, Refusal
from stepjax.sharding.planner.search import weigh
from stepjax.weights.plain import PLAIN

FLASH = ModelConfig.preset("step-3.5-flash")


TENSOR = Choice(MeshSpec(tensor=8), "expert_tensor", PLAIN)


def weighed(goal: Goal, **given: Any) -> Option | Refusal:
    """Eight H100 in bfloat16 without drafts."""
    return weigh(FLASH, parse("8xH100"), PlanRequest(goal, **given), TENSOR)


def test_a_first_token_that_is_late_is_refused():
    free = weighed("latency", context=32768)
    assert isinstance(free, Option)
    assert weighed("latency", context=32768, ttft_s=free.prompt_s) == free
    late = weighed("latency", context=32768, ttft_s=0.9 * free.prompt_s)
    assert isinstance(late, Refusal)
    assert late.reason.startswith("late first token: a prompt of 32,768 takes ")
    assert late.reason.endswith(f" ms, expected {0.9e3 * free.prompt_s:g} at most")


def test_a_context_is_as_long_as_its_first_token_allows():
    free = weighed("latency", context=32768)
    assert isinstance(free, Option)
    longest = weighed("context", ttft_s=free.prompt_s)
    assert isinstance(longest, Option)
    assert 32768 <= longest.context < FLASH.max_positions
    assert longest.prompt_s <= free.prompt_s


def test_a_rack_chooses_how_tokens_reach_experts_as_its_runtime_does():
    """72 devices that NVLink joins: an exchange where a board of eight would still gather."""
    choice = Choice(MeshSpec(expert=72), "wide", PLAIN)
    for hardware, domain in (("72xGB200", 72), ("72xH100", 8)):
        candidate = Candidate.of(FLASH, parse(hardware), PlanRequest("latency"), choice)
        assert isinstance(candidate, Candidate)
        assert candidate.layout.domain == domain_size(candidate.cluster.device.name) == domain
        for tokens in (1, 8, 32, 128):
            work = StepShape("decode", 72 * tokens, 1, 4096)
            seconds = dispatch_seconds(FLASH, Group.of(candidate.layout.rules), tokens, domain=domain)
            kinds = {exchange.kind for exchange in serving_exchanges(candidate.layout, work, rows_split=False)}
            assert ("all-to-all" in kinds) == (seconds["exchange"] < seconds["gather"]), (hardware, tokens)
