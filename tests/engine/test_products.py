"""Packed linear layers give what nn.Linear gives, and packing a network leaves the network as it was."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from engine.products import FEW, PackedLinear, can_pack, packed, row_products

WIDTH, OUT = 48, 80
BF16 = pytest.mark.skipif(not can_pack(nn.Linear(1, 1).bfloat16()), reason="the CPU multiplies no bf16")
pytestmark = pytest.mark.skipif(not can_pack(nn.Linear(1, 1)), reason="torch without oneDNN packs nothing")
TYPES = pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=BF16)])
BIAS = pytest.mark.parametrize("bias", [True, False])
CLOSE = {torch.float32: {"atol": 1e-5, "rtol": 1e-5}, torch.bfloat16: {"atol": 0.02, "rtol": 0.02}}


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def dense(dtype: torch.dtype = torch.float32, *, bias: bool = True) -> nn.Linear:
    return nn.Linear(WIDTH, OUT, bias=bias).to(dtype)


class Tower(nn.Module):
    """Layers of several kinds, a tied one, one in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(OUT, WIDTH)
        self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)) for _ in range(2))
        self.head = nn.Linear(WIDTH, OUT, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("scale", torch.tensor(0.5))

    def forward(self, codes: Tensor) -> Tensor:
        x = self.embedding(codes)
        for block in self.blocks:
            x = x + self.scale * block(x)
        return self.head(x)


@TYPES
@BIAS
def test_a_packed_layer_equals_the_dense_one(dtype: torch.dtype, bias: bool) -> None:
    layer = dense(dtype, bias=bias)
    for shape in ((1,), (3,), (17,), (1, 1), (3, 1), (2, 5), (0,), (0, 1)):
        x = torch.randn(*shape, WIDTH).to(dtype)
        for rows in (1, 4):  # what it is packed for decides its speed alone
            found = PackedLinear(layer, rows)(x)
            assert found.dtype == dtype and found.shape == (*shape, OUT)
            torch.testing.assert_close(found, layer(x), **CLOSE[dtype])


@TYPES
def test_rows_that_lie_apart_in_memory_are_read_where_they_lie(dtype: torch.dtype) -> None:
    layer, x = dense(dtype), torch.randn(3, 5, 2 * WIDTH).to(dtype)
    last = x[:, -1, WIDTH:]
    for product in (PackedLinear(layer, 3), lambda x: row_products(x, layer.weight, layer.bias)):
        torch.testing.assert_close(product(last), layer(last.clone()), **CLOSE[dtype])


@BF16
def test_under_autocast_a_packed_layer_computes_in_the_type_of_its_weight() -> None:
    layer, x = dense(), torch.randn(2, WIDTH).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = PackedLinear(layer, 2)(x)
    torch.testing.assert_close(found, layer(x.float()), **CLOSE[torch.float32])


@TYPES
@BIAS
@pytest.mark.parametrize("shape", [(1,), (4,), (2, 1), (0,)])
def test_a_sum_of_products_is_a_matrix_product(dtype: torch.dtype, bias: bool, shape: tuple[int, ...]) -> None:
    layer, x = dense(dtype, bias=bias), torch.randn(*shape, WIDTH).to(dtype)
    found = row_products(x, layer.weight, layer.bias)
    assert found.dtype == dtype and found.shape == (*shape, OUT)
    torch.testing.assert_close(found, F.linear(x, layer.weight, layer.bias), **CLOSE[dtype])


@BF16
def test_a_sum_of_products_in_bf16_is_at_least_as_exact_as_torchs() -> None:
    layer, x = nn.Linear(1024, 256).bfloat16(), torch.randn(4, 1024).bfloat16()
    exact = F.linear(x.double(), layer.weight.double(), layer.bias.double())

    def error(found: Tensor) -> float:
        return float((found.double() - exact).square().mean())

    ours, torchs = (error(product(x, layer.weight, layer.bias)) for product in (row_products, F.linear))
    assert ours <= 1.001 * torchs
    assert ours <= 1.001 * error(exact.bfloat16())  # the last rounding is the only one that shows


@pytest.mark.slow
@TYPES
def test_a_compiled_layer_equals_the_dense_one(dtype: torch.dtype) -> None:
    layer = dense(dtype, bias=dtype == torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(PackedLinear(layer, 1), fullgraph=True, dynamic=False)
    for rows in (1, FEW[dtype], FEW[dtype] + 1):  # sums of products up to FEW rows, then F.linear
        x = torch.randn(rows, 1, WIDTH).to(dtype)
        torch.testing.assert_close(compiled(x), layer(x), **CLOSE[dtype])


@TYPES
@pytest.mark.parametrize("training", [False, True])
def test_a_packed_network_shares_its_weights_and_leaves_the_other_as_it_is(dtype: torch.dtype, training: bool) -> None:
    network, codes = Tower().to(dtype).train(training), torch.randint(OUT, (3, 4))
    kinds = [type(module) for module in network.modules()]
    state = {name: value.clone() for name, value in network.state_dict().items()}
    before = network(codes)
    twin = packed(network, 3)

    assert [type(module) for module in network.modules()] == kinds
    assert torch.equal(network(codes), before)
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())

    assert sum(isinstance(module, PackedLinear) for module in twin.modules()) == 3
    assert not any(isinstance(module, nn.Linear) for module in twin.modules())
    assert type(twin) is Tower and all(module.training == training for module in twin.modules())
    assert list(twin.state_dict()) == list(state)
    ours, theirs = dict(network.named_parameters()), dict(twin.named_parameters())
    assert ours.keys() == theirs.keys() and all(theirs[name] is ours[name] for name in ours)
    assert twin.head.weight is twin.embedding.weight
    torch.testing.assert_close(twin(codes), before, **CLOSE[dtype])


def test_a_network_without_linear_layers_or_data_is_not_packed() -> None:
    with torch.device("meta"):
        shapes_only = Tower()
    for network in (nn.Sequential(nn.Embedding(3, 4), nn.LayerNorm(4)), shapes_only):
        assert packed(network, 1) is network
    assert packed(Tower().double(), 1).head.weight.dtype == torch.float64  # oneDNN packs no float64


class Sharded(Tensor):
    """A tensor of another kind, as a weight that is spread over processes is."""


def test_weights_of_another_kind_are_not_packed() -> None:
    network = Tower()
    network.blocks[1][1].weight = nn.Parameter(network.blocks[1][1].weight.as_subclass(Sharded))
    assert can_pack(network.head) and not can_pack(network.blocks[1][1])
    assert packed(network, 1) is network


def test_what_fsdp_shards_is_not_packed_even_while_its_weights_are_whole(tmp_path: Path) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        network = fully_shard(Tower(), mesh=init_device_mesh("cpu", (1,)))
        assert packed(network, 1) is network
        network.unshard()
        assert type(network.head.weight) is nn.Parameter
        assert packed(network, 1) is network
    finally:
        dist.destroy_process_group()
