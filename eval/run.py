"""The door: score whatever a run has, print a table, and keep the records in eval/metrics.json."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from engine.checkpoint import write_json
from engine.config import DataConfig, RunConfig
from engine.device import Device
from engine.snapshots import snapshots
from engine.sources import open_images
from eval.classifier import Classifier, check_classes, load_classifier, train_classifier
from eval.config import EvalConfig
from eval.features import Extractor
from eval.generator_scores import (
    check_enough_real,
    score_likelihood,
    score_real,
    score_samples,
    weights_kind,
)
from eval.neighbours import open_archive
from eval.panel import Panel, cache_of, open_extractors
from eval.pictures import drawn
from eval.probe_scores import check_counts, score_probe
from eval.protocol import Record, drop_scores, drop_stale, merge_scores
from eval.restoration import ENLARGED, check_enough_test, score_restorations
from eval.sample_sets import Drawn, draw_all, remove_unasked
from eval.standard import named_reference, open_standard, training_pictures
from eval.subject import Subject
from eval.table import table
from eval.taps import (
    Representation,
    encoded_once,
    generator_representation,
    pixel_representation,
    random_representation,
    tokenizer_representation,
)
from eval.tokenizer_scores import load_lpips, lpips_nets, score_tokenizer
from eval.variants import GeneratorConfig, samplings, snapshot_samplings
from generator.config import AutoregressiveConfig, DiffusionConfig
from tokenizer.config import TokenizerConfig


def evaluate(
    *,
    run: RunConfig,
    data: DataConfig,
    tokenizer: TokenizerConfig,
    autoregressive: AutoregressiveConfig | None,
    diffusion: DiffusionConfig | None,
    eval: EvalConfig,
    device: Device,
    only: str | None = None,
) -> list[Record]:
    """Score what the run has trained, merge the records into run.folder/eval/metrics.json, print and return them.

    `only` limits the work: fid (samples, and the likelihood of the autoregressive model), reconstruction (the
    tokenizer) or probe (which also writes eval/probe.json). Samples and the classifier are made where they are missing.
    Every process of a run must call it; all but the first get an empty list.

    Raises:
        ValueError: no trained tokenizer, missing weights, too few images, or a section that does not fit the run.
    """
    if only not in (None, "fid", "reconstruction", "probe"):
        raise ValueError(f"only={only!r} must be fid, reconstruction or probe")
    sections = {"autoregressive": autoregressive, "diffusion": diffusion}
    present = {family: config for family, config in sections.items() if config is not None}
    asked, families = samplings(eval, present), _trained(run.folder, present, device)
    asked = [each for each in asked if each.family in families]
    parts = [only] if only else ["reconstruction", "fid", "probe"]
    if eval.snapshots and "fid" in parts:
        check_snapshots(run.folder, families)
    subject = Subject(
        run=run,
        config=eval,
        train_set=open_images(data, "train"),
        test_set=open_images(data, "test"),
        tokenizer_config=tokenizer,
        families=families,
        samplings=[*asked, *(snapshot_samplings(run.folder, families) if eval.snapshots else ())],
        device=device,
    )
    if "fid" in parts:
        check_enough_real(subject.train_set, eval)
        check_enough_test(eval, diffusion if "diffusion" in families else None, subject.test_set)
    if "probe" in parts:
        check_counts(eval.probe, subject.train_set, subject.test_set)
    if "reconstruction" in parts:
        _check_lpips(eval, data.size, device)
    judges = [] if only == "probe" else open_extractors(eval, device, lambda: _classifier(subject))
    if "fid" in parts:
        _check_reference(eval, data.size, judges)
    panel = Panel(extractors=judges, config=eval, cache=cache_of(run, eval), device=device)
    folders = draw_all(subject, panel.extractors) if "fid" in parts else []
    path = run.folder / "eval" / "metrics.json"
    if device.is_main:
        drop_stale(path, subject.fingerprints if only else ())
    records: list[Record] = []
    for part in parts:
        found = _score(part, subject, panel, folders)
        if device.is_main:
            if part == "fid":
                # Some may no longer be asked for.
                drop_scores(path, lambda entry: "@" in entry["subject"] or entry["subject"] == ENLARGED)
                remove_unasked(subject, folders)
            merge_scores(path, found)
        records += found
    if device.is_main:
        print(table(records))
    device.barrier()
    return records


def check_snapshots(folder: Path, families: dict[str, GeneratorConfig]) -> None:
    """Raise ValueError if snapshots are to be scored, but a trained diffusion model has none."""
    if "diffusion" in families and not snapshots(folder / "diffusion"):
        raise ValueError(
            f"eval.snapshots=true, but {folder / 'diffusion'} was trained without snapshots: leave it out, or train"
            " with diffusion.train.snapshot_every under another run.name"
        )


def check(*, data: DataConfig, eval: EvalConfig, device: Device) -> None:
    """Raise now the ValueError that `evaluate` would raise after hours of training: too few images, labels, weights."""
    train_set, test_set = open_images(data, "train"), open_images(data, "test")
    check_enough_real(train_set, eval)
    check_counts(eval.probe, train_set, test_set)
    judges = open_extractors(eval, device)
    if "classifier" in eval.features:
        classes = check_classes(train_set)
        if eval.classifier.path is not None:
            load_classifier(Path(eval.classifier.path), num_classes=classes, device=device)
    if eval.rejection.acceptances:
        classes = check_classes(train_set, asked="eval.rejection.acceptances is set", remedy="leave it empty")
        if eval.rejection.classifier.path is not None:
            load_classifier(Path(eval.rejection.classifier.path), num_classes=classes, device=device)
    # With a classifier, statistics may be of its features, which are not there yet.
    _check_reference(eval, data.size, () if "classifier" in eval.features else judges)
    _check_lpips(eval, data.size, device)


def _check_reference(config: EvalConfig, size: int, judges: Sequence[Extractor]) -> None:
    """Raise ValueError if eval.reference names a file that samples cannot be held against."""
    if config.reference not in ("equal", "all"):
        named_reference(config, size, judges)


def _check_lpips(config: EvalConfig, size: int, device: Device) -> None:
    """Raise ValueError if eval.lpips names a network that cannot be had."""
    if config.lpips != "auto":
        for net in lpips_nets(config.lpips, size):
            load_lpips(net, device.device)


def _score(part: str, subject: Subject, panel: Panel, folders: Sequence[Drawn]) -> list[Record]:
    if part == "reconstruction":
        return score_tokenizer(subject.tokenizer, subject.test_set, panel, weights=subject.tokenizer_weights)
    return _score_generators(subject, panel, folders) if part == "fid" else _probe(subject)


def _score_generators(subject: Subject, panel: Panel, folders: Sequence[Drawn]) -> list[Record]:
    train_set, test_set = subject.train_set, subject.test_set
    standard, control = open_standard(train_set, test_set, panel)
    archive = None
    if panel.config.neighbours and folders:
        held_out = drawn(test_set, np.arange(len(test_set)), name="test images")
        archive = open_archive(training_pictures(train_set), held_out, panel)
    records = score_real(control, standard, panel, train_set) if panel.device.is_main else []
    for (name, _, config), folder in folders:
        records += score_samples(
            name, folder, standard, panel, train_set=train_set, weights=weights_kind(config), archive=archive,
            sheet=subject.run.folder / "eval" / f"neighbours-{name}.png",
        )  # fmt: skip
    records += score_restorations(subject, folders, panel)
    return records + (_likelihood(subject) if "autoregressive" in subject.families else [])


def _likelihood(subject: Subject) -> list[Record]:
    entry = score_likelihood(
        subject.generator("autoregressive"),
        subject.tokenizer,
        subject.test_set,
        batch_size=subject.config.batch_size,
        device=subject.device,
        weights=weights_kind(subject.families["autoregressive"]),
    )
    return [entry] if subject.device.is_main else []


def _probe(subject: Subject) -> list[Record]:
    """Probe every model that the run has, and write the curves to eval/probe.json."""
    records, content = score_probe(
        subject.config.probe,
        _representations(subject),
        train_set=subject.train_set,
        test_set=subject.test_set,
        run=subject.run,
        cache=cache_of(subject.run, subject.config),
        batch_size=subject.config.batch_size,
        device=subject.device,
    )
    if records and subject.device.is_main:
        write_json(subject.run.folder / "eval" / "probe.json", content)
    return records


def _representations(subject: Subject) -> dict[str, Callable[[], Representation]]:
    """What the run has that can be probed, by the prefix of its taps; made when a tap of it is asked for."""
    tokenizer = subject.tokenizer
    encode = encoded_once(tokenizer)
    makers: dict[str, Callable[[], Representation]] = {
        "pixels": pixel_representation,
        "tokenizer": lambda: tokenizer_representation(tokenizer),
    }
    if "autoregressive" in subject.families:
        makers["vim"] = lambda: generator_representation(subject.generator("autoregressive"), tokenizer, encode)
        makers["vim_random"] = lambda: random_representation(subject.generator("autoregressive"), tokenizer, encode)
    if "diffusion" in subject.families:
        makers["dit"] = lambda: generator_representation(subject.generator("diffusion"), tokenizer, encode)
    return makers


def _classifier(subject: Subject) -> Classifier:
    """The judge that the run has, or that is trained now."""
    network, _ = train_classifier(
        subject.config.classifier,
        train_set=subject.train_set,
        test_set=subject.test_set,
        run=subject.run,
        device=subject.device,
    )
    return network


def _trained(folder: Path, sections: dict[str, GeneratorConfig], device: Device) -> dict[str, GeneratorConfig]:
    """The families that the run has trained."""
    found = {}
    for family, config in sections.items():
        if (folder / family / "model.json").exists():
            found[family] = config
        elif device.is_main:
            print(f"{family} left out: {folder / family} holds no finished generator yet")
    return found
