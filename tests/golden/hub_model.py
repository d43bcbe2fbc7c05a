"""transformers' Step 3.5 with the hub's names and a Linear for each projection of each expert.

Tools that quantise a model module by module (compressed-tensors, llm-compressor, ModelOpt) find nothing in
transformers' own class, whose experts are stacks of parameters. The attention, norms and dense layers here are its own.
It needs the oracle extra; import it inside a test.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.modeling_outputs import CausalLMOutput
from transformers.models.step3p7 import modeling_step3p7 as reference
from transformers.models.step3p7.configuration_step3p7 import Step3p7TextConfig


class Expert(nn.Module):
    def __init__(self, config: Any, limit: float | None):
        super().__init__()
        width, size = config.hidden_size, config.moe_intermediate_size
        self.gate_proj = nn.Linear(width, size, bias=False)
        self.up_proj = nn.Linear(width, size, bias=False)
        self.down_proj = nn.Linear(size, width, bias=False)
        self.limit = float("inf") if limit is None else limit

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate = nn.functional.silu(self.gate_proj(x)).clamp(max=self.limit)
        return self.down_proj(gate * self.up_proj(x).clamp(min=-self.limit, max=self.limit))


class Mixture(nn.Module):
    """Routed experts. With ``every`` each expert sees every token, as calibrations may want; the sum is the same."""

    every = False

    def __init__(self, config: Any, layer_idx: int):
        super().__init__()
        self.gate = nn.Linear(config.hidden_size, config.n_routed_experts, bias=False)
        self.router_bias = nn.Parameter(torch.zeros(config.n_routed_experts))
        limit = (config.swiglu_limits[layer_idx] or None) if config.swiglu_limits else None
        self.experts = nn.ModuleList(Expert(config, limit) for _ in range(config.n_routed_experts))
        self.top_k, self.scaling = config.num_experts_per_tok, config.moe_router_scaling_factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        scores = self.gate(rows).float().sigmoid()
        ids = (scores + self.router_bias.float()).topk(self.top_k, dim=-1).indices
        weights = scores.gather(1, ids)
        weights = self.scaling * weights / weights.sum(dim=-1, keepdim=True)
        share = torch.zeros_like(scores).scatter(1, ids, weights)
        out = torch.zeros_like(rows)
        for i, expert in enumerate(self.experts):
            chosen = slice(None) if self.every else share[:, i].nonzero()[:, 0]
            out[chosen] += share[chosen, i, None].to(rows.dtype) * expert(rows[chosen])
        return out.reshape(x.shape)


class HubLayer(reference.Step3p7DecoderLayer):
    def __init__(self, config: Any, layer_idx: int):
        super().__init__(config, layer_idx)
        if config.mlp_layer_types[layer_idx] == "sparse":
            del self.mlp
            self.moe = Mixture(config, layer_idx)
            self.share_expert = reference.Step3p7MLP(config, layer_idx, is_shared_expert=True)

    def forward(self, hidden_states: torch.Tensor, **given: Any) -> torch.Tensor:
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **given)
        hidden_states = hidden_states + attended
        x = self.post_attention_layernorm(hidden_states)
        return hidden_states + (self.moe(x) + self.share_expert(x) if hasattr(self, "moe") else self.mlp(x))


class Step3p5ForCausalLM(reference.Step3p7PreTrainedModel):
    config_class = Step3p7TextConfig
    _no_split_modules = ["HubLayer"]  # noqa: RUF012 — transformers' own attribute
    _keep_in_fp32_modules_strict = {"router_bias"}  # noqa: RUF012

    def __init__(self, config: Any):
        super().__init__(config)
        self.model = reference.Step3p7TextModel(config)
        self.model.layers = nn.ModuleList(HubLayer(config, i) for i in range(config.num_hidden_layers))
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def forward(self, input_ids: torch.Tensor, attention_mask: Any = None, **_: Any) -> CausalLMOutput:
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        return CausalLMOutput(logits=self.lm_head(hidden))


def model_of(hub: Mapping[str, Any], tensors: Mapping[str, np.ndarray], dtype: torch.dtype) -> Step3p5ForCausalLM:
    """The model with the weights of a release, MTP layers left out."""
    config: Any = Step3p7TextConfig(**{name: value for name, value in hub.items() if name != "model_type"})
    config._attn_implementation = "eager"
    model = Step3p5ForCausalLM(config).to(dtype).eval()
    for layer in model.model.layers:
        if hasattr(layer, "moe"):
            layer.moe.router_bias.data = layer.moe.router_bias.data.float()
    model.model.rotary_emb = reference.Step3p7RotaryEmbedding(config=config)  # its frequencies are float32
    state, wanted = {}, model.state_dict()
    for name, value in tensors.items():
        whole = torch.from_numpy(np.asarray(value, np.float32))
        if value.ndim == 3:
            each = {name.replace(".moe.", f".moe.experts.{i}."): whole[i] for i in range(len(whole))}
            state |= each
        else:
            state[name] = whole
    model.load_state_dict({name: state[name].to(wanted[name].dtype) for name in wanted})
    return model


def logits_of(model: nn.Module, ids: np.ndarray) -> np.ndarray:
    """Float32 [B, T, V] of token ids [B, T]."""
    with torch.no_grad():
        return model(input_ids=torch.from_numpy(ids.astype(np.int64))).logits.float().numpy()
