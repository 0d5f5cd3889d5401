"""Averaged weights at steps of the training, kept for good: what samples can be drawn from afterwards.

    snapshots/step-00000500/{model.safetensors, width-0.05.safetensors, ..., snapshot.json}

`model` holds the weights that sampling uses, each `width-<sigma_rel>` a power-function average, from which averages of
other widths are reconstructed. `snapshot.json` (sizes and sha256 of the others) is written last, as in a checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.checkpoint import WRITE_ERRORS, checkpoints, damage, write_folder
from engine.posthoc import combine, reconstruct

MANIFEST = "snapshot.json"
LARGEST_REST = 0.2  # of a profile, as a share of its norm; above it a reconstruction is another average
State = dict[str, Tensor]


def write_snapshot(folder: Path, step: int, *, updates: int, model: State, widths: Mapping[float, State]) -> None:
    """Write `folder/step-XXXXXXXX` so that it is either whole or not there; `updates` of the steps were good.

    Raises:
        OSError: the disk is full or not writable; older snapshots are untouched.
    """

    def write(draft: Path) -> None:
        save_file(model, draft / "model.safetensors")
        for width, state in widths.items():
            save_file(state, draft / file_of(width))

    facts = {"step": step, "updates": updates, "widths": list(widths)}
    try:
        write_folder(folder / f"step-{step:08d}", write, manifest=MANIFEST, facts=facts)
    except WRITE_ERRORS as error:
        message = f"snapshot of step {step} not written to {folder}: {error}. Older snapshots and checkpoints are whole"
        raise OSError(f"{message}; free some space and run the same command again") from error


def snapshots(stage: Path) -> dict[int, Path]:
    """The snapshot folders of a stage's folder by training step, rising."""
    return {int(path.name.removeprefix("step-")): path for path in checkpoints(stage / "snapshots")}


def read_snapshot(stage: Path, step: int) -> State:
    """The weights that sampled at a step.

    Raises:
        ValueError: there is no such snapshot, or it is damaged.
    """
    path = _found(stage, step)
    _checked(path)
    return load_file(path / "model.safetensors")


def averaged_at(stage: Path, step: int, width: float) -> State:
    """The power-function average of a width over the training up to a step, from the snapshots until then.

    Raises:
        ValueError: there is no snapshot of this step or one is damaged, they hold no power-function averages, or these
            are too few to tell the wanted one.
    """
    _found(stage, step)
    told = {path: _checked(path) for at, path in snapshots(stage).items() if at <= step}
    begun = {path: each for path, each in told.items() if each["updates"]}
    stored = {(each["updates"], one): path / file_of(one) for path, each in begun.items() for one in each["widths"]}
    if not stored:
        raise ValueError(
            f"{stage / 'snapshots'} holds no averages to reconstruct width {width} from: train with"
            " train.ema_widths=[0.05,0.1]"
        )
    *_, last = told.values()
    coefficients, rest = reconstruct(list(stored), (last["updates"], width))
    if rest > LARGEST_REST:
        there = ", ".join(map(str, sorted({one for _, one in stored})))
        raise ValueError(
            f"an average of width {width} at step {step} cannot be told from {len(told)} snapshots of widths {there}:"
            f" {rest:.0%} of its profile is missing; ask for a width nearer to these, or train with a smaller"
            " train.snapshot_every"
        )
    return combine(list(stored.values()), coefficients)


def file_of(width: float) -> str:
    """The name of the file that holds the average of a width."""
    return f"width-{width}.safetensors"


def _found(stage: Path, step: int) -> Path:
    there = snapshots(stage)
    if step not in there:
        known = f"there are those of steps {', '.join(map(str, there))}" if there else "train with train.snapshot_every"
        raise ValueError(f"{stage / 'snapshots'} has no snapshot of step {step}: {known}")
    return there[step]


def _checked(path: Path) -> dict[str, Any]:
    """What snapshot.json tells; raise ValueError if a file of the snapshot is cut or altered."""
    problem = damage(path, MANIFEST)
    if problem is not None:
        raise ValueError(f"snapshot {path} is damaged ({problem}): delete it and use another one")
    return json.loads((path / MANIFEST).read_text())
