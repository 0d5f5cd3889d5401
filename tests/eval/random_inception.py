"""A file of random weights in the shape of FID's Inception-v3, for tests and benchmarks."""

import io
from pathlib import Path

import torch
from torch import nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3


class Unfilled(FeatureExtractorInceptionV3):
    """The network as it is built, before weights are put into it."""

    def load_state_dict(self, *_: object, **__: object) -> None:
        pass


def write_random_inception(path: Path, seed: int = 0) -> Path:
    """Convolutions keep the signal (He et al. 2015): as built, the network says nearly the same of every image, and
    the rest is rounding. The statistics of batch norms are random, so that folding them shows."""
    empty = io.BytesIO()
    torch.save({}, empty)
    empty.seek(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = Unfilled("inception", ["2048"], feature_extractor_weights_path=empty)
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
                module.weight.data.uniform_(0.5, 1.5)
                module.bias.data.normal_(0, 0.1)
    torch.save(network.state_dict(), path)
    return path


def torch_fidelitys(path: Path) -> FeatureExtractorInceptionV3:
    """torch-fidelity's own network on a file: uint8 images -> pool3, unbiased logits."""
    return FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"], feature_extractor_weights_path=path)
