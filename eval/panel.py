"""Who judges: the networks, what all their scores share, and where their features are kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.config import RunConfig
from engine.device import Device
from eval.classifier import Classifier
from eval.config import EvalConfig
from eval.extraction import Seen, extract
from eval.features import Extractor, open_features
from eval.pictures import Pictures


def open_extractors(
    config: EvalConfig, device: Device, classifier: Callable[[], Classifier] | None = None
) -> list[Extractor]:
    """The extractors of eval.features on the device, in that order.

    Args:
        classifier: gives the trained network, once all others are there; without it the entry `classifier` is left out.

    Raises:
        ValueError: an unknown entry, missing or altered weights, or two judges of one name.
    """
    weights, others = config.inception_weights, [spec for spec in config.features if spec != "classifier"]
    opened = {spec: open_features(spec, inception_weights=weights) for spec in others}
    if classifier is not None and "classifier" in config.features:
        opened["classifier"] = open_features("classifier", classifier=classifier())
    names = [extractor.name for extractor in opened.values()]
    if len(set(names)) < len(names):
        raise ValueError(f"eval.features gives two judges one name ({', '.join(names)}): rename a weights file")
    return [opened[spec].to(device.device) for spec in config.features if spec in opened]


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
