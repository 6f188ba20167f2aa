"""PyTorch's transfer-learning tutorial, as people paste it: SGD, StepLR, the best weights kept.

As in its "ConvNet as fixed feature extractor", what is frozen has ``requires_grad=False`` and stays in training mode.
Source: https://docs.pytorch.org/tutorials/beginner/transfer_learning_tutorial.html
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from _common import Clock, begin, frozen_modules, make_network, transforms
from torch import nn, optim
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder


def train_model(model, criterion, optimizer, scheduler, dataloaders, dataset_sizes, device, num_epochs, clock):
    with tempfile.TemporaryDirectory() as folder:
        best_model_params_path = Path(folder) / "best_model_params.pt"
        torch.save(model.state_dict(), best_model_params_path)
        best_acc = 0.0
        for _ in range(num_epochs):
            clock.tick()
            for phase in ("train", "val"):
                if phase == "train":
                    model.train()
                else:
                    model.eval()
                running_loss = 0.0
                running_corrects = 0
                for inputs, labels in dataloaders[phase]:
                    inputs = inputs.to(device)
                    labels = labels.to(device)
                    optimizer.zero_grad()
                    with torch.set_grad_enabled(phase == "train"):
                        outputs = model(inputs)
                        _, preds = torch.max(outputs, 1)
                        loss = criterion(outputs, labels)
                        if phase == "train":
                            loss.backward()
                            optimizer.step()
                    running_loss += loss.item() * inputs.size(0)
                    running_corrects += torch.sum(preds == labels.data)
                if phase == "train":
                    scheduler.step()
                epoch_acc = running_corrects.double() / dataset_sizes[phase]
                if phase == "val" and epoch_acc > best_acc:
                    best_acc = epoch_acc
                    torch.save(model.state_dict(), best_model_params_path)
        model.load_state_dict(torch.load(best_model_params_path, weights_only=True))
    clock.tick()
    return float(best_acc)


def main() -> None:
    options = begin(__doc__)
    device = torch.device("cpu")
    data_transforms = transforms(options.image_size)
    image_datasets = {part: ImageFolder(options.data / part, data_transforms[part]) for part in ("train", "val")}
    dataloaders = {
        part: DataLoader(dataset, batch_size=options.batch_size, shuffle=True, num_workers=options.workers)
        for part, dataset in image_datasets.items()
    }
    model = make_network(options, len(image_datasets["train"].classes))
    for module in frozen_modules(model, options.model, options.policy):
        for param in module.parameters():
            param.requires_grad = False
    model = model.to(device)
    trained = [param for param in model.parameters() if param.requires_grad]
    optimizer = optim.SGD(trained, lr=0.001, momentum=0.9)
    clock = Clock()
    best = train_model(
        model,
        nn.CrossEntropyLoss(),
        optimizer,
        lr_scheduler.StepLR(optimizer, step_size=7, gamma=0.1),
        dataloaders,
        {part: len(dataset) for part, dataset in image_datasets.items()},
        device,
        options.epochs,
        clock,
    )
    clock.report(best)


if __name__ == "__main__":
    main()
