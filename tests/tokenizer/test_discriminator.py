"""Discriminators: sizes, the parts they are made of against arithmetic by hand, and gradients of gradients."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizer.config import DiscriminatorConfig
from tokenizer.discriminator import (
    EqualConv,
    EqualLinear,
    PatchDiscriminator,
    blurred,
    build_discriminator,
    group_size,
    minibatch_deviation,
)
from tokenizer.losses import gradient_penalty


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def small(kind: str, size: int = 16, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    config = DiscriminatorConfig(kind=kind, channels=8, channel_base=128, patch_channels=8, patch_layers=2)
    return build_discriminator(config, size)


KINDS = ("stylegan2", "patchgan")


@pytest.mark.parametrize("size", [8, 16, 64])
def test_stylegan2_gives_one_logit_per_image(size: int) -> None:
    assert small("stylegan2", size)(noise(2, 3, size, size)).shape == (2, 1)


@pytest.mark.parametrize(("size", "layers", "side"), [(16, 1, 6), (16, 2, 2), (24, 3, 1), (64, 3, 6), (256, 3, 30)])
def test_patchgan_gives_a_logit_per_patch(size: int, layers: int, side: int) -> None:
    network = build_discriminator(DiscriminatorConfig(kind="patchgan", patch_channels=8, patch_layers=layers), size)
    assert network(noise(2, 3, size, size)).shape == (2, 1, side, side)


def test_patchgan_sees_patches_of_the_size_that_its_layers_say() -> None:
    network = PatchDiscriminator(channels=4, layers=3)
    network.features = nn.Sequential(*(layer for layer in network.features if not isinstance(layer, nn.GroupNorm)))
    images = noise(1, 3, 128, 128).requires_grad_()
    network(images)[0, 0, 7, 7].backward()
    touched = images.grad[0, 0].abs().sum(dim=0).nonzero().flatten()
    assert int(touched[-1] - touched[0]) + 1 == 70  # pix2pix's 70 x 70 PatchGAN


def test_the_published_size_has_28_864_129_parameters() -> None:
    with torch.device("meta"):
        network = build_discriminator(DiscriminatorConfig(channels=512, channel_base=32768), 256)
    assert sum(parameter.numel() for parameter in network.parameters()) == 28_864_129


@pytest.mark.parametrize("size", [4, 24, 100])
def test_stylegan2_refuses_sizes_that_do_not_halve_down_to_4(size: int) -> None:
    with pytest.raises(ValueError, match=rf"data\.size={size} must be a power of two.*kind=patchgan"):
        small("stylegan2", size)


def test_patchgan_refuses_small_images() -> None:
    config = DiscriminatorConfig(kind="patchgan", patch_channels=8, patch_layers=3)
    with pytest.raises(ValueError, match=r"at least 24 pixels, but data\.size=16: use discriminator\.patch_layers=2"):
        build_discriminator(config, 16)
    with pytest.raises(ValueError, match="use larger images"):
        build_discriminator(config, 4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_penalty_on_gradients_has_gradients_itself(kind: str) -> None:
    network = small(kind)
    gradient_penalty(network, noise(4, 3, 16, 16)).backward()
    gradients = {name: parameter.grad for name, parameter in network.named_parameters()}
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients.values())
    weights = [name for name in gradients if name.endswith("weight")]
    assert all(gradients[name].norm() > 0 for name in weights)


@pytest.mark.parametrize("kind", KINDS)
def test_the_penaltys_gradient_agrees_with_a_finite_difference(kind: str) -> None:
    network, images = small(kind), noise(4, 3, 16, 16)
    penalty = gradient_penalty(network, images)
    penalty.backward()
    weight = network.judge.weight
    slope = (weight.grad * weight).sum().item()  # along the weight itself, in which the penalty is quadratic
    assert slope == pytest.approx(2 * penalty.item(), rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_leaves_the_logits_in_float32(kind: str) -> None:
    network, images = small(kind), noise(4, 3, 16, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, penalty = network(images), gradient_penalty(network, images)
    penalty.backward()
    assert logits.dtype == penalty.dtype == torch.float32
    torch.testing.assert_close(logits, network(images), rtol=0.05, atol=0.05)
    torch.testing.assert_close(penalty, gradient_penalty(network, images), rtol=0.1, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_real_and_made_images_judged_together_are_judged_as_if_apart(kind: str) -> None:
    network, real, made = small(kind), noise(6, 3, 16, 16), noise(6, 3, 16, 16, seed=1) / 3
    together = network(torch.cat([real, made]), parts=2)
    torch.testing.assert_close(together, torch.cat([network(real), network(made)]))


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_kept_but_weights(kind: str) -> None:
    network = small(kind)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    network(noise(4, 3, 16, 16))
    assert before.keys() == dict(network.named_parameters()).keys()
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_an_images_patches_do_not_depend_on_the_others() -> None:
    network, images = small("patchgan"), noise(3, 3, 16, 16)
    torch.testing.assert_close(network(images)[:1], network(images[:1]))


def test_groups_are_as_large_as_fit_each_part() -> None:
    assert [group_size(batch, 1) for batch in (8, 6, 2, 5, 7, 1)] == [4, 3, 2, 1, 1, 1]
    assert [group_size(batch, 2) for batch in (16, 12, 4, 2)] == [4, 3, 2, 1]
    with pytest.raises(ValueError, match="no 2 equal parts"):
        group_size(5, 2)


def test_the_minibatch_deviation_in_closed_form() -> None:
    values = torch.tensor([1.0, 3.0, 10.0, 10.0])  # two groups of two: deviations 1 and 0
    x = values.view(4, 1, 1, 1).expand(4, 3, 2, 2)
    deviation = minibatch_deviation(x, group=2)
    assert deviation.shape == (4, 1, 2, 2)
    torch.testing.assert_close(deviation[:, 0, 0, 0], torch.tensor([1.0, 1.0, 0.0, 0.0]), atol=2e-4, rtol=0)
    assert minibatch_deviation(x, group=1).unique().tolist() == [0]


def test_the_deviation_is_averaged_over_channels_and_places() -> None:
    x = noise(8, 3, 4, 4)
    expected = torch.stack([part.std(dim=0, unbiased=False).mean() for part in x.split(4)])
    torch.testing.assert_close(minibatch_deviation(x, group=4)[::4, 0, 0, 0], expected)


def test_the_blur_agrees_with_arithmetic_by_hand() -> None:
    x, row = noise(1, 2, 6, 6), torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
    padded = F.pad(x, (2, 2, 2, 2))
    by_hand = torch.zeros(1, 2, 7, 7)
    for i in range(4):
        for j in range(4):
            by_hand += row[i] * row[j] * padded[..., i : i + 7, j : j + 7]
    kernel = row[:, None] * row
    torch.testing.assert_close(blurred(x, kernel, padding=2, stride=1), by_hand)
    torch.testing.assert_close(blurred(x, kernel, padding=1, stride=2), by_hand[..., 1:-1, 1:-1][..., ::2, ::2])


def test_both_ways_through_a_block_look_at_the_same_places() -> None:
    """A mirrored image gives mirrored features: neither way is shifted against the other by half a pixel."""
    block = small("stylegan2").blocks[0]
    for conv in (block.keep, block.down):
        conv.weight.data = (conv.weight + conv.weight.flip(3)) / 2
    x = noise(1, 8, 16, 16)
    torch.testing.assert_close(block(x.flip(3)), block(x).flip(3))


def test_the_learning_rate_is_equalised() -> None:
    """Weights have variance 1 whatever the fan in; used, they keep the variance of what comes in."""
    torch.manual_seed(0)
    for inputs in (8, 128):
        linear, conv = EqualLinear(inputs, 512), EqualConv(inputs, 64, 3, bias=False)
        assert [layer.weight.std().item() for layer in (linear, conv)] == pytest.approx([1, 1], abs=0.05)
        assert linear(noise(64, inputs)).std().item() == pytest.approx(1, abs=0.1)
        assert conv(noise(2, inputs, 12, 12))[..., 1:-1, 1:-1].std().item() == pytest.approx(1, abs=0.1)
        layer = EqualLinear(inputs, 1)
        (gradient,) = torch.autograd.grad(layer(torch.ones(1, inputs)).sum(), layer.weight)
        torch.testing.assert_close(gradient, torch.full((1, inputs), 1 / math.sqrt(inputs)))
