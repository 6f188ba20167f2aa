"""Commands that use a trained model: ``evaluate``, ``calibrate`` and ``predict``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from transferkit.cli._app import BatchSize, Device, Engine, Json, OnBadImage, Run, app, print_json, print_table

__all__ = ["calibrate", "evaluate", "predict"]

Labelled = Annotated[Path, typer.Argument(help="Folder of class folders, or one with val/ in it.")]
Tta = Annotated[
    str | None,
    typer.Option("--tta", help="Look several times and average: flip (its mirror image too) or crops (five parts)."),
]


@app.command()
def evaluate(
    run: Run,
    data: Labelled,
    tta: Tta = None,
    on_bad_image: OnBadImage = "skip",
    batch_size: BatchSize = 16,
    device: Device = None,
    engine: Engine = "eager",
    as_json: Json = False,
) -> None:
    """Measure a trained model on labelled pictures."""
    from transferkit.finetuner import Finetuner

    tuner = Finetuner.load(run, batch_size=batch_size, device=device, engine=engine, on_bad_image=on_bad_image)
    result = tuner.evaluate(data, tta=tta)
    if as_json:
        print_json(result)
        return
    rows = [["class", "count", "precision", "recall", "f1"]]
    for name, figures in result["per_class"].items():
        shares = [f"{figures[key]:.3f}" for key in ("precision", "recall", "f1")]
        rows.append([name, str(figures["count"]), *shares])
    low, high = result["accuracy_interval"]
    typer.echo(
        f"accuracy {result['accuracy']:.4f} (95 %: {low:.3f} to {high:.3f})  loss {result['loss']:.4f}  "
        f"calibration error {result['ece']:.3f}  {result['count']} pictures"
    )
    print_table(rows)


@app.command()
def calibrate(
    run: Run,
    data: Labelled,
    precision: Annotated[
        float | None, typer.Option(help="Also find the confidence from which on this share of the answers is right.")
    ] = None,
    on_bad_image: OnBadImage = "skip",
    batch_size: BatchSize = 16,
    device: Device = None,
    engine: Engine = "eager",
    as_json: Json = False,
) -> None:
    """Fit a trained model's confidences to labelled pictures that it was not trained on, and keep that with it."""
    from transferkit.finetuner import Finetuner

    tuner = Finetuner.load(run, batch_size=batch_size, device=device, engine=engine, on_bad_image=on_bad_image)
    found = tuner.calibrate(data, precision=precision, directory=run)
    if as_json:
        print_json(found.to_dict())
        return
    typer.echo(f"temperature {found.temperature:.3f} from {found.count} pictures, kept in {run / 'config.json'}")
    print_table(
        [
            ["", "before", "after"],
            ["calibration error", f"{found.ece_before:.4f}", f"{found.ece_after:.4f}"],
            ["negative log-likelihood", f"{found.nll_before:.4f}", f"{found.nll_after:.4f}"],
        ]
    )
    if found.threshold is not None:
        typer.echo(
            f"of the {found.threshold.coverage:.1%} with a confidence of {found.threshold.confidence:.4f} or more, "
            f"{found.threshold.precision:.1%} are right:\n"
            f"  transferkit predict {run} PICTURES… --min-confidence {found.threshold.confidence:.4f}"
        )


@app.command()
def predict(
    run: Run,
    pictures: Annotated[list[Path], typer.Argument(help="Picture files, or folders of them.")],
    top: Annotated[int, typer.Option(min=1, help="How many classes to show for each picture.")] = 1,
    min_confidence: Annotated[
        float, typer.Option(help="Below it a picture is called unsure, and its label is left empty.")
    ] = 0.0,
    tta: Tta = None,
    csv: Annotated[Path | None, typer.Option(help="Write a row per picture into this file instead.")] = None,
    on_bad_image: OnBadImage = "skip",
    batch_size: BatchSize = 16,
    device: Device = None,
    engine: Engine = "eager",
    as_json: Json = False,
) -> None:
    """Classify pictures with a trained model."""
    from transferkit.finetuner import Finetuner
    from transferkit.prediction import save_predictions

    tuner = Finetuner.load(run, batch_size=batch_size, device=device, engine=engine, on_bad_image=on_bad_image)
    with _progress() as on_progress:
        found = tuner.stream_predictions(pictures, min_confidence=min_confidence, tta=tta, on_progress=on_progress)
        if csv is not None:
            count = save_predictions(found, csv, top=top)
        else:
            predictions = list(found)
    if csv is not None:
        if as_json:
            print_json({"csv": str(csv), "count": count})
        else:
            typer.echo(f"{count} predictions written into {csv}")
        return
    if as_json:
        print_json(
            {
                "predictions": [
                    {
                        "path": each.path,
                        "label": each.label if each.accepted else None,
                        "confidence": each.confidence,
                        "top": [list(pair) for pair in each.top(top)],
                    }
                    for each in predictions
                ]
            }
        )
        return
    rows = []
    for each in predictions:
        first, *others = (f"{name} {share:.3f}" for name, share in each.top(top))
        rows.append([str(each.path), first if each.accepted else f"unsure ({first})", *others])
    print_table(rows)


@contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    """Show a bar on standard error, where that is a terminal."""
    from rich.console import Console
    from rich.progress import Progress

    shown = Console(stderr=True)
    with Progress(console=shown, transient=True, disable=not shown.is_terminal) as bar:
        task = bar.add_task("classifying", total=None)
        yield lambda done, count: bar.update(task, completed=done, total=count)
