"""What a model would hold in memory, found without its numbers: its operations run on fake tensors, and storages are counted.

Parameters are fake (a shape, a dtype and no bytes), the batch is real, so that which tokens are learned and where padding lies
is as it will be. Fake tensors say that they are on a CPU, whose fused attention keeps for backward what a GPU's does: no
[B,H,Q,K] weights. Not seen is what a kernel allocates inside itself.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten


def without_numbers(model: nn.Module) -> None:
    """Give a model on the meta device fake parameters and buffers in place of its own, which work with real tensors."""
    made: dict[Tensor, Tensor] = {}  # what is tied stays tied
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in model.modules():
            parts: list[dict[str, Any]] = [module._parameters, module._buffers]
            for part in parts:
                for name, tensor in part.items():
                    if tensor is None:
                        continue
                    if tensor not in made:
                        empty = torch.empty_like(tensor, device="cpu")
                        made[tensor] = (
                            nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
                        )
                    part[name] = made[tensor]


class Ledger(TorchDispatchMode):
    """While inside, counts the bytes that operations allocate and that are still held, by storage.

    held: now. peak: the most so far. model: its parameters and buffers are not counted.

    Of fake tensors it answers what their numbers would have to say, as a model that works says it: no number is odd, and two
    tensors are equal where nothing has drawn at random between them (`dropout.prefix` asks of sums, which have one dimension).
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.held = self.peak = 0
        self._known: dict[int, weakref.ref[Any]] = {}
        for tensor in (*model.parameters(), *model.buffers()):
            self._note(tensor, 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if isinstance(args[0] if args else None, FakeTensor):
            if func is aten._local_scalar_dense.default:  # .item(), bool(): finite, and nothing to be saved
                return False if args[0].dtype == torch.bool else 1
            if func is aten.equal.default:
                one, two = args
                return one.shape == two.shape and (one.ndim == 1 or one.untyped_storage() is two.untyped_storage())
            if func in (aten.index.Tensor, aten.index_put_.default, aten.index_put.default):
                args = (args[0], _numbered(args[1]), *args[2:])
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, Tensor):
                self._note(tensor, tensor.untyped_storage().nbytes())
        return found

    def _note(self, tensor: Tensor, size: int) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return

        def freed(_: Any) -> None:
            self.held -= size
            del self._known[key]

        self._known[key] = weakref.ref(storage, freed)
        self.held += size
        self.peak = max(self.peak, self.held)


def _numbered(indices: list[Tensor | None]) -> list[Tensor | None]:
    """Real masks as the places where they are true: of a fake one that would not be known."""
    found: list[Tensor | None] = []
    for index in indices:
        masks = isinstance(index, Tensor) and index.dtype == torch.bool and not isinstance(index, FakeTensor)
        found.extend(index.nonzero(as_tuple=True) if masks and index is not None else [index])
    return found
