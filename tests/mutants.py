"""The bug zoo: classic bugs of instruction tuning and RLHF, as small patches to this repository.

    python -m tests.mutants                     every bug must be caught by its test
    python -m tests.mutants --only NAME NAME    these bugs only
    python -m tests.mutants --list              names and symptoms
    python -m tests.mutants --show NAME         a bug: its patch, its symptom, its story
    python -m tests.mutants --run NAME          train with the bug and without, and draw both curves

None of these bugs raises an error, and with most of them the loss still falls. A bug is put into a
copy of the tree in a temporary directory, never into the tree itself. `guard` is the test that must
fail there. `source` is a public issue or pull request about the same bug in other code, where one
is known. `--run` works for the bugs that have a `run`: a short chain of small models in out/zoo. It
trains the stage named there twice, and the scoreboard measures both models with healthy code.
"""

import difflib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import run

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ["data", "evaluate", "kernels", "run", "tests"]
BESIDE = ["pytest.ini", "requirements.txt", "README.md", "LICENSE"]  # at the top, with the stages
TIMEOUT = 300  # seconds; a guard takes a few


class Mutant(NamedTuple):
    name: str
    file: str
    old: str  # occurs exactly once in the file
    new: str  # replaces it
    symptom: str  # what a student would say
    story: str  # what is wrong, and why it is easily done
    guard: str  # the test that fails, as FILE::TEST in tests/
    source: str = ""  # where it happened: owner/repository#number
    run: str = ""  # the stage that shows it, with its flags


# ----------------------------------------------------------------------- what is learnt from a text

TEXT = [
    Mutant(
        "targets-not-shifted",
        "data/collate.py",
        "pad([ids[1:] for ids, _ in examples])",
        "pad([ids[:-1] for ids, _ in examples])",
        symptom="the loss falls to almost 0 at once, and every sample repeats its last token",
        story="Position t must predict token t + 1. Without the shift it copies token t, which it "
        "has just read.",
        guard="test_identities.py::test_after_the_shift_every_assistant_token_and_its_end_is_a_"
        "target_and_nothing_else",
        source="KempnerInstitute/KempnerForge#155",
        run="sft",
    ),
    Mutant(
        "mask-not-shifted",
        "data/collate.py",
        "weights, _ = pad([weights[1:]",
        "weights, _ = pad([weights[:-1]",
        symptom="replies begin with any word at all and then go on well",
        story="Targets are shifted and the mask is not. The first token of a reply is not learnt, "
        "and the token behind its end is.",
        guard="test_identities.py::test_each_reply_is_predicted_from_its_header_on_up_to_its_end_"
        "token",
        source="verl-project/verl#3287",
        run="sft",
    ),
    Mutant(
        "prompt-in-the-loss",
        "data/chat.py",
        "mask += [False] * len(header)",
        "mask += [True] * len(header)",
        symptom="the loss is higher than my friend's, and the model likes to ask itself questions",
        story="The mask marks the question too. The model spends its capacity on what users write.",
        guard="test_chat.py::test_mask_is_true_exactly_on_assistant_tokens_and_their_end_token",
        source="MervinPraison/PraisonAI#4358",
        run="sft",
    ),
    Mutant(
        "end-not-in-the-loss",
        "data/chat.py",
        "[i in supervised] * len(answer)",
        "[i in supervised] * (len(answer) - 1) + [False]",
        symptom="the loss looks fine, replies never end",
        story="The mask covers the words of an answer and not the end-of-turn token behind them. "
        "Nothing ever tells the model to stop.",
        guard="test_chat.py::test_an_empty_answer_supervises_its_end_token",
        source="huggingface/open-r1#494",
        run="sft",
    ),
    Mutant(
        "padding-masked-by-its-id",
        "data/collate.py",
        "mask = weights > 0",
        "mask = (weights > 0) & (targets != 0)",
        symptom="replies never end (if the padding token is the end token, as it often is)",
        story="Many vocabularies have no padding token, so people take the end token. A collator "
        "that masks padding by its id then masks every real end as well. Mask by position.",
        guard="test_identities.py::test_a_token_counts_by_its_position_even_if_its_id_is_the_"
        "padding_s",
        source="huggingface/transformers#23530",
    ),
    Mutant(
        "padded-on-the-left",
        "data/collate.py",
        "padded[: len(row)] = ",
        "padded[len(padded) - len(row) :] = ",
        symptom="a batch of one works, larger batches get worse and worse",
        story="Padding moved to the left, while positions still count from the row's first column "
        "and nothing hides the padding from attention.",
        guard="test_identities.py::test_padding_rows_are_zero_behind_their_lengths",
        source="tloen/alpaca-lora#315",
        run="sft",
    ),
    Mutant(
        "mean-of-micro-batch-means",
        "sft.py",
        "losses.sum() / divisor",
        "losses.sum() / total_weight(micro_batch)",
        symptom="gradient accumulation is worse than one large batch, and the loss is far too high",
        story="Each micro-batch is divided by its own number of tokens. The sum of means is not "
        "the mean: a token in a short micro-batch counts more. Divide by the step's total.",
        guard="test_identities.py::test_three_steps_of_sft_end_in_the_same_weights_whatever_the_"
        "micro_batch",
        source="huggingface/transformers#34191",
        run="sft --micro-batch-size 4",
    ),
    Mutant(
        "mean-over-ranks",
        "run/ranks.py",
        "lambda gradient: gradient * ranks",
        "lambda gradient: gradient",
        symptom="on two GPUs the model learns as if the gradient were halved",
        story="The loss is divided by the count of the whole batch, and DDP then averages the "
        "ranks' gradients: one division too many. Adam hides it, until clipping or a comparison "
        "with one process shows it.",
        guard="test_ranks.py::test_a_gathered_batch_has_every_rank_s_values_and_a_gradient_that_"
        "survives_ddp_s_average",
    ),
    Mutant(
        "clipped-before-the-sum",
        "sft.py",
        "loss += micro_loss.detach()",
        "loss += micro_loss.detach()\n            run.clip(model, max_norm=1.0)",
        symptom="with gradient accumulation the last examples of a batch count most",
        story="Clipping belongs after the last micro-batch. Inside the loop it shrinks again and "
        "again what earlier micro-batches have added.",
        guard="test_identities.py::test_three_steps_of_sft_end_in_the_same_weights_whatever_the_"
        "micro_batch",
    ),
    Mutant(
        "weights-of-tokens-ignored",
        "sft.py",
        "return -weights[index] * logprob",
        "return -logprob",
        symptom="--prompt-weight changes the loss's scale and nothing else",
        story="Tokens of weight .1 count like all others in the gradient, but the divisor still "
        "counts them as a tenth.",
        guard="test_identities.py::test_a_token_of_weight_a_tenth_counts_a_tenth",
        run="sft --pretrain",
    ),
    Mutant(
        "distils-the-demonstrations",
        "sft.py",
        "batch = reply_examples(prompts, replies)",
        "replies = reply_examples(prompts, replies)",
        symptom="the KL falls on the data, and the student's own replies leave what it has seen",
        story="The sampled replies are never used: the teacher is asked about the demonstrations. "
        "On-policy distillation corrects the student where it goes by itself.",
        guard="test_distillation.py::test_the_student_learns_from_its_own_replies_of_today",
    ),
    Mutant(
        "distils-by-the-forward-kl",
        "data/logprobs.py",
        "ref.head_weight, mask=mask)",
        "ref.head_weight, mask=mask, reverse=False)",
        symptom="a small student says things that its teacher would never say",
        story="KL(teacher || pi) covers all that the teacher may say. A student that is too small "
        "for it does better with one way of answering well, which KL(pi || teacher) finds.",
        guard="test_distillation.py::test_the_loss_and_its_gradient_are_those_of_the_slow_loop_and_"
        "the_teacher_gets_none",
    ),
    Mutant(
        "one-token-lost-per-block",
        "data/supervised.py",
        "slice(start, start + context + 1)",
        "slice(start, start + context)",
        symptom="nothing to see: one token in every context length is never learnt",
        story="A block of `context` inputs has `context` targets, so it needs context + 1 tokens. "
        "The last target of a block is the first input of the next.",
        guard="test_identities.py::test_a_long_document_becomes_pieces_of_the_context_whose_"
        "targets_are_all_its_tokens",
    ),
    Mutant(
        "cut-replies-get-an-end",
        "data/chat.py",
        'if not reply[-1].get("ended", True):',
        "if False:",
        symptom="the model learns to stop in the middle of a sentence",
        story="A reply that ran into the length limit is stored as text. Rendered again, it gets "
        "the end token that nobody sampled.",
        guard="test_formats.py::test_a_reply_that_was_cut_stays_one_and_teaches_no_end",
    ),
    Mutant(
        "held-out-by-record",
        "data/collate.py",
        "rows_of[key].append(row)",
        "rows_of[row].append(row)",
        symptom="held-out accuracy is .93; on questions of my own it is .81",
        story="Records are split at random, but many records share a question. The model has seen "
        "the held-out questions, and maybe their answers.",
        guard="test_identities.py::test_all_rows_of_a_question_are_held_out_or_none",
    ),
]

# ------------------------------------------------------------------------------------- chat format

CHAT = [
    Mutant(
        "user-can-type-special-tokens",
        "data/chat.py",
        'pending += [message["content"], *_pieces(',
        'pending += [*_pieces(message["content"], encoding), *_pieces(',
        symptom="a user types <|im_end|> and speaks as the system from there on",
        story="The conversation is put together as one string, and the tokenizer then finds "
        "special tokens in all of it, in what users wrote too.",
        guard="test_chat.py::test_special_tokens_spelled_in_content_stay_text",
        source="huggingface/transformers#29279",
    ),
    Mutant(
        "two-begin-tokens",
        "data/chat.py",
        'begin="<|begin_of_text|>",',
        'begin="<|begin_of_text|><|begin_of_text|>",',
        symptom="everything works, a little worse than in the paper",
        story="The template writes the begin token, and the tokenizer adds another one. The model "
        "has never seen two.",
        guard="test_chat.py::test_llama_3s_vocabulary_brings_its_template",
        source="OpenRLHF/OpenRLHF#393",
    ),
    Mutant(
        "prompt-without-its-newline",
        "data/chat.py",
        "return _render(messages, encoding, following=header)[0]",
        "return _render(messages, encoding, following=header.rstrip())[0]",
        symptom="every reply begins with an empty line",
        story="The generation prompt ends differently from the header that training saw. One "
        "token is missing, and the model has to write it first.",
        guard="test_chat.py::test_the_prompt_is_the_prefix_that_training_sees_whatever_the_answer_"
        "starts_with",
    ),
    Mutant(
        "no-generation-prompt",
        "data/chat.py",
        "return _render(messages, encoding, following=header)[0]",
        "return _render(messages, encoding)[0]",
        symptom="instead of answering, the model writes the next question itself",
        story="The prompt ends behind the user's turn. Nothing says that it is the assistant's.",
        guard="test_chat.py::test_the_prompt_is_the_prefix_that_training_sees_whatever_the_answer_"
        "starts_with",
    ),
    Mutant(
        "every-stop-is-an-end",
        "data/reinforcement.py",
        "reply[-1] == stops[0]",
        "reply[-1] in stops",
        symptom="PPO teaches the model to end its turns with the end of the document",
        story="Generation stops at several tokens. Only the end-of-turn token ends a reply, and "
        "the reward model has never read a score at another one.",
        guard="test_identities.py::test_the_rollout_trains_on_exactly_what_was_sampled",
    ),
]

# ------------------------------------------------------------------------------------ reward model

REWARD = [
    Mutant(
        "score-read-at-padding",
        "data/scores.py",
        "scores[torch.arange(len(sequences)), lengths - 1]",
        "scores[:, -1]",
        symptom="the score of a reply depends on the other replies of its batch",
        story="The last column holds the end of the longest reply and padding in all others.",
        guard="test_identities.py::test_scores_do_not_change_with_padding_order_or_company",
        source="EleutherAI/gpt-neox#1285",
        run="ppo",
    ),
    Mutant(
        "score-read-one-early",
        "data/scores.py",
        "torch.arange(len(ids)), lengths - 1)",
        "torch.arange(len(ids)), lengths - 2)",
        symptom="the reward model trains well and PPO gets nonsense from it",
        story="Training reads the hidden state before the end-of-turn token, scoring the one at "
        "it. `lengths - 1` looks like an off-by-one and invites a second one.",
        guard="test_identities.py::test_scores_do_not_change_with_padding_order_or_company",
    ),
    Mutant(
        "log-of-sigmoid",
        "reward.py",
        "F.logsigmoid(difference) - (1 - label)",
        "torch.log(torch.sigmoid(difference)) - (1 - label)",
        symptom="the loss is inf after one confident mistake, and NaN from then on",
        story="sigmoid(-104) is 0 in float32, and log 0 is -inf. logsigmoid does both in one.",
        guard="test_losses.py::test_comparisons_stay_finite_at_log_ratios_of_ten_thousand",
        source="deepspeedai/DeepSpeedExamples#423",
    ),
    Mutant(
        "chosen-and-rejected-swapped",
        "data/collate.py",
        "if record.label < 0.5:",
        "if record.label > 0.5:",
        symptom="accuracy is as good as ever, and PPO makes the policy worse",
        story="Both sides change places on their way into the batch. All metrics call the first "
        "one chosen, so they look as good as ever.",
        guard="test_identities.py::test_soft_labels_below_a_half_change_the_sides",
        run="reward",
    ),
    Mutant(
        "equal-replies-compared",
        "data/collate.py",
        " or chosen[0] == rejected[0]:",
        ":",
        symptom="a part of the loss stays at .69, whatever is learnt",
        story="Pairs whose two sides are the same, often only after cutting, teach nothing and "
        "have loss ln 2.",
        guard="test_identities.py::test_pairs_that_teach_nothing_are_dropped_and_counted",
    ),
    Mutant(
        "rewards-not-normalised",
        "reward.py",
        "normalise(model, data.batch((held_out + training)[:1000]))",
        "pass",
        symptom="the same beta is far too strong for one reward model and too weak for another",
        story="The Bradley-Terry loss leaves mean and scale of the score free. beta is a price in "
        "units of the score, so the unit has to be fixed.",
        guard="test_identities.py::test_the_reward_run_normalises_what_it_saves_and_starts_the_"
        "next_stage",
    ),
    Mutant(
        "bias-scaled-before-the-shift",
        "reward.py",
        ".sub_(scores.mean()).mul_(gain)",
        ".mul_(gain).sub_(scores.mean())",
        symptom="scores have standard deviation 1, but their mean is not 0",
        story="gain (r - mean) and gain r - mean differ unless gain is 1.",
        guard="test_identities.py::test_normalised_rewards_have_mean_0_and_deviation_1_and_the_"
        "gain_is_kept",
    ),
    Mutant(
        "score-in-bfloat16",
        "model.py",
        "with torch.autocast(hidden.device.type, enabled=False):  # bf16",
        "with torch.autocast(hidden.device.type, enabled=True):  # bf16",
        symptom="many pairs have exactly equal scores",
        story="The scalar head runs in the policy's dtype. bfloat16 has three digits: 4.01 and "
        "4.02 are the same number.",
        guard="test_model.py::test_a_score_is_fp32_under_autocast",
    ),
    Mutant(
        "step-labels-one-early",
        "data/collate.py",
        "[ends[t] for t, _ in rated]",
        "[ends[t - 1] for t, _ in rated]",
        symptom="the process model blames the step before the mistake",
        story="Each label sits at the end of another step than the one that it judges.",
        guard="test_reward.py::test_labels_sit_on_each_step_s_last_token",
        run="reward --process",
    ),
    Mutant(
        "alternative-steps-concatenated",
        "data/collate.py",
        "paths.append(([*record.steps[:t], candidate], [(t, label)]))",
        "paths.append(([*record.steps[: t + 1], candidate], [(t + 1, label)]))",
        symptom="the process model is confused by solutions that say the same step twice",
        story="PRM800K rates several candidates for one step. Each is another way to go on, not a "
        "further step.",
        guard="test_reward.py::test_alternatives_are_examples_of_their_own_and_unrated_steps_have_"
        "no_label",
    ),
    Mutant(
        "ties-are-losses",
        "data/annotators.py",
        "        if gap:\n",
        "        if True:\n",
        symptom="the policy learns to tell equally good replies apart",
        story="The judge finds both replies equally good, and the code that asks `gap > 0` calls "
        "the first one rejected.",
        guard="test_rounds.py::test_the_world_s_judge_skips_ties_and_is_never_wrong",
    ),
    Mutant(
        "position-bias-not-averaged",
        "data/constitution.py",
        "round(1 - chances[2 * k + 1], 4)",
        "round(chances[2 * k + 1], 4)",
        symptom="the AI's labels agree with each other and not with the judge",
        story="A model leans to the answer shown first. Asking in both orders helps only if the "
        "second answer is turned round before both are averaged.",
        guard="test_constitution.py::test_averaging_both_orders_takes_a_position_bias_away",
    ),
]

# --------------------------------------------------------------------------------- DPO, its family

DPO = [
    Mutant(
        "dpo-on-averages",
        "dpo.py",
        'config.loss in ("ln-dpo", "simpo", "orpo")',
        'config.loss in ("dpo", "ln-dpo", "simpo", "orpo")',
        symptom="the loss hardly moves at the paper's beta, and replies change their length",
        story="DPO's reward is the log-ratio of a whole reply, a sum. An average divides beta by "
        "the length, another one for each reply.",
        guard="test_losses.py::test_each_loss_of_a_batch_reads_what_its_equation_reads[dpo]",
        source="huggingface/trl#789",
        run="dpo",
    ),
    Mutant(
        "simpo-on-sums",
        "dpo.py",
        'config.loss in ("ln-dpo", "simpo", "orpo")',
        'config.loss in ("ln-dpo", "orpo")',
        symptom="SimPO's loss starts far from the paper's and is 0 after a few steps",
        story="The loss compares averages. Sums are larger by the length, as if beta were, and "
        "the longer reply starts behind.",
        guard="test_losses.py::test_each_loss_of_a_batch_reads_what_its_equation_reads[simpo]",
        run="dpo --loss simpo",
    ),
    Mutant(
        "ipo-on-sums",
        "dpo.py",
        "and not config.summed",
        "and config.summed",
        symptom="IPO is much worse than in the paper's figures",
        story="IPO regresses a gap to 1 / (2 beta). With sums the gap of a long pair reaches it "
        "in its first steps, and what beta means depends on the length.",
        guard="test_losses.py::test_each_loss_of_a_batch_reads_what_its_equation_reads[ipo]",
        source="huggingface/trl#1265",
        run="dpo --loss ipo",
    ),
    Mutant(
        "reference-not-averaged",
        "dpo.py",
        "logps, ref_logps = logps / batch.sizes, ref_logps / batch.sizes",
        "logps = logps / batch.sizes",
        symptom="length-normalised DPO starts far from ln 2 and likes short replies",
        story="The policy's log-probs are averaged over the reply and the reference's are not. "
        "The ratio then grows with the length of the reply, whatever the policy does.",
        guard="test_losses.py::test_the_first_losses_are_what_the_docstring_says",
        run="dpo --loss ln-dpo",
    ),
    Mutant(
        "nll-of-the-whole-reply",
        "dpo.py",
        "chosen_nll = -chosen / batch.sizes[:, 0]",
        "chosen_nll = -chosen",
        symptom="DPO with the NLL is plain fine-tuning on the chosen replies",
        story="The sum over a reply's tokens is larger than DPO's term by the length of the reply, "
        "and long replies count most.",
        guard="test_losses.py::test_each_loss_of_a_batch_reads_what_its_equation_reads[dpo-nll]",
        run="dpo --loss dpo-nll",
    ),
    Mutant(
        "apo-raises-the-rejected",
        "dpo.py",
        "+ torch.sigmoid(beta * rejected_ratio)",
        "+ torch.sigmoid(-beta * rejected_ratio)",
        symptom="the loss falls, both log-probs rise, accuracy stays at a half",
        story="The rejected reply's term has the sign of the chosen one's. The first loss is 1 all "
        "the same.",
        guard="test_losses.py::test_apo_zero_raises_the_chosen_and_lowers_the_rejected_each_by_"
        "itself",
        run="dpo --loss apo-zero",
    ),
    Mutant(
        "padding-in-the-average",
        "data/logprobs.py",
        "collate(examples).to(model.device)).sum(1)",
        "collate(examples).to(model.device)).mean(1)",
        symptom="a reply's log-prob depends on the longest reply of its batch",
        story="`mean(1)` divides by the padded length. Zeros behind the reply are counted.",
        guard="test_identities.py::test_a_reply_s_logp_is_the_sum_over_its_tokens_and_end_token_"
        "whatever_the_batch",
        run="dpo --loss kto",
    ),
    Mutant(
        "no-reference",
        "dpo.py",
        "chosen_ratio = chosen_logps - ref_chosen_logps  # (B,) h_w",
        "chosen_ratio = chosen_logps  # (B,) h_w",
        symptom="the first loss is not ln 2, and it grows with the length of the replies",
        story="One of the two ratios lacks its reference. The loss then asks for a probability "
        "instead of a change.",
        guard="test_losses.py::test_dpo_is_ln_2_where_policy_and_reference_agree",
        run="dpo",
    ),
    Mutant(
        "dpo-sides-swapped",
        "dpo.py",
        "beta * (chosen_ratio - rejected_ratio)  # (B,) log-odds",
        "beta * (rejected_ratio - chosen_ratio)  # (B,) log-odds",
        symptom="the loss falls as it should, accuracy falls below a half",
        story="The loss makes the rejected reply likely. Look at accuracy, not at the loss.",
        guard="test_losses.py::test_dpo_by_hand",
        run="dpo",
    ),
    Mutant(
        "beta-twice",
        "dpo.py",
        "F.logsigmoid(logits) - label_smoothing",
        "F.logsigmoid(beta * logits) - label_smoothing",
        symptom="the policy runs away from its reference as if beta were .04, not .2",
        story="One function multiplies log-ratios by beta to make them rewards, and the next one "
        "does it again.",
        guard="test_losses.py::test_dpo_by_hand",
        run="dpo",
    ),
    Mutant(
        "smoothing-with-the-wrong-sign",
        "dpo.py",
        " - label_smoothing * F.logsigmoid(-logits)",
        " + label_smoothing * F.logsigmoid(-logits)",
        symptom="told of noisy labels, the policy trusts them even more",
        story="With a minus, doubt pulls the odds to a finite value. With a plus it pushes them "
        "further out, and the loss has no lower bound.",
        guard="test_losses.py::test_conservative_dpo_rests_at_the_log_odds_of_the_label_noise",
        run="dpo --loss cdpo",
    ),
    Mutant(
        "robust-dpo-not-rescaled",
        "dpo.py",
        "e * flipped_loss) / (1 - 2 * e)",
        "e * flipped_loss)",
        symptom="robust DPO needs another learning rate for every noise level",
        story="Without 1 - 2e the loss is unbiased only up to a factor.",
        guard="test_losses.py::test_robust_dpo_undoes_flipped_labels_in_the_mean",
    ),
    Mutant(
        "kto-weights-swapped",
        "dpo.py",
        "torch.where(desirable, desirable_weight, undesirable_weight)",
        "torch.where(desirable, undesirable_weight, desirable_weight)",
        symptom="raising --desirable-weight makes the model forget its good replies",
        story="Both weights are 1 by default, so nobody notices until data are unbalanced.",
        guard="test_losses.py::test_every_relative_by_hand",
        run="dpo --loss kto --desirable-weight 4",
    ),
    Mutant(
        "kto-kl-of-matched-replies",
        "dpo.py",
        "z0 = mismatched_kl(mismatched)",
        "z0 = mismatched_kl(log_ratios)",
        symptom="KTO learns, but more slowly the better it gets",
        story="z0 should say how far the policy has moved on replies in general. Taken from the "
        "very replies that are judged, it takes away what they have gained.",
        guard="test_losses.py::test_each_loss_of_a_batch_reads_what_its_equation_reads[kto]",
        run="dpo --loss kto",
    ),
    Mutant(
        "kto-kl-with-a-gradient",
        "dpo.py",
        "log_ratios.detach().mean()",
        "log_ratios.mean()",
        symptom="z0 is 0 for the whole run",
        story="z0 is a number to compare with. With a gradient the loss lowers it instead.",
        guard="test_losses.py::test_kto_raises_good_replies_lowers_bad_ones_and_z0_takes_no_"
        "gradient",
    ),
    Mutant(
        "kto-mismatched-with-itself",
        "data/collate.py",
        "            if other.prompt != record.prompt\n        )",
        "        )",
        symptom="KTO's KL is too high where many replies share a question",
        story="A random other record may answer the same question: no mismatch at all.",
        guard="test_identities.py::test_kto_s_mismatched_reply_never_answers_the_same_question",
        source="huggingface/trl#1911",
    ),
    Mutant(
        "orpo-odds",
        "dpo.py",
        "return a - torch.log(-torch.expm1(a))",
        "return a",
        symptom="ORPO hardly tells the two replies apart once both are likely",
        story="The odds are p / (1 - p). Without the 1 - p this is a ratio of probabilities: from "
        ".9 to .99 it changes by a tenth, and the odds by a factor of eleven.",
        guard="test_losses.py::test_every_relative_by_hand",
        source="huggingface/diffusers#7465",
        run="dpo --loss orpo",
    ),
    Mutant(
        "second-side-reads-the-first",
        "data/forks.py",
        "(section[:, None] == section[:, :, None])",
        "(section[:, None] <= section[:, :, None])",
        symptom="training accuracy is wonderful, at sampling time nothing is left of it",
        story="Two replies share a row to save time. Without a mask between them the second one "
        "is predicted from the first. The same happens to packed examples.",
        guard="test_identities.py::test_what_a_pair_begins_with_is_read_once_and_each_side_as_if_"
        "it_stood_alone",
        source="huggingface/transformers#25452",
        run="dpo",
    ),
    Mutant(
        "packed-positions-run-on",
        "data/forks.py",
        "positions[place] = position",
        "positions[place] = place[1]",
        symptom="a little worse, and worse the more is packed into a row",
        story="The second reply of a row continues the positions of the first. When it is "
        "sampled, it begins where the prompt ends.",
        guard="test_identities.py::test_a_fork_holds_every_token_once",
        source="huggingface/nanoVLM#201",
    ),
    Mutant(
        "online-reference-follows",
        "dpo.py",
        "ref = policy if config.spin or config.refresh_ref else",
        "ref = policy if True else",
        symptom="the KL to the SFT model grows in every round, whatever beta is",
        story="Each round takes the policy as its new reference, so the KL to the start is not "
        "paid for any more.",
        guard="test_rounds.py::test_a_fixed_reference_is_left_behind_and_a_refreshed_one_follows",
    ),
]

# --------------------------------------------------------------------------------------------- PPO

PPO = [
    Mutant(
        "reference-is-the-policy",
        "data/reinforcement.py",
        "ref = policy.reference()",
        "ref = policy",
        symptom="the KL is 0 for the whole run, and the score has never been higher",
        story="`ref = policy` names the same object twice. There is no penalty left.",
        guard="test_identities.py::test_ppo_s_reference_stays_where_the_policy_began",
        run="ppo",
    ),
    Mutant(
        "copy-shares-its-weights",
        "model.py",
        "if not t.requires_grad}",
        "}",
        symptom="the KL is 0 although the reference is a deep copy",
        story="The copy's memo lists all tensors, so deepcopy copies none of them.",
        guard="test_lora.py::test_without_adapters_copies_share_no_weight",
    ),
    Mutant(
        "kl-penalty-with-the-wrong-sign",
        "ppo.py",
        "rewards = -beta * kl",
        "rewards = beta * kl",
        symptom="the KL explodes, and a larger beta makes it worse",
        story="The policy is paid for leaving its reference.",
        guard="test_identities.py::test_returns_are_the_score_less_the_kl_that_is_still_to_come",
        source="Unakar/Logic-RL#58",
        run="ppo",
    ),
    Mutant(
        "k3-in-the-reward",
        "ppo.py",
        "kl = (old_logprobs - ref_logprobs).masked_fill(~batch.mask, 0.0)",
        'kl = kernels.kl_estimate(old_logprobs, ref_logprobs, "k3").masked_fill(~batch.mask, 0.0)',
        symptom="the KL term is never negative, and does not hold the policy back",
        story="k3 is the better estimate of the KL's value, so people put it into the reward. "
        "There its gradient is 0 to first order. See tests/README.md.",
        guard="test_identities.py::test_returns_are_the_score_less_the_kl_that_is_still_to_come",
        run="ppo",
    ),
    Mutant(
        "k3-the-other-way-round",
        "kernels/rows.py",
        "return torch.expm1(-log_ratio) + log_ratio",
        "return torch.expm1(log_ratio) - log_ratio",
        symptom="in some batches the logged KL is far above the exact one",
        story="The sign decides which of KL(pi, ref) and KL(ref, pi) is estimated, and from whose "
        "samples.",
        guard="test_kernels.py::test_k1_and_k3_are_unbiased_and_k2_agrees_to_second_order",
    ),
    Mutant(
        "score-on-the-first-token",
        "ppo.py",
        "last = batch.lengths - 1",
        "last = mask.int().argmax(1)",
        symptom="replies begin well and end badly",
        story="What comes after the score has no return but the KL penalty.",
        guard="test_identities.py::test_the_score_sits_on_the_last_reply_token",
        run="ppo",
    ),
    Mutant(
        "score-behind-the-end",
        "ppo.py",
        "rewards[torch.arange(len(scores)), last] += scores",
        "rewards[torch.arange(len(scores)), (last + 1).clamp(max=mask.shape[1] - 1)] += scores",
        symptom="only the longest reply of each batch learns anything from its score",
        story="The score lands on the first padding token, which the mask then removes.",
        guard="test_identities.py::test_the_score_sits_on_the_last_reply_token",
        source="huggingface/trl#3750",
        run="ppo",
    ),
    Mutant(
        "no-price-for-not-ending",
        "data/reinforcement.py",
        "return torch.where(ended, scores, least)",
        "return scores",
        symptom="replies grow until they reach the limit",
        story="A reply that was cut has no end-of-turn token, where the reward model learnt to "
        "read a score. What it says elsewhere may be high.",
        guard="test_identities.py::test_a_score_is_read_at_the_last_token_alone_and_a_reply_"
        "without_an_end_gets_the_fixed_one",
        source="huggingface/trl#3750",
        run="ppo",
    ),
    Mutant(
        "bootstrapped-past-the-end",
        "ppo.py",
        "next_value = next_advantage = torch.zeros_like(values[:, 0])",
        "next_value, next_advantage = values[:, -1], torch.zeros_like(values[:, 0])",
        symptom="values and returns grow from iteration to iteration",
        story="A finished reply has no next state. The critic's last value is added to a return "
        "that it should only predict.",
        guard="test_losses.py::test_gae_by_hand",
        source="RoboVerseOrg/RoboVerse#814",
        run="ppo",
    ),
    Mutant(
        "gaps-count-as-steps",
        "ppo.py",
        "next_advantage = torch.where(mask[:, t], advantage, next_advantage)",
        "next_advantage = advantage",
        symptom="where a tool answers in between, the credit of what was said before fades",
        story="Tokens that others wrote between two parts of a reply are no steps: they may "
        "neither discount the advantage nor add to it.",
        guard="test_losses.py::test_gae_is_its_definition_whatever_stands_at_masked_positions",
        source="radixark/miles#1827",
    ),
    Mutant(
        "whitened-returns",
        "ppo.py",
        "return whiten(advantages, mask), returns",
        "return whiten(advantages, mask), whiten(returns, mask)",
        symptom="the critic's loss is small, its values are those of another task in every batch",
        story="Advantages may be whitened. Returns are what the critic has to predict, in the "
        "units of the score.",
        guard="test_identities.py::test_returns_are_the_score_less_the_kl_that_is_still_to_come",
        run="ppo",
    ),
    Mutant(
        "whitened-with-the-padding",
        "ppo.py",
        "masked = values[mask]",
        "masked = values.nan_to_num()",
        symptom="the more padding in a batch, the larger the policy's steps",
        story="The zeros of the padding shrink the standard deviation, and pull the mean to 0.",
        guard="test_losses.py::test_whitened_advantages_have_mean_0_and_deviation_1_over_the_mask_"
        "alone",
        run="ppo",
    ),
    Mutant(
        "values-one-token-late",
        "data/reinforcement.py",
        "return critic.score(critic(batch.inputs[rows]))",
        "return critic.score(critic(batch.inputs[rows])).roll(-1, 1)",
        symptom="the critic's loss is low, the policy learns little",
        story="The baseline of an action may not know the action. A value read after the token "
        "takes away the token's own credit.",
        guard="test_identities.py::test_values_are_those_of_the_state_before_each_token_whatever_"
        "the_padding",
        run="ppo",
    ),
    Mutant(
        "ratio-upside-down",
        "ppo.py",
        "log_ratio = (logprobs - old_logprobs)",
        "log_ratio = (old_logprobs - logprobs)",
        symptom="the score falls in every iteration",
        story="pi_old / pi instead of pi / pi_old: the gradient points the other way.",
        guard="test_losses.py::test_policy_loss_at_the_old_policy_is_the_policy_gradient",
        run="ppo",
    ),
    Mutant(
        "clip-of-the-product",
        "ppo.py",
        "ratio.clamp(1 - lower, 1 + upper) * advantages)",
        "(ratio * advantages).clamp(1 - lower, 1 + upper))",
        symptom="the best replies of a batch teach nothing",
        story="The ratio has to be clipped, not its product with the advantage: an advantage "
        "above 1.2 has no gradient at all.",
        guard="test_losses.py::test_the_clip_takes_away_the_gain_but_never_the_loss",
    ),
    Mutant(
        "clip-bounds-swapped",
        "ppo.py",
        "ratio.clamp(1 - lower, 1 + upper)",
        "ratio.clamp(1 - upper, 1 + lower)",
        symptom="clip-higher lowers the entropy instead of keeping it up",
        story="With equal bounds nothing shows. DAPO's .2 and .28 are not equal.",
        guard="test_losses.py::test_the_clip_has_a_lower_and_an_upper_bound",
    ),
    Mutant(
        "max-instead-of-min",
        "ppo.py",
        "gain = torch.minimum(",
        "gain = torch.maximum(",
        symptom="a few replies take over, the ratio reaches 20 and more",
        story="Published losses are written with minus signs, where min becomes max. Copying the "
        "word and not the sign makes the bound optimistic.",
        guard="test_losses.py::test_the_clip_takes_away_the_gain_but_never_the_loss",
        run="ppo --ppo-epochs 4",
    ),
    Mutant(
        "value-clip-takes-the-smaller-error",
        "ppo.py",
        "errors = torch.maximum(",
        "errors = torch.minimum(",
        symptom="the value loss is tiny and the values are wrong",
        story="With the smaller of both errors a critic may run away from its old value free of "
        "charge.",
        guard="test_losses.py::test_value_loss_by_hand",
    ),
    Mutant(
        "old-log-probs-of-today",
        "ppo.py",
        "old_logprobs, advantages = old.old_logprobs[rows], old.advantages[rows]",
        "old_logprobs, advantages = logprobs.detach(), old.advantages[rows]",
        symptom="nothing is ever clipped, and more epochs make training unstable",
        story="Recomputed in the update, the old policy is always today's and the ratio is 1.",
        guard="test_identities.py::test_each_minibatch_has_the_gradient_of_a_slow_loop_and_each_"
        "reply_its_turn",
        source="abhisheksuran/Reinforcement_Learning#4",
        run="ppo --ppo-epochs 4",
    ),
    Mutant(
        "temperature-missing-in-the-update",
        "ppo.py",
        "rl.row_logprobs, models.policy, rows, **old.reading)",
        "rl.row_logprobs, models.policy, rows, batch=old.batch, temperature=1.0)",
        symptom="at temperature 1 all is well; at .7 the first ratio is not 1, many are clipped",
        story="Replies are drawn from softmax(z / T). The update asks softmax(z).",
        guard="test_identities.py::test_ppo_s_run_starts_at_a_ratio_of_1_and_saves_its_policy[0.7]",
        source="huggingface/trl#3029",
        run="ppo --temperature 0.7",
    ),
    Mutant(
        "temperature-missing-in-the-reference",
        "ppo.py",
        "rl.row_logprobs, models.ref, rows, **reading)",
        "rl.row_logprobs, models.ref, rows, batch=batch, temperature=1.0)",
        symptom="the KL is far from 0 before the first step",
        story="The KL compares the policy at T with the reference at 1, so a policy that has not "
        "moved pays as well.",
        guard="test_identities.py::test_ppo_s_run_starts_at_a_ratio_of_1_and_saves_its_policy[0.7]",
        source="OpenRLHF/OpenRLHF#853",
        run="ppo --temperature 0.7",
    ),
    Mutant(
        "first-minibatch-only",
        "ppo.py",
        "for rows in order.tensor_split(config.minibatches):",
        "for rows in order.tensor_split(config.minibatches)[:1]:",
        symptom="PPO needs twice as many samples as it should",
        story="A `return` or `break` in the wrong place, and half of what was sampled is thrown "
        "away.",
        guard="test_identities.py::test_each_minibatch_has_the_gradient_of_a_slow_loop_and_each_"
        "reply_its_turn",
    ),
    Mutant(
        "beta-moves-the-wrong-way",
        "ppo.py",
        "error = min(max(kl / target - 1, -0.2), 0.2)",
        "error = min(max(1 - kl / target, -0.2), 0.2)",
        symptom="the KL leaves its target, and does so faster and faster",
        story="A KL above its target must raise its price.",
        guard="test_losses.py::test_the_kl_coefficient_moves_by_at_most_a_fifth_per_ten_thousand_"
        "replies",
    ),
    Mutant(
        "grpo-std-of-the-batch",
        "ppo.py",
        "(scores.std(1, keepdim=True) + 1e-4)",
        "(scores.std() + 1e-4)",
        symptom="only prompts with very different replies are learnt from",
        story="GRPO compares within a prompt. The batch's deviation is mostly that of the prompts.",
        guard="test_identities.py::test_without_a_critic_a_reply_is_compared_with_the_others_to_"
        "its_prompt",
        source="XU-YIJIE/grpo-flat#2",
        run="ppo --advantage grpo",
    ),
    Mutant(
        "groups-across-prompts",
        "ppo.py",
        "scores = scores.view(-1, config.group_size)",
        "scores = scores.view(config.group_size, -1).T.contiguous()",
        symptom="easy prompts are praised and hard ones punished, whatever the reply",
        story="Replies come as a a a a b b b b or as a b a b a b a b. The other order compares "
        "replies to different prompts, and every shape fits.",
        guard="test_identities.py::test_without_a_critic_a_reply_is_compared_with_the_others_to_"
        "its_prompt",
        source="StarsfieldAI/R1-V#67",
        run="ppo --advantage grpo",
    ),
    Mutant(
        "penalty-normalised-with-the-score",
        "ppo.py",
        "grpo_advantages(scores) - grpo_advantages(penalties, scale=False)",
        "grpo_advantages(scores - penalties)",
        symptom="beta makes no difference where all replies of a group score the same",
        story="Among equal scores the standard deviation is that of the penalty, and dividing by "
        "it gives noise of size 1 for any beta.",
        guard="test_identities.py::test_grpo_on_a_group_of_equal_scores_learns_the_penalty_and_no_"
        "noise",
        run="ppo --advantage grpo",
    ),
    Mutant(
        "grpo-without-its-length",
        "ppo.py",
        "advantages = advantages / mask.sum(1, keepdim=True)",
        "pass",
        symptom="called GRPO, behaves like RLOO",
        story="GRPO is a mean over replies of means over tokens. Without the division long "
        "replies count more.",
        guard="test_identities.py::test_without_a_critic_a_reply_is_compared_with_the_others_to_"
        "its_prompt",
    ),
    Mutant(
        "dr-grpo-divided-by-tokens",
        "ppo.py",
        "return len(mask) * config.max_new_tokens",
        "return mask.sum()",
        symptom="wrong answers grow longer and longer, as with plain GRPO",
        story="The number of tokens depends on what was sampled: in a batch of long replies every "
        "token counts less. Dr. GRPO divides by a constant.",
        guard="test_losses.py::test_each_advantage_divides_its_loss_as_its_table_says",
        source="huggingface/trl#3138",
    ),
    Mutant(
        "rloo-baseline-includes-the-reply",
        "ppo.py",
        "scale=False) * K / (K - 1)",
        "scale=False)",
        symptom="RLOO learns more slowly, most of all with two replies to a prompt",
        story="The mean over all K contains the reply itself and takes away 1/K of its advantage.",
        guard="test_losses.py::test_group_advantages_by_hand",
    ),
    Mutant(
        "equal-scores-beside-their-mean",
        "ppo.py",
        "scores.mean(1, keepdim=True).clamp(least, most)",
        "scores.mean(1, keepdim=True)",
        symptom="where all replies score .7, GRPO still moves, and Adam makes a whole step of it",
        story="The mean of five times .7 is not .7 in float32. A difference of 6e-8 over a "
        "standard deviation of 0 + 1e-4 is an advantage of 6e-4, the same for all replies.",
        guard="test_losses.py::test_equal_scores_have_exactly_no_advantage_whatever_rounding_makes_"
        "of_their_mean",
    ),
    Mutant(
        "dapo-divided-by-replies",
        "ppo.py",
        'case "gae" | "dapo":\n            return mask.sum()  # the mean over tokens\n'
        '        case "rloo" | "grpo":',
        'case "gae":\n            return mask.sum()  # the mean over tokens\n'
        '        case "rloo" | "grpo" | "dapo":',
        symptom="the learning rate that DAPO needs depends on how long replies are",
        story="DAPO's mean is over the tokens of the batch. Divided by replies, a sum of "
        "advantages grows with their length.",
        guard="test_losses.py::test_each_advantage_divides_its_loss_as_its_table_says",
    ),
    Mutant(
        "gspo-ratio-summed",
        "ppo.py",
        "log_ratio.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)",
        "log_ratio.sum(1, keepdim=True)",
        symptom="with GSPO nearly every long reply is clipped at the second step",
        story="The ratio of a whole reply is a product of hundreds of ratios. GSPO takes the mean "
        "of their logs.",
        guard="test_losses.py::test_gspo_by_hand",
    ),
    Mutant(
        "cispo-weight-has-a-gradient",
        "ppo.py",
        "weight = ratio.detach().clamp(max=1 + upper)",
        "weight = ratio.clamp(max=1 + upper)",
        symptom="CISPO's tokens learn at a rate that depends on how likely they are",
        story="The ratio weighs log pi and is a constant. With a gradient it adds log pi times the "
        "gain to each token's gradient.",
        guard="test_losses.py::test_cispo_by_hand",
    ),
    Mutant(
        "cispo-clipped-from-below",
        "ppo.py",
        "weight = ratio.detach().clamp(max=1 + upper)",
        "weight = ratio.detach().clamp(1 - lower, 1 + upper)",
        symptom="bad replies that are hardly sampled any more are still pushed down",
        story="CISPO cuts large weights only. With a lower bound a token that the policy hardly "
        "says any more counts like one that it still says.",
        guard="test_losses.py::test_cispo_by_hand",
    ),
    Mutant(
        "k2-token-by-token",
        "ppo.py",
        'return kernels.kl_estimate(logps, ref_logps, "k2")',
        'return kernels.kl_estimate(logprobs, ref_logprobs, "k2").masked_fill(~mask, 0.0).sum(1)',
        symptom="with --kl-loss the policy ends elsewhere than with the KL in the reward",
        story="The sum of the tokens' k2 has the gradient of each next token's KL. It forgets that "
        "a token also decides which states follow.",
        guard="test_losses.py::test_kl_losses_by_hand",
    ),
    Mutant(
        "kl-loss-with-a-divisor-of-its-own",
        "ppo.py",
        "beta * penalties.sum() / divisor",
        "beta * penalties.mean()",
        symptom="--kl-loss needs another beta for each --advantage",
        story="The gain is divided by tokens or by a constant and the KL by replies, so that beta "
        "is worth ten times as much as in the reward.",
        guard="test_identities.py::test_the_first_gradient_of_the_kl_as_a_loss_is_that_of_an_"
        "uncentred_penalty",
    ),
    Mutant(
        "redraw-keeps-the-equal-ones",
        "ppo.py",
        "if not group.equal]",
        "if group.equal]",
        symptom="with --redraw `equal` rises to 1 and the gradient falls to 0",
        story="One `not` too few: the groups that teach something give way.",
        guard="test_ppo.py::test_equal_groups_give_way_others_stay_and_the_count_is_right",
    ),
    Mutant(
        "overlong-starts-at-the-limit",
        "ppo.py",
        "batch.mask.sum(1) - (config.max_new_tokens - config.overlong)",
        "batch.mask.sum(1) - config.max_new_tokens",
        symptom="--overlong makes no difference",
        story="No reply is longer than the limit. The penalty has to begin before it.",
        guard="test_ppo.py::test_the_score_falls_evenly_by_1_over_the_last_tokens",
    ),
    Mutant(
        "entropy-is-negative",
        "data/reinforcement.py",
        '"entropy": -old.old_logprobs[mask].mean()',
        '"entropy": old.old_logprobs[mask].mean()',
        symptom="the entropy rises to 0 while replies become alike",
        story="Entropy is the mean of -log p.",
        guard="test_ppo.py::test_the_entropy_is_that_of_the_whole_vocabulary_at_the_sampled_states",
    ),
    Mutant(
        "a-rule-s-critic-starts-at-random",
        "data/reinforcement.py",
        "torch.nn.init.zeros_(critic.score_head.weight)",
        "torch.nn.init.normal_(critic.score_head.weight)",
        symptom="the first iterations undo part of what SFT taught",
        story="A new head says something else about every prefix. These differences are noise, and "
        "they go straight into the advantages.",
        guard="test_ppo.py::test_a_rule_s_critic_starts_at_0_everywhere_and_learns",
    ),
    Mutant(
        "cut-reply-keeps-a-rule-s-score",
        "data/reinforcement.py",
        "return torch.where(ended, scores, least)",
        "return torch.where(ended | bool(reward.rule), scores, least)",
        symptom="the score rises, and replies no longer end",
        story="A rule finds its number in a reply that was cut behind it.",
        guard="test_ppo.py::test_a_cut_reply_has_no_score_of_a_rule",
    ),
    Mutant(
        "importance-weight-without-a-bound",
        "ppo.py",
        "(old_logprobs - sampled_logprobs).exp().clamp(max=2)",
        "(old_logprobs - sampled_logprobs).exp()",
        symptom="in bfloat16 a few tokens decide the gradient of a batch",
        story="A token that the sampler found unlikely and the trainer does not gets a large "
        "weight. Truncation takes a little bias for much less variance.",
        guard="test_ppo.py::test_where_the_sampler_is_less_precise_tokens_count_by_a_truncated_"
        "importance_weight",
    ),
    Mutant(
        "pass-at-k-as-a-power",
        "evaluate/pass_at_k.py",
        "math.comb(n - int(c), k) / math.comb(n, k)",
        "(1 - int(c) / n) ** k",
        symptom="pass@8 from 8 replies is lower than the share of questions with a right one",
        story="1 - (1 - p)^k of an estimated p is biased, as if replies were drawn with return.",
        guard="test_pass_at_k.py::test_pass_at_k_is_the_share_of_all_subsets_with_a_right_reply",
    ),
]

# --------------------------------------------------------------------------------- model, sampling

MODEL = [
    Mutant(
        "stop-token-dropped",
        "kernels/sampling.py",
        "            replies[i].append(t)\n",
        "            if t in stops.tolist():\n                continue\n"
        "            replies[i].append(t)\n",
        symptom="after RL the replies get longer, and stopping is never rewarded",
        story="The sampler gives back the text without the token that ended it. For RL that token "
        "is an action, the one on which the score sits.",
        guard="test_model.py::test_a_reply_ends_with_its_first_stop_token_and_holds_no_other",
        source="karpathy/nanochat#810",
    ),
    Mutant(
        "sampling-ignores-its-generator",
        "kernels/sampling.py",
        "torch.multinomial(probs, 1, generator=generator)",
        "torch.multinomial(probs, 1)",
        symptom="the same seed gives another run as soon as I look at a sample in between",
        story="Evaluation and training draw from one global stream, so measuring changes what is "
        "measured.",
        guard="test_model.py::test_the_generator_decides_what_is_sampled",
    ),
    Mutant(
        "top-p-one-short",
        "kernels/sampling.py",
        "probs.cumsum(-1) - probs >= top_p",
        "probs.cumsum(-1) >= top_p",
        symptom="top-p .9 samples as if it were greedy wherever one token has more than .9",
        story="The token that crosses the threshold belongs to the nucleus.",
        guard="test_model.py::test_tokens_are_drawn_with_the_probabilities_that_were_asked_for",
        source="rasbt/reasoning-from-scratch#164",
    ),
    Mutant(
        "sampled-log-probs-without-temperature",
        "model.py",
        "temperature=temperature or 1.0, ",
        "temperature=1.0, ",
        symptom="at temperature .7 the sampler's log-probs are not the trainer's",
        story="The sampler reports log-probs of another distribution than the one it drew from.",
        guard="test_model.py::test_sampled_logprobs_are_the_recomputed_ones",
        source="thinking-machines-lab/tinker-feedback#148",
    ),
    Mutant(
        "padding-in-the-cache",
        "model.py",
        "cache.lengths = torch.tensor(list(map(len, prompts)), device=device)",
        "cache.lengths = torch.full((len(prompts),), longest, device=device)",
        symptom="one prompt at a time is fine, in a batch the shorter ones get nonsense",
        story="All rows are treated as if they had the longest prompt's length, so short ones go "
        "on from padding.",
        guard="test_model.py::test_ragged_prompts_continue_as_they_would_alone",
        source="unslothai/unsloth#3803",
    ),
    Mutant(
        "cache-one-short",
        "model.py",
        "self.mask = (keys <= self.positions[:, :, None])",
        "self.mask = (keys < self.positions[:, :, None])",
        symptom="the loss is good, samples are a little dull and repeat themselves",
        story="A new token sees all earlier ones but not itself.",
        guard="test_model.py::test_ragged_prompts_continue_as_they_would_alone",
    ),
    Mutant(
        "positions-restart-in-the-cache",
        "model.py",
        "positions = torch.arange(T, device=ids.device) if cache is None else cache.positions",
        "positions = torch.arange(T, device=ids.device)",
        symptom="the first sampled token is right, the rest is word salad",
        story="With a cache each step reads one token, and its position is not 0.",
        guard="test_model.py::test_ragged_prompts_continue_as_they_would_alone",
    ),
    Mutant(
        "rope-pairs-neighbours",
        "model.py",
        "a, b = x.chunk(2, dim=-1)",
        "a, b = x[..., ::2], x[..., 1::2]",
        symptom="my own models train well, downloaded ones talk nonsense",
        story="The paper rotates neighbouring coordinates, published checkpoints the two halves. "
        "From scratch both work, and only weights from elsewhere tell them apart.",
        guard="test_model.py::test_every_architecture_is_what_its_file_means_token_by_token",
        source="huggingface/transformers#25199",
        run="sft --pretrain",
    ),
    Mutant(
        "attention-sees-the-future",
        "model.py",
        "is_causal=mask is None",
        "is_causal=False",
        symptom="the loss goes to 0, samples are noise",
        story="A position that sees its own target has nothing to learn.",
        guard="test_model.py::test_no_position_sees_the_future",
        run="sft --pretrain",
    ),
    Mutant(
        "tied-head-of-its-own",
        "model.py",
        "elif not config.tied:",
        "else:",
        symptom="the loss starts well, but the model has more parameters than the config says",
        story="The config says that head and embedding are one matrix. A copy of its own drifts "
        "away, and is lost when the checkpoint is saved.",
        guard="test_run.py::test_a_tied_embedding_counts_once",
    ),
    Mutant(
        "rows-without-an-id",
        "model.py",
        "return weight if self.config.n_ids is None else weight[: self.config.n_ids]",
        "return weight",
        symptom="once in a thousand tokens the tokenizer cannot decode a reply",
        story="Embeddings are padded to a multiple of 64. The rows beyond the vocabulary take "
        "part in the softmax, and sometimes win.",
        guard="test_model.py::test_rows_without_an_id_are_never_sampled_and_in_no_normaliser",
    ),
    Mutant(
        "lora-scale-alpha",
        "model.py",
        "module.attach(rank, (alpha or 2 * rank) / rank)",
        "module.attach(rank, alpha or 2 * rank)",
        symptom="LoRA at rank 16 diverges at a learning rate that rank 1 likes",
        story="The output of an adapter counts alpha / r, so that the rank can change alone.",
        guard="test_lora.py::test_the_adapter_s_own_matrices_are_added_with_alpha_over_rank",
        source="Blaizzy/mlx-vlm#841",
        run="sft --lora-rank 8 --lr 1e-2",
    ),
    Mutant(
        "lora-b-not-zero",
        "model.py",
        "self.B = nn.Parameter(self.weight.new_zeros(self.out_features, rank))",
        "self.B = nn.Parameter(0.1 * torch.randn_like(self.weight[:, :rank]))",
        symptom="the first loss of a fine-tuned model is that of a damaged one",
        story="B A must be 0 at the start: then the adapted model is the base model.",
        guard="test_lora.py::test_a_new_adapter_changes_nothing_and_only_it_learns",
        run="sft --lora-rank 8 --lr 1e-2",
    ),
]

# --------------------------------------------------------------------------------- optimiser, runs

RUNS = [
    Mutant(
        "first-step-at-rate-0",
        "run/optimizer.py",
        "(step + 1) / (warmup + 1)",
        "step / (warmup + 1)",
        symptom="the first batch is wasted; with one step in all nothing is learnt",
        story="step / warmup is 0 at step 0.",
        guard="test_run.py::test_learning_rate_is_positive_at_every_step",
        source="verl-project/verl#3674",
    ),
    Mutant(
        "last-step-at-rate-0",
        "run/optimizer.py",
        "(steps - step) / max(1, steps - warmup)",
        "(steps - step - 1) / max(1, steps - warmup)",
        symptom="the last batch is wasted",
        story="The rate should be 0 after the last step, not in it.",
        guard="test_run.py::test_learning_rate_is_positive_at_every_step",
    ),
    Mutant(
        "decay-on-norms",
        "run/optimizer.py",
        '"weight_decay": 0.0}',
        '"weight_decay": weight_decay}',
        symptom="long runs lose a little quality, and the norms' gains shrink",
        story="Weight decay pulls a norm's gain to 0 instead of to 1.",
        guard="test_run.py::test_weight_decay_touches_matrices_only",
        source="ServiceNow/Fast-LLM#542",
    ),
    Mutant(
        "gradients-never-cleared",
        "run/optimizer.py",
        "optimizer.zero_grad(set_to_none=True)",
        "pass",
        symptom="the gradient norm grows from step to step, then the loss does",
        story="Gradients add up over the whole run.",
        guard="test_run.py::test_clip_reports_the_norm_before_and_a_step_clears_the_gradient",
        run="sft",
    ),
    Mutant(
        "resume-forgets-the-optimiser",
        "run/state.py",
        "part.load_state_dict(state)\n",
        "pass\n",
        symptom="the loss jumps after every resume",
        story="Adam's moments start from 0 again.",
        guard="test_resume.py::test_a_run_cut_short_twice_ends_like_one_that_was_not[sft]",
        source="NVIDIA-NeMo/Megatron-Bridge#3832",
    ),
    Mutant(
        "resume-forgets-the-generators",
        "run/state.py",
        "part.set_state(state.cpu())",
        "pass",
        symptom="after a resume PPO draws the random numbers of its first steps once more",
        story="A generator made from the seed begins at the beginning.",
        guard="test_resume.py::test_a_run_cut_short_twice_ends_like_one_that_was_not[ppo]",
        source="modelscope/ms-swift#9935",
    ),
    Mutant(
        "resume-forgets-torch-s-stream",
        "run/state.py",
        'torch.set_rng_state(state["rng"].cpu())',
        "pass",
        symptom="a resumed run is never the run that was killed",
        story="Torch's own generator is a part of the state too.",
        guard="test_resume.py::test_torch_s_own_stream_goes_on_too",
        source="huggingface/accelerate#4283",
    ),
    Mutant(
        "detector-across-prompts",
        "evaluate/detector.py",
        "x, y = x - x.mean(1, keepdim=True), y - y.mean(1, keepdim=True)",
        "x, y = x - x.mean(), y - y.mean()",
        symptom="the reward model seems to love long replies; it only knows the hard questions",
        story="Hard questions have long answers and low scores. What length is worth shows among "
        "replies to one prompt.",
        guard="test_hacking.py::test_length_and_score_are_compared_within_prompts",
    ),
    Mutant(
        "error-over-replies",
        "evaluate/detector.py",
        "means = terms.view(-1, group_size).mean(1)",
        "means = terms",
        symptom="the detector warns of hacking in runs that have hardly begun",
        story="Eight replies to one prompt are not eight observations. The error has to be that "
        "of the prompts' means.",
        guard="test_hacking.py::test_the_error_of_a_drift_is_over_prompts_and_not_over_replies",
    ),
    Mutant(
        "best-of-n-is-a-mean",
        "evaluate/best_of_n.py",
        "return golds.double().gather(1, order) @ weights",
        "return golds.double().gather(1, order).mean(1)",
        symptom="best of 64 is no better than best of 1",
        story="The mean over all samples instead of the one that was chosen.",
        guard="test_hacking.py::test_best_of_n_is_the_mean_over_all_subsets",
    ),
    Mutant(
        "best-of-n-by-the-judge",
        "evaluate/best_of_n.py",
        "order = scores.argsort(",
        "order = golds.argsort(",
        symptom="every reward model is perfect",
        story="The reply is chosen by the truth on which it is then measured.",
        guard="test_hacking.py::test_best_of_n_is_the_mean_over_all_subsets",
    ),
    Mutant(
        "ties-are-wins",
        "evaluate/scoreboard.py",
        "(a > b) + 0.5 * (a == b)",
        "float(a >= b)",
        symptom="two equal models win most of their comparisons, both of them",
        story="Most replies to easy questions are equally right. A tie counts half.",
        guard="test_evaluate.py::test_a_tie_is_half_a_win",
    ),
    Mutant(
        "unfinished-replies-scored",
        "data/scores.py",
        "return torch.where(ended, scores, scores.min())",
        "return scores",
        symptom="endless replies win",
        story="An end token is added to a reply that was cut, and the score is read there.",
        guard="test_annotators.py::test_a_reward_model_as_judge_gives_a_cut_reply_the_lowest_score",
    ),
]

# ----------------------------------------------------------------------------------------- kernels

KERNELS = [
    Mutant(
        "gradient-without-temperature",
        "kernels/linear_logprob.py",
        "if x is not None) * ctx.scale",
        "if x is not None)",
        symptom="at temperature .7 the learning rate seems to be another one",
        story="d/dz of log softmax(z / T) has a factor 1 / T.",
        guard="test_kernels.py::test_linear_logprob_passes_gradcheck",
    ),
    Mutant(
        "softmax-without-the-maximum",
        "kernels/rows_torch.py",
        "p = torch.softmax(z, 1, out=torch.empty_like(z) if entropy else z)",
        "p = z.exp() / z.exp().sum(1, keepdim=True)",
        symptom="all is well, until one logit exceeds 88 and the loss is NaN",
        story="exp(89) is infinite in float32. The maximum has to be subtracted before.",
        guard="test_kernels.py::test_extreme_logits_keep_fp32_precision",
    ),
    Mutant(
        "ignored-tokens-in-the-divisor",
        "kernels/__init__.py",
        "return total / (targets != ignore_index).sum().clamp(min=1)",
        "return total / max(1, len(targets))",
        symptom="the loss depends on how much padding there is",
        story="The mean is over supervised tokens, not over all positions.",
        guard="test_kernels.py::test_one_valid_row_gives_that_rows_gradient_only",
    ),
    Mutant(
        "entropy-without-a-gradient",
        "kernels/rows.py",
        "if g_entropy is not None:",
        "if False:",
        symptom="the entropy bonus can be seen in the loss and nowhere else",
        story="The entropy is computed beside the log-prob and forgotten in the backward.",
        guard="test_kernels.py::test_linear_logprob_passes_gradcheck",
    ),
    Mutant(
        "kl-the-other-way-round",
        "kernels/__init__.py",
        "arguments = (gather(hidden, index), weight, *ref, reverse, temperature)",
        "arguments = (gather(hidden, index), weight, *ref, not reverse, temperature)",
        symptom="distillation spreads out over all that the teacher could say",
        story="KL(pi, ref) and KL(ref, pi) agree near 0 and nowhere else.",
        guard="test_kernels.py::test_every_op_matches_its_twin_at_every_shape",
    ),
    Mutant(
        "last-row-of-each-chunk-lost",
        "kernels/chunks.py",
        "min(start + step, length)",
        "min(start + step - (step > 1), length)",
        symptom="NaN, or a loss that differs from run to run, in large batches only",
        story="Small batches fit into one chunk, so a wrong boundary shows in no small test.",
        guard="test_kernels.py::test_every_op_matches_its_twin_at_every_shape",
    ),
    Mutant(
        "positions-restart-in-each-chunk",
        "kernels/token_loss.py",
        "losses_and_slopes(token_loss, logprob, index[rows], True)",
        "losses_and_slopes(token_loss, logprob, index[: len(logprob)], True)",
        symptom="weights of tokens work in small batches and are mixed up in large ones",
        story="Each chunk asks for the weights of the first one's tokens.",
        guard="test_kernels.py::test_token_loss_sees_each_supervised_token_once_with_its_position",
    ),
    Mutant(
        "triton-last-block-unmasked",
        "kernels/rows_triton.py",
        "whole = V // B * B",
        "whole = (V + B - 1) // B * B",
        symptom="wrong on a GPU for GPT-2's 50257 tokens, right for 65536",
        story="A vocabulary that is no multiple of the block has a partial block, which needs a "
        "mask.",
        guard="test_triton.py::test_running_statistics_do_not_depend_on_where_the_maximum_stands",
    ),
    Mutant(
        "triton-maximum-not-rescaled",
        "kernels/rows_triton.py",
        "alpha = tl.exp(log_alpha)",
        "alpha = tl.exp(log_alpha * 0)",
        symptom="on a GPU the entropy is wrong whenever a later block holds the largest logit",
        story="A running softmax must rescale its earlier sums when the maximum rises.",
        guard="test_triton.py::test_running_statistics_do_not_depend_on_where_the_maximum_stands",
    ),
]

# --------------------------------------------------------------- rules, rejection sampling

RULES = [
    Mutant(
        "first-number-is-the-answer",
        "data/rules.py",
        "*_, found = NUMERAL.finditer(text, start)",
        "found, *_ = NUMERAL.finditer(text)",
        symptom="accuracy falls when the model shows its work",
        story="A worked solution begins with the numbers of the question. The result is the last.",
        guard="test_rules.py::test_a_rule_judges_as_a_person_would",
    ),
    Mutant(
        "difference-ends-on-a-negative-number",
        "data/rules.py",
        r"(?:(?<![\w)\]}])-\$?|",
        r"(?:-\$?|",
        symptom="a few right answers, all after a subtraction, count as wrong",
        story="In 10-3 the minus stands between two terms. It is no sign of the 3.",
        guard="test_rules.py::test_a_rule_judges_as_a_person_would",
    ),
    Mutant(
        "padded-reply-is-exact",
        "data/rules.py",
        "reply.strip() == reference_text(answer)",
        "reference_text(answer) in reply",
        symptom="the reward goes to 1, and replies become lists of all possible answers",
        story="A reply that contains the answer is not the answer. Policies find that out at once.",
        guard="test_rules.py::test_a_rule_judges_as_a_person_would",
    ),
    Mutant(
        "cut-reply-is-right",
        "data/rejection.py",
        "score if ended else lowest",
        "score",
        symptom="pass@1 looks better than the kept replies",
        story="A rule reads text and does not see that the reply was cut behind the right number.",
        guard="test_rules.py::test_a_cut_reply_is_never_right_and_never_better_than_a_whole_one",
    ),
    Mutant(
        "worst-reply-is-kept",
        "data/rejection.py",
        "return max(usable,",
        "return min(usable,",
        symptom="each round of expert iteration makes the model worse",
        story="The sign of a score is easily mistaken where others keep a loss.",
        guard="test_rules.py::test_the_best_whole_reply_is_kept_and_of_equals_the_first",
    ),
]

MUTANTS = [*TEXT, *CHAT, *REWARD, *DPO, *PPO, *MODEL, *RUNS, *KERNELS, *RULES]


# ---------------------------------------------------------------------------------------- commands


Names = list  # the flag --list hides the built-in name inside the class


@dataclass
class Config:
    show: str = ""  # name of a bug to print
    run: str = ""  # name of a bug to train with
    only: Names = field(default_factory=list)  # names of bugs to catch (default: all)
    jobs: int = 2  # guards that run at once
    list: bool = False  # print all names and symptoms


def find(name):
    found = [mutant for mutant in MUTANTS if mutant.name == name]
    run.require(found, f"there is no bug called {name}: --list shows all names")
    return found[0]


def mutated(mutant):
    """The text of the mutant's file, without and with the bug."""
    text = (ROOT / mutant.file).read_text(encoding="utf-8")
    places = text.count(mutant.old)
    changed = f"{mutant.name}: its old text occurs {places} times in {mutant.file}, not once"
    run.require(places == 1, f"{changed}: bring tests/mutants.py up to date")
    return text, text.replace(mutant.old, mutant.new)


def copy_tree(directory, mutant=None):
    """Writes a copy of the code and the tests, with the bug if one is given."""
    ignore = shutil.ignore_patterns("__pycache__")
    for room in ROOMS:
        shutil.copytree(ROOT / room, directory / room, ignore=ignore)
    for path in [*ROOT.glob("*.py"), *(ROOT / name for name in BESIDE)]:
        shutil.copy(path, directory)
    if mutant:
        (directory / mutant.file).write_text(mutated(mutant)[1], encoding="utf-8")


def is_triton(guard):
    return guard.startswith("test_triton.py")


def run_tests(mutant, guards):
    """Runs tests in a copy of the tree -> pytest's exit code (None: too long), output, seconds.
    Tests of the Triton source run in Triton's interpreter (tests/test_interpreter.py)."""
    began = time.perf_counter()
    words = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    if all(map(is_triton, guards)):
        environment["TRITON_INTERPRET"] = "1"
        words += ["-m", "gpu"]
    with tempfile.TemporaryDirectory() as directory:
        copy_tree(Path(directory), mutant)
        words += [f"tests/{guard}" for guard in guards]
        options = dict(cwd=directory, env=environment, capture_output=True, text=True)
        timeout = TIMEOUT * len(guards)
        try:
            result = subprocess.run(words, timeout=timeout, **options)
        except subprocess.TimeoutExpired:
            return None, "", timeout
    return result.returncode, result.stdout + result.stderr, time.perf_counter() - began


def catch(mutant):
    """Runs the guard of a mutant -> whether it fails, and a line that says so."""
    code, output, seconds = run_tests(mutant, [mutant.guard])
    # pytest's exit codes: 1 for a failed test; 0 for none; 2 and more if the test could not run
    verdict = {0: "SURVIVES", 1: "caught", None: "TOO SLOW"}.get(code, "BROKEN")
    line = f"{verdict:8} {seconds:5.1f} s  {mutant.name}"
    return code == 1, line if code == 1 else f"{line}\n{output[-2000:]}"


def healthy_code_passes(guards):
    """Whether every guard passes without a bug; prints what fails."""
    code, output, seconds = run_tests(None, guards)
    summary = output.strip().splitlines()[-1:]
    print(f"healthy code: {len(guards)} guards, {seconds:.0f} s: {' '.join(summary)}", flush=True)
    if code != 0:
        print(output[-4000:])
    return code == 0


def catch_all(mutants, jobs):
    """Healthy code must pass every guard, and each mutant fail its own."""
    began = time.perf_counter()
    guards = list(dict.fromkeys(mutant.guard for mutant in mutants))
    parts = [[guard for guard in guards if is_triton(guard) == kind] for kind in (False, True)]
    with ThreadPoolExecutor(jobs) as pool:
        healthy = [pool.submit(healthy_code_passes, part) for part in parts if part]
        caught = 0
        for dead, line in pool.map(catch, mutants):
            caught += dead
            print(line, flush=True)
    seconds = time.perf_counter() - began
    print(f"{caught} of {len(mutants)} bugs caught in {seconds:.0f} s, {jobs} at a time")
    return all(part.result() for part in healthy) and caught == len(mutants)


def show(mutant):
    before, after = (text.splitlines(keepends=True) for text in mutated(mutant))
    diff = difflib.unified_diff(before, after, mutant.file, f"{mutant.file} ({mutant.name})", n=3)
    print(f"{mutant.name}\n\n    symptom  {mutant.symptom}\n    story    {mutant.story}")
    print(f"    guard    tests/{mutant.guard}")
    if mutant.source:
        print(f"    source   {mutant.source}")
    if mutant.run:
        print(f"    run      python -m tests.mutants --run {mutant.name}   ({mutant.run})")
    print("\n" + "".join(diff), end="")


# --------------------------------------------------------------------------- training with the bug

# Small models and short runs: enough to see a difference, not enough for a good assistant.
SHORT = {
    "base": "sft.py --pretrain --shape llama:2x64x128 --steps 600",
    "sft": "sft.py --steps 200",
    "reward": "reward.py --prompts 3000",
    "process": "reward.py --process --prompts 500 --steps 60",
    "dpo": "dpo.py --prompts 3000 --steps 60 --lr 3e-4",
    "ppo": "ppo.py --steps 16 --batch-size 128",
}
INIT = {"sft": "base", "reward": "sft", "process": "sft", "dpo": "sft", "ppo": "sft"}
NAMED = {"--pretrain": "base", "--process": "process"}  # these flags choose the stage
WATCH = {
    "base": ["loss", "held_out_loss", "grad_norm"],
    "sft": ["loss", "held_out_loss", "grad_norm"],
    "reward": ["loss", "held_out_accuracy", "margin"],
    "process": ["loss", "held_out_loss", "held_out_accuracy"],
    "dpo": ["loss", "accuracy", "chosen_logps", "kl", "gold"],
    "ppo": ["score", "gold", "kl", "length", "ended"],
}


def last_edit():
    """When a file of the healthy code was last changed, in seconds."""
    files = [path for room in ROOMS if room != "tests" for path in (ROOT / room).rglob("*.py")]
    return max(path.stat().st_mtime for path in [*ROOT.glob("*.py"), *files])


def train(tree, home, stage, out, flags=()):
    """Runs a stage of the code in `tree`, from the healthy models in `home`. A run that is there
    already is kept, unless the code has been edited since."""
    if out.exists() and (out / "run.json").stat().st_mtime > last_edit():
        return
    shutil.rmtree(out, ignore_errors=True)
    words = [*SHORT[stage].split(), "--seed", "0", "--device", "cpu", "--out", out, *flags]
    if stage in INIT:
        words += ["--init", home / INIT[stage]]
    if stage == "ppo":
        words += ["--reward", home / "reward"]
    words = [str(word) for word in words]
    ended = subprocess.run([sys.executable, *words], cwd=tree).returncode
    run.require(ended == 0, f"{' '.join(words)} ended with exit code {ended}: see above")


def stage_of(mutant):
    """The stage that shows a bug, and its flags beyond those of SHORT."""
    first, *flags = mutant.run.split()
    stage = next((NAMED[flag] for flag in flags if flag in NAMED), first)
    return stage, [flag for flag in flags if flag not in NAMED]


def compare(mutant):
    """Trains a stage without and with the bug, draws both curves and measures both models."""
    run.require(mutant.run, f"no training curve shows {mutant.name}: see --show {mutant.name}")
    stage, flags = stage_of(mutant)
    home = ROOT / "out" / "zoo"
    for before in ["base", "sft", *(["reward"] if stage == "ppo" else [])]:  # trained once
        train(ROOT, home, before, home / before)
    healthy = home / "-".join([stage, *flags]).replace("--", "")
    train(ROOT, home, stage, healthy, flags)
    sick = home / mutant.name
    shutil.rmtree(sick, ignore_errors=True)  # the bug may have been edited
    with tempfile.TemporaryDirectory() as directory:
        copy_tree(Path(directory), mutant)
        train(directory, home, stage, sick, flags)
    picture = home / f"{mutant.name}.png"
    draw({"healthy": healthy, mutant.name: sick}, WATCH[stage], picture)
    if stage != "process":  # the scoreboard measures policies and reward models
        words = ["-m", "evaluate.scoreboard", "--runs", healthy, sick, "--sft", home / "sft"]
        words += ["--prompts", "260", "--out", home / f"{mutant.name}-board"]
        subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, check=True)
    print(f"{mutant.name}: {mutant.symptom}\n{picture}")


def draw(runs, metrics, path):
    """{name: run directory} -> a panel for each metric, a line for each run."""
    rows = {}
    for name, directory in runs.items():
        lines = (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        rows[name] = [json.loads(line) for line in lines]
    panels = []
    for metric in metrics:
        lines = {}
        for name, steps in rows.items():
            points = [(row["step"], row[metric]) for row in steps if metric in row]
            if points:
                lines[name] = tuple(zip(*points))
        panels.append(("step", metric, lines))
    run.lines_picture(path, panels)


def main(config):
    run.check_range(config, "jobs", least=1)
    if config.list:
        for mutant in MUTANTS:
            print(f"{mutant.name:38} {mutant.symptom}")
    elif config.show:
        show(find(config.show))
    elif config.run:
        compare(find(config.run))
    else:
        mutants = list(map(find, config.only)) or MUTANTS
        if not catch_all(mutants, config.jobs):
            sys.exit(1)


if __name__ == "__main__":
    run.script(main, Config, __doc__)
