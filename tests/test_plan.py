"""What the plan prints is what training does."""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from transferkit.callbacks import Callback, LRScheduler
from transferkit.callbacks.lr_scheduler import span_of
from transferkit.create import adapt, create_model
from transferkit.data import from_datasets
from transferkit.finetuner import Finetuner
from transferkit.freezing import (
    FreezePolicy,
    FullFinetune,
    GradualUnfreezing,
    LinearProbe,
    ScheduledUnfreeze,
    TrainLast,
)
from transferkit.model import TransferModel
from transferkit.optim import param_groups
from transferkit.plan import lr_over_time, plan_text
from transferkit.preprocessing import Preprocessing
from transferkit.randomness import seeded
from transferkit.recipes import Recipe, default_recipe
from transferkit.schedules import (
    Constant,
    Cosine,
    ExponentialDecay,
    MetricSchedule,
    OneCycle,
    Plateau,
    Schedule,
    StepDecay,
)
from transferkit.trainer import Trainer

EPOCHS, STEPS = 7, 3

SCHEDULES: list[Schedule] = [
    Constant(warmup_epochs=1),
    StepDecay(every=3, gamma=0.1),
    ExponentialDecay(gamma=0.8),
    Cosine(warmup_epochs=0.5),
    OneCycle(),
    Plateau(patience=99),
]
INNER = ScheduledUnfreeze({0: TrainLast(1), 2: FullFinetune()}, lr={2: 0.002})
POLICIES: dict[str, FreezePolicy] = {
    "full": FullFinetune(),
    "head": LinearProbe(),
    "gradual": GradualUnfreezing(),
    "two rates": ScheduledUnfreeze({0: LinearProbe(), 2: FullFinetune(), 5: LinearProbe()}, lr={0: 0.02, 2: 0.004}),
    "nested": ScheduledUnfreeze({0: LinearProbe(), 2: INNER, 6: TrainLast(1)}, lr={2: 0.004}),
}
DATA = from_datasets([("p", 0), ("p", 1)], [("p", 0)], class_names=["ant", "bee"])


def small_model() -> TransferModel:
    with seeded(0):
        blocks = [
            nn.Sequential(nn.Conv2d(inputs, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4), nn.ReLU())
            for inputs in (3, 4, 4)
        ]
        network = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
        return adapt(network, class_names=["ant", "bee"], preprocessing=Preprocessing(size=8, resize_size=8))


def optimizer_of(model: TransferModel, recipe: Recipe) -> torch.optim.Optimizer:
    head = recipe.head_lr_multiplier
    groups = param_groups(model, lr=recipe.lr / head, layer_decay=recipe.layer_decay, head_lr_multiplier=head)
    return torch.optim.SGD(groups)


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(4, 3, 8, 8, generator=generator), torch.tensor([0, 1, 0, 1])) for _ in range(count)]


class Rates(Callback):
    """Keeps the lr with which each stage makes each step, ``None`` where it makes none."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float | None]] = []

    def on_before_optimizer_step(self, trainer: Trainer) -> None:
        rates = {group["stage"]: group["lr"] for group in trainer.optimizer.param_groups}
        trains = {each.name: all(one.requires_grad for one in each.parameters) for each in trainer.model.stages}
        self.rows.append({name: rates[name] if trains[name] else None for name in trainer.model.stage_names})


def printed(text: str) -> tuple[dict[tuple[int, int], dict[str, str]], dict[str, str]]:
    """Read the table of rates back: stage and rate by (epoch, step), and the epochs in which each stage trains."""
    table = text.split("\n\n")[-1].splitlines()
    epochs, steps = (
        [int(each) for each in re.findall(rf"{word} +(\d+)", table[row])] for row, word in enumerate(("epoch", "step"))
    )
    cells = [re.split(r"  +", line) for line in table[2:] if "  " in line]
    columns = {
        place: {row[0]: row[column - len(epochs)] for row in cells}
        for column, place in enumerate(zip(epochs, steps, strict=True))
    }
    return columns, {row[0]: row[1] for row in cells}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda each: type(each).__name__)
def test_the_printed_rates_are_those_of_training(schedule: Schedule, policy: str) -> None:
    # an epoch's last step may see fewer batches than the others
    accumulate = 2 if isinstance(schedule, Cosine) else 1
    recipe = Recipe(POLICIES[policy], lr=0.01, schedule=schedule, layer_decay=0.5, head_lr_multiplier=10.0)
    model, rates = small_model(), Rates()
    optimizer = optimizer_of(model, recipe)
    text = plan_text(model, DATA, recipe, optimizer, epochs=EPOCHS, steps_per_epoch=STEPS)
    over_time = lr_over_time(model, recipe, optimizer, epochs=EPOCHS, steps_per_epoch=STEPS)
    trainer = Trainer(
        model,
        optimizer,
        policy=recipe.policy,
        callbacks=[LRScheduler(schedule), rates],
        accumulate=accumulate,
        device="cpu",
    )
    trainer.fit(batches(STEPS * accumulate - accumulate // 2), batches(1), epochs=EPOCHS)

    assert len(rates.rows) == EPOCHS * STEPS
    columns, trains_in = printed(text)
    assert 2 <= len(columns) <= 5 or isinstance(schedule, Plateau)
    for (epoch, step), column in columns.items():
        row = rates.rows[(epoch - 1) * STEPS + step - 1]
        assert column == {name: "–" if lr is None else f"{lr:.2g}" for name, lr in row.items()}
    assert over_time == rates.rows[::STEPS]
    for name, epochs in trains_in.items():
        spans = [each.split("–") for each in epochs.split(", ") if each != "–"]
        numbers = [number for span in spans for number in range(int(span[0]), int(span[-1]) + 1)]
        assert numbers == [1 + epoch for epoch in range(EPOCHS) if rates.rows[epoch * STEPS][name] is not None]


def plan_of(recipe: Recipe, *, epochs: int, steps_per_epoch: int = 16, model: TransferModel | None = None) -> str:
    model = model or small_model()
    optimizer = optimizer_of(model, recipe)
    return plan_text(model, DATA, recipe, optimizer, epochs=epochs, steps_per_epoch=steps_per_epoch)


def test_the_table_shows_the_ends_the_top_of_each_span_and_the_first_step_of_each_phase() -> None:
    columns, trains_in = printed(plan_of(default_recipe(None, 5), epochs=5))
    assert list(columns) == [(1, 1), (1, 8), (3, 1), (3, 8), (5, 16)]
    assert [column["head"] for column in columns.values()] == ["0.00038", "0.003", "0.00038", "0.003", "4.6e-06"]
    assert trains_in == {"stem": "3–5", "stage1": "3–5", "stage2": "3–5", "head": "1–5"}


def test_the_table_shows_where_a_staircase_falls() -> None:
    recipe = Recipe(FullFinetune(), lr=0.01, schedule=StepDecay(every=7, gamma=0.1))
    assert list(printed(plan_of(recipe, epochs=16))[0]) == [(1, 1), (8, 1), (15, 1), (16, 16)]


def test_the_top_of_a_one_cycle_among_many_steps_is_found() -> None:
    recipe = Recipe(FullFinetune(), lr=0.01, schedule=OneCycle(peak_at=0.3))
    columns = printed(plan_of(recipe, epochs=20, steps_per_epoch=1000))[0]
    assert columns[6, 1000]["head"] == "0.01"


@pytest.mark.parametrize(
    ("schedule", "line"),
    [
        (Plateau(), "until val_loss stops falling, then × 0.1 each time"),
        (Plateau("val_accuracy", mode="max", factor=0.5), "until val_accuracy stops rising, then × 0.5 each time"),
    ],
)
def test_a_plateau_says_until_when_its_rates_hold(schedule: Schedule, line: str) -> None:
    policy = ScheduledUnfreeze({0: LinearProbe(), 5: FullFinetune()}, lr={5: 1e-4})
    text = plan_of(Recipe(policy, lr=0.01, schedule=schedule), epochs=9)
    assert text.splitlines()[-1] == line
    assert list(printed(text)[0]) == [(1, 1), (6, 1)]


def test_a_schedule_of_a_metric_of_ones_own_names_the_metric() -> None:
    class Mine(MetricSchedule):
        monitor = "train_loss"

        def factor_from(self, values: Any) -> float:
            return 1.0

    text = plan_of(Recipe(FullFinetune(), lr=0.01, schedule=Mine()), epochs=3)
    assert text.splitlines()[-1] == "until train_loss decides otherwise"


def test_the_tables_fit_into_80_characters() -> None:
    model = create_model("torchvision/mobilenet_v2", weights=None, class_names=["ant", "bee"])
    for schedule, policy in itertools.product(SCHEDULES, (POLICIES["gradual"], POLICIES["nested"])):
        recipe = default_recipe(policy, 90).replaced(schedule=schedule)
        text = plan_of(recipe, epochs=90, steps_per_epoch=2000, model=model)
        described = ("policy: ", "schedule: ")
        assert max(len(line) for line in text.splitlines() if not line.startswith(described)) <= 80


def test_a_resumed_run_prints_the_plan_of_the_whole_run(
    picture_folder: Any, tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    class Stop(Callback):
        def on_train_epoch_end(self, trainer: Trainer) -> None:
            if len(trainer.history) == 1:
                raise KeyboardInterrupt

    def plan(*callbacks: Callback) -> list[str]:
        tuner = Finetuner(
            "timm/test_efficientnet",
            weights=None,
            image_size=32,
            epochs=2,
            output_dir=tmp_path / "run",
            num_workers=0,
            checkpoint_interval=0,
            callbacks=callbacks,
        )
        if callbacks:
            with pytest.raises(KeyboardInterrupt):
                tuner.fit(picture_folder, resume="auto")
        else:
            tuner.fit(picture_folder, resume="auto")
        return capsys.readouterr().err.split("\nlr ")[1].splitlines()[:9]

    assert plan(Stop()) == plan()


def test_the_span_of_a_schedule_is_that_between_phases_with_rates_of_their_own() -> None:
    policy = ScheduledUnfreeze({0: LinearProbe(), 2: TrainLast(1), 4: FullFinetune()}, lr={4: 0.1})
    assert [span_of(policy, epoch, epochs=6) for epoch in range(6)] == [(0, 4)] * 4 + [(4, 6)] * 2
    assert span_of(policy, 2, epochs=3) == (0, 3)
