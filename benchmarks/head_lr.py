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
from torch import Tensor
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


def head_inputs_of(model, source) -> tuple[Tensor, Tensor]:
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


def probe(model, train, val, lr: float, seed: int) -> float:
    """Train a fresh head as the Trainer would, and return the best epoch's validation accuracy."""
    torch.manual_seed(seed)
    old = model.network.get_submodule(model.head_paths[0])
    head = build_head(old, Head(len(model.class_names)))
    (inputs, labels), (val_inputs, val_labels) = train, val
    optimizer = torch.optim.AdamW(head.parameters(), lr=lr, weight_decay=0.01)
    per_epoch = -(-len(inputs) // BATCH)
    logits_of = (lambda x: F.relu(head(x)).mean((2, 3))) if isinstance(head, torch.nn.Conv2d) else head
    step, best = 0, 0.0
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(inputs)).split(BATCH):
            factor = Cosine().factor(Progress(step=step, steps=EPOCHS * per_epoch, steps_per_epoch=per_epoch))
            optimizer.param_groups[0]["lr"] = lr * factor
            loss = F.cross_entropy(logits_of(inputs[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
        with torch.no_grad():
            best = max(best, (logits_of(val_inputs).argmax(1) == val_labels).float().mean().item())
    return best


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
