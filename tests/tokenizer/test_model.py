"""The tokenizer's contract: shapes, dtypes, round trips, refusals, files."""

from pathlib import Path

import pytest
import torch

from engine.checkpoint import save_model
from tokenizer.config import TOWERS, TokenizerModelConfig
from tokenizer.model import Tokenizer, count_parameters, load_tokenizer, model_card
from tokenizer.vit import patchify


def test_shapes_and_dtypes(tokenizer: Tokenizer, images: torch.Tensor) -> None:
    codes, latents = tokenizer.encode(images), tokenizer.to_latents(images)
    assert tokenizer.grid == (4, 4) and tokenizer.latent_shape == (4, 4, 4) and tokenizer.vocab_size == 32
    assert codes.shape == (6, 16) and codes.dtype == torch.int64 and 0 <= codes.min() and codes.max() < 32
    assert latents.shape == (6, 4, 4, 4) and latents.dtype == torch.float32
    for output in (tokenizer.decode(codes), tokenizer.from_latents(latents)):
        assert output.shape == images.shape and output.dtype == torch.uint8


def test_latents_and_codes_decode_to_the_same_images(tokenizer: Tokenizer, images: torch.Tensor) -> None:
    tokenizer.latent_mean.normal_()
    tokenizer.latent_std.uniform_(0.5, 2)
    latents = tokenizer.to_latents(images)
    assert torch.equal(tokenizer.latents_to_codes(latents), tokenizer.encode(images))
    assert torch.equal(tokenizer.from_latents(latents), tokenizer.decode(tokenizer.encode(images)))


def test_latents_lie_in_raster_order(tokenizer: Tokenizer, images: torch.Tensor) -> None:
    latents, vectors = tokenizer.to_latents(images), tokenizer.vectors(images)
    assert torch.equal(latents[:, :, 1, 2], vectors[:, 1 * 4 + 2])


def test_codes_survive_the_latent_of_their_code(tokenizer: Tokenizer) -> None:
    codes = torch.arange(32).reshape(2, 16)
    vectors = tokenizer.quantizer.lookup(codes)
    assert torch.equal(tokenizer.latents_to_codes(vectors.transpose(1, 2).reshape(2, 4, 4, 4)), codes)


def test_training_pass_and_inference_agree(tokenizer: Tokenizer, images: torch.Tensor) -> None:
    reconstruction, codes, _, _ = tokenizer(images.float() / 127.5 - 1)
    assert torch.equal(codes, tokenizer.encode(images))
    pixels = (reconstruction.detach() * 127.5 + 127.5).clamp(0, 255)
    assert (tokenizer.decode(codes).float() - pixels).abs().max() <= 0.51


def test_same_images_same_codes_whatever_the_batch(tokenizer: Tokenizer, images: torch.Tensor) -> None:
    assert torch.equal(tokenizer.encode(images), tokenizer.encode(images))
    singly = torch.cat([tokenizer.encode(image[None]) for image in images])
    assert torch.equal(singly, tokenizer.encode(images))


def test_features_of_every_tap(tokenizer: Tokenizer, images: torch.Tensor) -> None:
    assert tokenizer.taps == ("patch", "encoder.1", "encoder.2", "pre_quant", "post_quant")
    found = tokenizer.features(images, tokenizer.taps)
    assert {tap: tuple(value.shape) for tap, value in found.items()} == {
        "patch": (6, 32), "encoder.1": (6, 32), "encoder.2": (6, 32), "pre_quant": (6, 4), "post_quant": (6, 4),
    }  # fmt: skip
    assert torch.equal(found["pre_quant"], tokenizer.vectors(images).mean(1))
    assert torch.equal(found["post_quant"], tokenizer.quantizer.lookup(tokenizer.encode(images)).mean(1))
    embedded = tokenizer.encoder.embed(patchify(images / 127.5 - 1, 4)) + tokenizer.encoder.positions
    torch.testing.assert_close(found["patch"], embedded.mean(1))
    assert not torch.allclose(found["encoder.1"], found["encoder.2"])
    with pytest.raises(ValueError, match=r"tap='decoder.1' is unknown.*patch, encoder.1, .*, post_quant"):
        tokenizer.features(images, ["patch", "decoder.1"])


def test_features_take_one_pass_as_far_as_the_deepest_tap(tokenizer: Tokenizer, images: torch.Tensor) -> None:
    passes: list[int] = []
    whole = tokenizer.features(images, tokenizer.taps)
    hooks = [
        block.register_forward_hook(lambda *args, number=number: passes.append(number))
        for number, block in enumerate(tokenizer.encoder.blocks, start=1)
    ]
    asked = {("patch",): [], ("encoder.1", "patch"): [1], tokenizer.taps: [1, 2], ("post_quant",): [1, 2], (): []}
    for taps, blocks in asked.items():
        passes.clear()
        found = tokenizer.features(images, taps)
        assert passes == blocks and found.keys() == set(taps)
        assert all(torch.equal(found[tap], whole[tap]) and not found[tap].requires_grad for tap in taps)
    for hook in hooks:
        hook.remove()


def test_inference_needs_no_gradients_and_gives_none(tokenizer: Tokenizer, images: torch.Tensor) -> None:
    latents = tokenizer.to_latents(images)
    assert not latents.requires_grad and not latents.is_inference()  # usable as a training input


def test_wrong_images_are_refused(tokenizer: Tokenizer, images: torch.Tensor) -> None:
    for wrong in (images[..., :8], images.float(), images[:, :1], images[0]):
        with pytest.raises(ValueError, match=r"reads uint8 \[B, \*\(3, 16, 16\)\]"):
            tokenizer.encode(wrong)


def test_wrong_codes_and_latents_are_refused(tokenizer: Tokenizer) -> None:
    for wrong in (torch.zeros(2, 15, dtype=torch.int64), torch.zeros(2, 16), torch.zeros(16, dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"reads int64 \[B, 16\]"):
            tokenizer.decode(wrong)
    for value in (-1, 32):
        with pytest.raises(ValueError, match=r"outside this tokenizer's 0 \.\. 31"):
            tokenizer.decode(torch.full((2, 16), value))
    with pytest.raises(ValueError, match="latents are"):
        tokenizer.from_latents(torch.zeros(2, 4, 4, 3))


def test_patch_size_must_divide_the_image() -> None:
    with pytest.raises(ValueError, match=r"data.size=30, tokenizer.model.patch_size=8"):
        Tokenizer(TokenizerModelConfig(preset="tiny-tiny"), image_size=30)


@pytest.mark.parametrize("tower", TOWERS)
def test_every_preset_has_the_parameters_that_its_table_implies(tower: str) -> None:
    """Weights and biases counted by hand: attention 4 d^2 + 4 d, MLP 2 d m + d + m, two norms 4 d, per block."""
    config = TokenizerModelConfig(preset=f"{tower}-{tower}", patch_size=8, vocab_size=8192, code_dim=32)
    with torch.device("meta"):
        model = Tokenizer(config, image_size=256)
    size = TOWERS[tower]
    L, d, m, p, c, T = size.blocks, size.width, size.mlp, 3 * 64, 32, 1024
    blocks = L * (4 * d * d + 4 * d + 2 * d * m + d + m + 4 * d) + 2 * d + T * d
    encoder = blocks + p * d + d + d * c + c
    decoder = blocks + c * d + d + d * 4 * d + 4 * d + 4 * d * p + p
    assert count_parameters(model.encoder) == encoder
    assert count_parameters(model.decoder) == decoder
    assert count_parameters(model) == encoder + decoder + 8192 * c


def test_saved_tokenizer_loads_from_its_folder_and_its_run(
    tokenizer: Tokenizer, images: torch.Tensor, tmp_path: Path
) -> None:
    tokenizer.latent_mean.normal_()
    fingerprint = save_model(tmp_path / "tokenizer", tokenizer.state_dict(), model_card(tokenizer))
    for path in (tmp_path, tmp_path / "tokenizer", str(tmp_path)):
        loaded = load_tokenizer(path)
        assert loaded.fingerprint == fingerprint and not loaded.training
        assert torch.equal(loaded.to_latents(images), tokenizer.to_latents(images))
        assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_fingerprint_changes_with_the_weights(tokenizer: Tokenizer, tmp_path: Path) -> None:
    first = save_model(tmp_path / "a", tokenizer.state_dict(), model_card(tokenizer))
    assert save_model(tmp_path / "b", tokenizer.state_dict(), model_card(tokenizer)) == first
    with torch.no_grad():
        tokenizer.decoder.head[2].bias[0] += 1e-6
    assert save_model(tmp_path / "c", tokenizer.state_dict(), model_card(tokenizer)) != first


def test_missing_and_foreign_models_are_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.json is missing"):
        load_tokenizer(tmp_path)
    save_model(tmp_path, tokenizer.state_dict(), {**model_card(tokenizer), "kind": "diffusion"})
    with pytest.raises(ValueError, match="describes a 'diffusion', not a tokenizer"):
        load_tokenizer(tmp_path)
