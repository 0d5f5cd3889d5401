from pathlib import Path

import pytest

from engine.checkpoint import save_model
from engine.resume import check_identity, completed, is_finished


def test_what_does_not_shape_the_weights_may_change_and_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check_identity(tmp_path, {"train": {"steps": 10, "log_every": 5}, "precision": "fp32"})
    assert capsys.readouterr().err == ""
    check_identity(tmp_path, {"train": {"steps": 20, "log_every": 5}, "precision": "bf16"})
    told = capsys.readouterr().err
    assert "train.steps: 10 -> 20" in told and "precision: 'fp32' -> 'bf16'" in told and "log_every" not in told


@pytest.mark.parametrize("change", [{"seed": 1}, {"data": {"n": 4}}, {"train": {"batch_size": 2}}, {"added": 1}])
def test_what_shapes_the_weights_is_refused_and_the_folder_left_as_it_was(tmp_path: Path, change: dict) -> None:
    begun = {"seed": 0, "data": {"n": 3}, "train": {"batch_size": 1}}
    check_identity(tmp_path, begun)
    with pytest.raises(ValueError, match=r"begun with another configuration(.|\n)*--run\.name"):
        check_identity(tmp_path, {**begun, **change})
    check_identity(tmp_path, begun)


def test_a_stage_is_finished_only_under_its_own_identity(tmp_path: Path) -> None:
    identity = {"seed": 0, "betas": (0.9, 0.99)}
    assert not is_finished(tmp_path, identity)
    save_model(tmp_path, {}, {"config": {}, "identity": identity})
    assert is_finished(tmp_path, identity)
    assert not is_finished(tmp_path, {**identity, "seed": 1})


def test_a_setting_that_is_newer_than_the_run_counts_as_its_default(tmp_path: Path) -> None:
    old, defaults = {"model": {"width": 8}, "codes": {"n": 3}}, {"model": {"width": 4, "block": "vim"}}
    now = {"model": {"width": 8, "block": "vim"}, "codes": {"n": 3}}
    save_model(tmp_path, {}, {"config": {}, "identity": old})
    assert completed(old, defaults) == now
    assert is_finished(tmp_path, now, defaults) and not is_finished(tmp_path, now)
    check_identity(tmp_path, old)
    check_identity(tmp_path, now, defaults)
    with pytest.raises(ValueError, match=r"model\.block: 'vim' -> 'modern'"):
        check_identity(tmp_path, {**now, "model": {"width": 8, "block": "modern"}}, defaults)
