"""Tiny models of every kind whose neurons are to be re-ordered, with the sizes of groups that they have by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.densenet import DenseNet
from torchvision.models.mobilenetv2 import MobileNetV2
from torchvision.models.mobilenetv3 import InvertedResidualConfig, MobileNetV3
from torchvision.models.resnet import BasicBlock
from torchvision.models.shufflenetv2 import ShuffleNetV2
from torchvision.models.swin_transformer import SwinTransformer
from torchvision.models.vgg import VGG, make_layers
from torchvision.models.vision_transformer import VisionTransformer
from torchvision.ops.misc import Conv2dNormActivation

from fedmerge.models import build_model

CLASSES = 5
VOCABULARY = 11


class LeNet(nn.Module):
    """Convolutions, a flatten, linear layers."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 6, 5, stride=2), nn.Conv2d(6, 10, 5)
        self.fc1, self.fc2, self.fc3 = nn.Linear(10 * 5 * 5, 20), nn.Linear(20, 14), nn.Linear(14, CLASSES)

    def forward(self, x):
        x = F.max_pool2d(torch.relu(self.conv2(torch.relu(self.conv1(x)))), 2)
        return self.fc3(torch.relu(self.fc2(torch.relu(self.fc1(x.flatten(1))))))


class ResNet18(nn.Module):
    """Four stages of two of torchvision's blocks each."""

    def __init__(self, norm):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), norm(8), nn.ReLU())
        blocks, below = [], 8
        for stage in range(4):
            above, stride = 8 * 2**stage, 1 if stage == 0 else 2
            shortcut = None
            if below != above:
                shortcut = nn.Sequential(nn.Conv2d(below, above, 1, stride=stride, bias=False), norm(above))
            blocks.append(BasicBlock(below, above, stride, shortcut, norm_layer=norm))
            blocks.append(BasicBlock(above, above, norm_layer=norm))
            below = above
        self.blocks, self.out = nn.Sequential(*blocks), nn.Linear(below, CLASSES)

    def forward(self, x):
        return self.out(F.adaptive_avg_pool2d(self.blocks(self.stem(x)), 1).flatten(1))


class Recurrent(nn.Module):
    """A recurrent layer and a linear one at its last step."""

    def __init__(self, kind, hidden, **settings):
        super().__init__()
        self.rnn = kind(6, hidden, batch_first=True, **settings)
        self.out = nn.Linear(hidden * (2 if settings.get("bidirectional") else 1), CLASSES)

    def forward(self, x):
        return self.out(self.rnn(x)[0].mean(1))


class Encoder(nn.Module):
    """torch's own encoder between two linear layers."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(6, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.out = nn.Linear(16, CLASSES)

    def forward(self, x):
        return self.out(self.encoder(self.embed(x)).mean(1))


class LanguageModel(nn.Module):
    """A causal transformer whose output weight is its embedding."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 16)
        self.position = nn.Parameter(torch.randn(7, 16))
        self.layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True, norm_first=True)
        self.norm = nn.LayerNorm(16)
        self.out = nn.Linear(16, VOCABULARY, bias=False)
        self.out.weight = self.embed.weight
        self.register_buffer("mask", torch.full((7, 7), -torch.inf).triu(1), persistent=False)

    def forward(self, tokens):
        return self.out(self.norm(self.layer(self.embed(tokens) + self.position, self.mask)))


def vgg():
    model = VGG(make_layers([8, "M", 12, 16, "M"], batch_norm=True), CLASSES, init_weights=False)
    model.avgpool = nn.AdaptiveAvgPool2d(2)
    model.classifier = nn.Sequential(nn.Linear(16 * 4, 24), nn.ReLU(True), nn.Dropout(), nn.Linear(24, CLASSES))
    return model


def resnet20(norm):
    seed = int(torch.randint(1000, ()))
    return build_model("resnet20", (3, 32, 32), CLASSES, seed=seed, width=8, norm=norm, groups=4)


def mobilenet_v2():
    model = MobileNetV2(CLASSES, 0.25, [[1, 32, 1, 1], [2, 48, 2, 2]], round_nearest=4)
    model.features[-1] = Conv2dNormActivation(12, 20, 1, activation_layer=nn.ReLU6)
    model.classifier = nn.Sequential(nn.Dropout(), nn.Linear(20, CLASSES))
    return model


def mobilenet_v3():
    settings = [
        InvertedResidualConfig(16, 3, 16, 16, True, "RE", 1, 1, 1.0),
        InvertedResidualConfig(16, 3, 32, 24, False, "HS", 2, 1, 1.0),
        InvertedResidualConfig(24, 5, 48, 24, True, "HS", 1, 1, 1.0),
    ]
    return MobileNetV3(settings, 40, CLASSES)


def images():
    return torch.randn(4, 3, 32, 32)


def sequences():
    return torch.randn(4, 7, 6)


@dataclass(frozen=True)
class Model:
    """An architecture, a batch for it, and the sizes of its groups, those of blocks too.

    `heads` are all groups of blocks and within blocks, which some methods leave as they are.
    """

    build: Callable[[], nn.Module]
    batch: Callable[[], torch.Tensor]
    sizes: tuple[int, ...]
    blocks: int = 0
    convolutional: bool = False

    def make(self, seed=0):
        """The model in eval mode with all its neurons distinct, and its batch."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model, batch = self.build().eval(), self.batch()
            distinct(model)
        return model, batch


def distinct(model):
    """Draw all norms, biases and whatever starts at one value, and let signals reach the output undamped."""
    buffers = {id(b) for n, b in model.named_buffers() if not n.endswith(("running_mean", "running_var"))}
    tensors = [*model.named_parameters(), *model.named_buffers()]
    with torch.no_grad():
        for name, tensor in tensors:
            if id(tensor) in buffers or not tensor.is_floating_point():
                continue
            if name.endswith("running_var"):
                tensor.copy_(0.5 + torch.rand(tensor.shape))
            elif tensor.ndim == 1:
                tensor.add_(0.6 * torch.rand(tensor.shape) - 0.3)
            elif tensor.std() < 1e-6:  # zeros, or the layer scale of ConvNeXt
                tensor.copy_(0.5 * torch.randn(tensor.shape))
            elif tensor.ndim > 1:
                tensor.mul_(max(1.0, float((2 / tensor[0].numel()) ** 0.5 / tensor.std())))


@torch.no_grad()
def calibrate(model, batch):
    """Give batch norms the statistics that they have on a batch."""
    layers = [(m, m.momentum) for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for layer, _ in layers:
        layer.train()
        layer.momentum = 1.0
    model(batch)
    for layer, momentum in layers:
        layer.eval()
        layer.momentum = momentum


def permuted(model, spec, perms):
    """A copy with its neurons re-ordered."""
    found = copy.deepcopy(model)
    found.load_state_dict(spec.apply(model.state_dict(), perms))
    return found


def free_perms(spec, seed, *, blocks=True):
    """A random permutation of every group; without `blocks`, those of blocks and within blocks stay."""
    perms = spec.random(torch.Generator().manual_seed(seed))
    if not blocks:
        for i in blocked(spec):
            perms[i] = torch.arange(len(perms[i]))
    return perms


def blocked(spec):
    """Indices of groups that are blocks or lie within them."""
    inner = {g for group in spec.groups for block in group.inner for g in block}
    return inner | {i for i, group in enumerate(spec.groups) if group.inner}


def difference(one, other, batch):
    """Largest difference of outputs relative to the largest output, in float64."""
    x = batch.double() if batch.is_floating_point() else batch
    with torch.no_grad():
        a, b = (copy.deepcopy(m).double().eval()(x) for m in (one, other))
    return float((a - b).abs().max() / a.abs().max())


def _norm_groups(*widths):
    """For each width, four groups of a norm and what lies within them."""
    return tuple(size for width in widths for size in (4, *[width // 4] * 4))


def _heads(heads, dimensions):
    """Queries with keys, and values, of each head; then the heads."""
    return (*[dimensions] * (2 * heads), heads)


_STAGES = (8, 16, 32, 64)
# By width of a branch: two wholes of two branches that the next block splits in halves, two inside, one after it.
_SHUFFLED = (8, *(4, 4, 4, 2, 2, 2, 2), *(8, 8, 8, 4, 4, 4, 4), *(12, 12, 12), 32)
_batch_norm, _group_norm = nn.BatchNorm2d, partial(nn.GroupNorm, 4)

MODELS = {
    "mlp": Model(
        lambda: nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, CLASSES)),
        lambda: torch.randn(4, 6),
        (16, 12),
        convolutional=True,
    ),
    "lenet": Model(LeNet, images, (6, 10, 20, 14), convolutional=True),
    "vgg": Model(vgg, images, (8, 12, 16, 24), convolutional=True),
    "resnet18": Model(lambda: ResNet18(_batch_norm), images, _STAGES * 3, convolutional=True),
    "resnet18_group_norm": Model(
        lambda: ResNet18(_group_norm), images, _norm_groups(*_STAGES * 3), blocks=12, convolutional=True
    ),
    "resnet20": Model(lambda: resnet20("batch"), images, (8, 16, 32) * 4, convolutional=True),
    "resnet20_group_norm": Model(
        lambda: resnet20("group"),
        images,
        _norm_groups(*(8, 16, 32) * 4),
        blocks=12,
        convolutional=True,
    ),
    "densenet": Model(
        lambda: DenseNet(4, (2, 2), 8, bn_size=2, num_classes=CLASSES), images, (8,) * 6 + (4,) * 4, convolutional=True
    ),
    "mobilenet_v2": Model(mobilenet_v2, images, (8, 16, 12, 24, 20), convolutional=True),
    "mobilenet_v3": Model(mobilenet_v3, images, (16, 8, 32, 24, 48, 16, 144, 40), convolutional=True),
    "shufflenet": Model(
        lambda: ShuffleNetV2([2, 2, 1], [8, 8, 16, 24, 32], CLASSES), images, _SHUFFLED, convolutional=True
    ),
    "gru": Model(lambda: Recurrent(nn.GRU, 10), sequences, (10,)),
    "bilstm": Model(lambda: Recurrent(nn.LSTM, 7, num_layers=2, bidirectional=True), sequences, (7,) * 4),
    "encoder": Model(Encoder, sequences, (16, 24, 24, *_heads(2, 8), *_heads(2, 8)), blocks=2),
    "vit": Model(
        lambda: VisionTransformer(32, 8, 2, 2, 16, 24, num_classes=CLASSES),
        images,
        (16, 24, 24, *_heads(2, 8), *_heads(2, 8)),
        blocks=2,
    ),
    "convnext": Model(
        lambda: ConvNeXt([CNBlockConfig(8, 16, 2), CNBlockConfig(16, None, 1)], num_classes=CLASSES),
        images,
        (8, 32, 32, 16, 64),
        convolutional=True,
    ),
    "swin": Model(
        lambda: SwinTransformer([2, 2], 8, [2, 2], [2, 4], [4, 4], num_classes=CLASSES),
        images,
        (8, 32, 32, 16, 64, 64, *_heads(2, 4) * 2, *_heads(4, 4) * 2),
        blocks=4,
    ),
    "language_model": Model(
        LanguageModel, lambda: torch.randint(0, VOCABULARY, (4, 7)), (16, 24, *_heads(2, 8)), blocks=1
    ),
}
