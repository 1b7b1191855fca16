"""Claims about the bug zoo (tests/mutants.py): its patches fit today's code, its guards are tests
that exist, and a bug is caught. `python -m tests.mutants` catches all of them."""

import ast
import re

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


def test_every_guard_is_a_test_of_the_default_suite():
    for mutant in mutants.MUTANTS:
        file, name = mutant.guard.split("::")
        body = ast.parse((mutants.ROOT / "tests" / file).read_text(encoding="utf-8")).body
        functions = {node.name: node for node in body if isinstance(node, ast.FunctionDef)}
        test = functions[name.partition("[")[0]]
        marks = [ast.unparse(decorator) for decorator in test.decorator_list]
        assert not [mark for mark in marks if re.search(r"mark\.(slow|gpu|claims|skip)", mark)]


def test_every_run_names_a_stage():
    for mutant in mutants.MUTANTS:
        if mutant.run:
            stage, flags = mutants.stage_of(mutant)
            assert stage in mutants.SHORT and stage in mutants.WATCH
            assert not set(flags) & set(mutants.NAMED)


def test_a_bug_is_caught_and_healthy_code_is_not(capsys):
    guard = "test_losses.py::test_dpo_by_hand"
    assert mutants.healthy_code_passes([guard])
    caught, line = mutants.catch(mutants.find("dpo-sides-swapped"))
    assert caught and line.startswith("caught")


def test_a_bug_that_its_guard_does_not_see_survives():
    blind = mutants.find("dpo-sides-swapped")._replace(guard="test_losses.py::test_gae_by_hand")
    caught, line = mutants.catch(blind)
    assert not caught and line.startswith("SURVIVES")


def test_a_test_that_cannot_run_catches_nothing():
    missing = mutants.find("dpo-sides-swapped")._replace(guard="test_losses.py::test_nothing")
    caught, line = mutants.catch(missing)
    assert not caught and line.startswith("BROKEN")


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
    assert "-            reading = dict(batch=old.batch, temperature=config.temperature)" in printed
    assert "+            reading = dict(batch=old.batch, temperature=1.0)" in printed


def test_an_unknown_name_is_refused_in_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["mutants.py", "--show", "no-such-bug"])
    with pytest.raises(SystemExit) as exit:
        mutants.run.script(mutants.main, mutants.Config, mutants.__doc__)
    assert exit.value.code == 2
    assert capsys.readouterr().err == (
        "error: there is no bug called no-such-bug: --list shows all names\n"
    )
