"""The limit: a loop tuned by hand on pictures that were decoded before its clock starts, one plain view of each.

channels_last, fused AdamW, gradients set to None, no value read back within an epoch. Batch norms keep their statistics
where weights are given, as transferkit's do, so that both compute the same.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from _common import Clock, begin, frozen_modules, make_network, transforms
from torch import Tensor
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder


def decoded(folder: Path, size: int, workers: int) -> tuple[Tensor, Tensor]:
    images, labels = zip(
        *DataLoader(ImageFolder(folder, transforms(size)["val"]), 16, num_workers=workers), strict=True
    )
    return torch.cat(images).contiguous(memory_format=torch.channels_last), torch.cat(labels)


def main() -> None:
    options = begin(__doc__)
    data = {part: decoded(options.data / part, options.image_size, options.workers) for part in ("train", "val")}
    network = make_network(options, int(data["train"][1].max()) + 1).to(memory_format=torch.channels_last)
    still = [module for module in frozen_modules(network, options.model, options.policy) for module in module.modules()]
    for module in still:
        module.requires_grad_(False)
    if options.weights != "none":
        still += [module for module in network.modules() if isinstance(module, _BatchNorm)]
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-3 if options.policy == "head" else 1e-4, fused=True)
    clock, best = Clock(), 0.0
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(options.epochs):
            clock.tick()
            network.train()
            for module in still:
                module.training = False
            images, labels = data["train"]
            for rows in torch.randperm(len(labels)).split(options.batch_size):
                F.cross_entropy(network(images[rows]), labels[rows]).backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            network.eval()
            images, labels = data["val"]
            with torch.inference_mode():
                logits = torch.cat([network(batch) for batch in images.split(options.batch_size)])
            accuracy = float((logits.argmax(1) == labels).float().mean())
            if accuracy >= best:
                best = accuracy
                torch.save(network.state_dict(), Path(folder) / "best.pt")
        clock.tick()
    clock.report(best)


if __name__ == "__main__":
    main()
