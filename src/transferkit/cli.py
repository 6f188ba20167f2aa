"""The ``transferkit`` command. Heavy imports live inside the commands, so that ``--help`` answers at once."""

from __future__ import annotations

import json
import logging
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from transferkit import __version__
from transferkit.allocator import tune_allocator
from transferkit.exceptions import TransferkitError
from transferkit.interrupts import EXIT_CODE, Interrupted

__all__ = ["app", "main"]

app = typer.Typer(
    name="transferkit",
    help="Fine-tune any torchvision or timm classifier on your own folder of pictures.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object to standard output and nothing else there.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps …; the best there is by default.")]
Data = Annotated[Path, typer.Argument(help="Folder with train/ and val/, or with one folder per class.")]
ModelName = Annotated[
    str, typer.Option("--model", help="torchvision/NAME, timm/NAME, or a bare name; see `transferkit models`.")
]
Weights = Annotated[str, typer.Option(help="default, a tag, a path to a state dict, bundled, or none.")]
BatchSize = Annotated[int, typer.Option(help="Pictures per batch.")]
ImageSize = Annotated[int | None, typer.Option(help="Input side in pixels; the weights' by default.")]
Seed = Annotated[int, typer.Option(help="Of everything that is random.")]
Engine = Annotated[
    str, typer.Option(help="What computes where nothing is trained: eager, compile, onnxruntime or openvino.")
]
OnBadImage = Annotated[
    str, typer.Option(help="Pictures that cannot be read: skip leaves them out and lists them, raise stops.")
]
Workers = Annotated[int | None, typer.Option(help="Processes that read pictures.")]
Run = Annotated[Path, typer.Argument(help="Output folder of a run, or any saved model.")]


def main() -> None:
    """Run the command line; a mistake of the user's ends with one sentence and exit code 2."""
    tune_allocator()
    try:
        app()
    except TransferkitError as error:
        typer.echo(f"transferkit: {error}", err=True)
        sys.exit(2)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Fine-tune any torchvision or timm classifier on your own folder of pictures."""
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("transferkit").setLevel(logging.INFO)


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder for pictures, runs and plots.")] = Path("transferkit-demo"),
    as_json: Json = False,
) -> None:
    """Run the whole job in under a minute, without a network: digits, from pretrained and from random weights."""
    from transferkit.demo import run_demo

    result = run_demo(output, progress=True)
    if as_json:
        _print_json(result.to_dict())
        return
    pretrained, random = result.pretrained.best(), result.random.best()
    typer.echo(f"""
best val_accuracy, same network and budget:
  pretrained weights  {pretrained.val_accuracy:.3f}  (epoch {pretrained.epoch})
  random weights      {random.val_accuracy:.3f}  (epoch {random.epoch})
{result.prediction.path} is a {result.prediction.label!r}, confidence {result.prediction.confidence:.2f}
written:
  {result.folder / "run"}/  the best model: model.safetensors, config.json, history.csv
  {result.folder / "curves.png"}, {result.folder / "predictions.png"}

Now your own folder of pictures, one folder per class:
  transferkit finetune PATH/TO/PICTURES --model torchvision/mobilenet_v2 --output runs/mine""")


@app.command()
def finetune(
    data: Data,
    model: ModelName = "torchvision/mobilenet_v2",
    weights: Weights = "default",
    policy: Annotated[
        str | None,
        typer.Option(help="head, full, gradual, until:STAGE or last:N; by default the head first, then everything."),
    ] = None,
    epochs: Annotated[int, typer.Option(help="Passes over the training pictures.")] = 5,
    batch_size: BatchSize = 16,
    lr: Annotated[float | None, typer.Option(help="Learning rate of the head; the recipe's by default.")] = None,
    image_size: ImageSize = None,
    in_chans: Annotated[int | None, typer.Option(help="Channels: 1 for greys, 3, or 4 with transparency.")] = None,
    small_images: Annotated[
        str, typer.Option(help="upsample: enlarge small pictures; stem: adapt the network's stem to them.")
    ] = "upsample",
    augment: Annotated[
        str | None, typer.Option(help="light, imagenet, cifar, trivial_augment or none; the recipe's by default.")
    ] = None,
    schedule: Annotated[
        str | None,
        typer.Option(help="constant, step, exponential, cosine, one_cycle or plateau; the recipe's by default."),
    ] = None,
    accumulate: Annotated[int, typer.Option(help="Batches per optimizer step.")] = 1,
    balanced: Annotated[bool, typer.Option("--balanced", help="Draw every class equally often.")] = False,
    ema: Annotated[float | None, typer.Option(help="Decay of an average of the weights, 0.999 for example.")] = None,
    patience: Annotated[int | None, typer.Option(help="Epochs without a better one after which to stop.")] = None,
    val_fraction: Annotated[float, typer.Option(help="Share held out where the data has no val/.")] = 0.2,
    on_bad_image: OnBadImage = "skip",
    seed: Seed = 0,
    output: Annotated[Path | None, typer.Option(help="Folder of the run; runs/NAME-OF-DATA by default.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a run that is already there.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run that is there, if one is.")] = False,
    checkpoint_every: Annotated[
        int | None, typer.Option(help="Steps between two resume states; by default one per epoch.")
    ] = None,
    checkpoint_interval: Annotated[float, typer.Option(help="Seconds between two resume states at least.")] = 5.0,
    device: Device = None,
    views: Annotated[
        int | None, typer.Option(help="Kept views of each augmented picture while stages are frozen (4), 0 for none.")
    ] = None,
    cache_budget: Annotated[
        str | None, typer.Option(help="Memory for what frozen stages gave, such as 2GB; the rest goes into files.")
    ] = None,
    cache_dir: Annotated[Path | None, typer.Option(help="Keep what frozen stages gave here for later runs.")] = None,
    engine: Engine = "eager",
    torch_compile: Annotated[
        bool, typer.Option("--torch-compile", help="Compile what trains, which takes a minute or so.")
    ] = False,
    resident: Annotated[
        bool | None,
        typer.Option("--resident/--no-resident", help="Keep decoded pictures on the device; on a GPU if they fit."),
    ] = None,
    shard: Annotated[bool, typer.Option("--shard", help="Spread the network over the processes (FSDP2).")] = False,
    workers: Workers = None,
    as_json: Json = False,
) -> None:
    """Fine-tune a pretrained network on a folder of pictures; saves the best model, curves and predictions."""
    import time
    import warnings

    from transferkit.devices import is_main_process
    from transferkit.finetuner import Finetuner

    started = time.perf_counter()
    if not is_main_process():  # the first process says it already
        logging.getLogger("transferkit").setLevel(logging.ERROR)
        warnings.simplefilter("ignore")
    folder = output if output is not None else Path("runs") / data.resolve().name
    tuner = Finetuner(
        model,
        weights=_weights(weights),
        policy=policy,
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        image_size=image_size,
        in_chans=in_chans,
        small_images=small_images,
        train_preset=augment,
        schedule=schedule,
        accumulate=accumulate,
        balanced=balanced,
        ema=ema,
        patience=patience,
        val_fraction=val_fraction,
        on_bad_image=on_bad_image,
        seed=seed,
        output_dir=folder,
        overwrite=overwrite,
        checkpoint_every=checkpoint_every,
        checkpoint_interval=checkpoint_interval,
        device=device,
        views=views,
        cache_budget=cache_budget,
        cache_dir=cache_dir,
        engine=engine,
        torch_compile=torch_compile,
        resident=resident,
        shard=shard,
        num_workers=workers,
        progress=is_main_process(),
    )
    try:
        history = tuner.fit(data, resume="auto" if resume else None)
    except Interrupted as error:
        if is_main_process():
            again = [each for each in sys.argv[1:] if each not in ("--resume", "--overwrite")]
            line = shlex.join(["transferkit", *again, "--resume"])
            typer.echo(f"transferkit: {error}; to go on:\n  {line}", err=True)
        raise typer.Exit(EXIT_CODE) from None  # typer ends with it at a KeyboardInterrupt too, but says nothing
    if not is_main_process():
        return
    tuner.plot_history(folder / "curves.png")
    tuner.plot_predictions(folder / "predictions.png")
    best = history.best()
    if as_json:
        _print_json(
            {
                "output": str(folder),
                "classes": list(tuner.model.class_names) if tuner.model is not None else [],
                "best": {"epoch": best.epoch, "val_accuracy": best.val_accuracy, "val_loss": best.val_loss},
                "history": history.to_dicts(),
                "seconds": time.perf_counter() - started,
            }
        )
        return
    typer.echo(f"""
best epoch {best.epoch}: val_accuracy {best.val_accuracy:.4f}, val_loss {best.val_loss:.4f}
saved in {folder}: model.safetensors, config.json, history.csv, curves.png, predictions.png
  transferkit predict {folder} PICTURES…
  transferkit evaluate {folder} DATA""")


@app.command()
def check(
    data: Data,
    val_fraction: Annotated[float, typer.Option(help="Share held out where the data has no val/.")] = 0.2,
    seed: Seed = 0,
    remember: Annotated[
        bool, typer.Option("--remember/--no-remember", help="Keep what is found of each file for the next look.")
    ] = True,
    as_json: Json = False,
) -> None:
    """Look at every picture of a folder before training: what cannot be read, leaks, wrong labels, copies and more.

    Ends with 1 where something would hurt.
    """
    from rich.console import Console
    from rich.progress import Progress

    from transferkit.check import check_data

    shown = Console(stderr=True)
    with Progress(console=shown, transient=True, disable=not shown.is_terminal) as bar:
        task = bar.add_task("looking at pictures", total=None)
        found = check_data(
            data,
            val_fraction=val_fraction,
            seed=seed,
            remember=remember,
            on_progress=lambda done, count: bar.update(task, completed=done, total=count),
        )
    if as_json:
        _print_json(found.to_dict())
    else:
        labels = list(dict.fromkeys(label for counts in found.counts.values() for label in counts))
        rows = [["class", *found.counts]]
        rows += [[label, *(f"{counts.get(label, 0):,}" for counts in found.counts.values())] for label in labels]
        rows.append(["all", *(f"{sum(counts.values()):,}" for counts in found.counts.values())])
        _print_table(rows)
        typer.echo()
        for finding in found.findings:
            typer.echo(f"{'!' if finding.hurts else '-'} {finding.kind}: {finding.message}")
        typer.echo("something here would hurt (!)" if found.hurts else "nothing found that would hurt")
    if found.hurts:
        raise typer.Exit(1)


@app.command()
def find_lr(
    data: Data,
    model: ModelName = "torchvision/mobilenet_v2",
    weights: Weights = "default",
    policy: Annotated[str, typer.Option(help="head, full, gradual, until:STAGE or last:N.")] = "head",
    batch_size: BatchSize = 16,
    image_size: ImageSize = None,
    steps: Annotated[int, typer.Option(help="Learning rates to try, one batch each.")] = 100,
    seed: Seed = 0,
    on_bad_image: OnBadImage = "skip",
    plot: Annotated[Path | None, typer.Option(help="Where to draw the losses, .png, .svg or .pdf.")] = None,
    device: Device = None,
    workers: Workers = None,
    as_json: Json = False,
) -> None:
    """Suggest a learning rate for a policy: each batch is tried with a higher one, on a copy of the network."""
    from transferkit.finetuner import Finetuner

    tuner = Finetuner(
        model,
        weights=_weights(weights),
        policy=policy,
        batch_size=batch_size,
        image_size=image_size,
        on_bad_image=on_bad_image,
        seed=seed,
        device=device,
        num_workers=workers,
    )
    finding = tuner.find_lr(data, steps=steps)
    if plot is not None:
        finding.plot(plot)
    if as_json:
        _print_json({"suggestion": finding.suggestion, "lrs": list(finding.lrs), "losses": list(finding.losses)})
        return
    typer.echo(f"suggested lr {finding.suggestion:.2g}")
    typer.echo(f"  transferkit finetune {data} --model {model} --policy {policy} --lr {finding.suggestion:.2g}")


@app.command()
def evaluate(
    run: Run,
    data: Annotated[Path, typer.Argument(help="Folder of class folders, or one with val/ in it.")],
    on_bad_image: OnBadImage = "skip",
    batch_size: BatchSize = 16,
    device: Device = None,
    engine: Engine = "eager",
    as_json: Json = False,
) -> None:
    """Measure a trained model on labelled pictures."""
    from transferkit.finetuner import Finetuner

    tuner = Finetuner.load(run, batch_size=batch_size, device=device, engine=engine, on_bad_image=on_bad_image)
    result = tuner.evaluate(data)
    if as_json:
        _print_json(result)
        return
    rows = [["class", "count", "precision", "recall", "f1"]]
    for name, figures in result["per_class"].items():
        shares = [f"{figures[key]:.3f}" for key in ("precision", "recall", "f1")]
        rows.append([name, str(figures["count"]), *shares])
    typer.echo(f"accuracy {result['accuracy']:.4f}  loss {result['loss']:.4f}  {result['count']} pictures")
    _print_table(rows)


@app.command()
def predict(
    run: Run,
    pictures: Annotated[list[Path], typer.Argument(help="Picture files, or folders of them.")],
    top: Annotated[int, typer.Option(min=1, help="How many classes to show for each picture.")] = 1,
    on_bad_image: OnBadImage = "skip",
    batch_size: BatchSize = 16,
    device: Device = None,
    engine: Engine = "eager",
    as_json: Json = False,
) -> None:
    """Classify pictures with a trained model."""
    from transferkit.finetuner import Finetuner

    tuner = Finetuner.load(run, batch_size=batch_size, device=device, engine=engine, on_bad_image=on_bad_image)
    predictions = tuner.predict(pictures)
    if as_json:
        _print_json(
            {
                "predictions": [
                    {
                        "path": each.path,
                        "label": each.label,
                        "confidence": each.confidence,
                        "top": [list(pair) for pair in each.top(top)],
                    }
                    for each in predictions
                ]
            }
        )
        return
    _print_table([[str(each.path), *(f"{name} {share:.3f}" for name, share in each.top(top))] for each in predictions])


@app.command()
def models(
    pattern: Annotated[str, typer.Argument(help="Part of a name, or a shell pattern such as 'timm/conv*'.")] = "*",
    as_json: Json = False,
) -> None:
    """List the networks: name, parameters, input size, licence of the weights where timm states it."""
    from transferkit.backbones import list_models, model_info
    from transferkit.exceptions import UnknownModelError

    names = list_models(pattern)
    if not names:
        raise UnknownModelError(f"no torchvision or timm classifier matches {pattern!r}; try a part of its name")
    infos = [model_info(name) for name in names]
    if as_json:
        _print_json({"models": [info._asdict() for info in infos]})
        return
    rows = [["name", "parameters", "input", "licence of weights"]]
    rows += [
        [
            info.name,
            "–" if info.parameters is None else f"{info.parameters / 1e6:.1f} M",
            f"{info.input_size} px",
            info.licence or "not stated",
        ]
        for info in infos
    ]
    _print_table(rows)


@app.command()
def stages(
    model: Annotated[str, typer.Argument(help="torchvision/NAME, timm/NAME, or a bare name.")],
    image_size: ImageSize = None,
    num_classes: Annotated[int, typer.Option(help="Width of the new head.")] = 1000,
    as_json: Json = False,
) -> None:
    """Show a network's stages, which freeze policies name: parameters, batch norm, native modules."""
    from transferkit.create import outline

    network = outline(model, num_classes=num_classes, image_size=image_size)
    if as_json:
        _print_json(
            {
                "model": network.name,
                "num_features": network.num_features,
                "stages": [
                    {
                        "name": stage.name,
                        "parameters": stage.num_parameters,
                        "batch_norm": stage.has_batch_norm,
                        "modules": list(stage.paths),
                    }
                    for stage in network.stages
                ],
            }
        )
        return
    total = sum(stage.num_parameters for stage in network.stages)
    typer.echo(
        f"{network.name}: {total:,} parameters, {network.preprocessing.size} px, {network.num_features} features"
    )
    rows = [["stage", "parameters", "batch norm", "native modules"]]
    for stage in network.stages:
        ends = stage.paths if len(stage.paths) < 4 else (stage.paths[0], "…", stage.paths[-1])
        norm = "yes" if stage.has_batch_norm else "–"
        rows.append([stage.name, f"{stage.num_parameters:>12,}", norm, ", ".join(ends)])
    _print_table(rows)


def _weights(text: str) -> str | None:
    return None if text.lower() == "none" else text


def _print_json(values: Any) -> None:
    typer.echo(json.dumps(values, ensure_ascii=False, allow_nan=False))


def _print_table(rows: list[list[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
