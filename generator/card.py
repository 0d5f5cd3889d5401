"""The card of a generator: what `model.json` holds beside the weights, enough to rebuild it and to refuse a mix-up."""

from __future__ import annotations

import math
from typing import Any

import torch

from engine.config import to_dict
from engine.images import ImageSet
from engine.shards import Shards
from generator.condition import null_unknown
from generator.condition_config import ConditionConfig
from generator.config import AutoregressiveConfig, DiffusionConfig
from tokenizer.model import Tokenizer

TRAINING = ("codes", "order", "align", "train", "sample")  # keys that say how, not what: told beside the config


def family_of(config: AutoregressiveConfig | DiffusionConfig) -> str:
    """The name of a section's family: of its folder and of its scores."""
    return "autoregressive" if isinstance(config, AutoregressiveConfig) else "diffusion"


def generator_card(
    config: AutoregressiveConfig | DiffusionConfig, source: Shards | ImageSet, tokenizer: Tokenizer
) -> dict[str, Any]:
    """What `model.json` must hold to rebuild a generator; training and sampling settings are told, but name no model.

    `source` is what the generator is trained on: codes and latents, or the images that each step encodes.

    Raises:
        ValueError: a label of the source has no class name.
    """
    names = list(source.meta["class_names"] if isinstance(source, Shards) else source.class_names)
    null_unknown(torch.from_numpy(source.labels), len(names))
    told = to_dict(config)
    names = [] if config.model.label_dropout == 1 and config.condition.kind == "class" else names
    return {
        "kind": "generator",
        "family": family_of(config),
        "config": {key: value for key, value in told.items() if key not in TRAINING},
        **{key: told[key] for key in TRAINING if key in told},
        "num_classes": len(names),
        "class_names": names,
        "grid": list(tokenizer.grid),
        "codes_per_token": tokenizer.length // math.prod(tokenizer.grid),
        "vocab_size": tokenizer.vocab_size,
        "latent_shape": list(tokenizer.latent_shape),
        "tokenizer_fingerprint": tokenizer.code_fingerprint,
        **_text_weights(config.condition),
        **_smaller(config.condition, source),
    }


def _text_weights(condition: ConditionConfig) -> dict[str, str]:
    """What tells the frozen weights that texts are read with, where there are any."""
    if condition.kind != "text" or condition.text.encoder == "bytes":
        return {}
    from generator.pretrained_text import text_fingerprint  # transformers is slow to import

    return {"text_fingerprint": str(text_fingerprint(condition.text))}


def _smaller(condition: ConditionConfig, source: Shards | ImageSet) -> dict[str, int]:
    """By how much the images of a condition are smaller, where it is one of images."""
    told = source.meta.get("low_resolution") if isinstance(source, Shards) and condition.kind == "image" else None
    return {} if told is None else {"low_resolution": told}
