"""Does a temperature help, and from how many pictures on? Fitted on some validation pictures, measured on others.

    python benchmarks/calibration.py ASSETS

Heads trained on frozen ImageNet weights, 3 seeds. Each figure of a seed is the mean over draws of the part.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from _report import markdown_table, mean_spread
from _runs import hand_out, heading
from default_recipe import NETWORKS, SEEDS
from torch import Tensor
from torch.nn import functional as F

from transferkit import Finetuner
from transferkit.calibration import PRIOR, confidences_of, expected_calibration_error, fit_temperature
from transferkit.callbacks import Callback
from transferkit.trainer import Trainer

DATA = ("hymenoptera_data", "flowers5_small")
EPOCHS = (5, 25)
HALVES, DRAWS = 100, 40
COUNTS = (10, 20, 30, 50, 75)
PRIORS = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)


class KeepLogits(Callback):
    """Keeps what the best epoch says of the validation pictures."""

    def on_validation_end(self, trainer: Trainer) -> None:
        """Keep it, if this epoch is the best so far."""
        if trainer.history.best() is trainer.history.records[-1]:
            self.logits, self.labels = trainer.val_logits


def trained(
    assets: Path, network: str, data: str, *callbacks: Callback, seed: int, epochs: int, cache: Path
) -> Finetuner:
    """Train a head alone, and keep its best epoch; what lies below runs over the pictures once for all seeds."""
    tuner = Finetuner(
        f"torchvision/{network}",
        weights=assets / "weights" / NETWORKS[network],
        policy="head",
        epochs=epochs,
        seed=seed,
        cache_dir=cache,
        callbacks=callbacks,
        progress=False,
    )
    tuner.fit(assets / data)
    return tuner


def val_logits(assets: Path, network: str, data: str, **settings: Any) -> tuple[Tensor, Tensor]:
    kept = KeepLogits()
    trained(assets, network, data, kept, **settings)
    return kept.logits, kept.labels


def figures(logits: Tensor, labels: Tensor, temperature: float) -> tuple[float, float]:
    """Return calibration error and negative log-likelihood."""
    error = expected_calibration_error(*confidences_of(logits, labels, temperature=temperature))
    return error, F.cross_entropy(logits.double() / temperature, labels).item()


def parts(count: int, size: int, seed: int, draws: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Draw which pictures a temperature is fitted on, and give the rest too."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(draws):
        order = torch.randperm(count, generator=generator)
        yield order[:size], order[size:]


def halves(logits: Tensor, labels: Tensor, seed: int) -> list[float]:
    """Fit on a half; returns the temperature, then errors and losses of the other half, as the first table has them."""
    rows = []
    generator = torch.Generator().manual_seed(seed)
    for fitted, held_out in parts(len(labels), len(labels) // 2, seed, HALVES):
        temperature, plain = (fit_temperature(logits[fitted], labels[fitted], prior=prior) for prior in (PRIOR, 0.0))
        before, after, without = (figures(logits[held_out], labels[held_out], each) for each in (1, temperature, plain))
        said, _ = confidences_of(logits[held_out], labels[held_out], temperature=temperature)
        ideal = expected_calibration_error(said, torch.bernoulli(said, generator=generator) > 0)
        rows.append((temperature, before[0], after[0], ideal, before[1], after[1], without[1]))
    return [statistics.mean(column) for column in zip(*rows, strict=True)]


def change(logits: Tensor, labels: Tensor, seed: int, *, size: int, prior: float) -> float:
    """Fit on so many pictures; returns by how much the loss of all others rises."""
    changes = []
    for fitted, held_out in parts(len(labels), size, seed, DRAWS):
        temperature = fit_temperature(logits[fitted], labels[fitted], prior=prior)
        losses = [figures(logits[held_out], labels[held_out], each)[1] for each in (1.0, temperature)]
        changes.append(losses[1] - losses[0])
    return statistics.mean(changes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("assets", type=Path)
    parser.add_argument("--output", type=Path, help="file for the report; standard output by default")
    options = parser.parse_args()
    halved, every = [], []
    cases = [(network, data, epochs) for network in NETWORKS for data in DATA for epochs in EPOCHS]
    with tempfile.TemporaryDirectory() as cache:
        for network, data, epochs in cases:
            settings = {"epochs": epochs, "cache": Path(cache)}
            found = {seed: val_logits(options.assets, network, data, seed=seed, **settings) for seed in SEEDS}
            accuracy = [float((logits.argmax(1) == labels).double().mean()) for logits, labels in found.values()]
            columns = zip(*(halves(*each, seed) for seed, each in found.items()), strict=True)
            halved.append([network, data, str(epochs), mean_spread(accuracy), *map(mean_spread, columns)])
            every.append(found)
    priors = []
    for prior in PRIORS:
        cells = []
        for size in COUNTS:
            of_cases = [
                statistics.mean(change(*each, seed, size=size, prior=prior) for seed, each in found.items())
                for found in every
            ]
            cells.append(f"{statistics.mean(of_cases):+.3f} ({max(of_cases):+.3f})")
        priors.append([f"{prior:g}", *cells])
    head = ["network", "data", "epochs", "accuracy", "temperature", "ECE before", "after", "if calibrated"]
    head += ["NLL before", "after", "without prior"]
    report = f"""# Calibration

{heading("calibration.py ASSETS")}

Heads on frozen ImageNet weights, best of the epochs; 153 validation pictures of `hymenoptera_data`, 100 of
`flowers5_small`. ECE is the expected calibration error in 15 bins, and "if calibrated" what it comes to on so few
pictures if they are right exactly as often as the confidences after say; NLL is the negative log-likelihood in nats.

## Fitted on one half of the validation pictures, measured on the other

Mean ± standard deviation over {len(SEEDS)} seeds, each the mean over {HALVES} draws of the half. "Without prior" is the
NLL after fitting the pictures of the half alone.

{markdown_table(head, halved)}

## Which prior, and how many pictures

By how much the NLL of all other pictures changes, by the prior and by how many pictures the temperature was fitted on:
mean over the {len(every)} rows above, and the worst of them in brackets. Each is the mean over {len(SEEDS)} seeds and
{DRAWS} draws.

{markdown_table(["prior", *map(str, COUNTS)], priors)}
"""
    hand_out(report, options.output)


if __name__ == "__main__":
    main()
