"""Who judges: the networks, what all their scores share, and where their features are kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.config import RunConfig
from engine.device import Device
from eval.config import EvalConfig
from eval.extraction import Seen, extract
from eval.features import Extractor
from eval.pictures import Pictures


@dataclass(frozen=True, kw_only=True)
class Panel:
    """Networks that see the same sets of images."""

    extractors: Sequence[Extractor]
    config: EvalConfig
    cache: Path
    device: Device

    @property
    def main(self) -> Extractor:
        """The network under kid, precision, recall, density, coverage and the nearest neighbours."""
        return self.extractors[self.config.features.index(self.config.main_features)]

    def see(self, pictures: Pictures) -> Seen:
        """What all networks say of a set (every process must call it)."""
        return self._extract(self.extractors, pictures)

    def see_main(self, pictures: Pictures) -> Seen:
        """What the main network says of a set (every process must call it)."""
        return self._extract([self.main], pictures)

    def _extract(self, networks: Sequence[Extractor], pictures: Pictures) -> Seen:
        size = self.config.batch_size
        return extract(
            networks, pictures, cache=self.cache, device=self.device, batch_size=size, title=f"judge/{pictures.name}"
        )


def cache_of(run: RunConfig, config: EvalConfig) -> Path:
    """Where features are kept."""
    return Path(config.cache) if config.cache else Path(run.root) / ".features"
