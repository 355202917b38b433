"""The mesh as one rank sees it: collectives along its axes, on torch.distributed alone (TRAINING 9).

Shapes: R ranks of an axis, N tokens of this rank, D = d_in. A mesh of one rank needs no process group.
"""

from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from sae.distributed_cost import AXES, MeshShape
from sae.errors import ConfigError, SaescopeError

_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
"""torch renamed it in 2.13."""


class CollectiveFailed(SaescopeError):
    """A collective ended with an error or after its time limit; who is to blame is for the watch to say."""


class Mesh:
    """Position and collectives of this rank. All ranks must call the same ones in the same order."""

    def __init__(self, shape: MeshShape, device: torch.device | str = "cpu") -> None:
        """``ConfigError`` unless the process group has as many ranks as the mesh."""
        self.shape, self.device = shape, torch.device(device)
        world = dist.get_world_size() if dist.is_initialized() else 1
        if world != shape.world:
            raise ConfigError(
                f"the mesh {shape} has {shape.world} ranks, {world} process{'es run' if world > 1 else ' runs'}: start "
                f"it with torchrun --nproc-per-node {shape.world}, or give a mesh of {world}"
            )
        self.rank = dist.get_rank() if world > 1 else 0
        self.data_rank, self.latent_rank = divmod(self.rank, shape.latent)
        self.operands: Counter[str] = Counter()
        """Bytes of operands so far, by ``kind axis``; what :func:`sae.distributed_cost.communication` predicts."""
        self._groups: dict[str, Any] = {}
        if world > 1:  # every rank makes all groups in the same order
            found = dist.device_mesh.init_device_mesh(
                self.device.type, (shape.data, shape.latent), mesh_dim_names=AXES
            )
            self._groups = {axis: found.get_group(axis) for axis in AXES} | {"world": dist.group.WORLD}

    def size(self, axis: str) -> int:
        return self.shape.size(axis)

    def part(self, n: int) -> slice:
        """Rows of a global batch of n tokens that are this rank's."""
        share = n // self.shape.data
        return slice(self.data_rank * share, (self.data_rank + 1) * share)

    def reduce_(self, tensor: Tensor, axis: str, op: str = "sum") -> Tensor:
        """All-reduce in place (``sum`` or ``max``); the same bits on all ranks of the axis."""
        if self.size(axis) == 1:
            return tensor
        kinds = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}
        self.operands[f"reduce {axis}"] += tensor.numel() * tensor.element_size()
        with _named(axis):
            dist.all_reduce(tensor, kinds[op], group=self._groups[axis])
        return tensor

    def reduce_all_(self, tensors: list[Tensor], axis: str) -> None:
        """Sum several tensors in place: all are on their way before the first is waited for."""
        if self.size(axis) == 1:
            return
        with _named(axis):
            handles = [dist.all_reduce(t, group=self._groups[axis], async_op=True) for t in tensors]
            for handle in handles:
                handle.wait()
        self.operands[f"reduce {axis}"] += sum(t.numel() * t.element_size() for t in tensors)

    def gather(self, tensor: Tensor, axis: str) -> Tensor:
        """[R, ...] from all ranks of the axis; operands of one shape."""
        if self.size(axis) == 1:
            return tensor[None]
        tensor = tensor.contiguous()
        out = tensor.new_empty(self.size(axis), *tensor.shape)
        self.operands[f"gather {axis}"] += tensor.numel() * tensor.element_size()
        with _named(axis):
            _all_gather(out.view(-1), tensor.view(-1), group=self._groups[axis])
        return out

    def gather_objects(self, value: Any) -> list[Any]:
        """Small values of all ranks, in the order of ranks; for rare events."""
        if self.shape.world == 1:
            return [value]
        out: list[Any] = [None] * self.shape.world
        with _named("world"):
            dist.all_gather_object(out, value)
        return out

    def gather_to_first(self, tensor: Tensor) -> list[Tensor] | None:
        """Operands of all latent ranks on the first of them, None elsewhere; data rank 0 alone calls it."""
        if self.shape.latent == 1:
            return [tensor]
        first = self.latent_rank == 0
        out = [torch.empty_like(tensor) for _ in range(self.shape.latent)] if first else None
        with _named("latent"):
            dist.gather(tensor.contiguous(), out, group=self._groups["latent"], group_dst=0)
        return out

    def copy_from_first_(self, tensor: Tensor, axis: str) -> Tensor:
        """Overwrite the tensor with that of the axis' first rank."""
        if self.size(axis) > 1:
            with _named(axis):
                dist.broadcast(tensor, group=self._groups[axis], group_src=0)
        return tensor

    def summed(self, tensor: Tensor, axis: str) -> Tensor:
        """Sum over the axis whose gradient is that of one summand: what follows is computed alike on all ranks."""
        return tensor if self.size(axis) == 1 else _Summed.apply(tensor, self, axis)  # type: ignore[no-any-return]

    def shared(self, tensor: Tensor, axis: str) -> Tensor:
        """The tensor itself, whose gradient is summed over the axis: each rank uses it for its own part."""
        return tensor if self.size(axis) == 1 else _Shared.apply(tensor, self, axis)  # type: ignore[no-any-return]


class _named:
    """Errors of a collective as :class:`CollectiveFailed` that names the axis."""

    def __init__(self, axis: str) -> None:
        self.axis = axis

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, value: BaseException | None, trace: Any) -> None:
        if isinstance(value, RuntimeError):  # torch's DistError is one
            raise CollectiveFailed(f"a collective of the axis {self.axis!r} failed: {value}") from value


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, mesh: Mesh, axis: str) -> Tensor:
        return mesh.reduce_(tensor.detach().clone(memory_format=torch.contiguous_format), axis)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad, None, None


class _Shared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, mesh: Mesh, axis: str) -> Tensor:
        ctx.mesh, ctx.axis = mesh, axis
        return tensor.view_as(tensor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.mesh.reduce_(grad.clone(memory_format=torch.contiguous_format), ctx.axis), None, None
