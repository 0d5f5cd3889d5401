"""Images of which only the first codes stand."""

import pytest
import torch

from generator.partial import GREY, paint_partial
from tokenizer.config import QuantizerConfig, TokenizerModelConfig, TowerConfig
from tokenizer.model import Tokenizer

TOWER = TowerConfig(blocks=1, width=16, heads=2, mlp=32)


def build(depth: int = 1) -> Tokenizer:
    torch.manual_seed(0)
    model = TokenizerModelConfig(patch_size=4, vocab_size=8, code_dim=4, encoder=TOWER, decoder=TOWER)
    quantizer = QuantizerConfig(kind="residual", depth=depth) if depth > 1 else QuantizerConfig()
    return Tokenizer(model, quantizer, image_size=16).eval()


def grey_cells(images: torch.Tensor) -> list[bool]:
    """Which cells of a 4 x 4 grid are all grey, in raster order."""
    patches = images.unflatten(3, (4, 4)).unflatten(2, (4, 4))  # [B, 3, row, y, column, x]
    return (patches == GREY).all(dim=(0, 1, 3, 5)).flatten().tolist()


@pytest.mark.parametrize("done", [0, 1, 5, 15, 16])
def test_cells_beyond_the_codes_are_grey(done: int) -> None:
    tokenizer, codes = build(), torch.randint(8, (3, 16))
    images = paint_partial(tokenizer, codes, done)
    assert images.shape == (3, 3, 16, 16) and images.dtype == torch.uint8
    assert grey_cells(images) == [cell >= done for cell in range(16)]


def test_what_stands_does_not_depend_on_what_comes_later() -> None:
    tokenizer, codes = build(), torch.randint(8, (2, 16))
    later = codes.clone()
    later[:, 6:] = -1  # no codes at all
    assert torch.equal(paint_partial(tokenizer, codes, 6), paint_partial(tokenizer, later, 6))
    assert (later[:, 6:] == -1).all()
    assert torch.equal(paint_partial(tokenizer, codes, 16), tokenizer.decode(codes))


def test_a_cell_stands_when_all_its_codes_do() -> None:
    tokenizer, codes = build(depth=3), torch.randint(8, (1, 48))
    for done, cells in ((2, 0), (3, 1), (13, 4), (48, 16)):
        assert grey_cells(paint_partial(tokenizer, codes, done)) == [cell >= cells for cell in range(16)]


@pytest.mark.parametrize("done", [-1, 17])
def test_more_codes_than_there_are_are_refused(done: int) -> None:
    with pytest.raises(ValueError, match=rf"done={done} must lie in 0 \.\. 16"):
        paint_partial(build(), torch.zeros(1, 16, dtype=torch.int64), done)
