"""What is installed and found here: versions, device, room, extras, weights. Never fails, never fetches."""

from __future__ import annotations

import os
import platform
import re
import shutil
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

Rows = Iterator[tuple[str, str]]
CGROUP_MEMORY = Path("/sys/fs/cgroup/memory.max")


def doctor() -> str:
    """The report as text: a heading and aligned rows per section."""
    return "\n\n".join(_section(title, rows) for title, rows in SECTIONS.items())


def _section(title: str, rows: Callable[[], Rows]) -> str:
    found: list[tuple[str, str]] = []
    # A report about a broken installation must come out of a broken installation.
    try:
        found.extend(rows())
    except Exception as error:
        found.append(("not known", f"{type(error).__name__}: {error}"))
    width = max(len(name) for name, _ in found)
    return "\n".join([title, *(f"  {name:<{width}}  {text}" for name, text in found)])


def _versions() -> Rows:
    yield "python", f"{platform.python_version()} on {platform.platform()}"
    yield "tokenloom", _version("tokenloom") or "absent: pip install -e ."
    for package in _requirements().get("", ()):
        yield package, _version(package) or f"absent: pip install {package}"


def _extras() -> Rows:
    for extra, packages in _requirements().items():
        absent = [package for package in packages if not _version(package)]
        if extra and absent:
            yield extra, f"absent ({', '.join(absent)}): pip install 'tokenloom[{extra}]'"
        elif extra:
            yield extra, ", ".join(f"{package} {_version(package)}" for package in packages)


def _requirements() -> dict[str, list[str]]:
    """Distribution names by extra, as the installed package declares them; "" holds what is always needed."""
    groups: dict[str, list[str]] = {"": []}
    for line in metadata.requires("tokenloom") or ():
        name = re.match(r"[\w.-]+", line)
        extra = re.search(r"""extra\s*==\s*["']([\w-]+)["']""", line)
        if name:
            groups.setdefault(extra.group(1) if extra else "", []).append(name.group())
    return groups


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _compute() -> Rows:
    import torch

    from engine.device import choose_precision, cpu_quota, has_bf16

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    yield (
        "device",
        ", ".join(_gpus()) if device.type == "cuda" else f"cpu ({platform.processor() or platform.machine()})",
    )
    reason = "the hardware multiplies bf16 matrices" if has_bf16(device) else f"this {device.type} has no bf16 hardware"
    yield "precision", f"{choose_precision('auto', device)}: {reason}"
    yield "threads", f"{cpu_quota()} by affinity and quota, of {os.cpu_count()} processors"


def _gpus() -> Iterator[str]:
    import torch

    for number in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(number)
        yield f"cuda:{number} {facts.name} ({_gib(facts.total_memory)})"


def _room() -> Rows:
    yield "disk", f"{_gib(shutil.disk_usage(Path.cwd()).free)} free in {Path.cwd()}"
    page = os.sysconf("SC_PAGE_SIZE")
    yield (
        "memory",
        f"{_gib(os.sysconf('SC_PHYS_PAGES') * page)}, of which {_gib(os.sysconf('SC_AVPHYS_PAGES') * page)} unused",
    )
    limit = CGROUP_MEMORY.read_text().strip() if CGROUP_MEMORY.is_file() else "max"
    if limit != "max":
        yield "memory limit", f"{_gib(int(limit))} for this container"


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"


def _weights() -> Rows:
    from engine.pretrained import checkpoint_folder
    from eval.inception import INCEPTION_FILES
    from tokenizer.perceptual import TRUNKS

    folder = checkpoint_folder()
    yield "looked for in", f"{folder} (TORCH_HOME moves it); nothing is downloaded"
    yield "Inception", _first(folder, INCEPTION_FILES) or f"absent ({INCEPTION_FILES[0]}): no FID, only fd_<features>"
    for net, file_name in TRUNKS.items():
        without = f"no lpips_{net}, no perceptual loss lpips:{net}"
        yield f"LPIPS {net}", _first(folder, (file_name,)) or f"absent ({file_name}): {without}"


def _first(folder: Path, names: tuple[str, ...]) -> str | None:
    return next((str(folder / name) for name in names if (folder / name).is_file()), None)


SECTIONS: dict[str, Callable[[], Rows]] = {
    "versions": _versions,
    "computing": _compute,
    "room": _room,
    "optional extras": _extras,
    "weights of the judges": _weights,
}
