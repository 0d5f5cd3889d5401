"""The command line: one command, a few verbs, any field of the YAML as an option. Heavy imports wait until needed."""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.device import Device
    from eval.rejection import Picker
    from tokenloom.experiment import Experiment

USAGE = """\
usage: tokenloom COMMAND --config FILE [--section.key=value ...]

  run        every stage of a YAML, then the report       tokenloom run --config configs/digits.yaml
  tokenizer  train stage 1
  encode     images to codes and latents on disk
  generator  train stage 2                                [--only autoregressive|diffusion]
  steps      where a solver best stops, optimised for a trained diffusion model
  sample     pictures from a trained generator            [--only FAMILY] [--num 64] [--label 3] [--seed 0] [--out DIR]
                                                          [--prompt "a photo of a frog"] [--image FILE|DIR]
                                                          [--acceptance 0.25] [--stream] [--npz FILE]
  eval       scores of a run                              [--only fid|reconstruction|probe]
             scores of any images                         tokenloom eval --generated A --reference B [--size 256]
  report     one page with curves, samples and scores
  export     the finished models alone, to share          --out DIR
  study      rows of equal cost over seeds, compared      [--only ROW,ROW] [--seeds 0,1] [--report-only]
  speed      images/s, FLOP/s and memory of each stage
  compare    scores of several models side by side        tokenloom compare runs/a runs/b [--only fid,kid] [--force]
  doctor     versions, device, disk, extras, weights

The same command resumes what was interrupted. `tokenloom COMMAND --help` lists every key,
--print_config prints the whole configuration, --dry-run tells sizes and costs without computing.
Several processes: torchrun --nproc_per_node 2 -m tokenloom COMMAND ...
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command; a user's mistake ends with one clear line and exit code 2."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("--help", "-h", "help"):
        print(USAGE, end="")
        return
    # Threads wait for each other a few microseconds at full speed, then sleep: they must not slow other processes.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    warnings.showwarning = _show_warning  # type: ignore[assignment]
    command, rest = words[0], words[1:]
    if command not in COMMANDS:
        _fail(f"unknown command {command!r}: `tokenloom --help` lists the commands")
    try:
        COMMANDS[command](rest)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader has left, as `head` does
    except (ValueError, RuntimeError, OSError) as error:
        if os.environ.get("TOKENLOOM_TRACEBACK"):
            raise
        _fail(f"{error}" if isinstance(error, ValueError) else f"{error} (TOKENLOOM_TRACEBACK=1 shows where)")
    except KeyboardInterrupt:
        _fail("interrupted", code=130)


def _show_warning(message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: object) -> None:
    """Our own warnings speak to the user and need no line of code; others keep theirs."""
    ours = Path(filename).parent.parent == Path(__file__).parent.parent and issubclass(category, UserWarning)
    where = "" if ours else f"{filename}:{lineno}: {category.__name__}: "
    print(f"tokenloom: warning: {where}{message}", file=sys.stderr)


def _fail(message: str, *, code: int = 2) -> None:
    print(f"tokenloom: {message}", file=sys.stderr)
    raise SystemExit(code)


class _Options:
    """A command's own options, split off before the rest is read as the configuration."""

    def __init__(self, command: str) -> None:
        self.command = command
        self.parser = argparse.ArgumentParser(prog=f"tokenloom {command}", add_help=False, allow_abbrev=False)
        self.parser.add_argument("--dry-run", action="store_true", help="tell sizes and costs, compute nothing")

    def add(self, *names: str, **how: object) -> None:
        self.parser.add_argument(*names, **how)  # type: ignore[arg-type]

    def read(self, words: Sequence[str]) -> tuple[argparse.Namespace, Experiment]:
        from tokenloom.experiment import load_experiment

        try:
            own, rest = self.parser.parse_known_args(list(words))
        except SystemExit as error:
            raise SystemExit(2) from error
        if {"--help", "-h"} & set(words):
            self.parser.print_help()
            print()
        return own, load_experiment(rest, program=f"tokenloom {self.command}")


def _staged(command: str, stage: Callable[[Experiment, Device, argparse.Namespace], None], **options: dict) -> Callable:
    """A command that reads an experiment, answers --dry-run, sets up the device and runs one stage."""

    def execute(words: Sequence[str]) -> None:
        reader = _Options(command)
        for name, how in options.items():
            names = [f"--{name}", "--count"] if name == "num" else [f"--{name}"]  # torchrun takes --num for its own
            reader.add(*names, **how)
        own, experiment = reader.read(words)
        if own.dry_run:
            from tokenloom.dry_run import dry_run

            told = dry_run(experiment)
            if os.environ.get("RANK", "0") == "0":
                print(told)
            return
        from engine.device import setup

        stage(experiment, setup(experiment.run), own)

    return execute


def _run(experiment: Experiment, device: Device, _: argparse.Namespace) -> None:
    from tokenloom.pipeline import run_all

    run_all(experiment, device)


def _tokenizer(experiment: Experiment, device: Device, _: argparse.Namespace) -> None:
    from tokenloom import pipeline

    pipeline.train_tokenizer(experiment, device)


def _encode(experiment: Experiment, device: Device, _: argparse.Namespace) -> None:
    from tokenloom import pipeline

    pipeline.encode(experiment, device)


def _generator(experiment: Experiment, device: Device, own: argparse.Namespace) -> None:
    from tokenloom import pipeline

    for family, _ in experiment.generators(own.only):
        pipeline.train_generator(experiment, device, family)


def _steps(experiment: Experiment, device: Device, _: argparse.Namespace) -> None:
    from tokenloom import pipeline

    path = pipeline.align(experiment, device)
    if device.is_main:
        print(f"steps: {path}, drawn in {path.with_suffix('.png')}; --diffusion.sample.steps=aligned samples in them")


def _sample(experiment: Experiment, device: Device, own: argparse.Namespace) -> None:
    sections = list(experiment.generators(own.only))
    if own.stream and any(family != "autoregressive" for family, _ in sections):
        raise ValueError("--stream shows samples that grow code by code: add --only autoregressive")
    if own.npz and Path(own.npz).suffix != ".npz":
        raise ValueError(f"--npz {own.npz}: the file must end in .npz; rename it")
    if own.acceptance is not None and (own.prompt or own.image):
        raise ValueError("--acceptance keeps what a classifier takes for the asked class: ask with --label alone")
    images = [path for given in own.image for path in _image_files(Path(given))]
    picker = _picker(experiment, device, own) if own.acceptance is not None else None
    for family, config in sections:
        out = _sample_folder(experiment, family, own)
        how: dict[str, Any] = {"run": experiment.run, "config": config, "family": family, "device": device}
        how |= {"num": own.num, "label": own.label, "seed": own.seed, "out": out, "decoder": own.decoder}
        how |= {"prompts": own.prompt, "images": images}
        how["partial"] = out.with_name(f"{out.name}-partial.png") if own.stream else None
        _draw(how, own.acceptance, picker)
        if device.is_main:
            best = "" if picker is None else f", the best {own.acceptance:g} of all candidates,"
            print(f"{own.num} samples of {family}{best} in {out}; look at {out / 'grid.png'}")
            if own.npz:
                _save_npz(out, Path(own.npz), family if len(sections) > 1 else "")


def _image_files(path: Path) -> list[Path]:
    """A picture, or those of a folder by name.

    Raises:
        ValueError: there is none.
    """
    from engine.splits import IMAGE_SUFFIXES

    inside = sorted(path.iterdir()) if path.is_dir() else []
    found = [each for each in inside if each.suffix.lower() in IMAGE_SUFFIXES] or [path]
    if not found[0].is_file():
        raise ValueError(f"--image {path}: no picture there; give a file, or a folder of such")
    return found


def _save_npz(samples: Path, path: Path, family: str) -> None:
    """Samples as one array; with several families each has a file, with the family behind its name."""
    from eval.array_files import save_adm
    from eval.image_files import open_pictures

    file = path.with_name(f"{path.stem}-{family}.npz") if family else path
    pictures = open_pictures(samples)
    save_adm(file, pictures)
    print(f"{pictures.count} samples as one array: {file}")


def _draw(how: dict[str, Any], acceptance: float, picker: Picker | None) -> None:
    """Samples, or the best of the candidates, which are then removed."""
    from eval.rejection import sample_accepted
    from generator.sample import sample

    if picker is None:
        sample(**how)
        return
    pool = how["out"].with_name(f".candidates-{how['out'].name}")
    sample_accepted(**how, picker=picker, acceptance=acceptance, pool=pool)
    if how["device"].is_main:
        shutil.rmtree(pool, ignore_errors=True)


def _picker(experiment: Experiment, device: Device, own: argparse.Namespace) -> Picker:
    """The classifier that picks samples, trained first if the run has none; what can be refused is refused before."""
    from engine.sources import open_images
    from eval.classifier import check_classes
    from eval.config import check_acceptance
    from eval.rejection import check_conditional, open_picker
    from generator.sample import load_generator

    check_acceptance("--acceptance", own.acceptance)
    for family, _ in experiment.generators(own.only):
        check_conditional(load_generator(experiment.run.folder, family))
    train_set, test_set = (open_images(experiment.data, split) for split in ("train", "test"))
    check_classes(train_set, asked="--acceptance keeps what a classifier picks", remedy="leave it out")
    classifier = experiment.eval.rejection.classifier
    return open_picker(classifier, train_set=train_set, test_set=test_set, run=experiment.run, device=device)


def _sample_folder(experiment: Experiment, family: str, own: argparse.Namespace) -> Path:
    if own.out:
        return Path(own.out) / family
    name = f"{family}-seed{own.seed}-num{own.num}" + ("" if own.label is None else f"-label{own.label}")
    name += f"-by-{Path(own.decoder).name}" if own.decoder else ""
    name += "" if own.acceptance is None else f"-accept{own.acceptance:g}"
    for option, words in (("prompt", own.prompt), ("image", own.image)):
        name += f"-{option}-{hashlib.sha256(repr(words).encode()).hexdigest()[:8]}" if words else ""
    return experiment.run.folder / "samples" / name


def _eval(experiment: Experiment, device: Device, own: argparse.Namespace) -> None:
    from tokenloom import pipeline

    pipeline.evaluate(experiment, device, only=own.only)


def _eval_either(words: Sequence[str]) -> None:
    """Scores of the run of a configuration, or of any images."""
    outside = {"--generated", "--reference"} & {word.partition("=")[0] for word in words}
    if not outside and {"--help", "-h"} & set(words):
        print("Scores of any images:\n")
        _outside_parser().print_help()
        print("\nScores of a run:\n")
    (_eval_outside if outside else EVAL)(words)


def _outside_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tokenloom eval", add_help=False, allow_abbrev=False)
    parser.add_argument("--generated", help="run, folder or zip of images, .npz or .npy array, or parquet file")
    parser.add_argument("--reference", help="the same of real images, or an .npz with mu and sigma")
    parser.add_argument(
        "--size", type=int, help="crop all images to so many pixels; without it they must have one size"
    )
    parser.add_argument("--num", "--count", type=int, default=0, help="score so many, drawn at random (default: all)")
    parser.add_argument("--out", help="the .json of the scores (default: <name>-scores.json in the working folder)")
    parser.add_argument("--statistics", help="also write mean and covariance of the reference to this .npz")
    return parser


def _eval_outside(words: Sequence[str]) -> None:
    parser = _outside_parser()
    own, rest = parser.parse_known_args(list(words))
    asks_help = {"--help", "-h"} & set(words)
    if asks_help:
        parser.print_help()
        print()
    elif own.reference is None or (own.generated is None and own.statistics is None):
        raise ValueError(
            "give --generated A --reference B to score images, or --reference B --statistics FILE.npz to measure real"
            " ones"
        )
    from engine.config import load
    from engine.device import setup
    from eval.outside import OutsideConfig, judge_files
    from eval.outside_inputs import subject_of

    config = load(OutsideConfig, rest, program="tokenloom eval")
    out = None if own.generated is None else Path(own.out or f"{subject_of(Path(own.generated))}-scores.json")
    statistics = Path(own.statistics) if own.statistics else None
    judge_files(
        own.generated, own.reference, config=config, device=setup(config.run), size=own.size, num=own.num, out=out,
        statistics=statistics,
    )  # fmt: skip
    if out is not None and os.environ.get("RANK", "0") == "0":
        print(f"scores: {out}; set them beside others with tokenloom compare")


def _report(experiment: Experiment, device: Device, _: argparse.Namespace) -> None:
    from tokenloom.report import write_report

    if device.is_main:
        print(f"report: {write_report(experiment.run.folder)}")


def _export(experiment: Experiment, device: Device, own: argparse.Namespace) -> None:
    from tokenloom.export import export

    if device.is_main:
        print(f"exported to {export(experiment.run.folder, Path(own.out))}")


def _speed(experiment: Experiment, device: Device, _: argparse.Namespace) -> None:
    from eval.speed import speed

    speed(
        run=experiment.run, data=experiment.data, tokenizer=experiment.tokenizer,
        autoregressive=experiment.autoregressive, diffusion=experiment.diffusion, device=device,
    )  # fmt: skip


def _study(words: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="tokenloom study", add_help=False, allow_abbrev=False)
    parser.add_argument(
        "--only", default="", help="these rows alone, separated by commas, and those whose networks they take"
    )
    parser.add_argument("--seeds", default="", help="these seeds alone, separated by commas")
    parser.add_argument("--dry-run", action="store_true", help="tell rows, steps, FLOPs and time, train nothing")
    parser.add_argument("--report-only", action="store_true", help="write the results of what is there, train nothing")
    own, rest = parser.parse_known_args(list(words))
    if {"--help", "-h"} & set(words):
        parser.print_help()
        print("\nBeside its section `study` the file has those of `tokenloom run`, whose --help lists their keys.\n")
    from tokenloom.study_config import load_study

    study, base = load_study(rest)
    only = [name for name in own.only.split(",") if name]
    if not all(seed.isdigit() for seed in own.seeds.split(",") if own.seeds):
        raise ValueError(f"--seeds={own.seeds} must be numbers separated by commas, such as 0,1,2")
    seeds = [int(seed) for seed in own.seeds.split(",") if seed]
    from tokenloom.study import complain, run_study, tell

    if own.dry_run:
        print(tell(study, base, only=only, seeds=seeds))
    else:
        complain(run_study(study, base, only=only, seeds=seeds, report_only=own.report_only))


def _compare(words: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="tokenloom compare", description="Scores of several models side by side.")
    parser.add_argument("metrics", nargs="+", help="run folders, or files such as their eval/metrics.json; one will do")
    parser.add_argument("--only", default="", help="these scores alone, separated by commas, such as fid,kid")
    parser.add_argument("--force", action="store_true", help="mark what was measured differently, do not refuse it")
    parser.add_argument("--json", action="store_true", help="print JSON")
    own = parser.parse_intermixed_args(list(words))
    from eval.comparison import compare
    from eval.comparison_table import comparison_json, comparison_text

    only = [name for name in own.only.split(",") if name]
    found = compare([Path(path) for path in own.metrics], only=only, force=own.force)
    print(comparison_json(found) if own.json else comparison_text(found))


def _doctor(words: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="tokenloom doctor", description="What is installed and found here.")
    parser.parse_args(list(words))
    from tokenloom.doctor import doctor

    print(doctor())


ACCEPTANCE = (
    "draw num / acceptance, keep those that a classifier takes most surely; what an interrupted command has drawn waits"
    " in .candidates-<folder> for the same command"
)
STREAM = (
    "show autoregressive samples on the way, in <folder>-partial.png, which is gone at the end; a killed command leaves"
    " it to the next one"
)
FAMILY = {"choices": ("autoregressive", "diffusion"), "help": "this family alone"}
EVAL = _staged("eval", _eval, only={"choices": ("fid", "reconstruction", "probe"), "help": "these scores alone"})
COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "run": _staged("run", _run),
    "tokenizer": _staged("tokenizer", _tokenizer),
    "encode": _staged("encode", _encode),
    "generator": _staged("generator", _generator, only=FAMILY),
    "steps": _staged("steps", _steps),
    "sample": _staged(
        "sample",
        _sample,
        only=FAMILY,
        num={"type": int, "default": 64, "help": "how many (default 64)"},
        label={"type": int, "help": "class to draw; without it all classes take turns"},
        prompt={"action": "append", "default": [], "help": "text to draw; several --prompt take turns"},
        image={"action": "append", "default": [], "help": "smaller image to restore, a file or a folder of such"},
        seed={"type": int, "default": 0, "help": "another seed, other samples (default 0)"},
        out={"help": "folder to write to; default: in the run's folder"},
        acceptance={"type": float, "help": ACCEPTANCE},
        stream={"action": "store_true", "help": STREAM},
        npz={"help": "also write all samples and labels to this file as ADM's evaluator reads them"},
        decoder={"help": "run whose tokenizer paints the images: one trained with tokenizer.encoder_from"},
    ),
    "eval": _eval_either,
    "report": _staged("report", _report),
    "export": _staged("export", _export, out={"required": True, "help": "folder to write to"}),
    "study": _study,
    "speed": _staged("speed", _speed),
    "compare": _compare,
    "doctor": _doctor,
}
