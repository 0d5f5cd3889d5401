"""Whatever bytes of a file are altered, it is read or refused with a sentence that names it: nothing else gets out."""

import random
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eval.image_files import open_pictures
from eval.reference_files import open_reference

PIXELS = np.random.default_rng(0).integers(0, 256, (3, 4, 5, 3), np.uint8)  # [N, H, W, 3]


def write_zip(path: Path, method: int) -> None:
    with zipfile.ZipFile(path, "w", method) as archive:
        for row, pixels in enumerate(PIXELS):
            with archive.open(f"{row}.png", "w") as stream:
                Image.fromarray(pixels).save(stream, "PNG")


WRITERS = {
    "a.npy": lambda path: np.save(path, PIXELS),
    "b.npz": lambda path: np.savez(path, PIXELS, np.arange(3)),
    "c.npz": lambda path: np.savez_compressed(path, PIXELS, np.arange(3)),
    "d.zip": lambda path: write_zip(path, zipfile.ZIP_STORED),
    "e.zip": lambda path: write_zip(path, zipfile.ZIP_DEFLATED),
    "reference.npz": lambda path: np.savez(path, mu=np.zeros(3), sigma=np.eye(3), n=9),
}


def read(path: Path) -> None:
    if path.name == "reference.npz":
        open_reference(path)
    else:
        pictures = open_pictures(path)
        pictures.load(0, pictures.count)


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_with_altered_bytes_is_read_or_refused(tmp_path: Path, name: str) -> None:
    path, draw = tmp_path / name, random.Random(0)
    WRITERS[name](path)
    whole, refusals = path.read_bytes(), []
    read(path)
    for _ in range(150):
        spoilt = bytearray(whole)
        start = draw.choice([0, 0, max(0, len(whole) - 200)])  # headers are at the beginning, directories at the end
        for _ in range(draw.choice([1, 1, 3])):
            spoilt[draw.randrange(start, min(start + 200, len(whole)))] = draw.randrange(256)
        path.write_bytes(spoilt[: draw.choice([len(whole), len(whole), draw.randrange(len(whole))])])
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                read(path)
        except ValueError as error:
            refusals.append(str(error))
    assert len(refusals) > 50 and all(name in refusal for refusal in refusals)
