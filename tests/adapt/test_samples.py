"""What is read out of the mappings of a dataset."""

import pytest

from rtpurbo.adapt.samples import Samples


def one(**fields):
    return Samples([{"input_ids": [0, 0, 7, 8, 9], **fields}], "tokens")[0]


@pytest.mark.parametrize("mask", [[0, 0, 1, 1, 1], [False, False, True, True, True]])
def test_left_padding_is_cut_off_with_its_labels_and_rows(mask):
    sample = one(attention_mask=mask, labels=[3, 4, -100, 8, 9], rows=[3, 4])
    assert sample.tokens.tolist() == [7, 8, 9]
    assert sample.labels == [1, 2]
    assert sample.rows == [1, 2]


def test_without_padding_everything_stays():
    for fields in ({}, {"attention_mask": [1] * 5}, {"attention_mask": None}):
        sample = one(**fields, rows=[4])
        assert sample.tokens.tolist() == [0, 0, 7, 8, 9]
        assert (sample.rows, sample.labels) == ([4], None)


@pytest.mark.parametrize("mask", [[1, 1, 1, 0, 0], [0, 1, 0, 1, 1], [0] * 5])
def test_other_padding_is_refused(mask):
    with pytest.raises(ValueError, match=r"tokens\[0\]: attention_mask must be zeros, then ones"):
        one(attention_mask=mask)


def test_a_mask_of_another_length_is_refused():
    with pytest.raises(ValueError, match=r"length of input_ids, 5, got \[4\]"):
        one(attention_mask=[1] * 4)
