"""Random inputs that a model runs on, found from the names of its forward's arguments.

An argument can have several shapes (an image, or several for each sample), and not all arguments go together. So the
ways are tried, the fullest first, until one runs. How many tokens of a text an image takes is learnt from the error
that transformers raises when their number is wrong.
"""

import inspect
import random
import re
from collections.abc import Iterator
from typing import Any

import numpy
import torch
from tiny_models import FIRST_SPECIAL, IMAGE, PATCH, POSITIONS
from torch import Tensor, nn
from transformers import PreTrainedConfig

BATCH, LENGTH, FRAMES, SAMPLES = 2, 12, 64, 6400
GRID = 4  # patches of an image each way, where a model takes patches
MOST_TRIES = 40
MISCOUNTED = r"(?i)(image|video|audio)[\w ]*features?.*tokens? do(?:es)? not match.*?(\d+)\D+(\d+)"

VISION, AUDIO = ("vision", "image", "visual", "backbone", "vit", "encoder"), ("audio", "speech", "encoder", "wav")

Inputs = dict[str, Tensor]


def inputs_for(model: nn.Module) -> Inputs:
    """Inputs on which ``model`` runs as it is. Raises RuntimeError with what every try raised."""
    errors: list[str] = []
    for names in _argument_sets(model):
        maker = Maker(model)
        for inputs in maker.all(names):
            for _ in range(3):  # the numbers of tokens of an image and of a sound are learnt one after the other
                try:
                    with torch.no_grad():
                        run(model, inputs)
                    return inputs
                except Exception as error:  # of a model that is not ours, fed with a guess
                    errors.append(f"{', '.join(names)}: {type(error).__name__}: {error}"[:300])
                    miscounted = re.search(MISCOUNTED, str(error))
                if len(errors) > MOST_TRIES or not miscounted or "input_ids" not in inputs:
                    break
                maker.placeholders[miscounted[1].lower()] = int(miscounted[3])
                inputs = maker.with_placeholders(inputs)
    raise RuntimeError(" | ".join(dict.fromkeys(errors)))


def run(model: nn.Module, inputs: Inputs) -> Any:
    """The output of ``model``, with all that is drawn at random drawn anew from the same seed."""
    torch.manual_seed(0)
    random.seed(0)
    numpy.random.seed(0)
    takes = _arguments(model)
    flags = {name: value for name, value in (("use_cache", False), ("return_dict", True)) if name in takes}
    return model(**{name: value.clone() for name, value in inputs.items()}, **flags)


def _arguments(model: nn.Module) -> dict[str, inspect.Parameter]:
    forward = model.get_base_model().forward if hasattr(model, "get_base_model") else model.forward
    parameters = inspect.signature(forward).parameters
    return {name: p for name, p in parameters.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}


def _argument_sets(model: nn.Module) -> list[list[str]]:
    """Sets of arguments to try, the fullest first: with and without each sense, companions, decoder, mask."""
    takes = set(_arguments(model))
    required = {name for name, p in _arguments(model).items() if p.default is p.empty}
    least = required | {getattr(model, "main_input_name", "input_ids")} & set(MAKERS)
    senses = {"pixel_values", "input_features", "input_values"} & takes
    text = least | {"input_ids", "bbox"} & takes
    sets = []
    for wanted in (text | senses, *(text | senses - {sense} for sense in sorted(senses)), text, least):
        companions = {name for name in takes if COMPANIONS.get(name, name) in wanted}
        decoder = {"decoder_input_ids"} & takes
        for extra in (companions | decoder, decoder, companions, set(), companions | decoder | {"attention_mask"}):
            sets.append(wanted | extra & takes)
    order = list(MAKERS)
    found = [sorted(s, key=lambda name: order.index(name) if name in order else len(order)) for s in sets]
    return [list(names) for names in dict.fromkeys(map(tuple, found)) if names]


class Maker:
    """Makes each argument in the shapes that it can have, for one model."""

    def __init__(self, model: nn.Module):
        self.config = model.config
        self.takes = _arguments(model)
        self.placeholders: dict[str, int] = {}  # how many tokens of all texts stand for an image, a sound
        self.made: Inputs = {}

    def all(self, names: list[str]) -> Iterator[Inputs]:
        """Every way to make these arguments."""
        if unknown := [name for name in names if name not in MAKERS]:
            raise RuntimeError(f"no rule makes the argument {unknown[0]}")
        ways: list[Inputs] = [{}]
        for name in names:
            grown = []
            for self.made in ways:
                grown += [{**self.made, name: value} for value in MAKERS[name](self)]
            ways = grown
        yield from ways

    def with_placeholders(self, inputs: Inputs) -> Inputs:
        self.made = {**inputs, "input_ids": self.input_ids()[0]}
        for name in ("attention_mask", "mm_token_type_ids"):
            if name in inputs:
                self.made[name] = MAKERS[name](self)[0]
        return self.made

    def find(self, kinds: tuple[str, ...], names: tuple[str, ...], default: Any = None) -> Any:
        """The first of these fields in the configuration's parts of these kinds, then itself, then its other parts."""
        parts: list[tuple[str, PreTrainedConfig]] = [("", self.config)]
        for path, config in parts:  # grows meanwhile
            parts += [(f"{path}.{k}", v) for k, v in vars(config).items() if isinstance(v, PreTrainedConfig)]
        parts.sort(key=lambda part: not any(kind in part[0] for kind in kinds))
        found = (getattr(config, name, None) for _, config in parts for name in names)
        return next((v for v in found if isinstance(v, int | list | tuple) and not isinstance(v, bool) and v), default)

    def number(self, kinds: tuple[str, ...], names: tuple[str, ...], default: int) -> int:
        value = self.find(kinds, names, default)
        return value if isinstance(value, int) else value[-1]

    def input_ids(self) -> list[Tensor]:
        most = min(FIRST_SPECIAL, self.number(("text",), ("vocab_size",), FIRST_SPECIAL))
        ids = torch.randint(most // 2, most, (BATCH, LENGTH))
        ids[:, -1] = min(self.number(("text",), ("eos_token_id",), 2), self.number(("text",), ("vocab_size",), 3) - 1)
        for kind, rows in self.placeholders.items():
            token = self.number((), (f"{kind}_token_id", f"{kind}_token_index"), 0)
            ids = torch.cat([ids[:, :2], torch.full((BATCH, -(-rows // BATCH)), token), ids[:, 2:]], 1)
        return [ids]

    def decoder_input_ids(self) -> list[Tensor]:
        return [torch.randint(3, 9, (BATCH, 6))]

    def image_size(self) -> tuple[int, int]:
        size = self.find(VISION, ("image_size", "img_size", "input_size"), IMAGE)
        while not isinstance(size, int) and not isinstance(size[0], int):
            size = size[0]
        return (size, size) if isinstance(size, int) else (size[0], size[-1])

    def patch(self) -> int:
        """The number of values of a patch."""
        side, time = self.number(VISION, ("patch_size",), PATCH), self.find(VISION, ("temporal_patch_size",), 1)
        return self.channels() * side * side * (time if isinstance(time, int) else time[0])

    def channels(self) -> int:
        value = self.find(VISION, ("num_channels", "in_channels", "in_chans"), 3)
        return value if isinstance(value, int) else value[0]

    def pixel_values(self) -> list[Tensor]:
        image = (self.channels(), *self.image_size())
        frames = self.number(VISION, ("num_frames", "frames_per_clip"), 2)
        ways = [torch.randn(BATCH, *image), torch.randn(BATCH, frames, *image)]
        if any(name.endswith("grid_thw") for name in self.takes):
            return [torch.randn(BATCH * GRID**2, self.patch()), *ways]
        patches = [torch.randn(BATCH, GRID**2, self.patch())]
        return patches + ways if "spatial_shapes" in self.takes else ways + patches

    def videos(self) -> list[Tensor]:
        return self.pixel_values()[1:2]

    def flattened_patches(self) -> list[Tensor]:
        places = torch.randint(1, GRID, (BATCH, GRID**2, 2)).float()
        return [torch.cat([places, torch.randn(BATCH, GRID**2, self.patch())], -1)]

    def input_features(self) -> list[Tensor]:
        names = ("num_mel_bins", "input_feat_per_channel", "n_mels", "feature_size", "input_dim", "input_feat_size")
        mel = self.number(AUDIO, (*names, "feature_projection_input_dim"), 80)
        frames = 2 * self.number(AUDIO, ("max_source_positions",), POSITIONS)
        ways = [(BATCH, mel, frames), (BATCH, FRAMES, mel), (BATCH, 1, FRAMES, mel)]
        return [torch.randn(shape) for shape in ways]

    def input_values(self) -> list[Tensor]:
        mel, frames = self.number(AUDIO, ("num_mel_bins",), 80), self.number(AUDIO, ("max_length",), FRAMES)
        ways = [(BATCH, SAMPLES), (BATCH, 1, SAMPLES), (BATCH, frames, mel)]
        return [torch.randn(shape) for shape in ways]

    def bbox(self) -> list[Tensor]:
        corner, sides = torch.randint(0, 50, (2, BATCH, LENGTH, 2))
        box = torch.cat([corner, corner + sides], -1)
        return [box, box / 100]

    def grid_thw(self) -> list[Tensor]:
        return [torch.tensor([[1, GRID, GRID]] * BATCH)]

    def spatial_shapes(self) -> list[Tensor]:
        return [torch.tensor([[GRID, GRID]] * BATCH)]

    def image_sizes(self) -> list[Tensor]:
        return [torch.tensor([self.image_size()] * BATCH)]

    def token_types(self) -> list[Tensor]:
        return [(self.made["input_ids"] == self.number((), ("image_token_id", "image_token_index"), -1)).long()]

    def attention_mask(self) -> list[Tensor]:
        return [torch.ones_like(self.made["input_ids"]) if "input_ids" in self.made else torch.ones(BATCH, LENGTH)]

    def features_mask(self) -> list[Tensor]:
        features = self.made.get("input_features", self.made.get("input_values"))
        return [torch.ones(BATCH, features.shape[dim], dtype=torch.long) for dim in (-1, 1)]

    def pixel_mask(self) -> list[Tensor]:
        return [torch.ones(BATCH, GRID**2, dtype=torch.long)]

    def past_values(self) -> list[Tensor]:
        lags = self.find((), ("lags_sequence",), [0])
        steps = self.number((), ("context_length", "prediction_length"), 32) + max(lags)
        return [torch.randn(BATCH, steps), torch.randn(BATCH, steps, self.number((), ("num_input_channels",), 1))]

    def past_time_features(self) -> list[Tensor]:
        return [torch.zeros(BATCH, self.made["past_values"].shape[1], 0)]

    def past_observed_mask(self) -> list[Tensor]:
        return [torch.ones_like(self.made["past_values"])]

    def visual_feats(self) -> list[Tensor]:
        return [torch.randn(BATCH, 4, self.number((), ("visual_feat_dim",), 64))]

    def visual_pos(self) -> list[Tensor]:
        return [torch.rand(BATCH, 4, 4)]

    def hidden_states(self) -> list[Tensor]:
        return [torch.randn(BATCH, LENGTH, self.number((), ("hidden_size", "d_model", "dim"), 64))]


MAKERS = {
    "input_ids": Maker.input_ids,
    "decoder_input_ids": Maker.decoder_input_ids,
    "pixel_values": Maker.pixel_values,
    "pixel_values_videos": Maker.videos,
    "flattened_patches": Maker.flattened_patches,
    "input_features": Maker.input_features,
    "input_values": Maker.input_values,
    "bbox": Maker.bbox,
    "visual_feats": Maker.visual_feats,
    "visual_pos": Maker.visual_pos,
    "image_grid_thw": Maker.grid_thw,
    "grid_thw": Maker.grid_thw,
    "spatial_shapes": Maker.spatial_shapes,
    "image_sizes": Maker.image_sizes,
    "mm_token_type_ids": Maker.token_types,
    "attention_mask": Maker.attention_mask,
    "input_features_mask": Maker.features_mask,
    "feature_attention_mask": Maker.features_mask,
    "pixel_attention_mask": Maker.pixel_mask,
    "past_values": Maker.past_values,
    "past_time_features": Maker.past_time_features,
    "past_observed_mask": Maker.past_observed_mask,
    "hidden_states": Maker.hidden_states,
    "inputs_embeds": Maker.hidden_states,
    "qformer_input_ids": Maker.input_ids,
}
COMPANIONS = {  # arguments that come with another one
    "image_grid_thw": "pixel_values",
    "spatial_shapes": "pixel_values",
    "pixel_attention_mask": "pixel_values",
    "image_sizes": "pixel_values",
    "mm_token_type_ids": "input_ids",
    "input_features_mask": "input_features",
    "feature_attention_mask": "input_features",
    "visual_feats": "input_ids",
    "visual_pos": "input_ids",
}
