"""Plans with a limit on the time to the first token, and racks whose devices NVLink joins."""

from __future__ import annotations

from typing import Any

from stepjax.config import ModelConfig
from stepjax.sharding.dispatch import dispatch_seconds
from stepjax.sharding.expert_parallel import Group
from stepjax.sharding.expert_traffic import domain_size
from stepjax.sharding.mesh import MeshSpec
from stepjax.sharding.planner.candidate import Candidate
from stepjax.sharding.planner.exchanges import StepShape, serving_exchanges
from stepjax.sharding.planner.hardware import parse
from stepjax.sharding.planner.options import Choice, Plan, PlanRequest
from stepjax.sharding.planner.search import rank_options
from stepjax.weights.plain import PLAIN

FLASH = ModelConfig.preset("step-3.5-flash")


def plan(**given: Any) -> Plan:
    """Of two nodes of eight H100 in bfloat16 without drafts."""
    return rank_options(FLASH, parse("2 nodes of 8xH100"), PlanRequest(experts=(PLAIN,), drafts=(0,), **given))


def test_a_first_token_in_time_may_take_another_layout():
    """A limit leaves out what is slower, ranks the others as before, and a context is as long as it allows."""
    free = plan(goal="latency", context=32768)
    limit = sorted(option.prompt_s for option in free.options)[0]
    held = plan(goal="latency", context=32768, ttft_s=limit)
    assert [o.choice for o in held.options] == [o.choice for o in free.options if o.prompt_s <= limit]
    late = [refusal.reason for refusal in held.refusals if "late first token" in refusal.reason]
    assert len(late) >= len(free.options) - len(held.options) > 0
    assert all(
        "a prompt of 32,768 takes" in reason and f"expected {1e3 * limit:g} at most" in reason for reason in late
    )
    longest = plan(goal="context", ttft_s=limit).options[0]
    assert 32768 <= longest.context < FLASH.max_positions
    assert longest.prompt_s <= limit


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
