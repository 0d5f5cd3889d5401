from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from engine.config import DataConfig
from engine.sources import open_images
from eval.pictures import Pictures, draw_indices, drawn, label_scheme, numbered


def images(n: int) -> torch.Tensor:
    return torch.randint(0, 256, (n, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_drawn_indices_are_seeded_distinct_and_not_sorted() -> None:
    candidates = np.arange(100, 200)
    chosen = draw_indices(candidates, 50, seed=1)
    assert len(set(chosen)) == 50
    assert set(chosen) <= set(candidates)
    assert not np.array_equal(chosen, np.sort(chosen))
    assert np.array_equal(chosen, draw_indices(candidates, 50, seed=1))
    assert sorted(draw_indices(candidates, 0, seed=1)) == candidates.tolist()


def test_images_of_a_split_come_in_the_order_asked_with_their_labels() -> None:
    digits = open_images(DataConfig(size=16), "test")
    rows = np.array([7, 3, 200])
    found = drawn(digits, rows, name="three")
    assert torch.equal(found.load(0, 3), digits.load(rows)["images"])
    assert torch.equal(found.load(1, 2), digits.load(rows[1:2])["images"])
    assert found.labels is not None and found.labels.tolist() == digits.labels[rows].tolist()
    assert found.facts == {**digits.identity(), "drawn": 3}
    assert drawn(digits, np.arange(len(digits)), name="all").facts == digits.identity()


def test_a_label_goes_with_the_image_that_stands_in_for_an_unreadable_one(tmp_path: Path) -> None:
    for index, (folder, image) in enumerate(zip("abbb", images(4), strict=True)):
        (tmp_path / folder).mkdir(exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / folder / f"{index}.png")
    (tmp_path / "a" / "0.png").write_bytes(b"no image")
    data = DataConfig(source="folder", path=str(tmp_path), test_path=str(tmp_path), size=16)
    found = drawn(open_images(data, "train"), np.array([0, 2]), name="two")
    with pytest.warns(UserWarning, match="left out unreadable image"):
        found.load(0, 2)
    assert found.labels is not None and found.labels.tolist() == [1, 1]


def test_png_files_come_back_as_they_were_written(tmp_path: Path) -> None:
    for index, image in enumerate(images(5)):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / f"{index:06d}.png")
    assert torch.equal(torch.cat(list(numbered(tmp_path, 5, size=16, name="png").batches(2))), images(5))
    with pytest.raises(ValueError, match=r"000000\.png has 16 x 16 pixels, but data\.size=32"):
        numbered(tmp_path, 5, size=32, name="png").load(0, 1)
    with pytest.raises(ValueError, match=r"000005\.png: not a readable image"):
        numbered(tmp_path, 6, size=16, name="png").load(4, 6)


def test_rows_of_a_set_are_a_set() -> None:
    whole = Pictures(name="whole", count=6, load=lambda a, b: images(6)[a:b], labels=torch.arange(6))
    part = whole.at(np.array([4, 0, 5]))
    assert (part.name, part.count) == ("whole", 3)
    assert torch.equal(part.load(0, 3), images(6)[[4, 0, 5]])
    assert part.labels is not None and part.labels.tolist() == [4, 0, 5]


@pytest.mark.parametrize(
    ("labels", "scheme"),
    [
        ([0, 1, 2, 0, 1, 2, 0], "balanced"),
        ([0, 0, 1, 0], "unbalanced"),
        ([0, 1, -1], "unbalanced"),
        ([-1, -1], None),
        (None, None),
    ],
)
def test_label_scheme_says_whether_classes_take_turns(labels: list[int] | None, scheme: str | None) -> None:
    assert label_scheme(None if labels is None else torch.tensor(labels)) == scheme
