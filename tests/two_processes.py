"""Run as ``two_processes.py PORT PROCESS TASK ...``: one of two processes that do a task and print JSON.

load FOLDER MESH          what loading read, and what this process must hold
answer FOLDER MESH WAY [SLOTS]  the answers of an engine that process 0 leads, by a strategy; experts move between SLOTS
scores                    what a scorer that only process 0 has gives, and its error
chances FILE              what rewards and an environment of FILE give that draw random numbers
restore FOLDER BASE MESH  how many weights of a converted base differ from the folder it came from
update FOLDER MESH OUT    writes the leaves and moments after one update of sft
programs ROOT             which programs were compiled, by processes with a folder of programs each
"""

from __future__ import annotations

import dataclasses
import json
import sys
from functools import partial
from typing import Any

import jax

GUIDED = "[a-z]{6,9}-[0-9]{3}"  # what one answer must be


def main(port: str, process: str, task: str, *args: str) -> int:
    jax.distributed.initialize(f"localhost:{port}", 2, int(process))
    tasks = {
        "load": report,
        "restore": restore,
        "answer": serve,
        "programs": programs,
        "update": update,
        "scores": scores,
        "chances": chances,
    }
    return tasks[task](*args)


def scores() -> int:
    """The scores of two answers by a teacher that only process 0 has, how often it was asked, and how it fails."""
    import numpy as np

    from stepjax.errors import TrainingError
    from stepjax.train.rollouts.sampler import Rollout
    from stepjax.train.teachers.resident import Scored
    from stepjax.train.teachers.shared import Shared

    asked: list[int] = []

    class Server:
        top_k = 7

        def score(self, rollouts: Any, *, top: int) -> list[Scored]:
            asked.append(len(rollouts))
            if top > self.top_k:
                raise TrainingError("no answer\nin 3 tries")
            logprobs = [np.arange(len(rollout.ids), dtype=np.float32) / 3 - jax.process_index() for rollout in rollouts]
            if not top:
                return [Scored(values) for values in logprobs]
            top_ids = np.arange(top, dtype=np.int32)
            return [Scored(x, np.tile(top_ids, (len(x), 1)), np.tile(x[:, None], (1, top))) for x in logprobs]

    def opened() -> Server:
        assert jax.process_index() == 0
        return Server()

    teacher: Any = Shared(opened)
    answers = [Rollout(Any, 0, 0, ids=list(range(size))) for size in (3, 1)]  # type: ignore[arg-type]
    results: list[Any] = [teacher.top_k]
    for top in (0, 2):
        for scored in teacher.score(answers, top=top):
            arrays = scored.logprobs, scored.top_ids, scored.top_logprobs
            results.append([None if array is None else array.tolist() for array in arrays])
    try:
        teacher.score(answers, top=8)
    except TrainingError as error:
        results.append(str(error))
    print(json.dumps({"results": results, "asked": len(asked)}))
    return 0


def chances(file: str) -> int:
    """Rewards, replies and failures of code that draws random numbers; and whether this process runs it."""
    from stepjax.errors import ConfigError
    from stepjax.train.config.rewards import RewardSettings
    from stepjax.train.config.tune import DataSettings
    from stepjax.train.environments.episode import Turn
    from stepjax.train.workers.code import UserCode, results_of

    settings = DataSettings(kind="environment", environment=f"{file}:Dice", reward=(f"{file}:drawn", f"{file}:fails"))
    with UserCode({"mine": settings}, RewardSettings(workers=1)) as code:
        mine = code.of_source("mine")
        assert mine
        episode = mine.open({"row": {}, "index": 0, "seed": 5, "split": "train"}, otherwise=None)
        futures = [mine.reward(reward, {"answer": 1}) for reward in mine.rewards]
        futures += [episode.respond(Turn("", "x", (), True)), episode.reward()]
        results = [episode.messages, *map(str, results_of(futures))]
        runs = code._pool is not None
    try:
        UserCode({"mine": DataSettings(kind="jsonl", path="x", reward=f"{file}:none")}, RewardSettings(workers=1))
    except ConfigError as error:
        results.append(str(error))
    print(json.dumps({"results": results, "runs": runs}))
    return 0


def report(folder: str, mesh: str) -> int:
    """Load, and print the report with what this process must hold: its parts, copies counted once."""
    from stepjax.infer.load import load

    session = load(folder, dtype="bfloat16", mesh=mesh)
    assert session.load_report
    parts = 0
    for value in session.params.values():
        held = {str(shard.index): shard.data.nbytes for shard in value.addressable_shards}
        parts += sum(held.values())
    print(json.dumps(dataclasses.asdict(session.load_report) | {"parts": parts}))
    return 0


def serve(folder: str, mesh: str, strategy: str, slots: str = "") -> int:
    """`requests` in a cache too small for all of them: the answers by id, on process 0."""
    from stepjax.infer.balanced_engine import BalancedConfig, BalancedEngine
    from stepjax.infer.engine.config import EngineConfig
    from stepjax.infer.engine.engine import Engine, open_engine
    from stepjax.infer.load import load
    from stepjax.infer.sampling.params import SamplingParams

    places: dict[str, Any] = {"expert_slots": int(slots)} if slots else {}
    session = load(folder, dtype="float32", mesh=mesh, strategy=strategy, **places)
    shards = session.model.layout.together().num_shards
    make: Any = partial(BalancedConfig, move_every=3) if slots else EngineConfig
    config = make(
        num_slots=3 * shards,
        context=64,
        num_pages=11 * shards,
        page_size=8,
        widths=(32,),
        token_budget=32,
        speculate=1,
        num_snapshots=4 * shards,
        host_cache_bytes=2**26,
    )
    engine = open_engine(session, config, host="localhost", kind=BalancedEngine if slots else Engine)
    if engine is None:
        print("followed")
        return 0
    guided = constraints(session)
    for id, (prompt, params) in requests(SamplingParams).items():
        engine.add(prompt, params, id=id, constraint=guided.get(id))
    answers: dict[str, list[int]] = {}
    for update in engine.run():
        answers.setdefault(update.id, []).extend(update.tokens)
    engine.close()
    session.grammars.close()
    admission = engine.scheduler.admission
    loaded = admission.prefix.host.stats.loaded_pages
    counts = {"preemptions": admission.num_preemptions, "loaded": loaded, "moved": engine.stats.expert_slots_written}
    print(json.dumps({"answers": answers, **counts}))
    return 0


def requests(make: Any) -> dict[str, tuple[list[int], Any]]:
    """What `serve` asks: half of them sampled. The last begins as the first, which has left the device by then."""
    shared, early = list(range(20, 44)), list(range(50, 74))
    prompts = [[*shared[: 8 * (at % 4)], 7 + at, 9, 100 + at] for at in range(10)]
    found = {
        str(at): (
            prompt,
            make(max_tokens=20, temperature=at % 2, seed=at, ignore_eos=True, presence_penalty=at % 3 / 2),
        )
        for at, prompt in enumerate(prompts)
    }
    repeated = make(max_tokens=4, temperature=0, seed=0, ignore_eos=True)
    return {"first": ([*early, 7], repeated), **found, "last": ([*early, 9], repeated)}


def constraints(session: Any) -> dict[str, Any]:
    """What holds some of the answers, by id: a grammar for one that is sampled and for one behind a bounded thought."""
    from stepjax.infer.guided.guide import Constraint
    from stepjax.infer.guided.schema_grammar import grammar_of, json_schema, regex

    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
    forms = {"9": regex(GUIDED), "8": json_schema(schema, strict=True)}
    ends = frozenset(session.grammars.eos_ids)

    def held(id: str, *, thinking: bool, budget: int | None) -> Constraint:
        matcher = session.grammars.compile(grammar_of(forms[id], after_thinking=thinking))
        return Constraint(session.masks, thinking=thinking, budget=budget, matcher=matcher, ends=ends)

    return {"9": held("9", thinking=False, budget=None), "8": held("8", thinking=True, budget=3)}


def update(folder: str, mesh: str, out: str) -> int:
    """One update of sft with the sequences of the training service's tests."""
    import numpy as np
    from sft_updates import adam_of, sft_states
    from training import SEQUENCES

    from stepjax.infer.load import load
    from stepjax.train.config.tune import LoraSettings

    (state,) = sft_states(load(folder, dtype="float32", mesh=mesh), SEQUENCES, steps=1, lora=LoraSettings(rank=4))
    adam = adam_of(state)
    if jax.process_index() == 0:
        parts = {"leaves": state.leaves, "first": adam.mu, "second": adam.nu}
        np.savez(out, **{f"{part}:{name}": value for part, values in parts.items() for name, value in values.items()})
    return 0


def restore(folder: str, base: str, mesh: str) -> int:
    """Restore, and count the weights of which any part on this process differs from the folder's."""
    import jax.numpy as jnp
    import numpy as np

    from stepjax.checkpoint.reader import Checkpoint
    from stepjax.sharding.mesh import MeshSpec
    from stepjax.sharding.mesh_layout import MeshLayout
    from stepjax.sharding.rules import ShardingRules
    from stepjax.sharding.sharded_checkpoint import restore_params, stored_config

    checkpoint, spec = Checkpoint(folder), MeshSpec.parse(mesh)
    params = restore_params(base, MeshLayout(spec.build(), ShardingRules(stored_config(base), spec)))
    different = 0
    for path, value in params.items():
        stored = checkpoint.read(path, dtype=jnp.bfloat16)
        assert isinstance(value, jax.Array)
        different += any((np.asarray(part.data) != stored[part.index]).any() for part in value.addressable_shards)
    print(json.dumps({"restored": len(params), "different": different}))
    return 0


def programs(root: str) -> int:
    """Three functions of an array on the devices of both: those that were compiled, and what they return."""
    import logging
    import os

    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import NamedSharding, PartitionSpec

    from stepjax.program_cache import ProgramCache
    from stepjax.stored_function import StoredFunction, compile_together

    os.environ["STEPJAX_CACHE_DIR"] = f"{root}/{jax.process_index()}"
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("stepjax.program_cache")
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    cache = ProgramCache.open()
    assert cache is not None
    mesh = jax.make_mesh((jax.device_count(),), ("data",))
    split, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data",), ()))
    x = jax.make_array_from_callback((16,), split, lambda index: np.arange(16, dtype=np.float32)[index])

    def scaled(by: int) -> StoredFunction:
        def scale(x: Any) -> Any:
            return x * by, jnp.sum(x * by)

        return StoredFunction("scale", scale, identity=f"by {by}", cache=cache, out_shardings=(split, whole))

    functions = [scaled(by) for by in (1, 2, 3)]
    compile_together([(function, (x,)) for function in functions[:2]])
    sums = [float(np.asarray(function(x)[1])) for function in functions]
    compiled = sum(" compiled " in message for message in messages)
    print(json.dumps({"compiled": compiled, "sums": sums}))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
