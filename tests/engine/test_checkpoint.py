import contextlib
import json
import resource
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from engine import checkpoint
from engine.checkpoint import load_checkpoint, load_model, prune, save_checkpoint, save_model

WEIGHTS = {"net": {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(3)}, "other": {"c": torch.ones(2)}}


def save(folder: Path, step: int) -> Path:
    return save_checkpoint(folder, step, weights=WEIGHTS, averaged={"net": WEIGHTS["net"]}, state={"number": step})


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    save(tmp_path, 5)
    loaded = load_checkpoint(tmp_path)
    assert loaded is not None
    weights, averaged, state = loaded
    assert weights.keys() == WEIGHTS.keys() and averaged.keys() == {"net"}
    assert all(torch.equal(weights[m][k], WEIGHTS[m][k]) for m in WEIGHTS for k in WEIGHTS[m])
    assert state == {"step": 5, "number": 5}
    assert load_checkpoint(tmp_path / "nothing") is None


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


@pytest.mark.parametrize("name", ["model.safetensors", "averaged.safetensors", "state.pt", "manifest.json"])
@pytest.mark.parametrize("damage", [flip_a_bit, cut, Path.unlink])
def test_any_damage_falls_back_to_the_newest_whole_one(tmp_path: Path, name: str, damage) -> None:
    save(tmp_path, 5)
    save(tmp_path, 10)
    damage(tmp_path / "step-00000010" / name)
    if name == "manifest.json" and damage is flip_a_bit:
        (tmp_path / "step-00000010" / name).write_bytes(b"{]")
    with pytest.warns(UserWarning, match="step-00000010 is damaged .* falling back"):
        loaded = load_checkpoint(tmp_path)
    assert loaded is not None and loaded[2]["step"] == 5


def test_a_draft_of_a_killed_process_is_never_loaded_and_cleared_away(tmp_path: Path) -> None:
    save(tmp_path, 5)
    (tmp_path / ".draft-step-00000010").mkdir()
    loaded = load_checkpoint(tmp_path)
    assert loaded is not None and loaded[2]["step"] == 5
    save(tmp_path, 15)
    prune(tmp_path, keep_last=2, milestone_every=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000005", "step-00000015"]


@contextlib.contextmanager
def room_for(size: int) -> Iterator[None]:
    """No file may grow beyond `size` bytes, as on a full disk."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("size", [10, 100, 400, 700])  # in the middle of the weights, of the state, of the manifest
def test_a_full_disk_is_told_and_loses_nothing(tmp_path: Path, size: int) -> None:
    save(tmp_path, 5)
    with room_for(size), pytest.raises(OSError, match=r"step 10 not written .*Older checkpoints are whole.*free some"):
        save(tmp_path, 10)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000005"]
    assert load_checkpoint(tmp_path) is not None


def test_a_full_disk_leaves_no_half_model(tmp_path: Path) -> None:
    save_model(tmp_path, {"a": torch.ones(3)}, {"config": {}})
    with room_for(50), pytest.raises(OSError, match="model not written"):
        save_model(tmp_path, {"a": torch.zeros(300)}, {"config": {}})
    assert torch.equal(load_model(tmp_path)[1]["a"], torch.ones(3))


def test_a_kill_between_the_two_files_of_a_model_leaves_it_unfinished_not_false(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(tmp_path, {"a": torch.ones(3)}, {"config": {}})

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "write_json", killed)
    with pytest.raises(KeyboardInterrupt):
        save_model(tmp_path, {"a": torch.zeros(3)}, {"config": {}})
    with pytest.raises(ValueError, match="has not been trained to its end"):
        load_model(tmp_path)


def test_nothing_is_loaded_that_could_run_code(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self):
            return (Path(tmp_path / "owned").touch, ())

    folder = save(tmp_path, 5)
    torch.save({"step": 5, "evil": Payload()}, folder / "state.pt")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["state.pt"] = {
        "bytes": (folder / "state.pt").stat().st_size,
        "sha256": checkpoint.sha256(folder / "state.pt"),
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(Exception, match=r"[Ww]eights"):
        load_checkpoint(tmp_path)
    assert not (tmp_path / "owned").exists()


def test_a_model_is_named_by_its_weights_and_its_configuration(tmp_path: Path) -> None:
    weights = {"a": torch.ones(3)}
    first = save_model(tmp_path / "1", weights, {"config": {"width": 3}})
    assert first == save_model(tmp_path / "2", weights, {"config": {"width": 3}, "note": "other"})
    assert first != save_model(tmp_path / "3", weights, {"config": {"width": 4}})
    assert first != save_model(tmp_path / "4", {"a": torch.zeros(3)}, {"config": {"width": 3}})
    card, loaded = load_model(tmp_path / "1")
    assert card["fingerprint"] == first and torch.equal(loaded["a"], weights["a"])


def test_a_model_that_is_missing_cut_or_exchanged_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has not been trained to its end"):
        load_model(tmp_path)
    save_model(tmp_path, {"a": torch.ones(3)}, {"config": {}})
    save_file({"a": torch.zeros(3)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="does not match the sha256"):
        load_model(tmp_path)
    cut(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="damaged"):
        load_model(tmp_path)
