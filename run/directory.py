"""A run's directory. A run works in DIR.partial, which is renamed to DIR once its checkpoint is
complete: a killed run leaves the earlier DIR untouched, and DIR never holds half a checkpoint.
DIR.partial.lock keeps a second process out.

DIR: config.json, model.safetensors, the tokenizer, run.json (every flag, seed, versions, git
commit, memory), metrics.jsonl and curves.png; of ppo.py also tokens.json, a reply token by token.
"""

import contextlib
import dataclasses
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from . import lock
from .files import GO_ON, ROOT, read_facts, refusal, write_json, writing
from .flags import flag_name, require
from .ranks import environment
from .renames import FIRST_FILES, exchange, flush, is_mount, remove

# Flags that do not change the result, so --resume accepts other values than the killed run had.
FREE = {"out", "overwrite", "resume", "save_every", "device"}


def require_directory(directory, source, remedy):
    """Raises ValueError unless the directory exists. source: the flag or file that names it."""
    name = str(directory)
    folder, _, model = name.partition("/")
    if re.fullmatch(r"\w[\w.-]*", model) and folder != "out" and not Path(folder).exists():
        hub = f"hf download {name} --local-dir DIR"  # such as Qwen/Qwen2.5-0.5B
        remedy = (
            f"nothing is downloaded here: if it is on the hub, run `{hub}` and name DIR instead"
        )
    missing = f"{source} {name}: there is no such directory"
    require(name and Path(name).is_dir(), f"{missing}; {remedy}")


def check_inputs(config):
    """Raises ValueError if a checkpoint that a flag names does not exist."""
    for name in ("init", "judge", "teacher"):
        value = getattr(config, name, "")
        if value not in ("", "scratch", "world"):
            require_directory(value, flag_name(name), "run the stage before, or name a checkpoint")


def is_complete(place):
    """Whether the run in a directory has come to its end: it knows how long it took."""
    return (place / "run.json").exists() and "seconds" in read_facts(place)


class Directory:
    def __init__(self, config, stage, writes=True):
        """Locks the directory if this process `writes` it, and ends what a kill has interrupted.
        Raises ValueError if --out may not be written: another process writes it, it holds files
        other than a run's, or a run that no flag allows to replace."""
        self.config, self.stage = config, stage
        self.out = Path(config.out or f"out/{stage}")
        nameless = f"--out {self.out} has no name: name a directory of the run's own"
        require(self.out.name not in ("", ".."), nameless)
        ours = f"--out {self.out}: names with this ending are for runs at work: name another"
        require(not self.out.name.endswith((".partial", ".lock")), ours)
        try:
            if self.out.is_symlink():
                self.out = self.out.resolve()  # a link to a larger disk stays a link
            self.partial = self.out.with_name(self.out.name + ".partial")
            if writes:
                holder = lock.take(self.partial.with_name(self.partial.name + ".lock"))
                remedy = "wait until it ends, or name another directory"
                require(not holder, f"--out {self.out}: {holder} is writing it: {remedy}")
                self.repair()
            for place in (self.out, self.partial):
                self.check(place)
        except OSError as error:
            wrong = f"--out {self.out} cannot be written ({refusal(error)})"
            raise ValueError(f"{wrong}: name another directory") from None

    def check(self, place):
        """Raises ValueError if DIR or DIR.partial may not be replaced, or could not be renamed."""
        if not place.exists():
            return
        mounted = f"--out {self.out}: {place} is a mount point, which cannot be renamed"
        require(not is_mount(place), f"{mounted}: name a directory inside it")
        folder = place.is_dir() and not place.is_symlink()
        names = {path.name for path in place.iterdir()} if folder else {None}
        if not names or (place == self.partial and names <= FIRST_FILES):
            return
        foreign = f"--out {self.out}: {place} holds files that are no run of ours"
        is_run = {"run.json", "metrics.jsonl"} <= names
        require(is_run, f"{foreign}: name another directory")
        inner = [path.parent.name for path in place.glob("*/run.json")]
        nested = f"--out {self.out}: {place} also holds the run {''.join(inner[:1])}"
        require(set(inner) <= {"replaced"}, f"{nested}: name another directory")
        locked = f"--out {self.out} cannot be written (permission denied)"
        require(os.access(place, os.W_OK), f"{locked}: name another directory")
        finished = (
            f"--out {self.out}: the run in {self.partial} is complete but for its last rename"
        )
        keep = place == self.partial and is_complete(place)
        allowed = self.config.overwrite or self.config.resume
        require(allowed or not keep, f"{finished}: pass --resume to end it, or --overwrite")
        replace = not self.config.out or allowed
        taken = f"--out {self.out} already holds a run: name another directory"
        require(replace or place == self.partial, f"{taken} or pass --overwrite")

    def check_resume(self, device):
        """Finds the run that --resume continues -> its run.json, and whether it is complete. Raises
        ValueError if there is none, or if its flags or kind of device are other ones."""
        clash = "--resume goes on with a run and --overwrite begins another"
        require(not self.config.overwrite, f"{clash}: leave one of them out")
        places = (self.out,) if self.published() else (self.partial, self.out)
        place = next((place for place in places if (place / "run.json").exists()), None)
        nothing = f"--resume: neither {self.partial} nor {self.out} holds a run"
        require(place, f"{nothing}: leave --resume out to begin one")
        remedy = "leave --resume out to begin anew"
        facts = read_facts(place, stage=str, flags=dict, device=str)
        other = f"--resume: {place} is no run of {self.stage}: name another directory"
        require(facts.get("stage") == self.stage, f"{other}, or {remedy}")
        for name, value in dataclasses.asdict(self.config).items():
            before = facts["flags"].get(name)
            changed = f"--resume: {place} was run with {flag_name(name)} {before!r}, not {value!r}"
            same = name in FREE or before == value
            require(same, f"{changed}: give the same flags, or {remedy}")
        kind = "cpu" if facts["device"].startswith("cpu") else "cuda"
        moved = f"--resume: {place} was run on {kind}, and this is {device}"
        require(kind == device.type, f"{moved}: name that --device, or {remedy}")
        ranks = environment("WORLD_SIZE", 1)
        before = facts.get("ranks", ranks)
        others = f"--resume: {place} was run in {before} processes, not {ranks}"
        require(before == ranks, f"{others}: start as many, or {remedy}")
        complete = place == self.out
        halfway = f"--resume: {self.out} is a run that has not ended"
        ended = "seconds" in facts or not complete
        require(ended, f"{halfway}: rename it to {self.partial}, or {remedy}")
        return facts, complete

    def open(self, size=None):
        """Makes DIR.partial and opens metrics.jsonl. size: bytes to keep (None: a new run)."""
        path = self.partial / "metrics.jsonl"
        resumed = size is not None
        with writing(self.partial, GO_ON if resumed else "name another directory"):
            if resumed:
                os.truncate(path, size)
            else:
                remove(self.partial)
                self.partial.mkdir(parents=True)
            # a whole line at a time; open until the run's end
            self.metrics = open(path, "a", buffering=1, encoding="utf-8")  # noqa: SIM115

    def write_metrics(self, row):
        """One more line of metrics.jsonl."""
        with writing(self.partial / "metrics.jsonl", GO_ON):
            print(json.dumps(row), file=self.metrics)

    def write_facts(self, device, facts):
        """Writes run.json: all that is needed to run this again."""
        ask = ["git", "-C", ROOT, "rev-parse", "HEAD"]
        git = shutil.which("git")
        commit = subprocess.run(ask, capture_output=True, text=True).stdout if git else ""
        cpu = f"cpu, {torch.get_num_threads()} threads"
        about = {
            "stage": self.stage,
            "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
            "flags": dataclasses.asdict(self.config),
            "seed": self.config.seed,
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu,
            "git_commit": commit.strip() or None,
        }
        write_json(self.partial / "run.json", about | facts)

    def publish(self):
        """DIR.partial becomes DIR, and an earlier DIR is deleted. Where the system cannot exchange
        both in one call, a kill may come between two renames: see `repair`."""
        remedy = f"the run is complete in {self.partial}: rename it yourself"
        try:
            self.check(self.out)  # hours after the first time
        except ValueError as error:
            raise ValueError(f"{error}; {remedy}") from None
        with writing(self.out, remedy):
            flush(self.partial)  # before the earlier run and this one's state are deleted
            earlier = self.out.exists()
            if not (earlier and exchange(self.partial, self.out)):
                if earlier:  # moved inside the new run: a third name might be somebody's
                    os.replace(self.out, self.partial / "replaced")
                os.replace(self.partial, self.out)
        self.clear()

    def clear(self):
        """Deletes what a published run has replaced. state.pt goes last: while it is there, this is
        not finished."""
        with contextlib.suppress(OSError):
            remove(self.partial)
            remove(self.out / "replaced")
            (self.out / "state.pt").unlink(missing_ok=True)

    def published(self):
        """Whether a kill interrupted `publish` when DIR was the new run already: something of it is
        left, and in DIR.partial at most a finished run, the one that it replaced."""
        left = (self.out / "state.pt").exists() or (self.out / "replaced").exists()
        if not left or (self.partial / "state.pt").exists() or not is_complete(self.out):
            return False
        return not (self.partial / "run.json").exists() or is_complete(self.partial)

    def repair(self):
        """Ends a `publish` that a kill interrupted."""
        if (self.partial / "replaced").exists() and not self.out.exists():
            os.replace(self.partial, self.out)
        if self.published():
            self.clear()
