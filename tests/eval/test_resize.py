import numpy as np
import pytest
import torch
from PIL import Image

from eval.resize import RULES, resized

SIZES = [(32, 32, 299), (64, 48, 299), (33, 70, 56), (400, 310, 299), (120, 130, 37), (2, 1, 5)]


def images(height: int, width: int) -> torch.Tensor:
    draws = torch.Generator().manual_seed(height)
    return torch.randint(0, 256, (2, 3, height, width), dtype=torch.uint8, generator=draws)


@pytest.mark.parametrize(("height", "width", "size"), SIZES)
def test_tf1_is_torch_fidelitys_rule_bit_for_bit(height: int, width: int, size: int) -> None:
    peer = pytest.importorskip("torch_fidelity.interpolate_compat_tensorflow")
    x = images(height, width)
    expected = peer.interpolate_bilinear_2d_like_tensorflow1x(x.float(), size=(size, size), align_corners=False)
    assert torch.equal(resized(x, size, "tf1"), expected)


def test_tf1_by_hand() -> None:
    ramp = torch.tensor([0.0, 8.0]).expand(1, 3, 2, 2)
    assert resized(ramp, 4, "tf1")[0, 0].tolist() == [[0, 4, 8, 8]] * 4  # sources 0, 0.5, 1 and 1.5, past the last
    assert resized(torch.arange(16.0).expand(1, 3, 4, 16), 4, "tf1")[0, 0, 0].tolist() == [0, 4, 8, 12]


@pytest.mark.parametrize(
    ("rule", "pillows"), [("clean", Image.Resampling.BICUBIC), ("antialias", Image.Resampling.BILINEAR)]
)
@pytest.mark.parametrize(("height", "width", "size"), SIZES)
def test_the_antialiased_rules_are_pillows_on_floats(
    rule: str, pillows: int, height: int, width: int, size: int
) -> None:
    x = images(height, width)
    channels = [Image.fromarray(channel.float().numpy()).resize((size, size), pillows) for channel in x.flatten(0, 1)]
    expected = torch.from_numpy(np.stack(channels)).view(2, 3, size, size)
    torch.testing.assert_close(resized(x, size, rule), expected, rtol=0, atol=0.02)  # of 255


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_keeps_images_of_the_size_and_plain_ones(rule: str) -> None:
    x = images(24, 24)
    assert torch.equal(resized(x, 24, rule), x.float())
    plain = torch.full((1, 3, 24, 20), 201, dtype=torch.uint8)
    torch.testing.assert_close(resized(plain, 31, rule), torch.full((1, 3, 31, 31), 201.0))
    alone, together = resized(x[:1], 17, rule), resized(x, 17, rule)
    assert torch.equal(alone, together[:1])


def test_rules_differ_where_they_shrink() -> None:
    """A chequerboard: what lies between is skipped by tf1 alone."""
    board = (torch.arange(64)[:, None] + torch.arange(64)) % 2 * 255
    small = {rule: resized(board.float().expand(1, 3, 64, 64), 16, rule) for rule in RULES}
    assert small["tf1"].max() == 0
    for rule in ("clean", "antialias"):
        torch.testing.assert_close(small[rule], torch.full((1, 3, 16, 16), 127.5), rtol=0, atol=12)
