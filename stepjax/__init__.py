"""Step 3.5 Flash in JAX and Flax.

Importing this package loads nothing else: each public name loads its own module when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from stepjax._version import __version__ as __version__

if TYPE_CHECKING:
    from stepjax.adapters.lora import LoraConfig
    from stepjax.config import ModelConfig
    from stepjax.errors import (
        CheckpointError,
        ClusterError,
        ConfigError,
        ContextError,
        MeshError,
        RequestError,
        StepjaxError,
        TemplateError,
        TokenizerError,
        TrainingError,
    )
    from stepjax.infer.engine.config import EngineConfig
    from stepjax.infer.engine.engine import Engine
    from stepjax.infer.generate import generate
    from stepjax.infer.load import load
    from stepjax.infer.sampling.params import SamplingParams
    from stepjax.infer.session import Session
    from stepjax.model.step3p5 import Step3p5
    from stepjax.sharding.mesh import MeshSpec
    from stepjax.text.tokenizer import Tokenizer
    from stepjax.train.planning.plan import plan
    from stepjax.train.tune.verbs import distill, rl, sft

__all__ = [
    "CheckpointError",
    "ClusterError",
    "ConfigError",
    "ContextError",
    "Engine",
    "EngineConfig",
    "LoraConfig",
    "MeshError",
    "MeshSpec",
    "ModelConfig",
    "RequestError",
    "SamplingParams",
    "Session",
    "Step3p5",
    "StepjaxError",
    "TemplateError",
    "Tokenizer",
    "TokenizerError",
    "TrainingError",
    "distill",
    "generate",
    "load",
    "plan",
    "rl",
    "sft",
]

_HOME = {
    "CheckpointError": "stepjax.errors",
    "ClusterError": "stepjax.errors",
    "ConfigError": "stepjax.errors",
    "ContextError": "stepjax.errors",
    "Engine": "stepjax.infer.engine.engine",
    "EngineConfig": "stepjax.infer.engine.config",
    "LoraConfig": "stepjax.adapters.lora",
    "MeshError": "stepjax.errors",
    "MeshSpec": "stepjax.sharding.mesh",
    "ModelConfig": "stepjax.config",
    "RequestError": "stepjax.errors",
    "SamplingParams": "stepjax.infer.sampling.params",
    "Session": "stepjax.infer.session",
    "Step3p5": "stepjax.model.step3p5",
    "StepjaxError": "stepjax.errors",
    "TemplateError": "stepjax.errors",
    "Tokenizer": "stepjax.text.tokenizer",
    "TokenizerError": "stepjax.errors",
    "TrainingError": "stepjax.errors",
    "distill": "stepjax.train.tune.verbs",
    "generate": "stepjax.infer.generate",
    "load": "stepjax.infer.load",
    "plan": "stepjax.train.planning.plan",
    "rl": "stepjax.train.tune.verbs",
    "sft": "stepjax.train.tune.verbs",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOME[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
