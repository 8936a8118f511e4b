"""Every architecture in transformers' registry that runs from a tiny configuration, in plain PEFT and patched.

    python -m tests.architectures [--only REGEX] [--json FILE]     prints the table

"""

import argparse
import copy
import inspect
import itertools
import json
import random
import re
import sys
import time
import traceback
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy
import torch
import transformers
from peft import LoraConfig, get_peft_model
from tiny_models import FRAMES, IMAGE, PATCH, tiny_config
from torch import Tensor, nn
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES, model_type_to_module_name

from fastlora.peft import patch

BATCH, LENGTH = 2, 12
MOST_PARAMETERS = 20_000_000
TOLERANCE = 1e-3

FIRST_MAPPINGS = ("CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM", "MASKED_LM", "CTC")


def architectures() -> list[str]:
    """One model type of each family (a folder of transformers), or several where none is a part of another."""
    families = defaultdict(list)
    for model_type in CONFIG_MAPPING_NAMES:
        families[model_type_to_module_name(model_type)].append(model_type)
    found = []
    for types in families.values():
        if len(types) > 1:
            parts = {c for t in types for c in getattr(CONFIG_MAPPING[t], "sub_configs", {}).values()}
            types = [t for t in types if CONFIG_MAPPING[t] not in parts]
        found += types
    return found


def classes_of(model_type: str) -> list[type]:
    names = [f"MODEL_FOR_{n}_MAPPING_NAMES" for n in FIRST_MAPPINGS] + ["MODEL_MAPPING_NAMES"]
    names += [n for n in dir(modeling_auto) if re.fullmatch("MODEL_FOR_.*_MAPPING_NAMES", n) and n not in names]
    found = []
    for name in names:
        classes = getattr(modeling_auto, name).get(model_type, ())
        found += [classes] if isinstance(classes, str) else classes
    return list(dict.fromkeys(found))


# inputs


class Maker:
    def __init__(self, model):
        self.model, self.config = model, model.config
        self.parameters = inspect.signature(model.forward).parameters
        self.placeholders = {}

    def configs(self, *kinds):
        """The configuration's parts whose name speaks of one of these kinds, then itself, then the other parts."""
        parts, queue = [], [("", self.config)]
        while queue:
            name, config = queue.pop(0)
            parts.append((name, config))
            for key, value in vars(config).items():
                if isinstance(value, transformers.PreTrainedConfig):
                    queue.append((f"{name}.{key}", value))
        return [c for _, c in sorted(parts, key=lambda part: not any(kind in part[0] for kind in kinds))]

    def find(self, kinds, names, default=None):
        for config in self.configs(*kinds):
            for name in names:
                value = getattr(config, name, None)
                if isinstance(value, (int, list, tuple)) and not isinstance(value, bool) and value:
                    return value
        return default

    def image_size(self):
        size = self.find(VISION, ("image_size", "img_size", "input_size", "image_resolution"), IMAGE)
        h, w = (size[-2], size[-1]) if isinstance(size, (list, tuple)) and len(size) > 1 else (size, size)
        return (h[0] if isinstance(h, (list, tuple)) else h), w

    def channels(self):
        n = self.find(VISION, ("num_channels", "in_channels", "in_chans", "num_input_channels"), 3)
        return n if isinstance(n, int) else n[0]

    def input_ids(self, name):
        ids = torch.randint(30, 80, (BATCH, LENGTH))
        ids[:, -1] = eos if isinstance(eos := self.find(TEXT, ("eos_token_id",), 2), int) else eos[0]
        for kind, rows in self.placeholders.items():
            token = self.find((), (f"{kind}_token_id", f"{kind}_token_index"))
            if token is not None:
                each = -(-rows // BATCH)
                ids = torch.cat([ids[:, :2], torch.full((BATCH, each), token), ids[:, 2:]], 1)
        return [ids]

    def decoder_input_ids(self, name):
        return [torch.randint(3, 9, (BATCH, 6))]

    def pixel_values(self, name):
        h, w = self.image_size()
        c = self.channels()
        frames = self.find(VISION, ("num_frames", "frames_per_clip"), 2)
        plain, several = torch.randn(BATCH, c, h, w), torch.randn(BATCH, frames, c, h, w)
        patch = self.find(VISION, ("patch_size",), PATCH)
        patch = patch if isinstance(patch, int) else patch[-1]
        time = self.find(VISION, ("temporal_patch_size",), 1)
        time = time if isinstance(time, int) else time[0]
        flat = torch.randn(BATCH * GRID * GRID, c * time * patch * patch)
        if any("grid_thw" in p for p in self.parameters):
            return [flat, plain, several]
        return [plain, several, torch.randn(BATCH, 16, c * patch * patch)]

    def pixel_values_videos(self, name):
        h, w = self.image_size()
        frames = self.find(VISION, ("num_frames", "frames_per_clip"), 2)
        return [torch.randn(BATCH, frames, self.channels(), h, w)]

    def input_features(self, name):
        mel = self.find(AUDIO, ("num_mel_bins", "input_feat_per_channel", "n_mels", "feature_size", "input_dim", "input_feat_size", "feature_projection_input_dim"), 80)
        positions = self.find(AUDIO, ("max_source_positions",), FRAMES // 2)
        return [torch.randn(BATCH, mel, 2 * positions), torch.randn(BATCH, FRAMES, mel)]

    def input_values(self, name):
        mel = self.find(AUDIO, ("num_mel_bins", "n_mels"), 80)
        long = self.find(AUDIO, ("max_length",), FRAMES)
        return [torch.randn(BATCH, 6400), torch.randn(BATCH, 1, 6400), torch.randn(BATCH, long, mel)]

    def bbox(self, name):
        corner = torch.randint(0, 50, (BATCH, LENGTH, 2))
        box = torch.cat([corner, corner + torch.randint(1, 50, (BATCH, LENGTH, 2))], -1)
        return [box, box / 100.0]

    def grid(self, name):
        return [torch.tensor([[1, GRID, GRID]] * BATCH)]

    def image_sizes(self, name):
        return [torch.tensor([self.image_size()] * BATCH)]

    def mm_token_type_ids(self, name):
        ids = self.chosen["input_ids"]
        token = self.find((), ("image_token_id", "image_token_index"), -1)
        return [(ids == token).long()]

    def attention_mask(self, name):
        ids = self.chosen.get("input_ids")
        return [torch.ones_like(ids)] if ids is not None else [torch.ones(BATCH, LENGTH, dtype=torch.long)]

    def feature_mask(self, name):
        x = self.chosen.get("input_features", self.chosen.get("input_values"))
        return [torch.ones(BATCH, x.shape[-1], dtype=torch.long), torch.ones(BATCH, x.shape[1], dtype=torch.long)]

    def past_values(self, name):
        n = self.find((), ("context_length", "prediction_length"), 32)
        lags = self.find((), ("lags_sequence",), [0])
        n += max(lags) if isinstance(lags, (list, tuple)) else 0
        channels = self.find((), ("num_input_channels",), 1)
        return [torch.randn(BATCH, n, channels), torch.randn(BATCH, n)]

    def floats(self, name):
        return [torch.randn(BATCH, LENGTH, self.find((), ("hidden_size", "d_model", "dim")))]


VISION, AUDIO, TEXT = ("vision", "image", "visual", "backbone", "vit", "encoder"), ("audio", "speech", "encoder", "wav"), ("text",)
GRID = 4
MAKERS = {
    "input_ids": Maker.input_ids,
    "decoder_input_ids": Maker.decoder_input_ids,
    "pixel_values": Maker.pixel_values,
    "pixel_values_videos": Maker.pixel_values_videos,
    "input_features": Maker.input_features,
    "input_values": Maker.input_values,
    "bbox": Maker.bbox,
    "image_grid_thw": Maker.grid,
    "grid_thw": Maker.grid,
    "image_sizes": Maker.image_sizes,
    "mm_token_type_ids": Maker.mm_token_type_ids,
    "attention_mask": Maker.attention_mask,
    "input_features_mask": Maker.feature_mask,
    "feature_attention_mask": Maker.feature_mask,
    "past_values": Maker.past_values,
    "hidden_states": Maker.floats,
    "inputs_embeds": Maker.floats,
    "qformer_input_ids": Maker.input_ids,
}
SENSES = ("pixel_values", "input_features", "input_values")
COMPANIONS = {"image_grid_thw", "image_sizes", "mm_token_type_ids", "input_features_mask", "feature_attention_mask"}


def argument_sets(model) -> list[list[str]]:
    """Sets of arguments to try, the fullest first."""
    parameters = inspect.signature(model.forward).parameters
    required = {n for n, p in parameters.items() if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
    main = getattr(model, "main_input_name", "input_ids")
    least = required | {main} | ({"decoder_input_ids", "bbox"} & set(parameters))
    main_ones = set(SENSES) & set(parameters)
    full = least | main_ones | ({"input_ids"} & set(parameters))
    sets = []
    for wanted in (full, *(full - {s} for s in main_ones), least | ({"input_ids"} & set(parameters)), least):
        companions = {c for c in COMPANIONS if c in parameters and needed(c, wanted)}
        sets += [wanted | companions, wanted, wanted | companions | ({"attention_mask"} & set(parameters))]
    order = list(MAKERS)
    return list(dict.fromkeys(tuple(sorted(s, key=lambda n: order.index(n) if n in order else 99)) for s in sets))


def needed(companion, wanted):
    if companion.endswith("mask") or "feature" in companion:
        return bool({"input_features", "input_values"} & wanted)
    return "pixel_values" in wanted


def variants(maker, names):
    """All the ways to make these arguments."""
    def grow(chosen, rest):
        if not rest:
            yield dict(chosen)
            return
        make = MAKERS.get(rest[0])
        if make is None:
            raise LookupError(f"no rule makes the argument {rest[0]}")
        maker.chosen = chosen
        for value in make(maker, rest[0]):
            yield from grow({**chosen, rest[0]: value}, rest[1:])
    torch.manual_seed(1)
    yield from grow({}, list(names))


def inputs_for(model) -> tuple[dict, list[str]]:
    errors = []
    maker = Maker(model)
    count = 0
    for names in argument_sets(model):
        maker.placeholders = {}
        try:
            for first in variants(maker, names):
                inputs = first
                for _ in range(3):
                    count += 1
                    if count > 40:
                        raise RuntimeError(" | ".join(dict.fromkeys(errors)))
                    try:
                        with torch.no_grad():
                            seed()
                            run(model, inputs)
                        return inputs, errors
                    except Exception as error:
                        errors.append(f"{names}: {type(error).__name__}: {error}"[:300])
                        m = re.search(r"(?i)(image|video|audio|speech)[\w ]*features?.*tokens? do(?:es)? not match.*?(\d+)\D+(\d+)", str(error))
                        if not m or "input_ids" not in inputs:
                            break
                        maker.placeholders[m[1].lower()] = int(m[3])
                        maker.chosen = inputs
                        inputs = dict(inputs)
                        inputs["input_ids"] = maker.input_ids("input_ids")[0]
                        maker.chosen = inputs
                        for n in ("mm_token_type_ids", "attention_mask"):
                            if n in inputs:
                                inputs[n] = MAKERS[n](maker, n)[0]
                maker.placeholders = {}
        except LookupError as e:
            errors.append(str(e))
    raise RuntimeError(" | ".join(dict.fromkeys(errors)))


def seed():
    torch.manual_seed(0)
    random.seed(0)
    numpy.random.seed(0)


def run(model, inputs):
    inputs = {k: v.clone() for k, v in inputs.items()}
    names = inspect.signature(base(model).forward).parameters
    if "use_cache" in names:
        inputs["use_cache"] = False
    if "return_dict" in names:
        inputs["return_dict"] = True
    return model(**inputs)


def base(model):
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def floats_of(output) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, dict):
        output = list(output.values())
    return [t for o in output for t in floats_of(o)] if isinstance(output, (list, tuple)) else []


def loss_of(output):
    """An inner product with a random tensor: the sum of squares of a layer norm's output would be a constant."""
    g = torch.Generator().manual_seed(2)
    total = 0.0
    for t in floats_of(output):
        if t.requires_grad:
            w = torch.randn(t.shape, generator=g)
            total = total + torch.where(t.isfinite(), t, 0.0).mul(w).sum() / max(1, t.numel()) ** 0.5
    return total


@dataclass
class Result:
    model_type: str
    status: str = "not built"  # not built, no plain run, equal, differs, raised
    reason: str = ""
    cls: str = ""
    inputs: list = field(default_factory=list)
    loras: int = 0
    patched: int = 0
    skipped: dict = field(default_factory=dict)
    fused: int = 0
    not_fused: dict = field(default_factory=dict)
    worst: float = 0.0
    merge: str = ""
    seconds: float = 0.0
    trace: str = ""


def build(model_type):
    errors = []
    for name in classes_of(model_type)[:4]:
        try:
            cls = getattr(transformers, name)
            config = tiny_config(model_type)
            seed()
            try:
                with torch.device("meta"):
                    n = sum(p.numel() for p in cls(copy.deepcopy(config)).parameters())
            except Exception:
                n = 0
            if n > MOST_PARAMETERS:
                raise RuntimeError(f"{n / 1e6:.0f} million parameters: no rule made it tiny")
            model = cls(config).float().eval()
            inputs, _ = inputs_for(model)
            return model, inputs
        except Exception as error:
            errors.append(f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:1500]}")
    raise RuntimeError(" || ".join(errors))


def adapted(model):
    for p in model.parameters():
        p.requires_grad_(False)
    try:
        peft = get_peft_model(copy.deepcopy(model), LoraConfig(r=4, target_modules="all-linear"))
    except Exception:
        names = [n for n, m in model.named_modules() if type(m) in (nn.Linear, transformers.pytorch_utils.Conv1D)]
        peft = get_peft_model(model, LoraConfig(r=4, target_modules=names))
    g = torch.Generator().manual_seed(3)
    for n, p in peft.named_parameters():
        if "lora_B" in n:
            p.data = torch.randn(p.shape, generator=g) * 0.1
    return peft


def train_step(model, inputs):
    model.train()
    seed()
    loss = loss_of(run(model, inputs))
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def evaluate(model, inputs):
    model.eval()
    seed()
    with torch.no_grad():
        return floats_of(run(model, inputs))


def difference(ours, theirs, floor=0.0):
    ours, theirs = ours.nan_to_num(0, 0, 0), theirs.nan_to_num(0, 0, 0)
    scale = max(theirs.norm().item(), floor, 1e-12)
    return ((ours - theirs).norm() / scale).item()


def compare(model_type) -> Result:
    result = Result(model_type)
    start = time.perf_counter()
    try:
        _compare(result)
    except Exception as e:
        result.reason = result.reason or f"{type(e).__name__}: {' '.join(str(e).split())}"
        result.trace = traceback.format_exc()
    result.seconds = time.perf_counter() - start
    return result


def _compare(result):
    model, inputs = build(result.model_type)
    result.status = "no plain run"
    result.cls, result.inputs = type(model).__name__, [f"{k}{list(v.shape)}" for k, v in inputs.items()]
    plain = adapted(model)
    patched = copy.deepcopy(plain)
    loss, grads = train_step(plain, inputs)
    if not any(g is not None and g.norm() > 0 for g in grads.values()):
        raise RuntimeError("no adapter takes part")
    result.status = "raised"
    report = patch(patched)
    result.patched, result.skipped = len(report.patched), report.skipped
    result.fused, result.not_fused = len(report.fused), report.not_fused
    our_loss, our_grads = train_step(patched, inputs)
    result.status = "differs"
    largest = max(g.norm().item() for g in grads.values() if g is not None)
    worst = []
    for n, g in grads.items():
        o = our_grads[n]
        if (g is None) != (o is None):
            raise AssertionError(f"gradient of {n}: plain {None if g is None else 'there'}, ours {None if o is None else 'there'}")
        if g is not None:
            worst.append((difference(o, g, 1e-4 * largest), n, g.norm().item() / largest))
    worst.append((difference(our_loss, loss, 1e-2), "loss", 1))
    result.worst = max(worst)[0]
    if result.worst > TOLERANCE:
        raise AssertionError(f"gradients differ: {sorted(worst)[::-1][:4]}")
    result.status = "raised"
    theirs = evaluate(plain, inputs)
    ours = evaluate(patched, inputs)
    result.status = "differs"
    d = max((difference(o, t) for o, t in zip(ours, theirs, strict=True)), default=0.0)
    if d > TOLERANCE:
        raise AssertionError(f"eval outputs differ by {d}")
    try:
        theirs = evaluate(plain.merge_and_unload(), inputs)
    except Exception as e:
        result.merge = f"plain cannot: {e}"
        result.status = "equal"
        return
    result.status = "merge raised"
    ours = evaluate(patched.merge_and_unload(), inputs)
    result.status = "merge differs"
    d = max((difference(o, t) for o, t in zip(ours, theirs, strict=True)), default=0.0)
    if d > TOLERANCE:
        raise AssertionError(f"merged outputs differ by {d}")
    result.merge = "equal"
    result.status = "equal"


def main():
    import signal
    import warnings
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    p = argparse.ArgumentParser()
    p.add_argument("--only", default=".*")
    p.add_argument("--json")
    p.add_argument("--part", default="0/1")
    args = p.parse_args()
    i, n = map(int, args.part.split("/"))

    def late(*_):
        raise TimeoutError("takes over 60 s")
    signal.signal(signal.SIGALRM, late)
    torch.set_num_threads(1)
    types = [t for t in architectures() if re.fullmatch(args.only, t)]
    out = []
    for t in types[i::n]:
        signal.alarm(60)
        r = compare(t)
        signal.alarm(0)
        out.append(r)
        print(f"{t:30s} {r.status:13s} {r.cls:40s} {r.patched} {len(r.skipped)} {r.fused} {len(r.not_fused)} {r.worst:.1e} {r.seconds:.1f} {','.join(r.inputs)} {r.merge[:60]} {r.reason[:200]}", flush=True)
    print(Counter(r.status for r in out))
    if args.json:
        json.dump([asdict(r) for r in out], open(args.json, "w"))


if __name__ == "__main__":
    main()
