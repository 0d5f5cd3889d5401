from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.optim import Lars

from engine.batches import StepRandom
from engine.config import DataConfig, RunConfig
from engine.device import Device, setup
from engine.images import ImageSet, Listing
from engine.sources import open_images
from eval import online_probe
from eval.config import OnlineProbeConfig
from eval.online_probe import BatchNorm, Heads, augmented, optimizer, score_heads, train_heads
from eval.probe import Labelled, probe_tap
from eval.taps import Representation, pixel_representation

PLAIN = {"min_scale": 1.0, "flip": False}
QUICK = OnlineProbeConfig(epochs=4, warmup_epochs=0.5, batch_size=32, learning_rates=(0.1, 1.0), **PLAIN)


@pytest.fixture(scope="module")
def device() -> Device:
    return setup(RunConfig(device="cpu", precision="fp32", threads=1))


@pytest.fixture(scope="module")
def digits() -> ImageSet:
    return open_images(DataConfig(size=8), "train")


def run_in(folder: Path) -> RunConfig:
    return RunConfig(name="run", root=str(folder), device="cpu", precision="fp32", threads=1)


def labelled(images: ImageSet, rows: np.ndarray) -> Labelled:
    batch = images.load(rows)
    return Labelled(pixel_representation().outputs(batch["images"])["pixels"], batch["labels"])


def test_separable_classes_are_read_off_perfectly(tmp_path: Path, device: Device) -> None:
    labels = np.arange(120) % 3
    colours = [np.full((8, 8, 3), 255 * np.eye(3)[label], np.uint8) for label in labels]
    from PIL import Image

    listing = Listing(labels=labels, read=lambda i: Image.fromarray(colours[i]), name=str, digest="colours")
    images = ImageSet(listing, size=8, split="train", origin={})
    heads = train_heads(
        QUICK, pixel_representation(), images=images, rows=np.arange(90), run=run_in(tmp_path), device=device
    )
    seen = labelled(images, np.arange(90, 120))
    score = score_heads(heads, "pixels", held_out=seen, test=seen)
    assert score.held_out == score.top1.value == 1.0 and score.top5 is None and score.setting in (0.1, 1.0)


def test_digits_come_near_logistic_regression(tmp_path: Path, device: Device, digits: ImageSet) -> None:
    test_set = open_images(DataConfig(size=8), "test")
    test = labelled(test_set, np.arange(len(test_set)))
    rows = np.random.default_rng(0).permutation(len(digits))[:900]
    fitted, held = rows[90:], rows[:90]
    config = OnlineProbeConfig(epochs=20, warmup_epochs=2, batch_size=64, learning_rates=(0.03, 0.3), **PLAIN)
    representation = pixel_representation()
    heads = train_heads(config, representation, images=digits, rows=fitted, run=run_in(tmp_path), device=device)
    online = score_heads(heads, "pixels", held_out=labelled(digits, held), test=test)
    offline = probe_tap("pixels", *labelled(digits, rows), *test, c_grid=(1e-3, 1e-2, 1e-1), held_out=0.1)
    assert offline.top1.value > 0.93
    assert online.top1.value == pytest.approx(offline.top1.value, abs=0.03)
    assert online.held_out > 0.9


def two_taps(facts: str = "") -> Representation:
    """Pixels, and their mean: two taps of different width."""

    def read(images: torch.Tensor, taps: Any) -> dict[str, torch.Tensor]:
        x = images.float().flatten(1)
        return {"two.wide": x, "two.narrow": x.mean(1, keepdim=True)}

    return Representation(
        name="two", subject="two", taps=("two.wide", "two.narrow"), read=read, facts={"generator": facts}
    )


@pytest.mark.parametrize("kind", ["sgd", "lars"])
def test_interrupted_equals_uninterrupted(
    kind: Any, tmp_path: Path, device: Device, digits: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = OnlineProbeConfig(epochs=1, warmup_epochs=0.3, batch_size=16, learning_rates=(0.1, 1.0), optimizer=kind)
    rows = np.arange(160)  # ten steps, a checkpoint at each

    def train(name: str) -> Heads:
        run = run_in(tmp_path / name)
        return train_heads(config, two_taps(), images=digits, rows=rows, run=run, device=device)

    whole = train("whole")
    step, seen = online_probe.ProbeTask.step, []

    def stopping(self: Any, *arguments: Any) -> Any:
        seen.append(1)
        if len(seen) == 6:
            raise KeyboardInterrupt
        return step(self, *arguments)

    monkeypatch.setattr(online_probe.ProbeTask, "step", stopping)
    with pytest.raises(KeyboardInterrupt):
        train("parts")
    resumed = train("parts")
    assert len(seen) == 6 + 5  # the sixth step is done again
    state = whole.state_dict()
    assert state.keys() == resumed.state_dict().keys() and {"norms.0.mean", "norms.1.variance"} <= state.keys()
    for name, value in resumed.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert not torch.equal(state["norms.0.mean"], torch.zeros(192))
    seen.clear()
    train("parts")
    assert not seen  # finished: nothing is trained again


def test_other_settings_are_another_probe_and_take_its_place(tmp_path: Path, device: Device, digits: ImageSet) -> None:
    run, found = run_in(tmp_path), []
    for epochs in (2, 1, 1):
        config = OnlineProbeConfig(epochs=epochs, warmup_epochs=0, batch_size=32, learning_rates=(0.1,))
        found.append(train_heads(config, two_taps(), images=digits, rows=np.arange(64), run=run, device=device))
        assert [path.name for path in (run.folder / "eval" / "probe").iterdir()] == ["two"]
    first, second, again = (heads.linear[0][0].weight for heads in found)
    assert torch.equal(second, again) and not torch.equal(first, second)


def test_heads_of_another_model_are_not_taken(
    tmp_path: Path, device: Device, digits: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = OnlineProbeConfig(epochs=1, warmup_epochs=0, batch_size=32, learning_rates=(0.1,))
    step, steps = online_probe.ProbeTask.step, []
    monkeypatch.setattr(online_probe.ProbeTask, "step", lambda *given: steps.append(1) or step(*given))
    for facts, taken in (("a", 2), ("a", 2), ("b", 4)):
        rows = np.arange(64)
        train_heads(config, two_taps(facts), images=digits, rows=rows, run=run_in(tmp_path), device=device)
        assert len(steps) == taken


def test_every_head_has_the_gradient_of_its_own_loss(digits: ImageSet) -> None:
    config = OnlineProbeConfig(learning_rates=(0.1, 0.5), batch_size=16, **PLAIN)
    heads, representation = Heads(("two.wide", "two.narrow"), [192, 1], num_classes=10, rates=(0.1, 0.5)), two_taps()
    batch = digits.load(np.arange(16))
    task = online_probe.ProbeTask(config, representation, heads)
    task.step(batch, StepRandom(0, 0, 16))["loss"].backward()
    features = representation.outputs(batch["images"])
    for place, tap in enumerate(representation.taps):
        for column, head in enumerate(heads.linear[place]):
            logits = list(heads.each(tap, features[tap]))[column]
            [expected] = torch.autograd.grad(F.cross_entropy(logits, batch["labels"]), [head.weight])
            torch.testing.assert_close(head.weight.grad, expected, rtol=1e-4, atol=1e-6)


def test_the_learning_rate_rises_and_falls_over_epochs() -> None:
    schedule = online_probe._schedule(OnlineProbeConfig(epochs=90, warmup_epochs=10, batch_size=256), 2560)
    assert (schedule.steps, schedule.warmup_steps, schedule.learning_rate) == (900, 100, 1.0)
    one = online_probe._schedule(OnlineProbeConfig(epochs=1, warmup_epochs=0.5, batch_size=256), 20)
    assert (one.steps, one.warmup_steps) == (1, 0)


def test_heads_do_not_touch_each_other() -> None:
    """Heads trained together are those trained alone."""
    generator = torch.Generator().manual_seed(0)
    features = {"a": torch.randn(40, 6, generator=generator), "b": torch.randn(40, 3, generator=generator)}
    labels = torch.arange(40) % 4

    def trained(taps: tuple[str, ...], rates: tuple[float, ...]) -> Heads:
        heads = Heads(taps, [features[tap].shape[1] for tap in taps], num_classes=4, rates=rates)
        with torch.no_grad():
            for weight in heads.parameters():
                weight.zero_()
        solver = optimizer(OnlineProbeConfig(learning_rates=rates, batch_size=256), heads)
        for _ in range(5):
            solver.zero_grad()
            logits = heads(features).flatten(0, 1)
            sum(F.cross_entropy(each, labels) for each in logits).backward()
            solver.step()
        return heads

    together = trained(("a", "b"), (0.1, 0.5))
    for place, tap in enumerate("ab"):
        for column, rate in enumerate((0.1, 0.5)):
            alone = trained((tap,), (rate,))
            torch.testing.assert_close(together.linear[place][column].weight, alone.linear[0][0].weight)
    assert not torch.allclose(together.linear[0][0].weight, together.linear[0][1].weight)


@pytest.mark.parametrize("kind", ["sgd", "lars"])
def test_every_head_has_its_learning_rate_scaled_with_the_batch(kind: Any) -> None:
    heads = Heads(("a",), [3], num_classes=2, rates=(0.1, 0.5))
    solver = optimizer(OnlineProbeConfig(learning_rates=(0.1, 0.5), batch_size=1024, optimizer=kind), heads)
    assert isinstance(solver, torch.optim.SGD if kind == "sgd" else Lars)
    told = [(group["peak_lr"], group.get("always_adapt"), group["momentum"]) for group in solver.param_groups]
    adapts = (True, False) if kind == "lars" else (None, None)
    assert told == [(rate, adapt, 0.9) for rate in (0.4, 2.0) for adapt in adapts]
    assert all(group["weight_decay"] == 0 for group in solver.param_groups)
    assert sum(len(group["params"]) for group in solver.param_groups) == len(list(heads.parameters()))


def test_batch_norm_is_that_of_torch() -> None:
    generator = torch.Generator().manual_seed(0)
    ours, theirs = BatchNorm(5, lambda value: value), torch.nn.BatchNorm1d(5, eps=1e-6, affine=False)
    for step in range(13):
        theirs.momentum = None if step < 10 else 0.1  # at first the mean of all steps
        x = 3 * torch.randn(400, 5, generator=generator) + 2
        torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours.mean, theirs.running_mean)
    torch.testing.assert_close(ours.variance, theirs.running_var, rtol=4e-3, atol=0)  # torch's divides by n - 1
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=4e-3, atol=4e-3)


def test_batch_norm_of_halves_that_share_their_means_is_that_of_the_whole() -> None:
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    whole = BatchNorm(3, lambda value: value)
    shared = iter([x.mean(0), (x - x.mean(0)).square().mean(0)])
    half = BatchNorm(3, lambda value: next(shared))
    torch.testing.assert_close(half(x[:4]), whole(x)[:4])
    torch.testing.assert_close(half.variance, whole.variance)


IMAGE = torch.randint(256, (1, 3, 12, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_whole_images_stay_as_they_are_or_are_mirrored() -> None:
    draws = torch.tensor([[0.9, 0.3, 0.8, 0.1, 0.7], [0.1, 0.3, 0.8, 0.1, 0.7]])
    images = IMAGE.repeat(2, 1, 1, 1)
    whole = augmented(images, draws, min_scale=1.0, flip=True)
    assert torch.equal(whole[0], images[0]) and torch.equal(whole[1], images[1].flip(-1))
    assert torch.equal(augmented(images, draws, min_scale=1.0, flip=False), images)


def test_a_rectangle_of_the_image_is_resized_to_the_whole() -> None:
    # Area 1/4, square, in the lower left corner: the mirror draw is above one half.
    draws = torch.tensor([[0.9, 0.0, 0.5, 1.0, 0.0]])
    found = augmented(IMAGE, draws, min_scale=0.25, flip=True)[0].float()
    corner = F.interpolate(IMAGE[..., 6:, :6].float(), (12, 12), mode="bicubic")[0].round().clamp(0, 255)
    assert (found - corner)[:, 4:, :8].abs().max() <= 1  # elsewhere the filter sees pixels beyond the rectangle
    assert found.shape == (3, 12, 12)


def test_rectangles_have_the_areas_and_shapes_that_were_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    boxes: list[torch.Tensor] = []
    grid = F.affine_grid
    monkeypatch.setattr(
        F, "affine_grid", lambda theta, *rest, **more: boxes.append(theta) or grid(theta, *rest, **more)
    )
    draws = torch.rand(4000, 5, generator=torch.Generator().manual_seed(0))
    augmented(IMAGE.expand(4000, -1, -1, -1), draws, min_scale=0.08, flip=True)
    width, height = boxes[0][:, 0, 0].abs(), boxes[0][:, 1, 1]
    assert 0.08 - 1e-6 <= float((width * height).min()) < 0.1 and float(width.max()) <= 1 and float(height.max()) <= 1
    assert float((width / height).max()) <= 4 / 3 + 1e-5 and float((width / height).min()) >= 3 / 4 - 1e-5
    assert float((boxes[0][:, 0, 0] < 0).float().mean()) == pytest.approx(0.5, abs=0.03)
    for centre, side in ((boxes[0][:, 0, 2], width), (boxes[0][:, 1, 2], height)):
        assert bool((centre.abs() <= 1 - side + 1e-6).all())  # inside of the image


def test_the_best_head_is_chosen_on_held_out_images_alone() -> None:
    heads = Heads(("a",), [2], num_classes=2, rates=(1.0, 0.1)).eval()
    for head, sign in zip(heads.linear[0], (1, -1), strict=True):
        head.weight.data = sign * torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    x, labels = torch.eye(2), torch.tensor([0, 1])
    score = score_heads(heads, "a", held_out=Labelled(x, labels), test=Labelled(x, 1 - labels))
    assert (score.setting, score.held_out, score.top1.value, score.at_end) == (1.0, 1.0, 0.0, True)
