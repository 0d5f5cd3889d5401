"""Models side by side: like scores pass, unlike ones are refused by name, or marked."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from eval.comparison import compare, run_names
from eval.comparison_table import comparison_json, comparison_text
from eval.names import score_name
from eval.protocol import protocol, record
from eval.statistics import Estimate
from eval.table import table, wrapped
from tokenloom.cli import main

FEATURES = {"name": "inception", "weights": "ab" * 32, "resize": "tf1"}


def entry(name: str, of: str, value: float, *, n: int = 5000, reach: float = 0.1, **facts: Any) -> dict[str, Any]:
    told = {"features": FEATURES, "num_generated": n, "reference": "ef", **facts}
    tap = told.pop("tap", None)
    spread = Estimate(value, (value - reach, value + reach))
    return record(name, of, spread, n=n, protocol=protocol(**told), tap=tap)


def scores(value: float, **facts: Any) -> list[dict[str, Any]]:
    """What a run has: the floor, a generator, its tokenizer and two probes."""
    fid = score_name("fd", features="inception", n=facts.get("n", 5000))
    probe = {"features": None, "num_generated": None, "settings": {"c_grid": [1.0]}}
    return [
        entry("fid5k", "real", 1.5),
        entry("kid", "real", 0.001),
        entry(fid, "diffusion", value, **facts),
        entry("kid", "diffusion", value / 1000, **facts),
        entry("psnr", "tokenizer", 20 + value, num_generated=None, features=None),
        entry("probe_top1", "pixels", 0.5, tap="pixels", **probe),
        entry("probe_top1", "diffusion", 0.8, tap="dit.block1", **probe),
    ]


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(records))
    return path


def runs(folder: Path, *facts: dict[str, Any]) -> list[Path]:
    """Run folders a, b, ... whose samples have these facts in their protocols, and FIDs 3, 5, ..."""
    names = [folder / "runs" / "abc"[place] for place in range(len(facts))]
    for place, (run, told) in enumerate(zip(names, facts, strict=True)):
        write(run / "eval" / "metrics.json", scores(3.0 + 2 * place, **told))
    return names


def test_equal_protocols_pass_and_baselines_are_told_once(tmp_path: Path) -> None:
    found = compare(runs(tmp_path, {"subject": {"guidance": 1.0}}, {"subject": {"guidance": 2.0}}))
    labels = {title: [model.label for model in found.rows(title)] for title in found.columns}
    assert labels == {
        "Generators": ["real", "a/diffusion", "b/diffusion"],
        "Tokenizers": ["a/tokenizer", "b/tokenizer"],
        "Probes": ["pixels", "a/diffusion", "b/diffusion"],
    }
    assert found.columns["Generators"] == ["fid", "kid"] and not found.unlike
    lines = comparison_text(found, 200).splitlines()
    assert lines[1].split() == ["fid5k", "kid"]
    assert next(line.split()[:4] for line in lines if "/diffusion" in line) == ["a/diffusion", "3", "+-", "0.1"]
    assert "a/diffusion  guidance 1.0" in lines and "b/diffusion  guidance 2.0" in lines
    assert "inception, n 5,000" in lines[2]  # kid's name does not tell its features


def test_baselines_that_differ_are_told_apart(tmp_path: Path) -> None:
    a, b = runs(tmp_path, {}, {})
    write(b / "eval" / "metrics.json", [entry("fid5k", "real", 1.6), *scores(5.0)[1:]])
    labels = {model.label for model in compare([a, b]).models}
    assert {"a/real", "b/real", "pixels"} <= labels and "real" not in labels


def test_one_file_lists_its_models(tmp_path: Path) -> None:
    (run,) = runs(tmp_path, {})
    found = compare([run])
    assert [model.label for model in found.models] == ["real", "diffusion", "tokenizer", "pixels"]
    assert compare([run, run / "eval" / "metrics.json"]).models == found.models


def test_unlike_scores_are_refused_by_name(tmp_path: Path) -> None:
    other = {**FEATURES, "resize": "clean"}
    paths = runs(tmp_path, {}, {"n": 500}, {"features": other})
    with pytest.raises(ValueError, match=r"--only.*--force") as refusal:
        compare(paths)
    told = str(refusal.value)
    assert "fid, kid of b/diffusion unlike a/diffusion: num_generated 5000 | 500" in told
    assert "fid, kid of c/diffusion unlike a/diffusion: features.resize tf1 | clean" in told
    assert "psnr" not in told and "real" not in told
    assert not compare(paths, only=["psnr", "probe_top1"]).unlike


def test_real_images_are_marked_and_stop_nothing(tmp_path: Path) -> None:
    """Held against a part of themselves, where the model is held against all of them."""
    records = [entry("fid5k", "real", 1.5, num_real=4000, reference="aa"), entry("fid5k", "made", 3.0, num_real=5000)]
    found = compare([write(tmp_path / "a.json", records)])
    assert set(found.unlike) == {("real", "fid")}
    text = comparison_text(found, 200)
    assert "[1] unlike made: num_real 5000 | 4000; reference ef | aa" in text
    assert [line.endswith("[1]") for line in text.splitlines() if line.startswith(("real", "made"))] == [True, False]
    refused = [*records, entry("fid5k", "other", 2.0, num_real=4000)]
    with pytest.raises(ValueError, match="fid of other unlike made: num_real 5000") as refusal:
        compare([write(tmp_path / "a.json", refused)])
    assert "real unlike" not in str(refusal.value)


def test_json_has_no_number_that_is_not_finite(tmp_path: Path) -> None:
    odd = entry("fid5k", "a", math.nan, settings={"limit": math.inf}, subject={"guidance": math.inf})
    paths = [write(tmp_path / "a.json", [odd]), write(tmp_path / "b.json", [entry("fid5k", "a", 1.0)])]

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    (told,) = json.loads(comparison_json(compare(paths, force=True)), parse_constant=refuse)["tables"]
    cell = told["rows"][0]["scores"]["fid"]
    assert (cell["value"], cell["interval"]) == (None, [None, None])
    assert "nan" in comparison_text(compare(paths, force=True), 200)


def test_force_marks_what_is_unlike(tmp_path: Path) -> None:
    found = compare(runs(tmp_path, {}, {"n": 500}), force=True)
    assert set(found.unlike) == {("b/diffusion", "fid"), ("b/diffusion", "kid")}
    assert found.columns["Generators"] == ["fid", "kid"]
    text = comparison_text(found, 200)
    mine, marked = (line for line in text.splitlines()[:8] if "/diffusion" in line)
    assert marked.count("[1]") == 2 and "n 500" in marked and "[1]" not in mine
    assert "[1] unlike a/diffusion: num_generated 5000 | 500" in text
    told = json.loads(comparison_json(found))["tables"][0]["rows"]
    assert told[2]["scores"]["fid"]["unlike"] == {"num_generated": [5000, 500]}
    assert "unlike" not in told[1]["scores"]["fid"]
    assert "*" not in text.split("Tokenizers")[0]  # nothing is best among unlike scores


def test_schemes_of_labels_count_where_they_are_stated(tmp_path: Path) -> None:
    paths = runs(tmp_path, {}, {"labels": "balanced"}, {"labels": "unbalanced"})
    assert not compare(paths[:2]).unlike
    with pytest.raises(ValueError, match=r"c/diffusion unlike a/diffusion: labels balanced \| unbalanced"):
        compare(paths)
    records = [{**each, "protocol": {**each["protocol"], "labels": "unbalanced"}} for each in scores(1.0)[:2]]
    write(tmp_path / "d.json", [*records, *scores(1.0, labels="balanced")[2:]])
    assert not compare([tmp_path / "d.json"]).unlike  # real images are not drawn by class


def test_the_best_is_apart_from_all_others(tmp_path: Path) -> None:
    def starred(*figures: tuple[str, float, float]) -> list[str]:
        records = [entry("fid5k", subject, value, reach=reach) for subject, value, reach in figures]
        lines = comparison_text(compare([write(tmp_path / "one.json", records)]), 200).splitlines()
        return [line.split()[0] for line in lines if line.endswith(" *")]

    assert starred(("real", 1.0, 0.1), ("a", 3.0, 0.1), ("b", 4.0, 0.1)) == ["a"]
    assert starred(("a", 3.0, 0.6), ("b", 4.0, 0.6)) == []
    assert starred(("a", 3.0, 0.1), ("real", 1.0, 0.1)) == []
    unsure = [entry("psnr", "a", 30.0), {**entry("psnr", "b", 20.0), "interval": None}]
    assert "*" not in comparison_text(compare([write(tmp_path / "two.json", unsure)]), 200)
    higher = [entry("psnr", "a", 20.0), entry("psnr", "b", 30.0)]
    assert "b  30 +- 0.1 *" in comparison_text(compare([write(tmp_path / "three.json", higher)]), 200)


def test_only_takes_names_with_or_without_their_numbers(tmp_path: Path) -> None:
    records = [entry(name, "a", 1.0) for name in ("fid5k", "fid5k_clean", "fid_inf", "fd_x", "fd_inf_x")]
    path = write(tmp_path / "a.json", records + [{**each, "subject": "b"} for each in records])

    def columns(*only: str) -> list[str]:
        return compare([path], only=only).columns["Generators"]

    assert columns("fid") == columns("fid5k") == columns("fid500") == ["fid"]
    assert columns("fd") == ["fd_x"] and columns("fd_inf") == ["fd_inf_x"] and columns("fid_clean") == ["fid_clean"]
    assert columns() == ["fid", "fid_clean", "fid_inf", "fd_x", "fd_inf_x"]
    with pytest.raises(ValueError, match=r"--only fdi: no such score; there are fd_inf_x, .*fid_inf"):
        columns("fid", "fdi")


def test_nothing_to_compare(tmp_path: Path) -> None:
    a = write(tmp_path / "a.json", [entry("psnr", "tokenizer", 1.0)])
    b = write(tmp_path / "b.json", [entry("ssim", "tokenizer", 1.0)])
    with pytest.raises(ValueError, match=r"no score is in more than one model of .*a\.json, .*b\.json"):
        compare([a, b])
    (tmp_path / "nowhere").mkdir()
    with pytest.raises(ValueError, match=r"nowhere.*eval.*metrics\.json: no such file"):
        compare([tmp_path / "nowhere"])


def test_names_of_runs_are_short_and_apart() -> None:
    paths = ["s/cosine/seed-0/eval/metrics.json", "s/laplace/seed-0/eval/metrics.json", "x/other.json"]
    assert run_names([Path(path) for path in paths]) == ["cosine/seed-0", "laplace/seed-0", "x/other"]
    assert run_names([Path("runs/a/eval/metrics.json"), Path("out/b/metrics.json")]) == ["a", "b"]
    assert run_names([Path("runs/a.json"), Path("runs/a/metrics.json")]) == ["runs/a.json", "runs/a/metrics.json"]
    assert run_names([Path("a.json")]) == [""]


def test_several_taps_of_one_score_have_columns_of_their_own(tmp_path: Path) -> None:
    taps = [entry("probe_top1", subject, 0.5, tap=tap) for subject in "ab" for tap in ("block1", "block2")]
    found = compare([write(tmp_path / "a.json", taps)])
    assert found.columns == {"Probes": ["probe_top1 at block1", "probe_top1 at block2"]}


def test_tables_are_wrapped_without_cutting_numbers() -> None:
    rows = [["", "first", "second", "third"], ["", "n 5", "", ""], ["a row", "1.5 +- 0.1", "123456.7", "8"]]
    wide, narrow = wrapped(rows, 80, head=2), wrapped(rows, 24, head=2)
    assert wide.splitlines()[0].split() == ["first", "second", "third"] and len(wide.splitlines()) == 4
    assert max(map(len, narrow.splitlines())) <= 24
    assert all(cell in narrow for cell in ("1.5 +- 0.1", "123456.7", "third"))
    assert narrow.count("a row") == 2  # the second and the third share a table, whose head is one line
    assert wrapped(rows, 5, head=2).count("a row") == 3  # too wide, but whole


def test_the_table_of_an_evaluation_has_the_floor_beside() -> None:
    records = [entry("fid5k", "real", 1.5), entry("fid5k", "diffusion", 3.0), entry("psnr", "tokenizer", 20.0)]
    records += [entry("fid5k", "odd", 4.0, features={**FEATURES, "name": "other"})]
    head, real, made, psnr, odd = (line.split("  ") for line in table(records).splitlines())
    assert head[-1].strip() == "real images"
    assert made[0] == "diffusion" and made[-1].strip() == "1.5"
    assert "5,000" in "".join(made)
    assert real[-1].strip() == "inception" and odd[-1].strip() == "other"
    assert psnr[-1].strip() != "1.5"


def test_the_command_compares_runs(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    a, b = map(str, runs(tmp_path, {}, {"n": 500}))
    with pytest.raises(SystemExit):
        main(["compare", a, b])
    assert "num_generated 5000 | 500" in capsys.readouterr().err
    main(["compare", a, "--force", b, "--only", "fid,psnr"])
    text = capsys.readouterr().out
    assert "kid" not in text and "[1]" in text and max(map(len, text.splitlines())) <= 60
    main(["compare", a, b, "--only=psnr", "--json"])
    (told,) = json.loads(capsys.readouterr().out)["tables"]
    assert [row["scores"]["psnr"]["value"] for row in told["rows"]] == [23.0, 25.0]


def test_likelihoods_of_other_codes_stand_apart_and_stop_nothing(tmp_path: Path) -> None:
    def file(name: str, tokenizer: str) -> Path:
        nll = entry("nll", "autoregressive", 4.0, settings={"unit": "nats per code", "tokenizer": tokenizer})
        (tmp_path / name).write_text(json.dumps([nll, entry("fid5k", "autoregressive", 9.0)]))
        return tmp_path / name

    paths = [file("a.json", "abcdef99"), file("b.json", "123456ff")]
    columns = compare(paths).columns["Generators"]
    assert {"nll at codes abcdef", "nll at codes 123456"} <= set(columns)
    assert "nll" in compare([paths[0], file("c.json", "abcdef99")]).columns["Generators"]
