"""Linear layers for decoding: a weight is read once to multiply a few rows, and the reading is all that it costs."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEW = {torch.float32: 4, torch.bfloat16: 2}  # rows up to which a compiled sum of products is fastest

Module = TypeVar("Module", bound=nn.Module)


class PackedLinear(nn.Module):
    """A frozen nn.Linear on a CPU that multiplies a few rows two to three times as fast.

    The weight is packed into oneDNN's own layout, as Inductor does it: F.linear leaves fp32 to a library that reads
    weights at a third of the memory's rate. Compiled, very few rows go through `row_products` instead.
    """

    def __init__(self, dense: nn.Linear, rows: int) -> None:
        super().__init__()
        self.weight, self.bias = dense.weight, dense.bias
        self.packed = torch.ops.mkldnn._reorder_linear_weight(dense.weight.detach(), rows)
        self.train(dense.training)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., O]."""
        if not torch.compiler.is_compiling():
            x = x.to(self.packed.dtype)  # autocast narrows activations, but knows nothing of this product
            return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        if x.numel() <= FEW.get(x.dtype, 0) * x.shape[-1]:
            return row_products(x, self.weight, self.bias)
        return F.linear(x, self.weight, self.bias)


def packed(module: Module, rows: int) -> Module:
    """The same network for inference on about `rows` rows at a time, with packed linear layers where that is faster.

    It shares the parameters with `module`, which stays as it is; the packed weights are a second copy of them. On a
    GPU, where torch has no oneDNN, and where FSDP shards the weights, it is `module` itself.
    """
    linears = {name: layer for name, layer in module.named_modules() if isinstance(layer, nn.Linear)}
    sharded = any(hasattr(unit, "reshard") for unit in module.modules())  # FSDP forbids copies, even of whole weights
    if not linears or sharded or not all(can_pack(layer) for layer in linears.values()):
        return module
    twin = copy.deepcopy(module, {id(parameter): parameter for parameter in module.parameters()})
    for name, layer in linears.items():
        twin.set_submodule(name, PackedLinear(layer, rows))
    return twin


def can_pack(layer: nn.Module) -> bool:
    """Whether oneDNN packs this layer's weight: a plain one on a CPU, fp32, or bf16 where the CPU multiplies that."""
    weight = layer.weight
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return False
    narrow = weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return type(weight) is nn.Parameter and weight.is_cpu and (weight.dtype == torch.float32 or narrow)


def row_products(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b as a sum of products in fp32: [..., D], [O, D], [O] -> [..., O].

    The compiler turns it into one loop that reads each weight once, at the memory's full rate.
    """
    rows = x.flatten(0, -2).float()  # [R, D]
    rows = rows.as_strided(rows.shape, rows.stride())  # computed first: else it is computed anew for each output
    sums = (weight.float()[:, None] * rows).sum(-1).T  # [R, O]
    sums = sums if bias is None else sums + bias
    return sums.to(x.dtype).reshape(*x.shape[:-1], len(weight))
