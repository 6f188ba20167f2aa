"""Freeze policies inside the Hugging Face Trainer."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from transferkit.create import create_model
from transferkit.exceptions import SettingError, UnknownStageError
from transferkit.freezing import (
    FreezePolicy,
    FreezeUntil,
    FullFinetune,
    GradualUnfreezing,
    LinearProbe,
    ScheduledUnfreeze,
)
from transferkit.model import TransferModel
from transferkit.optim import param_groups

transformers = pytest.importorskip("transformers", reason="needs the transformers extra")

from transferkit.integrations.transformers import (  # noqa: E402
    PolicyCallback,
    WithLoss,
    collate,
    compute_metrics,
)

UNFREEZING = ScheduledUnfreeze({0: LinearProbe(), 1: FullFinetune()})
STEPS = 4


def pictures(count: int = 4 * STEPS) -> list[tuple[Tensor, int]]:
    images = torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return [(image, index % 3) for index, image in enumerate(images)]


class Recorder(transformers.TrainerCallback):  # type: ignore[misc]
    """Notes what is frozen at each step and the tensors after each epoch."""

    def __init__(self) -> None:
        self.frozen: list[tuple[int, frozenset[str]]] = []
        self.epochs: list[dict[str, Tensor]] = []
        self.lrs: list[list[float]] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, *, model: Any, optimizer: Any, **others: Any) -> None:
        self.frozen.append((state.global_step, model.model.frozen))
        self.lrs.append([group["lr"] for group in optimizer.param_groups])

    def on_epoch_end(self, args: Any, state: Any, control: Any, *, model: Any, **others: Any) -> None:
        self.epochs.append(tensors(model.model))


def host(
    model: nn.Module,
    policy: FreezePolicy,
    *callbacks: Any,
    folder: Path,
    optimizer: torch.optim.Optimizer | None = None,
    epochs: float = 2,
    **options: Any,
) -> Any:
    quiet = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "logging_strategy": "no"}
    settings = {"num_train_epochs": epochs, "per_device_train_batch_size": 4, "use_cpu": True, **quiet, **options}
    return transformers.Trainer(
        model,
        transformers.TrainingArguments(str(folder), learning_rate=1e-2, **settings),
        data_collator=collate,
        train_dataset=pictures(),
        eval_dataset=pictures(),
        compute_metrics=compute_metrics,
        optimizers=(optimizer, None),
        callbacks=[PolicyCallback(policy), *callbacks],
    )


def of_all(model: TransferModel) -> torch.optim.Optimizer:
    return torch.optim.AdamW(param_groups(model, lr=1e-2, layer_decay=0.5))


def tensors(model: TransferModel) -> dict[str, Tensor]:
    """All parameters and buffers by stage."""
    return {
        f"{stage.name}/{index}": tensor.clone()
        for stage in model.stages
        for index, tensor in enumerate((*stage.parameters, *stage.buffers))
    }


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> dict[str, bool]:
    return {name: not torch.equal(tensor, after[name]) for name, tensor in before.items()}


def test_a_linear_probe_leaves_everything_but_the_head_bit_equal(
    tiny_model: Callable[..., TransferModel], tmp_path: Path
) -> None:
    model = tiny_model()
    before = tensors(model)
    host(
        WithLoss(model), LinearProbe(), folder=tmp_path, optimizer=of_all(model), eval_strategy="steps", eval_steps=1
    ).train()
    changed = moved(before, tensors(model))
    assert {name.split("/")[0] for name, has_moved in changed.items() if has_moved} == {"head"}


@pytest.mark.parametrize("own_optimizer", [True, False], ids=["param_groups", "the Trainer's optimizer"])
def test_after_a_scheduled_unfreeze_everything_moves_and_before_it_nothing_frozen(
    tiny_model: Callable[..., TransferModel], tmp_path: Path, own_optimizer: bool
) -> None:
    model, recorder = tiny_model(), Recorder()
    before = tensors(model)
    optimizer = of_all(model) if own_optimizer else None
    host(WithLoss(model), UNFREEZING, recorder, folder=tmp_path, optimizer=optimizer).train()
    first, second = recorder.epochs
    assert {name.split("/")[0] for name, has_moved in moved(before, first).items() if has_moved} == {"head"}
    assert all(moved(first, second).values())


def test_the_trainers_schedule_keeps_the_ratios_of_the_groups(
    tiny_model: Callable[..., TransferModel], tmp_path: Path
) -> None:
    model, recorder = tiny_model(), Recorder()
    own = [group["lr"] for group in param_groups(model, lr=1e-2, layer_decay=0.5)]
    host(WithLoss(model), UNFREEZING, recorder, folder=tmp_path, optimizer=of_all(model)).train()
    for step, lrs in enumerate(recorder.lrs):
        assert lrs == pytest.approx([lr * (1 - step / (2 * STEPS)) for lr in own])


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_resumed_run_freezes_what_the_uninterrupted_run_freezes(
    tiny_model: Callable[..., TransferModel], tmp_path: Path, accumulate: int
) -> None:
    policy, model, whole = GradualUnfreezing(), tiny_model(), Recorder()
    options = {"epochs": 3, "gradient_accumulation_steps": accumulate}
    saving = {"save_strategy": "steps", "save_steps": 1}
    host(WithLoss(model), policy, whole, folder=tmp_path, optimizer=of_all(model), **options, **saving).train()
    per_epoch = -(-STEPS // accumulate)
    names = model.stage_names
    assert whole.frozen == [(step, policy.frozen_stages(names, step // per_epoch)) for step in range(3 * per_epoch)]
    for step in range(per_epoch - 1, 2 * per_epoch + 1):
        again, rest = tiny_model(seed=1), Recorder()
        trainer = host(WithLoss(again), policy, rest, folder=tmp_path, optimizer=of_all(again), **options)
        trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert rest.frozen == whole.frozen[step:]
        assert not any(moved(tensors(model), tensors(again)).values())


def test_an_epoch_that_another_callback_cuts_short_counts(
    tiny_model: Callable[..., TransferModel], tmp_path: Path
) -> None:
    class Short(transformers.TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            control.should_epoch_stop = True

    model, recorder, policy = tiny_model(), Recorder(), GradualUnfreezing()
    host(WithLoss(model), policy, Short(), recorder, folder=tmp_path, optimizer=of_all(model), epochs=3).train()
    assert [frozen for _, frozen in recorder.frozen] == [
        policy.frozen_stages(model.stage_names, epoch) for epoch in range(3)
    ]


def test_an_optimizer_that_lacks_what_is_unfrozen_later_is_refused_before_training(
    tiny_model: Callable[..., TransferModel], tmp_path: Path
) -> None:
    model = tiny_model()
    before = tensors(model)
    head = torch.optim.SGD(model.stages[-1].parameters, lr=0.1)
    with pytest.raises(SettingError, match=r"lacks \d+ parameters of timm/test_efficientnet that Scheduled.* trains"):
        host(WithLoss(model), UNFREEZING, folder=tmp_path, optimizer=head).train()
    assert not any(moved(before, tensors(model)).values())
    host(WithLoss(model), LinearProbe(), folder=tmp_path, optimizer=head, epochs=1).train()


def test_a_policy_that_names_no_stage_or_brings_rates_and_a_model_of_another_kind_are_refused(
    tiny_model: Callable[..., TransferModel], tmp_path: Path
) -> None:
    with pytest.raises(SettingError, match=r"at \[1\], but transformers.Trainer sets them by its own schedule"):
        PolicyCallback(ScheduledUnfreeze(UNFREEZING.phases, lr={1: 1e-4}))
    with pytest.raises(UnknownStageError, match="no stage named 'stage9'"):
        host(WithLoss(tiny_model()), FreezeUntil("stage9"), folder=tmp_path)
    with pytest.raises(SettingError, match="Linear holds no TransferModel"):
        host(nn.Linear(1, 1), LinearProbe(), folder=tmp_path)


def test_evaluation_reports_loss_and_accuracy_over_all_pictures(
    tiny_model: Callable[..., TransferModel], tmp_path: Path
) -> None:
    model = tiny_model()
    figures = host(WithLoss(model), LinearProbe(), folder=tmp_path, per_device_eval_batch_size=5).evaluate()
    batch = collate(pictures())
    with torch.no_grad():
        logits = model.eval()(batch["pixel_values"])
    assert figures["eval_accuracy"] == pytest.approx((logits.argmax(1) == batch["labels"]).float().mean().item())
    assert figures["eval_loss"] == pytest.approx(nn.functional.cross_entropy(logits, batch["labels"]).item(), rel=1e-5)


def test_the_loss_counts_auxiliary_classifiers_and_needs_labels() -> None:
    model = create_model("torchvision/googlenet", weights=None, num_classes=2, aux="train").train()
    images, labels = torch.randn(2, 3, 64, 64), torch.tensor([0, 1])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        output = WithLoss(model)(images, labels)
        torch.manual_seed(0)
        assert torch.equal(output["loss"], model.loss(model(images), labels))
    assert output["logits"].shape == (2, 2)
    assert set(WithLoss(model)(images)) == {"logits"}


def test_collate_keeps_the_order_and_the_types() -> None:
    batch = collate([(torch.full((3, 2, 2), float(label)), label) for label in (2, 0, 1)])
    assert batch["labels"].dtype == torch.int64
    assert batch["pixel_values"][:, 0, 0, 0].tolist() == batch["labels"].tolist() == [2, 0, 1]


def test_accuracy_is_a_plain_number() -> None:
    logits = np.eye(3, dtype=np.float32)
    figures = compute_metrics(transformers.EvalPrediction(predictions=logits, label_ids=np.array([0, 1, 1])))
    assert figures == {"accuracy": pytest.approx(2 / 3)}
    assert type(figures["accuracy"]) is float


SCRIPT = """
import sys, torch
from pathlib import Path
from transformers import Trainer, TrainingArguments
from transferkit import FullFinetune, LinearProbe, ScheduledUnfreeze, TrainLast, create_model, param_groups
from transferkit.exceptions import SettingError
from transferkit.integrations.transformers import PolicyCallback, WithLoss, collate

folder = Path(sys.argv[1])
torch.manual_seed(0)
model = create_model("timm/test_efficientnet", weights=None, num_classes=2, image_size=32)
data = [(torch.randn(3, 32, 32), index % 2) for index in range(16)]
torch.save(model.state_dict(), folder / "before.pt")
args = TrainingArguments(str(folder), num_train_epochs=2, per_device_train_batch_size=4, use_cpu=True,
                         ddp_backend="gloo", report_to="none", disable_tqdm=True, save_strategy="no")

def train(policy, late=False):
    optimizer = torch.optim.AdamW(param_groups(model, lr=1e-2))
    trainer = Trainer(WithLoss(model), args, data_collator=collate, train_dataset=data, optimizers=(optimizer, None),
                      callbacks=[] if late else [PolicyCallback(policy)])
    if late:
        trainer.add_callback(PolicyCallback(policy))
    trainer.train()

for name, settings in {"changing": (ScheduledUnfreeze({0: LinearProbe(), 1: FullFinetune()}),),
                       "late": (LinearProbe(), True), "constant": (TrainLast(1),)}.items():
    try:
        train(*settings)
    except SettingError as error:
        (folder / f"{name}-{args.process_index}.txt").write_text(str(error))
    torch.save(model.state_dict(), folder / f"{name}-{args.process_index}.pt")
"""


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes found: refusals, and the weights after each attempt."""
    folder = tmp_path_factory.mktemp("together")
    script = folder / "script.py"
    script.write_text(SCRIPT, encoding="utf-8")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, str(script), str(folder)],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return folder


def weights(folder: Path, name: str) -> dict[str, Tensor]:
    return dict(torch.load(folder / f"{name}.pt", weights_only=True))


@pytest.mark.long
@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ("changing", "changes what is frozen after epoch 1, which transformers.Trainer cannot do in 2 processes"),
        ("late", "the model was wrapped for several processes before the policy froze it"),
    ],
)
def test_in_two_processes_what_cannot_be_wrapped_right_is_refused_before_training(
    together: Path, case: str, reason: str
) -> None:
    for rank in (0, 1):
        assert reason in (together / f"{case}-{rank}.txt").read_text(encoding="utf-8")
        assert not any(moved(weights(together, "before"), weights(together, f"{case}-{rank}")).values())


@pytest.mark.long
def test_in_two_processes_a_constant_policy_trains_equal_weights(together: Path) -> None:
    before, first, second = (weights(together, name) for name in ("before", "constant-0", "constant-1"))
    trained = {name.split(".")[1] for name, has_moved in moved(before, first).items() if has_moved}
    assert trained == {"blocks", "conv_head", "bn2", "classifier"}
    # a trained stage's running statistics are each process's own
    assert [name for name, differs in moved(first, second).items() if differs and "running" not in name] == []
