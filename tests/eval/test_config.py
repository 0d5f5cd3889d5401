from dataclasses import dataclass, field

import pytest
import yaml

from engine.config import load, to_yaml
from eval.config import ClassifierConfig, EvalConfig, OnlineProbeConfig, ProbeConfig, RejectionConfig


@dataclass(frozen=True, kw_only=True)
class Outer:
    eval: EvalConfig = field(default_factory=EvalConfig)


def test_section_survives_yaml(tmp_path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"eval": {"features": ["inception", "random"], "probe": {"taps": ["tokenizer.*"]}}}))
    read = load(Outer, ["--config", str(path), "--eval.num_samples=64", "--eval.classifier.train.steps=9"])
    assert read.eval.features == ("inception", "random")
    assert read.eval.probe.taps == ("tokenizer.*",)
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
    with pytest.raises(ValueError, match=r"eval\.rejection\.acceptances=1 must lie between 0 and 1"):
        RejectionConfig(acceptances=(0.5, 1))
    with pytest.raises(ValueError, match="names a share twice"):
        RejectionConfig(acceptances=(0.5, 0.5))
    with pytest.raises(ValueError, match="held_out"):
        ProbeConfig(held_out=1.0)
    with pytest.raises(ValueError, match="c_grid"):
        ProbeConfig(c_grid=())


def test_taps_name_a_model_that_could_be_there(tmp_path) -> None:
    taps = ("pixels", "tokenizer.patch", "vim.block[12]", "vim_random.*", "dit.block6@logsnr=-0.5", "timm:vit:a.pth:64")
    assert ProbeConfig(taps=taps).taps == taps
    for wrong in ("vae.block1", "block1", "autoregressive.block1", "*", "timm:vit", ""):
        with pytest.raises(
            ValueError, match=r"it takes pixels, tokenizer\.\*, vim\.\*, vim_random\.\*, dit\.\*, or timm:"
        ):
            ProbeConfig(taps=("pixels", wrong))
    for wrong in ("dit.block6@2", "dit.block6@logsnr=much", "vim.block6@logsnr=2"):
        with pytest.raises(ValueError, match=r"only dit has noise levels, as dit\.block6@logsnr=0"):
            ProbeConfig(taps=(wrong,))
    with pytest.raises(ValueError, match=r"eval\.probe\.taps is empty"):
        ProbeConfig(taps=())


def test_wrong_numbers_of_a_probe_are_refused() -> None:
    for key, value in (("num_train", -1), ("knn_k", -5), ("knn_temperature", 0.0)):
        with pytest.raises(ValueError, match=rf"eval\.probe\.{key}={value}"):
            ProbeConfig(**{key: value})
    for key, value in (("epochs", 0), ("batch_size", 0), ("warmup_epochs", 90), ("warmup_epochs", -1)):
        with pytest.raises(ValueError, match=rf"eval\.probe\.online: .*{key}={value}"):
            OnlineProbeConfig(**{key: value})
    for rates in ((), (0.1, 0.1), (0.0, 0.1)):
        with pytest.raises(ValueError, match=r"eval\.probe\.online\.learning_rates=\["):
            OnlineProbeConfig(learning_rates=rates)
    with pytest.raises(ValueError, match=r"min_scale=0\.0 must be above 0"):
        OnlineProbeConfig(min_scale=0.0)
