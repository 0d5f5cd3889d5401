"""Decoding and training of VIM beside transformers' GPT-2 with the same weights, shape and precision.

    python tests/benchmarks/autoregressive.py decode [--batch 1 16] [--length 256 1024] [--dtype bfloat16] [--compile]
    python tests/benchmarks/autoregressive.py length [--batch 1 16] [--compile]       cost of a code against its place
    python tests/benchmarks/autoregressive.py train [--batch 8] [--length 256] [--dropout 0.1]

512 wide, 8 layers, 8 heads, 8,192 codes. Decoding is greedy, and the codes of the two are compared. The two take turns
in one process (after a first run of ours, which compiles and warms up). With --memory that is measured too, in a
process of its own for each, as the growth of its peak resident size from the finished network on.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.flops import matmul_rate
from engine.products import packed
from generator.autoregressive import VIM
from generator.config import AutoregressiveModelConfig, AutoregressiveSampleConfig
from generator.decoding import decode

sys.path.insert(0, str(Path(__file__).parents[1] / "generator"))
from gpt2 import vim_from_gpt2

CODES, WIDTH, DEPTH, HEADS = 8192, 512, 8, 8
LENGTHS = (64, 256, 1024)

Result = TypeVar("Result")


def gpt2(length: int, dropout: float = 0.0) -> nn.Module:
    """transformers' GPT-2; its head is scaled so that the likeliest code stands out."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    drop = {"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout}
    model = GPT2LMHeadModel(GPT2Config(
        vocab_size=CODES, n_positions=length + 1, n_embd=WIDTH, n_layer=DEPTH, n_head=HEADS,
        tie_word_embeddings=False, bos_token_id=0, eos_token_id=None, **drop,
    ))  # fmt: skip
    model.lm_head.weight.data.mul_(20)
    return model


def decoders(batch: int, length: int, dtype: torch.dtype, *, compiled: bool) -> dict[str, Callable[[], Tensor]]:
    """Both, as functions that give all codes [B, T]."""
    theirs = gpt2(length).eval().to(dtype)
    network = vim_from_gpt2(theirs, length).to(dtype)
    settings = AutoregressiveSampleConfig(temperature=0, compile=compiled)
    start = torch.zeros(batch, 1, dtype=torch.int64)

    def ours() -> Tensor:
        # As Autoregressive.sample does, packing included.
        uniforms = torch.zeros(batch, length)
        return decode(packed(network, batch), start[:, 0], uniforms, settings, null=start[:, 0])

    def peer() -> Tensor:
        with torch.inference_mode():
            mask = torch.ones_like(start)
            return theirs.generate(
                start, attention_mask=mask, max_new_tokens=length, do_sample=False, pad_token_id=0
            )[:, 1:]  # fmt: skip

    return {"ours": ours, "transformers": peer}


def memory_rate() -> float:
    """Bytes per second at which this process reads a long array."""
    x, best = torch.randn(64 * 2**20), 0.0
    for _ in range(5):
        begun = time.perf_counter()
        x.sum()
        best = max(best, 4 * x.numel() / (time.perf_counter() - begun))
    return best


def weight_bytes(dtype: torch.dtype) -> int:
    """What one step must read: all linear layers."""
    return (12 * DEPTH * WIDTH**2 + CODES * WIDTH) * dtype.itemsize


def timed(function: Callable[[], Result]) -> tuple[float, Result]:
    begun = time.perf_counter()
    result = function()
    return time.perf_counter() - begun, result


def grown_memory(which: str, batch: int, length: int, args: argparse.Namespace) -> int:
    """Growth of the peak resident size while one of the two decodes, in a new process."""
    words = [sys.executable, __file__, "memory", "--which", which, "--batch", str(batch), "--length", str(length)]
    words += ["--dtype", args.dtype, *(["--compile"] if args.compile else [])]
    return json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def memory(args: argparse.Namespace) -> None:
    run = decoders(args.batch[0], args.length[0], getattr(torch, args.dtype), compiled=args.compile)[args.which]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run()
    print(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))


def compare_decoding(args: argparse.Namespace) -> None:
    dtype = getattr(torch, args.dtype)
    rate = memory_rate()
    bound = rate / weight_bytes(dtype)
    print(f"{args.dtype}, compile={args.compile}: {rate / 1e9:.1f} GB/s, bound of batch 1: {bound:.0f} codes/s")
    for batch in args.batch:
        for length in args.length:
            both = decoders(batch, length, dtype, compiled=args.compile)
            first, _ = timed(both["ours"])
            runs = [{name: timed(run) for name, run in both.items()} for _ in range(args.repeats)]
            speed = {name: batch * length / min(run[name][0] for run in runs) for name in both}
            ours, theirs = (runs[0][name][1] for name in both)
            grown = {name: grown_memory(name, batch, length, args) / 2**20 for name in both if args.memory}
            share = f", {speed['ours'] / bound:.0%} of the bound" if batch == 1 else ""
            print(
                f"batch {batch}, {length} codes: ours {speed['ours']:.0f} codes/s{share}, transformers "
                f"{speed['transformers']:.0f}, ratio {speed['ours'] / speed['transformers']:.2f}; the same codes: "
                f"{float((ours == theirs).float().mean()):.2%}; first run {first:.1f} s",
                *(f"; memory of {name} {size:.0f} MiB" for name, size in grown.items()),
                flush=True,
            )


def compare_lengths(args: argparse.Namespace) -> None:
    """Milliseconds a step at each length, and how far they lie from a line in the mean number of keys."""
    for batch in args.batch:
        costs = []
        for length in LENGTHS:
            run = decoders(batch, length, getattr(torch, args.dtype), compiled=args.compile)["ours"]
            run()
            costs.append(1000 * min(timed(run)[0] for _ in range(args.repeats)) / length)
        keys = torch.tensor([[1.0, (length + 1) / 2] for length in LENGTHS], dtype=torch.float64)
        target = torch.tensor(costs, dtype=torch.float64)[:, None]
        fixed, slope = torch.linalg.lstsq(keys, target).solution.flatten().tolist()
        off = float(((keys @ torch.tensor([[fixed], [slope]], dtype=torch.float64) - target) / target).abs().max())
        told = ", ".join(f"{length} codes {cost:.2f} ms" for length, cost in zip(LENGTHS, costs, strict=True))
        print(f"batch {batch}: {told} a step; {fixed:.2f} ms + {1000 * slope:.2f} us a key, off by {off:.1%} at most")


def compare_training(args: argparse.Namespace) -> None:
    """Forward, backward and fused AdamW under bf16 autocast, where the CPU has it."""
    batch, length = args.batch[0], args.length[0]
    theirs = gpt2(length, args.dropout).train()
    model = AutoregressiveModelConfig(depth=DEPTH, width=WIDTH, heads=HEADS, dropout=args.dropout)
    ours = VIM(model, vocab_size=CODES, length=length, num_classes=0).train()
    codes, labels = torch.randint(CODES, (batch, length)), torch.zeros(batch, dtype=torch.int64)
    inputs = torch.cat([labels[:, None], codes[:, :-1]], 1)
    logits = {"ours": lambda: ours(codes, labels), "transformers": lambda: theirs(inputs).logits}
    optimizers = {
        name: torch.optim.AdamW(module.parameters(), fused=True)
        for name, module in (("ours", ours), ("transformers", theirs))
    }

    def step(name: str) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(logits[name]().flatten(0, 1).float(), codes.flatten())
        loss.backward()
        optimizers[name].step()
        optimizers[name].zero_grad()

    times: dict[str, list[float]] = {name: [] for name in logits}
    for _ in range(args.repeats + 1):
        for name in times:
            times[name].append(timed(partial(step, name))[0])
    flops = 3 * batch * length * (2 * (12 * DEPTH * WIDTH**2 + CODES * WIDTH) + 4 * length * WIDTH * DEPTH)
    rate = matmul_rate(torch.bfloat16, torch.device("cpu"))
    seconds = {name: statistics.median(each[1:]) for name, each in times.items()}
    told = ", ".join(f"{name} {each:.2f} s ({flops / each / rate:.2f} of it)" for name, each in seconds.items())
    print(
        f"matrix rate {rate / 1e9:.0f} GFLOP/s bf16; batch {batch}, {length} codes, dropout {args.dropout}: "
        f"{told}, ratio {seconds['transformers'] / seconds['ours']:.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tasks = {"decode": compare_decoding, "length": compare_lengths, "train": compare_training, "memory": memory}
    parser.add_argument("task", choices=tasks)
    parser.add_argument("--batch", type=int, nargs="+")
    parser.add_argument("--length", type=int, nargs="+")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--memory", action="store_true", help="measure memory too, which takes as long again")
    parser.add_argument("--which", choices=("ours", "transformers"), default="ours", help="for memory")
    args = parser.parse_args()
    args.batch = args.batch or ([8] if args.task == "train" else [1, 16])
    args.length = args.length or ([256] if args.task == "train" else [256, 1024])
    torch.set_num_threads(args.threads)
    tasks[args.task](args)


if __name__ == "__main__":
    main()
