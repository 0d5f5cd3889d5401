"""Training and sampling of DiT beside diffusers' DiTTransformer2DModel of the same shape.

    python tests/benchmarks/diffusion.py train [--batch 8] [--repeats 5] [--threads 1] [--which ours] [--keep-memory]
    python tests/benchmarks/diffusion.py sample [--batch 64] [--preset mini --latents 3 32 32 --patch 4]

DiT-S/2 on latents of 4 x 32 x 32, which are 256 tokens, and 1,000 classes. The two take turns in one process, after a
first step of each; told are the medians. CPU time stands beside wall time: where other work disturbs, compare that of
one thread, as threads that wait for each other count too. --which times one of them alone, and --keep-memory sets the
allocator as a run of ours does, which is a setting of the whole process.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from engine.allocator import keep_freed_memory
from engine.flops import TRAINING_FACTOR, forward_flops, matmul_rate
from engine.products import packed
from generator.config import DENOISER_PRESETS
from generator.denoiser import DiT

sys.path.insert(0, str(Path(__file__).parents[1] / "generator"))
from diffusers_dit import peer_of

NUM_CLASSES = 1000


def build(args: argparse.Namespace) -> DiT:
    """Ours, with gates and output away from zero, so that no product is of zeros."""
    torch.manual_seed(0)
    depth, width, heads = DENOISER_PRESETS[args.preset]
    network = DiT(
        tuple(args.latents), depth=depth, width=width, heads=heads, patch_size=args.patch, num_classes=NUM_CLASSES,
        **dict.fromkeys(args.switch, True),
    )  # fmt: skip
    for name, parameter in network.named_parameters():
        if "modulation" in name or name.startswith("output"):
            nn.init.normal_(parameter, std=0.02)
    return network


def inputs(batch: int, network: DiT) -> tuple[Tensor, Tensor, Tensor]:
    labels = torch.arange(batch) * 7 % NUM_CLASSES
    return torch.randn(batch, *network.latent_shape), torch.linspace(-8, 8, batch), labels


class Turns:
    """Wall and CPU seconds of several functions that take turns."""

    def __init__(self, functions: dict[str, Callable[[], object]], repeats: int) -> None:
        self.wall: dict[str, list[float]] = {name: [] for name in functions}
        self.cpu: dict[str, list[float]] = {name: [] for name in functions}
        for _ in range(repeats + 1):
            for name, function in functions.items():
                wall, cpu = time.perf_counter(), time.process_time()
                function()
                self.wall[name].append(time.perf_counter() - wall)
                self.cpu[name].append(time.process_time() - cpu)

    def medians(self, name: str) -> tuple[float, float]:
        """Wall and CPU seconds, without the first turn."""
        return statistics.median(self.wall[name][1:]), statistics.median(self.cpu[name][1:])

    def ratios(self, one: str, other: str) -> tuple[float, float]:
        """Median over the turns of the time of `other` over that of `one`: wall and CPU."""
        pairs = [list(zip(kind[one], kind[other], strict=True))[1:] for kind in (self.wall, self.cpu)]
        wall, cpu = (statistics.median(b / a for a, b in pair) for pair in pairs)
        return wall, cpu


def compare_training(args: argparse.Namespace) -> None:
    """Forward and backward under bf16 autocast, then fused AdamW."""
    ours = build(args).train()
    theirs = peer_of(ours).train()
    x, logsnr, labels = inputs(args.batch, ours)
    outputs = {"ours": lambda: ours(x, logsnr, labels), "diffusers": lambda: theirs(x, logsnr, labels).sample}
    optimizers = {
        name: torch.optim.AdamW(module.parameters(), fused=True)
        for name, module in (("ours", ours), ("diffusers", theirs))
    }

    def gradients(name: str) -> None:
        optimizers[name].zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            output = outputs[name]()
        (output.float() - x).square().mean().backward()

    named = ("ours", "diffusers") if args.which == "both" else (args.which,)
    turns = Turns(
        {
            **{name: lambda name=name: gradients(name) for name in named},
            **{f"{name}, AdamW": optimizers[name].step for name in named},
        },
        args.repeats,
    )
    rate = matmul_rate(torch.bfloat16)
    flops = TRAINING_FACTOR * forward_flops(ours, x, logsnr, labels)
    for name in named:
        wall, cpu = turns.medians(name)
        optimizer, _ = turns.medians(f"{name}, AdamW")
        print(
            f"{name}: forward and backward {wall:.3f} s wall, {cpu:.3f} s CPU, {flops / wall / rate:.2f} of the matrix "
            f"rate {rate / 1e9:.0f} GFLOP/s bf16; AdamW {optimizer:.3f} s more"
        )
    if args.which != "both":
        return
    both = [turns.medians(name)[0] + turns.medians(f"{name}, AdamW")[0] for name in named]
    wall, cpu = turns.ratios(*named)
    print(f"ratio {wall:.2f} wall, {cpu:.2f} CPU; with AdamW {both[1] / both[0]:.2f} wall")


def compare_sampling(args: argparse.Namespace) -> None:
    """One call of the network in fp32 without gradients: plain, with packed linear layers, and diffusers'."""
    ours = build(args).eval().requires_grad_(False)
    theirs, quick = peer_of(ours).eval(), packed(ours, args.batch * ours.grid[0] * ours.grid[1])
    x, logsnr, labels = inputs(args.batch, ours)
    with torch.inference_mode():
        turns = Turns(
            {
                "ours": lambda: ours(x, logsnr, labels),
                "packed": lambda: quick(x, logsnr, labels),
                "diffusers": lambda: theirs(x, logsnr, labels).sample,
            },
            args.repeats,
        )
        rate = matmul_rate(torch.float32)
    flops = forward_flops(ours, x, logsnr, labels)
    for name in ("ours", "packed", "diffusers"):
        wall, cpu = turns.medians(name)
        over, over_cpu = turns.ratios(name, "diffusers")
        print(
            f"{name}: {wall:.4f} s wall, {cpu:.4f} s CPU, {flops / wall / rate:.2f} of the matrix rate "
            f"{rate / 1e9:.0f} GFLOP/s fp32, {over:.2f} times diffusers' speed ({over_cpu:.2f} by CPU time)"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tasks = {"train": compare_training, "sample": compare_sampling}
    parser.add_argument("task", choices=tasks)
    parser.add_argument("--preset", choices=DENOISER_PRESETS, default="S")
    parser.add_argument("--latents", type=int, nargs=3, default=(4, 32, 32))
    parser.add_argument("--patch", type=int, default=2)
    parser.add_argument("--switch", nargs="+", default=(), choices=("qk_norm", "rope", "swiglu"), help="of ours")
    parser.add_argument("--which", choices=("both", "ours", "diffusers"), default="both", help="for train")
    parser.add_argument("--keep-memory", action="store_true", help="set the allocator as engine/allocator.py does")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.keep_memory and not keep_freed_memory():
        raise SystemExit("--keep-memory needs glibc")
    tasks[args.task](args)


if __name__ == "__main__":
    main()
