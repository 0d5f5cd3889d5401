"""The curriculum on the order of codes, and the network that learns in random orders."""

import pytest
import torch
import torch.nn.functional as F

from generator.autoregressive import VIM
from generator.config import AutoregressiveModelConfig, OrderConfig
from generator.order import draw_orders, fold_order, random_share, source_positions

VOCAB, LENGTH, GRID = 11, 8, (2, 4)
LABELS = torch.tensor([0, 1, 2, 3])
RANDOM = OrderConfig(kind="random", anneal_start=0.5, anneal_end=0.75)


def network(block: str, random_order: bool) -> VIM:
    """An untrained network with large weights, so that its distributions are far from uniform."""
    torch.manual_seed(0)
    model = AutoregressiveModelConfig(preset="tiny", depth=2, width=32, heads=4, dropout=0.0, block=block)
    vim = VIM(model, vocab_size=VOCAB, length=LENGTH, num_classes=3, grid=GRID, random_order=random_order).eval()
    for parameter in vim.parameters():
        parameter.data.mul_(8 if parameter.ndim == 2 else 1)
    return vim


@pytest.fixture
def codes() -> torch.Tensor:
    return torch.randint(VOCAB, (4, LENGTH), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def order() -> torch.Tensor:
    return torch.rand(4, LENGTH, generator=torch.Generator().manual_seed(2)).argsort(1)


BLOCKS = pytest.mark.parametrize("block", ["vim", "modern"])


def test_the_share_of_random_orders_falls_from_one_to_zero() -> None:
    shares = {step: random_share(step, 1000, RANDOM) for step in (0, 500, 625, 749, 750, 999)}
    assert shares == pytest.approx({0: 1, 500: 1, 625: 0.5, 749: 0.004, 750: 0, 999: 0})
    assert random_share(0, 1000, OrderConfig()) == 0
    sudden = OrderConfig(kind="random", anneal_start=0.5, anneal_end=0.5)
    assert [random_share(step, 10, sudden) for step in (4, 5)] == [1, 0]


@pytest.mark.parametrize("interval", [(0.8, 0.5), (-0.1, 0.5), (0.5, 1.1)])
def test_an_impossible_interval_is_refused(interval: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match=rf"order\.anneal_start={interval[0]} .* anneal_end={interval[1]}"):
        OrderConfig(kind="random", anneal_start=interval[0], anneal_end=interval[1])


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_orders_are_permutations_and_the_share_of_them_is_random(share: float) -> None:
    generator = torch.Generator().manual_seed(0)
    uniforms, noise = torch.rand(2000, generator=generator), torch.rand(2000, LENGTH, generator=generator)
    orders = draw_orders(uniforms, noise, share)
    raster = torch.arange(LENGTH)
    assert orders.dtype == torch.int64 and torch.equal(orders.sort(1).values, raster.expand(2000, -1))
    moved = (orders != raster).any(1)
    assert torch.equal(moved, uniforms < share)
    if share == 1:  # each code comes first as often: 250 times, with a deviation of 15
        assert (orders[:, 0].bincount(minlength=LENGTH) - 250).abs().max() < 60


def test_each_step_is_given_the_code_before_it() -> None:
    assert source_positions(torch.tensor([[2, 0, 3, 1]])).tolist() == [[0, 3, 1, 4]]


@BLOCKS
@pytest.mark.parametrize("random_order", [False, True])
def test_the_raster_as_an_order_changes_nothing(codes: torch.Tensor, block: str, random_order: bool) -> None:
    vim, raster = network(block, random_order), torch.arange(LENGTH).expand(4, -1)
    torch.testing.assert_close(vim(codes, LABELS, raster), vim(codes, LABELS))


@BLOCKS
def test_a_folded_network_is_the_same_in_raster_order(codes: torch.Tensor, block: str) -> None:
    trained, plain = network(block, True), network(block, False)
    assert (trained.source_embedding.weight[0] == 0).all()
    plain.load_state_dict(fold_order(trained.state_dict()))
    assert torch.equal(plain(codes, LABELS), trained(codes, LABELS))
    weights = plain.state_dict()
    assert all(fold_order(weights)[name] is weight for name, weight in weights.items())


@BLOCKS
def test_logits_see_the_label_and_the_codes_before_them_in_the_order(
    codes: torch.Tensor, order: torch.Tensor, block: str
) -> None:
    vim = network(block, True)
    before = vim(codes, LABELS, order)
    later = torch.zeros_like(codes, dtype=torch.bool).scatter(1, order[:, 3:], True)
    after = vim(torch.where(later, (codes + 1) % VOCAB, codes), LABELS, order)
    torch.testing.assert_close(after[:, :4], before[:, :4])
    assert ((after - before)[:, 4:].abs().amax(-1) > 1e-3).all()


@BLOCKS
def test_logits_know_the_place_that_they_predict_and_the_places_seen(
    codes: torch.Tensor, order: torch.Tensor, block: str
) -> None:
    vim = network(block, True)
    before = vim(codes, LABELS, order)
    swapped = order.clone()
    swapped[:, [3, 4]] = order[:, [4, 3]]
    change = (vim(codes, LABELS, swapped) - before).abs().amax(-1)  # [B, T]
    assert (change[:, :3] == 0).all()
    assert (change[:, 3] > 1e-3).all()  # the same codes seen, another place asked for
    vim.source_embedding.weight.data[1 + order[0, 2]] *= 3
    change = (vim(codes, LABELS, order) - before).abs().amax(-1)[0]
    assert (change[:3] == 0).all() and (change[3:] > 1e-3).all()  # told with the code, after it has been predicted


def test_cached_logits_of_an_unfolded_network_equal_its_forward(codes: torch.Tensor) -> None:
    vim, position = network("vim", True), torch.arange(LENGTH)
    caches = vim.caches(len(codes))
    cached = [vim.advance(codes[:, :0], LABELS, position[:1], caches)]
    for step in range(1, LENGTH):
        cached.append(vim.advance(codes[:, step - 1 : step], None, position[step : step + 1], caches))
    torch.testing.assert_close(torch.stack(cached, dim=1), vim(codes, LABELS))


def test_training_in_random_orders_leaves_the_labels_place_at_zero(codes: torch.Tensor, order: torch.Tensor) -> None:
    vim = network("vim", True).train()
    optimizer = torch.optim.AdamW(vim.parameters(), lr=1e-2)
    targets, losses = codes.gather(1, order), []
    for _ in range(40):
        losses.append(F.cross_entropy(vim(codes, LABELS, order).flatten(0, 1), targets.flatten()))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.1 < losses[0]
    assert (vim.source_embedding.weight[0] == 0).all() and (vim.source_embedding.weight[1:] != 0).all()
