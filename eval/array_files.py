"""Images in one array: ADM's .npz of samples (Dhariwal and Nichol 2021, code) and plain .npy. Nothing is unpickled."""

from __future__ import annotations

import math
import tokenize
import zipfile
from pathlib import Path
from typing import IO, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from engine.checkpoint import write_atomic
from eval.pictures import Pictures
from eval.zip_members import Member, data_offset, list_members, opened

CHUNK_BYTES = 1 << 24
BAD_HEADER = (ValueError, TypeError, KeyError, SyntaxError, tokenize.TokenError)
"""What numpy raises on broken headers."""


class ImageArray(NamedTuple):
    """Pixels uint8 [N, H, W, 3], mapped from the file unless it is packed, and labels int64 [N] if it has any."""

    pixels: np.ndarray
    labels: np.ndarray | None


class Header(NamedTuple):
    """What a .npy says of itself."""

    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype

    @property
    def order(self) -> Literal["C", "F"]:
        return "F" if self.fortran else "C"


def open_npy(path: Path) -> ImageArray:
    """A .npy of uint8 [N, H, W, 3] or [N, 3, H, W].

    Raises:
        ValueError: cut, or not such an array.
    """
    return ImageArray(_channels_last(_mapped(path, 0, path.stat().st_size, str(path))), None)


def open_npz(path: Path) -> ImageArray:
    """`arr_0` and, if it is there, `arr_1` (labels) of an .npz. A packed `arr_0` is read whole, into memory.

    Raises:
        ValueError: not a whole .npz, no `arr_0`, or one that is no array of images; labels that do not fit it.
    """
    members = npz_members(path)
    if "arr_0" not in members:
        stated = " (a reference, it seems: give it as --reference)" if {"mu", "sigma"} <= set(members) else ""
        keys = ", ".join(members) or "nothing"
        raise ValueError(f"{path}: has {keys}{stated}, but no images; they must be its arr_0, uint8 [N, H, W, 3]")
    stored, where = members["arr_0"], f"{path}: arr_0"
    if stored.method == zipfile.ZIP_STORED:
        pixels = _mapped(path, data_offset(path, stored), stored.size, where)
    else:
        pixels = _unpacked(path, stored, where)
    pixels = _channels_last(pixels)
    return ImageArray(pixels, _labels(path, members, len(pixels)))


def npz_members(path: Path) -> dict[str, Member]:
    """The arrays of an .npz by key.

    Raises:
        ValueError: not a whole .npz.
    """
    return {member.name.removesuffix(".npy"): member for member in list_members(path)}


def save_adm(path: str | Path, pictures: Pictures, labels: Tensor | None = None) -> None:
    """Write `arr_0` uint8 [N, H, W, 3] and, where all classes are known, `arr_1` int64 [N], as ADM's evaluator reads.

    Unpacked, a few images in memory at a time, and never half a file. `labels` stands for `pictures.labels`.

    Raises:
        ValueError: no image, another suffix than .npz, or a number of labels that differs.
        OSError: the disk is full or not writable.
    """
    path, labels = Path(path), pictures.labels if labels is None else labels
    if path.suffix != ".npz":
        raise ValueError(f"{path}: the file must end in .npz; rename it")
    if not pictures.count:
        raise ValueError(f"{pictures.name}: there is no image to write to {path}; give another set")
    if labels is not None and labels.shape != (pictures.count,):
        raise ValueError(f"{tuple(labels.shape)} labels for {pictures.count} images of {pictures.name}; give as many")

    def write(draft: Path) -> None:
        with zipfile.ZipFile(draft, "w", zipfile.ZIP_STORED) as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as stream:
                _write_pixels(stream, pictures)
            if labels is not None and int(labels.min()) >= 0:
                with archive.open("arr_1.npy", "w") as stream:
                    np.lib.format.write_array(stream, labels.cpu().numpy().astype(np.int64), allow_pickle=False)

    write_atomic(path, write)


def _write_pixels(stream: IO[bytes], pictures: Pictures) -> None:
    """A .npy of all images, a few at a time."""
    height, width = pictures.load(0, 1).shape[-2:]
    shape = (pictures.count, height, width, 3)
    np.lib.format.write_array_header_1_0(stream, {"descr": "|u1", "fortran_order": False, "shape": shape})
    for images in pictures.batches(max(1, CHUNK_BYTES // (3 * height * width))):
        stream.write(images.permute(0, 2, 3, 1).contiguous().numpy().data)  # [B, H, W, 3]


def _mapped(path: Path, offset: int, size: int, where: str) -> np.ndarray:
    """The .npy of `size` bytes that begins at a byte of a file, read page by page when it is touched."""
    with open(path, "rb") as stream:
        stream.seek(offset)
        header, start = _header(stream, where), stream.tell()
    _check_length(header, offset + size - start, where)
    return np.memmap(path, np.uint8, "r", start, header.shape, header.order)


def _unpacked(path: Path, member: Member, where: str) -> np.ndarray:
    """A packed array, unpacked piece by piece into the memory that it will have."""
    with opened(path) as archive, archive.open(member.name) as stream:
        header, start = _header(stream, where), stream.tell()
        _check_length(header, member.size - start, where)
        flat, filled = np.empty(member.size - start, np.uint8), 0
        while piece := stream.read(CHUNK_BYTES):  # never more bytes than the directory of the zip promises
            flat[filled : filled + len(piece)] = np.frombuffer(piece, np.uint8)
            filled += len(piece)
    if filled < len(flat):
        raise ValueError(f"{where}: cut after {filled} of {len(flat)} bytes; write it again")
    return flat.reshape(header.shape, order=header.order)


def _check_length(header: Header, there: int, where: str) -> None:
    """Raise ValueError unless just the promised pixels are there."""
    wanted = math.prod(header.shape)
    if there != wanted:
        raise ValueError(f"{where}: {header.shape} takes {wanted} bytes, but {there} are there; write it again")


def _header(stream: IO[bytes], where: str) -> Header:
    """Shape, order and type of a .npy of images; the stream stands at the pixels afterwards."""
    try:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        header = Header(*read(stream))
    except BAD_HEADER as error:
        raise ValueError(f"{where}: not a whole .npy ({error}); write it again") from error
    if header.dtype.hasobject:
        raise ValueError(f"{where}: holds Python objects, which are never unpickled; save uint8 [N, H, W, 3]")
    if header.dtype != np.uint8:
        raise ValueError(f"{where}: holds {header.dtype}, not uint8; round the pixels to 0..255 and save them so")
    if len(header.shape) != 4 or 3 not in (header.shape[3], header.shape[1]) or not all(header.shape[1:]):
        raise ValueError(f"{where}: has shape {header.shape}; images must be [N, H, W, 3] or [N, 3, H, W]")
    if not header.shape[0]:
        raise ValueError(f"{where}: holds no image; give another file")
    return header


def _channels_last(pixels: np.ndarray) -> np.ndarray:
    return pixels if pixels.shape[3] == 3 else pixels.transpose(0, 2, 3, 1)


def _labels(path: Path, members: dict[str, Member], count: int) -> np.ndarray | None:
    if "arr_1" not in members:
        return None
    with opened(path) as archive, archive.open(members["arr_1"].name) as stream:
        try:
            labels = np.lib.format.read_array(stream, allow_pickle=False)
        except BAD_HEADER as error:
            raise ValueError(f"{path}: arr_1 cannot be read ({error}); save integer labels [N]") from error
    if labels.shape != (count,) or labels.dtype.kind not in "iu":
        found = f"{labels.dtype} {labels.shape}"
        raise ValueError(f"{path}: arr_1 is {found}, but the labels of {count} images must be integers [{count}]")
    return np.maximum(labels.astype(np.int64), -1)


def to_tensor(pixels: np.ndarray) -> Tensor:
    """A copy of pixels [B, H, W, 3] as uint8 [B, 3, H, W]."""
    return torch.from_numpy(np.array(pixels.transpose(0, 3, 1, 2), order="C"))
