"""Folders, zips and parquet files of any maker: order, labels, sizes, damage and messages."""

import io
import json
import os
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from engine.decode import center_crop
from eval.image_files import open_pictures

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 4, 5, 3), np.uint8)  # [N, H, W, 3]
EXPECTED = torch.from_numpy(PIXELS).permute(0, 3, 1, 2)
CLASSES = ["cat/b.png", "cat/deep/a.PNG", "dog/0.png", "dog/1.png", "dog/10.png", "emu/x.png"]  # sorted
EDM = [f"{row // 3:05d}/img{row:08d}.png" for row in range(6)]


def encoded(pixels, kind="PNG"):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def contents(names):
    return {name: encoded(pixels) for name, pixels in zip(names, PIXELS, strict=True)}


def make_folder(root, files):
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def make_zip(path, files, method=zipfile.ZIP_STORED, top=""):
    with zipfile.ZipFile(path, "w", method) as archive:
        for name in reversed(files):
            archive.writestr(top + name, files[name])
    return path


def samples_json(num=6, **more):
    told = {"family": "diffusion", "generator": "g1", "tokenizer": "t1", "settings": {"steps": 4}}
    lists = {"class_names": ["a", "b"], "labels": [row % 2 for row in range(num)], "seeds": list(range(7, 7 + num))}
    return json.dumps({**told, **lists, **more}).encode()


def own_samples():
    files = contents([f"{row:06d}.png" for row in range(6)])
    return {**files, "grid.png": encoded(np.zeros((40, 40, 3), np.uint8)), "samples.json": samples_json()}


def make_parquet(path, rows, **columns):
    cells = pa.array([{"bytes": encoded(PIXELS[row]), "path": None} for row in rows])
    pq.write_table(pa.table({"image": cells, **columns}), path, row_group_size=2)
    return path


def all_of(pictures):
    return torch.cat(list(pictures.batches(4)))


def test_a_folder_and_its_zips_are_the_same_set(tmp_path):
    files = {**contents(CLASSES), "cat/notes.txt": b"x", ".hidden/a.png": b"x", "__MACOSX/cat/._b.png": b"x"}
    made = [
        make_folder(tmp_path / "set", {name: data for name, data in files.items() if "MACOSX" not in name}),
        make_zip(tmp_path / "stored.zip", files),
        make_zip(tmp_path / "packed.zip", files, zipfile.ZIP_DEFLATED),
        make_zip(tmp_path / "around.zip", files, zipfile.ZIP_DEFLATED, top="some/set/"),
    ]
    for path in made:
        pictures = open_pictures(path)
        assert torch.equal(all_of(pictures), EXPECTED)
        assert pictures.labels.tolist() == [0, 0, 1, 1, 1, 2] and pictures.class_names == ("cat", "dog", "emu")
        kind = "folder" if path.is_dir() else "zip"
        assert pictures.facts == {"kind": kind, "path": str(path), "images": 6, "size": [4, 5], "crop": "as stored"}
        json.dumps(pictures.facts)


def test_flat_and_sharded_folders_have_no_classes(tmp_path):
    for number, names in enumerate(([f"{row}.png" for row in range(6)], EDM)):
        pictures = open_pictures(make_folder(tmp_path / str(number), contents(names)))
        assert torch.equal(all_of(pictures), EXPECTED)
        assert pictures.labels is None and pictures.class_names == ()


def test_a_link_that_leads_back_has_no_end(tmp_path):
    folder = make_folder(tmp_path / "set", contents(CLASSES))
    (folder / "fox").symlink_to(folder / "emu")
    assert open_pictures(folder).count == 7  # a link elsewhere is a folder as any other
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "back").symlink_to(folder)
    for link, target in (("dog/up", folder), ("dog/far", elsewhere)):
        (folder / link).symlink_to(target)
        with pytest.raises(ValueError, match=f"{link}.*: a link back to a folder around it; remove it"):
            open_pictures(folder)
        (folder / link).unlink()


def test_a_folder_that_cannot_be_read_is_no_gap(tmp_path, monkeypatch):
    folder, scan = make_folder(tmp_path / "set", contents(CLASSES)), os.scandir

    def refuse(path):
        if str(path).endswith("dog"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ValueError, match=r"dog: a folder that cannot be read \(Permission denied\)"):
        open_pictures(folder)


def test_names_in_a_zip_that_other_tools_write(tmp_path):
    files = contents(CLASSES)
    for number, odd in enumerate((lambda name: f"./{name}", lambda name: name.replace("/", "\\"))):
        path = make_zip(tmp_path / f"{number}.zip", {odd(name): data for name, data in files.items()})
        pictures = open_pictures(path)
        assert torch.equal(all_of(pictures), EXPECTED) and pictures.class_names == ("cat", "dog", "emu")
    with warnings.catch_warnings(), zipfile.ZipFile(tmp_path / "0.zip", "a") as archive:
        warnings.simplefilter("ignore")
        archive.writestr("./cat/b.png", files["dog/0.png"])
    with pytest.raises(ValueError, match=r"0\.zip member \./cat/b\.png: there several times"):
        open_pictures(tmp_path / "0.zip")


def test_a_zip_is_read_by_many_threads(tmp_path):
    pictures = open_pictures(make_zip(tmp_path / "a.zip", contents(CLASSES), zipfile.ZIP_DEFLATED))
    with ThreadPoolExecutor(8) as pool:
        for index, image in enumerate(pool.map(lambda row: pictures.load(row % 6, row % 6 + 1), range(120))):
            assert torch.equal(image[0], EXPECTED[index % 6])


def test_other_pixel_kinds_become_rgb(tmp_path):
    files = {
        "alpha": Image.new("RGBA", (3, 3), (9, 9, 9, 0)),  # nothing but transparency: white
        "grey": Image.new("L", (3, 3), 7),
        "palette": Image.new("RGB", (3, 3), (1, 2, 3)).quantize(2),
        "wide": Image.fromarray(np.full((3, 3), 65535, np.uint16)),
    }
    for name, image in files.items():
        image.save(tmp_path / f"{name}.png")
    pictures = open_pictures(tmp_path)
    assert pictures.load(0, 4)[:, :, 1, 1].tolist() == [[255] * 3, [7] * 3, [1, 2, 3], [255] * 3]
    assert pictures.load(2, 2).shape == (0, 3, 3, 3)


def test_images_of_several_sizes_need_a_size(tmp_path):
    big = np.random.default_rng(1).integers(0, 256, (9, 30, 3), np.uint8)
    folder = make_folder(tmp_path, {**contents(CLASSES), "emu/y.png": encoded(big)})
    pictures = open_pictures(folder)
    assert torch.equal(pictures.load(0, 6), EXPECTED)
    with pytest.raises(ValueError, match=r"emu/y\.png has 30 x 9 pixels, but .*cat/b\.png has 5 x 4; give --size"):
        pictures.load(5, 7)
    pictures = open_pictures(folder, size=4)
    cropped = np.asarray(center_crop(Image.fromarray(big), 4))
    assert torch.equal(pictures.load(6, 7)[0], torch.from_numpy(cropped.copy()).permute(2, 0, 1))
    assert pictures.facts["size"] == [4, 4] and pictures.facts["crop"] == "adm_center"


def test_a_cut_image_is_an_error_not_a_gap(tmp_path):
    files = contents(CLASSES)
    files["dog/1.png"] = files["dog/1.png"][:-30]
    for path in (make_folder(tmp_path / "set", files), make_zip(tmp_path / "set.zip", files)):
        pictures = open_pictures(path)
        assert len(pictures.load(0, 3)) == 3
        with pytest.raises(ValueError, match=r"dog/1\.png: not a readable image .*write it again"):
            pictures.load(0, 6)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_cut_or_altered_zip_is_noticed(tmp_path, method):
    """Bitmaps, as they have no checksum of their own."""
    files = {name: encoded(pixels, "BMP") for name, pixels in zip(CLASSES, PIXELS, strict=True)}
    path = make_zip(tmp_path / "a.zip", files, method)
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo("dog/1.png")
    spoilt = bytearray(whole)
    spoilt[info.header_offset + 30 + len(info.filename) + info.compress_size // 2] ^= 0xFF
    path.write_bytes(spoilt)
    with pytest.raises(ValueError, match=r"dog/1\.png.*again"):
        open_pictures(path).load(0, 6)
    path.write_bytes(whole[:-40])
    with pytest.raises(ValueError, match=r"a\.zip: not a whole zip"):
        open_pictures(path)


def test_jpeg_is_told_and_warned_about(tmp_path):
    folder = make_folder(tmp_path / "set", {"0.jpg": encoded(PIXELS[0], "JPEG")})
    cells = [{"bytes": encoded(PIXELS[0], "JPEG"), "path": None}]
    pq.write_table(pa.table({"image": cells}), tmp_path / "a.parquet")
    for path in (folder, tmp_path / "a.parquet"):
        with pytest.warns(UserWarning, match="holds JPEG files"):
            assert open_pictures(path).facts["lossy"] is True


@pytest.mark.parametrize("zipped", [False, True])
def test_edm_labels(tmp_path, zipped):
    def made(told):
        files = {**contents(EDM), "dataset.json": json.dumps(told).encode()}
        return make_zip(tmp_path / "a.zip", files) if zipped else make_folder(tmp_path / "set", files)

    rows = [[name, row % 3] for row, name in enumerate(EDM)]
    rows[0][0] = rows[0][0].replace("/", "\\")  # as Windows writes it
    pictures = open_pictures(made({"labels": rows[::-1]}))
    assert pictures.labels.tolist() == [0, 1, 2, 0, 1, 2] and pictures.class_names == ("0", "1", "2")
    assert torch.equal(all_of(pictures), EXPECTED)
    assert open_pictures(made({"labels": None})).labels is None
    with pytest.raises(ValueError, match=f"dataset.json: no label for {EDM[5]}"):
        open_pictures(made({"labels": [[name, 0] for name in EDM[:5]]}))
    with pytest.raises(ValueError, match=r"dataset\.json: label \[0\.5\] is no integer"):
        open_pictures(made({"labels": [[name, [0.5]] for name in EDM]}))
    with pytest.raises(ValueError, match=r"dataset\.json: label 1000000000000000000000 is no integer of 64 bits"):
        open_pictures(made({"labels": [[name, 10**21] for name in EDM]}))
    with pytest.raises(ValueError, match=r"dataset\.json: labels must be a list"):
        open_pictures(made({"labels": {"a": 1}}))


@pytest.mark.parametrize("zipped", [False, True])
def test_samples_of_ours_tell_labels_and_models(tmp_path, zipped):
    def made(files):
        return make_zip(tmp_path / "a.zip", files, top="diffusion/") if zipped else make_folder(tmp_path / "set", files)

    pictures = open_pictures(
        made({**own_samples(), "samples.json": samples_json(acceptance=0.5, probability=[0.1] * 6)})
    )
    assert torch.equal(all_of(pictures), EXPECTED) and pictures.labels.tolist() == [0, 1] * 3
    assert pictures.class_names == ("a", "b")
    models = {"family": "diffusion", "generator": "g1", "tokenizer": "t1"}
    assert pictures.facts["samples"] == {**models, "settings": {"steps": 4}, "acceptance": 0.5, "seeds": [7, 12]}
    without = made({**own_samples(), "samples.json": samples_json(labels=[-1] * 6)})
    assert open_pictures(without).labels is None
    with pytest.raises(ValueError, match=r"000006\.png is missing; sample again"):
        open_pictures(made({**own_samples(), "samples.json": samples_json(7)}))
    with pytest.raises(ValueError, match=r"samples\.json: cannot be read"):
        open_pictures(made({**own_samples(), "samples.json": samples_json()[:-9]}))


def test_a_run_or_several_sets_are_refused_with_a_hint(tmp_path):
    run = tmp_path / "run"
    for family in ("autoregressive", "diffusion"):
        make_folder(run / "samples" / family, own_samples())
    with pytest.raises(ValueError, match=r"several sets of samples; give one of .*samples/autoregressive, .*diffusion"):
        open_pictures(run / "samples")
    (run / "config.yaml").write_text("")
    with pytest.raises(ValueError, match=r"is a run, .*give its samples: .*samples/autoregressive, .*/diffusion"):
        open_pictures(run)
    split = make_folder(tmp_path / "split", {"train/a/0.png": encoded(PIXELS[0]), "val/a/0.png": encoded(PIXELS[1])})
    with pytest.raises(ValueError, match=r"both a training and a held-out split; give one of .*split/train, .*/val"):
        open_pictures(split)


def test_parquet_gives_every_row(tmp_path):
    make_parquet(tmp_path / "train-0.parquet", range(4), label=[1, 0, 1, 0])
    make_parquet(tmp_path / "train-1.parquet", range(4, 6), label=[2, 2])
    pictures = open_pictures(tmp_path / "train-*.parquet")
    assert torch.equal(all_of(pictures), EXPECTED) and pictures.labels.tolist() == [1, 0, 1, 0, 2, 2]
    assert pictures.facts["kind"] == "parquet" and "lossy" not in pictures.facts
    assert open_pictures(tmp_path / "train-1.parquet").count == 2
    make_parquet(tmp_path / "test.parquet", [0], label=[0])
    with pytest.raises(ValueError, match="both training and held-out files; give a glob"):
        open_pictures(tmp_path / "*.parquet")


def test_parquet_faults(tmp_path):
    pq.write_table(pa.table({"a": [1], "b": [2]}), tmp_path / "none.parquet")
    with pytest.raises(ValueError, match=r"none\.parquet: .*name the columns image and label"):
        open_pictures(tmp_path / "none.parquet")
    make_parquet(tmp_path / "empty.parquet", [])
    with pytest.raises(ValueError, match=r"empty\.parquet"):
        open_pictures(tmp_path / "empty.parquet")
    cells = [{"bytes": encoded(PIXELS[0]), "path": None}, {"bytes": b"no image", "path": None}]
    pq.write_table(pa.table({"image": cells}), tmp_path / "bad.parquet")
    with pytest.raises(ValueError, match="row group 0 row 1: not a readable image"):
        open_pictures(tmp_path / "bad.parquet").load(0, 2)
    cut = make_parquet(tmp_path / "cut.parquet", range(6))
    cut.write_bytes(cut.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"cut\.parquet: not a whole parquet file"):
        open_pictures(cut)


def test_what_is_no_set_of_images(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no image in it"):
        open_pictures(tmp_path / "empty")
    for name in ("absent", "absent.zip", "absent.npz", "absent*.parquet"):
        with pytest.raises(ValueError, match=r"no such file or folder .*give \.zip, \.npz"):
            open_pictures(tmp_path / name)
    (tmp_path / "a.png").write_bytes(encoded(PIXELS[0]))
    with pytest.raises(ValueError, match=r"not read from \.png; give .* a folder of images"):
        open_pictures(tmp_path / "a.png")
    with pytest.raises(ValueError, match="size=0 must be"):
        open_pictures(tmp_path, size=0)
    with pytest.raises(ValueError, match="images 0 to 2 are asked for, but there are 1"):
        open_pictures(tmp_path).load(0, 2)
    make_folder(tmp_path / "both", {"a.png": b"", "cat/b.png": b""})
    with pytest.raises(ValueError, match=r"a\.png lies beside folders of images such as cat"):
        open_pictures(tmp_path / "both")
