"""What a forward pass costs, told without computing it: operations and saved bytes. How fast this process multiplies.

Modules run on fake tensors: their data stay on the meta device, but they name a real one, so that autocast and the
choice of kernels are the real ones.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

TRAINING_FACTOR = 3  # the backward pass multiplies twice as much as the forward pass
RATE_SECONDS = 1.0
RATE_SIDE = {"cpu": 1536, "cuda": 8192}  # long enough to reach the full rate, short enough to repeat


def forward_flops(module: nn.Module, *inputs: Any, **options: Any) -> int:
    """Floating-point operations of `module(*inputs, **options)`, 2 for each multiply-add of matrices and convolutions.

    The module and the tensors may lie anywhere, the meta device included. Causal attention counts in full, as is the
    custom; elementwise operations do not count. Training costs TRAINING_FACTOR times as much.
    """
    # The fused attention kernels of the CPU would count as nothing, so attention is taken apart.
    with FakeTensorMode(), torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        _run_fake(module, inputs, options, torch.device("cpu"))
    return counter.get_total_flops()


def saved_bytes(
    module: nn.Module, *inputs: Any, bf16: bool = False, device: torch.device | str = "cpu", **options: Any
) -> int:
    """Bytes that `module(*inputs, **options)` keeps for its backward pass, each storage once.

    Inputs that are kept count, and so do the bf16 copies of weights that autocast makes; parameters and buffers do not.

    Args:
        bf16: matrix products run in bf16 by autocast.
        device: what kind of device to imagine, as it decides which attention kernel runs.
    """
    device = torch.device(device)
    kept: dict[int, Tensor] = {}  # by storage; holding the tensor keeps its address from being used again

    def keep(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    autocast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16)
    with FakeTensorMode(), autocast, saved_tensors_hooks(keep, lambda tensor: tensor):
        _, state = _run_fake(module, inputs, options, device)
    own = {tensor.untyped_storage()._cdata for tensor in state}
    return sum(tensor.untyped_storage().nbytes() for key, tensor in kept.items() if key not in own)


def matmul_rate(dtype: torch.dtype, device: torch.device | str = "cpu", threads: int | None = None) -> float:
    """FLOP/s of a large square matrix product in this process, now: the best of about a second of them."""
    device = torch.device(device)
    side = RATE_SIDE.get(device.type, RATE_SIDE["cpu"])
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    with _threads(threads):
        times = [_seconds_of_product(a, b)]  # the first one also waits for libraries to load
        while sum(times) < RATE_SECONDS or len(times) < 3:
            times.append(_seconds_of_product(a, b))
    return 2 * side**3 / min(times)


def _run_fake(
    module: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any], device: torch.device
) -> tuple[Any, list[Tensor]]:
    """The output of a module whose every tensor is a fake one on `device`, and its fake parameters and buffers."""
    state = {
        name: _fake(tensor, device)
        for named in (module.named_parameters(), module.named_buffers())
        for name, tensor in named
    }
    faked = tuple(_fake(value, device) for value in inputs)
    named_values = {name: _fake(value, device) for name, value in options.items()}
    return functional_call(module, state, faked, named_values), list(state.values())


def _fake(value: Any, device: torch.device) -> Any:
    """A tensor of the same shape, strides and type without values; what is no tensor, as it is."""
    if not isinstance(value, Tensor):
        return value
    empty = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
    return empty.requires_grad_(value.requires_grad)


def _seconds_of_product(a: Tensor, b: Tensor) -> float:
    begun = time.perf_counter()
    a @ b
    if a.device.type == "cuda":
        torch.cuda.synchronize(a.device)
    return time.perf_counter() - begun


@contextmanager
def _threads(number: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
