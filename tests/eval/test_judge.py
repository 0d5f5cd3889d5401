from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from engine.config import RunConfig
from engine.device import setup
from eval import judge
from eval.classifier import Classifier
from eval.config import EvalConfig
from eval.features import Extractor, open_features
from eval.judge import class_accuracy, reconstruction_distances, sample_scores
from eval.panel import Panel
from eval.pictures import Pictures
from eval.standard import Standard, see_standard


def images(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (n, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def pictures(n: int, seed: int = 0) -> Pictures:
    return Pictures(name="noise", count=n, load=lambda start, stop: images(n, seed)[start:stop])


def panel(folder: Path, *extractors: Extractor, **how: object) -> Panel:
    config = EvalConfig(features=("random",), **how)  # type: ignore[arg-type]
    device = setup(RunConfig(device="cpu", threads=1))
    return Panel(extractors=extractors or [open_features("random")], config=config, cache=folder, device=device)


@pytest.fixture
def scored(tmp_path: Path) -> Callable[..., dict[str, dict]]:
    def score(n: int = 60, **how: object) -> dict[str, dict]:
        judges = panel(tmp_path, **how)
        made, standard = judges.see(pictures(n, seed=1)), see_standard(pictures(n), judges)
        records = sample_scores(
            "diffusion", made, standard, judges.extractors, config=judges.config, main="random", facts={"size": 16}
        )
        return {entry["name"]: entry for entry in records}

    return score


def test_samples_have_every_score_of_two_sets_with_its_settings(scored: Callable[..., dict[str, dict]]) -> None:
    found = scored()
    assert set(found) == {"fd_random", "kid", "precision", "recall", "density", "coverage"}
    settings = {name: entry["protocol"].get("settings") for name, entry in found.items()}
    assert settings["fd_random"] is None and settings["kid"]["pairs"] == "all"
    assert settings["precision"] == settings["recall"] == {"k": 3}
    assert settings["density"] == settings["coverage"] == {"k": 5}
    for entry in found.values():
        assert entry["interval"][0] <= entry["value"] <= entry["interval"][1]
        assert entry["protocol"]["num_real"] == entry["protocol"]["num_generated"] == entry["n"] == 60


def test_another_convention_is_another_protocol(
    scored: Callable[..., dict[str, dict]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judge, "SUBSETS", 20)  # they take seconds
    ours, theirs = scored(1100), scored(1100, num_samples=1100, convention="torch_fidelity")
    assert theirs["fd_random"]["protocol"]["settings"] == {"root": "eigenvalues"}
    assert theirs["kid"]["protocol"]["settings"]["pairs"] == {"subsets": 20, "size": 1000, "seed": 2020}
    assert ours["fd_random"]["value"] == pytest.approx(theirs["fd_random"]["value"], rel=1e-6)  # n > D: both are right
    assert ours["kid"]["value"] == pytest.approx(
        theirs["kid"]["value"], abs=3 * (ours["kid"]["interval"][1] - ours["kid"]["value"])
    )
    assert ours["kid"]["protocol"]["hash"] != theirs["kid"]["protocol"]["hash"]


def test_of_many_images_those_compared_by_pairs_are_drawn_at_random(
    scored: Callable[..., dict[str, dict]], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "draw_seed" not in scored(60)["kid"]["protocol"]["settings"]
    seen: list[torch.Tensor] = []
    kernel = judge.kernel_distance
    monkeypatch.setattr(judge, "kernel_distance", lambda x, y: seen.append(x) or kernel(x, y))
    whole = scored(60)
    monkeypatch.setattr(judge, "PAIRWISE_IMAGES", 40)
    part = scored(60)
    stated = part["kid"]["protocol"]
    assert (stated["num_real"], stated["num_generated"], stated["settings"]["draw_seed"]) == (40, 40, 0)
    rows = [int((seen[0] == row).all(1).nonzero()) for row in seen[1]]
    assert len(set(rows)) == 40 and max(rows) >= 50  # sets are often sorted by class: the first are no sample of them
    assert part["fd_random"]["value"] == whole["fd_random"]["value"]  # of all images


def test_statistics_without_images_give_distances_alone(tmp_path: Path) -> None:
    judges = panel(tmp_path)
    made, whole = judges.see(pictures(40, seed=1)), see_standard(pictures(40), judges)
    told = {"file": "stats.npz", "sha256": "abc", "n": 40, "pixels": whole.facts("random")["reference"]}
    stated = Standard(gaussians=whole.gaussians, stated={"random": told})
    how = {"config": judges.config, "main": "random", "facts": {}}
    (entry,) = sample_scores("outside", made, stated, judges.extractors, **how)
    of_images = sample_scores("outside", made, whole, judges.extractors, **how)[0]
    assert entry["name"] == "fd_random" and entry["value"] == of_images["value"]
    assert entry["protocol"]["hash"] == of_images["protocol"]["hash"]  # the file says of which pixels it is


def test_class_accuracy_counts_the_classifiers_agreement(tmp_path: Path) -> None:
    torch.manual_seed(0)
    extractor = open_features("classifier", classifier=Classifier((8, 8, 8), 4).eval())
    seen = panel(tmp_path, extractor).see(pictures(12))
    with torch.no_grad():
        labels = extractor.outputs(images(12))["logits"].argmax(1)
    assert class_accuracy("diffusion", seen, labels, extractor, facts={})["value"] == 1.0
    labels[:3] = (labels[:3] + 1) % 4
    assert class_accuracy("diffusion", seen, labels, extractor, facts={})["value"] == 0.75


def test_too_few_reconstructions_have_no_distance_and_say_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    judges = panel(tmp_path)
    few, enough = (see_standard(pictures(n), judges) for n in (19, 20))
    assert few.seen is not None and enough.seen is not None
    assert reconstruction_distances(few.seen, few, judges.extractors, facts={}) == []
    assert "19 test images are too few, it takes 20" in capsys.readouterr().out
    (entry,) = reconstruction_distances(enough.seen, enough, judges.extractors, facts={})
    assert entry["name"] == "rfd_random" and entry["value"] == pytest.approx(0, abs=1e-6)
