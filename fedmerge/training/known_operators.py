"""Operators whose gradient for many clients in one call is known to be the gradient of each client alone.

Each stands here because a test trains a model with it both ways. Whatever is not here is not known: models that use it
train one client after another. Missing on purpose:

``embedding_bag``, ``embedding_renorm_`` and ``embedding`` with options
    the batched lookup forgets what only the backward pass needs, such as counts of a row (see
    :mod:`fedmerge.training.padded_lookups` for rows of padding);
recurrent layers in one operator
    have no rule at all;
random draws
    but for dropout, whose masks are replayed, all clients would share one draw.
"""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["unknown_reason"]

# As torch names them, in-place forms (``relu_``) included.
_POINTWISE = """
abs add addcdiv addcmul atan celu clamp clamp_max clamp_min cos div elu erf exp expm1 gelu hardshrink hardsigmoid
hardswish hardtanh leaky_relu lerp log log1p log_sigmoid_forward masked_fill maximum minimum mish mul neg pow
_prelu_kernel reciprocal relu rsqrt rsub sigmoid silu sin softplus softshrink sqrt sub tanh threshold where
"""
_NOT_DIFFERENTIATED = """
arange argmax bitwise_and bitwise_not bitwise_or ceil eq floor ge gt le logical_and logical_not logical_or lt ne round
sign
"""
_PRODUCTS = "addmm addmv baddbmm bmm convolution dot mm mv"
_REDUCTIONS = """
amax amin cumsum glu linalg_vector_norm logsumexp _log_softmax max mean min prod _safe_softmax _softmax std sum var
var_mean
"""
_NORMS = """
native_batch_norm _native_batch_norm_legit cudnn_batch_norm native_group_norm native_layer_norm _fused_rms_norm
_weight_norm_interface
"""
_IMAGES = """
_adaptive_avg_pool2d adaptive_max_pool2d avg_pool2d avg_pool3d channel_shuffle im2col max_pool2d_with_indices
pixel_shuffle reflection_pad2d replication_pad2d upsample_bilinear2d upsample_nearest2d
"""
_SHAPES = """
alias cat clone constant_pad_nd copy_ detach diagonal expand fill_ flip gather index index_select _to_copy permute
repeat roll scatter select slice
split split_with_sizes squeeze stack t topk transpose tril triu unbind unfold unsafe_split
_unsafe_view unsqueeze view lift_fresh
"""
_NEW = """
empty empty_like full full_like new_empty new_full new_ones new_zeros ones ones_like scalar_tensor zeros zeros_like
"""
# Draws of dropout, in whose place the clients' own masks are put; any other draw is refused by torch.vmap.
_DROPOUT = "bernoulli_ native_dropout"

_KNOWN = frozenset(
    " ".join(
        [_POINTWISE, _NOT_DIFFERENTIATED, _PRODUCTS, _REDUCTIONS, _NORMS, _IMAGES, _SHAPES, _NEW, _DROPOUT]
    ).split()
)
# Where the options of a lookup stand among its arguments, and the values without effect.
_LOOKUP_OPTIONS = {"padding_idx": (2, -1), "scale_grad_by_freq": (3, False), "sparse": (4, False)}


def unknown_reason(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """Why the gradient of a call is not known to be right, or None where it is.

    Examples
    --------
    >>> unknown_reason(torch.ops.aten.relu.default, (), {}) is None
    True
    >>> unknown_reason(torch.ops.aten.median.default, (), {})
    "the gradient of the operator 'median' is not known to be right for several clients in one call"
    """
    space, _, name = func._schema.name.partition("::")
    if space == "aten" and name == "embedding":
        for option, (place, harmless) in _LOOKUP_OPTIONS.items():
            value = args[place] if len(args) > place else kwargs.get(option, harmless)
            if value != harmless:
                return f"an embedding with {option}={value}, which stacked lookups forget"
        return None
    if space == "aten" and (name in _KNOWN or name.removesuffix("_") in _KNOWN):
        return None
    if torch.Tag.nondeterministic_seeded in func.tags:
        return f"the random draw {name!r}, which all clients would share"
    shown = name if space == "aten" else func._schema.name
    return f"the gradient of the operator {shown!r} is not known to be right for several clients in one call"
