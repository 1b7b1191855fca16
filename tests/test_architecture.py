"""Claims about the house itself: which room may import which, how long a file may be, that nothing
runs on import, that no flag is dead, that it can be imported without a GPU and without Linux, that
the vocabulary's arithmetic is in one place, and that nothing else has moved in."""

import ast
import functools
import graphlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOOR = {"sft": 5, "reward": 5, "ppo": 5, "dpo": 5, "evaluate": 4, "data": 3, "model": 2}
FLOOR |= {"kernels": 1, "run": 1}  # DESIGN.md, "Rooms"
STAGES = ["sft", "reward", "ppo", "dpo"]
PACKAGES = ["run", "evaluate", "kernels", "data"]
TOP = "README.md LICENSE requirements.txt model.py sft.py reward.py ppo.py dpo.py run evaluate"
TOP += " kernels data tests ruff.toml pytest.ini"

FILES = [*ROOT.glob("*.py"), *(path for room in PACKAGES for path in ROOT.glob(f"{room}/**/*.py"))]
NAMES = sorted(path.relative_to(ROOT).as_posix() for path in FILES)
TESTS = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("tests/**/*.py"))


def module_of(name):
    """data/chat.py -> data.chat, kernels/__init__.py -> kernels."""
    return name.removesuffix(".py").replace("/", ".").removesuffix(".__init__")


MODULES = {module_of(name): name for name in NAMES}
ROOMS = {module.split(".")[0] for module in MODULES}

# Of data, what reads and writes models; the commands that need a model to write data may do so too.
ABOUT_MODELS = {"data.checkpoints", "data.architectures", "data.adapters"}
THIRD_PARTY = set("torch triton numpy tiktoken safetensors tqdm matplotlib".split())
THIRD_PARTY |= {"regex", "jinja2"}  # they come with tiktoken and with torch
# Modules of the standard library that Windows does not have:
UNIX_ONLY = set("resource fcntl pwd grp termios tty pty readline curses syslog posix".split())


def source(name):
    return (ROOT / name).read_text(encoding="utf-8")


@functools.cache
def tree(name):
    return ast.parse(source(name), filename=name)


def count_lines(name):
    return len(source(name).splitlines())


def import_statements(node, everywhere=True):
    """All import statements in a file. everywhere=False: those that run when it is imported and
    that nothing catches."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.Import, ast.ImportFrom)):
            yield child
        function = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        caught = isinstance(child, ast.Try) and child.handlers
        if everywhere or not (function or caught):
            yield from import_statements(child, everywhere)


@functools.cache
def imported(name, everywhere=True):
    """Full names of all that a file imports: `from data import chat` gives data.chat if it is a
    module, and data if it is not."""
    package = name.split("/")[:-1]
    result = set()
    for node in import_statements(tree(name), everywhere):
        if isinstance(node, ast.Import):
            result |= {alias.name for alias in node.names}
            continue
        above = package[: len(package) - node.level + 1] if node.level else []
        base = ".".join([*above, *([node.module] if node.module else [])])
        for alias in node.names:
            full = f"{base}.{alias.name}"
            result.add(full if full in MODULES else base)
    return result


def room(module):
    return module.split(".")[0]


@functools.cache
def import_graph(everywhere=True):
    """{module of the project: the modules of the project that it imports}."""
    names = MODULES.items()
    return {module: imported(name, everywhere) & MODULES.keys() for module, name in names}


def reachable(module, graph):
    """All modules that importing this one imports, itself included."""
    visited, queue = set(), [module]
    while queue:
        module = queue.pop()
        if module not in visited:
            visited.add(module)
            queue += graph[module]
    return visited


def is_main_guard(node):
    return isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"


def is_command(name):
    return any(map(is_main_guard, tree(name).body))


def files_under_git():
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("this copy of the project is not a git checkout")
    command = ["git", "-C", ROOT, "ls-files", "-z"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True)
    return [name for name in listed.stdout.split("\0") if name]


# ------------------------------------------------------------------------------------------- rooms


@pytest.mark.parametrize("name", NAMES)
def test_arrows_run_down_only(name):
    here = room(module_of(name))
    assert here in FLOOR, f"{name} is in no room of DESIGN.md"
    for module in imported(name):
        there = room(module)
        if there in ROOMS and there != here:
            assert FLOOR[there] < FLOOR[here], f"{name} imports {module}"


def test_the_import_graph_finds_what_is_imported():
    """Absolute and relative imports, and those inside functions."""
    graph, top = import_graph(), import_graph(everywhere=False)
    assert {"run", "data.chat", "data.checkpoints", "kernels"} <= graph["sft"]
    assert {"run.flags", "run.ranks"} <= graph["run.command"]
    assert "kernels.linear_triton" in graph["kernels.dispatch"] - top["kernels.dispatch"]
    assert "triton" in imported("kernels/linear_triton.py", everywhere=False)
    assert "resource" in imported("run/memory.py")


def test_no_module_imports_itself_through_others():
    try:
        list(graphlib.TopologicalSorter(import_graph()).static_order())
    except graphlib.CycleError as error:
        raise AssertionError(f"a circle: {' <- '.join(error.args[1])}") from None


def test_model_imports_nothing_of_the_project_but_kernels():
    assert {room(module) for module in import_graph()["model"]} == {"kernels"}


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("data/")])
def test_of_data_only_checkpoints_and_commands_import_the_model(name):
    if "model" in imported(name):
        assert module_of(name) in ABOUT_MODELS or is_command(name)


@pytest.mark.parametrize("module", ["data.formats", "data.chat", "data.tokenizer", "data.world"])
def test_formats_chat_tokenizer_and_world_know_no_model(module):
    parts = [each for each in MODULES if each == module or each.startswith(f"{module}.")]
    assert parts  # a file, or a folder of files
    for part in parts:
        assert "model" not in reachable(part, import_graph())


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_imported_beyond_the_requirements(name):
    outside = {module.split(".")[0] for module in imported(name)}
    foreign = outside - ROOMS - sys.stdlib_module_names - THIRD_PARTY
    assert not foreign, f"{name} imports {', '.join(sorted(foreign))}"


def test_only_the_rooms_stand_at_the_top():
    strangers = {name.split("/")[0] for name in files_under_git()} - set(TOP.split())
    assert not {name for name in strangers if not name.startswith(".")}


def test_no_output_cache_or_checkpoint_is_under_git():
    folders = r"(^|/)(out|__pycache__|\.pytest_cache|\.venv)/|\.partial/"
    unwanted = re.compile(rf"{folders}|\.(pyc|safetensors|pt|bin|tmp|log)$")
    assert not [name for name in files_under_git() if unwanted.search(name)]


# ------------------------------------------------------------------------------------------- sizes


AIMS = {"sft.py": 160, "reward.py": 280, "dpo.py": 340, "ppo.py": 346, "model.py": 450}
ROOM_AIMS = {"run": 200, "evaluate": 200, "kernels": 200, "data": 400}


@pytest.mark.parametrize("name", [*NAMES, *TESTS])
def test_lines_have_at_most_100_columns(name):
    lines = enumerate(source(name).splitlines(), 1)
    assert not [f"{name}:{number}" for number, line in lines if len(line) > 100]


@pytest.mark.parametrize("name", NAMES)
def test_a_file_is_read_in_one_sitting(name):
    """STYLE.md's sizes, with a tenth to spare."""
    aim = AIMS.get(name) or ROOM_AIMS[room(module_of(name))]
    lines = count_lines(name)
    assert lines <= aim * 11 // 10, f"{name} has {lines} lines, for {aim} (+ a tenth)"


@pytest.mark.parametrize("stage", STAGES)
def test_main_fits_a_screen_and_a_half(stage):
    body = tree(f"{stage}.py").body
    (main,) = [node for node in body if isinstance(node, ast.FunctionDef) and node.name == "main"]
    lines = main.end_lineno - main.lineno + 1
    assert lines <= 70, f"main of {stage}.py has {lines} lines"


def test_the_readme_is_a_front_door():
    assert count_lines("README.md") <= 220, f"README.md has {count_lines('README.md')} lines"


def test_the_whole_can_be_read():
    """The aim was 8,800 lines, and 10,540 were reached. Reading what public files and checkpoints
    mean (formats, added tokens, chat templates, three more architectures) took 1,750 more, guarding
    runs and readers against accidents 750, running and measuring on a GPU 1,000, rewards that can
    be checked, with their measurements, 1,600, and a report, a terminal and a chat for learners
    900. This limit is what there is: lower it when lines go, and weigh a feature before raising it.
    """
    total = sum(map(count_lines, NAMES))
    assert total <= 16425, f"{total} lines of Python outside tests"


# ------------------------------------------------------------------------------------------ import


NAMING = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)


@pytest.mark.parametrize("name", NAMES)
def test_a_module_s_top_level_only_names_things(name):
    for node in tree(name).body:
        names = isinstance(node, (*NAMING, ast.AugAssign))
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        tries = node.body if isinstance(node, ast.Try) else []
        fallback = tries and all(isinstance(x, (ast.Import, ast.ImportFrom)) for x in tries)
        quiet = names or docstring or fallback or is_main_guard(node)
        assert quiet, f"{name}:{node.lineno} runs on import"


def import_all(modules, folder, before="", **environment):
    """A process that imports these modules, with a flag that none of them knows."""
    code = f"""
{before}
import importlib, random, sys, torch
def state():
    switches = torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads()
    return random.getstate(), torch.get_rng_state().tolist(), switches
random.seed(1); torch.manual_seed(1)
before = state()
for module in {modules}:
    importlib.import_module(module)
assert state() == before
assert "matplotlib.pyplot" not in sys.modules, "it takes a second; only a run's end needs it"
"""
    quiet = {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    options = dict(env=os.environ | quiet | environment, capture_output=True, text=True)
    command = [sys.executable, "-c", code, "--no-such-flag"]
    done = subprocess.run(command, cwd=folder, **options)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(folder.iterdir())


def test_importing_everything_prints_and_writes_nothing_and_leaves_random_state_alone(tmp_path):
    import_all(list(MODULES), tmp_path)


NEEDS_TRITON = {m for m, name in MODULES.items() if "triton" in imported(name, everywhere=False)}


def test_triton_is_imported_where_there_is_cuda_only(tmp_path):
    assert NEEDS_TRITON
    for module, others in import_graph(everywhere=False).items():
        assert module in NEEDS_TRITON or not others & NEEDS_TRITON
    hidden = "import sys; sys.modules['triton'] = None"  # `import triton` raises ImportError
    rest = [module for module in MODULES if module not in NEEDS_TRITON]
    import_all(rest, tmp_path, hidden, CUDA_VISIBLE_DEVICES="")


@pytest.mark.parametrize("name", [*NAMES, *TESTS])
def test_what_windows_lacks_is_not_imported_at_the_top_of_a_file(name):
    assert not imported(name, everywhere=False) & UNIX_ONLY


def test_triton_is_required_where_it_exists_only():
    (line,) = [x for x in source("requirements.txt").splitlines() if x.startswith("triton")]
    assert line.endswith('; sys_platform == "linux"')


def test_model_imports_alone_with_nothing_but_kernels(tmp_path):
    """A single-file GPT that one can carry away."""
    shutil.copy(ROOT / "model.py", tmp_path)
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "kernels", tmp_path / "kernels", ignore=ignore)
    code = """
import json, model
gpt = model.GPT.from_scratch("llama:1x32x16", 10)
print(json.dumps(gpt.generate([[1]], 2, 0)))
"""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    options = dict(cwd=tmp_path, env=environment, capture_output=True, text=True)
    done = subprocess.run([sys.executable, "-c", code], **options)
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)[0]) == 2


# ------------------------------------------------------------------------------------------- flags


def is_config(node):
    return isinstance(node, ast.ClassDef) and (node.name.endswith("Config") or node.name == "Flags")


# {(file, class name): node} of every Config at the top level of a module, and the shared Flags:
CONFIGS = {(name, x.name): x for name in NAMES for x in tree(name).body if is_config(x)}
FLAGS = "run/flags.py", "Flags"
COMMAND_LINE = {key: node for key, node in CONFIGS.items() if key[0] != "model.py"}


def declared(node):
    return {item.target.id: item for item in node.body if isinstance(item, ast.AnnAssign)}


def line_of(name, item):
    return source(name).splitlines()[item.lineno - 1]


def inherits_flags(node):
    return "run.Flags" in map(ast.unparse, node.bases)


@functools.cache
def attributes_read(name, owners=("config", "c")):
    """Fields that a file reads from something called config (`config.lr`, `self.config.lr`,
    `job.config.lr`, `c.width`)."""
    result = set()
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            owner = node.value
            variable = isinstance(owner, ast.Name) and owner.id in owners
            attribute = isinstance(owner, ast.Attribute) and owner.attr == "config"
            if variable or attribute:
                result.add(node.attr)
    return result


def readers(name):
    """The files that may read a Config of this file: itself, and what it imports as long as that
    has no Config of its own. The model's is also read by what reads and writes its files."""
    if name == "model.py":
        return {name, *(MODULES[module] for module in ABOUT_MODELS)}
    others = {file for file, _ in CONFIGS} - {name, FLAGS[0]}
    return {MODULES[module] for module in reachable(module_of(name), import_graph())} - others


@pytest.mark.parametrize("key", [key for key in CONFIGS if key != FLAGS], ids=":".join)
def test_every_field_of_a_config_is_read_somewhere(key):
    """A stage reads the shared flags too."""
    name, node = key[0], CONFIGS[key]
    names = set(declared(node))
    if inherits_flags(node):
        names |= set(declared(CONFIGS[FLAGS]))
    assert names
    dead = names - set().union(*map(attributes_read, readers(name)))
    assert not dead, f"{name}: nobody reads {', '.join(sorted(dead))}"


@pytest.mark.parametrize("key", COMMAND_LINE, ids=":".join)
def test_every_flag_is_flat_and_has_a_comment_that_becomes_its_help(key):
    for item in declared(CONFIGS[key]).values():
        where = f"{key[0]}:{item.lineno}"
        assert re.search(r"  # \S", line_of(key[0], item)), f"{where} has no comment"
        kind = ast.unparse(item.annotation).removesuffix(" | None")  # None: it was not given
        flat = kind in ("str", "int", "float", "bool", "list")
        assert flat, f"{where} is not flat"


def test_the_shared_flags_are_declared_once_and_inherited_by_every_stage():
    names = "init tokenizer data out overwrite resume save_every steps batch_size lr seed device"
    shared = declared(CONFIGS[FLAGS])
    assert {*names.split(), "dtype"} <= set(shared)
    for stage in STAGES:
        node = CONFIGS[f"{stage}.py", "Config"]
        assert inherits_flags(node)
        for field, item in declared(node).items():
            if field in shared:  # for another default or another meaning
                inherited = line_of(FLAGS[0], shared[field])
                assert line_of(f"{stage}.py", item) != inherited, f"{stage}.py repeats {field}"


# ----------------------------------------------------------------------------------- the one place


PRODUCTS = r"log_softmax|F\.cross_entropy|functional\.cross_entropy|CrossEntropyLoss|nll_loss"
VOCABULARY_ARITHMETIC = re.compile(rf"{PRODUCTS}|logsumexp|softmax\([^()]*\)\.log\(")
KERNELS = [name for name in NAMES if name.startswith("kernels/")]


@pytest.mark.parametrize("name", [name for name in NAMES if name not in KERNELS])
def test_log_probs_over_the_vocabulary_are_computed_in_kernels_only(name):
    lines = enumerate(source(name).splitlines(), 1)
    assert not [f"{name}:{n}: {line}" for n, line in lines if VOCABULARY_ARITHMETIC.search(line)]


def test_the_search_for_vocabulary_arithmetic_finds_it_where_it_is():
    assert any(VOCABULARY_ARITHMETIC.search(source(name)) for name in KERNELS)


@pytest.mark.parametrize("name", NAMES)
def test_losses_are_tensors_in_tensors_out(name):
    """A function called ..._loss never calls .item() and never asks for a device (DESIGN.md: no
    config, no model, no device)."""
    for node in ast.walk(tree(name)):
        if not isinstance(node, ast.FunctionDef) or not node.name.endswith("_loss"):
            continue
        if {"model", "config"} & {argument.arg for argument in node.args.args}:
            continue
        used = {part.attr for part in ast.walk(node) if isinstance(part, ast.Attribute)}
        unwanted = used & {"item", "tolist", "cuda", "cpu", "numpy"}
        assert not unwanted, f"{name}:{node.lineno} {node.name}"
