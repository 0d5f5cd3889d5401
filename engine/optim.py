"""Parameter groups, fused AdamW or RAdam, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math

import torch
from torch import nn

from engine.config import TrainConfig

MATRICES = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d)


def build_optimizer(module: nn.Module, train: TrainConfig) -> torch.optim.Optimizer:
    """Only the weights of linear and convolution layers decay, decoupled; each group carries its `peak_lr`."""
    matrices = {layer.weight for layer in module.modules() if isinstance(layer, MATRICES)}
    decayed = [p for p in module.parameters() if p.requires_grad and p in matrices]
    others = [p for p in module.parameters() if p.requires_grad and p not in matrices]
    groups = [
        {"params": parameters, "weight_decay": weight_decay, "peak_lr": train.learning_rate}
        for parameters, weight_decay in ((decayed, train.weight_decay), (others, 0.0))
        if parameters
    ]
    if train.optimizer == "radam":  # Liu et al., 2020; PyTorch has no fused one
        return torch.optim.RAdam(groups, lr=train.learning_rate, betas=train.betas, decoupled_weight_decay=True)
    return torch.optim.AdamW(groups, lr=train.learning_rate, betas=train.betas, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, step: int, train: TrainConfig) -> float:
    """Put the rate of `step` (counted from 0) into every group, scaled by the group's own peak; returns the factor."""
    factor = learning_rate(step, train) / train.learning_rate
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
    return factor


def learning_rate(step: int, train: TrainConfig) -> float:
    """Linear warm-up to the peak, then constant, cosine, linear or exponential decay to the final rate."""
    if step < train.warmup_steps:
        return train.learning_rate * (step + 1) / train.warmup_steps
    start = max(train.warmup_steps, train.decay_start)
    if train.decay == "constant" or step < start:
        return train.learning_rate
    progress = (step - start) / max(1, train.steps - start)
    return _decayed(train, min(progress, 1.0))


def _decayed(train: TrainConfig, progress: float) -> float:
    peak, final = train.learning_rate, train.final_learning_rate
    if train.decay == "cosine":
        return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * progress))
    if train.decay == "linear":
        return peak + (final - peak) * progress
    return peak * (final / peak) ** progress
