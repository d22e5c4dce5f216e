"""``fedmerge merge`` on files, as a person runs it."""

from __future__ import annotations

import re
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import fedmerge
from fedmerge import ConfigError, ModelError, RecordError, cli
from fedmerge.models import build_model
from fedmerge.models.resize import resize
from fedmerge.offline.merge_files import merge_files, numbers
from fedmerge.records.checkpoints import Checkpoint, save_checkpoint

SHAPE = (1, 28, 28)


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(monkeypatch, capsys, *arguments):
    """Exit code, standard output and standard error of ``fedmerge merge``."""
    monkeypatch.setattr(sys, "argv", ["fedmerge", "merge", *map(str, arguments)])
    with pytest.raises(SystemExit) as done:
        cli.main()
    captured = capsys.readouterr()
    return done.value.code or 0, captured.out, captured.err


def saved(path, model="lenet", shape=SHAPE, classes=10, seed=0, **options):
    """A model, its state in a file."""
    module = build_model(model, shape, classes, seed=seed, **options).eval()
    save_file(module.state_dict(), path)
    return module


def test_the_command_of_the_documents(monkeypatch, capsys, tmp_path):
    a, b = saved("a.safetensors"), saved("b.safetensors", seed=1)
    arguments = ("a.safetensors", "b.safetensors", "--model", "lenet", "--method", "otfusion")
    code, out, err = run(monkeypatch, capsys, *arguments, "--out", "merged.safetensors")
    assert (code, out.strip()) == (0, "merged.safetensors"), err
    expected = fedmerge.merge([a, b], "otfusion", example=torch.randn(2, *SHAPE)).state_dict()
    merged = load_file("merged.safetensors")
    assert set(merged) == set(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(merged[name], tensor)
    assert {path.name for path in tmp_path.iterdir()} == {"a.safetensors", "b.safetensors", "merged.safetensors"}
    with safe_open("merged.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt", "model": "lenet", "method": "otfusion"}


def test_weights_count(monkeypatch, capsys):
    a, b = (saved(f"{seed}.safetensors", "logistic", seed=seed).state_dict() for seed in (0, 1))
    arguments = ("0.safetensors", "1.safetensors", "--model", "logistic", "--weights", "3,1", "--out", "m.safetensors")
    assert run(monkeypatch, capsys, *arguments)[0] == 0
    for name, tensor in load_file("m.safetensors").items():
        torch.testing.assert_close(tensor, 0.75 * a[name] + 0.25 * b[name])


@pytest.mark.parametrize(
    ("model", "shape", "classes", "options"),
    [
        ("lenet", (1, 8, 8), 10, {}),
        ("lenet", (3, 32, 32), 100, {}),
        ("mlp", (13,), 2, {}),
        ("resnet8", (3, 32, 32), 7, {}),
        ("char_lstm", (20,), 30, {"hidden": 12}),
    ],
)
def test_without_a_shape_one_is_found(tmp_path, model, shape, classes, options):
    models = [saved(f"{seed}.safetensors", model, shape, classes, seed, **options) for seed in (0, 1)]
    files = [tmp_path / "0.safetensors", tmp_path / "1.safetensors"]
    merge_files(files, tmp_path / "m.safetensors", model=model, method="rebasin")
    merged = load_file("m.safetensors")
    assert {n: t.shape for n, t in merged.items()} == {n: t.shape for n, t in models[0].state_dict().items()}
    # Rebasin re-orders the neurons of models that have nothing in common, and keeps the output's.
    x = torch.randint(0, 20, (2, *shape)) if model == "char_lstm" else torch.randn(2, *shape)
    assert torch.isfinite(resize(models[0], merged).eval()(x)).all()


def test_unequal_widths_merge_where_the_method_can(tmp_path):
    saved("narrow.safetensors", "mlp", (1, 8, 8), hidden=[20])
    wide = saved("wide.safetensors", "mlp", (1, 8, 8), hidden=[30], seed=1)
    files = [tmp_path / "narrow.safetensors", tmp_path / "wide.safetensors"]
    merge_files(files, tmp_path / "m.safetensors", model="mlp", method="otfusion")
    assert {n: t.shape for n, t in load_file("m.safetensors").items()} == {
        n: t.shape for n, t in wide.state_dict().items()
    }
    with pytest.raises(ModelError, match=r"wide\.safetensors: 'layers\.0\..*equal widths.*otfusion"):
        merge_files(files, tmp_path / "n.safetensors", model="mlp", method="fedavg")


def test_data_make_the_example_and_serve_the_method(monkeypatch, capsys):
    a, b = (saved(f"{seed}.safetensors", "mlp", (1, 6, 6), 4, seed=seed) for seed in (0, 1))
    inputs = torch.randn(300, 1, 6, 6)
    save_file({"inputs": inputs}, "data.safetensors")
    arguments = ("0.safetensors", "1.safetensors", "--model", "mlp", "--method", "rebasin", "--out", "m.safetensors")
    code, _, err = run(monkeypatch, capsys, *arguments, "--data", "data.safetensors", "--set", "ground=activations")
    assert code == 0, err
    expected = fedmerge.merge([a, b], "rebasin", ground="activations", data=[inputs])
    for name, tensor in load_file("m.safetensors").items():
        torch.testing.assert_close(tensor, expected.state_dict()[name])


def test_types_of_the_files_stay_and_counters_count(tmp_path):
    states = []
    for seed in (0, 1):
        state = saved(f"{seed}.safetensors", "resnet8", SHAPE, seed=seed).state_dict()
        state = {n: t.bfloat16() if t.is_floating_point() else t + seed for n, t in state.items()}
        save_file(state, f"{seed}.safetensors")
        states.append(state)
    merge_files([tmp_path / f"{s}.safetensors" for s in (0, 1)], tmp_path / "m.safetensors", model="resnet8")
    merged = load_file("m.safetensors")
    assert {n: t.dtype for n, t in merged.items()} == {n: t.dtype for n, t in states[0].items()}
    assert all(int(t) == 1 for n, t in merged.items() if n.endswith("num_batches_tracked"))


def test_checkpoints_of_runs_and_tied_weights(tmp_path, monkeypatch):
    (tmp_path / "tied_net.py").write_text(
        "from torch import nn\n"
        "class Tied(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.a, self.b = nn.Linear(5, 5), nn.Linear(5, 5)\n"
        "        self.b.weight = self.a.weight\n"
        "    def forward(self, x):\n"
        "        return self.b(self.a(x).relu())\n"
    )
    files = []
    for i in range(2):
        state = {"a.weight": torch.full((5, 5), float(i)), "a.bias": torch.ones(5), "b.bias": torch.ones(5)}
        more = {
            "memory": {"aggregator/m": torch.ones(2)},
            "simulation": {"0": torch.arange(3)},
            "mine": {"x": state["a.bias"]},
        }
        files.append(save_checkpoint(tmp_path / str(i), Checkpoint(i, {"state": state, **more}, {"engine": "serial"})))
    merge_files(files, files[0], model="tied_net:Tied")  # the output may be one of the inputs
    merged = load_file(files[0])
    assert torch.equal(merged["a.weight"], torch.full((5, 5), 0.5))
    assert torch.equal(merged["b.weight"], merged["a.weight"])


def test_a_checkpoint_counts_as_it_was_written(tmp_path):
    states = [build_model("logistic", (1, 8, 8), 10, seed=seed).state_dict() for seed in (0, 1)]
    files = [save_checkpoint(tmp_path / str(i), Checkpoint(3, {"state": state})) for i, state in enumerate(states)]
    merge_files(files, tmp_path / "m.safetensors", model="logistic")
    assert torch.equal(
        load_file("m.safetensors")["output.bias"], (states[0]["output.bias"] + states[1]["output.bias"]) / 2
    )
    with pytest.raises(ModelError, match=re.escape(str(files[0]))):  # the folder's newest
        merge_files([files[0].parent, files[1]], tmp_path / "n.safetensors", model="logistic")
    content = bytearray(files[0].read_bytes())
    content[-1] ^= 1
    files[0].write_bytes(content)
    with pytest.raises(RecordError, match="truncated or edited"):
        merge_files(files, tmp_path / "n.safetensors", model="logistic")
    assert not (tmp_path / "n.safetensors").exists()


def complex_of(tensor, i):
    return torch.complex(tensor, (i + 1) * tensor)


# By what is wrong: the model's kind of `w`, which tensor is another in the file, how, and what the error says.
SPOILT = {
    "complex in a real model": ("float32", "w", complex_of, "imaginary part would be lost"),
    "complex in the second file": (
        "float32",
        "w",
        lambda t, i: complex_of(t, i) if i else t,
        "1.safetensors.*imaginary",
    ),
    "real in a complex model": ("complex64", "w", lambda t, i: t.real * i, "lacks an imaginary part"),
    "whole numbers for weights": ("float32", "w", lambda t, i: (t * i).int(), "have no mean"),
    "yes and no for weights": ("float32", "w", lambda t, i: t > i, "have no mean"),
    "fractions for indices": ("float32", "ids", lambda t, i: t + 0.5, "fractions would be lost"),
    "indices that differ": ("float32", "ids", lambda t, i: t + i, "indices and masks have no mean"),
    "masks that differ": ("float32", "mask", lambda t, i: t & (i == 0), "indices and masks have no mean"),
    "a first file too narrow": (
        "float32",
        "w",
        lambda t, i: t * 3e8 if i else t.half(),
        "does not fit into torch.float16",
    ),
    "counters too wide": ("float32", "seen", lambda t, i: t + 2**40 if i else t.int(), "does not fit into torch.int32"),
}


@pytest.mark.parametrize("kind", SPOILT)
def test_tensors_that_a_merge_would_spoil_are_refused(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    sys.modules.pop("kinds_net", None)
    (tmp_path / "kinds_net.py").write_text(
        "import torch\nfrom torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self, kind='float32'):\n"
        "        super().__init__()\n"
        "        self.fc, self.w = nn.Linear(4, 3), nn.Parameter(torch.ones(3, dtype=getattr(torch, kind)))\n"
        "        self.register_buffer('ids', torch.arange(3))\n"
        "        self.register_buffer('mask', torch.ones(3, dtype=torch.bool))\n"
        "        self.register_buffer('seen', torch.tensor(1))\n"
        "    def forward(self, x):\n"
        "        return self.fc(x) * self.w.real\n"
    )
    model_kind, name, spoil, told = SPOILT[kind]
    whole = build_model("kinds_net:Net", (4,), 3, seed=0, kind=model_kind).state_dict()
    files = [tmp_path / f"{i}.safetensors" for i in range(2)]
    given = {"model": "kinds_net:Net", "input_shape": (4,), "settings": [f"model.kind={model_kind}"]}
    for i, file in enumerate(files):
        save_file({**whole, name: spoil(whole[name], i)}, file)
    with pytest.raises(ModelError, match=told):
        merge_files(files, tmp_path / "m.safetensors", **given)
    assert not (tmp_path / "m.safetensors").exists()
    for file in files:
        save_file(whole, file)
    merge_files(files, tmp_path / "m.safetensors", **given)  # it was that tensor
    assert torch.equal(load_file("m.safetensors")[name], whole[name])


def test_methods_on_updates_take_the_common_start(tmp_path):
    for seed, name in enumerate(("base", "a", "b")):
        saved(f"{name}.safetensors", "logistic", seed=seed)
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    out = merge_files(
        files, tmp_path / "m.safetensors", model="logistic", method="fedatt", base=tmp_path / "base.safetensors"
    )
    assert out.exists()


MISTAKES = {
    "missing file": (["a.safetensors", "nowhere.safetensors"], "there is no file nowhere.safetensors"),
    "a folder": (["a.safetensors", "folder"], "folder"),
    "no safetensors": (["a.safetensors", "pickle.pt"], "pickle.pt is no safetensors file"),
    "one file": (["a.safetensors"], "name two or more"),
    "another architecture": (
        ["a.safetensors", "b.safetensors", "--model", "lenet"],
        "a.safetensors: the tensors do not",
    ),
    "more layers": (["deep.safetensors", "deep.safetensors"], "model.option=value"),
    "names of the second": (["a.safetensors", "deep.safetensors"], "deep.safetensors: the tensors do not fit"),
    "unknown model": (["a.safetensors", "b.safetensors", "--model", "lenett"], "lenet"),
    "unknown method": (["a.safetensors", "b.safetensors", "--method", "otfusoin"], "Did you mean 'otfusion'"),
    "unknown option": (["a.safetensors", "b.safetensors", "--set", "sweps=3", "--method", "rebasin"], "'sweeps'"),
    "an argument of merge": (["a.safetensors", "b.safetensors", "--set", "data=3"], "option of fedavg 'data'"),
    "no option": (["a.safetensors", "b.safetensors", "--set", "sweeps"], "option=value"),
    "too many weights": (["a.safetensors", "b.safetensors", "--weights", "1,2,3"], "3 entries for 2 models"),
    "weights in words": (["a.safetensors", "b.safetensors", "--weights", "one,2"], "--weights wants numbers"),
    "weight of zero": (["a.safetensors", "b.safetensors", "--weights", "1,0"], "b.safetensors: its weight"),
    "wrong shape": (["a.safetensors", "b.safetensors", "--input-shape", "1,9,9"], "does not take"),
    "wrong classes": (["a.safetensors", "b.safetensors", "--classes", "7"], "gives 10 logits, not 7"),
    "shape and data": (
        ["a.safetensors", "b.safetensors", "--input-shape", "1,8,8", "--data", "flat.safetensors"],
        "that of the data [64]",
    ),
    "missing data": (["a.safetensors", "b.safetensors", "--data", "nowhere.safetensors"], "there is no file nowhere"),
    "data without inputs": (["a.safetensors", "b.safetensors", "--data", "a.safetensors"], "tensor 'inputs'"),
    "statistics are needed": (["a.safetensors", "b.safetensors", "--method", "fednova"], "local_steps"),
    "a base is needed": (["a.safetensors", "b.safetensors", "--method", "fedatt"], "--base"),
    "data are needed": (
        ["a.safetensors", "b.safetensors", "--method", "rebasin", "--set", "ground=activations"],
        "data",
    ),
    "NaN": (["a.safetensors", "nan.safetensors"], "nan.safetensors: tensor"),
    "out is a folder": (["a.safetensors", "b.safetensors", "--out", "folder"], "folder is a folder"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_end_with_one_clear_line_and_no_file(mistake, monkeypatch, capsys, tmp_path):
    for seed, name in enumerate("ab"):
        saved(f"{name}.safetensors", "mlp", (1, 8, 8), seed=seed)
    saved("deep.safetensors", "mlp", (1, 8, 8), hidden=[100, 100])
    broken = {n: t.fill_(torch.nan) for n, t in load_file("a.safetensors").items()}
    save_file(broken, "nan.safetensors")
    save_file({"inputs": torch.zeros(3, 64)}, "flat.safetensors")
    torch.save(broken, "pickle.pt")
    (tmp_path / "folder").mkdir()
    arguments, words = MISTAKES[mistake]
    model = [] if "--model" in arguments else ["--model", "mlp"]
    out = [] if "--out" in arguments else ["--out", "m.safetensors"]
    code, _, err = run(monkeypatch, capsys, *arguments, *model, *out)
    lines = err.strip().splitlines()
    assert code == 2
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert words in lines[0]
    assert not (tmp_path / "m.safetensors").exists()


def test_layers_go_by_an_option_of_the_model(tmp_path):
    for seed in (0, 1):
        saved(f"{seed}.safetensors", "mlp", (1, 8, 8), hidden=[9, 7], seed=seed)
    files = [tmp_path / f"{seed}.safetensors" for seed in (0, 1)]
    merge_files(files, tmp_path / "m.safetensors", model="mlp", settings=["model.hidden=[5, 5]"])
    assert load_file("m.safetensors")["layers.1.weight"].shape == (7, 9)


def test_errors_are_typed(tmp_path):
    for seed in (0, 1):
        saved(f"{seed}.safetensors", "logistic", (4,), seed=seed)
    files = [tmp_path / f"{seed}.safetensors" for seed in (0, 1)]
    with pytest.raises(RecordError, match="cannot be written"):
        merge_files(files, files[0] / "below" / "m.safetensors", model="logistic")
    with pytest.raises(ConfigError, match="--input-shape wants"):
        numbers("1,x", "--input-shape", int)
