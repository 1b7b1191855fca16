"""Stage 3b: learning from comparisons without a reward model. DPO and its family.

    minimise   - log sigmoid( beta (h_w - h_l) ),   h = log pi(y|x) - log pi_ref(y|x)
                                                                     (Rafailov et al. 2023, eq. 7)

y_w is the chosen reply, y_l the rejected one, pi_ref the SFT model, log pi(y|x) the *sum* over the
reply's tokens, its end-of-turn token included. The policy that maximises reward - beta KL(pi ||
pi_ref) is pi_ref exp(r / beta) / Z. So beta h is that policy's own reward, up to a constant that
cancels in the difference: fitting comparisons with it is reward modelling and policy optimisation
in one step. `--loss` names a relative; each is one function below:

    cdpo    a known share of labels is wrong: finite odds     robust  the same, without bias
    ipo     a fixed distance to reach, no growing odds        hinge   a margin, no more
    simpo   no reference: average log-probs, a margin         orpo    SFT and comparison at once
    kto     thumbs up or down for single replies

The replies need not come from a file. `--online` draws two fresh ones from the policy in every
round and has them compared (Guo et al. 2024). With --refresh-ref the reference is the policy at the
round's start (Yuan et al. 2024); the KL to --init is then unbounded, while Xiong et al. 2024 keep
the reference. `--spin` needs no judge: a demonstration is chosen, the policy's own reply rejected,
the reference refreshed. It rests where the two cannot be told apart (Chen et al. 2024, eq. 4.7).

    python dpo.py                               noisy comparisons of out/sft's replies -> out/dpo
    python dpo.py --loss kto --out out/kto      another member of the family
    python dpo.py --loss orpo --init out/base --data out/pairs.jsonl --out out/orpo     one stage
    python dpo.py --online --out out/online     fresh replies (--judge: who compares them)
    python dpo.py --spin --data chats.jsonl --out out/spin
    python dpo.py --init DIR --data pairs.jsonl any checkpoint, any file of preferences

Watch: loss (ln 2 = .693 at step 0, where policy and reference are the same, exactly in float32;
down to .6), accuracy (of h_w > h_l, from .5 up), kl (nats per reply on own samples: a few tenths
buy most of the gain here), chosen_logps and rejected_logps. Both usually *fall*, the rejected
faster: the loss asks for a difference, and lowering both is the cheapest way to get one. The chosen
falling as fast is not healthy.

What everybody gets wrong: a reference that is not the model training starts from, or dropout, or
other tokens (a padding, an end-of-turn) in one of the four log-probs. Then the first loss is not ln
2. A test asserts that it is, to 1e-6.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import run
from data import annotators, chat, checkpoints, world
from data.collate import batch_order, longest_side
from data.comparisons import Source, encode
from data.logprobs import all_logps, mismatched_logps, pair_logps, reply_kl

LOSSES = ["dpo", "cdpo", "robust", "ipo", "hinge", "simpo", "orpo", "kto"]
BETA = {"ipo": 0.5, "simpo": 1.0}  # defaults for the embedded world, where not .2
SMOOTHING = {"cdpo": 0.25, "robust": 0.1}
LR = {"orpo": 1e-3}  # where not 1e-4: a base model has more to learn


@dataclass
class Config(run.Flags):
    loss: str = "dpo"  # dpo, cdpo, robust, ipo, hinge, simpo, orpo or kto
    beta: float = 0.0  # KL strength: larger stays closer to the reference (default: .2, see BETA)
    label_smoothing: float = 0.0  # assumed share of flipped labels (default: cdpo .25, robust .1)
    gamma: float = 0.5  # simpo: the margin to reach, after beta
    lam: float = 0.03  # orpo: weight of the odds-ratio term (for real models .1)
    summed: bool = False  # ipo: sum log-probs as in the paper, instead of averaging as its code
    desirable_weight: float = 1.0  # kto: weight of good replies; weight times number should be
    undesirable_weight: float = 1.0  # kto: ... 1 to 4/3 times that of bad replies
    prompts: int = 20000  # without --data: how many of the world's questions get two replies
    agreement: float = 0.75  # without --data: how often annotators agree with the judge
    online: bool = False  # compare fresh replies of the policy, round by round
    judge: str = ""  # --online: a reward model, or "world" (default: the world's annotators)
    spin: bool = False  # demonstrations against the policy's own replies, round by round
    rounds: int = 4  # --online, --spin: how often fresh replies are drawn
    refresh_ref: bool = False  # --online: the reference is the policy at the round's start
    labels: int = 0  # comparisons over all rounds (0: all); of a file's, up to 300 are held out
    max_new_tokens: int = world.MAX_NEW_TOKENS  # longest reply to sample
    watch: int = 128  # replies sampled from time to time, to see KL and gold (0: none)
    steps: int = 0  # optimiser steps (default: one and a half epochs)
    lr: float = 0.0  # peak learning rate (default: 1e-4, orpo 1e-3; for real models 5e-7 to 1e-6)


def check(config):
    """Fills in the loss's defaults, and refuses flags that do not go together."""
    run.check_choice(config, "loss", LOSSES)
    annotators.check_agreement(config.agreement)
    requires = {
        "beta": {"loss": [name for name in LOSSES if name != "orpo"]},
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
    config.beta = config.beta or BETA.get(config.loss, 0.2)
    config.lr = config.lr or LR.get(config.loss, 1e-4)
    config.label_smoothing = config.label_smoothing or SMOOTHING.get(config.loss, 0.0)
    share = config.label_smoothing
    run.require(0 <= share < 0.5, f"--label-smoothing must lie in [0, 0.5), not {share}")
    fresh = config.online or config.spin
    both = config.online and config.spin
    run.require(not both, "--online compares, --spin imitates: choose one of them")
    rounds = "--rounds belongs to --online and --spin: add one of them"
    run.require(fresh or config.rounds == Config.rounds, rounds)
    judge = "--online on files needs a --judge: annotators know only the embedded world"
    run.require(config.judge or not (config.online and config.data), judge)
    for name in ("steps", "labels") if fresh else ():
        count = getattr(config, name)
        few = f"--{name} {count} are too few for --rounds {config.rounds}"
        run.require(count == 0 or count >= config.rounds, few)


# ---------------------------------------------------------------------------------------- losses


def dpo_loss(
    chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta, label_smoothing=0.0
):
    """DPO per pair, (B,). All log-probs (B,) in nats, summed over the reply's tokens.

    label_smoothing e, a number or (B,): conservative DPO (Mitchell 2023), (1-e) l(+) + e l(-). The
    best log-odds are then finite, as they should be when a share e of the labels is wrong, or when
    a soft label says that the choice was close.
    """
    chosen_ratio = chosen_logps - ref_chosen_logps  # (B,) h_w
    rejected_ratio = rejected_logps - ref_rejected_logps  # (B,) h_l
    logits = beta * (chosen_ratio - rejected_ratio)  # (B,) log-odds that chosen is the better one
    return -(1 - label_smoothing) * F.logsigmoid(logits) - label_smoothing * F.logsigmoid(-logits)


def unbiased(loss, flipped_loss, label_smoothing):
    """[(1-e) l(+) - e l(-)] / (1-2e), (B,), from a pair's losses under its label and under the
    other one. Its mean over a share e of flipped labels is the mean of l under the true ones
    (Natarajan et al. 2013, lemma 1). For a single pair it has no lower bound."""
    e = label_smoothing
    return ((1 - e) * loss - e * flipped_loss) / (1 - 2 * e)


def robust_dpo_loss(
    chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta, label_smoothing
):
    """DPO without bias from a share `label_smoothing` of flipped labels, (B,)
    (Chowdhury et al. 2024, eq. 12)."""
    logps = chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps
    return unbiased(dpo_loss(*logps, beta), dpo_loss(*logps, -beta), label_smoothing)


def ipo_loss(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta):
    """(h_w - h_l - 1 / (2 beta))^2 per pair, (B,) (Azar et al. 2024, eq. 17).

    A distance to reach: a comparison that everybody decides alike does not drive the odds to
    infinity. Log-probs (B,) summed over the reply as the paper writes them, or averaged over its
    tokens as its authors trained. beta is the paper's tau.
    """
    chosen_ratio = chosen_logps - ref_chosen_logps  # (B,)
    rejected_ratio = rejected_logps - ref_rejected_logps  # (B,)
    return (chosen_ratio - rejected_ratio - 1 / (2 * beta)) ** 2


def hinge_loss(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta):
    """max(0, 1 - beta (h_w - h_l)) per pair, (B,): a pair won by the margin is left alone
    (Zhao et al. 2023; Liu et al. 2024)."""
    chosen_ratio = chosen_logps - ref_chosen_logps  # (B,)
    rejected_ratio = rejected_logps - ref_rejected_logps  # (B,)
    return F.relu(1 - beta * (chosen_ratio - rejected_ratio))


def simpo_loss(chosen_avg_logps, rejected_avg_logps, beta, gamma):
    """-log sigmoid(beta (a_w - a_l) - gamma) per pair, (B,) (Meng et al. 2024, eq. 6).

    The loss uses average log-probability a, as decoding does, so a longer reply gains nothing.
    There is no reference: only a small learning rate holds the policy back, and no optimum in
    closed form.
    """
    return -F.logsigmoid(beta * (chosen_avg_logps - rejected_avg_logps) - gamma)


def log_odds(avg_logps):
    """log(p / (1 - p)) of p = e^a, the mean probability per token; a (B,) kept a little below 0."""
    a = avg_logps.clamp(max=-1e-6)
    return a - torch.log(-torch.expm1(a))


def orpo_loss(chosen_avg_logps, rejected_avg_logps, chosen_nll, lam, label_smoothing=0.0):
    """NLL(chosen) - lam log sigmoid(log-odds_w - log-odds_l) per pair, (B,) (Hong et al. 2024, eq.
    6)

    chosen_nll (B,) in nats per token. One stage from the base model: the first term is SFT, the
    second tells the two replies apart.

    DEVIATION: the second term can be corrected for a share `label_smoothing` of flipped labels, as
    in robust DPO. It has no beta: where a quarter of the labels is wrong it rests at odds of 3 : 1,
    flatter than what SFT believes already.
    """
    logits = log_odds(chosen_avg_logps) - log_odds(rejected_avg_logps)  # (B,)
    odds_loss = unbiased(-F.logsigmoid(logits), -F.logsigmoid(-logits), label_smoothing)
    return chosen_nll + lam * odds_loss


def kto_loss(log_ratios, desirable, kl, beta, desirable_weight=1.0, undesirable_weight=1.0):
    """Per single reply, (B,): w_D (1 - sigmoid(beta (h - z0))) if good, w_U (1 - sigmoid(beta (z0 -
    h))) if bad (Ethayarajh et al. 2024, eq. 8).

    log_ratios (B,) h; desirable (B,) bool; kl z0, a number or (B,), without gradient: how far the
    policy has moved on replies in general, so that raising all of them is no gain.
    """
    gain = torch.where(desirable, log_ratios - kl, kl - log_ratios)  # (B,)
    weights = torch.where(desirable, desirable_weight, undesirable_weight)
    return weights * (1 - torch.sigmoid(beta * gain))


def mismatched_kl(log_ratios):
    """log_ratios (B,) of replies to *other* prompts -> z0 = max(0, mean), without gradient. From
    the replies' own h their mean would cancel in the loss."""
    return log_ratios.detach().mean().clamp(min=0)


def batch_losses(config, logps, batch):
    """--loss of each pair (B,). logps (B, 2): summed log-probs of chosen and rejected (KTO: of the
    reply and a mismatched one). Only dpo and cdpo read soft labels; the others take them for
    certain."""
    four = *logps.unbind(1), *batch.ref_logps.unbind(1)  # (B,) each
    averages = logps / batch.sizes  # (B, 2) nats per token
    ref_averages = batch.ref_logps / batch.sizes  # (B, 2)
    match config.loss:
        case "dpo":
            return dpo_loss(*four, config.beta, 1 - batch.labels)
        case "cdpo":
            soft = batch.labels < 1
            smoothing = torch.where(soft, 1 - batch.labels, config.label_smoothing)
            return dpo_loss(*four, config.beta, smoothing)
        case "robust":
            return robust_dpo_loss(*four, config.beta, config.label_smoothing)
        case "ipo" if config.summed:
            return ipo_loss(*four, config.beta)
        case "ipo":
            return ipo_loss(*averages.unbind(1), *ref_averages.unbind(1), config.beta)
        case "hinge":
            return hinge_loss(*four, config.beta)
        case "simpo":
            return simpo_loss(*averages.unbind(1), config.beta, config.gamma)
        case "orpo":
            nll = -averages[:, 0]  # (B,)
            return orpo_loss(*averages.unbind(1), nll, config.lam, config.label_smoothing)
        case "kto":
            log_ratios, mismatched = (logps - batch.ref_logps).unbind(1)  # (B,) each
            z0, good = mismatched_kl(mismatched), batch.labels > 0.5
            weights = config.desirable_weight, config.undesirable_weight
            return kto_loss(log_ratios, good, z0, config.beta, *weights)


def batch_metrics(config, logps, batch):
    """What to watch, from (B, 2) log-probs without gradient: the implicit rewards beta h, up to a
    constant per prompt, and how often they order a pair rightly."""
    rewards = config.beta * (logps - batch.ref_logps)  # (B, 2)
    if config.loss in ("simpo", "orpo") or (config.loss == "ipo" and not config.summed):
        rewards = config.beta * (logps - batch.ref_logps) / batch.sizes
    both = torch.stack([rewards, logps], dim=-1)  # (B, 2, 2)
    if config.loss == "kto":
        good = batch.labels > 0.5  # (B,)
        correct = (rewards[:, 0] > mismatched_kl(rewards[:, 1])) == good  # (B,)
        chosen, rejected = both[good, 0], both[~good, 0]  # (n, 2) each; either may be empty
    else:
        correct = rewards[:, 0] > rewards[:, 1]  # (B,)
        chosen, rejected = both.unbind(1)  # (B, 2) each
    metrics = {"accuracy": correct.float().mean()}
    for name, side in (("chosen", chosen), ("rejected", rejected)):
        if len(side):
            metrics[f"{name}_rewards"], metrics[f"{name}_logps"] = side.mean(0)
    if len(chosen) and len(rejected):
        metrics["margin"] = metrics["chosen_rewards"] - metrics["rejected_rewards"]
    return metrics


# -------------------------------------------------------------------------------------- training


def starting_policy(config, policy):
    """The reference once the policy has moved on. Under adapters its weights are still there;
    otherwise --init is read again, which saves the memory of a second model during training."""
    return policy.reference() if policy.rank else checkpoints.open_policy(config, policy.device)[0]


def prepare(config, records, ref, encoding, job, wanted=0):
    """Records -> Comparisons with the reference's log-probs, and the questions of the held-out
    ones."""
    context = ref.config.context
    data, questions = encode(config, records, encoding, context, wanted, job.device, job.say)
    if config.loss not in ("simpo", "orpo"):  # the two without a reference
        # at the precision of training, or the first loss is not ln 2
        data.ref_logps = job.forward(all_logps, ref, data.pairs, logps=logps_function(config))
    return data, questions


def logps_function(config):
    return mismatched_logps if config.loss == "kto" else pair_logps


def look(config, policy, encoding, questions, job):
    """The policy's own replies now: KL to the starting policy (nats per reply), and gold where the
    world's judge knows the questions. The first reply is shown."""
    replies = annotators.sample(policy, encoding, questions, config.max_new_tokens)
    prompts = [chat.prompt(messages, encoding) for messages in questions]
    job.say(chat.painted_reply(prompts[0], replies[0][0], encoding, job.colour))
    ref = starting_policy(config, policy)
    metrics = {"kl": reply_kl(policy, ref, prompts, [ids for ids, _, _ in replies]).mean()}
    if all(map(world.solve, questions)):
        verdicts = annotators.world_judge(zip(questions, replies, strict=True))
        metrics["gold"] = sum(verdict["gold"] for verdict in verdicts) / len(verdicts)
    return metrics


def main(config):
    check(config)
    job = run.start(config, "dpo")
    policy, encoding = checkpoints.open_policy(config, job.device)
    source = Source(config, policy, encoding, job.device, job.say)
    records = source.draw(policy, round=0)
    run.require(records, "no two replies could be told apart: there is nothing to learn")
    ref = policy  # before its first step the policy is its own reference
    data, questions = prepare(config, records, ref, encoding, job, source.wanted)
    questions = source.questions or questions[: config.watch]
    job.memory(policy=policy)

    rounds, training = source.rounds, len(data.pairs) - data.held_out
    steps = config.steps or rounds * math.ceil(1.5 * training / config.batch_size)  # 1.5 epochs
    optimizer = run.adamw(policy, config.lr)
    # A later round's replies cannot be sampled again after a kill: their policy is gone.
    saved = data if source.fresh else None
    order, logps_of = None, logps_function(config)
    for step in job.steps(steps, policy=policy, optimizer=optimizer, comparisons=saved):
        round = step * rounds // steps
        first = math.ceil(round * steps / rounds)  # the round's first step
        if step == first > 0:  # fresh replies of the policy as it is now, and a reference for them
            records = source.draw(policy, round)
            if not records:
                job.say("dpo: no two replies could be told apart any more: training ends here")
                break
            refreshed = config.spin or config.refresh_ref
            ref = policy if refreshed else starting_policy(config, policy)
            fresh, _ = prepare(config, records, ref, encoding, job, source.wanted)
            vars(data).update(vars(fresh))
        if step == first or order is None:
            lengths = [longest_side(pair) for pair in data.pairs[data.held_out :]]
            last = math.ceil((round + 1) * steps / rounds)
            order = batch_order(lengths, config.batch_size, config.seed, last - first)

        batch = data.select([data.held_out + i for i in order[step - first]])
        logps = job.forward(logps_of, policy, batch.pairs)  # (B, 2) chosen and rejected
        losses = batch_losses(config, logps, batch)  # (B,)
        losses.mean().backward()
        grad_norm = run.clip(policy, max_norm=1.0)
        lr = run.linear(config.lr, step, steps, warmup=steps // 10)
        run.step(optimizer, lr)
        metrics = {"loss": losses.detach().mean(), **batch_metrics(config, logps.detach(), batch)}
        metrics |= {"grad_norm": grad_norm, "lr": lr}
        if data.held_out and run.due(step, steps):
            held_out = data.select(list(range(data.held_out)))
            logps = job.forward(all_logps, policy, held_out.pairs, logps=logps_of)  # (N, 2)
            metrics["held_out_loss"] = batch_losses(config, logps, held_out).mean()
        if questions and run.due(step, steps):
            metrics |= look(config, policy, encoding, questions, job)
        job.log(step, **metrics)

    job.finish(lambda directory: checkpoints.save(policy, directory, encoding))


if __name__ == "__main__":
    run.script(main, Config, __doc__, ranks=True)
