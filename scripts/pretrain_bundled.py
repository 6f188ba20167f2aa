"""Pretrain the backbone that ships inside transferkit, by distilling a MobileNetV2 on real photos.

Two steps, each resumable, both on the CPU::

    python scripts/pretrain_bundled.py views --pictures DIR --teacher mobilenet_v2.pth --store STORE
    python scripts/pretrain_bundled.py train --teacher mobilenet_v2.pth --store STORE --output DIR

``views`` cuts random views out of the pictures once, mixes some of them, and stores each with the teacher's
features. ``train`` fits the student to those features and, through the teacher's own classifier, to its
1000-way predictions (Beyer et al. 2022, "A good teacher is patient and consistent": both networks see the
same view; Chen et al. 2022, "SimKD": the teacher's classifier is reused on the student's features).

``DIR`` holds ``imagenette_128/train`` and ``cifar10_jpg/train``.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision.models import mobilenet_v2
from torchvision.transforms import v2

ARCHITECTURE = "mobilenetv2_050"
VIEW_SIZE = 128
TEACHER_SIZE = 160
MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


def normalise(images: Tensor, size: int) -> Tensor:
    """Resize uint8 images (B, 3, H, W) to a square and normalise them as ImageNet weights expect."""
    floats = images.float().div_(255)
    if images.shape[-1] != size:
        floats = F.interpolate(floats, size=(size, size), mode="bilinear", antialias=True)
    return ((floats - MEAN) / STD).contiguous(memory_format=torch.channels_last)


class Views(Dataset[Tensor]):
    """View ``i`` of the store: a function of ``i`` and the seed alone. (3, 128, 128) uint8."""

    def __init__(self, pictures: Path, count: int, seed: int) -> None:
        self.photos = sorted((pictures / "imagenette_128" / "train").glob("*/*.jpg"))
        self.thumbnails = sorted((pictures / "cifar10_jpg" / "train").glob("*/*"))
        self.count, self.seed = count, seed
        self.crop = v2.RandomResizedCrop(VIEW_SIZE, scale=(0.2, 1.0), antialias=True)
        self.jitter = v2.ColorJitter(brightness=0.3, contrast=0.3, saturation=0.3, hue=0.03)

    def __len__(self) -> int:
        return self.count

    def view(self, path: Path) -> Tensor:
        with Image.open(path) as picture:
            image = v2.functional.pil_to_tensor(picture.convert("RGB"))
        return self.jitter(self.crop(image))

    def __getitem__(self, index: int) -> Tensor:
        torch.manual_seed(self.seed * 1_000_003 + index)
        kind = torch.rand(()).item()
        if kind < 0.2:  # CIFAR's animals and vehicles, blurred but of other kinds than Imagenette's
            return self.view(self.thumbnails[int(torch.randint(len(self.thumbnails), ()))])
        first = self.view(self.photos[index % len(self.photos)])
        if kind < 0.7:
            return first
        other = self.view(self.photos[int(torch.randint(len(self.photos), ()))])
        if kind < 0.85:  # mixup
            share = 0.5 + 0.5 * torch.rand(()).item()
            return (first * share + other * (1 - share)).round().to(torch.uint8)
        width = int(torch.randint(VIEW_SIZE // 4, 3 * VIEW_SIZE // 4, ()))  # cutmix, vertical or horizontal halves
        if torch.rand(()).item() < 0.5:
            first[:, :, :width] = other[:, :, :width]
        else:
            first[:, :width] = other[:, :width]
        return first


def load_teacher(path: Path) -> nn.Module:
    teacher = mobilenet_v2()
    teacher.load_state_dict(torch.load(path, weights_only=True))
    return teacher.eval().requires_grad_(False)


def make_views(pictures: Path, teacher_path: Path, store: Path, count: int, seed: int) -> None:
    """Write ``images.npy`` (N, 3, 128, 128) uint8 and ``features.npy`` (N, 1280) float16."""
    store.mkdir(parents=True, exist_ok=True)
    teacher = load_teacher(teacher_path)
    trunk = fuse(nn.Sequential(teacher.features, nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval())
    trunk = trunk.to(memory_format=torch.channels_last)
    images = np.lib.format.open_memmap(store / "images.npy", "w+", np.uint8, (count, 3, VIEW_SIZE, VIEW_SIZE))
    features = np.lib.format.open_memmap(store / "features.npy", "w+", np.float16, (count, 1280))
    # One view must not depend on who cuts it, so a worker's batch is fully determined by its indices.
    loader = DataLoader(Views(pictures, count, seed), batch_size=256, num_workers=1)
    done, started = 0, time.perf_counter()
    for batch in loader:
        images[done : done + len(batch)] = batch.numpy()
        with torch.inference_mode():
            parts = [trunk(normalise(part, TEACHER_SIZE)) for part in batch.split(8)]
        features[done : done + len(batch)] = torch.cat(parts).half().numpy()
        done += len(batch)
        if done % (256 * 40) == 0:
            print(f"{done}/{count} views, {done / (time.perf_counter() - started):.0f}/s", flush=True)


def batches(count: int, size: int, seed: int, start: int) -> Iterator[np.ndarray]:
    """Endless shuffled batches of indices; step ``n`` is the same whenever training starts."""
    per_epoch, step = count // size, start
    while True:
        order = np.random.default_rng([seed, step // per_epoch]).permutation(count)
        for position in range(step % per_epoch, per_epoch):
            yield np.sort(order[position * size : (position + 1) * size])
            step += 1


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Warm up, hold, and decay over the last 40 %, so that a resumed run may still choose its length."""
    warmup, decay = 500, int(0.4 * steps)
    return peak * min(1.0, (step + 1) / warmup, max(0.0, (steps - step) / decay))


def image_size(step: int, steps: int) -> int:
    """Progressive resizing: small first, the size it is used at last."""
    return 80 if step < 0.45 * steps else 96 if step < 0.8 * steps else 112


def train(teacher_path: Path, store: Path, output: Path, steps: int, batch_size: int, peak: float, seed: int) -> None:
    output.mkdir(parents=True, exist_ok=True)
    classifier = load_teacher(teacher_path).classifier[1]
    images = np.load(store / "images.npy", mmap_mode="r")
    features = np.load(store / "features.npy", mmap_mode="r")
    sample = torch.from_numpy(features[:: max(1, len(features) // 5000)].astype(np.float32))
    scale = sample.std(0).clamp_min(sample.std(0).mean() * 0.2)

    torch.manual_seed(seed)
    student = timm.create_model(ARCHITECTURE, num_classes=0).to(memory_format=torch.channels_last)
    average = timm.utils.ModelEmaV3(student, decay=0.9995, use_warmup=True)
    decayed = [p for p in student.parameters() if p.ndim > 1]
    others = [p for p in student.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.02}, {"params": others, "weight_decay": 0.0}])
    state_file, start = output / "state.pt", 0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        student.load_state_dict(state["student"])
        average.module.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
    started, seconds = time.perf_counter(), state["seconds"] if start else 0.0
    for step, rows in zip(range(start, steps), batches(len(images), batch_size, seed, start), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak)
        batch = torch.from_numpy(images[rows])
        target = torch.from_numpy(features[rows].astype(np.float32))
        if np.random.default_rng([seed, 1, step]).random() < 0.5:
            batch = batch.flip(-1)
        student.train()
        produced = student(normalise(batch, image_size(step, steps)))
        feature_loss = ((produced - target) / scale).square().mean()
        with torch.no_grad():
            soft = classifier(target).softmax(-1)
        logit_loss = F.cross_entropy(classifier(produced), soft)
        loss = feature_loss + 0.5 * logit_loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 5.0)
        optimizer.step()
        average.update(student, step=step)
        if (step + 1) % 100 == 0:
            spent = seconds + time.perf_counter() - started
            print(
                f"{step + 1}/{steps} feature {feature_loss.item():.4f} logit {logit_loss.item():.3f} "
                f"{(step + 1 - start) * batch_size / (time.perf_counter() - started):.0f}/s {spent / 60:.1f} min",
                flush=True,
            )
        if (step + 1) % 1000 == 0 or step + 1 == steps:
            spent = seconds + time.perf_counter() - started
            torch.save(
                {
                    "student": student.state_dict(),
                    "average": average.module.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "step": step + 1,
                    "seconds": spent,
                },
                state_file,
            )
            tensors = {key: value.contiguous().clone() for key, value in average.module.state_dict().items()}
            save_file(tensors, output / "model.safetensors")
            (output / "training.json").write_text(json.dumps({"step": step + 1, "seconds": spent, "seed": seed}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=["views", "train"])
    parser.add_argument("--pictures", type=Path)
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--views", type=int, default=110_000)
    parser.add_argument("--steps", type=int, default=11_000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.step == "views":
        make_views(options.pictures, options.teacher, options.store, options.views, options.seed)
    else:
        train(
            options.teacher, options.store, options.output, options.steps, options.batch_size, options.lr, options.seed
        )


if __name__ == "__main__":
    main()
