"""A plain PyTorch loop that uses transferkit for the model, the freezing, the groups and the batches.

python examples/own_loop.py data/hymenoptera_data
"""

from __future__ import annotations

import argparse

import torch
from torch.nn.functional import cross_entropy

from transferkit import (
    GradualUnfreezing,
    create_model,
    eval_transform,
    image_folder,
    loader,
    param_groups,
    save_artifact,
    train_transform,
)
from transferkit.evaluation import collect_logits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="folder with train/ and val/, or with one folder per class")
    parser.add_argument("--model", default="torchvision/mobilenet_v2")
    parser.add_argument("--weights", default="default", help="default, a tag, a path, bundled, or none")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--image-size", type=int, help="input side in pixels; that of the weights by default")
    options = parser.parse_args()

    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    data = image_folder(options.data)
    weights = None if options.weights == "none" else options.weights
    model = create_model(options.model, class_names=data.class_names, weights=weights, image_size=options.image_size)
    model.to(device)
    batches = loader(data.train, train_transform("light", model.preprocessing), batch_size=32, train=True)
    val_view = eval_transform(model.eval_preset, model.preprocessing)
    val_batches = loader(data.val, val_view, batch_size=32, train=False)
    optimizer = torch.optim.AdamW(param_groups(model, lr=1e-3, weight_decay=0.01, layer_decay=0.7))
    policy = GradualUnfreezing(every=1)

    for epoch in range(options.epochs):
        model.train().freeze(policy.frozen_stages(model.stage_names, epoch))
        batches.sampler.set_epoch(epoch)  # decides order and augmentation
        for images, labels in batches:
            cross_entropy(model(images.to(device)), labels.to(device)).backward()
            optimizer.step()
            optimizer.zero_grad()
        logits, labels = collect_logits(model, val_batches, device)
        print(f"epoch {epoch + 1}: val_accuracy {(logits.argmax(1) == labels).double().mean():.4f}")
    print("saved in", save_artifact(model, "runs/own_loop"))


if __name__ == "__main__":
    main()
