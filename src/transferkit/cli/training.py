"""Commands that train: ``demo``, ``finetune`` and ``find-lr``."""

from __future__ import annotations

import logging
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from transferkit.cli._app import (
    BatchSize,
    Data,
    Device,
    Engine,
    ImageSize,
    Json,
    ModelName,
    OnBadImage,
    Seed,
    Weights,
    Workers,
    app,
    print_json,
    weights_named,
)
from transferkit.interrupts import EXIT_CODE, Interrupted

__all__ = ["demo", "find_lr", "finetune"]


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder for pictures, runs and plots.")] = Path("transferkit-demo"),
    as_json: Json = False,
) -> None:
    """Run the whole job in under a minute, without a network: digits, from pretrained and from random weights."""
    from transferkit.demo import run_demo

    result = run_demo(output, progress=True)
    if as_json:
        print_json(result.to_dict())
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
    natural_sort: Annotated[
        bool, typer.Option("--natural-sort", help="Sort classes by the numbers in their names, 2 before 10.")
    ] = False,
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
    precision: Annotated[
        str,
        typer.Option(help="What training computes in: fp32, bf16, fp16 (CUDA), or auto: bf16 on GPUs that have it."),
    ] = "auto",
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
    track: Annotated[
        list[str] | None, typer.Option(help="Log the run to tensorboard, wandb or mlflow; can be given several times.")
    ] = None,
    workers: Workers = None,
    as_json: Json = False,
) -> None:
    """Fine-tune a pretrained network on a folder of pictures; saves the best model, curves and predictions."""
    import time
    import warnings

    from transferkit.callbacks import Tracker
    from transferkit.devices import is_main_process
    from transferkit.finetuner import Finetuner
    from transferkit.report import write_report

    started = time.perf_counter()
    if not is_main_process():  # the first process says it already
        logging.getLogger("transferkit").setLevel(logging.ERROR)
        warnings.simplefilter("ignore")
    folder = output if output is not None else Path("runs") / data.resolve().name
    tuner = Finetuner(
        model,
        weights=weights_named(weights),
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
        natural_sort=natural_sort,
        on_bad_image=on_bad_image,
        seed=seed,
        output_dir=folder,
        overwrite=overwrite,
        checkpoint_every=checkpoint_every,
        checkpoint_interval=checkpoint_interval,
        device=device,
        precision=precision,
        views=views,
        cache_budget=cache_budget,
        cache_dir=cache_dir,
        engine=engine,
        torch_compile=torch_compile,
        resident=resident,
        shard=shard,
        num_workers=workers,
        callbacks=[Tracker(name) for name in dict.fromkeys(track or ())],
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
    report = write_report(folder, model=tuner.model, device=device)
    best = history.best()
    if as_json:
        print_json(
            {
                "output": str(folder),
                "report": str(report),
                "classes": list(tuner.model.class_names) if tuner.model is not None else [],
                "best": {"epoch": best.epoch, "val_accuracy": best.val_accuracy, "val_loss": best.val_loss},
                "history": history.to_dicts(),
                "seconds": time.perf_counter() - started,
            }
        )
        return
    typer.echo(f"""
best epoch {best.epoch}: val_accuracy {best.val_accuracy:.4f}, val_loss {best.val_loss:.4f}
saved in {folder}: model.safetensors, config.json, history.csv, validation.csv, curves.png, predictions.png
open {report}
  transferkit predict {folder} PICTURES…
  transferkit evaluate {folder} DATA""")


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
        weights=weights_named(weights),
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
        print_json({"suggestion": finding.suggestion, "lrs": list(finding.lrs), "losses": list(finding.losses)})
        return
    typer.echo(f"suggested lr {finding.suggestion:.2g}")
    typer.echo(f"  transferkit finetune {data} --model {model} --policy {policy} --lr {finding.suggestion:.2g}")
