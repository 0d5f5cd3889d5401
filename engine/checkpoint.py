"""Checkpoints that survive anything: written aside, hashed, renamed into place, verified before use.

    checkpoints/step-00000500/{model.safetensors, averaged.safetensors, state.pt, manifest.json}

The manifest (sizes and sha256 of the other files) is written last and the folder renamed after it, so a killed process,
a full disk, a cut file or a flipped bit is always noticed, and an older checkpoint is always there to fall back to.
Only tensors and primitives are stored and everything loads with `weights_only=True`: nothing read here can run code.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

WRITE_ERRORS = (OSError, SafetensorError, RuntimeError)  # how the two libraries tell of a full disk
Weights = dict[str, dict[str, Tensor]]  # module name -> its state


def save_checkpoint(folder: Path, step: int, *, weights: Weights, averaged: Weights, state: dict[str, Any]) -> Path:
    """Write `folder/step-XXXXXXXX` so that it is either whole or not there.

    Raises:
        OSError: the disk is full or not writable; older checkpoints are untouched.
    """
    final = folder / f"step-{step:08d}"

    def write(draft: Path) -> None:
        save_file(_joined(weights), draft / "model.safetensors")
        if averaged:
            save_file(_joined(averaged), draft / "averaged.safetensors")
        torch.save({"step": step, **state}, draft / "state.pt")

    try:
        write_folder(final, write, manifest="manifest.json", facts={"step": step})
    except WRITE_ERRORS as error:
        message = f"checkpoint of step {step} not written to {folder}: {error}. Older checkpoints are whole"
        raise OSError(f"{message}; free some space and run the same command again") from error
    return final


def write_folder(final: Path, write: Callable[[Path], None], *, manifest: str, facts: dict[str, Any]) -> None:
    """Let `write` fill a draft folder, add `facts` with each file's size and sha256 as `manifest`, put it in place."""
    folder, draft = final.parent, final.with_name(f".draft-{final.name}")
    clear_drafts(folder)
    try:
        draft.mkdir(parents=True)
        write(draft)
        files = {path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in sorted(draft.iterdir())}
        (draft / manifest).write_text(json.dumps({**facts, "files": files}, indent=1))
        for path in draft.iterdir():
            _sync(path)
        shutil.rmtree(final, ignore_errors=True)
        draft.rename(final)
        _sync(folder)
    except WRITE_ERRORS:
        clear_drafts(folder)
        raise


def load_checkpoint(folder: Path) -> tuple[Weights, Weights, dict[str, Any]] | None:
    """The newest valid checkpoint as (weights, averaged weights, state), or None if there is none.

    Damaged ones are passed over with a warning that says what is wrong with them.
    """
    path = newest_whole(folder)
    if path is None:
        return None
    averaged = path / "averaged.safetensors"
    return (
        _split(load_file(path / "model.safetensors")),
        _split(load_file(averaged)) if averaged.exists() else {},
        torch.load(path / "state.pt", weights_only=True),
    )


def newest_whole(folder: Path) -> Path | None:
    """The newest undamaged checkpoint folder; a warning tells of each damaged one that is passed over."""
    for path in reversed(checkpoints(folder)):
        problem = damage(path)
        if problem is None:
            return path
        warnings.warn(f"{path} is damaged ({problem}); falling back to an older checkpoint", stacklevel=3)
    return None


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, oldest first."""
    return sorted(folder.glob("step-*"))


def damage(path: Path, manifest: str = "manifest.json") -> str | None:
    """What is wrong with a folder that `write_folder` has written; None if it is whole."""
    try:
        for name, record in json.loads((path / manifest).read_text())["files"].items():
            if (path / name).stat().st_size != record["bytes"]:
                return f"{name} has {(path / name).stat().st_size} bytes instead of {record['bytes']}"
            if sha256(path / name) != record["sha256"]:
                return f"{name} does not match its sha256"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except OSError as error:
        return f"cannot be read: {error}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{manifest} is not readable"
    return None


def prune(folder: Path, *, keep_last: int, milestone_every: int) -> None:
    """Delete all but the newest `keep_last` checkpoints and the milestones."""
    for path in checkpoints(folder)[:-keep_last]:
        step = int(path.name.removeprefix("step-"))
        if not milestone_every or step % milestone_every:
            shutil.rmtree(path, ignore_errors=True)


def drop_beyond(folder: Path, step: int) -> None:
    """Delete checkpoints of later steps: they were damaged, and must not count among the newest that are kept."""
    for path in checkpoints(folder):
        if int(path.name.removeprefix("step-")) > step:
            shutil.rmtree(path)


def clear_drafts(folder: Path) -> None:
    """Delete what killed processes left half written."""
    for draft in folder.glob(".draft-*"):
        shutil.rmtree(draft, ignore_errors=True)


def save_model(folder: Path, weights: dict[str, Tensor], card: dict[str, Any]) -> str:
    """Write a finished model: `model.safetensors`, then `model.json` (the card, with hashes), each atomically.

    `card["config"]` must hold all that is needed to build the network. Returns the fingerprint, which names this model
    in codes, samples and scores.
    """
    folder.mkdir(parents=True, exist_ok=True)
    draft = folder / ".draft-model.safetensors"
    try:
        save_file({name: value.contiguous() for name, value in weights.items()}, draft)
        digest = sha256(draft)
        _sync(draft)
    except WRITE_ERRORS as error:
        draft.unlink(missing_ok=True)
        message = f"model not written to {folder}: {error}"
        raise OSError(f"{message}; free some space and run the same command again") from error
    (folder / "model.json").unlink(missing_ok=True)  # a kill between the two files must not leave a false pair
    draft.rename(folder / "model.safetensors")
    fingerprint = model_fingerprint(card["config"], digest)
    write_json(folder / "model.json", {**card, "fingerprint": fingerprint, "sha256": digest})
    return fingerprint


def model_fingerprint(config: dict[str, Any], digest: str) -> str:
    """16 hex digits of a sha256 over a configuration and the sha256 of the weights' file."""
    return hashlib.sha256((json.dumps(config, sort_keys=True) + digest).encode()).hexdigest()[:16]


def load_model(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The card and the weights of a finished model.

    Raises:
        ValueError: there is none, or its files are cut, altered or do not belong together.
    """
    folder = Path(folder)
    card_path, weights_path = folder / "model.json", folder / "model.safetensors"
    for path in (card_path, weights_path):
        if not path.is_file():
            raise ValueError(f"{path} is missing: this stage has not been trained to its end; run its command first")
    try:
        card = json.loads(card_path.read_text())
        weights = load_file(weights_path)
    except (json.JSONDecodeError, SafetensorError) as error:
        raise ValueError(f"{folder}: damaged files ({error}); delete {card_path} and run the stage again") from error
    if sha256(weights_path) != card.get("sha256"):
        raise ValueError(
            f"{weights_path} does not match the sha256 in model.json: damaged or exchanged; "
            f"delete {card_path} and run the stage again (it restarts from its last checkpoint)"
        )
    return card, weights


def write_json(path: Path, data: Any) -> None:
    """Write JSON so that readers see the old file or the new one, never half of one."""
    write_atomic(path, (json.dumps(data, indent=1) + "\n").encode())


def write_atomic(path: Path, content: bytes | Callable[[Path], None]) -> None:
    """Write a file beside its place and rename it; `content` is the bytes, or a function that writes to a path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".draft-{os.getpid()}-{path.name}")
    try:
        if callable(content):
            content(draft)
        else:
            draft.write_bytes(content)
        _sync(draft)
        draft.rename(path)
    finally:
        draft.unlink(missing_ok=True)


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _joined(weights: Weights) -> dict[str, Tensor]:
    return {f"{module}/{name}": value for module, state in weights.items() for name, value in state.items()}


def _split(flat: dict[str, Tensor]) -> Weights:
    weights: Weights = {}
    for key, value in flat.items():
        module, _, name = key.partition("/")
        weights.setdefault(module, {})[name] = value
    return weights


def _sync(path: Path) -> None:
    """Force a file's bytes, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
