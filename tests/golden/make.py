"""Makes the golden arrays: what an independent reference, transformers' Step 3.7 text model, says of random models.

    python tests/golden/make.py

needs the oracle extra. A file holds token ids and outputs; the weights behind them are drawn again by
`checkpoints.random_tensors` from the case's seed, and ``digest`` says whether the same came out.

transformers knows no trained MTP wiring (spec §3.4), so the chain around its MTP layer is written out here (spec §9.3).
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script's own folder is golden/

from checkpoints import random_tensors, tiny_hub_config

FOLDER = Path(__file__).resolve().parent

# Two correct float32 programs differ by about 1e-6 in a router's scores; a gap this wide keeps their choices the same.
LEAST_MARGIN = 2e-4

FULL, SLIDE = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class Case:
    """A random model and the token batches it is asked about: (sequences, tokens) each."""

    name: str
    seed: int
    overrides: dict[str, Any] = field(default_factory=dict)
    batches: tuple[tuple[int, int], ...] = ((1, 40), (1, 100), (3, 24))

    @property
    def hub(self) -> dict[str, Any]:
        return tiny_hub_config(**self.overrides)

    def tensors(self) -> dict[str, np.ndarray]:
        return random_tensors(self.hub, self.seed)

    def ids(self) -> list[np.ndarray]:
        random = np.random.default_rng(self.seed + 1000)
        return [random.integers(0, self.hub["vocab_size"], shape) for shape in self.batches]


CASES = (
    Case("tiny", seed=1),
    # Other numbers everywhere: fewer heads in sliding layers than in full ones, one KV head, limits as integers.
    Case(
        "other",
        seed=16,
        overrides={
            "hidden_size": 48,
            "intermediate_size": 80,
            "num_hidden_layers": 7,
            "layer_types": [FULL, SLIDE, SLIDE, FULL, SLIDE, SLIDE, FULL, SLIDE, SLIDE, SLIDE],
            "num_attention_heads": 6,
            "num_attention_groups": 1,
            "head_dim": 32,
            "attention_other_setting": {"attention_type": SLIDE, "num_attention_heads": 4, "num_attention_groups": 1},
            "rope_theta": [2e6, 500.0, 500.0, 2e6, 500.0, 500.0, 2e6, 500.0, 500.0, 500.0],
            "partial_rotary_factors": [0.25, 0.75, 0.75, 0.25, 0.75, 0.75, 0.25, 0.75, 0.75, 0.75],
            "sliding_window": 5,
            "vocab_size": 96,
            "moe_layers_enum": "3,4,5,6",
            "moe_num_experts": 12,
            "moe_top_k": 3,
            "moe_intermediate_size": 24,
            "share_expert_dim": 40,
            "moe_router_scaling_factor": 2.5,
            "rms_norm_eps": 1e-3,
            "swiglu_limits": [0, 0, 0, 0, 2, 1, 1, 0, 0, 0],
            "swiglu_limits_shared": [0, 0, 1, 0, 0, 0, 2, 0, 0, 0],  # layer 2 is dense and clamped
        },
    ),
    # Lists that stop at the backbone, and null for "no clamp".
    Case(
        "short",
        seed=21,
        overrides={
            "num_attention_heads": 2,
            "attention_other_setting": {"attention_type": SLIDE, "num_attention_heads": 8, "num_attention_groups": 2},
            "rope_theta": [(5e6, 1e4)[i % 4 > 0] for i in range(9)],
            "partial_rotary_factors": [(0.5, 1.0)[i % 4 > 0] for i in range(9)],
            "swiglu_limits": [None] * 7 + [0.5, 0.5],
            "swiglu_limits_shared": [None] * 8 + [0.8],
        },
    ),
)


def digest(case: Case) -> str:
    """Checksum over the configuration and the names, shapes, dtypes and bytes of the weights."""
    total = hashlib.sha256(json.dumps(case.hub, sort_keys=True).encode())
    for name, value in sorted(case.tensors().items()):
        total.update(f"{name} {value.shape} {value.dtype}".encode() + value.tobytes())
    return total.hexdigest()


class Oracle:
    """transformers' text model with a checkpoint's tensors, and its MTP layer once per depth."""

    def __init__(self, hub: Mapping[str, Any], tensors: Mapping[str, np.ndarray], *, dtype: str = "float32"):
        import torch
        from transformers.modeling_layers import MtpLayer
        from transformers.models.step3p7 import modeling_step3p7 as reference
        from transformers.models.step3p7.configuration_step3p7 import Step3p7TextConfig

        self.torch, self.window = torch, hub["sliding_window"]
        config: Any = Step3p7TextConfig(**{name: value for name, value in hub.items() if name != "model_type"})
        config._attn_implementation = "eager"
        weights = {
            name: torch.from_numpy(value.astype(np.float32)).to(getattr(torch, dtype))
            if not name.endswith("router_bias")
            else torch.from_numpy(value)
            for name, value in tensors.items()
        }
        self.head = weights["lm_head.weight"]
        self.model = reference.Step3p7TextModel(config).to(getattr(torch, dtype)).eval()
        # The cast took the rotary frequencies and the selection bias along, which are float32 at every width.
        self.model.rotary_emb = reference.Step3p7RotaryEmbedding(config=config)
        layers: Any = self.model.layers
        for layer in layers:
            if hasattr(layer.mlp, "gate"):
                layer.mlp.gate.e_score_correction_bias = layer.mlp.gate.e_score_correction_bias.float()
        self.mtp, self.mtp_heads = [], []
        num_layers, num_mtp = hub["num_hidden_layers"], hub["num_nextn_predict_layers"]
        for i in range(num_layers, num_layers + num_mtp):
            prefix = f"model.layers.{i}."
            own = {name.removeprefix(prefix): weights.pop(name) for name in [*weights] if name.startswith(prefix)}
            self.mtp_heads.append(own.pop("transformer.shared_head.output.weight"))
            # Layer 1 is of the kind that MTP blocks are: sliding, dense, unclamped.
            layer = MtpLayer(config, reference.Step3p7DecoderLayer, reference.Step3p7RMSNorm, 1, use_post_norm=True)
            layer.load_state_dict({_mtp_name(name): value for name, value in own.items()})
            self.mtp.append(layer.to(getattr(torch, dtype)).eval())
        backbone = {name.removeprefix("model."): value for name, value in weights.items() if name != "lm_head.weight"}
        self.model.load_state_dict(_fused(backbone, torch.cat))

    def run(self, ids: np.ndarray) -> dict[str, np.ndarray]:
        """Outputs for ids [B, T], float32.

        ``hidden`` [B, T, D] is the residual stream before the final norm and ``normed`` after it, ``logits`` [B, T, V],
        ``mtp_k`` [B, T − k, V] the logits of depth k, ``mtp_hidden_k`` its pre-norm state; ``experts`` [M, B, T, A] the
        sorted expert ids of the M MoE layers and ``margin`` the least gap between a chosen and a left-out score.
        """
        torch, seen = self.torch, _Seen(self.model)
        tokens = torch.from_numpy(ids.astype(np.int64))
        with torch.no_grad(), seen:
            normed = self.model(input_ids=tokens, use_cache=False).last_hidden_state
            out = {"hidden": seen.hidden, "normed": normed, "logits": normed @ self.head.T}
            out |= self._mtp(tokens, seen.hidden)
        arrays = {name: value.float().numpy() for name, value in out.items()}
        arrays["experts"] = np.stack([each.sort(-1).values.reshape(*ids.shape, -1).numpy() for each in seen.experts])
        return arrays | {"margin": np.array(min(seen.margins), np.float32)}

    def _mtp(self, tokens: Any, hidden: Any) -> dict[str, Any]:
        """Chained by pre-norm states, tokens shifted once more per depth, positions those of the hidden state."""
        torch, out = self.torch, {}
        for k, (layer, head) in enumerate(zip(self.mtp, self.mtp_heads, strict=True), start=1):
            fed, hidden = self.model.embed_tokens(tokens[:, k:]), hidden[:, : tokens.shape[1] - k]
            position = torch.arange(fed.shape[1])[None]
            key, query = position[0][None, :], position[0][:, None]
            mask = torch.where((key <= query) & (key > query - self.window), 0.0, -1e30)
            before = []
            hook = layer.post_norm.register_forward_pre_hook(lambda _, args, before=before: before.append(args[0]))
            normed = layer(
                fed,
                hidden,
                self.model.rotary_emb(fed, position, layer_type=SLIDE),
                mask[None, None].to(fed.dtype),
                position,
                None,  # no cache, whose name differs between versions
            )
            hook.remove()
            hidden = before[0]
            out |= {f"mtp_{k}": normed @ head.T, f"mtp_hidden_{k}": hidden}
        return out


class _Seen:
    """What forward hooks see of one pass: the input of the final norm, and every router's choice."""

    def __init__(self, model: Any):
        self.model, self.experts, self.margins = model, [], []

    def __enter__(self) -> _Seen:
        routers = [layer.mlp.gate for layer in self.model.layers if hasattr(layer.mlp, "gate")]
        self.hooks = [self.model.norm.register_forward_pre_hook(self._final)]
        self.hooks += [router.register_forward_hook(self._router) for router in routers]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()

    def _final(self, _: Any, args: tuple[Any, ...]) -> None:
        self.hidden = args[0]

    def _router(self, router: Any, _: Any, outputs: tuple[Any, Any, Any]) -> None:
        logits, _, chosen = outputs
        scores = (logits.float().sigmoid() + router.e_score_correction_bias).sort(descending=True).values
        self.experts.append(chosen)
        self.margins.append(float((scores[:, router.top_k - 1] - scores[:, router.top_k]).min()))


def _mtp_name(name: str) -> str:
    if name.split(".")[0] in ("enorm", "hnorm", "eh_proj"):
        return name
    return "post_norm.weight" if "shared_head" in name else f"mtp_block.{name}"


def _fused(hub: Mapping[str, Any], concatenate: Any) -> dict[str, Any]:
    """The hub's names and halves as transformers names and joins them (spec §4.4)."""
    out = {}
    for name, value in hub.items():
        if name.endswith("moe.up_proj.weight"):
            continue
        if name.endswith("moe.gate_proj.weight"):
            value = concatenate([value, hub[name.replace("gate_proj", "up_proj")]], 1)
        for old, new in (
            ("moe.gate_proj.weight", "mlp.experts.gate_up_proj"),
            ("moe.down_proj.weight", "mlp.experts.down_proj"),
            ("moe.gate.weight", "mlp.gate.weight"),
            ("moe.router_bias", "mlp.gate.e_score_correction_bias"),
            ("share_expert.", "mlp.shared_experts."),
        ):
            name = name.replace(old, new)
        out[name] = value
    return out


def load(case: Case) -> list[dict[str, np.ndarray]]:
    """The arrays of a case, one dictionary per batch: what `Oracle.run` returned, and ``ids``.

    Raises:
      ValueError: the weights drawn here are not those that the arrays were made with.
    """
    with np.load(FOLDER / f"{case.name}.npz") as file:
        if str(file["digest"]) != digest(case):
            raise ValueError(f"{case.name}: checkpoints.py or numpy draws another model now; run golden/make.py again")
        arrays = {name: file[name] for name in file.files if name != "digest"}
    names = {name.partition(".")[2] for name in arrays}
    return [{name: arrays[f"{i}.{name}"] for name in sorted(names)} for i in range(len(case.batches))]


def main() -> None:
    for case in CASES:
        oracle = Oracle(case.hub, case.tensors(), dtype="float64")
        arrays = {"digest": np.array(digest(case))}
        for i, ids in enumerate(case.ids()):
            out = oracle.run(ids) | {"ids": ids.astype(np.int32)}
            margin, scale = float(out["margin"]), float(np.abs(out["normed"]).max())
            print(f"{case.name} {ids.shape}: router margin {margin:.1e}, largest |normed| {scale:.2f}")
            assert margin > LEAST_MARGIN, "two correct programs may route differently: choose another seed"
            out["experts"] = out["experts"].astype(np.uint8)
            arrays |= {f"{i}.{name}": value for name, value in out.items() if not name.startswith("mtp_hidden")}
        path = FOLDER / f"{case.name}.npz"
        np.savez_compressed(path, allow_pickle=False, **arrays)
        print(f"{path.name}: {path.stat().st_size / 2**20:.2f} MiB")


if __name__ == "__main__":
    main()
