"""Images to codes and latents on disk, for the generators: `<run>/codes/{train,test}/`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch

from engine.config import DataConfig, RunConfig
from engine.device import Device
from engine.images import ImageSet
from engine.log import progress
from engine.shards import ShardWriter, open_shards
from engine.sources import open_images
from tokenizer.config import TokenizerConfig
from tokenizer.model import Tokenizer, load_tokenizer

SPLITS: tuple[Literal["train", "test"], ...] = ("train", "test")


def encode_images(*, run: RunConfig, data: DataConfig, tokenizer: TokenizerConfig, device: Device) -> Path:
    """Encode both splits with the run's trained tokenizer; returns the folder that holds them.

    A split that is there already, from this tokenizer and these images, is left alone. The training split also holds
    the mirrored images as a second view if `tokenizer.flipped_view`; the test split never does.

    Raises:
        ValueError: there is no trained tokenizer, or it was trained at another image size.
    """
    model = load_tokenizer(run.folder).to(device.device)
    if model.image_size != data.size:
        trained = f"the tokenizer in {run.folder} was trained at {model.image_size} pixels"
        raise ValueError(f"data.size={data.size}, but {trained}: use that size, or another run.name to train anew")
    for split in SPLITS:
        images, folder = open_images(data, split), run.folder / "codes" / split
        views = ("original", "flip") if tokenizer.flipped_view and split == "train" else ("original",)
        if not is_encoded(folder, model, images, views):
            encode_split(model, images, folder, views=views, batch_size=tokenizer.encode_batch_size, device=device)
        device.barrier()
    return run.folder / "codes"


def encode_split(
    tokenizer: Tokenizer, images: ImageSet, folder: Path, *, views: tuple[str, ...], batch_size: int, device: Device
) -> None:
    """Write the codes and latents of all readable images of one split; every process encodes its share."""
    start, stop = (len(images) * rank // device.world for rank in (device.rank, device.rank + 1))
    writer = ShardWriter(
        folder,
        views=views,
        vocab_size=tokenizer.vocab_size,
        rank=device.rank,
        world=device.world,
        barrier=device.barrier,
    )
    with progress(total=stop - start, title=f"encode {images.split}", unit="image", enabled=device.is_main) as bar:
        for batch in images.in_order(batch_size, start=start, stop=stop):
            pixels = batch["images"].to(device.device)
            versions = [pixels.flip(-1) if view == "flip" else pixels for view in views]
            codes, latents = zip(*(tokenizer.codes_and_latents(version) for version in versions), strict=True)
            writer.append(labels=batch["labels"], codes=torch.stack(codes, 1), latents=torch.stack(latents, 1))
            bar.update(len(pixels))
    writer.close(shard_meta(tokenizer, images))


def shard_meta(tokenizer: Tokenizer, images: ImageSet) -> dict[str, object]:
    """What a generator must know of its codes and latents."""
    return {
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "grid": list(tokenizer.grid),
        "vocab_size": tokenizer.vocab_size,
        "latent_shape": list(tokenizer.latent_shape),
        "class_names": list(images.class_names),
        "images": images.identity(),
    }


def is_encoded(folder: Path, tokenizer: Tokenizer, images: ImageSet, views: tuple[str, ...]) -> bool:
    """Whether the folder is complete and comes from this tokenizer, these images and these views."""
    try:
        shards = open_shards(folder, fingerprint=tokenizer.fingerprint)
    except ValueError:
        return False
    return shards.views == views and shards.meta["images"] == images.identity()
