"""Small checkpoints that quantising tools made themselves: tests/golden/tools.npz.

    python tests/golden/make_tools.py                  # llm-compressor, where it is installed, and ModelOpt likewise
    python tests/golden/make_tools.py gptq awq         # some cases

For each case the file holds the tensors of the routed experts as the tool saved them, its ``quantization_config``, and
the logits of the model as transformers runs what was saved, in float32. All else is `checkpoints.random_tensors`.
Cases that cannot be made here keep what the file has of them.
"""

from __future__ import annotations

import json
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from checkpoints import Tensors, hub_config_of_layers, levelled, random_tensors, write_folder

from stepjax.config import ASSETS

FILE = Path(__file__).resolve().parent / "tools.npz"
IDS = np.random.default_rng(5).integers(0, 128, (1, 24))
IGNORE = ["lm_head", "re:.*self_attn.*", "re:.*share_expert.*", r"re:.*moe\.gate$", r"re:.*layers\.0\..*"]


def hub_config() -> dict[str, Any]:
    """A dense layer and one with four experts, without clamps, since smoothing down projections needs that."""
    hub = hub_config_of_layers((0, 1), moe_num_experts=4)
    return hub | {"swiglu_limits": [0.0] * 5, "swiglu_limits_shared": [0.0] * 5}


def base_tensors(hub: dict[str, Any]) -> Tensors:
    return {name: levelled(value) if value.ndim == 3 else value for name, value in random_tensors(hub).items()}


def weights(**given: Any) -> dict[str, Any]:
    """A config group of compressed-tensors."""
    return {"group_0": {"targets": ["Linear"], "weights": {"dynamic": False, "symmetric": True} | given}}


INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
INT8 = {"num_bits": 8, "type": "int", "strategy": "channel"}
BLOCKS = {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [16, 16]}


def recipes() -> dict[str, Callable[[], Any]]:
    """llm-compressor's recipes by case."""
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from llmcompressor.modifiers.transform.awq.mappings import AWQMapping

    def nearest(**given: Any) -> Any:
        return QuantizationModifier(ignore=IGNORE, **given)

    def smoothed() -> list[Any]:
        mapping = AWQMapping(r"re:.*experts\.\d+\.up_proj$", [r"re:.*experts\.\d+\.down_proj$"])
        return [AWQModifier(mappings=[mapping]), nearest(config_groups=weights(**INT4, symmetric=False))]

    return {
        "nearest": lambda: nearest(config_groups=weights(**INT4)),
        "gptq": lambda: GPTQModifier(ignore=IGNORE, config_groups=weights(**INT4)),
        "gptq-actorder": lambda: GPTQModifier(ignore=IGNORE, config_groups=weights(**INT4), actorder="static"),
        "awq": smoothed,
        "int8": lambda: nearest(config_groups=weights(**INT8)),
        "nvfp4": lambda: nearest(scheme="NVFP4A16"),
        "nvfp4-activations": lambda: nearest(scheme="NVFP4"),
        "mxfp4": lambda: nearest(scheme="MXFP4A16"),
        "fp8-dynamic": lambda: nearest(scheme="FP8_DYNAMIC"),
        "fp8-blocks": lambda: nearest(config_groups=weights(**BLOCKS)),
    }


def by_llm_compressor(model: Any, recipe: Any, folder: Path) -> None:
    import torch
    from llmcompressor import oneshot
    from torch.utils.data import DataLoader

    torch.Tensor.pin_memory = lambda self, *_: self  # AWQ asks for it, which needs an accelerator
    rows = torch.from_numpy(np.random.default_rng(6).integers(0, 128, (4, 64)))
    data = DataLoader([{"input_ids": row} for row in rows], batch_size=1)
    sees = "GPTQ" in str(recipe) or "AWQ" in str(recipe) or "input_activations" in str(recipe)
    given: dict[str, Any] = {"pipeline": "datafree"}
    if sees or getattr(recipe, "scheme", None) in ("NVFP4",):
        given = {"dataset": data, "pipeline": "basic", "shuffle_calibration_samples": False}
    oneshot(model=model, recipe=recipe, processor=tokenizer(), clear_sparse_session=True, **given)
    model.save_pretrained(folder, save_compressed=True)


def tokenizer() -> Any:
    """One that llm-compressor asks for, and does not use on token ids."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_file=str(ASSETS / "step-tiny" / "tokenizer.json"))


def by_modelopt(model: Any, settings: str, folder: Path) -> None:
    import copy

    import modelopt.torch.quantization as mtq
    import torch
    from modelopt.torch.export import export_hf_checkpoint

    chosen = copy.deepcopy(getattr(mtq, settings))
    rows = torch.from_numpy(np.random.default_rng(6).integers(0, 128, (4, 64)))

    def calibrate(model: Any) -> None:
        for row in rows:
            model(input_ids=row[None])

    quantised = mtq.quantize(model, chosen, calibrate)
    for name in ("*self_attn*", "*share_expert*", "*moe.gate", "*layers.0.*", "*lm_head*"):
        mtq.disable_quantizer(quantised, lambda path, name=name: Path(path).match(name) or name.strip("*") in path)
    export_hf_checkpoint(quantised, export_dir=folder)


MODELOPT = {"modelopt-nvfp4": "NVFP4_DEFAULT_CFG", "modelopt-fp8": "FP8_DEFAULT_CFG"}


def made(case: str) -> dict[str, np.ndarray]:
    """The arrays of a case."""
    import torch
    from golden.hub_model import Step3p5ForCausalLM, logits_of, model_of

    hub = hub_config()
    model = model_of(hub, base_tensors(hub), torch.bfloat16)
    with tempfile.TemporaryDirectory() as scratch:
        folder, base = Path(scratch) / "model", Path(scratch) / "base"
        write_folder(base, hub, base_tensors(hub), num_shards=1)
        model.config._name_or_path = model.name_or_path = str(base)  # from which tools copy MTP layers
        if case in MODELOPT:
            by_modelopt(model, MODELOPT[case], folder)
        else:
            by_llm_compressor(model, recipes()[case](), folder)
        settings = json.loads((folder / "config.json").read_text())["quantization_config"]
        arrays = experts_of(folder)
        if case not in MODELOPT:  # transformers reads no file of ModelOpt's
            again = Step3p5ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
            again.hf_quantizer.compressor.decompress_model(again)
            for module in again.modules():
                if isinstance(module, torch.nn.Linear):
                    module.weight.data = module.weight.data.float()  # NVFP4 is widened to bfloat16
                    module.quantization_enabled = False  # activations are not rounded here
            arrays["logits"] = logits_of(again, IDS)
    arrays["settings"] = np.array(json.dumps(settings))
    return arrays


def experts_of(folder: Path) -> dict[str, np.ndarray]:
    """The tensors of routed experts by name, with the dtype behind an @ where numpy has none."""
    import torch
    from safetensors import safe_open

    bits = {torch.bfloat16: ("@BF16", torch.uint16), torch.float8_e4m3fn: ("@F8_E4M3", torch.uint8)}
    arrays = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 — not a dict
                if ".moe.experts." not in name:
                    continue
                value = file.get_tensor(name).contiguous()
                suffix, dtype = bits.get(value.dtype, ("", value.dtype))
                arrays[f"{name}{suffix}"] = value.view(dtype).numpy()
    return arrays


def main() -> None:
    for case in sys.argv[1:] or [*recipes(), *MODELOPT]:
        try:
            found = made(case)
        except Exception as error:  # a tool that is not here, or does not know the model
            print(f"{case}: {type(error).__name__}: {error}\n{''.join(traceback.format_tb(error.__traceback__)[-3:])}")
            continue
        keep(case, found)
        print(f"{case}: {len(found)} arrays; {FILE.name} has {FILE.stat().st_size / 1024:.0f} KiB")


def keep(case: str, found: dict[str, np.ndarray]) -> None:
    """Put a case into the file in place of what it has of it."""
    arrays: dict[str, np.ndarray] = {}
    if FILE.exists():
        with np.load(FILE) as file:
            arrays |= {name: value for name, value in file.items() if not name.startswith(f"{case}/")}
    np.savez_compressed(
        FILE, allow_pickle=False, **arrays, **{f"{case}/{name}": value for name, value in found.items()}
    )


if __name__ == "__main__":
    main()
