"""Which head learning rate? Linear probes on cached features, over lr, data set and network, 3 seeds each.

python benchmarks/head_lr.py ASSETS            5 epochs
python benchmarks/head_lr.py ASSETS --longer   10 to 50 epochs of MobileNetV2, by the Finetuner
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import torch
from default_recipe import spread
from torch import Tensor, nn
from torch.nn import functional as F

from transferkit import create_model, image_folder, loader
from transferkit.heads import Head, build_head
from transferkit.schedules import Cosine, Progress
from transferkit.transforms import imagenet_eval

NETWORKS = {
    "torchvision/mobilenet_v2": "mobilenet_v2-77326c9b.pth",
    "torchvision/squeezenet1_1": "squeezenet1_1-a3c258a5.pth",
}
RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
EPOCHS, BATCH = 5, 32
Part = tuple[Tensor, Tensor]


def head_inputs_of(model, source) -> Part:
    """Collect what the head receives; SqueezeNet's convolutional head gets maps, kept whole."""
    received: list[Tensor] = []
    head = model.network.get_submodule(model.head_paths[0])
    handle = head.register_forward_pre_hook(lambda module, inputs: received.append(inputs[0].clone()))
    labels = []
    model.eval()
    with torch.no_grad():
        for images, targets in loader(source, imagenet_eval(model.preprocessing), batch_size=16, train=False):
            model(images)
            labels.append(targets)
    handle.remove()
    return torch.cat(received), torch.cat(labels)


def trained(
    head: nn.Module,
    train: Part,
    val: Part,
    *,
    lr: float,
    epochs: int = EPOCHS,
    batch: int = BATCH,
    weight_decay: float = 0.01,
    dropout: float = 0.0,
    smoothing: float = 0.0,
) -> list[float]:
    """Train a head on its inputs as the Trainer would, and return the validation accuracy of each epoch."""
    (inputs, labels), (val_inputs, val_labels) = train, val
    biases = {"params": [each for each in head.parameters() if each.dim() == 1], "weight_decay": 0.0}
    weights = {"params": [each for each in head.parameters() if each.dim() > 1], "weight_decay": weight_decay}
    optimizer = torch.optim.AdamW([weights, biases], lr=lr)
    per_epoch = -(-len(inputs) // batch)
    logits_of = (lambda x: F.relu(head(x)).mean((2, 3))) if isinstance(head, nn.Conv2d) else head
    step, accuracies = 0, []
    for _ in range(epochs):
        for rows in torch.randperm(len(inputs)).split(batch):
            factor = Cosine().factor(Progress(step=step, steps=epochs * per_epoch, steps_per_epoch=per_epoch))
            for group in optimizer.param_groups:
                group["lr"] = lr * factor
            logits = logits_of(F.dropout(inputs[rows], dropout))
            optimizer.zero_grad()
            F.cross_entropy(logits, labels[rows], label_smoothing=smoothing).backward()
            optimizer.step()
            step += 1
        with torch.no_grad():
            accuracies.append((logits_of(val_inputs).argmax(1) == val_labels).float().mean().item())
    return accuracies


def probe(model, train: Part, val: Part, lr: float, seed: int) -> float:
    """Train a fresh head, and return the best epoch's validation accuracy."""
    torch.manual_seed(seed)
    head = build_head(model.network.get_submodule(model.head_paths[0]), Head(len(model.class_names)))
    return max(trained(head, train, val, lr=lr))


def longer(assets: Path) -> None:
    """Print what lower rates give in longer runs."""
    print("| data | epochs | lr | best val_accuracy | last epoch | seconds per run |\n|---|---|---|---|---|---|")
    for data in ("hymenoptera_data", "flowers5_small"):
        for epochs in (10, 25, 50):
            for lr in (3e-3, 1.3e-3, 1e-3, 6e-4):
                cells = spread(assets, "mobilenet_v2", data, policy="head", epochs=epochs, lr=lr)
                print(f"| {data} | {epochs} | {lr:g} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("assets", type=Path)
    parser.add_argument("--longer", action="store_true", help="longer runs of MobileNetV2 instead")
    options = parser.parse_args()
    assets = options.assets
    if options.longer:
        longer(assets)
        return
    print("| network | data | " + " | ".join(f"lr {lr:g}" for lr in RATES) + " |")
    print("|---|---|" + "---|" * len(RATES))
    for name, weights in NETWORKS.items():
        for folder in ("hymenoptera_data", "flowers5_small"):
            data = image_folder(assets / folder)
            model = create_model(name, weights=assets / "weights" / weights, class_names=data.class_names)
            train, val = head_inputs_of(model, data.train), head_inputs_of(model, data.val)
            cells = []
            for lr in RATES:
                found = [probe(model, train, val, lr, seed) for seed in range(3)]
                cells.append(f"{statistics.mean(found):.3f} ± {statistics.stdev(found):.3f}")
            print(f"| {name} | {folder} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
