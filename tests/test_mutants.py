"""Claims about the bug zoo (tests/mutants.py): its patches fit today's code, its guards are tests
that exist, and a bug is caught. `python -m tests.mutants` catches all of them."""

import ast
import functools
import re
from types import SimpleNamespace

import pytest

from tests import mutants

NAMES = [mutant.name for mutant in mutants.MUTANTS]


@pytest.mark.parametrize("mutant", mutants.MUTANTS, ids=NAMES)
def test_each_bug_fits_today_s_code_in_one_place_and_leaves_it_python(mutant):
    before, after = mutants.mutated(mutant)  # raises unless the old text occurs once
    assert before != after
    ast.parse(after)


def test_names_are_unique_and_sources_name_a_repository_and_a_number():
    assert len(set(NAMES)) == len(NAMES) >= 45
    assert all(re.fullmatch(r"[a-z0-9-]+", name) for name in NAMES)
    sources = [mutant.source for mutant in mutants.MUTANTS if mutant.source]
    assert all(re.fullmatch(r"[\w.-]+/[\w.-]+#\d+", source) for source in sources)


@functools.cache
def functions_of(file):
    body = ast.parse((mutants.ROOT / "tests" / file).read_text(encoding="utf-8")).body
    return {node.name: node for node in body if isinstance(node, ast.FunctionDef)}


def test_every_guard_is_a_test_of_the_default_suite():
    for mutant in mutants.MUTANTS:
        file, name = mutant.guard.split("::")
        test = functions_of(file)[name.partition("[")[0]]
        marks = [ast.unparse(decorator) for decorator in test.decorator_list]
        elsewhere = re.compile(r"pytest\.mark\.(slow|gpu|claims|skip)")
        assert not [mark for mark in marks if elsewhere.match(mark)]


def test_every_run_names_a_stage():
    for mutant in mutants.MUTANTS:
        if mutant.run:
            stage, flags = mutants.stage_of(mutant)
            assert stage in mutants.SHORT and stage in mutants.WATCH
            assert not set(flags) & set(mutants.NAMED)


@pytest.mark.slow
def test_bugs_are_caught_and_healthy_code_is_not(capsys):
    names = ["dpo-sides-swapped", "gaps-count-as-steps"]
    assert mutants.catch_all(list(map(mutants.find, names)), jobs=2)
    printed = capsys.readouterr().out
    assert "healthy code: 2 guards" in printed and "2 of 2 bugs caught" in printed


@pytest.mark.parametrize(
    "code, verdict", [(1, "caught"), (0, "SURVIVES"), (4, "BROKEN"), (None, "TOO SLOW")]
)
def test_only_a_test_that_fails_has_caught_a_bug(code, verdict, monkeypatch):
    monkeypatch.setattr(mutants, "run_tests", lambda mutant, guards: (code, "its output", 1.5))
    caught, line = mutants.catch(mutants.MUTANTS[0])
    assert caught == (code == 1) and line.startswith(verdict)
    assert ("its output" in line) == (code != 1)


def test_a_bug_that_survives_makes_the_command_fail(monkeypatch, capsys):
    codes = {None: 0, "dpo-sides-swapped": 0, "orpo-odds": 1}  # None: healthy code

    def run_tests(mutant, guards):
        return codes[mutant and mutant.name], "", 1.0

    monkeypatch.setattr(mutants, "run_tests", run_tests)
    with pytest.raises(SystemExit) as exit:
        mutants.main(mutants.Config(only=["dpo-sides-swapped", "orpo-odds"]))
    assert exit.value.code == 1 and "1 of 2 bugs caught" in capsys.readouterr().out
    codes["dpo-sides-swapped"] = 1
    mutants.main(mutants.Config(only=["dpo-sides-swapped", "orpo-odds"]))
    codes[None] = 1  # a guard that fails without a bug catches nothing
    with pytest.raises(SystemExit):
        mutants.main(mutants.Config(only=["dpo-sides-swapped", "orpo-odds"]))


def test_a_patch_that_no_longer_fits_is_refused_by_name():
    stale = mutants.find("dpo-sides-swapped")._replace(old="no such line")
    with pytest.raises(ValueError, match="dpo-sides-swapped: its old text occurs 0 times in dpo"):
        mutants.mutated(stale)


def test_a_bug_is_shown_with_its_patch_and_its_story(capsys):
    mutant = mutants.find("temperature-missing-in-the-update")
    mutants.show(mutant)
    printed = capsys.readouterr().out
    for text in (mutant.symptom, mutant.story, mutant.guard, mutant.source, f"--run {mutant.name}"):
        assert text in printed
    call = "            logprobs = job.forward(rl.row_logprobs, models.policy, rows, "
    assert f"-{call}**old.reading)" in printed
    assert f"+{call}batch=old.batch, temperature=1.0)" in printed


def test_a_healthy_run_of_older_code_is_trained_again(tmp_path, monkeypatch):
    trained = []

    def train(words, cwd):
        trained.append(words)
        assert not (tmp_path / "sft").exists()
        (tmp_path / "sft").mkdir()
        (tmp_path / "sft" / "run.json").write_text("{}")
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(mutants.subprocess, "run", train)
    arguments = (mutants.ROOT, tmp_path, "sft", tmp_path / "sft")
    for _ in range(2):  # the second time it is there
        mutants.train(*arguments)
    assert len(trained) == 1
    edited = (tmp_path / "sft" / "run.json").stat().st_mtime + 1
    monkeypatch.setattr(mutants, "last_edit", lambda: edited)
    mutants.train(*arguments)
    assert len(trained) == 2


def test_an_unknown_name_is_refused_in_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["mutants.py", "--show", "no-such-bug"])
    with pytest.raises(SystemExit) as exit:
        mutants.run.script(mutants.main, mutants.Config, mutants.__doc__)
    assert exit.value.code == 2
    assert capsys.readouterr().err == (
        "error: there is no bug called no-such-bug: --list shows all names\n"
    )
