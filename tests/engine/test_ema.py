import torch
from torch import nn

from engine.ema import Ema


def test_the_average_follows_the_warmed_up_formula() -> None:
    module = nn.Linear(1, 1, bias=False)
    nn.init.constant_(module.weight, 1.0)
    average, expected = Ema(module, 0.5), 1.0
    for count, value in enumerate([3.0, 5.0, -2.0, 8.0, 1.0, 1.0, 1.0, 7.0, 2.0, 4.0], start=1):
        nn.init.constant_(module.weight, value)
        average.update(module)
        decay = min(0.5, (1 + count) / (10 + count))
        expected = decay * expected + (1 - decay) * value
        assert torch.isclose(average.shadow[0], torch.tensor([[expected]])).all()


def test_averaged_weights_are_lent_and_taken_back() -> None:
    module = nn.Linear(2, 2)
    average = Ema(module, 0.9)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(1.0)
    own = [parameter.clone() for parameter in module.parameters()]
    averaged = [shadow.clone() for shadow in average.shadow]
    with average.applied(module):
        assert all(torch.equal(p, a) for p, a in zip(module.parameters(), averaged, strict=True))
    assert all(torch.equal(p, o) for p, o in zip(module.parameters(), own, strict=True))
    assert all(torch.equal(s, a) for s, a in zip(average.shadow, averaged, strict=True))
