"""References: every layout of mu and sigma, what a file says of its features, and what may be held against it."""

import json

import numpy as np
import pytest
import torch

from engine.checkpoint import sha256
from eval.reference_files import check_reference, open_reference, save_reference
from eval.statistics import Gaussian, Moments

FEATURES = {"name": "random", "weights": "ab12", "resize": "none", "taps": ["a", 1]}
PIXELS = np.random.default_rng(0).integers(0, 256, (5, 4, 4, 3), np.uint8)


def gaussian(dims=6, n=20):
    return Moments.of(torch.randn(n, dims, generator=torch.Generator().manual_seed(0))).gaussian()


def stated(mu=None, sigma=None, **more):
    """The arrays of a file as other tools write it."""
    known = gaussian()
    return {
        "mu": known.mu.numpy() if mu is None else mu,
        "sigma": known.sigma.numpy() if sigma is None else sigma,
        **more,
    }


def write(path, arrays):
    np.savez(path, **arrays)
    return path


def same(one, other):
    return torch.equal(one.mu, other.mu) and torch.equal(one.sigma, other.sigma) and one.n == other.n


def test_what_is_saved_comes_back(tmp_path):
    path = tmp_path / "reference.npz"
    save_reference(path, gaussian(), features=FEATURES, pixels="cd34")
    reference = open_reference(path)
    assert same(reference.gaussian, gaussian()) and reference.pictures is None
    told = {"features": FEATURES, "n": 20, "pixels": "cd34"}
    assert reference.identity == {"file": "reference.npz", "sha256": sha256(path), **told}
    json.dumps(reference.identity)
    with np.load(path, allow_pickle=False) as stored:  # as pytorch-fid and ADM read it
        mu, sigma = stored["mu"][:], stored["sigma"][:]
    assert np.array_equal(mu, gaussian().mu) and np.array_equal(sigma, gaussian().sigma) and sigma.dtype == np.float64
    check_reference(reference, FEATURES)
    save_reference(tmp_path / "again.npz", gaussian(), features=FEATURES, pixels="cd34")
    assert sha256(tmp_path / "again.npz") == sha256(path)


def test_layouts_of_other_tools(tmp_path):
    for keys in ({}, {"mu_s": np.zeros(3), "sigma_s": np.eye(3)}, {"n": np.array(50)}):
        path = write(tmp_path / "a.npz", stated(**keys))
        reference = open_reference(path)
        assert same(reference.gaussian, gaussian(n=20)._replace(n=50 if "n" in keys else 0))
        assert reference.identity["features"] == "not stated" and "pixels" not in reference.identity
    half = {key: value.astype(np.float32) for key, value in stated().items()}
    again = open_reference(write(tmp_path / "single.npz", half)).gaussian
    assert again.sigma.dtype == torch.float64 and torch.allclose(again.sigma, gaussian().sigma, rtol=1e-6)


def test_images_beside_a_stated_gaussian(tmp_path):
    reference = open_reference(write(tmp_path / "a.npz", stated(arr_0=PIXELS)))
    assert reference.gaussian is not None
    assert torch.equal(reference.pictures.load(0, 5), torch.from_numpy(PIXELS).permute(0, 3, 1, 2))
    cropped = open_reference(tmp_path / "a.npz", size=2)
    assert cropped.pictures.load(0, 5).shape == (5, 3, 2, 2)


def test_images_alone(tmp_path):
    for path in (write(tmp_path / "a.npz", {"arr_0": PIXELS}), tmp_path / "b.npy"):
        np.save(tmp_path / "b.npy", PIXELS)
        reference = open_reference(path)
        assert reference.gaussian is None and reference.pictures.count == 5
        assert reference.identity["file"] == path.name
        assert reference.identity.get("sha256") == (sha256(path) if path.suffix == ".npz" else None)
        check_reference(reference, FEATURES)


@pytest.mark.parametrize(
    ("arrays", "fault"),
    [
        (stated(mu=np.full(6, np.nan)), r"mu \(float64\) is not all finite numbers"),
        (stated(sigma=np.full((6, 6), np.inf)), "sigma .* is not all finite"),
        (stated(sigma=np.eye(6).astype(complex)), "sigma .complex128. is not"),
        (stated(mu=np.array(["a"] * 6)), "mu .<U1. is not"),
        (stated(mu=np.zeros(5)), r"mu \(5,\) and sigma \(6, 6\) must be \[D\] and \[D, D\]"),
        (stated(sigma=np.zeros(6)), r"sigma \(6,\) must be"),
        (stated(sigma=np.triu(np.ones((6, 6)))), "no covariance .not symmetric"),
        (stated(sigma=-np.eye(6)), "no covariance .smaller variances"),
        (stated(sigma=2 - np.eye(6)), "no covariance .smaller variances than covariances"),
        (stated(n=np.array(0)), "n=0 must be a whole number of at least 2"),
        (stated(n=np.array([3, 4])), r"n=\[3 4\] must be"),
        (stated(n=np.array(2.5)), "n=2.5 must be"),
        ({"mu": np.zeros(6)}, "has no sigma; a stated reference needs mu and sigma"),
        ({"sigma": np.eye(6)}, "has no mu; a stated"),
        ({"mean": np.zeros(6)}, "has mean, but no images"),
        (stated(sigma=np.array([{}], dtype=object)), "sigma cannot be read .Object arrays"),
    ],
)
def test_files_that_are_no_reference(tmp_path, arrays, fault):
    with pytest.raises(ValueError, match=rf"a\.npz.*{fault}"):
        open_reference(write(tmp_path / "a.npz", arrays))


def test_cut_and_missing_files(tmp_path):
    whole = write(tmp_path / "a.npz", stated()).read_bytes()
    spoilt = bytearray(whole)
    spoilt[whole.index(b"mu.npy") + 200] ^= 0xFF  # within the numbers: the checksum of the zip tells
    for data, fault in (
        (whole[:-30], "not a whole zip"),
        (b"", "not a whole zip"),
        (bytes(spoilt), "mu cannot be read"),
    ):
        (tmp_path / "a.npz").write_bytes(data)
        with pytest.raises(ValueError, match=rf"a\.npz.*{fault}"):
            open_reference(tmp_path / "a.npz")
    with pytest.raises(ValueError, match=r"absent\.npz: no such file"):
        open_reference(tmp_path / "absent.npz")


def test_save_refuses_what_open_would(tmp_path):
    with pytest.raises(ValueError, match=r"must end in \.npz"):
        save_reference(tmp_path / "a.npy", gaussian(), features=FEATURES, pixels="")
    with pytest.raises(ValueError, match="n=0 must be"):
        save_reference(tmp_path / "a.npz", gaussian()._replace(n=0), features=FEATURES, pixels="")
    broken = Gaussian(torch.full((2,), float("nan")), torch.eye(2), 5)
    with pytest.raises(ValueError, match="not all finite"):
        save_reference(tmp_path / "a.npz", broken, features=FEATURES, pixels="")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("key", ["name", "weights", "resize"])
def test_other_features_are_refused(tmp_path, key):
    save_reference(tmp_path / "a.npz", gaussian(), features=FEATURES, pixels="cd34")
    reference = open_reference(tmp_path / "a.npz")
    check_reference(reference, {**FEATURES, "taps": ("a", 1)})  # JSON knows no tuples
    with pytest.raises(ValueError, match=rf"a\.npz was measured by other features.*\n  {key}: '.*' \| 'other'"):
        check_reference(reference, {**FEATURES, key: "other"})


@pytest.mark.parametrize(
    ("file", "dims", "fits"),
    [
        ("fid_stats_cifar10_train.npz", 2048, "inception"),
        ("VIRTUAL_imagenet256_labeled.npz", 2048, "inception"),
        ("cifar10_clean_train_32.npz", 2048, "inception-clean"),
        ("cifar10_legacy_tensorflow_train_32.npz", 2048, "inception"),
        ("cifar10_legacy_pytorch_train_32.npz", 2048, None),
        ("cleaned.npz", 2048, "inception"),
        ("stats.npz", 1024, None),
        ("cifar10_clean_clip_vit_b_32_train_32.npz", 512, None),
    ],
)
def test_a_file_that_does_not_say_is_inceptions_or_nothing(tmp_path, file, dims, fits):
    reference = open_reference(write(tmp_path / file, {"mu": np.zeros(dims, "f4"), "sigma": np.eye(dims, dtype="f4")}))
    for name in ("inception", "inception-clean", "inception-antialias", "dinov2"):
        if name == fits:
            check_reference(reference, {**FEATURES, "name": name})
        else:
            with pytest.raises(
                ValueError, match=f"{file} does not say by which features.* not {name}: give the reference"
            ):
                check_reference(reference, {**FEATURES, "name": name})
