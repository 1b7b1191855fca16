"""Stage 3b: learning from comparisons without a reward model and without sampling. DPO, and the family that grew around it.

    minimise   - log sigmoid( beta (h_w - h_l) ),   h = log pi(y|x) - log pi_ref(y|x)         (Rafailov et al. 2023, eq. 7)

y_w is the chosen reply, y_l the rejected one, pi_ref the SFT model, log pi(y|x) the *sum* over the reply's tokens, its
end-of-turn token included. The policy that maximises reward - beta KL(pi || pi_ref) is pi_ref exp(r / beta) / Z, so
beta h is that policy's own reward up to a constant that cancels in the difference: fitting comparisons with it is reward
modelling and policy optimisation in one step. `--loss` names a relative; each is one function below:

    cdpo      labels are wrong with a known probability: rest at finite odds      robust   the same, corrected without bias
    ipo       a fixed distance to reach, instead of odds that can grow for ever   hinge    a margin, and nothing beyond it
    simpo     no reference: average log-probs, with a margin                      orpo     no reference and no SFT before: both at once
    kto       thumbs up or down for single replies instead of pairs

The replies need not come from a file. `--online` draws two fresh ones from the policy in every round and has them compared (Guo et al.
2024; with --refresh-ref the reference is the policy of the round's start, as in Yuan et al. 2024: the KL to --init is then unbounded,
while Xiong et al. 2024 keep the reference). `--spin` needs no judge:
a demonstration is chosen, the policy's own reply rejected, the reference refreshed; it rests where the two cannot be told apart
(Chen et al. 2024, eq. 4.7).

    python dpo.py                               the embedded world's noisy comparisons of out/sft -> out/dpo
    python dpo.py --loss kto --out out/kto      another member of the family
    python dpo.py --loss orpo --init out/base --data out/pairs.jsonl --out out/orpo        from the base model in one stage
    python dpo.py --online --out out/online     fresh replies, compared by annotators (--judge out/reward: by a reward model)
    python dpo.py --spin --data chats.jsonl --out out/spin                                 demonstrations against own replies
    python dpo.py --init DIR --data pairs.jsonl any checkpoint, any file of preferences (KTO: or of single judged replies)

Watch: loss (for dpo ln 2 = .693 at step 0 because policy and reference are the same then, exactly in float32; down to .6), accuracy
(of h_w > h_l, from .5 up; nothing at step 0, where all h are equal), kl (nats per reply, on own samples: a few tenths buy most of
the gain here), chosen_logps and rejected_logps. Both usually *fall*, the rejected faster: the loss asks for a difference, and lowering
both is the cheapest way to get one. That is expected; the chosen falling as fast is not.

What everybody gets wrong: a reference that is not the model training starts from, or dropout, or other tokens (a padding, an
end-of-turn) in one of the four log-probs: then the first loss is not ln 2. A test asserts that it is, to 1e-6.
"""

import json
import math
from dataclasses import dataclass, field
from itertools import chain, islice
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F

import kernels
import run
from data import annotators, chat, formats, tokenizer, world
from data.collate import (
    by_length,
    collate,
    encode_pairs,
    encode_unpaired,
    epochs,
    extent,
    first_epoch,
    fork,
    hold_out,
    in_batches,
    longest_side,
    pair_extents,
    reply_kl,
    rows_at_once,
)
from model import GPT, TARGETS

LOSSES = ["dpo", "cdpo", "robust", "ipo", "hinge", "simpo", "orpo", "kto"]
BETA = {"ipo": 0.5, "simpo": 1.0}  # the embedded world's defaults, where not .2
SMOOTHING = {"cdpo": 0.25, "robust": 0.1}
READERS = {
    "label_smoothing": ["cdpo", "robust", "orpo"],
    "summed": ["ipo"],
    "gamma": ["simpo"],
    "lam": ["orpo"],
}  # of some losses only
READERS |= {
    "beta": [name for name in LOSSES if name != "orpo"],
    "desirable_weight": ["kto"],
    "undesirable_weight": ["kto"],
}
READERS = {
    flag: {"loss": losses} for flag, losses in READERS.items()
}  # and flags of some sources, see run.belong
READERS |= {"prompts": {"data": False}, "agreement": {"data": False, "judge": False, "spin": False}}
READERS |= {"judge": {"online": True}, "refresh_ref": {"online": True}}
LR = {"orpo": 1e-3}  # where not 1e-4: a base model has more to learn


@dataclass
class Config:
    loss: str = "dpo"  # dpo, cdpo, robust, ipo, hinge, simpo, orpo or kto
    init: str = "out/sft"  # checkpoint directory to start from, and the reference; "scratch": random weights
    tokenizer: str = (
        ""  # vocabulary directory (default: the one of --init, or the embedded world's)
    )
    data: list = field(
        default_factory=list
    )  # files of preferences; none: replies of --init to the embedded world, compared by annotators
    out: str = ""  # run directory (default: out/dpo, replaced when complete)
    overwrite: bool = False  # replace a run that --out already holds
    resume: bool = (
        False  # go on with the killed run of these flags that --out has left, to the same result
    )
    save_every: int = (
        0  # steps after which its state is written for --resume (0: ten times in a run)
    )
    prompts: int = 20000  # without --data: how many of the world's questions get two replies
    agreement: float = 0.75  # without --data: how often annotators agree with the judge
    beta: float = (
        0.0  # KL strength: larger stays closer to the reference (default: .2; ipo .5, simpo 1)
    )
    label_smoothing: float = (
        0.0  # cdpo, robust, orpo: assumed share of flipped labels (default: cdpo .25, robust .1)
    )
    online: bool = False  # compare fresh replies of the policy, round by round (--data: files whose prompts are asked)
    judge: str = ""  # online: who compares: a reward model's directory, or "world", its judge (default: annotators of the world)
    spin: bool = False  # demonstrations against the policy's own replies, round by round (--data: files of conversations)
    rounds: int = 4  # online, spin: how often fresh replies are drawn
    refresh_ref: bool = (
        False  # online: the reference is the policy at the round's start (spin: always), not --init
    )
    labels: int = 0  # comparisons (kto: judged replies) over all rounds (0: all there are); of a file's, up to 300 are held out
    max_new_tokens: int = world.MAX_NEW_TOKENS  # longest reply to sample
    watch: int = 128  # replies sampled now and then, to see KL and gold (0: none)
    summed: bool = False  # ipo: log-probs summed over the reply, the letter of the paper, instead of averaged, as its authors trained
    gamma: float = 0.5  # simpo: the margin to reach, after beta
    lam: float = 0.03  # orpo: weight of the odds-ratio term (for real models .1)
    desirable_weight: float = 1.0  # kto: weight of good replies
    undesirable_weight: float = 1.0  # kto: weight of bad ones; desirable : undesirable, by weight times number, is best in 1 .. 4/3
    steps: int = 0  # optimiser steps (default: one and a half epochs)
    batch_size: int = 64  # pairs per optimiser step
    lr: float = 0.0  # peak learning rate (default: 1e-4, orpo 1e-3; for real models 5e-7 to 1e-6)
    lora_rank: int = (
        0  # train low-rank adapters of this rank beside frozen weights (0: train all weights)
    )
    lora_alpha: float = 0.0  # LoRA: the adapter counts alpha / rank (default: 2 * rank)
    lora_targets: str = TARGETS  # LoRA: the matrices of a block that get an adapter
    shape: str = "llama:4x96x128"  # of a model from scratch: architecture:layers x width x context
    seed: int = 0  # of data and order
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...
    dtype: str = (
        "auto"  # precision of matrix products: float32 or bfloat16 (auto: bfloat16 on CUDA)
    )

    @property
    def fresh(self):
        """Whether replies are drawn anew in every round."""
        return self.online or self.spin

    @property
    def unpaired(self):
        """Whether single replies are judged, not pairs."""
        return self.loss == "kto"


def dpo_loss(
    chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta, label_smoothing=0.0
):
    """DPO per pair, (B,). All log-probs (B,) in nats, summed over the reply's tokens.

    label_smoothing e, a number or (B,): conservative DPO (Mitchell 2023), (1-e) l(+) + e l(-). The best log-odds are then finite, as
    they should be when a share e of the labels is wrong, or when a soft label says that the choice was a close one.
    """
    chosen_ratio = chosen_logps - ref_chosen_logps  # (B,) h_w
    rejected_ratio = rejected_logps - ref_rejected_logps  # (B,) h_l
    logits = beta * (
        chosen_ratio - rejected_ratio
    )  # (B,) log-odds that the chosen reply is the better one
    return -(1 - label_smoothing) * F.logsigmoid(logits) - label_smoothing * F.logsigmoid(-logits)


def unbiased(kept, flipped, label_smoothing):
    """[(1-e) l(+) - e l(-)] / (1-2e), (B,), from a pair's losses under its label and under the other one: its mean over a share e of
    flipped labels is the mean of l under the true ones (Natarajan et al. 2013, lemma 1). A single pair's has no lower bound."""
    return ((1 - label_smoothing) * kept - label_smoothing * flipped) / (1 - 2 * label_smoothing)


def robust_dpo_loss(
    chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta, label_smoothing
):
    """DPO without bias from a share `label_smoothing` of flipped labels, (B,)                           (Chowdhury et al. 2024, eq. 12)"""
    four = chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps
    return unbiased(dpo_loss(*four, beta), dpo_loss(*four, -beta), label_smoothing)


def ipo_loss(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta):
    """(h_w - h_l - 1 / (2 beta))^2 per pair, (B,)                                                       (Azar et al. 2024, eq. 17)

    A distance to reach, so a comparison that everybody decides alike does not drive the odds to infinity. Log-probs (B,) summed
    over the reply as the paper writes them, or averaged over its tokens as its authors trained; beta is the paper's tau.
    """
    logits = (chosen_logps - ref_chosen_logps) - (rejected_logps - ref_rejected_logps)  # (B,)
    return (logits - 1 / (2 * beta)) ** 2


def hinge_loss(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta):
    """max(0, 1 - beta (h_w - h_l)) per pair, (B,): a pair won by the margin is left alone       (Zhao et al. 2023; Liu et al. 2024)"""
    return F.relu(
        1 - beta * ((chosen_logps - ref_chosen_logps) - (rejected_logps - ref_rejected_logps))
    )


def simpo_loss(chosen_avg_logps, rejected_avg_logps, beta, gamma):
    """-log sigmoid(beta (a_w - a_l) - gamma) per pair, (B,), with a the mean log-prob per token      (Meng et al. 2024, eq. 6)

    What is made likely is what generation will pick, and length buys nothing. No reference: nothing but a small learning rate
    holds the policy back, and there is no optimum in closed form.
    """
    return -F.logsigmoid(beta * (chosen_avg_logps - rejected_avg_logps) - gamma)


def orpo_loss(chosen_avg_logps, rejected_avg_logps, chosen_nll, lam, label_smoothing=0.0):
    """NLL(chosen) - lam log sigmoid(log-odds_w - log-odds_l) per pair, (B,)                           (Hong et al. 2024, eq. 6)

    odds = p / (1 - p) with p = e^a, the reply's mean probability per token; chosen_nll (B,) in nats per token. One stage from the
    base model: the first term is SFT, the second tells the two replies apart.

    DEVIATION: the second can be rid of a share `label_smoothing` of flipped labels, as robust DPO is. It has no beta: where a quarter
    of the labels is wrong it rests at odds of 3 : 1, flatter than what SFT believes already.
    """

    def log_odds(avg_logps):
        a = avg_logps.clamp(max=-1e-6)  # (B,) a little below 0, where the odds are infinite
        return a - torch.log(-torch.expm1(a))

    logits = log_odds(chosen_avg_logps) - log_odds(rejected_avg_logps)  # (B,)
    return chosen_nll + lam * unbiased(
        -F.logsigmoid(logits), -F.logsigmoid(-logits), label_smoothing
    )


def kto_loss(log_ratios, desirable, kl, beta, desirable_weight=1.0, undesirable_weight=1.0):
    """Per single reply, (B,): w_D (1 - sigmoid(beta (h - z0))) if good, w_U (1 - sigmoid(beta (z0 - h))) if bad
                                                                                               (Ethayarajh et al. 2024, eq. 8)
    log_ratios (B,) h; desirable (B,) bool; kl z0, a number or (B,), without gradient: how far the policy has moved on answers in
    general, so that raising everything is no gain. It is not estimated from the same h: their mean would cancel.
    """
    gain = torch.where(desirable, log_ratios - kl, kl - log_ratios)  # (B,)
    return torch.where(desirable, desirable_weight, undesirable_weight) * (
        1 - torch.sigmoid(beta * gain)
    )


def mismatched_kl(log_ratios):
    """log_ratios (B,) of replies to other prompts -> KTO's z0, in nats: max(0, mean), without gradient."""
    return log_ratios.detach().mean().clamp(min=0)


def batch_losses(config, logps, ref_logps, sizes, labels):
    """--loss of each pair (B,). logps, ref_logps (B, 2): chosen and rejected (KTO: the reply and one to another prompt), summed.

    sizes (B, 2): their tokens; labels (B,): the probability that chosen is the better one, which dpo and cdpo read and the others
    take for certain (KTO: 1 for a good reply, 0 for a bad one).
    """
    four = *logps.unbind(1), *ref_logps.unbind(1)  # (B,) each
    averages = (logps / sizes).unbind(1)  # (B,) each, nats per token
    match config.loss:
        case "dpo":
            return dpo_loss(*four, config.beta, 1 - labels)
        case "cdpo":
            return dpo_loss(
                *four, config.beta, torch.where(labels < 1, 1 - labels, config.label_smoothing)
            )
        case "robust":
            return robust_dpo_loss(*four, config.beta, config.label_smoothing)
        case "ipo":
            return (
                ipo_loss(*four, config.beta)
                if config.summed
                else ipo_loss(*averages, *(ref_logps / sizes).unbind(1), config.beta)
            )
        case "hinge":
            return hinge_loss(*four, config.beta)
        case "simpo":
            return simpo_loss(*averages, config.beta, config.gamma)
        case "orpo":
            return orpo_loss(*averages, -averages[0], config.lam, config.label_smoothing)
        case "kto":
            log_ratios, mismatched = (logps - ref_logps).unbind(1)  # (B,) each
            weights = config.desirable_weight, config.undesirable_weight
            return kto_loss(
                log_ratios, labels > 0.5, mismatched_kl(mismatched), config.beta, *weights
            )


def batch_metrics(config, logps, ref_logps, sizes, labels):
    """What to watch, from (B, 2) log-probs without gradient: how well the implicit rewards tell good from bad."""
    averaged = config.loss in ("simpo", "orpo") or (config.loss == "ipo" and not config.summed)
    rewards = (
        config.beta * (logps - ref_logps) / (sizes if averaged else 1)
    )  # (B, 2), up to a constant per prompt
    both = torch.stack([rewards, logps], dim=-1)  # (B, 2, 2)
    if config.unpaired:
        good = labels > 0.5  # (B,)
        right = (rewards[:, 0] > mismatched_kl(rewards[:, 1])) == good  # (B,)
        chosen, rejected = both[good, 0], both[~good, 0]  # (n, 2) each, either may be empty
    else:
        right = rewards[:, 0] > rewards[:, 1]  # (B,)
        chosen, rejected = both.unbind(1)  # (B, 2) each
    metrics = {"accuracy": right.float().mean()}
    for name, side in (("chosen", chosen), ("rejected", rejected)):
        if len(side):
            metrics[f"{name}_rewards"], metrics[f"{name}_logps"] = side.mean(0)
    if len(chosen) and len(rejected):
        metrics["margin"] = metrics["chosen_rewards"] - metrics["rejected_rewards"]
    return metrics


def sequence_logps(model, examples):
    """(ids, mask) examples -> log pi(reply | prompt) of each (B,): fp32, summed over the reply's tokens."""
    batch = collate(examples).to(model.device)
    hidden = model(batch.inputs)  # (B, T, D)
    logprobs = kernels.linear_logprob(
        hidden.flatten(0, 1), model.head_weight, batch.targets.flatten()
    ).logprob  # (B * T,)
    return logprobs.view(batch.mask.shape).sum(1)  # zero outside the mask


def pair_logps(model, pairs, apart=False):
    """Pairs of examples -> log-probs of both sides (B, 2), what they begin with, the prompt, read once for both. apart: each side in a
    row of its own, the second one without gradient: KTO's, which is only a number to compare with."""
    if apart:
        first_ones, second_ones = zip(*pairs, strict=True)
        with torch.no_grad():
            others = sequence_logps(model, second_ones)
        return torch.stack([sequence_logps(model, first_ones), others], dim=1)
    batch = collate([*chain(*pairs)])  # (2 B, T)
    rows, positions = batch.mask.nonzero(as_tuple=True)  # (n,) of the reply tokens
    hidden = fork(batch.inputs, batch.lengths).hidden(model, rows, positions)  # (n, D)
    logprob = kernels.linear_logprob(
        hidden, model.head_weight, batch.targets[rows, positions].to(model.device)
    ).logprob  # (n,)
    mask = batch.mask.to(model.device)
    return logprob.new_zeros(mask.shape).masked_scatter(mask, logprob).sum(1).view(-1, 2)


@torch.no_grad()
def all_logps(model, pairs, apart=False, size=256):
    """pair_logps of many pairs without gradients: (N, 2)."""
    return in_batches(
        lambda batch: pair_logps(model, batch, apart), pairs, longest_side, size, model
    )


# -------------------------------------------------------------------------------------------------- comparisons, round by round


class Comparisons(NamedTuple):
    """What a round learns from. The held-out ones, if any, stand first."""

    pairs: (
        list  # of (ids, mask) examples: chosen and rejected; KTO: a reply and one to another prompt
    )
    labels: torch.Tensor  # (N,)
    sizes: torch.Tensor  # (N, 2) tokens of the replies
    ref_logps: torch.Tensor  # (N, 2) all that is ever needed of the reference
    held_out: torch.Tensor  # indices of those that are only looked at
    training: torch.Tensor  # indices of the others
    questions: list  # of the held-out ones, as messages


def starting_policy(config, encoding, device):
    """The model that training starts from."""
    torch.manual_seed(
        config.seed
    )  # a vocabulary that grows draws its new rows: the same ones every time
    scratch = config.init == "scratch"
    model = (
        GPT.from_scratch(config.shape, encoding.n_vocab)
        if scratch
        else GPT.from_pretrained(config.init)
    )
    run.require(
        model.config.head == "lm",
        f"--init {config.init} has a scalar head and cannot write: name a language model",
    )
    return tokenizer.fit(model, encoding).to(device)


def reference(config, policy, encoding):
    """The starting policy, when the policy has moved on: under adapters it is still there, otherwise it is read again."""
    return policy.reference() if policy.rank else starting_policy(config, encoding, policy.device)


def load_source(config):
    """What the rounds draw on: comparisons (KTO: judged replies), with --online questions, with --spin demonstrations. Without --data
    the embedded world's demonstrations or questions; comparisons are then made of the first round's replies."""
    kind = (
        "conversation"
        if config.spin
        else "prompt"
        if config.online
        else "unpaired"
        if config.unpaired
        else "preference"
    )
    if config.data:
        return [record for path in config.data for record in formats.read(path, kind)]
    run.require(
        config.init != "scratch", "--init scratch has no replies to compare: name files with --data"
    )
    if config.spin:
        return world.demonstrations(config.prompts, config.seed)
    return world.prompts(config.prompts, config.seed)


def compared(config, policy, encoding, label, questions, wanted, seed):
    """--online: asks questions until there are `wanted` comparisons of two fresh replies (0: asks them all) -> Preference records."""
    records, asked, size = [], 0, wanted or len(questions)
    while asked < len(questions) and (not wanted or len(records) < wanted):
        pairs = annotators.two_replies(
            policy, encoding, questions[asked : asked + size], config.max_new_tokens, seed + asked
        )
        records += label(pairs, seed + asked)
        asked = min(asked + size, len(questions))
    return records, f"{asked} questions asked, {asked - len(records)} without a better reply"


def against_own_replies(config, policy, encoding, demonstrations, seed):
    """--spin: each demonstration is chosen, the policy's own reply rejected -> Preference records."""
    prompts = [record.messages[:-1] for record in demonstrations]
    replies = annotators.sample(policy, encoding, prompts, config.max_new_tokens, seed=seed)
    records = [
        formats.Preference(
            prompt, record.messages[-1:], [{"role": "assistant", "content": text}], record.where
        )
        for prompt, record, (_, ended, text) in zip(prompts, demonstrations, replies, strict=True)
        if ended and text.strip()
    ]
    return (
        records,
        f"{len(replies)} replies to demonstrations, {len(replies) - len(records)} empty or unfinished",
    )


def round_records(config, policy, encoding, label, source, turn, wanted, job):
    """Round number `turn` -> the records that it learns from: Preferences, or for KTO Unpaired ones."""
    seed = config.seed + 1000003 * turn  # of samples and annotators
    if config.data and not config.fresh:
        return source
    if config.spin:
        records, said = against_own_replies(config, policy, encoding, source, seed)
    elif config.online:
        share = len(source) // config.rounds
        records, said = compared(
            config, policy, encoding, label, source[turn * share : (turn + 1) * share], wanted, seed
        )
    else:
        records, said = (
            annotators.preferences(policy, encoding, source, config.agreement, seed),
            f"{len(source)} questions asked",
        )
    job.say(f"dpo: round {turn + 1}: {said}")
    return [
        side
        for record in records
        for side in formats.reading(record, "unpaired" if config.unpaired else "preference")
    ]


def encode(config, records, encoding, context):
    """Records -> pairs of examples, their labels, the records that they come from, and what to say of them."""
    source = ", ".join(map(str, config.data)) or "the embedded world"
    if config.unpaired:
        pairs, labels, kept = encode_unpaired(records, encoding, context, config.seed)
        both = len(set(labels)) == 2
        run.require(
            both or not pairs,
            f"KTO learns from good replies and bad ones, and {source} holds only one kind: add the other",
        )
    else:
        pairs, labels, kept = encode_pairs(records, encoding, context)
        labels = [label for label, _ in labels]
    run.require(
        pairs,
        f"none of the {len(records)} records of {source} fits the model's context of {context} tokens",
    )
    kind, why = (
        ("judged replies", "too long")
        if config.unpaired
        else ("pairs", "too long, or two equal sides")
    )
    return pairs, labels, kept, f"{len(pairs)} {kind}, {len(records) - len(kept)} dropped ({why})"


def prepare(config, records, ref, encoding, job, wanted):
    """Records -> Comparisons, `wanted` of them (0: all), with the reference's log-probs. Of fresh replies none is held out: the next
    round's are as good as held out."""
    pairs, labels, kept, found = encode(config, records, encoding, ref.config.context)
    job.say(f"{config.loss}: {found}")
    kept_back = 0 if config.fresh else min(300, 8 * config.batch_size)
    held_out, training = hold_out(min(len(pairs), wanted or len(pairs)), kept_back, config.seed)
    used = math.ceil(
        config.steps / (config.rounds if config.fresh else 1)
    ) * config.batch_size or len(pairs)  # more, no step will see
    order = held_out + training[:used]
    pairs = [pairs[i] for i in order]
    labels = torch.tensor(
        [labels[i] for i in order], dtype=torch.float32, device=job.device
    )  # (N,)
    sizes = torch.tensor(
        [[sum(mask) for _, mask in pair] for pair in pairs], device=job.device
    )  # (N, 2)
    ref_logps = torch.zeros_like(sizes, dtype=torch.float32)  # (N, 2)
    if config.loss not in ("simpo", "orpo"):
        with job.autocast():  # at the precision of training, or the first loss is not ln 2
            ref_logps = job.whole(all_logps(ref, job.share(pairs), config.unpaired), len(pairs))
    indices = torch.arange(len(pairs)).tensor_split([len(held_out)])
    return Comparisons(
        pairs, labels, sizes, ref_logps, *indices, [kept[i].prompt for i in held_out]
    )


def own_replies(config, policy, ref, encoding, questions, job):
    """What the policy says now: KL to the reference on its own replies (nats per reply), and gold where the judge knows the questions.
    The first reply is shown."""
    replies = annotators.sample(policy, encoding, questions, config.max_new_tokens)
    prompts = [chat.prompt(messages, encoding) for messages in questions]
    job.say(chat.painted_reply(prompts[0], replies[0][0], encoding, job.colour))
    metrics = {"kl": reply_kl(policy, ref, prompts, [ids for ids, _, _ in replies]).mean()}
    if all(map(world.solve, questions)):
        golds = [
            one["gold"] for one in annotators.world_judge(zip(questions, replies, strict=True))
        ]
        metrics["gold"] = sum(golds) / len(golds)
    return metrics


def expect(config, job, policy, encoding, data, questions, steps):
    """Says where the memory will go: the first round's batches, what is read without learning, replies sampled and read again."""
    training = [data.pairs[i] for i in data.training]
    batches = map(
        job.share,
        first_epoch(
            [longest_side(pair) for pair in training], config.batch_size, config.seed, steps
        ),
    )
    looked = data.pairs if config.fresh else [data.pairs[i] for i in data.held_out]
    reads = by_length(looked, longest_side, model=policy)
    if config.unpaired:  # each side is a pass of its own, and only the first one learns
        learn = [extent([training[i][0] for i in batch]) for batch in batches]
        read = [extent([looked[i][side] for i in batch]) for batch in reads for side in (0, 1)]
    else:
        learn, read = pair_extents(training, batches), pair_extents(looked, reads)
    prompt = max(
        (len(chat.prompt(messages, encoding)) for messages in questions),
        default=max(map(longest_side, data.pairs)),
    )
    longest, samples = prompt + config.max_new_tokens, 2 if config.online else 1
    again = rows_at_once(len(questions), longest, policy)  # replies at once whose KL is measured
    replies = annotators.replies_at_once(
        policy, longest, samples, 512 if config.fresh else len(questions)
    )
    compare = [(again * longest, again * config.max_new_tokens)] if questions else []
    sample = (replies, replies // samples, prompt, config.max_new_tokens) if replies else None
    job.ledger({"policy": policy}, learn, read, compare, sample, keep=True)


def main(config):
    run.require(
        config.loss in LOSSES, f"--loss must be one of {', '.join(LOSSES)}, not {config.loss}"
    )
    annotators.check_agreement(config.agreement)
    run.belong(config, READERS)
    config.beta, config.lr = (
        config.beta or BETA.get(config.loss, 0.2),
        config.lr or LR.get(config.loss, 1e-4),
    )
    config.label_smoothing = config.label_smoothing or SMOOTHING.get(config.loss, 0.0)
    run.require(
        0 <= config.label_smoothing < 0.5,
        f"--label-smoothing must lie in [0, 0.5), not {config.label_smoothing}",
    )
    run.require(
        not (config.online and config.spin),
        "--online compares, --spin imitates: choose one of them",
    )
    run.require(
        config.fresh or config.rounds == Config.rounds,
        "--rounds belongs to --online and --spin: add one of them",
    )
    known = config.judge or not (config.online and config.data)
    run.require(known, "--online on files needs a --judge: annotators know only the embedded world")
    for name in ("steps", "labels"):
        enough = (
            not config.fresh or getattr(config, name) == 0 or getattr(config, name) >= config.rounds
        )
        run.require(
            enough, f"--{name} {getattr(config, name)} are too few for --rounds {config.rounds}"
        )
    job = run.start(config, "dpo")

    # --- policy and data
    encoding = chat.extend(tokenizer.choose(config.tokenizer, config.init, world.TOKENIZER))
    policy = starting_policy(config, encoding, job.device).adapt(
        config.lora_rank, config.lora_alpha, config.lora_targets
    )
    trunk = policy if policy.rank else None
    label, room = None, policy.config.context
    if config.online:
        label, judge_reads = annotators.labeller(
            config.judge, config.agreement, encoding, job.device, trunk
        )
        room = min(room, judge_reads)
    source, rounds, questions = load_source(config), 1, []
    if config.fresh:
        rounds, room = config.rounds, room - config.max_new_tokens
        asked = [record.messages[:-1] if config.spin else record.messages for record in source]
        fitting = [
            i for i, messages in enumerate(asked) if len(chat.prompt(messages, encoding)) <= room
        ]
        watched, kept = hold_out(len(fitting), config.watch, config.seed)
        questions, found = [asked[fitting[i]] for i in watched], len(source)
        source = [source[fitting[i]] for i in kept]
        job.say(
            f"dpo: {len(source)} questions in {rounds} rounds, {found - len(fitting)} dropped for their length"
        )
        run.require(
            len(source) >= rounds, f"{len(source)} records are too few for --rounds {rounds}"
        )
    needs = [
        n
        for n in (
            config.labels // rounds,
            math.ceil(config.steps / rounds) * config.batch_size * config.fresh,
        )
        if n
    ]
    wanted = min(needs, default=0)  # comparisons of a round; 0: all there are
    records = round_records(config, policy, encoding, label, source, 0, wanted, job)
    run.require(records, "no two replies could be told apart: there is nothing to learn")
    data = prepare(config, records, policy, encoding, job, wanted)
    questions = questions or data.questions[: config.watch]

    # --- training
    steps = config.steps or rounds * math.ceil(1.5 * len(data.training) / config.batch_size)
    expect(config, job, policy, encoding, data, questions, steps)
    optimizer = run.optimizer(policy, config.lr)
    now = SimpleNamespace(
        data=None
    )  # for --resume: a later round's comparisons, whose policy is gone (the first round's was --init)
    first = job.resume(policy=policy, optimizer=optimizer, now=now)
    learner = job.learner(policy)
    data = Comparisons(json.loads(now.data[0]), *now.data[1:]) if now.data else data
    for step in job.steps(steps):
        turn = step * rounds // steps
        begun = -(-turn * steps // rounds)  # the round's first step
        if step == begun > 0:  # a new round: fresh replies, and what the reference makes of them
            records = round_records(config, policy, encoding, label, source, turn, wanted, job)
            if not records:
                job.say("dpo: no two replies could be told apart any more: training ends here")
                break
            refreshed = config.spin or config.refresh_ref
            data = prepare(
                config,
                records,
                policy if refreshed else reference(config, policy, encoding),
                encoding,
                job,
                wanted,
            )
            now.data = (
                json.dumps(data.pairs),
                *data[1:],
            )  # one string: millions of small lists would take long to write
        if step in (begun, first):
            lengths = [longest_side(data.pairs[i]) for i in data.training]
            batches = islice(epochs(lengths, config.batch_size, config.seed), step - begun, None)
        rows = data.training[next(batches)]  # (B,)
        labels, sizes, ref_logps = data.labels[rows], data.sizes[rows], data.ref_logps[rows]
        with job.autocast():
            logps = pair_logps(learner, [data.pairs[i] for i in job.share(rows)], config.unpaired)
        logps = job.whole(logps, len(rows))  # (B, 2)
        losses = batch_losses(config, logps, ref_logps, sizes, labels)
        losses.mean().backward()
        lr, grad_norm = run.update(optimizer, policy, step, steps, config.lr, warmup=steps // 10)
        metrics = {
            "loss": losses.detach().mean(),
            **batch_metrics(config, logps.detach(), ref_logps, sizes, labels),
        }
        metrics |= {"grad_norm": grad_norm, "lr": lr}
        if len(data.held_out) and run.due(step, steps):
            rows = data.held_out
            with job.autocast():
                logps = all_logps(policy, [data.pairs[i] for i in job.share(rows)], config.unpaired)
            logps = job.whole(logps, len(rows))  # (N, 2)
            metrics["held_out_loss"] = batch_losses(
                config, logps, data.ref_logps[rows], data.sizes[rows], data.labels[rows]
            ).mean()
        if questions and run.due(step, steps):
            metrics |= own_replies(
                config, policy, reference(config, policy, encoding), encoding, questions, job
            )
        job.log(step, **metrics)

    def save(directory):
        policy.save_pretrained(directory)
        tokenizer.save(encoding, directory)

    job.finish(save)


if __name__ == "__main__":
    run.script(main, Config, __doc__, ranks=True)
