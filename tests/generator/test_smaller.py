"""Files of any of the two sizes make the condition that the test split has on disk."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from generator.smaller import enlarged_latents, smaller_latents
from tokenizer.config import TokenizerModelConfig, TowerConfig
from tokenizer.model import Tokenizer
from tokenizer.smaller import enlarge, shrink

TOWER = TowerConfig(blocks=1, width=32, heads=2, mlp=64)
MODEL = TokenizerModelConfig(patch_size=4, vocab_size=32, code_dim=4, encoder=TOWER, decoder=TOWER)


@pytest.fixture
def tokenizer() -> Tokenizer:
    torch.manual_seed(0)
    return Tokenizer(MODEL, image_size=16).eval().requires_grad_(False)


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def saved(path: Path, image: torch.Tensor) -> Path:
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    return path


def test_a_file_of_either_size_makes_the_latents_of_the_image_enlarged(
    tokenizer: Tokenizer, images: torch.Tensor, tmp_path: Path
) -> None:
    small = shrink(images, 4)
    paths = [saved(tmp_path / "0.png", images[0]), saved(tmp_path / "1.png", small[1])]
    made = smaller_latents(tokenizer, paths, factor=4)
    expected = tokenizer.to_latents(enlarge(small, 16)[:2])
    assert made.shape == (2, *tokenizer.latent_shape) and made.dtype == torch.float32
    assert torch.equal(made, expected.half().float())
    assert torch.equal(enlarged_latents(tokenizer, small[:2], factor=4), made)


def test_files_that_do_not_fit_are_refused(tokenizer: Tokenizer, images: torch.Tensor, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no image is given"):
        smaller_latents(tokenizer, [], factor=4)
    odd = saved(tmp_path / "odd.png", images[0, :, :8])
    with pytest.raises(ValueError, match=r"odd\.png has 16 x 8 pixels, .* of 4 x 4, or of 16 x 16"):
        smaller_latents(tokenizer, [odd], factor=4)
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(ValueError, match=r"text\.png: not a readable image"):
        smaller_latents(tokenizer, [tmp_path / "text.png"], factor=4)
    with pytest.raises(ValueError, match=r"absent\.png: not a readable image"):
        smaller_latents(tokenizer, [tmp_path / "absent.png"], factor=4)


def test_pixels_that_do_not_fit_are_refused(tokenizer: Tokenizer, images: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"torch\.float32 \[3, 3, 16, 16\]: give uint8"):
        enlarged_latents(tokenizer, images.float(), factor=4)
    with pytest.raises(ValueError, match=r"have 4 x 8 pixels"):
        enlarged_latents(tokenizer, images[:, :, :8, :4], factor=4)
    with pytest.raises(ValueError, match=r"have 16 x 16 pixels, but this generator takes 4 x 4"):
        enlarged_latents(tokenizer, images, factor=4)
