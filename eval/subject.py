"""What `tokenloom eval` scores: a run, its models, its images, and how samples are to be drawn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from engine.checkpoint import load_model
from engine.config import RunConfig
from engine.device import Device
from engine.images import ImageSet
from eval.config import EvalConfig
from eval.generator_scores import weights_kind
from eval.variants import GeneratorConfig, Sampling, drawn_from
from generator.sample import open_generator
from tokenizer.config import TokenizerConfig
from tokenizer.model import Tokenizer, load_tokenizer


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is scored, and with what."""

    run: RunConfig
    config: EvalConfig
    train_set: ImageSet
    test_set: ImageSet
    tokenizer_config: TokenizerConfig
    families: dict[str, GeneratorConfig]
    samplings: list[Sampling]
    device: Device

    @property
    def tokenizer(self) -> Tokenizer:
        """The run's tokenizer on the device."""
        return load_tokenizer(self.run.tokenizer_folder).to(self.device.device)

    @property
    def tokenizer_weights(self) -> str:
        """Which weights of the tokenizer's training are scored; another run's tells of itself."""
        if self.run.tokenizer is None:
            return weights_kind(self.tokenizer_config) if self.tokenizer_config.model.learned else "raw"
        card, _ = load_model(self.run.tokenizer_folder / "tokenizer")
        ema = card.get("identity", {}).get("tokenizer", {}).get("train", {}).get("ema")
        return f"ema {ema}" if ema else "raw"

    @property
    def fingerprints(self) -> list[str]:
        """Of all the models of the run, and of all weights that samples are drawn from, as they are now."""
        folders = [self.run.tokenizer_folder / "tokenizer", *(self.run.folder / family for family in self.families)]
        drawn = [each for sampling in self.samplings for each in drawn_from(self.run.folder, sampling.config)]
        return [load_model(folder)[0]["fingerprint"] for folder in folders] + drawn

    def generator(self, family: str) -> Any:
        """A generator of the run on the device.

        Raises:
            ValueError: it learned from another tokenizer than the run now has.
        """
        generator = open_generator(self.run.folder, self.families[family])
        tokenizer = load_tokenizer(self.run.tokenizer_folder)
        if generator.tokenizer_fingerprint != tokenizer.code_fingerprint:
            raise ValueError(
                f"{self.run.folder / family} learned from codes {generator.tokenizer_fingerprint}, but the run's "
                f"tokenizer gives {tokenizer.code_fingerprint}: encode and train the generator again"
            )
        return generator.to(self.device.device)
