"""Trained networks from files that are there already: `fetch_timm` alone downloads, and no code in a file is run."""

from __future__ import annotations

from collections.abc import Mapping
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
        ValueError: the file is cut, or holds more or other than weights.
    """
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files make the unpickler stumble in all manner of ways
        raise ValueError(f"{path}: not a readable file of weights ({error})") from error
    if not isinstance(state, Mapping):
        raise ValueError(f"{path}: holds a {type(state).__name__}, not weights by their names; save a state dict")
    for name, value in state.items():
        if not (isinstance(name, str) and isinstance(value, Tensor)):
            remedy = "save the state dict alone, such as checkpoint['state_dict'] or checkpoint['model']"
            raise ValueError(f"{path}: {name!r} is a {type(value).__name__}, not a weight; {remedy}")
    return dict(state)


def timm_parts(text: str) -> tuple[str, Path, int | None]:
    """`<model>:<weights file>[:<input size>]` -> its parts."""
    model, _, path = text.partition(":")
    file, _, size = path.rpartition(":")
    return (model, Path(file), int(size)) if file and size.isdigit() else (model, Path(path), None)


def open_timm(
    model: str, path: Path, size: int | None, *, key: str, remedy: str = "", blank: bool = False
) -> tuple[Any, dict[str, Any]]:
    """A timm network with the weights of a local file, in float32, and timm's settings of it (mean, std, ...).

    It has the classifier that the file has, or none.

    Args:
        size: pixels along each side if they are to differ from the network's own.
        key: the setting that asked for it, for messages.
        remedy: what else can be done if the file is not there, for that message.
        blank: the file must be there, but it is not read, and there is no classifier; for counting.

    Raises:
        ValueError: no such file or model, a model without settings, or weights that do not fit it.
    """
    if not path.is_file():
        raise ValueError(f"{key}=timm:{model}:{path}: no such weights file (working folder: {Path.cwd()}){remedy}")
    settings = _timm_settings(model, key)
    state = {} if blank else {name: value.float() for name, value in read_weights(path).items()}
    head = state.get(f"{_classifier(settings)}.weight")
    network = _created(model, settings, size, key, num_classes=0 if head is None else len(head))
    try:
        if not blank:
            network.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{key}=timm:{model}: the file's weights do not fit this model: {error}") from error
    return network, settings


def fetch_timm(model: str, size: int | None, *, key: str) -> tuple[Any, dict[str, Any]]:
    """A timm network with the weights that timm knows for it, in float32, and timm's settings of it (mean, std, ...).

    They are taken from the cache of the Hugging Face hub or of torch hub, or else downloaded into it. timm refuses
    weights that would run code, or prefers files that cannot.

    Args:
        size, key: as in `open_timm`.

    Raises:
        ValueError: no such model, one without weights or settings, or weights that cannot be had.
    """
    settings = _timm_settings(model, key)
    try:
        network = _created(model, settings, size, key, pretrained=True)
    except ValueError:
        raise
    except Exception as error:  # no network, no weights, a full disk: each hub stumbles in a manner of its own
        raise ValueError(
            f"{key}=timm:{model}:pretrained: its weights could not be fetched ({error}). Get the file elsewhere and "
            f"give {key}=timm:{model}:<weights file>"
        ) from error
    return network.float(), settings


def _created(model: str, settings: dict[str, Any], size: int | None, key: str, **options: Any) -> Any:
    """timm's network; one of a fixed input size is built for any, if another `size` than its own is asked."""
    import timm

    flexible: dict[str, Any] = {"dynamic_img_size": True} if settings.get("fixed_input_size") and size else {}
    try:
        return timm.create_model(model, **options, **flexible)
    except TypeError as error:
        if not flexible:
            raise
        raise ValueError(f"{key}=timm:{model}: it takes images of its own size alone; leave :{size} out") from error


def _timm_settings(model: str, key: str) -> dict[str, Any]:
    """timm's settings of a model: mean, std, input_size, classifier, ..."""
    import timm

    if not timm.is_model(model):
        raise ValueError(f"{key}=timm:{model}: timm has no such model; `timm.list_models()` lists them")
    try:
        settings = timm.get_pretrained_cfg(model)
    except RuntimeError as error:  # a tag that the model does not have
        raise ValueError(f"{key}=timm:{model}: {error} `timm.list_pretrained()` lists them") from error
    if settings is None:
        told = "timm does not say which mean and deviation of the pixels it was trained with"
        raise ValueError(f"{key}=timm:{model}: {told}; choose one of `timm.list_pretrained()`")
    return settings.to_dict()


def _classifier(settings: dict[str, Any]) -> str:
    """Name of the classifier, the first of several: a distilled network has a second one for its teacher's answers."""
    named = settings["classifier"]
    return named[0] if isinstance(named, tuple) else str(named)


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
