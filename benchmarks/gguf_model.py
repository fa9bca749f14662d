"""The saved random models as bfloat16 GGUF files, for programs that read nothing else."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType

from random_model import saved_folder, saved_source

WHOLE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
PARTS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6
"""Kinds of tokens in GGUF."""


def saved_gguf(shape: str) -> Path:
    """The same weights as `saved_folder`'s, beside them; written the first time."""
    folder = saved_folder(shape)
    path = folder.with_name(f"{folder.name}.gguf")  # shape names have dots
    if not path.exists():
        print(f"writing {path}", file=sys.stderr)
        started = path.with_suffix(".part")
        _write(shape, started)
        started.rename(path)
    return path


def _write(shape: str, path: Path) -> None:
    source = saved_source(shape)
    config = source.config
    writer = GGUFWriter(path, "llama")
    writer.add_file_type(LlamaFileType.MOSTLY_BF16)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    _add_tokens(writer, config.vocab_size)
    for name in source.tensor_names():
        weight = source.read(name)
        if weight.dim() == 1:
            writer.add_tensor(_gguf_name(name), weight.float().numpy())
            continue
        if ".q_proj." in name:
            weight = _permuted(weight, config.num_attention_heads)
        elif ".k_proj." in name:
            weight = _permuted(weight, config.num_key_value_heads)
        raw = weight.contiguous().view(torch.uint8).numpy()
        writer.add_tensor(_gguf_name(name), raw, raw_dtype=GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _gguf_name(name: str) -> str:
    if name in WHOLE:
        return WHOLE[name]
    number, _, part = name.removeprefix("model.layers.").partition(".")
    return f"blk.{number}.{PARTS[part.removesuffix('.weight')]}.weight"


def _permuted(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """llama.cpp rotates neighbouring pairs of a head's rows, transformers its halves."""
    rows, width = weight.shape
    split = weight.reshape(num_heads, 2, rows // num_heads // 2, width)
    return split.transpose(1, 2).reshape(rows, width)


def _add_tokens(writer: GGUFWriter, vocab_size: int) -> None:
    """A vocabulary of bytes and names; prompts are given as token ids."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{value:02X}>" for value in range(256))]
    kinds = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256]
    tokens += [f"t{number}" for number in range(len(tokens), vocab_size)]
    kinds += [NORMAL] * (vocab_size - len(kinds))
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * vocab_size)
    writer.add_token_types(kinds)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
