"""A small tokenizer and a small set of coloured squares, in memory."""

import numpy as np
import pytest
import torch
from PIL import Image

from engine.images import ImageSet, Listing
from tokenizer.config import TokenizerModelConfig, TowerConfig
from tokenizer.model import Tokenizer

TOWER = TowerConfig(blocks=2, width=32, heads=2, mlp=64)
MODEL = TokenizerModelConfig(patch_size=4, vocab_size=32, code_dim=4, encoder=TOWER, decoder=TOWER)


@pytest.fixture
def model_config() -> TokenizerModelConfig:
    return MODEL


@pytest.fixture
def tokenizer() -> Tokenizer:
    torch.manual_seed(0)
    return Tokenizer(MODEL, image_size=16).eval()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randint(0, 256, (6, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def squares() -> ImageSet:
    """50 images of one coloured square each, 16 x 16."""
    return square_set(50)


def square_set(num: int, *, split: str = "train", size: int = 16) -> ImageSet:
    listing = Listing(
        labels=np.arange(num, dtype=np.int64) % 3,
        class_names=("a", "b", "c"),
        read=lambda index: square(index, size),
        name=str,
        digest=f"squares-{num}",
    )
    return ImageSet(listing, size=size, split=split, origin={"source": "squares"})


def square(index: int, size: int) -> Image.Image:
    random = np.random.default_rng(index)
    pixels = np.full((size, size, 3), random.integers(0, 256, 3), np.uint8)
    top, left = random.integers(0, size // 2, 2)
    pixels[top : top + size // 2, left : left + size // 2] = random.integers(0, 256, 3)
    return Image.fromarray(pixels)
