"""Claims about rewards that can be checked (data/rules.py) and about rejection sampling
(data/rejection.py): each rule on replies that a person has judged, on what a policy may write, on
records that lack an answer, and on functions of a user's that fail."""

import json
import logging
import re
import time
from pathlib import Path

import pytest
import torch

from data import chat, checkpoints, formats, rejection, rules, tokenizer, world
from data.records import Prompt

ROOT = Path(__file__).parents[1]


def ask(answer, where="here:1"):
    return Prompt([{"role": "user", "content": "what is it ?"}], where, answer)


def score(spec, text, answer=""):
    (result,) = rules.open_rule(spec).scores([ask(answer)], [([], True, text)])
    assert type(result) is float
    return result


# ------------------------------------------------------------------------------- rules by hand

HAND = [  # rule, reply, answer of the record, whether it is right
    ("equals", " 1 + 2 = 3 ; 3 + 4 = 7", "7", True),
    ("equals", " 1 + 2 = 7 ; 3 + 4 = 3", "7", False),  # the last sign counts
    ("equals", "48 / 2 = <<48/2=24>>24 clips", "He sold 24.\n#### 24", True),
    ("equals", "x = -3", "-3", True),
    ("equals", "x = $1,234.50.", "1234.5", True),
    ("equals", "it is 7", "7", False),
    ("equals", "7 =", "7", False),
    ("equals", "x = y 7", "7", False),
    ("equals", "x = 3,5", "3", False),  # no number at all
    ("last", "first 3, then 4", "4", True),
    ("last", "first 4, then 3", "4", False),
    ("last", "It costs $1,234.", "1234", True),
    ("last", "10-3", "3", True),  # a minus between two terms
    ("last", "10 and -3", "3", False),
    ("last", "10 and -3", "-3.0", True),
    ("last", "wait...5", "5", True),
    ("last", "about .5", "0.50", True),
    ("last", "2e3", "2000", True),
    ("last", "1, 2", "2", True),
    ("last", "1,2", "2", False),
    ("last", "-$3.50", "-3.5", True),
    ("last", "no idea", "4", False),
    ("last", "so \u22125", "-5", True),
    ("last", "so \u22125", "5", False),
    ("last", "it is 10{,}000", "10000", True),
    ("last", "it is 10\u00a0000", "10000", True),
    ("last", "it is 5\u00a06", "6", False),
    ("last", "1/2", "2", False),
    ("last", "1 / 2", "2", False),
    ("last", "\\frac{1}{2}", "2", False),
    ("last", "\\dfrac12", "2", False),
    ("last", "\\frac1{2}", "2", False),
    ("last", "\\frac{\\sqrt{3}}{ x + 2 }", "2", False),
    ("last", "\\frac{3}{x}", "3", False),
    ("last", "\\sqrt{2}", "2", False),
    ("last", "1/2 of 10 is 5", "5", True),
    ("last", "10^5", "5", False),
    ("last", "10^{5}", "5", False),
    ("last", "5^x", "5", False),
    ("last", "90^\\circ", "90", True),
    ("last", "so \\boxed{5}", "5", True),
    ("last", '{"answer": 5}', "5", True),
    ("last", "- 5", "5", False),
    ("last", "x = - 5", "5", False),
    ("last", "10 - 5", "5", True),
    ("equals", "x = 7 + 3", "7", False),
    ("equals", "x = 5/2", "5", False),
    ("equals", "x = 10^3", "10", False),
    ("equals", "x = 5*2", "5", False),
    ("equals", "x = 5**2", "5", False),
    ("equals", "x = 5 \\times 3", "5", False),
    ("equals", "x = \\boxed{5} + 3", "5", False),
    ("equals", "x <= 5", "5", False),
    ("equals", "x >= 5", "5", False),
    ("equals", "x = - 5", "5", False),
    ("equals", "x = **5** apples", "5", True),
    ("equals", "**x = 5** apples", "5", True),
    ("equals", "x = \\$5", "5", True),
    ("equals", "x = \\boxed{5}", "5", True),
    ("equals", "so $x = 5$.", "5", True),
    ("equals", "x = $5$", "5", True),
    ("boxed", r"so $\boxed{\dfrac{14}{3}}$.", r"It is \boxed{\frac{14}{3}}", True),
    ("boxed", r"\boxed{14/3}", r"\frac{14}{3}", False),
    ("boxed", r"\boxed{1,234}", "1234", True),
    ("boxed", r"\boxed{10\,000}", "10000", True),
    ("boxed", r"\boxed{1} or \boxed{2}", "2", True),
    ("boxed", r"\boxed{1} or \boxed{2}", "1", False),
    ("boxed", r"\boxed{2", "2", False),
    ("boxed", r"\boxed{1} or \boxed{2", "1", False),
    ("boxed", r"\boxed{\{1, 2\}}", r"\{1,2\}", True),
    ("boxed", r"\boxed{\text{Evelyn}}", "Evelyn", True),
    ("boxed", r"\boxed{\left( 3, \frac{\pi}{2} \right)}", r"(3,\frac{\pi}{2})", True),
    ("boxed", r"\boxed{\leftarrow}", "arrow", False),
    ("boxed", r"\boxed{\frac12}", r"\frac{1}{2}", True),
    ("boxed", r"\boxed{\tfrac 1{2}}", r"\frac{1}{2}", True),
    ("boxed", r"\boxed{\dfrac{1}2}", r"\frac{1}{2}", True),
    ("boxed", r"\boxed{5\%}", "5%", True),
    ("boxed", r"\boxed{5\%}", "5", False),
    ("boxed", r"\boxed{90^\circ}", "90", True),
    ("boxed", r"\boxed{90}", r"90^{\circ}", True),
    ("boxed", r"\boxed{10{,}000}", "10000", True),
    ("boxed", r"\boxed {5}", "5", True),
    ("boxed", r"\boxed{1} and \boxed {5}", "1", False),
    ("boxed", r"\boxed{- 5}", "-5", True),
    ("boxed", r"\boxed{1 2}", "12", False),
    ("boxed", r"\boxed{1\ 2}", "12", False),
    ("boxed", r"\boxed{1, 234}", "1234", False),
    ("boxed", r"\boxed{1, 234}", "1,234", False),
    ("boxed", r"\boxed{(1, 234)}", "(1,234)", True),
    ("boxed", "42", "42", False),
    ("boxed", r"\boxed{42}", "6 * 7 = 42\n#### 42", True),
    ("exact", " blue ", "blue", True),
    ("exact", "blue ok", "blue", False),
    ("exact", "Blue", "blue", False),
    ("exact", "18", "He sells 18.\n#### 18", True),
    ("exact", "He sells 18.\n#### 18", "He sells 18.\n#### 18", False),
    ("ends", "that makes 18", "He sells 18.\n#### 18", True),
    ("ends=5", "it is 5", "", True),
    ("ends=5", "it is 15", "", False),
    ("ends=5", "it is 1.5", "", False),
    ("ends=5", "it is .5", "", False),
    ("ends=5", "it is -5", "", False),
    ("ends=5", "wait...5", "", True),
    ("ends=hat", "a hat", "", True),
    ("ends=hat", "(hat", "", True),
    ("ends=hat", "a chat", "", False),
    ("ends=.", "it is so.", "", True),
    ("ends=?", "who are you? ", "", True),
    ("ends=?", "who? me", "", False),
    ("length=4", "four", "", True),
    ("length=4", "fives", "", False),
    ("length=4", " ", "", False),
    ("words=2", "two  words", "", True),
    ("words=2", "three little words", "", False),
    ("words", "two words", "2", True),  # without a VALUE: the record's
    ("case=lower", "i have 2", "", True),
    ("case=lower", "I have 2", "", False),
    ("case=upper", "STOP 2", "", True),
    ("case=upper", "", "", False),
    ("last=4", "it is 4", "5", True),  # a VALUE stands in place of the record's answer
]


@pytest.mark.parametrize(("rule", "reply", "answer", "right"), HAND)
def test_a_rule_judges_as_a_person_would(rule, reply, answer, right):
    assert score(f"rule:{rule}", reply, answer) == float(right)


def test_every_rule_is_judged_by_hand_right_and_wrong():
    judged = {(rule.partition("=")[0], right) for rule, *_, right in HAND}
    assert judged == {(name, right) for name in rules.RULES for right in (True, False)}


VALUES = dict(ends="ends=x", length="length=9", words="words=3", case="case=lower")
EMPTY = ["", " ", "\n", "\u00a0"]
ODD = [
    *EMPTY,
    "=",
    "==",
    "\\boxed{",
    "\\boxed{}",
    "}{",
    "-",
    "$",
    ".",
    ",",
    "1.2.3",
    "1,",
    "$-",
    "-$5-",
]
ODD += ["NaN", "= nan", "inf", "1e400", "= 1e99999999999999999999", "= -1e-99999999999999999999"]
ODD += ["٣", "²", "= ½", "\x00", "\ud800", "\\", "1e", "= 1e+", "0x10", "\\boxed{\\", "####"]
LONG = [
    "9",
    "1,",
    "111,",
    "-",
    "$",
    "-$",
    "=",
    "{",
    "\\",
    "\\boxed{",
    "\\text{",
    "1e",
    ".",
    " ",
    "a",
    "\\frac{",
    "\\frac1",
    "\\boxed ",
    "{,}",
    "^ ",
    "/ ",
    "- ",
    "**a",
    "1 ",
    "}",
]


@pytest.mark.parametrize("name", rules.RULES)
def test_whatever_a_policy_writes_is_scored_0_or_1(name):
    spec = f"rule:{VALUES.get(name, name)}"
    for text in ODD:
        assert score(spec, text, "5") in (0.0, 1.0), text
    for text in EMPTY:
        assert score(spec, text, "5") == 0.0


@pytest.mark.parametrize("name", rules.RULES)
def test_a_long_reply_takes_no_quadratic_time(name):
    """A rule that goes over 300,000 characters again for each of them would need hours."""
    spec = f"rule:{VALUES.get(name, name)}"
    start = time.perf_counter()
    for piece in LONG:
        text = piece * (300_000 // len(piece))
        for reply in (text, f"= {text}", f"\\boxed{{{text}}}"):
            assert score(spec, reply, "5") in (0.0, 1.0)
    assert time.perf_counter() - start < 60


# --------------------------------------------------------------------- answers, and what they lack

NUMBERS = [  # answer, its number
    ("5", "5"),
    (" 5. ", "5"),
    ("1,234", "1234"),
    ("$5", "5"),
    ("-3.50", "-3.5"),
    ("2 + 3 = 5\n5 * 2 = 10\n#### 1,000", "1000"),
    (r"So $x = \boxed{10\,000}$.", "10000"),
    ("#### Steps\n1 + 1\n\nIt is \\boxed{2}.", "2"),  # no last line: a heading
    ("2 + 3 = 5 and #### is a mark\n####  5 \n\n", "5"),
    ("\u22125", "-5"),
    ("1 + 2 = 3 ; 3 + 4 = 7", "7"),
]


@pytest.mark.parametrize(("answer", "number"), NUMBERS)
def test_the_number_of_a_published_answer_is_found(answer, number):
    assert score("rule:last", number, answer) == 1
    assert score("rule:last", f"{number}1", answer) == 0


UNUSABLE = [  # rule, answer of a record, what the sentence says
    ("last", "", "has no answer"),
    ("exact", " ", "has no answer"),
    ("words", "", "has no answer"),
    ("last", "five", "the answer 'five' is no number: give the number alone or behind"),
    ("last", "3,5", "the answer '3,5' is no number"),
    ("last", "12 apples", "is no number"),
    ("last", "10-3", "is no number"),
    ("last", "1 2", "is no number"),
    ("last", "٣", "is no number"),
    ("last", "nan", "is no number"),
    ("last", "1e99999999999999999999", "is no number"),
    ("equals", r"\boxed{\pi}", "is no number"),
    ("equals", "x" * 100 + "y", f"the answer '..{'x' * 59}y' is no number"),
    ("last", "1/2", "is no number"),
    ("last", r"\boxed{1, 234}", "is no number"),
    ("boxed", r"\boxed{2", "holds no final answer"),
    ("boxed", "a\n####", "holds no final answer"),
    ("exact", "a\n####", "holds no final answer"),
    ("words", "many", "the answer 'many' is no count"),
    ("length", "0", "the answer '0' is no count"),
    ("case", "title", "the answer 'title' is no case: give lower or upper"),
]


@pytest.mark.parametrize(("name", "answer", "words"), UNUSABLE)
def test_a_record_that_a_rule_cannot_use_is_named_before_training(name, answer, words):
    rule = rules.open_rule(f"rule:{name}", "--judge")
    with pytest.raises(ValueError) as caught:
        rule.check([ask({"case": "lower"}.get(name, "5")), ask(answer, "file.jsonl:7")])
    sentence = str(caught.value)
    assert sentence.startswith(f"--judge rule:{name}: file.jsonl:7") and words in sentence
    assert "\n" not in sentence


def test_a_record_needs_no_answer_where_the_rule_has_a_value():
    rules.open_rule("rule:last=5").check([ask("")])


SPECS = [  # spec, what the sentence says
    (
        "rule:",
        "there is no rule ''; there are equals, last, boxed, exact, ends, length, words, case",
    ),
    ("rule:lst", "there is no rule 'lst'; there are"),
    ("rule:__class__", "there is no rule '__class__'"),
    ("rule:words=x", "the answer 'x' is no count: give a whole number from 1 on"),
    ("rule:words=-1", "the answer '-1' is no count"),
    ("rule:length=٣", "is no count"),
    ("rule:case=Lower", "is no case"),
    ("rule:last=many", "is no number"),
    ("rule:ends=", "there is no text behind the =; write one"),
]


@pytest.mark.parametrize(("spec", "words"), SPECS)
def test_a_rule_that_does_not_exist_or_a_value_that_does_not_fit_is_refused(spec, words):
    with pytest.raises(ValueError) as caught:
        rules.open_rule(spec)
    assert str(caught.value).startswith(f"--reward {spec}: ") and words in str(caught.value)


def test_a_reward_is_a_rule_or_a_directory():
    for spec in ("world", "rule:last", "rule:no-such", "a.py:f", r"C:\a b\x.py:f", "a.py", "a.py:"):
        assert rules.is_rule(spec), spec
    for spec in ("out/reward", "out/world", "rules", "a.py/reward", "C:\\out", "x.pyc:f", ""):
        assert not rules.is_rule(spec), spec


def test_world_is_the_world_s_judge():
    prompts = world.prompts(26)
    rule = rules.open_rule("world")
    rule.check(prompts)
    for ended, gold in ((True, 1.0), (False, 0.0)):
        replies = [([], ended, f" {prompt.answer}") for prompt in prompts]
        assert rule.scores(prompts, replies) == [gold] * 26
    with pytest.raises(ValueError, match="--reward world: here:1 is no question of the embedded"):
        rule.check([*prompts, ask("5")])


def test_the_world_s_answers_pass_the_rules_that_compare():
    prompts = world.prompts(130, skills=["sum", "add", "count"])
    right = [([], True, f" {prompt.answer}") for prompt in prompts]
    wrong = [([], True, f" {prompt.answer}1") for prompt in prompts]
    for name in ("last", "exact"):
        rule = rules.open_rule(f"rule:{name}")
        rule.check(prompts)
        assert rule.scores(prompts, right) == [1.0] * 130
        assert rule.scores(prompts, wrong) == [0.0] * 130


def test_published_solutions_pass_the_rule_for_their_answers(shared):
    """GSM8K's own solutions end on their answers. MATH-500 has answers that are no numbers, and
    its solutions hold them in a box."""
    for name, spec, count in (
        ("gsm8k/test", "rule:last", 300),
        ("math_test500", "rule:boxed", 300),
    ):
        path = shared / f"data/process/{name}.jsonl"
        solutions = [record.messages[-1]["content"] for record in formats.read(path)]
        prompts = formats.read(path, "prompt")
        rule = rules.open_rule(spec)
        rule.check(prompts)
        replies = [([], True, solution) for solution in solutions]
        others = replies[1:] + replies[:1]
        assert rule.scores(prompts, replies) == [1.0] * count
        assert sum(rule.scores(prompts, others)) < count / 10


# ---------------------------------------------------------------------------- a user's own function


@pytest.fixture
def users(tmp_path):
    """users(source): the path of a Python file."""

    def write(source):
        path = tmp_path / "mine.py"
        path.write_text(source, encoding="utf-8")
        return path

    return write


def test_a_user_s_function_is_called_with_what_it_takes(users, tmp_path):
    path = users(
        "def two(messages, reply): return len(reply)\n"
        "def three(messages, reply, answer): return reply == answer\n"
        "def rest(*arguments): return len(arguments)\n"
        "def asked(messages, reply):\n"
        "    messages[0]['content'] += '!'\n"
        "    return len(messages[0]['content'])\n"
        "class Judge:\n"
        "    def __call__(self, messages, reply): return 0.5\n"
        "judge = Judge()\n"
    )
    assert score(f"{path}:two", "abc") == 3.0
    assert score(f"{path}:three", "abc", "abc") == 1.0
    assert score(f"{path}:rest", "abc") == 3.0
    assert score(f"{path}:judge", "abc") == 0.5
    prompt = ask("")
    rule = rules.open_rule(f"{path}:asked")
    # what it does to its arguments does not reach the prompt
    assert rule.scores([prompt] * 2, [([], True, "")] * 2) == [13.0] * 2
    assert prompt == ask("")
    assert [file.name for file in tmp_path.iterdir()] == ["mine.py"]  # nothing compiled beside it


def test_the_readme_s_function_pays_for_right_answers_of_ordinary_length(users, shared):
    text = (ROOT / "data/README.md").read_text(encoding="utf-8")
    source = re.search(r"```python\n(# rewards\.py.*?)```", text, re.DOTALL)[1]
    rule = rules.open_rule(f"{users(source)}:brief")
    path = shared / "data/process/gsm8k/test.jsonl"
    solutions = [([], True, record.messages[-1]["content"]) for record in formats.read(path)]
    assert rule.scores(formats.read(path, "prompt"), solutions) == [1.0] * 300
    prompt = [ask("It is 5.\n#### 5")]
    for reply, value in (("7.5", 0.0), ("no", 0.0), ("so " * 209 + "5", 0.9)):
        assert rule.scores(prompt, [([], True, reply)]) == [value]


def test_a_changed_file_is_read_again(users):
    path = users("def f(messages, reply): return 1\n")
    assert score(f"{path}:f", "") == 1
    users("def f(messages, reply): return 2\n")
    assert score(f"{path}:f", "") == 2


def test_a_function_that_takes_the_answer_needs_one_unless_it_has_a_default(users):
    path = users(
        "def needs(messages, reply, answer): return 1\n"
        "def may(messages, reply, answer=''): return 1\n"
    )
    with pytest.raises(ValueError, match=r"mine\.py:needs: here:1 has no answer: give it a field"):
        rules.open_rule(f"{path}:needs").check([ask("")])
    rules.open_rule(f"{path}:may").check([ask("")])


BROKEN = [  # source, function, what the sentence says
    ("", "f", "has no function f; define it there"),
    ("f = 3", "f", "has no function f"),
    ("x = 1", "", "name the function too, as file.py:NAME"),
    ("def f(reply): return 1", "f", "takes other arguments; define f(messages, reply) or f(mess"),
    ("def f(a, b, *, c): return 1", "f", "takes other arguments"),
    ("def f(", "f", "cannot be imported: SyntaxError: '(' was never closed"),
    ("\nimport no_such_module", "f", "ModuleNotFoundError: No module named 'no_such_module'"),
    ("import sys\nsys.exit(3)", "f", "cannot be imported: SystemExit: 3"),
    ("x = '\x00'", "f", "cannot be imported: "),
]


@pytest.mark.parametrize(("source", "name", "words"), BROKEN)
def test_a_user_s_file_that_cannot_be_used_is_refused(source, name, words, users):
    path = users(source)
    with pytest.raises(ValueError) as caught:
        rules.open_rule(f"{path}:{name}")
    assert words in str(caught.value) and f"--reward {path}:{name}" in str(caught.value)


def test_a_missing_user_s_file_is_named():
    with pytest.raises(
        FileNotFoundError, match="nowhere.py: there is no such file; check the path"
    ):
        rules.open_rule("nowhere.py:f")


FAILING = [  # body of the function, what the sentence says
    ("return 1 / 0", "ZeroDivisionError: division by zero ({path}:2); correct it"),
    ("raise ValueError('a\\nb')", "ValueError: a\\x0ab ({path}:2)"),
    (
        "import json; json.loads('')",
        "JSONDecodeError: Expecting value: line 1 column 1 (char 0) ({path}:2)",
    ),
    ("import sys; sys.exit()", "SystemExit"),
    ("return f(messages, reply)", "RecursionError"),
    ("return None", "the function returned NoneType None: return a number, true or false"),
    ("return '1'", "the function returned str '1': return a number"),
    ("return [1.0]", "the function returned list [1.0]"),
    ("return 1j", "the function returned complex 1j"),
    ("return float('nan')", "the function returned float nan: return a finite number"),
    ("return -float('inf')", "the function returned float -inf: return a finite number"),
    ("return 10 ** 400", "return a finite number"),
]


@pytest.mark.parametrize(("body", "words"), FAILING)
def test_a_user_s_function_that_fails_is_named_with_its_record_and_line(body, words, users):
    path = users(f"def f(messages, reply):\n    {body}\n")
    rule = rules.open_rule(f"{path}:f")
    with pytest.raises(ValueError) as caught:
        rule.scores([ask("5", "file.jsonl:7")], [([], True, "hi")])
    sentence = str(caught.value)
    assert sentence.startswith(f"--reward {path}:f: file.jsonl:7: the function ")
    assert words.format(path=path) in sentence and "\n" not in sentence


@pytest.mark.parametrize(("body", "value"), [("True", 1.0), ("False", 0.0), ("3", 3.0)])
def test_true_and_whole_numbers_are_scores(body, value, users):
    assert score(f"{users(f'def f(messages, reply): return {body}')}:f", "") == value


# ------------------------------------------------------------------------------- rejection sampling


def best(*replies, at_least=-1e9, encoding=None):
    """Index of the best of (score, ended, text)."""
    rows = [([], ended, text) for _, ended, text in replies]
    return rejection.best(rows, [score for score, _, _ in replies], at_least, encoding)


def test_the_best_whole_reply_is_kept_and_of_equals_the_first(world_encoding):
    whole = [(0.2, True, "a"), (0.9, True, "b"), (0.9, True, "c"), (0.1, True, "d")]
    assert best(*whole, encoding=world_encoding) == 1
    assert best((9.0, False, "cut"), *whole, encoding=world_encoding) == 2
    assert best((9.0, True, " "), *whole, encoding=world_encoding) == 2
    assert best(*whole, at_least=0.9, encoding=world_encoding) == 1
    assert best(*whole, at_least=1, encoding=world_encoding) is None
    assert best((-3.0, True, "a"), (-2.0, True, "b"), encoding=world_encoding) == 1
    assert best((1.0, False, "a"), encoding=world_encoding) is None


def test_a_cut_reply_is_never_right_and_never_better_than_a_whole_one(users):
    prompts = [ask("5")] * 3
    replies = [([], True, "5"), ([], False, "5"), ([], True, "4")]
    rule = rules.open_rule("rule:last")
    assert rejection.score_replies(rule, None, prompts, replies) == [1.0, 0.0, 0.0]
    below = rules.open_rule(f"{users('def f(messages, reply): return -float(reply)')}:f")
    assert rejection.score_replies(below, None, prompts, replies) == [-5.0, -5.0, -4.0]


@pytest.fixture
def sampled(place, world_model, world_encoding, monkeypatch, capsys):
    """sampled(replies, flags): runs the command with these (ended, text) for samples; gives the
    rows that it wrote and what it said."""
    checkpoints.save(world_model(), place / "lm")
    tokenizer.save(world_encoding, place / "lm")

    def command(replies, **flags):
        def sample(model, encoding, messages, max_new_tokens, temperature, seed, samples):
            assert len(messages) * samples == len(replies)
            return [([], ended, text) for ended, text in replies]

        monkeypatch.setattr(rejection.annotators, "sample", sample)
        config = rejection.Config(init="lm", out="new/best.jsonl", device="cpu", **flags)
        rejection.main(config)
        lines = (place / "new/best.jsonl").read_text().splitlines()
        return list(map(json.loads, lines)), capsys.readouterr().out

    return command


def test_the_command_keeps_right_replies_and_says_how_many_were_right(sampled, place):
    questions = [{"question": f"1 + {i} ?", "answer": f"It is\n#### {1 + i}"} for i in range(3)]
    (place / "q.jsonl").write_text("\n".join(map(json.dumps, questions)))
    replies = [(True, "0"), (True, "it is 1"), (False, "1"), (True, "2")]  # of 1, 2 and 3
    rows, said = sampled(
        [*replies, (True, "4"), (True, "5")],
        data=["q.jsonl"],
        reward="rule:last",
        at_least=1.0,
        samples=2,
    )
    texts = [[turn["content"] for turn in row["messages"]] for row in rows]
    assert texts == [["1 + 0 ?", "it is 1"], ["1 + 1 ?", "2"]]
    assert "2 of 3 prompts kept a reply, written to" in said
    assert "mean score 0.333 of all 6 replies, 1.000 of the kept" in said
    assert "pass@1 0.333, pass@2 0.667\n0.667 of the prompts have right and wrong" in said
    facts = json.loads((place / "new/best.json").read_text())
    assert facts["flags"]["reward"] == "rule:last" and 0 < facts.pop("cpu_seconds") < 600
    del facts["flags"]
    shares = {"mean": 1 / 3, "pass@1": 1 / 3, "pass@2": 2 / 3}
    assert facts == {"asked": 3, "kept": 2} | shares
    read_back = formats.read(place / "new/best.jsonl")
    assert [record.messages for record in read_back] == [row["messages"] for row in rows]


def test_the_command_asks_the_world_for_the_skills_that_are_named(sampled):
    prompts = world.prompts(4, skills=["add", "count"])
    rows, said = sampled(
        [(True, f" {prompt.answer}") for prompt in prompts],
        prompts=4,
        skills=["add", "count"],
        samples=1,
    )
    assert [row["messages"][:-1] for row in rows] == [prompt.messages for prompt in prompts]
    assert said.count("pass@1 1.000") == 1


def test_only_the_chosen_reply_of_a_conversation_is_learnt(sampled, place, world_encoding):
    prompt = world.prompts(1, skills=["follow"])[0]
    (row,), _ = sampled([(True, f" {prompt.answer}")], prompts=1, skills=["follow"], samples=1)
    said = [turn for turn in row["messages"] if turn["role"] == "assistant"]
    assert [turn.get("weight") for turn in said] == [0, None]
    (record,) = formats.read(place / "new/best.jsonl")
    ids, mask = chat.render(record.messages, world_encoding)
    learnt = world_encoding.decode(
        [id for id, is_learnt in zip(ids, mask, strict=True) if is_learnt]
    )
    assert learnt == f" {prompt.answer}<|im_end|>"


def test_a_reward_model_chooses_by_its_score_at_the_end_of_turn(
    place, world_model, world_encoding, capsys
):
    """End to end, with a random policy and a random reward model."""
    torch.manual_seed(0)
    for name, head in (("lm", "lm"), ("scorer", "score")):
        checkpoints.save(world_model(head), place / name)
        tokenizer.save(world_encoding, place / name)
    flags = dict(init="lm", device="cpu", prompts=20, samples=4, max_new_tokens=8)
    rejection.main(rejection.Config(reward="scorer", out="best.jsonl", **flags))
    said = capsys.readouterr().out
    rows = list(map(json.loads, (place / "best.jsonl").read_text().splitlines()))
    assert rows and f"{len(rows)} of 20 prompts" in said
    assert "pass@" not in said and "pass@" not in (place / "best.json").read_text()
    means = [float(number) for number in re.findall(r"(-?\d+\.\d+) of", said)]
    assert means[1] > means[0]
    with pytest.raises(ValueError, match="--out best.jsonl: best.jsonl is there already: name"):
        rejection.main(rejection.Config(reward="scorer", out="best.jsonl", **flags))


def test_prompts_without_room_are_dropped_with_a_warning(sampled, place, caplog):
    questions = [{"prompt": "cat " * n, "ground_truth": "1"} for n in (2, 500, 3)]
    (place / "q.jsonl").write_text("\n".join(map(json.dumps, questions)))
    with caplog.at_level(logging.WARNING, "data"):
        rows, _ = sampled([(True, "1")] * 2, data=["q.jsonl"], reward="rule:last", samples=1)
    assert len(rows) == 2
    assert "1 of 3 prompts dropped: no room for a reply of 24 tokens in the context" in caplog.text
