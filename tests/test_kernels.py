"""Claims about `kernels`: each op equals its plain torch twin (kernels/reference.py) in value and
gradient, for any budget, shape, layout and values; it takes little memory; and it refuses bad input
by name.

Run as they are, these tests see the torch path on the CPU. test_triton.py collects most of them
once more for the Triton path: compiled on a GPU, or through Triton's interpreter. The interpreter
is slow, so a few tests shrink there."""

import math
import re
import sys
import types
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import kernels
from kernels import backward, dispatch, reference
from kernels.chunks import add_in_pieces_, default_budget, gpu_budget, padded, plan
from kernels.linear_logprob import plan_forward

INTERPRETED = dispatch.interpreting()
# bytes: the smallest pieces, several pieces, everything kept
BUDGETS = [0, 3000, math.inf] if INTERPRETED else [0, 3000, 200_000, 2 << 30, math.inf]
IGNORE = -100


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def linear_case(N=9, V=23, D=5, valid=0.6, dtype=torch.float64, ref_D=4):
    """hidden (N, D), weight (V, D), ref_hidden, ref_weight, targets (N,), mask (N,)"""
    hidden = torch.randn(N, D, dtype=dtype).requires_grad_()
    weight = torch.randn(V, D, dtype=dtype).requires_grad_()
    ref_hidden, ref_weight = torch.randn(N, ref_D, dtype=dtype), torch.randn(V, ref_D, dtype=dtype)
    mask = torch.rand(N) < valid
    targets = torch.randint(V, (N,)).where(mask, torch.tensor(IGNORE))
    return hidden, weight, ref_hidden, ref_weight, targets, mask


def tensors(result):
    return [x for x in (result if isinstance(result, tuple) else (result,)) if x is not None]


def gradcheck(op, inputs):
    """fp64 gradients against finite differences: every entry of the Jacobian, or, interpreted, a
    random projection of it."""
    return torch.autograd.gradcheck(op, inputs, fast_mode=INTERPRETED)


def assert_same(ours, twin, leaves, which=None, **tolerance):
    """Equal values, then equal gradients for random upstream gradients to the results numbered in
    `which` (or all)."""
    ours, twin = tensors(ours), tensors(twin)
    assert len(ours) == len(twin)
    for a, b in zip(ours, twin):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, **tolerance)
    chosen = range(len(ours)) if which is None else which
    upstream = [torch.randn_like(twin[i]) for i in chosen]
    grads = [
        torch.autograd.grad([out[i] for i in chosen], leaves, upstream) for out in (ours, twin)
    ]
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, **tolerance)


# ---- values and gradients against the twins ----


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("entropy", [False, True])
def test_linear_logprob_passes_gradcheck(entropy, budget):
    hidden, weight, *_, targets, _ = linear_case()

    def op(hidden, weight):
        return tuple(tensors(kernels.linear_logprob(
            hidden, weight, targets, temperature=0.7, entropy=entropy, logits_budget=budget
        )))  # fmt: skip

    assert gradcheck(op, (hidden, weight))


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("reverse", [True, False])
def test_linear_kl_passes_gradcheck(reverse, budget):
    hidden, weight, ref_hidden, ref_weight, _, mask = linear_case()
    options = dict(mask=mask, reverse=reverse, temperature=1.3, logits_budget=budget)
    assert gradcheck(
        lambda h, w: kernels.linear_kl(h, w, ref_hidden, ref_weight, **options), (hidden, weight)
    )


@pytest.mark.parametrize("budget", BUDGETS)
def test_linear_token_loss_passes_gradcheck(budget):
    hidden, weight, *_, targets, _ = linear_case()
    advantages = torch.randn(9, dtype=torch.float64)

    def op(hidden, weight):  # gradcheck goes backward several times through one graph
        def token_loss(logprob, index):
            return -advantages[index] * logprob.exp()

        return (
            kernels.linear_token_loss(
                hidden, weight, targets, token_loss, temperature=0.7, logits_budget=budget
            ).sum()
            / 3
        )

    assert gradcheck(op, (hidden, weight))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_linear_cross_entropy_passes_gradcheck(reduction):
    hidden, weight, *_, targets, _ = linear_case()
    assert gradcheck(
        lambda h, w: kernels.linear_cross_entropy(h, w, targets, reduction=reduction),
        (hidden, weight),
    )


def test_row_ops_pass_gradcheck():
    *_, targets, mask = linear_case()
    logits, ref_logits = torch.randn(2, 9, 23, dtype=torch.float64)
    logits.requires_grad_()
    assert gradcheck(
        lambda z: tuple(kernels.logprob_rows(z, targets, temperature=0.7, entropy=True)), logits
    )
    for reverse in (True, False):
        assert gradcheck(
            lambda z: kernels.kl_rows(z, ref_logits, mask=mask, reverse=reverse, temperature=0.7),
            logits,
        )


@pytest.mark.parametrize("which", [[0], [1], [2], [0, 1], [0, 2], [1, 2], [0, 1, 2]])
def test_any_mixture_of_upstream_gradients_gives_the_twins_gradient(which):
    hidden, weight, *_, targets, _ = linear_case(N=40, V=300)
    for budget in BUDGETS:
        ours = kernels.linear_logprob(
            hidden, weight, targets, temperature=0.7, entropy=True, logits_budget=budget
        )
        twin = reference.linear_logprob(hidden, weight, targets, temperature=0.7, entropy=True)
        assert_same(ours, twin, [hidden, weight], which)
        if 1 not in which:  # without entropy there are two results and another path
            options = dict(temperature=0.7, logits_budget=budget)
            ours, twin = (
                (logprob, lse)
                for logprob, _, lse in (
                    m.linear_logprob(hidden, weight, targets, **options)
                    for m in (reference, kernels)
                )
            )
            assert_same(ours, twin, [hidden, weight], [i // 2 for i in which])
    logits = torch.randn(40, 300, dtype=torch.float64, requires_grad=True)
    ours, twin = (
        m.logprob_rows(logits, targets, temperature=0.7, entropy=True) for m in (kernels, reference)
    )
    assert_same(ours, twin, [logits], which)


@pytest.mark.parametrize("N", [0, 1, 5, 130])
@pytest.mark.parametrize("V", [1, 2, 127, 128, 129])
def test_every_op_matches_its_twin_at_every_shape(V, N):
    hidden, weight, ref_hidden, ref_weight, targets, mask = linear_case(N, V, D=7)
    both = (kernels, reference)
    leaves = [hidden, weight]
    for valid in (targets, torch.randint(V, (N,))):  # some ignored, none ignored
        for entropy in (False, True):
            assert_same(
                *(
                    m.linear_logprob(*leaves, valid, entropy=entropy, logits_budget=V * 100)
                    for m in both
                ),
                leaves,
            )
        for reduction in ("mean", "sum", "none"):
            assert_same(
                *(m.linear_cross_entropy(*leaves, valid, reduction=reduction) for m in both), leaves
            )
    for reverse in (True, False):
        for mask_or_none in (mask, None):
            options = dict(mask=mask_or_none, reverse=reverse)
            assert_same(
                *(m.linear_kl(*leaves, ref_hidden, ref_weight, **options) for m in both), leaves
            )
    logits, ref_logits = torch.randn(2, N, V, dtype=torch.float64)
    logits.requires_grad_()
    assert_same(*(m.logprob_rows(logits, targets, entropy=True) for m in both), [logits])
    assert_same(*(m.kl_rows(logits, ref_logits, mask=mask) for m in both), [logits])


def test_gpt2_vocabulary_in_fp32():
    hidden, weight, ref_hidden, ref_weight, targets, mask = linear_case(
        3, 50257, D=8, valid=1, dtype=torch.float32
    )
    close = dict(rtol=1e-4, atol=1e-5)
    for budget in [200_000, math.inf] if INTERPRETED else BUDGETS:
        out = (
            m.linear_logprob(hidden, weight, targets, entropy=True, logits_budget=budget)
            for m in (kernels, reference)
        )
        assert_same(*out, [hidden, weight], **close)
        out = (
            m.linear_kl(hidden, weight, ref_hidden, ref_weight, logits_budget=budget)
            for m in (kernels, reference)
        )
        assert_same(*out, [hidden, weight], **close)
        out = (
            m.linear_cross_entropy(hidden, weight, targets, logits_budget=budget)
            for m in (kernels, reference)
        )
        assert_same(*out, [hidden, weight], **close)


@pytest.mark.filterwarnings("ignore:(ref_)?weight")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_results_of_narrow_inputs_are_fp32_and_gradients_have_the_inputs_dtype(dtype):
    hidden, weight, ref_hidden, ref_weight, targets, mask = linear_case(dtype=dtype)
    results = [
        *kernels.linear_logprob(hidden, weight, targets, entropy=True),
        kernels.linear_cross_entropy(hidden, weight, targets),
    ]
    results += [
        kernels.linear_kl(hidden, weight, ref_hidden, ref_weight, mask=mask),
        kernels.linear_logprob(hidden, weight, targets)[0],
    ]
    results += [
        *kernels.logprob_rows(hidden, targets % 5, entropy=True),
        kernels.kl_rows(hidden, ref_hidden.repeat(1, 2)[:, :5]),
    ]
    for result in results:
        assert result.dtype == torch.float32
        (grad,) = torch.autograd.grad(result.sum(), hidden, retain_graph=True)
        assert grad.dtype == dtype and grad.isfinite().all()


def test_autocast_gives_what_tensors_of_its_dtype_give_and_gradients_in_the_tensors_own():
    hidden, weight, ref_hidden, ref_weight, targets, mask = linear_case(
        N=40, V=300, dtype=torch.float32
    )
    narrow = [x.detach().bfloat16().requires_grad_() for x in (hidden, weight)]
    device = hidden.device.type
    for op in (
        lambda h, w: kernels.linear_logprob(h, w, targets).logprob,
        lambda h, w: kernels.linear_token_loss(
            h, w, targets, lambda logprob, index: -logprob, logits_budget=30_000
        ),
        lambda h, w: kernels.linear_cross_entropy(h, w, targets, reduction="none"),
        lambda h, w: kernels.linear_kl(
            h, w, ref_hidden.to(h.dtype), ref_weight.to(h.dtype), mask=mask
        ),
    ):
        expected = op(*narrow)
        for leaves in (
            [hidden, weight],
            [narrow[0], weight],
        ):  # a model may hand over hidden states of either dtype
            with torch.autocast(device, torch.bfloat16):
                result = op(*leaves)
            assert torch.equal(result, expected) and result.dtype == torch.float32
            d_hidden, d_weight = torch.autograd.grad(result.sum(), leaves)
            same = torch.autograd.grad(expected.sum(), narrow, retain_graph=True)
            assert d_hidden.dtype == leaves[0].dtype
            assert torch.equal(d_hidden, same[0].to(d_hidden.dtype))
            assert d_weight.dtype == torch.float32  # and not rounded to bf16 as same[1] is
            assert (d_weight - same[1]).norm() <= 2**-8 * same[1].norm()


def test_under_autocast_an_fp32_heads_gradient_is_fp32_from_the_start():
    """No cast between the head and the op, so none of dW on the way back; and a dW that is summed
    over chunks in fp32 keeps digits that bf16 does not have."""
    hidden, weight, ref_hidden, ref_weight, targets, _ = linear_case(
        N=40, V=300, valid=1, dtype=torch.float32
    )
    options = dict(logits_budget=30_000)
    with torch.autocast(hidden.device.type, torch.bfloat16):
        results = [
            kernels.linear_logprob(hidden, weight, targets).logprob,
            kernels.linear_token_loss(hidden, weight, targets, lambda lp, index: -lp, **options),
            kernels.linear_kl(hidden, weight, ref_hidden, ref_weight),
        ]
    for result in results:
        assert result.grad_fn.next_functions[1][0].variable is weight
    (d_weight,) = torch.autograd.grad(results[1].sum(), weight)
    assert not torch.equal(d_weight, d_weight.bfloat16().float())


def test_targets_may_be_int32():
    hidden, weight, *_, targets, _ = linear_case()
    assert_same(
        *(
            kernels.linear_logprob(hidden, weight, t, entropy=True)
            for t in (targets.int(), targets)
        ),
        [hidden, weight],
    )
    assert torch.equal(
        kernels.logprob_rows(hidden, (targets % 5).int())[0],
        kernels.logprob_rows(hidden, targets % 5)[0],
    )


@pytest.mark.parametrize("budget", BUDGETS)
def test_strided_and_transposed_inputs_give_the_same(budget):
    hidden = torch.randn(60, 14, dtype=torch.float64)[::2, ::2].requires_grad_()  # (30, 7)
    targets = torch.randint(41, (60,))[::2]
    for weight in (
        torch.randn(7, 41, dtype=torch.float64).T,
        torch.randn(82, 14, dtype=torch.float64)[::2, ::2],
    ):
        weight.requires_grad_()
        out = (
            m.linear_logprob(hidden, weight, targets, entropy=True, logits_budget=budget)
            for m in (kernels, reference)
        )
        assert_same(*out, [hidden, weight])
        out = (
            m.linear_cross_entropy(hidden, weight, targets, logits_budget=budget)
            for m in (kernels, reference)
        )
        assert_same(*out, [hidden, weight])
        out = (
            m.linear_kl(hidden, weight, hidden * 2, weight * 0.5, logits_budget=budget)
            for m in (kernels, reference)
        )
        assert_same(*out, [hidden, weight])
    logits = torch.randn(41, 30, dtype=torch.float64).T.requires_grad_()
    assert_same(
        *(m.logprob_rows(logits, targets, entropy=True) for m in (kernels, reference)), [logits]
    )
    assert_same(
        *(
            m.kl_rows(logits, logits.detach()[:, torch.arange(41) - 1])
            for m in (kernels, reference)
        ),
        [logits],
    )


def test_overwritten_logits_hold_their_gradient_and_a_second_backward_says_so():
    *_, targets, mask = linear_case(N=40, V=300)
    leaf = torch.randn(40, 300, dtype=torch.float64, requires_grad=True)
    for rows in (targets, targets.clamp(min=0)):  # some ignored, none ignored
        (expected,) = torch.autograd.grad(
            kernels.logprob_rows(leaf, rows, temperature=0.7, entropy=True).entropy.sum(), leaf
        )
        logits = leaf * 1
        entropy = kernels.logprob_rows(
            logits, rows, temperature=0.7, entropy=True, overwrite=True
        ).entropy
        (grad,) = torch.autograd.grad(entropy.sum(), logits, retain_graph=True)
        assert grad.data_ptr() == logits.data_ptr()
        torch.testing.assert_close(grad, expected, rtol=0, atol=1e-14)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            entropy.sum().backward()
    with pytest.raises(ValueError, match="^overwrite:"):
        kernels.logprob_rows(leaf.T, torch.zeros(300, dtype=torch.int64), overwrite=True)


# ---- what is ignored ----


@pytest.mark.parametrize("budget", BUDGETS)
def test_all_rows_ignored_gives_zeros_and_zero_gradients(budget):
    hidden, weight, ref_hidden, ref_weight, *_ = linear_case()
    ignored = torch.full((9,), IGNORE)
    options = dict(logits_budget=budget)
    results = [*kernels.linear_logprob(hidden, weight, ignored, entropy=True, **options)]
    results += [*tensors(kernels.linear_logprob(hidden, weight, ignored, **options))]
    results += [
        kernels.linear_kl(
            hidden, weight, ref_hidden, ref_weight, mask=torch.zeros(9, dtype=torch.bool), **options
        )
    ]
    results += [
        kernels.linear_cross_entropy(hidden, weight, ignored, reduction=r, **options)
        for r in ("mean", "sum", "none")
    ]
    for result in results:
        assert (result == 0).all()
        for grad, leaf in zip(
            torch.autograd.grad(result.sum(), [hidden, weight], retain_graph=True), (hidden, weight)
        ):
            assert torch.equal(grad, torch.zeros_like(leaf))
    logits = torch.randn(9, 7, requires_grad=True)
    grads = torch.autograd.grad(
        sum(x.sum() for x in kernels.logprob_rows(logits, ignored, entropy=True)), logits
    )
    assert torch.equal(grads[0], torch.zeros(9, 7))


def test_what_stands_in_ignored_rows_is_never_read():
    hidden, weight, ref_hidden, ref_weight, targets, mask = linear_case()
    poisoned = hidden.detach().masked_fill(~mask[:, None], math.nan).requires_grad_()
    for ops in (
        lambda h: kernels.linear_logprob(h, weight, targets, entropy=True),
        lambda h: (kernels.linear_cross_entropy(h, weight, targets),),
        lambda h: (kernels.linear_kl(h, weight, ref_hidden, ref_weight, mask=mask),),
        lambda h: kernels.logprob_rows(h, torch.where(mask, targets % 5, targets), entropy=True),
        lambda h: (kernels.kl_rows(h, weight.detach()[:9], mask=mask),),
    ):
        for clean, dirty in zip(ops(hidden), ops(poisoned)):
            assert torch.equal(clean, dirty)
            clean, dirty = (
                torch.autograd.grad(x.sum(), h, retain_graph=True)[0]
                for x, h in ((clean, hidden), (dirty, poisoned))
            )
            assert torch.equal(clean, dirty) and (dirty[~mask] == 0).all()


def test_one_valid_row_gives_that_rows_gradient_only():
    hidden, weight, *_ = linear_case()
    targets = torch.full((9,), IGNORE)
    targets[4] = 22
    assert_same(
        *(m.linear_logprob(hidden, weight, targets) for m in (kernels, reference)), [hidden, weight]
    )
    assert_same(
        *(m.linear_cross_entropy(hidden, weight, targets) for m in (kernels, reference)),
        [hidden, weight],
    )


def test_ignore_index_may_be_a_token_of_the_vocabulary():
    hidden, weight, *_ = linear_case()
    targets = torch.arange(9) % 3
    assert_same(
        *(m.linear_logprob(hidden, weight, targets, ignore_index=0) for m in (kernels, reference)),
        [hidden, weight],
    )


def test_frozen_weight_or_hidden_gets_no_gradient_and_the_other_the_same():
    hidden, weight, ref_hidden, ref_weight, targets, mask = linear_case(N=40)
    for budget in BUDGETS:
        options = dict(logits_budget=budget)
        for op in (
            lambda h, w: kernels.linear_logprob(h, w, targets, **options).logprob,
            lambda h, w: kernels.linear_logprob(h, w, targets, entropy=True, **options).entropy,
            lambda h, w: kernels.linear_cross_entropy(h, w, targets, **options),
            lambda h, w: kernels.linear_kl(h, w, ref_hidden, ref_weight, mask=mask, **options),
        ):
            both = torch.autograd.grad(op(hidden, weight).sum(), [hidden, weight])
            (only_hidden,) = torch.autograd.grad(op(hidden, weight.detach()).sum(), [hidden])
            (only_weight,) = torch.autograd.grad(op(hidden.detach(), weight).sum(), [weight])
            torch.testing.assert_close((only_hidden, only_weight), both, rtol=1e-12, atol=1e-12)


# ---- targets that all count ----


def test_without_an_ignore_index_every_op_gives_the_same_and_its_twins_result():
    hidden, weight, *_, targets, _ = linear_case(valid=1)
    logits = torch.randn(9, 23, dtype=torch.float64).requires_grad_()

    def weighted(logprob, index):
        return -logprob * (index + 1)

    for op, leaves in (
        (lambda m, *x, **o: m.linear_logprob(*x, entropy=True, **o), [hidden, weight]),
        (lambda m, *x, **o: m.linear_cross_entropy(*x, **o), [hidden, weight]),
        (lambda m, *x, **o: m.linear_token_loss(*x, weighted, **o).sum(), [hidden, weight]),
        (lambda m, *x, **o: m.logprob_rows(*x, **o), [logits]),
    ):
        told = op(kernels, *leaves, targets, ignore_index=None)
        for a, b in zip(tensors(told), tensors(op(kernels, *leaves, targets))):
            assert torch.equal(a, b)
        assert_same(told, op(reference, *leaves, targets, ignore_index=None), leaves)
    none = torch.zeros(0, 5, requires_grad=True)
    arguments = (none, weight.float(), torch.zeros(0, dtype=torch.int64))
    assert kernels.linear_cross_entropy(*arguments, ignore_index=None) == 0


def test_without_an_ignore_index_a_target_outside_the_vocabulary_is_refused():
    hidden, weight, *_, targets, _ = linear_case(valid=1)
    for wrong in (23, -100, -1):
        targets[3] = wrong
        with pytest.raises((ValueError, RuntimeError), match=r"targets: .*expected \[0, 23\)"):
            kernels.linear_logprob(hidden, weight, targets, ignore_index=None)


class Waits(torch.utils._python_dispatch.TorchDispatchMode):
    """The operations that make the host wait for a GPU, in order."""

    NAMES = {"aten::nonzero", "aten::_local_scalar_dense", "aten::equal", "aten::is_nonzero"}

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if function.name() in self.NAMES:
            self.names.append(function.name())
        return function(*arguments, **(options or {}))


def test_without_an_ignore_index_no_op_waits_for_its_device():
    """Forward and backward. A CPU's check of the range reads a list, which is no operation: what a
    GPU does instead is seen in the interpreter, where reading a list fails here."""
    hidden, weight, ref_hidden, ref_weight, targets, _ = linear_case(valid=1)

    def work(**options):
        logprob = kernels.linear_logprob(hidden, weight, targets, **options).logprob
        loss = kernels.linear_cross_entropy(hidden, weight, targets, **options)
        kl = kernels.linear_kl(hidden, weight, ref_hidden, ref_weight)
        (logprob.sum() + loss + kl.sum()).backward()

    def refused(tensor):
        raise AssertionError("a wait")

    with pytest.MonkeyPatch.context() as patch, Waits() as waits:
        if INTERPRETED:
            patch.setattr(torch.Tensor, "tolist", refused, raising=False)
        work(ignore_index=None)
    assert waits.names == []
    with Waits() as waits:
        work()
    assert len(waits.names) >= 2  # the measure sees them


# ---- the memory regimes ----


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_saved_recomputed_and_token_loss_gradients_agree_for_any_budget(dtype):
    N, V = (70, 103) if INTERPRETED else (700, 1003)
    hidden, weight, *_, targets, _ = linear_case(N, V, D=16, dtype=dtype)
    advantages = torch.randn(N)
    results = []
    for budget in (0, 1, 100_000, 1_500_000, 3e6, 1 << 30, math.inf):
        options = dict(temperature=1.1, logits_budget=budget)
        logprob = kernels.linear_logprob(hidden, weight, targets, **options).logprob
        token = kernels.linear_token_loss(
            hidden, weight, targets, lambda lp, index: advantages[index] * lp, **options
        )
        with_entropy = kernels.linear_logprob(
            hidden, weight, targets, entropy=True, **options
        ).logprob
        for losses in (advantages * logprob, token, advantages * with_entropy):
            results.append(
                (losses.detach(), *torch.autograd.grad(losses.sum() / 7, [hidden, weight]))
            )
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    for result in results[1:]:
        for a, b in zip(result, results[0]):
            assert (a.double() - b.double()).norm() <= tolerance * b.double().norm()


def test_token_loss_sees_each_supervised_token_once_with_its_position():
    hidden, weight, *_, targets, mask = linear_case(N=900, V=300)
    seen = []

    def token_loss(logprob, index):
        seen.append(index)
        return logprob.double() * index

    losses = kernels.linear_token_loss(hidden, weight, targets, token_loss, logits_budget=300_000)
    assert len(seen) > 1 and torch.equal(torch.cat(seen), mask.nonzero()[:, 0])
    expected = reference.linear_logprob(hidden, weight, targets)[0] * torch.arange(900)
    torch.testing.assert_close(losses, expected)


def test_token_loss_refuses_an_upstream_gradient_that_differs_between_tokens():
    hidden, weight, *_, targets, mask = linear_case()
    losses = kernels.linear_token_loss(hidden, weight, targets, lambda logprob, index: -logprob)
    with pytest.raises(ValueError, match="put per-token weights inside token_loss"):
        (losses * torch.arange(9)).sum().backward(retain_graph=True)
    (losses * mask * 3).sum().backward()  # differs at ignored tokens only
    assert hidden.grad.norm() > 0


def test_the_readme_names_the_scripts_whose_gradient_is_formed_in_the_forward():
    root = Path(__file__).resolve().parents[1]
    callers = {path.name for path in root.glob("*.py") if "linear_token_loss" in path.read_text()}
    lines = (root / "kernels/README.md").read_text().splitlines()
    (row,) = [line for line in lines if "formed in the forward |" in line]
    assert set(re.findall(r"`(\w+\.py)`", row)) == callers
    assert not re.search("PPO|GRPO|DPO", row)


def test_token_loss_that_ignores_the_logprob_has_zero_gradient():
    hidden, weight, *_, targets, _ = linear_case()
    losses = kernels.linear_token_loss(
        hidden, weight, targets, lambda logprob, index: torch.ones_like(logprob).detach()
    )
    for grad in torch.autograd.grad(losses.sum(), [hidden, weight]):
        assert (grad == 0).all()


def test_gradients_formed_in_the_forward_survive_a_kept_graph():
    hidden, weight, *_, targets, _ = linear_case()
    loss = kernels.linear_cross_entropy(hidden, weight, targets)
    first = torch.autograd.grad(loss, [hidden, weight], retain_graph=True)
    second = torch.autograd.grad(loss, [hidden, weight])
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, [hidden, weight])


def peak_bytes(work):
    """The most that torch had allocated at once during work(), beyond what was there before."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        work()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    total = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        total += event.nbytes()
        peak = max(peak, total)
    return peak


def test_peak_memory_is_at_most_a_quarter_of_eagers():
    hidden, weight, *_ = linear_case(512, 20000, D=32, dtype=torch.float32)
    targets = torch.randint(20000, (512,)).where(torch.arange(512) % 2 == 0, torch.tensor(IGNORE))
    outputs = hidden.nbytes + weight.nbytes

    def eager():
        F.cross_entropy(hidden @ weight.T, targets).backward()

    def saved():
        (-kernels.linear_logprob(hidden, weight, targets).logprob.sum()).backward()

    def formed():
        kernels.linear_cross_entropy(hidden, weight, targets).backward()

    peaks = []
    for work in (eager, saved, formed):
        hidden.grad = weight.grad = None
        peaks.append(peak_bytes(work) - outputs)
    assert peaks[0] > 2 * 512 * 20000 * 4  # the measure sees eager's logits
    assert peaks[1] <= peaks[0] / 4 and peaks[2] <= peaks[0] / 4, peaks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peak_memory_stays_under_the_budget_asked_for(dtype):
    N, V = 512, 32000
    hidden, weight, ref_hidden, ref_weight, *_ = linear_case(N, V, D=16, dtype=dtype)
    targets = torch.randint(V, (N,))
    outputs = hidden.nbytes + weight.nbytes
    for budget in (16 << 20, 40 << 20, 100 << 20):  # the logits: 62 MiB in fp32
        options = dict(logits_budget=budget)
        for op in (
            lambda: kernels.linear_logprob(hidden, weight, targets, **options).logprob,
            lambda: (
                kernels.linear_logprob(hidden, weight, targets, entropy=True, **options).entropy
            ),
            lambda: kernels.linear_cross_entropy(hidden, weight, targets, **options),
            lambda: kernels.linear_kl(hidden, weight, ref_hidden, ref_weight, **options),
            lambda: kernels.linear_kl(
                hidden, weight, ref_hidden, ref_weight, reverse=False, **options
            ),
        ):
            hidden.grad = weight.grad = None
            peak = peak_bytes(lambda: op().sum().backward()) - outputs
            assert peak <= budget, (budget, peak)
            with torch.no_grad():
                assert peak_bytes(op) <= budget


def test_the_default_budget_is_2_gib_on_a_cpu_and_at_most_a_quarter_of_a_gpus_free_memory():
    """And 8 GiB keep the unit gradient, three products instead of four, at sizes where 2 do not."""
    assert default_budget(torch.device("cpu")) == 2 << 30
    for free, gib in ((5, 2), (15, 2), (16, 4), (31, 4), (32, 8), (140, 8)):
        assert gpu_budget(free << 30) == gib << 30
    for V in (151_936, 256_000, 128_256):
        hidden = torch.empty(8192, 1, dtype=torch.bfloat16, device="meta")
        assert plan_forward(hidden, V, gpu_budget(140 << 30)).save
        assert not plan_forward(hidden, V, gpu_budget(15 << 30)).save


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_pieces_are_whole_tiles_of_a_product_wherever_the_budget_allows_one(device):
    """16 rows on a CPU, 128 on a GPU; never more than the budget's rows, nor fewer than 16."""
    tile = dict(cpu=16, cuda=128)[device]
    for length in (100, 1000, 8192, 50_257):
        for rows in (0, 20, 127, 128, 300, 1000, 5000):
            step = plan(length, 4, 4 * rows, device, parts=1).step
            assert step <= max(16, rows)
            if step < length:
                assert step % (tile if rows >= tile else 16) == 0
    if device == "cuda":  # nine equal pieces would have 911 rows, eight tiles
        assert plan(8192, 4, 4 * 1000, device, parts=1).step == 896


def test_a_sum_that_torch_refuses_to_extend_grows_piece_by_piece_without_a_second_one(monkeypatch):
    """What a GPU falls back to: dW (V, D) in fp32 exists once."""
    left, right = torch.randn(6000, 20), torch.randn(20, 64)
    total = torch.randn(6000, 64)
    expected = total + left @ right
    monkeypatch.setattr("kernels.chunks.GPU_PIECE", 256 << 10)  # 1024 rows
    assert peak_bytes(lambda: add_in_pieces_(total, left, right)) <= 256 << 10 < total.nbytes
    torch.testing.assert_close(total, expected)


def test_a_head_in_float16_says_that_it_is_copied_to_fp32():
    hidden, weight, ref_hidden, ref_weight, targets, _ = linear_case(dtype=torch.float16)
    with pytest.warns(UserWarning, match=r"^weight: float16 .* copy .* bfloat16 needs none"):
        kernels.linear_logprob(hidden, weight, targets)
    with pytest.warns(UserWarning, match=r"^ref_weight: float16"):
        kernels.linear_kl(hidden.float(), weight.float(), ref_hidden, ref_weight)
    with warnings.catch_warnings(action="error"):
        kernels.linear_logprob(hidden.bfloat16(), weight.bfloat16(), targets)


def test_without_a_budget_the_ops_take_the_devices_default(monkeypatch):
    hidden, weight, ref_hidden, ref_weight, targets, mask = linear_case()
    asked = []

    def counted(device):
        asked.append(device)
        return 0

    monkeypatch.setattr(kernels, "default_budget", counted)
    kernels.linear_logprob(hidden, weight, targets)
    kernels.linear_cross_entropy(hidden, weight, targets)
    kernels.linear_kl(hidden, weight, ref_hidden, ref_weight)
    kernels.linear_kl(hidden, weight, ref_hidden, ref_weight, logits_budget=0)
    assert asked == [hidden.device] * 3


def test_scoring_holds_one_chunk_and_saves_nothing():
    hidden, weight, ref_hidden, ref_weight, targets, _ = linear_case(
        2000, 4000, valid=1, dtype=torch.float32
    )
    chunk = 262 * 4000 * 4
    for op, chunks in (
        (lambda h, w: kernels.linear_logprob(h, w, targets), 1),
        (lambda h, w: kernels.linear_logprob(h, w, targets, entropy=True), 2),
        (lambda h, w: kernels.linear_token_loss(h, w, targets, lambda lp, index: -lp), 1),
        (lambda h, w: kernels.linear_kl(h, w, ref_hidden, ref_weight), 2.25),
    ):
        trained = tensors(op(hidden, weight))
        with torch.no_grad():
            scored = tensors(op(hidden, weight))
            assert peak_bytes(lambda: op(hidden, weight)) < (chunks + 0.1) * chunk
        frozen = tensors(op(hidden.detach(), weight.detach()))
        for a, b, c in zip(trained, scored, frozen):
            assert a.requires_grad and not b.requires_grad and not c.requires_grad
            assert torch.equal(a, b) and torch.equal(a, c)


# ---- extreme values ----


@pytest.mark.parametrize("scale", [1.0, 30.0, 1e4])
def test_extreme_logits_keep_fp32_precision(scale):
    logits = (torch.randn(6, 50) * scale).requires_grad_()
    ref_logits = torch.randn(6, 50) * scale
    logits.data[0], logits.data[1, 7] = 3.0, 4e4  # equal logits; p -> 1
    targets = torch.tensor([0, 7, 3, 4, 5, 6])
    wide = logits.detach().double().requires_grad_()
    for ours, exact in (
        (
            kernels.logprob_rows(logits, targets, entropy=True),
            reference.logprob_rows(wide, targets, entropy=True),
        ),
        (kernels.kl_rows(logits, ref_logits), reference.kl_rows(wide, ref_logits.double())),
        (
            kernels.kl_rows(logits, ref_logits, reverse=False),
            reference.kl_rows(wide, ref_logits.double(), reverse=False),
        ),
    ):
        for a, b in zip(tensors(ours), tensors(exact)):
            torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)
            grads = (
                torch.autograd.grad(x.sum(), leaf, retain_graph=True)[0]
                for x, leaf in ((a, logits), (b, wide))
            )
            torch.testing.assert_close(
                *(g.double() for g in grads), rtol=1e-4, atol=1e-5 * max(1, b.abs().max().item())
            )


@pytest.mark.parametrize("budget", BUDGETS)
def test_large_hidden_states_give_the_twins_values_and_finite_gradients(budget):
    hidden, weight, ref_hidden, ref_weight, targets, mask = linear_case(N=30, V=70)
    hidden = (hidden.detach() * 5e3).requires_grad_()  # logits of +-1e4
    for entropy in (False, True):
        out = (
            m.linear_logprob(hidden, weight, targets, entropy=entropy, logits_budget=budget)
            for m in (kernels, reference)
        )
        assert_same(*out, [hidden, weight])
    for reverse in (True, False):
        options = dict(mask=mask, reverse=reverse, logits_budget=budget)
        assert_same(
            *(
                m.linear_kl(hidden, weight, ref_hidden, ref_weight, **options)
                for m in (kernels, reference)
            ),
            [hidden, weight],
        )


def test_forbidden_tokens_with_logit_minus_infinity_contribute_nothing():
    logits = torch.randn(5, 12, dtype=torch.float64)
    ref_logits = torch.randn(5, 12, dtype=torch.float64)
    logits[:, 3], ref_logits[:, 3] = -math.inf, -math.inf
    logits.requires_grad_()
    targets = torch.tensor([0, 1, 2, 4, 5])
    assert_same(
        *(m.logprob_rows(logits, targets, entropy=True) for m in (kernels, reference)), [logits]
    )
    for reverse in (True, False):
        assert_same(
            *(m.kl_rows(logits, ref_logits, reverse=reverse) for m in (kernels, reference)),
            [logits],
        )
    assert kernels.logprob_rows(logits, torch.full((5,), 3)).logprob.tolist() == [-math.inf] * 5
    # the same through a head: one weight row at infinity against positive hidden states
    hidden = torch.rand(5, 3, dtype=torch.float64).add(1).requires_grad_()
    weight = torch.randn(12, 3, dtype=torch.float64)
    weight[3] = -math.inf
    for budget in BUDGETS:
        out = kernels.linear_logprob(hidden, weight, targets, entropy=True, logits_budget=budget)
        torch.testing.assert_close(
            tuple(out),
            tensors_of_twin := reference.linear_logprob(hidden, weight, targets, entropy=True),
        )
        assert all(x.isfinite().all() for x in tensors_of_twin)


def test_a_nan_among_the_logits_shows_in_its_own_row_and_no_other():
    logits, ref_logits = torch.randn(2, 3, 12, dtype=torch.float64)
    logits[1, 4] = math.nan
    logits.requires_grad_()
    out = kernels.logprob_rows(logits, torch.tensor([0, 1, 2]), entropy=True)
    for result in (
        *out,
        *(kernels.kl_rows(logits, ref_logits, reverse=reverse) for reverse in (True, False)),
    ):
        (grad,) = torch.autograd.grad(result.sum(), logits, retain_graph=True)
        assert result.isnan().tolist() == [False, True, False]
        assert grad.isnan().any(1).tolist() == [False, True, False]


def test_kl_of_a_model_with_itself_is_exactly_zero():
    hidden, weight, *_ = linear_case(N=40, V=1003, dtype=torch.float32)
    logits = (hidden @ weight.T * 100).detach().requires_grad_()
    for reverse in (True, False):
        for budget in BUDGETS:
            kl = kernels.linear_kl(
                hidden,
                weight,
                hidden.detach(),
                weight.detach(),
                reverse=reverse,
                logits_budget=budget,
            )
            assert (kl == 0).all()
            for grad in torch.autograd.grad(kl.sum(), [hidden, weight]):
                assert grad.abs().max() < 1e-5
        kl = kernels.kl_rows(logits, logits, reverse=reverse)
        assert (kl == 0).all() and (torch.autograd.grad(kl.sum(), logits)[0] == 0).all()


def test_kl_is_infinite_where_the_reference_forbids_what_the_policy_allows():
    logits, ref_logits = torch.zeros(1, 4), torch.tensor([[0.0, 0.0, 0.0, -math.inf]])
    assert kernels.kl_rows(logits, ref_logits).item() == math.inf
    torch.testing.assert_close(
        kernels.kl_rows(logits, ref_logits, reverse=False), torch.tensor([math.log(4 / 3)])
    )


# ---- precision, determinism, hygiene ----


def relative_errors(got, exact):
    return [((a.double() - b).norm() / b.norm()).item() for a, b in zip(got, exact)]


@pytest.mark.slow
def test_a_vocabulary_of_256000_stays_under_the_budget():
    N, V = 4096, 256000
    hidden, weight = (
        (torch.randn(N, 256) * 0.1).requires_grad_(),
        (torch.randn(V, 256) * 0.1).requires_grad_(),
    )
    targets, budget = torch.randint(V, (N,)), 256 << 20  # the logits: 3.9 GiB
    options = dict(logits_budget=budget)
    for op in (
        lambda: kernels.linear_cross_entropy(hidden, weight, targets, **options),
        lambda: kernels.linear_logprob(hidden, weight, targets, **options).logprob.mean(),
    ):
        hidden.grad = weight.grad = None
        assert peak_bytes(lambda: op().backward()) - hidden.nbytes - weight.nbytes <= budget


@pytest.mark.parametrize("peak", [0.0, 1.0], ids=["spread", "peaked"])
def test_bf16_error_is_at_most_1_1_times_that_of_plain_torch_in_bf16(peak):
    N, V, D = (96, 501, 64) if INTERPRETED else (512, 3001, 64)
    most = (
        2.5 if INTERPRETED else 1.1
    )  # the interpreter (triton 3.9) cuts fp32 off to bf16 where a GPU rounds it
    targets, g = torch.randint(V, (N,)), torch.randn(N)
    head = torch.randn(V, D) * 0.4  # logits of +-3.2, and of the target 10 more when peaked
    hidden = (torch.randn(N, D) + peak * head[targets]).bfloat16().requires_grad_()
    weight = head.bfloat16().requires_grad_()
    ref_hidden, ref_weight = (
        torch.randn(N, D).bfloat16(),
        (head + 0.2 * torch.randn(V, D)).bfloat16(),
    )
    leaves, wide = (
        [hidden, weight],
        [x.detach().double().requires_grad_() for x in (hidden, weight)],
    )

    def all_of(result, leaves):
        return [result, *torch.autograd.grad(result, leaves, g.to(result.dtype))]

    exact = all_of(reference.linear_logprob(*wide, targets)[0], wide)
    plain = relative_errors(all_of(reference.linear_logprob(*leaves, targets)[0], leaves), exact)
    exact_kl = all_of(reference.linear_kl(*wide, ref_hidden.double(), ref_weight.double()), wide)
    plain_kl = relative_errors(
        all_of(reference.linear_kl(*leaves, ref_hidden, ref_weight), leaves), exact_kl
    )
    for budget in (0, 1_000_000, 2 << 30):
        options = dict(logits_budget=budget)
        for entropy in (False, True):
            ours = all_of(
                kernels.linear_logprob(*leaves, targets, entropy=entropy, **options).logprob, leaves
            )
            assert all(a <= most * b for a, b in zip(relative_errors(ours, exact), plain)), (
                budget,
                entropy,
            )
        losses = kernels.linear_token_loss(
            *leaves, targets, lambda lp, index: g[index] * lp, **options
        )
        ours = [
            x.double() * 7 for x in torch.autograd.grad(losses.sum() / 7, leaves)
        ]  # a factor that is no power of 2
        assert all(a <= most * b for a, b in zip(relative_errors(ours, exact[1:]), plain[1:])), (
            budget
        )
        ours = all_of(kernels.linear_kl(*leaves, ref_hidden, ref_weight, **options), leaves)
        assert all(a <= most * b for a, b in zip(relative_errors(ours, exact_kl), plain_kl)), budget


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_runs_are_bitwise_equal_and_unset_memory_leaves_no_trace(dtype):
    N, V = (20, 103) if INTERPRETED else (300, 1003)
    hidden, weight, ref_hidden, ref_weight, targets, mask = linear_case(N, V, D=16, dtype=dtype)

    def everything(budget):
        options = dict(logits_budget=budget, temperature=0.9)
        out = [*kernels.linear_logprob(hidden, weight, targets, entropy=True, **options)]
        out += [*tensors(kernels.linear_logprob(hidden, weight, targets, **options))]
        out += [
            kernels.linear_token_loss(hidden, weight, targets, lambda lp, index: lp * lp, **options)
        ]
        out += [
            kernels.linear_kl(
                hidden, weight, ref_hidden, ref_weight, mask=mask, reverse=r, **options
            )
            for r in (True, False)
        ]
        out += [kernels.kl_rows(hidden, ref_hidden.repeat(1, 4), mask=mask)]
        out += [*kernels.logprob_rows(hidden, targets.clamp(max=15), entropy=True)]
        return [x.detach() for x in out] + list(
            torch.autograd.grad(sum(x.sum() for x in out), [hidden, weight])
        )

    for budget in (0, 700_000, 2 << 30):
        first = everything(budget)
        assert all(x.isfinite().all() for x in first)
        torch.use_deterministic_algorithms(True)  # fills every torch.empty with NaN
        try:
            assert torch.empty(3).isnan().all()
            runs = [everything(budget), everything(budget)]
        finally:
            torch.use_deterministic_algorithms(False)
        assert all(torch.equal(a, b) for run in runs for a, b in zip(first, run))


def test_columns_beyond_a_vocabulary_slice_are_zero_in_a_narrow_gradient(monkeypatch):
    """Some CPUs' bf16 product reads on beyond the last column and multiplies by 0: NaN in unset
    memory would survive. So slices_backward zeroes up to the next multiple of 64 columns."""
    hidden, weight, ref_hidden, ref_weight, targets, mask = linear_case(
        N=20, V=103, D=16, dtype=torch.bfloat16
    )
    add_product_, checked = backward.add_product_, []

    def check_product_(total, left, right):
        columns = left.shape[1]
        rows = left.as_strided((len(left), padded(columns)), left.stride())
        checked.append(bool((rows[:, columns:] == 0).all()))
        return add_product_(total, left, right)

    monkeypatch.setattr(backward, "add_product_", check_product_)
    torch.use_deterministic_algorithms(True)  # fills every torch.empty with NaN
    try:
        for budget in (0, 30_000):  # slices of 16 columns; larger ones, the last one shorter
            options = dict(logits_budget=budget)
            out = [*kernels.linear_logprob(hidden, weight, targets, entropy=True, **options)]
            out += [kernels.linear_kl(hidden, weight, ref_hidden, ref_weight, **options)]
            grads = torch.autograd.grad(sum(x.sum() for x in out), [hidden, weight])
            assert all(x.isfinite().all() for x in grads)
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(checked) > 14 and all(checked)


def test_unit_gradients_of_selected_rows_are_stored_one_after_another():
    logits, ref = torch.randn(2, 9, 23, dtype=torch.float64)
    rows = torch.tensor([7, 2, 4])
    targets = torch.tensor([0, 22, 5])
    ops = dispatch.row_ops(logits)
    units = torch.full((3, 3, 23), math.nan, dtype=torch.float64)
    ops.statistics(logits, targets, 1, logits.new_empty(4, 3), rows=rows, unit=units[0])
    for unit, reverse in zip(units[1:], (True, False)):
        ops.kl_statistics(logits, ref, 1, reverse, logits.new_empty(5, 3), rows=rows, unit=unit)
    leaf = logits[rows].requires_grad_()
    losses = [-reference.logprob_rows(leaf, targets)[0]]
    losses += [reference.kl_rows(leaf, ref[rows], reverse=r) for r in (True, False)]
    for unit, loss in zip(units, losses):
        torch.testing.assert_close(unit, torch.autograd.grad(loss.sum(), leaf)[0])


def test_inputs_are_not_modified():
    hidden, weight, ref_hidden, ref_weight, targets, mask = linear_case(N=40, V=300)
    logits, ref_logits = torch.randn(2, 40, 300, dtype=torch.float64)
    logits.requires_grad_()
    given = [hidden, weight, ref_hidden, ref_weight, targets, mask, logits, ref_logits]
    before = [x.detach().clone() for x in given]
    for budget in BUDGETS:
        results = [
            *kernels.linear_logprob(
                hidden, weight, targets, entropy=True, temperature=2, logits_budget=budget
            )
        ]
        results += [kernels.linear_cross_entropy(hidden, weight, targets, logits_budget=budget)]
        results += [
            kernels.linear_kl(
                hidden,
                weight,
                ref_hidden,
                ref_weight,
                mask=mask,
                temperature=2,
                logits_budget=budget,
            )
        ]
        results += [*kernels.logprob_rows(logits, targets, temperature=2, entropy=True)]
        results += [
            kernels.kl_rows(logits, ref_logits, temperature=2, reverse=r) for r in (True, False)
        ]
        results += [
            *tensors(kernels.logprob_rows(logits, torch.arange(40))),
            kernels.kl_rows(logits, ref_logits),
        ]
        torch.autograd.grad(sum(x.sum() for x in results), [hidden, weight, logits])
    assert all(torch.equal(a, b) for a, b in zip(before, given))


# ---- kl_estimate ----


def test_k1_and_k3_are_unbiased_and_k2_agrees_to_second_order():
    logp = torch.log_softmax(torch.randn(1, 8, dtype=torch.float64), -1)
    for step, tolerance in ((1.0, None), (1e-3, 1e-8)):
        logq = torch.log_softmax(logp + step * torch.randn(1, 8, dtype=torch.float64), -1)
        exact = reference.kl_rows(logp, logq)
        mean = {
            kind: (logp.exp() * kernels.kl_estimate(logp, logq, kind)).sum()
            for kind in ("k1", "k2", "k3")
        }  # enumerated
        torch.testing.assert_close(mean["k1"], exact[0])
        torch.testing.assert_close(mean["k3"], exact[0])
        if tolerance:
            assert abs(mean["k2"] - exact[0]) < tolerance
        assert (kernels.kl_estimate(logp, logq, "k3") >= 0).all()


def test_only_k2_differentiated_has_the_gradient_of_the_kl():
    logits = torch.randn(1, 8, dtype=torch.float64, requires_grad=True)
    logq = torch.log_softmax(torch.randn(1, 8, dtype=torch.float64), -1)
    (exact,) = torch.autograd.grad(reference.kl_rows(logits, logq).sum(), logits)
    got = {}
    for kind in ("k1", "k2", "k3"):
        logp = torch.log_softmax(logits, -1)
        (got[kind],) = torch.autograd.grad(
            (logp.exp().detach() * kernels.kl_estimate(logp, logq, kind)).sum(), logits
        )
    torch.testing.assert_close(got["k2"], exact)
    assert got["k1"].abs().max() < 1e-12
    torch.testing.assert_close(
        got["k3"], torch.softmax(logits, -1).detach() - logq.exp()
    )  # grad KL(q || p)


def test_only_k1_inside_a_reward_has_the_gradient_of_the_kl():
    """A reward that contains k adds E[k grad log p] to the policy gradient."""
    logits = torch.randn(1, 8, dtype=torch.float64, requires_grad=True)
    logq = torch.log_softmax(torch.randn(1, 8, dtype=torch.float64), -1)
    reverse, forward = (
        torch.autograd.grad(reference.kl_rows(logits, logq, reverse=r).sum(), logits)[0]
        for r in (True, False)
    )
    got = {}
    for kind in ("k1", "k2", "k3"):
        logp = torch.log_softmax(logits, -1)
        k = kernels.kl_estimate(logp, logq, kind).detach()
        (got[kind],) = torch.autograd.grad((logp.exp().detach() * k * logp).sum(), logits)
    torch.testing.assert_close(got["k1"], reverse)
    torch.testing.assert_close(got["k3"], reverse - forward)
    assert (got["k2"] - reverse).norm() > 0.1 * reverse.norm()


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_kl_estimate_matches_its_twin(kind):
    logprobs, ref_logprobs = -torch.rand(2, 3, 4, dtype=torch.float64)
    logprobs.requires_grad_()
    assert_same(
        *(m.kl_estimate(logprobs, ref_logprobs, kind) for m in (kernels, reference)), [logprobs]
    )


# ---- bad input ----


H, W, T = torch.randn(4, 3), torch.randn(6, 3), torch.tensor([0, 5, IGNORE, 2])
SAME = torch.ones_like


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: kernels.linear_logprob(H[0], W, T), ["hidden", "(3,)", "(N, D)"]),
        (lambda: kernels.linear_logprob(H.long(), W, T), ["hidden", "int64", "float"]),
        (lambda: kernels.linear_logprob(H.tolist(), W, T), ["hidden", "list"]),
        (lambda: kernels.linear_logprob(H, W[:, :2], T), ["weight", "(6, 2)", "(V, 3)"]),
        (lambda: kernels.linear_logprob(H, W.double(), T), ["weight", "float64", "float32"]),
        (lambda: kernels.linear_logprob(H, W.to("meta"), T), ["weight", "meta", "cpu"]),
        (lambda: kernels.linear_logprob(H, W, T[:3]), ["targets", "(3,)", "(4,)"]),
        (lambda: kernels.linear_logprob(H, W, T.float()), ["targets", "float32", "int64"]),
        (lambda: kernels.linear_logprob(H, W, T.to("meta")), ["targets", "meta", "cpu"]),
        (lambda: kernels.linear_logprob(H, W, T + 1), ["targets", "6", "[0, 6)"]),
        (lambda: kernels.linear_logprob(H, W, T - 1), ["targets", "-101", "[0, 6)"]),
        (lambda: kernels.linear_logprob(H, W, T.int() + 1), ["targets", "6", "[0, 6)"]),
        (lambda: kernels.linear_logprob(H, W, T, logits_budget=math.nan), ["logits_budget", "nan"]),
        (lambda: kernels.linear_logprob(H, W, T, logits_budget=-1), ["logits_budget", "-1"]),
        (lambda: kernels.linear_logprob(H, W, T, temperature=0), ["temperature", "0"]),
        (lambda: kernels.linear_logprob(H, W, T, temperature=math.nan), ["temperature", "nan"]),
        (lambda: kernels.linear_token_loss(H, W, T, None), ["token_loss", "NoneType"]),
        (
            lambda: kernels.linear_token_loss(H, W, T, lambda lp, index: lp.sum()),
            ["token_loss", "()", "(3,)"],
        ),
        (
            lambda: kernels.linear_token_loss(H, W, T, lambda lp, index: 1.0),
            ["token_loss", "float"],
        ),
        (
            lambda: kernels.linear_cross_entropy(H, W, T, reduction="avg"),
            ["reduction", "avg", "mean"],
        ),
        (lambda: kernels.linear_cross_entropy(H, W, T + 1), ["targets", "[0, 6)"]),
        (lambda: kernels.linear_kl(H, W, H[:3], W), ["ref_hidden", "(3, 3)", "(4"]),
        (lambda: kernels.linear_kl(H, W, H, W[:5]), ["ref_weight", "(5, 3)", "(6"]),
        (lambda: kernels.linear_kl(H, W, H[:, :2], W), ["ref_weight", "(V, 2)"]),
        (lambda: kernels.linear_kl(H, W, H, W, mask=T), ["mask", "int64", "bool"]),
        (lambda: kernels.linear_kl(H, W, H, W, mask=(T > 0)[:2]), ["mask", "(2,)", "(4,)"]),
        (lambda: kernels.linear_kl(H, W[:0], H, W[:0]), ["weight", "V >= 1"]),
        (lambda: kernels.logprob_rows(H.long(), T), ["logits", "int64"]),
        (lambda: kernels.logprob_rows(H, T), ["targets", "5", "[0, 3)"]),
        (lambda: kernels.logprob_rows(H, T % 3, temperature=-1), ["temperature", "-1"]),
        (lambda: kernels.kl_rows(H, H[:, :2]), ["ref_logits", "(4, 2)", "(4, 3)"]),
        (lambda: kernels.kl_rows(H, H, mask=[True] * 4), ["mask", "list"]),
        (lambda: kernels.kl_estimate(H, H, "k4"), ["kind", "k4", "k1"]),
        (lambda: kernels.kl_estimate(H, H[:2]), ["ref_logprobs", "(2, 3)", "(4, 3)"]),
    ],
)
def test_bad_input_is_one_valueerror_that_names_the_argument(call, words):
    with pytest.raises(ValueError) as error:
        call()
    message = str(error.value)
    assert message.startswith(words[0] + ":") and "\n" not in message
    for word in words:
        assert word in message, message


def test_zero_size_inputs_give_zero_size_outputs_and_zero_gradients():
    for N, V, D in ((0, 6, 3), (0, 0, 3), (4, 6, 0), (0, 0, 0)):
        hidden, weight = (
            torch.zeros(N, D, requires_grad=True),
            torch.zeros(V, D, requires_grad=True),
        )
        targets = torch.zeros(N, dtype=torch.int64)
        for budget in (0, 2 << 30):
            results = [
                *kernels.linear_logprob(hidden, weight, targets, entropy=True, logits_budget=budget)
            ]
            results += tensors(
                kernels.linear_logprob(hidden, weight, targets, logits_budget=budget)
            )
            results += [
                kernels.linear_kl(hidden, weight, hidden, weight, reverse=r, logits_budget=budget)
                for r in (True, False)
            ]
            results += [
                kernels.linear_token_loss(
                    hidden, weight, targets, lambda lp, index: lp, logits_budget=budget
                )
            ]
            for result in results:
                assert result.shape == (N,)
                grads = torch.autograd.grad(result.sum(), [hidden, weight], retain_graph=True)
                assert [g.shape for g in grads] == [hidden.shape, weight.shape] and all(
                    (g == 0).all() for g in grads
                )
        mean = kernels.linear_cross_entropy(hidden, weight, targets)
        torch.testing.assert_close(mean.item(), math.log(V) if N else 0.0)
    logits = torch.zeros(0, 6, requires_grad=True)
    assert kernels.kl_rows(logits, logits).shape == (0,)
    assert all(
        x.shape == (0,)
        for x in kernels.logprob_rows(logits, torch.zeros(0, dtype=torch.int32), entropy=True)
    )


@pytest.mark.parametrize(
    "capability, entropy, fused",
    [((7, 5), False, False), ((8, 0), False, True), ((8, 0), True, False), ((9, 0), True, True)],
)
def test_the_fused_forward_runs_where_its_registers_do_not_spill(
    capability, entropy, fused, monkeypatch
):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    hidden = SimpleNamespace(is_cuda=True, dtype=torch.bfloat16, shape=(8, 768), device="cuda")
    module = types.ModuleType("kernels.linear_triton")
    module.statistics = print
    monkeypatch.setitem(sys.modules, "kernels.linear_triton", module)
    monkeypatch.setattr(kernels, "linear_triton", module, raising=False)
    assert (dispatch.fused_forward(hidden, entropy) is print) == fused
