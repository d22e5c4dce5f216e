"""What a model does when it is run: its operators, in order, with the tensors and settings that go into each."""

from __future__ import annotations

import hashlib
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fedmerge.inputs import arguments_of, changed, tensors_of
from fedmerge.permutations.running import repeated

__all__ = ["doings"]


def doings(model: nn.Module, example: Any) -> str | None:
    """A text that two models share if they do the same on examples of the same shapes; None where it is not known.

    It says all that symmetries follow from. What a model looks like does not: settings in objects, closures and
    globals decide as well what it does.

    Parameters
    ----------
    model
        A copy to run, in eval mode.
    example
        On its device.
    """
    example = changed(example, Tensor.clone)
    record = _Record()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        record.name(tensor, f"{name}:{tuple(tensor.shape)}:{tensor.dtype}:{type(tensor).__name__}")
    for i, tensor in enumerate(tensors_of(example)):
        record.name(tensor, f"input {i}:{tuple(tensor.shape)}:{tensor.dtype}")
    args, kwargs = arguments_of(model, example)
    repeated()
    try:
        with record:
            outputs = model(*args, **kwargs)
    except Exception:  # of any kind: the export will tell what is wrong, or succeed where this does not
        return None
    shapes = [f"{name}:{tuple(tensor.shape)}" for name, tensor in model.state_dict().items()]
    lines = [*shapes, *record.lines, record.told(tensors_of(outputs))]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


class _Record(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Writes down every operator, its tensors called by where they came from."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.lines: list[str] = []
        self._names: dict[int, str] = {}
        self._kept: list[Tensor] = []  # an id is used again when its owner is gone

    def name(self, tensor: Tensor, name: str) -> None:
        """From here on, call the tensor so; a shared one keeps all its names."""
        self._names[id(tensor)] = f"{self._names.get(id(tensor), '')}{name}"
        self._kept.append(tensor)

    def told(self, argument: Any) -> str:
        """An argument as text."""
        if isinstance(argument, Tensor):
            if id(argument) not in self._names:
                self.name(argument, f"constant {len(self._kept)}:{tuple(argument.shape)}:{argument.dtype}")
            return self._names[id(argument)]
        if isinstance(argument, list | tuple):
            return f"[{', '.join(self.told(part) for part in argument)}]"
        return repr(argument)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        named = [f"{name}={self.told(argument)}" for name, argument in kwargs.items()]
        self.lines.append(f"{func}({self.told(args)}, {named})")
        result = func(*args, **kwargs)
        for i, tensor in enumerate(tensors_of(result)):
            self._names[id(tensor)] = f"line {len(self.lines)}.{i}"
            self._kept.append(tensor)
        return result
