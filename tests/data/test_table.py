"""Tables: files with a column to predict, turned into inputs by what their training rows say."""

from __future__ import annotations

import gzip

import numpy as np
import pytest
import torch

from fedmerge.data import load_dataset
from fedmerge.errors import DataError, InvalidOption, UnknownName

pandas = pytest.importorskip("pandas")

ROWS = 40
RNG = np.random.default_rng(5)
FRAME = pandas.DataFrame(
    {
        "age": RNG.normal(50, 10, ROWS).round(1),
        "smokes": RNG.random(ROWS) < 0.4,
        "ward": RNG.choice(["a", "b", "c"], ROWS),
        "grade": RNG.integers(1, 4, ROWS),
        "site": np.repeat(["north", "south"], ROWS // 2),
        "fold": ["test" if i % 5 == 0 else "train" for i in range(ROWS)],
        "cost": RNG.normal(0, 1, ROWS),
        "ill": RNG.integers(0, 2, ROWS),
    }
)


@pytest.fixture
def table(tmp_path):
    def write(frame=FRAME, name="wards.csv"):
        path = tmp_path / name
        if name.endswith(".parquet"):
            frame.to_parquet(path)
        else:
            frame.to_csv(path, index=False, sep="\t" if name.endswith(".tsv") else ",")
        return str(path)

    return write


@pytest.mark.parametrize("name", ["wards.csv", "wards.tsv", "wards.csv.gz", "wards.parquet"])
def test_every_kind_of_file_gives_the_same_data(table, name):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    options = {"label": "ill", "client": "site", "drop": ["cost", "fold"]}
    found, want = load_dataset(table(name=name), **options), load_dataset(table(), **options)
    assert torch.equal(found.train_x, want.train_x)
    assert torch.equal(found.test_y, want.test_y)
    assert found.client_names == ("north", "south")
    assert found.input_shape == (1 + 2 + 3 + 1,)  # age, smokes, ward, grade


def test_numbers_are_standardised_by_the_training_rows_and_categories_become_columns(table):
    found = load_dataset(table(), label="ill", test="fold", drop=["cost", "site"], categorical=["grade"])
    train = FRAME[FRAME.fold == "train"]
    assert (len(found.train), len(found.test)) == (32, 8)
    age = (FRAME.age - train.age.mean()) / train.age.std(ddof=0)
    np.testing.assert_allclose(found.train_x[:, 0], age[FRAME.fold == "train"], atol=1e-5)
    np.testing.assert_allclose(found.test_x[:, 0], age[FRAME.fold == "test"], atol=1e-5)
    ones = found.train_x[:, 1:]
    assert ones.shape[1] == 2 + 3 + 3
    assert set(ones.flatten().tolist()) == {0.0, 1.0}
    assert ones.sum(1).tolist() == [3.0] * 32
    raw = load_dataset(table(), label="ill", test="fold", drop=["cost", "site"], standardise=False)
    np.testing.assert_allclose(raw.train_x[:, 0], train.age, atol=1e-4)


def test_a_value_that_only_test_rows_have_is_no_category(table):
    frame = FRAME.copy()
    frame.loc[0, "ward"] = "z"
    found = load_dataset(table(frame), label="ill", test="fold", drop=["cost", "site", "age", "smokes", "grade"])
    assert found.test_x[0].tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("label", "task", "classes"),
    [
        ("ill", "", ("0", "1")),
        ("grade", "", ("1", "2", "3")),
        ("ward", "", ("a", "b", "c")),
        ("smokes", "", ("0", "1")),
        ("cost", "", ()),
        ("grade", "regression", ()),
    ],
)
def test_what_is_predicted_decides_between_classes_and_numbers(table, label, task, classes):
    found = load_dataset(table(), label=label, task=task)
    assert found.class_names == classes
    assert found.num_classes == len(classes)
    assert found.task == ("" if classes else "regression")
    assert found.outputs == (len(classes) or 1)
    assert found.train_y.dtype == (torch.int64 if classes else torch.float32)


def test_clients_and_classes_are_in_both_parts(table):
    frame = FRAME.assign(ill=[int(i % 10 == 0) for i in range(ROWS)])
    found = load_dataset(table(frame), label="ill", client="site", test_share=0.5)
    assert found.train_client.bincount().tolist() == [10, 10]
    assert found.train_y.bincount().tolist() == found.test_y.bincount().tolist() == [18, 2]
    again = load_dataset(table(frame), label="ill", client="site", test_share=0.5)
    assert torch.equal(found.test_x, again.test_x)


def with_holes():
    frame = FRAME.copy()
    frame.loc[[1, 2, 3], "age"] = np.nan
    frame.loc[7, "ward"] = None
    frame.loc[8, "cost"] = np.inf
    return frame


def test_missing_values_are_an_error_that_names_columns_and_rows(table):
    words = r"'age' in 3 of 40 rows, 'ward' in 1 of 40 rows, 'cost' in 1 of 40 rows.*missing=drop.*impute"
    with pytest.raises(DataError, match=words):
        load_dataset(table(with_holes()), label="ill")


def test_missing_values_are_dropped_or_filled_where_asked(table):
    assert len(load_dataset(table(with_holes()), label="ill", missing="drop").train) == 28  # 35 rows are left
    options = {"label": "ill", "missing": "impute", "standardise": False, "test": "fold"}
    found = load_dataset(table(with_holes()), **options)
    rows = with_holes()[FRAME.fold == "train"].reset_index(drop=True)
    median = rows.age.median()
    assert found.train_x[rows.index[rows.age.isna()], 0].tolist() == pytest.approx([median] * 3)
    assert found.input_shape == (1 + 2 + 4 + 1 + 2 + 1,)  # the missing ward is a category of its own


def test_missing_labels_and_clients_are_not_filled(table):
    for column in ("ill", "site"):
        frame = FRAME.astype({column: object})
        frame.loc[4, column] = None
        with pytest.raises(DataError, match=f"'{column}' in 1 of 40 rows"):
            load_dataset(table(frame), label="ill", client="site", missing="impute")


BAD = {
    "no label": ({}, InvalidOption, r"data.label=NAME: age, smokes, ward"),
    "unknown column": ({"label": "il"}, UnknownName, "'ill'"),
    "unknown client": ({"label": "ill", "client": "hospital"}, UnknownName, "hospital"),
    "twice": ({"label": "ill", "client": "ill"}, InvalidOption, "cannot have two meanings"),
    "share": ({"label": "ill", "test_share": 1.0}, InvalidOption, "test_share=1.0 must be"),
    "missing": ({"label": "ill", "missing": "mean"}, InvalidOption, '"impute"'),
    "option": ({"label": "ill", "lable": "x"}, UnknownName, "'label'"),
    "text as numbers": ({"label": "ward", "task": "regression"}, DataError, "a regression wants numbers"),
    "a text for a list": ({"label": "ill", "drop": "age"}, InvalidOption, r'drop = \["age"\]'),
    "no inputs": ({"label": "ill", "drop": [c for c in FRAME if c != "ill"]}, DataError, "no column is left"),
    "no test rows": ({"label": "ill", "test": "age"}, DataError, "0 of 40 rows are for testing"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_cannot_be_is_told_in_words(table, kind):
    options, error, words = BAD[kind]
    with pytest.raises(error, match=words):
        load_dataset(table(), **options)


def test_files_that_are_no_tables_are_told(table, tmp_path):
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "head.csv").write_text("a,b\n")
    (tmp_path / "broken.parquet").write_bytes(b"nothing")
    for name, words in (
        ("gone.csv", "there is no file"),
        ("empty.csv", "cannot be read: EmptyDataError"),
        ("head.csv", "has no rows"),
        ("broken.parquet", "cannot be read"),
    ):
        with pytest.raises(DataError, match=words):
            load_dataset(str(tmp_path / name), label="b")
    one = FRAME.assign(ill=1)
    with pytest.raises(DataError, match="all rows have the class 1"):
        load_dataset(table(one), label="ill")
    names = FRAME.assign(name=[f"p{i}" for i in range(ROWS)])
    assert load_dataset(table(names), label="ill").input_shape[0] > 30


@pytest.mark.parametrize("ending", [".csv", ".csv.gz"])
def test_a_table_in_another_encoding_is_told_with_its_line(tmp_path, ending):
    raw = "town,size,ill\nBern,3,0\nGenève,4,1\n".encode("latin-1")
    path = tmp_path / f"towns{ending}"
    path.write_bytes(gzip.compress(raw) if ending == ".csv.gz" else raw)
    with pytest.raises(DataError, match=rf"'towns{ending}' is not UTF-8: line 3, byte 4 is 0xe8\. Save it as UTF-8"):
        load_dataset(str(path), label="ill")


@pytest.mark.parametrize(
    ("each", "words"), [(1, "more than 1: tell by"), (2, r"more than 2: raise test_share to 0\.25")]
)
def test_clients_with_too_few_rows_to_test_on_are_told(table, each, words):
    frame = FRAME.assign(ward=[f"w{i // each}" for i in range(ROWS)])
    with pytest.raises(DataError, match=f"0 of 40 rows are for testing, .*'ward' has {words}"):
        load_dataset(table(frame), label="ill", client="ward")
    if each == 2:
        assert len(load_dataset(table(frame), label="ill", client="ward", test_share=0.25).test) == 20


def test_a_table_lies_in_the_folder_of_data_too(table, tmp_path):
    table()
    assert len(load_dataset("wards.csv", tmp_path, label="ill").train) == 32


def test_without_pyarrow_parquet_is_refused_with_the_remedy(table, monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    (tmp_path / "some.parquet").write_bytes(b"")
    with pytest.raises(DataError, match=r"Parquet file, needs pyarrow .*pip install"):
        load_dataset(str(tmp_path / "some.parquet"), label="ill")


def test_numbers_to_be_regressed_on_are_standardised_where_asked(table):
    raw = load_dataset(table(), label="cost", test="fold")
    found = load_dataset(table(), label="cost", test="fold", standardise_label=True)
    assert found.train_y.mean().item() == pytest.approx(0, abs=1e-5)
    assert found.train_y.std(correction=0).item() == pytest.approx(1, abs=1e-4)
    scale = raw.train_y.std(correction=0)
    assert torch.allclose(found.test_y, (raw.test_y - raw.train_y.mean()) / scale, atol=1e-5)


def test_a_column_with_numbers_too_large_to_standardise_is_named_and_not_flattened(tmp_path):
    rows = "".join(f"{1e308 if i < 5 else -1e308},{i},{i % 2}\n" for i in range(20))
    (tmp_path / "large.csv").write_text("dose,age,y\n" + rows)
    with pytest.raises(DataError, match=r"'dose'.*too large"):
        load_dataset("large.csv", data_dir=tmp_path, label="y")


def test_large_numbers_to_be_regressed_on_are_standardised_too(tmp_path):
    (tmp_path / "large.csv").write_text("age,y\n" + "".join(f"{i},{i}.5e25\n" for i in range(20)))
    found = load_dataset("large.csv", data_dir=tmp_path, label="y", standardise_label=True)
    assert float(found.train_y.std(correction=0)) == pytest.approx(1, rel=1e-4)


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
@pytest.mark.parametrize(
    ("cell", "words"),
    [
        (str(2**64), "18446744073709551616 is beyond 64 bits"),
        (str(-(2**63) - 1), "-9223372036854775809 is beyond 64 bits"),
        ("9" * 6000, "is beyond 64 bits"),
        ("4\0 7", r"has a byte of zero \(NUL\)"),
    ],
)
def test_cells_that_would_silently_become_categories_are_named(cell, words, suffix, tmp_path):
    separator = "\t" if suffix == ".tsv" else ","
    lines = [["dose", "ill"], *([str(i), str(i % 2)] for i in range(20))]
    lines[4][0] = cell
    path = tmp_path / f"doses{suffix}"
    path.write_bytes("\n".join(map(separator.join, lines)).encode())
    with pytest.raises(DataError, match=rf"table 'doses{suffix}', column 'dose', row 4: .*{words}"):
        load_dataset(str(path), label="ill")


def test_sixty_four_bits_are_numbers_and_names_of_digits_and_letters_are_names(tmp_path):
    path = tmp_path / "ids.csv"
    rows = [f"{2**64 - 1 - i},{-(2**63) + i},n{i % 3},{10**25 + i % 2},{10**25 + i % 2},{i % 2}" for i in range(20)]
    path.write_text("large,small,name,code,owner,ill\n" + "\n".join(rows))
    data = load_dataset(str(path), label="ill", client="owner", categorical=["code"])
    assert data.train_x.shape[1] == 2 + 3 + 2
    assert data.client_names == tuple(str(10**25 + i) for i in range(2))
