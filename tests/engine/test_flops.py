"""Operations and saved bytes agree with counts by hand, and nothing is computed to find them."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine import flops
from engine.flops import forward_flops, matmul_rate, saved_bytes

B, T, D, HEADS, HIDDEN = 3, 10, 16, 4, 48


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, *, causal: bool = False) -> None:
        super().__init__()
        self.causal = causal
        self.norm, self.qkv, self.out = nn.LayerNorm(D), nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.mlp = nn.Sequential(nn.LayerNorm(D), nn.Linear(D, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, D))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(x)


def test_a_linear_layer_costs_two_operations_for_each_weight_and_row() -> None:
    assert forward_flops(nn.Linear(5, 7), torch.empty(3, 5)) == 2 * 3 * 5 * 7


@pytest.mark.parametrize("causal", [False, True])
def test_a_transformer_block_costs_its_matrices_and_its_attention(causal: bool) -> None:
    matrices = 2 * B * T * (3 * D * D + D * D + 2 * D * HIDDEN)
    attention = 4 * B * T * T * D
    assert forward_flops(Block(causal=causal), torch.empty(B, T, D)) == matrices + attention


def test_a_convolution_costs_its_kernel_at_every_output_pixel() -> None:
    convolution = nn.Conv2d(3, 8, kernel_size=5, stride=2, padding=2)
    assert forward_flops(convolution, torch.empty(2, 3, 16, 12)) == 2 * (2 * 8 * 8 * 6) * (3 * 5 * 5)


def test_the_count_is_the_same_on_the_meta_device_and_with_named_inputs() -> None:
    with torch.device("meta"):
        block, x = Block(), torch.empty(B, T, D)
    assert forward_flops(block, x=x) == forward_flops(Block(), torch.empty(B, T, D))


def test_nothing_is_computed() -> None:
    class Dreamt(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x)
            return super().forward(x)

    seen: list[Tensor] = []
    huge = torch.empty(10**6, 10**6, device="meta")
    with torch.device("meta"):
        layer = Dreamt(10**6, 10**6)
    assert forward_flops(layer, huge) == 2 * 10**18
    assert saved_bytes(layer, huge) == 4 * 10**12
    assert all(type(x).__name__ == "FakeTensor" for x in seen)


def test_a_linear_layer_and_gelu_save_their_inputs() -> None:
    layers = nn.Sequential(nn.Linear(10, 20), nn.GELU())
    assert saved_bytes(layers, torch.empty(4, 10)) == 4 * 4 * (10 + 20)


def test_in_bf16_activations_take_half_and_copies_of_weights_count() -> None:
    layers = nn.Sequential(nn.Linear(10, 20), nn.GELU())
    assert saved_bytes(layers, torch.empty(4, 10), bf16=True) == 2 * 4 * (10 + 20)
    wanted = torch.empty(4, 10, requires_grad=True)  # its gradient needs the weight
    assert saved_bytes(layers, wanted) == 4 * 4 * (10 + 20)
    assert saved_bytes(layers, wanted, bf16=True) == 2 * 4 * (10 + 20) + 2 * 10 * 20


def test_each_storage_counts_once() -> None:
    class Twice(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.square() + x.sin() + x.view(-1).cos().view_as(x)

    assert saved_bytes(Twice(), torch.empty(6, 5, requires_grad=True)) == 4 * 30


def test_saved_bytes_grow_with_the_batch() -> None:
    one, four = (saved_bytes(Block(), torch.empty(size, T, D)) for size in (1, 4))
    assert four == 4 * one


def test_the_matrix_rate_is_positive_and_leaves_the_threads_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flops, "RATE_SECONDS", 0.01)
    monkeypatch.setitem(flops.RATE_SIDE, "cpu", 64)
    before = torch.get_num_threads()
    assert matmul_rate(torch.float32, "cpu", threads=2) > 0
    assert torch.get_num_threads() == before
