"""Names and order of what is scored."""

from typing import Any

from tokenloom.score_table import score_tables, subject_title


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


def entry(subject: str) -> dict[str, Any]:
    return {"name": "fd_random", "subject": subject, "value": 1.0, "interval": None, "n": 9, "protocol": {"judge": 1}}
