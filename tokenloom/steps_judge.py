"""The judge of samples while steps are optimised: their Frechet distance to the training images."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.device import Device, exact_products
from engine.sources import open_images
from eval.distances import frechet_to
from eval.extraction import extract
from eval.features import Extractor, open_features
from eval.names import score_name
from eval.panel import cache_of
from eval.standard import gaussian, training_pictures
from eval.statistics import Gaussian, Moments
from generator.align_config import AlignConfig
from tokenizer.model import Tokenizer, load_tokenizer
from tokenloom.experiment import Experiment


class FrechetJudge:
    """Decodes latents and holds the images against a reference."""

    def __init__(self, tokenizer: Tokenizer, extractor: Extractor, reference: Gaussian, *, num: int) -> None:
        self.tokenizer, self.extractor = tokenizer, extractor
        self.name = score_name("fd", features=extractor.name, n=num)
        self.to_reference = frechet_to(reference)

    @torch.inference_mode()
    def see(self, latents: Tensor) -> Tensor:
        """Features float32 [n, D] on the CPU, of samples as latents [n, C, h, w]."""
        images = self.tokenizer.from_latents(latents)  # uint8 [n, 3, H, W]
        with exact_products(images.device):
            return self.extractor(images).float().cpu()

    def distance(self, features: Tensor) -> float:
        """Squared Frechet distance of all samples, as features [N, D], to the training images."""
        return self.to_reference(Moments.of(features).gaussian())


def check_judge(experiment: Experiment) -> None:
    """Raise now the ValueError that `open_judge` would raise once the network is trained."""
    align = experiment.diffusion and experiment.diffusion.align
    if align and align.probe_images:
        _open_extractor(experiment, align)


def open_judge(experiment: Experiment, device: Device) -> FrechetJudge:
    """The judge that diffusion.align names; what it sees in the training images is kept for the scores, too.

    Every process of a run must call it.

    Raises:
        ValueError: an unknown entry, missing weights, or images that cannot be opened.
    """
    assert experiment.diffusion is not None
    align = experiment.diffusion.align or AlignConfig()
    extractor = _open_extractor(experiment, align).to(device.device)
    pictures = training_pictures(open_images(experiment.data, "train"))
    cache, size = cache_of(experiment.run, experiment.eval), experiment.eval.batch_size
    seen = extract([extractor], pictures, cache=cache, device=device, batch_size=size, title="steps/training images")
    tokenizer = load_tokenizer(experiment.run.tokenizer_folder).to(device.device)
    return FrechetJudge(tokenizer, extractor, gaussian(seen.outputs[extractor.name]), num=align.probe_images)


def _open_extractor(experiment: Experiment, align: AlignConfig) -> Extractor:
    try:
        return open_features(align.probe_features, inception_weights=experiment.eval.inception_weights)
    except ValueError as error:
        raise ValueError(f"diffusion.align.probe_features={align.probe_features}: {error}") from error
