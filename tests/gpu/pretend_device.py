"""A device that is not there: tensors that say they lie on it, compute on the CPU, and refuse to meet the CPU's.

A machine without a GPU can so run every check of this folder and sees where tensors of two devices meet. The rules are
CUDA's: numbers without axes may come from the CPU, a tensor may be indexed with positions on the CPU but not the other
way round, a generator belongs to its device, and NumPy sees nothing of a device.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

__all__ = ["Pretending", "can_pretend", "pretend_device"]

_NAME = "pretend"
_CROSSING = {torch.ops.aten.copy_, torch.ops.aten._to_copy}
_INDEXING = {torch.ops.aten.index, torch.ops.aten.index_put_, torch.ops.aten.index_put, torch.ops.aten._index_put_impl_}


def can_pretend() -> bool:
    """Whether this torch lets Python bring a device (2.9 and later)."""
    try:
        from torch.utils.backend_registration import _setup_privateuseone_for_python_backend  # noqa: F401
    except ImportError:
        return False
    return True


def pretend_device() -> torch.device:
    """Tell torch of the device, once and for the whole process: run it in a process of its own."""
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    _setup_privateuseone_for_python_backend(rename=_NAME, backend_module=_Module())
    # A parameter cannot take the data of a tensor of another kind: a module that moves gets new ones.
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    # Torch fills a new tensor in C++, past Python.
    on_cpu = torch.tensor

    def tensor(data: Any, device: Any = None, **settings: Any) -> Tensor:
        made = on_cpu(data, **settings)
        return made if device is None else made.to(device)

    torch.tensor = tensor
    return torch.device(_NAME, 0)


class _Module:
    """What torch asks of a kind of device: there is one, and it draws nothing of its own."""

    def is_initialized(self) -> bool:
        return True

    is_available = is_initialized

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 1

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        pass

    def get_rng_state(self, device: Any = None) -> Tensor:
        return torch.zeros(0)

    def set_rng_state(self, state: Tensor, device: Any = None) -> None:
        pass


class There(Tensor):
    """A tensor that says it is on the device; `held` is where its numbers are."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> There:
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        made = Tensor._make_wrapper_subclass(cls, held.shape, device=torch.device(_NAME, 0), **layout)
        made.held = held
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    def __repr__(self, **_: Any) -> str:
        return f"There({self.held!r})"

    # Torch does these in C++, past Python.
    def tolist(self) -> Any:
        return self.held.tolist()

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(_positions(key))

    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(_positions(key), value)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class Pretending(TorchDispatchMode):
    """Within it, tensors can be made on the device and moved to it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    there = any(isinstance(leaf, There) for leaf in tree_leaves((args, kwargs)))
    named = kwargs.get("device")
    onto = there if named is None else torch.device(named).type == _NAME
    if there or onto:
        _check(func, args, kwargs, onto)
    plain = {name: torch.device("cpu") if name == "device" and onto else value for name, value in kwargs.items()}
    out = func(*tree_map(_held, args), **tree_map(_held, plain))
    if not onto:
        return out
    out = tree_map(lambda leaf: There(leaf) if isinstance(leaf, Tensor) else leaf, out)
    return return_and_correct_aliasing(func, args, kwargs, out) if there else out


def _positions(key: Any) -> Any:
    """An index in which lists are tensors."""
    if isinstance(key, tuple):
        return tuple(_positions(part) for part in key)
    return torch.tensor(key) if isinstance(key, list) else key


def _held(leaf: Any) -> Any:
    return leaf.held if isinstance(leaf, There) else leaf


def _check(func: Any, args: Any, kwargs: dict[str, Any], onto: bool) -> None:
    """Refuse what CUDA refuses."""
    generators = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Generator)]
    if onto and generators:
        raise RuntimeError(f"{func}: Expected a '{_NAME}' device type for generator but found 'cpu'")
    if func.overloadpacket in _CROSSING:
        return
    first = args[0] if args else None
    looked_at = tree_leaves((args, kwargs))
    if func.overloadpacket in _INDEXING:
        positions = [leaf for leaf in tree_leaves(args[1]) if isinstance(leaf, Tensor)]
        if not isinstance(first, There) and any(isinstance(p, There) for p in positions):
            raise RuntimeError(f"{func}: indices should be either on cpu or on the same device as the indexed tensor")
        looked_at = [leaf for leaf in looked_at if not any(leaf is p for p in positions)]
    tensors = [leaf for leaf in looked_at if isinstance(leaf, Tensor)]
    strangers = [t for t in tensors if not isinstance(t, There)]
    written = func._schema.arguments and func._schema.arguments[0].is_write and isinstance(first, Tensor)
    into_cpu = written and not isinstance(first, There)
    if len(strangers) < len(tensors) and (into_cpu or any(t.ndim for t in strangers)):
        raise RuntimeError(f"{func}: Expected all tensors to be on the same device, but found {_NAME}:0 and cpu!")


def main() -> None:
    """Run checks on the device that is not there, all or those with these words; a line for each, and an exit code."""
    from tests.gpu.checks import CHECKS
    from tests.gpu.running import run_check

    device, wanted = pretend_device(), sys.argv[1:]
    chosen = [check for check in CHECKS if not wanted or any(word in check.name for word in wanted)]
    failed = 0
    with Pretending():
        for check in chosen:
            row = run_check(check, device)
            failed += row["verdict"] != "ok"
            print(row, flush=True)
    print(f"{len(chosen)} checks, {failed} failed")
    sys.exit(failed > 0 or not chosen)


if __name__ == "__main__":
    main()
