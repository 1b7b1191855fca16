"""Simulated annotators: what each bias does, how agreement is counted, and that files come out the way other tools expect them."""

import json
import math
import random

import pytest

import run
from data import annotators, formats, world


@pytest.fixture(scope="module")
def pairs():
    """Two attempts of limited care at each of the world's questions."""
    rng, found = random.Random(3), []
    for record in world.prompts(6000):
        a, b = (
            world.attempt(rng, record.messages, world.solve(record.messages), 0.4, 0.4)
            for _ in range(2)
        )
        if a != b:
            found.append((record.messages, ([], True, a), ([], True, b)))
    return found


def agreed(rows, gaps):
    votes = [
        choice == (gap > 0)
        for row, gap in zip(rows, gaps, strict=True)
        for choice in row
        if gap and choice is not None
    ]
    return sum(votes) / len(votes)


def test_without_a_bias_annotators_agree_as_often_as_dialled(pairs):
    _, rows, gaps = annotators.compare(pairs, annotators.world_judge, 0.7, annotators=3)
    assert agreed(rows, gaps) == pytest.approx(0.7, abs=0.015)


def test_a_bias_moves_choices_its_own_way_and_away_from_the_judge(pairs):
    def share(kind, **dials):
        """How often the chosen side is the one that this bias is for, and how often choices agree with the judge."""
        records, rows, gaps = annotators.compare(pairs, annotators.world_judge, 0.75, **dials)
        texts = [(r.chosen[0]["content"], r.rejected[0]["content"]) for r in records]
        worth = (
            (lambda t: len(t.split())) if kind == "length" else (lambda t: annotators.PRAISE in t)
        )
        sides = [worth(a) > worth(b) for a, b in texts if worth(a) != worth(b)]
        return sum(sides) / len(sides), agreed(rows, gaps)

    for kind, value in (("length", 0.3), ("flattery", 1.0)):
        (before, right), (after, less) = share(kind), share(kind, **{f"{kind}_bias": value})
        assert after > before + 0.2 and less < right - 0.02, kind


def test_position_bias_favours_neither_file_but_costs_agreement(pairs):
    _, rows, gaps = annotators.compare(
        pairs, annotators.world_judge, 0.9, annotators=2, position_bias=0.5
    )
    assert agreed(rows, gaps) < 0.87
    assert sum(row[0] for row in rows) / len(rows) == pytest.approx(
        0.5, abs=0.03
    )  # who is shown first is drawn for each annotator
    equal = [row for row, gap in zip(rows, gaps, strict=True) if gap == 0]
    assert len({choice for row in equal for choice in row}) == 2


def test_annotators_abstain_on_close_pairs_only(pairs):
    _, rows, gaps = annotators.compare(pairs, annotators.world_judge, 0.9, abstain=0.8)
    silent = {True: [], False: []}
    for row, gap in zip(rows, gaps, strict=True):
        silent[gap == 0].append(row[0] is None)
    close, clear = (sum(silent[kind]) / len(silent[kind]) for kind in (True, False))
    assert close == pytest.approx(0.8, abs=0.04) and clear < 0.35


def test_more_annotators_leave_the_first_one_s_choices_as_they_were(pairs):
    one, three = (
        annotators.compare(pairs, annotators.world_judge, annotators=n)[1] for n in (1, 3)
    )
    assert [row[0] for row in one] == [row[0] for row in three]


def test_the_majority_chooses_and_its_share_is_the_label(pairs):
    records, rows, _ = annotators.compare(pairs, annotators.world_judge, 0.75, annotators=3)
    assert len(records) == len(pairs) and {round(r.label, 3) for r in records} == {1.0, 0.667}
    for record, (_, a, b), row in zip(records, pairs, rows, strict=True):
        assert record.chosen[0]["content"] == (a if sum(row) > 1 else b)[2]
        assert record.label == max(sum(row), 3 - sum(row)) / 3
    ties = annotators.compare(pairs, annotators.world_judge, 0.75, annotators=2)
    assert len(ties[0]) == sum(sum(row) != 1 for row in ties[1]) < len(pairs)


def test_fleiss_kappa_is_the_published_example_s():
    """Fleiss 1971, table 1 as it is reprinted everywhere: ten subjects, fourteen raters, five categories."""
    table = """0 0 0 0 14; 0 2 6 4 2; 0 0 3 5 6; 0 3 9 2 0; 2 2 8 1 1; 7 7 0 0 0; 3 2 6 3 0; 2 5 3 2 2; 6 5 2 1 0; 0 2 2 3 7"""
    rows = [
        [kind for kind, n in enumerate(map(int, line.split())) for _ in range(n)]
        for line in table.split(";")
    ]
    assert annotators.fleiss_kappa(rows) == pytest.approx(0.210, abs=0.0005)


def test_fleiss_kappa_of_unanimity_is_1_and_of_coins_0():
    rng = random.Random(0)
    assert (
        annotators.fleiss_kappa([(1, 1), (0, 0)]) == 1
        and annotators.fleiss_kappa([(1, 1), (1, 1)]) == 1
    )
    assert (
        abs(
            annotators.fleiss_kappa(
                [[rng.choice([0, 1, None]) for _ in range(3)] for _ in range(20000)]
            )
        )
        < 0.01
    )
    with pytest.raises(ValueError, match="two of them"):
        annotators.fleiss_kappa([(1,), (0,)])


def test_annotators_are_alike_as_far_as_their_noise_allows(pairs):
    """Two annotators who both say "first" with probability p agree with p^2 + (1-p)^2: kappa is the mean of (2p - 1)^2."""
    _, rows, gaps = annotators.compare(pairs, annotators.world_judge, 0.75, annotators=2)
    steep = annotators.strength(gaps, 0.75)
    expected = sum((2 / (1 + math.exp(-steep * gap)) - 1) ** 2 for gap in gaps) / len(gaps)
    assert annotators.fleiss_kappa(rows) == pytest.approx(expected, abs=0.04)


def test_ratings_follow_the_judge_in_every_dimension(pairs):
    records, _, _ = annotators.compare(pairs, annotators.world_judge, ratings=True, annotators=2)
    for k, name in enumerate(annotators.DIMENSIONS):
        marks = {}
        for r in records:
            assert list(r.ratings) == annotators.DIMENSIONS
            for side, mark in zip((r.chosen, r.rejected), r.ratings[name], strict=True):
                assert 1 <= mark <= 5
                marks.setdefault(world.judge(r.prompt, side[0]["content"])[name] == 1, []).append(
                    mark
                )
        good, bad = (sum(marks[kind]) / len(marks[kind]) for kind in (True, False))
        assert good > 4.4 and bad < 3 - (k > 0), name


# ---------------------------------------------------------------------------------------------------------------- files


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture
def two_files(tmp_path, pairs):
    """The same questions, answered by two writers; every tenth alike."""

    def side(k):
        return [
            {
                "messages": [
                    *m,
                    {"role": "assistant", "content": (a if k == 0 or i % 10 == 0 else b)[2]},
                ]
            }
            for i, (m, a, b) in chosen
        ]

    chosen = list(enumerate(pairs[:200]))
    return [write(tmp_path / f"{name}.jsonl", side(k)) for k, name in enumerate("ab")]


def label(*argv):
    annotators.main(run.parse(annotators.Config, [*map(str, argv)]))


def test_two_files_of_answers_become_one_of_preferences(two_files, tmp_path, capsys):
    out = tmp_path / "pairs.jsonl"
    label("--data", *two_files, "--out", out, "--annotators", 3, "--ratings", "--device", "cpu")
    said = capsys.readouterr().out
    assert "kappa" in said and "180 pairs of 180" in said and "agrees with the judge" in said
    records = formats.read(out, "preference")
    assert len(records) == 180 and {round(r.label, 3) for r in records} == {1.0, 0.667}
    assert set(records[0].ratings) == set(annotators.DIMENSIONS)
    assert formats.read(out, "unpaired") and formats.read(out, "prompt")


def test_a_reward_model_can_be_the_judge_of_any_text(tmp_path, world_model, world_encoding, capsys):
    from data import tokenizer

    world_model("score").save_pretrained(tmp_path / "rm")
    tokenizer.save(world_encoding, tmp_path / "rm")
    files = [
        write(
            tmp_path / f"{n}.jsonl",
            [{"prompt": f"say {i}", "completion": f"{n} {i}"} for i in range(40)],
        )
        for n in "ab"
    ]
    with pytest.raises(ValueError, match="embedded world"):
        label("--data", *files, "--out", tmp_path / "no.jsonl", "--device", "cpu")
    label(
        "--data",
        *files,
        "--out",
        tmp_path / "p.jsonl",
        "--judge",
        tmp_path / "rm",
        "--device",
        "cpu",
    )
    assert len(formats.read(tmp_path / "p.jsonl")) == 40


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda a, b: [a], "two files"),
        (
            lambda a, b: [
                a,
                write(b, [json.loads(line) for line in a.read_text().splitlines()][1:]),
            ],
            "different prompts",
        ),
        (
            lambda a, b: [
                a,
                write(b, [json.loads(line) for line in a.read_text().splitlines()][:-1]),
            ],
            "one file has 199",
        ),
        (lambda a, b: [a, a], "nothing to compare"),
    ],
)
def test_files_that_do_not_belong_together_are_refused(change, words, two_files, tmp_path):
    with pytest.raises(ValueError, match=words):
        label("--data", *change(*two_files), "--out", tmp_path / "pairs.jsonl", "--device", "cpu")
    assert not (tmp_path / "pairs.jsonl").exists()


@pytest.mark.parametrize("ratings", [5, {"helpful": 4}, {"helpful": ["good", "bad"]}])
def test_ratings_of_a_wrong_form_name_their_line(ratings, tmp_path):
    file = write(
        tmp_path / "pairs.jsonl",
        [{"prompt": "a", "chosen": "b", "rejected": "c", "ratings": ratings}],
    )
    with pytest.raises(ValueError, match="pairs.jsonl:1: the field ratings"):
        formats.read(file)


def test_one_unbiased_annotator_writes_plain_pairs(pairs, tmp_path):
    records, _, _ = annotators.compare(pairs[:50], annotators.world_judge)
    annotators.write(records, tmp_path / "pairs.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    assert all(set(row) == {"prompt", "chosen", "rejected"} for row in rows)
