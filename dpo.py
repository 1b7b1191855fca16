"""Stage 3b: learning from comparisons without a reward model. DPO and its family.

    minimise   - log sigmoid( beta (h_w - h_l) ),   h = log pi(y|x) - log pi_ref(y|x)
                                                                     (Rafailov et al. 2023, eq. 7)

y_w is the chosen reply, y_l the rejected one, pi_ref the SFT model, log pi(y|x) the *sum* over the
reply's tokens, its end-of-turn token included. The policy that maximises reward r - beta KL(pi ||
pi_ref) is pi_ref exp(r / beta) / Z(x). So its beta h is r - beta log Z(x), and Z cancels in the
model P(w wins) = sigmoid(r_w - r_l): fitting it with beta h is reward modelling and policy
optimisation in one step. `--loss` names a relative (`batch_losses` calls it):

    dpo-nll  and the chosen reply's NLL, so it stays likely   ln-dpo    log-probs per token
    cdpo     noisy labels: smoothed, so odds stay finite      robust    noisy labels: unbiased
    ipo      regress the gap h_w - h_l to a fixed value       hinge     no loss beyond a margin
    simpo    no reference: average log-probs and a margin     orpo      SFT and DPO-like in one
    kto      thumbs up or down for single replies             apo-zero  raise h_w and lower h_l

The replies need not be fixed before. `--online` draws two fresh ones from the policy in every
round and has them compared (Guo et al. 2024). The reference stays --init (Xiong et al. 2024), or
with --refresh-ref is the policy at the round's start (Yuan et al. 2024); the KL to --init is then
unbounded. `--spin` needs no judge: a demonstration is chosen, the policy's own reply rejected, the
reference refreshed (Chen et al. 2024, eq. 4.7). It rests where the two cannot be told apart.

    python dpo.py                               noisy comparisons of out/sft's replies -> out/dpo
    python dpo.py --loss kto --out out/kto      another member of the family
    python dpo.py --loss orpo --init out/base --data out/pairs.jsonl --out out/orpo     one stage
    python dpo.py --online --out out/online     fresh replies (--judge: who compares them)
    python dpo.py --spin --data chats.jsonl --out out/spin
    python dpo.py --init DIR --data pairs.jsonl any checkpoint, any file of preferences

Watch: loss (at step 0 policy and reference are the same: dpo, ln-dpo, cdpo, robust ln 2 = .693,
dpo-nll ln 2 + alpha NLL, hinge and apo-zero 1; dpo to .6), accuracy (of h_w > h_l; means nothing at
step 0), kl (nats per reply on own samples: a few tenths buy most of the gain here), chosen_logps
and rejected_logps. Both usually *fall*, the rejected faster: the loss asks for a difference, and
lowering both gives one. The chosen falling as fast is not healthy.

What everybody gets wrong: a reference other than the starting policy, or dropout, or an extra token
(padding, end-of-turn) in one of the four log-probs. Each moves the first loss off ln 2 (tested).
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import run
from data import annotators, checkpoints, world
from data.collate import batch_order, longest_side
from data.comparisons import Comparisons, Source, check_rounds, encode
from data.logprobs import all_logps, pair_logps
from evaluate.measures import own_replies

LOSSES = "dpo dpo-nll ln-dpo cdpo robust ipo hinge apo-zero simpo orpo kto".split()
# For the embedded world. Robust assumes fewer flips than the 25 % there: it has no lower bound.
BETA = {"ln-dpo": 1.0, "ipo": 0.5, "apo-zero": 1.0, "simpo": 1.0}  # other losses: .2
SMOOTHING = {"cdpo": 0.25, "robust": 0.1}  # other losses: 0
LR = {"orpo": 1e-3}  # a base model has more to learn; other losses: 1e-4


@dataclass
class Config(run.Flags):
    loss: str = "dpo"  # dpo, dpo-nll, ln-dpo, cdpo, robust, ipo, hinge, apo-zero, simpo, orpo, kto
    beta: float | None = None  # KL strength: larger stays closer to ref (default: .2, see BETA)
    alpha: float = 1.0  # dpo-nll: weight of the chosen reply's NLL per token
    label_smoothing: float | None = None  # share of flipped labels (default: cdpo .25, robust .1)
    gamma: float = 0.5  # simpo: target margin, not scaled by beta
    lam: float = 0.03  # orpo: weight of the odds-ratio term (for real models .1)
    summed: bool = False  # ipo: sum log-probs, as in the paper (default: average them)
    desirable_weight: float = 1.0  # kto: of good replies; weight x number: 1 to 4/3 x that of bad
    undesirable_weight: float = 1.0  # kto: of bad replies
    prompts: int = 20000  # without --data: how many of the world's questions get two replies
    agreement: float = 0.75  # without --data: how often annotators agree with the judge
    online: bool = False  # compare fresh replies of the policy, round by round
    judge: str = ""  # --online: a reward model, or "world" (default: the world's annotators)
    spin: bool = False  # demonstrations against the policy's own replies, round by round
    rounds: int = 4  # --online, --spin: how often fresh replies are drawn
    refresh_ref: bool = False  # --online: the reference is the policy at the round's start
    labels: int = 0  # comparisons over all rounds (0: all); of a file's, up to 300 are held out
    max_new_tokens: int = world.MAX_NEW_TOKENS  # longest reply to sample
    watch: int = 128  # replies sampled to see KL and gold, the true score (0: none)
    steps: int | None = None  # optimiser steps (default: one and a half epochs)
    lr: float | None = None  # peak (default: 1e-4, orpo 1e-3; for real models 5e-7 to 1e-6)

    @property
    def fresh(self):
        """Whether every round draws fresh replies."""
        return self.online or self.spin


def check(config):
    """Fills in the loss's defaults, and refuses flags that do not go together."""
    run.check_choice(config, "loss", LOSSES)
    annotators.check_agreement(config.agreement)
    requires = {
        "beta": {"loss": [name for name in LOSSES if name != "orpo"]},
        "alpha": {"loss": ["dpo-nll"]},
        "label_smoothing": {"loss": ["cdpo", "robust", "orpo"]},
        "gamma": {"loss": ["simpo"]},
        "lam": {"loss": ["orpo"]},
        "summed": {"loss": ["ipo"]},
        "desirable_weight": {"loss": ["kto"]},
        "undesirable_weight": {"loss": ["kto"]},
        "prompts": {"data": False},
        "agreement": {"data": False, "judge": False, "spin": False},
        "judge": {"online": True},
        "refresh_ref": {"online": True},
    }
    run.check_requires(config, requires)
    run.fill(config, beta=BETA.get(config.loss, 0.2), lr=LR.get(config.loss, 1e-4))
    run.fill(config, label_smoothing=SMOOTHING.get(config.loss, 0.0))
    run.check_range(config, "beta", above=0)
    run.check_range(config, "label_smoothing", most=0.499)  # half of the labels flipped say nothing
    one = torch.ones(1, 2)  # a pair of replies of one token: has --loss a case?
    losses = batch_losses(config, -one, Comparisons([], one[:, 0], one, -one, 0))  # (1,)
    run.require(losses is not None, f"--loss {config.loss} has no case in batch_losses: add one")
    check_rounds(config)


# ---------------------------------------------------------------------------------------- losses


def dpo_loss(
    chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta, label_smoothing=0.0
):
    """DPO per pair, (B,). All log-probs (B,) in nats, summed over the reply's tokens.

    label_smoothing e, a number or (B,): conservative DPO (Mitchell 2023), (1-e) l(+) + e l(-),
    where l(-) is the loss of the flipped label. A pair then aims at finite log-odds, log((1-e) /
    e): its worth if a share e of labels is wrong, or if 1-e is a soft label.
    """
    chosen_ratio = chosen_logps - ref_chosen_logps  # (B,) h_w
    rejected_ratio = rejected_logps - ref_rejected_logps  # (B,) h_l
    logits = beta * (chosen_ratio - rejected_ratio)  # (B,) log-odds that chosen is the better one
    return -(1 - label_smoothing) * F.logsigmoid(logits) - label_smoothing * F.logsigmoid(-logits)


def unbiased(loss, flipped_loss, label_smoothing):
    """[(1-e) l(+) - e l(-)] / (1-2e), (B,). Its mean over a share e of flipped labels is the mean
    of l under the true ones (Natarajan et al. 2013, lemma 1). It has no lower bound."""
    e = label_smoothing
    return ((1 - e) * loss - e * flipped_loss) / (1 - 2 * e)


def robust_dpo_loss(
    chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta, label_smoothing
):
    """DPO unbiased by a share `label_smoothing` of flips, (B,) (Chowdhury et al. 2024)."""
    logps = chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps
    flipped_loss = dpo_loss(*logps, -beta)  # -log sigmoid(-x): as if rejected were chosen
    return unbiased(dpo_loss(*logps, beta), flipped_loss, label_smoothing)


def ipo_loss(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta):
    """(h_w - h_l - 1 / (2 beta))^2 per pair, (B,) (Azar et al. 2024, eq. 17).

    A distance to reach: a unanimous comparison does not drive the odds to infinity. Log-probs (B,)
    summed over the reply as in the paper, or averaged as its authors trained. beta is its tau.
    """
    gap = (chosen_logps - ref_chosen_logps) - (rejected_logps - ref_rejected_logps)  # (B,)
    return (gap - 1 / (2 * beta)) ** 2


def hinge_loss(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta):
    """max(0, 1 - beta (h_w - h_l)) per pair, (B,): a pair won by the margin is left alone
    (Zhao et al. 2023; Liu et al. 2024)."""
    gap = (chosen_logps - ref_chosen_logps) - (rejected_logps - ref_rejected_logps)  # (B,)
    return F.relu(1 - beta * gap)


def apo_zero_loss(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta):
    """1 - sigmoid(beta h_w) + sigmoid(beta h_l) per pair, (B,) (D'Oosterlinck et al. 2024, eq. 7):
    each reply has a term of its own, so lowering both is no gain. Both terms saturate."""
    chosen_ratio = chosen_logps - ref_chosen_logps  # (B,)
    rejected_ratio = rejected_logps - ref_rejected_logps  # (B,)
    return 1 - torch.sigmoid(beta * chosen_ratio) + torch.sigmoid(beta * rejected_ratio)


def simpo_loss(chosen_avg_logps, rejected_avg_logps, beta, gamma):
    """-log sigmoid(beta (a_w - a_l) - gamma) per pair, (B,) (Meng et al. 2024, eq. 6).

    The loss uses average log-probability a, so a longer reply gains nothing. There is no reference,
    hence no optimum in closed form: only a small learning rate holds the policy back.
    """
    return -F.logsigmoid(beta * (chosen_avg_logps - rejected_avg_logps) - gamma)


def log_odds(avg_logps):
    """log(p / (1 - p)) of p = e^a, the geometric mean probability per token; a (B,) below 0."""
    a = avg_logps.clamp(max=-1e-6)
    return a - torch.log(-torch.expm1(a))


def orpo_loss(chosen_avg_logps, rejected_avg_logps, chosen_nll, lam, label_smoothing=0.0):
    """NLL(chosen) - lam log sigmoid(log-odds_w - log-odds_l) per pair, (B,) (Hong et al. 2024).

    Eq. 6; chosen_nll (B,) in nats per token. One stage from the base model: the first term is SFT,
    the second tells the two replies apart.

    DEVIATION: the second term can be corrected for a share `label_smoothing` of flipped labels, as
    in robust DPO. Uncorrected, 25 % of flips bring it to rest at an odds ratio of 3 : 1.
    """
    logits = log_odds(chosen_avg_logps) - log_odds(rejected_avg_logps)  # (B,)
    odds_loss = unbiased(-F.logsigmoid(logits), -F.logsigmoid(-logits), label_smoothing)
    return chosen_nll + lam * odds_loss


def kto_loss(log_ratios, desirable, kl, beta, desirable_weight=1.0, undesirable_weight=1.0):
    """w_D (1 - sigmoid(beta (h - z0))) of a good reply, w_U (1 - sigmoid(beta (z0 - h))) of a bad
    one, (B,) (Ethayarajh et al. 2024).

    log_ratios (B,) h; desirable (B,) bool; kl z0, a number or (B,), without gradient: how far the
    policy has moved on replies in general, so that raising all of them is no gain.
    """
    gain = torch.where(desirable, log_ratios - kl, kl - log_ratios)  # (B,)
    weights = torch.where(desirable, desirable_weight, undesirable_weight)
    return weights * (1 - torch.sigmoid(beta * gain))


def mismatched_kl(log_ratios):
    """log_ratios (B,) of replies to another prompt, given this one -> z0 = max(0, mean), in nats,
    without gradient: an estimate of the KL that does not depend on the replies being judged."""
    return log_ratios.detach().mean().clamp(min=0)


def averages(config):
    """Whether the loss reads log-probs averaged over a reply's tokens instead of summed."""
    always = config.loss in ("ln-dpo", "simpo", "orpo")
    return always or (config.loss == "ipo" and not config.summed)


def batch_losses(config, logps, batch):
    """--loss of each pair of a batch of Comparisons, (B,).

    logps (B, 2): the policy's summed log-probs of chosen and rejected; for KTO of a reply and of a
    mismatched one. batch.ref_logps and batch.sizes (B, 2): the reference's (0 for simpo and orpo),
    and the replies' tokens. batch.labels (B,): P(chosen is the better one), which only the
    four called dpo read as a probability; of KTO 1 for a good reply, 0 for a bad one.
    """
    ref_logps = batch.ref_logps  # (B, 2)
    if averages(config):
        logps, ref_logps = logps / batch.sizes, ref_logps / batch.sizes  # nats per token
    chosen, rejected = logps.unbind(1)  # (B,) each
    four = chosen, rejected, *ref_logps.unbind(1)
    match config.loss:
        case "dpo" | "ln-dpo":  # ln-dpo: of averages (Lambert et al. 2024)
            return dpo_loss(*four, config.beta, 1 - batch.labels)
        case "dpo-nll":  # Pang et al. 2024
            chosen_nll = -chosen / batch.sizes[:, 0]  # (B,) nats per token
            return dpo_loss(*four, config.beta, 1 - batch.labels) + config.alpha * chosen_nll
        case "cdpo":  # a soft label is its own smoothing
            soft = batch.labels < 1
            smoothing = torch.where(soft, 1 - batch.labels, config.label_smoothing)
            return dpo_loss(*four, config.beta, smoothing)
        case "robust":
            return robust_dpo_loss(*four, config.beta, config.label_smoothing)
        case "ipo":
            return ipo_loss(*four, config.beta)
        case "hinge":
            return hinge_loss(*four, config.beta)
        case "apo-zero":
            return apo_zero_loss(*four, config.beta)
        case "simpo":
            return simpo_loss(chosen, rejected, config.beta, config.gamma)
        case "orpo":
            return orpo_loss(chosen, rejected, -chosen, config.lam, config.label_smoothing)
        case "kto":
            log_ratios, mismatched = (logps - ref_logps).unbind(1)  # (B,) each
            z0 = mismatched_kl(mismatched)
            weights = config.desirable_weight, config.undesirable_weight
            return kto_loss(log_ratios, batch.labels > 0.5, z0, config.beta, *weights)


def batch_metrics(config, logps, batch):
    """What to watch, from (B, 2) log-probs without gradient. Rewards are beta h; accuracy is how
    often chosen has more, for KTO how often good is above beta z0 and bad below."""
    rewards = config.beta * (logps - batch.ref_logps)  # (B, 2)
    if averages(config):
        rewards = rewards / batch.sizes
    if config.loss == "kto":
        good = batch.labels > 0.5  # (B,)
        correct = (rewards[:, 0] > mismatched_kl(rewards[:, 1])) == good  # (B,)
        sides = {"chosen": (good, 0), "rejected": (~good, 0)}  # rows, column
    else:
        correct = rewards[:, 0] > rewards[:, 1]  # (B,)
        sides = {"chosen": (slice(None), 0), "rejected": (slice(None), 1)}
    metrics = {"accuracy": correct.float().mean()}
    for name, place in sides.items():
        if len(rewards[place]):  # a batch of KTO may hold replies of one kind only
            metrics[f"{name}_rewards"] = rewards[place].mean()
            metrics[f"{name}_logps"] = logps[place].mean()
    if "chosen_rewards" in metrics and "rejected_rewards" in metrics:
        metrics["margin"] = metrics["chosen_rewards"] - metrics["rejected_rewards"]
    return metrics


# -------------------------------------------------------------------------------------- training


def starting_policy(config, policy):
    """The policy before its first step: the weights under its adapters, or --init, read again. That
    saves the memory of a second model during training."""
    return policy.reference() if policy.rank else checkpoints.open_policy(config, policy.device)[0]


def prepare(config, records, ref, encoding, job, wanted):
    """Records -> Comparisons (`wanted` of them, 0: all) with the log-probs of the reference, and
    the questions of the held-out ones, which come first."""
    context = ref.config.context
    data, questions = encode(config, records, encoding, context, wanted, job.device, job.say)
    if config.loss not in ("simpo", "orpo"):  # at training's precision: first loss ln 2
        data.ref_logps = job.forward(all_logps, ref, data.pairs, kto=config.loss == "kto")
    return data, questions


@run.stage
def main(config):
    check(config)
    job = run.start(config, "dpo")
    policy, encoding = checkpoints.open_policy(config, job.device)
    source = Source(config, policy, encoding, job)  # not config.fresh: one round
    records = source.draw(policy, round=0)
    run.require(records, "no two replies could be told apart: there is nothing to learn")
    ref = policy  # before its first step the policy is its own reference
    data, questions = prepare(config, records, ref, encoding, job, source.wanted)
    questions = source.questions or questions[: config.watch]  # what KL is measured on
    job.memory(policy=policy)

    rounds, count = source.rounds, len(data.pairs) - data.held_out
    steps = config.steps or rounds * math.ceil(1.5 * count / config.batch_size)
    optimizer = run.adamw(policy, config.lr)
    # A later round's replies cannot be sampled again after a kill: their policy is gone.
    saved = data if config.fresh else None
    order, kto = None, config.loss == "kto"
    for step in job.steps(steps, policy=policy, optimizer=optimizer, comparisons=saved):
        round = step * rounds // steps
        start, end = (math.ceil(r * steps / rounds) for r in (round, round + 1))  # of the round
        if step == start and round > 0:  # fresh replies of today's policy
            records = source.draw(policy, round)
            if not records:
                job.say("dpo: no two replies could be told apart any more: training ends here")
                break
            ref = policy if config.spin or config.refresh_ref else starting_policy(config, policy)
            fresh, _ = prepare(config, records, ref, encoding, job, source.wanted)
            del ref  # frees the second model
            vars(data).update(vars(fresh))  # in place: job.steps saves this object
        if step == start or order is None:  # None: --resume in the middle of a round
            lengths = [longest_side(pair) for pair in data.pairs[data.held_out :]]
            order = batch_order(lengths, config.batch_size, config.seed, end - start)

        batch = data.select([data.held_out + i for i in order[step - start]])
        logps = job.forward(pair_logps, policy, batch.pairs, kto=kto)  # (B, 2) log pi(y|x)
        losses = batch_losses(config, logps, batch)  # (B,) in nats
        losses.mean().backward()
        grad_norm = run.clip(policy, max_norm=1.0)
        lr = run.linear(config.lr, step, steps, warmup=steps // 10)
        run.step(optimizer, lr)  # and zero_grad
        metrics = {"loss": losses.detach().mean(), **batch_metrics(config, logps.detach(), batch)}
        metrics |= {"grad_norm": grad_norm, "lr": lr}
        if data.held_out and run.due(step, steps):
            held_out = data.select(list(range(data.held_out)))
            logps = job.forward(all_logps, policy, held_out.pairs, kto=kto)  # (N, 2), no grad
            metrics["held_out_loss"] = batch_losses(config, logps, held_out).mean()
        if questions and run.due(step, steps):
            job.check(step, batch.records, losses, **metrics)  # a policy of NaN cannot reply
            options = (encoding, questions, config.max_new_tokens, job)
            metrics |= own_replies(policy, starting_policy(config, policy), *options)
        job.log(step, records=batch.records, losses=losses, **metrics)

    return checkpoints.save_run(job, policy, encoding)


if __name__ == "__main__":
    run.script(main, Config, __doc__, ranks=True)
