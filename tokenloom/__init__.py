"""tokenloom: train a tokenizer, train a generator on its codes, score both.

    import tokenloom
    tokenizer = tokenloom.load_tokenizer("runs/digits")
    images = tokenloom.sample("runs/digits", "autoregressive", labels=[3, 3, 7], seeds=[0, 1, 2])

The names below are loaded at first use, so that importing the package costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenloom.api import load_generator, load_tokenizer, reconstruct, sample, score, score_images, stream

__version__ = "0.1.0"
__all__ = ["load_generator", "load_tokenizer", "reconstruct", "sample", "score", "score_images", "stream"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"tokenloom has no {name!r}; it has {', '.join(__all__)}")
    from tokenloom import api

    return getattr(api, name)
