"""Labs that implement: functions to write again, and the tests that grade them (tests/LABS.md).

    python -m tests.lab list                    names, points, files and functions
    python -m tests.lab blank DIR [NAME ...]    a copy of the repository without their bodies
    python -m tests.lab check DIR [NAME ...]    the first failure of each, in a sentence
    python -m tests.lab grade DIR               points; --json FILE: as Gradescope reads them

Without a NAME, all labs are meant. Bodies are cut from the code as it is today, at the lines of its
syntax tree: signature and docstring stay, and so does everything else, byte for byte.

A lab is graded alone. Of DIR only the lab's file counts, with the other labs' functions as they are
here. All else comes from this repository, the tests included. DIR's code runs in a process of its
own, with a limit of time. This guards against accidents and not against fraud: read what is handed
in.
"""

import ast
import json
import os
import re
import subprocess
import sys
import tempfile
import traceback
from dataclasses import dataclass
from functools import partial
from inspect import cleandoc
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

import torch

import run
from tests.mutants import ROOMS, ROOT, copy_tree

LIMIT = 300  # seconds that a lab's tests may take; on a quiet machine they take about four
BLANK = "is still blank: write its body"
REPORT = "lab-report.json"  # in the working directory of the tests


class Lab(NamedTuple):
    name: str
    points: int
    file: str
    functions: list  # to write; each has a docstring
    graders: str  # FILE::TEST, as in tests/ but without test_, and under it a hint for who fails it

    @property
    def tests(self):
        """{test, as FILE::TEST in tests/: its hint}."""
        found = re.findall(r"^(\w+)::(\S+)\n((?: +.+\n?)+)", cleandoc(self.graders), re.MULTILINE)
        return {
            f"test_{file}.py::test_{test}": " ".join(hint.split()) for file, test, hint in found
        }


LABS = [
    Lab(
        "mask",
        10,
        "data/collate.py",
        ["collate"],
        """
        identities::a_token_counts_by_its_position_even_if_its_id_is_the_padding_s
            Whether a target counts is known from the mask alone, never from its id.
        identities::after_the_shift_every_assistant_token_and_its_end_is_a_target_and_nothing_else
            Position t predicts token t + 1: targets and weights are both shifted by one.
        identities::each_reply_is_predicted_from_its_header_on_up_to_its_end_token
            The last token of the header predicts the first one of the reply.
        identities::inputs_targets_mask_and_weights_agree_and_padding_is_outside_of_all
            Inputs lack the last token, targets the first one; padding is 0 and never counts.
        """,
    ),
    Lab(
        "sft",
        12,
        "sft.py",
        ["sequence_losses", "total_weight"],
        """
        identities::the_sft_loss_is_the_slow_loop_and_1_x_8_is_8_x_1
            An example's loss is a sum over its own supervised tokens, not yet divided.
        identities::a_token_of_weight_a_tenth_counts_a_tenth
            A token counts by its weight, in the sum and in the divisor.
        identities::sft_reports_the_loss_and_the_supervised_tokens_of_its_whole_step
            The divisor is the weight of all targets, and a first token is never a target.
        identities::three_steps_of_sft_end_in_the_same_weights_whatever_the_micro_batch
            The divisor is that of the whole step: a mean of means is another loss.
        """,
    ),
    Lab(
        "bradley-terry",
        6,
        "reward.py",
        ["bradley_terry_loss"],
        """
        losses::bradley_terry_by_hand
            Only the difference of the two scores counts: -log sigmoid(chosen - rejected).
        losses::bradley_terry_is_the_slow_loop_for_every_margin_and_soft_label
            The margin is subtracted from the difference; a label p weighs the comparison by p and
            the flipped comparison by 1 - p.
        losses::a_soft_label_is_minimal_at_its_own_log_odds
            With the label p the loss is least where sigmoid(difference) is p.
        losses::bradley_terry_passes_gradcheck
            Keep to torch operations, so that both scores get their gradient.
        losses::comparisons_stay_finite_at_log_ratios_of_ten_thousand
            The log of a sigmoid overflows: use F.logsigmoid.
        """,
    ),
    Lab(
        "dpo",
        8,
        "dpo.py",
        ["dpo_loss"],
        """
        losses::dpo_is_ln_2_where_policy_and_reference_agree
            Each log-prob is taken against the reference's: where the two agree, logits are 0.
        losses::dpo_by_hand
            The logits are beta (h_w - h_l), chosen minus rejected; label_smoothing e weighs the
            loss of the flipped label by e.
        losses::dpo_is_the_slow_loop
            One loss for each pair, (B,), and no mean.
        losses::conservative_dpo_rests_at_the_log_odds_of_the_label_noise
            (1 - e) l(+) + e l(-): the two weights sum to 1.
        losses::dpo_passes_gradcheck
            Keep to torch operations, so that all four log-probs get their gradient.
        losses::comparisons_stay_finite_at_log_ratios_of_ten_thousand
            The log of a sigmoid overflows: use F.logsigmoid.
        """,
    ),
    Lab(
        "kto",
        10,
        "dpo.py",
        ["kto_loss", "mismatched_kl"],
        """
        losses::kto_raises_good_replies_lowers_bad_ones_and_z0_takes_no_gradient
            A good reply gains above z0, a bad one below it; z0 is max(0, mean), detached.
        losses::every_relative_by_hand
            The loss is 1 - sigmoid(beta gain), times the weight of the reply's kind.
        losses::relatives_are_slow_loops_at_random_points
            desirable_weight is of good replies, undesirable_weight of bad ones.
        losses::each_loss_of_a_batch_reads_what_its_equation_reads[kto]
            z0 is the mean over the batch's mismatched replies, and at least 0.
        """,
    ),
    Lab(
        "gae",
        12,
        "ppo.py",
        ["gae"],
        """
        losses::gae_by_hand
            Go backwards: A_t = delta_t + gamma lam A_{t+1}; the value after the last step is 0,
            and returns are advantages + values.
        losses::gae_defaults_are_no_discount_and_95_percent
            gamma and lam have their defaults in the signature: leave it as it is.
        losses::gae_is_its_definition_whatever_stands_at_masked_positions
            A masked position is no step: the next step's value and advantage pass over it. Fill
            what is masked before you compute with it, because NaN times 0 is NaN.
        """,
    ),
    Lab(
        "clip",
        12,
        "ppo.py",
        ["policy_loss"],
        """
        losses::the_clip_takes_away_the_gain_but_never_the_loss
            The gain is the smaller of ratio A and clip(ratio) A, and the loss is its negative.
        losses::the_clip_has_a_lower_and_an_upper_bound
            clip_eps may be a pair, (lower, upper).
        losses::policy_loss_is_the_slow_loop_and_its_divisor_makes_micro_batches_add_up
            A sum over the tokens under the mask, divided by divisor, or by their number.
        losses::what_stands_at_masked_positions_reaches_neither_loss_nor_gradient
            Fill what is masked before you compute with it: NaN times 0 is NaN.
        losses::a_batch_without_a_single_token_costs_nothing
            Divide by at least 1.
        losses::gspo_by_hand
            All tokens of a reply have one ratio: exp of the mean of their log-ratios.
        losses::cispo_by_hand
            The weight min(ratio, 1 + upper) has no gradient, log pi has one.
        losses::each_clip_is_the_slow_loop_and_reads_nothing_under_the_mask
            The three clips differ in the gain of a token and share the sum and its divisor.
        losses::policy_loss_stays_finite_at_log_ratios_of_ten_thousand
            exp overflows: clamp the log-ratio from above.
        """,
    ),
    Lab(
        "groups",
        8,
        "ppo.py",
        ["rloo_advantages", "grpo_advantages"],
        """
        losses::group_advantages_by_hand
            RLOO subtracts the mean of the K - 1 others; GRPO the mean of all K, and divides by the
            sample standard deviation + 1e-4.
        losses::equal_scores_have_exactly_no_advantage_whatever_rounding_makes_of_their_mean
            Rounding moves a mean away from equal scores: keep it between their least and largest.
        identities::without_a_critic_a_reply_is_compared_with_the_others_to_its_prompt
            Groups are rows: take the mean over dimension 1.
        """,
    ),
    Lab(
        "row-gradient",
        12,
        "kernels/rows.py",
        ["logprob_coefficients", "kl_coefficients"],
        """
        kernels::any_mixture_of_upstream_gradients_gives_the_twins_gradient
            Bring dlogits into the form exp(u) [a + b (u - v)] + c onehot. Here v = 0, p / T is
            exp(u) exp(-s) scale, and log p + H is u - s + H.
        kernels::row_ops_pass_gradcheck
            The temperature divides once. log p - log q - KL is (u - v) - (s - s_ref + KL).
        kernels::linear_logprob_passes_gradcheck
            An upstream gradient that is None was not asked for: it adds nothing.
        kernels::linear_kl_passes_gradcheck
            The forward KL has p - q: a for p, d for q.
        """,
    ),
    Lab(
        "sampler",
        10,
        "kernels/sampling.py",
        ["sample"],
        """
        model::top_k_1_and_a_tiny_top_p_are_greedy
            Temperature 0 is argmax, and the most likely token is always kept.
        model::the_generator_decides_what_is_sampled
            Hand the generator on to torch.
        model::tokens_are_drawn_with_the_probabilities_that_were_asked_for
            First the temperature, then top-k, then top-p of what is left. top_p's set holds the
            token that reaches it. After sorting, go back to the vocabulary's order.
        kills::a_policy_of_nan_says_that_it_cannot_reply
            Logits that are NaN raise ValueError(DIVERGED).
        """,
    ),
]


def find(names):
    """The labs of these names; all of them without a name."""
    known = {lab.name: lab for lab in LABS}
    for name in names:
        run.require(name in known, f"there is no lab called {name}: there are {', '.join(known)}")
    return [known[name] for name in names] or LABS


# --------------------------------------------------------------------------------- cut and put back


def read(path):
    """A file's text with its line ends as they are."""
    return path.read_bytes().decode("utf-8")


def functions_of(text, names):
    """{name: its node} of these top-level functions. Raises ValueError if one is missing or if the
    text is no Python."""
    try:
        body = ast.parse(text).body
    except SyntaxError as error:
        raise ValueError(f"line {error.lineno} is no Python: {error.msg}") from None
    except (ValueError, RecursionError, MemoryError) as error:  # a null byte, or nested too deep
        raise ValueError(f"it is no Python: {error}") from None
    found = {node.name: node for node in body if isinstance(node, ast.FunctionDef)}
    missing = ", ".join(name for name in names if name not in found)
    run.require(not missing, f"it has no function {missing}: put it back")
    return {name: found[name] for name in names}


def from_below(text, names):
    """The nodes of these functions, the last one first: what is above a cut keeps its lines."""
    return sorted(functions_of(text, names).values(), key=lambda node: -node.lineno)


def blanked(text, lab):
    """The text of a lab's file, with an error in the place of each of its functions' bodies."""
    lines = text.split("\n")
    for node in from_below(text, lab.functions):
        docstring = node.body[0]
        error = f'raise NotImplementedError("{node.name} {BLANK}")'
        lines[docstring.end_lineno : node.end_lineno] = [" " * docstring.col_offset + error]
    return "\n".join(lines)


def restored(text, original, names):
    """The text, with these functions as they are in the original."""
    lines, original_lines = text.split("\n"), original.split("\n")
    ours = functions_of(original, names)
    for node in from_below(text, names):
        first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
        whole = ours[node.name]
        lines[first - 1 : node.end_lineno] = original_lines[whole.lineno - 1 : whole.end_lineno]
    return "\n".join(lines)


def write_copy(directory, labs):
    """A copy of the repository in an empty directory, without the bodies of these labs."""
    target = directory.resolve()
    empty = not target.exists() or (target.is_dir() and not any(target.iterdir()))
    run.require(empty, f"{directory} exists and is not an empty directory: name another one")
    inside = any(target == ROOT / room or ROOT / room in target.parents for room in ROOMS)
    run.require(not inside, f"{directory} lies in the code that is copied: name one elsewhere")
    target.mkdir(parents=True, exist_ok=True)
    copy_tree(target)
    for lab in labs:
        path = target / lab.file
        path.write_bytes(blanked(read(path), lab).encode())


# ----------------------------------------------------------- in the process that runs a lab's tests

FINDINGS = {"passed": 0}  # pytest, started with -p tests.lab, calls the three functions below


def pytest_exception_interact(call, report):
    FINDINGS.setdefault("failed", (report.nodeid, sentence(call.excinfo.value)))


def pytest_runtest_logreport(report):
    FINDINGS["passed"] += report.when == "call" and report.passed


def pytest_sessionfinish(session):
    FINDINGS["collected"] = session.testscollected
    Path(REPORT).write_text(json.dumps(FINDINGS), encoding="utf-8")


def sentence(error):
    """What went wrong in a test: what was expected and what came, if the error knows them."""
    places = list(traceback.walk_tb(error.__traceback__))
    for frame, _ in places:
        if (
            frame.f_code.co_name == "assert_close"
            and {"actual", "expected"} <= frame.f_locals.keys()
        ):
            difference = compared(frame.f_locals["actual"], frame.f_locals["expected"])
            if difference:
                return difference
    lines = str(error).strip().splitlines() or [""]
    if isinstance(error, AssertionError):
        claim = lines[0].removeprefix("assert ")
        got, _, expected = claim.partition(" == ")
        if expected and " == " not in expected:
            return f"expected {expected}, got {got}"
        if claim in ("False", "not True", "") or claim.startswith("tensor("):  # of a call
            claim = traceback.extract_tb(error.__traceback__)[-1].line.removeprefix("assert ")
        return f"this does not hold: {claim}"
    if isinstance(error, NotImplementedError):
        return lines[0]
    if type(error).__name__ == "CollectError":  # a traceback as text, the error in its last line
        return lines[-1].removeprefix("E").strip()
    files = [(Path(frame.f_code.co_filename), frame.f_code.co_name) for frame, _ in places]
    theirs = [name for file, name in files if ROOT in file.parents and file.parent.name != "tests"]
    place = f" in {theirs[-1]}" if theirs else ""
    return f"{type(error).__name__}{place}: {lines[0].rstrip(',')}"


def compared(actual, expected):
    """Where two tensors or numbers differ most; nothing if they are no tensors."""
    try:
        actual, expected = (torch.as_tensor(x).detach() for x in (actual, expected))
    except (TypeError, ValueError, RuntimeError):
        return ""
    if (actual.shape, actual.dtype) != (expected.shape, expected.dtype):
        shapes = [f"{tuple(x.shape)} of {x.dtype}" for x in (expected, actual)]
        return "expected the shape {}, got {}".format(*shapes)
    if not actual.numel():
        return ""
    gaps = (actual.double() - expected.double()).abs().nan_to_num(torch.inf)
    gaps = gaps.masked_fill(actual == expected, 0)  # infinities of one sign
    index = torch.unravel_index(gaps.argmax(), gaps.shape)
    place = f" at {[int(i) for i in index]}" if index else ""
    return f"expected {float(expected[index]):.6g}{place}, got {float(actual[index]):.6g}"


# -------------------------------------------------------------------------------------------- grade


def graded(lab, directory):
    """-> what is wrong with a lab's functions in this directory, in a sentence ("": nothing), and
    the output of their tests."""
    try:
        text, original = read(directory / lab.file), read(ROOT / lab.file)
        functions_of(text, lab.functions)
        others = [other for other in LABS if other.file == lab.file and other is not lab]
        text = restored(text, original, [name for other in others for name in other.functions])
    except (ValueError, OSError) as error:
        return f"{lab.file}: {error}", ""
    words = [
        sys.executable,
        "-m",
        "pytest",
        "-x",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "tests.lab",
    ]
    words += [f"tests/{test}" for test in lab.tests]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    options = dict(env=environment, stdin=subprocess.DEVNULL, stderr=subprocess.STDOUT)
    scratch = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    with scratch as tree, tempfile.TemporaryFile() as output:
        copy_tree(Path(tree))
        (Path(tree) / lab.file).write_bytes(text.encode())
        try:  # to a file: a process that the code has started could hold a pipe open
            ended = subprocess.run(words, cwd=tree, stdout=output, timeout=LIMIT, **options)
        except subprocess.TimeoutExpired:
            ended = None
        output.seek(0)
        printed = output.read().decode("utf-8", "replace")
        findings = findings_in(Path(tree) / REPORT)
    if ended is None:
        return f"its tests did not end within {LIMIT} seconds: does a loop never stop?", printed
    return verdict(lab, findings, ended.returncode), printed


def findings_in(path):
    """FINDINGS of the tests' process; empty if it wrote none, or if something wrote over them."""
    try:
        findings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    whole = isinstance(findings, dict) and {"passed", "collected"} <= findings.keys()
    return findings if whole else {}


def verdict(lab, findings, code):
    """What is wrong, in a sentence. findings: of the tests' process; code: its exit code."""
    names = " or ".join(lab.functions)
    if "failed" in findings:
        place, why = findings["failed"]
        if why.endswith(BLANK):
            return f"{why} in {lab.file}"
        test = place.removeprefix("tests/")
        hint = lab.tests.get(test) or lab.tests.get(test.partition("[")[0], "")
        return " ".join([f"{names} in {lab.file} fails {test.partition('::')[2]}: {why}.", hint])
    if findings and code == 0 and findings["passed"] == findings["collected"] > 0:
        return ""
    return (
        f"{names} in {lab.file} ended or skipped the tests (exit code {code}): leave that to them"
    )


# ----------------------------------------------------------------------------------------- commands


@dataclass
class Config:
    pass


@dataclass
class CheckConfig:
    traceback: bool = False  # also print all that the tests print


@dataclass
class GradeConfig:
    json: str = ""  # file for Gradescope, there /autograder/results/results.json


def directory_of(words):
    run.require(words, "name a directory, such as out/labs")
    return Path(words[0])


def list_labs(words, config):
    run.require(not words, f"list takes no {' '.join(words)}: leave it out")
    for lab in LABS:
        run.show(f"{lab.name:14} {lab.points:3}  {lab.file:20} {', '.join(lab.functions)}")


def blank(words, config):
    directory, labs = directory_of(words), find(words[1:])
    write_copy(directory, labs)
    for lab in labs:
        run.show(f"{lab.name:14} write {', '.join(lab.functions)} in {directory / lab.file}")
    run.show(f"then: python -m tests.lab check {directory}")


def check(words, config):
    directory, labs = directory_of(words), find(words[1:])
    require_labs(directory)
    failed = 0
    for lab in labs:
        wrong, printed = graded(lab, directory)
        failed += bool(wrong)
        run.show(run.one_line(f"{lab.name}: {wrong or 'passed'}"))
        if wrong and config.traceback:
            run.show(printed)
        elif wrong and printed:
            run.show(f"    python -m tests.lab check {directory} {lab.name} --traceback")
    if failed:
        sys.exit(1)


def grade(words, config):
    directory = directory_of(words)
    run.require(len(words) == 1, f"grade takes one directory and no {' '.join(words[1:])}")
    require_labs(directory)
    tests = []
    for lab in LABS:
        wrong, _ = graded(lab, directory)
        result = {"name": lab.name, "score": 0 if wrong else lab.points, "max_score": lab.points}
        tests.append(result | {"output": str(run.one_line(wrong or "passed"))})
        run.show(f"{lab.name:14} {result['score']:3} of {lab.points:3}  {tests[-1]['output']}")
    score = sum(test["score"] for test in tests)
    run.show(f"{score} of {sum(lab.points for lab in LABS)} points")
    if config.json:
        run.write_json(Path(config.json), {"score": score, "tests": tests})


def require_labs(directory):
    some = any((directory / lab.file).is_file() for lab in LABS)
    wrong = f"{directory} holds none of the labs' files"
    run.require(some, f"{wrong}: python -m tests.lab blank {directory} makes it")


COMMANDS = {"list": (list_labs, Config), "blank": (blank, Config)}
COMMANDS |= {"check": (check, CheckConfig), "grade": (grade, GradeConfig)}


def main():
    """Takes the words before the first flag, DIR and NAMEs, from the command line."""
    words = list(takewhile(lambda word: not word.startswith("-"), sys.argv[2:]))
    del sys.argv[2 : 2 + len(words)]
    table = {name: (partial(command, words), flags) for name, (command, flags) in COMMANDS.items()}
    run.commands(table, __doc__)


if __name__ == "__main__":
    main()
