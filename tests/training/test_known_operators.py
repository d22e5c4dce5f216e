"""Every operator that is known trains a model with stacked weights as it does alone."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from fedmerge.training import LocalTraining, Participant, known_operators, train_cohort, train_one_by_one
from fedmerge.training.forward_watch import why_not_stacked

IMAGE, VOLUME = (2, 6, 6), (1, 4, 4, 4)
POINTWISE = [
    *(torch.abs, torch.atan, torch.cos, torch.erf, torch.exp, torch.expm1, torch.neg, torch.sigmoid, torch.sin),
    *(torch.square, torch.tanh, lambda h: torch.rsub(h, 2), F.celu, F.elu, F.gelu, F.hardshrink),
    *(F.hardsigmoid, F.hardswish, F.hardtanh, F.leaky_relu, F.logsigmoid, F.mish, F.relu, F.relu_, F.silu, F.softplus),
    *(F.softshrink, lambda h: F.threshold(h, 0.1, 0.3), lambda h: h.clamp(-0.2, 0.4), lambda h: h.clamp_min(0.1)),
    *(lambda h: h.clamp_max(0.1), lambda h: h.square().add(1).log(), lambda h: h.square().log1p()),
    *(lambda h: h.square().add(1).sqrt(), lambda h: h.square().add(1).rsqrt(), lambda h: 1 / (2 + h.square())),
    *(lambda h: h / (1 + h.square()), lambda h: h.square().add(1).reciprocal(), lambda h: h.pow(3)),
    *(lambda h: torch.lerp(h, h.flip(1), 0.3), lambda h: torch.addcmul(h, h, h), lambda h: h.add_(h).mul_(2).sub_(1)),
    *(lambda h: torch.addcdiv(h, h, 1 + h.square()), lambda h: torch.maximum(h, h.flip(0)), lambda h: h - h.floor()),
    *(lambda h: torch.minimum(h, h.flip(0)), lambda h: torch.where(h > 0, h, -2 * h), lambda h: h * h.sign()),
    *(lambda h: h.masked_fill(h < 0.1, 0.5), lambda h: h * ((h > 0) & (h < 1) | ~(h != 0)), lambda h: h.clone()),
    *(lambda h: h * ((h >= 0).logical_or(h <= -1).logical_and((h == 0).logical_not())), lambda h: h + h.detach()),
    *(lambda h: h - h.ceil() + h.round(), lambda h: F.prelu(h, h[0, :1].abs()), lambda h: h.addcmul(h, h.new_ones(8))),
    *(lambda h: F.glu(torch.cat([h, h.flip(1)], 1)), lambda h: h.softmax(1), lambda h: h.log_softmax(1)),
    *(lambda h: h - h.amax(1, keepdim=True), lambda h: h - h.amin(1, keepdim=True), lambda h: h.cumsum(1)),
    *(lambda h: h - h.max(1, keepdim=True)[0], lambda h: h - h.min(1, keepdim=True)[0], lambda h: h - h.mean(1, True)),
    *(lambda h: h - h.logsumexp(1, True), lambda h: F.normalize(h, dim=1)),
    *(lambda h: h / h.sum(1, True).square().add(1),),
    *(lambda h: h * h.std(1, keepdim=True), lambda h: h * h.var(1, keepdim=True), lambda h: h * h[:, :2].prod(1, True)),
    *(lambda h: h * torch.var_mean(h, 1, keepdim=True)[0], lambda h: F.layer_norm(h, (8,))),
    *(lambda h: F.rms_norm(h, (8,)),),
    *(lambda h: F.group_norm(h, 2), lambda h: F.batch_norm(h, None, None, training=True), lambda h: h.roll(1, 1)),
    *(lambda h: h.view(-1, 2, 4).permute(0, 2, 1).flatten(1),),
    *(lambda h: h.view(-1, 2, 4).diagonal(0, 1, 2).repeat(1, 4),),
    *(lambda h: h.gather(1, h.argmax(1, keepdim=True)) + h, lambda h: h[:, torch.tensor([3, 1, 2, 0, 7, 6, 5, 4])]),
    *(lambda h: h.index_select(1, torch.arange(7, -1, -1)), lambda h: h.scatter(1, torch.zeros(len(h), 1).long(), 0.0)),
    *(lambda h: torch.stack(h.unbind(1), 1), lambda h: torch.cat(h.split([3, 5], 1)[::-1], 1)),
    *(lambda h: h.topk(8, 1)[0],),
    *(lambda h: torch.cat(h.chunk(2, 1), 1),),
    *(lambda h: (h.view(-1, 2, 4) * h.view(-1, 2, 4).tril()).triu(-1).flatten(1),),
    *(lambda h: torch.cat(h.unsafe_split(4, 1), 1), lambda h: h.unfold(1, 4, 2)[:, :2].reshape(-1, 8)),
    *(lambda h: h + F.pad(h, (1, -1)), lambda h: h.t().contiguous().t()),
    *(lambda h: h.select(1, 0)[:, None].expand(-1, 8),),
    *(lambda h: F.dropout(h, 0.3), lambda h: h.float().double(), lambda h: torch.mv(h, h[0])[:, None] + h),
    *(lambda h: torch.addmv(h[:, 0], h, h[0])[:, None] * 0.1 + h, lambda h: torch.dot(h[0], h[0]) * h),
    *(lambda h: (h @ h.T) @ h,),
    *(lambda h: torch.bmm(h.view(-1, 2, 4), h.view(-1, 4, 2)).flatten(1).repeat(1, 2),),
    *(lambda h: h.squeeze().unsqueeze(0)[0],),
    *(lambda h: torch.baddbmm(h.view(-1, 2, 4), h.view(-1, 2, 4)[:, :, :2], h.view(-1, 2, 4)).flatten(1),),
    *(lambda h: h + torch.full((8,), 0.5) + torch.ones(8) + torch.zeros(8) + torch.arange(8) + h.new_full((8,), 1.0),),
    *(lambda h: h + torch.full_like(h, 0.5) * torch.ones_like(h) + torch.zeros_like(h) + h.new_zeros(8), F.relu6),
    *(lambda h: h + torch.empty(8).fill_(1.0) + torch.empty_like(h).fill_(1.0) + h.new_empty(8).copy_(torch.ones(8)),),
    *(lambda h: h + torch.scalar_tensor(2.0) + torch.tensor(1.0), lambda h: h.view_as(h).squeeze(-1)),
    *(lambda h: F.scaled_dot_product_attention(*[h.view(-1, 1, 2, 4)] * 3, is_causal=True).flatten(1),),
    *(lambda h: torch._weight_norm(h, h[:, :1], 0),),
]  # fmt: skip
IMAGES = [
    *(lambda h: F.adaptive_avg_pool2d(h, 3), lambda h: F.adaptive_max_pool2d(h, 3), lambda h: F.avg_pool2d(h, 2)),
    *(lambda h: F.max_pool2d(h, 2), lambda h: F.channel_shuffle(h, 2), lambda h: F.unfold(h, 2)),
    *(lambda h: F.pixel_shuffle(torch.cat([h, h], 1), 2), lambda h: F.pad(h, (1, 1, 1, 1), "reflect")),
    *(lambda h: F.pad(h, (1, 1, 1, 1), "replicate"), lambda h: F.interpolate(h, scale_factor=2)),
    *(lambda h: F.interpolate(h, scale_factor=2, mode="bilinear"), F.instance_norm),
    *(lambda h: F.conv2d(h, h[:2, :, :2, :2]),),
]
VOLUMES = [lambda h: F.avg_pool3d(h, 2)]


class Applied(nn.Module):
    """A function of what the weights make of the inputs."""

    def __init__(self, shape, function):
        super().__init__()
        width = torch.Size(shape).numel()
        self.shape, self.function = shape, function
        self.first = nn.Linear(width, width)
        self.last = nn.Linear(function(torch.randn(5, *shape).double()).flatten(1).shape[1], 3)

    def forward(self, x):
        hidden = self.first(x.flatten(1)).view(-1, *self.shape)
        return self.last(self.function(hidden).flatten(1))


def applied(function):
    shape = IMAGE if function in IMAGES else VOLUME if function in VOLUMES else (8,)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Applied(shape, function)
        sizes = enumerate((10, 5))
        people = [Participant(i, torch.randn(n, *shape, dtype=torch.float64), torch.arange(n) % 3) for i, n in sizes]
    return model.double(), people


FUNCTIONS = [*POINTWISE, *IMAGES, *VOLUMES]


@pytest.mark.parametrize("function", FUNCTIONS, ids=range(len(FUNCTIONS)))
def test_an_operator_trains_alike(function):
    model, people = applied(function)
    settings = LocalTraining(learning_rate=0.1, epochs=2, batch_size=5)
    stacked, alone = (train(model, people, settings, seed=0, round=1) for train in (train_cohort, train_one_by_one))
    for name, tensor in alone.states.items():
        torch.testing.assert_close(
            stacked.states[name], tensor, rtol=1e-6, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert not torch.equal(alone.states["first.weight"][0], model.first.weight)


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func._schema.name.removeprefix("aten::"))
        return func(*args, **(kwargs or {}))


# What only some processors and releases of torch have, or what stands for another operator there.
ELSEWHERE = {"cudnn_batch_norm", "_native_batch_norm_legit", "native_dropout", "_fused_rms_norm", "lift_fresh", "alias"}


def test_no_operator_is_known_that_is_not_tried():
    seen = Seen()
    with torch.random.fork_rng(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), seen:
        for function in FUNCTIONS:
            model, people = applied(function)
            copy.deepcopy(model).train()(people[0].x)
    tried = seen.names | {name.removesuffix("_") for name in seen.names}
    assert known_operators._KNOWN - tried <= ELSEWHERE


@pytest.mark.parametrize(
    ("function", "word"),
    [(lambda h: h - h.median(1, keepdim=True)[0], "median"), (lambda h: torch.linalg.svd(h)[0] @ h, "svd")],
)
def test_other_operators_are_named(function, word):
    model, people = applied(lambda h: h)
    model.function = function
    assert word in why_not_stacked(model, people[0].x[:5])
