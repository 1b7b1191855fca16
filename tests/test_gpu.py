"""Claims about the Triton path that only a GPU can show: sizes beyond 32-bit addresses, the grid's
limits, peak memory."""

import pytest
import torch

import kernels
import sft
from data.forks import Forks
from kernels import reference
from model import GPT, Config

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def on_the_gpu():
    torch.manual_seed(0)
    torch.backends.cuda.enable_cudnn_sdp(False)  # as in every run
    with torch.device("cuda"):
        yield


def test_row_ops_address_more_than_2_31_logits_and_more_than_65535_rows():
    N, V = 70_000, 32_768  # 2.3e9 logits, 4.6 GB in bf16
    logits, targets = (
        torch.randn(N, V, dtype=torch.bfloat16).requires_grad_(),
        torch.randint(V, (N,)),
    )
    out = kernels.logprob_rows(logits, targets, entropy=True)
    last = slice(N - 8, N)
    exact = reference.logprob_rows(
        logits[last].detach().double().requires_grad_(), targets[last], entropy=True
    )
    for ours, twin in zip(out, exact, strict=True):
        torch.testing.assert_close(ours[last].double(), twin.detach(), rtol=1e-5, atol=1e-5)
    (grad,) = torch.autograd.grad(out.logprob.sum(), logits)
    probabilities = torch.softmax(logits[last].detach().double(), 1)
    expected = -probabilities.scatter_add(
        1, targets[last, None], torch.full((8, 1), -1.0, dtype=torch.float64)
    )
    assert (grad[last].double() - expected).norm() <= 4e-3 * expected.norm()
    del grad, out
    kl = kernels.kl_rows(logits, logits)
    assert (kl == 0).all()


def test_linear_ops_on_more_than_65535_tokens_and_2_31_logits():
    N, V, D = 70_000, 32_768, 64
    hidden, weight = (
        torch.randn(N, D).bfloat16().requires_grad_(),
        torch.randn(V, D).mul(0.2).bfloat16().requires_grad_(),
    )
    targets, last = torch.randint(V, (N,)), slice(N - 8, N)
    exact = reference.linear_logprob(
        hidden[last].detach().double(), weight.detach().double(), targets[last]
    )[0]
    token = kernels.linear_token_loss(hidden, weight, targets, lambda logprob, index: -logprob)
    for budget in (1 << 30, 16 << 30):  # recomputed; kept
        logprob = kernels.linear_logprob(hidden, weight, targets, logits_budget=budget).logprob
        torch.testing.assert_close(logprob[last].double(), exact, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(logprob, -token, rtol=1e-4, atol=1e-4)
        ours, formed = (
            torch.autograd.grad(x.sum(), [hidden, weight], retain_graph=True)
            for x in (-logprob, token)
        )
        for a, b in zip(ours, formed, strict=True):
            assert (a - b).norm() <= 1e-2 * b.norm()
    with torch.no_grad():  # the fused forward
        scored = kernels.linear_logprob(hidden, weight, targets).logprob
    torch.testing.assert_close(scored, -token, rtol=1e-4, atol=1e-4)


def never_waits(work):
    """Raises RuntimeError if the host waits for the GPU in work()."""
    work()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        work()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_without_an_ignore_index_the_host_never_waits():
    hidden, weight = (
        torch.randn(300, 64).bfloat16().requires_grad_(),
        torch.randn(5000, 64).requires_grad_(),
    )
    targets = torch.randint(5000, (300,))

    def work():
        with torch.autocast("cuda", torch.bfloat16):
            out = kernels.linear_logprob(hidden, weight, targets, ignore_index=None)
            loss = kernels.linear_cross_entropy(hidden, weight, targets, ignore_index=None)
        (out.logprob.sum() + loss).backward()

    never_waits(work)


@pytest.mark.parametrize("D", [256, 2048])
def test_peak_memory_stays_under_the_budget_whatever_v_times_n(D):
    N, V, budget = 16_384, 128_256, 1 << 30  # the logits: 8.4 GB in fp32
    hidden, weight = (
        torch.randn(N, D).bfloat16().requires_grad_(),
        torch.randn(V, D).mul(D**-0.5).bfloat16().requires_grad_(),
    )
    targets, ref_hidden, ref_weight = torch.randint(V, (N,)), hidden.detach() * 0.9, weight.detach()
    sums = (
        2 * V * D * 4
    )  # dW of a loss known token by token is added up in fp32; some versions of torch take a copy
    for name, op, beside in (
        (
            "logprob",
            lambda: kernels.linear_logprob(
                hidden, weight, targets, logits_budget=budget
            ).logprob.mean(),
            0,
        ),
        (
            "token loss",
            lambda: kernels.linear_cross_entropy(hidden, weight, targets, logits_budget=budget),
            sums,
        ),
        (
            "kl",
            lambda: kernels.linear_kl(
                hidden, weight, ref_hidden, ref_weight, logits_budget=budget
            ).mean(),
            0,
        ),
    ):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        grads = torch.autograd.grad(op(), [hidden, weight])
        peak = torch.cuda.max_memory_allocated() - before - sum(g.nbytes for g in grads) - beside
        del grads
        assert peak <= budget + 3 * hidden.numel() * 4, (
            name,
            peak,
        )  # a few arrays (N, D) in fp32 beside the logits


def test_scoring_with_a_narrow_head_allocates_no_logits():
    N, V, D = 8192, 50257, 768
    hidden, weight, targets = (
        torch.randn(N, D).bfloat16(),
        torch.randn(V, D).mul(0.1).bfloat16(),
        torch.randint(V, (N,)),
    )
    with torch.no_grad():
        kernels.linear_logprob(hidden, weight, targets)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kernels.linear_logprob(hidden, weight, targets, entropy=True)
    assert torch.cuda.max_memory_allocated() - before < 16 << 20


@pytest.fixture
def gpt():
    return GPT(Config(61, 128, 2, 4, 2, 32, 256, 256, "llama", init_std=0.1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_recorded_step_gives_the_replies_of_plain_steps(gpt, dtype, monkeypatch):
    prompts = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10]]
    options = dict(stop_id=[3, 17], return_logprobs=True)
    with torch.autocast("cuda", dtype, enabled=dtype == torch.bfloat16):
        ours, logprobs = gpt.generate(prompts, 100, temperature=0, **options)
        monkeypatch.setattr("model.uses_graphs", lambda device: False)
        plain, expected = gpt.generate(prompts, 100, temperature=0, **options)
    assert list(map(len, ours)) == list(map(len, logprobs))
    if dtype == torch.float32:  # in bf16 two tokens may change places
        assert ours == plain
        for a, b in zip(logprobs, expected, strict=True):
            torch.testing.assert_close(torch.tensor(a), torch.tensor(b), rtol=0, atol=1e-3)


def test_recorded_steps_draw_new_numbers_each_time_and_repeat_with_the_seed(gpt):
    def generate(seed):
        generator = torch.Generator("cuda").manual_seed(seed)
        return gpt.generate([[1]] * 64, 100, generator=generator)

    first = generate(0)
    assert first == generate(0) != generate(1)
    columns = {tuple(reply[t] for reply in first) for t in range(100)}
    assert len(columns) == 100  # a replay that drew the same numbers would repeat its tokens


def test_sampled_logprobs_are_those_of_training_in_recorded_steps(gpt):
    replies, logprobs = gpt.generate([[1, 2], [3]] * 8, 100, 0.7, return_logprobs=True)
    for prompt, reply, sampled in zip([[1, 2], [3]] * 8, replies, logprobs, strict=True):
        with torch.no_grad():
            logits = gpt.logits(gpt(torch.tensor([prompt + reply])))[0, len(prompt) - 1 : -1] / 0.7
        again = logits.log_softmax(-1).gather(1, torch.tensor(reply)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(sampled), again, rtol=0, atol=2e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_heads_with_a_mask_hold_no_square_of_the_length(dtype):
    B, T = 2, 4096
    model = GPT(Config(61, 512, 1, 8, 2, 64, 512, T, "llama"))
    forks = Forks(
        torch.randint(61, (B, T)),
        torch.arange(T).expand(B, T),
        torch.ones(T, T, dtype=torch.bool).tril().expand(B, 1, T, T),
        None,
    )
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.no_grad(), torch.autocast("cuda", dtype, enabled=dtype == torch.bfloat16):
        masked = model(forks.ids, forks)
        plain = model(forks.ids)
    peak = torch.cuda.max_memory_allocated() - before
    assert peak < B * 8 * T * T * 4  # the scores of all heads in fp32
    atol = 6e-2 if dtype == torch.bfloat16 else 2e-2
    torch.testing.assert_close(masked, plain, rtol=0, atol=atol)


def test_the_forward_of_sft_never_waits_for_the_gpu(gpt):
    examples = [([1, 2, 3, 4, 5], [0, 0, 1, 1, 1]), ([6, 7, 8], [0, 1, 1])] * 4

    def work():
        # a run collates on the CPU
        with torch.device("cpu"), torch.autocast("cuda", torch.bfloat16):
            losses = sft.sequence_losses(gpt, examples)
        return losses.sum()

    never_waits(work)
