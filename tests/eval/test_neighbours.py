import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from eval.neighbours import LEAST_HELD_OUT, find_neighbours, write_sheet
from eval.pictures import Pictures


def vectors(n: int, seed: int, dims: int = 6) -> torch.Tensor:
    return torch.randn(n, dims, generator=torch.Generator().manual_seed(seed))


def test_copies_of_training_images_come_first_and_are_counted() -> None:
    training, held_out = vectors(500, 0), vectors(300, 1)
    generated = torch.cat([vectors(90, 2), training[40:50] + 1e-3])
    found = find_neighbours(generated, training, held_out)
    assert sorted(found.rows[:10].tolist()) == list(range(90, 100))
    assert found.indices[:10, 0].tolist() == [40 + row - 90 for row in found.rows[:10].tolist()]
    assert (found.distances[:, 1:] >= found.distances[:, :-1]).all()
    assert found.copies is not None and 0.10 <= found.copies.value <= 0.14  # the ten, and about one in a hundred


def test_images_that_are_not_copied_score_as_real_ones_do() -> None:
    found = find_neighbours(vectors(2000, 3), vectors(500, 0), vectors(2000, 1))
    assert found.copies is not None and found.copies.interval is not None
    assert found.copies.interval[0] < 0.01 + 0.005 and found.copies.value < 0.025
    nearest = torch.cdist(vectors(2000, 1), vectors(500, 0)).min(1).values
    torch.testing.assert_close(torch.tensor(found.typical), nearest.median(), rtol=1e-5, atol=0)


def test_too_few_held_out_images_give_no_share() -> None:
    assert find_neighbours(vectors(9, 1), vectors(9, 0), vectors(LEAST_HELD_OUT - 1, 2)).copies is None
    assert find_neighbours(vectors(9, 1), vectors(3, 0), None).indices.shape == (9, 3)


def test_the_sheet_shows_the_nearest_pairs_and_tells_them(tmp_path: Path) -> None:
    def plain(count: int, shade: int) -> Pictures:
        shades = (torch.arange(count) * 3 + shade).to(torch.uint8)
        whole = shades[:, None, None, None].expand(count, 3, 8, 8).contiguous()
        return Pictures(name="plain", count=count, load=lambda start, stop: whole[start:stop])

    training = vectors(20, 0)
    found = find_neighbours(training[[7, 3]] + torch.tensor([[0.01], [0.2]]), training, None)
    write_sheet(tmp_path / "sheet.png", found, plain(2, 200), plain(20, 0), rows=2, told={"features": "toy"})
    told = json.loads((tmp_path / "sheet.json").read_text())
    assert told["samples"] == [0, 1] and [row[0] for row in told["training_images"]] == [7, 3]
    assert told["features"] == "toy" and told["distances"][0][0] < told["distances"][1][0]
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert (sheet[20, 20] == 200).all()  # the generated image
    assert (sheet[20, 4 + 100 + 8 + 20] == 21).all()  # beside it training image 7, of shade 21
