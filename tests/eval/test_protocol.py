import json

import pytest

from eval.protocol import (
    comparable,
    compare,
    comparison_table,
    merge_scores,
    protocol,
    protocol_hash,
    read_scores,
    record,
)
from eval.statistics import Estimate

FEATURES = {"name": "random", "weights": "ab", "resize": "none"}


def stated(**changes: object) -> dict:
    facts = {"features": FEATURES, "size": 32, "num_real": 500, "num_generated": 500, "reference": "ef"}
    return protocol(**{**facts, **changes})


def test_what_is_scored_may_differ_how_it_is_scored_may_not() -> None:
    a = stated(subject={"guidance": 1.0, "weights": "ema"})
    assert comparable(a, stated(subject={"guidance": 4.0, "weights": "raw"})) == []
    assert comparable(a, stated(num_generated=1000)) == ["num_generated"]
    assert comparable(a, stated(features={**FEATURES, "weights": "cd"})) == ["features.weights"]
    other = stated(features={**FEATURES, "resize": "bicubic"}, reference="00")
    assert comparable(a, other) == ["features.resize", "reference"]


def test_hash_is_equal_just_when_scores_are_alike() -> None:
    assert stated()["hash"] == stated(subject={"seeds": [0, 1]})["hash"] == protocol_hash(stated())
    assert stated()["hash"] != stated(size=64)["hash"]


def test_record_is_plain_json() -> None:
    entry = record("fd_random", "diffusion", Estimate(1.5, (1.0, 2.0)), n=500, protocol=stated(), tap="block.1")
    assert json.loads(json.dumps(entry)) == entry
    assert (entry["value"], entry["interval"], entry["tap"]) == (1.5, [1.0, 2.0], "block.1")
    assert record("usage", "tokenizer", 0.5, n=9, protocol=stated())["interval"] is None


def test_new_scores_replace_those_of_the_same_name_and_subject(tmp_path) -> None:
    path = tmp_path / "eval" / "metrics.json"
    merge_scores(path, [record("psnr", "tokenizer", 20.0, n=9, protocol=stated())])
    merge_scores(path, [record("probe_top1", "tokenizer", 0.5, n=9, protocol=stated(), tap="encoder.0")])
    merge_scores(path, [record("psnr", "tokenizer", 25.0, n=9, protocol=stated())])
    assert {entry["name"]: entry["value"] for entry in read_scores(path)} == {"psnr": 25.0, "probe_top1": 0.5}


def test_a_better_tap_takes_the_place_of_the_old_one(tmp_path) -> None:
    path = tmp_path / "metrics.json"
    taps = [record("probe_top1", "tokenizer", 0.5, n=9, protocol=stated(), tap=f"encoder.{n}") for n in range(3)]
    merge_scores(path, taps[:2])
    assert len(read_scores(path)) == 2
    merge_scores(path, taps[2:])
    assert [entry["tap"] for entry in read_scores(path)] == ["encoder.2"]


def test_unlike_scores_are_not_compared(tmp_path) -> None:
    paths = [tmp_path / "a.json", tmp_path / "b.json", tmp_path / "c.json"]
    for path, num, value in zip(paths, (500, 500, 200), (3.0, 4.0, 5.0), strict=True):
        merge_scores(path, [record("fd_random", "diffusion", value, n=num, protocol=stated(num_generated=num))])
    rows = compare(paths[:2])
    assert [score["value"] for score in rows[0]["scores"]] == [3.0, 4.0]
    assert comparison_table(paths[:2]).splitlines()[1].split() == ["diffusion", "fd_random", "3", "4"]
    with pytest.raises(ValueError, match=r"(?s)fd_random of .* measured differently.*num_generated: 500 \| 200"):
        compare(paths)


def test_nothing_to_compare(tmp_path) -> None:
    merge_scores(tmp_path / "a.json", [record("psnr", "tokenizer", 1.0, n=1, protocol=stated())])
    merge_scores(tmp_path / "b.json", [record("ssim", "tokenizer", 1.0, n=1, protocol=stated())])
    with pytest.raises(ValueError, match="no score is in all of"):
        compare([tmp_path / "a.json", tmp_path / "b.json"])
    with pytest.raises(ValueError, match="at least two"):
        compare([tmp_path / "a.json"])
    with pytest.raises(ValueError, match="no such file"):
        read_scores(tmp_path / "absent.json")
    (tmp_path / "broken.json").write_text('{"a": 1')
    with pytest.raises(ValueError, match="delete it and score again"):
        read_scores(tmp_path / "broken.json")
