import numpy as np
import pytest
import torch
from PIL import Image

from eval.classifier import Classifier
from eval.features import Extractor, open_features
from eval.judge import class_accuracy, draw_indices, judge, png_batches, reconstruction_distances

CPU = torch.device("cpu")


def images(n: int) -> torch.Tensor:
    return torch.randint(0, 256, (n, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_batch_size_changes_neither_identity_nor_features() -> None:
    extractors = [open_features("random")]
    one, many = (judge(extractors, images(10).split(size), device=CPU) for size in (10, 3))
    assert one.n == many.n == 10
    assert one.pixels == many.pixels
    torch.testing.assert_close(one.outputs["random"].features, many.outputs["random"].features)
    assert judge(extractors, [images(10).flip(0)], device=CPU).pixels != one.pixels


def test_no_image_is_an_error() -> None:
    with pytest.raises(ValueError, match="no image to judge"):
        judge([open_features("random")], [], device=CPU)


class Witness(Extractor):
    """Sees in which precision it is asked."""

    name, resize = "witness", "none"

    def outputs(self, images: torch.Tensor) -> tuple[torch.Tensor, None]:
        assert torch.get_float32_matmul_precision() == "highest" and torch.is_inference_mode_enabled()
        return images.flatten(1).float(), None


def test_images_are_judged_in_full_precision_whatever_the_run_s() -> None:
    torch.set_float32_matmul_precision("medium")
    try:
        assert judge([Witness()], [images(2)], device=CPU).n == 2
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_class_accuracy_counts_the_classifiers_agreement() -> None:
    torch.manual_seed(0)
    extractor = open_features("classifier", classifier=Classifier((8, 8, 8), 4).eval())
    judged = judge([extractor], [images(12)], device=CPU)
    labels = extractor.outputs(images(12))[1].argmax(1)
    assert class_accuracy("diffusion", judged, labels, extractor, facts={})["value"] == 1.0
    labels[:3] = (labels[:3] + 1) % 4
    assert class_accuracy("diffusion", judged, labels, extractor, facts={})["value"] == 0.75


def test_drawn_images_are_seeded_distinct_and_not_sorted() -> None:
    candidates = np.arange(100, 200)
    drawn = draw_indices(candidates, 50, seed=1)
    assert len(set(drawn)) == 50
    assert set(drawn) <= set(candidates)
    assert not np.array_equal(drawn, np.sort(drawn))
    assert np.array_equal(drawn, draw_indices(candidates, 50, seed=1))
    assert sorted(draw_indices(candidates, 0, seed=1)) == candidates.tolist()


def test_png_files_come_back_as_they_were_written(tmp_path) -> None:
    for index, image in enumerate(images(5)):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / f"{index:06d}.png")
    assert torch.equal(torch.cat(list(png_batches(tmp_path, 5, size=16, batch_size=2))), images(5))
    with pytest.raises(ValueError, match=r"000000\.png has 16 x 16 pixels, but data\.size=32"):
        list(png_batches(tmp_path, 5, size=32, batch_size=2))
    with pytest.raises(ValueError, match=r"000005\.png: not a readable image"):
        list(png_batches(tmp_path, 6, size=16, batch_size=2))


def test_too_few_reconstructions_have_no_distance_and_say_so(capsys: pytest.CaptureFixture[str]) -> None:
    extractors = [open_features("random")]
    few, enough = (judge(extractors, [images(n)], device=CPU) for n in (19, 20))
    assert reconstruction_distances(few, few, extractors, facts={}) == []
    assert "19 test images are too few, it takes 20" in capsys.readouterr().out
    (entry,) = reconstruction_distances(enough, enough, extractors, facts={})
    assert entry["name"] == "rfd_random" and entry["value"] == pytest.approx(0, abs=1e-6)
