"""A folder for the Hugging Face Hub: a trained model as plain files, with a model card filled from its run."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transferkit.artifact_config import sealed
from transferkit.calibration import wilson_interval
from transferkit.checkpoint import CONFIG, HISTORY, WEIGHTS, read_config, read_weights, save_artifact
from transferkit.exceptions import ArtifactError, ExportError, OutputError, SettingError, one_line
from transferkit.export import whole_files
from transferkit.history import History
from transferkit.model import TransferModel
from transferkit.pages import markdown_table

__all__ = ["CARD", "export_hub", "model_card", "push_to_hub"]

CARD = "README.md"
_BUNDLED = "transferkit bundled"
# Facts of a run that the recipe's table shows, by their names in it.
_RECIPE = {
    "policy": "freeze policy",
    "epochs": "epochs",
    "batch_size": "batch size",
    "optimizer": "optimizer",
    "lr": "learning rate of the head",
    "head_lr_multiplier": "head learns faster by",
    "layer_decay": "factor from stage to stage",
    "schedule": "schedule",
    "weight_decay": "weight decay",
    "train_preset": "augmentation",
    "label_smoothing": "label smoothing",
    "mixup": "mixup",
    "cutmix": "cutmix",
    "ema": "average of the weights (EMA)",
    "seed": "seed",
}


def export_hub(
    source: TransferModel | str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    repo_id: str | None = None,
    licence: str | None = None,
) -> Path:
    """Write a folder that goes to the Hub as it is: weights, ``config.json``, history, and a model card.

    ``timm.create_model("local-dir:FOLDER", pretrained=True)`` opens it where the network is timm's own, and from the
    Hub ``"hf-hub:OWNER/NAME"``. Settings of the run that may name places on this machine are left out.

    Args:
        source: The output folder of a run, or any saved model, whose record fills the card; or a model in memory, of
            which no record is known.
        folder: Where to write; made if missing. Files of the same names are replaced.
        repo_id: ``"OWNER/NAME"`` on the Hub, for the card; ``None`` leaves it open.
        licence: Of the trained weights, as the Hub abbreviates it; ``None`` for that of the pretrained weights where
            timm states it, else the card says that none is stated.

    Returns:
        The folder.

    Raises:
        ArtifactError: ``source`` holds no saved model, or a damaged one.
        OutputError: The folder cannot be written, or is the run's own.
        SettingError: ``repo_id`` is no ``"OWNER/NAME"``.

    Source: timm ``save_for_hf`` for the layout; the Hub's model card specification for the head of the card.

    Example:
        >>> import tempfile
        >>> from transferkit.create import create_model
        >>> model = create_model("timm/test_efficientnet", weights=None, class_names=["ant", "bee"], image_size=32)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     sorted(file.name for file in export_hub(model, folder, repo_id="me/bees").iterdir())
        ['README.md', 'config.json', 'model.safetensors']
    """
    target = Path(folder)
    if repo_id is not None:
        _check_repo_id(repo_id)
    if not isinstance(source, TransferModel) and target.resolve() == Path(source).resolve():
        raise OutputError(f"{folder} is the folder of the run itself; choose another for the Hub")
    with whole_files(target) as place:
        history = History()
        if isinstance(source, TransferModel):
            save_artifact(source, place)
            config = read_config(place)
        else:
            config = read_config(source)
            read_weights(source)
            shutil.copyfile(Path(source) / WEIGHTS, place / WEIGHTS)
            if (Path(source) / HISTORY).is_file():
                history = History.load_csv(Path(source) / HISTORY)
                history.save_csv(place / HISTORY)
        own = config["transferkit"]
        published = {
            **{key: value for key, value in config.items() if key != "run"},
            "transferkit": {**own, "weights": _without_folder(own["weights"])},
        }
        texts = {
            CONFIG: json.dumps(sealed(published), indent=2, ensure_ascii=False) + "\n",
            CARD: model_card(config, history, folder=target.resolve().name, repo_id=repo_id, licence=licence),
        }
        for name, text in texts.items():
            (place / name).write_bytes(text.encode("utf-8", "backslashreplace"))
        read_weights(place)  # the config and the weights of a run that was killed need not belong together
    return target


def push_to_hub(folder: str | os.PathLike[str], repo_id: str, *, private: bool = False) -> str:
    """Upload a folder that :func:`export_hub` wrote, as one commit; its repository is made if missing.

    It goes as the user that ``hf auth login`` or ``HF_TOKEN`` names.

    Args:
        folder: The folder; what was added to it goes along.
        repo_id: ``"OWNER/NAME"``.
        private: Whether a repository that is made is private; one that is there stays as it is.

    Returns:
        The address of the repository.

    Raises:
        ArtifactError: The folder holds no model card or no model.
        SettingError: ``repo_id`` is no ``"OWNER/NAME"``.
        ExportError: It cannot be uploaded: no connection, no right, or the Hub refuses it.

    Source: ``huggingface_hub.create_repo`` and ``upload_folder``.
    """
    import huggingface_hub

    _check_repo_id(repo_id)
    read_config(folder)
    if not (Path(folder) / CARD).is_file():
        raise ArtifactError(f"{folder} has no model card ({CARD}); write it with export_hub, or transferkit export")
    try:
        address = huggingface_hub.create_repo(repo_id, private=private, exist_ok=True)
        message = "Model trained with transferkit"
        huggingface_hub.upload_folder(repo_id=repo_id, folder_path=Path(folder), commit_message=message)
    except Exception as error:  # whatever the Hub's client, and what it stands on, raise
        raise ExportError(
            f"{repo_id} could not be pushed to ({one_line(error) or type(error).__name__}); check the name and "
            "the connection, and log in with `hf auth login`"
        ) from error
    return str(address)


def model_card(
    config: Mapping[str, Any],
    history: History,
    *,
    folder: str,
    repo_id: str | None = None,
    licence: str | None = None,
) -> str:
    """Write the model card of a saved model.

    Args:
        config: Its ``config.json``; what it has under ``"run"`` fills data, figures and recipe.
        history: Of its run, without records where none is known.
        folder: Name of the folder that the card lies in.
        repo_id: ``"OWNER/NAME"`` on the Hub, or ``None``.
        licence: As for :func:`export_hub`.

    Returns:
        Markdown, with the metadata that the Hub reads as YAML at its head.

    Source: the Hub's model card specification.
    """
    from huggingface_hub import ModelCardData

    own, run = config["transferkit"], config.get("run", {})
    counts: Mapping[str, Mapping[str, int]] = run.get("data", {})
    validated = sum(counts.get("val", {}).values())
    library, _, architecture = own["backbone"].partition("/")
    base, stated = _origin(own["weights"])
    classes = len(own["class_names"])
    sections = {
        "Classes": _classes(own["class_names"], counts),
        "Data": _data(counts),
        "Figures": _figures(run.get("best"), history, validated),
        "Recipe": _recipe(own, run),
        "Preprocessing": _preprocessing(own),
        "Limits": _limits(validated, classes, own.get("temperature", 1.0)),
        "Licence": _licence(licence, stated, own["weights"]),
        "Use": _use(config, folder=folder, repo_id=repo_id),
    }
    metadata = ModelCardData(
        library_name="timm" if library == "timm" and own["native"] else "transferkit",
        pipeline_tag="image-classification",
        tags=["image-classification", "transferkit", *([library] if library in ("timm", "torchvision") else [])],
        base_model=base,
        license=licence or stated,
        metrics=["accuracy"],
    )
    title = repo_id.partition("/")[2] if repo_id else folder
    lines = ["---", metadata.to_yaml(), "---", "", f"# {title}", ""]
    told = f"{architecture} ({library}) that tells {classes} classes of pictures apart, trained with transferkit."
    lines += [told, ""]
    for name, text in sections.items():
        lines += [f"## {name}", "", *text, ""]
    return "\n".join(lines)


def _check_repo_id(repo_id: str) -> None:
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # it does not list what it offers

    try:
        validate_repo_id(repo_id)
        right = repo_id.count("/") == 1
    except ValueError:
        right = False
    if not right:
        raise SettingError(f"{repo_id!r} cannot be a model's name on the Hub; give OWNER/NAME, such as me/bees")


def _without_folder(weights: str | None) -> str | None:
    """Leave of a path what tells nothing of the machine it was on."""
    return Path(weights).name if weights and os.sep in weights else weights


def _origin(weights: str | None) -> tuple[str | None, str | None]:
    """Return the Hub's name of pretrained weights and their licence, where they are known."""
    if weights == _BUNDLED:
        return None, "apache-2.0"
    from timm.models import get_pretrained_cfg

    library, _, name = (weights or "").partition(" ")
    if library != "timm":
        return None, None
    try:
        stated = get_pretrained_cfg(name)
    except RuntimeError:  # the installed timm does not know the tag
        stated = None
    return getattr(stated, "hf_hub_id", None), getattr(stated, "license", None)


def _classes(names: Sequence[str], counts: Mapping[str, Mapping[str, int]]) -> list[str]:
    titles = {"train": "training pictures", "val": "validation pictures"}
    rows: list[list[object]] = [["logit", "class", *(titles.get(part, part) for part in counts)]]
    rows += [[index, name, *(part.get(name, 0) for part in counts.values())] for index, name in enumerate(names)]
    return markdown_table(rows)


def _data(counts: Mapping[str, Mapping[str, int]]) -> list[str]:
    if not counts:
        return ["The record of the training is not part of this model, so its pictures are not known."]
    train, val = (sum(counts.get(part, {}).values()) for part in ("train", "val"))
    return [f"Trained on {train:,} pictures; {val:,} others were held out to validate."]


def _figures(best: Mapping[str, Any] | None, history: History, count: int) -> list[str]:
    if best is None:
        return ["No figures were recorded."]
    accuracy = best["val_accuracy"]
    measured = f"accuracy {accuracy:.4f}, loss {best['val_loss']:.4f} after epoch {best['epoch']}, the best"
    if count:
        low, high = wilson_interval(round(accuracy * count), count)
        measured += f". The accuracy's 95 % interval (Wilson) is {low:.3f} to {high:.3f}"
    names = ("epoch", "train_loss", "val_loss", "val_accuracy")
    rows = [
        names,
        *([each.epoch, *(f"{getattr(each, name):.4f}" for name in names[1:])] for each in history),
    ]
    return [f"On the validation pictures: {measured}.", *(["", *markdown_table(rows)] if len(history) else [])]


def _recipe(own: Mapping[str, Any], run: Mapping[str, Any]) -> list[str]:
    # What was left to the recipe stands in the identity alone, which a run without an output folder lacks.
    facts = {**run.get("settings", {}), **(run.get("identity") or {})}
    environment = {**own["versions"], **run.get("environment", {})}
    rows: list[list[object]] = [
        ["", ""],
        ["backbone", own["backbone"]],
        ["pretrained weights", _without_folder(own["weights"]) or "none, drawn at random"],
        *([name, facts[key]] for key, name in _RECIPE.items() if facts.get(key) is not None),
    ]
    if "seconds" in run:
        rows.append(["time", f"{run['seconds']:.0f} s"])
    return markdown_table([*rows, *environment.items()])


def _preprocessing(own: Mapping[str, Any]) -> list[str]:
    how = own["preprocessing"]
    size, resize_size, channels = how["size"], how["resize_size"], len(how["mean"])
    square, middle = f"{size} × {size}", f"then the middle {size} × {size} is cut out"
    steps = {
        "center": f"The shorter side is resized to {resize_size} pixels, {middle}",
        "squash": f"The picture is squeezed into {resize_size} × {resize_size} pixels, {middle}",
        "border": f"The longer side is resized to {resize_size} pixels, then {square} are filled up with the mean",
        "cifar": f"The shorter side is resized to 32 pixels, the middle 32 × 32 is cut out and resized to {square}",
    }
    kind = {1: "grey", 3: "RGB", 4: "RGBA"}.get(channels, f"in {channels} channels")
    return [
        f"{steps['cifar' if own['eval_transform'] == 'cifar' else how['crop']]}; the interpolation is "
        f"{how['interpolation']}. Pixels in [0, 1], {kind}, become `(pixel - mean) / std` with mean {how['mean']} "
        f"and std {how['std']}."
    ]


def _limits(count: int, classes: int, temperature: float) -> list[str]:
    measured = f"{count:,} validation pictures" if count else "unknown validation pictures"
    calibrated = (
        "Its confidences were not calibrated."
        if temperature == 1.0
        else f"Divided by the temperature {temperature:.4g}, its logits give confidences calibrated on those pictures."
    )
    return [
        f"- It gives one of {classes} classes to every picture, also to one that shows none of them.",
        f"- It was measured on {measured}, which come from where the training pictures come from and also chose the "
        "best epoch. Expect somewhat less on new ones. On other data it was not tested.",
        f"- {calibrated}",
        "- What its training pictures, and those of its pretrained weights, lack or distort, it lacks and distorts.",
    ]


def _licence(licence: str | None, stated: str | None, weights: str | None) -> list[str]:
    if weights is None:
        return [f"{licence or 'None is stated'}. It was trained from random weights."]
    base = f"The pretrained weights have {stated}" if stated else "None is stated for the pretrained weights"
    return [f"{licence}. {base}." if licence else f"{base}."]


def _use(config: Mapping[str, Any], *, folder: str, repo_id: str | None) -> list[str]:
    own = config["transferkit"]
    library, _, architecture = own["backbone"].partition("/")
    if repo_id:
        fetch, place = ["from huggingface_hub import snapshot_download", ""], f'snapshot_download("{repo_id}")'
    else:
        fetch, place = [], json.dumps(folder, ensure_ascii=False)
    network = ", network=YourModule()" if library == "module" else ""
    lines = ["With transferkit, pictures are prepared as above:", "", "```python", *fetch]
    lines += ["from transferkit import Finetuner", "", f"tuner = Finetuner.load({place}{network})"]
    lines += ['print(tuner.predict("picture.jpg")[0].label)', "```"]
    if library == "timm" and own["native"]:
        name = json.dumps(f"hf-hub:{repo_id}" if repo_id else f"local-dir:{folder}", ensure_ascii=False)
        lines += ["", "With timm alone:", "", "```python", "import timm", ""]
        lines += [f"network = timm.create_model({name}, pretrained=True).eval()"]
        lines += ["transform = timm.data.create_transform(**timm.data.resolve_model_data_config(network))", "```"]
    if library == "torchvision" and own["native"]:
        arguments = "".join(f", {key}={value!r}" for key, value in config["model_args"].items())
        build = f'"{architecture}", num_classes={len(own["class_names"])}{arguments}'
        weights = f'{place} + "/{WEIGHTS}"' if repo_id else json.dumps(f"{folder}/{WEIGHTS}", ensure_ascii=False)
        lines += ["", "With torchvision alone:", "", "```python", *fetch[:1], "import torchvision"]
        lines += ["from safetensors.torch import load_file", ""]
        lines += [f"network = torchvision.models.get_model({build})"]
        # the network's own state has the versions of its modules, which MNASNet asks for
        lines += ["state = network.state_dict()", f"state.update(load_file({weights}))"]
        lines += ["network.load_state_dict(state)", "network.eval()", "```"]
    return lines
