"""Reconstructions in order, and the picture of pairs."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from engine.images import ImageSet
from tokenizer.model import Tokenizer
from tokenizer.reconstruct import reconstruct, save_reconstructions, side_by_side


def test_every_image_is_reconstructed_once_in_order(tokenizer: Tokenizer, squares: ImageSet) -> None:
    batches = list(reconstruct(tokenizer, squares, batch_size=16))
    assert [len(batch.originals) for batch in batches] == [16, 16, 16, 2]
    originals = torch.cat([batch.originals for batch in batches])
    assert torch.equal(originals, squares.load(np.arange(50))["images"])
    for batch in batches:
        assert torch.equal(batch.codes, tokenizer.encode(batch.originals))
        assert torch.equal(batch.reconstructions, tokenizer.decode(batch.codes))


def test_pairs_take_turns(tokenizer: Tokenizer, squares: ImageSet) -> None:
    batch = next(reconstruct(tokenizer, squares, start=3, stop=5))
    pairs = side_by_side(batch)
    assert torch.equal(pairs[0::2], batch.originals) and torch.equal(pairs[1::2], batch.reconstructions)


def test_the_grid_is_a_picture_of_pairs(tokenizer: Tokenizer, squares: ImageSet, tmp_path: Path) -> None:
    save_reconstructions(tokenizer, squares, tmp_path / "grid.png", num=6, columns=3)
    with Image.open(tmp_path / "grid.png") as picture:
        assert picture.width > 2 * picture.height  # 2 rows of 3 pairs
