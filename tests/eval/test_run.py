"""A whole run of untrained models is scored; what matters here is what is measured, on what, and how it is kept."""

import dataclasses
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.checkpoint import load_model, save_model
from engine.config import DataConfig, RunConfig
from engine.device import setup
from engine.snapshots import write_snapshot
from eval.config import RejectionConfig
from eval.features import RandomFeatures
from eval.outside import OutsideConfig, judge_files
from eval.protocol import read_scores
from eval.run import check
from eval.taps import encoded_once
from generator.config import AutoregressiveSampleConfig
from tokenizer.model import Tokenizer, model_card

sys.path.insert(0, str(Path(__file__).parent))
from untrained import EVAL, FAMILIES, MODEL, make_run, scores


@pytest.fixture
def run(tmp_path: Path) -> RunConfig:
    return make_run(tmp_path)


ONE_FAMILY = dataclasses.replace(EVAL, probe=dataclasses.replace(EVAL.probe, taps=("vim.*",)))


def test_everything_a_run_has_is_scored_and_kept(run: RunConfig, capsys: pytest.CaptureFixture) -> None:
    found = scores(run)
    judged = {"fd_classifier", "is_classifier", "fd_random", "kid", "precision", "recall", "density", "coverage"}
    probed = {"probe_top1", "probe_top5", "knn_top1"}
    expected = {("real", name) for name in judged}
    expected |= {(family, name) for family in FAMILIES for name in judged | probed | {"class_accuracy"}}
    expected |= {("tokenizer", name) for name in {"psnr", "ssim", "usage", "perplexity"} | probed}
    expected |= {("tokenizer", "rfd_classifier"), ("tokenizer", "rfd_random")}
    expected |= {("autoregressive", "nll")}
    expected |= {(subject, name) for subject in ("pixels", "autoregressive_random") for name in probed}
    assert set(found) == expected
    assert not any(name in ("fid", "rfid", "is") for _, name in found)
    assert len(read_scores(run.folder / "eval" / "metrics.json")) == len(expected)
    assert re.search(r"^diffusion +kid .* classifier ", capsys.readouterr().out, flags=re.M)
    real, made = found["real", "fd_random"], found["diffusion", "fd_random"]
    assert real["protocol"]["hash"] == made["protocol"]["hash"]
    assert real["value"] < made["value"]
    assert made["n"] == made["protocol"]["num_real"] == 24
    assert made["protocol"]["subject"]["seeds"] == [0, 23]
    assert made["protocol"]["subject"]["settings"]["num_steps"] == 2
    assert found["tokenizer", "psnr"]["n"] == 32


def test_probe_keeps_the_whole_curve(run: RunConfig) -> None:
    found = scores(run, "probe")
    kept = json.loads((run.folder / "eval" / "probe.json").read_text())
    assert [(row["family"], row["tap"]) for row in kept["curve"]] == [
        ("pixels", "pixels"),
        ("tokenizer", "tokenizer.patch"),
        ("tokenizer", "tokenizer.encoder.1"),
        ("tokenizer", "tokenizer.pre_quant"),
        ("tokenizer", "tokenizer.post_quant"),
        ("autoregressive", found["autoregressive", "probe_top1"]["tap"]),
        ("autoregressive_random", found["autoregressive_random", "probe_top1"]["tap"]),
        ("diffusion", found["diffusion", "probe_top1"]["tap"]),
    ]
    assert found["pixels", "probe_top1"]["value"] > 0.5
    assert found["tokenizer", "probe_top1"]["protocol"]["num_real"] == 40
    twin = found["autoregressive_random", "probe_top1"]["protocol"]["subject"]
    assert twin["weights"] == "random, seed 0"
    assert twin["generator"] == found["autoregressive", "probe_top1"]["protocol"]["subject"]["generator"]
    scores(run, "reconstruction", dataclasses.replace(EVAL, features=("random",)))
    kept = read_scores(run.folder / "eval" / "metrics.json")
    assert "autoregressive_random" in {entry["subject"] for entry in kept}  # no other model's, so not stale


def test_a_batch_is_encoded_once_for_all_who_look_at_it() -> None:
    class Counting:
        calls = 0

        def codes_and_latents(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            self.calls += 1
            return images.flatten(1)[:, :4].long(), images.float()

    tokenizer = Counting()
    encode, images = encoded_once(tokenizer), torch.arange(24, dtype=torch.uint8).view(2, 3, 2, 2)
    assert torch.equal(encode(images)[0], encode(images.clone())[0])
    assert tokenizer.calls == 1
    assert not torch.equal(encode(images.flip(0))[0], encode(images)[0])
    assert tokenizer.calls == 2


def test_features_behind_an_untrained_null_label_say_so(run: RunConfig, capsys: pytest.CaptureFixture) -> None:
    told = scores(run, "probe", ONE_FAMILY)["autoregressive", "probe_top1"]["protocol"]["subject"]
    assert "null_label" not in told and "null label" not in capsys.readouterr().out
    card, weights = load_model(run.folder / "autoregressive")
    card["config"]["model"]["label_dropout"] = 0.0
    save_model(run.folder / "autoregressive", weights, card)
    told = scores(run, "probe", ONE_FAMILY)["autoregressive", "probe_top1"]["protocol"]["subject"]
    assert told["null_label"] == "never trained"
    assert "autoregressive.model.label_dropout above 0" in capsys.readouterr().out


def test_samples_that_fit_are_used_and_others_are_made_again(run: RunConfig) -> None:
    scores(run, "fid", diffusion=None)
    first = run.folder / "samples" / "autoregressive" / "000000.png"
    stamp = first.stat().st_mtime_ns
    fewer = dataclasses.replace(EVAL, num_samples=20)
    scores(run, "fid", fewer, diffusion=None)
    assert first.stat().st_mtime_ns == stamp
    hotter = dataclasses.replace(FAMILIES["autoregressive"], sample=AutoregressiveSampleConfig(temperature=2.0))
    scores(run, "fid", diffusion=None, autoregressive=hotter)
    assert first.stat().st_mtime_ns != stamp


def test_the_best_candidates_are_scored_under_their_own_name(run: RunConfig, capsys: pytest.CaptureFixture) -> None:
    picks = RejectionConfig(acceptances=(0.5, 0.3), classifier=dataclasses.replace(EVAL.classifier, seed=1))
    config = dataclasses.replace(EVAL, features=("classifier",), rejection=picks)
    found = scores(run, "fid", config, diffusion=None)
    subjects = {subject for subject, _ in found}
    assert subjects == {"real", "autoregressive", "autoregressive@accept0.5", "autoregressive@accept0.3"}
    plain, kept = (found[subject, "class_accuracy"] for subject in ("autoregressive", "autoregressive@accept0.3"))
    assert kept["n"] == plain["n"] == 24
    facts = kept["protocol"]["subject"]
    picker, _ = load_model(run.folder / "eval" / "rejection_classifier")
    assert (facts["acceptance"], facts["candidates"], facts["classifier"]) == (0.3, 80, picker["fingerprint"])
    assert facts["label_counts"] == plain["protocol"]["subject"]["label_counts"]  # as many of each class
    assert kept["protocol"]["hash"] == plain["protocol"]["hash"]
    assert ("autoregressive@accept0.5", "nll") not in found
    assert "autoregressive@accept0.3" in capsys.readouterr().out
    # Another acceptance needs no new candidate, and takes the place of the old ones.
    pool = run.folder / "samples" / "autoregressive-candidates"
    stamp = (pool / "000079.png").stat().st_mtime_ns
    other = dataclasses.replace(picks, acceptances=(0.4,))
    scores(run, "fid", dataclasses.replace(config, rejection=other), diffusion=None)
    assert (pool / "000079.png").stat().st_mtime_ns == stamp
    names = {entry["subject"] for entry in read_scores(run.folder / "eval" / "metrics.json")}
    assert {name for name in names if "@" in name} == {"autoregressive@accept0.4"}
    assert [folder.name for folder in pool.parent.glob("*@*")] == ["autoregressive@accept0.4"]


def test_variants_and_snapshots_are_scored_under_their_own_names(run: RunConfig) -> None:
    folder, last = run.folder / "diffusion", FAMILIES["diffusion"].train.steps
    _, weights = load_model(folder)
    for step, scale in ((100, 0.5), (last, 1.0)):
        network = {name: scale * value for name, value in weights.items()}
        write_snapshot(folder / "snapshots", step, updates=step, model=network, widths={})
    variants = {"cfg2": {"diffusion.sample.guidance": 2.0}, "cold": {"autoregressive.sample.temperature": 0.5}}
    config = dataclasses.replace(EVAL, features=("random",), snapshots=True, variants=variants)
    found = scores(run, "fid", config)
    others = {"diffusion@cfg2", "diffusion@step100", "autoregressive@cold"}
    assert {subject for subject, _ in found} == {"real", *FAMILIES, *others}
    told = {subject: entry["protocol"]["subject"] for (subject, name), entry in found.items() if name == "fd_random"
            and subject != "real"}  # fmt: skip
    assert (told["diffusion"]["settings"]["guidance"], told["diffusion@cfg2"]["settings"]["guidance"]) == (1, 2)
    assert told["diffusion@step100"]["weights"] == "ema 0.999 at step 100"
    models = {subject: each["generator"] for subject, each in told.items()}
    assert models["diffusion@cfg2"] == models["diffusion"] != models["diffusion@step100"]
    assert len({entry["protocol"]["hash"] for (_, name), entry in found.items() if name == "fd_random"}) == 1
    samples, metrics = run.folder / "samples", run.folder / "eval" / "metrics.json"
    assert {each.name for each in samples.glob("*@*")} == others
    scores(run, "reconstruction", config)
    assert others <= {entry["subject"] for entry in read_scores(metrics)}  # they are of models that are still there
    scores(run, "fid", dataclasses.replace(config, snapshots=False, variants={"cfg2": variants["cfg2"]}))
    assert {entry["subject"] for entry in read_scores(metrics)} & others == {"diffusion@cfg2"}
    assert {each.name for each in samples.glob("*@*")} == {"diffusion@cfg2"}


def test_scores_under_a_guide_do_not_outlive_it(run: RunConfig, tmp_path: Path) -> None:
    weak, config = tmp_path / "weak", dataclasses.replace(EVAL, features=("random",))
    card, weights = load_model(run.folder / "diffusion")
    sample = dataclasses.replace(FAMILIES["diffusion"].sample, guide=str(weak), guidance=2.0)
    guided = {"diffusion": dataclasses.replace(FAMILIES["diffusion"], sample=sample), "autoregressive": None}
    path = run.folder / "eval" / "metrics.json"
    for factor in (0.5, 0.25):
        guide = save_model(weak, {name: factor * value for name, value in weights.items()}, card)
        if factor == 0.25:  # another one lies there now
            scores(run, "reconstruction", config, **guided)
            assert "diffusion" not in {entry["subject"] for entry in read_scores(path)}
        assert scores(run, "fid", config, **guided)["diffusion", "fd_random"]["protocol"]["subject"]["guide"] == guide
    scores(run, "reconstruction", config, **guided)
    assert "diffusion" in {entry["subject"] for entry in read_scores(path)}


def test_snapshots_that_were_not_taken_are_not_passed_over(run: RunConfig) -> None:
    config = dataclasses.replace(EVAL, features=("random",), snapshots=True)
    with pytest.raises(ValueError, match=r"eval\.snapshots=true, but .*diffusion was trained without snapshots"):
        scores(run, "fid", config, autoregressive=None)
    scores(run, "reconstruction", config)


def test_a_tokenizer_of_another_run_is_the_one_that_is_scored(run: RunConfig, tmp_path: Path) -> None:
    config = dataclasses.replace(EVAL, features=("random",))
    own = scores(run, config=config)
    shutil.move(run.folder / "tokenizer", tmp_path / "other" / "tokenizer")
    taken = scores(dataclasses.replace(run, tokenizer=str(tmp_path / "other")), config=config)
    assert {key: entry["value"] for key, entry in taken.items()} == {key: entry["value"] for key, entry in own.items()}
    assert taken["tokenizer", "psnr"]["protocol"]["subject"]["weights"] == "raw"  # as its own card tells, not the YAML


def test_models_without_classes_are_not_picked_from(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    picks = RejectionConfig(acceptances=(0.5,), classifier=EVAL.classifier)
    config = dataclasses.replace(EVAL, features=("random",), rejection=picks)
    found = scores(make_run(tmp_path, num_classes=0), "fid", config, diffusion=None)
    assert not any("@" in subject for subject, _ in found)
    assert "rejection sampling of autoregressive left out: it was trained without classes" in capsys.readouterr().out
    assert not (tmp_path / "digits" / "eval" / "rejection_classifier").exists()  # nothing to pick from


def test_the_judge_may_not_pick(run: RunConfig) -> None:
    scores(run, "reconstruction")
    itself = dataclasses.replace(EVAL.classifier, path=str(run.folder / "eval" / "classifier"))
    config = dataclasses.replace(EVAL, rejection=RejectionConfig(acceptances=(0.5,), classifier=itself))
    with pytest.raises(ValueError, match="would be circular"):
        scores(run, "fid", config)


def test_rejection_without_a_fitting_classifier_is_refused_before_training(run: RunConfig, tmp_path: Path) -> None:
    absent = dataclasses.replace(EVAL.classifier, path=str(tmp_path / "absent"))
    config = dataclasses.replace(EVAL, rejection=RejectionConfig(acceptances=(0.5,), classifier=absent))
    with pytest.raises(ValueError, match="absent"):
        check(data=DataConfig(size=16), eval=config, device=setup(run))


def test_same_run_gives_the_same_scores(run: RunConfig) -> None:
    config = dataclasses.replace(EVAL, features=("random",))
    assert scores(run, "reconstruction", config) == scores(run, "reconstruction", config)


def test_a_generator_that_is_not_trained_yet_is_left_out(run: RunConfig, capsys: pytest.CaptureFixture) -> None:
    (run.folder / "diffusion" / "model.json").unlink()
    assert not any(subject == "diffusion" for subject, _ in scores(run, "fid"))
    assert "diffusion left out" in capsys.readouterr().out


def test_refusals(run: RunConfig) -> None:
    with pytest.raises(ValueError, match=r"num_samples=800: .* the train split has 1438; set --eval.num_samples=719"):
        scores(run, "fid", dataclasses.replace(EVAL, num_samples=800, features=("random",)), autoregressive=None)
    with pytest.raises(ValueError, match="FID needs the Inception weights"):
        scores(run, "fid", dataclasses.replace(EVAL, features=("inception",), inception_weights="absent.pth"))
    taps = dataclasses.replace(EVAL.probe, taps=("tokenizer.encoder.9",))
    with pytest.raises(ValueError, match=r"tokenizer\.encoder\.9.*tokenizer\.patch"):
        scores(run, "probe", dataclasses.replace(EVAL, probe=taps))
    with pytest.raises(ValueError, match="only='speed' must be"):
        scores(run, "speed")
    greedy = dataclasses.replace(EVAL, probe=dataclasses.replace(EVAL.probe, knn_k=2000))
    with pytest.raises(ValueError, match=r"eval\.probe\.knn_k=2000 neighbours"):
        scores(run, config=greedy)
    assert not (run.folder / "samples").exists()  # told before anything is drawn


def test_all_training_images_or_a_file_may_be_the_reference(run: RunConfig, tmp_path: Path) -> None:
    config = dataclasses.replace(EVAL, features=("random",))
    whole = scores(run, "fid", dataclasses.replace(config, reference="all"), diffusion=None)
    stated = whole["autoregressive", "fd_random"]["protocol"]
    assert (stated["num_real"], stated["num_generated"], stated["labels"]) == (1438, 24, "balanced")
    assert whole["real", "fd_random"]["protocol"]["hash"] == stated["hash"]
    assert whole["real", "kid"]["protocol"]["reference"] == whole["autoregressive", "kid"]["protocol"]["reference"]
    outside = OutsideConfig(run=dataclasses.replace(run, root=str(tmp_path)), eval=config)
    (run.folder / "config.yaml").write_text("data: {source: digits, size: 16}")
    judge_files(None, run.folder, config=outside, device=setup(run), statistics=tmp_path / "digits.npz")
    filed = scores(run, "fid", dataclasses.replace(config, reference=str(tmp_path / "digits.npz")), diffusion=None)
    assert set(filed) == {("autoregressive", "fd_random"), ("real", "fd_random"), ("autoregressive", "nll")}
    for subject in ("autoregressive", "real"):
        assert filed[subject, "fd_random"]["value"] == pytest.approx(whole[subject, "fd_random"]["value"], rel=1e-9)
        assert filed[subject, "fd_random"]["protocol"]["hash"] == whole[subject, "fd_random"]["protocol"]["hash"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reference": "other.npz"}, r"other\.npz does not say by which features"),
        ({"reference": "absent.npz"}, r"absent\.npz: no such file"),
        ({"reference": "few.npz"}, r"few\.npz has 19 images, .* it takes 20"),
        ({"convention": "torch_fidelity"}, r"eval\.num_samples=24: too few for eval\.convention=torch_fidelity"),
        ({"lpips": "vgg"}, r"eval\.lpips=vgg"),
    ],
)
def test_what_cannot_be_scored_is_refused_before_training_and_before_sampling(
    run: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    np.savez("other.npz", mu=np.zeros(8), sigma=np.eye(8))
    np.savez("few.npz", arr_0=np.zeros((19, 16, 16, 3), np.uint8))
    config = dataclasses.replace(EVAL, features=("random",), **changes)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        check(data=DataConfig(size=16), eval=config, device=setup(run))
    with pytest.raises(ValueError, match=message):
        scores(run, None, config)
    assert not (run.folder / "samples").exists()


def test_statistics_may_be_of_a_classifier_that_is_not_trained_yet(run: RunConfig, tmp_path: Path) -> None:
    stated = {"mu": np.zeros(64), "sigma": np.eye(64), "n": 99, "features": np.array('{"name": "classifier"}')}
    np.savez(tmp_path / "stated.npz", **stated, pixels=np.array("0"))
    config = dataclasses.replace(EVAL, reference=str(tmp_path / "stated.npz"))
    check(data=DataConfig(size=16), eval=config, device=setup(run))


def test_the_sheet_of_nearest_training_images_is_left_with_the_scores(run: RunConfig) -> None:
    found = scores(run, "fid", dataclasses.replace(EVAL, features=("random",), neighbours=3), diffusion=None)
    copies = found["autoregressive", "copies"]
    assert copies["protocol"]["num_real"] == 1438 and copies["protocol"]["settings"]["held_out"] == 359
    told = json.loads((run.folder / "eval" / "neighbours-autoregressive.json").read_text())
    assert len(told["samples"]) == 3 and (run.folder / "eval" / "neighbours-autoregressive.png").is_file()


def test_a_second_look_computes_no_features(run: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config = dataclasses.replace(EVAL, features=("random",))
    before = scores(run, config=config)

    def never(*_: object) -> None:
        raise AssertionError("features were computed again")

    monkeypatch.setattr(RandomFeatures, "outputs", never)
    assert scores(run, "fid", config).items() <= before.items()


def test_a_generator_of_another_tokenizer_is_not_probed(run: RunConfig) -> None:
    torch.manual_seed(1)
    tokenizer = Tokenizer(MODEL, image_size=16)
    save_model(run.folder / "tokenizer", tokenizer.state_dict(), model_card(tokenizer))
    with pytest.raises(ValueError, match="learned from codes"):
        scores(run, "probe")
