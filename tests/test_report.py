"""The report and the pictures: what a page shows, that it asks for nothing and fits every screen,
and what a curve shows and leaves out."""

import itertools
import json
import math
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

import ppo
import run
from data import checkpoints, world
from evaluate import charts, figures, frontier, report
from run import pictures

PROMPTS = world.prompts(26, held=True)
BOARD = {
    "base": {"gold": 0.25, "gold_ci": 0.02, "harmless": 0.2, "over_refusal": 0.5},
    "sft": {"gold": 0.75, "gold_ci": 0.02, "harmless": 0.7, "over_refusal": 0.1, "kl": 0.0},
    "reward": {"accuracy": 0.86},
    "ppo": {"gold": 0.9, "gold_ci": 0.01, "harmless": 1.0, "over_refusal": 0.0, "kl": 0.36},
}
RELIABILITY = {"reward": [{"said": x, "seen": x - 0.05, "pairs": 40} for x in (0.6, 0.7, 0.9)]}
TOKENS = [{"token": "add", "mask": False}, {"token": "\n", "mask": False}]
NUMBERS = {"logprob": -0.5, "ref_logprob": -1.0, "kl": 0.5, "value": 0.2}
TOKENS += [{"token": " 8", "mask": True, "advantage": 1.25, "reward": -0.1} | NUMBERS]
TOKENS += [{"token": "<end>", "mask": True, "advantage": -2.5, "reward": 0.7} | NUMBERS]


def metrics_of(steps, names=("score", "gold", "kl")):
    """A run's rows: every metric grows, but beta."""
    rows = []
    for step in range(steps):
        row = {name: math.sqrt(step + i) / 60 for i, name in enumerate(names)}
        rows.append({"step": step, "beta": 0.2} | row)
    return rows


@pytest.fixture
def runs(tmp_path):
    """Directories of a recipe's four runs, as the report reads them."""
    for name in BOARD:
        (tmp_path / name).mkdir()
        stage = {"base": "sft"}.get(name, name)
        run.write_json(tmp_path / name / "run.json", {"stage": stage, "flags": {}})
        names = ("score", "gold", "kl") if name == "ppo" else ("loss", "held_out_loss")
        run.write_lines(tmp_path / name / "metrics.jsonl", metrics_of(30, names))
    facts = {"step": 32, "score": 0.8, "beta": 0.2, "tokens": TOKENS}
    run.write_json(tmp_path / "ppo" / "tokens.json", facts)
    return [tmp_path / name for name in BOARD]


def written(runs):
    """The report of these runs, as text."""
    out = runs[0].parent / "out"
    golds = [(" right", 1.0), (" wrong", 0.0), (" sure thing right", 0.8)]
    answers = [golds[i % 3] for i in range(len(PROMPTS))]
    policies = [name for name in BOARD if "gold" in BOARD[name]]
    skills = {
        name: {skill: [0.0, BOARD[name]["gold"]] for skill in world.SKILLS} for name in policies
    }
    answers = {name: answers for name in policies}
    report.write(out, BOARD, skills, answers, PROMPTS, runs, RELIABILITY)
    return (out / "report.html").read_text(encoding="utf-8")


class Reader(HTMLParser):
    """Checks that every element is closed, and collects elements and words."""

    VOID = {"meta", "br", "img", "link", "input", "hr"}

    def __init__(self, page):
        super().__init__()
        self.open, self.elements, self.words = [], [], []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        self.words.append(text)


# ----------------------------------------------------------------------------------------- the page


def test_the_page_is_whole_needs_no_other_file_and_no_script(runs):
    page = written(runs)
    elements = Reader(page).elements
    assert not {"script", "link", "img", "iframe", "object", "base", "form"} & {
        x for x, _ in elements
    }
    names = {name for _, attributes in elements for name in attributes}
    assert not {"src", "href", "srcset", "action"} & names
    assert not [name for name in names if name.startswith("on")]
    assert not re.search(r"url\(|@import|https?:", page)
    assert written(runs) == page


def test_every_chart_has_a_title_a_sentence_and_words_for_those_who_cannot_see_it(runs):
    page = written(runs)
    charts_of_page = [x for tag, x in Reader(page).elements if tag == "svg"]
    assert len(charts_of_page) == 4 + 3 + 2  # figures; losses of three runs; ppo's score, kl
    assert all(x["role"] == "img" and x["aria-label"] for x in charts_of_page)
    assert page.count("<figcaption>") == 4
    words = " ".join(Reader(page).words)
    assert "gold: .25 (base) → .9 (ppo)" in words
    assert "ppo: no help with 100% of unsafe requests, refuses 0% of look-alikes" in words
    assert "ppo: gold .9 for .36 nats" in words
    assert "reward says .733 and is right .683 of the time" in words
    assert "NaN" not in page and "nan" not in re.sub(r"[a-z]*nan[a-z]+", "", page)


def test_every_question_has_each_model_s_answer_with_a_mark_and_its_gold(runs):
    page = written(runs)
    cards = page.split('<div class="question">')[1:]
    assert len(cards) == len(PROMPTS)
    for i, card in enumerate(cards):
        mark, gold = [("✓", "1"), ("✗", "0"), ("~", ".8")][i % 3]
        assert len(re.findall(rf">{mark}</td><td>{gold}</td>", card)) == 3
    assert PROMPTS[0].messages[-1]["content"] in cards[0]


def test_skills_are_a_heat_map_whose_shade_is_the_gold(runs):
    page = written(runs)
    for skill in world.SKILLS:
        (row,) = re.findall(rf"<td>{skill}</td>(.*?)</tr>", page)
        shades = re.findall(r'<td style="--share:([\d.]+)">([\d.]+)</td>', row)
        assert [(float(a), float(b)) for a, b in shades] == [
            (0.12, 0.125),
            (0.38, 0.375),
            (0.45, 0.45),
        ]


def test_the_token_view_has_every_number_of_every_token_without_a_script_too(runs):
    page = written(runs)
    tips = re.findall(r'<span class="tip">(.*?)</span>', page)
    assert len(tips) == 4 and tips[0] == "add  mask 0" and "↵" in tips[1]
    expected = "policy log-prob -0.500; reference log-prob -1.000; KL 0.500; value 0.200; "
    assert tips[2] == f"·8  mask 1; {expected}advantage 1.250; reward -0.100"
    assert page.count('tabindex="0" class="token on up" style="--share:0.50"') == 1
    assert page.count('tabindex="0" class="token on down" style="--share:1.00"') == 1
    table = page[page.index("<th>token</th>") :].split("</table>")[0]
    row = ["·8", "1", "-0.500", "-1.000", "0.500", "0.200", "1.250", "-0.100"]
    cells = re.findall(r"<td>(?:3 )?(.*?)</td>", table)[:8]
    assert cells == row


@pytest.mark.parametrize(
    "text", ["", "[1", "{}", '{"step": 1, "score": 0, "beta": 0, "tokens": 3}']
)
def test_a_damaged_token_file_is_refused_in_one_sentence(runs, text):
    (runs[-1] / "tokens.json").write_text(text)
    with pytest.raises(ValueError, match="tokens.json is damaged: delete it, or train .*ppo again"):
        written(runs)


def test_a_long_run_s_report_is_small(runs):
    names = [f"metric_{i}" for i in range(20)]
    for directory in runs:
        run.write_lines(directory / "metrics.jsonl", metrics_of(3000, names))
    assert len(written(runs).encode()) < 1_500_000  # of 3 MB


def test_questions_without_a_judge_have_no_marks_and_the_score_takes_the_place_of_gold(runs):
    board = {"sft": {"score": 0.1, "score_ci": 0.2, "kl": 0.0}, "dpo": {"score": 2.5, "kl": 0.5}}
    answers = {name: [(" yes", None)] for name in board}
    report.write(runs[0].parent, board, {}, answers, PROMPTS[:1], [], {})
    page = (runs[0].parent / "report.html").read_text(encoding="utf-8")
    assert "score: .1 (sft) → 2.5 (dpo)" in page and "✓" not in page.split("gold 0")[1]
    assert "Gold by skill" not in page and page.count("<svg") == 2
    report.write(runs[0].parent, {"x": {}}, {}, {}, [], [], {})  # nothing was measured
    Reader((runs[0].parent / "report.html").read_text(encoding="utf-8"))


# ------------------------------------------------------------------------------------ one PPO reply


@pytest.mark.parametrize("advantage", ["gae", "grpo"])
def test_ppo_leaves_the_numbers_of_one_reply_token_by_token(
    advantage, place, world_model, world_encoding, monkeypatch
):
    checkpoints.save(world_model(), place / "lm", world_encoding)
    rollout, seen = ppo.rollout, []

    def record(*arguments):
        seen.append(rollout(*arguments))
        return seen[-1]

    monkeypatch.setattr(ppo, "rollout", record)
    flags = f"--init lm --reward world --advantage {advantage} --steps 3 --batch-size 16 --out run"
    flags += " --max-new-tokens 8 --device cpu --beta 0.5 --no-end-score -1"
    ppo.main(run.parse(ppo.Config, flags.split()))
    step, score, beta, tokens = report.read_reply(place / "run")
    old = seen[-1]
    prompt, reply = old.groups[0].question.ids, old.replies[0]
    assert (step, beta) == (3, 0.5) and score == pytest.approx(float(old.scores[0]))
    assert "".join(token for token, *_ in tokens) == world_encoding.decode(prompt + reply)
    assert [mask for _, mask, _ in tokens] == [False] * len(prompt) + [True] * len(reply)
    rows = [numbers for _, mask, numbers in tokens if mask]
    names = {"logprob", "ref_logprob", "kl", "advantage", "reward"}
    assert all(set(row) == names | ({"value"} if advantage == "gae" else set()) for row in rows)
    for i, row in enumerate(rows):
        column = len(prompt) - 1 + i  # of the batch, where the target is the reply's token i
        assert row["logprob"] == pytest.approx(float(old.old_logprobs[0, column]))
        assert row["advantage"] == pytest.approx(float(old.advantages[0, column]))
        assert row["kl"] == pytest.approx(row["logprob"] - row["ref_logprob"], abs=1e-5)
        end = score if i == len(rows) - 1 else 0.0
        assert row["reward"] == pytest.approx(end - 0.5 * row["kl"], abs=1e-6)
        if advantage == "gae":
            assert row["value"] == pytest.approx(float(old.values[0, column]))


# ------------------------------------------------------------------------------------------- curves


def test_a_running_mean_begins_at_the_first_value_and_averages_the_last_twentieth():
    values = [float(x) for x in range(100)]
    values[0], values[-1] = 50.0, 0.0
    means = pictures.running_mean(values)
    assert means[0] == 50 and means[50] == 50 and len(means) == 100
    assert means[-1] == pytest.approx(sum(values[94:]) / 6)
    assert pictures.running_mean([3.0, 1.0]) == [3, 1]


def test_constants_and_values_that_are_no_numbers_are_no_curves():
    rows = [{"step": 0, "beta": 0.2, "loss": 1.0, "gold": None, "x": "a"}]
    rows += [{"step": 1, "beta": 0.2, "loss": 2.0, "gold": None, "x": "b"}]
    rows += [{"step": 2, "beta": 0.2, "loss": math.inf, "late": 1.0}]
    lines, constants = pictures.changing(rows)
    assert lines == {"loss": ((0, 1), (1.0, 2.0))}
    assert constants["beta"] == 0.2 and constants["late"] == 1 and math.isnan(constants["gold"])
    assert pictures.without_change({"beta": 0.2}) == "Without change: beta 0.2."


def test_score_and_gold_share_a_panel_and_a_metric_without_its_partner_has_its_own():
    assert pictures.grouped(["kl", "gold", "score"]) == [["kl"], ["score", "gold"]]
    assert pictures.grouped(["gold", "kl"]) == [["gold"], ["kl"]]
    assert pictures.grouped(["loss", "lr", "held_out_loss"]) == [["loss", "held_out_loss"], ["lr"]]


@pytest.mark.parametrize(
    "stage, loss, belongs",
    [("dpo", "dpo", True), ("dpo", "robust", True), ("dpo", "ipo", False), ("dpo", "kto", False)]
    + [("reward", None, True), ("sft", None, False), ("ppo", None, False)],
)
def test_ln_2_is_drawn_where_a_loss_starts_there(stage, loss, belongs, tmp_path):
    run.write_json(tmp_path / "run.json", {"stage": stage, "flags": {"loss": loss}})
    coin = pictures.loss_of_a_coin(tmp_path)
    assert coin == (math.log(2) if belongs else None)
    lines = {"loss": ((0, 1), (0.6, 0.5))}
    assert ("ln 2" in figures.curve(lines, ["loss"], coin)) == belongs


def test_a_resumed_run_draws_the_same_picture(tmp_path, monkeypatch):
    """The picture depends on metrics.jsonl and the flags alone."""
    files = []
    for name, resumed in (("a", []), ("b", [7])):
        (tmp_path / name).mkdir()
        facts = {"stage": "dpo", "flags": {"loss": "dpo"}, "resumed_at": resumed, "seconds": 5}
        run.write_json(tmp_path / name / "run.json", facts)
        run.write_lines(
            tmp_path / name / "metrics.jsonl", metrics_of(30, ("loss", "score", "gold"))
        )
        pictures.curves(tmp_path / name / "metrics.jsonl", tmp_path / name / "curves.png")
        files.append((tmp_path / name / "curves.png").read_bytes())
    assert files[0] == files[1] and len(files[0]) > 5000


# ------------------------------------------------------------------------------------------- charts


def test_labels_meet_neither_one_another_nor_a_point():
    points = [(50 + 3 * (i % 4), 50 + 3 * (i // 4)) for i in range(12)]  # closer than a label
    taken = [(x - 2, y - 2, x + 2, y + 2) for x, y in points]
    inside = (0, 0, 400, 400)
    for point in points:
        charts.free_place(taken, point, (40, 10), 4, inside)
    assert len(taken) == 24
    assert all(min(box) >= 0 and max(box) <= 400 for box in taken[12:])
    for a, b in itertools.combinations(taken, 2):
        assert not charts.meet(a, b) or (a in taken[:12] and b in taken[:12])


def test_ticks_are_round_inside_and_told_apart():
    assert list(charts.ticks(0, 1).values()) == ["0", ".2", ".4", ".6", ".8", "1"]
    assert list(charts.ticks(-60, 3000).values()) == ["0", "1000", "2000", "3000"]
    for low, high in ((0.99998, 1.00001), (-3e-7, 5e-7), (17, 18), (1e9, 3e9), (-5, -4.9)):
        ticks = charts.ticks(low, high)
        assert 2 <= len(ticks) <= 7 and len(set(ticks.values())) == len(ticks)
        slack = 1e-5 * (high - low)
        assert min(ticks) >= low - slack and max(ticks) <= high + slack


def test_a_dot_lies_where_its_numbers_say():
    chart = charts.Chart((0, 10), (0, 1), "x", height=236)
    chart.dot(5, 0.5, "c1", across=1, up=0.25)
    middle = (chart.left + chart.end) / 2, (charts.TOP + chart.low) / 2
    assert chart.place(5, 0.5) == middle
    assert f'cx="{middle[0]:.1f}" cy="{middle[1]:.1f}"' in chart.svg("a dot")
    left, right = chart.place(4, 0.5)[0], chart.place(6, 0.5)[0]
    assert f'd="M{left:.1f} {middle[1]:.1f}L{right:.1f} {middle[1]:.1f}"' in chart.svg("a dot")
    assert chart.place(0, 2, axis=(1, 3))[1] == middle[1]


def test_the_title_of_the_frontier_is_what_was_found():
    cells = {"a": (0.7, 0.0), "dpo": (0.9, 0.25)}
    rows = {}
    for name, (gold, kl) in cells.items():
        rows[name] = {"gold": {"mean": gold, "half_width": 0.01}, "kl": {"mean": kl}}
    best = {0.0: {"mean": 0.7}, 0.6: {"mean": 0.88}, 1.8: {"mean": 0.77}}
    first = "dpo has the most gold, 0.900 +-0.010 at a KL of 0.25"
    assert frontier.finding(rows, best) == f"{first}; best of n falls from 0.880 to 0.770"
    assert frontier.finding(rows, {0.0: {"mean": 0.7}, 0.6: {"mean": 0.8}}) == first


# ----------------------------------------------------------------------------------------- Chromium


class Chromium:
    """Headless Chromium, driven by the DevTools protocol over a pair of pipes."""

    def __init__(self, program, profile):
        to, self.write = os.pipe()
        self.read, back = os.pipe()
        flags = "--headless=new --no-sandbox --disable-gpu --no-first-run --disable-dev-shm-usage"
        flags += " --remote-debugging-pipe"
        shell = f'exec "$0" "$@" 3<&{to} 4>&{back}'  # the protocol's descriptors (dash knows ten)
        words = ["bash", "-c", shell, program, *flags.split(), f"--user-data-dir={profile}"]
        quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.process = subprocess.Popen([*words, "about:blank"], pass_fds=(to, back), **quiet)
        os.close(to)
        os.close(back)
        self.buffer, self.calls, self.events, self.session = b"", 0, [], {}
        targets = self.call("Target.getTargets")["targetInfos"]
        page = next(target["targetId"] for target in targets if target["type"] == "page")
        attached = self.call("Target.attachToTarget", targetId=page, flatten=True)
        self.session = {"sessionId": attached["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def message(self):
        while b"\0" not in self.buffer:
            received = os.read(self.read, 1 << 20)
            assert received, "Chromium has ended"
            self.buffer += received
        message, self.buffer = self.buffer.split(b"\0", 1)
        return json.loads(message)

    def call(self, method, **parameters):
        self.calls += 1
        call = {"id": self.calls, "method": method, "params": parameters} | self.session
        os.write(self.write, json.dumps(call).encode() + b"\0")
        while True:
            message = self.message()
            if message.get("id") == self.calls:
                assert "error" not in message, message
                return message["result"]
            self.events.append(message)

    def open(self, file, width, scheme):
        """Loads a page -> what it wrote to the console, and the addresses that it asked for."""
        size = dict(width=width, height=900, deviceScaleFactor=1, mobile=False)
        self.call("Emulation.setDeviceMetricsOverride", **size)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", features=features)
        self.events.clear()
        self.call("Page.navigate", url=file.as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(self.message())
        console = {"Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown"}
        said = [event for event in self.events if event["method"] in console]
        asked = [x for x in self.events if x["method"] == "Network.requestWillBeSent"]
        return said, [event["params"]["request"]["url"] for event in asked]

    def mouse(self, kind, x, y):
        button = {} if kind == "mouseMoved" else {"button": "left", "clickCount": 1}
        self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, **button)

    def value(self, expression):
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        return result["result"].get("value")


@pytest.fixture
def chromium(tmp_path):
    names = ("chromium", "chromium-browser", "google-chrome")
    program = next(filter(None, map(shutil.which, names)), None)
    if program is None or os.name != "posix":
        pytest.skip("there is no Chromium on this machine")
    browser = Chromium(program, tmp_path / "profile")
    yield browser
    browser.process.kill()
    browser.process.wait()


OVERFLOWING = """[...document.querySelectorAll('body *')].filter(x => !x.closest('.wide') &&
    x.getBoundingClientRect().right > document.documentElement.clientWidth + 1).length"""
TIP = "getComputedStyle(document.querySelectorAll('.tip')[2]).display"
PLACE = """(() => {const token = document.querySelectorAll('.token')[2];
    token.scrollIntoView({block: 'center'});
    const box = token.getBoundingClientRect();
    return [box.x + box.width / 2, box.y + 5]})()"""
COLOURS = "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
LETTERS = """Math.min(...[...document.querySelectorAll('svg .word')].map(
    x => x.getBoundingClientRect().height))"""


@pytest.mark.slow
def test_chromium_shows_the_page_at_every_width_and_asks_and_says_nothing(runs, chromium):
    written(runs)
    file = runs[0].parent / "out" / "report.html"
    colours = {}
    for width in (390, 768, 1280, 1600):
        for scheme in ("light", "dark"):
            said, asked = chromium.open(file, width, scheme)
            assert not said and asked == [file.as_uri()]
            assert chromium.value("document.documentElement.scrollWidth") <= width
            assert chromium.value(OVERFLOWING) == 0
            assert chromium.value(LETTERS) > 9  # pixels
            colours[scheme] = chromium.value(COLOURS)
    assert colours["light"] == ["rgb(29, 33, 41)", "rgb(255, 255, 255)"]
    assert colours["dark"] == ["rgb(228, 231, 236)", "rgb(20, 23, 28)"]
    assert chromium.value(TIP) == "none"
    x, y = chromium.value(PLACE)
    chromium.mouse("mouseMoved", x, y)
    assert chromium.value(TIP) == "block"
    chromium.mouse("mouseMoved", 0, 0)
    assert chromium.value(TIP) == "none"
    chromium.call("Emulation.setTouchEmulationEnabled", enabled=True)
    touch = dict(touchPoints=[{"x": x, "y": y}])
    chromium.call("Input.dispatchTouchEvent", type="touchStart", **touch)
    chromium.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
    assert chromium.value(TIP) == "block"
    printed = chromium.call("Page.printToPDF")
    assert len(printed["data"]) > 10_000
