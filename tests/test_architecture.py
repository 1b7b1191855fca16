"""Claims about the house itself: which room may import which, that nothing runs on import, that no flag is dead, that the vocabulary's
arithmetic is in one place, and that nothing else has moved in."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
STAGES = ["sft", "reward", "ppo", "dpo", "evaluate"]
TOP = "README.md LICENSE requirements.txt model.py run.py sft.py reward.py ppo.py dpo.py evaluate.py kernels data tests ruff.toml pytest.ini"
SOURCES = sorted(
    path for path in [*ROOT.glob("*.py"), *ROOT.glob("kernels/*.py"), *ROOT.glob("data/*.py")]
)
NAMES = [str(path.relative_to(ROOT)) for path in SOURCES]
MODULES = [name.removesuffix(".py").replace("/", ".").removesuffix(".__init__") for name in NAMES]
OURS = {module.split(".")[0] for module in MODULES}

# What each room may import of the project (DESIGN.md, "Rooms"); data's commands that need a model to write data import it as well.
WRITERS = {"data.constitution", "data.annotators", "data.curate"}
BELOW = {
    "kernels": {"kernels"},
    "run": set(),
    "model": {"kernels"},
    "data": {"data", "run", "kernels"},
}
BELOW |= {stage: {"model", "run", "kernels", "data"} for stage in STAGES}
THIRD_PARTY = {
    "torch",
    "triton",
    "numpy",
    "tiktoken",
    "safetensors",
    "tqdm",
    "matplotlib",
    "regex",
}  # regex comes with tiktoken


def tree(name):
    return ast.parse((ROOT / name).read_text(encoding="utf-8"), filename=name)


def imports(name):
    """The top-level name of everything that a file imports, wherever in it; a relative import is one of its own room."""
    found = set()
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(name.split("/")[0] if node.level else node.module.split(".")[0])
    return found


def files_under_git():
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("this copy of the project is not a git checkout")
    listed = subprocess.run(
        ["git", "-C", ROOT, "ls-files", "-z"], capture_output=True, text=True, check=True
    )
    return [name for name in listed.stdout.split("\0") if name]


# -------------------------------------------------------------------------------------------------------------------- rooms


@pytest.mark.parametrize("name, module", list(zip(NAMES, MODULES, strict=True)), ids=NAMES)
def test_arrows_run_down_only(name, module):
    room = module.split(".")[0]
    assert room in BELOW, f"{name} is no room of DESIGN.md"
    allowed = BELOW[room] | ({"model"} if module in WRITERS else set())
    above = (imports(name) & OURS) - allowed
    assert not above, f"{name} imports {', '.join(sorted(above))}"


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_imported_beyond_the_requirements(name):
    foreign = imports(name) - OURS - sys.stdlib_module_names - THIRD_PARTY
    assert not foreign, f"{name} imports {', '.join(sorted(foreign))}"


def test_only_the_rooms_stand_at_the_top():
    allowed = set(TOP.split())
    strangers = {name.split("/")[0] for name in files_under_git()} - allowed
    assert not {name for name in strangers if not name.startswith(".")}


def test_no_output_cache_or_checkpoint_is_under_git():
    unwanted = re.compile(
        r"(^|/)(out|__pycache__|\.pytest_cache|\.venv)/|\.(pyc|safetensors|pt|bin|tmp|log)$|\.partial/"
    )
    assert not [name for name in files_under_git() if unwanted.search(name)]


# ------------------------------------------------------------------------------------------------------------------- import


def is_main_guard(node):
    return isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"


@pytest.mark.parametrize("name", NAMES)
def test_a_module_s_top_level_only_names_things(name):
    quiet = (
        ast.Import,
        ast.ImportFrom,
        ast.FunctionDef,
        ast.ClassDef,
        ast.Assign,
        ast.AnnAssign,
        ast.AugAssign,
    )
    for node in tree(name).body:
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        fallback = isinstance(node, ast.Try) and all(
            isinstance(part, (ast.Import, ast.ImportFrom)) for part in node.body
        )
        assert isinstance(node, quiet) or docstring or fallback or is_main_guard(node), (
            f"{name}:{node.lineno} runs on import"
        )


def test_importing_everything_prints_nothing_writes_nothing_reads_no_flags_and_leaves_random_state_alone(
    tmp_path,
):
    code = f"""
import random, sys, torch
random.seed(1); torch.manual_seed(1)
before = random.getstate(), torch.get_rng_state(), torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads()
import importlib
for module in {MODULES}:
    importlib.import_module(module)
after = random.getstate(), torch.get_rng_state(), torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads()
assert all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(before, after))
assert "matplotlib.pyplot" not in sys.modules, "pyplot takes a second to import and only the end of a run needs it"
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", code, "--no-such-flag"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


# -------------------------------------------------------------------------------------------------------------------- flags


def configs():
    """(file, class) of every dataclass called ...Config at the top level of a module."""
    for name in NAMES:
        for node in tree(name).body:
            if isinstance(node, ast.ClassDef) and node.name.endswith("Config"):
                yield name, node


def attributes_read(name, owners=("config", "c")):
    """Fields that a file reads from something called config (`config.lr`, `self.config.lr`, `job.config.lr`, `c.width`)."""
    found = set()
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            owner = node.value
            if (isinstance(owner, ast.Name) and owner.id in owners) or (
                isinstance(owner, ast.Attribute) and owner.attr == "config"
            ):
                found.add(node.attr)
    return found


@pytest.mark.parametrize(
    "name, node", [pytest.param(*pair, id=f"{pair[0]}:{pair[1].name}") for pair in configs()]
)
def test_every_field_of_a_config_is_read_somewhere(name, node):
    fields = {item.target.id for item in node.body if isinstance(item, ast.AnnAssign)}
    assert fields
    reads = attributes_read(name) | (set() if name == "model.py" else attributes_read("run.py"))
    dead = fields - reads
    assert not dead, f"{name}: nobody reads {', '.join(sorted(dead))}"


@pytest.mark.parametrize(
    "name, node",
    [
        pytest.param(*pair, id=f"{pair[0]}:{pair[1].name}")
        for pair in configs()
        if pair[0] != "model.py"
    ],
)
def test_every_flag_is_flat_and_has_a_comment_that_becomes_its_help(name, node):
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    for item in node.body:
        if isinstance(item, ast.AnnAssign):
            assert re.search(r"  # \S", lines[item.lineno - 1]), (
                f"{name}:{item.lineno} has no comment"
            )
            assert ast.unparse(item.annotation) in ("str", "int", "float", "bool", "list"), (
                f"{name}:{item.lineno} is not flat"
            )


def test_the_shared_flags_are_called_the_same_in_every_stage():
    shared = set(
        "init tokenizer data out overwrite resume save_every steps batch_size lr seed device dtype".split()
    )
    for name, node in configs():
        if name in ("sft.py", "reward.py", "ppo.py", "dpo.py"):
            fields = {item.target.id for item in node.body if isinstance(item, ast.AnnAssign)}
            assert shared <= fields, f"{name} lacks {shared - fields}"


def test_model_imports_alone_with_nothing_but_kernels(tmp_path):
    """A single-file GPT that one can carry away."""
    shutil.copy(ROOT / "model.py", tmp_path)
    shutil.copytree(
        ROOT / "kernels", tmp_path / "kernels", ignore=shutil.ignore_patterns("__pycache__")
    )
    code = "import json, torch, model; m = model.GPT.from_scratch('llama:1x32x16', 10); print(json.dumps(m.generate([[1]], 2, 0)))"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)[0]) == 2


# --------------------------------------------------------------------------------------------------------------- the one place


VOCABULARY_ARITHMETIC = re.compile(
    r"log_softmax|F\.cross_entropy|functional\.cross_entropy|CrossEntropyLoss|nll_loss|logsumexp|softmax\([^()]*\)\.log\("
)


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("kernels/")])
def test_log_probs_over_the_vocabulary_are_computed_in_kernels_only(name):
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    found = [
        f"{name}:{number}: {line.strip()}"
        for number, line in enumerate(lines, 1)
        if VOCABULARY_ARITHMETIC.search(line)
    ]
    assert not found


def test_the_search_for_vocabulary_arithmetic_finds_it_where_it_is():
    assert any(
        VOCABULARY_ARITHMETIC.search((ROOT / name).read_text(encoding="utf-8"))
        for name in NAMES
        if name.startswith("kernels/")
    )


@pytest.mark.parametrize("name", NAMES)
def test_losses_are_tensors_in_tensors_out(name):
    """A function called ..._loss never calls .item() and never asks for a device (DESIGN.md: no config, no model, no device)."""
    for node in ast.walk(tree(name)):
        if (
            isinstance(node, ast.FunctionDef)
            and node.name.endswith("_loss")
            and not {"model", "config"} & {a.arg for a in node.args.args}
        ):
            used = {part.attr for part in ast.walk(node) if isinstance(part, ast.Attribute)}
            assert not used & {"item", "tolist", "cuda", "cpu", "numpy"}, (
                f"{name}:{node.lineno} {node.name}"
            )
