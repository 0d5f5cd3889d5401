"""FID's Inception-v3: torch-fidelity's layers and weights, arranged to run faster and in less memory.

Batch norms are folded into the convolutions before them, images run in the layout that convolutions like best, and the
resize rule is ours. Features differ from torch-fidelity's by rounding alone.
"""

from __future__ import annotations

import io
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from engine.checkpoint import sha256
from engine.pretrained import checkpoint_folder, read_weights

INCEPTION_FILES = ("weights-inception-2015-12-05-6726825d.pth", "pt_inception-2015-12-05-6726825d.pth")
INCEPTION_HASH = "6726825d"  # with which the sha256 of the published weights begins
SIZE = 299


class Inception(nn.Module):
    """Inception-v3 of FID: pool3, and logits without bias as in the original Inception Score.

    Raises:
        ValueError: the file is missing, cut, altered, or holds other weights.
    """

    def __init__(self, weights: str | None) -> None:
        super().__init__()
        path = inception_file(weights)
        self.weights = checked_hash(path)
        *trunk, classes = _filled(path).children()  # in the order in which an image passes them
        self.trunk = _folded(nn.Sequential(*trunk)).to(memory_format=torch.channels_last)
        self.classes = classes.weight  # [1008, 2048]

    @property
    def name(self) -> str:
        """`inception` for the published weights alone; for others a name that no score called FID can have."""
        return "inception" if self.weights.startswith(INCEPTION_HASH) else f"inception-{self.weights[:8]}"

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """float32 [B, 3, 299, 299] in 0 .. 255 -> pool3 [B, 2048] and logits [B, 1008]."""
        x = ((images - 128) / 128).contiguous(memory_format=torch.channels_last)
        features = self.trunk(x).flatten(1)
        return features, features @ self.classes.T


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


def checked_hash(path: Path) -> str:
    """sha256 of a weights file.

    Raises:
        ValueError: the file's name promises the published weights, but its content is another.
    """
    found = sha256(path)
    if INCEPTION_HASH in path.name and not found.startswith(INCEPTION_HASH):
        raise ValueError(f"{path}: sha256 starts with {found[:8]}, not {INCEPTION_HASH}: cut or altered; get it again")
    return found


def _filled(path: Path) -> nn.Module:
    """torch-fidelity's network with the weights of the file."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    # torch-fidelity unpickles without restraint, so it is given a copy of what a safe load has let through.
    safe = io.BytesIO()
    torch.save({name: value.float() for name, value in read_weights(path).items()}, safe)
    safe.seek(0)
    try:
        return FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=safe)
    except RuntimeError as error:
        raise ValueError(f"{path}: not the weights of FID's Inception-v3: {error}") from error


def _folded(module: nn.Module) -> nn.Module:
    """The same network with each batch norm inside the convolution before it."""
    from torch_fidelity.feature_extractor_inceptionv3 import BasicConv2d

    for name, child in module.named_children():
        if isinstance(child, BasicConv2d):
            child = nn.Sequential(fuse_conv_bn_eval(child.conv, child.bn), nn.ReLU(inplace=True))
        setattr(module, name, _folded(child))
    return module
