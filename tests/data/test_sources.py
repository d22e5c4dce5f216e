from __future__ import annotations

import sys
from pathlib import Path

import pytest

from fedmerge.data import dataset_names, load_dataset
from fedmerge.data.sources import WITH_NATURAL_CLIENTS
from fedmerge.errors import DataError, UnknownName


def test_names():
    assert dataset_names() == ["digits", "mnist", "fashion_mnist", "cifar10", "shakespeare", "heart_disease", "table"]


def test_unknown_data_set_names_the_nearest():
    with pytest.raises(UnknownName, match="Did you mean 'fashion_mnist'"):
        load_dataset("fashion_mnst")


def test_unknown_option_names_the_nearest(tmp_path):
    with pytest.raises(UnknownName, match=r"option of data set 'shakespeare'.*Did you mean 'max_clients'"):
        load_dataset("shakespeare", tmp_path, max_client=3)


def test_option_of_a_data_set_that_takes_none():
    with pytest.raises(UnknownName, match=r"option of data set 'digits': 'sequence_length'\. It takes none"):
        load_dataset("digits", sequence_length=3)


def test_data_dir_is_no_option():
    with pytest.raises(TypeError):
        load_dataset("digits", None, data_dir=Path())


def test_given_folder_must_exist(tmp_path):
    with pytest.raises(DataError, match=r"nowhere.*data_dir.*--data-dir or FEDMERGE_DATA"):
        load_dataset("digits", tmp_path / "nowhere")


def test_folder_of_the_environment_must_exist(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDMERGE_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match=r"nowhere.*from FEDMERGE_DATA"):
        load_dataset("digits")


def test_file_is_no_data_folder(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="not a folder"):
        load_dataset("digits", tmp_path / "file")


def test_environment_names_the_folder_and_an_argument_overrides_it(tmp_path, monkeypatch):
    (tmp_path / "environment").mkdir()
    (tmp_path / "argument").mkdir()
    monkeypatch.setenv("FEDMERGE_DATA", str(tmp_path / "environment"))
    with pytest.raises(DataError, match="environment"):
        load_dataset("heart_disease")
    with pytest.raises(DataError, match="argument"):
        load_dataset("heart_disease", tmp_path / "argument")


def test_default_folder_is_in_the_cache_and_may_be_absent(tmp_path, monkeypatch):
    monkeypatch.delenv("FEDMERGE_DATA", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(load_dataset("digits").train_x) == 1437
    with pytest.raises(DataError, match=str(tmp_path / ".cache" / "fedmerge")):
        load_dataset("heart_disease")


@pytest.mark.parametrize(("name", "library"), [("digits", "sklearn.datasets"), ("mnist", "torchvision.datasets")])
def test_missing_library_says_what_to_install(name, library, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(DataError, match=r'pip install "fedmerge\[sim\]"'):
        load_dataset(name, tmp_path)


@pytest.mark.parametrize("name", ["digits", "heart_disease", "shakespeare"])
def test_natural_clients_are_where_we_say(name, real_data):
    has_clients = load_dataset(name, real_data).train_client is not None
    assert has_clients == (name in WITH_NATURAL_CLIENTS)
