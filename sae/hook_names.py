"""Where an SAE reads, in the words of other libraries, as the native hookpoint (FORMATS 4).

The native name is the module path below the decoder stack, ``:in`` where the module's input is meant. A name that has
no certain counterpart gives None, never a guess.
"""

import re

_LLAMA = {
    "resid_post": "layers.{l}", "resid_pre": "layers.{l}:in", "resid_mid": "layers.{l}.post_attention_layernorm:in",
    "attn_out": "layers.{l}.self_attn", "mlp_out": "layers.{l}.mlp", "hook_z": "layers.{l}.self_attn.o_proj:in",
    "mlp_post": "layers.{l}.mlp.down_proj:in", "mlp_in": "layers.{l}.mlp:in", "mlp": "layers.{l}.mlp",
}  # fmt: skip
_GEMMA = _LLAMA | {
    "resid_mid": "layers.{l}.pre_feedforward_layernorm:in", "attn_out": "layers.{l}.post_attention_layernorm",
    "mlp_out": "layers.{l}.post_feedforward_layernorm",
}  # fmt: skip
_GPT2 = {
    "resid_post": "h.{l}", "resid_pre": "h.{l}:in", "resid_mid": "h.{l}.ln_2:in", "attn_out": "h.{l}.attn",
    "mlp_out": "h.{l}.mlp", "hook_z": "h.{l}.attn.c_proj:in", "mlp_post": "h.{l}.mlp.c_proj:in",
    "mlp_in": "h.{l}.mlp:in", "mlp": "h.{l}.mlp",
}  # fmt: skip
_NEOX = {
    "resid_post": "layers.{l}", "resid_pre": "layers.{l}:in", "attn_out": "layers.{l}.attention",
    "mlp_out": "layers.{l}.mlp",
}  # fmt: skip
_FAMILIES = (
    (r"gpt2", _GPT2), (r"gemma", _GEMMA), (r"pythia|neox", _NEOX), (r"llama|qwen|mistral|smollm|deepseek|phi-3", _LLAMA)
)  # fmt: skip
_TRANSFORMER_LENS = {
    "hook_resid_post": "resid_post", "hook_resid_pre": "resid_pre", "hook_resid_mid": "resid_mid",
    "hook_attn_out": "attn_out", "hook_mlp_out": "mlp_out", "attn.hook_z": "hook_z", "mlp.hook_post": "mlp_post",
    "mlp.hook_in": "mlp_in", "mlp.hook_out": "mlp",  # circuit-tracer's names of what its MLP is given and gives
}  # fmt: skip
_OPENAI = {
    "resid_post_mlp": "resid_post", "resid_post_attn": "resid_mid", "resid_delta_attn": "attn_out",
    "resid_delta_mlp": "mlp_out", "mlp_post_act": "mlp_post",
}  # fmt: skip


def place(site: str, layer: int, lm: str | None) -> str | None:
    """Native name of a site (``resid_post``, ``mlp_out``, ...) of a layer; None for a model of unknown build."""
    for pattern, names in _FAMILIES:
        if lm is not None and re.search(pattern, lm.lower()):
            return names[site].format(l=layer) if site in names else None
    return None


def from_transformer_lens(hook: str | None, lm: str | None) -> str | None:
    """``blocks.7.hook_resid_pre`` of gpt2-small -> ``h.7:in``."""
    found = re.fullmatch(r"blocks\.(\d+)\.(.+)", hook or "")
    if found is None or found.group(2) not in _TRANSFORMER_LENS:
        return None
    return place(_TRANSFORMER_LENS[found.group(2)], int(found.group(1)), lm)


def from_openai(location: str, layer: int) -> str | None:
    """Location of the released GPT-2 SAEs, e.g. ``resid_post_mlp``."""
    return place(_OPENAI[location], layer, "gpt2") if location in _OPENAI else None


def to_transformer_lens(hookpoint: str, lm: str | None) -> str | None:
    """The inverse of :func:`from_transformer_lens`, None where there is none."""
    found = re.search(r"\.(\d+)", hookpoint)
    if found is None:
        return None
    for hook, site in _TRANSFORMER_LENS.items():
        if place(site, int(found.group(1)), lm) == hookpoint:
            return f"blocks.{found.group(1)}.{hook}"
    return None
