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
def tokenizer() -> Tokenizer:
    torch.manual_seed(0)
    return Tokenizer(MODEL, image_size=16).eval()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randint(0, 256, (6, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def squares() -> ImageSet:
    """50 images of one coloured square each, 16 x 16."""
    labels = np.arange(50, dtype=np.int64) % 3
    listing = Listing(labels=labels, class_names=("a", "b", "c"), read=square, name=str, digest="squares")
    return ImageSet(listing, size=16, split="train", origin={"source": "squares"})


def square(index: int) -> Image.Image:
    random = np.random.default_rng(index)
    pixels = np.full((16, 16, 3), random.integers(0, 256, 3), np.uint8)
    top, left = random.integers(0, 8, 2)
    pixels[top : top + 8, left : left + 8] = random.integers(0, 256, 3)
    return Image.fromarray(pixels)
