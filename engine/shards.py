"""Codes and latents on disk: memory-mapped files, a part per process, and meta.json, written last, that names them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.checkpoint import sha256, write_json
from engine.growing import GrowingArray

REQUIRED_META = ("tokenizer_fingerprint", "grid", "vocab_size", "latent_shape", "class_names", "images")
REMEDY = "run `tokenloom encode` again"
CAPTIONS = "captions"  # the one kind of file that is a list of texts instead of an array


class ShardWriter:
    """Appends rows to this process's part files in `<folder>.partial`; `close` renames that to `folder`.

    Used in a `with` block, so that an error leaves no file open; what was not closed by `close` is never read.

    Args:
        views: names of the V versions of each image, such as ("original", "flip").
        vocab_size: number of codes, which chooses uint16 or int32; None if no codes are written.
        barrier: waits for the other processes; parts are read back in the order of their ranks.
    """

    def __init__(
        self,
        folder: Path | str,
        *,
        views: Sequence[str],
        vocab_size: int | None = None,
        rank: int = 0,
        world: int = 1,
        barrier: Callable[[], None] = lambda: None,
    ) -> None:
        self.folder = Path(folder)
        self._partial = self.folder.with_name(f"{self.folder.name}.partial")
        self._views, self._vocab_size = tuple(views), vocab_size
        self._rank, self._world, self._barrier = rank, world, barrier
        self._columns: dict[str, GrowingArray] = {}
        self._captions: list[str] = []
        self._kinds: list[str] = []
        if rank == 0:
            shutil.rmtree(self._partial, ignore_errors=True)
            self._partial.mkdir(parents=True)
        barrier()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self._close_columns()

    def append(
        self,
        *,
        labels: Tensor,
        codes: Tensor | None = None,
        latents: Tensor | None = None,
        smaller: Tensor | None = None,
        captions: Sequence[str] | None = None,
    ) -> None:
        """Adds B rows: labels int64 [B], codes int64 [B, V, T], latents float [B, V, C, h, w] stored as float16.

        `smaller`, shaped and stored as the latents, are those of each view's smaller version, enlarged again.
        `captions` are B texts, in which every line is an alternative.

        Raises:
            ValueError: a code outside the vocabulary, a latent that float16 cannot hold, or shapes that disagree.
        """
        if len(labels) == 0:
            return
        rows = {"labels": labels.cpu().numpy().astype(np.int64)}
        if codes is not None:
            rows["codes"] = self._narrow_codes(codes.cpu().numpy())
        for kind, given in (("latents", latents), ("smaller", smaller)):
            if given is not None:
                rows[kind] = _narrow_latents(given.float().cpu().numpy())
        self._check_rows(rows, captions)
        for kind, values in rows.items():
            if kind not in self._columns:
                self._columns[kind] = GrowingArray(self._partial / self._file_name(kind), values)
            self._columns[kind].append(values)
        self._captions += captions or ()

    def close(self, meta: dict[str, Any]) -> Path:
        """Completes the folder. `meta` must hold REQUIRED_META; n, views, parts and dtypes are added here.

        Raises:
            ValueError: `meta` lacks a key, or no row was written.
        """
        missing = [key for key in REQUIRED_META if key not in meta]
        if missing:
            raise ValueError(f"meta lacks {', '.join(missing)}")
        number = self._close_columns()
        files = {kind: column.facts() for kind, column in self._columns.items()}
        if self._captions:
            files[CAPTIONS] = self._write_captions()
        write_json(self._partial / f"part-{self._rank:05d}.json", {"n": number, "files": files})
        self._barrier()
        if self._rank == 0:
            self._commit(meta)
        self._barrier()
        return self.folder

    def _close_columns(self) -> int:
        for column in self._columns.values():
            column.close()
        return next((column.rows for column in self._columns.values()), 0)

    def _check_rows(self, rows: dict[str, np.ndarray], captions: Sequence[str] | None) -> None:
        """Raise ValueError unless all kinds have one length and all views, and are the kinds of the first rows."""
        number = len(rows["labels"])
        for kind, values in rows.items():
            if len(values) != number or (kind != "labels" and values.shape[1] != len(self._views)):
                raise ValueError(f"{kind} {values.shape}: expected {number} rows of {len(self._views)} views")
        if captions is not None and len(captions) != number:
            raise ValueError(f"{len(captions)} captions for {number} rows: give one for each")
        kinds = sorted([*rows, *([] if captions is None else [CAPTIONS])])
        if self._kinds and self._kinds != kinds:
            raise ValueError(f"rows hold {kinds}, earlier ones {self._kinds}; append the same kinds")
        self._kinds = kinds

    def _write_captions(self) -> dict[str, Any]:
        """Write this process's texts, and tell of their file what is told of arrays."""
        path = self._partial / self._file_name(CAPTIONS, "json")
        write_json(path, self._captions)
        return {"file": path.name, "bytes": path.stat().st_size, "sha256": sha256(path)}

    def _file_name(self, kind: str, suffix: str = "npy") -> str:
        return f"{kind}-{self._rank:05d}-of-{self._world:05d}.{suffix}"

    def _narrow_codes(self, codes: np.ndarray) -> np.ndarray:
        if self._vocab_size is None:
            raise ValueError("vocab_size=None announces a folder without codes, but codes came; give vocab_size")
        if codes.size and not 0 <= codes.min() <= codes.max() < self._vocab_size:
            raise ValueError(f"codes from {codes.min()} to {codes.max()} do not fit vocab_size={self._vocab_size}")
        return codes.astype(np.uint16 if self._vocab_size <= 65536 else np.int32)

    def _commit(self, meta: dict[str, Any]) -> None:
        """Joins the parts' facts, writes meta.json and puts the folder in its place."""
        lists = [self._partial / f"part-{rank:05d}.json" for rank in range(self._world)]
        parts = [json.loads(path.read_text()) for path in lists]
        parts = [part for part in parts if part["n"]]
        number = sum(part["n"] for part in parts)
        if number == 0:
            raise ValueError(f"{self.folder}: not one row was written; are there readable images?")
        added = {"views": list(self._views), "n": number, "parts": parts, "complete": True}
        write_json(self._partial / "meta.json", {**meta, **added})
        for path in lists:
            path.unlink()
        old = self.folder.with_name(f"{self.folder.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if self.folder.exists():
            self.folder.rename(old)
        self._partial.rename(self.folder)
        shutil.rmtree(old, ignore_errors=True)


class Shards:
    """The rows of a complete folder, by index; read from the memory-mapped files. Made by `open_shards`."""

    def __init__(self, folder: Path, meta: dict[str, Any]) -> None:
        self.folder, self.meta = folder, meta
        self.views: tuple[str, ...] = tuple(meta["views"])
        self._ends = np.cumsum([part["n"] for part in meta["parts"]])
        self._columns = {
            kind: [np.load(folder / part["files"][kind]["file"], mmap_mode="r") for part in meta["parts"]]
            for kind in meta["parts"][0]["files"]
            if kind != CAPTIONS
        }
        self.labels: np.ndarray = np.concatenate(self._columns.pop("labels"))

    def __len__(self) -> int:
        return len(self.labels)

    def identity(self) -> dict[str, Any]:
        """What these codes are, however many processes wrote them; JSON-ready."""
        return {key: value for key, value in self.meta.items() if key not in ("parts", "complete")}

    @cached_property
    def captions(self) -> list[str] | None:
        """The texts of all rows, in each of which every line is an alternative; None if none were written."""
        parts = [part["files"].get(CAPTIONS) for part in self.meta["parts"]]
        if None in parts:
            return None
        texts = (json.loads((self.folder / facts["file"]).read_text(encoding="utf-8")) for facts in parts)
        return [text for part in texts for text in part]

    def load(self, indices: np.ndarray, draws: np.ndarray | None = None) -> dict[str, Tensor]:
        """{"codes": int64 [B, T], "latents": float32 [B, C, h, w], "labels": int64 [B]}, what was written of it.

        Where the smaller images were encoded too there is "smaller", as "latents"; where there are captions, "rows"
        int64 [B] says which of them belong to the batch. draws[:, 0] in [0, 1) picks the view of each row; None takes
        view 0.
        """
        indices = np.asarray(indices)
        views = np.zeros(len(indices), np.int64) if draws is None else (draws[:, 0] * len(self.views)).astype(np.int64)
        batch = {"labels": torch.from_numpy(self.labels[indices])}
        for kind, dtype in (("codes", np.int64), ("latents", np.float32), ("smaller", np.float32)):
            if kind in self._columns:
                batch[kind] = torch.from_numpy(self._gather(kind, indices, views).astype(dtype))
        if CAPTIONS in self.meta["parts"][0]["files"]:
            batch["rows"] = torch.from_numpy(indices.astype(np.int64))
        return batch

    def histogram(self) -> np.ndarray:
        """How often each code occurs over all rows and views: int64 [vocab_size].

        Raises:
            ValueError: the folder holds latents only.
        """
        if "codes" not in self._columns:
            raise ValueError(f"{self.folder}: holds no codes, only {', '.join(self._columns)}; {REMEDY} with codes")
        counts = np.zeros(self.meta["vocab_size"], np.int64)
        for part in self._columns["codes"]:
            for first in range(0, len(part), 4096):
                counts += np.bincount(part[first : first + 4096].ravel(), minlength=len(counts))
        return counts

    def unigram_entropy(self) -> float:
        """Nats per token of a model that knows only how frequent each code is."""
        counts = self.histogram()
        shares = counts[counts > 0] / counts.sum()
        return float(-(shares * np.log(shares)).sum())

    def _gather(self, kind: str, indices: np.ndarray, views: np.ndarray) -> np.ndarray:
        parts = self._columns[kind]
        rows = np.empty((len(indices), *parts[0].shape[2:]), parts[0].dtype)
        owner = np.searchsorted(self._ends, indices, side="right")
        for number, part in enumerate(parts):
            mine = np.flatnonzero(owner == number)
            first = int(self._ends[number]) - len(part)
            rows[mine] = part[indices[mine] - first, views[mine]]
        return rows


def open_shards(folder: Path | str, *, fingerprint: str | None = None, verify: bool = False) -> Shards:
    """The codes and latents in `folder`, made by the tokenizer with `fingerprint`; `verify` also checks every sha256.

    Raises:
        ValueError: the folder is missing, incomplete, cut, altered, or was made by another tokenizer.
    """
    folder = Path(folder)
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder}: no complete codes or latents here (meta.json: {error}); {REMEDY}") from error
    if not meta.get("complete"):
        raise ValueError(f"{folder}: incomplete; {REMEDY}")
    if fingerprint is not None and meta["tokenizer_fingerprint"] != fingerprint:
        made = f"made by tokenizer {meta['tokenizer_fingerprint']}, but {fingerprint} is wanted"
        raise ValueError(f"{folder}: {made}; {REMEDY}, or use the tokenizer that made it")
    for facts in (facts for part in meta["parts"] for facts in part["files"].values()):
        path = folder / facts["file"]
        size = path.stat().st_size if path.is_file() else 0
        if size != facts["bytes"]:
            raise ValueError(f"{path}: {size} bytes instead of {facts['bytes']}; {REMEDY}")
        if verify and sha256(path) != facts["sha256"]:
            raise ValueError(f"{path}: altered, its sha256 differs from meta.json; {REMEDY}")
    return Shards(folder, meta)


def _narrow_latents(latents: np.ndarray) -> np.ndarray:
    # Overflow to infinity is caught below, so numpy need not warn.
    with np.errstate(over="ignore"):
        narrow = latents.astype(np.float16)
    if not np.isfinite(narrow).all():
        raise ValueError(f"latents reach {np.abs(latents).max()}, which float16 cannot hold; are they normalised?")
    return narrow
