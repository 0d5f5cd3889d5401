"""Small grey pictures, each known by its level, for the tests of the sources."""

import io

from PIL import Image

from engine.config import DataConfig
from engine.images import ImageSet
from engine.sources import open_images


def grey(level: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (8, 8), level).save(buffer, "PNG")
    return buffer.getvalue()


def levels(images: ImageSet) -> list[int]:
    """Every image's grey level, which the tests use as its name."""
    return [level for batch in images.in_order(16) for level in batch["images"][:, 0, 0, 0].tolist()]


def config(source: str, path=None, **keys) -> DataConfig:
    return DataConfig(**{"source": source, "path": path and str(path), "size": 8, **keys})


def both(settings: DataConfig) -> tuple[list[int], list[int]]:
    return levels(open_images(settings, "train")), levels(open_images(settings, "test"))


def make_folder(root, layout: dict[str, list[int]]):
    for folder, names in layout.items():
        (root / folder).mkdir(parents=True, exist_ok=True)
        for level in names:
            (root / folder / f"{level:03d}.png").write_bytes(grey(level))
    return root
