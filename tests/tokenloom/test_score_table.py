"""Names and order of what is scored."""

from typing import Any

import pytest

from eval.names import CHAPTERS, better
from tokenloom.score_table import ARROWS, KINDS, find, kind_label, kind_of, score_tables, subject_title, written


def test_every_way_to_sample_has_a_title() -> None:
    assert subject_title("diffusion") == "Latent diffusion"
    assert subject_title("diffusion@cfg2.5") == "Latent diffusion, cfg2.5"
    assert subject_title("diffusion@step12000") == "Latent diffusion after 12,000 steps"
    assert subject_title("diffusion@accept0.25") == "Latent diffusion, best 25\N{NO-BREAK SPACE}% of its candidates"
    assert (subject_title("odd"), subject_title("odd@cfg2")) == ("odd", "odd@cfg2")


def test_variants_come_after_their_family_and_snapshots_by_their_steps() -> None:
    order = ["real", "autoregressive", "diffusion", "diffusion@accept0.5", "diffusion@heun", "diffusion@cfg2"]
    order += ["diffusion@step500", "diffusion@step10000", "odd"]
    shuffled = [*order[4:6], *order[:4], *reversed(order[6:])]  # variants stay as they come
    html = score_tables([entry(subject) for subject in shuffled])
    places = [html.index(f"<h3>{subject_title(subject)}</h3>") for subject in order]
    assert places == sorted(places)


def test_every_score_has_a_label_and_a_way() -> None:
    named = {name for scores in CHAPTERS.values() for name in scores}
    assert set(KINDS) - {"is_"} == named
    assert {name: kind_of(name).better for name in named} == {name: ARROWS[better(name)] for name in named}
    assert all(kind_of(name).better for name in named)


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("fid", "FID"),
        ("fid5k", "FID-5k"),
        ("rfid500_clean", "rFID-500"),
        ("fid_inf", "FID\N{INFINITY}"),
        ("fd_inf_random", "Fréchet distance at infinity"),
        ("fd_random", "Fréchet distance"),
        ("is_clean", "Inception Score"),
        ("is_random", "Confidence and variety"),
        ("lpips_vgg", "LPIPS"),
        ("odd_name", "odd_name"),
    ],
)
def test_a_label_tells_a_small_number_of_images(name: str, label: str) -> None:
    assert kind_of(name).label == label
    record = {**entry("diffusion"), "name": name, "protocol": {"features": {"name": "inception-clean"}}}
    assert kind_label(record) == f"{label} (inception-clean)"


def test_scores_are_found_by_what_they_are() -> None:
    names = ["fid_inf", "fd_inf_random", "fd_random", "fid500", "usage_256", "usage"]
    records = [{**entry("diffusion"), "name": name} for name in names]

    def found(*wanted: str) -> str | None:
        record = find(records, "diffusion", *wanted)
        return record and record["name"]

    assert found("fid", "fd") == found("fd", "fid") == "fid500"
    assert (found("fd"), found("fd_inf"), found("usage")) == ("fd_random", "fd_inf_random", "usage")
    assert found("fid5k") is None and found("kid") is None and find(records, "real", "fid") is None


def test_numbers_are_written_as_their_score_wants() -> None:
    assert (written("fid5k", 12.3456), written("density", 0.98765), written("copies", 0.0123)) == (
        "12.3",
        "0.988",
        "1.2",
    )


def entry(subject: str) -> dict[str, Any]:
    return {"name": "fd_random", "subject": subject, "value": 1.0, "interval": None, "n": 9, "protocol": {"judge": 1}}
