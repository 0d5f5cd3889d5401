"""DiT: its formula and a peer's output, the identity at the start, published sizes, and clear refusals."""

from __future__ import annotations

import math
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engine.flops import forward_flops
from generator.config import DENOISER_PRESETS, DenoiserModelConfig
from generator.denoiser import DiT, modulate, sincos_positions
from generator.diffusion import build_denoiser
from generator.schedule import MAX_LOGSNR

sys.path.insert(0, str(Path(__file__).parent))
from diffusers_dit import peer_of, same_weights

SHAPE = (3, 4, 6)
NAMES = ("qk_norm", "rope", "swiglu")
EVERY = [dict(zip(NAMES, switches, strict=True)) for switches in product((False, True), repeat=3)]
SWITCHES = pytest.mark.parametrize("switches", EVERY, ids=["+".join(n for n in NAMES if s[n]) or "none" for s in EVERY])


def tiny(patch_size: int = 2, out_channels: int | None = None, **switches: bool) -> DiT:
    torch.manual_seed(0)
    return DiT(
        SHAPE, depth=2, width=32, heads=4, patch_size=patch_size, num_classes=5, out_channels=out_channels, **switches
    )


def opened(network: DiT) -> DiT:
    """The network with random weights, so that nothing is zero."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return network


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


def published(size: str, patch_size: int) -> DiT:
    """For ImageNet at 256 pixels: latents of 4 x 32 x 32 and a learnt variance. On the meta device."""
    depth, width, heads = DENOISER_PRESETS[size]
    shape = {"depth": depth, "width": width, "heads": heads, "patch_size": patch_size}
    with torch.device("meta"):
        return DiT((4, 32, 32), num_classes=1000, out_channels=8, **shape)


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# Peebles & Xie (2023), table 4: Gflops, which are multiply-adds. It gives parameters in millions without decimals.
@pytest.mark.parametrize(
    ("size", "patch_size", "millions", "gmacs"),
    [
        ("S", 2, 32.96, 6.06),   ("S", 4, 32.95, 1.41),   ("S", 8, 33.15, 0.36),
        ("B", 2, 130.51, 23.01), ("L", 4, 458.05, 19.70), ("XL", 2, 675.13, 118.64),
    ],
)  # fmt: skip
def test_published_sizes_and_costs(size: str, patch_size: int, millions: float, gmacs: float) -> None:
    network = published(size, patch_size)
    # DiT counts the fixed positions among its parameters.
    assert (count(network) + network.positions.numel()) / 1e6 == pytest.approx(millions, abs=0.005)
    x, one = torch.empty(1, 4, 32, 32, device="meta"), torch.empty(1, device="meta")
    # All matrix products and the patch convolution, attention's two products included.
    assert forward_flops(network, x, one, one.long()) / 2e9 == pytest.approx(gmacs, rel=0.01)


@pytest.mark.parametrize("patch_size", [2, 8])
def test_as_many_parameters_as_diffusers_which_embeds_the_condition_in_every_block(patch_size: int) -> None:
    network = published("S", patch_size)
    with torch.device("meta"):
        peer = peer_of(network)
    repeated = (len(network.blocks) - 1) * count(peer.transformer_blocks[0].norm1.emb)
    assert count(network) == count(peer) - repeated


def test_the_same_weights_in_diffusers_give_the_same_output_and_gradients() -> None:
    torch.manual_seed(0)
    network = opened(DiT((3, 8, 8), depth=2, width=32, heads=4, patch_size=2, num_classes=5, out_channels=6))
    peer = same_weights(network)
    x = torch.randn(3, 3, 8, 8, requires_grad=True)
    condition = torch.tensor([-7.0, 0.5, 9.0]), torch.tensor([0, 5, 3])
    ours, theirs = network(x, *condition), peer(x, *condition).sample
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    weight, same = network.blocks[0].modulation.weight, peer.transformer_blocks[0].norm1.linear.weight
    gradients = torch.autograd.grad(ours.square().sum(), (x, weight))
    for one, other in zip(gradients, torch.autograd.grad(theirs.square().sum(), (x, same)), strict=True):
        torch.testing.assert_close(one / one.norm(), other / other.norm(), rtol=1e-5, atol=1e-5)


def plain(network: DiT, x: Tensor, logsnr: Tensor, labels: Tensor) -> Tensor:
    """DiT written from its formulas over named weights."""
    weights, p, heads, (rows, columns) = dict(network.named_parameters()), network.patch_size, 4, network.grid

    def linear(x: Tensor, name: str) -> Tensor:
        y = x @ weights[f"{name}.weight"].T
        return y + weights[f"{name}.bias"] if f"{name}.bias" in weights else y

    def norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        normed = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
        return normed * (1 + scale[:, None]) + shift[:, None]

    def turned(x: Tensor) -> Tensor:
        """Pairs (i, i + d / 2) as complex numbers: the first half turns by the row, the second by the column."""
        frequencies = 10000.0 ** (-torch.arange(x.shape[-1] // 4) * 4 / x.shape[-1])
        row, column = torch.meshgrid(torch.arange(rows) + 1, torch.arange(columns) + 1, indexing="ij")
        angles = torch.cat([each.flatten()[:, None] * frequencies for each in (row, column)], dim=-1)
        pairs = torch.complex(*x.chunk(2, dim=-1)) * torch.polar(torch.ones(()), angles)
        return torch.cat([pairs.real, pairs.imag], dim=-1)

    def attention(x: Tensor, name: str) -> Tensor:
        q, k, v = (each.unflatten(-1, (heads, -1)).transpose(1, 2) for each in linear(x, f"{name}.qkv").chunk(3, -1))
        if f"{name}.query_norm.weight" in weights:
            q, k = (
                each / (each.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weights[f"{name}.{side}_norm.weight"]
                for each, side in ((q, "query"), (k, "key"))
            )
        if network.rotary is not None:
            q, k = turned(q), turned(k)
        scores = torch.einsum("bhid,bhjd->bhij", q, k) / q.shape[-1] ** 0.5
        return linear(torch.einsum("bhij,bhjd->bihd", scores.softmax(-1), v).flatten(2), f"{name}.out")

    def mlp(x: Tensor, name: str) -> Tensor:
        hidden = linear(x, f"{name}.rise")
        if f"{name}.rise.bias" not in weights:  # SwiGLU
            gate, value = hidden.chunk(2, -1)
            return linear(gate * gate.sigmoid() * value, f"{name}.fall")
        slope = (2 / math.pi) ** 0.5
        return linear(hidden / 2 * (1 + torch.tanh(slope * (hidden + 0.044715 * hidden**3))), f"{name}.fall")

    angles = logsnr[:, None] * 10 ** torch.linspace(-1, 1, 128)
    level = linear(torch.cat([angles.cos(), angles.sin()], -1), "noise_level.rise")
    level = linear(level * level.sigmoid(), "noise_level.fall") + weights["labels.weight"][labels]
    condition = level * level.sigmoid()
    squares = x.unfold(2, p, p).unfold(3, p, p)  # [B, C, rows, columns, p, p]
    tokens = torch.einsum("bcrkpq,dcpq->brkd", squares, weights["patches.weight"]).flatten(1, 2)
    tokens = tokens + weights["patches.bias"] + network.positions
    for index in range(len(network.blocks)):
        name = f"blocks.{index}"
        numbers = linear(condition, f"{name}.modulation").chunk(6, -1)
        tokens = tokens + numbers[2][:, None] * attention(norm(tokens, *numbers[:2]), f"{name}.attention")
        tokens = tokens + numbers[5][:, None] * mlp(norm(tokens, *numbers[3:5]), f"{name}.mlp")
    patches = linear(norm(tokens, *linear(condition, "output.modulation").chunk(2, -1)), "output.linear")
    squares = patches.unflatten(2, (-1, p, p)).unflatten(1, (rows, columns))  # [B, rows, columns, C, p, p]
    return squares.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


@SWITCHES
def test_output_and_gradients_are_those_of_the_formula(switches: dict[str, bool]) -> None:
    network = opened(tiny(**switches))
    results = []
    for function in (network, lambda *inputs: plain(network, *inputs)):
        output = function(*batch())
        gradients = torch.autograd.grad(output.square().mean(), list(network.parameters()))
        results.append([each / each.norm() for each in (output, *gradients)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@SWITCHES
def test_a_new_network_is_the_identity_and_predicts_zero(switches: dict[str, bool]) -> None:
    network = tiny(**switches)
    x, logsnr, labels = batch()
    tokens, condition, _ = network.embed(x, logsnr, labels)
    for mixed in network.mix(tokens, condition):
        assert torch.equal(mixed, tokens)
    assert not network(x, logsnr, labels).any()


def test_each_switch_changes_its_own_part_alone() -> None:
    def parts(**switches: bool) -> set[tuple[str, torch.Size]]:
        return {(name, parameter.shape) for name, parameter in tiny(**switches).named_parameters()}

    usual = parts()
    assert {name.split(".", 2)[2] for name, _ in parts(qk_norm=True) ^ usual} == {
        "attention.query_norm.weight", "attention.key_norm.weight",
    }  # fmt: skip
    assert parts(rope=True) == usual
    assert {name.split(".")[2] for name, _ in parts(swiglu=True) ^ usual} == {"mlp"}


def test_the_configuration_reaches_the_network() -> None:
    card = {"latent_shape": SHAPE, "num_classes": 5}

    def built(**settings: Any) -> DiT:
        return build_denoiser(DenoiserModelConfig(preset="tiny", **settings), card)

    def what(network: DiT) -> list[bool]:
        block = network.blocks[0]
        norms = not isinstance(block.attention.query_norm, nn.Identity)
        return [norms, network.rotary is not None, type(block.mlp).__name__ == "SwiGLU"]

    assert what(built()) == [False, False, False]
    for name in NAMES:
        assert what(built(**{name: True})) == [name == each for each in NAMES]


def test_rotary_positions_tell_places_without_the_fixed_ones() -> None:
    x, logsnr, labels = batch()
    rolled = x.roll(2, dims=-1)
    for rope in (False, True):
        network = opened(tiny(rope=rope))
        network.positions.zero_()
        same = network(rolled, logsnr, labels).roll(-2, dims=-1)
        assert torch.allclose(network(x, logsnr, labels), same, atol=1e-4) != rope


@pytest.mark.parametrize("sign", [-1, 1])
def test_levels_beyond_those_of_training_count_as_the_last_one(sign: int) -> None:
    network = trained(tiny()).eval()
    x, _, labels = batch()
    outputs = [network(x, torch.full((4,), sign * level), labels) for level in (MAX_LOGSNR, 30.0, math.inf)]
    assert outputs[0].isfinite().all()
    assert torch.equal(outputs[1], outputs[0]) and torch.equal(outputs[2], outputs[0])
    below = torch.full((4,), sign * (MAX_LOGSNR - 0.1))
    assert not torch.equal(network(x, below, labels), outputs[0])


@pytest.mark.parametrize("patch_size", [1, 2, 4, 8])
def test_pixels_forward_and_backward(patch_size: int) -> None:
    network = opened(DiT((3, 8, 16), depth=1, width=16, heads=2, patch_size=patch_size, num_classes=2, rope=True))
    x = torch.randn(2, 3, 8, 16, requires_grad=True)
    output = network(x, torch.tensor([-3.0, 3.0]), torch.tensor([0, 2]))
    assert output.shape == x.shape and network.grid == (8 // patch_size, 16 // patch_size)
    output.square().sum().backward()
    assert x.grad is not None and x.grad.isfinite().all() and x.grad.any()


@pytest.mark.parametrize("patch_size", [1, 2])
@pytest.mark.parametrize("out_channels", [None, 6])
def test_shapes(patch_size: int, out_channels: int | None) -> None:
    network = tiny(patch_size, out_channels)
    assert network(*batch()).shape == (4, out_channels or 3, 4, 6)
    assert [x.shape for x in network.activations(*batch())] == 2 * [(4, 24 // patch_size**2, 32)]


def test_patches_return_to_their_place() -> None:
    network = tiny()
    squares = torch.arange(6.0)[None, :, None].expand(1, 6, 3 * 4)  # token number, in all channels and pixels
    image = network.unpatchify(squares)
    assert image.shape == (1, 3, 4, 6)
    torch.testing.assert_close(image[0, 2, ::2, ::2], torch.arange(6.0).reshape(2, 3))
    torch.testing.assert_close(image[0, 0, 1::2, 1::2], torch.arange(6.0).reshape(2, 3))


@SWITCHES
def test_gradient_reaches_every_parameter_once_the_gates_are_open(switches: dict[str, bool]) -> None:
    network = trained(tiny(**switches), steps=2)  # the first step opens the output, the second the gates
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
    _, condition, _ = network.embed(*batch())
    first, last = network.activations(*batch())
    torch.testing.assert_close(network.unpatchify(network.output(last, condition)), network(*batch()))
    assert not torch.allclose(first, last)


@SWITCHES
def test_bf16_autocast_stays_close(switches: dict[str, bool]) -> None:
    network = trained(tiny(**switches))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = network(*batch())
    torch.testing.assert_close(half.float(), network(*batch()), rtol=0.1, atol=0.1)


def test_under_autocast_branches_are_bf16_and_the_stream_is_fp32() -> None:
    network = opened(tiny())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        tokens, condition, _ = network.embed(*batch())
        shift, scale = network.output.modulation(condition)[:, None].chunk(2, dim=-1)
        assert modulate(network.output.norm, tokens, shift, scale).dtype == torch.bfloat16
        assert tokens.dtype == network.blocks[0](tokens, condition).dtype == torch.float32


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
