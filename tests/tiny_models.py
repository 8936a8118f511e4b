"""A tiny configuration of any architecture in transformers' registry, made by rules.

It is the default configuration with every size replaced by a small one, which the field's name decides. Nothing here is
written for one architecture but the rows of `EXCEPTIONS`.
"""

import re
from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FFN, LAYERS, STAGE = 64, 4, 2, 16, 96, 2, 8
VOCAB, FIRST_SPECIAL = 128, 80  # tokens from FIRST_SPECIAL on have a meaning of their own
IMAGE, PATCH, FRAMES = 64, 8, 64

# The first pattern that matches a field's whole name gives the largest value it may have.
SIZES = [
    (r".*(head_dim|d_kv|key_dim|value_dim|d_head|kv_channels|dim_head|key_size|value_size)", HEAD_DIM),
    (r".*(kv|key_value)_heads|.*num_(query_)?groups?", KV_HEADS),
    (r".*(heads?)", HEADS),
    (r".*(layers?|depth|n_layers?|blocks|block_repeats)", LAYERS),
    (r".*experts?_per_tok(en)?|.*moe_top_?k|.*experts_top_?k|moe_k|top_k_experts", 2),
    (r".*n_group|topk_group", 1),
    (r".*(routed|local|num|zero)_experts?|.*expert_num|n_experts", 4),
    (r".*(lora_rank|rotary_dim)", HEAD_DIM),
    (r".*(intermediate_(size|dim)|ffn_(dim|hidden_size)|mlp_(dim|hidden_size|hidden_dim)|d_ff|dff|dim_ff|d_inner)", FFN),
    (r".*(feed_?forward.*(dim|size)|linear_units|n_inner|inner_dim|dim_feedforward)", FFN),
    (r".*(vocab_size|codebook_size|num_embeddings|vocab)", VOCAB),
    (r".*(image|img|input|crop|spec)_size|resolution", IMAGE),
    (r".*patch_size", PATCH),
    (r".*(hidden|embed|embedding|model|emb|output|proj|projection|project|projector|query|latent|out|condition)_?(size|dims?)", HIDDEN),
    (r".*(d_model|n_embd|width|hidden|fpn_.*dim|in_dim|out_dim|conv_dim|mlp_dim)", HIDDEN),
    (r".*(max_position_embeddings|n_positions|n_ctx|max_seq.*_len.*|context_length|max_sequence_length)", 256),
    (r".*max_(source|target)_positions", FRAMES // 2),
    (r".*(num_queries|query_num|num_query_tokens|num_latents|n_latents)", 8),
]
WIDTHS = r".*(hidden_sizes|channels|dims?|sizes|units|widths?)"  # of lists, one for each stage
DEPTHS = r".*(depths|layers|blocks|num_blocks.*|repeats)"
TOKEN = r".*(token_id|token_index|token|(eos|bos|pad|sep|cls|unk|boi|eoi|start|end)_(id|index|idx))"
KEPT = r"num_feat_extract_layers|.*_factor|.*pretraining_tp"


class Tokens(dict):
    """An id below VOCAB for each name of a special token, the same wherever the name occurs."""

    def __missing__(self, name: str) -> int:
        self[name] = FIRST_SPECIAL + len(self)
        return self[name]


def tiny_config(model_type: str) -> PreTrainedConfig:
    cls = CONFIG_MAPPING[model_type]
    return cls.from_dict(shrunk(cls().to_dict(), Tokens()))


def shrunk(config: dict[str, Any], tokens: Tokens) -> dict[str, Any]:
    dropped = ("stage_names", "out_features", "id2label", "label2id")
    layers = next((v for k, v in config.items() if re.fullmatch(r"num_hidden_layers|num_layers|n_layers?|depth", k) and isinstance(v, int)), 0)
    out = {}
    stages = any(re.fullmatch(WIDTHS + "|" + DEPTHS, k) and isinstance(v, (list, tuple)) and len(v)<7 for k, v in config.items())
    n_out = len(config.get("out_indices") or ()) if not stages else 0
    n = max(LAYERS, n_out) if not stages else LAYERS
    if stages and any(re.fullmatch(WIDTHS, k) and isinstance(v, (list, tuple)) and len(v) == layers for k, v in config.items()):
        n = layers
    keep = per_layer_sample(config, layers, n)
    for name, value in config.items():
        if name in dropped and not (isinstance(value, (list, tuple)) and value and isinstance(value[0], int)):
            continue
        if name == "per_layer_config" and value:
            out[name] = {j: shrunk(value[i], tokens) for j, i in enumerate(keep) if i in value}
        elif isinstance(value, dict) and not all(isinstance(k, str) for k in value):
            out[name] = value
        elif isinstance(value, dict):
            out[name] = rope(value, config) if name.startswith("rope_") else shrunk(value, tokens)
        elif isinstance(value, (list, tuple)):
            out[name] = small_list(name, value, layers, keep, n, stages, tokens)
        elif isinstance(value, bool) or value is None:
            out[name] = value
        elif isinstance(value, int):
            out[name] = small_int(name, value, n, tokens)
            if re.fullmatch(r".*key_value_heads", name) and value == config.get("num_attention_heads"):
                out[name] = min(value, HEADS)
        elif isinstance(value, float) and "drop" in name:
            out[name] = 0.0
        else:
            out[name] = value
    return out


def per_layer_sample(config, layers, n):
    lists = [v for v in config.values() if isinstance(v, (list, tuple)) and len(v) == layers and layers > 2]
    kinds = list(zip(*lists, strict=True)) if lists else []
    kinds = [str(k) for k in kinds]
    first = [kinds.index(k) for k in dict.fromkeys(kinds)][:n]
    rest = [i for i in range(layers) if i not in first]
    return sorted(first + rest[: n - len(first)])


def small_list(name, value, layers, keep, n, stages, tokens):
    kind = type(value)
    if not value or isinstance(value[0], (list, tuple, dict)):
        return value
    if len(value) == layers and layers > 2 and not (isinstance(value[0], (int, float)) and len(value) < 7 and not isinstance(value[0], bool)):
        return kind(value[i] for i in keep)
    if isinstance(value[0], float) and "drop" in name:
        return kind(0.0 for _ in value)
    if not isinstance(value[0], int) or isinstance(value[0], bool):
        return value
    if re.fullmatch(TOKEN, name):
        return kind([tokens[name]])
    if name == "out_indices":
        return value if stages else kind(range(1, n + 1))
    if re.fullmatch(r".*(index|indexes|indices|ids|_at|(feature|extract|hook|vision)_layers?)", name):
        small = [max(-2, min(v, n - 1)) for v in value]
        return kind(small if name == "vision_feature_layer" else dict.fromkeys(small))
    if re.fullmatch(r".*(patch|image|img|tubelet|kernel|input|crop)_size", name):
        top = IMAGE if "image" in name or "img" in name or "input" in name else PATCH
        return kind(min(v, top) for v in value)
    if re.fullmatch(DEPTHS, name):
        return kind(min(v, LAYERS) for v in value)
    if re.fullmatch(r".*heads?", name):
        return kind(min(v, 2) for v in value)
    if re.fullmatch(WIDTHS, name) and "kernel" not in name and "patch" not in name:
        return kind(max(8, v // 8) if v > 16 else v for v in value)
    return value


def small_int(name, value, n, tokens):
    if re.fullmatch(KEPT, name):
        return value
    if re.fullmatch(TOKEN, name):
        return tokens[name] if value >= VOCAB else value
    for pattern, top in SIZES:
        if re.fullmatch(pattern, name):
            top = n if top == LAYERS else top
            return min(value, top)
    return value


def rope(value, config):
    if "mrope_section" in value:
        return {**value, "mrope_section": [4, 2, 2]}
    return value
