"""The evaluator beside torch-fidelity: the network alone, the whole job, and 10,000 small images on cheap features.

    python tests/benchmarks/evaluator.py network [--batch 16] [--repeats 3]
    python tests/benchmarks/evaluator.py job [--num 200] [--size 32] [--convention torch_fidelity]
    python tests/benchmarks/evaluator.py cheap [--num 10000]

`network` lets both see the same images in turns, in one process. `job` is FID, KID, Inception Score, precision and
recall of one set of images against another, in a process for each side: told are wall and CPU time from the first
import to the last score, and the most memory held. Ours also gives what it always gives: intervals, density, coverage.
Below 1,000 images KID is over all pairs for both. Weights are random (--weights names a file), images are coloured
blobs. --threads holds for all.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[1] / "eval"), str(Path(__file__).parents[2])]

SUBSETS, SUBSET_SIZE = 100, 1000  # of torch-fidelity's KID


def prepare(folder: Path, args: argparse.Namespace) -> None:
    """Put two sets of images, random weights of Inception and an untrained classifier into the folder."""
    import numpy as np
    import torch
    from random_inception import write_random_inception

    from engine.checkpoint import save_model
    from eval.classifier import Classifier
    from eval.config import ClassifierConfig

    for seed, name in enumerate(("generated", "reference")):
        np.savez(folder / f"{name}.npz", blobs(args.num, args.size, seed).permute(0, 2, 3, 1).numpy())
    if args.task == "job" and not args.weights:
        write_random_inception(folder / "inception.pth")
    torch.manual_seed(0)
    widths = ClassifierConfig().widths
    card = {"kind": "classifier", "num_classes": 10, "config": {"widths": list(widths)}}
    save_model(folder / "classifier", Classifier(widths, 10).state_dict(), card)


def blobs(num: int, size: int, seed: int) -> Any:
    """Smooth coloured images uint8 [N, 3, S, S]; another seed has others, a little less bright."""
    import torch
    import torch.nn.functional as F

    draws = torch.Generator().manual_seed(seed)
    rough = torch.rand(num, 3, 4, 4, generator=draws) * torch.rand(num, 1, 1, 1, generator=draws)
    smooth = F.interpolate(rough, (size, size), mode="bilinear")
    return (smooth * (255 - 10 * seed)).round().to(torch.uint8)


def ours(folder: Path, args: argparse.Namespace) -> dict[str, float]:
    """All scores of `tokenloom eval --generated A --reference B`."""
    from engine.config import RunConfig
    from engine.device import setup
    from eval.config import ClassifierConfig, EvalConfig
    from eval.names import base_name
    from eval.outside import OutsideConfig, judge_files

    run = RunConfig(root=str(folder / "cache"), device="cpu", threads=args.threads)
    settings = EvalConfig(
        features=("inception",) if args.task == "job" else ("classifier", "random"),
        inception_weights=args.weights or str(folder / "inception.pth"),
        classifier=ClassifierConfig(path=str(folder / "classifier")),
        convention=args.convention,
        num_samples=args.num,
    )
    records = judge_files(
        folder / "generated.npz", folder / "reference.npz", config=OutsideConfig(run=run, eval=settings),
        device=setup(run),
    )  # fmt: skip
    return {base_name(entry["name"]): entry["value"] for entry in records}


def torch_fidelity(folder: Path, args: argparse.Namespace) -> dict[str, float]:
    """The same scores, without worker processes, which would take more memory."""
    import numpy as np
    import torch
    from torch_fidelity import calculate_metrics

    class Images(torch.utils.data.Dataset):
        def __init__(self, name: str) -> None:
            self.pixels = np.load(folder / f"{name}.npz")["arr_0"]

        def __len__(self) -> int:
            return len(self.pixels)

        def __getitem__(self, index: int) -> torch.Tensor:
            return torch.from_numpy(self.pixels[index]).permute(2, 0, 1)

    torch.set_num_threads(args.threads)
    few = args.num < SUBSET_SIZE
    found = calculate_metrics(
        input1=Images("generated"), input2=Images("reference"), isc=True, fid=True, kid=True, prc=True, cuda=False,
        feature_extractor="inception-v3-compat", save_cpu_ram=True, cache=False, verbose=False,
        feature_extractor_weights_path=args.weights or str(folder / "inception.pth"),
        kid_subsets=1 if few else SUBSETS, kid_subset_size=args.num if few else SUBSET_SIZE,
    )  # fmt: skip
    names = {"frechet_inception_distance": "fd", "kernel_inception_distance_mean": "kid", "precision": "precision"}
    names.update(inception_score_mean="is", recall="recall")
    return {name: found[theirs] for theirs, name in names.items()}


SIDES = {"prepare": prepare, "ours": ours, "torch_fidelity": torch_fidelity}


def run_side(side: str, folder: Path, args: argparse.Namespace) -> None:
    """What the child process does; its last line is what it found."""
    start = time.perf_counter()
    values = SIDES[side](folder, args)
    used = resource.getrusage(resource.RUSAGE_SELF)
    told = {"wall": time.perf_counter() - start, "cpu": used.ru_utime + used.ru_stime, "peak": used.ru_maxrss / 1024}
    print(json.dumps({**told, "values": values}))


def in_process(side: str, folder: str) -> dict[str, Any]:
    """Run one side alone. This process stays small: a child's peak memory begins with that of its parent."""
    command = [sys.executable, __file__, *sys.argv[1:], "--side", side, "--folder", folder]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def compare_jobs(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        in_process("prepare", folder)
        found = {side: in_process(side, folder) for side in args.which or ("ours", "torch_fidelity")}
    for side, one in found.items():
        print(f"{side}: {one['wall']:.1f} s wall, {one['cpu']:.1f} s CPU, {one['peak']:.0f} MiB at most")
    mine, theirs = (found.get(side, {"values": {}})["values"] for side in ("ours", "torch_fidelity"))
    for name, value in mine.items():
        key = name.partition("_")[0].replace("fid", "fd")
        beside = f"  torch-fidelity {theirs[key]:.8g}, off by {abs(value - theirs[key]):.1e}" if key in theirs else ""
        print(f"  {name:24s} {value:.8g}{beside}")


def time_cheap(args: argparse.Namespace) -> None:
    args.which = ("ours",)
    compare_jobs(args)


def compare_networks(args: argparse.Namespace) -> None:
    import torch
    from diffusion import Turns
    from random_inception import torch_fidelitys, write_random_inception

    from eval.features import open_features

    torch.set_num_threads(args.threads)
    images = blobs(args.batch, args.size, 0)
    with tempfile.TemporaryDirectory() as folder:
        path = args.weights or write_random_inception(Path(folder) / "inception.pth")
        mine, theirs = open_features("inception", inception_weights=str(path)), torch_fidelitys(path)
    found: dict[str, torch.Tensor] = {}
    sides = {"ours": lambda: mine(images), "torch-fidelity": lambda: theirs(images)[0]}
    with torch.inference_mode():
        turns = Turns({side: lambda side=side: found.update({side: sides[side]()}) for side in sides}, args.repeats)
    for side in sides:
        wall, cpu = (1000 * seconds / args.batch for seconds in turns.medians(side))
        print(f"{side}: {wall:.0f} ms wall, {cpu:.0f} ms CPU an image")
    wall, cpu = turns.ratios("ours", "torch-fidelity")
    x, y = found.values()
    off, spread = (float(part.norm()) for part in (x - y, y - y.mean(0)))
    print(f"{wall:.2f} times torch-fidelity's speed by wall, {cpu:.2f} by CPU time; pool3 off by {off / spread:.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tasks = {"network": compare_networks, "job": compare_jobs, "cheap": time_cheap}
    parser.add_argument("task", choices=tasks)
    parser.add_argument("--num", type=int, help="images a side: 200 for job, 10,000 for cheap")
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--convention", default="unbiased", choices=("unbiased", "torch_fidelity"), help="of ours")
    parser.add_argument("--weights", help="a file of Inception weights")
    parser.add_argument("--which", nargs="+", choices=("ours", "torch_fidelity"), help="these sides of the job alone")
    parser.add_argument("--batch", type=int, default=16, help="for network")
    parser.add_argument("--repeats", type=int, default=3, help="for network")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.num = args.num or (10_000 if args.task == "cheap" else 200)
    if args.side:
        run_side(args.side, args.folder, args)
    else:
        tasks[args.task](args)


if __name__ == "__main__":
    main()
