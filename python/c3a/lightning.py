"""For Lightning: checkpoints without the frozen base, and the adapter alone when training ends."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

from .adapter import save_adapter
from .distributed import is_sharded
from .patch import patched_part
from .trained import give_without_base, take_without_base

try:
    from lightning.pytorch import Callback
except ImportError:
    try:
        from pytorch_lightning import Callback
    except ImportError as _error:
        raise ImportError(
            "c3a.lightning needs the lightning library: pip install 'c3a[lightning]'"
        ) from _error

__all__ = ["AdapterCallback"]


class AdapterCallback(Callback):
    """Keep the frozen base out of Lightning's checkpoints, and save the adapter as training ends.

    What ``ModelCheckpoint`` and ``save_checkpoint`` write then holds what is trained, beside the
    optimizer's state and the trainer's. ``fit(..., ckpt_path=...)`` resumes from it; the base is
    what the module has. The adapter goes into ``<folder>/adapter``, for ``c3a.load_adapter``
    and PEFT. (``LightningModule.load_from_checkpoint`` knows of no callbacks: ``strict=False``.)

    Args:
        folder: where to; by default the trainer's ``default_root_dir``.
        task_type: as for ``c3a.save_adapter``.

    Raises:
        ValueError: when it begins, the module has no patched model, or several. When training ends,
            what ``c3a.save_adapter`` raises.

    Example::

        module.model = c3a.patch_model(model, "all-linear", "auto")
        Trainer(callbacks=[c3a.lightning.AdapterCallback("runs/mine")]).fit(module, data)
    """

    folder: Path | None
    task_type: str | None

    def __init__(self, folder: str | Path | None = None, *, task_type: str | None = None) -> None:
        self.folder = None if folder is None else Path(folder)
        self.task_type = task_type
        self._hooks = ExitStack()

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        patched_part(pl_module, "c3a.lightning.AdapterCallback")
        self._hooks.close()
        give_without_base(pl_module, self._hooks)
        take_without_base(pl_module, self._hooks)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._hooks.close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._hooks.close()

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        part = patched_part(pl_module, "c3a.lightning.AdapterCallback")
        if trainer.is_global_zero or is_sharded(part):
            folder = Path(trainer.default_root_dir) if self.folder is None else self.folder
            save_adapter(part, folder / "adapter", task_type=self.task_type)
