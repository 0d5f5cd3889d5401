"""Features are extracted once, kept whole, and do not depend on how the work was divided."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config import RunConfig
from engine.device import Device, setup
from eval import extraction
from eval.extraction import CHUNK, extract, folder_of
from eval.features import open_features
from eval.pictures import Pictures

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))
import forked

COUNT = CHUNK + 90


@pytest.fixture
def device() -> Device:
    return setup(RunConfig(device="cpu", threads=1))


def pixels(n: int = COUNT) -> torch.Tensor:
    return torch.randint(0, 256, (n, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def pictures(images: torch.Tensor, **how: Any) -> Pictures:
    return Pictures(name="noise", count=len(images), load=lambda start, stop: images[start:stop], **how)


class Counting:
    """Sums of pixels, and how many images were asked for in which precision."""

    name = "counting"

    def __init__(self, version: int = 0) -> None:
        self.seen, self.version = 0, version

    def outputs(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        assert torch.get_float32_matmul_precision() == "highest" and torch.is_inference_mode_enabled()
        self.seen += len(images)
        return {"features": images.flatten(1).sum(1, keepdim=True).float(), "logits": images[:, :2, 0, 0].float()}

    def identity(self) -> dict[str, Any]:
        return {"name": self.name, "version": self.version}


def test_every_image_is_seen_once_and_in_order(tmp_path: Path, device: Device) -> None:
    network = Counting()
    seen = extract([network], pictures(pixels()), cache=tmp_path, device=device, batch_size=100)
    found = seen.outputs["counting"]
    assert (network.seen, seen.count, found.count) == (COUNT, COUNT, COUNT)
    expected = pixels().flatten(1).sum(1, keepdim=True).float()
    assert torch.equal(found.rows(), expected)
    assert torch.equal(torch.cat(list(found.parts())), expected)
    some = found.at([CHUNK + 3, 5, 7])
    assert torch.equal(some.rows(), expected[[5, 7, CHUNK + 3]])
    assert torch.equal(some.at([2, 0]).rows(), expected[[5, CHUNK + 3]])
    assert found.has("logits") and not found.has("other")


def test_what_is_kept_is_not_computed_again(tmp_path: Path, device: Device) -> None:
    first = extract([Counting()], pictures(pixels()), cache=tmp_path, device=device)
    again, other = Counting(), Counting(version=1)
    second = extract([again], pictures(pixels(), workers=2), cache=tmp_path, device=device, batch_size=7)
    assert again.seen == 0 and second == first
    extract([other], pictures(pixels()), cache=tmp_path, device=device)
    assert other.seen == COUNT  # another network of that name
    shorter = extract([again], pictures(pixels()[: CHUNK + 1]), cache=tmp_path, device=device)
    assert again.seen == 1 and shorter.pixels != first.pixels  # the first chunk is known already
    changed = pixels()
    changed[3, 0, 0, 0] += 1
    assert extract([again], pictures(changed), cache=tmp_path, device=device).pixels != first.pixels
    assert again.seen == 1 + CHUNK


def test_an_interrupted_extraction_goes_on_where_it_was(tmp_path: Path, device: Device) -> None:
    def load(start: int, stop: int) -> torch.Tensor:
        if start >= CHUNK:
            raise KeyboardInterrupt
        return pixels()[start:stop]

    with pytest.raises(KeyboardInterrupt):
        extract([Counting()], Pictures(name="n", count=COUNT, load=load), cache=tmp_path, device=device)
    rest = Counting()
    extract([rest], pictures(pixels()), cache=tmp_path, device=device)
    assert rest.seen == COUNT - CHUNK


@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_damaged_features_are_noticed_and_computed_again(tmp_path: Path, device: Device, damage: str) -> None:
    expected = extract([Counting()], pictures(pixels()), cache=tmp_path, device=device)
    path = expected.outputs["counting"].files[0]
    content = bytearray(path.read_bytes())
    if damage == "cut":
        content = content[:-100]
    else:
        content[-50] ^= 1
    path.write_bytes(bytes(content))
    again = Counting()
    with pytest.warns(UserWarning, match="cut or altered features are computed again"):
        found = extract([again], pictures(pixels()), cache=tmp_path, device=device)
    assert again.seen == CHUNK
    assert torch.equal(found.outputs["counting"].rows(), pixels().flatten(1).sum(1, keepdim=True).float())


def test_batch_size_changes_features_by_rounding_at_most(tmp_path: Path, device: Device) -> None:
    network = open_features("random")
    one, many = (
        extract([network], pictures(pixels()), cache=tmp_path / str(size), device=device, batch_size=size)
        for size in (1000, 33)
    )
    assert one.pixels == many.pixels
    torch.testing.assert_close(one.outputs["random"].rows(), many.outputs["random"].rows(), rtol=1e-6, atol=1e-6)


def test_precision_of_the_run_is_left_as_it_was(tmp_path: Path, device: Device) -> None:
    torch.set_float32_matmul_precision("medium")
    try:
        extract([Counting()], pictures(pixels(3)), cache=tmp_path, device=device)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_no_image_is_an_error(tmp_path: Path, device: Device) -> None:
    with pytest.raises(ValueError, match="noise: there is no image to judge"):
        extract([Counting()], pictures(pixels(0)), cache=tmp_path, device=device)


def test_a_full_disk_is_told_with_a_remedy(tmp_path: Path, device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    extract([Counting()], pictures(pixels(5)), cache=tmp_path, device=device)
    kept = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(extraction, "save_file", full)
    with pytest.raises(OSError, match=r"No space left.*--eval\.cache=FOLDER"):
        extract([Counting()], pictures(pixels(6)), cache=tmp_path, device=device)
    assert sorted(tmp_path.rglob("*")) == kept


def test_a_name_with_odd_letters_makes_a_folder(tmp_path: Path) -> None:
    network = Counting()
    network.name = "vim: block/4"
    assert folder_of(tmp_path, network).parent == tmp_path


def share(folder: Path) -> None:
    """One process's part in looking at 1,100 images, and what it has then."""
    loaded: list[list[int]] = []

    def load(start: int, stop: int) -> torch.Tensor:
        loaded.append([start, stop])
        return pixels(1100)[start:stop]

    device = setup(RunConfig(device="cpu", threads=1))
    noise = Pictures(name="noise", count=1100, load=load)
    seen = extract([open_features("random")], noise, cache=folder / "cache", device=device)
    rows = seen.outputs["random"].rows()
    told = {"pixels": seen.pixels, "sum": rows.double().sum().item(), "rows": len(rows), "loaded": loaded}
    (folder / f"{device.rank}.json").write_text(json.dumps(told))


@pytest.mark.slow
def test_two_processes_share_the_work_and_agree_with_one(tmp_path: Path) -> None:
    found = []
    for name, run in (("one", forked.run), ("two", forked.run_two)):
        (tmp_path / name).mkdir()
        run("test_extraction:share", tmp_path / name, told=tmp_path / "told")
        found.append([json.loads(path.read_text()) for path in sorted((tmp_path / name).glob("*.json"))])
    [alone], both = found
    assert len(both) == 2
    for told in both:
        assert all(told[key] == alone[key] for key in ("pixels", "sum", "rows"))
    assert sorted(both[0]["loaded"] + both[1]["loaded"]) == alone["loaded"]  # no image twice
    assert both[0]["loaded"] and both[1]["loaded"]
