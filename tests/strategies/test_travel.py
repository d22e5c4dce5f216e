"""Only what clients train travels, down and up; personal parts stay with them, and each is judged with its own."""

import copy
import logging
from functools import partial

import pytest
import torch
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import LocalDpMod
from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping
from flwr.serverapp.strategy import FedAvg as FlowerFedAvg
from torch import nn

from fedmerge.data import ClientData
from fedmerge.errors import InvalidOption, ModelError, NoUsableUpdates, UnknownName
from fedmerge.layout import freeze
from fedmerge.simulation import SimulationGrid
from fedmerge.simulation.grids.exchanges import MeasuredGrid
from fedmerge.strategies import MergeStrategy, add_statistics, client_app, from_arrays, to_arrays
from fedmerge.training import LocalTraining, train

CLIENTS = 3
TRAINING = LocalTraining(epochs=1, batch_size=6, learning_rate=0.05)
METHODS = ["fedavg", "fednova", "fedfisher(variant=diag)", "regmean", "rebasin", "pfnm", "fedavg+natural_gradient"]


class Net(nn.Module):
    """A body with batch norm and dropout, a middle with batch norm, and a head."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.2), nn.Flatten())
        self.mid = nn.Sequential(nn.Linear(54, 8), nn.BatchNorm1d(8), nn.ReLU())
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.mid(self.body(x)))


def model_fn(frozen=("body",), seed=0):
    torch.manual_seed(seed)
    return freeze(Net(), frozen)


def data_fn(partition, _total):
    generator = torch.Generator().manual_seed(partition)
    x = torch.randn(20 + partition, 1, 5, 5, generator=generator)
    y = (x.mean((1, 2, 3)) * 8).long().clamp(-1, 1) + 1
    return ClientData(x[:14], y[:14], x[14:], y[14:])


class Watched(SimulationGrid):
    """Keeps all messages, in both directions."""

    def __init__(self, *arguments, **keywords):
        super().__init__(*arguments, **keywords)
        self.sent, self.heard = [], []

    def send_and_receive(self, messages, *, timeout=None):
        messages = list(messages)
        self.sent += messages
        replies = list(super().send_and_receive(messages, timeout=timeout))
        self.heard += replies
        return replies


class ByMessage(MergeStrategy):
    """Makes its messages itself, so that each client is reached by one."""

    def configure_train(self, *arguments):
        return super().configure_train(*arguments)


def app(**keywords):
    return client_app(keywords.pop("model_fn", model_fn), data_fn, training=TRAINING, **keywords)


def run(method="fedavg", kind=MergeStrategy, *, clients=None, engine="serial", rounds=2, initial=None, **keywords):
    """The final model, the grid, and the result."""
    made = keywords.pop("model_fn", model_fn)
    strategy = kind(method, model_fn=made, example=torch.zeros(2, 1, 5, 5), **keywords)
    with Watched(clients or app(), CLIENTS, engine=engine) as grid:
        result = strategy.start(
            grid=grid, initial_arrays=to_arrays((initial or made()).state_dict()), num_rounds=rounds
        )
    return from_arrays(result.arrays), grid, result


def names(message, key="arrays"):
    return set(message.content.array_records[key])


@pytest.mark.parametrize("personal", [(), ("head.*",)])
@pytest.mark.parametrize("method", METHODS)
def test_by_message_serial_and_stacked_it_is_one_model(method, personal):
    serial, _, judged = run(method, personal=personal)
    message, grid, again = run(method, ByMessage, personal=personal)
    stacked = run(method, engine="stacked", personal=personal)[0]
    still = ("body", "head") if personal else ("body",)
    for name, tensor in model_fn().state_dict().items():
        if method != "regmean":  # what solves gives bits by where its numbers lie in memory
            assert torch.equal(serial[name], message[name]), name
        torch.testing.assert_close(message[name], serial[name], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(stacked[name], serial[name], rtol=1e-4, atol=1e-5, check_dtype=True)
        assert serial[name].shape != tensor.shape or torch.equal(serial[name], tensor) == name.startswith(still), name
    for number, metrics in judged.evaluate_metrics_clientapp.items():
        assert again.evaluate_metrics_clientapp[number]["eval_loss"] == pytest.approx(metrics["eval_loss"], rel=1e-6)
    assert all(not any(n.startswith(still) for n in names(one)) for one in grid.heard if "arrays" in one.content)
    later = [one for one in grid.sent if one.content["config"]["server-round"] == 2 and "arrays" in one.content]
    assert later
    assert all(not any(n.startswith(still) for n in names(one)) for one in later)


@pytest.mark.parametrize("frozen", [(), ("body",)])
def test_a_cohort_counts_the_bytes_that_messages_have(frozen):
    def bytes_up(kind):
        made = partial(model_fn, frozen)
        strategy = kind("fedavg", model_fn=made, fraction_evaluate=0.0)
        with SimulationGrid(app(model_fn=made), CLIENTS, engine="serial") as grid:
            measured = MeasuredGrid(grid)
            strategy.start(grid=measured, initial_arrays=to_arrays(made().state_dict()), num_rounds=2)
        return [exchange.bytes_up for exchange in measured.exchanges if exchange.kind == "train"]

    assert bytes_up(MergeStrategy) == bytes_up(ByMessage)


def test_statistics_of_what_does_not_travel_stay_as_well():
    _, grid, _ = run("fedfisher(variant=diag)", ByMessage, personal=["head"])
    (fisher,) = {key for key in grid.heard[0].content.array_records if key != "arrays"}
    assert all(name.startswith("mid") for name in names(grid.heard[0], fisher))


def test_a_client_that_trains_a_tenth_sends_a_tenth():
    """Counted in the bytes of all messages; a node gets the rest once, until it is known to make it itself."""

    def wide():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(25, 400), nn.ReLU(), nn.Linear(400, 3)).requires_grad_(True)

    def part():
        return freeze(wide(), ["1"])

    def bytes_of(messages):
        arrays = [one.content["arrays"] for one in messages if "arrays" in one.content]
        return [sum(len(array.data) for array in record.values()) for record in arrays]

    parameters = {name: p.numel() for name, p in part().named_parameters()}
    share = (parameters["3.weight"] + parameters["3.bias"]) / sum(parameters.values())
    assert 0.10 < share < 0.14
    whole, brief = (run(kind=ByMessage, model_fn=f, clients=app(model_fn=f))[1] for f in (wide, part))
    up, down = bytes_of(brief.heard), bytes_of(brief.sent)
    assert max(up) / max(bytes_of(whole.heard)) == pytest.approx(share, abs=0.02)
    assert down[CLIENTS:] == [max(up)] * (len(down) - CLIENTS)
    assert down[:CLIENTS] == [max(bytes_of(whole.sent))] * CLIENTS
    never = run(kind=ByMessage, model_fn=part, clients=app(model_fn=part), send_frozen="never")[1]
    assert set(bytes_of(never.sent)) == {max(up)}


def stock(made=model_fn, *, strict=True, statistics=False, mode="eval"):
    """A ClientApp as Flower's templates have it: it loads all, trains, and sends all."""
    flower = ClientApp()

    @flower.train()
    def train(message, context):
        model, partition = made(), context.node_config["partition-id"]
        model.load_state_dict(message.content["arrays"].to_torch_state_dict(), strict=strict)
        data = data_fn(partition, CLIENTS)
        model.train()
        if mode == "eval":
            model.body.eval()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
        nn.functional.cross_entropy(model(data.train_x), data.train_y).backward()
        optimizer.step()
        reply = RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": MetricRecord({"num-examples": 14})})
        if statistics:
            add_statistics(reply, message, model, [(data.train_x, data.train_y)])
        return Message(reply, reply_to=message)

    return flower


@pytest.mark.parametrize("method", ["fedavg", "fedfisher(variant=diag)", "regmean", "rebasin"])
def test_a_stock_client_app_that_loads_and_sends_everything_works(method):
    """Also one whose frozen norms run in training mode: their statistics are nobody's to change."""
    asked = "fisher" in method or method == "regmean"
    merged, grid, _ = run(method, clients=stock(statistics=asked, mode="train"), fraction_evaluate=0.0)
    assert all(one.has_content() for one in grid.heard)
    start = model_fn().state_dict()
    assert all(torch.equal(merged[name], start[name]) for name in start if name.startswith("body"))
    assert not torch.equal(merged["mid.0.weight"], start["mid.0.weight"])
    assert not torch.equal(merged["head.bias"], start["head.bias"])


def test_a_stock_client_app_that_trains_what_is_frozen_is_told():
    with pytest.raises(NoUsableUpdates, match=r"frozen parameter 'body.0.weight' is not as it was sent.*requires_grad"):
        run(clients=stock(lambda: model_fn(())), fraction_evaluate=0.0)
    merged, *_ = run(clients=stock(lambda: model_fn(())), fraction_evaluate=0.0, send_frozen="always")
    assert not torch.equal(merged["body.0.weight"], model_fn().body[0].weight)


@pytest.mark.parametrize("personal", [(), ("head",)])
def test_a_stock_strategy_works_with_our_client_app(personal):
    """It gets all tensors but those that the client keeps to itself."""
    with Watched(app(personal=personal), CLIENTS) as grid:
        result = FlowerFedAvg().start(grid=grid, initial_arrays=to_arrays(model_fn().state_dict()), num_rounds=2)
    assert not any(one.has_error() for one in grid.heard)
    found, start = from_arrays(result.arrays), model_fn().state_dict()
    assert set(found) == {name for name in start if not (personal and name.startswith("head"))}
    torch.testing.assert_close(found["body.0.weight"], start["body.0.weight"])
    assert not torch.equal(found["mid.0.weight"], start["mid.0.weight"])
    ours = run(personal=personal)[2].evaluate_metrics_clientapp
    for number, metrics in result.evaluate_metrics_clientapp.items():
        assert metrics["eval_loss"] == pytest.approx(ours[number]["eval_loss"], rel=1e-4)


def test_other_frozen_tensors_on_a_client_are_refused_with_the_remedy():
    with pytest.raises(
        NoUsableUpdates, match=r"frozen tensor 'body.0.bias' of this client's model_fn is not.*same file"
    ):
        run(kind=ByMessage, clients=app(model_fn=lambda: model_fn(seed=1)))
    with pytest.raises(ModelError, match=r"same seed.*send_frozen"):
        run(clients=app(model_fn=lambda: model_fn(seed=1)))
    with pytest.raises(NoUsableUpdates, match="7 tensors of the server's model are frozen, and 0 of this client's"):
        run(kind=ByMessage, clients=app(model_fn=lambda: model_fn(())), frozen_mode="eval")
    sent, *_ = run(clients=app(model_fn=lambda: model_fn(seed=1)), send_frozen="always")
    assert torch.equal(sent["body.0.weight"], model_fn().body[0].weight)


def test_a_client_keeps_what_is_personal_whatever_the_server_says():
    with pytest.raises(NoUsableUpdates, match=r"the server takes \['mid.\*'\] for personal, this client \['head.\*'\]"):
        run(kind=ByMessage, clients=app(personal=["head.*"]), personal=["mid.*"])
    both, *_ = run(clients=app(personal=["head.*"]), personal=["head.*"])
    told, *_ = run(personal=["head.*"])
    assert all(torch.equal(both[name], told[name]) for name in told)
    with pytest.raises(NoUsableUpdates, match=r"'head\.weight' is missing"):
        run(clients=app(personal=["head.*"]))


def test_settings_that_make_no_sense_are_refused():
    with pytest.raises(UnknownName, match=r"tensor in personal 'haed'.*head\.weight"):
        MergeStrategy(model_fn=model_fn, personal=["haed"])
    with pytest.raises(InvalidOption, match="pass model_fn="):
        run(model_fn=None, initial=model_fn(), personal=["head"])
    with pytest.raises(InvalidOption, match="send_frozen must be one of"):
        MergeStrategy(send_frozen="sometimes")
    with pytest.raises(InvalidOption, match="frozen_mode must be one of"):
        MergeStrategy(frozen_mode="off")
    with pytest.raises(ModelError, match=r"starts with lacks \['body"):
        run(initial=model_fn().head)


def test_each_client_trains_its_own_head_on_and_is_judged_with_it():
    """With the shared part frozen from the outside, a head is what plain local training makes of it."""
    rounds = 3
    _, grid, result = run(personal=["head", "mid.1"], rounds=rounds)
    kept = grid.client_states()
    heads = [from_arrays(kept[node]["fedmerge.personal"]) for node in sorted(kept)]
    assert len(heads) == CLIENTS
    assert set(heads[0]) == {name for name in model_fn().state_dict() if name.startswith(("head", "mid.1"))}
    assert not torch.equal(heads[0]["head.weight"], heads[1]["head.weight"])
    assert int(heads[0]["mid.1.num_batches_tracked"]) == 3 * rounds
    shared, losses, examples = from_arrays(result.arrays), [], []
    for client, own in enumerate(heads):
        model, data = model_fn().eval(), data_fn(client, CLIENTS)
        model.load_state_dict({**shared, **own})
        losses.append(nn.functional.cross_entropy(model(data.held_out_x), data.held_out_y).item())
        examples.append(len(data.held_out_x))
    mean = sum(loss * n for loss, n in zip(losses, examples, strict=True)) / sum(examples)
    assert result.evaluate_metrics_clientapp[rounds]["eval_loss"] == pytest.approx(mean, rel=1e-5)


def test_frozen_parts_in_training_mode_move_their_statistics_and_send_them():
    merged, grid, _ = run(kind=ByMessage, frozen_mode="train")
    start = model_fn().state_dict()
    assert torch.equal(merged["body.0.weight"], start["body.0.weight"])
    assert torch.equal(merged["body.1.weight"], start["body.1.weight"])
    assert not torch.equal(merged["body.1.running_mean"], start["body.1.running_mean"])
    assert "body.1.running_mean" in names(grid.heard[0])
    assert "body.1.weight" not in names(grid.heard[0])


def test_models_of_ones_own_share_the_frozen_part():
    """Clients that start apart start with other trained tensors, and the same frozen ones."""
    own = app(own_model_fn=lambda partition: model_fn(seed=10 + partition))
    merged, *_ = run(kind=ByMessage, clients=own, rounds=1)
    start = model_fn().state_dict()
    assert all(torch.equal(merged[name], start[name]) for name in start if name.startswith("body"))
    assert not torch.allclose(merged["mid.0.weight"], run(rounds=1)[0]["mid.0.weight"])


def test_inside_a_wrapper_of_flowers_all_of_the_model_travels():
    """It clips what replies bring against the model sent, tensor by tensor."""
    made = lambda: freeze(nn.Sequential(nn.Flatten(), nn.Linear(25, 6), nn.ReLU(), nn.Linear(6, 3)), ["1"])  # noqa: E731
    first = made()
    inner = MergeStrategy(model_fn=lambda: copy.deepcopy(first))
    wrapper = DifferentialPrivacyServerSideFixedClipping(inner, 0.0, 10.0, CLIENTS)
    with Watched(app(model_fn=made), CLIENTS) as grid:
        wrapper.start(grid=grid, initial_arrays=to_arrays(first.state_dict()), num_rounds=1)
    assert names(grid.heard[0]) == set(first.state_dict())
    personal = MergeStrategy(model_fn=model_fn, personal=["head"])
    wrapper = DifferentialPrivacyServerSideFixedClipping(personal, 0.0, 10.0, CLIENTS)
    with Watched(app(model_fn=made), CLIENTS) as grid, pytest.raises(InvalidOption, match="none can be personal"):
        wrapper.start(grid=grid, initial_arrays=to_arrays(first.state_dict()), num_rounds=1)


def test_a_strategy_goes_on_from_its_checkpoint_with_the_same_parts_alone(tmp_path, caplog):
    settings = {"checkpoint_dir": tmp_path, "personal": ["head"]}
    run(rounds=1, **settings)
    with caplog.at_level(logging.WARNING, "fedmerge"):
        run(rounds=2, **settings)
    assert "personal parts as model_fn makes them" in caplog.text
    with pytest.raises(Exception, match=r"personal was \['head'\], is None"):
        run(rounds=3, checkpoint_dir=tmp_path)


def test_the_personal_part_can_be_trained_first_and_then_the_shared_part_alone():
    """FedRep: two phases, of which each leaves the other's tensors as they are."""
    settings = LocalTraining(epochs=1, batch_size=6, learning_rate=0.05, personal_epochs=2)
    made = client_app(model_fn, data_fn, training=settings)
    serial, grid, _ = run(clients=made, personal=["head"], rounds=1)
    message, *_ = run(kind=ByMessage, clients=made, personal=["head"], rounds=1)
    assert all(torch.equal(serial[name], message[name]) for name in serial)
    data, head = data_fn(0, CLIENTS), model_fn()
    for name, parameter in head.named_parameters():
        parameter.requires_grad_(name.startswith("head"))
    first = LocalTraining(epochs=2, batch_size=6, learning_rate=0.05)
    train(head, data.train_x, data.train_y, first, seed=0, client=0, round=1 + (1 << 40))
    kept = from_arrays(grid.client_states()[2]["fedmerge.personal"])
    assert torch.equal(kept["head.weight"], head.head.weight)
    with pytest.raises(InvalidOption, match="nothing is personal"):
        run(clients=made)


def test_a_client_app_of_ones_own_measures_nothing_of_what_it_keeps():
    """It sends all of its tensors, as it knows nothing of personal ones; they are not merged."""
    merged, grid, _ = run(
        "fedfisher(variant=diag)", clients=stock(statistics=True), personal=["head"], fraction_evaluate=0.0
    )
    start = model_fn().state_dict()
    assert all(torch.equal(merged[name], start[name]) for name in start if name.startswith(("body", "head")))
    assert not torch.equal(merged["mid.0.weight"], start["mid.0.weight"])
    assert all(name.startswith("mid") for name in names(grid.heard[0], "statistics.fisher_diag"))


@pytest.mark.parametrize("personal", [(), ("2",)])
def test_flowers_mods_see_the_names_that_the_message_brought(personal):
    """Local differential privacy compares the two, and adds noise to all that comes back."""

    def made():
        torch.manual_seed(0)
        return freeze(nn.Sequential(nn.Flatten(), nn.Linear(25, 6), nn.Linear(6, 3)), () if personal else ("1",))

    private = LocalDpMod(clipping_norm=1.0, sensitivity=1.0, epsilon=50.0, delta=1e-5)
    clients = client_app(made, data_fn, training=TRAINING, mods=[private])
    merged, grid, _ = run(model_fn=made, clients=clients, personal=personal, rounds=2)
    assert not any(one.has_error() for one in grid.heard)
    start, still = made().state_dict(), "2" if personal else "1"
    for name, tensor in start.items():
        assert torch.equal(merged[name], tensor) == name.startswith(still), name
    trained = [one for one in grid.sent if one.metadata.message_type == "train"]
    assert names(trained[0]) == set(start)
    assert names(trained[-1]) == {name for name in start if not name.startswith(still)}
