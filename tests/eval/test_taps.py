"""What the probe reads of a generator: all blocks from one pass, the same numbers as block by block."""

from types import SimpleNamespace

import torch

from engine.config import to_dict
from eval.taps import generator_representation, random_representation
from generator.autoregressive import VIM, Autoregressive
from generator.config import AutoregressiveModelConfig

MODEL = AutoregressiveModelConfig(preset="tiny", depth=3, width=16, heads=2)
CARD = {
    "config": {"model": to_dict(MODEL)}, "num_classes": 2, "class_names": ["a", "b"], "grid": [2, 2],
    "vocab_size": 5, "tokenizer_fingerprint": "t", "fingerprint": "g",
}  # fmt: skip
TOKENIZER = SimpleNamespace(fingerprint="t")


def encode(images: torch.Tensor) -> torch.Tensor:
    return images.flatten(1)[:, :4].long() % 5


def test_every_block_of_an_autoregressive_generator_is_read_in_one_pass() -> None:
    torch.manual_seed(0)
    generator = Autoregressive(VIM(MODEL, vocab_size=5, length=4, num_classes=2), CARD).eval()
    images = torch.randint(256, (6, 3, 2, 2), dtype=torch.uint8)
    passes: list[str] = []
    for family, source in (("trained", generator), ("random", generator.randomised(0))):
        source.network.blocks[0].register_forward_hook(lambda *args, family=family: passes.append(family))
        representation = generator_representation(source, TOKENIZER, encode)
        found = representation.features(images, representation.taps)
        assert passes.count(family) == 1 and len(found) == 3
        for features, tap in zip(found, representation.taps, strict=True):
            torch.testing.assert_close(features, source.features(encode(images), tap))
    twin = random_representation(generator, TOKENIZER, encode)
    for ours, theirs in zip(twin.features(images, twin.taps), found, strict=True):
        assert torch.equal(ours, theirs)
