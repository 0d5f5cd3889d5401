"""Weights come from files that are there, and from nowhere else."""

import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

from engine.pretrained import checkpoint_folder, fill_trunk, open_timm, read_weights, timm_parts


def test_the_checkpoint_folder_follows_torch_home(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert checkpoint_folder() == tmp_path / "hub" / "checkpoints"


def test_weights_that_would_run_code_are_refused(tmp_path) -> None:
    class Evil:
        def __reduce__(self):
            return print, ("ran",)

    path = tmp_path / "weights.pth"
    path.write_bytes(pickle.dumps({"a": Evil()}, protocol=2))
    with pytest.raises(ValueError, match="not a readable file of weights"):
        read_weights(path)


@pytest.mark.parametrize("name", ["cut.pth", "cut.safetensors"])
def test_a_cut_file_is_refused(tmp_path, name: str) -> None:
    from safetensors.torch import save_file

    path, weights = tmp_path / name, {"a": torch.zeros(100)}
    save_file(weights, path) if path.suffix == ".safetensors" else torch.save(weights, path)
    assert read_weights(path).keys() == {"a"}
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match=name.replace(".", r"\.") + ": not a readable file of weights"):
        read_weights(path)


def test_the_parts_of_a_timm_entry() -> None:
    assert timm_parts("resnet50:/a/b.pth") == ("resnet50", Path("/a/b.pth"), None)
    assert timm_parts("resnet50:/a/b.pth:128") == ("resnet50", Path("/a/b.pth"), 128)
    assert timm_parts("resnet50:C:/a/b.pth") == ("resnet50", Path("C:/a/b.pth"), None)


def test_a_timm_network_has_the_head_of_its_file(tmp_path) -> None:
    timm = pytest.importorskip("timm")
    for classes in (0, 7):
        torch.manual_seed(classes)
        network, path = timm.create_model("test_resnet", num_classes=classes), tmp_path / f"{classes}.pth"
        torch.save(network.half().state_dict(), path)
        opened, settings = open_timm("test_resnet", path, None, key="some.key")
        assert opened.num_classes == classes and len(settings["mean"]) == 3
        stored = network.state_dict()
        assert all(torch.equal(value, stored[name].float()) for name, value in opened.state_dict().items())


def test_what_is_wrong_with_a_timm_network_is_said_under_its_key(tmp_path) -> None:
    path = tmp_path / "a.pth"
    with pytest.raises(ValueError, match=r"some\.key=timm:resnet18:.*no such weights file.*or do without"):
        open_timm("resnet18", path, None, key="some.key", remedy=", or do without")
    torch.save({"a": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"some\.key=timm:resnot: timm has no such model"):
        open_timm("resnot", path, None, key="some.key")
    with pytest.raises(ValueError, match=r"some\.key=timm:test_resnet: the file's weights do not fit"):
        open_timm("test_resnet", path, None, key="some.key")


class Slices(nn.Module):
    """The first and last layer of `Whole`, in groups of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.slice1, self.slice2 = nn.Sequential(), nn.Sequential()
        self.slice1.add_module("0", nn.Linear(2, 3))
        self.slice2.add_module("2", nn.Linear(3, 4))


class Whole(nn.Module):
    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Linear(2, width), nn.ReLU(), nn.Linear(width, 4))
        self.classifier = nn.Linear(4, 5)


def test_a_trunk_is_filled_from_the_whole_model(tmp_path) -> None:
    whole, slices, path = Whole(), Slices(), tmp_path / "whole.pth"
    torch.save(whole.state_dict(), path)
    fill_trunk(slices, path)
    assert torch.equal(slices.slice2[0].weight, whole.features[2].weight)
    torch.save(Whole(width=5).state_dict(), path)
    with pytest.raises(ValueError, match=r"whole\.pth: not the weights of the torchvision model"):
        fill_trunk(slices, path)
    torch.save({"a": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"whole\.pth: not the weights of the torchvision model"):
        fill_trunk(slices, path)
