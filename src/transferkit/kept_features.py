"""Features of pictures that an earlier run left in its ``cache_dir``, and pictures that are alike by them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from transferkit.activation_store import ABOUT, ActivationStore
from transferkit.identity import contents_of
from transferkit.sources import PictureFiles

__all__ = ["ALIKE", "alike_pairs", "kept_features"]

ALIKE = 0.93
"""Cosine of the angle between two pictures' features from which on they are taken for the same."""

MOST = 20_000
"""Pictures that are compared at most: each is compared with each."""

_AT_ONCE = 2048


def kept_features(files: PictureFiles, directory: str | os.PathLike[str]) -> Tensor | None:
    """Return what a frozen network gave for pictures when a head was trained on it, if an earlier run kept that.

    Args:
        files: The pictures; a run kept theirs if their contents, order and labels were the same.
        directory: ``cache_dir`` of that run.

    Returns:
        (N, num_features) float, or ``None`` where nothing of the kind is kept.

    Raises:
        PictureError: A file cannot be read.

    Example:
        >>> kept_features(PictureFiles([]), "no/such/folder") is None
        True
    """
    stores = list(_plain_stores(Path(directory)))
    if not stores:
        return None
    contents = contents_of(files)
    for folder, facts in stores:
        if facts["pictures"] != contents:
            continue
        store = ActivationStore.open(folder, facts=facts, rows=len(files), in_memory=True)
        if store is not None and len(store.tensors) == 2 and store.tensors[0].ndim == 2:
            features, _ = store.read(torch.arange(len(files)))
            return features.float()
    return None


def alike_pairs(features: Tensor, *, limit: float = ALIKE) -> list[tuple[int, int]]:
    """Find the pictures whose features point the same way.

    Args:
        features: (N, num_features) float, of 20,000 pictures at most, since each is compared with each.
        limit: Cosine of the angle between them, from -1 to 1.

    Returns:
        Pairs of positions, the smaller one first, in order.

    Example:
        >>> alike_pairs(torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 0.1]]))
        [(0, 2)]
    """
    directions = F.normalize(features)
    pairs: list[tuple[int, int]] = []
    for start in range(0, len(directions), _AT_ONCE):
        near = (directions[start : start + _AT_ONCE] @ directions.T >= limit).triu(start + 1).nonzero()
        near[:, 0] += start
        pairs += [(int(one), int(other)) for one, other in near]
    return pairs


def _plain_stores(directory: Path) -> Iterator[tuple[Path, dict[str, object]]]:
    """Yield the kept activations of pictures as they are, with what they were made from."""
    for about in sorted(directory.glob(f"*/{ABOUT}")):
        try:
            facts = json.loads(about.read_text(encoding="utf-8"))["facts"]
            plain = facts["augmentation"] is None and isinstance(facts["pictures"], str)
        except (OSError, ValueError, KeyError, TypeError):  # another program's file, or a damaged one
            continue
        if plain:
            yield about.parent, facts
