from pathlib import Path

import pytest
import torch

from eval.classifier import Classifier
from eval.features import open_features
from eval.resize import RULES, resized


def images(n: int = 2, size: int = 32) -> torch.Tensor:
    return torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def stored(path: Path, model: str = "test_resnet", **options: object) -> torch.nn.Module:
    """A small timm network of random weights, kept in a file."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    network = timm.create_model(model, **options).eval()
    torch.save(network.state_dict(), path)
    return network


def test_random_features_are_the_same_every_time() -> None:
    first, second = open_features("random"), open_features("random")
    assert first.identity() == second.identity()
    assert torch.equal(first(images()), second(images()))
    assert first(images()).shape == (2, 256)
    assert first.outputs(images()).keys() == {"features"}


def test_an_image_is_judged_alone() -> None:
    extractor = open_features("random")
    torch.testing.assert_close(extractor(images(3))[:1], extractor(images(3)[:1]))


def test_classifier_features_are_the_input_of_its_last_layer() -> None:
    network = Classifier((8, 16, 24), 5).eval()
    outputs = open_features("classifier", classifier=network).outputs(images())
    assert outputs["features"].shape == (2, 64)
    torch.testing.assert_close(outputs["logits"], network(images()))


def test_identity_changes_with_the_weights() -> None:
    network = Classifier((8, 16, 24), 5)
    before = open_features("classifier", classifier=network).identity()
    with torch.no_grad():
        network.head.bias += 1
    assert open_features("classifier", classifier=network).identity() != before


def test_any_timm_network_with_a_local_file(tmp_path) -> None:
    timm = pytest.importorskip("timm")
    from safetensors.torch import save_file

    torch.manual_seed(0)
    network = timm.create_model("test_resnet", num_classes=7).eval()
    path = tmp_path / "my_net.safetensors"
    save_file(network.half().state_dict(), path)
    extractor = open_features(f"timm:test_resnet:{path}:64")
    outputs = extractor.outputs(images())
    assert (extractor.name, extractor.size) == ("my-net", 64)
    assert outputs["logits"].shape == (2, 7)
    x = (resized(images(), 64, "antialias") / 255 - torch.tensor(extractor.mean).view(3, 1, 1)) / torch.tensor(
        extractor.std
    ).view(3, 1, 1)
    torch.testing.assert_close(outputs["logits"], network.float()(x))


def test_a_timm_networks_identity_is_that_of_older_scores(tmp_path) -> None:
    stored(tmp_path / "test_resnet-tiny.pth")
    told = open_features(f"timm:test_resnet:{tmp_path / 'test_resnet-tiny.pth'}:64").identity()
    assert told.keys() == {"name", "weights", "resize"} and told["name"] == "test-resnet-tiny"
    assert told["resize"] == "bilinear antialiased to 64; mean (0.5, 0.5, 0.5), std (0.5, 0.5, 0.5) of x / 255"


def test_a_file_that_does_not_name_its_model_has_it_told(tmp_path) -> None:
    """Two models can take one file and say different things."""
    stored(tmp_path / "mine.pth")
    assert open_features(f"timm:test_resnet:{tmp_path / 'mine.pth'}").identity()["model"] == "test_resnet"


@pytest.mark.parametrize("rule", RULES)
def test_the_rule_of_a_timm_network_can_be_chosen(rule: str, tmp_path) -> None:
    stored(tmp_path / "net.pth", num_classes=0)
    default = open_features(f"timm:test_resnet:{tmp_path / 'net.pth'}:48")
    for size in ("", ":48"):
        extractor = open_features(f"timm:test_resnet:{tmp_path / 'net.pth'}{size}:{rule}")
        assert extractor.resize.startswith(RULES[rule].told.format(size=extractor.size))
    assert extractor.name == ("net" if rule == "antialias" else f"net-{rule}")
    assert extractor.outputs(images()).keys() == {"features"}
    assert torch.equal(extractor(images()), default(images())) == (rule == "antialias")


@pytest.mark.parametrize("model", ["deit_tiny_distilled_patch16_224", "resnetv2_50x1_bit"])
def test_logits_are_the_networks_own_whatever_its_head(model: str, tmp_path) -> None:
    """A distilled network has two classifiers, whose answers are averaged; BiT's is a convolution."""
    network = stored(tmp_path / "net.pth", model, num_classes=3)
    for parameter in network.parameters():  # as made, classifiers begin alike or at zero
        torch.nn.init.normal_(parameter, std=0.05)
    torch.save(network.state_dict(), tmp_path / "net.pth")
    extractor = open_features(f"timm:{model}:{tmp_path / 'net.pth'}:32")
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (extractor.mean, extractor.std))
    outputs = extractor.outputs(images())
    assert outputs["features"].shape == (2, network.num_features) and outputs["logits"].shape == (2, 3)
    torch.testing.assert_close(outputs["logits"], extractor.network((images() / 255 - mean) / std))


def test_a_vision_transformer_gives_its_class_token_at_any_size(tmp_path) -> None:
    """DINOv2 is such a network: no classifier, a fixed input size, the normed class token."""
    timm = pytest.importorskip("timm")
    stored(tmp_path / "vit.pth", "test_vit", num_classes=0, fc_norm=False)
    extractor = open_features(f"timm:test_vit:{tmp_path / 'vit.pth'}:96")
    features = extractor(images(size=96))
    built = timm.create_model(
        "test_vit", num_classes=0, img_size=96, pretrained=True,
        pretrained_cfg_overlay={"file": str(tmp_path / "vit.pth"), "num_classes": 0},
    ).eval()  # fmt: skip
    maps = built.forward_features((images(size=96) / 255 - 0.5) / 0.5)  # [B, 1 + T, D]
    torch.testing.assert_close(features, maps[:, 0], rtol=1e-4, atol=1e-5)


def test_dinov2_is_built_for_224_pixels_with_1024_features(tmp_path) -> None:
    pytest.importorskip("timm")
    from engine.pretrained import open_timm

    (tmp_path / "any").touch()
    with torch.device("meta"):
        network, settings = open_timm(
            "vit_large_patch14_dinov2.lvd142m", tmp_path / "any", 224, key="eval.features", blank=True
        )
        maps = network.forward_features(torch.zeros(1, 3, 224, 224))
    assert (network.num_classes, network.global_pool, maps.shape) == (0, "token", (1, 1 + 16 * 16, 1024))
    assert network.forward_head(maps, pre_logits=True).shape == (1, 1024)
    assert settings["mean"] == (0.485, 0.456, 0.406)


def test_weights_that_timm_knows_are_fetched_where_the_entry_says_so(tmp_path, monkeypatch) -> None:
    timm = pytest.importorskip("timm")
    network, create = stored(tmp_path / "fetched.pth"), timm.create_model

    def fetched(model: str, *, pretrained: bool = False, **options: object) -> torch.nn.Module:
        assert pretrained and model == "test_resnet.r160_in1k"
        return create(model, pretrained=True, pretrained_cfg_overlay={"file": str(tmp_path / "fetched.pth")}, **options)

    monkeypatch.setattr(timm, "create_model", fetched)
    extractor = open_features("timm:test_resnet.r160_in1k:pretrained:48:clean")
    assert (extractor.name, extractor.size) == ("test-resnet.r160-in1k-clean", 48)
    assert torch.equal(extractor.network.fc.weight, network.fc.weight)
    assert len(extractor.weights) == 64 and "model" not in extractor.identity()


def test_weights_that_cannot_be_fetched_are_said_with_the_remedy(monkeypatch) -> None:
    timm = pytest.importorskip("timm")

    def unreachable(*_: object, **__: object) -> None:
        raise OSError("no network")

    with pytest.raises(ValueError, match="timm has no such model"):
        open_features("timm:resnot:pretrained")
    monkeypatch.setattr(timm, "create_model", unreachable)
    with pytest.raises(ValueError, match=r"timm:test_resnet:pretrained: .*no network.*timm:test_resnet:<weights file>"):
        open_features("timm:test_resnet:pretrained")


@pytest.mark.parametrize("name", ["inception.pth", "inception_clean.pth", "inception_0123abcd.pth", "classifier.pth"])
def test_no_file_can_take_the_name_of_another_judge(name: str, tmp_path) -> None:
    stored(tmp_path / name)
    with pytest.raises(ValueError, match=r"is another judge; rename the file"):
        open_features(f"timm:test_resnet:{tmp_path / name}")


@pytest.mark.parametrize(
    "spec", ["incepton", "inception:", "inception:bilinear", "classifier", "timm", "timm:resnet18"]
)
def test_an_unknown_entry_is_told_the_choices(spec: str) -> None:
    told = r"is unknown: use classifier .*inception\[:<rule>\].*timm:<model>:pretrained.*tf1, clean, antialias"
    with pytest.raises(ValueError, match=f"{spec}' {told}"):
        open_features(spec)


def test_weights_that_are_not_there_or_do_not_fit_are_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="no such weights file"):
        open_features("timm:resnet18:absent.safetensors")
    torch.save({"a": torch.zeros(1)}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match="do not fit"):
        open_features(f"timm:test_resnet:{tmp_path / 'a.pth'}")
