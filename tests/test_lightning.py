"""Freeze policies inside Lightning's own training loop."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from transferkit.exceptions import SettingError, UnknownStageError
from transferkit.freezing import (
    FreezePolicy,
    FreezeUntil,
    FullFinetune,
    GradualUnfreezing,
    LinearProbe,
    ScheduledUnfreeze,
    TrainLast,
)
from transferkit.metrics import evaluate_logits
from transferkit.model import TransferModel
from transferkit.optim import param_groups
from transferkit.schedules import Constant, Cosine, OneCycle, Plateau, Progress, StepDecay

pl = pytest.importorskip("lightning.pytorch", reason="needs the lightning extra")

from transferkit.integrations.lightning import PolicyCallback, TransferModule  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:The '(train|val)_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:GPU available but not used"),
    # Lightning's own use of torch
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated"),
]

UNFREEZING = ScheduledUnfreeze({0: LinearProbe(), 1: FullFinetune()})
BATCHES = 4


def batches() -> DataLoader[tuple[Tensor, ...]]:
    pictures = torch.randn(4 * BATCHES, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(pictures, torch.arange(4 * BATCHES) % 3), batch_size=4)


def host(*callbacks: Any, epochs: int = 2, **options: Any) -> Any:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    settings = {"max_epochs": epochs, "accelerator": "cpu", "enable_model_summary": False, **quiet, **options}
    return pl.Trainer(callbacks=list(callbacks), **settings)


def fit(module: Any, policy: FreezePolicy, *callbacks: Any, resume: Path | None = None, **options: Any) -> Any:
    trainer = host(PolicyCallback(policy), *callbacks, **options)
    trainer.fit(module, batches(), batches(), ckpt_path=resume)
    return trainer


def tensors(model: TransferModel) -> dict[str, Tensor]:
    """All parameters and buffers by stage."""
    return {
        f"{stage.name}/{index}": tensor.clone()
        for stage in model.stages
        for index, tensor in enumerate((*stage.parameters, *stage.buffers))
    }


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> dict[str, bool]:
    return {name: not torch.equal(tensor, after[name]) for name, tensor in before.items()}


class Recorder(pl.Callback):  # type: ignore[misc]
    """Notes what is frozen at each batch, the tensors after each epoch and the rates of each step."""

    def __init__(self) -> None:
        self.frozen: list[tuple[int, frozenset[str]]] = []
        self.epochs: list[dict[str, Tensor]] = []
        self.lrs: list[list[float]] = []
        self.figures: list[dict[str, float]] = []

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
        self.frozen.append((trainer.current_epoch, module.model.frozen))
        assert {stage.name for stage in module.model.stages if not any(m.training for m in stage.modules)} >= (
            module.model.frozen
        )
        self.lrs.append([group["lr"] for group in trainer.optimizers[0].param_groups])

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        self.epochs.append(tensors(module.model))
        self.figures.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def test_importing_the_package_of_integrations_loads_no_host() -> None:
    code = "import sys, transferkit.integrations\nassert not {'lightning', 'transformers', 'torch'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=120).returncode == 0


@pytest.mark.parametrize("interval", [1, BATCHES])
def test_a_linear_probe_leaves_everything_but_the_head_bit_equal(
    tiny_model: Callable[..., TransferModel], interval: int
) -> None:
    model = tiny_model()
    before = tensors(model)
    fit(TransferModule(model, lr=1e-2), LinearProbe(), val_check_interval=interval)
    changed = moved(before, tensors(model))
    assert {name.split("/")[0] for name, has_moved in changed.items() if has_moved} == {"head"}


def test_after_a_scheduled_unfreeze_everything_moves_and_before_it_nothing_frozen(
    tiny_model: Callable[..., TransferModel],
) -> None:
    model, recorder = tiny_model(), Recorder()
    before = tensors(model)
    fit(TransferModule(model, lr=1e-2), UNFREEZING, recorder)
    first, second = recorder.epochs
    assert {name.split("/")[0] for name, has_moved in moved(before, first).items() if has_moved} == {"head"}
    assert all(moved(first, second).values())


def test_frozen_stages_stay_frozen_through_train_calls_and_from_an_eval_mode_model(
    tiny_model: Callable[..., TransferModel],
) -> None:
    class Training(TransferModule):
        def on_train_batch_start(self, batch: Any, index: int) -> None:
            self.train()
            self.model.network.train()

    model, recorder = tiny_model().eval(), Recorder()
    before = tensors(model)
    with pytest.warns(UserWarning, match="in eval mode at the start of training"):
        fit(Training(model, lr=1e-2), TrainLast(1), recorder)
    changed = moved(before, tensors(model))
    assert {name.split("/")[0] for name, has_moved in changed.items() if has_moved} == set(model.stage_names[-2:])
    assert all(has_moved for name, has_moved in changed.items() if name.startswith(model.stage_names[-2]))


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks")
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended")
@pytest.mark.parametrize(
    "when",
    [
        pytest.param({"every_n_train_steps": 3}, id="within an epoch"),
        pytest.param({"every_n_train_steps": BATCHES}, id="at its last step"),
        pytest.param({"save_on_train_epoch_end": False}, id="after validation"),
        pytest.param({"save_on_train_epoch_end": True}, id="at the epoch's end"),
    ],
)
def test_a_resumed_run_freezes_what_the_uninterrupted_run_freezes(
    tiny_model: Callable[..., TransferModel], tmp_path: Path, when: dict[str, Any]
) -> None:
    policy, whole = GradualUnfreezing(), Recorder()
    saving = pl.callbacks.ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, **when)
    model = tiny_model()
    fit(TransferModule(model, lr=1e-2), policy, whole, saving, epochs=3, enable_checkpointing=True)
    steps = {int(path.stem.removeprefix("step=")): path for path in tmp_path.glob("*.ckpt")}
    assert len(steps) >= 3
    for step in sorted(steps)[:-1]:
        again, rest = tiny_model(seed=1), Recorder()
        fit(TransferModule(again, lr=1e-2), policy, rest, resume=steps[step], epochs=3)
        assert rest.frozen == whole.frozen[step:]
        # within an epoch Lightning goes on with the epoch's first batches
        assert step % BATCHES or not any(moved(tensors(model), tensors(again)).values())
    assert {frozen for epoch, frozen in whole.frozen if epoch == 1} == {policy.frozen_stages(model.stage_names, 1)}


def test_the_model_is_found_as_the_module_itself_as_an_attribute_or_deeper(
    tiny_model: Callable[..., TransferModel],
) -> None:
    class Own(pl.LightningModule):  # type: ignore[misc]
        def __init__(self, inner: nn.Module, optimized: TransferModel) -> None:
            super().__init__()
            self.backbone, self.optimized = inner, [optimized]

        def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
            return nn.functional.cross_entropy(self.backbone(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(param_groups(self.optimized[0], lr=0.1))

    for wrap in (lambda model: model, nn.Sequential):
        model = tiny_model()
        host(PolicyCallback(LinearProbe()), epochs=1).fit(Own(wrap(model), model), batches())
        assert model.frozen == set(model.stage_names[:-1])


def test_no_model_and_several_models_are_named_errors(tiny_model: Callable[..., TransferModel]) -> None:
    several = TransferModule(tiny_model(), lr=0.1)
    several.teacher = tiny_model()
    with pytest.raises(SettingError, match=r"holds 2 TransferModels \(model, teacher\)"):
        fit(several, LinearProbe())
    none = TransferModule(tiny_model(), lr=0.1)
    none.model = nn.Linear(1, 1)
    with pytest.raises(SettingError, match="TransferModule holds no TransferModel"):
        fit(none, LinearProbe())


def test_an_optimizer_that_lacks_what_is_unfrozen_later_is_refused_before_training(
    tiny_model: Callable[..., TransferModel],
) -> None:
    class HeadOnly(TransferModule):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.model.stages[-1].parameters, lr=0.1)

    model = tiny_model()
    before = tensors(model)
    with pytest.raises(SettingError, match=r"lacks \d+ parameters of timm/test_efficientnet that Scheduled.* trains"):
        fit(HeadOnly(model, lr=0.1), UNFREEZING)
    assert not any(moved(before, tensors(model)).values())
    fit(HeadOnly(model, lr=0.1), LinearProbe(), epochs=1)


def test_a_policy_that_names_no_stage_or_brings_rates_is_refused(tiny_model: Callable[..., TransferModel]) -> None:
    with pytest.raises(SettingError, match=r"learning rates for the phases at \[1\], but Lightning sets them"):
        PolicyCallback(ScheduledUnfreeze(UNFREEZING.phases, lr={1: 1e-4}))
    with pytest.raises(UnknownStageError, match="no stage named 'stage9'"):
        fit(TransferModule(tiny_model(), lr=0.1), ScheduledUnfreeze({0: LinearProbe(), 1: FreezeUntil("stage9")}))


@pytest.mark.parametrize("schedule", [Constant(warmup_epochs=1), StepDecay(every=1), Cosine(), OneCycle()])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_schedule_multiplies_each_groups_own_rate(
    tiny_model: Callable[..., TransferModel], schedule: Any, accumulate: int
) -> None:
    model, recorder = tiny_model(), Recorder()
    module = TransferModule(model, lr=1e-2, layer_decay=0.5, schedule=schedule)
    fit(module, UNFREEZING, recorder, epochs=3, accumulate_grad_batches=accumulate)
    per_epoch = math.ceil(BATCHES / accumulate)
    own = [group["lr"] for group in param_groups(model, lr=1e-2, layer_decay=0.5)]
    for index, lrs in enumerate(recorder.lrs):
        step = index // BATCHES * per_epoch + index % BATCHES // accumulate
        factor = schedule.factor(Progress(step=step, steps=3 * per_epoch, steps_per_epoch=per_epoch))
        assert lrs == pytest.approx([lr * factor for lr in own])


def test_a_schedule_may_look_at_a_logged_figure(tiny_model: Callable[..., TransferModel]) -> None:
    schedule = Plateau(monitor="val_accuracy", mode="max", patience=0, factor=0.5)
    recorder = Recorder()
    fit(TransferModule(tiny_model(), lr=1e-3, schedule=schedule), LinearProbe(), recorder, epochs=4)
    accuracies = [figures["val_accuracy"] for figures in recorder.figures]
    for epoch, lrs in enumerate(itertools.islice(recorder.lrs, 0, None, BATCHES)):
        assert lrs == pytest.approx([1e-3 * schedule.factor_from(accuracies[:epoch])] * len(lrs))
    assert recorder.lrs[-1] < recorder.lrs[0]


@pytest.mark.parametrize("limits", [{"max_epochs": -1, "max_steps": 6}, {"max_epochs": 5, "max_steps": 6}])
def test_a_schedule_ends_with_the_trainers_limit_of_steps(
    tiny_model: Callable[..., TransferModel], limits: dict[str, int]
) -> None:
    schedule, recorder = Cosine(warmup_epochs=0), Recorder()
    fit(TransferModule(tiny_model(), lr=1e-2, schedule=schedule), LinearProbe(), recorder, **limits)
    expected = [schedule.factor(Progress(step=step, steps=6, steps_per_epoch=BATCHES)) for step in range(6)]
    assert [lrs[0] for lrs in recorder.lrs] == pytest.approx([1e-2 * factor for factor in expected])


@pytest.mark.filterwarnings("ignore:Detected KeyboardInterrupt")
def test_a_schedule_of_steps_needs_an_end(tiny_model: Callable[..., TransferModel]) -> None:
    with pytest.raises(SettingError, match="needs to know how long training takes"):
        fit(TransferModule(tiny_model(), lr=1e-2, schedule="cosine"), LinearProbe(), epochs=-1)


def test_the_logged_figures_are_those_over_all_pictures(tiny_model: Callable[..., TransferModel]) -> None:
    model, recorder = tiny_model(), Recorder()
    pictures, labels = batches().dataset.tensors  # type: ignore[attr-defined]
    unequal = DataLoader(TensorDataset(pictures, labels), batch_size=5)
    host(recorder, epochs=1).fit(TransferModule(model, lr=1e-3), batches(), unequal)
    with torch.no_grad():
        expected = evaluate_logits(model.eval()(pictures), labels, model.class_names)
    assert recorder.figures[0]["val_accuracy"] == pytest.approx(expected.accuracy)
    assert recorder.figures[0]["val_loss"] == pytest.approx(expected.loss, rel=1e-5)


@pytest.mark.parametrize("wrong", [{"lr": 0.0}, {"lr": 0.1, "optimizer": "adan"}, {"lr": 0.1, "schedule": "triangle"}])
def test_a_wrong_setting_is_refused_at_once(tiny_model: Callable[..., TransferModel], wrong: dict[str, Any]) -> None:
    with pytest.raises(SettingError):
        TransferModule(tiny_model(), **wrong)


SCRIPT = """
import sys, torch
from pathlib import Path
from lightning import pytorch as pl
from torch.utils.data import DataLoader, TensorDataset
from transferkit import FullFinetune, LinearProbe, ScheduledUnfreeze, TrainLast, create_model
from transferkit.integrations.lightning import PolicyCallback, TransferModule

class Keep(pl.Callback):
    def on_train_end(self, trainer, module):
        torch.save(module.model.state_dict(), Path(sys.argv[2]) / f"{trainer.global_rank}.pt")

torch.manual_seed(0)
model = create_model("timm/test_efficientnet", weights=None, num_classes=2, image_size=32)
data = TensorDataset(torch.randn(16, 3, 32, 32), torch.arange(16) % 2)
torch.save(model.state_dict(), Path(sys.argv[2]) / "before.pt")
policy = TrainLast(1) if sys.argv[1] == "constant" else ScheduledUnfreeze({0: LinearProbe(), 1: FullFinetune()})
options = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
trainer = pl.Trainer(max_epochs=2, accelerator="cpu", strategy="ddp", devices=2,
                     callbacks=[PolicyCallback(policy), Keep()], **options)
trainer.fit(TransferModule(model, lr=1e-2), DataLoader(data, batch_size=4))
"""


def two_processes(tmp_path: Path, policy: str) -> subprocess.CompletedProcess[str]:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT, encoding="utf-8")
    return subprocess.run(
        [sys.executable, str(script), policy, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.long
def test_in_two_processes_a_policy_that_changes_is_refused_before_training(tmp_path: Path) -> None:
    done = two_processes(tmp_path, "changing")
    assert done.returncode != 0
    assert "changes what is frozen after epoch 1, which Lightning cannot do in 2 processes" in done.stderr
    assert not (tmp_path / "0.pt").exists()


@pytest.mark.long
def test_in_two_processes_a_constant_policy_trains_equal_weights(tmp_path: Path) -> None:
    done = two_processes(tmp_path, "constant")
    assert done.returncode == 0, done.stderr
    before, first, second = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("before", 0, 1))
    trained = {name for name in before if not torch.equal(before[name], first[name])}
    assert trained
    assert {name.split(".")[1] for name in trained} == {"blocks", "conv_head", "bn2", "classifier"}
    # a trained stage's running statistics are each process's own
    assert [name for name in before if "running" not in name and not torch.equal(first[name], second[name])] == []
