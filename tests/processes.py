"""Checks that run in several processes of torch.distributed, by gloo on this machine."""

import json
import os
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
        timeout=timedelta(seconds=120),  # of a busy machine's processes one may be far behind
    )
    said, store = {}, dist.FileStore(str(folder / "said"), count)
    for check in checks:
        torch.manual_seed(0)
        try:
            check(folder)
            error = ""
        except BaseException:  # pytest's failures are no Exceptions
            error = traceback.format_exc()
        said[check.__name__] = error
        store.set(f"{check.__name__}-{rank}", error)
        # After an error the processes' collectives do not match any more, which gloo answers by
        # ending a process without a word of that error.
        if error or any(store.get(f"{check.__name__}-{other}") for other in range(count)):
            break
    (folder / f"said-{rank}.json").write_text(json.dumps(said))
    # DTensor's caches keep the group's threads beyond destroy_process_group. One that lets go of a
    # tensor while the interpreter ends is ended by it, and with it the process (pytorch #190489).
    os._exit(0)


def errors_in(count: int, checks: Sequence[Check], folder: Path) -> dict[str, str]:
    """Run checks one after the other in ``count`` processes; return what failed, by check.

    One start of processes, which takes seconds, serves them all. The checks are functions of a
    module that the processes can import; each gets a folder that is the same in all. After one that
    fails no other is run.
    """
    torch.multiprocessing.spawn(_process, (count, folder, checks), nprocs=count)
    said = [json.loads((folder / f"said-{rank}.json").read_text()) for rank in range(count)]
    return {
        check.__name__: "\n".join(
            filter(
                None, (errors.get(check.__name__, "not run after those before") for errors in said)
            )
        )
        for check in checks
    }
