"""All that can be chosen for a fine-tuning run, checked before anything is read, loaded or written."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from torch import nn

from transferkit.activations import ActivationCache
from transferkit.bad_pictures import check_on_bad_image
from transferkit.callbacks import BestCheckpoint, Callback
from transferkit.create import agreed
from transferkit.exceptions import SettingError
from transferkit.freezing import FreezePolicy, FullFinetune, policy_from_text
from transferkit.heads import Head
from transferkit.identity import in_plain_values
from transferkit.inference import check_engine
from transferkit.optim import OptimizerFactory, check_rates, find_optimizer
from transferkit.preprocessing import Preprocessing
from transferkit.ranges import (
    LARGEST_SIDE,
    MOST_CHANNELS,
    MOST_EPOCHS,
    MOST_PER_BATCH,
    MOST_WORKERS,
    check_number,
    check_whole_number,
)
from transferkit.recipes import Recipe, default_recipe
from transferkit.schedules import Schedule, schedule_by_name
from transferkit.trainer import check_training
from transferkit.transforms import Transform, eval_transform, train_transform

__all__ = ["Settings", "check_settings"]


@dataclass(kw_only=True)
class Settings:
    """The settings of a :class:`~transferkit.Finetuner`, which says what each of them is.

    Raises:
        SettingError: A setting is outside its range, or two settings exclude each other.

    Example:
        >>> Settings("torchvision/mobilenet_v2", epochs=5, policy="head").recipe.policy
        LinearProbe()
    """

    backbone: str | nn.Module = field(kw_only=False)
    weights: str | os.PathLike[str] | None = "default"
    epochs: int = 5
    policy: FreezePolicy | str | None = None
    batch_size: int = 16
    lr: float | None = None
    weight_decay: float | None = None
    layer_decay: float | None = None
    head_lr_multiplier: float | None = None
    keep_statistics: bool | None = None
    optimizer: str | OptimizerFactory = "adamw"
    schedule: Schedule | str | None = None
    image_size: int | None = None
    in_chans: int | None = None
    aux: str = "drop"
    small_images: str = "upsample"
    head: str | None = None
    preprocessing: Preprocessing | None = None
    train_preset: str | Transform | None = None
    eval_preset: str = "imagenet"
    dropout: float = 0.0
    hidden_size: int | None = None
    label_smoothing: float | None = None
    class_weights: Sequence[float] | str | None = None
    mixup: float = 0.0
    cutmix: float = 0.0
    accumulate: int = 1
    clip_grad_norm: float | None = None
    balanced: bool = False
    ema: float | None = None
    patience: int | None = None
    monitor: str = "val_accuracy"
    val_fraction: float = 0.2
    natural_sort: bool = False
    on_bad_image: str = "raise"
    seed: int = 0
    output_dir: str | os.PathLike[str] | None = None
    overwrite: bool = False
    checkpoint_every: int | None = None
    checkpoint_interval: float = 5.0
    views: int | None = None
    cache_budget: int | str | None = None
    cache_dir: str | os.PathLike[str] | None = None
    cache_dtype: str = "auto"
    engine: str = "eager"
    torch_compile: bool = False
    resident: bool | None = None
    device: str | None = None
    precision: str = "auto"
    shard: bool = False
    sync_batch_norm: bool = False
    num_workers: int | None = None
    callbacks: Sequence[Callback] = ()
    progress: bool = True

    def __post_init__(self) -> None:
        """Check what can be checked before the data and the network are known."""
        check_settings(self)

    @property
    def recipe(self) -> Recipe:
        """The default recipe with every setting that was given in its place."""
        policy = policy_from_text(self.policy) if isinstance(self.policy, str) else self.policy
        recipe = default_recipe(
            policy,
            self.epochs,
            lr=self.lr,
            pretrained=self.weights is not None,
            rescaled=self.small_images == "stem",
            views=self.views,
        )
        schedule = schedule_by_name(self.schedule) if isinstance(self.schedule, str) else self.schedule
        return recipe.replaced(
            schedule=schedule,
            weight_decay=self.weight_decay,
            layer_decay=self.layer_decay,
            head_lr_multiplier=self.head_lr_multiplier,
            train_preset=self.train_preset,
            label_smoothing=self.label_smoothing,
        )

    @property
    def activation_cache(self) -> ActivationCache:
        """What keeps activations, as far as the settings say."""
        return ActivationCache(
            views=self.views, budget=self.cache_budget, directory=self.cache_dir, dtype=self.cache_dtype
        )

    def settings(self) -> dict[str, Any]:
        """Return the settings that were given, as JSON values; objects are named in words."""
        given = {
            each.name: getattr(self, each.name)
            for each in fields(self)
            if each.init and each.name not in ("output_dir", "overwrite", "progress")
        }
        return in_plain_values(given)


def check_settings(settings: Settings) -> None:
    """Raise ``SettingError`` unless all settings are within their ranges and go together.

    Args:
        settings: What was given. What only the data or the network can tell is not looked at.

    Raises:
        SettingError: One is not, or two exclude each other.

    Example:
        >>> Settings("torchvision/resnet18", views=4, mixup=0.2)
        Traceback (most recent call last):
        transferkit.exceptions.SettingError: views would have no effect, since mixup and cutmix mix pictures before ...
    """
    _check_numbers(settings)
    _check_backbone(settings)
    _check_transforms(settings)
    check_on_bad_image(settings.on_bad_image)
    check_engine(settings.engine)
    find_optimizer(settings.optimizer)
    BestCheckpoint(monitor=settings.monitor)
    if isinstance(settings.class_weights, str) and settings.class_weights != "balanced":
        raise SettingError(f"class_weights={settings.class_weights!r}; it can be 'balanced', a list, or None")
    recipe = settings.recipe
    check_rates(
        lr=recipe.lr,
        weight_decay=recipe.weight_decay,
        layer_decay=recipe.layer_decay,
        head_lr_multiplier=recipe.head_lr_multiplier,
    )
    check_training(
        seed=settings.seed,
        label_smoothing=recipe.label_smoothing,
        class_weights=None if isinstance(settings.class_weights, str) else settings.class_weights,
        mixup=settings.mixup,
        cutmix=settings.cutmix,
        accumulate=settings.accumulate,
        clip_grad_norm=settings.clip_grad_norm,
        precision=settings.precision,
        shard=settings.shard,
        engine=settings.engine,
    )
    if settings.balanced and settings.class_weights is not None:
        raise SettingError("balanced=True and class_weights both even out the classes; choose one of them")
    _check_activations(settings, recipe)


def _check_numbers(settings: Settings) -> None:
    """Check the numbers that no other part checks under the same name, and those that a recipe is made of."""
    check_whole_number("epochs", settings.epochs, at_least=1, at_most=MOST_EPOCHS)
    check_whole_number("batch_size", settings.batch_size, at_least=1, at_most=MOST_PER_BATCH)
    check_number("lr", settings.lr, above=0, or_none=True)
    check_whole_number("image_size", settings.image_size, at_least=1, at_most=LARGEST_SIDE, or_none=True)
    check_whole_number("in_chans", settings.in_chans, at_least=1, at_most=MOST_CHANNELS, or_none=True)
    Head(1, dropout=settings.dropout, hidden_size=settings.hidden_size)
    check_number("ema", settings.ema, at_least=0, below=1, or_none=True, hint="0.999 is usual")
    check_whole_number("patience", settings.patience, at_least=1, or_none=True)
    check_number("val_fraction", settings.val_fraction, above=0, below=1)
    check_whole_number("checkpoint_every", settings.checkpoint_every, at_least=1, or_none=True)
    check_number("checkpoint_interval", settings.checkpoint_interval, at_least=0)
    _ = settings.activation_cache  # which has ranges of its own
    check_whole_number("num_workers", settings.num_workers, at_least=0, at_most=MOST_WORKERS, or_none=True)


def _check_backbone(settings: Settings) -> None:
    """Refuse what contradicts the preprocessing, what a module cannot have, and what only a module can."""
    if not isinstance(settings.backbone, nn.Module):
        if settings.head is not None:
            raise SettingError("head= goes with a module; the head of a named backbone is known")
        if settings.preprocessing is not None:
            agreed("image_size", settings.image_size, settings.preprocessing.size)
            agreed("in_chans", settings.in_chans, settings.preprocessing.channels)
        return
    for name, default in (("image_size", None), ("in_chans", None), ("aux", "drop"), ("small_images", "upsample")):
        if getattr(settings, name) != default:
            raise SettingError(f"{name} goes with a backbone's name; give a module preprocessing=Preprocessing(...)")
    if settings.weights not in (None, "default"):
        raise SettingError("weights goes with a backbone's name; load a module's weights before it is passed")


def _check_transforms(settings: Settings) -> None:
    """Make the transforms once, for the channels that are known by now."""
    probe = Preprocessing() if settings.preprocessing is None else settings.preprocessing
    if settings.in_chans is not None:
        probe = probe.with_channels(settings.in_chans)
    if settings.train_preset is not None:
        train_transform(settings.train_preset, probe)
    eval_transform(settings.eval_preset, probe)


def _check_activations(settings: Settings, recipe: Recipe) -> None:
    """Refuse settings of the activation cache where nothing will be kept, whatever the network is."""
    asked = [name for name in ("views", "cache_budget", "cache_dir") if getattr(settings, name) is not None]
    if settings.views == 0:
        asked.remove("views")
        reason = "views=0 keeps no activations"
    elif settings.mixup or settings.cutmix:
        reason = "mixup and cutmix mix pictures before the first stage, so that no activations are kept"
    elif settings.shard:
        reason = "shard spreads the network over the processes, so that no activations are kept"
    elif isinstance(recipe.policy, FullFinetune):
        reason = f"{recipe.policy} freezes nothing, so that no activations are kept"
    else:
        return
    if asked:
        raise SettingError(
            f"{' and '.join(asked)} would have no effect, since {reason}; leave out the one or the other"
        )
