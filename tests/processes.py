"""Checks that run in several processes of torch.distributed, by gloo on this machine."""

import json
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

Check = Callable[[Path], None]


def _process(rank: int, count: int, folder: Path, checks: Sequence[Check]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=count,
        timeout=timedelta(seconds=30),
    )
    said = {}
    for check in checks:
        torch.manual_seed(0)
        try:
            check(folder)
            said[check.__name__] = ""
        except BaseException:  # pytest's failures are no Exceptions
            said[check.__name__] = traceback.format_exc()
    (folder / f"said-{rank}.json").write_text(json.dumps(said))
    dist.destroy_process_group()


def errors_in(count: int, checks: Sequence[Check], folder: Path) -> dict[str, str]:
    """Run checks one after the other in ``count`` processes; return what failed, by check.

    One start of processes, which takes seconds, serves them all. The checks are functions of a
    module that the processes can import; each gets a folder that is the same in all.
    """
    try:
        torch.multiprocessing.spawn(_process, (count, folder, checks), nprocs=count)
    except torch.multiprocessing.ProcessExitedException as error:
        # Seen now and then as torch's processes end, whatever they ran: once more, then it counts.
        print(f"a process ended by itself, all start again: {error}")
        torch.multiprocessing.spawn(_process, (count, folder, checks), nprocs=count)
    said = [json.loads((folder / f"said-{rank}.json").read_text()) for rank in range(count)]
    return {
        check.__name__: next(filter(None, (errors[check.__name__] for errors in said)), "")
        for check in checks
    }
