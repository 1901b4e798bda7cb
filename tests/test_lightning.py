"""Lightning's checkpoints of patched models, and adapters saved as training ends."""

import subprocess
import sys

import pytest
import torch
from torch import nn

import c3a

try:
    import lightning.pytorch as lightning
except ImportError:
    lightning = pytest.importorskip("pytorch_lightning", reason="needs lightning")

from c3a.lightning import AdapterCallback

pytestmark = [
    # Lightning's own, of torch
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
]
STEPS = 6


def network():
    torch.manual_seed(0)
    # without dropout, as Lightning's checkpoints have no state of random numbers
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.GELU(), nn.Linear(16, 3))


class Module(lightning.LightningModule):
    def __init__(self, init="zeros", patched=True):
        super().__init__()
        self.model = network()
        if patched:
            c3a.patch_model(self.model, ["0"], 4, init=init, modules_to_save=["3"])

    def training_step(self, batch, _):
        x, y = batch
        return nn.functional.cross_entropy(self.model(x), y)

    def configure_optimizers(self):
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return torch.optim.AdamW(trained, lr=0.05)


def data():
    torch.manual_seed(1)
    x, y = torch.randn(4 * STEPS, 8), torch.arange(4 * STEPS) % 3
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=4)


def trainer_in(folder, *callbacks, **options):
    lightning.seed_everything(2, verbose=False)
    return lightning.Trainer(
        default_root_dir=folder,
        callbacks=list(callbacks),
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"max_steps": STEPS, **options},
    )


def saving(**options):
    return lightning.callbacks.ModelCheckpoint(
        every_n_train_steps=3, save_top_k=-1, filename="{step}", **options
    )


def assert_same_state(module, other):
    expected = other.state_dict()
    for key, tensor in module.state_dict().items():
        assert torch.equal(tensor, expected[key]), key


TRAINED = {
    "model.0.c3a_kernel",
    "model.1.running_mean",
    "model.1.running_var",
    "model.1.num_batches_tracked",
    "model.3.weight",
    "model.3.bias",
}


@pytest.mark.parametrize("weights_only", [False, True])
def test_checkpoints_hold_what_is_trained(weights_only, tmp_path):
    module = Module()
    before = module.state_dict()
    trainer = trainer_in(tmp_path, AdapterCallback(), saving(save_weights_only=weights_only))
    trainer.fit(module, data())
    (path,) = tmp_path.rglob("step=3.ckpt")
    saved = torch.load(path, weights_only=True)
    assert set(saved["state_dict"]) == TRAINED
    assert ("optimizer_states" in saved) != weights_only
    assert set(module.state_dict()) == set(before)  # again, after training


def test_a_run_resumes_to_the_same_bits(tmp_path):
    options = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1, "max_epochs": 2}
    options |= {"max_steps": -1, "precision": "bf16-mixed"}
    whole = Module()
    trainer_in(tmp_path / "whole", AdapterCallback(), saving(), **options).fit(whole, data())
    assert whole.model[0].c3a_kernel.any()
    assert whole.model[0].c3a_kernel.dtype == torch.float32
    (path,) = (tmp_path / "whole").rglob("step=3.ckpt")
    resumed = Module("gaussian")
    again = trainer_in(tmp_path / "again", AdapterCallback(), saving(), **options)
    again.fit(resumed, data(), ckpt_path=path, weights_only=False)
    assert again.global_step == 2 * STEPS // 2
    assert_same_state(resumed, whole)


def test_the_adapter_is_saved_for_the_model_alone(tmp_path):
    module = Module()
    callback = AdapterCallback(tmp_path / "mine", task_type="SEQ_CLS")
    trainer_in(tmp_path, callback, enable_checkpointing=False).fit(module, data())
    assert c3a.adapter.read_adapter(tmp_path / "mine" / "adapter").config["task_type"] == "SEQ_CLS"
    loaded = c3a.load_adapter(network(), tmp_path / "mine" / "adapter")
    for key in ("0.c3a_kernel", "3.weight", "3.bias"):
        assert torch.equal(loaded.state_dict()[key], module.model.state_dict()[key])


def test_a_checkpoint_that_lost_a_part_of_its_base_is_still_refused(tmp_path):
    module = Module()
    trainer = trainer_in(tmp_path, AdapterCallback(), saving())
    trainer.fit(module, data())
    whole = module.state_dict()
    (path,) = tmp_path.rglob("step=3.ckpt")
    saved = torch.load(path, weights_only=True)
    saved["state_dict"] = {key: t for key, t in whole.items() if key != "model.1.weight"}
    torch.save(saved, tmp_path / "lost.ckpt")
    with pytest.raises(RuntimeError, match=r"Missing key.*model.1.weight"):
        trainer_in(tmp_path / "again", AdapterCallback(), saving()).fit(
            Module(), data(), ckpt_path=tmp_path / "lost.ckpt", weights_only=False
        )


def test_a_model_without_adapters_is_refused_before_training(tmp_path):
    with pytest.raises(ValueError, match="expected one patched model, got 0; patch it first"):
        trainer_in(tmp_path, AdapterCallback()).fit(Module(patched=False), data())


def test_the_callback_needs_lightning_and_the_package_does_not():
    program = """
import sys
sys.modules["lightning"] = sys.modules["pytorch_lightning"] = None
import c3a
try:
    import c3a.lightning
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "needs the lightning library: pip install 'c3a[lightning]'" in done.stdout
