"""Rewards that can be checked: a plain function says whether a reply is right, no model is asked.

    world                       the embedded world's judge: gold, from 0 to 1
    rule:NAME                   a function of this file, against each record's own answer
    rule:NAME=VALUE             the same against VALUE, for every record: rule:words=5
    path/to/file.py:function    a function of yours: (messages, reply) or (messages, reply, answer)

The rules that compare:
    equals    the number behind the last "=" of the reply
    last      the last number of the reply
    boxed     what the last \\boxed{..} of the reply holds, as a number or as LaTeX
    exact     the whole reply, without the spaces around it
The rules of form, which usually take a VALUE:
    ends      the reply ends with this text, as words of its own
    length    it has at most so many characters
    words     it has exactly so many words
    case      it is all in "lower" or "upper" case

A rule is (messages, reply, answer) -> 1.0 right or 0.0 wrong. An empty reply is never right. Rules
read text only: they do not know whether a reply was cut, so the caller decides what it gets then.

The one thing that everybody gets wrong is what the policy finds out first. `last` is right for a
reply that lists numbers and ends on the right one by chance; `length` and `case` are right for one
word that says nothing. Read some replies with a reward of 1 before you believe a curve.
"""

import inspect
import re
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from numbers import Real
from types import ModuleType

import run
from data import doors, world

# A run of digits, commas and periods is one number or none. A minus between two terms ("10-3")
# belongs to none. No branch goes back far, so that a long text takes linear time.
NUMERAL = re.compile(
    r"(?:(?<![\w)\]}])-\$?|\$-?)?(?:(?<![.\w])\.)?[0-9][0-9.,]*(?:[eE][-+]?[0-9]+)?"
)
VALUE = re.compile(r"-?(?:[0-9]+|[0-9]{1,3}(?:,[0-9]{3})+)?(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?")
BOX = re.compile(r"\\boxed\s*\{")
BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
SPELLINGS = [  # what is written in several ways, and the one way in which it is read
    (re.compile("\u2212"), "-"),
    (re.compile(r"\\([$%])"), r"\1"),
    (re.compile(r"(?<=[0-9])(?:\{,\}|,?\\[,!]|[\u00a0\u202f])(?=[0-9])"), ","),  # thousands
    (re.compile(r"°|\^\s*(?:\\circ(?![A-Za-z])|\{\s*\\circ\s*\})"), ""),
    (re.compile(r"\\[dt]frac(?![A-Za-z])"), r"\\frac"),
    (re.compile(r"\\frac\s*([0-9])"), r"\\frac{\1}"),  # \frac12, \frac1{2}
    (re.compile(r"(\\frac\s*\{[0-9]*\})\s*([0-9])"), r"\1{\2}"),
    (re.compile(r"(\A|=)\s*-\s+(?=[$.]?[0-9])"), r"\1-"),
]
# In front of a numeral, or of a brace around it: it is part of a larger term.
PART = re.compile(r"(?:[/^]\s*\(?\s*|\})\Z")
ARGUMENT = re.compile(r"(?:[\]}^_]|\\(?:frac|sqrt))\s*\Z")
# Behind an equals sign: what may stand in front of the numeral, and what goes on behind it.
LEAD = re.compile(r"(?:[\s$]|\\boxed\s*\{)*")
OPERATOR = re.compile(r"[\s$}]*(?:[-+/^×÷·]|\*+\s*[\w$(\\]|\\(?:times|cdot|div)(?![A-Za-z]))")
BOLD = re.compile(r"(?<![\w)])\*\*(?=\S)([^*]+)(?<=\S)\*\*")
NOT_SHOWN = re.compile(r"\\[,!]|\\(?:left|right)(?![A-Za-z])|\$")  # spacing and sizes
INSIDE = re.compile(r"(?:\w\w|[0-9][.,][0-9]|(?<![\w.])[-.\u2212][0-9])\Z")  # no border of a word


# ----------------------------------------------------------------------- the rules


def equals(messages, reply, answer):
    """The number that follows the last "=" of the reply is the answer's."""
    wanted = reference_number(answer)
    before, sign, after = BOLD.sub(r"\1", tidy(reply)).rpartition("=")
    found = NUMERAL.match(after, LEAD.match(after).end())
    if not (sign and found) or before.endswith(("<", ">")) or OPERATOR.match(after, found.end()):
        return 0.0
    return float(to_decimal(found[0]) == wanted)


def last(messages, reply, answer):
    """The last number of the reply is the answer's."""
    wanted = reference_number(answer)
    text = tidy(reply)
    end = 1 + max(map(text.rfind, "0123456789"))
    if end == 0:
        return 0.0
    start = end - len(text[:end].split()[-1])  # of the last word that has a digit
    *_, found = NUMERAL.finditer(text, start)
    return float(not is_part(text, found) and to_decimal(found[0]) == wanted)


def boxed(messages, reply, answer):
    r"""The last \boxed{..} of the reply holds the answer: the same number, or the same LaTeX."""
    wanted = plain(reference_text(answer))
    found = plain(in_box(reply) or "")
    number = as_number(wanted)
    if number is not None:
        return float(as_number(found) == number)
    # Now a comma separates, and "(1, 2)" is "(1,2)".
    return float(bool(found) and found.replace(", ", ",") == wanted.replace(", ", ","))


def exact(messages, reply, answer):
    return float(reply.strip() == reference_text(answer))


def ends(messages, reply, answer):
    wanted = reference_text(answer)
    text = reply.rstrip()
    start = len(text) - len(wanted)
    return float(text.endswith(wanted) and not INSIDE.search(text[max(0, start - 2) : start + 1]))


def length(messages, reply, answer):
    most = count(answer)
    return float(0 < len(reply.strip()) <= most)


def words(messages, reply, answer):
    wanted = count(answer)
    return float(len(reply.split()) == wanted)


def case(messages, reply, answer):
    wanted = answer.strip()
    is_case = wanted in ("lower", "upper")
    run.require(is_case, f"the answer {shown(answer)} is no case: give lower or upper")
    changed = reply.lower() if wanted == "lower" else reply.upper()
    return float(bool(reply.strip()) and reply == changed)


RULES = dict(equals=equals, last=last, boxed=boxed, exact=exact)
RULES |= dict(ends=ends, length=length, words=words, case=case)


# ----------------------------------------------------------------------- what an answer says


def to_decimal(numeral):
    """The value of a text that NUMERAL matches ("1,234", "$5", "-3.50", "5."), or None if it is no
    number ("3,5"). Two Decimals are compared digit by digit, however many there are."""
    text = numeral.replace("$", "").rstrip(".,")
    try:
        return Decimal(text.replace(",", "")) if VALUE.fullmatch(text) else None
    except InvalidOperation:  # "1e99999999999999999999"
        return None


def as_number(text):
    """The number that a text is as a whole, or None."""
    text = text.strip()
    return to_decimal(text) if NUMERAL.fullmatch(text) else None


def in_box(text):
    r"""The content of a text's last \boxed{..}, or None: without one, or if it does not end."""
    boxes = list(BOX.finditer(text))
    depth = 1
    for brace in BRACE.finditer(text, boxes[-1].end()) if boxes else ():
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return text[boxes[-1].end() : brace.start()]
    return None


def is_part(text, numeral):
    r"""Whether a match of NUMERAL in a text is only part of a number: of a fraction ("1/2",
    "\frac{1}{2}"), a power or a root. Both braces of \frac{..}{..} are found from the inside."""
    if PART.search(text[max(0, numeral.start() - 8) : numeral.start()]):
        return True
    depth = 0
    for brace in reversed(list(BRACE.finditer(text, 0, numeral.start()))):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 1:  # a brace that is open at the numeral
            depth = 0
            if ARGUMENT.search(text[max(0, brace.start() - 8) : brace.start()]):
                return True
    return text[numeral.end() : numeral.end() + 1] in ("/", "^")


def tidy(text):
    """A text in one of the SPELLINGS of minus signs, thousands, degrees, fractions, "$" and "%"."""
    for pattern, replacement in SPELLINGS:
        text = pattern.sub(replacement, text)
    return text


def plain(latex):
    r"""LaTeX, tidy, and without what only changes its looks: \left, \text{..}, $, a last period,
    and spaces, except in front of a digit behind a digit or comma: "1 2" is not "12"."""
    latex = re.sub(r"\\text\s*\{([^{}]*)\}", r"\1", tidy(latex))
    latex = re.sub(r"(?:\\[;: ]|\s)+", " ", NOT_SHOWN.sub("", latex))
    latex = re.sub(r"(?<![0-9.,]) | (?![0-9])", "", latex)
    return latex.removesuffix(".")


def reference_text(answer):
    r"""The final answer in a reference: what follows "####" where that begins the last line, as in
    GSM8K, else what the last \boxed{..} holds, else all of it; without the spaces around it."""
    text = answer.strip()
    last_line = text[text.rfind("\n") + 1 :].lstrip()
    if last_line.startswith("####"):
        text = last_line.removeprefix("####").strip()
    elif BOX.search(text):
        text = (in_box(text) or "").strip()
    run.require(text, f"the answer {shown(answer)} holds no final answer: complete it")
    return text


def reference_number(answer):
    """The number of a reference answer, which may stand behind an equals sign."""
    number = as_number(plain(reference_text(answer)).rpartition("=")[2])
    remedy = 'give the number alone or behind "####", or take rule:boxed or rule:exact'
    run.require(number is not None, f"the answer {shown(answer)} is no number: {remedy}")
    return number


def count(answer):
    text = answer.strip()
    is_count = re.fullmatch("[0-9]{1,9}", text) and int(text) > 0
    run.require(is_count, f"the answer {shown(answer)} is no count: give a whole number from 1 on")
    return int(text)


def shown(answer):
    """The end of an answer for a message; a solution has its final answer there."""
    return repr(answer if len(answer) <= 60 else f"..{answer[-60:]}")


# ----------------------------------------------------------------------- the interface


def is_rule(spec):
    """Whether a reward is a rule. Otherwise it is the directory of a reward model."""
    is_file = re.search(r"\.py(:[^/\\:]*)?$", spec)
    return spec == "world" or spec.startswith("rule:") or bool(is_file)


@dataclass(frozen=True)
class Rule:
    """A reward that can be checked. `open_rule` makes it."""

    spec: str  # as on the command line
    flag: str  # that named it, for messages
    function: Callable | None  # (messages, reply, answer) -> number; None: the world's judge
    value: str | None = None  # in place of every record's answer
    is_users: bool = False
    needs_answer: bool = True

    def check(self, prompts):
        """To be called once, before training. ValueError, with the record and the remedy, for one
        that lacks what the rule needs."""
        for prompt in prompts:
            if self.function is None:
                known = world.solve(prompt.messages)
                self.require(
                    known, prompt, "is no question of the embedded world: name a rule:NAME"
                )
            elif self.needs_answer and self.value is None:
                lacking = 'has no answer: give it a field "answer" or "ground_truth"'
                self.require(prompt.answer.strip(), prompt, lacking)
                if not self.is_users:
                    self.score(prompt, "")  # a rule reads the answer first

    def scores(self, prompts, replies):
        """Prompt records and a reply to each, as `annotators.sample` gives them: (ids, ended, text)
        -> a list of floats. The world's judge gives a reply that has not ended 0; rules do not
        look at it. ValueError, with the record and the place, for a user's function that fails."""
        pairs = list(zip(prompts, replies, strict=True))
        if self.function is None:
            return [
                world.judge(prompt.messages, text, ended)["gold"]
                for prompt, (_, ended, text) in pairs
            ]
        return [self.score(prompt, text) for prompt, (_, _, text) in pairs]

    def score(self, prompt, text):
        answer = prompt.answer if self.value is None else self.value
        try:
            return self.function(prompt.messages, text, answer)
        except ValueError as error:
            sentence = f"{self.flag} {self.spec}: {prompt.where}: {error}"
            raise ValueError(run.one_line(sentence)) from None

    def require(self, condition, prompt, problem):
        run.require(condition, f"{self.flag} {self.spec}: {prompt.where} {problem}")


def open_rule(spec, flag="--reward"):
    """The Rule of a spec for which `is_rule` holds. ValueError, with the flag, for an unknown name,
    a VALUE that does not fit, or a user's function that cannot be called."""
    if spec == "world":
        return Rule(spec, flag, None)
    if not spec.startswith("rule:"):
        return users_rule(spec, flag)
    name, has_value, value = spec.removeprefix("rule:").partition("=")
    known = f"there are {', '.join(RULES)}"
    run.require(name in RULES, f"{flag} {spec}: there is no rule {name!r}; {known}")
    if not has_value:
        return Rule(spec, flag, RULES[name])
    run.require(value.strip(), f"{flag} {spec}: there is no text behind the =; write one")
    try:
        RULES[name]([], "", value)
    except ValueError as error:
        raise ValueError(f"{flag} {spec}: {error}") from None
    return Rule(spec, flag, RULES[name], value)


def users_rule(spec, flag):
    """The Rule of "path/to/file.py:function". The file runs once, and leaves no compiled copy."""
    wrong = f"{flag} {spec}"
    path, _, name = spec.rpartition(":")  # the last colon: Windows has one behind the drive
    run.require(path.endswith(".py") and name, f"{wrong}: name the function too, as file.py:NAME")
    module = ModuleType("users_rule")
    module.__file__ = path
    source = doors.read_bytes(path)
    sys.modules[module.__name__] = module  # dataclasses look themselves up there
    try:
        exec(compile(source, path, "exec"), vars(module))
    except (Exception, SystemExit) as error:
        raise ValueError(f"{wrong}: cannot be imported: {failure(error, path)}") from None
    function = getattr(module, name, None)
    run.require(callable(function), f"{wrong}: {path} has no function {name}; define it there")
    takes_answer = can_call(function, 3)
    takes_two = can_call(function, 2)
    signature = f"define {name}(messages, reply) or {name}(messages, reply, answer)"
    run.require(takes_answer or takes_two, f"{wrong}: takes other arguments; {signature}")

    def checked(messages, reply, answer):
        # Copies, since what the function does to its arguments must not reach the prompts.
        arguments = [[dict(message) for message in messages], reply]
        arguments += [answer] if takes_answer else []
        try:
            score = function(*arguments)
        except (Exception, SystemExit) as error:
            raise ValueError(f"the function failed: {failure(error, path)}") from None
        return finite(score)

    return Rule(spec, flag, checked, is_users=True, needs_answer=not takes_two)


def can_call(function, n):
    """Whether a function can be called with n positional arguments."""
    try:
        inspect.signature(function).bind(*range(n))
    except (TypeError, ValueError):  # ValueError: a built-in function without a signature
        return False
    return True


def failure(error, path):
    """What a user's file raised, and at which of its lines."""
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename == path
    ]
    line = error.lineno if isinstance(error, SyntaxError) else (lines or [None])[-1]
    place = f" ({path}:{line})" if line else ""
    return f"{type(error).__name__}: {run.one_line(str(error), 200)}{place}; correct it"


def finite(score):
    """A user's score as a float; true is 1 and false is 0."""
    wrong = f"the function returned {type(score).__name__} {score!r:.60}"
    run.require(isinstance(score, Real), f"{wrong}: return a number, true or false")
    try:
        value = float(score)
    except OverflowError:  # an int of 400 digits
        value = float("inf")
    run.require(abs(value) < float("inf"), f"{wrong}: return a finite number")
    return value
