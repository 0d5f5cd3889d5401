"""Where a run computes: device, precision, threads, processes. accelerate connects the processes; FSDP2 is torch's."""

from __future__ import annotations

import atexit
import gc
import inspect
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from engine.allocator import keep_freed_memory
from engine.config import RunConfig

# Tasks keep their buffers equal themselves; torch renamed the switch that copies them before each forward.
SYNC_BUFFERS = next(
    name
    for name in ("forward_sync_buffers", "broadcast_buffers")
    if name in inspect.signature(DistributedDataParallel).parameters
)

PATIENCE = timedelta(days=2)  # the first process scores alone while the others wait


class Device:
    """The device of this process and what it shares with the others."""

    def __init__(self, run: RunConfig) -> None:
        from accelerate import Accelerator
        from accelerate.utils import InitProcessGroupKwargs

        if run.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("run.device=cuda, but torch finds no GPU: use run.device=auto or cpu")
        patience = InitProcessGroupKwargs(timeout=PATIENCE)
        cpu = run.device == "cpu" or not torch.cuda.is_available()
        self.accelerator = Accelerator(cpu=cpu, kwargs_handlers=[patience])
        self.device: torch.device = self.accelerator.device
        if run.device not in ("auto", self.device.type):
            begun = f"this process has begun on {self.device.type}"
            raise ValueError(f"run.device={run.device}, but {begun}: start a new one")
        self.rank: int = self.accelerator.process_index
        self.world: int = self.accelerator.num_processes
        self.parallel = run.parallel if self.world > 1 else "none"
        self.precision = choose_precision(run.precision, self.device)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def autocast(self) -> AbstractContextManager[None]:
        """Matrix products in bf16 inside the block, if the run's precision says so."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16")

    def share(self, module: nn.Module, optimizer: torch.optim.Optimizer, *, copy: bool = False) -> nn.Module:
        """The module on this device, copied to (DDP, or `copy`) or sharded over (FSDP2) all processes."""
        module.to(self.device)
        if self.parallel == "none":
            return module
        if self.parallel == "fsdp" and not copy:
            return _shard(module, optimizer, self.device)
        ids = [self.device] if self.device.type == "cuda" else None
        options: dict[str, Any] = {SYNC_BUFFERS: False, "gradient_as_bucket_view": True}
        return DistributedDataParallel(module, device_ids=ids, **options)

    def mean(self, value: Tensor) -> Tensor:
        """The mean over all processes."""
        return self.sum(value) / self.world

    def sum(self, value: Tensor) -> Tensor:
        """The sum over all processes."""
        if self.world == 1:
            return value
        value = value.detach().clone()
        torch.distributed.all_reduce(value)
        return value

    def share_of(self, count: int) -> tuple[int, int]:
        """First and last plus one of the `count` things that this process does, no two processes the same."""
        return count * self.rank // self.world, count * (self.rank + 1) // self.world

    def collect(self, values: list[Any]) -> list[Any]:
        """The values of all processes, in the order of their ranks (collective)."""
        if self.world == 1:
            return values
        lists: list[Any] = [None] * self.world
        torch.distributed.all_gather_object(lists, values)
        return [value for each in lists for value in each]

    def barrier(self) -> None:
        self.accelerator.wait_for_everyone()


def setup(run: RunConfig) -> Device:
    """Set threads and determinism for this process, start process communication, choose device and precision."""
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    torch.set_num_threads(run.threads or max(1, cpu_quota() // local_world))
    device = Device(run)
    if device.world > 1:
        atexit.register(_leave_group)
    if device.device.type == "cpu":
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        keep_freed_memory()
    else:
        torch.set_float32_matmul_precision("high")
    return device


@contextmanager
def exact_products(device: torch.device | None = None) -> Iterator[None]:
    """Inside the block, matrix products and convolutions of float32 are float32, not TF32 as `setup` allows on a GPU.

    It is a setting of the process, so a backward pass after the block does not know of it. Autocast is left as it is.

    Args:
        device: where the products are; a CPU has no TF32, so there nothing is done. Absent: anywhere.
    """
    if device is not None and device.type == "cpu":
        yield
        return
    products, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(products)
        torch.backends.cudnn.allow_tf32 = convolutions


def cpu_quota() -> int:
    """CPUs that this process may use: its affinity, cut to the cgroup's quota."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return cpus
    return cpus if quota == "max" else max(1, min(cpus, int(quota) // int(period)))


def has_bf16(device: torch.device) -> bool:
    """Whether the hardware multiplies bf16 matrices; in software they are slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def check_sampling_precision(family: str, precision: str, device: torch.device) -> None:
    """Raise ValueError if bf16 sampling is asked of hardware that has none, and would be slower than fp32."""
    if precision == "bf16" and not has_bf16(device):
        raise ValueError(f"{family}.sample.precision=bf16, but this {device.type} has no bf16 hardware: use fp32")


def choose_precision(wish: str, device: torch.device) -> str:
    """`fp32` or `bf16`.

    Raises:
        ValueError: bf16 is asked of hardware that has none.
    """
    if wish == "bf16" and not has_bf16(device):
        raise ValueError(f"run.precision=bf16, but this {device.type} has no bf16 hardware: use auto or fp32")
    return wish if wish != "auto" else ("bf16" if has_bf16(device) else "fp32")


def unwrapped(module: nn.Module) -> nn.Module:
    """The module that DDP holds, or the module itself."""
    return module.module if isinstance(module, DistributedDataParallel) else module


def full_state(module: nn.Module) -> dict[str, Tensor]:
    """A module's whole state on the CPU, under the names it has without DDP, FSDP or compilation (collective)."""
    reshard(module)
    return {name: whole(value).contiguous() for name, value in unwrapped(module).state_dict().items()}


def reshard(module: nn.Module) -> None:
    """Let FSDP put away the whole parameters that it keeps after a forward without a backward."""
    for unit in module.modules():
        if hasattr(unit, "reshard"):
            unit.reshard()  # type: ignore[operator]


@contextmanager
def gathered(module: nn.Module, method: str) -> Iterator[None]:
    """Inside the block `module.method` may be called again and again on the whole weights (collective).

    FSDP gathers weights for `forward` alone, and puts those of each unit away after it. In the block they stay where
    they are, so that a method that is called once for each code of an image gathers once. Every process then holds
    all weights. A module that is not sharded is left as it is.
    """
    from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method

    if not isinstance(module, FSDPModule):
        yield
        return
    if method not in vars(module):
        register_fsdp_forward_method(module, method)
    units = [unit for unit in module.modules() if isinstance(unit, FSDPModule) and unit is not module]
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for unit in units:
            unit.set_reshard_after_forward(True, recurse=False)
        reshard(module)


def whole(tensor: Tensor) -> Tensor:
    """A detached copy on the CPU, gathered from all processes if it is sharded (collective)."""
    full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full.detach().to("cpu", copy=True)


def fill(target: Tensor, value: Tensor) -> None:
    """Copy a whole tensor into `target`, or this process's share of it into a shard."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    value = value.to(target.device)
    if isinstance(target, DTensor):
        value = distribute_tensor(value, target.device_mesh, target.placements)
    with torch.no_grad():
        target.copy_(value)


def _leave_group() -> None:
    """Sharded modules hold communicators, whose threads must have ended before the interpreter does."""
    if torch.distributed.is_initialized():
        gc.collect()
        torch.distributed.destroy_process_group()
        gc.collect()


def _shard(module: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device) -> nn.Module:
    """FSDP2: every block of a ModuleList is one unit, the rest another; the optimizer is pointed at the shards."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    before = dict(module.named_parameters())
    for stack in (child for child in module.modules() if isinstance(child, nn.ModuleList)):
        for block in stack:
            fully_shard(block, mesh=mesh)
    fully_shard(module, mesh=mesh)
    shards = {id(before[name]): parameter for name, parameter in module.named_parameters()}
    for group in optimizer.param_groups:
        group["params"] = [shards[id(parameter)] for parameter in group["params"]]
    return module
