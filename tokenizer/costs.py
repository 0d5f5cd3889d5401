"""What the tokenizer itself computes in a step of its training, and which of its parts learn in it."""

from __future__ import annotations

import torch

from engine.flops import TRAINING_FACTOR, forward_flops
from tokenizer.config import TokenizerConfig
from tokenizer.model import Tokenizer


def untrained(config: TokenizerConfig, image_size: int) -> Tokenizer:
    """The tokenizer that the configuration trains, on the current device; with encoder_from, encoder and bottleneck are
    frozen as in training, though their weights are not read.

    Raises:
        ValueError: sizes that do not fit each other.
    """
    model = Tokenizer(config.model, config.quantizer, image_size=image_size, loss=config.loss)
    if config.encoder_from is not None:
        for part in (model.encoder, model.quantizer):
            part.requires_grad_(False)
    return model


def training_passes(model: Tokenizer) -> float:
    """Forward passes that cost as much as a step of training, per image.

    A part that learns counts TRAINING_FACTOR times; a frozen encoder and its bottleneck only once, forwards.
    """
    if any(parameter.requires_grad for parameter in model.encoder.parameters()):
        return TRAINING_FACTOR
    whole = forward_flops(model, torch.empty(1, 3, model.image_size, model.image_size))
    decoder = forward_flops(model.decoder, torch.empty(1, model.grid[0] * model.grid[1], model.quantizer.latent_dim))
    return (whole + (TRAINING_FACTOR - 1) * decoder) / whole
