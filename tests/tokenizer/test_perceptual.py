"""Perceptual distances: LPIPS as its own package computes it, and timm networks against the formula by hand."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.flops import forward_flops
from tokenizer.perceptual import LEAST_SIDE, TRUNKS, lpips_trunk, open_perceptual


def images(seed: int, size: int = 64) -> Tensor:
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.fixture(scope="module")
def trunk(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Untrained torchvision networks, without the layers that LPIPS does not use, in files."""
    from torchvision import models

    folder = tmp_path_factory.mktemp("trunks")

    def saved(net: str) -> Path:
        path = folder / TRUNKS[net]
        if not path.is_file():
            torch.manual_seed(0)
            with torch.device("meta"):
                network = {"alex": models.AlexNet, "vgg": models.vgg16, "squeeze": models.squeezenet1_1}[net]()
            features = network.features.to_empty(device="cpu")
            for parameter in features.parameters():
                torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 0.1)
            torch.save({f"features.{name}": value for name, value in features.state_dict().items()}, path)
        return path

    return saved


@pytest.mark.parametrize("net", list(TRUNKS))
def test_lpips_agrees_with_its_own_package(net: str, trunk: Callable[[str], Path]) -> None:
    import lpips

    distance = open_perceptual(f"lpips:{net}:{trunk(net)}")
    assert isinstance(distance.network, lpips.LPIPS)
    with torch.no_grad():
        found, theirs = distance(images(0), images(1)), distance.network(images(0), images(1))
    torch.testing.assert_close(found, theirs.flatten())
    kept = torch.load(trunk(net), weights_only=True).values()
    assert all(torch.equal(*pair) for pair in zip(distance.network.net.state_dict().values(), kept, strict=False))
    assert found.shape == (2,) and found.min() > 0


def test_no_distance_to_itself_and_the_same_both_ways(trunk: Callable[[str], Path]) -> None:
    distance = open_perceptual(f"lpips:alex:{trunk('alex')}")
    assert distance(images(0), images(0)).tolist() == [0, 0]
    torch.testing.assert_close(distance(images(0), images(1)), distance(images(1), images(0)))


def test_the_gradient_reaches_the_images_alone(trunk: Callable[[str], Path]) -> None:
    distance, x = open_perceptual(f"lpips:alex:{trunk('alex')}"), images(0).requires_grad_()
    distance(x, images(1)).sum().backward()
    assert x.grad.isfinite().all() and x.grad.norm() > 0
    assert not distance.training and not any(parameter.requires_grad for parameter in distance.parameters())


def test_places_without_any_feature_have_finite_gradients(trunk: Callable[[str], Path]) -> None:
    """A ReLU may leave a place with zeros alone, whose length has no derivative."""
    distance, x = open_perceptual(f"lpips:alex:{trunk('alex')}"), images(0).requires_grad_()
    distance.network.net.slice1[0].bias.data.fill_(-1e3)
    distance(x, images(1)).sum().backward()
    assert x.grad.isfinite().all()


def test_features_are_compared_in_float32_under_bf16(trunk: Callable[[str], Path]) -> None:
    distance = open_perceptual(f"lpips:alex:{trunk('alex')}")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = distance(images(0), images(1))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, distance(images(0), images(1)), rtol=0.02, atol=0)


def test_the_trunk_is_looked_for_in_torch_hubs_folder(tmp_path, monkeypatch, trunk: Callable[[str], Path]) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    expected = r"perceptual_network=lpips:alex: no trunk weights at .*hub.*alexnet.*lpips:alex:FILE, or .*perceptual=0"
    with pytest.raises(ValueError, match=expected):
        open_perceptual("lpips:alex")
    lpips_trunk("alex").parent.mkdir(parents=True)
    lpips_trunk("alex").symlink_to(trunk("alex"))
    assert open_perceptual("lpips:alex")(images(0), images(1)).shape == (2,)
    with pytest.raises(ValueError, match=r"no trunk weights at .*absent\.pth"):
        open_perceptual("lpips:alex:absent.pth")


def test_another_networks_trunk_is_refused(trunk: Callable[[str], Path]) -> None:
    with pytest.raises(ValueError, match="not the weights of the torchvision model"):
        open_perceptual(f"lpips:squeeze:{trunk('alex')}")


@pytest.mark.parametrize("net", list(TRUNKS))
def test_the_smallest_images_that_lpips_can_judge(net: str, trunk: Callable[[str], Path]) -> None:
    least, spec = LEAST_SIDE[net], f"lpips:{net}:{trunk(net)}"
    distance = open_perceptual(spec, image_size=least)
    assert distance(images(0, least), images(1, least)).isfinite().all()
    with pytest.raises(RuntimeError, match="Output size is too small"):
        distance(images(0, least - 1), images(1, least - 1))
    for blank in (False, True):
        with pytest.raises(ValueError, match=rf"network=lpips:{net} needs .*{least} pixels.*data\.size={least - 1}: "):
            open_perceptual(spec, image_size=least - 1, blank=blank)


def test_too_small_images_are_sent_to_a_network_that_can_judge_them() -> None:
    with pytest.raises(ValueError, match=r"data\.size=28: use .*=lpips:vgg, raise data\.size, or set .*perceptual=0"):
        open_perceptual("lpips:alex", image_size=28)
    with pytest.raises(ValueError, match=r"data\.size=8: raise data\.size, or set .*perceptual=0"):
        open_perceptual("lpips:vgg", image_size=8)


@pytest.mark.parametrize("spec", ["lpips", "lpips:resnet", "vgg", "timm:resnet18", ""])
def test_an_unknown_network_is_refused(spec: str) -> None:
    with pytest.raises(ValueError, match=r"is unknown: use lpips:alex, lpips:vgg, lpips:squeeze"):
        open_perceptual(spec)


def test_opening_a_network_leaves_the_random_numbers_alone(tmp_path, trunk: Callable[[str], Path]) -> None:
    specs = (f"lpips:alex:{trunk('alex')}", f"timm:test_resnet:{timm_file('test_resnet', tmp_path)}")
    before = torch.get_rng_state()
    for spec in specs:
        open_perceptual(spec)
    assert torch.equal(torch.get_rng_state(), before)


def timm_file(model: str, folder: Path, **options: int) -> Path:
    import timm

    torch.manual_seed(0)
    torch.save(timm.create_model(model, **options).state_dict(), folder / f"{model}.pth")
    return folder / f"{model}.pth"


@pytest.mark.parametrize(("model", "size", "stages"), [("test_resnet", 64, 5), ("test_vit", 32, 6)])
def test_timm_features_by_hand(model: str, size: int, stages: int, tmp_path) -> None:
    distance = open_perceptual(f"timm:{model}:{timm_file(model, tmp_path)}:{size}")
    x, y = images(0, size), images(1, size)
    mean, std = distance.mean, distance.std
    assert mean.shape == (3, 1, 1) and mean.min() > 0
    expected = torch.zeros(2)
    maps = [distance.network.forward_intermediates(((z + 1) / 2 - mean) / std, intermediates_only=True) for z in (x, y)]
    assert len(maps[0]) == stages
    for features, others in zip(*maps, strict=True):
        a, b = (z / z.norm(dim=1, keepdim=True) for z in (features, others))
        expected += (a - b).square().sum(dim=1).mean(dim=(1, 2))
    torch.testing.assert_close(distance(x, y), expected)


def test_timm_gradient_reaches_the_images_alone(tmp_path) -> None:
    distance = open_perceptual(f"timm:test_resnet:{timm_file('test_resnet', tmp_path)}")
    x = images(0, 32).requires_grad_()
    distance(x, images(1, 32)).sum().backward()
    assert x.grad.isfinite().all() and x.grad.norm() > 0
    assert not distance.training and not any(parameter.requires_grad for parameter in distance.parameters())


def test_images_are_resized_only_if_asked_or_needed(tmp_path) -> None:
    seen: list[int] = []
    specs = {
        f"timm:test_resnet:{timm_file('test_resnet', tmp_path)}": 40,
        f"timm:test_resnet:{tmp_path / 'test_resnet.pth'}:56": 56,
        f"timm:test_vit:{timm_file('test_vit', tmp_path)}": 160,
        f"timm:test_vit:{tmp_path / 'test_vit.pth'}:48": 48,
    }
    for spec, size in specs.items():
        distance = open_perceptual(spec)
        whole = distance.network.forward_intermediates
        distance.network.forward_intermediates = lambda x, whole=whole, **options: (
            seen.append(x.shape[-1]) or whole(x, **options)
        )
        assert distance(images(0, 40), images(1, 40)).shape == (2,)
        assert seen[-1] == size


def test_a_blank_timm_network_counts_without_its_weights(tmp_path) -> None:
    spec = f"timm:test_vit:{timm_file('test_vit', tmp_path)}:48"
    sizes = []
    for options in ({}, {"blank": True}):
        with torch.device("meta" if options else "cpu"):
            distance = open_perceptual(spec, **options)
        sizes.append(forward_flops(distance, images(0, 40), images(1, 40)))
        assert not any(parameter.requires_grad for parameter in distance.parameters())
    assert sizes[0] == sizes[1] > 0
    with pytest.raises(ValueError, match="no such weights file"):
        open_perceptual(f"timm:test_vit:{tmp_path / 'absent.pth'}", blank=True)


def test_missing_timm_weights_name_the_key_and_the_remedy(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"perceptual_network=timm:resnet18:.*no such weights file.*perceptual=0"):
        open_perceptual(f"timm:resnet18:{tmp_path / 'absent.pth'}")
