"""Arrays of images: ADM's .npz and .npy, read without unpickling and written a few images at a time."""

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from eval import array_files
from eval.array_files import open_npz, save_adm
from eval.image_files import open_pictures
from eval.pictures import Pictures

PIXELS = np.random.default_rng(0).integers(0, 256, (7, 4, 5, 3), np.uint8)  # [N, H, W, 3]
EXPECTED = torch.from_numpy(PIXELS).permute(0, 3, 1, 2)


def pictures_of(images, labels=None, seen=None):
    def load(start, stop):
        if seen is not None:
            seen.append(stop - start)
        return images[start:stop]

    return Pictures(name="toy", count=len(images), load=load, labels=labels)


def test_what_is_written_is_what_numpy_reads(tmp_path, monkeypatch):
    monkeypatch.setattr(array_files, "CHUNK_BYTES", 2 * PIXELS[0].size)
    seen, labels = [], torch.tensor([3, 1, 2, 0, 0, 1, 3])
    save_adm(tmp_path / "a.npz", pictures_of(EXPECTED, labels, seen))
    assert max(seen) == 2 and sum(seen) == 8  # one image more: its shape was asked for first
    with np.load(tmp_path / "a.npz", allow_pickle=False) as stored:
        assert np.array_equal(stored["arr_0"], PIXELS) and stored["arr_0"].dtype == np.uint8
        assert stored["arr_1"].tolist() == labels.tolist() and stored["arr_1"].dtype == np.int64
    save_adm(tmp_path / "b.npz", pictures_of(EXPECTED, labels))
    assert (tmp_path / "b.npz").read_bytes() == (tmp_path / "a.npz").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npz", "b.npz"]


def test_labels_are_written_only_if_all_are_known(tmp_path):
    for labels in (None, torch.tensor([0, 1, -1, 0, 0, 0, 0])):
        save_adm(tmp_path / "a.npz", pictures_of(EXPECTED, labels))
        with np.load(tmp_path / "a.npz") as stored:
            assert stored.files == ["arr_0"]
    save_adm(tmp_path / "a.npz", pictures_of(EXPECTED), torch.ones(7, dtype=torch.int64))
    assert open_pictures(tmp_path / "a.npz").labels.tolist() == [1] * 7


def test_save_adm_refuses(tmp_path):
    with pytest.raises(ValueError, match=r"a\.zip: the file must end in \.npz"):
        save_adm(tmp_path / "a.zip", pictures_of(EXPECTED))
    with pytest.raises(ValueError, match=r"\(3,\) labels for 7 images of toy"):
        save_adm(tmp_path / "a.npz", pictures_of(EXPECTED), torch.zeros(3))
    with pytest.raises(ValueError, match="no image to write"):
        save_adm(tmp_path / "a.npz", pictures_of(EXPECTED[:0]))


def test_a_failed_write_leaves_the_old_file(tmp_path):
    def load(start, stop):
        if stop == 7:
            raise OSError("disk")
        return EXPECTED[start:stop]

    (tmp_path / "a.npz").write_bytes(b"old")
    with pytest.raises(OSError, match="disk"):
        save_adm(tmp_path / "a.npz", Pictures(name="toy", count=7, load=load))
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]


def test_every_layout_of_an_array(tmp_path):
    channels_first = np.ascontiguousarray(PIXELS.transpose(0, 3, 1, 2))
    np.save(tmp_path / "last.npy", PIXELS)
    np.save(tmp_path / "first.npy", channels_first)
    np.save(tmp_path / "fortran.npy", np.asfortranarray(PIXELS))
    np.savez(tmp_path / "stored.npz", PIXELS, np.arange(7))
    np.savez_compressed(tmp_path / "packed.npz", PIXELS, np.arange(7))
    np.savez_compressed(tmp_path / "packed_fortran.npz", np.asfortranarray(PIXELS))
    np.savez(tmp_path / "more.npz", arr_0=channels_first, mu=np.zeros(2), sigma=np.eye(2))
    paths = sorted(tmp_path.iterdir())
    assert len(paths) == 7
    for path in paths:
        pictures = open_pictures(path)
        loaded = torch.cat(list(pictures.batches(3)))
        assert torch.equal(loaded, EXPECTED) and loaded.is_contiguous(), path
        kind = path.suffix[1:]
        assert pictures.facts == {"kind": kind, "path": str(path), "images": 7, "size": [4, 5], "crop": "as stored"}
    for name in ("stored", "packed"):
        pictures = open_pictures(tmp_path / f"{name}.npz")
        assert pictures.labels.tolist() == list(range(7)) and pictures.class_names[6] == "6"
    assert isinstance(open_npz(tmp_path / "stored.npz").pixels, np.memmap)
    assert isinstance(open_npz(tmp_path / "packed.npz").pixels, np.ndarray)


def test_a_loaded_block_is_a_copy(tmp_path):
    np.save(tmp_path / "first.npy", EXPECTED.numpy())
    pictures = open_pictures(tmp_path / "first.npy")
    pictures.load(0, 7).zero_()
    assert torch.equal(pictures.load(0, 7), EXPECTED)


def test_an_array_is_cropped_as_files_are(tmp_path):
    from PIL import Image

    np.savez(tmp_path / "a.npz", PIXELS)
    (tmp_path / "folder").mkdir()
    for row, pixels in enumerate(PIXELS):
        Image.fromarray(pixels).save(tmp_path / "folder" / f"{row}.png")
    for size in (3, 4):
        array, folder = (open_pictures(tmp_path / name, size=size) for name in ("a.npz", "folder"))
        assert torch.equal(array.load(0, 7), folder.load(0, 7)) and array.load(3, 3).shape == (0, 3, size, size)
        assert array.facts["size"] == folder.facts["size"] == [size, size]


class Trap:
    """Unpickling it would leave a file behind."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


def test_objects_are_refused_and_never_unpickled(tmp_path):
    sprung = tmp_path / "sprung"
    objects = np.array([Trap(sprung)], dtype=object)
    np.save(tmp_path / "a.npy", objects)
    np.savez(tmp_path / "b.npz", arr_0=objects)
    np.savez_compressed(tmp_path / "c.npz", arr_0=objects)
    np.savez(tmp_path / "d.npz", arr_0=PIXELS, arr_1=objects)
    for name, fault in (("a.npy", "Python objects"), ("b.npz", "Python objects"), ("c.npz", "Python objects")):
        with pytest.raises(ValueError, match=fault):
            open_pictures(tmp_path / name)
    with pytest.raises(ValueError, match="arr_1 cannot be read"):
        open_pictures(tmp_path / "d.npz")
    assert not sprung.exists()
    np.load(tmp_path / "a.npy", allow_pickle=True)
    assert sprung.exists()  # so the trap was a real one


@pytest.mark.parametrize(
    ("arrays", "fault"),
    [
        ({"arr_0": PIXELS.astype(np.float32)}, "holds float32, not uint8; round the pixels"),
        ({"arr_0": PIXELS[..., 0]}, r"shape \(7, 4, 5\); images must be \[N, H, W, 3\]"),
        ({"arr_0": PIXELS[..., :2]}, r"shape \(7, 4, 5, 2\)"),
        ({"arr_0": PIXELS[:0]}, "holds no image"),
        ({"images": PIXELS}, "has images, but no images; they must be its arr_0"),
        ({"mu": np.zeros(2), "sigma": np.eye(2)}, "has mu, sigma .a reference, it seems: give it as --reference"),
        ({"arr_0": PIXELS, "arr_1": np.arange(6)}, r"arr_1 is int64 \(6,\), but the labels of 7 images"),
        ({"arr_0": PIXELS, "arr_1": np.zeros(7)}, r"arr_1 is float64 \(7,\)"),
    ],
)
def test_arrays_that_are_no_images(tmp_path, arrays, fault):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match=fault):
        open_pictures(tmp_path / "a.npz")


def test_cut_arrays(tmp_path):
    for name, save in (("a.npy", np.save), ("b.npz", np.savez), ("c.npz", np.savez_compressed)):
        save(tmp_path / name, PIXELS)
        whole = (tmp_path / name).read_bytes()
        for length in (0, 5, 100, len(whole) - 10):
            (tmp_path / name).write_bytes(whole[:length])
            with pytest.raises(ValueError, match=f"{name}.*again"):
                open_pictures(tmp_path / name)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("count", [6, 8])
def test_a_false_header(tmp_path, method, count):
    """It promises fewer or more images than there are bytes."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        buffer, {"descr": "|u1", "fortran_order": False, "shape": (count * 1000, 4, 5, 3)}
    )
    with zipfile.ZipFile(tmp_path / "a.npz", "w", method) as archive:
        archive.writestr("arr_0.npy", buffer.getvalue() + np.repeat(PIXELS, 1000, 0).tobytes())
    with pytest.raises(ValueError, match=r"arr_0: .* takes \d+ bytes, but 420000 are there; write it again"):
        open_pictures(tmp_path / "a.npz")


def test_an_altered_packed_array_is_noticed(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", PIXELS)
    spoilt = bytearray((tmp_path / "a.npz").read_bytes())
    spoilt[len(spoilt) // 2] ^= 0xFF
    (tmp_path / "a.npz").write_bytes(spoilt)
    with pytest.raises(ValueError, match="not a whole zip file"):
        open_pictures(tmp_path / "a.npz")
