"""Codes and latents on disk: what is written is read, and only what is whole."""

import json
import math
import threading

import numpy as np
import pytest
import torch

from engine.shards import ShardWriter, open_shards

META = {
    "tokenizer_fingerprint": "abc",
    "grid": [2, 2],
    "vocab_size": 16,
    "latent_shape": [3, 2, 2],
    "class_names": ["cat", "dog"],
    "images": {"source": "digits"},
}


def rows(number: int, views: int = 2, vocab_size: int = 16, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "labels": torch.randint(2, (number,), generator=generator),
        "codes": torch.randint(vocab_size, (number, views, 4), generator=generator),
        "latents": torch.randn(number, views, 3, 2, 2, generator=generator),
    }


def write(folder, *batches, vocab_size: int | None = 16, views=("original", "flip"), **options):
    with ShardWriter(folder, views=views, vocab_size=vocab_size, **options) as writer:
        for batch in batches:
            writer.append(**batch)
        return writer.close({**META, "vocab_size": vocab_size or 0})


def test_rows_come_back_as_they_were_written(tmp_path):
    first, second = rows(3, seed=1), rows(2, seed=2)
    shards = open_shards(write(tmp_path / "codes", first, second), fingerprint="abc", verify=True)
    batch = shards.load(np.array([4, 0, 2]))
    whole = {kind: torch.cat([first[kind], second[kind]])[[4, 0, 2]] for kind in first}
    assert torch.equal(batch["codes"], whole["codes"][:, 0]) and batch["codes"].dtype == torch.int64
    assert (
        torch.equal(batch["latents"], whole["latents"][:, 0].half().float()) and batch["latents"].dtype == torch.float32
    )
    assert torch.equal(batch["labels"], whole["labels"]) and len(shards) == 5 == shards.meta["n"]
    assert shards.meta["class_names"] == ["cat", "dog"] and shards.views == ("original", "flip")


def test_the_first_draw_picks_the_view(tmp_path):
    batch = rows(4)
    shards = open_shards(write(tmp_path / "codes", batch))
    draws = np.array([[0.0, 0.9], [0.49, 0.9], [0.5, 0.0], [0.999, 0.0]])
    views = torch.tensor([0, 0, 1, 1])
    assert torch.equal(shards.load(np.arange(4), draws)["codes"], batch["codes"][torch.arange(4), views])


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65536, np.uint16), (65537, np.int32)])
def test_the_largest_code_survives(tmp_path, vocab_size, dtype):
    codes = torch.full((1, 1, 4), vocab_size - 1)
    folder = write(
        tmp_path / "codes", {"labels": torch.zeros(1), "codes": codes}, vocab_size=vocab_size, views=["original"]
    )
    assert np.load(folder / "codes-00000-of-00001.npy").dtype == dtype
    assert torch.equal(open_shards(folder).load(np.array([0]))["codes"], codes[:, 0])


def test_latents_alone(tmp_path):
    batch = rows(2)
    del batch["codes"]
    shards = open_shards(write(tmp_path / "latents", batch, vocab_size=None))
    assert sorted(shards.load(np.array([1]))) == ["labels", "latents"]
    with pytest.raises(ValueError, match=r"holds no codes, only latents"):
        shards.histogram()


def test_smaller_images_stand_beside_the_latents_of_their_view(tmp_path):
    batch = rows(3) | {"smaller": rows(3, seed=5)["latents"]}
    shards = open_shards(write(tmp_path / "codes", batch), verify=True)
    found = shards.load(np.array([2, 0]), np.array([[0.6], [0.1]]))
    chosen = torch.tensor([2, 0]), torch.tensor([1, 0])
    assert torch.equal(found["smaller"], batch["smaller"][chosen].half().float())
    assert torch.equal(found["latents"], batch["latents"][chosen].half().float())
    assert found["smaller"].dtype == torch.float32 and "smaller" not in open_rows(tmp_path, rows(3))


def open_rows(folder, batch):
    """The first row of a folder with this batch."""
    return open_shards(write(folder / "others", batch)).load(np.array([0]))


def test_captions_follow_their_rows_and_a_batch_says_which_they_are(tmp_path):
    texts = ["a cat\nein Kätzchen", "", 'a "dog"', "b", "c"]
    folder = write(tmp_path / "codes", {**rows(3), "captions": texts[:3]}, {**rows(2), "captions": texts[3:]})
    shards = open_shards(folder, verify=True)
    assert shards.captions == texts
    found = shards.load(np.array([4, 0, 2]))["rows"]
    assert found.tolist() == [4, 0, 2] and found.dtype == torch.int64


def test_without_captions_nothing_tells_of_them(tmp_path):
    shards = open_shards(write(tmp_path / "codes", rows(2)))
    assert shards.captions is None and "rows" not in shards.load(np.array([1]))
    assert set(shards.identity()) == {*META, "views", "n"}
    assert set(shards.meta["parts"][0]["files"]) == {"labels", "codes", "latents"}


def test_captions_are_one_for_each_row_of_all_batches(tmp_path):
    with pytest.raises(ValueError, match=r"2 captions for 3 rows: give one for each"):
        write(tmp_path / "a", {**rows(3), "captions": ["a", "b"]})
    with pytest.raises(ValueError, match=r"append the same kinds"):
        write(tmp_path / "b", {**rows(1), "captions": ["a"]}, rows(1))


def test_altered_captions_are_noticed(tmp_path):
    folder = write(tmp_path / "codes", {**rows(2), "captions": ["a cat", "a dog"]})
    path = folder / "captions-00000-of-00001.json"
    path.write_text(path.read_text().replace("cat", "rat"))
    with pytest.raises(ValueError, match=r"captions-00000-of-00001.json: altered"):
        open_shards(folder, verify=True)
    path.write_text("[]")
    with pytest.raises(ValueError, match=r"captions-00000-of-00001.json: 2 bytes instead of \d+"):
        open_shards(folder)


def test_several_ranks_write_one_folder(tmp_path):
    barrier = threading.Barrier(3, timeout=10)
    parts = [rows(2, seed=1), None, rows(3, seed=3)]  # the second process had only unreadable images
    for part, texts in ((parts[0], ["a", "b"]), (parts[2], ["c", "d", "e"])):
        part["captions"] = texts

    def work(rank: int) -> None:
        batches = [parts[rank]] if parts[rank] else []
        write(tmp_path / "codes", *batches, rank=rank, world=3, barrier=barrier.wait)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    shards = open_shards(tmp_path / "codes", verify=True)
    assert torch.equal(shards.load(np.arange(5))["codes"], torch.cat([parts[0]["codes"], parts[2]["codes"]])[:, 0])
    assert shards.captions == list("abcde") and shards.load(np.array([3]))["rows"].tolist() == [3]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["codes"]


def test_nothing_is_there_before_close_and_a_new_start_is_clean(tmp_path):
    with ShardWriter(tmp_path / "codes", views=["a", "b"], vocab_size=16) as killed:
        killed.append(**rows(9))
    with pytest.raises(ValueError, match=r"no complete codes or latents here .*tokenloom encode"):
        open_shards(tmp_path / "codes")
    assert len(open_shards(write(tmp_path / "codes", rows(2)))) == 2


def test_an_older_folder_is_replaced(tmp_path):
    write(tmp_path / "codes", rows(2))
    assert len(open_shards(write(tmp_path / "codes", rows(5)))) == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["codes"]


def test_histogram_and_entropy_count_every_view(tmp_path):
    codes = torch.tensor([[[0, 0, 1, 1], [0, 0, 1, 1]], [[2, 2, 3, 3], [2, 2, 3, 3]]])
    shards = open_shards(write(tmp_path / "codes", {"labels": torch.zeros(2), "codes": codes}))
    assert shards.histogram().tolist() == [4, 4, 4, 4] + [0] * 12
    assert shards.unigram_entropy() == pytest.approx(math.log(4))


@pytest.mark.parametrize("code", [-1, 16])
def test_a_code_outside_the_vocabulary_is_refused(tmp_path, code):
    with pytest.raises(ValueError, match=r"do not fit vocab_size=16"):
        write(tmp_path / "codes", {"labels": torch.zeros(1), "codes": torch.full((1, 2, 4), code)})


@pytest.mark.parametrize("value", [float("nan"), 1e6])
def test_a_latent_that_float16_cannot_hold_is_refused(tmp_path, value):
    with pytest.raises(ValueError, match=r"float16 cannot hold"):
        write(tmp_path / "codes", {"labels": torch.zeros(1), "latents": torch.full((1, 2, 3, 2, 2), value)})


def test_unlike_rows_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"expected 3 rows of 2 views"):
        write(tmp_path / "a", rows(3, views=1))
    with pytest.raises(ValueError, match=r"append the same kinds"):
        write(tmp_path / "b", rows(3), {"labels": torch.zeros(1), "codes": rows(1)["codes"]})
    with pytest.raises(ValueError, match=r"rows of shape \(2, 9\) after rows of \(2, 4\)"):
        write(tmp_path / "c", rows(3), {**rows(1), "codes": torch.zeros(1, 2, 9, dtype=torch.int64)})
    with pytest.raises(ValueError, match=r"vocab_size=None"):
        write(tmp_path / "d", rows(3), vocab_size=None)


def test_nothing_written_and_a_missing_key_are_errors(tmp_path):
    with pytest.raises(ValueError, match="not one row was written"):
        write(tmp_path / "codes")
    with pytest.raises(ValueError, match=r"meta lacks tokenizer_fingerprint"):
        ShardWriter(tmp_path / "codes", views=["a"]).close({})


def test_codes_of_another_tokenizer_are_refused(tmp_path):
    folder = write(tmp_path / "codes", rows(2))
    with pytest.raises(ValueError, match=r"made by tokenizer abc, but xyz is wanted; .*tokenloom encode"):
        open_shards(folder, fingerprint="xyz")


def test_cut_missing_and_altered_files_are_noticed(tmp_path):
    folder = write(tmp_path / "codes", rows(50))
    path = folder / "latents-00000-of-00001.npy"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=r"latents-00000-of-00001.npy: \d+ bytes instead of \d+"):
        open_shards(folder)
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"altered"):
        open_shards(folder, verify=True)
    path.unlink()
    with pytest.raises(ValueError, match=r"0 bytes instead of"):
        open_shards(folder)


def test_a_folder_without_its_last_word_is_incomplete(tmp_path):
    folder = write(tmp_path / "codes", rows(2))
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps({**meta, "complete": False}))
    with pytest.raises(ValueError, match=r"incomplete"):
        open_shards(folder)
