from dataclasses import dataclass, field

import pytest
import yaml

from engine.config import load, to_yaml
from eval.config import ClassifierConfig, EvalConfig, ProbeConfig, RejectionConfig


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


def test_variants_survive_yaml_and_the_command_line(tmp_path) -> None:
    path = tmp_path / "config.yaml"
    variants = {"cfg2": {"diffusion.sample.guidance": 2}}
    path.write_text(yaml.safe_dump({"eval": {"variants": variants}}))
    read = load(Outer, ["--config", str(path)])
    assert read.eval.variants == variants
    path.write_text(to_yaml(read))
    assert load(Outer, ["--config", str(path)]) == read
    other = load(Outer, ["--config", str(path), "--eval.variants={cold: {diffusion.sample.eta: 0.5}}"])
    assert other.eval.variants == {"cold": {"diffusion.sample.eta": 0.5}}
    assert load(Outer, ["--config", str(path), "--eval.variants={}"]).eval.variants == {}


def test_kid_uses_inception_wherever_it_is_listed() -> None:
    assert EvalConfig(features=("random", "inception")).main_features == "inception"
    assert EvalConfig(features=("random", "classifier")).main_features == "random"


def test_rejection_has_a_classifier_of_its_own(tmp_path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"eval": {"rejection": {"classifier": {"widths": [8, 8, 8]}}}}))
    read = load(Outer, ["--config", str(path), "--eval.rejection.acceptances=[0.5,0.25]"])
    assert read.eval.rejection.acceptances == (0.5, 0.25)
    assert (read.eval.rejection.classifier.seed, read.eval.classifier.seed) == (1, 0)
    assert RejectionConfig().classifier.widths != ClassifierConfig().widths
    path.write_text(to_yaml(read))
    assert load(Outer, ["--config", str(path)]) == read


def test_the_classifier_that_picks_is_not_the_one_that_judges() -> None:
    for judge in (ClassifierConfig(), ClassifierConfig(path="there")):
        picks = RejectionConfig(acceptances=(0.5,), classifier=judge)
        with pytest.raises(ValueError, match=r"circular: use another --eval\.rejection\.classifier\.seed, now 0,"):
            EvalConfig(classifier=judge, rejection=picks)
        EvalConfig(classifier=judge, rejection=picks, features=("random",))  # it judges nothing
        EvalConfig(classifier=judge, rejection=RejectionConfig(classifier=judge))  # it picks nothing
    picks = RejectionConfig(acceptances=(0.5,), classifier=ClassifierConfig(path="elsewhere"))
    EvalConfig(classifier=ClassifierConfig(path="there"), rejection=picks)


def test_bad_values_are_refused() -> None:
    with pytest.raises(ValueError, match=r"eval\.features is empty"):
        EvalConfig(features=())
    with pytest.raises(ValueError, match="num_samples=5"):
        EvalConfig(num_samples=5)
    with pytest.raises(ValueError, match="'vae'"):
        ProbeConfig(families=("vae",))
    with pytest.raises(ValueError, match=r"eval\.rejection\.acceptances=1 must lie between 0 and 1"):
        RejectionConfig(acceptances=(0.5, 1))
    with pytest.raises(ValueError, match="names a share twice"):
        RejectionConfig(acceptances=(0.5, 0.5))
    with pytest.raises(ValueError, match="held_out"):
        ProbeConfig(held_out=1.0)
    with pytest.raises(ValueError, match="c_grid"):
        ProbeConfig(c_grid=())
