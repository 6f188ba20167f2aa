"""Commands that look at data and networks and train nothing: ``check``, ``models`` and ``stages``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from transferkit.cli._app import Data, ImageSize, Json, Seed, app, print_json, print_table

__all__ = ["check", "models", "stages"]


@app.command()
def check(
    data: Data,
    val_fraction: Annotated[float, typer.Option(help="Share held out where the data has no val/.")] = 0.2,
    seed: Seed = 0,
    cache_dir: Annotated[
        Path | None, typer.Option(help="That of an earlier run, whose features then find more near duplicates.")
    ] = None,
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
            cache_dir=cache_dir,
            on_progress=lambda done, count: bar.update(task, completed=done, total=count),
        )
    if as_json:
        print_json(found.to_dict())
    else:
        labels = list(dict.fromkeys(label for counts in found.counts.values() for label in counts))
        rows = [["class", *found.counts]]
        rows += [[label, *(f"{counts.get(label, 0):,}" for counts in found.counts.values())] for label in labels]
        rows.append(["all", *(f"{sum(counts.values()):,}" for counts in found.counts.values())])
        print_table(rows)
        typer.echo()
        for finding in found.findings:
            typer.echo(f"{'!' if finding.hurts else '-'} {finding.kind}: {finding.message}")
        typer.echo("something here would hurt (!)" if found.hurts else "nothing found that would hurt")
    if found.hurts:
        raise typer.Exit(1)


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
        print_json({"models": [info._asdict() for info in infos]})
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
    print_table(rows)


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
        print_json(
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
    print_table(rows)
