"""A llama-architecture GGUF file as plain Hugging Face tensors: what transformers does, without ``accelerate``.

Dequantised values are kept in float32 (they are not exact in bfloat16). Names and the rotary permutation follow
llama.cpp's converter, which this reverses. Shapes: [out, in] for weights, as in torch.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae.errors import DataError, Unsupported

if TYPE_CHECKING:
    import torch

_BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


def read_llama(path: Path) -> tuple[dict[str, Any], dict[str, "torch.Tensor"]]:
    """Keyword arguments of a ``LlamaConfig`` and the state dict, float32.

    Raises :class:`Unsupported` for another architecture and :class:`DataError` for a file that is no GGUF.
    """
    import gguf
    import torch

    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, IndexError, OSError) as error:
        raise DataError(f"{path} is not a readable GGUF file ({error})") from error

    def meta(name: str, default: Any = None) -> Any:
        field = reader.fields.get(name)
        return default if field is None else field.contents()

    architecture = meta("general.architecture")
    if architecture != "llama":
        raise Unsupported(f"{path} holds a {architecture!r} model; only GGUF files of llama models can be converted")
    heads = int(meta("llama.attention.head_count"))
    kv_heads = int(meta("llama.attention.head_count_kv", heads))
    tensors: dict[str, torch.Tensor] = {}
    for entry in reader.tensors:
        name = _hf_name(entry.name, path)
        value = torch.tensor(gguf.dequantize(entry.data, entry.tensor_type), dtype=torch.float32)
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            value = _unpermute(value, heads if "q_proj" in name else kv_heads)
        tensors[name] = value.contiguous()
    hidden = int(meta("llama.embedding_length"))
    config = {
        "vocab_size": int(tensors["model.embed_tokens.weight"].shape[0]),
        "hidden_size": hidden,
        "intermediate_size": int(meta("llama.feed_forward_length")),
        "num_hidden_layers": int(meta("llama.block_count")),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": int(meta("llama.rope.dimension_count", hidden // heads)),
        "max_position_embeddings": int(meta("llama.context_length")),
        "rms_norm_eps": float(meta("llama.attention.layer_norm_rms_epsilon")),
        "rope_theta": float(meta("llama.rope.freq_base", 10_000.0)),
        "bos_token_id": meta("tokenizer.ggml.bos_token_id"),
        "eos_token_id": meta("tokenizer.ggml.eos_token_id"),
        "pad_token_id": meta("tokenizer.ggml.padding_token_id"),
        "tie_word_embeddings": "lm_head.weight" not in tensors,
    }
    return config, tensors


def _hf_name(name: str, path: Path) -> str:
    if name in _TOP_NAMES:
        return _TOP_NAMES[name]
    parts = name.split(".")
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in _BLOCK_NAMES:
        return f"model.layers.{parts[1]}.{_BLOCK_NAMES[parts[2]]}.{parts[3]}"
    raise Unsupported(f"{path} holds the tensor {name!r}, which no plain llama model has")


def _unpermute(weight_OI: "torch.Tensor", heads: int) -> "torch.Tensor":
    """llama.cpp interleaves the two rotary halves of each head; Hugging Face keeps them apart."""
    rows, columns = weight_OI.shape
    return weight_OI.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)
