"""Reconstruction errors in closed form."""

import math

import pytest
import torch

from tokenizer.losses import l1, l2, psnr


def test_l2_and_l1_of_a_constant_difference() -> None:
    images = torch.full((2, 3, 4, 4), 0.25)
    target = torch.full((2, 3, 4, 4), -0.25)
    assert l2(images, target).item() == pytest.approx(0.25)
    assert l1(images, target).item() == pytest.approx(0.5)


def test_errors_are_computed_in_float32() -> None:
    images = torch.zeros(1, 3, 4, 4, dtype=torch.bfloat16)
    assert l2(images, images).dtype == l1(images, images).dtype == torch.float32


def test_psnr_of_a_constant_difference_per_image() -> None:
    images = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    other = images.clone()
    other[0], other[1] = 255, 1
    assert psnr(images, other).tolist() == pytest.approx([0.0, 20 * math.log10(255)])
    assert psnr(images, images).tolist() == [100, 100]
