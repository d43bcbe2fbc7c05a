"""The message by which a broken folder is refused."""

from pathlib import Path

import pytest
from calls import calls_counted
from checkpoints import (
    fp8_hub_config,
    fp8_tensors,
    random_tensors,
    tiny_hub_config,
)

from stepjax.checkpoint.reader import Checkpoint
from stepjax.errors import CheckpointError

HUB, FP8_HUB = tiny_hub_config(), fp8_hub_config()
TENSORS = random_tensors(HUB)
FP8_TENSORS = fp8_tensors(TENSORS)
Q = "model.layers.4.self_attn.q_proj.weight"
UP = "model.layers.5.moe.up_proj.weight"
SCALE = f"{UP}_scale_inv"
FIRST, INDEX = "model-00001.safetensors", "model.safetensors.index.json"


def refusal(folder: Path, error: type[Exception] = CheckpointError) -> str:
    """The message, which came after little work: at most 28,000 calls for folders of this size, counted, not timed."""
    with pytest.raises(error) as found, calls_counted() as counted:
        Checkpoint(folder)
    assert counted.calls < 60_000
    message = str(found.value)
    assert message.isprintable() or "\n  " in message
    assert len(message) < 3000
    return message
