"""Judges of images: uint8 images -> feature vectors [B, D], and logits [B, K] where the network has classes.

Nothing is ever downloaded, and only Inception's features give a score the name FID.
"""

from __future__ import annotations

import hashlib
import io
import itertools
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.checkpoint import sha256
from engine.images import to_float
from engine.pretrained import checkpoint_folder, open_timm, read_weights, timm_parts
from eval.classifier import Classifier

INCEPTION_FILES = ("weights-inception-2015-12-05-6726825d.pth", "pt_inception-2015-12-05-6726825d.pth")
INCEPTION_HASH = "6726825d"


class Extractor(nn.Module):
    """A frozen network that judges images. A subclass sets the four fields below and overrides `outputs`."""

    name: str
    """Last part of a score's name: fd_<name>."""
    weights: str
    """sha256 of the weights."""
    resize: str
    """How an image comes to the network's size and range."""

    def outputs(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """uint8 [B, 3, H, W] -> features float32 [B, D] and logits [B, K], or None."""
        raise NotImplementedError

    def forward(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] -> features float32 [B, D]."""
        return self.outputs(images)[0]

    def identity(self) -> dict[str, str]:
        """What a score's protocol records of its features."""
        return {"name": self.name, "weights": self.weights, "resize": self.resize}


class ClassifierFeatures(Extractor):
    """The 64 inputs of the last layer of the classifier trained on the data set."""

    name, resize = "classifier", "none; x / 127.5 - 1"

    def __init__(self, network: Classifier) -> None:
        super().__init__()
        self.network, self.weights = network, weights_hash(network)

    def outputs(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        features = self.network.features(images)
        return features, self.network.head(features)


class RandomFeatures(Extractor):
    """An untrained convolutional network with fixed weights: cheap, always there, blind to meaning. 256 numbers."""

    name, resize = "random", "none; x / 127.5 - 1"

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.convs = nn.ModuleList()
        for inputs, outputs in itertools.pairwise((3, 32, 64, 64)):
            conv = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False)
            nn.init.kaiming_normal_(conv.weight, generator=generator)
            self.convs.append(conv)
        self.weights = weights_hash(self)

    def outputs(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        x = to_float(images)
        for conv in self.convs:
            x = F.relu(conv(x))  # [B, C, H/2, W/2]
        return F.adaptive_avg_pool2d(x, 2).flatten(1), None  # [B, 256]


class InceptionFeatures(Extractor):
    """Inception-v3 of FID through torch-fidelity: pool3 (2048), and logits without bias as in the original score."""

    name, resize = "inception", "TF1 bilinear to 299, no antialias; (x - 128) / 128"

    def __init__(self, weights: str | None) -> None:
        super().__init__()
        path = inception_file(weights)
        self.weights = sha256(path)
        if INCEPTION_HASH in path.name and not self.weights.startswith(INCEPTION_HASH):
            found = self.weights[:8]
            raise ValueError(f"{path}: sha256 starts with {found}, not {INCEPTION_HASH}: cut or altered; get it again")
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        # torch-fidelity unpickles without restraint, so it is given a copy of what a safe load has let through.
        safe = io.BytesIO()
        torch.save(read_weights(path), safe)
        safe.seek(0)
        layers = ["2048", "logits_unbiased"]
        self.network = FeatureExtractorInceptionV3("inception", layers, feature_extractor_weights_path=safe)

    def outputs(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        features, logits = self.network(images)
        return features, logits


class TimmFeatures(Extractor):
    """Any timm network with a local weights file: its pooled features, and logits if the file has a classifier."""

    def __init__(self, model: str, path: Path, size: int | None) -> None:
        super().__init__()
        self.network, settings = open_timm(model, path, size, key="eval.features")
        self.size = size or settings["input_size"][-1]
        self.name, self.weights = path.stem.replace("_", "-"), sha256(path)
        self.resize = f"bilinear antialiased to {self.size}; mean {settings['mean']}, std {settings['std']} of x / 255"
        self.mean, self.std = settings["mean"], settings["std"]

    def outputs(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        x = images.float() / 255
        if x.shape[-2:] != (self.size, self.size):
            x = F.interpolate(x, (self.size, self.size), mode="bilinear", antialias=True, align_corners=False)
        mean, std = (x.new_tensor(values).view(3, 1, 1) for values in (self.mean, self.std))
        maps = self.network.forward_features((x - mean) / std)
        features = self.network.forward_head(maps, pre_logits=True)  # [B, D]
        return features, self.network.get_classifier()(features) if self.network.num_classes else None


def open_features(
    spec: str, *, inception_weights: str | None = None, classifier: Classifier | None = None
) -> Extractor:
    """The extractor that an entry of eval.features names, frozen and in eval mode.

    Args:
        spec: classifier, inception, random, or timm:<model>:<weights file>[:<input size>].
        classifier: the trained network; needed for `classifier`.

    Raises:
        ValueError: an unknown entry, or weights that are missing or altered; says where they were looked for.
    """
    kind, _, rest = spec.partition(":")
    extractor: Extractor
    if spec == "classifier" and classifier is not None:
        extractor = ClassifierFeatures(classifier)
    elif spec == "random":
        extractor = RandomFeatures()
    elif spec == "inception":
        extractor = InceptionFeatures(inception_weights)
    elif kind == "timm" and ":" in rest:
        extractor = TimmFeatures(*timm_parts(rest))
    else:
        raise ValueError(
            f"eval.features entry {spec!r} is unknown: use classifier (with labelled images), inception, random, "
            "or timm:<model>:<weights file>[:<input size>]"
        )
    return extractor.eval().requires_grad_(False)


def score_name(score: str, features: str) -> str:
    """A score's name under given features: fd -> fid, rfd -> rfid, is -> is for Inception, else <score>_<features>."""
    assert score in ("fd", "rfd", "is")
    if features == "inception":
        return {"fd": "fid", "rfd": "rfid", "is": "is"}[score]
    return f"{score}_{features}"


def inception_file(given: str | None) -> Path:
    """The Inception weights file: the given one, else one of the two usual names in torch hub's checkpoint folder.

    Raises:
        ValueError: not there; the message says where it was looked for.
    """
    candidates = [Path(given)] if given else [checkpoint_folder() / name for name in INCEPTION_FILES]
    for path in candidates:
        if path.is_file():
            return path
    looked = " and ".join(map(str, candidates))
    raise ValueError(
        f"FID needs the Inception weights, looked for at {looked}. Give a file with --eval.inception_weights=FILE "
        f"({INCEPTION_FILES[0]} of torch-fidelity's release v0.2.0), or choose other --eval.features; none is fetched"
    )


def weights_hash(module: nn.Module) -> str:
    """sha256 over names and values of a network's weights."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
