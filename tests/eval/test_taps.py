"""What the probe reads of a model: all taps from one pass, under whole names, the same numbers as tap by tap."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from timm import create_model

from engine.config import to_dict
from engine.images import to_float
from eval.taps import (
    PIXEL_SIDE,
    REMEMBERED,
    Representation,
    asked_representations,
    encoded_once,
    generator_representation,
    pixel_representation,
    random_representation,
    tokenizer_representation,
)
from generator.autoregressive import VIM, Autoregressive
from generator.config import AutoregressiveModelConfig, DenoiserModelConfig, DiffusionConfig
from generator.diffusion import Diffusion, build_denoiser
from tokenizer.config import TokenizerModelConfig, TowerConfig
from tokenizer.model import Tokenizer

TOWER = TowerConfig(blocks=2, width=16, heads=2, mlp=32)
MODEL = AutoregressiveModelConfig(preset="tiny", depth=3, width=16, heads=2)
DENOISER = DiffusionConfig(model=DenoiserModelConfig(preset="tiny", depth=2, width=16, heads=2))
FACTS = {
    "num_classes": 2, "class_names": ["a", "b"], "grid": [2, 2], "vocab_size": 8, "latent_shape": [4, 2, 2],
    "tokenizer_fingerprint": "t", "fingerprint": "g",
}  # fmt: skip
IMAGES = torch.randint(256, (6, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    torch.manual_seed(0)
    model = TokenizerModelConfig(patch_size=4, vocab_size=8, code_dim=4, encoder=TOWER, decoder=TOWER)
    return Tokenizer(model, image_size=8).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def vim() -> Autoregressive:
    torch.manual_seed(1)  # not the seed of the untrained twin
    network = VIM(MODEL, vocab_size=8, length=4, num_classes=2)
    return Autoregressive(network, FACTS | {"config": {"model": to_dict(MODEL)}}).eval()


@pytest.fixture(scope="module")
def dit() -> Diffusion:
    torch.manual_seed(0)
    network = build_denoiser(DENOISER.model, FACTS)
    for weight in network.parameters():
        torch.nn.init.normal_(weight, std=0.1)  # new gates are closed
    return Diffusion(network, FACTS | {"config": to_dict(DENOISER)}).eval()


Makers = dict[str, Callable[[], Representation]]


@pytest.fixture(scope="module")
def makers(tokenizer: Tokenizer, vim: Autoregressive, dit: Diffusion) -> Makers:
    encode = encoded_once(tokenizer)
    return {
        "pixels": pixel_representation,
        "tokenizer": lambda: tokenizer_representation(tokenizer),
        "vim": lambda: generator_representation(vim, tokenizer, encode),
        "vim_random": lambda: random_representation(vim, tokenizer, encode),
        "dit": lambda: generator_representation(dit, tokenizer, encode),
    }


def asked(makers: Makers, *patterns: str) -> list[str]:
    return [tap for each in asked_representations(patterns, makers, CPU) for tap in each.taps]


def test_taps_are_asked_for_by_name(makers: Makers) -> None:
    blocks = ["vim.block1", "vim.block2", "vim.block3"]
    assert asked(makers, "vim.*") == blocks and asked(makers, "vim.block[23]") == blocks[1:]
    whole = ["patch", "encoder.1", "encoder.2", "pre_quant", "post_quant"]
    assert asked(makers, "tokenizer.*") == [f"tokenizer.{tap}" for tap in whole]
    assert asked(makers, "tokenizer.*_quant", "pixels") == ["tokenizer.pre_quant", "tokenizer.post_quant", "pixels"]
    assert asked(makers, "dit.block1", "dit.*", "dit.*@logsnr=-1") == [
        "dit.block1", "dit.block2", "dit.block1@logsnr=-1", "dit.block2@logsnr=-1",
    ]  # fmt: skip


def test_models_that_are_not_there_are_left_out_and_what_is_not_asked_for_is_not_opened(makers: Makers) -> None:
    assert asked({"pixels": makers["pixels"]}, "pixels", "vim.block9", "dit.*") == ["pixels"]

    def opened() -> Representation:
        raise AssertionError

    assert asked({**makers, "dit": opened}, "vim.block1") == ["vim.block1"]


@pytest.mark.parametrize("pattern", ["vim.block9", "tokenizer.codes", "dit.block3@logsnr=1", "vim_random.patch", "dit"])
def test_a_name_that_a_model_does_not_have_is_an_error_that_lists_its_taps(makers: Makers, pattern: str) -> None:
    model = pattern.split(".")[0]
    with pytest.raises(ValueError, match=rf"eval\.probe\.taps has '{pattern}', but {model} has {model}\.\w+, {model}"):
        asked(makers, "pixels", pattern)


def test_all_taps_of_a_model_come_from_one_pass_and_are_those_of_each(
    makers: Makers, tokenizer: Tokenizer, vim: Autoregressive, dit: Diffusion
) -> None:
    passes: list[str] = []
    first = {"tokenizer": tokenizer.encoder.blocks[0], "vim": vim.network.blocks[0], "dit": dit.network.blocks[0]}
    hooks = [block.register_forward_hook(lambda *args, name=name: passes.append(name)) for name, block in first.items()]
    found = {}
    for name in ("tokenizer", "vim", "vim_random", "dit"):
        found[name] = makers[name]().outputs(IMAGES)
    assert passes == ["tokenizer", "tokenizer", "vim", "dit"]  # once for its taps, once for codes and latents
    for hook in hooks:
        hook.remove()
    expected: dict[str, dict[str, Any]] = {
        "tokenizer": tokenizer.features(IMAGES, tokenizer.taps),
        "vim": vim.features(tokenizer.encode(IMAGES), vim.taps),
        "vim_random": vim.randomised(0).features(tokenizer.encode(IMAGES), vim.taps),
        "dit": dit.features(tokenizer.to_latents(IMAGES), dit.taps),
    }
    for name, taps in expected.items():
        assert list(found[name]) == [f"{name}.{tap}" for tap in taps]
        for tap, features in taps.items():
            torch.testing.assert_close(found[name][f"{name}.{tap}"], features)
    assert not torch.allclose(found["vim"]["vim.block3"], found["vim_random"]["vim_random.block3"])


def test_a_noise_level_can_be_named(makers: Makers, dit: Diffusion, tokenizer: Tokenizer) -> None:
    [noisy] = asked_representations(["dit.block2", "dit.block2@logsnr=-2"], makers, CPU)
    found = noisy.outputs(IMAGES)
    expected = dit.features(tokenizer.to_latents(IMAGES), ["block2@logsnr=-2"])["block2@logsnr=-2"]
    torch.testing.assert_close(found["dit.block2@logsnr=-2"], expected)
    assert not torch.allclose(found["dit.block2"], expected, atol=1e-3)


def test_what_decides_the_features_identifies_them(makers: Makers) -> None:
    told = [makers[name]().at([f"{name}.block1"]).identity() for name in ("vim", "vim_random", "dit")]
    assert [each["taps"] for each in told] == [["vim.block1"], ["vim_random.block1"], ["dit.block1"]]
    assert [each["generator"] for each in told] == ["g", "g", "g"] and told[1]["weights"] == "random, seed 0"
    assert told[2]["logsnr"] == 2.0 and all("tokenizer" in each for each in told)
    assert [makers[name]().subject for name in makers] == [
        "pixels", "tokenizer", "autoregressive", "autoregressive_random", "diffusion",
    ]  # fmt: skip


def test_pixels_are_shrunk_only_if_there_are_more_than_32() -> None:
    pixels = pixel_representation()
    assert torch.equal(pixels.outputs(IMAGES)["pixels"], to_float(IMAGES).flatten(1))
    large = torch.full((2, 3, 64, 48), 200, dtype=torch.uint8)
    shrunk = pixels.outputs(large)["pixels"]
    assert shrunk.shape == (2, 3 * PIXEL_SIDE**2)
    torch.testing.assert_close(shrunk, to_float(large[:, :, :32, :32]).flatten(1))


def test_images_are_encoded_once_and_forgotten_in_time() -> None:
    batches: list[int] = []

    def codes_and_latents(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        batches.append(len(images))
        return images.flatten(1)[:, :2].long(), images.float()

    encode = encoded_once(SimpleNamespace(codes_and_latents=codes_and_latents))
    first, second = torch.zeros(4, 3, 2, 2, dtype=torch.uint8), torch.ones(REMEMBERED, 3, 2, 2, dtype=torch.uint8)
    codes, latents = encode(first)
    assert torch.equal(encode(first.clone())[0], codes) and torch.equal(latents, first.float()) and batches == [4]
    assert encode(first + 7)[0].eq(7).all() and batches.pop() == 4
    assert encode(second)[0].eq(1).all() and encode(second)[0].eq(1).all() and batches == [4, REMEMBERED]
    encode(first)
    assert batches == [4, REMEMBERED, 4]


def test_a_network_of_timm_has_one_tap(tmp_path) -> None:
    torch.manual_seed(0)
    network = create_model("test_vit", num_classes=0).eval()
    path = tmp_path / "tiny.pth"
    torch.save(network.state_dict(), path)
    spec = f"timm:test_vit:{path}"
    [found] = asked_representations([spec, "vim.*"], {}, CPU)
    assert (found.taps, found.subject) == ((spec,), "tiny")
    features = found.outputs(torch.zeros(2, 3, 160, 160, dtype=torch.uint8))[spec]
    assert features.shape == (2, network.num_features) and found.identity()["weights"]
    with pytest.raises(ValueError, match="no such weights file"):
        asked_representations([f"timm:test_vit:{tmp_path / 'none.pth'}"], {}, CPU)


def test_two_models_cannot_have_one_name(tmp_path, makers: Makers) -> None:
    path = tmp_path / "pixels.pth"
    torch.save(create_model("test_vit", num_classes=0).state_dict(), path)
    with pytest.raises(ValueError, match=r"eval\.probe\.taps has 2 models whose scores would be of 'pixels': rename"):
        asked_representations(["pixels", f"timm:test_vit:{path}"], makers, CPU)
