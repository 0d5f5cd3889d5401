"""Trained networks from files that are there already: nothing is ever downloaded, and no code in a file is run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def checkpoint_folder() -> Path:
    """Torch hub's folder of weights, where files that have no path of their own are looked for; TORCH_HOME moves it."""
    return Path(torch.hub.get_dir()) / "checkpoints"


def read_weights(path: Path) -> dict[str, Tensor]:
    """A state dict from .safetensors, or from a PyTorch file without running any code in it.

    Raises:
        ValueError: the file is cut, or holds more than weights.
    """
    from pickle import UnpicklingError

    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except (SafetensorError, UnpicklingError, RuntimeError, EOFError, TypeError) as error:
        raise ValueError(f"{path}: not a readable file of weights ({error})") from error


def timm_parts(text: str) -> tuple[str, Path, int | None]:
    """`<model>:<weights file>[:<input size>]` -> its parts."""
    model, _, path = text.partition(":")
    file, _, size = path.rpartition(":")
    return (model, Path(file), int(size)) if file and size.isdigit() else (model, Path(path), None)


def open_timm(model: str, path: Path, size: int | None, *, key: str, remedy: str = "") -> tuple[Any, dict[str, Any]]:
    """A timm network with the weights of a local file, in float32, and timm's settings of it (mean, std, ...).

    It has the classifier that the file has, or none.

    Args:
        size: pixels along each side if they are to differ from the network's own.
        key: the setting that asked for it, for messages.
        remedy: what else can be done if the file is not there, for that message.

    Raises:
        ValueError: no such file or model, or the weights do not fit it.
    """
    import timm

    if not path.is_file():
        raise ValueError(f"{key}=timm:{model}:{path}: no such weights file (working folder: {Path.cwd()}){remedy}")
    state = {name: value.float() for name, value in read_weights(path).items()}
    if not timm.is_model(model):
        raise ValueError(f"{key}=timm:{model}: timm has no such model; `timm.list_models()` lists them")
    pretrained = timm.get_pretrained_cfg(model)
    assert pretrained is not None
    settings = pretrained.to_dict()
    head = state.get(f"{settings['classifier']}.weight")
    flexible: dict[str, Any] = {"dynamic_img_size": True} if settings.get("fixed_input_size") and size else {}
    network = timm.create_model(model, num_classes=0 if head is None else len(head), **flexible)
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{key}=timm:{model}: the file's weights do not fit this model: {error}") from error
    return network, settings


def fill_trunk(network: torch.nn.Module, path: Path) -> None:
    """Give a network, cut out of a torchvision model's `features`, the weights of that model's file.

    Layers keep their number in `features`, whatever group the network has put them in: `slice2.5.weight` is
    `features.5.weight` in the file.

    Raises:
        ValueError: the file is cut, or is another model's.
    """
    trunk = read_weights(path)
    try:
        network.load_state_dict({key: trunk["features." + key.split(".", 1)[1]] for key in network.state_dict()})
    except (KeyError, RuntimeError) as error:
        raise ValueError(f"{path}: not the weights of the torchvision model that is needed here: {error}") from error
