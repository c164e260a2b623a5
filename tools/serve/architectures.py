# SPDX-License-Identifier: Apache-2.0
"""Architectures of the small models: what each needs beside the sizes of a recipe."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tools.serve.model import ModelRecipe

__all__ = ["ARCHITECTURES", "Architecture"]


@dataclass(frozen=True)
class Architecture:
    """Names of transformers' two classes, and settings of the configuration; a recipe's own settings go over them.

    ``around`` is the configuration of a model that takes more than text: its class, and its settings beside the configuration of
    the text model; its checkpoint has the ``special_tokens`` and JSON ``files`` as well.
    """

    config: str
    model: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    around: tuple[str, Mapping[str, Any]] | None = None
    special_tokens: tuple[str, ...] = ()
    files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def make(self, recipe: ModelRecipe, **tokens: int) -> Any:
        """Make the model in the present random state; ``tokens`` are ids of special tokens."""
        import transformers  # noqa: PLC0415 - heavy, and only here

        sizes = {
            "vocab_size": recipe.vocabulary,
            "hidden_size": recipe.hidden,
            "intermediate_size": recipe.intermediate,
            "num_hidden_layers": recipe.layers,
            "num_attention_heads": recipe.heads,
            "num_key_value_heads": recipe.kv_heads,
            "head_dim": recipe.head_dim,
            "max_position_embeddings": recipe.max_positions,
            "initializer_range": recipe.initializer_range,
            "tie_word_embeddings": False,
            **({"sliding_window": recipe.window_tokens} if recipe.window_tokens else {}),
        }
        make_config: Any = getattr(transformers, self.config)
        make_model: Any = getattr(transformers, self.model)
        config = make_config(**{**sizes, **tokens, **self.settings, **recipe.settings})
        if self.around:
            name, settings = self.around
            config = getattr(transformers, name)(text_config=config, **settings)
        return make_model(config)


# All experts are used, so that no token depends on a close choice.
_EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 2}

_TOWER = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "initializer_range": 0.3,
}

#: By the name that a recipe gives.
ARCHITECTURES = {
    "llama": Architecture("LlamaConfig", "LlamaForCausalLM"),
    "qwen3": Architecture("Qwen3Config", "Qwen3ForCausalLM"),
    # Llama with windows is how vLLM runs Mistral, whose own tokenizers want a package more.
    "windows": Architecture("LlamaConfig", "LlamaForCausalLM", {"layer_types": ["sliding_attention"] * 4}),
    "gemma3": Architecture("Gemma3TextConfig", "Gemma3ForCausalLM", {"query_pre_attn_scalar": 32}),
    "gemma4": Architecture(
        "Gemma4TextConfig",
        "Gemma4ForCausalLM",
        {"global_head_dim": 64, "vocab_size_per_layer_input": 512, "hidden_size_per_layer_input": 32},
    ),
    "gpt-oss": Architecture("GptOssConfig", "GptOssForCausalLM", _EXPERTS),
    "llama4": Architecture(
        "Llama4TextConfig",
        "Llama4ForCausalLM",
        {"intermediate_size_mlp": 512, "num_local_experts": 1, "attention_chunk_size": 128},
    ),
    "deepseek": Architecture(
        "DeepseekV3Config",
        "DeepseekV3ForCausalLM",
        {
            "kv_lora_rank": 512,
            "q_lora_rank": None,
            "qk_rope_head_dim": 64,
            "qk_nope_head_dim": 32,
            "v_head_dim": 32,
            "first_k_dense_replace": 99,
            "n_routed_experts": 2,
            "n_group": 1,
            "topk_group": 1,
            "num_experts_per_tok": 1,
            "moe_intermediate_size": 64,
            "num_mtp_layers": 0,
        },
    ),
    "qwen3-next": Architecture(
        "Qwen3NextConfig",
        "Qwen3NextForCausalLM",
        {
            # vLLM wants experts in at least one layer.
            "num_experts": 2,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 256,
            "shared_expert_intermediate_size": 256,
            "mlp_only_layers": [0, 1, 2],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 2,
            "linear_key_head_dim": 128,  # vLLM's kernels know no other on CPUs
            "linear_value_head_dim": 128,
        },
    ),
    # Others that take images want torchvision.
    "blip2": Architecture(
        "LlamaConfig",
        "Blip2ForConditionalGeneration",
        around=(
            "Blip2Config",
            {
                "vision_config": {**_TOWER, "image_size": 56, "patch_size": 14},
                "qformer_config": {**_TOWER, "vocab_size": 32, "encoder_hidden_size": 64},
                "num_query_tokens": 64,
                "image_token_index": 5,
                "tie_word_embeddings": False,
            },
        ),
        special_tokens=("<image>",),
        files={
            "preprocessor_config.json": {
                "image_processor_type": "BlipImageProcessor",
                "size": {"height": 56, "width": 56},
            },
            "processor_config.json": {"processor_class": "Blip2Processor", "num_query_tokens": 64},
        },
    ),
    "jamba": Architecture(
        "JambaConfig",
        "JambaForCausalLM",
        {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 1, "num_experts_per_tok": 1},
    ),
    "granite4": Architecture(
        "GraniteMoeHybridConfig",
        "GraniteMoeHybridForCausalLM",
        {
            **_EXPERTS,
            "mamba_d_state": 16,
            "mamba_n_heads": 8,
            "mamba_d_head": 64,
            "shared_intermediate_size": 64,
            "layer_types": ["mamba", "attention", "mamba", "attention"],
        },
    ),
}
