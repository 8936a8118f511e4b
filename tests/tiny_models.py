"""A tiny configuration of any architecture in transformers' registry, made by rules.

It is the default configuration with every size replaced by a small one, which the field's name decides. Only the rows
of `EXCEPTIONS` are written for one architecture. All widths become the same number, so parts that have to fit each
other do; lists with one entry for each stage of a network keep their length and their ratios.
"""

import re
from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FFN, LAYERS = 64, 4, 2, 16, 96, 2
IMAGE, PATCH, POSITIONS = 64, 8, 32
VOCAB, FIRST_SPECIAL = 128, 80  # from FIRST_SPECIAL on, tokens have a meaning of their own
MOST_STAGES = 6  # a list of more entries has one for each layer

# The first pattern that matches the whole name of a field of int gives the largest value it may have.
SIZES = [
    (r"num_feat_extract_layers|num_encoder_blocks|num_stages|.*_factor", 10**9),  # the length of a list that is kept
    (r"qk_head_dim|mamba_(d_head|head_dim|headdim)", 2 * HEAD_DIM),
    (r".*(head_dim|d_kv|key_dim|value_dim|d_head|kv_channels|dim_head|key_size|value_size)", HEAD_DIM),
    (r".*(lora_rank|rotary_dim)", HEAD_DIM),
    (r".*(kv|key_value)_heads|.*num_(query_)?groups?", KV_HEADS),
    (r".*heads?", HEADS),
    (r".*(layers?|depth|blocks|block_repeats)", LAYERS),
    (r".*experts?_per_tok(en)?|.*(moe|experts)_top_?k|moe_k|top_k_experts", 2),
    (r".*n_groups?|topk_group", 1),
    (r".*(routed|local|num|zero)_experts?|.*expert_num|n_experts", 4),
    (
        r".*(intermediate_(size|dim)|ffn_(dim|hidden_size)|mlp_(dim|hidden_size|hidden_dim)|d_ff|dff|dim_ff|d_inner)",
        FFN,
    ),
    (r".*(feed_?forward.*(dim|size)|linear_units|n_inner|inner_dim|dim_feedforward)", FFN),
    (r".*vocab(_size.*)?|.*codebook_size|.*num_embeddings", VOCAB),
    (r"image_embedding_size", IMAGE // PATCH),
    (r".*(image|img|input|crop|spec)_size|resolution", IMAGE),
    (r".*patch_size", PATCH),
    (r"coordinate_size", 12),  # four coordinates and two sides of a box make up one embedding
    (r"shape_size", 8),
    (
        r".*(hidden|embed|embedding|model|emb|output|proj|projection|project|projector|query|latent|out|condition"
        r"|bottleneck)_?(size|dims?)",
        HIDDEN,
    ),
    (r".*(d_model|d_latents|n_embd|width|hidden|fpn_.*dim|in_dim|out_dim|conv_dim)|output_channels|.*_groups", HIDDEN),
    (r".*(max_position_embeddings|n_positions|n_ctx|max_seq.*_len.*|context_length|max_sequence_length)", 256),
    (r".*max_(source|target)_positions", POSITIONS),
    (r".*(num_queries|query_num|num_query_tokens|num_latents)", 8),
]
WIDTHS = r"(?!.*(kernel|patch)).*(sizes|channels|dims?|units|widths?)"
DEPTHS = r".*(depths|layers|blocks.*|repeats)"
INDICES = r".*(index|indexes|indices|ids|_at|(feature|extract|hook|vision)_layers?)"
TOKEN = r".*(token_id|token_index|(eos|bos|pad|sep|cls|unk|boi|eoi|start|end)_(id|index|idx))"
PLACEHOLDER = r"(image|video|audio)_token_(id|index)"
LAYER_COUNT = r"num_hidden_layers|num_layers|n_layers?|depth"

EXCEPTIONS: dict[str, dict[str, Any]] = {  # fields that no rule gets right, some of which have no default
    "autoformer": {"prediction_length": 8},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "esm": {"vocab_size": 33, "pad_token_id": 1, "mask_token_id": 32},
    "informer": {"prediction_length": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"head_dim": 2 * HIDDEN // HEADS},
    "nemotron": {"num_key_value_heads": KV_HEADS},
    "olmo": {"clip_qkv": 8.0},
    "swin2sr": {"image_size": 16},
    "time_series_transformer": {"prediction_length": 8},
    "xmod": {"default_language": "en_XX"},
}


class Tokens(dict):
    """An id below VOCAB for each name of a special token, the same wherever the name occurs."""

    def __missing__(self, name: str) -> int:
        self[name] = FIRST_SPECIAL + len(self)
        return self[name]


def tiny_config(model_type: str) -> PreTrainedConfig:
    """The default configuration of ``model_type``, made small."""
    cls = CONFIG_MAPPING[model_type]
    return cls.from_dict(_shrunk(cls().to_dict(), Tokens()) | EXCEPTIONS.get(model_type, {}))


def _shrunk(config: dict, tokens: Tokens) -> dict:
    stages = any(re.fullmatch(f"{WIDTHS}|{DEPTHS}", name) and _is_per_stage(v) for name, v in config.items())
    before = next((v for name, v in config.items() if re.fullmatch(LAYER_COUNT, name) and isinstance(v, int)), 0)
    if stages:
        per_stage = before and any(re.fullmatch(WIDTHS, n) and _length(v) == before for n, v in config.items())
        layers = before if per_stage else LAYERS
    else:
        layers = max(LAYERS, _length(config.get("out_indices")))  # a backbone puts out that many of its layers
    kept = _layers_to_keep(config, before, layers)
    small = {}
    for name, value in config.items():
        if name in ("id2label", "label2id", "stage_names") or (name == "out_features" and not stages):
            continue  # made from other fields
        if name == "out_indices" and stages and config.get("out_features"):
            continue  # says the same
        if isinstance(value, dict):
            small[name] = _small_dict(name, value, config, kept, tokens)
        elif _is_list(value):
            per_layer = len(value) == before > 2 and (len(value) > MOST_STAGES or not isinstance(value[0], int | float))
            chosen = [value[i] for i in kept] if per_layer else _small_list(name, value, layers, stages, tokens)
            small[name] = type(value)(chosen)
        else:
            small[name] = _small_number(name, value, layers, config, tokens)
    return small


def _length(value: Any) -> int:
    return len(value) if isinstance(value, list | tuple) else 0


def _is_list(value: Any) -> bool:
    return _length(value) > 0 and not isinstance(value[0], list | tuple | dict)


def _is_per_stage(value: Any) -> bool:
    return 0 < _length(value) <= MOST_STAGES


def _layers_to_keep(config: dict, before: int, layers: int) -> list[int]:
    """Which layers the small model has: the first of each kind, as the lists with an entry for each layer tell them."""
    lists = [value for value in config.values() if _length(value) == before > 2]
    kinds = [str(kind) for kind in zip(*lists, strict=True)] if lists else [""] * before
    firsts = [kinds.index(kind) for kind in dict.fromkeys(kinds)][:layers]
    others = [i for i in range(before) if i not in firsts]
    return sorted(firsts + others[: layers - len(firsts)])


def _small_dict(name: str, value: dict, config: dict, kept: list[int], tokens: Tokens) -> dict:
    if name == "per_layer_config":
        return {new: _shrunk(value[old], tokens) for new, old in enumerate(kept) if old in value}
    if not all(isinstance(key, str) for key in value):
        return value
    if not name.startswith("rope_"):
        return _shrunk(value, tokens)
    value = {key: _shrunk(v, tokens) if isinstance(v, dict) else v for key, v in value.items()}
    if "rope_theta" in value and value["rope_theta"] is None:
        value["rope_theta"] = 10_000.0
    cls = CONFIG_MAPPING[config["model_type"]] if config.get("model_type") in CONFIG_MAPPING else None
    flat = value and not any(isinstance(v, dict) for v in value.values())
    if flat and "mrope_section" in {*value, *getattr(cls, "ignore_keys_at_rope_validation", ())}:
        pairs = int(HEAD_DIM * value.get("partial_rotary_factor", 1.0)) // 2
        value["mrope_section"] = [pairs - 2 * (pairs // 4), pairs // 4, pairs // 4]
    return value


def _small_list(name: str, value: Any, layers: int, stages: bool, tokens: Tokens) -> Any:
    if "drop" in name and isinstance(value[0], float):
        return [0.0] * len(value)
    if not isinstance(value[0], int) or isinstance(value[0], bool):
        return value
    if re.fullmatch(TOKEN, name):
        return [tokens[name]]
    if name == "out_indices":
        return value if stages else range(1, layers + 1)
    if re.fullmatch(INDICES, name):
        indices = [max(-2, min(i, layers - 1)) for i in value]
        return indices if name == "vision_feature_layer" else dict.fromkeys(indices)
    if re.fullmatch(r".*(image|img|input|crop)_size", name):
        return [min(size, IMAGE) for size in value]
    if re.fullmatch(r".*(patch|tubelet|kernel)_size", name):
        return [min(size, PATCH) for size in value]
    if re.fullmatch(DEPTHS, name):
        return [min(depth, LAYERS) for depth in value]
    if re.fullmatch(r".*heads?", name):
        return [min(heads, 2) for heads in value]
    if re.fullmatch(WIDTHS, name):
        return [width if width <= 16 else max(8, 8 * round(width / 64)) for width in value]
    return value


def _small_number(name: str, value: Any, layers: int, config: dict, tokens: Tokens) -> Any:
    if value is None:
        return tokens[name] if re.fullmatch(PLACEHOLDER, name) else None
    if isinstance(value, float) and "drop" in name:
        return 0.0
    if isinstance(value, bool) or not isinstance(value, int):
        return value
    if re.fullmatch(TOKEN, name):
        return tokens[name] if value >= VOCAB else value
    if name == "num_key_value_heads" and value == config.get("num_attention_heads"):
        return min(value, HEADS)
    most = next((most for pattern, most in SIZES if re.fullmatch(pattern, name)), value)
    is_depth = re.fullmatch(r".*(layers?|depth|blocks)", name) and most == LAYERS
    return min(value, layers if is_depth else most)
