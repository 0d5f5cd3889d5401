"""A .npy file that grows by rows, for writers that do not know how many will come."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from engine.checkpoint import sha256


class GrowingArray:
    """A .npy file whose first axis grows by appending; numpy pads headers so that the final length fits in place."""

    def __init__(self, path: Path, example: np.ndarray) -> None:
        self.path, self.rows = path, 0
        self._dtype, self._shape = example.dtype, example.shape[1:]
        self._file: BinaryIO = path.open("wb+")
        self._write_header()
        self._start = self._file.tell()

    def append(self, values: np.ndarray) -> None:
        if values.shape[1:] != self._shape:
            raise ValueError(f"{self.path.name}: rows of shape {values.shape[1:]} after rows of {self._shape}")
        self._file.write(np.ascontiguousarray(values, self._dtype).tobytes())
        self.rows += len(values)

    def close(self) -> None:
        if self._file.closed:
            return
        self._file.seek(0)
        self._write_header()
        assert self._file.tell() == self._start, "the header grew over the first rows"
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def facts(self) -> dict[str, Any]:
        facts = {"file": self.path.name, "dtype": str(self._dtype), "shape": [self.rows, *self._shape]}
        return {**facts, "bytes": self.path.stat().st_size, "sha256": sha256(self.path)}

    def _write_header(self) -> None:
        description = np.lib.format.dtype_to_descr(self._dtype)
        header = {"descr": description, "fortran_order": False, "shape": (self.rows, *self._shape)}
        np.lib.format.write_array_header_1_0(self._file, header)
