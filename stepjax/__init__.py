"""Step 3.5 Flash in JAX and Flax.

Importing this package loads nothing else: each public name brings its own module in when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from stepjax._version import __version__ as __version__

if TYPE_CHECKING:
    from stepjax.config import ModelConfig
    from stepjax.infer.engine.config import EngineConfig
    from stepjax.infer.engine.engine import Engine
    from stepjax.infer.generate import generate
    from stepjax.infer.load import load
    from stepjax.infer.sampling.params import SamplingParams
    from stepjax.model.step3p5 import Step3p5
    from stepjax.text.tokenizer import Tokenizer

__all__ = ["Engine", "EngineConfig", "ModelConfig", "SamplingParams", "Step3p5", "Tokenizer", "generate", "load"]

_HOME = {
    "Engine": "stepjax.infer.engine.engine",
    "EngineConfig": "stepjax.infer.engine.config",
    "ModelConfig": "stepjax.config",
    "SamplingParams": "stepjax.infer.sampling.state",
    "Step3p5": "stepjax.model.step3p5",
    "Tokenizer": "stepjax.text.tokenizer",
    "generate": "stepjax.infer.generate",
    "load": "stepjax.infer.load",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOME[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
