"""Freeze policies inside the training loops of others: Lightning and the Hugging Face Trainer.

Each host has a module of its own, imported by name, so that importing this package loads neither library.
"""

from __future__ import annotations

__all__: list[str] = []
