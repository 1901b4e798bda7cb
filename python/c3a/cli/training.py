"""One fine-tuning run on ``transformers.Trainer``: the model is an ordinary model to it."""

import math
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.table import Table
from torch import Tensor, nn

from ..memory import saved_for_backward
from .data import Examples
from .failures import working_on

Row = dict[str, Any]  # a text as a model takes it, by the names of its arguments
_VALIDATIONS = 4  # in a run; the best of them gives the parameters that are tested


@dataclass
class Result:
    """What a run found. Accuracies are fractions, times seconds, memory bytes."""

    adapter_parameters: int
    head_parameters: int
    test_accuracy: float
    test_standard_error: float
    validation_accuracy: float
    seconds_per_step: float
    saved_bytes: int
    steps: int
    losses: list[tuple[int, float]]
    validations: list[tuple[int, float]]

    def metrics(self) -> dict[str, Any]:
        return dict(vars(self))


@dataclass
class _Progress(transformers.trainer_callback.ProgressCallback):
    """The progress bar, and what a run leaves behind: times, losses, the best parameters."""

    losses: list[tuple[int, float]] = field(default_factory=list)
    validations: list[tuple[int, float]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    best: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()
        self.training_bar: Any  # which transformers says nothing of
        self.prediction_bar: Any

    def on_step_begin(
        self, args: Any, state: transformers.TrainerState, control: Any, **kwargs: Any
    ) -> None:
        self._start = time.perf_counter()

    def on_step_end(
        self, args: Any, state: transformers.TrainerState, control: Any, **kwargs: Any
    ) -> None:
        self.seconds.append(time.perf_counter() - self._start)
        super().on_step_end(args, state, control, **kwargs)  # type: ignore[no-untyped-call]

    def on_log(
        self,
        args: Any,
        state: transformers.TrainerState,
        control: Any,
        logs: Any = None,
        **kwargs: Any,
    ) -> None:
        check_finite(logs, state.global_step)
        if "loss" in logs:
            self.losses.append((state.global_step, float(logs["loss"])))
        if "eval_accuracy" in logs:
            self.validations.append((state.global_step, logs["eval_accuracy"]))
        if self.training_bar is not None and self.losses:
            shown = {"loss": f"{self.losses[-1][1]:.3f}"}
            if self.validations:
                shown["validation"] = f"{100 * self.validations[-1][1]:.1f} %"
            self.training_bar.set_postfix(shown)

    def close(self) -> None:
        """Leave the line of the terminal that the bars stand in."""
        for bar in (self.training_bar, self.prediction_bar):
            if bar is not None:
                bar.close()

    def on_evaluate(
        self,
        args: Any,
        state: transformers.TrainerState,
        control: Any,
        model: Any = None,
        metrics: Any = None,
        **kwargs: Any,
    ) -> None:
        super().on_evaluate(args, state, control, **kwargs)  # type: ignore[no-untyped-call]
        if metrics["eval_accuracy"] > max((a for _, a in self.validations[:-1]), default=-1.0):
            self.best = {
                name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad
            }


def check_finite(logs: Mapping[str, float], step: int) -> None:
    """Raise ValueError for a loss that is infinite or not a number."""
    for name, value in logs.items():
        if name.endswith("loss") and not math.isfinite(value):
            raise ValueError(
                f"the loss is {value} after {step} steps; nothing was written; a smaller --lr or "
                "--head-lr may help"
            )


def quiet_libraries(seed: int) -> None:
    """Seed every generator, and leave the terminal to the progress bar and the table."""
    transformers.set_seed(seed)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def encode(
    examples: Examples,
    model: nn.Module,
    tokenizer: transformers.PreTrainedTokenizerBase,
    max_length: int,
) -> list[Row]:
    """Return the examples as the model takes them, or ValueError if it cannot take the longest."""
    special = tokenizer.num_special_tokens_to_add()
    if max_length <= special:
        raise ValueError(
            f"expected --max-length > {special}, the special tokens of this model, got {max_length}"
        )
    encoded = tokenizer(examples.texts, truncation=True, max_length=max_length)
    rows = [{name: encoded[name][row] for name in encoded} for row in range(len(examples))]
    longest = max(rows, key=lambda row: len(row["input_ids"]))
    tokens = len(longest["input_ids"])
    inputs = tokenizer.pad([longest], return_tensors="pt")
    # Tried, since a configuration's numbers do not always tell.
    cannot = f"the model cannot take a text of {tokens} tokens (--max-length)"
    with working_on(cannot), torch.no_grad():
        model(**inputs)
    return [{**row, "labels": label} for row, label in zip(rows, examples.labels, strict=True)]


def train(
    model: nn.Module,
    tokenizer: transformers.PreTrainedTokenizerBase,
    splits: tuple[list[Row], list[Row], list[Row]],
    *,
    head: list[str],
    lr: float | None,
    head_lr: float,
    epochs: float,
    steps: int | None,
    batch_size: int,
    seed: int,
    compile: bool,
) -> Result:
    """Train on the first split, choose by the second, and report on the third."""
    train, validation, test = splits
    total = steps or math.ceil(epochs * math.ceil(len(train) / batch_size))
    is_head = _in_modules(head)
    parameters = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    in_adapter = [p for name, p in parameters if not is_head(name)]
    in_head = [p for name, p in parameters if is_head(name)]
    groups: list[dict[str, Any]] = [{"params": in_adapter, "lr": lr}] if in_adapter else []
    optimizer = torch.optim.AdamW([*groups, {"params": in_head, "lr": head_lr}], weight_decay=0.0)
    progress = _Progress()
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
        # pin_memory without a GPU, said by torch on Trainer's behalf
        warnings.filterwarnings("ignore", message=".*pin_memory.*")
        trainer = transformers.Trainer(
            model=model,
            args=transformers.TrainingArguments(
                output_dir=scratch,
                max_steps=total,
                per_device_train_batch_size=batch_size,
                per_device_eval_batch_size=4 * batch_size,
                train_sampling_strategy="group_by_length",
                eval_strategy="steps",
                eval_steps=math.ceil(total / _VALIDATIONS),
                save_strategy="no",
                logging_steps=min(10, total),
                logging_nan_inf_filter=False,
                lr_scheduler_type="linear",
                warmup_steps=math.ceil(0.06 * total),
                max_grad_norm=1.0,
                seed=seed,
                report_to="none",
                disable_tqdm=False,
                label_names=["labels"],
                torch_compile=compile,
                dataloader_pin_memory=torch.cuda.is_available(),
            ),
            train_dataset=train,
            eval_dataset=validation,
            processing_class=tokenizer,
            data_collator=transformers.DataCollatorWithPadding(tokenizer),
            compute_metrics=_accuracy,
            optimizers=(optimizer, None),
        )
        trainer.remove_callback(transformers.trainer_callback.ProgressCallback)
        trainer.add_callback(progress)
        saved = _saved_bytes(trainer, model)
        try:
            trainer.train()
            if progress.validations[-1][0] != total:
                trainer.evaluate()
            model.load_state_dict(progress.best, strict=False)
            found = trainer.predict(test)  # type: ignore[arg-type]  # a list does as well
        finally:
            progress.close()
    metrics = found.metrics or {}
    check_finite(metrics, total)
    accuracy = metrics["test_accuracy"]
    return Result(
        adapter_parameters=sum(p.numel() for p in in_adapter),
        head_parameters=sum(p.numel() for p in in_head),
        test_accuracy=accuracy,
        test_standard_error=math.sqrt(accuracy * (1 - accuracy) / len(test)),
        validation_accuracy=max(accuracy for _, accuracy in progress.validations),
        seconds_per_step=statistics.median(progress.seconds),
        saved_bytes=saved,
        steps=total,
        losses=progress.losses,
        validations=progress.validations,
    )


def _in_modules(modules: list[str]) -> Callable[[str], bool]:
    """Return the test whether a parameter stands in one of these modules, wrapped or not."""
    return lambda name: any(f".{module}." in f".{name}" for module in modules)


def _accuracy(prediction: Any) -> dict[str, float]:
    logits = prediction.predictions
    logits = logits[0] if isinstance(logits, tuple) else logits
    return {"accuracy": float((logits.argmax(-1) == prediction.label_ids).mean())}


def _saved_bytes(trainer: transformers.Trainer, model: nn.Module) -> int:
    """Bytes that one training batch saves for the backward."""
    batch = next(iter(trainer.get_train_dataloader()))
    device = next(model.parameters()).device
    model.train()
    with saved_for_backward(model) as saved:
        model(**{name: tensor.to(device) for name, tensor in batch.items()})
    return saved.total


def table(method: str, result: Result) -> Table:
    """Return the closing table, one row."""
    columns = Table()
    for name in ("method", "adapter", "head", "accuracy", "s / step", "saved for backward"):
        columns.add_column(name, justify="left" if name == "method" else "right")
    columns.add_row(
        method,
        f"{result.adapter_parameters:,}",
        f"{result.head_parameters:,}",
        f"{100 * result.test_accuracy:.1f} ± {100 * result.test_standard_error:.1f} %",
        f"{result.seconds_per_step:.3f}",
        f"{result.saved_bytes / 2**20:.0f} MiB",
    )
    columns.caption = (
        "parameters trained; accuracy on the test split ± standard error; memory for one batch"
    )
    return columns


def draw_curve(result: Result, method: str, path: Path) -> None:
    """Draw training loss and validation accuracy over the steps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    loss, accuracy = figure.subplots(1, 2)
    loss.plot(*zip(*result.losses, strict=True), color="tab:blue")
    loss.set(xlabel="step", ylabel="training loss", title=f"{method}: training")
    steps, values = zip(*result.validations, strict=True)
    accuracy.plot(steps, [100 * v for v in values], "o-", color="tab:blue", label="validation")
    test, error = 100 * result.test_accuracy, 100 * result.test_standard_error
    accuracy.axhline(test, color="tab:orange", ls="--", label="test, standard error")
    accuracy.axhspan(test - error, test + error, color="tab:orange", alpha=0.15, lw=0)
    accuracy.margins(y=0.35)
    accuracy.set(xlabel="step", ylabel="accuracy (%)", title="accuracy")
    accuracy.legend(loc="lower right", fontsize="small")
    for axes in (loss, accuracy):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
