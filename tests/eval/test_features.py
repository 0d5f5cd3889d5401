import pytest
import torch

from eval.classifier import Classifier
from eval.features import INCEPTION_FILES, inception_file, open_features, score_name


def images(n: int = 2, size: int = 32) -> torch.Tensor:
    return torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_only_inception_gives_the_name_fid() -> None:
    assert [score_name(score, "inception") for score in ("fd", "rfd", "is")] == ["fid", "rfid", "is"]
    others = ("random", "classifier", "dinov2")
    names = [score_name(score, features) for score in ("fd", "rfd", "is") for features in others]
    assert names[0] == "fd_random"
    assert not {"fid", "rfid", "is"} & set(names)


def test_random_features_are_the_same_every_time() -> None:
    first, second = open_features("random"), open_features("random")
    assert first.identity() == second.identity()
    assert torch.equal(first(images()), second(images()))
    assert first(images()).shape == (2, 256)
    assert first.outputs(images())[1] is None


def test_an_image_is_judged_alone() -> None:
    extractor = open_features("random")
    torch.testing.assert_close(extractor(images(3))[:1], extractor(images(3)[:1]))


def test_classifier_features_are_the_input_of_its_last_layer() -> None:
    network = Classifier((8, 16, 24), 5).eval()
    extractor = open_features("classifier", classifier=network)
    features, logits = extractor.outputs(images())
    assert features.shape == (2, 64)
    torch.testing.assert_close(logits, network(images()))


def test_identity_changes_with_the_weights() -> None:
    network = Classifier((8, 16, 24), 5)
    before = open_features("classifier", classifier=network).identity()
    with torch.no_grad():
        network.head.bias += 1
    assert open_features("classifier", classifier=network).identity() != before


def test_missing_inception_weights_say_where_they_were_looked_for(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(ValueError, match=r"looked for at .*hub.*--eval\.inception_weights=FILE"):
        open_features("inception")
    with pytest.raises(ValueError, match=r"absent\.pth"):
        open_features("inception", inception_weights=str(tmp_path / "absent.pth"))


def test_inception_weights_are_found_in_torch_hubs_folder(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    path = tmp_path / "hub" / "checkpoints" / INCEPTION_FILES[0]
    path.parent.mkdir(parents=True)
    path.write_bytes(b"other bytes")
    assert inception_file(None) == path
    with pytest.raises(ValueError, match=r"sha256 starts with .* not 6726825d"):
        open_features("inception")


def test_inception_runs_on_a_given_file(tmp_path) -> None:
    torch_fidelity = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    kind = torch_fidelity.FeatureExtractorInceptionV3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_fidelity, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(kind, "load_state_dict", lambda self, state: None)
        network = kind("inception", ["2048", "logits_unbiased"])
    path = tmp_path / "inception.pth"
    torch.save(network.state_dict(), path)
    extractor = open_features("inception", inception_weights=str(path))
    features, logits = extractor.outputs(images())
    torch.testing.assert_close(features, network(images())[0])
    assert (features.shape, logits.shape) == ((2, 2048), (2, 1008))


def test_any_timm_network_with_a_local_file(tmp_path) -> None:
    timm = pytest.importorskip("timm")
    from safetensors.torch import save_file

    torch.manual_seed(0)
    network = timm.create_model("test_resnet", num_classes=7).eval()
    path = tmp_path / "my_net.safetensors"
    state = network.half().state_dict()
    save_file(state, path)
    extractor = open_features(f"timm:test_resnet:{path}:64")
    features, logits = extractor.outputs(images())
    assert (extractor.name, extractor.size) == ("my-net", 64)
    assert logits.shape == (2, 7)
    torch.testing.assert_close(logits, extractor.network.get_classifier()(features))
    assert "64" in extractor.identity()["resize"]


def test_unknown_or_unfit_features_are_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="'incepton' is unknown"):
        open_features("incepton")
    with pytest.raises(ValueError, match="no such weights file"):
        open_features("timm:resnet18:absent.safetensors")
    torch.save({"a": torch.zeros(1)}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match="do not fit"):
        open_features(f"timm:test_resnet:{tmp_path / 'a.pth'}")
    with pytest.raises(ValueError, match="no such model"):
        open_features(f"timm:resnot:{tmp_path / 'a.pth'}")
