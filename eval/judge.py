"""From features to records: generated images against a standard, reconstructions against their originals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from engine.images import ImageSet
from engine.log import progress
from eval.config import EvalConfig
from eval.distances import frechet_distance, inception_score, kernel_distance, kernel_distance_subsets
from eval.extraction import Extracted, Seen
from eval.features import Extractor
from eval.infinity import POINTS, frechet_infinity
from eval.manifold import NEIGHBOURS, manifold_scores
from eval.names import score_name
from eval.pictures import draw_indices
from eval.protocol import Record, protocol, record
from eval.standard import Standard
from eval.statistics import GROUPS, Estimate, Gaussian, grouped_moments, proportion

PAIRWISE_IMAGES = 10_000  # scores that compare all pairs of images take at most so many per side, drawn at random
SPLITS, SUBSETS, SUBSET_SIZE, SEED = 10, 100, 1000, 2020  # of torch-fidelity


def data_facts(images: ImageSet) -> dict[str, Any]:
    """What a protocol says of the data; the size must agree between two scores, the rest is told."""
    told = images.identity()
    return {"size": images.size, "crop": told.get("crop"), "data": told}


def sample_scores(
    subject: str,
    generated: Seen,
    standard: Standard,
    extractors: Sequence[Extractor],
    *,
    config: EvalConfig,
    main: str,
    facts: Mapping[str, Any],
) -> list[Record]:
    """Scores of generated images, per extractor; those that compare images pair by pair under the `main` one alone.

    `facts` go into each protocol: what was scored, and on which data. A score that the standard cannot give is left
    out: of statistics without images there are Frechet distances alone.
    """
    records = []
    for extractor in extractors:
        stated = dict(facts, features=extractor.identity(), num_generated=generated.count)
        mine = generated.outputs[extractor.name]
        if extractor.name in standard.gaussians:
            held = {**stated, **standard.facts(extractor.name)}
            records += _frechet_scores(subject, mine, standard, extractor, config=config, stated=held)
        if mine.has("logits"):
            name = score_name("is", features=extractor.name, n=generated.count)
            splits = protocol(**stated, settings={"splits": SPLITS, "shuffle_seed": SEED})
            estimate = inception_score(mine.rows("logits"), splits=SPLITS, seed=SEED)
            records.append(record(name, subject, estimate, n=generated.count, protocol=splits))
        if extractor.name == main and standard.seen is not None:
            theirs = standard.seen.outputs[extractor.name]
            held = {**stated, **standard.image_facts()}
            records += _pairwise_scores(subject, mine, theirs, config=config, stated=held)
    return records


def reconstruction_distances(
    reconstructed: Seen, originals: Standard, extractors: Sequence[Extractor], *, facts: Mapping[str, Any]
) -> list[Record]:
    """rfid or rfd_<features>: reconstructions against the very images that they reconstruct; needs twenty of them."""
    records: list[Record] = []
    if reconstructed.count < 2 * GROUPS:
        print(f"rfd left out: {reconstructed.count} test images are too few, it takes {2 * GROUPS}")
        return records
    for extractor in extractors:
        name = score_name("rfd", features=extractor.name, n=reconstructed.count)
        groups = grouped_moments(reconstructed.outputs[extractor.name].parts(), reconstructed.count)
        estimate = frechet_distance(groups, originals.gaussians[extractor.name])
        stated = protocol(
            **facts,
            **originals.facts(extractor.name),
            features=extractor.identity(),
            num_generated=reconstructed.count,
        )
        records.append(record(name, "tokenizer", estimate, n=reconstructed.count, protocol=stated))
    return records


def class_accuracy(
    subject: str, generated: Seen, labels: Tensor, extractor: Extractor, *, facts: Mapping[str, Any]
) -> Record:
    """Share of generated images that the data set's classifier takes for the class that was asked, labels int64 [N]."""
    found = generated.outputs[extractor.name].rows("logits").argmax(1)
    estimate = proportion(int((found == labels).sum()), generated.count)
    stated = protocol(**facts, features=extractor.identity(), num_generated=generated.count)
    return record("class_accuracy", subject, estimate, n=generated.count, protocol=stated)


def _frechet_scores(
    subject: str,
    mine: Extracted,
    standard: Standard,
    extractor: Extractor,
    *,
    config: EvalConfig,
    stated: Mapping[str, Any],
) -> list[Record]:
    reference = standard.gaussians[extractor.name]
    eigenvalues = config.convention == "torch_fidelity"
    groups = grouped_moments(mine.parts(), mine.count)
    distance = frechet_distance(groups, reference, root="eigenvalues" if eigenvalues else "nuclear")
    found: dict[str, tuple[Estimate, dict[str, Any] | None]] = {
        "fd": (distance, {"root": "eigenvalues"} if eigenvalues else None)
    }
    if config.infinity:
        try:
            found["fd_inf"] = (_extrapolated(subject, mine, reference, extractor.name), {"points": POINTS})
        except ValueError as error:
            print(f"fd_inf of {subject} left out: {error}")
    return [
        record(
            score_name(score, features=extractor.name, n=mine.count), subject, estimate, n=mine.count,
            protocol=protocol(**stated, settings=how),
        )
        for score, (estimate, how) in found.items()
    ]  # fmt: skip


def _extrapolated(subject: str, mine: Extracted, reference: Gaussian, features: str) -> Estimate:
    total = POINTS * (GROUPS + 1)
    with progress(total=total, title=f"fd_inf/{subject}/{features}", unit="distance") as bar:
        return frechet_infinity(mine.rows(), reference, tick=bar.update)


def _pairwise_scores(
    subject: str, mine: Extracted, theirs: Extracted, *, config: EvalConfig, stated: Mapping[str, Any]
) -> list[Record]:
    x, y = _some(mine).rows(), _some(theirs).rows()
    stated = {**stated, "num_real": len(y), "num_generated": len(x)}
    drawn = {"draw_seed": 0} if len(x) < mine.count or len(y) < theirs.count else {}
    kernel: dict[str, Any] = {"kernel": "(x.y / D + 1)^3", "pairs": "all"}
    found: list[tuple[str, Estimate, dict[str, Any]]] = []
    if config.convention == "torch_fidelity":
        kernel["pairs"] = {"subsets": SUBSETS, "size": SUBSET_SIZE, "seed": SEED}
        found.append(("kid", kernel_distance_subsets(x, y, subsets=SUBSETS, size=SUBSET_SIZE, seed=SEED), kernel))
    else:
        found.append(("kid", kernel_distance(x, y), kernel))
    found += [(name, each, {"k": NEIGHBOURS[name]}) for name, each in manifold_scores(x, y, NEIGHBOURS).items()]
    return [
        record(name, subject, estimate, n=len(x), protocol=protocol(**stated, settings={**settings, **drawn}))
        for name, estimate, settings in found
    ]


def _some(extracted: Extracted) -> Extracted:
    """As many images as are compared pair by pair, at random: the first of a set are often of its first classes."""
    if extracted.count <= PAIRWISE_IMAGES:
        return extracted
    return extracted.at(draw_indices(np.arange(extracted.count), PAIRWISE_IMAGES, seed=0).tolist())
