"""The CPU operators' property tests, run on CUDA: every call moves its tensors there and back."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rtpurbo import ops
from tests.gpu import test_cache_append_projected_cuda, test_cache_cuda, test_index_project_cuda
from tests.gpu import test_sparse_decode_cuda as layers
from tests.ops import test_attention_properties as attention
from tests.ops import test_cache_properties as cache
from tests.ops import test_decode_properties as decode
from tests.ops import test_index_properties as index
from tests.ops import test_quantize_index as quantize_index
from tests.ops import test_refine_properties as refine
from tests.ops import test_select_properties as select
from tests.ops import test_select_tiles_properties as select_tiles
from tests.ops import test_sparse_decode_properties as sparse_decode
from tests.ops import test_top_p_properties as top_p

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
    top_p.test_top_p_sets,
    index.test_retrieval_scores_equal_the_reference,
    cache.test_append_and_unroll_equal_the_reference,
    cache.test_append_projected_is_project_and_append,
    cache.test_chunks_and_decode_over_the_cache_equal_one_pass,
]
# Of operators whose CPU properties ask for more: gradients, or the roundings of the CPU.
SEEDED = [
    test_index_project_cuda.test_random_cases_equal_float64,
    test_cache_cuda.test_random_histories_equal_the_cpu,
    test_cache_append_projected_cuda.test_random_histories_equal_the_two_operators,
]


class OnDevice:
    """`rtpurbo.ops` for tensors on the CPU, computed on a device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __getattr__(self, name: str):
        operator = getattr(ops, name)

        def call(*args, **kwargs):
            there = [self.moved(a) for a in args]
            result = operator(*there, **{k: self.moved(v) for k, v in kwargs.items()})
            if name.startswith("cache_append"):  # writes some of these
                for own, moved in zip(args, there, strict=True):
                    if isinstance(own, torch.Tensor):
                        own.copy_(moved)
            if isinstance(result, torch.Tensor):
                return result.cpu()
            return result if result is None else tuple(r.cpu() for r in result)

        return call

    def moved(self, value):
        """On the device with the same strides; float64, which it does not take, as float32."""
        if isinstance(value, torch.dtype):
            return torch.float32 if value == torch.float64 else value
        if not isinstance(value, torch.Tensor):
            return value
        moved = torch.empty_strided(
            value.shape, value.stride(), dtype=self.moved(value.dtype), device=self.device
        )
        return moved.copy_(value)


@pytest.mark.parametrize("check", PROPERTIES, ids=lambda check: check.__name__)
def test_property_holds_on_cuda(check, cuda_device, monkeypatch):
    monkeypatch.setattr(attention, "GRADIENTS", False)
    monkeypatch.setitem(check.hypothesis.inner_test.__globals__, "ops", OnDevice(cuda_device))
    check()


@pytest.mark.parametrize("check", SEEDED, ids=lambda check: check.__module__.rpartition(".")[2])
def test_random_cases_hold_for_any_seed(check):
    given(seed=st.integers(0, 2**32))(check)()


def test_layers_of_thousands_of_keys_hold(cuda_device):
    """With a sieve, in a quarter of them: a multiprocessor has thousands of scores there."""
    check = layers.test_a_step_selects_enough_and_attends_to_it

    @given(seed=st.integers(0, 2**32), dtype=st.sampled_from([torch.bfloat16, torch.float16]))
    def holds(seed, dtype):
        check(seed, dtype, cuda_device)

    holds()
