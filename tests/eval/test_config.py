from dataclasses import dataclass, field

import pytest
import yaml

from engine.config import load, to_yaml
from eval.config import EvalConfig, ProbeConfig


@dataclass(frozen=True, kw_only=True)
class Outer:
    eval: EvalConfig = field(default_factory=EvalConfig)


def test_section_survives_yaml(tmp_path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"eval": {"features": ["inception", "random"], "probe": {"taps": ["encoder.0"]}}}))
    read = load(Outer, ["--config", str(path), "--eval.num_samples=64", "--eval.classifier.train.steps=9"])
    assert read.eval.features == ("inception", "random")
    assert read.eval.probe.taps == ("encoder.0",)
    assert (read.eval.num_samples, read.eval.classifier.train.steps) == (64, 9)
    assert read.eval.classifier.train.preview_every == 0
    path.write_text(to_yaml(read))
    assert load(Outer, ["--config", str(path)]) == read


def test_kid_uses_inception_wherever_it_is_listed() -> None:
    assert EvalConfig(features=("random", "inception")).main_features == "inception"
    assert EvalConfig(features=("random", "classifier")).main_features == "random"


def test_bad_values_are_refused() -> None:
    with pytest.raises(ValueError, match=r"eval\.features is empty"):
        EvalConfig(features=())
    with pytest.raises(ValueError, match="num_samples=5"):
        EvalConfig(num_samples=5)
    with pytest.raises(ValueError, match="'vae'"):
        ProbeConfig(families=("vae",))
    with pytest.raises(ValueError, match="held_out"):
        ProbeConfig(held_out=1.0)
    with pytest.raises(ValueError, match="c_grid"):
        ProbeConfig(c_grid=())
