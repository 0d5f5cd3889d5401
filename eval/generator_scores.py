"""Scores of generators: their samples against real training images, beside real images against real images."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.config import RunConfig
from engine.device import Device, exact_products
from engine.images import ImageSet
from eval.config import EvalConfig
from eval.features import Extractor
from eval.judge import (
    Judged,
    class_accuracy,
    data_facts,
    draw_indices,
    drawn_batches,
    judge,
    png_batches,
    sample_scores,
)
from eval.protocol import Record, protocol, record
from eval.statistics import mean_of
from eval.variants import Sampling
from generator.sample import sample
from tokenizer.model import Tokenizer


def ensure_samples(*, run: RunConfig, sampling: Sampling, num: int, device: Device) -> Path:
    """The folder with at least `num` samples drawn in this way; samples if it is not there yet.

    Every process of a run must call it.
    """
    subject, family, config = sampling
    out = run.folder / "samples" / subject
    return sample(run=run, config=config, family=family, device=device, num=num, candidates=num, out=out)


def check_enough_real(train_set: ImageSet, num: int) -> None:
    """Raise ValueError if the training split is too small for two disjoint sets of `num` images."""
    if 2 * num > len(train_set):
        raise ValueError(
            f"eval.num_samples={num}: two disjoint sets of real images are needed, but the train split has "
            f"{len(train_set)}; set --eval.num_samples={len(train_set) // 2} or less"
        )


def real_halves(
    train_set: ImageSet, extractors: Sequence[Extractor], *, config: EvalConfig, device: torch.device
) -> tuple[Judged, Judged]:
    """Two disjoint sets of eval.num_samples real training images: the reference, and one to hold against it."""
    num = config.num_samples
    order = draw_indices(np.arange(len(train_set)), 2 * num, seed=0)
    halves = [
        judge(extractors, _images(train_set, part, config.batch_size), device=device, total=num, title=f"real/{name}")
        for name, part in (("reference", order[:num]), ("control", order[num:]))
    ]
    return halves[0], halves[1]


def score_real(
    control: Judged, reference: Judged, extractors: Sequence[Extractor], *, main: str, train_set: ImageSet
) -> list[Record]:
    """What real images score against other real images: the best that a generator can hope for at this number."""
    return sample_scores("real", control, reference, extractors, main=main, facts=data_facts(train_set))


def score_samples(
    subject: str,
    folder: Path,
    reference: Judged,
    extractors: Sequence[Extractor],
    *,
    config: EvalConfig,
    train_set: ImageSet,
    device: torch.device,
    main: str,
    weights: str,
) -> list[Record]:
    """All scores of the samples in a folder under the name `subject`; `weights` says EMA or raw.

    Of the best of more candidates the protocol tells how many they were and who picked.
    """
    told = json.loads((folder / "samples.json").read_text(encoding="utf-8"))
    num = config.num_samples
    batches = png_batches(folder, num, size=train_set.size, batch_size=config.batch_size)
    made = judge(extractors, batches, device=device, total=num, title=f"judge/{subject}")
    labels, seeds = torch.tensor(told["labels"][:num]), told["seeds"][:num]
    facts: dict[str, Any] = {
        **data_facts(train_set),
        "subject": {
            **{key: told[key] for key in ("generator", "tokenizer", "settings")},
            **{key: told[key] for key in ("guide", "outside", "acceptance", "candidates", "classifier") if key in told},
            "seeds": [seeds[0], seeds[-1]],
            "labels": torch.bincount(labels + 1).tolist(),
            "weights": weights,
        },
    }
    records = sample_scores(subject, made, reference, extractors, main=main, facts=facts)
    judge_of_classes = next((each for each in extractors if each.name == "classifier"), None)
    if judge_of_classes is not None and int(labels.min()) >= 0:
        records.append(class_accuracy(subject, made, labels, judge_of_classes, facts=facts))
    return records


def score_likelihood(
    generator: Any, tokenizer: Tokenizer, test_set: ImageSet, *, batch_size: int, device: torch.device, weights: str
) -> Record:
    """nll: negative log likelihood of the test images' codes given their labels, in nats per code."""
    values = []
    with exact_products():
        for batch in test_set.in_order(batch_size):
            labels = batch["labels"] if generator.num_classes else torch.full_like(batch["labels"], -1)
            codes = tokenizer.encode(batch["images"].to(device))  # [B, T]
            values.append(generator.nll(codes, labels.to(device)).cpu() / codes.shape[1])
    estimate = mean_of(torch.cat(values))
    stated = protocol(
        settings={"unit": "nats per code", "tokenizer": tokenizer.fingerprint, "labels": bool(generator.num_classes)},
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


def _images(images: ImageSet, indices: np.ndarray, batch_size: int) -> Iterator[Tensor]:
    return (batch["images"] for batch in drawn_batches(images, indices, batch_size))
