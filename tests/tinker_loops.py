"""Loops of the real Tinker SDK and its cookbook against a server, run by an environment that has them:

    TINKER_BASE_URL=http://127.0.0.1:8124 TINKER_API_KEY=tml-test python tests/tinker_loops.py NAME FOLDER

Each prints one JSON object, which `tests/test_tinker.py` checks.
"""

from __future__ import annotations

import asyncio
import functools
import json
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

MODEL, RANK = "step-tiny", 8


def interpreter() -> str | None:
    """The interpreter of an environment with the extra ``tinker``; None: there is none."""
    given = os.environ.get("STEPJAX_TINKER_PYTHON")
    own = Path(__file__).resolve().parent.parent / ".venv-tinker" / "bin" / "python"
    return given or (str(own) if own.exists() else None)


def question(number: int) -> tuple[str, str]:
    rng = random.Random(number)
    a, b = rng.randrange(100, 500), rng.randrange(100, 500)
    return f"What is {a} + {b}?", str(a + b)


def sdk(folder: Path) -> dict[str, Any]:
    """What the SDK itself offers: training, futures ahead, custom losses, saves, loads, samples, lists."""
    import numpy as np
    import tinker
    import torch
    from tinker import types

    service = tinker.ServiceClient()
    model = service.create_lora_training_client(base_model=MODEL, rank=RANK, seed=3).result()
    tokenizer = model.get_tokenizer()
    ids = tokenizer.encode("What is 467 + 358? It is 825.")
    inputs = {"target_tokens": np.array(ids[1:]), "weights": np.ones(len(ids) - 1, np.float32)}
    batch = [types.Datum(model_input=types.ModelInput.from_ints(ids[:-1]), loss_fn_inputs=inputs)] * 3
    pairs = []
    for _ in range(4):  # all sent before the first is done
        pairs.append(
            (model.forward_backward(batch, "cross_entropy"), model.optim_step(types.AdamParams(learning_rate=1e-3)))
        )
    losses = [loss.result().metrics["loss:sum"] for loss, _ in pairs]
    norms = [step.result().metrics["grad_norm"] for _, step in pairs]

    def squares(data: Any, logprobs: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        return sum((item**2).sum() for item in logprobs), {"mine": 1.0}  # pyright: ignore[reportReturnType]

    custom = model.forward_backward_custom(batch[:1], squares).result().metrics
    model.optim_step(types.AdamParams(learning_rate=0.0)).result()
    soft = {
        "target_tokens": torch.tensor([[id, 5, 0] for id in ids[1:]]),
        "weights": torch.tensor([[0.5, 0.5, 0.0]] * (len(ids) - 1)),
    }
    wide = model.forward(
        [types.Datum(model_input=types.ModelInput.from_ints(ids[:-1]), loss_fn_inputs=soft)], "cross_entropy"
    ).result()
    sampler = model.save_weights_and_get_sampling_client().result()
    prompt = types.ModelInput.from_ints(ids[:9])
    params = types.SamplingParams(max_tokens=8, temperature=0.7, seed=1, stop=["\n"])
    answers = sampler.sample(prompt=prompt, num_samples=3, sampling_params=params).result().sequences
    scores = sampler.compute_logprobs(types.ModelInput.from_ints(ids)).result()
    forward = model.forward(batch[:1], "cross_entropy").result()
    gap = np.abs(np.array(scores[1:]) - np.array(forward.loss_fn_outputs[0]["logprobs"].data)).max()
    try:
        bad = {**inputs, "target_tokens": np.array([99_999] * (len(ids) - 1))}
        item = types.Datum(model_input=types.ModelInput.from_ints(ids[:-1]), loss_fn_inputs=bad)
        refused = str(model.forward_backward([item], "cross_entropy").result())
    except tinker.BadRequestError as error:
        refused = str(error)
    state = model.save_state("state").result().path
    loaded = service.create_training_client_from_state_with_optimizer(state).result()
    same = [each.forward(batch[:1], "cross_entropy").result().metrics["loss:sum"] for each in (model, loaded)]
    rest = service.create_rest_client()
    info = rest.get_weights_info_by_tinker_path(state).result()
    listed = [item.tinker_path for item in rest.list_user_checkpoints().result().checkpoints]
    rest.set_checkpoint_ttl_from_tinker_path(state, 3600).result()
    rest.delete_checkpoint_from_tinker_path(state).result()
    left = [item.tinker_path for item in rest.list_user_checkpoints().result().checkpoints]
    kl = model.forward_backward(batch[:1], "reverse_kl", {"teacher": MODEL}).result().metrics
    return {
        "losses": losses,
        "norms": norms,
        "custom": custom,
        "wide": list(wide.loss_fn_outputs[0]["logprobs"].shape or ()),
        "answers": [[list(answer.tokens), list(answer.logprobs or ()), answer.stop_reason] for answer in answers],
        "gap": float(gap),
        "refused": refused,
        "same": same,
        "rank": info.lora_rank,
        "listed": state in listed and state not in left,
        "kl": kl["kl:sum"],
    }


def register() -> None:
    """The tokenizer and the chat format of the served model."""
    from stepjax.train import cookbook

    cookbook.register(MODEL)
    try:
        from tinker_cookbook.utils import cost_estimation

        cost_estimation._pricing_fetched = True  # pyright: ignore[reportAttributeAccessIssue]
    except ImportError:
        pass


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def supervised(folder: Path) -> dict[str, Any]:
    """`tinker_cookbook.supervised.train` on local conversations, and once more from its checkpoint."""
    register()
    from tinker_cookbook.supervised import train
    from tinker_cookbook.supervised.data import FromConversationFileBuilder
    from tinker_cookbook.supervised.types import ChatDatasetBuilderCommonConfig

    from stepjax.train.cookbook import RENDERER

    rows = folder / "rows.jsonl"
    with rows.open("w") as file:
        for number in range(32):
            text, answer = question(number)
            turns = [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": turns}) + "\n")

    def config(steps: int) -> Any:
        common = ChatDatasetBuilderCommonConfig(
            model_name_for_tokenizer=MODEL, renderer_name=RENDERER, max_length=64, batch_size=8
        )
        return train.Config(
            log_path=str(folder / "run"),
            model_name=MODEL,
            recipe_name="test",
            renderer_name=RENDERER,
            learning_rate=3e-3,
            lora_rank=RANK,
            num_epochs=3,
            max_steps=steps,
            save_every=4,
            eval_every=0,
            dataset_builder=FromConversationFileBuilder(file_path=str(rows), common_config=common),
        )

    asyncio.run(train.main(config(6)))
    saved = folder / "run" / "checkpoints.jsonl"
    kept = [line for line in saved.read_text().splitlines() if json.loads(line)["name"] != "final"]
    saved.write_text("".join(f"{line}\n" for line in kept))  # as if it had been killed
    asyncio.run(train.main(config(10)))
    return {"nll": [row["train_mean_nll"] for row in metrics(folder / "run") if "train_mean_nll" in row]}


def environments() -> tuple[type, type]:
    """An environment of sums, and a data set of them."""
    import chz
    from tinker_cookbook import renderers
    from tinker_cookbook.rl.problem_env import ProblemEnv, ProblemGroupBuilder
    from tinker_cookbook.rl.types import RLDataset, RLDatasetBuilder
    from tinker_cookbook.tokenizer_utils import get_tokenizer

    class Sum(ProblemEnv):
        def __init__(self, renderer: Any, number: int):
            super().__init__(renderer)
            self.text, self.answer = question(number)

        def get_question(self) -> str:
            return self.text

        def check_answer(self, sample_str: str) -> bool:
            return sample_str.strip()[:1].isdigit()  # what a few steps can teach

        def check_format(self, sample_str: str) -> bool:
            return True

        def get_reference_answer(self) -> str:
            return self.answer

    class Sums(RLDataset):
        def __init__(self, renderer: Any):
            self.renderer = renderer

        def get_batch(self, index: int) -> Any:
            return [
                ProblemGroupBuilder(env_thunk=functools.partial(Sum, self.renderer, 4 * index + i), num_envs=4)
                for i in range(4)
            ]

        def __len__(self) -> int:
            return 4

    @chz.chz
    class Builder(RLDatasetBuilder):
        async def __call__(self) -> Any:
            return Sums(renderers.get_renderer("role_colon", get_tokenizer(MODEL))), None

    return Sum, Builder


def reinforced(folder: Path, loss: str) -> dict[str, Any]:
    """`tinker_cookbook.rl.train`."""
    register()
    from tinker_cookbook.rl import train

    _, builder = environments()
    config = train.Config(
        model_name=MODEL,
        recipe_name="test",
        renderer_name="role_colon",
        learning_rate=3e-3,
        max_tokens=6,
        lora_rank=RANK,
        dataset_builder=builder(),
        log_path=str(folder / "run"),
        loss_fn=loss,  # pyright: ignore[reportArgumentType]
        max_steps=3,
        save_every=2,
        eval_every=0,
    )
    asyncio.run(train.main(config))
    rows = metrics(folder / "run")
    return {
        "reward": [row["env/all/reward/total"] for row in rows if "env/all/reward/total" in row],
        "kl": [row["optim/kl_sample_train_v1"] for row in rows if "optim/kl_sample_train_v1" in row],
    }


def distilled(folder: Path, teachers: int) -> dict[str, Any]:
    """`tinker_cookbook.distillation.train_on_policy`, with one teacher or two."""
    register()
    import chz
    from tinker_cookbook import renderers
    from tinker_cookbook.distillation import train_on_policy
    from tinker_cookbook.distillation.datasets import DistillationDatasetConfig, PromptOnlyDataset, TeacherConfig
    from tinker_cookbook.rl.types import RLDatasetBuilder
    from tinker_cookbook.tokenizer_utils import get_tokenizer

    @chz.chz
    class Builder(RLDatasetBuilder):
        first: int

        async def __call__(self) -> Any:
            tokenizer = get_tokenizer(MODEL)
            prompts = [question(self.first + number)[0] for number in range(8)]
            renderer = renderers.get_renderer("role_colon", tokenizer)
            return PromptOnlyDataset(prompts, 2, 2, renderer, tokenizer), None

    config = train_on_policy.Config(
        learning_rate=1e-3,
        dataset_configs=[
            DistillationDatasetConfig(
                dataset_builder=Builder(first=100 * teacher),
                teacher_config=TeacherConfig(base_model=MODEL),
                groups_per_batch=2,
            )
            for teacher in range(teachers)
        ],
        model_name=MODEL,
        recipe_name="test",
        renderer_name="role_colon",
        max_tokens=6,
        lora_rank=RANK,
        log_path=str(folder / "run"),
        max_steps=2,
        save_every=0,
        eval_every=0,
    )
    asyncio.run(train_on_policy.main(config))
    return {"kl": [row["teacher_kl"] for row in metrics(folder / "run") if "teacher_kl" in row]}


LOOPS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "sdk": sdk,
    "supervised": supervised,
    **{loss: functools.partial(reinforced, loss=loss) for loss in ("importance_sampling", "ppo", "cispo")},
    "distilled": functools.partial(distilled, teachers=1),
    "two_teachers": functools.partial(distilled, teachers=2),
}

if __name__ == "__main__":
    os.environ |= {"TINKER_TELEMETRY": "0", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    name, out = sys.argv[1:]
    print(json.dumps(LOOPS[name](Path(out))))
