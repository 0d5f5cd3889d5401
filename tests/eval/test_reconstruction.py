import math

import pytest
import torch

from eval.reconstruction import batch_usage, code_counts, lpips_distance, perplexity, psnr, ssim, usage
from eval.tokenizer_scores import load_lpips, lpips_nets
from tokenizer.perceptual import TRUNKS


def noise(seed: int, size: int = 24) -> torch.Tensor:
    return torch.randint(0, 256, (3, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def test_psnr_of_a_constant_error() -> None:
    images = torch.full((2, 3, 8, 8), 100, dtype=torch.uint8)
    assert psnr(images, images + 5).tolist() == pytest.approx([20 * math.log10(255 / 5)] * 2, rel=1e-12)
    assert psnr(images, images).tolist() == [100.0, 100.0]
    assert psnr(torch.zeros_like(images), torch.full_like(images, 255)).tolist() == pytest.approx([0, 0], abs=1e-12)


def test_psnr_is_taken_per_image() -> None:
    images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    others = images.clone()
    others[1] += 10
    assert psnr(images, others)[1] == pytest.approx(28.1308, abs=1e-3)


def test_ssim_of_flat_images_in_closed_form() -> None:
    a, b = torch.full((1, 3, 16, 16), 100, dtype=torch.uint8), torch.full((1, 3, 16, 16), 150, dtype=torch.uint8)
    c1 = (0.01 * 255) ** 2
    assert float(ssim(a, b)) == pytest.approx((2 * 100 * 150 + c1) / (100**2 + 150**2 + c1), rel=1e-9)


def test_ssim_of_an_image_with_itself_is_one() -> None:
    torch.testing.assert_close(ssim(noise(0), noise(0)), torch.ones(3, dtype=torch.float64))
    with pytest.raises(ValueError, match="at least 11 x 11"):
        ssim(noise(0, 10), noise(1, 10))


def test_ssim_agrees_with_scikit_image() -> None:
    metrics = pytest.importorskip("skimage.metrics")
    a, b = noise(0), ((noise(0).float() + noise(1)) / 2).to(torch.uint8)
    theirs = [
        metrics.structural_similarity(
            x.permute(1, 2, 0).numpy(), y.permute(1, 2, 0).numpy(), channel_axis=-1, gaussian_weights=True, sigma=1.5,
            use_sample_covariance=False, data_range=255,
        )
        for x, y in zip(a, b, strict=True)
    ]  # fmt: skip
    assert ssim(a, b).tolist() == pytest.approx(theirs, rel=1e-6)


def test_usage_and_perplexity() -> None:
    counts = code_counts(torch.tensor([[0, 1], [0, 1]]), 8)
    assert usage(counts) == 0.25
    assert perplexity(counts) == pytest.approx(2)
    assert perplexity(torch.ones(8)) == pytest.approx(8)


def test_usage_per_batch_counts_full_batches_only() -> None:
    codes = torch.arange(10)[:, None]
    assert batch_usage(codes, 10, batch_size=4).tolist() == pytest.approx([0.4, 0.4])
    assert len(batch_usage(codes, 10)) == 0


def test_missing_lpips_weights_say_where_they_belong(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    expected = r"eval\.lpips=vgg: no trunk weights at .*vgg16-397923af\.pth; put .* eval\.lpips=none"
    with pytest.raises(ValueError, match=expected):
        load_lpips("vgg", torch.device("cpu"))


def test_networks_that_cannot_judge_small_images_are_left_out_or_refused(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    for name in TRUNKS.values():
        (tmp_path / "hub" / "checkpoints" / name).touch()
    assert lpips_nets("auto", 31) == lpips_nets("auto") == ["alex", "vgg", "squeeze"]
    assert capsys.readouterr().out == ""
    assert lpips_nets("auto", 28) == ["vgg", "squeeze"]
    assert capsys.readouterr().out == "lpips left out: images of 28 pixels are too small for alex (31)\n"
    assert lpips_nets("auto", 8) == []
    assert "too small for alex (31), vgg (16), squeeze (17)\n" in capsys.readouterr().out
    assert lpips_nets("vgg", 16) == ["vgg"] and lpips_nets("none", 8) == []
    expected = r"eval\.lpips=alex needs .* 31 pixels.*data\.size=28: use eval\.lpips=vgg, .* eval\.lpips=none"
    with pytest.raises(ValueError, match=expected):
        lpips_nets("alex", 28)


def test_lpips_reads_its_trunk_from_the_checkpoint_folder(tmp_path, monkeypatch) -> None:
    torchvision = pytest.importorskip("torchvision")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save(torchvision.models.squeezenet1_1().state_dict(), folder / "squeezenet1_1-b8a52dc0.pth")
    network = load_lpips("squeeze", torch.device("cpu"))
    same, other = (lpips_distance(network, noise(0, 64), noise(seed, 64)) for seed in (0, 1))
    assert same.tolist() == [0, 0, 0]
    assert float(other.min()) > 0
