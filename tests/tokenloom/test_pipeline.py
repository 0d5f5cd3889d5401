"""The whole street on real images, once, in seconds; then what holds of the run that it leaves."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

import tokenloom
from engine.checkpoint import load_model, save_model
from engine.device import setup
from tokenloom.cli import main
from tokenloom.experiment import load_experiment
from tokenloom.export import export
from tokenloom.pipeline import check

SMOKE = str(Path(__file__).parents[2] / "configs" / "smoke.yaml")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    main(["run", "--config", SMOKE, f"--run.root={root}", "--run.device=cpu", "--run.precision=fp32"])
    return root / "smoke"


def command(run: Path, name: str, *words: str) -> None:
    main([name, "--config", str(run / "config.yaml"), *words])


def test_every_stage_leaves_its_files(run: Path) -> None:
    for name in (
        "config.yaml", "stages.json", "tokenizer/model.json", "codes/train/meta.json", "codes/test/meta.json",
        "autoregressive/model.json", "diffusion/model.json", "samples/autoregressive/samples.json",
        "samples/diffusion/000039.png", "eval/metrics.json", "eval/probe.json", "report.html",
    ):  # fmt: skip
        assert (run / name).is_file(), name


def test_scores_are_records_with_a_protocol(run: Path) -> None:
    records = json.loads((run / "eval" / "metrics.json").read_text())
    assert {"real", "tokenizer", "autoregressive", "diffusion"} <= {entry["subject"] for entry in records}
    assert all({"name", "subject", "value", "interval", "n", "protocol"} <= entry.keys() for entry in records)
    names = {(entry["subject"], entry["name"]) for entry in records}
    for subject in ("real", "autoregressive", "diffusion"):
        assert (subject, "fd_classifier") in names
    assert not any(name in ("fid", "is", "rfid") for _, name in names)  # Inception alone may bear these names


def test_a_second_run_finds_nothing_to_do(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = ("tokenizer/model.json", "codes/train/meta.json", "diffusion/model.json", "samples/diffusion/samples.json")
    command(run, "run")  # another test may have scored a part alone
    before = [(run / name).stat().st_mtime_ns for name in files]
    capsys.readouterr()
    command(run, "run")
    told = capsys.readouterr().out
    for stage in ("tokenizer", "encode", "autoregressive", "diffusion", "samples of diffusion", "eval"):
        assert f"{stage}: done before" in told
    assert [(run / name).stat().st_mtime_ns for name in files] == before


def test_a_changed_tokenizer_is_refused_and_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        command(run, "tokenizer", "--tokenizer.train.learning_rate=0.5")
    assert error.value.code == 2
    assert "tokenizer.train.learning_rate: 0.002 -> 0.5" in capsys.readouterr().err


def test_a_generator_that_encodes_its_images_needs_no_encoded_training_split(run: Path, tmp_path: Path) -> None:
    """The codes that it trains on come from the images; those of the test split still judge it."""
    shutil.copytree(run / "tokenizer", tmp_path / "fly" / "tokenizer")
    words = ("--autoregressive.codes=on_the_fly", "--diffusion=null", "--run.name=fly", f"--run.root={tmp_path}")
    for name in ("encode", "generator"):
        command(run, name, *words)
    command(run, "sample", *words, "--num", "2", "--out", str(tmp_path / "out"))
    assert [path.name for path in (tmp_path / "fly" / "codes").iterdir()] == ["test"]
    told = json.loads((tmp_path / "fly" / "autoregressive" / "model.json").read_text())
    assert told["codes"] == "on_the_fly" and told["identity"]["codes"]["images"]["split"] == "train"
    assert len(list((tmp_path / "out" / "autoregressive").glob("0*.png"))) == 2


def test_bf16_sampling_is_refused_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.device.has_bf16", lambda _: False)
    words = ["--config", SMOKE, "--run.device=cpu", "--run.precision=fp32", f"--run.root={tmp_path}"]
    experiment = load_experiment([*words, "--autoregressive.sample.precision=bf16"])
    with pytest.raises(ValueError, match=r"autoregressive\.sample\.precision=bf16, but this cpu has no bf16"):
        check(experiment, setup(experiment.run))


def test_samples_from_the_command_line(run: Path, tmp_path: Path) -> None:
    words = ("--only", "autoregressive", "--num", "3", "--label", "7", "--seed", "5")
    command(run, "sample", *words, "--out", str(tmp_path / "out"))
    told = json.loads((tmp_path / "out" / "autoregressive" / "samples.json").read_text())
    assert told["labels"] == [7, 7, 7]
    assert len(list((tmp_path / "out" / "autoregressive").glob("0*.png"))) == 3


@pytest.mark.parametrize("family", ["autoregressive", "diffusion"])
def test_the_python_interface_draws_what_a_seed_says(run: Path, family: str) -> None:
    images = tokenloom.sample(run, family, labels=[3, 7, 3], seeds=[0, 1, 2])
    assert images.shape == (3, 3, 16, 16) and images.dtype == torch.uint8
    again = tokenloom.sample(run, family, labels=[7], seeds=[1])
    assert (images[1].int() - again[0].int()).abs().max() <= 1
    with pytest.raises(ValueError, match="labels has 1 entries, seeds 2: give one for each seed"):
        tokenloom.sample(run, family, labels=[3], seeds=[0, 1])


def test_the_python_interface_reconstructs_and_loads(run: Path) -> None:
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    tokenizer = tokenloom.load_tokenizer(run)
    assert torch.equal(tokenloom.reconstruct(run, images), tokenizer.decode(tokenizer.encode(images)))
    assert tokenloom.load_generator(run, "diffusion").tokenizer_fingerprint == tokenizer.code_fingerprint
    with pytest.raises(AttributeError, match="load_tokenizer"):
        tokenloom.load_tokeniser  # noqa: B018


def test_scoring_from_python_gives_the_same_numbers(run: Path) -> None:
    before = {(r["subject"], r["name"]): r["value"] for r in json.loads((run / "eval" / "metrics.json").read_text())}
    for entry in tokenloom.score(run, only="reconstruction"):
        assert entry["value"] == pytest.approx(before[entry["subject"], entry["name"]])


def test_scores_of_a_part_or_of_older_models_do_not_pass_for_the_whole(run: Path, tmp_path: Path) -> None:
    """After a partial evaluation the next run scores again; records of models that are gone are dropped."""
    copy = tmp_path / "smoke"
    shutil.copytree(run, copy)
    place = ("--run.root", str(tmp_path))
    metrics = copy / "eval" / "metrics.json"
    records = json.loads(metrics.read_text())
    for entry in records:
        if entry["subject"] == "diffusion":
            entry["protocol"]["subject"]["generator"] = "gone"
    metrics.write_text(json.dumps(records))
    command(copy, "eval", "--only", "reconstruction", *place)
    assert "diffusion" not in {entry["subject"] for entry in json.loads(metrics.read_text())}
    assert not (copy / "eval" / "scored.json").exists()
    command(copy, "run", *place)
    assert "diffusion" in {entry["subject"] for entry in json.loads(metrics.read_text())}


def test_a_new_decoder_paints_the_samples_of_the_old_codes(run: Path, tmp_path: Path) -> None:
    place, source = [f"--run.root={tmp_path}", "--run.name=repainted"], f"--tokenizer.encoder_from={run}"
    command(run, "tokenizer", *place, source, "--tokenizer.train.steps=10")
    old, new = tokenloom.load_tokenizer(run), tokenloom.load_tokenizer(tmp_path / "repainted")
    assert new.code_fingerprint == old.code_fingerprint and new.fingerprint != old.fingerprint
    words = ["--num", "4", "--only", "autoregressive", "--out", str(tmp_path / "samples")]
    command(run, "sample", *words, "--decoder", str(tmp_path / "repainted"))
    told = json.loads((tmp_path / "samples" / "autoregressive" / "samples.json").read_text())
    assert told["tokenizer"] == new.fingerprint
    painted = tmp_path / "samples" / "autoregressive" / "000000.png"
    assert painted.read_bytes() != (run / "samples" / "autoregressive" / "000000.png").read_bytes()


@pytest.fixture(scope="module")
def taken(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that takes tokenizer and codes from the other one."""
    root = tmp_path_factory.mktemp("taken")
    words = (f"--run.root={root}", f"--run.tokenizer={run}", "--autoregressive=null")
    command(run, "run", *words, "--eval.features=[random]", "--eval.variants={cfg2: {diffusion.sample.guidance: 2}}")
    return root / "smoke"


def test_a_tokenizer_of_another_run_makes_the_same_generator(run: Path, taken: Path) -> None:
    assert not (taken / "tokenizer").exists() and not (taken / "codes").exists()
    cards = [json.loads((folder / "diffusion" / "model.json").read_text()) for folder in (run, taken)]
    assert cards[0]["fingerprint"] == cards[1]["fingerprint"]
    images = [tokenloom.sample(folder, "diffusion", labels=[3, 7], seeds=[0, 1]) for folder in (run, taken)]
    assert torch.equal(*images)
    subjects = {entry["subject"] for entry in json.loads((taken / "eval" / "metrics.json").read_text())}
    assert {"tokenizer", "diffusion", "diffusion@cfg2"} <= subjects


def test_a_second_run_with_anothers_tokenizer_finds_nothing_to_do(
    taken: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command(taken, "run")
    told = capsys.readouterr().out
    assert "tokenizer, encode: those of" in told and "eval: done before" in told


def test_pages_and_exports_of_a_run_show_the_tokenizer_that_it_takes(run: Path, taken: Path, tmp_path: Path) -> None:
    page = (taken / "report.html").read_text()
    assert json.loads((run / "tokenizer" / "model.json").read_text())["fingerprint"] in page
    assert "Latent diffusion, cfg2" in page and "Reconstructions" in page
    out = tmp_path / "models"
    command(taken, "export", "--out", str(out))
    first, second = (tokenloom.sample(path, "diffusion", labels=[1], seeds=[0]) for path in (taken, out))
    assert torch.equal(first, second)


@pytest.mark.parametrize("name", ["tokenizer", "encode"])
def test_a_run_with_anothers_tokenizer_makes_none(
    run: Path, taken: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        command(taken, name)
    told = capsys.readouterr().err
    assert f"`tokenloom {name}` has nothing to do here; give it --config {run / 'config.yaml'}" in told


def test_a_run_without_tokenizer_or_codes_lends_none(
    run: Path, taken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = [f"--run.root={tmp_path}", f"--run.tokenizer={tmp_path / 'other'}"]
    with pytest.raises(SystemExit):
        command(taken, "run", *place)
    assert "holds no finished tokenizer; give the folder of a run" in capsys.readouterr().err
    shutil.copytree(run / "tokenizer", tmp_path / "other" / "tokenizer")
    shutil.copytree(run / "codes" / "test", tmp_path / "other" / "codes" / "test")
    for name in ("run", "generator"):
        with pytest.raises(SystemExit):
            command(taken, name, *place)
        told = capsys.readouterr().err
        assert "train: no complete codes" in told
        assert f"`tokenloom encode --config {tmp_path / 'other' / 'config.yaml'}` makes them" in told


def test_codes_of_other_images_are_refused(
    run: Path, taken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("tokenizer", "codes"):
        shutil.copytree(run / name, tmp_path / "other" / name)
    path = tmp_path / "other" / "codes" / "train" / "meta.json"
    told = json.loads(path.read_text())
    path.write_text(json.dumps(told | {"images": told["images"] | {"source": "folder"}}))
    for name in ("run", "generator"):
        with pytest.raises(SystemExit):
            command(taken, name, f"--run.root={tmp_path}", f"--run.tokenizer={tmp_path / 'other'}")
        told = capsys.readouterr().err
        assert "other train images than this run's section data names (source 'folder' -> 'digits')" in told
    assert not (tmp_path / "smoke" / "diffusion").exists()


def test_a_run_has_one_tokenizer(run: Path, taken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where it has its own, another one would be mistaken for it."""
    shutil.copytree(run / "tokenizer", tmp_path / "smoke" / "tokenizer")
    with pytest.raises(SystemExit):
        command(taken, "generator", f"--run.root={tmp_path}")
    assert f"{tmp_path / 'smoke'} has a tokenizer of its own" in capsys.readouterr().err


def test_another_guide_makes_other_scores(taken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(taken, tmp_path / "smoke")
    (card, weights), weak = load_model(taken / "diffusion"), tmp_path / "weak"
    words = (f"--run.root={tmp_path}", f"--diffusion.sample.guide={weak}", "--eval.variants={}")
    words += ("--eval.probe.taps=[pixels]", "--eval.num_samples=20")
    for factor in (0.5, 0.25):
        save_model(weak, {name: factor * value for name, value in weights.items()}, card)
        command(taken, "run", *words)
        assert "eval: done before" not in capsys.readouterr().out
    command(taken, "run", *words)
    assert "eval: done before" in capsys.readouterr().out


def test_a_dry_run_does_not_count_the_tokenizer_of_another_run(taken: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command(taken, "run", "--dry-run")
    told = capsys.readouterr().out
    assert "they are not trained here" in told and "samples/diffusion@cfg2/" in told
    head = next(line for line in told.splitlines() if line.strip().startswith("diffusion"))
    assert head.split() == ["diffusion"]


def test_a_mistake_in_a_variant_is_told_before_training(tmp_path: Path) -> None:
    words = ["--config", SMOKE, "--run.device=cpu", f"--run.root={tmp_path}"]
    experiment = load_experiment([*words, "--eval.variants={a: {diffusion.sample.guidanc: 2}}"])
    with pytest.raises(ValueError, match=r"eval\.variants\.a: did you mean 'diffusion\.sample\.guidance'"):
        check(experiment, setup(experiment.run))


def test_an_exported_folder_samples_the_same_images(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "models"
    command(run, "export", "--out", str(out))
    first, second = (tokenloom.sample(path, "autoregressive", labels=[1, 2], seeds=[0, 1]) for path in (run, out))
    assert torch.equal(first, second)
    assert not list(out.rglob("checkpoints"))


def test_an_export_holds_the_weights_that_are_sampled(run: Path, tmp_path: Path) -> None:
    """An average that is made of snapshots, which stay behind."""
    words = ("--diffusion.train.snapshot_every=10", "--diffusion.train.ema_widths=[0.05,0.1]", "--autoregressive=null")
    place = (f"--run.root={tmp_path}", f"--run.tokenizer={run}")
    command(run, "generator", *place, *words, "--diffusion.sample.ema_width=0.08")
    made, out = tmp_path / "smoke", tmp_path / "models"
    main(["export", "--config", str(made / "config.yaml"), "--out", str(out)])
    assert {path.name for path in (out / "diffusion").iterdir()} == {"model.json", "model.safetensors"}
    first, second = (tokenloom.sample(path, "diffusion", labels=[1, 2], seeds=[0, 1]) for path in (made, out))
    assert torch.equal(first, second)
    chosen, plain = (tokenloom.load_generator(made, "diffusion", ema_width=width) for width in (0.08, None))
    assert tokenloom.load_generator(out, "diffusion").fingerprint == chosen.fingerprint != plain.fingerprint
    text = (out / "README.md").read_text()
    assert chosen.fingerprint in text and 'tokenloom.sample("this-folder", "diffusion", labels=[0, 1, 2]' in text
    command(made, "generator", "--diffusion.sample.guide=step-10")
    with pytest.raises(ValueError, match="guide=step-10 is a snapshot, which an export leaves behind"):
        export(made, tmp_path / "more")


def test_scores_of_another_protocol_are_not_set_side_by_side(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = run / "eval" / "metrics.json"
    main(["compare", str(mine), str(mine)])
    assert "fd_classifier" in capsys.readouterr().out
    changed = json.loads(mine.read_text())
    for entry in changed:
        entry["protocol"]["num_real"] = 7
    (tmp_path / "other.json").write_text(json.dumps(changed))
    with pytest.raises(SystemExit):
        main(["compare", str(mine), str(tmp_path / "other.json")])
    assert "num_real" in capsys.readouterr().err


def test_the_readmes_python_runs_as_it_stands(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parents[2] / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.S)
    names: dict = {}
    exec(code.replace("runs/digits", str(run)), names)
    assert names["images"].shape == (3, 3, 16, 16) and names["again"].shape == names["images"].shape
    assert names["records"]
