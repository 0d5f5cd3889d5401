"""What generators are told about images must be there before anything is trained."""

import sys
from pathlib import Path

import pytest

from engine.device import setup
from engine.sources import open_images
from tokenizer.encode import encode_images
from tokenloom.experiment import Experiment, load_experiment
from tokenloom.pipeline import check_conditions, check_tokenizer

sys.path.insert(0, str(Path(__file__).parents[1] / "eval"))
sys.path.insert(0, str(Path(__file__).parents[1] / "engine"))
from pictures import make_folder
from untrained import make_run, write_yaml

SMOKE = str(Path(__file__).parents[2] / "configs" / "smoke.yaml")


def experiment(*words: str, config: str = SMOKE) -> Experiment:
    return load_experiment(["--config", config, *words])


def checked(*words: str) -> None:
    chosen = experiment(*words)
    check_conditions(chosen, open_images(chosen.data, "train"))


def test_smaller_images_are_asked_of_the_run_that_encodes() -> None:
    image = "--diffusion.condition.kind=image"
    with pytest.raises(ValueError, match=r"diffusion\.condition\.kind=image needs .*: set tokenizer\.low_resolution"):
        checked(image)
    checked(image, "--tokenizer.low_resolution=4")
    with pytest.raises(ValueError, match=r"tokenizer\.low_resolution=5 must divide data\.size="):
        checked("--tokenizer.low_resolution=5")


def test_each_smaller_image_is_restored_once() -> None:
    words = ("--diffusion.condition.kind=image", "--tokenizer.low_resolution=4")
    with pytest.raises(ValueError, match=r"eval\.num_samples=400: .* the test split has 359"):
        checked(*words, "--eval.num_samples=400")
    checked("--eval.num_samples=400")


def test_captions_of_the_data_must_be_there(tmp_path: Path) -> None:
    words = ["--autoregressive.condition.kind=text", "--autoregressive.condition.text.captions=data"]
    with pytest.raises(
        ValueError, match=r"autoregressive\.condition\.text\.captions=data, .* set data\.caption_column"
    ):
        checked(*words)
    make_folder(tmp_path, {".": list(range(10))})
    for level in range(10):
        (tmp_path / f"{level:03d}.txt").write_text(f"level {level}")
    folder = [f"--data.path={tmp_path}", "--data.source=folder", "--data.caption_column=txt", "--eval.num_samples=20"]
    checked(*words, *folder)


def test_class_names_must_fit_into_all_templates(tmp_path: Path) -> None:
    texts = ["--diffusion.condition.kind=text", "--diffusion.condition.text.length=8"]
    with pytest.raises(ValueError, match=r"'picture of 0' has 12 tokens, .* leaves room for 7"):
        checked(
            *texts,
            "--diffusion.condition.text.templates=['{}']",
            "--diffusion.condition.text.held_out=['picture of {}']",
        )
    checked(*texts, "--diffusion.condition.text.templates=['{}']", "--diffusion.condition.text.held_out=['see {}']")
    make_folder(tmp_path, {".": list(range(10))})
    with pytest.raises(
        ValueError, match=r"captions=templates puts class names into templates, but .* knows no classes"
    ):
        checked(*texts[:1], "--data.source=folder", f"--data.path={tmp_path}", "--eval.num_samples=20")


def test_another_runs_codes_must_have_the_captions(tmp_path: Path) -> None:
    run, images = make_run(tmp_path), tmp_path / "images"
    make_folder(images, {".": list(range(40))})
    for level in range(40):
        (images / f"{level:03d}.txt").write_text(f"level {level}")
        (images / f"{level:03d}.tags").write_text(f"shade {level}")
    config = str(write_yaml(tmp_path / "digits.yaml"))
    folder = [f"--data.path={images}", "--data.source=folder"]
    words = [f"--run.root={tmp_path}", "--run.name=borrower", f"--run.tokenizer={run.folder}", *folder]
    texts = ["--diffusion.condition.kind=text", "--diffusion.condition.text.captions=data"]

    def borrow(*more: str) -> None:
        check_tokenizer(experiment(*words, *more, config=config))

    def encode(*more: str) -> None:
        lender = experiment(*folder, *more, config=config)
        encode_images(run=run, data=lender.data, tokenizer=lender.tokenizer, device=setup(run))

    encode()
    borrow("--data.caption_column=txt")
    with pytest.raises(ValueError, match=r"has other captions .* or none: .*--data\.caption_column=\.\.\."):
        borrow("--data.caption_column=txt", *texts)
    encode("--data.caption_column=tags")
    with pytest.raises(ValueError, match=r"has other captions"):
        borrow("--data.caption_column=txt", *texts)
    encode("--data.caption_column=txt")
    borrow("--data.caption_column=txt", *texts)


def test_another_runs_codes_must_have_smaller_images(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    config = str(write_yaml(tmp_path / "digits.yaml"))
    words = [f"--run.root={tmp_path}", "--run.name=borrower", f"--run.tokenizer={run.folder}", "--autoregressive=null"]
    borrower, restorer = (
        experiment(*words, *more, config=config) for more in ([], ["--diffusion.condition.kind=image"])
    )

    def encode(*more: str) -> None:
        lender = experiment(*more, config=config)
        encode_images(run=run, data=lender.data, tokenizer=lender.tokenizer, device=setup(run))

    encode()
    check_tokenizer(borrower)
    with pytest.raises(ValueError, match=r"has no smaller images.*encode .*--tokenizer\.low_resolution=4"):
        check_tokenizer(restorer)
    encode("--tokenizer.low_resolution=4")
    check_tokenizer(borrower)
    check_tokenizer(restorer)
