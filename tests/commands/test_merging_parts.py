"""`fedmerge merge` of parts of models, and of files that name or divide tensors otherwise than the model."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fedmerge import cli
from fedmerge.errors import ConfigError, ModelError, RecordError, UnknownName
from fedmerge.models import build_model
from fedmerge.offline.merge_files import merge_files
from fedmerge.records.model_shards import byte_size, write_shards
from fedmerge.records.model_tensors import read_metadata, read_state

MLP = ["--model", "mlp", "--input-shape", "1,8,8", "--set", "model.hidden=[7]"]


@pytest.fixture(autouse=True)
def _there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def state(seed, classes=10):
    return build_model("mlp", (1, 8, 8), classes, seed=seed, hidden=[7]).state_dict()


def saved(name, tensors):
    save_file({key: tensor.clone() for key, tensor in tensors.items()}, name)
    return tensors


def run(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["fedmerge", "merge", *arguments])
    with pytest.raises(SystemExit) as done:
        cli.main()
    out = capsys.readouterr()
    return done.value.code or 0, out.out.strip(), out.err


def here(name):
    return Path.cwd() / name


def names():
    body = [name for name in state(0) if not name.startswith("layers.1")]
    return body, [name for name in state(0) if name.startswith("layers.1")]


@pytest.mark.parametrize("part", [["--leave-out", "layers.1.*"], ["--only", "layers.0"], ["--leave-out", "layers.1"]])
def test_heads_of_other_sizes_are_left_out(part, monkeypatch, capsys):
    a, b = saved("a.safetensors", state(0, 4)), saved("b.safetensors", state(1, 6))
    code, _, err = run(monkeypatch, capsys, "a.safetensors", "b.safetensors", *MLP, *part, "--out", "m.safetensors")
    assert (code, err) == (0, "")
    merged, (body, head) = load_file("m.safetensors"), names()
    for name in body:
        torch.testing.assert_close(merged[name], (a[name] + b[name]) / 2)
    assert all(torch.equal(merged[name], a[name]) for name in head)


def test_a_base_without_a_head_will_do(monkeypatch, capsys):
    a, body, head = state(0, 4), *names()
    saved("a.safetensors", a)
    saved("b.safetensors", {n: t for n, t in state(1).items() if n in body})
    base = saved("base.safetensors", {n: t for n, t in state(2).items() if n in body})
    more = [
        "--base",
        "base.safetensors",
        "--method",
        "task_arithmetic",
        "--set",
        "scale=0.5",
        "--leave-out",
        "layers.1",
    ]
    code, _, err = run(monkeypatch, capsys, "a.safetensors", "b.safetensors", *MLP, *more, "--out", "m.safetensors")
    assert (code, err) == (0, "")
    merged = load_file("m.safetensors")
    assert all(torch.equal(merged[name], a[name]) for name in head)
    assert not torch.allclose(merged[body[0]], base[body[0]])
    full = saved("base.safetensors", state(2, 5))
    code, *_ = run(
        monkeypatch,
        capsys,
        "a.safetensors",
        "b.safetensors",
        *MLP,
        *more,
        "--left-from",
        "base",
        "--out",
        "m.safetensors",
    )
    assert code == 0
    assert torch.equal(load_file("m.safetensors")["layers.1.bias"], full["layers.1.bias"])


def test_patterns_have_weights(monkeypatch, capsys):
    a, b = saved("a.safetensors", state(0)), saved("b.safetensors", state(1))
    more = ["--weights", "3,1", "--pattern-weights", "layers.1.*=0,1", "--pattern-weights", "layers.0.bias=1,1"]
    code, _, err = run(monkeypatch, capsys, "a.safetensors", "b.safetensors", *MLP, *more, "--out", "m.safetensors")
    assert (code, err) == (0, "")
    merged = load_file("m.safetensors")
    assert torch.equal(merged["layers.1.weight"], b["layers.1.weight"])
    torch.testing.assert_close(merged["layers.0.bias"], (a["layers.0.bias"] + b["layers.0.bias"]) / 2)
    torch.testing.assert_close(merged["layers.0.weight"], 0.75 * a["layers.0.weight"] + 0.25 * b["layers.0.weight"])


def test_names_and_buffers_of_files_may_be_others(monkeypatch, capsys):
    a, b, base = state(0), state(1), state(2)
    ids = torch.arange(5)
    saved("a.safetensors", {f"model.{n}": t for n, t in a.items()} | {"model.position_ids": ids})
    saved("b.safetensors", {n.replace("layers.", "hidden."): t for n, t in b.items()} | {"x.position_ids": ids + 1})
    saved("base.safetensors", {f"model.{n}": t for n, t in base.items()})
    more = ["--prefix", "model.", "--rename", "hidden.=layers.", "--ignore", "*position_ids"]
    more += ["--base", "base.safetensors", "--method", "task_arithmetic", "--set", "scale=1.0"]
    code, _, err = run(monkeypatch, capsys, "a.safetensors", "b.safetensors", *MLP, *more, "--out", "m.safetensors")
    assert (code, err) == (0, "")
    merged = load_file("m.safetensors")
    assert set(merged) == set(a)
    for name in a:
        torch.testing.assert_close(merged[name], (a[name] + b[name]) / 2)


def test_ignored_buffers_are_those_that_the_model_is_built_with(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    sys.modules.pop("ids_net", None)
    (tmp_path / "ids_net.py").write_text(
        "import torch\nfrom torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.fc = nn.Linear(4, 3)\n"
        "        self.register_buffer('ids', torch.arange(3))\n"
        "    def forward(self, x):\n"
        "        return self.fc(x) + self.ids\n"
    )
    files = [tmp_path / f"{i}.safetensors" for i in range(2)]
    own = build_model("ids_net:Net", (4,), 3, seed=0).state_dict()
    saved(files[0], {n: t for n, t in own.items() if n != "ids"})
    saved(files[1], {**own, "ids": torch.tensor([9, 9])})
    given = {"model": "ids_net:Net", "input_shape": (4,)}
    with pytest.raises(ModelError):
        merge_files(files, tmp_path / "m.safetensors", **given)
    merge_files(files, tmp_path / "m.safetensors", ignore=["ids"], **given)
    assert load_file("m.safetensors")["ids"].tolist() == [0, 1, 2]
    with pytest.raises(ConfigError, match=r"'fc\.weight' is a parameter.*--leave-out"):
        merge_files(files, tmp_path / "m.safetensors", ignore=["ids", "fc.*"], **given)


def test_shards_are_read_and_written(monkeypatch, capsys):
    a, b = state(0), state(1)
    most = max(t.nbytes for t in a.values())
    index = write_shards(here("a.safetensors"), a, most)
    assert index.name == "a.safetensors.index.json"
    assert len(list(index.parent.glob("a-0000?-of-0000?.safetensors"))) >= 2
    saved("b.safetensors", b)
    more = ["--out", "m.safetensors", "--max-shard-size"]
    code, out, err = run(monkeypatch, capsys, str(index), "b.safetensors", *MLP, *more, f"{most}B")
    assert (code, err) == (0, "")
    assert out.endswith("m.safetensors.index.json")
    merged = read_state(here("m.safetensors.index.json"))
    assert list(merged) == list(a)
    for name in a:
        torch.testing.assert_close(merged[name], (a[name] + b[name]) / 2)
    content = json.loads(here("m.safetensors.index.json").read_text())
    assert content["metadata"]["total_size"] == sum(t.nbytes for t in a.values())
    for shard in set(content["weight_map"].values()):
        held = load_file(shard)
        assert sum(t.nbytes for t in held.values()) <= most
    assert read_metadata(here("m.safetensors.index.json"))["method"] == "fedavg"
    code, out, _ = run(
        monkeypatch, capsys, str(index), "b.safetensors", *MLP, "--out", "n.safetensors", more[-1], "1GB"
    )
    assert out.endswith("n.safetensors")
    assert set(load_file("n.safetensors")) == set(a)
    whole = write_shards(here("w.safetensors.index.json"), a, 10**9)
    assert read_state(whole).keys() == a.keys()
    with pytest.raises(RecordError, match="in shards is written as"):
        write_shards(here("w.bin"), a, 10)


def test_sizes_have_units():
    sizes = {"5GB": 5 * 10**9, "512MiB": 2**29, "1.5kb": 1500, "70": 70, "1 GB": 10**9}
    assert {text: byte_size(text, "--x") for text in sizes} == sizes
    for text in ("", "0", "5 apples", "GB", "-1GB", "0.1B"):
        with pytest.raises(ConfigError, match="--x wants a size"):
            byte_size(text, "--x")


MISTAKES = {
    "a pattern of nothing": (["--leave-out", "head.*"], "unknown tensor in leave_out 'head.*'"),
    "only of nothing": (["--only", "encoder.*"], "unknown tensor in only"),
    "weights of nothing": (["--pattern-weights", "layers.1.weigth=1,0"], "Did you mean 'layers.1.weight'"),
    "weights without numbers": (["--pattern-weights", "layers.1.*"], "--pattern-weights wants a pair"),
    "weights in words": (["--pattern-weights", "layers.1.*=a,b"], "--pattern-weights wants numbers"),
    "one weight": (["--pattern-weights", "layers.1.*=1"], "has 1 entries for 2 models"),
    "two sets of weights": (
        ["--pattern-weights", "layers.1=1,0", "--pattern-weights", "layers.1=0,1"],
        "says two things",
    ),
    "neurons are aligned": (["--method", "rebasin", "--pattern-weights", "layers.1.*=1,0"], "as rebasin does"),
    "no such prefix": (["--prefix", "module."], "beginning of names in the files"),
    "no pair": (["--rename", "model."], "--rename wants a pair"),
    "nothing to ignore": (["--ignore", "*.position_ids"], "unknown tensor in --ignore"),
    "a parameter to ignore": (["--ignore", "layers.1.*"], "is a parameter of the model"),
    "no size": (["--max-shard-size", "large"], "--max-shard-size wants a size"),
    "from nowhere": (["--leave-out", "layers.1", "--left-from", "second"], "left_from must be"),
    "from no base": (["--leave-out", "layers.1", "--left-from", "base"], "pass base="),
    "an index without a size": (["--out", "m.safetensors.index.json"], "--max-shard-size"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_end_with_one_clear_line(mistake, monkeypatch, capsys, tmp_path):
    saved("a.safetensors", state(0))
    saved("b.safetensors", state(1))
    arguments, words = MISTAKES[mistake]
    out = [] if "--out" in arguments else ["--out", "m.safetensors"]
    code, _, err = run(monkeypatch, capsys, "a.safetensors", "b.safetensors", *MLP, *arguments, *out)
    lines = err.strip().splitlines()
    assert (code, len(lines)) == (2, 1)
    assert lines[0].startswith("error: ")
    assert words in lines[0]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]


def test_errors_are_typed(tmp_path):
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for seed, file in enumerate(files):
        saved(file, state(seed))
    with pytest.raises(UnknownName):
        merge_files(files, tmp_path / "m.safetensors", model="mlp", settings=["model.hidden=[7]"], leave_out=["tail"])
