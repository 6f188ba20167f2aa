"""Commands that hand a trained model on: ``export`` and ``push``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from transferkit.cli._app import Json, Run, app, print_json

__all__ = ["export", "push"]


@app.command()
def export(
    run: Run,
    output: Annotated[Path, typer.Option(help="Where to write: NAME.onnx, NAME.pt2, or a folder for the Hub.")],
    to: Annotated[
        str, typer.Option("--to", help="onnx; pt2 (torch.export); or hub, a folder with a model card.")
    ] = "onnx",
    as_json: Json = False,
) -> None:
    """Write a trained model for other programs; a network's file is checked against the model before it is kept."""
    from transferkit.checkpoint import load_artifact
    from transferkit.exceptions import SettingError
    from transferkit.export import export_onnx, export_program
    from transferkit.hub import export_hub

    if to not in ("onnx", "pt2", "hub"):
        raise SettingError(f"--to {to}; it can be onnx, pt2 or hub")
    if to == "hub":
        export_hub(run, output)
        difference = None
    else:
        write = export_onnx if to == "onnx" else export_program
        difference = write(load_artifact(run), output).difference
    if as_json:
        print_json({"output": str(output), "to": to, "difference": difference})
        return
    typer.echo(f"written to {output}")
    if difference is None:
        typer.echo(f"  look at {output / 'README.md'}, then: transferkit push {output} --repo OWNER/NAME")
    else:
        typer.echo(f"  at batches of 1, 3 and 8 photographs its logits differ by {difference:.1g} at most")


@app.command()
def push(
    run: Annotated[Path, typer.Argument(help="Output folder of a run, any saved model, or a folder for the Hub.")],
    repo: Annotated[str, typer.Option(help="OWNER/NAME on the Hugging Face Hub; made if missing.")],
    private: Annotated[bool, typer.Option("--private", help="Let nobody else see a repository that is made.")] = False,
    as_json: Json = False,
) -> None:
    """Push a trained model to the Hugging Face Hub; a folder of `export --to hub` goes as it is."""
    import tempfile

    from transferkit.hub import CARD, export_hub, push_to_hub

    with tempfile.TemporaryDirectory() as place:
        folder = run if (run / CARD).is_file() else export_hub(run, place, repo_id=repo)
        address = push_to_hub(folder, repo, private=private)
    if as_json:
        print_json({"repo": repo, "url": address})
        return
    typer.echo(f"pushed to {address}")
