"""A model in its tangent space: its first-order expansion around fixed parameters, in the place of the model."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from fedmerge.errors import InvalidOption, ModelError
from fedmerge.layout import check_patterns, matching_names
from fedmerge.state import is_number, is_uninitialised, tied_names, trained_names

__all__ = ["Tangent", "is_linearised", "linearise", "linearised_maker"]

_SHARED = ("_parameters", "_buffers", "_non_persistent_buffers_set", "_modules")


class Tangent(nn.Module):
    """The linearisation of a model, ``f(x; w0) + J(x; w0) (w - w0)``, under the names of its own tensors.

    Ortiz-Jimenez et al. 2023, "Task Arithmetic in the Tangent Space", arXiv:2305.12827, equation 5. The expansion point
    w0 are the model's parameters when this is made; it never moves, so outputs are affine in w: the mean of several
    such models gives the mean of their outputs. Some parameters may be left out of the expansion, which then goes
    through at their present values: ``f(x; w0, v) + J_w(x; w0, v) (w - w0)``.

    The module shares the parameters, buffers and parts of the model that it was made of, so both have the same
    ``state_dict``; w0 is not in it. It always runs as in use: dropout is off, and batch norms take their running
    statistics, which do not move.

    Parameters
    ----------
    model
        What to linearise, at w0.
    names
        Parameters of the expansion, of a shared one its first name.

    Raises
    ------
    ModelError
        On a call, where an operator has no derivative that can be taken forward.
    """

    _plain: nn.Module
    _start: dict[str, Tensor]
    _places: dict[str, str]

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        # Not by setattr: the model is no part of this module, it is this module in another guise.
        self.__dict__["_plain"] = model
        for kind in _SHARED:
            self.__dict__[kind] = model.__dict__[kind]
        first = {id(p): name for name, p in model.named_parameters() if name in set(names)}
        self._start = {name: p.detach().clone() for name, p in model.named_parameters() if id(p) in first}
        self._places = {
            f"{path}.{name}" if path else name: first[id(p)]
            for path, part in model.named_modules()
            for name, p in part._parameters.items()
            if id(p) in first
        }
        self.eval()

    @property
    def plain(self) -> nn.Module:
        """The model itself, whose tensors these are."""
        return self._plain

    @property
    def linearised(self) -> tuple[str, ...]:
        """Names of the parameters of the expansion."""
        return tuple(self._start)

    @property
    def start(self) -> Mapping[str, Tensor]:
        """The expansion point w0, by name; to be read only."""
        return self._start

    @property
    def forward(self) -> Callable[..., Any]:  # type: ignore[override]
        """Called as the model is: with its arguments, by their names."""
        return functools.update_wrapper(functools.partial(self._expanded), self._plain.forward)

    def train(self, mode: bool = True) -> Tangent:
        """Stay as in use: the expansion is of the model as it is used, whatever the mode."""
        super().train(False)
        self._plain.training = False
        return self

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            plain = self.__dict__.get("_plain")
            # While Python copies or reads one, there is no model yet; and what fails in a property ends up here.
            if plain is None or name == "forward" or name.startswith("__"):
                raise
            return getattr(plain, name)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Tangent:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        with torch.no_grad():
            self._start = {name: fn(tensor) for name, tensor in self._start.items()}
        return self

    def _expanded(self, *args: Any, **kwargs: Any) -> Any:
        own = dict(self.named_parameters())
        change = {}
        for name, start in self._start.items():
            if own[name].shape != start.shape:
                raise ModelError(
                    f"{name!r} has shape {list(own[name].shape)}, and the model is linearised around a tensor of shape "
                    f"{list(start.shape)}: a linearised model keeps its widths"
                )
            change[name] = own[name] - start
        outputs: list[_Outputs] = []

        def run(weights: dict[str, Tensor]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
            given = {place: weights[name] for place, name in self._places.items()}
            outcome = _Outputs(functional_call(self._plain, given, args, kwargs, tie_weights=False))
            outputs.append(outcome)
            return outcome.numbers, outcome.others

        try:
            with _differentiable_kernels(self._plain):
                expanded: Any = jvp(run, (self._start,), (change,), has_aux=True)
        except (AssertionError, AttributeError, NotImplementedError, RuntimeError) as error:
            self._tell(error, args, kwargs)
            raise
        at_start, slope, others = expanded
        return outputs[0].rebuilt([y + dy for y, dy in zip(at_start, slope, strict=True)], others)

    def _tell(self, error: Exception, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Raise what is wrong with the expansion, where the model itself runs."""
        try:
            with torch.no_grad():
                outcome = _Outputs(self._plain(*args, **kwargs))
        except Exception:  # the error that there was says what is wrong
            return
        name = type(self._plain).__name__
        if not outcome.numbers:
            raise ModelError(
                f"{name} cannot be linearised: it returns a {outcome.kind}, in which no tensors of numbers are found. "
                "Return a tensor, or a tuple, list or dict of them"
            ) from error
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise ModelError(
            f"{name} cannot be linearised, for a part of it has no derivative that can be taken forward ({reason}): "
            "replace that part, or name other parameters in linearised, such as those behind it"
        ) from error


class _Outputs:
    """What a model returns, taken apart: tensors of numbers, other tensors, and the rest."""

    def __init__(self, returned: Any) -> None:
        self.kind = type(returned).__name__
        leaves, self._form = pytree.tree_flatten(returned)
        self.numbers = tuple(leaf for leaf in leaves if isinstance(leaf, Tensor) and is_number(leaf))
        self.others = tuple(leaf for leaf in leaves if isinstance(leaf, Tensor) and not is_number(leaf))
        self._rest = [
            leaf if not isinstance(leaf, Tensor) else _Kind.NUMBERS if is_number(leaf) else _Kind.OTHERS
            for leaf in leaves
        ]

    def rebuilt(self, numbers: Sequence[Tensor], others: Sequence[Tensor]) -> Any:
        """The same with other tensors."""
        given = {_Kind.NUMBERS: iter(numbers), _Kind.OTHERS: iter(others)}
        leaves = [next(given[leaf]) if isinstance(leaf, _Kind) else leaf for leaf in self._rest]
        return pytree.tree_unflatten(leaves, self._form)


class _Kind(Enum):
    NUMBERS = 1
    OTHERS = 2


@contextmanager
def _differentiable_kernels(model: nn.Module) -> Iterator[None]:
    """Keep torch from fused kernels, which have no derivative that is taken forward."""
    fast, backends = torch.backends.mha.get_fastpath_enabled(), torch.backends
    recurrent = any(isinstance(part, nn.RNNBase) for part in model.modules())
    backends.mha.set_fastpath_enabled(False)
    try:
        with ExitStack() as stack:
            stack.enter_context(warnings.catch_warnings())
            # What torch loads for its first derivative forward, and its own switches, use what it will give up.
            for message in ("`torch.jit.script` is deprecated", "TF32 acceleration"):
                warnings.filterwarnings("ignore", message=message)
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            if recurrent:
                stack.enter_context(backends.mkldnn.flags(enabled=False))
                stack.enter_context(backends.cudnn.flags(enabled=False))
            yield
    finally:
        backends.mha.set_fastpath_enabled(fast)


def linearise(model: nn.Module, patterns: Sequence[str] = ("*",)) -> Tangent:
    """Linearise a model around its present parameters, whose tensors it shares from then on.

    Parameters
    ----------
    model
        Any module. One that is linearised already stays as it is, around its own expansion point.
    patterns
        Which parameters are part of the expansion, such as ``["encoder.*"]``; the name of a layer stands for all that
        is in it. Those that are not trained are none of it.

    Raises
    ------
    UnknownName
        A pattern is the name of no parameter.
    InvalidOption
        None of the parameters is trained; or the model is linearised already, in other parameters.
    ModelError
        A parameter has no shape yet.

    Examples
    --------
    >>> model = linearise(nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)))
    >>> x, start = torch.ones(1, 2), {name: t.clone() for name, t in model.state_dict().items()}
    >>> outputs = []
    >>> for step in (0.0, 1.0, 2.0):
    ...     _ = model.load_state_dict({name: t + step for name, t in start.items()})
    ...     outputs.append(model(x))
    >>> torch.allclose(outputs[0] + outputs[2], 2 * outputs[1], atol=1e-5)
    True
    """
    patterns = check_patterns(patterns, "linearised")
    parameters = dict(model.named_parameters(remove_duplicate=False))
    lazy = next((name for name, parameter in parameters.items() if is_uninitialised(parameter)), None)
    if lazy is not None:
        raise ModelError(
            f"{lazy!r} belongs to a lazy layer and has no shape yet: run one batch through the model first"
        )
    trained, matching = trained_names(model), matching_names(parameters, patterns, tied_names(model), "linearised")
    names = [name for name, _ in model.named_parameters() if name in matching and name in trained]
    if isinstance(model, Tangent):
        # What is trained of it may be less for a while than what it was linearised in.
        if not set(names) <= set(model.linearised) <= matching:
            raise InvalidOption(
                f"the model is linearised already, in {model.linearised[0]!r} and {len(model.linearised) - 1} more, "
                f"and linearised = {list(patterns)} names others: leave one out"
            )
        return model
    if not names:
        raise InvalidOption(f"linearised = {list(patterns)} names no parameter that is trained: name others")
    return Tangent(model, names)


def is_linearised(model: nn.Module) -> bool:
    """Whether a model, or a part of it, is linearised.

    Examples
    --------
    >>> is_linearised(nn.Linear(2, 1)), is_linearised(nn.Sequential(linearise(nn.Linear(2, 1))))
    (False, True)
    """
    return any(isinstance(part, Tangent) for part in model.modules())


def linearised_maker(model_fn: Callable[[], nn.Module], patterns: Sequence[str]) -> Callable[[], nn.Module]:
    """A function that makes the model of another linearised, around what that makes; the other itself without patterns.

    Examples
    --------
    >>> type(linearised_maker(lambda: nn.Linear(2, 1), ["*"])()).__name__
    'Tangent'
    """
    return functools.partial(_made, model_fn, tuple(patterns)) if patterns else model_fn


def _made(model_fn: Callable[[], nn.Module], patterns: tuple[str, ...]) -> nn.Module:
    return linearise(model_fn(), patterns)
