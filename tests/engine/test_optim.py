import math

import pytest
import torch
from torch import nn

from engine.config import TrainConfig, load
from engine.optim import build_optimizer, learning_rate, set_learning_rate


def test_only_matrices_of_linear_and_convolution_layers_decay() -> None:
    module = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.LayerNorm(4), nn.Conv1d(4, 4, 1))
    decayed, others = build_optimizer(module, TrainConfig(weight_decay=0.1)).param_groups
    assert {id(p) for p in decayed["params"]} == {id(module[1].weight), id(module[3].weight)}
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    assert len(decayed["params"]) + len(others["params"]) == len(list(module.parameters()))


def test_adamw_is_the_default() -> None:
    optimizer = build_optimizer(nn.Linear(2, 2), TrainConfig(betas=(0.8, 0.9)))
    assert type(optimizer) is torch.optim.AdamW
    assert all(group["fused"] and group["betas"] == (0.8, 0.9) for group in optimizer.param_groups)


def test_radam_has_the_same_groups_and_decays_apart_from_the_gradient() -> None:
    """A weight without gradient shrinks by 1 - rate x decay in a step; a bias stays."""
    layer = nn.Linear(3, 2)
    optimizer = build_optimizer(
        layer, TrainConfig(optimizer="radam", learning_rate=0.1, weight_decay=0.5, betas=(0.8, 0.9))
    )
    assert type(optimizer) is torch.optim.RAdam
    assert [(group["weight_decay"], group["betas"], group["peak_lr"]) for group in optimizer.param_groups] == [
        (0.5, (0.8, 0.9), 0.1), (0.0, (0.8, 0.9), 0.1)
    ]  # fmt: skip
    weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    for parameter in layer.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.testing.assert_close(layer.weight.detach(), weight * 0.95)
    assert torch.equal(layer.bias.detach(), bias)


def test_radam_steps_by_the_mean_gradient_until_it_knows_the_variance() -> None:
    """With beta2 = 0.9 the length of its average passes 5 in the seventh step (Liu et al., 2020, algorithm 2)."""
    layer, gradient = nn.Linear(1, 1, bias=False), 100.0
    nn.init.zeros_(layer.weight)
    optimizer = build_optimizer(layer, TrainConfig(optimizer="radam", learning_rate=1e-3, betas=(0.0, 0.9)))
    moves = []
    for step in range(1, 9):
        before = layer.weight.item()
        layer.weight.grad = torch.full_like(layer.weight, gradient)
        optimizer.step()
        moves.append(before - layer.weight.item())
        length = 2 / (1 - 0.9) - 1 - 2 * step * 0.9**step / (1 - 0.9**step)
        if length <= 5:
            assert moves[-1] == pytest.approx(1e-3 * gradient, rel=1e-4)
        else:
            longest = 2 / (1 - 0.9) - 1
            rectified = math.sqrt(
                (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
            )  # fmt: skip
            assert moves[-1] == pytest.approx(1e-3 * rectified, rel=1e-3)
    assert moves[0] > moves[-1]


def test_an_unknown_optimizer_is_refused_on_the_command_line() -> None:
    with pytest.raises(ValueError, match="optimizer"):
        load(TrainConfig, ["--optimizer=sgd"])


@pytest.mark.parametrize("decay", ["constant", "cosine", "linear", "exponential"])
def test_the_learning_rate_warms_up_and_ends_where_it_should(decay: str) -> None:
    train = TrainConfig(
        steps=100, learning_rate=1.0, final_learning_rate=0.01, warmup_steps=10, decay=decay, decay_start=20
    )  # type: ignore[arg-type]
    assert learning_rate(0, train) == pytest.approx(0.1)
    assert learning_rate(9, train) == pytest.approx(1.0)
    assert learning_rate(19, train) == learning_rate(20, train) == pytest.approx(1.0)
    middle = {"constant": 1.0, "cosine": 0.505, "linear": 0.505, "exponential": 0.1}[decay]
    assert learning_rate(60, train) == pytest.approx(middle)
    assert learning_rate(100, train) == pytest.approx(1.0 if decay == "constant" else 0.01)


def test_the_exponential_law_is_the_one_published_for_vim() -> None:
    """4.5e-4 until step 80,000, then exponentially to 1e-5 at 450,000 (ViT-VQGAN; second-hand)."""
    train = TrainConfig(
        steps=450_000,
        learning_rate=4.5e-4,
        final_learning_rate=1e-5,
        warmup_steps=5_000,
        decay="exponential",
        decay_start=80_000,
    )
    assert learning_rate(2_499, train) == pytest.approx(2.25e-4)
    assert learning_rate(265_000, train) == pytest.approx(math.sqrt(4.5e-4 * 1e-5))


def test_exponential_decay_to_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="final_learning_rate"):
        TrainConfig(steps=100, decay="exponential")


def test_groups_keep_their_own_peak() -> None:
    train = TrainConfig(steps=10, learning_rate=0.1, decay="linear")
    optimizer = build_optimizer(nn.Linear(2, 2), train)
    optimizer.param_groups[1]["peak_lr"] = 0.4
    set_learning_rate(optimizer, 5, train)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.05, 0.2])
    assert torch.is_tensor(optimizer.param_groups[0]["params"][0])
