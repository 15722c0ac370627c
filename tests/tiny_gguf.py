"""Tiny GGUF files: the Llama of tiny_models.py in float32, with the tensor layout of llama.cpp."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from gguf import GGUFWriter, RopeScalingType
from safetensors.numpy import load_file

PARTS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
WHOLE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def save_gguf(
    folder: Path,
    path: Path,
    *,
    add_bos: bool | None = None,
    add_eos: bool | None = None,
    pre: str | None = None,
    bos_id: int | None = 1,
    without: str = "",
    rope_factors: Sequence[float] = (),
    rope_scale: float | None = None,
) -> Path:
    """Writes the Llama of `folder` as a GGUF file without the tensor `without`.

    `add_bos`, `add_eos`, `pre` and `bos_id` are fields of its tokenizer; None leaves one out.
    """
    config = json.loads((folder / "config.json").read_text())
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    if rope_scale is not None:
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope_scale)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    vocabulary = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].get)
    special = {token["content"] for token in tokenizer["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(vocabulary)
    writer.add_token_types([3 if token in special else 1 for token in vocabulary])
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
    writer.add_pad_token_id(0)
    if bos_id is not None:
        writer.add_bos_token_id(bos_id)
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    writer.add_eos_token_id(2)
    if add_bos is not None:
        writer.add_add_bos_token(add_bos)
    if add_eos is not None:
        writer.add_add_eos_token(add_eos)
    for name, array in load_file(folder / "model.safetensors").items():
        renamed, tensor = _renamed(name, array, config)
        if renamed != without:
            writer.add_tensor(renamed, tensor)
    if rope_factors:
        writer.add_tensor("rope_freqs.weight", np.array(rope_factors, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _renamed(name: str, array: np.ndarray, config: dict[str, int]) -> tuple[str, np.ndarray]:
    if name in WHOLE:
        return WHOLE[name], array
    _, _, block, part = name.removesuffix(".weight").split(".", 3)
    heads = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}.get(PARTS[part])
    if heads is not None:  # llama.cpp stores the two halves of a rotary head interleaved
        split = array.reshape(config[heads], 2, -1, array.shape[1])
        array = np.ascontiguousarray(split.swapaxes(1, 2)).reshape(array.shape)
    return f"blk.{block}.{PARTS[part]}.weight", array
