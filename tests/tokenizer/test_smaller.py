"""The smaller version of an image: means of blocks, then a smooth enlargement, the same to the bit wherever made."""

import numpy as np
import pytest
import torch
from PIL import Image

from tokenizer.smaller import check_factor, enlarge, shrink, smaller_version


def noise(number: int = 3, size: int = 16) -> torch.Tensor:
    return torch.randint(0, 256, (number, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_a_shrunk_pixel_is_the_mean_of_its_block_and_halves_round_up() -> None:
    block = torch.tensor([[0, 1], [0, 1]], dtype=torch.uint8)  # mean 0.5
    other = torch.tensor([[10, 20], [30, 41]], dtype=torch.uint8)  # mean 25.25
    image = torch.cat([block, other], dim=1).expand(1, 3, 2, 4)  # [1, 3, 2, 4]
    assert shrink(image, 2).tolist() == [[[[1, 25]]] * 3]


@pytest.mark.parametrize("factor", [2, 4])
def test_shrinking_agrees_with_pillow(factor: int) -> None:
    for image, small in zip(noise(), shrink(noise(), factor), strict=True):
        theirs = Image.fromarray(image.permute(1, 2, 0).numpy()).reduce(factor)
        assert np.array_equal(small.permute(1, 2, 0).numpy(), np.asarray(theirs))


def test_enlarging_is_bicubic_at_the_centres_of_pixels() -> None:
    """Catmull-Rom's family with a = -0.75: weights of an offset of 1/4 pixel, by hand."""
    row = torch.tensor([10, 10, 50, 130, 130, 130, 130, 130], dtype=torch.uint8)
    made = enlarge(row.expand(1, 3, 8, 8), 16)[0, 0, 8]
    a, t = -0.75, 0.25

    def near(x: float) -> float:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1

    def far(x: float) -> float:
        return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a

    weights = [far(1 + t), near(t), near(1 - t), far(2 - t)]
    # Output pixel 5 lies at 2.25: between inputs 2 and 3, with 1 and 4 beside them.
    expected = sum(weight * value for weight, value in zip(weights, (10, 50, 130, 130), strict=True))
    assert int(made[5]) == int(expected + 0.5)


def test_enlarging_stays_in_range_and_keeps_flat_images() -> None:
    edges = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
    edges[..., 2:] = 255
    made = enlarge(edges, 16)
    assert made.dtype == torch.uint8 and int(made[..., :6].max()) == 0 and int(made[..., 10:].min()) == 255
    flat = torch.full((1, 3, 4, 4), 77, dtype=torch.uint8)
    assert torch.equal(smaller_version(flat, 2), flat)


def test_an_image_is_the_same_in_any_batch() -> None:
    images = noise(5, 32)
    whole = smaller_version(images, 4)
    assert whole.shape == images.shape
    assert all(torch.equal(smaller_version(image[None], 4)[0], made) for image, made in zip(images, whole, strict=True))


def test_a_factor_that_does_not_divide_the_size_is_refused() -> None:
    check_factor(28, 4)
    with pytest.raises(ValueError, match=r"low_resolution=3 must divide data\.size=28: use one of 2, 4, 7, 14, 28"):
        check_factor(28, 3)
