"""The claims of test_kernels.py about the Triton path, and those about its own kernels.

pytest -m gpu tests/test_triton.py                        compiled, on a GPU
TRITON_INTERPRET=1 pytest -m gpu tests/test_triton.py     the same source as Python on the CPU
                                                          (test_interpreter.py runs this)
"""

import itertools
import math
import os

# asked for by torch.use_deterministic_algorithms
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch
from test_kernels import (  # noqa: F401  collected once more, for another device
    INTERPRETED,
    seeded,
    test_a_nan_among_the_logits_shows_in_its_own_row_and_no_other,
    test_all_rows_ignored_gives_zeros_and_zero_gradients,
    test_any_mixture_of_upstream_gradients_gives_the_twins_gradient,
    test_autocast_gives_what_tensors_of_its_dtype_give_and_gradients_in_the_tensors_own,
    test_bf16_error_is_at_most_1_1_times_that_of_plain_torch_in_bf16,
    test_every_op_matches_its_twin_at_every_shape,
    test_extreme_logits_keep_fp32_precision,
    test_forbidden_tokens_with_logit_minus_infinity_contribute_nothing,
    test_frozen_weight_or_hidden_gets_no_gradient_and_the_other_the_same,
    test_gpt2_vocabulary_in_fp32,
    test_inputs_are_not_modified,
    test_kl_is_infinite_where_the_reference_forbids_what_the_policy_allows,
    test_kl_of_a_model_with_itself_is_exactly_zero,
    test_large_hidden_states_give_the_twins_values_and_finite_gradients,
    test_linear_cross_entropy_passes_gradcheck,
    test_linear_kl_passes_gradcheck,
    test_linear_logprob_passes_gradcheck,
    test_linear_token_loss_passes_gradcheck,
    test_one_valid_row_gives_that_rows_gradient_only,
    test_overwritten_logits_hold_their_gradient_and_a_second_backward_says_so,
    test_results_of_narrow_inputs_are_fp32_and_gradients_have_the_inputs_dtype,
    test_row_ops_pass_gradcheck,
    test_runs_are_bitwise_equal_and_unset_memory_leaves_no_trace,
    test_saved_recomputed_and_token_loss_gradients_agree_for_any_budget,
    test_strided_and_transposed_inputs_give_the_same,
    test_targets_may_be_int32,
    test_token_loss_refuses_an_upstream_gradient_that_differs_between_tokens,
    test_unit_gradients_of_selected_rows_are_stored_one_after_another,
    test_what_stands_in_ignored_rows_is_never_read,
    test_without_an_ignore_index_a_target_outside_the_vocabulary_is_refused,
    test_without_an_ignore_index_every_op_gives_the_same_and_its_twins_result,
    test_without_an_ignore_index_no_op_waits_for_its_device,
    test_zero_size_inputs_give_zero_size_outputs_and_zero_gradients,
)

from kernels import linear_triton, reference, rows_torch, rows_triton

if not INTERPRETED:  # a device-side assert breaks the GPU's context for all later tests
    del test_without_an_ignore_index_a_target_outside_the_vocabulary_is_refused

# the warnings are numpy's, of lanes that are masked out
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore::RuntimeWarning")]


@pytest.fixture(autouse=True)
def on_triton(monkeypatch):
    """Every tensor on the GPU (interpreted: on the CPU), and no way back to the torch path."""

    def refused(*args, **options):
        raise AssertionError("the torch path ran")

    for name in ("statistics", "kl_statistics", "gradient"):
        monkeypatch.setattr(rows_torch, name, refused)
    if INTERPRETED:
        yield
    else:
        with torch.device("cuda"):
            yield


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("N, V, D", [(1, 1, 1), (5, 23, 7), (130, 300, 40), (17, 1003, 130)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_fused_forward_matches_its_twin_in_fp64(dtype, N, V, D, entropy, monkeypatch):
    """Off the tile in every direction, several parts of the vocabulary, transposed operands, logits
    of +-100 and more."""
    hidden, weight = (torch.randn(D, N) * 3).to(dtype).T, torch.randn(V, 2 * D).to(dtype)[:, ::2]
    targets = torch.randint(V, (N,))
    exact = reference.linear_logprob(
        hidden.double(), weight.double(), targets, temperature=0.7, entropy=True
    )
    for programs in (1, 528):  # one part, one part for each tile
        monkeypatch.setattr(linear_triton, "PROGRAMS", programs)
        stats = torch.full((4, N), torch.nan, dtype=torch.promote_types(dtype, torch.float32))
        linear_triton.statistics(hidden, weight, targets, 1 / 0.7, stats, entropy)
        rtol, atol = (1e-12, 1e-12) if dtype == torch.float64 else (1e-5, 2e-4)
        close = dict(rtol=rtol, atol=atol)
        torch.testing.assert_close(stats[0].double(), exact[0], **close)
        torch.testing.assert_close((stats[1] + stats[2]).double(), exact[2], **close)
        if entropy:
            torch.testing.assert_close(stats[3].double(), exact[1], **close)


def test_the_split_over_the_vocabulary_never_starts_another_wave_of_programs():
    for n, V in itertools.product((1, 128, 1000, 8192, 16_384, 60_000, 100_000), (300, 50_304)):
        BN, BV, _, tiles = linear_triton.blocks(n, V, 768)
        token_blocks = math.ceil(n / BN)
        splits = math.ceil(math.ceil(V / BV) / tiles)
        assert token_blocks * splits <= max(linear_triton.PROGRAMS, token_blocks)
    assert linear_triton.blocks(8192, 50_304, 768) == (128, 128, 64, 50)  # 8 parts of 393 tiles


def test_running_statistics_do_not_depend_on_where_the_maximum_stands():
    """The largest logit in the first or the last of many blocks, the rest negligible or -inf."""
    for place in (0, 7, 40):
        z = torch.randn(3, 41, dtype=torch.float64)
        z[:, place] += torch.tensor([0.0, 50.0, 1e4], dtype=torch.float64)
        z[2, :20] = -torch.inf if place >= 20 else z[2, :20]
        targets = torch.full((3,), 40)
        exact = reference.logprob_rows(z, targets, entropy=True)
        stats = z.new_empty(4, 3)
        scale = z.new_ones(1)
        rows_triton.statistics_kernel[(3,)](
            z, None, targets, None, stats, None, scale, 3, 41, 41, 0, 3, 0,
            ENTROPY=True, REVERSE=True, R=1, B=8,
        )  # fmt: skip
        for row, expected in zip((stats[0], stats[3], stats[1] + stats[2]), exact):
            torch.testing.assert_close(row, expected, rtol=1e-12, atol=1e-12)


def test_a_unit_gradient_is_formed_by_programs_of_its_own_size(monkeypatch):
    """As test_hopper.py compiles them: one on a multiprocessor, so that its rows stay in L2."""
    shapes = []

    class Recorder:
        def __getitem__(self, grid):
            return lambda *arguments, R, B, num_warps, **options: shapes.append((R, B, num_warps))

    monkeypatch.setattr(rows_triton, "statistics_kernel", Recorder())
    z = torch.randn(3, 50_304)
    targets = torch.zeros(3, dtype=torch.int64)
    for unit in (None, z):
        rows_triton.statistics(z, targets, 1.0, z.new_empty(4, 3), unit=unit)
    assert shapes == [(1, 8192, 8), (1, 16_384, 16)]


def test_unit_gradient_in_many_blocks_matches_the_twin_in_place_and_beside():
    """The second pass of the statistics kernels: log-prob and both KLs, rows of six blocks."""
    N, V = 3, 41
    policy, ref = torch.randn(2, N, V, dtype=torch.float64)
    targets, scale, n = torch.tensor([0, 17, 40]), torch.ones(1, dtype=torch.float64), 3
    for kind in ("logprob", "reverse", "forward"):
        leaf = policy.clone().requires_grad_()
        if kind == "logprob":
            expected = -torch.autograd.grad(reference.logprob_rows(leaf, targets)[0].sum(), leaf)[0]
        else:
            (expected,) = torch.autograd.grad(
                reference.kl_rows(leaf, ref, reverse=kind == "reverse").sum(), leaf
            )
        for in_place in (False, True):
            z, other = policy.clone(), None if kind == "logprob" else ref.clone()
            unit = z if in_place else torch.full((N, V), torch.nan, dtype=z.dtype)
            p, q = (other, z) if kind == "forward" else (z, other)
            rows_triton.statistics_kernel[(N,)](
                p, q, targets, None, z.new_empty(5, N), unit, scale, n, V, V, V, N, V,
                ENTROPY=False, REVERSE=kind == "reverse", R=1, B=8,
            )  # fmt: skip
            torch.testing.assert_close(unit, expected, rtol=1e-12, atol=1e-12)
