"""How fast does a stage train? Runs it as it is, and measures whole steps from outside.

    python -m evaluate.watch sft.py --pretrain            everything behind the script is its own
    python -m evaluate.watch --stop 12 ppo.py --steps 32  killed after 12 steps

Prints a line of JSON after each step, about all steps but the first two, in which kernels are
compiled. A step is the time between two log lines, where the host reads its metrics.

    ms, median_ms           mean and median of a step
    trained_tokens_per_s    positions of forward passes with a gradient, padding included; of PPO
                            those of policy and critic both
    sampled_tokens_per_s    new tokens over the time of whole steps; generate_...: while sampling
    model_tflops            10^12 FLOP/s: forward 2 for each weight and position, backward 4;
                            attention up to the diagonal; the head for supervised tokens only;
                            nothing for what is computed a second time
    waits                   how often the host waits for the GPU in a step, and at which lines;
                            those of the metrics come with logging
"""

import json
import os
import runpy
import statistics
import sys
import time
import warnings
from collections import Counter
from pathlib import Path

import torch

import kernels
import run
from model import GPT, Linear

WARM_UP = 2  # steps


class Watch:
    """Counts what a stage does, and prints its speed after each step. stop: 0, or a step's number
    after which the process ends."""

    def __init__(self, stop):
        self.stop, self.cuda = stop, torch.cuda.is_available()
        self.steps = []  # of each step its totals
        self.places = Counter()  # file:line -> host waits there since the warm-up
        self.begin()

    def begin(self):
        self.began = time.perf_counter()
        self.totals = Counter()
        self.pending = []  # (number of tokens or keys, FLOPs of each), read at the step's end
        self.generating = False
        if self.cuda:
            torch.cuda.set_sync_debug_mode("warn")

    def start(self):
        """Puts itself around what a stage calls."""
        torch.nn.modules.module.register_module_forward_pre_hook(self.before_forward)
        for name in ("linear_logprob", "linear_token_loss"):
            setattr(kernels, name, self.around_head(getattr(kernels, name)))
        GPT.generate = self.around_generate(GPT.generate)
        run.Job.log = self.around_log(run.Job.log)
        if self.cuda:
            warnings.simplefilter("always")
            warnings.showwarning = self.around_warning(warnings.showwarning)

    def before_forward(self, model, inputs):
        if not isinstance(model, GPT) or self.generating:
            return
        ids, cache = (*inputs, None)[:2]  # (B, T)
        weights, attention = costs(model)
        trains = torch.is_grad_enabled() and any(p.requires_grad for p in model.parameters())
        passes = 3 if trains else 1  # a backward pass costs two forward passes
        self.totals["flops"] += passes * ids.numel() * weights
        if cache is None:
            self.totals["flops"] += passes * ids.numel() * (ids.shape[1] + 1) / 2 * attention
        else:  # Forks: a token sees those before it in its own sequence
            self.pending.append(((cache.positions + 1).sum(), passes * attention))
        self.totals["trained"] += ids.numel() * trains

    def around_head(self, function):
        def counted(hidden, weight, targets, *arguments, **options):
            passes = 3 if torch.is_grad_enabled() else 1
            number = (targets != -100).sum()  # a tensor: the host does not wait
            self.pending.append((number, passes * 2 * weight.numel()))
            return function(hidden, weight, targets, *arguments, **options)

        return counted

    def around_generate(self, function):
        def timed(model, prompts, *arguments, **options):
            began = time.perf_counter()
            self.generating = True  # a recorded step, replayed, calls no hook: counted below
            result = function(model, prompts, *arguments, **options)
            self.generating = False
            self.totals["generate_s"] += time.perf_counter() - began
            replies = result[0] if options.get("return_logprobs") else result
            self.totals["sampled"] += sum(map(len, replies))
            samples, (weights, attention) = options.get("samples", 1), costs(model)
            for i, n in enumerate(map(len, replies)):
                p, first = len(prompts[i // samples]), i % samples == 0  # reads the prompt for all
                read = n - 1 + p * first  # the last token is not read
                keys = (n - 1) * p + n * (n - 1) / 2 + p * (p + 1) / 2 * first
                head = 2 * n * model.head_weight.numel()
                self.totals["flops"] += read * weights + keys * attention + head
            return result

        return timed

    def around_warning(self, function):
        def counted(message, category, filename, line, *rest):
            if "synchronizing CUDA operation" not in str(message):
                return function(message, category, filename, line, *rest)
            self.totals["waits"] += 1
            if len(self.steps) >= WARM_UP:
                self.places[f"{'/'.join(Path(filename).parts[-2:])}:{line}"] += 1

        return counted

    def around_log(self, function):
        def logged(job, step, **values):
            waits = self.totals["waits"]
            function(job, step, **values)
            self.totals["waits_of_metrics"] = self.totals["waits"] - waits
            if self.cuda:
                torch.cuda.set_sync_debug_mode("default")  # the waits below are not the stage's
                torch.cuda.synchronize()
            self.totals["s"] = time.perf_counter() - self.began
            self.totals["flops"] += sum(int(number) * flops for number, flops in self.pending)
            self.steps.append(self.totals)
            if len(self.steps) > WARM_UP:
                run.show(json.dumps({"name": job.stage} | self.summary(job)))
            if len(self.steps) == self.stop:
                os._exit(0)  # a kill: nothing is cleaned up
            self.begin()

        return logged

    def summary(self, job):
        steps = self.steps[WARM_UP:]
        total = sum(steps, Counter())
        result = {"steps": len(steps), "ms": round(1e3 * total["s"] / len(steps), 2)}
        result["median_ms"] = round(1e3 * statistics.median(step["s"] for step in steps), 2)
        times = {"trained": "s", "sampled": "s", "generate": "generate_s"}
        total["generate"] = total["sampled"]
        for name, seconds in times.items():
            if total[name]:
                result[f"{name}_tokens_per_s"] = round(total[name] / total[seconds], 1)
        result["model_tflops"] = round(total["flops"] / total["s"] / 1e12, 4)
        result["dtype"] = str(job.dtype).removeprefix("torch.")
        result["peak_memory_mib"] = round(job.peak())
        if self.cuda:
            for name in ("waits", "waits_of_metrics"):
                result[name] = round(total[name] / len(steps), 1)
            places = self.places.most_common(8)
            result["waits_at"] = {place: round(n / len(steps), 1) for place, n in places}
        return result


def costs(model):
    """-> FLOPs of a forward pass for each token, and for each key that a token sees."""
    config = model.config
    weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, Linear))
    return 2 * weights, 4 * config.layers * config.heads * config.head_dim


def main(words):
    """words: [--stop N] SCRIPT FLAGS..."""
    stop = 0
    if words[:1] == ["--stop"]:
        run.require("".join(words[1:2]).isdigit(), "--stop needs the number of a step")
        stop, words = int(words[1]), words[2:]
    exists = words and (run.ROOT / words[0]).is_file()
    run.require(exists, "name a stage's script and its flags: python -m evaluate.watch sft.py")
    Watch(stop).start()
    sys.argv = words
    runpy.run_path(str(run.ROOT / words[0]), run_name="__main__")


if __name__ == "__main__":
    if sys.argv[1:] in ([], ["-h"], ["--help"]):
        run.show(__doc__)
    else:
        try:
            main(sys.argv[1:])
        except (ValueError, OSError) as error:
            run.command.complain(error)
