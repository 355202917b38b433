"""Training in a process of its own that a test may kill. Imported by name, so that a fork server can run it."""

from pathlib import Path

from planted_store import META, PlantedStore, planted_store

from sae.config import TrainConfig


def store() -> PlantedStore:
    """2,048 planted tokens of width 16."""
    return planted_store(n=2_048)


def train(root: str, cfgs: list[TrainConfig]) -> None:
    """Train with every step saved; what is on disk decides where it begins."""
    import torch

    from sae.resume import Keeper
    from sae.train import train_many

    torch.set_num_threads(1)
    train_many(Path(root), store(), cfgs, META, keeper=Keeper(every_steps=1))
