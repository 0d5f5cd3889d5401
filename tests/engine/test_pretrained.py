"""Weights come from files that are there, and from nowhere else unless that was asked."""

import pickle
import random
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from engine.pretrained import checkpoint_folder, fetch_timm, fill_trunk, open_timm, read_weights, timm_parts


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


@pytest.mark.parametrize(
    ("held", "told"),
    [
        ({"state_dict": {"a": torch.zeros(1)}, "epoch": 3}, r"'state_dict' is a dict, not a weight; .*state_dict"),
        ({"a": torch.zeros(1), "epoch": 3}, r"'epoch' is a int, not a weight"),
        ({0: torch.zeros(1)}, r"0 is a Tensor, not a weight"),
        ([torch.zeros(1)], r"holds a list, not weights by their names"),
        (torch.zeros(1), r"holds a Tensor, not weights by their names"),
    ],
)
def test_a_file_of_more_or_other_than_weights_is_refused(held: object, told: str, tmp_path) -> None:
    torch.save(held, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"a\.pth: " + told):
        read_weights(tmp_path / "a.pth")
    pytest.importorskip("timm")
    with pytest.raises(ValueError, match=r"a\.pth: " + told):
        open_timm("test_resnet", tmp_path / "a.pth", None, key="some.key")


def test_a_damaged_file_is_refused_whatever_it_makes_the_unpickler_do(tmp_path) -> None:
    path, draws = tmp_path / "a.pth", random.Random(0)
    torch.save({"a": torch.zeros(3), "b": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    whole, messages = path.read_bytes(), []
    for _ in range(100):
        damaged = bytearray(whole)
        for _ in range(4):
            damaged[draws.randrange(len(damaged))] = draws.randrange(256)
        path.write_bytes(damaged)
        try:
            read_weights(path)
        except ValueError as error:
            messages.append(str(error))
    assert len(messages) > 50 and all(message.startswith(str(path)) for message in messages)


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


def test_a_timm_model_without_settings_or_with_an_unknown_tag_is_refused(tmp_path, monkeypatch) -> None:
    timm, path = pytest.importorskip("timm"), tmp_path / "a.pth"
    torch.save({"a": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"some\.key=timm:resnet18\.nonsense: .*nonsense.*list_pretrained"):
        open_timm("resnet18.nonsense", path, None, key="some.key")
    monkeypatch.setattr(timm, "get_pretrained_cfg", lambda _: None)
    with pytest.raises(ValueError, match=r"some\.key=timm:test_resnet: timm does not say.*list_pretrained"):
        open_timm("test_resnet", path, None, key="some.key")


def test_a_timm_model_of_one_size_alone_takes_no_other(tmp_path) -> None:
    pytest.importorskip("timm")
    torch.save({"a": torch.zeros(1)}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"some\.key=timm:mixer_s32_224: .*its own size alone; leave :64 out"):
        open_timm("mixer_s32_224", tmp_path / "a.pth", 64, key="some.key")


def test_timm_fetches_for_fetch_timm_alone(tmp_path, monkeypatch) -> None:
    timm, path = pytest.importorskip("timm"), tmp_path / "a.pth"
    network, create = timm.create_model("test_resnet"), timm.create_model
    torch.save(network.state_dict(), path)

    def offline(model: str, *, pretrained: bool = False, **options: object) -> nn.Module:
        if pretrained:
            raise ConnectionError("no network")
        return create(model, **options)

    monkeypatch.setattr(timm, "create_model", offline)
    open_timm("test_resnet", path, None, key="some.key")
    remedy = r"could not be fetched \(no network\).*give some\.key=timm:test_resnet:<weights file>"
    with pytest.raises(ValueError, match=r"some\.key=timm:test_resnet:pretrained: its weights " + remedy):
        fetch_timm("test_resnet", None, key="some.key")
    with pytest.raises(ValueError, match=r"some\.key=timm:resnot: timm has no such model"):
        fetch_timm("resnot", None, key="some.key")


def test_a_model_without_published_weights_is_said_to_have_none() -> None:
    pytest.importorskip("timm")
    with pytest.raises(ValueError, match=r"timm:mixer_s32_224:pretrained: .*could not be fetched \(No pretrained"):
        fetch_timm("mixer_s32_224", None, key="some.key")
    with pytest.raises(ValueError, match=r"its own size alone; leave :64 out"):
        fetch_timm("mixer_s32_224", 64, key="some.key")


def test_a_distilled_network_has_two_classifiers(tmp_path) -> None:
    timm, name = pytest.importorskip("timm"), "deit_tiny_distilled_patch16_224"
    network = timm.create_model(name, num_classes=3)
    torch.save(network.state_dict(), tmp_path / "a.pth")
    opened, settings = open_timm(name, tmp_path / "a.pth", None, key="some.key")
    assert settings["classifier"] == ("head", "head_dist") and opened.num_classes == 3
    assert torch.equal(opened.head_dist.weight, network.head_dist.weight)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_blank_network_needs_the_file_but_does_not_read_it(device: str, tmp_path) -> None:
    pytest.importorskip("timm")
    path = tmp_path / "a.pth"
    with pytest.raises(ValueError, match="no such weights file"), torch.device(device):
        open_timm("test_vit", path, None, key="some.key", blank=True)
    path.write_bytes(b"not read")
    with torch.device(device), warnings.catch_warnings():
        warnings.simplefilter("error")
        network, settings = open_timm("test_vit", path, None, key="some.key", blank=True)
    assert {parameter.device.type for parameter in network.parameters()} == {device}
    assert network.num_classes == 0 and len(settings["mean"]) == 3


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
