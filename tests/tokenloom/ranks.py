"""What each of several processes carries out in the tests of them, besides the commands."""

import json
import os
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from engine.batches import StepRandom
from engine.config import RunConfig
from engine.device import gathered, setup
from generator.diffusion_task import DiffusionTask
from tokenloom.cli import main


class Stack(nn.Module):
    """A network whose method `advance` is not its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.head = nn.ModuleList(nn.Linear(4, 4) for _ in range(2)), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.advance(x)

    def advance(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def shards(network: nn.Module) -> list[bool]:
    return [isinstance(weight, DTensor) for weight in network.parameters()]


def gather() -> None:
    """The weights of a network are shards, whole, and shards again."""
    device = setup(RunConfig(device="cpu", precision="fp32", threads=1, parallel="fsdp"))
    torch.manual_seed(0)
    plain, network = Stack(), Stack()
    network.load_state_dict(plain.state_dict())
    device.share(network, torch.optim.SGD(network.parameters()))
    assert all(shards(network))
    with gathered(network, "advance"), torch.no_grad():
        for _ in range(2):
            assert torch.equal(network.advance(torch.ones(3, 4)), plain(torch.ones(3, 4)))
            assert not any(shards(network))
    assert all(shards(network))
    network(torch.ones(3, 4))
    assert all(shards(network.blocks))  # as before the block, a forward puts the weights of each unit away


def watch(folder: Path, words: list[str]) -> None:
    """Carry a command out, and write what this process alone saw of the diffusion's steps: stage and loss."""
    step, seen = DiffusionTask.step, []

    def watched(self: DiffusionTask, batch: dict[str, Tensor], rng: StepRandom) -> dict[str, Tensor]:
        figures = step(self, batch, rng)
        seen.append([self.curriculum.stage, figures["loss"].item()])
        return figures

    DiffusionTask.step = watched  # type: ignore[method-assign]
    main(words)
    (folder / f"rank-{os.environ.get('RANK', '0')}.json").write_text(json.dumps(seen))
