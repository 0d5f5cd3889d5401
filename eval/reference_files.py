"""What images are held against: other images, or the mean and covariance of their features that a file states.

Stated ones are `mu` [D] and `sigma` [D, D] in an .npz, as ADM's evaluator, pytorch-fid and clean-fid store them. Our
own files also say by which network they were measured.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.checkpoint import sha256, write_atomic
from engine.config import difference
from eval.array_files import BAD_HEADER, npz_members
from eval.image_files import open_pictures
from eval.pictures import Pictures
from eval.statistics import Gaussian
from eval.zip_members import DAMAGE

NOT_STATED = "not stated"
INCEPTION_DIMS = 2048
ASYMMETRY = 1e-5  # of the largest entry: what a covariance that was computed in float32 may have


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Images, a stated Gaussian of features, or both: ADM's files have some of the images that theirs comes from."""

    pictures: Pictures | None
    gaussian: Gaussian | None
    identity: dict[str, Any]
    """JSON-ready: "file"; of an .npz also its "sha256"; of a stated Gaussian also "features" (the `identity` of its
    extractor, or "not stated"), "n" (0: not stated) and, if we wrote it, "pixels"."""


def open_reference(path: str | Path, *, size: int | None = None) -> Reference:
    """The reference at `path`: an .npz with `mu` and `sigma` (and perhaps images `arr_0`), or whatever `open_pictures`
    reads, which also says what `size` does.

    Raises:
        ValueError: nothing there, or a Gaussian that is none: not finite, not square, no covariance.
    """
    path = Path(path)
    if path.suffix.lower() != ".npz" or not path.is_file():
        return Reference(pictures=open_pictures(path, size=size), gaussian=None, identity={"file": path.name})
    keys = npz_members(path)
    identity = {"file": path.name, "sha256": sha256(path)}
    pictures = open_pictures(path, size=size) if "arr_0" in keys or not {"mu", "sigma"} & keys.keys() else None
    if not {"mu", "sigma"} & keys.keys():
        return Reference(pictures=pictures, gaussian=None, identity=identity)
    stored = _read_keys(path, {"mu", "sigma", "n", "features", "pixels"})
    gaussian = _gaussian(path, stored)
    return Reference(pictures=pictures, gaussian=gaussian, identity={**identity, "n": gaussian.n, **_told(stored)})


def save_reference(path: str | Path, gaussian: Gaussian, *, features: dict[str, Any], pixels: str) -> None:
    """Write `mu`, `sigma` and `n` with what they were measured on: the extractor's `identity` and a hash of the pixels.

    pytorch-fid and ADM's evaluator read it. The same Gaussian gives the same bytes.

    Raises:
        ValueError: no .npz, or no Gaussian of at least two images.
        OSError: the disk is full or not writable.
    """
    path = Path(path)
    if path.suffix != ".npz":
        raise ValueError(f"{path}: the file must end in .npz; rename it")
    mu, sigma = gaussian.mu.cpu().numpy(), gaussian.sigma.cpu().numpy()
    _gaussian(path, {"mu": mu, "sigma": sigma, "n": np.asarray(gaussian.n)})
    told = json.dumps(features, sort_keys=True)

    def write(draft: Path) -> None:
        with open(draft, "wb") as stream:
            np.savez(stream, mu=mu, sigma=sigma, n=gaussian.n, features=np.array(told), pixels=np.array(pixels))

    write_atomic(path, write)


def check_reference(reference: Reference, features: dict[str, Any]) -> None:
    """Refuse a stated Gaussian that was measured by another network or resize rule than `features`, an extractor's
    `identity`.

    A file that does not say is taken for Inception's features, which all such files hold, under the resize rule of the
    original network; under clean-fid's rule if its name says `clean`, as clean-fid's <set>_<mode>_<split>_<size> do.

    Raises:
        ValueError: the two differ, with what differs; or the file does not say, and cannot be of these features.
    """
    if reference.gaussian is None:
        return
    told, file = reference.identity["features"], reference.identity["file"]
    if told == NOT_STATED:
        _check_unstated(file, len(reference.gaussian.mu), str(features["name"]))
        return
    changes = difference(told, json.loads(json.dumps(features)))
    if changes:
        lines = "".join(f"\n  {key}: {before!r} | {after!r}" for key, (before, after) in changes.items())
        raise ValueError(
            f"reference {file} was measured by other features than these:{lines}\n"
            "Judge with the features of the file, or give the reference images instead"
        )


def _check_unstated(file: str, dims: int, name: str) -> None:
    rule = _rule_by_name(file.lower()) if dims == INCEPTION_DIMS else None
    if name != rule:
        raise ValueError(
            f"reference {file} does not say by which features it was measured; from its name and its {dims} numbers it "
            f"can be held against {rule or 'none of ours'}, not {name}: give the reference images instead"
        )


def _rule_by_name(file: str) -> str | None:
    """Which of our Inceptions a file of 2048 numbers belongs to; None for a mode of clean-fid that ours lack."""
    if "legacy_pytorch" in file:
        return None
    return "inception-clean" if "clean" in re.split(r"[-_.]", file) else "inception"


def _told(stored: dict[str, np.ndarray]) -> dict[str, Any]:
    """What one of our own files says of its measurement."""
    texts = {key: str(stored[key]) for key in ("features", "pixels") if key in stored and stored[key].dtype.kind == "U"}
    try:
        features = json.loads(texts.get("features", ""))
    except json.JSONDecodeError:
        return {"features": NOT_STATED}
    if not isinstance(features, dict):
        return {"features": NOT_STATED}
    return {"features": features, "pixels": texts.get("pixels", NOT_STATED)}


def _read_keys(path: Path, wanted: set[str]) -> dict[str, np.ndarray]:
    """Those of the wanted arrays that an .npz has; nothing is unpickled."""
    key = ""
    try:
        with np.load(path, allow_pickle=False) as stored:
            found = {}
            for key in sorted(wanted & set(stored.files)):
                found[key] = np.asarray(stored[key])
    except (*DAMAGE, *BAD_HEADER) as error:
        raise ValueError(f"reference {path}: {key} cannot be read ({error}); fetch or write the file again") from error
    return found


def _gaussian(path: Path, stored: dict[str, np.ndarray]) -> Gaussian:
    """mu, sigma and n of a file, checked.

    Raises:
        ValueError: one is missing or cannot be what its name says.
    """
    mu, sigma = (_numbers(path, stored, key) for key in ("mu", "sigma"))
    if mu.ndim != 1 or not mu.size or sigma.shape != (mu.size, mu.size):
        raise ValueError(
            f"reference {path}: mu {mu.shape} and sigma {sigma.shape} must be [D] and [D, D]; measure again"
        )
    size = np.abs(sigma)
    tolerance, spread = ASYMMETRY * float(size.max()), np.sqrt(sigma.diagonal().clip(min=0))
    uneven = float(np.abs(sigma - sigma.T).max()) > tolerance
    # No two numbers vary together more than each for itself (Cauchy and Schwarz); for i = j: no variance is negative.
    if uneven or bool((size > np.outer(spread, spread) + tolerance).any()):
        fault = "not symmetric" if uneven else "smaller variances than covariances"
        raise ValueError(f"reference {path}: sigma is no covariance ({fault}); measure again")
    return Gaussian(torch.from_numpy(mu), torch.from_numpy(sigma), _count(path, stored))


def _numbers(path: Path, stored: dict[str, np.ndarray], key: str) -> np.ndarray:
    if key not in stored:
        raise ValueError(f"reference {path}: has no {key}; a stated reference needs mu and sigma, so measure again")
    if stored[key].dtype.kind not in "fiu" or not np.isfinite(stored[key]).all():
        raise ValueError(f"reference {path}: {key} ({stored[key].dtype}) is not all finite numbers; measure again")
    return stored[key].astype(np.float64)


def _count(path: Path, stored: dict[str, np.ndarray]) -> int:
    """How many images were measured; 0 if the file does not say."""
    if "n" not in stored:
        return 0
    n = stored["n"]
    if n.shape != () or n.dtype.kind not in "iu" or int(n) < 2:
        raise ValueError(f"reference {path}: n={n} must be a whole number of at least 2 images; measure again")
    return int(n)
