"""Names of scores tell features and small numbers of images, and can be taken apart again."""

import pytest

from eval.names import (
    CHAPTERS,
    INCEPTION,
    ON_INCEPTION,
    OTHERS,
    answers_to,
    base_name,
    better,
    chapter_of,
    count_text,
    parts_of,
    rank,
    score_name,
)


def test_a_distance_is_called_fid_on_inception_alone() -> None:
    def names(features: str, n: int) -> list[str]:
        return [score_name(score, features=features, n=n) for score in ("fd", "rfd", "is", "fd_inf")]

    assert names("inception", 50_000) == ["fid", "rfid", "is", "fid_inf"]
    assert names("inception", 5_000) == ["fid5k", "rfid5k", "is", "fid_inf"]
    assert names("inception-clean", 10_000) == ["fid_clean", "rfid_clean", "is_clean", "fid_inf_clean"]
    assert names("inception-antialias", 500)[0] == "fid500_antialias"
    for other in ("random", "classifier", "dinov2_l", "inception-0a1b2c3d", "inception-0a1b2c3d-clean"):
        assert names(other, 500) == [f"fd_{other}", f"rfd_{other}", f"is_{other}", f"fd_inf_{other}"]


@pytest.mark.parametrize(
    ("n", "text"),
    [(359, "359"), (500, "500"), (1250, "1250"), (5000, "5k"), (9999, "9999"), (10_000, ""), (50_000, "")],
)
def test_a_number_is_told_below_ten_thousand(n: int, text: str) -> None:
    assert count_text(n) == text
    assert score_name("rfd", features="inception", n=n) == f"rfid{text}"


@pytest.mark.parametrize("features", [*INCEPTION, "random", "dinov2_vit_l", "inception-0a1b2c3d"])
@pytest.mark.parametrize("score", ON_INCEPTION)
@pytest.mark.parametrize("n", [500, 5000, 50_000])
def test_every_name_can_be_taken_apart(score: str, features: str, n: int) -> None:
    name, whole = score_name(score, features=features, n=n), score_name(score, features=features, n=10_000)
    inception = features in INCEPTION
    assert base_name(name) == whole
    assert parts_of(name).score == (ON_INCEPTION[score] if inception else score)
    assert parts_of(name).features == INCEPTION.get(features, features)
    assert parts_of(name).images == (count_text(n) if inception and score in ("fd", "rfd") else "")


@pytest.mark.parametrize("name", ["psnr", "usage_256", "kid", "is", "class_accuracy", "knn_top1", "odd_name", "fidget"])
def test_other_names_are_whole(name: str) -> None:
    assert parts_of(name) == (name, "", "")
    assert base_name(name) == name


@pytest.mark.parametrize("features", ["inf", "inf_x", "clean", "antialias"])
def test_features_may_not_be_named_like_a_part_of_a_name(features: str) -> None:
    with pytest.raises(ValueError, match=f"features named '{features}'.*rename"):
        score_name("fd", features=features, n=500)


def test_what_a_reader_asks_for_is_found() -> None:
    assert [answers_to(name, "fid") for name in ("fid", "fid5k", "fid_clean", "fid_inf", "rfid", "fd_x")] == [
        3,
        2,
        1,
        0,
        0,
        0,
    ]
    assert [answers_to(name, "fd") for name in ("fd_random", "fd_inf_random", "rfd_random")] == [1, 0, 0]
    assert answers_to("fid500", "fid5k") == 0
    assert answers_to("lpips_vgg", "lpips") == 1
    assert answers_to("usage_256", "usage") == 0


def test_chapters_and_ways() -> None:
    assert [chapter_of(name) for name in ("fid500_clean", "rfd_x", "probe_top5", "odd")] == [*CHAPTERS, OTHERS]
    assert [better(name) for name in ("fid5k", "is_random", "lpips_vgg", "odd")] == ["lower", "higher", "lower", ""]
    assert rank("fid5k") < rank("fd_random") < rank("kid") < rank("psnr") < rank("knn_top1") < rank("odd")
