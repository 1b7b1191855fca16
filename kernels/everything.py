"""All that a GPU can tell this project, in a quarter of an hour and one command:

    python -m kernels.bench --everything --minutes 13            a CPU rehearses it in small sizes
    python -m kernels.bench --everything --steps "model: 1B"    only steps whose names begin so, and
                                                                 what they need

A step is a command in a process of its own, with a deadline. A crash costs that step alone, and a
step that hangs is killed with every process that it started. When time runs short the last steps
are dropped. A step's results are the lines of its output that are JSON objects with a "name". Each
is in everything/<device>.json, in the directory of the results, as soon as it is printed; the whole
output is in <device>.log beside it. The rows of kernels.bench are in its own file, as ever. Another
run replaces the steps that it starts and leaves the others as they are."""

import contextlib
import datetime
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from .steps import ROOT, all_steps

SHORTEST = 15  # seconds: a step starts if so much time is left, or all of its own


def run_step(step, seconds, log, keep):
    """Runs a step -> "ok" or "failed: why". keep(line) is called for each line of its output, and
    the log gets it all."""
    command = [sys.executable, *map(str, step.words)]
    print(f"\n=== {step.name}: {' '.join(map(str, step.words))}", file=log, flush=True)
    options = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.PIPE)
    options |= dict(text=True, encoding="utf-8", errors="replace", cwd=ROOT)
    # a session of its own: whatever it starts can be killed with it
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, start_new_session=True, env=environment, **options)

    def read():
        for line in process.stdout:
            log.write(line)
            log.flush()
            try:
                keep(line)
            except Exception as error:  # a full disk; a step whose output is not read would stop
                log.write(f"=== not kept: {error!r}\n")

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        with contextlib.suppress(BrokenPipeError):  # a step that reads nothing
            process.stdin.write(step.typed)
            process.stdin.close()
        code = process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        code = None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # stuck in the driver: go on
            process.wait(timeout=5)
        reader.join(timeout=5)
    if code is None:
        return f"failed: killed at its deadline of {seconds:.0f} s"
    return "ok" if code == 0 else f"failed: exit code {code}"


def run_steps(steps, seconds, path):
    """Runs the steps within that time, writing results to the JSON file `path` as they come
    -> {name: (status, seconds)}."""
    ends = time.monotonic() + seconds
    path.parent.mkdir(parents=True, exist_ok=True)
    record = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    statuses = {}
    with path.with_suffix(".log").open("a", encoding="utf-8") as log:
        for step in steps:
            left = ends - time.monotonic()
            if step.module and importlib.util.find_spec(step.module) is None:
                statuses[step.name] = f"skipped: {step.module} is not installed", 0.0
            elif left < min(SHORTEST, step.seconds):
                statuses[step.name] = f"dropped: {max(0, left):.0f} s left", 0.0
            else:
                statuses[step.name] = record_step(step, min(left, step.seconds), log, record, path)
            status, took = statuses[step.name]
            print(f"{step.name:34} {took:6.1f} s  {status}", flush=True)
    return statuses


def record_step(step, seconds, log, record, path):
    """run_step, with its results under the step's name in `record` -> status, seconds."""
    today = datetime.date.today().isoformat()
    earlier = record.get(step.name, {}).get("results", {})
    entry = {"date": today, "status": "running", "last_line": "", "results": earlier}
    record[step.name] = entry
    results = {}  # of this run

    def keep(line):
        result = {}
        with contextlib.suppress(json.JSONDecodeError):
            result = json.loads(line) if line.startswith("{") else {}
        if "name" not in result:
            entry["last_line"] = line.strip()[:200] or entry["last_line"]
        else:
            name = result.pop("name")
            results[name] = result | utilisation(result, record) | {"date": today}
            entry["results"] = earlier | results
            write(record, path)

    began = time.monotonic()
    entry["status"] = run_step(step, seconds, log, keep)
    if entry["status"] != "ok" and entry["last_line"]:
        entry["status"] += f": {entry['last_line']}"
    entry["seconds"] = round(time.monotonic() - began, 1)
    write(record, path)
    for name, result in results.items():
        print(f"  {name}: {json.dumps(result)}")
    return entry["status"], entry["seconds"]


def utilisation(result, record):
    """A model's share of the speed of a large matrix product on this device."""
    ceilings = record.get("ceilings", {}).get("results", {}).get("ceilings", {})
    ceiling = ceilings.get(f"{result.get('dtype')}_tflops")
    if not ceiling or "model_tflops" not in result:
        return {}
    return {"mfu": round(result["model_tflops"] / ceiling, 4)}


def write(record, path):
    """The file is whole at any time: a machine may be taken away."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def selected(steps, names):
    """The steps whose names begin so, and those that they need."""
    chosen = {step.name for step in steps if step.name.startswith(tuple(names))}
    for step in reversed(steps):  # what a step needs comes before it
        chosen.update(step.needs if step.name in chosen else ())
    return [step for step in steps if step.name in chosen]


def everything(options, path):
    """kernels.bench --everything: runs the steps and prints how each has ended -> the exit code, 1
    if a step has failed."""
    ends = time.monotonic() + 60 * options.minutes
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # kills the step that runs, too
    # a process that outlives its step may still write there
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as work:
        cuda = options.device == "cuda"
        steps = all_steps(cuda, options.out.resolve(), Path(work), options.peers)
        if options.steps:
            steps = selected(steps, options.steps)
        statuses = run_steps(steps, ends - time.monotonic(), path)
    print("\n" + "\n".join(f"{name:34} {s:6.1f} s  {text}" for name, (text, s) in statuses.items()))
    if not cuda:
        print("no CUDA device: a rehearsal in small sizes, without the GPU tests")
    print(f"written to {path}")
    return int(any(text.startswith("failed") for text, _ in statuses.values()))
