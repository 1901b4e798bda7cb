"""Instruction-set levels against each other: a process each, in turns.

As a script: prints the seconds of the operator's f+b at the shapes given, for the level in use.
"""

import json
import os
import subprocess
import sys

import torch
from rich.progress import track

from c3a._library import cpu_level
from operators import QUICK, SHAPES, Case, shape_name
from report import Mark, Result
from timing import Run

LEVELS = ["x86-64-v4-bf16", "x86-64-v4", "x86-64-v3", "x86-64-v2"]


def bench_levels(run: Run) -> Result:
    """The best level for float32 against the one below it."""
    best = cpu_level()
    if best == LEVELS[0]:  # float32 is the next one's
        best = LEVELS[1]
    if best not in LEVELS[:-1]:
        return Result()
    below = LEVELS[LEVELS.index(best) + 1]
    shapes = [QUICK] if run.quick else SHAPES
    turns: dict[str, list[list[float]]] = {best: [], below: []}
    for _ in track(range(1 if run.quick else 3), "instruction sets", transient=True):
        for level, runs in turns.items():
            command = [sys.executable, __file__, json.dumps([run.rounds, run.own_time, shapes])]
            environment = {**os.environ, "C3A_CPU_LEVEL": level}
            child = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE)
            runs.append(json.loads(child.stdout))
    result = Result(raw=[{"shapes": shapes, "seconds": turns}])
    for i, shape in enumerate(shapes):
        ratio = min(run[i] for run in turns[below]) / min(run[i] for run in turns[best])
        what = f"f+b, {shape_name(shape)}: {below} / {best}"
        result.marks.append(Mark(what, ratio, 2.2))
    return result


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rounds, own_time, shapes = json.loads(sys.argv[1])
    run = Run(rounds, own_time=own_time)
    cases = [Case(*shape) for shape in shapes]
    print(json.dumps([run.measure(case.both("C3A"))["C3A"] for case in cases]))
