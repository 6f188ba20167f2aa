"""Which backbone for CIFAR-10? The same budget for each: the head alone, trained on what the frozen backbone gives.

AlexNet, VGG16, GoogLeNet, ResNet, DenseNet, MobileNetV2 and V3, EfficientNet, ViT, Swin, DeiT and Inception-ResNet come
by name; MoCo v3 and BEiT, which learned without labels, from checkpoints that you name. A backbone that fails costs its
row alone, and the same line goes on after an interrupt.

    python examples/compare_backbones_cifar10.py --data data/cifar10 --per-class 500
    python examples/compare_backbones_cifar10.py --data data/cifar10 --moco-v3 ./moco.pth.tar --beit ./beit.pth

Measured: the weights at hand, 128 px, the first 100 training and test pictures of each class as JPEG files, 10 epochs,
seeds 0, 1 and 2: MobileNetV2 0.699 ± 0.003, SqueezeNet 1.1 0.631 ± 0.003, the bundled MobileNetV2 of half width 0.556
± 0.002, ResNet-18 from random weights 0.261 ± 0.011; about 5 minutes on one thread of a busy machine. LogME told that
order exactly, H-score nearly. The other families were not measured.
"""

from __future__ import annotations

import sys

from _pictures import command_line, parse

from transferkit import compare

BACKBONES = [
    "torchvision/alexnet",
    "torchvision/vgg16",
    "torchvision/googlenet",
    "torchvision/resnet18",
    "torchvision/resnet50",
    "torchvision/densenet121",
    "torchvision/mobilenet_v2",
    "torchvision/mobilenet_v3_large",
    "torchvision/efficientnet_b0",
    "torchvision/vit_b_16",
    "torchvision/swin_t",
    "timm/deit_small_patch16_224",
    "timm/inception_resnet_v2",
]
TINY = ["timm/test_efficientnet@none", "timm/test_vit@none"]


def main() -> None:
    parser = command_line(__doc__, epochs=10, image_size=128)
    parser.add_argument(
        "--models", nargs="+", default=BACKBONES, help="NAME, or NAME@ and a path, tag, bundled or none"
    )
    parser.add_argument("--moco-v3", help="checkpoint of MoCo v3's ViT-B/16")
    parser.add_argument("--beit", help="checkpoint of BEiT's base model, patches of 16")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    options = parse(parser)

    backbones: list[str | dict[str, str]] = TINY if options.smoke else [*options.models]
    if options.moco_v3:
        backbones.append({"name": "MoCo v3", "backbone": "timm/vit_base_patch16_224", "weights": options.moco_v3})
    if options.beit:
        backbones.append({"name": "BEiT", "backbone": "timm/beit_base_patch16_224", "weights": options.beit})
    board = compare(
        options.data,
        backbones,
        seeds=options.seeds,
        epochs=options.epochs,
        image_size=options.image_size,
        output_dir=options.output,
        resume=True,
        isolated=not options.smoke,
        on_progress=lambda done, count, doing: print(f"{done} of {count} runs done, now {doing}", file=sys.stderr),
    )
    print(board.to_markdown())
    print(f"saved in {options.output}: leaderboard.html, .md, .csv and .json, tradeoff.png")


if __name__ == "__main__":
    main()
