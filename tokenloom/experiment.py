"""One YAML = one whole experiment: its sections, and the file that a run keeps of it. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from engine import config
from engine.config import DataConfig, RunConfig
from eval.config import EvalConfig
from generator.config import AutoregressiveConfig, DiffusionConfig
from tokenizer.config import TokenizerConfig


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A tokenizer, the generators on its codes, and how they are scored; either generator may be absent."""

    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    autoregressive: AutoregressiveConfig | None = None
    diffusion: DiffusionConfig | None = None
    eval: EvalConfig = field(default_factory=EvalConfig)

    def generators(self, only: str | None = None) -> Iterator[tuple[str, AutoregressiveConfig | DiffusionConfig]]:
        """The families that the YAML has, by name.

        Raises:
            ValueError: `only` names a family that it has not.
        """
        sections = {"autoregressive": self.autoregressive, "diffusion": self.diffusion}
        if only is not None and sections.get(only) is None:
            present = [name for name, section in sections.items() if section is not None]
            raise ValueError(f"--only={only}: this configuration has {' and '.join(present) or 'no generator section'}")
        for name, section in sections.items():
            if section is not None and only in (None, name):
                yield name, section


def load_experiment(arguments: Sequence[str], *, program: str = "tokenloom") -> Experiment:
    """An experiment from `--config FILE` and `--dotted.key=value` overrides.

    Raises:
        ValueError: no file, an unknown key, or a value that does not fit.
    """
    asks_help = {"--help", "-h"} & set(arguments)
    if not asks_help and not any(word == "--config" or word.startswith("--config=") for word in arguments):
        raise ValueError("no configuration given: add --config FILE, for instance --config configs/digits.yaml")
    return config.load(Experiment, arguments, program=program)
