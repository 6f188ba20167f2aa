"""Fine-tuning in one object: data, model, training and results, with good defaults."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from transferkit.bad_pictures import readable_files
from transferkit.calibration import Calibration, calibrate_logits
from transferkit.checkpoint import HISTORY, WEIGHTS, load_artifact, save_artifact, save_temperature
from transferkit.data import from_datasets, labelled_folder
from transferkit.devices import choose_device
from transferkit.evaluation import collect_logits
from transferkit.exceptions import SettingError
from transferkit.fitting import fit
from transferkit.history import History
from transferkit.metrics import evaluate_logits
from transferkit.model import TransferModel
from transferkit.pieces import (
    Data,
    build_model,
    class_weights,
    drawn_pictures,
    make_loader,
    make_optimizer,
    read_pictures,
    workers_for,
)
from transferkit.prediction import Pictures, Prediction, stream_predictions
from transferkit.ranges import check_whole_number
from transferkit.settings import Settings, check_settings
from transferkit.sources import LabelledPictures, PictureData
from transferkit.transforms import train_transform
from transferkit.tta import tta_views

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from transferkit.lr_finder import LRFinding

__all__ = ["Data", "Finetuner"]


@dataclass(kw_only=True)
class Finetuner(Settings):
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
        natural_sort: Whether classes are sorted by the numbers in their names, ``2`` before ``10``.
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
        num_workers: Processes that read pictures; ``None`` for one per spare core, 8 at most, and one less where a CPU
            computes. Without any this process reads, files in threads.
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

    model: TransferModel | None = field(default=None, init=False, repr=False)
    history: History = field(default_factory=History, init=False, repr=False)
    data: PictureData | None = field(default=None, init=False, repr=False)

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
            SettingError: A setting is outside its range, or does not go with the data or the network.
            CallbackError: A callback has failed. The best weights so far are in :attr:`model`, and in ``output_dir``
                with what ``resume="auto"`` goes on from.
            Interrupted: SIGINT (Ctrl-C) or SIGTERM came; the same is kept then.
        """
        check_settings(self)
        if resume not in (None, "auto"):
            raise SettingError(f"resume={resume!r}; it can be 'auto', or None to start anew")
        return fit(self, data, resume=resume == "auto")

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
        from transferkit.lr_finder import check_sweep, find_lr

        check_settings(self)
        check_sweep(**options)
        pictures = read_pictures(self, data)
        weights = class_weights(self, pictures)
        model = build_model(self, pictures)
        recipe = self.recipe
        model.freeze(recipe.policy.frozen_stages(model.stage_names, 0))
        transform = train_transform(recipe.train_preset, model.preprocessing)
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

    def evaluate(self, data: str | os.PathLike[str] | Any, *, tta: str | None = None) -> dict[str, Any]:
        """Measure the model on labelled pictures.

        Args:
            data: A folder of class folders (mapped by name), one with ``val/`` in it, or a map-style data set.
            tta: Test-time augmentation, as for :func:`transferkit.predict`.

        Returns:
            ``{"accuracy": 0 to 1, "accuracy_interval": [low, high], "loss": nats, "ece": 0 to 1, "count": pictures,
            "per_class": …}`` as in :class:`Evaluation`.

        Raises:
            DataError: The data cannot be used, or holds a class that the model does not know.
            SettingError: The model is not trained or loaded yet, or there is no such ``tta``.
        """
        model = self._trained()
        logits, labels = self._logits(self._labelled(data), tta=tta)
        return evaluate_logits(logits, labels, model.class_names, temperature=model.temperature).to_dict()

    def calibrate(
        self,
        data: str | os.PathLike[str] | Any = None,
        *,
        precision: float | None = None,
        directory: str | os.PathLike[str] | None = None,
    ) -> Calibration:
        """Fit the model's temperature to labelled pictures that it was not trained on; the answers stay the same.

        Args:
            data: As for :meth:`evaluate`; ``None`` for the validation pictures of :meth:`fit`, which has done it with
                them already where there are enough.
            precision: Share of accepted answers that should be right, to find the confidence for; ``None`` for none.
            directory: The saved model that keeps the temperature; ``None`` for :attr:`model` alone.

        Returns:
            The temperature, and what it does to the confidences of these pictures.

        Raises:
            DataError: The data cannot be used, or holds a class that the model does not know.
            SettingError: The model is not trained or loaded yet, there is no data, or nothing gives ``precision``.
        """
        model = self._trained()
        if data is not None:
            source = self._labelled(data)
        elif self.data is not None:
            source = self.data.val
        else:
            raise SettingError("which pictures? give calibrate(DATA), since none were trained on here")
        found = calibrate_logits(*self._logits(source), precision=precision)
        model.temperature = found.temperature
        if directory is not None:
            save_temperature(directory, found.temperature)
        return found

    def _labelled(self, data: str | os.PathLike[str] | Any) -> LabelledPictures:
        names = self._trained().class_names
        if isinstance(data, str | os.PathLike):
            return readable_files(labelled_folder(data, names), on_bad_image=self.on_bad_image)
        return from_datasets(data, data, class_names=names).val

    def _logits(self, source: LabelledPictures, *, tta: str | None = None) -> tuple[Tensor, Tensor]:
        model, device = self._trained(), choose_device(self.device)
        model.to(device)
        transform, views = tta_views(tta, model.eval_preset, model.preprocessing)
        batches = make_loader(
            self,
            source,
            transform,
            train=False,
            channels=model.preprocessing.channels,
            lost={} if self.on_bad_image == "skip" else None,
        )
        return collect_logits(model.network, batches, device, engine=self.engine, views=views)

    def predict(self, pictures: Pictures, *, min_confidence: float = 0.0, tta: str | None = None) -> list[Prediction]:
        """Classify pictures.

        Args:
            pictures: A file, a folder (searched through), a PIL image, or a list of these.
            min_confidence: Predictions below it are not :attr:`~Prediction.accepted`, 0 to 1.
            tta: Test-time augmentation, ``"flip"`` or ``"crops"``, as for :func:`transferkit.predict`.

        Returns:
            One :class:`Prediction` per picture that can be read.

        Raises:
            DataError: A path does not exist, or there is no picture.
            PictureError: A picture cannot be read, and none may be left out or none is left.
            SettingError: The model is not trained or loaded yet, or a setting is outside its range.
        """
        return list(self.stream_predictions(pictures, min_confidence=min_confidence, tta=tta))

    def stream_predictions(
        self,
        pictures: Pictures,
        *,
        min_confidence: float = 0.0,
        tta: str | None = None,
        on_progress: Callable[[int, int], object] | None = None,
    ) -> Iterator[Prediction]:
        """Do the same one after the other, for any number of pictures; see :func:`transferkit.stream_predictions`.

        Args:
            pictures: As for :meth:`predict`.
            min_confidence: Predictions below it are not accepted.
            tta: Test-time augmentation.
            on_progress: Called after each batch with the number of pictures that are done, and of all.

        Raises:
            DataError: A path does not exist, or there is no picture.
            PictureError: On the way: a picture cannot be read, and none may be left out or none is left.
            SettingError: The model is not trained or loaded yet, or a setting is outside its range.
        """
        return stream_predictions(
            self._trained(),
            pictures,
            batch_size=self.batch_size,
            num_workers=workers_for(self, sys.maxsize),  # a single batch starts none
            device=choose_device(self.device),
            engine=self.engine,
            on_bad_image=self.on_bad_image,
            min_confidence=min_confidence,
            tta=tta,
            on_progress=on_progress,
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

        check_whole_number("count", count, at_least=1)
        model = self._trained()
        if data is not None:
            source: LabelledPictures = labelled_folder(data, model.class_names)
        elif self.data is not None:
            source = self.data.val
        else:
            raise SettingError("which pictures? give plot_predictions(data=FOLDER), since none were trained on here")
        labelled = drawn_pictures(source, count=count, seed=self.seed, channels=model.preprocessing.channels)
        images = [image for image, _ in labelled]
        views = [
            PredictionView(image, said.label, said.confidence, model.class_names[label])
            for image, said, (_, label) in zip(images, self.predict(images), labelled, strict=True)
        ]
        figure = plot_predictions(views)
        if path is not None:
            save_figure(figure, path)
        return figure

    def _trained(self) -> TransferModel:
        if self.model is None:
            raise SettingError("there is no model yet: call fit(DATA) first, or Finetuner.load(DIRECTORY)")
        return self.model
