"""Router replay: the engine tells the experts of every token, and a forward pass and a run that have them follow."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_session
from tuning import SHORT, answers, assert_same, changed, history, interrupt

from stepjax.errors import ConfigError
from stepjax.infer.engine.answer import ExpertRecord
from stepjax.infer.engine.config import EngineConfig
from stepjax.infer.engine.engine import Engine
from stepjax.infer.sampling.params import SamplingParams
from stepjax.infer.steps.state import NO_EXPERT
from stepjax.model.cache import Chunk
from stepjax.model.layout import Layout, Routed, SingleDevice
from stepjax.model.step3p5 import abstract, bind
from stepjax.ops.swiglu import swiglu
from stepjax.train.objectives.objective import Agreement
from stepjax.train.objectives.table import OBJECTIVES
from stepjax.train.tune.run import tune
from stepjax.train.tune.setup import open_run

LENGTH = 128


def test_a_token_keeps_its_first_experts():
    routing = ExpertRecord()
    assert routing.first(3) is None
    pieces = np.arange(4 * 100 * 2 * 3, dtype=np.uint16).reshape(4, 100, 2, 3)
    routing.take(0, pieces[0, :40])
    routing.take(39, pieces[1, :70])  # token 39 again, as after a preemption
    hole = pieces[2, :10].copy()
    hole[3] = NO_EXPERT
    routing.take(120, hole)
    found = routing.first(140)
    assert found is not None
    np.testing.assert_array_equal(found[:40], pieces[0, :40])
    np.testing.assert_array_equal(found[40:109], pieces[1, 1:70])
    np.testing.assert_array_equal(found[[*range(120, 123), *range(124, 130)]], np.delete(hole, 3, axis=0))
    unknown = (found == NO_EXPERT).all(axis=(1, 2))
    assert np.flatnonzero(unknown).tolist() == [*range(109, 120), 123, *range(130, 140)]


# --- the engine


def own_experts(ids: list[int]) -> np.ndarray:
    """The routers' choice in one pass over a sequence: int32 [tokens, MoE layers, A]."""
    session = tiny_session()
    row = jnp.asarray([ids + [0] * (LENGTH - len(ids))], jnp.int32)
    return np.stack(_in_one_pass(session.params, row, jnp.asarray([len(ids)], jnp.int32)), axis=2)[0, : len(ids)]


@jax.jit
def _in_one_pass(params: Any, ids_BT: jax.Array, count_B: jax.Array) -> tuple[jax.Array, ...]:
    model = bind(tiny_session().model, params)
    return model.forward(ids_BT, Chunk.at(jnp.zeros_like(count_B), count_B, LENGTH)).expert_ids


@pytest.mark.slow
def test_the_engine_tells_the_experts_of_every_token():
    """Of prompts in pieces, with drafts that are taken back, stops among drafts, and sequences that go and come back;
    the last token of an answer is never run.
    """
    config = EngineConfig(
        num_slots=4,
        context=LENGTH,
        num_pages=16,
        page_size=8,
        widths=(32,),
        token_budget=32,
        speculate=3,
        routing=True,
    )
    engine = Engine(tiny_session(), config)
    assert engine.executor.size.num_snapshots == 0
    random = np.random.default_rng(3)
    prompts = [random.integers(8, 128, int(random.integers(20, 60))).tolist() for _ in range(6)]
    for at, prompt in enumerate(prompts):
        stops = tuple(range(100, 104)) if at % 2 else ()
        sampling = SamplingParams(max_tokens=40, temperature=1.3 * (at % 2), ignore_eos=True, seed=at, stop_ids=stops)
        engine.add(prompt, sampling, id=str(at))
    answers: dict[str, list[int]] = {}
    found: dict[str, np.ndarray | None] = {}
    for update in engine.run():
        answers.setdefault(update.id, []).extend(update.tokens)
        assert (update.experts is not None) == (update.finish_reason is not None)
        found[update.id] = update.experts
    assert engine.scheduler.admission.num_preemptions > 0
    assert sum(engine.stats.accepted) < sum(engine.stats.drafted)
    assert min(map(len, answers.values())) < 40
    for at, prompt in enumerate(prompts):
        ids, experts = [*prompt, *answers[str(at)]], found[str(at)]
        assert experts is not None
        assert experts.dtype == np.uint16
        assert len(experts) == len(ids)
        assert (experts[-1] == NO_EXPERT).all()
        np.testing.assert_array_equal(np.sort(experts[:-1]), np.sort(own_experts(ids)[:-1]))


@pytest.mark.slow
def test_an_engine_tells_nothing_unless_asked():
    engine = Engine(tiny_session(), EngineConfig(num_slots=1, context=LENGTH, num_pages=8, widths=(32,), speculate=0))
    engine.add([5, 9, 20], SamplingParams(max_tokens=3, temperature=0.0, seed=0))
    assert all(update.experts is None for update in engine.run())
    with pytest.raises(ConfigError, match="num_snapshots: is 4, expected 0 with routing"):
        EngineConfig(routing=True, num_snapshots=4)


# --- the forward pass


class Twin(SingleDevice):
    """Slow and obvious: expert after expert over all tokens, weighted where a token's recorded ids name it."""

    def mixture(
        self, moe: Routed, x_BTD: jax.Array, real_BT: jax.Array, recorded_BTA: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        assert recorded_BTA is not None
        router: Any = moe.router  # type: ignore[attr-defined]
        scores = jax.nn.sigmoid(jnp.einsum("btd,ed->bte", x_BTD, router.weight.get_value(), precision="highest"))
        chosen_BTE = jnp.zeros(scores.shape)
        for place in range(recorded_BTA.shape[-1]):
            chosen_BTE += jax.nn.one_hot(recorded_BTA[..., place], scores.shape[-1])
        weight_BTE = scores * chosen_BTE
        weight_BTE = router.scale * weight_BTE / jnp.sum(weight_BTE, axis=-1, keepdims=True)
        gate, up, down = moe.weights()
        assert isinstance(gate, jax.Array)
        assert isinstance(up, jax.Array)
        assert isinstance(down, jax.Array)
        out = moe.common(x_BTD)
        for expert in range(len(gate)):
            hidden = swiglu(x_BTD @ gate[expert].T, x_BTD @ up[expert].T, moe.limit)
            out += weight_BTE[..., expert : expert + 1] * (hidden @ down[expert].T)
        return out, recorded_BTA.astype(jnp.int32)


def measure(layout: Layout) -> Any:
    """``(params, ids, recorded) → gradients by all weights, (hidden states, the routers' choice)``."""
    skeleton = abstract(tiny_session().config, dtype=jnp.float32, layout=layout, mtp=False)

    def loss(params: Any, ids: jax.Array, recorded: jax.Array) -> Any:
        out = bind(skeleton, params).forward(ids, Chunk.whole(*ids.shape), recorded_BTLA=recorded)
        return jnp.mean(jnp.sin(out.hidden_BTD)), (out.hidden_BTD, out.expert_ids)

    return jax.jit(jax.grad(loss, has_aux=True))


@pytest.mark.slow
def test_a_forward_pass_follows_the_record():
    """With other routers than those that chose: states and gradients are the twin's, 1e-5 of the largest entry of each,
    and the biases, which only choose, change nothing.
    """
    config, params = tiny_session().config, tiny_session().params
    params = {name: value for name, value in params.items() if not name.startswith("mtp")}
    ids = jnp.asarray(np.random.default_rng(4).integers(8, 128, (1, LENGTH)), jnp.int32)
    chosen = _in_one_pass(tiny_session().params, ids, jnp.asarray([LENGTH], jnp.int32))
    recorded = jnp.stack(chosen, axis=2).astype(jnp.uint16)
    keys = iter(jax.random.split(jax.random.key(7), 2 * len(params)))
    moved = {
        name: value + 0.1 * jax.random.normal(next(keys), value.shape) if "router" in name else value
        for name, value in params.items()
    }
    run = measure(SingleDevice())
    gradients, (hidden, own) = run(moved, ids, recorded)
    expected, (hidden_1, _) = measure(Twin())(moved, ids, recorded)
    np.testing.assert_allclose(hidden, hidden_1, atol=1e-5 * float(jnp.abs(hidden_1).max()))
    for name, wanted in expected.items():
        bound = 1e-5 * float(jnp.abs(wanted).max())
        np.testing.assert_allclose(gradients[name], wanted, rtol=0, atol=bound, err_msg=name)
        assert bound > 0 or name.startswith(("norm", "lm_head")) or name.endswith("router.bias")
    agreement = Agreement.of(own, recorded, config.num_experts)
    assert float(agreement.tokens) == LENGTH
    assert 0.3 < float(agreement.agreed) / LENGTH < 0.99
    biased = params | {name: value for name, value in moved.items() if name.endswith("router.bias")}
    (_, (kept, _)), (_, (plain, plain_own)) = (run(each, ids, recorded) for each in (biased, params))
    np.testing.assert_array_equal(kept, plain)
    np.testing.assert_array_equal(jnp.stack(plain_own, axis=2), recorded)


def test_agreement_counts_shares_of_what_is_recorded():
    own = [jnp.asarray([[[0, 1], [2, 3], [4, 5]]]), jnp.asarray([[[6, 7], [0, 1], [2, 3]]])]
    recorded = np.full((1, 3, 2, 2), NO_EXPERT, np.uint16)
    recorded[0, 0] = [[1, 0], [6, 5]]  # in any order: three of four
    recorded[0, 2] = [[4, 5], [2, 3]]
    found = Agreement.of(own, jnp.asarray(recorded), 8)
    assert (float(found.tokens), float(found.agreed)) == (2, 1.75)


# --- runs


@pytest.mark.long
@pytest.mark.slow
def test_replay_changes_nothing_where_the_routers_agree(tmp_path):
    """One network in float32, so every router chooses what it chose for the sampler: the run is the other one to 1e-6
    (another program), and resumed in the middle to the bit.
    """
    plain = changed(SHORT, optim={"steps": 3})
    config = changed(plain, rollout={"replay": True})
    expected, whole = tune(plain, tmp_path / "plain"), tune(config, tmp_path / "whole")
    for a, b in zip(jax.tree.leaves(whole.leaves), jax.tree.leaves(expected.leaves), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)
    assert [record["router_agreement"] for record in history(tmp_path / "whole")] == [1.0] * 3
    assert "router_agreement" not in history(tmp_path / "plain")[0]

    interrupt(config, tmp_path / "run", step=2)
    assert_same(whole, tune(config, tmp_path / "run"))
    assert history(tmp_path / "run") == history(tmp_path / "whole")


@pytest.mark.slow
def test_replay_undoes_a_router_that_went_elsewhere():
    """The trainer's biases are moved: without replay it disagrees with the sampler, with it only on the routing."""
    setup = open_run(SHORT)
    recorded = answers(setup, routing=True)
    batches = setup.scoring.prepare(recorded, objective=OBJECTIVES["exact"]).batches
    plain = {name: [micro._replace(experts=None) for micro in parts] for name, parts in batches.items()}
    rng = np.random.default_rng(0)
    moved = {
        name: value + jnp.asarray(rng.normal(0, 0.3, value.shape), value.dtype)
        if name.endswith("router.bias")
        else value
        for name, value in setup.student.params.items()
    }
    same, off, replayed = (
        setup.measure(params, batch, setup.scoring.residents)
        for params, batch in ((setup.student.params, batches), (moved, plain), (moved, batches))
    )
    tokens = sum(len(each.prompt.ids) + len(each.ids) - 1 for each in recorded)
    assert same.agreement is not None
    assert replayed.agreement is not None
    assert float(same.agreement.tokens) == float(same.agreement.agreed) == tokens
    assert float(replayed.agreement.tokens) == tokens > 1.05 * float(replayed.agreement.agreed)
    assert float(off.gap) / float(off.tokens) > 1e-3
    assert float(replayed.gap) / float(replayed.tokens) < 1e-4
