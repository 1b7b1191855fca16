"""A run's plumbing, shared by every script. No mathematics, and nothing of the project is imported.

    config = run.parse(Config)              the script's dataclass, filled from the command line
    job = run.start(config, "dpo")          checks the directory and the device; sets the seed
    for step in job.steps(config.steps, policy=policy, optimizer=optimizer):
        logps = job.forward(pair_logps, policy, pairs)    at the run's precision, on all ranks
        ...
        job.log(step, loss=loss, lr=lr)     a line of metrics.jsonl, the same numbers on screen
    job.finish(save)                        save(directory) writes the checkpoint

flags.py      a dataclass becomes a command line; the flags that all stages share; what is refused
command.py    starts a script; bad input ends in one sentence and exit code 2
job.py        one run: its steps, its log, its end
progress.py   what a person sees of it: the bar, lines of numbers, the next command
directory.py  the directory of a run, which appears complete or not at all
lock.py, renames.py, signals.py      one process for each; whole renames; Ctrl-C
ranks.py      several processes under torchrun that compute what one process would
state.py      what --resume needs
optimizer.py  AdamW, the learning-rate schedule, clipping
memory.py, files.py, pictures.py     how much memory; files without halves; curves
terminal.py   text that is shown and never obeyed

Bad input: every module of the project raises ValueError or OSError with one sentence that says what
is wrong and what to do. Any other exception is a bug and keeps its traceback.
"""

from .command import commands, keep_memory, script, stage
from .directory import require_directory
from .files import ROOT, read_facts, read_metrics, write, write_json, write_lines
from .flags import Flags, check_choice, check_range, check_requires, fill, parse, require
from .job import Job, due
from .memory import free_memory, peak_memory
from .optimizer import adamw, clip, linear, step
from .pictures import lines_picture, plotting
from .progress import brief, next_commands
from .ranks import device, environment
from .state import put_back, state_of
from .terminal import Visible, one_line, paint, show, visible

start = Job
