"""A long PPO run, with its memory watched: does anything grow?

    python -m tests.soak --minutes 120         after the main command: needs out/sft, out/reward

Trains the default run, but with more iterations than the time allows, on a file of 5,000 prompts
(the default asks new ones in every iteration, and holds them all), and a state every 20 of them.
Every ten seconds it reads what the process holds (VmRSS in MiB, Linux only) and the files that it
has open. Prints the median of each sixth of the time: a leak shows as a rise from one to the next.
The run is ended by SIGTERM, so it also stops as a terminated run should, with a state to go on
from. Exit code 1 if the last sixth's median is over 2 % above the second's: in the first one the
allocator still meets the first long batches.
"""

import argparse
import contextlib
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
ALLOWED = 1.02  # the last sixth's median by the second's


def resident(pid):
    """MiB of memory that process `pid` holds in RAM."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024
    return None  # it has ended


def watch(process, minutes):
    """Samples (MiB, open files) of a running process, one every ten seconds."""
    samples, end = [], time.monotonic() + 60 * minutes
    while time.monotonic() < end:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=min(10, max(0, end - time.monotonic())))
            break  # it has ended by itself
        held = resident(process.pid)
        if held:
            samples.append((held, len(os.listdir(f"/proc/{process.pid}/fd"))))
    return samples


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=120, help="at least 1")
    parser.add_argument("--init", default="out/sft")
    parser.add_argument("--reward", default="out/reward")
    args = parser.parse_args()
    inputs = ["--init", Path(args.init).resolve(), "--reward", Path(args.reward).resolve()]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "soak"
        files = ["-m", "data.world", "--out", folder, "--documents", 1, "--demonstrations", 1]
        train = ["ppo.py", *inputs, "--data", Path(folder) / "prompts.jsonl", "--out", out]
        train += ["--steps", 10**6, "--save-every", 20, "--device", "cpu"]
        command = [[sys.executable, *map(str, words)] for words in (files, train)]
        with (Path(folder) / "log").open("w") as log:
            subprocess.run(command[0], cwd=ROOT, stdout=log, stderr=log, check=True)
            process = subprocess.Popen(command[1], cwd=ROOT, stdout=log, stderr=log)
            try:
                samples = watch(process, args.minutes)
                process.send_signal(signal.SIGTERM)
                code = process.wait(timeout=600)
            finally:
                process.kill()  # it would train for weeks
                process.wait()
        last = (Path(folder) / "log").read_text().splitlines()[-1]
    print(f"{args.minutes:g} minutes, exit code {code}: {last}")
    if code != 128 + signal.SIGTERM:
        sys.exit("the run did not end as a terminated run should: see its last line above")
    if len(samples) < 6:
        sys.exit("too few samples: give more --minutes")
    sys.exit(report(samples) > ALLOWED)


def report(samples):
    """Prints each sixth of the samples -> the last sixth's median by the second's."""
    size = len(samples) // 6
    medians = []
    for i in range(6):
        held, files = zip(*samples[size * i : size * (i + 1)], strict=True)
        medians.append(statistics.median(held))
        print(f"sixth {i + 1}: median {medians[-1]:.1f} MiB ({min(held):.1f} to ", end="")
        print(f"{max(held):.1f}), at most {max(files)} open files")
    growth = medians[-1] / medians[1]
    print(f"last / second sixth: {growth:.4f}")
    return growth


if __name__ == "__main__":
    main()
