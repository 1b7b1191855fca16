"""Claims about the labs (tests/lab.py): a blank one fails with a helpful sentence, the original
passes, whatever a body does the grader ends, and the repository stays as it is."""

import ast
import json
import re
import shutil
import subprocess
import sys

import pytest
import torch

from tests import lab
from tests.test_mutants import functions_of

NAMES = [each.name for each in lab.LABS]
DPO = lab.find(["dpo"])[0]
ELSEWHERE = re.compile(r"pytest\.mark\.(slow|gpu|claims|skip)")


@pytest.fixture
def command(monkeypatch, capsys):
    """command("check DIR"): -> exit code, standard output, standard error."""

    def run(line):
        monkeypatch.setattr("sys.argv", ["lab.py", *line.split()])
        code = 0
        try:
            lab.main()
        except SystemExit as exit:
            code = exit.code
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def answer(tmp_path):
    """answer(lab, body): a directory whose functions of that lab have this body."""

    def write(each, body):
        text = lab.blanked(lab.read(lab.ROOT / each.file), each)
        for name in each.functions:
            line = f'raise NotImplementedError("{name} {lab.BLANK}")'
            assert text.count(line) == 1
            text = text.replace(line, body)
        path = tmp_path / each.file
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(text.encode())
        return tmp_path

    return write


# ------------------------------------------------------------------------------------- the table


def test_points_sum_to_100_and_every_grader_is_a_test_of_the_default_suite_with_a_hint():
    assert sum(each.points for each in lab.LABS) == 100 and len(set(NAMES)) == len(NAMES) >= 10
    for each in lab.LABS:
        assert len(each.tests) == each.graders.count("::") >= 3
        for grader, hint in each.tests.items():
            file, name = grader.split("::")
            decorators = functions_of(file)[name.partition("[")[0]].decorator_list
            marks = [ast.unparse(decorator) for decorator in decorators]
            assert not [mark for mark in marks if ELSEWHERE.match(mark)]
            assert hint.endswith(".")


def test_a_function_belongs_to_one_lab():
    owned = [(each.file, name) for each in lab.LABS for name in each.functions]
    assert len(set(owned)) == len(owned)


# -------------------------------------------------------------------------------------- the copy


@pytest.mark.parametrize("each", lab.LABS, ids=NAMES)
def test_a_blank_body_leaves_signature_docstring_and_every_other_line(each):
    original = lab.read(lab.ROOT / each.file)
    text = lab.blanked(original, each)
    before, after = (lab.functions_of(x, each.functions) for x in (original, text))
    for name in each.functions:
        assert ast.unparse(after[name].args) == ast.unparse(before[name].args)
        assert ast.get_docstring(after[name]) == ast.get_docstring(before[name])
        docstring, error = after[name].body
        assert isinstance(error, ast.Raise) and lab.BLANK in ast.unparse(error)
    assert lab.restored(text, original, each.functions) == original  # to the byte
    kept = [line for line in text.split("\n") if lab.BLANK not in line]
    rest = iter(original.split("\n"))
    assert all(line in rest for line in kept)  # in their order


def git_status():
    if not (lab.ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("this copy of the project is not a git checkout")
    words = ["git", "-C", lab.ROOT, "status", "--porcelain"]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout


def test_blank_writes_a_copy_and_touches_nothing_here(command, tmp_path):
    status = git_status()
    code, printed, _ = command(f"blank {tmp_path / 'mine'} dpo kto gae")
    assert code == 0 and printed.splitlines()[-1].endswith(f"check {tmp_path / 'mine'}")
    changed = {}
    for path in [*lab.ROOT.glob("*.py"), *lab.ROOT.glob("data/**/*.py")]:
        name = path.relative_to(lab.ROOT).as_posix()
        changed[name] = (tmp_path / "mine" / name).read_bytes() != path.read_bytes()
    assert {name for name, differs in changed.items() if differs} == {"dpo.py", "ppo.py"}
    assert (tmp_path / "mine" / "dpo.py").read_text(encoding="utf-8").count(lab.BLANK) == 3
    assert (tmp_path / "mine" / "tests" / "LABS.md").exists() and git_status() == status


@pytest.mark.parametrize(
    "line, words",
    [
        ("blank", "name a directory, such as out/labs"),
        ("blank {0} nothing", "there is no lab called nothing: there are mask, sft, bradley-terry"),
        ("blank {0}", "exists and is not an empty directory: name another one"),
        ("blank {1}/tests/mine", "lies in the code that is copied: name one elsewhere"),
        ("check {0}/none", "holds none of the labs' files: python -m tests.lab blank"),
        ("check {0} nothing", "there is no lab called nothing: there are mask"),
        ("grade {0}", "holds none of the labs' files"),
        ("grade {1} dpo", "grade takes one directory and no dpo"),
        ("list dpo", "list takes no dpo: leave it out"),
        ("check {1} --trace", "unrecognized arguments: --trace (--help lists the flags)"),
    ],
)
def test_a_word_that_means_nothing_is_refused_in_one_sentence(line, words, command, tmp_path):
    (tmp_path / "full").write_text("mine")
    code, printed, errors = command(line.format(tmp_path, lab.ROOT))
    assert (code, printed) == (2, "") and errors.startswith("error: ") and words in errors
    assert errors.count("\n") == 1 and [path.name for path in tmp_path.iterdir()] == ["full"]


# --------------------------------------------------------------------------------- the sentences


def fails(claim):
    with pytest.raises(BaseException) as caught:
        claim()
    return lab.sentence(caught.value)


def test_a_sentence_says_what_was_expected_and_what_came():
    close, two = torch.testing.assert_close, torch.tensor([0.5, 2.0])
    assert fails(lambda: close(two, torch.tensor([0.5, 3.0]))) == "expected 3 at [1], got 2"
    nan = torch.tensor([[0.5, float("nan")]])
    assert fails(lambda: close(nan, torch.ones(1, 2))) == "expected 1 at [0, 1], got nan"
    assert fails(lambda: close(0.5, 0.25)) == "expected 0.25, got 0.5"
    shape = "expected the shape () of torch.float32, got (2,) of torch.float32"
    assert fails(lambda: close(two, torch.tensor(1.0))) == shape
    assert "None" in fails(lambda: close(None, two))

    def equal():
        assert float(two[0]) == pytest.approx(0.25)

    def finite():
        assert torch.isfinite(two / 0).all()

    def index():
        return two[7]

    assert fails(equal).startswith("expected 0.25 ± ") and fails(equal).endswith(", got 0.5")
    assert fails(finite) == "this does not hold: torch.isfinite(two / 0).all()"
    assert fails(index).startswith("IndexError: index 7 is out of bounds")


def test_a_failure_names_function_file_test_and_hint():
    failed = "tests/test_losses.py::test_dpo_is_the_slow_loop[0.01-0.0]", "expected 1, got 2"
    wrong = lab.verdict(DPO, {"failed": failed, "passed": 3, "collected": 9}, 1)
    assert wrong == (
        "dpo_loss in dpo.py fails test_dpo_is_the_slow_loop[0.01-0.0]: expected 1, got 2. "
        "One loss for each pair, (B,), and no mean."
    )


@pytest.mark.parametrize(
    "findings, code",
    [
        ({}, 0),  # the code ended the process
        ({"passed": 3, "collected": 9}, 2),  # the code pressed Ctrl-C
        ({"passed": 3, "collected": 9}, 0),  # the code skipped the others
        ({"passed": 0, "collected": 0}, 0),
    ],
)
def test_only_tests_that_have_all_passed_pass(findings, code):
    assert "ended or skipped the tests" in lab.verdict(DPO, findings, code)
    assert lab.verdict(DPO, {"passed": 9, "collected": 9}, 0) == ""


# -------------------------------------------------------------------------------- the tests of DIR


BODY = "return torch.zeros(9)"


@pytest.mark.parametrize(
    "text, words",
    [
        ("def dpo_loss(:\n", "dpo.py: line 1 is no Python"),
        ("import torch\n", "dpo.py: it has no function dpo_loss: put it back"),
        ("x = 1\0\n", "dpo.py: "),
        ("x = " + "-" * 100_000 + "1\n", "dpo.py: it is no Python: "),
        ("def dpo_loss(): return 1\n", "dpo.py: it has no function kto_loss, mismatched_kl: put"),
        (None, "dpo.py: "),
    ],
)
def test_a_file_that_cannot_be_graded_is_named_and_nothing_runs(text, words, tmp_path):
    if text:
        (tmp_path / "dpo.py").write_text(text)
    wrong, printed = lab.graded(DPO, tmp_path)
    assert wrong.startswith(words) and printed == "" and "\n" not in wrong


def test_a_wrong_body_fails_and_another_lab_s_blank_does_not_matter(answer):
    """The file holds two labs, and KTO's functions are still blank."""
    wrong, printed = lab.graded(DPO, answer(DPO, "return chosen_logps - rejected_logps"))
    where = "dpo_loss in dpo.py fails test_dpo_is_ln_2_where_policy_and_reference_agree: "
    assert wrong.startswith(f"{where}expected 0.693147 at [") and ", got " in wrong
    assert wrong.endswith("where the two agree, logits are 0.") and "1 failed" in printed
    path = answer(DPO, BODY) / "dpo.py"
    kto = lab.blanked(lab.read(lab.ROOT / "dpo.py"), lab.find(["kto"])[0])
    path.write_bytes(kto.encode())
    assert lab.graded(DPO, path.parent)[0] == ""


def test_a_body_that_ends_the_process_does_not_pass(answer):
    wrong, _ = lab.graded(DPO, answer(DPO, "import os; os._exit(0)"))
    assert (
        wrong == "dpo_loss in dpo.py ended or skipped the tests (exit code 0): leave that to them"
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "body, words",
    [
        ("raise SystemExit(0)", "fails test_dpo_is_ln_2"),
        ("raise KeyboardInterrupt", "ended or skipped the tests (exit code 2)"),
        ("import pytest; pytest.skip('later')", "ended or skipped the tests (exit code 0)"),
        ("import pytest; pytest.exit('done', 0)", "ended or skipped the tests (exit code 0)"),
        ("import os; os.kill(os.getpid(), 9)", "ended or skipped the tests (exit code -9)"),
        ("print('x' * 10**7); return input()", "fails test_dpo_is_ln_2"),
        ("return dpo_loss(*[chosen_logps] * 5)", "RecursionError in dpo_loss"),
        ("import time; time.sleep(1000)", "did not end within 40 seconds: does a loop never stop?"),
        ("while True: pass", "did not end within 40 seconds: does a loop never stop?"),
        ("import os; open('lab-report.json', 'w').write('[]'); os._exit(0)", "ended or skipped"),
        ("import shutil; shutil.rmtree('tests'); return 1", "dpo_loss in dpo.py "),
    ],
)
def test_whatever_a_body_does_the_grader_says_what_is_wrong(body, words, answer, monkeypatch):
    if "40 seconds" in words:
        monkeypatch.setattr(lab, "LIMIT", 40)
    if sys.platform == "win32" and "kill" in body:
        pytest.skip("Windows has no signal 9")
    wrong, _ = lab.graded(DPO, answer(DPO, body))
    assert words in wrong and "\n" not in wrong


@pytest.mark.slow
@pytest.mark.parametrize("each", lab.LABS, ids=NAMES)
def test_a_blank_lab_fails_with_its_sentence_and_the_original_passes(each, answer):
    status = git_status()
    directory = answer(each, f'raise NotImplementedError("{each.functions[0]} {lab.BLANK}")')
    wrong, _ = lab.graded(each, directory)
    assert wrong == f"{each.functions[0]} {lab.BLANK} in {each.file}"
    shutil.copy(lab.ROOT / each.file, directory / each.file)
    assert lab.graded(each, directory)[0] == ""
    assert git_status() == status


@pytest.mark.slow
def test_each_function_alone_left_blank_fails_its_lab(tmp_path):
    for each in lab.LABS:
        for name in each.functions if len(each.functions) > 1 else []:
            part = each._replace(functions=[name])
            path = tmp_path / each.file
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(lab.blanked(lab.read(lab.ROOT / each.file), part).encode())
            assert lab.graded(each, tmp_path)[0] == f"{name} {lab.BLANK} in {each.file}"


def test_grade_writes_what_gradescope_reads(command, tmp_path, monkeypatch):
    """Two labs: one passes, one has bytes that a terminal must not get."""
    results = {"dpo": "", "gae": "expected 1, got \x1b[2J"}
    monkeypatch.setattr(lab, "LABS", lab.find(["dpo", "gae"]))
    monkeypatch.setattr(lab, "graded", lambda each, directory: (results[each.name], "printed"))
    code, printed, _ = command(f"grade {lab.ROOT} --json {tmp_path / 'results.json'}")
    assert code == 0 and printed.splitlines() == [
        "dpo              8 of   8  passed",
        r"gae              0 of  12  expected 1, got \x1b[2J",
        "8 of 20 points",
    ]
    assert json.loads((tmp_path / "results.json").read_text()) == {
        "score": 8,
        "tests": [
            {"name": "dpo", "score": 8, "max_score": 8, "output": "passed"},
            {"name": "gae", "score": 0, "max_score": 12, "output": r"expected 1, got \x1b[2J"},
        ],
    }


def test_check_prints_a_sentence_for_each_lab_and_the_output_only_when_asked(command, monkeypatch):
    results = {"dpo": ("", "1 passed"), "gae": ("expected 1, got 2", "Traceback")}
    monkeypatch.setattr(lab, "graded", lambda each, directory: results[each.name])
    assert command(f"check {lab.ROOT} dpo") == (0, "dpo: passed\n", "")
    code, printed, _ = command(f"check {lab.ROOT} dpo gae")
    again = f"    python -m tests.lab check {lab.ROOT} gae --traceback"
    assert code == 1
    assert printed.splitlines() == ["dpo: passed", "gae: expected 1, got 2", again]
    code, printed, _ = command(f"check {lab.ROOT} gae --traceback")
    assert (code, printed) == (1, "gae: expected 1, got 2\nTraceback\n")


def test_the_handout_names_every_lab_with_its_points():
    handout = (lab.ROOT / "tests" / "LABS.md").read_text(encoding="utf-8")
    for each in lab.LABS:
        assert f"`{each.name}`" in handout and f"{each.points} points" in handout
        assert all(f"`{name}`" in handout for name in each.functions)
