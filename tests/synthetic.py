"""A DataModule of random tokens with unequal lengths, for tests of what lies behind the data room."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, IterableDataset, Subset

Sample = dict[str, torch.Tensor]


def random_samples(count: int, seed: int, vocabulary: int = 256, length: int = 20) -> list[Sample]:
    """``count`` right-padded samples of 6 to ``length`` tokens whose first four carry no loss."""
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for _ in range(count):
        used = int(torch.randint(6, length + 1, (1,), generator=generator))
        tokens = torch.randint(0, vocabulary, (length,), generator=generator)
        labels = tokens.clone()
        labels[:4] = labels[used:] = -100
        mask = (torch.arange(length) < used).long()
        samples.append({"input_ids": tokens, "labels": labels, "attention_mask": mask})
    return samples


class RandomData(LightningDataModule):
    """Two validation sets; every rank reads its stride of each set, without duplicates."""

    validation_names = ("left", "right")
    test_names = ("left",)

    def __init__(self, num_train: int = 16, batch_size: int = 2) -> None:
        super().__init__()
        self.num_train, self.batch_size = num_train, batch_size

    def train_dataloader(self):
        return self._loader(self.num_train, seed=0)

    def val_dataloader(self):
        return [self._loader(8, seed=1), self._loader(4, seed=2)]

    def test_dataloader(self):
        return [self._loader(8, seed=3)]

    def _loader(self, count: int, seed: int) -> DataLoader:
        world_size = self.trainer.world_size
        rows = range(self.trainer.global_rank, count, world_size)
        return DataLoader(Subset(random_samples(count, seed), rows), batch_size=self.batch_size // world_size)


class StreamedData(RandomData):
    """The same on one rank, of which the training data have no length."""

    def train_dataloader(self):
        return DataLoader(_Stream(random_samples(self.num_train, seed=0)), batch_size=self.batch_size)


class _Stream(IterableDataset):
    def __init__(self, samples: list[Sample]) -> None:
        self.samples = samples

    def __iter__(self):
        return iter(self.samples)
