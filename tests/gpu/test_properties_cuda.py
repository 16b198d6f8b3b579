"""The CPU operators' property tests, run on CUDA: every call moves its tensors there and back."""

import pytest
import torch

from rtpurbo import ops
from tests.ops import test_attention_properties as attention
from tests.ops import test_decode_properties as decode
from tests.ops import test_quantize_index as quantize_index
from tests.ops import test_refine_properties as refine
from tests.ops import test_select_properties as select
from tests.ops import test_select_tiles_properties as select_tiles
from tests.ops import test_sparse_decode_properties as sparse_decode

PROPERTIES = [
    attention.test_attention_equals_the_reference,
    attention.test_attention_over_block_lists,
    attention.test_attention_over_a_split_cache,
    attention.test_near_lse_equals_the_reference,
    attention.test_nan_and_inf_come_out_where_they_went_in,
    decode.test_decode_equals_the_reference,
    decode.test_decode_without_lists_sees_everything,
    decode.test_decode_over_rings,
    decode.test_unselected_keys_and_padding_are_never_read,
    decode.test_nan_and_inf_come_out_where_they_went_in,
    select.test_select_sets,
    select.test_hidden_keys_are_never_read,
    select.test_a_nan_selects_every_far_key,
    select.test_keys_of_minus_infinity_are_no_candidates,
    select_tiles.test_tile_lists,
    quantize_index.test_sets_are_those_of_the_float64_scores,
    refine.test_sets_are_those_of_the_rule,
    refine.test_only_twice_the_members_are_read_in_16_bits,
    refine.test_nothing_is_refined_where_all_is_selected,
    refine.test_a_nan_selects_every_far_key,
    refine.test_keys_without_codes_are_selected_as_ever,
    refine.test_equal_keys_tie_whether_they_had_codes_or_not,
    sparse_decode.test_sparse_decode_selects_and_attends,
    sparse_decode.test_sparse_decode_over_rings,
    sparse_decode.test_what_is_not_attended_is_never_read,
    sparse_decode.test_a_nan_score_selects_every_far_key,
]


class OnDevice:
    """`rtpurbo.ops` for tensors on the CPU, computed on a device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __getattr__(self, name: str):
        operator = getattr(ops, name)

        def call(*args, **kwargs):
            result = operator(
                *(self.moved(a) for a in args), **{k: self.moved(v) for k, v in kwargs.items()}
            )
            if isinstance(result, torch.Tensor):
                return result.cpu()
            return tuple(r.cpu() for r in result)

        return call

    def moved(self, value):
        """On the device with the same strides."""
        if not isinstance(value, torch.Tensor):
            return value
        moved = torch.empty_strided(
            value.shape, value.stride(), dtype=value.dtype, device=self.device
        )
        return moved.copy_(value)


@pytest.mark.parametrize("check", PROPERTIES, ids=lambda check: check.__name__)
def test_property_holds_on_cuda(check, cuda_device, monkeypatch):
    monkeypatch.setattr(attention, "GRADIENTS", False)
    monkeypatch.setitem(check.hypothesis.inner_test.__globals__, "ops", OnDevice(cuda_device))
    check()
