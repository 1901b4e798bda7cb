"""For ``transformers.Trainer``: saving adapters alone while it trains."""

import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .adapter import save_adapter
from .adapter_files import WEIGHTS
from .distributed import is_sharded
from .patch import adapters
from .sizes import is_count

if TYPE_CHECKING:
    from transformers import TrainerState

try:
    from transformers import TrainerCallback
except ImportError as _error:
    raise ImportError(
        "c3a.trainer needs the transformers library: pip install 'c3a[finetune]'"
    ) from _error

__all__ = ["AdapterCallback"]


class AdapterCallback(TrainerCallback):
    """Save the adapter alone, again and again while Trainer trains a patched model.

    Each goes into ``<folder>/adapter-<step>``, and when training ends into ``<folder>/adapter``
    (with ``load_best_model_at_end`` that is the best one). ``c3a.load_adapter`` and PEFT load them.
    With ``save_strategy="no"`` Trainer writes nothing else; only its own checkpoints can be resumed
    from.

    Args:
        folder: where to; by default Trainer's ``output_dir``.
        every: ``"epoch"``, or a number of steps.
        keep: how many of the newest to keep beside the last, ``<folder>/adapter``; by default all.
        task_type: as for ``c3a.save_adapter``.

    Raises:
        ValueError: ``every`` or ``keep`` is out of range; and when training begins, the model is
            not patched. While it trains, what ``c3a.save_adapter`` raises.

    Example::

        c3a.patch_model(model, "all-linear", "auto", modules_to_save=["classifier"])
        callback = AdapterCallback(every=100, keep=2)
        Trainer(model, args, train_dataset=data, callbacks=[callback]).train()
    """

    folder: Path | None
    every: str | int
    keep: int | None
    task_type: str | None

    def __init__(
        self,
        folder: str | Path | None = None,
        every: str | int = "epoch",
        *,
        keep: int | None = None,
        task_type: str | None = None,
    ) -> None:
        if every != "epoch" and not is_count(every):
            raise ValueError(
                "c3a.trainer.AdapterCallback: expected every to be 'epoch' or a number of steps "
                f">= 1, got {every!r}"
            )
        if keep is not None and not is_count(keep):
            raise ValueError(
                f"c3a.trainer.AdapterCallback: expected keep to be a number >= 1, got {keep!r}"
            )
        self.folder = None if folder is None else Path(folder)
        self.every, self.keep, self.task_type = every, keep, task_type

    def on_train_begin(
        self, args: Any, state: "TrainerState", control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        if not adapters(model):
            raise ValueError(
                "c3a.trainer.AdapterCallback: the model has no C3ALinear layer; patch it before "
                "training"
            )

    def on_step_end(
        self, args: Any, state: "TrainerState", control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        if isinstance(self.every, int) and state.global_step % self.every == 0:
            self._save_step(args, state, model)

    def on_epoch_end(
        self, args: Any, state: "TrainerState", control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        if self.every == "epoch":
            self._save_step(args, state, model)

    def on_train_end(
        self, args: Any, state: "TrainerState", control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero or is_sharded(model):
            save_adapter(model, self._folder(args) / "adapter", task_type=self.task_type)

    def _folder(self, args: Any) -> Path:
        return Path(args.output_dir) if self.folder is None else self.folder

    def _save_step(self, args: Any, state: "TrainerState", model: Any) -> None:
        if not (state.is_world_process_zero or is_sharded(model)):
            return
        folder = self._folder(args)
        save_adapter(model, folder / f"adapter-{state.global_step}", task_type=self.task_type)
        if self.keep and state.is_world_process_zero:
            # by time: a run that was resumed may meet later steps of the one before it
            saved = [path for path in folder.iterdir() if re.fullmatch(r"adapter-\d+", path.name)]
            saved.sort(key=lambda path: (path / WEIGHTS).stat().st_mtime_ns)
            for old in saved[: -self.keep]:
                shutil.rmtree(old)
