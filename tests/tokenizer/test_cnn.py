"""The CNN towers: equal to their peer layer by layer, of the published size, in raster order."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizer.cnn import CnnDecoder, CnnEncoder, Downsample, SelfAttention, norm, to_map, to_tokens
from tokenizer.config import CnnConfig

SMALL = CnnConfig(channels=16, multipliers=(1, 2, 2), res_blocks=1)
NARROW = CnnConfig(channels=4, multipliers=(1, 2, 2), res_blocks=1)
VQGAN_F16 = CnnConfig(channels=128, multipliers=(1, 1, 2, 2, 4), res_blocks=2, attention=(16,))
LATENT_DIFFUSION_F8 = CnnConfig(channels=128, multipliers=(1, 2, 4, 4), res_blocks=2)


def towers(
    config: CnnConfig = SMALL, image_size: int = 16, dim: int = 5, channels: int = 3
) -> tuple[CnnEncoder, CnnDecoder]:
    torch.manual_seed(0)
    encoder = CnnEncoder(config, image_size=image_size, out_dim=dim)
    return encoder, CnnDecoder(config, image_size=image_size, in_dim=dim, out_channels=channels)


@pytest.mark.parametrize(("image_size", "multipliers", "side"), [(16, (1, 2, 2), 4), (32, (1, 1), 16), (8, (2,), 8)])
def test_towers_map_images_to_vectors_and_back(image_size: int, multipliers: tuple[int, ...], side: int) -> None:
    encoder, decoder = towers(CnnConfig(channels=8, multipliers=multipliers, res_blocks=1), image_size, channels=6)
    vectors = encoder(torch.randn(2, 3, image_size, image_size))
    assert vectors.shape == (2, side**2, 5)
    assert decoder(vectors).shape == (2, 6, image_size, image_size)


def test_hidden_is_the_feature_map_after_each_resolution_and_after_the_middle() -> None:
    encoder, _ = towers()
    images = torch.randn(2, 3, 16, 16)
    first, *taps = encoder.hidden(images)
    assert torch.equal(to_map(first, 16), encoder.embed(images))
    assert [tuple(tap.shape) for tap in taps] == [(2, 256, 16), (2, 64, 32), (2, 16, 32), (2, 16, 32)]
    after = encoder.head(F.silu(encoder.norm(to_map(taps[-1], 4))))
    assert torch.allclose(encoder.project(to_tokens(after)), encoder(images), atol=1e-6)
    assert torch.allclose(encoder.out(taps[-1]), encoder(images), atol=1e-6)


def test_tokens_are_pixels_in_raster_order() -> None:
    maps = torch.arange(9.0).reshape(1, 1, 3, 3)
    assert to_tokens(maps).flatten().tolist() == list(range(9))
    assert torch.equal(to_map(to_tokens(maps), 3), maps)


def local(tower: nn.Module) -> nn.Module:
    """The tower without what looks at the whole map: only its convolutions tell then what a token sees."""
    for module in list(tower.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.GroupNorm | SelfAttention):
                setattr(module, name, nn.Identity())
    return tower.double()


def support(gradient: Tensor) -> list[int]:
    """First and last row, first and last column of what is not 0 in [1, C, H, W]."""
    rows, columns = (gradient.abs().sum(dims).nonzero().flatten().tolist() for dims in ((0, 1, 3), (0, 1, 2)))
    return [rows[0], rows[-1], columns[0], columns[-1]]


def test_a_token_sees_the_pixels_around_its_place() -> None:
    """7 cells on either side at the coarsest map; each halving doubles the range and adds 2 at its end."""
    encoder = local(towers(NARROW, image_size=128)[0])
    images = torch.randn(1, 3, 128, 128, dtype=torch.double, requires_grad=True)
    row, column = 14, 20
    (gradient,) = torch.autograd.grad(encoder(images)[0, 32 * row + column].sum(), images)
    assert support(gradient) == [4 * row - 35, 4 * row + 41, 4 * column - 35, 4 * column + 41]


def test_a_pixel_comes_from_the_tokens_around_its_place() -> None:
    """9 cells on either side at the coarsest map; each doubling makes two pixels of one."""
    decoder = local(towers(NARROW, image_size=128)[1])
    vectors = torch.randn(1, 1024, 5, dtype=torch.double)
    row, column = 14, 16
    moved = vectors.clone()
    moved[0, 32 * row + column] += 1
    change = decoder(moved) - decoder(vectors)
    assert support(change) == [4 * row - 52, 4 * row + 55, 4 * column - 52, 4 * column + 55]


def test_downsampling_is_every_second_pixel_of_a_convolution_that_keeps_the_size() -> None:
    layer, maps = Downsample(4), torch.randn(2, 4, 6, 6)
    whole = F.conv2d(maps, layer.conv.weight, layer.conv.bias, padding=1)
    assert torch.allclose(layer(maps), whole[..., 1::2, 1::2], atol=1e-6)


def test_downsampling_sees_three_pixels_from_its_own_on_and_zeros_past_the_edge() -> None:
    layer, maps = Downsample(4), torch.randn(1, 4, 6, 6, requires_grad=True)
    for index, seen in ((0, [0, 1, 2]), (1, [2, 3, 4]), (2, [4, 5])):
        (grad,) = torch.autograd.grad(layer(maps)[..., index, index].sum(), maps)
        assert grad.abs().sum((0, 1, 3)).nonzero().flatten().tolist() == seen
        assert grad.abs().sum((0, 1, 2)).nonzero().flatten().tolist() == seen


def test_attention_stands_in_the_middle_and_after_the_blocks_of_its_maps() -> None:
    encoder, decoder = towers(CnnConfig(channels=8, multipliers=(1, 2, 2), res_blocks=2, attention=(8,)))
    for tower, expected in ((encoder, [0, 2, 0, 1]), (decoder, [1, 0, 3, 0])):
        found = [sum(isinstance(layer, SelfAttention) for layer in stage) for stage in tower.stages]
        assert found == expected


def test_stages_are_one_flat_list_so_that_fsdp_shards_each_once() -> None:
    for tower in towers():
        lists = [module for module in tower.modules() if isinstance(module, nn.ModuleList)]
        assert [len(stages) for stages in lists] == [4]


@pytest.mark.parametrize(("width", "groups"), [(512, 32), (128, 32), (64, 16), (20, 5), (16, 4), (12, 3), (2, 1)])
def test_norms_have_vqgans_32_groups_or_so_few_that_each_holds_four_channels(width: int, groups: int) -> None:
    assert norm(width).num_groups == groups


def test_a_norm_keeps_the_colour_of_a_picture() -> None:
    """The mean of each channel over the image survives: with groups of one channel it would be the bias."""
    pictures = torch.randn(2, 16, 8, 8) * 0.1 + torch.randn(2, 16, 1, 1)
    means = norm(16)(pictures).mean((2, 3))
    assert means.std() > 0.5
    assert nn.GroupNorm(16, 16)(pictures).mean((2, 3)).abs().max() < 1e-5


def test_gradients_reach_every_parameter() -> None:
    encoder, decoder = towers(CnnConfig(channels=16, multipliers=(1, 2), res_blocks=2, attention=(16,)))
    images = torch.randn(2, 3, 16, 16)
    (decoder(encoder(images)) - images).square().mean().backward()
    for tower in (encoder, decoder):
        for name, parameter in tower.named_parameters():
            assert parameter.grad is not None and parameter.grad.norm() > 1e-7, name


def test_the_last_layer_alone_turns_features_into_channels() -> None:
    _, decoder = towers()
    assert isinstance(decoder.last_layer, nn.Parameter)
    nn.init.zeros_(decoder.last_layer)
    assert torch.equal(decoder(torch.randn(1, 16, 5)), decoder.head.bias[:, None, None].expand(1, 3, 16, 16))
    assert sum(name.endswith("last_layer") for name in decoder.state_dict()) == 0


def test_bf16_is_close_to_float32_forward_and_backward() -> None:
    encoder, decoder = towers()
    images = torch.randn(2, 3, 16, 16)
    exact = decoder(encoder(images))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = decoder(encoder(images))
    assert rough.dtype == torch.bfloat16
    assert (rough.float() - exact).norm() < 0.03 * exact.norm()
    rough.float().square().mean().backward()
    assert all(parameter.grad.isfinite().all() for parameter in (*encoder.parameters(), *decoder.parameters()))


@pytest.mark.parametrize(
    ("config", "image_size", "message"),
    [
        (SMALL, 18, r"data.size=18.*divisible"),
        (CnnConfig(channels=8, multipliers=(1, 1), attention=(12,)), 16, r"attention=\[12\].*16, 8"),
    ],
)
def test_impossible_sizes_are_refused(config: CnnConfig, image_size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CnnEncoder(config, image_size=image_size, out_dim=4)
    with pytest.raises(ValueError, match=message):
        CnnDecoder(config, image_size=image_size, in_dim=4)


# ----------------------------------------------------------------------------------------- parameters, counted by hand


def conv3(before: int, width: int) -> int:
    return 9 * before * width + width


def residual(before: int, width: int) -> int:
    shortcut = before * width + width if before != width else 0
    return 2 * before + conv3(before, width) + 2 * width + conv3(width, width) + shortcut


def attention(width: int) -> int:
    return 2 * width + 4 * (width * width + width)


def number_of_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_the_published_vqgan_has_its_layers() -> None:
    """ImageNet, 16 pixels per token, 256 numbers per code: 128, 128, 256, 256, 512 channels, attention at 16 x 16."""
    ends = 256 * 256 + 256
    middle = 2 * residual(512, 512) + attention(512)
    down = [2 * residual(128, 128), 2 * residual(128, 128), residual(128, 256) + residual(256, 256)]
    down += [2 * residual(256, 256), residual(256, 512) + residual(512, 512) + 2 * attention(512)]
    halving = 2 * conv3(128, 128) + 2 * conv3(256, 256)
    encoder = conv3(3, 128) + sum(down) + halving + middle + 2 * 512 + conv3(512, 256) + ends

    up = [3 * residual(512, 512) + 3 * attention(512), residual(512, 256) + 2 * residual(256, 256)]
    up += [3 * residual(256, 256), residual(256, 128) + 2 * residual(128, 128), 3 * residual(128, 128)]
    doubling = conv3(512, 512) + 2 * conv3(256, 256) + conv3(128, 128)
    decoder = ends + conv3(256, 512) + middle + sum(up) + doubling + 2 * 128 + conv3(128, 3)

    with torch.device("meta"):
        found = [number_of_parameters(tower) for tower in towers(VQGAN_F16, image_size=256, dim=256)]
    assert found == [encoder, decoder] == [29_363_968, 42_515_587]


def test_the_autoencoder_of_stable_diffusion_has_as_many_parameters_as_published() -> None:
    with torch.device("meta"):
        encoder = CnnEncoder(LATENT_DIFFUSION_F8, image_size=256, out_dim=8)  # means and variances
        decoder = CnnDecoder(LATENT_DIFFUSION_F8, image_size=256, in_dim=4)
    assert number_of_parameters(encoder) + number_of_parameters(decoder) == 83_653_863


# ---------------------------------------------------------------------------------------- diffusers, with equal weights


def tensors(*layers: nn.Module) -> Iterator[Tensor]:
    """The weights of diffusers' layers in the order in which ours hold them."""
    for layer in layers:
        if hasattr(layer, "to_q"):
            triple = (layer.to_q, layer.to_k, layer.to_v)
            yield from layer.group_norm.parameters()
            yield torch.cat([each.weight for each in triple])
            yield torch.cat([each.bias for each in triple])
            yield from layer.to_out[0].parameters()
        else:
            yield from layer.parameters()


def level(block: nn.Module) -> list[nn.Module]:
    """The layers of a resolution in the order of computation: each residual block, then its attention if it has one."""
    if not hasattr(block, "attentions"):
        return list(block.resnets)
    return [layer for pair in zip(block.resnets, block.attentions, strict=True) for layer in pair]


def middle_layers(peer: nn.Module) -> list[nn.Module]:
    return [peer.mid_block.resnets[0], peer.mid_block.attentions[0], peer.mid_block.resnets[1]]


def take_over(tower: nn.Module, layers: list[nn.Module]) -> None:
    """Copies the peer's weights; the projection, which the peer lacks, becomes the identity."""
    nn.init.eye_(tower.project.weight)
    nn.init.zeros_(tower.project.bias)
    own = [parameter for name, parameter in tower.named_parameters() if not name.startswith("project.")]
    with torch.no_grad():
        for parameter, tensor in zip(own, tensors(*layers), strict=True):
            parameter.copy_(tensor)


def test_towers_agree_with_diffusers() -> None:
    from diffusers.models.autoencoders import vae

    encoder, decoder = towers(CnnConfig(channels=128, multipliers=(1, 2), res_blocks=1, attention=(4,)), image_size=8)
    images, vectors = torch.randn(2, 3, 8, 8), torch.randn(2, 16, 5)

    down = vae.Encoder(3, 5, ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"), (128, 256), 1, 32, double_z=False)
    fine, coarse = down.down_blocks
    layers = [down.conv_in, *level(fine), fine.downsamplers[0], *level(coarse), *middle_layers(down)]
    take_over(encoder, [*layers, down.conv_norm_out, down.conv_out])
    assert torch.allclose(to_map(encoder(images), 4), down(images), atol=1e-4)

    up = vae.Decoder(5, 3, ("AttnUpDecoderBlock2D", "UpDecoderBlock2D"), (128, 256), 1, 32)
    coarse, fine = up.up_blocks
    layers = [up.conv_in, *middle_layers(up), *level(coarse), coarse.upsamplers[0], *level(fine)]
    take_over(decoder, [*layers, up.conv_norm_out, up.conv_out])
    assert torch.allclose(decoder(vectors), up(to_map(vectors, 4)), atol=1e-4)
