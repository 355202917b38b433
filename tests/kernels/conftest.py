"""Shared by the tests of the kernels."""

import pytest
import torch
from torch import Tensor


@pytest.fixture
def nan_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.empty gives NaN, or numbers that would be seen, so an element that no program wrote is noticed."""
    real = torch.empty

    def empty(*size: object, **options: object) -> Tensor:
        made = real(*size, **options)  # type: ignore[call-overload]
        if made.is_floating_point():
            return made.fill_(float("nan"))
        return made if made.dtype == torch.bool else made.fill_(-7)

    monkeypatch.setattr(torch, "empty", empty)
