"""Judges of images: uint8 images -> named outputs: feature vectors, and logits where the network has classes.

Nothing is fetched, but for the weights of an entry that says `pretrained`; and only the published weights of Inception
give a score the name FID.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.checkpoint import sha256
from engine.images import to_float
from engine.pretrained import fetch_timm, open_timm, timm_parts
from eval.classifier import Classifier
from eval.inception import SIZE, Inception
from eval.resize import RULES, resized

CHOICES = (
    "classifier (with labelled images), inception[:<rule>], random, timm:<model>:<weights file>[:<input size>][:<rule>]"
    f" or timm:<model>:pretrained[:<input size>][:<rule>], where a rule is one of {', '.join(RULES)}"
)
PRETRAINED = Path("pretrained")
INCEPTION_RULE, TIMM_RULE = "tf1", "antialias"
TAKEN = re.compile(r"(classifier|random|inception(-[0-9a-f]{8})?)(-(tf1|clean|antialias))?")
PART = 8  # images at a time through Inception on a CPU: more take memory and no less time


class Extractor(nn.Module):
    """A frozen network that judges images. A subclass sets the three fields below and overrides `outputs`."""

    name: str
    """Last part of a score's name: fd_<name>."""
    weights: str
    """sha256 of the weights."""
    resize: str
    """How an image comes to the network's size and range."""

    def outputs(self, images: Tensor) -> dict[str, Tensor]:
        """uint8 [B, 3, H, W] -> "features" float32 [B, D] and, where the network has K classes, "logits" [B, K]."""
        raise NotImplementedError

    def forward(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] -> features float32 [B, D]."""
        return self.outputs(images)["features"]

    def identity(self) -> dict[str, str]:
        """All that decides the outputs, for a score's protocol and for the cache of features."""
        return {"name": self.name, "weights": self.weights, "resize": self.resize}


class ClassifierFeatures(Extractor):
    """The 64 inputs of the last layer of the classifier trained on the data set."""

    name, resize = "classifier", "none; x / 127.5 - 1"

    def __init__(self, network: Classifier) -> None:
        super().__init__()
        self.network, self.weights = network, weights_hash(network)

    def outputs(self, images: Tensor) -> dict[str, Tensor]:
        features = self.network.features(images)
        return {"features": features, "logits": self.network.head(features)}


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

    def outputs(self, images: Tensor) -> dict[str, Tensor]:
        x = to_float(images)
        for conv in self.convs:
            x = F.relu(conv(x))  # [B, C, H/2, W/2]
        return {"features": F.adaptive_avg_pool2d(x, 2).flatten(1)}  # [B, 256]


class InceptionFeatures(Extractor):
    """Inception-v3 of FID under a resize rule: pool3 (2048), and logits (1008) without bias.

    Raises:
        ValueError: weights that are missing, altered or of another network.
    """

    def __init__(self, weights: str | None, rule: str = INCEPTION_RULE) -> None:
        super().__init__()
        self.network, self.rule = Inception(weights), rule
        self.weights = self.network.weights
        self.name = self.network.name + ("" if rule == INCEPTION_RULE else f"-{rule}")
        self.resize = f"{RULES[rule].told.format(size=SIZE)}; (x - 128) / 128"

    def outputs(self, images: Tensor) -> dict[str, Tensor]:
        parts = images.split(PART if images.device.type == "cpu" else len(images))
        seen = [self.network(resized(part, SIZE, self.rule)) for part in parts]
        features, logits = (torch.cat(rows) for rows in zip(*seen, strict=True))
        return {"features": features, "logits": logits}


class TimmFeatures(Extractor):
    """Any timm network: what it pools for its classifier (DINOv2: the class token), and logits if it has a classifier.

    Args:
        path: the weights file, or PRETRAINED for those that timm fetches.
        size: pixels along each side if they are to differ from the network's own.

    Raises:
        ValueError: weights that are missing or do not fit, or a file named like another judge.
    """

    def __init__(self, model: str, path: Path, size: int | None = None, rule: str = TIMM_RULE) -> None:
        super().__init__()
        if path == PRETRAINED:
            self.network, settings = fetch_timm(model, size, key="eval.features")
            stem, self.weights = model, weights_hash(self.network)
        else:
            self.network, settings = open_timm(model, path, size, key="eval.features")
            stem, self.weights = path.stem, sha256(path)
        self.name = stem.replace("_", "-") + ("" if rule == TIMM_RULE else f"-{rule}")
        if TAKEN.fullmatch(self.name):
            raise ValueError(f"eval.features=timm:{model}:{path}: {self.name!r} is another judge; rename the file")
        self.model, self.rule, self.size = model, rule, size or settings["input_size"][-1]
        self.mean, self.std = settings["mean"], settings["std"]
        self.resize = f"{RULES[rule].told.format(size=self.size)}; mean {self.mean}, std {self.std} of x / 255"

    def outputs(self, images: Tensor) -> dict[str, Tensor]:
        x = resized(images, self.size, self.rule) / 255  # [B, 3, S, S]
        mean, std = (x.new_tensor(values).view(3, 1, 1) for values in (self.mean, self.std))
        maps = self.network.forward_features((x - mean) / std)
        features = self.network.forward_head(maps, pre_logits=True)  # [B, D]
        classes = {"logits": self.network.forward_head(maps)} if self.network.num_classes else {}
        return {"features": features, **classes}

    def identity(self) -> dict[str, str]:
        # Two models may take the same weights and say different things, as with another activation function. A file
        # that is named after its model tells which one it is.
        told = self.name.startswith(self.model.partition(".")[0].replace("_", "-"))
        return {**super().identity(), **({} if told else {"model": self.model})}


def open_features(
    spec: str, *, inception_weights: str | None = None, classifier: Classifier | None = None
) -> Extractor:
    """The extractor that an entry of eval.features names, frozen and in eval mode.

    Args:
        spec: one of CHOICES.
        inception_weights: file; absent: one of the usual names in torch hub's checkpoint folder.
        classifier: the trained network; needed for `classifier`.

    Raises:
        ValueError: an unknown entry, or weights that are missing or altered; says where they were looked for.
    """
    kind, colon, rest = spec.partition(":")
    rule = rest if colon else INCEPTION_RULE
    extractor: Extractor
    if spec == "classifier" and classifier is not None:
        extractor = ClassifierFeatures(classifier)
    elif spec == "random":
        extractor = RandomFeatures()
    elif kind == "inception" and rule in RULES:
        extractor = InceptionFeatures(inception_weights, rule)
    elif kind == "timm" and ":" in rest:
        extractor = _open_timm_features(rest)
    else:
        raise ValueError(f"eval.features entry {spec!r} is unknown: use {CHOICES}")
    return extractor.eval().requires_grad_(False)


def _open_timm_features(text: str) -> TimmFeatures:
    """`<model>:<weights file or pretrained>[:<input size>][:<rule>]`."""
    before, _, last = text.rpartition(":")
    return TimmFeatures(*timm_parts(before), last) if last in RULES else TimmFeatures(*timm_parts(text))


def weights_hash(module: nn.Module) -> str:
    """sha256 over names and values of a network's weights."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
