"""Optimised steps: the descent of a trained model's bound, its end and resumption, and who samples in what it finds."""

import dataclasses
import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import generator.align as aligning
from engine.checkpoint import load_model, save_model, write_json
from engine.config import DataConfig, RunConfig, TrainConfig
from engine.device import Device
from engine.shards import open_shards
from engine.snapshots import write_snapshot
from generator.align import Search, Stage, align_steps, start_stops
from generator.align_config import AlignConfig
from generator.align_measures import Bound, Probe, at_any_levels
from generator.aligned_steps import check_coming, copy_aligned, read_aligned
from generator.config import (
    DenoiserModelConfig,
    DiffusionConfig,
    DiffusionSampleConfig,
    LearnedScheduleConfig,
    ScheduleConfig,
)
from generator.descent import sweep, total
from generator.diffusion import Diffusion
from generator.inputs import choose_inputs
from generator.klub import anchors, step_bounds
from generator.sample import sample_request
from generator.snapshots import load_generator
from generator.steps import along, solver_levels
from generator.train import train_generator
from tokenizer.model import load_tokenizer

ALIGN = AlignConfig(num_images=8, num_steps=4, subdivisions=1, candidates=3, max_sweeps=4, probe_images=20, patience=2)
CONFIG = DiffusionConfig(
    model=DenoiserModelConfig(preset="tiny", depth=1, width=16, heads=2),
    train=TrainConfig(steps=6, batch_size=16, learning_rate=1e-2, log_every=2, preview_every=3, checkpoint_every=6),
    sample=DiffusionSampleConfig(num_steps=4, guidance=1.5, batch_size=10, steps="aligned"),
    align=ALIGN,
)


class Pretended:
    """A judge that says what it is told to say, one distance after the other, then the last one for ever."""

    name = "fd_pretended"

    def __init__(self, *distances: float) -> None:
        self.distances, self.seen = list(distances), list[Tensor]()

    def see(self, latents: Tensor) -> Tensor:
        self.seen.append(latents)
        return latents.flatten(1)

    def distance(self, features: Tensor) -> float:
        return self.distances.pop(0) if len(self.distances) > 1 else self.distances[0]


@pytest.fixture(scope="module")
def trained(encoded: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a diffusion model, which was trained, previews and all, with steps=aligned before there were any."""
    root = tmp_path_factory.mktemp("trained")
    for part in ("tokenizer", "codes"):
        (root / "counting").mkdir(exist_ok=True)
        (root / "counting" / part).symlink_to(encoded / part)
    run = RunConfig(name="counting", root=str(root), device="cpu", precision="fp32", threads=1)
    folder = train_generator(run=run, data=DataConfig(size=16), config=CONFIG, family="diffusion", device=Device(run))
    assert sorted(path.name for path in (folder / "previews").glob("*samples.png"))
    return root / "counting"


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> RunConfig:
    """A copy of the trained run."""
    folder = tmp_path / "counting"
    folder.mkdir()
    for part in ("tokenizer", "codes"):
        (folder / part).symlink_to((trained / part).resolve())
    card, weights = load_model(trained / "diffusion")
    save_model(folder / "diffusion", weights, card)
    return RunConfig(name="counting", root=str(tmp_path), device="cpu", precision="fp32", threads=1)


def find(run: RunConfig, *distances: float, config: DiffusionConfig = CONFIG) -> dict[str, Any]:
    """steps.json after an optimisation that is judged as pretended."""
    path = align_steps(run=run, config=config, device=Device(run), judge=lambda: Pretended(*(distances or (1.0,))))
    told: dict[str, Any] = json.loads(path.read_text())
    return told


def opened(run: RunConfig) -> Diffusion:
    found = load_generator(run.folder, "diffusion")
    assert isinstance(found, Diffusion)
    return found


def bound_of(run: RunConfig, device: Any = None, num: int = 24, **sample: Any) -> Bound:
    settings = dataclasses.replace(CONFIG.sample, **sample)
    shards = open_shards(run.folder / "codes" / "train")
    return Bound(opened(run), settings, shards, device or Device(run), num=num, seed=0, sigma_data=1.0)


# What is found


def test_bounds_fall_and_levels_rise_in_every_schedule(run: RunConfig) -> None:
    told = find(run, 3.0, 2.0, 1.0)
    first, finest = told["stages"]
    assert [first["num_steps"], finest["num_steps"]] == [4, 8]
    for stage in told["stages"]:
        assert all(after < before for before, after in pairwise(stage["bounds"]))
        assert len(stage["bounds"]) >= 2
        assert all(here < there for here, there in pairwise(stage["stops"]))
        assert (stage["stops"][0], stage["stops"][-1]) == (-10.0, 7.0)
    assert finest["stops"][::2] == first["stops"]  # only the new ones have moved
    assert finest["stops"] == told["stops"] and finest["distances"] == []
    start = start_stops(ALIGN, CONFIG.sample)
    assert all(here != there for here, there in zip(first["stops"][1:-1], start[1:-1], strict=True))


def test_the_first_bound_is_that_of_the_schedule_it_begins_with(run: RunConfig) -> None:
    cost, stops = bound_of(run, num=8), start_stops(ALIGN, CONFIG.sample)
    expected = sum(cost(here, there) for here, there in pairwise(stops))
    assert find(run)["stages"][0]["bounds"][0] == pytest.approx(expected, rel=1e-12)


def test_the_descent_keeps_what_samples_best_and_ends_when_patience_does(run: RunConfig) -> None:
    first = find(run, 5.0, 3.0, 4.0, 3.5, 1.0)["stages"][0]
    assert first["distances"] == [5.0, 3.0, 4.0, 3.5]  # two sweeps after the best one
    assert first["sweeps"] == 1 and len(first["bounds"]) == 4
    again = dataclasses.replace(CONFIG, align=dataclasses.replace(ALIGN, max_sweeps=1))
    assert find(run, 5.0, 3.0, config=again)["stages"][0]["stops"] == first["stops"]


def test_the_schedule_to_begin_with_is_kept_if_nothing_samples_better(run: RunConfig) -> None:
    first = find(run, 1.0, 2.0)["stages"][0]
    assert first["sweeps"] == 0 and first["stops"] == start_stops(ALIGN, CONFIG.sample)


def test_without_a_probe_the_descent_goes_on_to_the_end(run: RunConfig) -> None:
    align = AlignConfig(num_images=8, num_steps=4, subdivisions=0, candidates=5, max_sweeps=60, probe_images=0)
    told = find(run, config=dataclasses.replace(CONFIG, align=align))
    first, cost = told["stages"][0], bound_of(run, num=8)
    assert first["distances"] == [] and told["distance"] is None
    assert first["sweeps"] == len(first["bounds"]) - 1 < 60
    again = sweep(told["stops"], cost, range(1, 4), candidates=5)
    assert total(again, cost) > first["bounds"][-1] * 0.999


def test_start_schedules_end_where_the_last_step_does() -> None:
    sample = DiffusionSampleConfig(first_logsnr=-8.0)  # whose own last level, 10, has no part in it
    for start in ("karras", "logsnr"):
        stops = start_stops(AlignConfig(start=start, num_steps=5), sample)  # type: ignore[arg-type]
        assert stops == pytest.approx(solver_levels(start, 6, first=-8.0, last=7.0).tolist())
        assert (stops[0], stops[-1]) == (-8.0, 7.0)
    cosine = start_stops(AlignConfig(start="cosine", num_steps=5, last_logsnr=6.0), sample)
    assert cosine == pytest.approx([*solver_levels("cosine", 5, first=-8.0, last=6.0).tolist(), 6.0])
    stop = float(solver_levels("cosine", 5, first=-8.0, last=9.0)[-1])
    DiffusionConfig(sample=sample, align=AlignConfig(num_steps=5, last_logsnr=stop + 1e-6))
    with pytest.raises(ValueError, match=rf"align\.start=cosine stops at log SNR {stop:.6g} with num_steps=5"):
        DiffusionConfig(sample=sample, align=AlignConfig(num_steps=5, last_logsnr=stop - 1e-6))


# Measures


def test_a_bound_is_the_mean_over_all_latents_however_they_are_divided(run: RunConfig) -> None:
    whole, parts = bound_of(run, batch_size=24), bound_of(run, batch_size=7)
    assert parts(-2.0, 1.0) == pytest.approx(whole(-2.0, 1.0), rel=1e-4)
    x0, noise, fresh, u = whole.draws
    denoise = opened(run).denoiser(whole.rows, CONFIG.sample)
    with torch.inference_mode():
        anchor = anchors(denoise, x0, noise, -2.0)
        values = step_bounds(denoise, anchor, (x0, noise, fresh, u), start=-2.0, end=1.0, sigma_data=1.0)
    assert whole(-2.0, 1.0) == pytest.approx(float(values.mean()), rel=1e-6)
    assert u.min() < 1 / 24 and u.max() > 23 / 24 and len(u) == 24  # one in each part


def test_processes_share_a_bound_between_them(run: RunConfig) -> None:
    """Each has its batches; the sums together are those of one process, to the bit."""

    class Rank:
        device, world = torch.device("cpu"), 2

        def __init__(self, rank: int) -> None:
            self.rank = rank

        def collect(self, values: list[Any]) -> list[Any]:
            return gathered.get(1 - self.rank, []) + gathered.setdefault(self.rank, list(values))

    gathered: dict[int, list[Any]] = {}
    bound_of(run, Rank(0))(-1.0, 2.0)
    assert bound_of(run, Rank(1))(-1.0, 2.0) == bound_of(run)(-1.0, 2.0)
    assert len(gathered[0]) == 2 and len(gathered[1]) == 1


def test_rows_at_different_levels_are_guided_as_each_would_be_alone(run: RunConfig) -> None:
    generator = opened(run)
    settings = dataclasses.replace(CONFIG.sample, guidance=3.0, guidance_first=-1.0, guidance_last=2.0)
    levels, rows = torch.tensor([-5.0, -1.0, 0.0, 2.0, 4.0, 1.0]), torch.tensor([0, 1, 2, 0, 1, 3])
    z = torch.randn(6, *generator.network.latent_shape, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        together = at_any_levels(generator, settings, rows)(z, levels)
        for row in range(6):
            one = slice(row, row + 1)
            alone = generator.denoiser(rows[one], settings)(z[one], levels[one])
            torch.testing.assert_close(together[one], alone, rtol=1e-4, atol=1e-5)
        plain = generator.denoiser(rows, dataclasses.replace(settings, guidance=1.0))(z, levels)
    assert [bool((each - other).abs().max() > 1e-3) for each, other in zip(together, plain, strict=True)] == [
        False, True, True, True, False, False  # guided inside the interval, where the last row has no class
    ]  # fmt: skip


def test_the_probe_draws_the_same_samples_at_all_but_the_last_stop(run: RunConfig) -> None:
    judge, generator = Pretended(1.0), opened(run)
    shards = open_shards(run.folder / "codes" / "train")
    probe = Probe(generator, CONFIG.sample, shards, Device(run), num=20, seed=0, judge=judge)
    stops = [-6.0, -1.0, 2.0, 9.0]
    assert probe(stops) == 1.0 and [len(part) for part in judge.seen] == [10, 10]
    settings = dataclasses.replace(CONFIG.sample, steps="list", levels=(-6.0, -1.0, 2.0))
    torch.testing.assert_close(judge.seen[1], generator.sample_rows(probe.rows[10:], probe.seeds[10:], settings))
    probe([*stops[:-1], 9.5])
    assert torch.equal(judge.seen[3], judge.seen[1])
    assert set(probe.seeds).isdisjoint(range(10**6))  # samples for scores come from these


# Resumption


def test_interrupted_equals_uninterrupted(run: RunConfig, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    distances = {0: 5.0, 1: 3.0, 2: 4.0, 3: 2.0, 4: 4.0}  # by how often the schedule has been seen to change

    class Repeatable(Pretended):
        def distance(self, features: Tensor) -> float:
            return round(float(features.double().square().sum()), 9) % 7  # of the samples alone

    def once() -> None:
        align_steps(run=run, config=CONFIG, device=Device(run), judge=lambda: Repeatable(*distances.values()))

    once()
    path = run.folder / "diffusion" / "steps.json"
    expected, writes = path.read_bytes(), [0]
    total = len(json.loads(expected)["stages"][0]["bounds"]) + len(json.loads(expected)["stages"][1]["bounds"])
    for stop in range(1, total):
        path.unlink()
        writes[0] = 0

        def cut(target: Path, content: Any, stop: int = stop) -> None:
            write_json(target, content)
            writes[0] += 1
            if writes[0] == stop:
                raise KeyboardInterrupt

        monkeypatch.setattr(aligning, "write_json", cut)
        with pytest.raises(KeyboardInterrupt):
            once()
        assert not path.exists() and (path.parent / "steps-draft.json").exists()
        monkeypatch.setattr(aligning, "write_json", write_json)
        once()
        assert path.read_bytes() == expected, f"after {stop} sweeps"
        assert not (path.parent / "steps-draft.json").exists()


def test_what_is_found_is_left_alone_until_something_else_is_asked(run: RunConfig) -> None:
    def refused() -> Any:
        raise AssertionError("the judge is not needed")

    before = find(run)
    path = align_steps(run=run, config=CONFIG, device=Device(run), judge=refused)
    assert json.loads(path.read_text()) == before
    (path.parent / "steps-draft.json").write_text("{cut")  # what a killed process may leave of another file system
    unguided = dataclasses.replace(CONFIG, sample=dataclasses.replace(CONFIG.sample, guidance=1.0))
    after = find(run, config=unguided)
    assert after["identity"] != before["identity"] and after["stages"][0]["bounds"] != before["stages"][0]["bounds"]


def test_a_stage_reads_back_as_it_was_written() -> None:
    stage = Stage(stops=[0.1, 1 / 3, 2.0], bounds=[3.0, 2.0], distances=[0.7, 0.1], best=1, kept=[0.1, 0.3, 2.0])
    assert Stage(**json.loads(json.dumps(dataclasses.asdict(stage)))) == stage
    assert (stage.num_steps, stage.sweeps) == (2, 1)
    assert Search.__name__  # the stages are its own


# Who samples in them


def test_samples_take_the_optimised_levels_in_any_number(run: RunConfig) -> None:
    stops = find(run)["stops"]
    generator = opened(run)
    for num in (4, 8, 3, 20):
        levels = generator.levels(dataclasses.replace(CONFIG.sample, num_steps=num))
        assert levels.tolist() == along(stops, num).tolist() and len(levels) == num
    listed = dataclasses.replace(CONFIG.sample, steps="list", levels=tuple(stops[:-1:2]))
    one, other = (generator.sample(None, [3, 4], **dataclasses.asdict(each)) for each in (CONFIG.sample, listed))
    assert not torch.equal(one, generator.sample(None, [3, 4], num_steps=4)) and torch.equal(one, other)


def test_without_steps_the_command_is_named(run: RunConfig) -> None:
    with pytest.raises(ValueError, match=r"steps=aligned .* there are none: run `tokenloom steps --config"):
        opened(run).sample(None, [0], steps="aligned")
    assert opened(run).sample(None, [0], steps="karras", num_steps=2).isfinite().all()


def test_steps_of_another_network_or_damaged_ones_are_refused_where_they_are_wanted(run: RunConfig) -> None:
    find(run)
    folder = run.folder / "diffusion"
    card, weights = load_model(folder)
    save_model(folder, {name: 1.01 * value for name, value in weights.items()}, card)
    with pytest.raises(
        ValueError, match=r"steps\.json was made for the network \w+, but here is \w+; run `tokenloom s"
    ):
        opened(run).sample(None, [0], steps="aligned")
    assert opened(run).sample(None, [0], steps="karras", num_steps=2).isfinite().all()
    find(run)  # anew for the network that is there
    assert len(opened(run).levels(CONFIG.sample)) == 4
    for content, message in (("{", "is damaged"), ('{"model": "a", "stops": [2, 1]}', "its stops must rise")):
        (folder / "steps.json").write_text(content)
        with pytest.raises(ValueError, match=rf"diffusion\.sample\.steps=aligned: .*steps\.json.*{message}"):
            opened(run).sample(None, [0], steps="aligned")


def test_a_damaged_file_gives_way_to_a_new_one(run: RunConfig) -> None:
    before = find(run)
    (run.folder / "diffusion" / "steps.json").write_text("{")
    assert find(run) == before


def test_snapshots_of_the_training_take_the_same_steps(run: RunConfig) -> None:
    stops = find(run)["stops"]
    _, weights = load_model(run.folder / "diffusion")
    halves = {name: value / 2 for name, value in weights.items()}
    write_snapshot(run.folder / "diffusion" / "snapshots", 3, updates=3, model=halves, widths={})
    snapshot = load_generator(run.folder, "diffusion", snapshot=3)
    assert isinstance(snapshot, Diffusion) and snapshot.fingerprint != opened(run).fingerprint
    assert snapshot.levels(CONFIG.sample).tolist() == along(stops, 4).tolist()


def test_other_steps_are_other_samples(run: RunConfig) -> None:
    find(run)
    tokenizer = load_tokenizer(run.folder)

    def request(config: DiffusionConfig) -> dict[str, Any]:
        generator = opened(run)
        inputs = choose_inputs(generator, run, num=2)
        return sample_request(generator, tokenizer, config, inputs, num=2)["settings"]

    before = request(CONFIG)
    assert before["steps"] == "aligned" and before["levels"] == opened(run).levels(CONFIG.sample).tolist()
    find(run, 5.0, 1.0, config=dataclasses.replace(CONFIG, align=dataclasses.replace(ALIGN, max_sweeps=1)))
    assert request(CONFIG) != before
    plain = dataclasses.replace(CONFIG, sample=dataclasses.replace(CONFIG.sample, steps="karras"))
    assert request(plain)["levels"] == []


def test_a_copy_of_the_model_takes_its_steps_along(run: RunConfig, tmp_path: Path) -> None:
    folder, out = run.folder / "diffusion", tmp_path / "out"
    copy_aligned(folder, out, "unknown")
    assert not out.exists()
    stops = find(run)["stops"]
    card, weights = load_model(folder)
    fingerprint = save_model(out, {name: 2 * value for name, value in weights.items()}, card)
    copy_aligned(folder, out, fingerprint)
    found = read_aligned(out)
    assert found is not None and found.usable() == tuple(stops)


# Refused before any work


def test_steps_that_will_never_come_are_named_before_training(run: RunConfig) -> None:
    stage, without = run.folder / "diffusion", dataclasses.replace(CONFIG, align=None)
    check_coming(CONFIG, stage)
    with pytest.raises(ValueError, match=r"steps=aligned, but no steps will be optimised: add .* diffusion\.align"):
        check_coming(without, stage)
    find(run)
    check_coming(without, stage)


def test_a_finished_training_does_not_depend_on_the_steps(run: RunConfig, trained: Path) -> None:
    weights = trained / "diffusion" / "model.json"
    before = weights.stat().st_mtime_ns
    own = RunConfig(name=trained.name, root=str(trained.parent), device="cpu", precision="fp32", threads=1)
    for align in (None, AlignConfig(num_steps=5)):
        config = dataclasses.replace(CONFIG, align=align)
        train_generator(run=own, data=DataConfig(size=16), config=config, family="diffusion", device=Device(own))
    assert weights.stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"candidates": 4}, r"diffusion\.align\.candidates=4 must be odd"),
        ({"candidates": 1}, r"candidates=1 must be at least 3"),
        ({"num_steps": 1}, r"num_steps=1 must be at least 2"),
        ({"probe_images": 10}, r"probe_images=10 are too few"),
        ({"probe_features": "classifier"}, r"probe_features=classifier is trained for the scores alone"),
        ({"probe_images": 0, "patience": 2}, r"patience=2 has no effect with probe_images=0"),
        ({"sigma_data": 0.0}, r"sigma_data=0\.0 must be positive"),
        ({"start": "flow"}, r"diffusion\.align\.start='flow' must be one of karras"),
        ({"first_logsnr": float("inf")}, r"diffusion\.align\.first_logsnr=inf must be finite"),
    ],
)
def test_settings_out_of_range_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AlignConfig(**values)


def test_settings_that_leave_no_room_are_refused() -> None:
    with pytest.raises(ValueError, match=r"align\.first_logsnr=7\.5 must lie below last_logsnr=7\.0"):
        DiffusionConfig(align=AlignConfig(first_logsnr=7.5))
    schedule = ScheduleConfig(kind="learned", learned=LearnedScheduleConfig(per="channel"))
    with pytest.raises(ValueError, match=r"schedule\.learned\.per=channel every channel has its own"):
        DiffusionConfig(align=ALIGN, schedule=schedule, sample=DiffusionSampleConfig(steps="time"))
    with pytest.raises(ValueError, match=r"from_zero_snr has no place in steps=aligned"):
        DiffusionSampleConfig(steps="aligned", from_zero_snr=True)


def test_previews_take_karras_steps_in_the_place_of_optimised_ones() -> None:
    assert CONFIG.sample.previewed == dataclasses.replace(CONFIG.sample, steps="karras")
    plain: Sequence[DiffusionSampleConfig] = (DiffusionSampleConfig(steps="flow"), DiffusionSampleConfig(steps="sdxl"))
    assert all(each.previewed is each for each in plain)
