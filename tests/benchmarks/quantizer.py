"""Speed and peak memory of the codebook beside vector-quantize-pytorch's cosine codebook, forward and backward.

    OMP_NUM_THREADS=1 python tests/benchmarks/quantizer.py [--vectors 65536] [--codes 8192] [--dim 32] [--repeats 3]

Both hold the same codes and see the same float32 vectors, in training mode. Speed is measured in one process, the two
in turn, the best of the repeats; memory in a process of its own for each, as the growth of its peak resident size.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time

import torch
from torch import Tensor, nn

from tokenizer.config import QuantizerConfig
from tokenizer.quantize import Codebook
from tokenizer.similarity import normalize

NEAR_TIE = 1e-6  # difference of two cosines that float32 does not tell apart


def ours(book: Tensor) -> nn.Module:
    quantizer = Codebook(book.shape[0], book.shape[1], QuantizerConfig())
    with torch.no_grad():
        quantizer.codebook.copy_(book)
    return quantizer


def peer(book: Tensor) -> nn.Module:
    from vector_quantize_pytorch import VectorQuantize

    quantizer = VectorQuantize(dim=book.shape[1], codebook_size=len(book), use_cosine_sim=True)
    quantizer.codebook = book
    return quantizer


MAKERS = {"ours": ours, "peer": peer}


def codes_and_vectors(args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Unit codes [K, D], and vectors [1, N, D]."""
    generator = torch.Generator().manual_seed(args.seed)
    book = normalize(torch.randn(args.codes, args.dim, generator=generator))
    return book, torch.randn(1, args.vectors, args.dim, generator=generator)


def train_once(quantizer: nn.Module, vectors: Tensor) -> Tensor:
    """A forward and a backward pass with the losses at their usual weights; the codes, [1, N]."""
    z = vectors.clone().requires_grad_()
    quantised, codes, losses, *_ = quantizer(z)
    extra = losses["codebook"] + 0.25 * losses["commitment"] if isinstance(losses, dict) else losses.sum()
    (quantised.square().mean() + extra).backward()
    return codes


def seconds(quantizer: nn.Module, vectors: Tensor) -> tuple[float, float]:
    """Of the clock, and of all processor cores together, which other programs on the machine disturb less."""
    clock, cores = time.perf_counter(), time.process_time()
    train_once(quantizer, vectors)
    return time.perf_counter() - clock, time.process_time() - cores


def peak() -> int:
    """The largest resident size of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def grown(name: str, args: argparse.Namespace) -> int:
    """Bytes by which the peak rises in one pass, after a tiny one has loaded what is loaded once."""
    book, vectors = codes_and_vectors(args)
    train_once(MAKERS[name](book[:64]), vectors[:, :64])
    quantizer, before = MAKERS[name](book), peak()
    train_once(quantizer, vectors)
    return peak() - before


def grown_elsewhere(name: str) -> int:
    command = [sys.executable, __file__, *sys.argv[1:], "--memory-of", name]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def disagreements(args: argparse.Namespace) -> tuple[int, int]:
    """Vectors whose codes differ, and those among them for which the two codes are not a near tie."""
    book, vectors = codes_and_vectors(args)
    codes = [train_once(make(book), vectors).flatten() for make in MAKERS.values()]
    differ = codes[0] != codes[1]
    unit = normalize(vectors[0][differ]).double()
    cosines = [(unit * book[found[differ]].double()).sum(dim=1) for found in codes]
    return int(differ.sum()), int(((cosines[0] - cosines[1]).abs() > NEAR_TIE).sum())


def compare(args: argparse.Namespace) -> None:
    # First, while this process is small: on Linux a child starts at the peak of its parent.
    memory = {name: grown_elsewhere(name) for name in MAKERS}
    book, vectors = codes_and_vectors(args)
    quantizers = {name: make(book) for name, make in MAKERS.items()}
    for quantizer in quantizers.values():
        train_once(quantizer, vectors[:, :1024])
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in MAKERS}
    for _ in range(args.repeats):
        for name, quantizer in quantizers.items():
            times[name].append(seconds(quantizer, vectors))
    print(f"{args.vectors:,} vectors, {args.codes:,} x {args.dim} codes, {torch.get_num_threads()} thread(s)")
    print(f"{'':6}{'vectors/s':>12}{'per core s':>12}{'peak MB':>10}")
    best = {name: [min(column) for column in zip(*measured, strict=True)] for name, measured in times.items()}
    for name, (clock, cores) in best.items():
        print(f"{name:6}{args.vectors / clock:>12,.0f}{args.vectors / cores:>12,.0f}{memory[name] / 1e6:>10,.0f}")
    (speed, work), share = (best["peer"][i] / best["ours"][i] for i in (0, 1)), memory["ours"] / memory["peer"]
    differing, untied = disagreements(args)
    print(f"ours is {speed:.1f} times as fast ({work:.1f} in core seconds) in {share:.1%} of the memory")
    print(f"{differing} codes differ, {untied} of them by more than a near tie of {NEAR_TIE:g}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for key, default in (("vectors", 65536), ("codes", 8192), ("dim", 32), ("repeats", 3), ("seed", 0)):
        parser.add_argument(f"--{key}", type=int, default=default)
    parser.add_argument("--memory-of", choices=MAKERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_of:
        print(grown(args.memory_of, args))
    else:
        compare(args)


if __name__ == "__main__":
    main()
