"""DiT: identity at the start, published sizes, gradients everywhere, and clear refusals."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from generator.config import DENOISER_PRESETS
from generator.denoiser import DiT, sincos_positions

SHAPE = (3, 4, 6)


def tiny(patch_size: int = 2, out_channels: int | None = None) -> DiT:
    torch.manual_seed(0)
    return DiT(SHAPE, depth=2, width=32, heads=4, patch_size=patch_size, num_classes=5, out_channels=out_channels)


def batch(size: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(size, *SHAPE, generator=generator)
    return x, torch.linspace(-9, 9, size), torch.arange(size) % 6


def trained(network: DiT, steps: int = 3) -> DiT:
    """The network after a few steps, so that nothing is zero any more."""
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    x, logsnr, labels = batch(6)
    for _ in range(steps):
        optimizer.zero_grad()
        (network(x, logsnr, labels) - x).square().mean().backward()
        optimizer.step()
    return network


@pytest.mark.parametrize(("size", "millions"), [("S", 32.96), ("B", 130.51), ("L", 458.10), ("XL", 675.13)])
def test_published_parameter_counts(size: str, millions: float) -> None:
    depth, width, heads = DENOISER_PRESETS[size]
    with torch.device("meta"):
        network = DiT(
            (4, 32, 32), depth=depth, width=width, heads=heads, patch_size=2, num_classes=1000, out_channels=8
        )
    # DiT counts the fixed positions among its parameters.
    count = sum(parameter.numel() for parameter in network.parameters()) + network.positions.numel()
    assert count / 1e6 == pytest.approx(millions, abs=0.005)


def test_a_new_network_is_the_identity_and_predicts_zero() -> None:
    network = tiny()
    x, logsnr, labels = batch()
    tokens, condition = network.embed(x, logsnr, labels)
    for block in network.blocks:
        torch.testing.assert_close(block(tokens, condition), tokens, rtol=0, atol=0)
    assert not network(x, logsnr, labels).any()


@pytest.mark.parametrize("patch_size", [1, 2])
@pytest.mark.parametrize("out_channels", [None, 6])
def test_shapes(patch_size: int, out_channels: int | None) -> None:
    network = tiny(patch_size, out_channels)
    assert network(*batch()).shape == (4, out_channels or 3, 4, 6)
    assert network.activations(*batch(), depth=1).shape == (4, 24 // patch_size**2, 32)


def test_patches_return_to_their_place() -> None:
    network = tiny()
    squares = torch.arange(6.0)[None, :, None].expand(1, 6, 3 * 4)  # token number, in all channels and pixels
    image = network.unpatchify(squares)
    assert image.shape == (1, 3, 4, 6)
    torch.testing.assert_close(image[0, 2, ::2, ::2], torch.arange(6.0).reshape(2, 3))
    torch.testing.assert_close(image[0, 0, 1::2, 1::2], torch.arange(6.0).reshape(2, 3))


def test_gradient_reaches_every_parameter_once_the_gates_are_open() -> None:
    network = trained(tiny(), steps=2)  # the first step opens the output, the second the gates
    network.zero_grad()
    x, logsnr, labels = batch(6)
    (network(x, logsnr, labels) - x).square().mean().backward()
    silent = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []


def test_the_prediction_depends_on_noise_level_label_and_place() -> None:
    network = trained(tiny()).eval()
    x, logsnr, labels = batch()
    answer = network(x, logsnr, labels)
    assert not torch.allclose(answer, network(x, logsnr + 1, labels))
    assert not torch.allclose(answer, network(x, logsnr, (labels + 1) % 6))
    rolled = network(x.roll(2, dims=-1), logsnr, labels).roll(-2, dims=-1)
    assert not torch.allclose(answer, rolled, atol=1e-4)


def test_rows_of_a_batch_do_not_meet() -> None:
    network = trained(tiny()).eval()
    x, logsnr, labels = batch()
    torch.testing.assert_close(network(x, logsnr, labels)[2:3], network(x[2:3], logsnr[2:3], labels[2:3]))


def test_activations_lead_to_the_output() -> None:
    network = trained(tiny())
    _, condition = network.embed(*batch())
    tokens = network.activations(*batch(), depth=len(network.blocks))
    torch.testing.assert_close(network.unpatchify(network.output(tokens, condition)), network(*batch()))
    torch.testing.assert_close(network.activations(*batch(), depth=0), network.embed(*batch())[0])


def test_bf16_autocast_stays_close() -> None:
    network = trained(tiny())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = network(*batch())
    torch.testing.assert_close(half.float(), network(*batch()), rtol=0.1, atol=0.1)


def test_positions_differ_and_factorise() -> None:
    positions = sincos_positions(32, (4, 6))
    assert positions.shape == (24, 32)
    assert len(positions.unique(dim=0)) == 24
    grid = positions.reshape(4, 6, 32)
    torch.testing.assert_close(grid[:, 0, :16], grid[:, 5, :16])  # the first half tells the row alone
    torch.testing.assert_close(grid[0, :, 16:], grid[3, :, 16:])
    torch.testing.assert_close(grid[2, 0, 0], torch.tensor(math.sin(2.0)))


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"latents of shape \[4, 2, 4, 6\] do not fit .* \[B, 3, 4, 6\]"):
        tiny()(torch.zeros(4, 2, 4, 6), torch.zeros(4), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"patch_size=4 must divide the latents' 4 x 6"):
        tiny(patch_size=4)
    with pytest.raises(ValueError, match=r"width=34 must be a multiple of 4"):
        DiT(SHAPE, depth=1, width=34, heads=2)
