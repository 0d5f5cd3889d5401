"""The discriminator's side: constants for the generator, lazy penalties, when it begins, what survives a restart."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tokenizer.adversary import LECAM_DECAY, Adversary
from tokenizer.config import DiscriminatorConfig
from tokenizer.losses import gradient_penalty, lecam

CONFIG = DiscriminatorConfig(r1=0.0)


class Judge(nn.Module):
    """One logit per image."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3 * 8 * 8, 1)

    def forward(self, images: torch.Tensor, *, parts: int = 1) -> torch.Tensor:
        return self.layer(images.flatten(1).square())


@pytest.fixture
def judge() -> Judge:
    torch.manual_seed(0)
    return Judge()


@pytest.fixture
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 8, requires_grad=True)


def test_each_side_learns_from_its_own_loss(judge: Judge, pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    real, fake = pair
    adversary = Adversary(judge, CONFIG)
    adversary.generator_loss(fake).backward()
    assert fake.grad is not None and fake.grad.abs().sum() > 0 and judge.layer.weight.grad is None
    fake.grad = None
    adversary.discriminator_losses(judge, real, fake, 0)["discriminator"].backward()
    assert fake.grad is None and judge.layer.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("objective", ["non_saturating", "hinge"])
def test_losses_are_the_closed_forms(objective: str, judge: Judge, pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    real, fake = pair
    adversary = Adversary(judge, replace(CONFIG, objective=objective))
    on_real, on_fake = judge(real), judge(fake)
    if objective == "hinge":
        teach, learn = -on_fake.mean(), (1 - on_real).relu().mean() + (1 + on_fake).relu().mean()
    else:
        teach, learn = F.softplus(-on_fake).mean(), F.softplus(-on_real).mean() + F.softplus(on_fake).mean()
    told = adversary.discriminator_losses(judge, real, fake, 0)
    torch.testing.assert_close(adversary.generator_loss(fake), teach)
    torch.testing.assert_close(told["discriminator"], learn)
    torch.testing.assert_close(told["logits_real"], on_real.mean())
    share = ((on_real > 0).sum() + (on_fake < 0).sum()) / 8
    torch.testing.assert_close(told["discriminator_accuracy"], share)


def test_the_gradient_penalty_is_lazy_and_weighs_as_much(judge: Judge, pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    real, fake = pair
    plain = Adversary(judge, CONFIG).discriminator_losses(judge, real, fake, 0)["discriminator"]
    adversary = Adversary(judge, replace(CONFIG, r1=10.0, r1_every=4))
    told = [adversary.discriminator_losses(judge, real, fake, step) for step in range(5)]
    assert ["r1" in each for each in told] == [True, False, False, False, True]
    penalty = gradient_penalty(judge, real)
    torch.testing.assert_close(told[0]["discriminator"], plain + 10 / 2 * 4 * penalty)
    torch.testing.assert_close(told[1]["discriminator"], plain)
    metrics = {"logits_real": 0.0, "logits_fake": 0.0, "r1": 3.0}
    adversary.after_step(0, metrics)
    later = {"logits_real": 0.0, "logits_fake": 0.0}
    adversary.after_step(1, later)
    assert later["r1"] == 3.0


def test_lecam_looks_at_running_means(judge: Judge, pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    real, fake = pair
    adversary = Adversary(judge, replace(CONFIG, lecam=0.5))
    adversary.after_step(0, {"logits_real": 2.0, "logits_fake": -1.0})
    assert adversary.mean_real == pytest.approx(2 * (1 - LECAM_DECAY))
    told = adversary.discriminator_losses(judge, real, fake, 1)
    expected = lecam(judge(real), judge(fake), adversary.mean_real, adversary.mean_fake)
    torch.testing.assert_close(told["lecam"], expected)
    plain = Adversary(judge, CONFIG).discriminator_losses(judge, real, fake, 1)["discriminator"]
    torch.testing.assert_close(told["discriminator"], plain + 0.5 * expected)


def test_it_begins_at_its_step(judge: Judge) -> None:
    assert Adversary(judge, CONFIG).begun
    adversary = Adversary(judge, replace(CONFIG, start_step=3))
    begun = []
    for step in range(4):
        begun.append(adversary.begun)
        adversary.after_step(step, {"l2": 1.0 / (step + 1), "logits_real": 0.0, "logits_fake": 0.0})
    assert begun == [False, False, False, True]


def test_it_begins_when_the_pixel_loss_stands_still(judge: Judge) -> None:
    """The smoothed loss falls by 1 % in each of the first steps, then by less than that in all the others together."""
    adversary = Adversary(judge, replace(CONFIG, start_step=2, start_patience=5))
    for step in range(30):
        adversary.after_step(step, {"l2": float(step == 0)})
        assert not adversary.begun
    waited = 0
    while not adversary.begun:
        adversary.after_step(30 + waited, {"l2": adversary.smoothed - 1e-3})
        waited += 1
    assert 5 <= waited <= 6


def test_its_state_survives(judge: Judge) -> None:
    adversary = Adversary(judge, replace(CONFIG, start_step=5, start_patience=2))
    for step in range(4):
        adversary.after_step(step, {"l2": 1.0})
    again = Adversary(judge, adversary.config)
    again.load_state_dict(adversary.state_dict())
    assert again.state_dict() == adversary.state_dict() and again.waited == adversary.waited > 0
