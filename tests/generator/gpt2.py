"""A VIM with the weights of transformers' GPT-2, to compare the two."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from generator.autoregressive import VIM
from generator.config import AutoregressiveModelConfig

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel

LAYERS = {
    "attn.c_attn": "attention.qkv", "attn.c_proj": "attention.out", "mlp.c_fc": "mlp.rise", "mlp.c_proj": "mlp.fall",
}  # fmt: skip
NORMS = {"ln_1": "attention_norm", "ln_2": "mlp_norm"}


def vim_from_gpt2(model: GPT2LMHeadModel, length: int) -> VIM:
    """A VIM without classes for `length` codes, in eval mode; its null label stands for GPT-2's token 0.

    VIM's logits of code t are GPT-2's after token 0 and codes 0 .. t - 1. The weights are copies.
    """
    config = model.config
    shape = {"depth": config.n_layer, "width": config.n_embd, "heads": config.n_head, "dropout": 0.0}
    network = VIM(AutoregressiveModelConfig(**shape), vocab_size=config.vocab_size, length=length, num_classes=0)
    theirs = model.state_dict()
    ours = {
        "code_embedding.weight": theirs["transformer.wte.weight"],
        "label_embedding.weight": theirs["transformer.wte.weight"][:1],
        "position_embedding.weight": theirs["transformer.wpe.weight"][:length],
        "norm.weight": theirs["transformer.ln_f.weight"],
        "norm.bias": theirs["transformer.ln_f.bias"],
        "head.weight": theirs["lm_head.weight"],
    }
    for number in range(config.n_layer):
        ours |= _block(theirs, f"transformer.h.{number}.", f"blocks.{number}.")
    network.load_state_dict(ours)
    return network.eval().requires_grad_(False)


def _block(theirs: dict[str, Tensor], source: str, target: str) -> dict[str, Tensor]:
    """The weights of one block under VIM's names; GPT-2 keeps those of its linear layers transposed."""
    found = {}
    for their_name, name in (LAYERS | NORMS).items():
        weight = theirs[f"{source}{their_name}.weight"]
        found[f"{target}{name}.weight"] = weight.T if their_name in LAYERS else weight
        found[f"{target}{name}.bias"] = theirs[f"{source}{their_name}.bias"]
    return found
