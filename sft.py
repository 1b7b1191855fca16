"""Stage 1: supervised fine-tuning. Show the model good replies and make each of their tokens likely.

    minimise   - sum_t m_t log pi(y_t | y_<t) / sum_t m_t          (Ouyang et al. 2022, sec. 3.5; the usual next-token loss)

m_t is 1 on the assistant's tokens and on the end-of-turn token behind them, 0 on everything a user or system wrote: the model
learns to answer, not to ask. Pretraining is the same script and the same loss with every token in it: m_t = 1, or 0.1 for a
question in front of an answer where the data tells them apart (nobody can predict a question, and noise costs gradient):

    python sft.py --pretrain                      raw documents of the embedded world  -> out/base
    python sft.py                                 its demonstrations, from out/base    -> out/sft
    python sft.py --init DIR --data chats.jsonl   any checkpoint, any file that data/formats.py reads

Watch: loss (falls fast, then slowly: a 4-in-10 flawed crowd keeps it well above 0), held_out_loss (follows the loss; when it turns up
while the loss still falls, the model has begun to memorise), grad_norm (below ~1 after the warm-up; spikes mean too high an lr).

What everybody gets wrong: the divisor. It is the number of supervised tokens of the *whole* optimiser step. A mean of
micro-batch means weighs a token by the company it happened to keep.
"""

from dataclasses import dataclass, field
from itertools import islice

import torch

import kernels
import run
from data import chat, formats, tokenizer, world
from data.collate import collate, epochs, extent, first_epoch, hold_out, rows_at_once
from model import GPT, TARGETS


@dataclass
class Config:
    init: str = ""  # checkpoint directory to start from; "scratch": random weights (default: scratch with --pretrain, else out/base)
    tokenizer: str = (
        ""  # vocabulary directory (default: the one of --init, or the embedded world's)
    )
    data: list = field(
        default_factory=list
    )  # files of conversations (with --pretrain: of text); none: the embedded world
    out: str = ""  # run directory (default: out/base or out/sft, replaced when complete)
    overwrite: bool = False  # replace a run that --out already holds
    resume: bool = (
        False  # go on with the killed run of these flags that --out has left, to the same result
    )
    save_every: int = (
        0  # steps after which its state is written for --resume (0: ten times in a run)
    )
    pretrain: bool = False  # raw text, every token in the loss
    template: str = (
        ""  # chat format: chatml, llama3 or alpaca (default: the vocabulary's own, else chatml)
    )
    last_only: bool = False  # of a conversation with several answers, only the last one counts
    prompt_weight: float = 0.1  # with --pretrain: what a token counts that only sets the scene (a question nobody could predict)
    steps: int = 0  # optimiser steps (default: 3000 with --pretrain, else 800)
    batch_size: int = 32  # sequences per optimiser step
    micro_batch_size: int = 0  # sequences per forward pass of a process; gradients add up to the same step (0: the whole batch)
    lr: float = 0.0  # peak learning rate (default: 1.5e-3 with --pretrain, else 1e-3)
    weight_decay: float = 0.01  # AdamW's, on matrices
    lora_rank: int = (
        0  # train low-rank adapters of this rank beside frozen weights (0: train all weights)
    )
    lora_alpha: float = 0.0  # LoRA: the adapter counts alpha / rank (default: 2 * rank)
    lora_targets: str = TARGETS  # LoRA: the matrices of a block that get an adapter
    shape: str = "llama:4x96x128"  # of a model from scratch: architecture:layers x width x context
    shard: bool = False  # under torchrun: weights, gradients and moments divided among the processes, for models too large for each
    seed: int = 0  # of weights, data and order
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...
    dtype: str = (
        "auto"  # precision of matrix products: float32 or bfloat16 (auto: bfloat16 on CUDA)
    )


def batch_loss(model, batch, divisor):
    """Weighted sum of the tokens' negative log-likelihoods / divisor: a scalar, in nats per token."""
    weights = batch.weights.flatten()  # (B * T,)

    def token_loss(logprob, index):  # (n,) supervised tokens and their places among the B * T
        return -weights[index] * logprob

    hidden = model(batch.inputs)  # (B, T, D); the (B * T, V) logits never exist as a whole
    losses = kernels.linear_token_loss(
        hidden.flatten(0, 1), model.head_weight, batch.targets.flatten(), token_loss
    )
    return losses.sum() / divisor


@torch.no_grad()
def held_out_loss(model, examples, size):
    """Mean loss per supervised token (nats) over examples that training does not see, `size` of them at a time."""
    batches = [
        collate(examples[i : i + size]).to(model.device) for i in range(0, len(examples), size)
    ]
    total = sum(batch.weights.sum() for batch in batches)
    return sum(batch_loss(model, batch, total) for batch in batches)


def reply_to(model, example, encoding, colour):
    """What the model would say, at its most likely, where the example's first answer stands; a line for the terminal."""
    ids, weights = example
    first = weights.index(1) if 1 in weights else len(ids) - 1
    prompt = ids[: max(1, first)][
        -model.config.context // 2 :
    ]  # a text may begin with what counts, and a prompt may leave no room
    (reply,) = model.generate(
        [prompt], world.MAX_NEW_TOKENS, temperature=0, stop_id=chat.stop_ids(encoding)
    )
    return chat.painted_reply(prompt, reply, encoding, colour)


def load_examples(config, encoding, context):
    """(ids, weights) examples from --data or the embedded world."""
    end = chat.end_of_text_id(encoding)
    examples, long = [], 0
    if config.data:
        kind = "document" if config.pretrain else "conversation"
        records = [record for path in config.data for record in formats.read(path, kind)]
    elif config.pretrain:
        records = world.documents(config.steps * config.batch_size + 500, config.seed)
    else:
        records = world.demonstrations(config.steps * config.batch_size + 500, config.seed)
    for record in records:
        if config.pretrain:
            scene, rest = record.text[: record.prompt], record.text[record.prompt :]
            scene, rest = (
                encoding.encode_ordinary(scene),
                encoding.encode_ordinary(rest) + ([] if end is None else [end]),
            )
            ids, weights = scene + rest, [config.prompt_weight] * len(scene) + [1.0] * len(rest)
        else:
            ids, weights = chat.render(record.messages, encoding, config.last_only)
        long += len(ids) > context + 1
        ids, weights = (
            ids[: context + 1],
            weights[: context + 1],
        )  # one more than the context: the last is only a target
        if any(weights[1:]):
            examples.append((ids, weights))
    return examples, long, len(records) - len(examples)


def main(config):
    config.steps = config.steps or (3000 if config.pretrain else 800)
    config.lr = config.lr or (1.5e-3 if config.pretrain else 1e-3)
    config.init = config.init or ("scratch" if config.pretrain else "out/base")
    run.belong(
        config,
        {
            "prompt_weight": {"pretrain": True},
            "last_only": {"pretrain": False},
            "shard": {"resume": False, "save_every": False},
        },
    )
    several = not config.shard or run.torchrun("WORLD_SIZE", 1) > 1
    run.require(
        several, "--shard divides a model among several processes: start them with torchrun"
    )
    stage = "base" if config.pretrain else "sft"
    job = run.start(config, stage)

    # --- model and vocabulary
    scratch = config.init == "scratch"
    encoding = chat.extend(
        tokenizer.choose(config.tokenizer, config.init, world.TOKENIZER), config.template
    )
    model = (
        GPT.from_scratch(config.shape, encoding.n_vocab)
        if scratch
        else GPT.from_pretrained(config.init)
    )
    run.require(
        model.config.head == "lm",
        f"--init {config.init} has a scalar head and cannot learn to write: name a language model",
    )
    model = tokenizer.fit(model, encoding, chat=not config.pretrain).to(job.device)
    model.adapt(config.lora_rank, config.lora_alpha, config.lora_targets)

    # --- data
    examples, long, empty = load_examples(config, encoding, model.config.context)
    source, context = ", ".join(map(str, config.data)) or "the embedded world", model.config.context
    run.require(
        examples,
        f"nothing to train on: no record of {source} has a supervised token within the context of {context} tokens",
    )
    held_out, kept = hold_out(len(examples), min(500, 16 * config.batch_size), config.seed)
    held_out, examples = [examples[i] for i in held_out], [examples[i] for i in kept]
    job.say(
        f"{stage}: {len(examples)} examples ({long} cut to the context, {empty} dropped with nothing to learn), such as"
    )
    job.say(chat.painted(*examples[0], encoding, job.colour))  # what counts is marked

    # --- training
    lengths, size = (
        [len(ids) for ids, _ in examples],
        (config.micro_batch_size or config.batch_size) * job.ranks,
    )  # at once, of all ranks
    looked = rows_at_once(128, max(lengths), model)  # examples at once without gradients
    batches = [
        [examples[i] for i in rows]
        for rows in first_epoch(lengths, config.batch_size, config.seed, config.steps)
    ]
    parts = [
        extent(job.share(batch[start : start + size]))
        for batch in batches
        for start in range(0, len(batch), size)
    ]
    if not config.shard:
        job.ledger(
            {"model": model},
            parts,
            [extent(held_out[i : i + looked]) for i in range(0, len(held_out), looked)],
        )
    learner = job.learner(model, config.shard)
    optimizer = run.optimizer(model, config.lr, config.weight_decay)
    first = job.resume(model=model, optimizer=optimizer)
    order = islice(epochs(lengths, config.batch_size, config.seed), first, None)
    for step in job.steps(config.steps):
        batch = [examples[i] for i in next(order)]
        supervised = sum(
            sum(weights[1:]) for _, weights in batch
        )  # of the whole step: the divisor of every micro-batch
        loss = 0.0
        for start in range(0, len(batch), size):
            micro = batch[start : start + size]
            learner.require_backward_grad_sync = start + size >= len(
                batch
            )  # ranks exchange gradients once a step, with the last part's
            with job.autocast():
                micro_loss = batch_loss(
                    learner, collate(job.share(micro)).to(job.device), supervised
                )
            micro_loss = job.whole(
                micro_loss[None], min(job.ranks, len(micro))
            ).sum()  # () one number from each rank with a share
            micro_loss.backward()
            loss += micro_loss.detach()
        lr, grad_norm = run.update(
            optimizer, model, step, config.steps, config.lr, warmup=config.steps // 20
        )
        metrics = {"loss": loss, "grad_norm": grad_norm, "lr": lr, "tokens": supervised}
        if held_out and run.due(step, config.steps, times=10):
            metrics["held_out_loss"] = held_out_loss(model, held_out, looked)
            job.say(reply_to(model, held_out[0], encoding, job.colour))
        job.log(step, **metrics)

    def save(directory):
        model.save_pretrained(directory)
        tokenizer.save(encoding, directory, chat=not config.pretrain)

    job.finish(save)


if __name__ == "__main__":
    run.script(main, Config, __doc__, ranks=True)
