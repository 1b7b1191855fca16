"""Stage 1: supervised fine-tuning. Show the model good replies and make each of their tokens
likely.

    minimise   - sum_t m_t log pi(y_t | y_<t) / sum_t m_t          (Ouyang et al. 2022, sec. 3.5)

m_t is 1 on the assistant's tokens and on the end-of-turn token behind them, 0 on everything a user
or system wrote: the model learns to answer, not to ask. Pretraining is the same script and the same
loss with every token in it: m_t = 1, or 0.1 for a question in front of an answer where the data
tells them apart (nobody can predict a question, and noise costs gradient).

    python sft.py --pretrain                      raw documents of the embedded world  -> out/base
    python sft.py                                 its demonstrations, from out/base    -> out/sft
    python sft.py --init DIR --data chats.jsonl   any checkpoint, any file of conversations

Watch: loss (falls fast, then slowly; 40 % of the world's demonstrations contain mistakes, so it
levels off above 0), held_out_loss (follows the loss; when it rises while the loss still falls, the
model has begun to memorise), grad_norm (below about 1 after the warm-up; spikes mean that lr is too
high).

What everybody gets wrong: the divisor. It is the number of supervised tokens of the *whole*
optimiser step. With a mean of micro-batch means, a token would count more in a short micro-batch.
"""

from dataclasses import dataclass

import torch

import kernels
import run
from data import chat, checkpoints, formats, world
from data.collate import batch_order, collate, hold_out
from data.passes import rows_at_once


@dataclass
class Config(run.Flags):
    init: str = ""  # checkpoint to start from (default: out/base; with --pretrain random weights)
    batch_size: int = 32  # sequences per optimiser step
    steps: int = 0  # optimiser steps (default: 800, with --pretrain 3000)
    lr: float = 0.0  # peak learning rate (default: 1e-3, with --pretrain 1.5e-3)
    weight_decay: float = 0.01  # AdamW's, on matrices
    pretrain: bool = False  # raw text, every token in the loss
    prompt_weight: float = (
        0.1  # --pretrain: weight of a question's tokens, which nobody can predict
    )
    template: str = (
        ""  # chat format: chatml, llama3 or alpaca (default: the vocabulary's, or chatml)
    )
    last_only: bool = False  # of a conversation with several answers, only the last one counts
    micro_batch_size: int = 0  # sequences per forward pass of a process (0: the whole batch)
    shard: bool = False  # under torchrun: divide weights, gradients and moments among the processes


def check(config):
    """Fills in the defaults that depend on --pretrain, and refuses flags that nothing would
    read."""
    config.steps = config.steps or (3000 if config.pretrain else 800)
    config.lr = config.lr or (1.5e-3 if config.pretrain else 1e-3)
    config.init = config.init or ("scratch" if config.pretrain else "out/base")
    requires = {
        "prompt_weight": {"pretrain": True},
        "last_only": {"pretrain": False},
        "shard": {"resume": False, "save_every": False},
    }
    run.check_requires(config, requires)
    several = "--shard divides a model among several processes: start them with torchrun"
    run.require(not config.shard or run.environment("WORLD_SIZE", 1) > 1, several)


def token_losses(model, examples):
    """(ids, weights) examples -> minus the weighted log-probs of each one's tokens, summed (B,),
    nats.

    The loss of a token needs nothing but its own log-prob, so the kernel forms the gradient in its
    forward pass, and the (B * T, V) logits never exist as a whole.
    """
    batch = collate(examples).to(model.device)
    weights = batch.weights.flatten()  # (B * T,) the m_t above

    def weighted_nll(logprob, index):  # (n,) supervised tokens and their places among the B * T
        return -weights[index] * logprob

    hidden = model(batch.inputs).flatten(0, 1)  # (B * T, D)
    targets = batch.targets.flatten()  # (B * T,)
    losses = kernels.linear_token_loss(hidden, model.head_weight, targets, weighted_nll)
    return losses.view(batch.mask.shape).sum(1)


def supervised_tokens(examples):
    """sum_t m_t over all examples: the divisor of the loss. A first token is never a target."""
    return sum(sum(weights[1:]) for _, weights in examples)


@torch.no_grad()
def held_out_loss(model, examples, size):
    """Mean loss per supervised token over examples that training never sees, `size` at a time."""
    starts = range(0, len(examples), size)
    total = sum(token_losses(model, examples[start : start + size]).sum() for start in starts)
    return total / supervised_tokens(examples)


def load_records(config):
    """Records of --data or of the embedded world: documents to pretrain on, else conversations."""
    if config.data:
        kind = "document" if config.pretrain else "conversation"
        return formats.read_all(config.data, kind)
    count = config.steps * config.batch_size + 500
    make = world.documents if config.pretrain else world.demonstrations
    return make(count, config.seed)


def load_examples(config, encoding, context):
    """-> (ids, weights) examples, how many were cut to the context, and how many were dropped
    because nothing in them is supervised."""
    end = chat.end_of_text_id(encoding)
    examples, cut = [], 0
    records = load_records(config)
    for record in records:
        if config.pretrain:
            prompt = encoding.encode_ordinary(record.text[: record.prompt])
            rest = encoding.encode_ordinary(record.text[record.prompt :])
            rest += [] if end is None else [end]
            ids, weights = prompt + rest, [config.prompt_weight] * len(prompt) + [1.0] * len(rest)
        else:
            ids, weights = chat.render(record.messages, encoding, config.last_only)
        cut += len(ids) > context + 1
        ids, weights = ids[: context + 1], weights[: context + 1]  # the last is only a target
        if any(weights[1:]):
            examples.append((ids, weights))
    return examples, cut, len(records) - len(examples)


def greedy_reply(model, example, encoding, colour):
    """The model's most likely reply to a held-out example, as a line for the terminal."""
    ids, weights = example
    prompt_length = weights.index(1) if 1 in weights else len(ids) - 1
    # keep at least one token, and leave half the context for the reply
    prompt = ids[: max(1, prompt_length)][-model.config.context // 2 :]
    stops = chat.stop_ids(encoding)
    (reply,) = model.generate([prompt], world.MAX_NEW_TOKENS, temperature=0, stop_id=stops)
    return chat.painted_reply(prompt, reply, encoding, colour)


def main(config):
    check(config)
    stage = "base" if config.pretrain else "sft"
    job = run.start(config, stage)
    encoding = checkpoints.open_vocabulary(config, template=config.template)
    model = checkpoints.open_model(config, encoding, job.device, chats=not config.pretrain)

    context = model.config.context
    examples, cut, empty = load_examples(config, encoding, context)
    limit = f"within the context of {context} tokens"
    nothing = f"no record of {config.source} has a supervised token {limit}"
    run.require(examples, f"nothing to train on: {nothing}")
    rows, kept = hold_out(len(examples), min(500, 16 * config.batch_size), config.seed)
    held_out, examples = [examples[i] for i in rows], [examples[i] for i in kept]
    counts = f"{cut} cut to the context, {empty} dropped with nothing to learn"
    job.say(f"{stage}: {len(examples)} examples ({counts}), such as")
    job.say(chat.painted(*examples[0], encoding, job.colour))  # the supervised tokens are marked

    lengths = [len(ids) for ids, _ in examples]
    held_out_rows = rows_at_once(128, max(lengths), model)
    order = batch_order(lengths, config.batch_size, config.seed, config.steps)
    job.memory(model=model)
    if config.shard:
        job.shard(model)
    optimizer = run.adamw(model, config.lr, config.weight_decay)
    for step in job.steps(config.steps, model=model, optimizer=optimizer):
        batch = [examples[i] for i in order[step]]
        tokens = supervised_tokens(batch)  # of the whole step: the divisor of every micro-batch
        loss = 0.0
        for micro_batch in job.micro_batches(batch, config.micro_batch_size):
            losses = job.forward(token_losses, model, micro_batch)  # (b,)
            micro_loss = losses.sum() / tokens
            micro_loss.backward()  # gradients add up to those of the whole batch
            loss += micro_loss.detach()
        grad_norm = run.clip(model, max_norm=1.0)
        lr = run.linear(config.lr, step, config.steps, warmup=config.steps // 20)
        run.step(optimizer, lr)
        metrics = {"loss": loss, "grad_norm": grad_norm, "lr": lr, "tokens": tokens}
        if held_out and run.due(step, config.steps, times=10):
            metrics["held_out_loss"] = held_out_loss(model, held_out, held_out_rows)
            job.say(greedy_reply(model, held_out[0], encoding, job.colour))
        job.log(step, **metrics)

    job.finish(lambda directory: checkpoints.save(model, directory, encoding, not config.pretrain))


if __name__ == "__main__":
    run.script(main, Config, __doc__, ranks=True)
