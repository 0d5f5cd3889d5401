"""A picture of images on the way: the first of a batch, rewritten about every second while its codes are decoded."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from engine.log import save_grid
from generator.autoregressive import Autoregressive
from generator.diffusion import Diffusion
from generator.partial import paint_partial
from tokenizer.model import Tokenizer

SHOWN, COLUMNS = 16, 8
SECONDS = 1.0  # between two pictures
Watch = Callable[[Tensor, int], None]  # codes int64 [B, T], and how many of each row stand


@contextmanager
def watching(tokenizer: Tokenizer, path: Path | None) -> Iterator[Watch | None]:
    """What turns codes into the picture `path`, which is gone once the block is left; None if path is None."""
    if path is None:
        yield None
        return
    picture = _Picture(tokenizer, path)
    try:
        yield picture
    finally:
        path.unlink(missing_ok=True)


def check_streams(generator: Autoregressive | Diffusion) -> None:
    """Raise ValueError unless the generator makes its samples code by code."""
    if not isinstance(generator, Autoregressive):
        raise ValueError(
            f"samples of {generator.family} do not grow code by code, so there is nothing to show on the way: "
            "choose the family autoregressive (--only autoregressive), or do not stream"
        )


class _Picture:
    def __init__(self, tokenizer: Tokenizer, path: Path) -> None:
        self.tokenizer, self.path = tokenizer, path
        self.last = time.monotonic()
        print(f"images on the way: {path}", flush=True)

    def __call__(self, codes: Tensor, done: int) -> None:
        if time.monotonic() - self.last < SECONDS:
            return
        save_grid(paint_partial(self.tokenizer, codes[:SHOWN], done), self.path, columns=COLUMNS)
        self.last = time.monotonic()  # after painting, lest a slow decoder did nothing else
