"""What the documents tell people to type, typed."""

from __future__ import annotations

import collections
import dataclasses
import os
import re
import shlex
import subprocess
import sys
import tomllib
import types
from pathlib import Path

import pytest
import torch
import typer
from safetensors.torch import load_file
from torch import nn

import fedmerge
from fedmerge import cli, registry
from fedmerge.lookup.kinds import KINDS
from fedmerge.lookup.method_names import split_methods
from fedmerge.merging import build_pipeline
from fedmerge.observers import make_observers
from fedmerge.simulation import Experiment, SimulationGrid, make_config
from fedmerge.strategies import MergeStrategy, from_arrays, to_arrays
from fedmerge.training import LocalTraining, train
from fedmerge.training.schedules import factor_at

ROOT = Path(__file__).parent.parent


def blocks(name: str) -> list[str]:
    """The Python examples of a document."""
    return re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), flags=re.DOTALL)


def test_the_aggregator_of_the_contributing_guide_works_as_it_stands(monkeypatch):
    (source,) = blocks("CONTRIBUTING.md")
    code = [line for line in source.strip().splitlines() if line and not line.startswith(("from ", "import ", '"""'))]
    assert len(code) <= 10
    fedmerge.methods()  # what discovery registers must outlive this test
    monkeypatch.setattr(registry, "_ENTRIES", dict(registry._ENTRIES))
    exec(compile(source, "contributing", "exec"), {"__name__": "contributing"})
    models = [nn.Linear(2, 1, bias=False) for _ in range(3)]
    for model, value in zip(models, (1.0, 2.0, 9.0), strict=True):
        nn.init.constant_(model.weight, value)
    assert torch.equal(fedmerge.merge(models, "midrange").weight, torch.full((1, 2), 5.0))
    assert MergeStrategy("midrange").pipeline.aggregator


def test_the_readmes_server_app_loads():
    app = next(source for source in blocks("README.md") if "ServerApp()" in source)
    scope = {"make_model": lambda: nn.Linear(1, 1)}
    exec(compile(app, "readme", "exec"), scope)
    assert scope["app"]
    assert len(app.strip().splitlines()) <= 12


def test_the_app_of_the_deployment_guide_runs_as_it_stands(tmp_path):
    text = (ROOT / "docs" / "deployment.md").read_text()
    names = re.findall(r"`digits-app/([\w/]+\.py|pyproject\.toml)`", text)
    sources = [source for _, source in re.findall(r"```(python|toml)\n(.*?)```", text, flags=re.DOTALL)]
    assert names == ["pyproject.toml", *(f"digitsapp/{name}.py" for name in ("task", "client_app", "server_app"))]
    (tmp_path / "digits-app" / "digitsapp").mkdir(parents=True)
    for name, source in zip(names, sources[:4], strict=True):
        (tmp_path / "digits-app" / name).write_text(source)
    settings = tomllib.loads(sources[0])["tool"]["flwr"]["app"]
    command = [sys.executable, "-c", sources[4].replace("/tmp/digits", str(tmp_path))]
    path = os.pathsep.join([str(tmp_path / "digits-app"), str(ROOT)])
    subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | {"PYTHONPATH": path})
    assert load_file(tmp_path / "model.safetensors")["3.bias"].shape == (10,)
    assert len(list((tmp_path / "checkpoints").iterdir())) == settings["config"]["rounds"]
    for side in settings["components"].values():
        assert (tmp_path / "digits-app" / Path(*side.partition(":")[0].split(".")).with_suffix(".py")).exists()
    build = [sys.executable, "-m", "flwr.cli.app", "build", "--app", str(tmp_path / "digits-app")]
    built = subprocess.run(build, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert list(tmp_path.glob("*.fab")), built.stdout + built.stderr


def test_the_privacy_examples_of_the_deployment_guide_run_together(monkeypatch):
    sources = blocks("docs/deployment.md")
    task, (client, votes) = sources[0], [s for s in sources if "mods=[" in s or "def equal_votes" in s]
    monkeypatch.setitem(sys.modules, "digitsapp", types.ModuleType("digitsapp"))
    monkeypatch.setitem(sys.modules, "digitsapp.task", types.ModuleType("digitsapp.task"))
    exec(compile(task, "task", "exec"), vars(sys.modules["digitsapp.task"]))
    scope = {}
    for source in (votes, client.replace("mods=[", "mods=[equal_votes, ")):
        exec(compile(source, "privacy", "exec"), scope)
    reported = []
    scope["strategy"].strategy.train_metrics_aggr_fn = lambda contents, key: reported.append(
        [content["metrics"][key] for content in contents]
    )
    with SimulationGrid(scope["app"], 2) as grid:
        scope["strategy"].start(grid, to_arrays(scope["make_model"]().state_dict()), num_rounds=1)
    assert reported == [[1, 1]]


def test_the_page_of_methods_names_every_method_and_no_other():
    table = (ROOT / "docs" / "methods.md").read_text().partition("## Which")[0]
    named = set(re.findall(r"^\| `([a-z0-9_+]+)` \|", table, flags=re.MULTILINE))
    behind = {f"+{name}" for kind in ("server step", "refinement", "trajectory") for name in registry.entries(kind)}
    assert named == set(fedmerge.methods()) | behind | {f"{name}+" for name in registry.entries("edit")}


def test_the_readmes_own_data_example_runs_as_it_stands():
    source = next(source for source in blocks("README.md") if "def load_client" in source)
    scope = {}
    exec(compile(source, "readme", "exec"), scope)
    assert set(scope["result"].arrays) == set(scope["make_model"]().state_dict())
    assert not torch.equal(from_arrays(scope["result"].arrays)["0.weight"], scope["make_model"]()[0].weight)


def test_the_readmes_merges_run_as_they_stand():
    source = next(source for source in blocks("README.md") if "[loader_a, loader_b]" in source)
    models = [nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)) for _ in range(2)]
    inputs = torch.randn(8, 4)
    loader = [(inputs, torch.arange(8) % 3)]
    scope = {"model_a": models[0], "model_b": models[1], "inputs": inputs, "loader_a": loader, "loader_b": loader}
    exec(compile(source, "readme", "exec"), scope)
    assert isinstance(scope["merged"], nn.Module)


def test_the_examples_of_the_page_of_tasks_run_as_they_stand():
    for source in blocks("docs/tasks.md"):
        exec(compile(source, "tasks", "exec"), {})


def test_the_examples_of_the_page_of_data_run_as_they_stand(tmp_path, monkeypatch):
    own, clients = blocks("docs/data.md")
    (config,) = re.findall(r"```toml\n(.*?)```", (ROOT / "docs/data.md").read_text(), flags=re.DOTALL)
    (tmp_path / "my_data.py").write_text(own)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    experiment = Experiment(make_config(tomllib.loads(config)), 0)
    assert experiment.partition.client_names == ("ward 0", "ward 1", "ward 2", "ward 3")
    sys.modules.pop("my_data")
    scope = {}
    exec(compile(clients, "data", "exec"), scope)
    assert set(scope["result"].arrays) == set(scope["make_model"]().state_dict())


def test_the_example_of_the_page_of_what_travels_runs_as_it_stands():
    (source,) = blocks("docs/travel.md")
    scope = {}
    exec(compile(source, "travel", "exec"), scope)
    start, end = scope["make_model"]().state_dict(), from_arrays(scope["result"].arrays)
    assert {name for name in start if torch.equal(start[name], end[name])} == {
        "0.weight",
        "0.bias",
        "4.weight",
        "4.bias",
    }


def test_the_examples_of_the_page_of_merging_models_run_as_they_stand():
    def words(vocabulary, seed):
        torch.manual_seed(seed)
        parts = {"embed": nn.Embedding(vocabulary, 4), "lm_head": nn.Linear(4, vocabulary)}
        return nn.Sequential(collections.OrderedDict(parts))

    def net(classes, seed):
        torch.manual_seed(seed)
        layers = nn.Sequential(nn.Linear(4, 5), nn.ReLU())
        return nn.Sequential(collections.OrderedDict(layers=layers, head=nn.Linear(5, classes)))

    heads, weights, rows = blocks("docs/merging-models.md")
    x = torch.randn(12, 4)
    scope = {"cats": net(2, 0), "dogs": net(3, 1), "a": net(2, 0), "b": net(2, 1)}
    scope |= {"cat_loader": [(x, torch.arange(12) % 2)], "dog_loader": [(x, torch.arange(12) % 3)]}
    exec(compile(heads, "merging", "exec"), scope)
    assert scope["for_dogs"](x).shape == (12, 3)
    assert torch.equal(scope["for_dogs"].head.weight, scope["dogs"].head.weight)
    exec(compile(weights, "merging", "exec"), scope)
    assert torch.equal(scope["merged"].head.weight, scope["a"].head.weight)
    scope |= {"a": words(2, 0), "b": words(3, 1), "words_a": ["the", "cat"], "words_b": ["dog", "ran", "the"]}
    exec(compile(rows, "merging", "exec"), scope)
    assert scope["words"] == ["the", "cat", "dog", "ran"]
    assert scope["merged"].embed.num_embeddings == 4


def test_the_settings_and_functions_of_the_page_of_local_training_are_understood(tmp_path, monkeypatch):
    page = (ROOT / "docs/training.md").read_text()
    (config,) = re.findall(r"```toml\n(.*?)```", page, flags=re.DOTALL)
    assert make_config(tomllib.loads(config)).training.examples_per_step == 32
    keys = set(re.findall(r"`(\w+)`", " ".join(line.split(" | ")[0] for line in page.splitlines() if "| `" in line)))
    assert {field.name for field in dataclasses.fields(LocalTraining)} <= keys
    (source,) = blocks("docs/training.md")
    scope = {}
    exec(compile(source, "training", "exec"), scope)
    training = LocalTraining(train_fn=scope["train"], proximal_mu=0.1, epochs=1, batch_size=8)
    model = nn.Linear(2, 2)
    report = train(model, torch.randn(16, 2), torch.arange(16) % 2, training, seed=0, client=0, round=1)
    assert report.steps == 2
    (tmp_path / "my_schedules.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    assert factor_at("my_schedules:slower(by=0.5)", 2, None) == 0.25


def test_the_tables_of_the_page_of_tasks_are_what_is_registered():
    page = (ROOT / "docs/tasks.md").read_text()
    for name, one in registry.entries("task").items():
        (row,) = (line for line in page.splitlines() if line.startswith(f"| `{name}` |"))
        assert set(one.cls.usual_metrics) <= set(re.findall(r"`(\w+)`", row.split(" | ")[-1]))
    for name in registry.entries("metric"):
        assert f"`{name}`" in page
    for config in re.findall(r"```toml\n(.*?)```", page, flags=re.DOTALL):
        make_config(tomllib.loads(config))


def test_the_examples_of_the_page_of_observers_run_as_they_stand(tmp_path, monkeypatch):
    from fedmerge.observers import Run, Watch

    own, deployed = blocks("docs/observers.md")
    (tmp_path / "my_observers.py").write_text(own)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    watch = Watch(make_observers(["my_observers:Alarm(below=0.4)"]))
    with watch.over(Run("fedavg", 0, 5)):
        for number, accuracy in enumerate((0.1, 0.5, 0.4, 0.3, 0.6)):
            watch.round_done({"round": number, "test_accuracy": accuracy}, {})
    assert watch.stopped == "the accuracy fell to 0.300"
    torch.manual_seed(0)
    scope = {}
    exec(compile(deployed, "observers", "exec"), scope)
    assert len(scope["result"].train_metrics_clientapp) < 100


def test_the_attack_of_the_page_of_extensions_works_as_it_stands(tmp_path, monkeypatch):
    (source,) = blocks("docs/extending.md")
    (tmp_path / "my_attacks.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    attack = registry.build("attack", "my_attacks:Lazy", {"share": "0.5"})
    sent = attack.sent({"w": torch.tensor([3.0])}, {"w": torch.tensor([1.0])}, torch.Generator())
    assert sent["w"].tolist() == [2.0]


def test_the_page_of_extensions_names_every_kind_and_group():
    text = (ROOT / "docs" / "extending.md").read_text()
    for kind in KINDS.values():
        assert f"`{kind.group}`" in text


def test_the_readmes_own_model_is_compared_from_the_current_directory(tmp_path, monkeypatch, capsys):
    source = next(source for source in blocks("README.md") if "# my_models.py" in source)
    (tmp_path / "my_models.py").write_text(source)
    (line,) = re.findall(r"^fedmerge (compare .*my_models:small.*)$", (ROOT / "README.md").read_text(), re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["fedmerge", *line.split()])
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])  # as for an installed command
    with pytest.raises(SystemExit) as done:
        cli.main()
    sys.modules.pop("my_models")
    assert not done.value.code
    assert "pfnm" in capsys.readouterr().out


COMMANDS = {
    line
    for page in ("README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))))
    for block in re.findall(r"```\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)
    for line in block.splitlines()
    if line.startswith("fedmerge ")
}


@pytest.mark.parametrize("line", sorted(COMMANDS))
def test_commands_of_the_documents_are_understood(line):
    """Flags exist, methods exist, configurations exist: everything but the run itself."""
    command = typer.main.get_command(cli.app)
    words = shlex.split(line.partition("  #")[0])[1:]
    values = command.commands[words[0]].make_context(words[0], words[1:]).params
    for method in split_methods(values.get("methods") or ""):
        if ":" not in method:
            build_pipeline(method)
    make_observers(name for name in split_methods(values.get("observers") or "") if "early" in name)
    config = values.get("config")
    if config is not None and str(config).startswith("simulations/"):
        assert (ROOT / config).exists()


def test_links_between_documents_lead_somewhere():
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
            if not target.startswith(("http:", "https:")):
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def promises() -> list[str]:
    """The list under "Promises" of SECURITY.md."""
    section = (ROOT / "SECURITY.md").read_text().split("\n## Promises\n")[1].split("\n## ")[0]
    return [item.replace("\n", " ") for item in re.split(r"\n(?=- )", section) if item.lstrip().startswith("- ")]


@pytest.mark.parametrize("number", range(len(promises())))
def test_a_promise_of_the_security_page_names_a_test_that_exists(number):
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", promises()[number])
    assert named, promises()[number]
    for file, function in named:
        source = (ROOT / file).read_text()
        assert f"def {function or 'test_'}" in source, (file, function)


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().split()) <= 1300


@pytest.mark.parametrize("name", ["demo.toml", "mnist-lenet.toml"])
def test_shipped_configurations_are_valid(name):
    from fedmerge.simulation import load_config, make_config

    assert make_config(load_config(ROOT / "simulations" / name)).methods


def test_importing_fedmerge_pulls_in_neither_flower_nor_ray_nor_matplotlib():
    code = (
        "import sys, fedmerge; fedmerge.methods(); print([m for m in sys.modules if m.split('.')[0] in sys.argv[1:]])"
    )
    heavy = ["flwr", "ray", "matplotlib", "torchvision", "sklearn", "flwr_datasets"]
    done = subprocess.run([sys.executable, "-c", code, *heavy], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_nothing_else(tmp_path):
    import zipfile

    command = [sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(command, capture_output=True, text=True, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"fedmerge", "fedmerge-0.1.0.dist-info"}
    assert "fedmerge/py.typed" in names
    assert "fedmerge/aggregators/fednova.py" in names
