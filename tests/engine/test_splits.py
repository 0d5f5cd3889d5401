"""The held-out part, numbered shards and labels."""

import numpy as np
import pytest

from engine.splits import encode_labels, expand_range, held_out, label_names


def test_held_out_is_a_stratified_partition():
    labels = np.repeat([0, 1, 2], [60, 30, 10])
    train, test = held_out(labels, 0.2, "train"), held_out(labels, 0.2, "test")
    assert sorted([*train, *test]) == list(range(100))
    assert np.bincount(labels[test]).tolist() == [12, 6, 2]


@pytest.mark.parametrize(("fraction", "split"), [(0.0, "test"), (0.99, "train"), (1.0, "train"), (-0.1, "test")])
def test_an_impossible_held_out_fraction_is_refused(fraction, split):
    with pytest.raises(ValueError, match=r"data.test_fraction"):
        held_out(np.zeros(5, np.int64), fraction, split)


def test_labels_of_any_kind_become_integers():
    names = label_names(["dog", "cat", None, "dog"])
    assert names == ("cat", "dog") and encode_labels(["dog", None, "cat"], names, "x").tolist() == [1, -1, 0]
    assert label_names([0, 3]) == ("0", "1", "2", "3") and encode_labels([3, -1], ("a",) * 4, "x").tolist() == [3, -1]
    with pytest.raises(ValueError, match="a label is 1,000,000,000,000, but labels count classes"):
        label_names([1, 10**12])


@pytest.mark.parametrize("value", ["fox", 7, 1.5])
def test_an_unknown_label_is_refused(value):
    with pytest.raises(ValueError, match=r"here: .*(classes|set data.label_column)"):
        encode_labels([value], ("cat", "dog"), "here")


def test_numbered_ranges_expand():
    assert expand_range("a-{08..10}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar"]
    assert expand_range("{0..1}/{0..1}") == ["0/0", "0/1", "1/0", "1/1"]
