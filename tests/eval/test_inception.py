"""Ours beside torch-fidelity's, on one file of random weights."""

import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("torch_fidelity")

from eval.features import InceptionFeatures, open_features
from eval.inception import INCEPTION_FILES, INCEPTION_HASH, Inception, inception_file
from eval.resize import RULES, resized

sys.path.insert(0, str(Path(__file__).parent))
from random_inception import torch_fidelitys, write_random_inception


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    return write_random_inception(tmp_path_factory.mktemp("inception") / "random.pth")


@pytest.fixture(scope="module")
def network(weights: Path) -> Inception:
    return Inception(str(weights)).eval().requires_grad_(False)


@pytest.fixture
def opened(network: Inception, monkeypatch) -> Callable[[str], InceptionFeatures]:
    """`open_features` on the random weights, which are read once."""
    monkeypatch.setattr("eval.features.Inception", lambda _: network)
    return open_features


def images(n: int, size: int = 32) -> torch.Tensor:
    return torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def off(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """How far apart rows [B, D] are, over how far `theirs` are from their mean: 0 for equal, 1 for unrelated."""
    return float((ours - theirs).norm() / (theirs - theirs.mean(0)).norm())


def test_features_and_logits_are_torch_fidelitys(weights: Path) -> None:
    pictures = torch.cat([images(2), images(2).sort(2).values])
    extractor = open_features("inception", inception_weights=str(weights))
    outputs = extractor.outputs(pictures)
    features, logits = torch_fidelitys(weights)(pictures)
    assert (outputs["features"].shape, outputs["logits"].shape) == ((4, 2048), (4, 1008))
    assert off(outputs["features"], features) < 2e-5 and off(outputs["logits"], logits) < 2e-5
    torch.testing.assert_close(outputs["features"], features, rtol=1e-5, atol=1e-6 * float(features.abs().max()))


def test_an_image_is_judged_alone_whatever_comes_with_it(opened) -> None:
    extractor, pictures = opened("inception"), images(9, 16)  # one more than go through at a time
    outputs, alone = extractor.outputs(pictures), extractor.outputs(pictures[8:])
    assert {key: len(value) for key, value in outputs.items()} == {"features": 9, "logits": 9}
    torch.testing.assert_close(outputs["features"][8:], alone["features"], rtol=1e-4, atol=1e-5)


def test_only_the_published_weights_are_called_inception(opened, network: Inception, monkeypatch) -> None:
    begin = network.weights[:8]
    names = {spec: opened(spec).name for spec in ("inception", "inception:tf1", "inception:clean")}
    assert names == {
        "inception": f"inception-{begin}",
        "inception:tf1": f"inception-{begin}",
        "inception:clean": f"inception-{begin}-clean",
    }
    monkeypatch.setattr("eval.inception.INCEPTION_HASH", begin)
    assert [opened(f"inception:{rule}").name for rule in RULES] == [
        "inception", "inception-clean", "inception-antialias",
    ]  # fmt: skip


@pytest.mark.parametrize("rule", RULES)
def test_the_rule_decides_how_images_reach_the_network(rule: str, opened) -> None:
    extractor = opened(f"inception:{rule}")
    expected, _ = extractor.network(resized(images(1, 48), 299, rule))
    torch.testing.assert_close(extractor(images(1, 48)), expected)
    assert extractor.identity()["resize"] == f"{RULES[rule].told.format(size=299)}; (x - 128) / 128"


def test_the_wording_of_fids_own_rule_is_that_of_older_scores(opened) -> None:
    assert opened("inception").resize == "TF1 bilinear to 299, no antialias; (x - 128) / 128"


def test_missing_weights_say_where_they_were_looked_for(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(ValueError, match=r"looked for at .*hub.*--eval\.inception_weights=FILE"):
        open_features("inception")
    with pytest.raises(ValueError, match=r"absent\.pth"):
        open_features("inception", inception_weights=str(tmp_path / "absent.pth"))


@pytest.mark.parametrize("name", INCEPTION_FILES)
def test_weights_in_torch_hubs_folder_are_found_and_their_hash_is_checked_first(
    name: str, tmp_path, monkeypatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    path = tmp_path / "hub" / "checkpoints" / name
    path.parent.mkdir(parents=True)
    path.write_bytes(b"other bytes")
    assert inception_file(None) == path
    monkeypatch.setattr("eval.inception.read_weights", lambda path: pytest.fail("read before its hash was checked"))
    with pytest.raises(ValueError, match=f"sha256 starts with .* not {INCEPTION_HASH}"):
        open_features("inception")


def test_a_file_that_runs_code_or_fits_no_inception_is_refused(weights: Path, tmp_path) -> None:
    class Evil:
        def __reduce__(self):
            return print, ("ran",)

    path = tmp_path / "a.pth"
    path.write_bytes(pickle.dumps({"a": Evil()}, protocol=2))
    with pytest.raises(ValueError, match=r"a\.pth: not a readable file of weights"):
        open_features("inception", inception_weights=str(path))
    torch.save({"a": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"a\.pth: not the weights of FID's Inception-v3"):
        open_features("inception", inception_weights=str(path))
    shutil.copy(weights, path)
    with open(path, "r+b") as stream:
        stream.truncate(1000)
    with pytest.raises(ValueError, match=r"a\.pth: not a readable file of weights"):
        open_features("inception", inception_weights=str(path))
