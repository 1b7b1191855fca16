"""Stage 1, supervised fine-tuning (Ouyang et al. 2022, sec. 3.5): make good replies likely.

    minimise   - sum_t m_t log pi(y_t | y_<t) / sum_t m_t

m_t is 1 on the assistant's tokens and on the end-of-turn token after them, 0 on all others (role
markers too): the model learns to answer, not to ask. Pretraining is the same loss with m_t = 1, but
--prompt-weight (0.1) on a question's tokens, which nobody can predict.

--teacher distils a larger model (Agarwal et al. 2024; on-policy, reverse KL): the student answers
the prompts itself, y ~ pi. With T tokens in all replies of a step, its loss, logged as kl, is

    sum_t KL(pi(. | y_<t) || teacher(. | y_<t)) / T

    python sft.py --pretrain                      raw documents of the embedded world  -> out/base
    python sft.py                                 its demonstrations, from out/base    -> out/sft
    python sft.py --teacher out/dpo --out out/student   a small --init learns from a large model
    python sft.py --init DIR --data chats.jsonl   any checkpoint, any file of conversations

Watch: loss (falls fast, then slowly, and levels off above 0: many replies fit a prompt, and many of
the world's demonstrations are wrong or padded), held_out_loss (follows the loss; if it rises while
the loss falls, the model memorises), grad_norm (below 1 after the warm-up; spikes: lr too high).

What everybody gets wrong: the divisor. It is sum_t m_t over the *whole* optimiser step. A mean of
micro-batch means counts a token more in a short micro-batch.
"""

from dataclasses import dataclass

import torch

import kernels
import run
from data import chat, checkpoints, world
from data.collate import batch_order, collate, hold_out, reply_examples, rows_at_once
from data.logprobs import sequence_kls
from data.supervised import load_data, open_teacher


@dataclass
class Config(run.Flags):
    init: str | None = None  # checkpoint (default: out/base; --pretrain: scratch, random)
    batch_size: int = 32  # sequences per optimiser step
    steps: int | None = None  # optimiser steps (default: 800, with --pretrain 3000)
    lr: float | None = None  # peak learning rate (default: 1e-3, with --pretrain 1.5e-3)
    weight_decay: float = 0.01  # AdamW's, on matrices
    pretrain: bool = False  # raw text, every token in the loss
    prompt_weight: float = 0.1  # --pretrain: m_t of a question's tokens
    template: str = ""  # chat format: chatml, llama3, alpaca (default: the checkpoint's, or chatml)
    last_only: bool = False  # of a conversation with several answers, only the last one counts
    teacher: str = ""  # checkpoint whose next-token distributions are learned, on own replies
    max_new_tokens: int = world.MAX_NEW_TOKENS  # --teacher: longest reply to sample
    micro_batch_size: int = 0  # sequences per forward pass of a process (0: the whole batch)
    shard: bool = False  # under torchrun: divide weights, gradients and moments among the processes


def check(config):
    """Fills in defaults that depend on --pretrain; refuses flags that clash or have no effect."""
    if config.pretrain:
        run.fill(config, steps=3000, lr=1.5e-3, init="scratch")
    else:
        run.fill(config, steps=800, lr=1e-3, init="out/base")
    requires = {name: {"pretrain": False} for name in ("last_only", "template", "teacher")}
    requires |= {"prompt_weight": {"pretrain": True}, "max_new_tokens": {"teacher": True}}
    requires["shard"] = {"resume": False, "save_every": False}
    run.check_requires(config, requires)
    alone = config.shard and run.environment("WORLD_SIZE", 1) == 1
    run.require(not alone, "--shard divides a model among several processes: start with torchrun")


def sequence_losses(model, examples):
    """(ids, weights) examples -> sum_t -m_t log pi(y_t | y_<t) of each example, in nats (B,).

    A token's loss depends only on its own log-prob, so the kernel forms the gradient in its forward
    pass, chunk by chunk, without (B * T, V) logits. Weights must go into weighted_nll.
    """
    batch = collate(examples).to(model.device)  # inputs ids[:-1], targets ids[1:], m_t; (B, T)
    supervised = batch.index  # (n,) the targets with m_t > 0, among the B * T
    weights = batch.weights.flatten()[supervised]  # (n,) m_t

    def weighted_nll(logprob, index):  # log-probs of some of the n, and their positions
        return -weights[index] * logprob

    hidden = model(batch.inputs).flatten(0, 1)[supervised]  # (n, D) before each target
    targets = batch.targets.flatten()[supervised]  # (n,)
    options = dict(ignore_index=None)  # every target counts, so nobody asks a GPU which do
    losses = kernels.linear_token_loss(hidden, model.head_weight, targets, weighted_nll, **options)
    by_token = losses.new_zeros(batch.mask.numel()).index_copy(0, supervised, losses)  # (B * T,)
    return by_token.view_as(batch.inputs).sum(1)


def total_weight(examples):
    """sum_t m_t, the divisor of the loss, logged as tokens. A first token is never a target."""
    return sum(sum(weights[1:]) for _, weights in examples)


@torch.no_grad()
def held_out_loss(model, examples, size):
    """The loss, in float32, of unseen examples, `size` at a time."""
    starts = range(0, len(examples), size)
    total = sum(sequence_losses(model, examples[start : start + size]).sum() for start in starts)
    return total / total_weight(examples)


def greedy_reply(model, example, encoding, colour):
    """The model's greedy reply to an example, as a line for the terminal."""
    ids, weights = example
    prompt_length = weights.index(1) if 1 in weights else len(ids) - 1  # before the first reply
    prompt = ids[: max(1, prompt_length)][-(model.config.context // 2) :]  # leaves room to reply
    stops = chat.stop_ids(encoding)
    (reply,) = model.generate([prompt], world.MAX_NEW_TOKENS, temperature=0, stop_id=stops)
    return chat.readable_reply(prompt, reply, encoding, colour)


@run.stage
def main(config):
    check(config)
    stage = "base" if config.pretrain else "sft"
    job = run.start(config, stage)
    encoding = checkpoints.open_vocabulary(config, template=config.template)
    chats = not config.pretrain  # a base model gets no chat template
    model = checkpoints.open_model(config, encoding, job.device, chats=chats)
    teacher = open_teacher(config, encoding, job.device) if config.teacher else None
    data = load_data(config, encoding, model.config.context, teacher)
    unseen, training = hold_out(data.questions, min(500, 16 * config.batch_size), config.seed)
    held_out = [data.examples[i] for i in unseen]
    lengths = [len(data.examples[i][0]) for i in training]
    counts = f"{data.cut} cut to the context, {data.dropped} dropped with nothing to learn"
    job.say(f"{stage}: {len(training)} examples ({counts}), such as")
    # the first one is shown, its supervised tokens marked
    job.say(chat.painted(*data.examples[training[0]], encoding, job.colour))

    held_out_size = rows_at_once(128, max(lengths), model)  # examples per forward pass
    order = batch_order(lengths, config.batch_size, config.seed, config.steps)  # of similar lengths
    job.memory(model=model, **({"teacher": teacher} if teacher else {}))
    if config.shard:
        job.shard(model)
    optimizer = run.adamw(model, config.lr, config.weight_decay)
    generator = torch.Generator(job.device).manual_seed(config.seed) if teacher else None
    sampling = dict(stop_id=chat.stop_ids(encoding), generator=generator)
    for step in job.steps(config.steps, model=model, optimizer=optimizer, generator=generator):
        rows = [training[i] for i in order[step]]
        batch = [data.examples[i] for i in rows]
        if teacher:  # not the demonstrations: the student's replies of today, at temperature 1
            prompts = [data.prompts[i] for i in rows]
            with job.autocast():
                replies = model.generate(prompts, config.max_new_tokens, **sampling)
            batch = reply_examples(prompts, replies)
        divisor = total_weight(batch)  # of the whole step
        loss = 0.0
        by_example = []  # the losses (b,) of each micro-batch
        for micro_batch in job.micro_batches(batch, config.micro_batch_size):
            if teacher:  # (b,) of all processes
                losses = job.forward(sequence_kls, model, micro_batch, ref=teacher)
            else:
                losses = job.forward(sequence_losses, model, micro_batch)
            micro_loss = losses.sum() / divisor
            micro_loss.backward()  # gradients add up to those of the whole batch
            loss += micro_loss.detach()
            by_example.append(losses.detach())
        grad_norm = run.clip(model, max_norm=1.0)  # the norm before clipping
        lr = run.linear(config.lr, step, config.steps, warmup=config.steps // 20)  # then down to 0
        run.step(optimizer, lr)  # and clears the gradients
        metrics = {"kl" if teacher else "loss": loss}  # nats per token
        metrics |= {"grad_norm": grad_norm, "lr": lr, "tokens": divisor}
        if held_out and run.due(step, config.steps, times=10):
            metrics["held_out_loss"] = held_out_loss(model, held_out, held_out_size)
            job.say(greedy_reply(model, held_out[0], encoding, job.colour))
        records = [data.records[i] for i in rows]
        job.log(step, records=records, losses=torch.cat(by_example), **metrics)

    return checkpoints.save_run(job, model, encoding, chats)


if __name__ == "__main__":
    run.script(main, Config, __doc__, ranks=True)
