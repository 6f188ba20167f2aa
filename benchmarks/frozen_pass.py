"""How near is the frozen pass to the limit? Pictures per second of our default engine and of ONNX Runtime, by turns.

    python benchmarks/frozen_pass.py                     decoded pictures, both networks
    python benchmarks/frozen_pass.py --data FOLDER       and photos of FOLDER that are decoded meanwhile

Both compute with the same weights (random ones: what they are costs nothing), the same threads and the same pictures of
224 px. A round runs everything once, so that what else the machine does meets all alike; a ratio is the median of the
rounds' ratios. Decoding runs as the command line lets it on two cores, in threads between the batches, and is compared
with ONNX Runtime without any. It needs the packages onnx, onnxruntime and onnxscript, and an idle machine.
"""

from __future__ import annotations

import argparse
import datetime
import os
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import torch
import torchvision
from _report import markdown_table, median_range
from _runs import commit, processor
from torch import Tensor, nn

from transferkit.allocator import tune_allocator
from transferkit.exceptions import PictureError
from transferkit.inference import fast_forward
from transferkit.loading import loader
from transferkit.pictures import find_pictures, read_picture
from transferkit.preprocessing import Preprocessing
from transferkit.sources import Picture, PictureFiles
from transferkit.transforms import imagenet_eval

ASKED = {"mobilenet_v2": 0.8, "resnet18": 0.9}  # of ONNX Runtime, decode excluded
ASKED_WITH_DECODING = 0.6
BATCH = 32
BATCHES = (1, 4, 8, BATCH)  # of which ONNX Runtime's best is found


def onnx_runtime(network: nn.Module, images: Tensor, threads: int) -> Callable[[np.ndarray], object]:
    with warnings.catch_warnings(action="ignore"):
        shapes = ({0: torch.export.Dim.DYNAMIC},)
        program = torch.onnx.export(network, (images[:2],), dynamo=True, dynamic_shapes=shapes, verbose=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    model = program.model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda part: session.run(None, {name: part})


def plain(network: nn.Module, images: Tensor) -> None:
    with torch.no_grad():
        network(images)


def readable(folder: Path) -> list[Picture]:
    """List the photos, each read once, so that all rounds find them in the system's memory."""
    found = []
    for path in find_pictures(folder)[0]:
        try:
            read_picture(path)
        except PictureError:
            continue
        found.append(Picture(path, 0))
    return found


def decode_and_compute(forward: Callable[[Tensor], Tensor], photos: list[Picture], workers: int) -> None:
    batches = loader(
        PictureFiles(photos), imagenet_eval(Preprocessing()), batch_size=BATCH, train=False, num_workers=workers
    )
    for images, _ in batches:
        forward(images)


def measure(runs: dict[str, tuple[int, Callable[[], object]]], rounds: int) -> dict[str, list[float]]:
    """Return pictures per second of each run in each round."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, (count, run) in runs.items():
            time.sleep(0.05)  # ONNX Runtime's threads look for work a while longer
            started = time.perf_counter()
            run()
            if number:  # the first round warms up
                found[name].append(count / (time.perf_counter() - started))
    return found


def ratio(ours: list[float], theirs: list[float]) -> float:
    return statistics.median(our / their for our, their in zip(ours, theirs, strict=True))


def row(network: str, name: str, found: dict[str, list[float]], best: str) -> list[str]:
    against = [f"{ratio(found[name], found[theirs]):.2f}" for theirs in (f"ONNX Runtime, batch {BATCH}", best)]
    return [network, name, median_range(found[name]), *against]


def verdict(asked: float, found: dict[str, list[float]], name: str, best: str) -> str:
    whole, own = (ratio(found[name], found[theirs]) for theirs in (f"ONNX Runtime, batch {BATCH}", best))
    return f"asked at least {asked:g} of ONNX Runtime, came to {whole:.2f} at batch {BATCH}, {own:.2f} at its best one."


def compare(name: str, options: argparse.Namespace, photos: list[Picture]) -> tuple[list[list[str]], list[str]]:
    """Return the rows of one network, and what was asked beside what came out."""
    torch.manual_seed(0)
    network = getattr(torchvision.models, name)(num_classes=1000).eval()
    images = torch.randn(BATCH, 3, 224, 224)
    forward, theirs = fast_forward(network, images), onnx_runtime(network, images, options.threads)
    difference = float((forward(images) - torch.from_numpy(theirs(images.numpy())[0])).abs().max())
    runs: dict[str, tuple[int, Callable[[], object]]] = {
        "transferkit": (BATCH, lambda: forward(images)),
        "torch as it is": (BATCH, lambda: plain(network, images)),
    }
    for size in BATCHES:
        parts = [part.numpy() for part in images.split(size)]
        runs[f"ONNX Runtime, batch {size}"] = (BATCH, lambda parts=parts: [theirs(part) for part in parts])
    found = measure(runs, options.rounds)
    best = max((each for each in found if "ONNX" in each), key=lambda each: statistics.median(found[each]))
    rows = [row(name, each, found, best) for each in found]
    against = f"ONNX Runtime, batch {BATCH}"
    said = [f"{name}: {verdict(ASKED[name], found, 'transferkit', best)} The two differ by {difference:.1e} at most."]
    if photos:
        with_decoding = "transferkit, decoding included"
        decoding = {
            with_decoding: (len(photos), lambda: decode_and_compute(forward, photos, options.workers)),
            **{each: runs[each] for each in dict.fromkeys((against, best))},
        }
        found = measure(decoding, max(3, options.rounds // 2))
        rows.append(row(name, with_decoding, found, best))
        said.append(f"{name}, decoding included: {verdict(ASKED_WITH_DECODING, found, with_decoding, best)}")
    return rows, said


def setting(options: argparse.Namespace, photos: list[Picture], tuned: bool) -> str:
    decoded = f" {len(photos)} photos, {options.workers or 'no'} worker processes." if photos else ""
    libraries = {"torch": torch, "torchvision": torchvision, "ONNX Runtime": onnxruntime}
    versions = ", ".join(f"{name} {library.__version__}" for name, library in libraries.items())
    return (
        f"{datetime.date.today()}, {os.cpu_count()} CPU cores ({processor()}), {options.threads} threads, "
        f"{versions}, commit {commit()}; medians of {options.rounds} rounds, lowest to highest in brackets; "
        f"allocator {'tuned' if tuned else 'left alone'}.{decoded}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a folder of photos, searched through")
    parser.add_argument("--networks", nargs="+", default=list(ASKED), choices=list(ASKED))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--workers", type=int, default=0, help="processes that decode; 0 for threads of this one")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--no-allocator", action="store_true", help="leave the C library's allocator alone")
    options = parser.parse_args()
    tuned = not options.no_allocator and tune_allocator()
    torch.set_num_threads(options.threads)
    photos = readable(options.data) if options.data else []
    rows, said = [], []
    for name in options.networks:
        more, verdicts = compare(name, options, photos)
        rows += more
        said += verdicts
    head = ["network", "run", "pictures/s", f"× ONNX Runtime, batch {BATCH}", "× its best batch"]
    print(f"# The frozen pass\n\n{setting(options, photos, tuned)}\n\n{markdown_table(head, rows)}\n")
    print("\n".join(f"- {each}" for each in said))


if __name__ == "__main__":
    main()
