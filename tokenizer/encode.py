"""Images to codes and latents on disk, for the generators: `<run>/codes/{train,test}/`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from engine.batches import DRAWS
from engine.config import DataConfig, RunConfig
from engine.device import Device
from engine.flops import forward_flops
from engine.images import ImageSet
from engine.log import progress
from engine.shards import Shards, ShardWriter, open_shards
from engine.sources import open_images
from engine.splits import digest
from tokenizer.config import TokenizerConfig
from tokenizer.model import Tokenizer, load_tokenizer
from tokenizer.smaller import check_factor, smaller_version

Split = Literal["train", "test"]
SPLITS: tuple[Split, ...] = ("train", "test")
MADE_FROM = ("images", "augmentation", "captions", "low_resolution")  # keys of meta.json; beside them, the tokenizer


def encode_images(
    *,
    run: RunConfig,
    data: DataConfig,
    tokenizer: TokenizerConfig,
    device: Device,
    splits: Sequence[Split] = SPLITS,
) -> Path:
    """Encode these splits with the run's trained tokenizer; returns the folder that holds them.

    A split that is there already, from this tokenizer, these images, captions and views, is left alone. The training
    split holds `tokenizer.views` versions of each image, the test split the centre crop alone; with
    `tokenizer.low_resolution` each version has the latents of its smaller version beside its own.

    Raises:
        ValueError: there is no trained tokenizer, it was trained at another image size, or images cannot be shrunk by
            the factor of low_resolution.
    """
    model = load_tokenizer(run.folder).to(device.device)
    check_size(model, data, run.folder)
    if tokenizer.low_resolution is not None:
        check_factor(data.size, tokenizer.low_resolution)
    for split in splits:
        images, folder = open_images(data, split), run.folder / "codes" / split
        views = tokenizer.views if split == "train" else 1
        augmentation = {"views": views, "crop": data.crop, "flip": data.flip} if views > 1 else {}
        meta = shard_meta(model, images, augmentation, low_resolution=tokenizer.low_resolution)
        if not is_encoded(folder, meta):
            size = tokenizer.encode_batch_size
            encode_split(model, images, folder, meta, views=views, batch_size=size, device=device)
        device.barrier()
    return run.folder / "codes"


def borrowed_tokenizer(run: RunConfig, data: DataConfig) -> Tokenizer:
    """The tokenizer of the run that run.tokenizer names.

    Raises:
        ValueError: it has no finished one, or one of another image size, or this run has one of its own.
    """
    folder = run.tokenizer_folder
    if (run.folder / "tokenizer").is_dir():
        raise ValueError(
            f"run.tokenizer={run.tokenizer}, but {run.folder} has a tokenizer of its own: leave run.tokenizer out, or"
            " give this run another name (--run.name=...)"
        )
    if not (folder / "tokenizer" / "model.json").is_file():
        told = "give the folder of a run that has trained one"
        raise ValueError(f"run.tokenizer={run.tokenizer}: {folder / 'tokenizer'} holds no finished tokenizer; {told}")
    tokenizer = load_tokenizer(folder)
    check_size(tokenizer, data, folder)
    return tokenizer


def open_codes(run: RunConfig, split: Split, tokenizer: Tokenizer) -> Shards:
    """The codes and latents of a split that a run learns from: its own, or those of the run that has its tokenizer.

    Raises:
        ValueError: they are missing, incomplete, cut, or of another tokenizer; says which command makes them.
    """
    try:
        return open_shards(run.tokenizer_folder / "codes" / split, fingerprint=tokenizer.code_fingerprint)
    except ValueError as error:
        if run.tokenizer is None:
            raise
        command = f"tokenloom encode --config {run.tokenizer_folder / 'config.yaml'}"
        raise ValueError(f"run.tokenizer={run.tokenizer} lacks codes ({error}): `{command}` makes them") from error


def check_size(tokenizer: Tokenizer, data: DataConfig, folder: Path) -> None:
    """Raise ValueError unless images of data.size fit the tokenizer of the run in `folder`."""
    if tokenizer.image_size != data.size:
        trained = f"the tokenizer in {folder} was trained at {tokenizer.image_size} pixels"
        raise ValueError(f"data.size={data.size}, but {trained}: use that size, or another run.name to train anew")


def encode_split(
    tokenizer: Tokenizer,
    images: ImageSet,
    folder: Path,
    meta: dict[str, Any],
    *,
    views: int,
    batch_size: int,
    device: Device,
) -> None:
    """Write the codes and latents of all readable images of one split; every process encodes its share.

    `meta` is that of `shard_meta`; by it the smaller images are encoded too.
    """
    factor, texts = meta.get("low_resolution"), images.captions
    start, stop = (len(images) * rank // device.world for rank in (device.rank, device.rank + 1))
    names = ("original", *(f"view_{view}" for view in range(1, views)))
    draws = [view_draws(len(images), view) for view in range(1, views)]
    with ShardWriter(
        folder,
        views=names,
        vocab_size=tokenizer.vocab_size or None,
        rank=device.rank,
        world=device.world,
        barrier=device.barrier,
    ) as writer:
        with progress(total=stop - start, title=f"encode {images.split}", unit="image", enabled=device.is_main) as bar:
            for batch in images.in_order(batch_size, start=start, stop=stop):
                rows = batch["indices"].numpy()
                versions = [batch["images"], *(images.load(rows, each[rows])["images"] for each in draws)]
                pairs = [tokenizer.codes_and_latents(version.to(device.device)) for version in versions]
                found = [codes for codes, _ in pairs if codes is not None]
                codes = torch.stack(found, 1) if found else None  # [B, V, T]
                latents = torch.stack([latents for _, latents in pairs], 1)  # [B, V, C, h, w]
                small = [smaller_version(version, factor).to(device.device) for version in versions] if factor else []
                writer.append(
                    labels=batch["labels"],
                    codes=codes,
                    latents=latents,
                    smaller=torch.stack([tokenizer.to_latents(each) for each in small], 1) if small else None,
                    captions=None if texts is None else [texts[row] for row in rows],
                )
                bar.update(len(rows))
        writer.close(meta)


def view_draws(num_images: int, view: int) -> np.ndarray:
    """What draws view `view` (from 1) of each image, float64 [N, DRAWS]; odd views are the mirrored ones."""
    draws = np.random.default_rng([view, 6]).random((num_images, DRAWS))
    draws[:, 0] = view % 2 * 0.5
    return draws


def shard_meta(
    tokenizer: Tokenizer, images: ImageSet, augmentation: dict[str, Any], *, low_resolution: int | None = None
) -> dict[str, Any]:
    """What a generator must know of its codes and latents, and what made them.

    `captions`, a hash of them, and `low_resolution`, the factor, are there only where there are captions and smaller
    images.
    """
    return {
        "tokenizer_fingerprint": tokenizer.code_fingerprint,
        "grid": list(tokenizer.grid),
        "vocab_size": tokenizer.vocab_size,
        "latent_shape": list(tokenizer.latent_shape),
        "class_names": list(images.class_names),
        "images": images.content(),
        "augmentation": augmentation,
        **caption_facts(images),
        **({} if low_resolution is None else {"low_resolution": low_resolution}),
    }


def caption_facts(images: ImageSet) -> dict[str, str]:
    """What tells that captions have changed: their hash; nothing where there are none."""
    return {} if images.captions is None else {"captions": digest(*images.captions)}


def is_encoded(folder: Path, meta: dict[str, Any]) -> bool:
    """Whether the folder is complete and was made from what `meta` says."""
    try:
        shards = open_shards(folder, fingerprint=meta["tokenizer_fingerprint"])
    except ValueError:
        return False
    return all(shards.meta.get(key) == meta.get(key) for key in MADE_FROM)


def encode_flops(tokenizer: Tokenizer) -> int:
    """Operations that make the codes of one image."""
    size = tokenizer.image_size
    return forward_flops(_Encoding(tokenizer), torch.empty(1, 3, size, size, dtype=torch.uint8))


class _Encoding(nn.Module):
    """A tokenizer's encoder, as a module that can be counted."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.tokenizer = tokenizer

    def forward(self, images: Tensor) -> Tensor:
        return self.tokenizer.encode(images)
