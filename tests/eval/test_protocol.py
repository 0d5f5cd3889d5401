import json

import pytest

from eval.protocol import (
    checked_out,
    comparable,
    merge_scores,
    protocol,
    protocol_hash,
    read_scores,
    record,
    unlikeness,
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


def test_the_crop_of_real_images_is_told_by_their_pixels() -> None:
    """Samples in a folder are as stored, those of a run stand beside cropped real images; they may be the same."""
    assert comparable(stated(crop="adm_center"), stated(crop="as stored")) == []
    assert stated(crop="adm_center")["hash"] == stated(crop="as stored")["hash"] == stated()["hash"]


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


def test_a_subject_has_one_fid_whatever_the_number_of_images(tmp_path) -> None:
    path = tmp_path / "metrics.json"
    for name, subject in (("fid500", "a"), ("fid500_clean", "a"), ("fid_inf", "a"), ("fid500", "b"), ("fid5k", "a")):
        merge_scores(path, [record(name, subject, 1.0, n=9, protocol=stated())])
    names = [(entry["name"], entry["subject"]) for entry in read_scores(path)]
    assert names == [("fid500_clean", "a"), ("fid_inf", "a"), ("fid500", "b"), ("fid5k", "a")]
    merge_scores(path, [record("fid", "a", 1.0, n=50_000, protocol=stated())])
    assert [entry["name"] for entry in read_scores(path) if entry["subject"] == "a"][-1] == "fid"
    assert len(read_scores(path)) == 4


def test_label_schemes_matter_where_both_are_stated() -> None:
    balanced, unbalanced, silent = stated(labels="balanced"), stated(labels="unbalanced"), stated()
    assert unlikeness(balanced, unbalanced) == {"labels": ("balanced", "unbalanced")}
    assert comparable(balanced, silent) == comparable(silent, unbalanced) == []
    assert balanced["hash"] == silent["hash"]


def test_scores_of_an_older_judge_are_read_and_not_compared(tmp_path) -> None:
    """The layout of metrics.json that the first version wrote."""
    old = {"judge": 1, "features": FEATURES, "size": 32, "crop": "adm_center", "reference": "ef", "hash": "00"}
    old |= {"num_real": 500, "num_generated": 500, "code": "0.1.0", "torch": "2.14.1"}
    entry = {"name": "fid", "subject": "diffusion", "value": 3.0, "interval": None, "n": 500, "protocol": old}
    (tmp_path / "metrics.json").write_text(json.dumps([entry]))
    assert read_scores(tmp_path / "metrics.json") == [entry]
    assert comparable(old, stated(crop="adm_center")) == ["judge"]
    merge_scores(tmp_path / "metrics.json", [record("fid500", "diffusion", 4.0, n=500, protocol=stated())])
    assert [each["name"] for each in read_scores(tmp_path / "metrics.json")] == ["fid500"]


def test_a_checkout_tells_its_commit(tmp_path) -> None:
    commit, other = "0123456789abcdef" * 2 + "01234567", "f" * 40
    git = tmp_path / "home" / ".git"
    (git / "refs" / "heads" / "topic").mkdir(parents=True)
    assert checked_out(tmp_path) == ""  # no checkout
    assert checked_out(tmp_path / "home") == ""  # git has no HEAD yet
    (git / "HEAD").write_text("ref: refs/heads/topic/a\n")
    assert checked_out(tmp_path / "home") == ""  # a branch without a commit
    (git / "packed-refs").write_text(
        f"# pack-refs with: peeled\n{other} refs/heads/topic\n{commit} refs/heads/topic/a\n"
    )
    assert checked_out(tmp_path / "home") == commit[:12]
    (git / "refs" / "heads" / "topic" / "a").write_text(f"{other}\n")
    assert checked_out(tmp_path / "home") == other[:12]  # a branch's own file is newer than the pack
    (git / "HEAD").write_text(f"{commit}\n")
    assert checked_out(tmp_path / "home") == commit[:12]  # no branch
    (git / "HEAD").write_bytes(b"\xff\xfe")
    assert checked_out(tmp_path / "home") == ""


def test_a_linked_work_tree_tells_its_commit(tmp_path) -> None:
    git, linked = tmp_path / "home" / ".git", tmp_path / "home" / ".git" / "worktrees" / "second"
    for folder in (git / "refs" / "heads", linked, tmp_path / "second"):
        folder.mkdir(parents=True)
    (tmp_path / "second" / ".git").write_text(f"gitdir: {linked}\n")
    (linked / "commondir").write_text("../..\n")
    (linked / "HEAD").write_text("ref: refs/heads/second\n")
    (git / "refs" / "heads" / "second").write_text("a" * 40 + "\n")
    assert checked_out(tmp_path / "second") == "a" * 12


def test_broken_files_are_named(tmp_path) -> None:
    with pytest.raises(ValueError, match="no such file"):
        read_scores(tmp_path / "absent.json")
    whole = record("psnr", "tokenizer", 20.0, n=9, protocol=stated())
    broken = ['{"a": 1', "7", "[7]", '["psnr"]', "\xff", json.dumps(whole), json.dumps([{"name": "psnr"}])]
    broken += [json.dumps([{**whole, key: None}]) for key in ("name", "subject", "value", "protocol")]
    for text in broken:
        (tmp_path / "broken.json").write_text(text, encoding="latin-1")
        with pytest.raises(ValueError, match=r"broken\.json: not a list of .*; delete it and score again"):
            read_scores(tmp_path / "broken.json")
