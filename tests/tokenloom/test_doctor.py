"""The report says what is here, and comes out of a broken installation too."""

import sys
from importlib import metadata

import pytest
import torch

from eval.inception import INCEPTION_FILES
from tokenizer.perceptual import TRUNKS
from tokenloom import doctor as module
from tokenloom.doctor import doctor


def test_every_section_is_reported():
    report = doctor()
    assert all(title in report.splitlines() for title in module.SECTIONS)
    assert metadata.version("torch") in report and "not known" not in report
    assert all(word in report for word in ("device", "precision", "threads", "disk", "memory", "hub"))


def test_an_absent_extra_names_its_command(monkeypatch):
    monkeypatch.setattr(metadata, "requires", lambda _: ["torch>=2", 'no-such-thing>=1; extra == "dream"'])
    assert "absent (no-such-thing): pip install 'tokenloom[dream]'" in doctor()


@pytest.mark.parametrize("there", [True, False])
def test_weights_are_reported_with_their_place(tmp_path, monkeypatch, there):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    for name in (*INCEPTION_FILES, *TRUNKS.values()) if there else ():
        (tmp_path / "checkpoints" / name).touch()
    report = doctor()
    assert str(tmp_path / "checkpoints") in report
    assert (str(tmp_path / "checkpoints" / INCEPTION_FILES[0]) in report) == there
    assert ("no FID, only fd_<features>" in report) != there and ("no lpips_vgg" in report) != there


def test_a_missing_module_spoils_only_its_section(monkeypatch):
    monkeypatch.setitem(sys.modules, "eval.inception", None)
    report = doctor()
    assert report.count("not known") == 1 and "precision" in report


def test_a_package_that_is_not_installed_is_no_failure(monkeypatch):
    def missing(name: str) -> list[str]:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", missing)
    monkeypatch.setattr(metadata, "version", missing)
    report = doctor()
    assert "absent: pip install -e ." in report and "PackageNotFoundError" in report
