"""What a probe looks at: pooled activations of frozen models at named taps, and raw pixels.

A tap is named `<model>.<tap>`, such as `tokenizer.post_quant`, `vim.block12` or `dit.block6@logsnr=0`; raw pixels are
`pixels`, and a network of timm has one tap, whose name is its entry `timm:<model>:<weights>`. All taps of a model come
from one pass, but for noise levels, which take one each.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.images import to_float
from eval.config import REPRESENTATIONS
from eval.features import open_features
from generator.diffusion import FEATURE_LOGSNR

PIXEL_SIDE = 32  # larger images are shrunk for the pixel baseline
RANDOM_SEED = 0  # of the untrained twin
REMEMBERED = 1024  # images whose codes are kept for the next model

Read = Callable[[Tensor, Sequence[str]], dict[str, Tensor]]  # uint8 [B, 3, H, W], taps -> float [B, D] under each
Encode = Callable[[Tensor], tuple[Tensor | None, Tensor]]  # uint8 [B, 3, H, W] -> codes [B, T] or None, latents


@dataclass(kw_only=True)
class Representation:
    """A frozen model on its device, and those of its taps that are read: what `extraction.extract` takes."""

    name: str
    """The model, which begins the names of its taps."""
    subject: str
    """What its scores are said of."""
    taps: tuple[str, ...]
    """Whole names."""
    read: Read
    facts: dict[str, Any]
    """What decides the activations, JSON-ready."""

    def outputs(self, images: Tensor) -> dict[str, Tensor]:
        """uint8 [B, 3, H, W] -> float32 [B, D] under each tap."""
        return {tap: features.float() for tap, features in self.read(images, self.taps).items()}

    def identity(self) -> dict[str, Any]:
        """All that decides `outputs`."""
        return {"name": self.name, "taps": list(self.taps), **self.facts}

    def at(self, patterns: Sequence[str]) -> Representation:
        """The same with those taps alone that a pattern names; patterns of other models are passed over.

        Raises:
            ValueError: a pattern that names no tap of this model.
        """
        found: list[str] = []
        for pattern in (each for each in patterns if model_of(each) == self.name):
            base, at, level = pattern.partition("@")
            named = [f"{tap}{at}{level}" for tap in self.taps if fnmatchcase(tap, base)]
            if not named:
                raise ValueError(f"eval.probe.taps has {pattern!r}, but {self.name} has {', '.join(self.taps)}")
            found += named
        return replace(self, taps=tuple(dict.fromkeys(found)))


def model_of(tap: str) -> str:
    """The model that a tap, or a pattern of taps, belongs to."""
    return tap if tap.startswith("timm:") else tap.split(".")[0]


def asked_representations(
    patterns: Sequence[str], makers: Mapping[str, Callable[[], Representation]], device: torch.device
) -> list[Representation]:
    """Every model that the patterns ask for and that is there or named by a file, in the order of the patterns.

    Args:
        makers: for each model that is there, what opens it.

    Raises:
        ValueError: a pattern that names no tap of its model, a file that cannot be opened, or two models of one name.
    """
    opened: list[Representation] = []
    for model in dict.fromkeys(map(model_of, patterns)):
        if model in makers:
            opened.append(makers[model]().at(patterns))
        elif model.startswith("timm:"):
            opened.append(timm_representation(model, device))
    for subject, count in Counter(representation.subject for representation in opened).items():
        if count > 1:
            raise ValueError(f"eval.probe.taps has {count} models whose scores would be of {subject!r}: rename a file")
    return opened


def pixel_representation() -> Representation:
    """Raw pixels, shrunk to at most 32 x 32."""

    def read(images: Tensor, taps: Sequence[str]) -> dict[str, Tensor]:
        return {"pixels": _pixels(images)}

    facts = {"resize": f"bilinear antialiased to at most {PIXEL_SIDE}"}
    return Representation(name="pixels", subject="pixels", taps=("pixels",), read=read, facts=facts)


def tokenizer_representation(tokenizer: Any) -> Representation:
    """Activations of the tokenizer's encoder and bottleneck."""
    return _of_model("tokenizer", tokenizer.taps, tokenizer.features, {"tokenizer": tokenizer.fingerprint})


def generator_representation(generator: Any, tokenizer: Any, encode: Encode) -> Representation:
    """Activations of a generator's blocks over the codes or latents of real images, behind the null label."""
    facts: dict[str, Any] = {"generator": generator.fingerprint, "tokenizer": tokenizer.fingerprint}
    if generator.num_classes and not generator.label_dropout:
        print(
            f"probe: {generator.family} was trained with label_dropout=0 and never saw the null label that its features"
            f" stand behind; for a fair probe train with {generator.family}.model.label_dropout above 0"
        )
        facts["null_label"] = "never trained"
    if generator.family == "diffusion":
        facts["logsnr"] = FEATURE_LOGSNR
    name = next(model for model, subject in REPRESENTATIONS.items() if subject == generator.family)
    return _of_model(name, generator.taps, _over(generator, encode), facts)


def random_representation(generator: Any, tokenizer: Any, encode: Encode) -> Representation:
    """The same architecture as an autoregressive generator with fresh weights: what training must beat."""
    twin = generator.randomised(RANDOM_SEED)
    facts = {
        "generator": generator.fingerprint,
        "tokenizer": tokenizer.fingerprint,
        "weights": f"random, seed {RANDOM_SEED}",
    }
    return _of_model("vim_random", twin.taps, _over(twin, encode), facts)


def timm_representation(spec: str, device: torch.device) -> Representation:
    """The pooled features of a network of timm, `timm:<model>:<weights>`.

    Raises:
        ValueError: no such model or file, or weights that do not fit.
    """
    extractor = open_features(spec).to(device)

    def read(images: Tensor, taps: Sequence[str]) -> dict[str, Tensor]:
        return {spec: extractor.outputs(images)["features"]}

    return Representation(name=spec, subject=extractor.name, taps=(spec,), read=read, facts=extractor.identity())


def encoded_once(tokenizer: Any) -> Encode:
    """The tokenizer's `codes_and_latents` for several models that look at the same images one after the other.

    Images are kept by reference, so nobody may write into them. They are compared where they lie, since on a GPU a hash
    of them would take longer than the models do.
    """
    known: deque[tuple[Tensor, tuple[Tensor | None, Tensor]]] = deque()

    def encode(images: Tensor) -> tuple[Tensor | None, Tensor]:
        for shown, found in known:
            if torch.equal(shown, images):
                return found
        known.append((images, tokenizer.codes_and_latents(images)))
        while len(known) > 1 and sum(len(shown) for shown, _ in known) > REMEMBERED:
            known.popleft()
        return known[-1][1]

    return encode


def _over(generator: Any, encode: Encode) -> Read:
    """A generator's features of the codes or latents of images."""

    def read(images: Tensor, taps: Sequence[str]) -> dict[str, Tensor]:
        codes, latents = encode(images)
        return generator.features(codes if generator.family == "autoregressive" else latents, taps)

    return read


def _of_model(name: str, taps: Sequence[str], features: Read, facts: dict[str, Any]) -> Representation:
    """A model whose `features` know taps by their own names, without the model's."""
    prefix = f"{name}."

    def read(images: Tensor, wanted: Sequence[str]) -> dict[str, Tensor]:
        found = features(images, [tap.removeprefix(prefix) for tap in wanted])
        return {f"{prefix}{tap}": value for tap, value in found.items()}

    whole = tuple(f"{prefix}{tap}" for tap in taps)
    return Representation(name=name, subject=REPRESENTATIONS[name], taps=whole, read=read, facts=facts)


def _pixels(images: Tensor) -> Tensor:
    x = to_float(images)
    if max(x.shape[-2:]) > PIXEL_SIDE:
        x = F.interpolate(x, (PIXEL_SIDE, PIXEL_SIDE), mode="bilinear", antialias=True)
    return x.flatten(1)  # [B, 3 * side * side]
