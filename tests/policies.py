"""Small random models of many architectures, and one that counts what it does."""

from typing import Any

import torch
import transformers

from preftune.model.forward import PolicyModel
from tests.tiny import tiny_model

SMALL: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,  # log-probs that differ from token to token
}
WINDOW = {"sliding_window": 8}
LATER_WINDOW = WINDOW | {"use_sliding_window": True, "max_window_layers": 2}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
LATENT = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
YARN |= {"rope_theta": 10000.0}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
LONG_ROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0] * 4,
    "long_factor": [2.0] * 4,
    "rope_theta": 10000.0,
    "original_max_position_embeddings": 128,
}
PACKED: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-yarn": ("Llama", {"rope_parameters": YARN}),
    "llama-dynamic": ("Llama", {"rope_parameters": DYNAMIC}),
    "mistral": ("Mistral", WINDOW),
    "mixtral": ("Mixtral", EXPERTS),
    "qwen2": ("Qwen2", LATER_WINDOW),
    "qwen3": ("Qwen3", LATER_WINDOW),
    "qwen3_moe": ("Qwen3Moe", EXPERTS | {"num_experts": 4, "moe_intermediate_size": 32}),
    "gemma2": ("Gemma2", WINDOW | {"query_pre_attn_scalar": 8, "attn_logit_softcapping": 5.0}),
    "gemma3": ("Gemma3Text", WINDOW | {"query_pre_attn_scalar": 8}),
    "phi3": ("Phi3", WINDOW),
    "phi3-longrope": (
        "Phi3",
        {"rope_parameters": LONG_ROPE, "original_max_position_embeddings": 128},
    ),
    "olmo2": ("Olmo2", {}),
    "olmo3": ("Olmo3", WINDOW),
    "gpt2": ("GPT2", {"n_embd": 32, "n_layer": 4, "n_head": 4}),
    "gpt_neox": ("GPTNeoX", {}),
    "opt": ("OPT", {"ffn_dim": 64, "word_embed_proj_dim": 32}),
    "smollm3": ("SmolLM3", LATER_WINDOW),
    "granite": ("Granite", {}),
    "cohere2": ("Cohere2", WINDOW),
    "deepseek_v3": ("DeepseekV3", LATENT),
    "gpt_oss": (
        "GptOss",
        WINDOW | EXPERTS | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    ),
}
MIXTURES = ["mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss"]


def long_rope(limit: int) -> dict[str, Any]:
    """Settings of a rotation that changes for rows longer than `limit`."""
    return {
        "rope_theta": 10000.0,
        "rope_type": "longrope",
        "short_factor": [1.0] * 4,
        "long_factor": [1.0, 2.0, 4.0, 8.0],
        "original_max_position_embeddings": limit,
    }


def make_policy(kind: str, settings: dict[str, Any], dtype: torch.dtype = torch.float32) -> Any:
    """A policy of PACKED's settings, or others of that kind."""
    torch.manual_seed(0)
    base = {k: v for k, v in SMALL.items() if kind != "Falcon" or k != "head_dim"}
    config = getattr(transformers, f"{kind}Config")(**(base | settings))
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype).eval()
    return PolicyModel(model)


class CountingModel(PolicyModel):
    """Counts forwards, and can fail at one of them."""

    def __init__(
        self, fail_at: int | None = None, error: type[BaseException] = KeyboardInterrupt
    ) -> None:
        super().__init__(tiny_model())
        self.num_forwards, self.fail_at, self.error = 0, fail_at, error

    def forward(self, layout, *wanted):
        self.num_forwards += 1
        if self.num_forwards == self.fail_at:
            raise self.error("no luck")
        return super().forward(layout, *wanted)
