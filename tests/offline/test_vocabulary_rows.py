"""Models of unequal vocabularies: rows that several have are merged, and others kept."""

import pytest
import torch
from torch import nn

import fedmerge
from fedmerge.errors import BadUpdate, InvalidOption, UnknownName

A, B, C = ["the", "cat", "sat"], ["cat", "dog", "the", "ran"], ["sun", "the"]


class Words(nn.Module):
    def __init__(self, words, seed, *, tied=False):
        super().__init__()
        torch.manual_seed(seed)
        self.words = list(words)
        self.embed = nn.Embedding(len(words), 5)
        self.body = nn.Linear(5, 5)
        self.lm_head = nn.Linear(5, len(words))
        if tied:
            self.lm_head.weight = self.embed.weight

    def forward(self, ids):
        return self.lm_head(self.body(self.embed(ids)).tanh())


def rows_of(models, *names):
    return {name: [model.words for model in models] for name in names}


ALL = ("embed.weight", "lm_head.weight", "lm_head.bias")


def row(model, name, word):
    return model.state_dict()[name][model.words.index(word)]


def test_common_rows_are_merged_and_the_others_kept():
    models = [Words(A, 1), Words(B, 2), Words(C, 3)]
    weights = [1, 2, 5]
    merged = fedmerge.merge(models, weights=weights, rows=rows_of(models, *ALL))
    merged.words = fedmerge.joined_labels(model.words for model in models)
    assert merged.words == ["the", "cat", "sat", "dog", "ran", "sun"]
    assert (merged.embed.num_embeddings, merged.lm_head.out_features) == (6, 6)
    for name in ALL:
        for word in merged.words:
            own = [(w, row(m, name, word)) for w, m in zip(weights, models, strict=True) if word in m.words]
            wanted = sum(w * r for w, r in own) / sum(w for w, _ in own)
            torch.testing.assert_close(row(merged, name, word), wanted)
    assert torch.equal(row(merged, "embed.weight", "dog"), row(models[1], "embed.weight", "dog"))
    torch.testing.assert_close(
        merged.body.weight, sum(w * m.body.weight for w, m in zip(weights, models, strict=True)) / 8
    )
    assert merged(torch.arange(6)).shape == (6, 6)
    assert models[0].embed.weight.shape == (3, 5)


def test_equal_vocabularies_in_another_order_give_the_plain_merge():
    models = [Words(A, 1), Words(A, 2)]
    other = Words(A[::-1], 0)
    order = [A.index(word) for word in other.words]
    other.load_state_dict({n: t[order] if n in ALL else t for n, t in models[1].state_dict().items()})
    for method in ("fedavg", "slerp", "median"):
        plain = fedmerge.merge(models, method)
        merged = fedmerge.merge([models[0], other], method, rows=rows_of([models[0], other], *ALL))
        for name, tensor in plain.state_dict().items():
            torch.testing.assert_close(merged.state_dict()[name], tensor)


def test_shared_tensors_are_named_once():
    models = [Words(A, 1, tied=True), Words(B, 2, tied=True)]
    for names in (("embed.weight", "lm_head.bias"), ("lm_head.weight", "lm_head.bias"), ALL):
        merged = fedmerge.merge(models, rows=rows_of(models, *names))
        assert merged.lm_head.weight is merged.embed.weight
        assert merged.embed.weight.shape == (5, 5)
        assert merged(torch.arange(5)).shape == (5, 5)
    with pytest.raises(InvalidOption, match="are one tensor"):
        fedmerge.merge(models, rows={"embed.weight": [A, B], "lm_head.weight": [A[::-1], B], "lm_head.bias": [A, B]})


def test_classes_may_be_numbers_and_have_weights_of_their_own():
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(3, 4), nn.Linear(4, n)) for n in (3, 2)]
    classes = [[0, 1, 2], [2, 7]]
    rows = {"1.weight": classes, "1.bias": classes}
    merged = fedmerge.merge(models, rows=rows, pattern_weights={"1": [0, 1]})
    assert merged[1].out_features == 4
    assert torch.equal(merged[1].bias, torch.stack([*models[0][1].bias[:2], *models[1][1].bias]))
    left = fedmerge.merge(models, rows=rows, leave_out=["0"])
    assert torch.equal(left[0].weight, models[0][0].weight)


@pytest.mark.parametrize(
    "method", ["fisher", "regmean", "task_arithmetic", "rebasin", "krum", "fedavg+ridge_head", "breadcrumbs+fedavg"]
)
def test_methods_that_need_more_than_tensors_are_refused_by_name(method):
    models = [Words(A, 1), Words(B, 2), Words(C, 3)]
    with pytest.raises(InvalidOption) as caught:
        fedmerge.merge(models, method, rows=rows_of(models, *ALL), base=Words(A, 0))
    assert method in str(caught.value)
    assert "take" in str(caught.value)


def test_labels_that_do_not_fit_are_told():
    models = [Words(A, 1), Words(B, 2)]
    with pytest.raises(UnknownName, match=r"'embd.weight'. Did you mean 'embed.weight'"):
        fedmerge.merge(models, rows={"embd.weight": [A, B]})
    for labels, words in (
        ([A, B[:2]], "2 labels for 4 rows"),
        ([A], "1 entries for 2 models"),
        ([["the", "the", "cat"], B], "two rows are labelled 'the'"),
        ([[1.5, 2, 3], B], "texts or whole numbers"),
        (["abc", B], "must be a list of labels"),
    ):
        with pytest.raises(InvalidOption, match=words):
            fedmerge.merge(models, rows={"embed.weight": labels, "lm_head.weight": [A, B], "lm_head.bias": [A, B]})
    with pytest.raises(InvalidOption, match="labels by tensor"):
        fedmerge.merge(models, rows=[A, B])
    with pytest.raises(InvalidOption, match="left out: name it in one"):
        fedmerge.merge(models, rows=rows_of(models, *ALL), leave_out=["lm_head"])
    with pytest.raises(BadUpdate, match="lm_head"):  # one tensor of the vocabulary was forgotten
        fedmerge.merge(models, rows=rows_of(models, "embed.weight", "lm_head.weight"))
    wide = Words(B, 2)
    wide.embed = nn.Embedding(4, 7)
    with pytest.raises(InvalidOption, match=r"rows of shape \[7\] in models\[1\]"):
        fedmerge.merge([models[0], wide], rows=rows_of([models[0], wide], *ALL))
