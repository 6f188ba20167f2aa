"""Fine-tuning in one object: data, model, training and results, with good defaults."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import nn

from transferkit.bad_pictures import check_on_bad_image, readable_files
from transferkit.callbacks import (
    EMA,
    BestCheckpoint,
    Callback,
    EarlyStopping,
)
from transferkit.callbacks.resuming import check_pace
from transferkit.checkpoint import HISTORY, WEIGHTS, load_artifact, save_artifact
from transferkit.data import from_datasets, labelled_folder
from transferkit.devices import choose_device
from transferkit.distribution import check_same_everywhere, load_network_state, share_object
from transferkit.evaluation import collect_logits
from transferkit.exceptions import SettingError
from transferkit.freezing import FreezePolicy, policy_from_text
from transferkit.heads import Head
from transferkit.history import History
from transferkit.identity import check_same_run
from transferkit.inference import check_engine
from transferkit.loading import in_channels
from transferkit.metrics import evaluate_logits
from transferkit.model import TransferModel
from transferkit.optim import OptimizerFactory, check_rates, find_optimizer
from transferkit.pieces import (
    build_model,
    claimed_folder,
    class_weights,
    identity_of,
    make_activations,
    make_callbacks,
    make_loader,
    make_optimizer,
    read_pictures,
    resume_checkpoint,
)
from transferkit.plan import note_enlarging, plan_text
from transferkit.prediction import Pictures, Prediction, predict
from transferkit.preprocessing import Preprocessing
from transferkit.randomness import seeded
from transferkit.recipes import Recipe, default_recipe
from transferkit.schedules import Schedule, schedule_by_name
from transferkit.sources import LabelledPictures, PictureData
from transferkit.trainer import Trainer, check_training
from transferkit.transforms import Transform, eval_transform, train_transform

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from transferkit.lr_finder import LRFinding
    from transferkit.run_folder import RunFolder

__all__ = ["Data", "Finetuner"]

logger = logging.getLogger("transferkit")

Data = str | os.PathLike[str] | PictureData | tuple[Any, Any]
"""A picture folder, a :class:`PictureData`, or a pair of map-style data sets (train, val)."""


@dataclass(kw_only=True)
class Finetuner:
    """Fine-tune a pretrained network on your own pictures.

    Constructing stores the settings; :meth:`fit` reads the data, loads the network and trains. Settings left at
    ``None`` follow the default recipe (:func:`default_recipe`).

    Args:
        backbone: ``"torchvision/resnet18"``, ``"timm/convnext_atto"``, a bare name, or an ``nn.Module`` of your own.
        weights: As for :func:`create_model`; ``None`` with a module of your own says that its weights are random.
        epochs: Passes over the training pictures, 1 or more.
        policy: A freeze policy, or ``"head"``, ``"full"``, ``"gradual"``, ``"until:STAGE"``, ``"last:N"``; ``None`` for
            the recipe's: head first, then everything.
        batch_size: Pictures per batch.
        lr: Learning rate of the head at the top of the schedule; ``None`` for the recipe's.
        weight_decay: Of weight matrices and kernels; ``None`` for the recipe's.
        layer_decay: Factor of the lr from one stage to the one before it, above 0, at most 1; ``None`` the recipe's.
        head_lr_multiplier: How much faster the head learns than the stage below it; ``None`` for the recipe's.
        keep_statistics: Whether batch norms keep their pretrained running statistics in stages that train; ``None`` for
            yes with pretrained weights, no with random ones or an adapted stem.
        optimizer: ``"adamw"``, ``"sgd"``, or a callable that takes parameter groups.
        schedule: A schedule or its name; ``None`` for the recipe's.
        image_size: Input side in pixels; ``None`` for the size of the weights.
        in_chans: Channels of the pictures: 1 for greys, 3, 4 with transparency; ``None`` for 3.
        aux: Auxiliary classifiers of GoogLeNet and Inception v3: ``"drop"`` or ``"train"``.
        small_images: ``"upsample"`` enlarges pictures that are smaller than the network's size; ``"stem"`` adapts the
            network's stem to them instead, for 32 px unless ``image_size`` says otherwise.
        head: For a module of your own: dotted name of its classification layer, where it cannot be found.
        preprocessing: Overrides that of the weights.
        train_preset: ``"light"``, ``"imagenet"``, ``"cifar"``, ``"trivial_augment"``, ``"none"``, or a callable from a
            picture to a tensor; ``None`` for the recipe's.
        eval_preset: ``"imagenet"`` or ``"cifar"``.
        dropout: Probability of dropping each of the head's inputs while training.
        hidden_size: Width of a hidden layer in the head; ``None`` for a linear head.
        label_smoothing: In [0, 1); ``None`` for the recipe's.
        class_weights: One weight per class; ``"balanced"`` for weights inverse to the classes' shares; ``None``.
        mixup: Alpha of mixup; 0 for none.
        cutmix: Alpha of cutmix; 0 for none.
        accumulate: Batches per optimizer step.
        clip_grad_norm: Largest norm of the gradient; ``None`` for no limit.
        balanced: Whether every class is drawn equally often in training (:class:`EpochSampler`).
        ema: Decay of an average of the weights over the steps, in [0, 1), which is what is validated and kept
            (:class:`EMA`); ``None`` for none.
        patience: Epochs without a better ``monitor`` after which training ends, 1 or more; ``None`` for all epochs.
        monitor: What makes an epoch the best: ``"val_accuracy"``, ``"val_loss"`` or ``"train_loss"``.
        val_fraction: Share held out for validation where the data has no split, in (0, 1).
        on_bad_image: What happens to picture files that cannot be read: ``"raise"`` names them before anything is
            trained; ``"skip"`` leaves them out, says so, and lists them in ``bad_images.csv`` of ``output_dir``.
        seed: Of everything that is random, 0 or more.
        output_dir: Folder for the best model and the history; ``None`` writes nothing.
        overwrite: Whether a run that is already in ``output_dir`` may be replaced.
        checkpoint_every: Optimizer steps between two resume states within an epoch; ``None`` for one per epoch.
        checkpoint_interval: Seconds that lie between two resume states at least, 0 or more.
        views: Views of each augmented training picture whose activations are kept while leading stages are frozen, 0 or
            more (:class:`ActivationCache`); 0 keeps none, so that frozen stages run in every epoch; ``None`` for 4.
        cache_budget: Memory for these activations, in bytes or as ``"256MiB"``; beyond it they are kept in files.
            ``None`` for a quarter of what is free.
        cache_dir: Folder where they stay for later runs; ``None`` for none.
        engine: What computes where nothing is trained: ``"eager"``, ``"compile"``, ``"onnxruntime"`` or ``"openvino"``.
        cache_dtype: ``"auto"`` keeps them as computed; ``"fp16"`` or ``"bf16"`` halves them, with a small loss.
        torch_compile: Whether what trains is compiled by torch: a minute or so, again whenever the policy changes.
        resident: Whether decoded pictures stay on the device and are augmented there (:class:`ResidentBatches`);
            ``None`` for yes on a CUDA device where a quarter of its free memory is enough.
        device: ``"cpu"``, ``"cuda"`` …; ``None`` for the best there is.
        precision: ``"auto"``, ``"fp32"``, ``"bf16"`` or ``"fp16"``.
        shard: Whether the network is spread over the processes instead of repeated in each (FSDP2).
        sync_batch_norm: Whether batch norms in training see the batches of all processes as one; on GPUs only.
        num_workers: Processes that read pictures; ``None`` for one per spare core, 8 at most.
        callbacks: More callbacks, called after the built-in ones.
        progress: Whether the plan, a progress bar and a line per epoch are shown on standard error.

    Attributes:
        model: The :class:`TransferModel` once fitted or loaded, else ``None``.
        history: The :class:`History` of the run.
        data: The :class:`PictureData` of the run, ``None`` after loading.

    Raises:
        SettingError: A setting is outside its range.

    Example:
        >>> tuner = Finetuner("torchvision/mobilenet_v2", epochs=5, policy="head", output_dir="runs/bees")
        >>> tuner.recipe.policy
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
    model: TransferModel | None = field(default=None, init=False, repr=False)
    history: History = field(default_factory=History, init=False, repr=False)
    data: PictureData | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        """Validate what can be validated before the data and the network are known."""
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise SettingError(f"{name} must be 1 or more, got {getattr(self, name)}")
        self._check_backbone()
        if self.num_workers is not None and self.num_workers < 0:
            raise SettingError(f"num_workers must be 0 or more, or None, got {self.num_workers}")
        if not 0 < self.val_fraction < 1:
            raise SettingError(f"val_fraction must be above 0 and below 1, got {self.val_fraction}")
        check_on_bad_image(self.on_bad_image)
        if isinstance(self.class_weights, str) and self.class_weights != "balanced":
            raise SettingError(f"class_weights={self.class_weights!r}; it can be 'balanced', a list, or None")
        if self.balanced and self.class_weights is not None:
            raise SettingError("balanced=True and class_weights both even out the classes; choose one of them")
        BestCheckpoint(monitor=self.monitor)
        check_pace(every=self.checkpoint_every, min_interval=self.checkpoint_interval)
        if self.patience is not None:
            EarlyStopping(patience=self.patience)
        if self.ema is not None:
            EMA(self.ema)
        make_activations(self)
        check_engine(self.engine)
        Head(1, dropout=self.dropout, hidden_size=self.hidden_size)
        probe = Preprocessing() if self.image_size is None else Preprocessing().resized(self.image_size)
        if self.train_preset is not None:
            train_transform(self.train_preset, probe)
        eval_transform(self.eval_preset, probe)
        recipe = self.recipe
        check_rates(
            lr=recipe.lr,
            weight_decay=recipe.weight_decay,
            layer_decay=recipe.layer_decay,
            head_lr_multiplier=recipe.head_lr_multiplier,
        )
        find_optimizer(self.optimizer)
        check_training(
            seed=self.seed,
            label_smoothing=recipe.label_smoothing,
            class_weights=None if isinstance(self.class_weights, str) else self.class_weights,
            mixup=self.mixup,
            cutmix=self.cutmix,
            accumulate=self.accumulate,
            clip_grad_norm=self.clip_grad_norm,
            precision=self.precision,
        )

    def _check_backbone(self) -> None:
        """Refuse what a module cannot have, and what only a module can."""
        if not isinstance(self.backbone, nn.Module):
            if self.head is not None:
                raise SettingError("head= goes with a module; the head of a named backbone is known")
            return
        for name, default in (("image_size", None), ("in_chans", None), ("aux", "drop"), ("small_images", "upsample")):
            if getattr(self, name) != default:
                raise SettingError(
                    f"{name} goes with a backbone's name; give a module preprocessing=Preprocessing(...)"
                )
        if self.weights not in (None, "default"):
            raise SettingError("weights goes with a backbone's name; load a module's weights before it is passed")

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

    def fit(self, data: Data, *, resume: str | None = None) -> History:
        """Train on labelled pictures; the best epoch's weights are in :attr:`model` afterwards.

        Where several processes were started (``torchrun``, ``accelerate launch``), each calls this with the same
        settings, and ``batch_size`` is that of each.

        Args:
            data: A folder with ``train/`` and ``val/``, or one folder of class folders, which is split by seed; a
                :class:`PictureData`; or a pair of map-style (image, label) data sets.
            resume: ``"auto"`` goes on with the run in ``output_dir`` where there is one; ``None`` starts anew.

        Returns:
            The history, one record per epoch.

        Raises:
            DataError: The data cannot be used for classification.
            OutputError: ``output_dir`` cannot be written, or holds another run.
            UnknownModelError: No such backbone.
            WeightsError: The weights do not exist or do not fit.
            UnknownStageError: The policy names a stage that the network does not have.
            SettingError: A setting does not go with the data or the network.
        """
        if resume not in (None, "auto"):
            raise SettingError(f"resume={resume!r}; it can be 'auto', or None to start anew")
        with claimed_folder(self, resume=resume == "auto") as folder:
            return self._fit(data, folder, resume=resume == "auto")

    def _fit(self, data: Data, folder: RunFolder | None, *, resume: bool) -> History:
        started = time.perf_counter()
        self.data = read_pictures(self, data)
        self.model = build_model(self, self.data)
        note_enlarging(self.model, self.data.train)
        recipe = self.recipe
        identity = identity_of(self, self.model, self.data)
        checkpoint = None if folder is None else resume_checkpoint(self, folder, identity)
        optimizer = make_optimizer(self, self.model)
        trainer = Trainer(
            self.model,
            optimizer,
            policy=recipe.policy,
            callbacks=make_callbacks(self, folder, checkpoint),
            seed=self.seed,
            label_smoothing=recipe.label_smoothing,
            class_weights=class_weights(self, self.data),
            mixup=self.mixup,
            cutmix=self.cutmix,
            accumulate=self.accumulate,
            clip_grad_norm=self.clip_grad_norm,
            device=self.device,
            precision=self.precision,
            shard=self.shard,
            sync_batch_norm=self.sync_batch_norm,
            activations=make_activations(self),
            engine=self.engine,
            torch_compile=self.torch_compile,
        )
        self.history = trainer.history
        given: dict[str, Any] = {
            "channels": self.model.preprocessing.channels,
            "rank": trainer.accelerator.process_index,
            "world_size": trainer.accelerator.num_processes,
            "device": trainer.device,
        }
        preprocessing = self.model.preprocessing
        train = make_loader(
            self, self.data.train, train_transform(recipe.train_preset, preprocessing), train=True, **given
        )
        val = make_loader(self, self.data.val, eval_transform(self.eval_preset, preprocessing), train=False, **given)
        # before a state is taken back: the optimizer still has each group's own lr
        shown = self.progress and trainer.is_main_process
        plan = shown and plan_text(
            self.model,
            self.data,
            recipe,
            optimizer,
            epochs=self.epochs,
            steps_per_epoch=-(-len(train) // self.accumulate),
            activations=trainer.plan_activations(train, val, epochs=self.epochs),
        )
        check_same_everywhere(trainer.accelerator, identity)
        if checkpoint is not None and resume:
            state = share_object(trainer.accelerator, folder.state() if folder and trainer.is_main_process else None)
            if state is not None:
                check_same_run(state["identity"], checkpoint.identity, folder=self.output_dir or "")
                if "weights" in state:
                    return self._finished(trainer, state)
                trainer.load_state_dict(state)
        if shown:
            from rich.console import Console

            Console(stderr=True, highlight=False, soft_wrap=True, markup=False).print(plan)
        trainer.fit(train, val, epochs=self.epochs)
        if self.output_dir is not None and trainer.is_main_process:
            run = {
                "settings": self.settings(),
                "best": self.history.best(self.monitor).to_dict(),
                "seconds": time.perf_counter() - started,
            }
            save_artifact(self.model, self.output_dir, extra={**run, "identity": checkpoint and checkpoint.identity})
            if checkpoint is not None:
                checkpoint.store.clear()
        return self.history

    def find_lr(self, data: Data, **options: Any) -> LRFinding:
        """Try learning rates on a copy of the network (the learning rate range test); nothing is trained or kept.

        Args:
            data: As for :meth:`fit`.
            **options: ``lowest``, ``highest`` and ``steps`` of :func:`transferkit.lr_finder.find_lr`.

        Returns:
            The rates and losses, with a ``suggestion`` for :attr:`lr` where the freeze policy is that of the first
            epoch, and a ``plot``.

        Raises:
            SettingError: The loss never fell, so that no rate can be suggested.
            TransferkitError: Whatever keeps :meth:`fit` from beginning.
        """
        from transferkit.lr_finder import find_lr

        pictures = read_pictures(self, data)
        model = build_model(self, pictures)
        recipe = self.recipe
        model.freeze(recipe.policy.frozen_stages(model.stage_names, 0))
        transform = train_transform(recipe.train_preset, model.preprocessing)
        weights = class_weights(self, pictures)
        return find_lr(
            model,
            make_optimizer(self, model),
            make_loader(self, pictures.train, transform, train=True, channels=model.preprocessing.channels),
            loss_function=nn.CrossEntropyLoss(
                weight=None if weights is None else torch.tensor(weights), label_smoothing=recipe.label_smoothing
            ),
            seed=self.seed,
            device=self.device,
            **options,
        )

    def _finished(self, trainer: Trainer, state: dict[str, Any]) -> History:
        """Take over what a run has left that needs nothing more."""
        load_network_state(self._trained().network, state["weights"])
        self.history = state["history"]
        logger.info("the run in %s is finished; Finetuner.load(%r) trains on from it", self.output_dir, self.output_dir)
        return self.history

    def evaluate(self, data: str | os.PathLike[str] | Any) -> dict[str, Any]:
        """Measure the model on labelled pictures.

        Args:
            data: A folder of class folders (mapped by name), one with ``val/`` in it, or a map-style data set.

        Returns:
            ``{"accuracy": 0 to 1, "loss": nats, "count": pictures, "per_class": …}`` as in :class:`Evaluation`.

        Raises:
            DataError: The data cannot be used, or holds a class that the model does not know.
            SettingError: The model is not trained or loaded yet.
        """
        model = self._trained()
        source: LabelledPictures
        if isinstance(data, str | os.PathLike):
            source = readable_files(labelled_folder(data, model.class_names), on_bad_image=self.on_bad_image)
        else:
            source = from_datasets(data, data, class_names=model.class_names).val
        device = choose_device(self.device)
        model.to(device)
        batches = make_loader(
            self,
            source,
            eval_transform(model.eval_preset, model.preprocessing),
            train=False,
            channels=model.preprocessing.channels,
        )
        logits, labels = collect_logits(model.network, batches, device, engine=self.engine)
        return evaluate_logits(logits, labels, model.class_names).to_dict()

    def predict(self, pictures: Pictures) -> list[Prediction]:
        """Classify pictures.

        Args:
            pictures: A file, a folder (searched through), a PIL image, or a list of these.

        Returns:
            One :class:`Prediction` per picture that can be read.

        Raises:
            DataError: A path does not exist, or there is no picture.
            PictureError: A picture cannot be read, and none may be left out or none is left.
            SettingError: The model is not trained or loaded yet.
        """
        device = choose_device(self.device)
        return predict(
            self._trained(),
            pictures,
            batch_size=self.batch_size,
            device=device,
            engine=self.engine,
            on_bad_image=self.on_bad_image,
        )

    def save(self, directory: str | os.PathLike[str]) -> Path:
        """Save the model and the history; :meth:`load`, and the native library, open it.

        Args:
            directory: Folder to write into; made if missing.

        Raises:
            OutputError: The folder cannot be written.
            SettingError: The model is not trained or loaded yet.
        """
        folder = save_artifact(self._trained(), directory, extra={"settings": self.settings()})
        if len(self.history):
            self.history.save_csv(folder / HISTORY)
        return folder

    @classmethod
    def load(cls, directory: str | os.PathLike[str], *, network: nn.Module | None = None, **settings: Any) -> Self:
        """Open a saved model. Nothing is downloaded and nothing unpickled.

        Args:
            directory: An output folder, or one that :meth:`save` wrote.
            network: For a model made from a module of your own: that module, built again.
            **settings: Settings of the new object, ``device="cpu"`` for example.

        Raises:
            ArtifactError: The folder holds no saved model, or its files do not belong together.
        """
        model = load_artifact(directory, network=network)
        # Its weights are where a further fit() on other pictures starts from, in a network of the same make.
        kept: dict[str, Any] = {
            "weights": Path(directory) / WEIGHTS,
            "eval_preset": model.eval_preset,
            "small_images": model.small_images,
            "aux": "train" if model.aux_paths else "drop",
        }
        if settings.get("image_size") is None:
            kept["preprocessing"] = model.preprocessing
        else:
            kept["in_chans"] = model.preprocessing.channels
        tuner = cls(model.name, **{**kept, **settings})
        tuner.model = model
        history = Path(directory) / HISTORY
        if history.is_file():
            tuner.history = History.load_csv(history)
        return tuner

    def plot_history(self, path: str | os.PathLike[str] | None = None, **options: Any) -> Figure:
        """Draw loss and accuracy over the epochs.

        Args:
            path: Where to save the figure, ``.png``, ``.svg`` or ``.pdf``; ``None`` only returns it.
            **options: As for :func:`transferkit.plots.plot_history`.

        Raises:
            SettingError: There is no history yet, or ``path`` has another extension.
        """
        from transferkit.plots import plot_history, save_figure

        if self.model is not None and "unfreeze_epochs" not in options:
            changes = self.recipe.policy.changes(self.model.stage_names, len(self.history))
            options["unfreeze_epochs"] = [epoch + 1 for epoch in changes]
        figure = plot_history(self.history.to_dicts(), **options)
        if path is not None:
            save_figure(figure, path)
        return figure

    def plot_predictions(
        self, path: str | os.PathLike[str] | None = None, *, count: int = 16, data: str | os.PathLike[str] | None = None
    ) -> Figure:
        """Draw labelled pictures with what the model says of them.

        Args:
            path: Where to save the figure, ``.png``, ``.svg`` or ``.pdf``; ``None`` only returns it.
            count: How many pictures, drawn by seed.
            data: A folder of class folders; ``None`` for the validation pictures of :meth:`fit`.

        Raises:
            SettingError: There is no model or no data yet, or ``path`` has another extension.
        """
        from transferkit.plots import PredictionView, plot_predictions, save_figure

        model = self._trained()
        if data is not None:
            source: LabelledPictures = labelled_folder(data, model.class_names)
        elif self.data is not None:
            source = self.data.val
        else:
            raise SettingError("which pictures? give plot_predictions(data=FOLDER), since none were trained on here")
        source = in_channels(source, model.preprocessing.channels)
        with seeded(self.seed, 4):
            chosen = torch.randperm(len(source))[:count].tolist()
        labelled = [source[index] for index in chosen]
        images = [image for image, _ in labelled]
        views = [
            PredictionView(image, said.label, said.confidence, model.class_names[label])
            for image, said, (_, label) in zip(images, self.predict(images), labelled, strict=True)
        ]
        figure = plot_predictions(views)
        if path is not None:
            save_figure(figure, path)
        return figure

    def settings(self) -> dict[str, Any]:
        """Return the settings that were given, as JSON values; objects are named in words."""
        plain = (str, int, float, bool, type(None))
        given = {
            each.name: getattr(self, each.name)
            for each in fields(self)
            if each.init and each.name not in ("output_dir", "overwrite", "progress")
        }
        return {name: value if isinstance(value, plain) else str(value)[:200] for name, value in given.items()}

    def _trained(self) -> TransferModel:
        if self.model is None:
            raise SettingError("there is no model yet: call fit(DATA) first, or Finetuner.load(DIRECTORY)")
        return self.model
