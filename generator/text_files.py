"""Frozen CLIP and T5 text encoders on disk, in transformers' layout (extra: text): found, checked, read.

A name on the hub stands for the folder that its files are kept in, or fetched into.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from engine.checkpoint import sha256

# For each choice of text.encoder, the `model_type` in a config.json, and transformers' class for it.
NETWORKS = {
    "clip": {"clip": "CLIPTextModel", "clip_text_model": "CLIPTextModel"},
    "t5": {"t5": "T5EncoderModel", "mt5": "MT5EncoderModel", "umt5": "UMT5EncoderModel"},
}
EXAMPLES = {"clip": "openai/clip-vit-base-patch32", "t5": "google/t5-v1_1-base"}
WEIGHTS = ("*.safetensors", "pytorch_model*.bin")  # the second where there is none of the first
VOCABULARY = ("tokenizer.json", "vocab.json", "merges.txt", "spiece.model")  # what ids mean, as far as there
CLIP_WIDTH, CLIP_POSITIONS = 512, 77  # of CLIP-B/32, whose numbers transformers may leave out of a file


@dataclass(frozen=True)
class TextFolder:
    """A folder with a frozen text encoder; made by `open_folder`."""

    encoder: str
    folder: Path
    network: str
    """Its class in transformers."""
    width: int
    """Numbers in each of its states."""
    positions: int | None
    """Tokens that it takes at most; None means any number."""

    @functools.cached_property
    def fingerprint(self) -> str:
        """Changes with the weights and with the vocabulary."""
        files = [*weight_files(self.folder), *(self.folder / name for name in VOCABULARY)]
        told = [f"{file.name} {sha256(file)}" for file in sorted(files) if file.is_file()]
        return hashlib.sha256("\n".join(told).encode()).hexdigest()[:16]


@functools.cache
def open_folder(encoder: str, path: str) -> TextFolder:
    """The encoder in the folder `path`, or of this name on the hub, which is fetched where it is not there yet.

    Raises:
        ValueError: transformers is not installed; there is no such folder or name; it has no weights; or it holds
            another kind of network.
    """
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"condition.text.encoder={encoder} needs the transformers library: pip install 'tokenloom[text]'"
        ) from error
    folder = Path(path).expanduser()
    folder = folder if folder.is_dir() else _fetched(encoder, path)
    if not (folder / "config.json").is_file() or not weight_files(folder):
        wanted = " or ".join(WEIGHTS)
        raise ValueError(
            f"condition.text.path={path}: {folder} holds no config.json with weights ({wanted}). {_remedy(encoder)}"
        )
    try:
        told = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return TextFolder(encoder, folder, NETWORKS[encoder][told["model_type"]], *_size(encoder, told))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"condition.text.path={path}: {folder / 'config.json'} describes no {encoder.upper()} text encoder"
            f" ({type(error).__name__}: {error}). Choose another folder, or the encoder of this one"
        ) from error


def weight_files(folder: Path) -> list[Path]:
    """The files of weights in a folder: safetensors, or else PyTorch's."""
    return next((found for pattern in WEIGHTS if (found := sorted(folder.glob(pattern)))), [])


def read_network(files: TextFolder) -> nn.Module:
    """The encoder with its weights, float32, on the CPU, in eval mode, without gradients.

    Raises:
        ValueError: the files are damaged, or lack weights.
    """
    import transformers

    kind = getattr(transformers, files.network)
    options = {"local_files_only": True, "dtype": torch.float32, "output_loading_info": True}
    try:
        # Building draws random numbers, which must not be missing elsewhere; no surrounding mode reaches in here.
        with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.inference_mode(False), quiet():
            network, told = kind.from_pretrained(files.folder, **options)
    except Exception as error:  # damaged files make the readers stumble in all manner of ways
        raise ValueError(
            f"condition.text.path: weights of {files.folder} are unreadable ({error}): renew them"
        ) from error
    missing = sorted(told["missing_keys"])
    if missing:
        raise ValueError(
            f"condition.text.path: {files.folder} lacks {len(missing)} weights of its {files.encoder.upper()} text"
            f" encoder, {missing[0]} among them: renew them"
        )
    return network.eval().requires_grad_(False)


def read_tokenizer(files: TextFolder) -> Any:
    """transformers' tokenizer of the folder.

    Raises:
        ValueError: it is missing or damaged, or needs a library that is not there.
    """
    import transformers

    try:
        with quiet():
            return transformers.AutoTokenizer.from_pretrained(files.folder, local_files_only=True)
    except Exception as error:  # as above
        raise ValueError(
            f"condition.text.path: {files.folder} has no tokenizer that can be read ({error}). Its files are"
            f" tokenizer_config.json and some of {', '.join(VOCABULARY)}. {_remedy(files.encoder)}"
        ) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' bars and remarks, such as on the image half of a CLIP, which stays unread."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _size(encoder: str, told: dict[str, Any]) -> tuple[int, int | None]:
    """Width and positions, as a config.json tells them."""
    if encoder == "t5":
        return int(told["d_model"]), None  # its positions are relative
    text = told.get("text_config", told)
    return int(text.get("hidden_size", CLIP_WIDTH)), int(text.get("max_position_embeddings", CLIP_POSITIONS))


def _fetched(encoder: str, name: str) -> Path:
    """The folder with the hub's files, from its cache or over the network."""
    here = f"working folder: {Path.cwd()}"
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ValueError(f"condition.text.path={name}: no such folder ({here}). {_remedy(encoder)}")
    try:
        return _snapshot(name)
    except Exception as error:  # no network, no such name, a full disk: the hub stumbles in a manner of its own
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ValueError(
            f"condition.text.path={name}: no folder ({here}), and not to be had from the hub ({reason})."
            f" {_remedy(encoder)}"
        ) from error


def _snapshot(name: str) -> Path:
    """Settings, vocabulary and weights of one kind alone: many names hold them in several formats."""
    from huggingface_hub import snapshot_download

    folder = Path()
    for weights in WEIGHTS:
        allowed = ["*.json", "*.txt", "*.model", weights]
        folder = Path(snapshot_download(name, allow_patterns=allowed, ignore_patterns=["*/*"]))
        if weight_files(folder):
            break
    return folder


def _remedy(encoder: str) -> str:
    return (
        f"Where there is a network, `hf download {EXAMPLES[encoder]} --local-dir FOLDER` makes a folder; bring it here"
        " and give condition.text.path=FOLDER. encoder=bytes needs no weights"
    )
