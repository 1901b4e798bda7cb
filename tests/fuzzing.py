"""The loop of the fuzzing programs: cases drawn from a seed and their number, till time is over."""

import argparse
import itertools
import time
from collections import Counter
from collections.abc import Callable, Sequence

MOST_FAILURES = 10


def parser(description: str) -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=description.splitlines()[0])
    found.add_argument("--seconds", type=float, default=60)
    found.add_argument("--seed", type=int, default=0)
    found.add_argument("--case", type=int, help="run this one alone and say how it was drawn")
    return found


def run(
    options: argparse.Namespace,
    command: str,
    run_case: Callable[[int], tuple[str, str | None, Sequence[str]]],
) -> int:
    """Run cases and count their kinds; return the exit status, 1 if one failed.

    ``run_case(number)`` returns a case's kind, what was wrong if anything was, and how it was
    drawn. ``command`` and ``--case N`` repeat one.
    """
    if options.case is not None:
        kind, wrong, facts = run_case(options.case)
        print(*facts, wrong or f"{kind}: right", sep="\n")
        return int(wrong is not None)
    kinds, failures, start, shown = Counter(), 0, time.monotonic(), 0.0
    for number in itertools.count():
        seconds = time.monotonic() - start
        if seconds >= options.seconds or failures == MOST_FAILURES:
            break
        if seconds >= shown + 0.5:
            shown = seconds
            print(f"\r{number} cases, {failures} failures, {seconds:.0f} s", end="", flush=True)
        kind, wrong, facts = run_case(number)
        kinds[kind] += 1
        if wrong is not None:
            failures += 1
            said = f"{'; '.join(facts[:1])}: {wrong.strip().splitlines()[-1]}"
            print(f"\r{command} --case {number}  # {said[:400]}", flush=True)
    print(f"\r{number} cases, {failures} failures, {seconds:.0f} s")
    for kind, count in sorted(kinds.items()):
        print(f"{count:8} {kind}")
    return int(failures > 0)
