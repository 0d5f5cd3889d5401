"""Scores of generators: their samples against real training images, beside real images against real images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.config import RunConfig
from engine.device import Device, exact_products
from engine.images import ImageSet
from eval.config import EvalConfig
from eval.extraction import Seen
from eval.judge import class_accuracy, data_facts, sample_scores
from eval.neighbours import Archive, score_neighbours
from eval.panel import Panel
from eval.pictures import label_scheme, numbered
from eval.protocol import Record, protocol, record
from eval.standard import Standard
from eval.statistics import mean_of
from eval.variants import Sampling
from generator.inputs import inputs_of_images
from generator.sample import sample
from tokenizer.model import Tokenizer


def ensure_samples(*, run: RunConfig, sampling: Sampling, num: int, device: Device) -> Path:
    """The folder with at least `num` samples drawn in this way; samples if it is not there yet.

    Every process of a run must call it.
    """
    subject, family, config = sampling
    out = run.folder / "samples" / subject
    return sample(run=run, config=config, family=family, device=device, num=num, candidates=num, out=out)


def check_enough_real(train_set: ImageSet, config: EvalConfig) -> None:
    """Raise ValueError if there will be too few samples or real images for the scores that are asked for."""
    num, least = config.num_samples, config.least_images
    for key, count in (
        (f"eval.num_samples={num}", num),
        (f"the train split has {len(train_set)} images", len(train_set)),
    ):
        if count < least:
            raise ValueError(f"{key}: too few for eval.convention={config.convention}, which takes {least}")
    if config.reference == "equal" and 2 * num > len(train_set):
        raise ValueError(
            f"eval.num_samples={num}: two disjoint sets of real images are needed, but the train split has "
            f"{len(train_set)}; set --eval.num_samples={len(train_set) // 2} or less, or --eval.reference=all"
        )


def score_real(control: Seen | None, standard: Standard, panel: Panel, train_set: ImageSet) -> list[Record]:
    """What real images score against other real images: the best that a generator can hope for at this number."""
    if control is None:
        return []
    how: dict[str, Any] = {"config": panel.config, "main": panel.main.name, "facts": data_facts(train_set)}
    return sample_scores("real", control, standard, panel.extractors, **how)


def score_samples(
    subject: str,
    folder: Path,
    standard: Standard,
    panel: Panel,
    *,
    train_set: ImageSet,
    weights: str,
    archive: Archive | None,
    sheet: Path,
) -> list[Record]:
    """All scores of the samples in a folder under the name `subject`; `weights` says EMA or raw.

    Of the best of more candidates the protocol tells how many they were and who picked. With an archive the samples
    nearest to training images are drawn in `sheet`. Every process must call it; all but the first get an empty list.
    """
    pictures = numbered(folder, panel.config.num_samples, size=train_set.size, name=subject)
    made = panel.see(pictures)
    if not panel.device.is_main:
        return []
    told = json.loads((folder / "samples.json").read_text(encoding="utf-8"))
    labels = torch.tensor(told["labels"][: made.count])
    facts = {**data_facts(train_set), **sampling_facts(told, labels, weights)}
    main = panel.main.name
    records = sample_scores(subject, made, standard, panel.extractors, config=panel.config, main=main, facts=facts)
    judge_of_classes = next((each for each in panel.extractors if each.name == "classifier"), None)
    if judge_of_classes is not None and int(labels.min()) >= 0:
        records.append(class_accuracy(subject, made, labels, judge_of_classes, facts=facts))
    if archive is not None:
        rows = panel.config.neighbours
        records += score_neighbours(
            subject, pictures, made.outputs[main], archive, panel.main, rows=rows, sheet=sheet, facts=facts
        )
    return records


def sampling_facts(told: dict[str, Any], labels: Tensor, weights: str) -> dict[str, Any]:
    """What the protocol says of samples: how they were drawn, of which models and weights."""
    optional = ("condition", "guide", "outside", "acceptance", "candidates", "classifier")
    seeds = told["seeds"][: len(labels)]
    return {
        "labels": label_scheme(labels),
        "subject": {
            **{key: told[key] for key in ("generator", "tokenizer", "settings")},
            **{key: told[key] for key in optional if key in told},
            "seeds": [seeds[0], seeds[-1]],
            "label_counts": torch.bincount(labels + 1).tolist(),
            "weights": weights,
            "rounding": "halves round up",
        },
    }


def score_likelihood(
    generator: Any, tokenizer: Tokenizer, test_set: ImageSet, *, batch_size: int, device: Device, weights: str
) -> Record:
    """nll: negative log likelihood of the test images' codes given their labels or texts, in nats per code.

    Every process must call it; each takes a share of the images.
    """
    values, (start, stop) = [], device.share_of(len(test_set))
    inputs = inputs_of_images(generator, test_set)
    with exact_products():
        for batch in test_set.in_order(batch_size, start=start, stop=stop):
            codes = tokenizer.encode(batch["images"].to(device.device))  # [B, T]
            told = inputs.condition(batch["indices"].tolist())
            values.append(generator.nll(codes, told).cpu() / codes.shape[1])
    values = device.collect(values)
    estimate = mean_of(torch.cat(values))
    settings = {"unit": "nats per code", "tokenizer": tokenizer.fingerprint, "labels": bool(generator.num_classes)}
    stated = protocol(
        settings=settings if inputs.prompts is None else {**settings, "condition": "text"},
        reference=test_set.identity().get("digest"),
        num_real=sum(len(part) for part in values),
        **data_facts(test_set),
        subject={"generator": generator.fingerprint, "weights": weights},
    )
    return record("nll", "autoregressive", estimate, n=stated["num_real"], protocol=stated)


def weights_kind(config: Any) -> str:
    """Which weights of a stage are scored: `ema 0.999`, `raw`, `power ema 0.08`; of a snapshot also its step."""
    sample = getattr(config, "sample", None)
    width, step = getattr(sample, "ema_width", None), getattr(sample, "snapshot", None)
    kind = f"ema {config.train.ema}" if config.train.ema else "raw"
    return (kind if width is None else f"power ema {width}") + ("" if step is None else f" at step {step}")
