"""Any transformers config, made small: the same sizes under the many names that they have."""

from __future__ import annotations

from typing import Any

_WIDTH = 64
_SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "hidden_dim", "emb_dim"), _WIDTH),
    **dict.fromkeys(("embedding_size", "word_embed_proj_dim", "projection_dim", "d_embed", "model_dim"), _WIDTH),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth_layers"), 2),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_encoder_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "multi_query_group_num"), 2),
    **dict.fromkeys(("head_dim", "d_kv", "attention_head_dim", "d_head"), 16),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff", "n_inner"), 128),
    **dict.fromkeys(("d_inner", "ffn_hidden_size", "mlp_dim"), 128),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_selected_experts", "moe_k"), 2),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size", "shared_expert_intermediate_size"), 64),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "max_source_positions"), 64),
    "max_target_positions": 64,
    "vocab_size": 2048,
    "vocab_size_per_layer_input": 256,
    "image_size": 32,
    "patch_size": 8,
    "num_mel_bins": 16,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "state_size": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}


def tiny_config(config_class: Any, **own: Any) -> Any:
    """Return a small config of a class: known sizes are set where it has them, and so are those of its parts."""
    return config_class(**{**_small_settings(config_class), **own})


def _small_settings(config_class: Any) -> dict[str, Any]:
    default = config_class()
    settings: dict[str, Any] = {}
    for name, value in _SIZES.items():
        found = getattr(default, name, None)
        if isinstance(found, int) and not isinstance(found, bool):
            settings[name] = min(value, found) if name in ("patch_size", "image_size") else value
    for name, part in getattr(config_class, "sub_configs", {}).items():
        inner = getattr(default, name, None)
        part = type(inner) if inner is not None else part
        if hasattr(part, "from_dict") and part.__name__ != "AutoConfig":
            settings[name] = _small_settings(part)
            if inner is not None and inner.model_type:
                settings[name]["model_type"] = inner.model_type
    return settings
