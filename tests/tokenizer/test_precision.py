"""Codes are compared in full float32 on a GPU too, where the rest of training may use TF32."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from tokenizer.entropy import code_entropy
from tokenizer.similarity import nearest, normalize

PRODUCTS = (torch.ops.aten.mm, torch.ops.aten.bmm, torch.ops.aten.addmm)


class Precisions(TorchDispatchMode):
    """Notes in which precision each matrix product runs."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.overloadpacket in PRODUCTS:
            self.seen.append(torch.get_float32_matmul_precision())
        return function(*args, **(kwargs or {}))


@pytest.fixture
def tf32() -> Iterator[None]:
    torch.set_float32_matmul_precision("high")
    yield
    assert torch.get_float32_matmul_precision() == "high"
    torch.set_float32_matmul_precision("highest")


def unit(*shape: int, seed: int) -> Tensor:
    return normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)))


@pytest.mark.usefixtures("tf32")
@pytest.mark.parametrize("unit_codes", [True, False])
def test_the_search_is_exact(unit_codes: bool) -> None:
    with FakeTensorMode(), Precisions() as products:
        nearest(torch.empty(9, 4, device="cuda:0"), torch.empty(8, 4, device="cuda:0"), unit=unit_codes)
    assert products.seen == ["highest"]


@pytest.mark.usefixtures("tf32")
def test_the_entropy_loss_is_exact_and_its_backward_pass_leaves_the_precision_as_it_was() -> None:
    """The backward pass computes the tile anew and leaves it halfway."""
    with Precisions() as products:
        vectors, book = (torch.empty(rows, 4, device="meta", requires_grad=True) for rows in (9, 8))
        loss = code_entropy(vectors, book, temperature=0.1, unit=True)
        assert products.seen == ["highest"]
        loss.backward()
    assert products.seen[1:] == ["highest", "high", "high"]  # the tile, then the gradients of both


def test_a_compiled_network_calls_the_search_as_it_is() -> None:
    """A graph of its own would hold the product without the precision that goes with it."""
    vectors, book, calls = unit(20, 4, seed=0), unit(8, 4, seed=1), []

    def kept(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        calls.extend(str(node.target) for node in graph.graph.nodes if node.op.startswith("call"))
        return graph

    codes = torch.compile(lambda z: nearest(2 * z, book) + 1, backend=kept)(vectors)
    assert torch.equal(codes, nearest(vectors, book) + 1)
    assert calls and not any("matmul" in call or "argmax" in call for call in calls)


@pytest.mark.gpu
@pytest.mark.usefixtures("tf32")
def test_the_nearest_codes_on_a_gpu_are_those_of_float64() -> None:
    vectors, book = unit(4096, 32, seed=0).cuda(), unit(8192, 32, seed=1).cuda()
    exact = (vectors.double() @ book.double().T).argmax(-1)
    assert (nearest(vectors, book) != exact).sum() <= 1  # a tie in float32
