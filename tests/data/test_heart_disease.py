from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch

from fedmerge.data import load_dataset
from fedmerge.errors import DataError

HOSPITALS = ("cleveland", "hungarian", "switzerland", "va")


@pytest.fixture
def made_up(tmp_path):
    """Forty patients in each hospital, every fourth with a missing value."""
    generator = np.random.default_rng(0)
    folder = tmp_path / "heart-disease"
    folder.mkdir()
    for hospital in HOSPITALS:
        lines = []
        for patient in range(40):
            cp, ecg, age = 1 + patient % 4, patient % 3, generator.integers(30, 70)
            chol = "?" if patient % 4 == 3 and patient % 8 == 7 else generator.integers(150, 300)
            lines.append(f"{age},1,{cp},{100 + patient},{chol},0,{ecg},{90 + patient},0,1.5,?,?,?,{patient % 3}")
        (folder / f"processed.{hospital}.data").write_text("\n".join(lines) + "\n")
    return tmp_path


def test_rows_with_a_missing_value_go_and_missing_columns_do_not_matter(made_up):
    data = load_dataset("heart_disease", made_up)
    assert len(data.train_y) + len(data.test_y) == 4 * 35
    assert torch.bincount(data.train_client).tolist() == [23] * 4
    assert data.client_names == HOSPITALS


def test_columns_are_standardised_by_each_hospitals_training_patients(made_up):
    data = load_dataset("heart_disease", made_up)
    assert data.train_x.shape[1] == 13
    assert (data.train_x[:, 12] == 0).all()  # oldpeak is the same for everybody here
    assert (data.train_x[:, 1] == 0).all()  # and so is sex
    for hospital in range(4):
        own = data.train_x[data.train_client == hospital][:, [0, 2, 3, 4, 5, 6, 8, 9, 10]]
        torch.testing.assert_close(own.mean(0), torch.zeros(9), rtol=0, atol=1e-5)
        torch.testing.assert_close(own.std(0), torch.ones(9), rtol=1e-5, atol=0)


def test_columns_may_be_standardised_by_all_training_patients(made_up):
    x = load_dataset("heart_disease", made_up, standardised="all").train_x[:, [0, 2, 5, 6, 8, 10]]
    torch.testing.assert_close(x.mean(0), torch.zeros(6), rtol=0, atol=1e-5)
    torch.testing.assert_close(x.std(0), torch.ones(6), rtol=1e-5, atol=0)


def test_real_files(real_data):
    data = load_dataset("heart_disease", real_data)
    # The sizes of FLamby's table 1: arXiv:2210.04620.
    assert torch.bincount(data.train_client).tolist() == [199, 172, 30, 85]
    assert len(data.test_y) == 104 + 89 + 16 + 45
    assert torch.cat([data.train_y, data.test_y]).sum() == 139 + 98 + 45 + 101
    again = load_dataset("heart_disease", real_data)
    assert torch.equal(data.train_x, again.train_x)


def test_split_keeps_the_share_of_the_ill(real_data):
    data = load_dataset("heart_disease", real_data)
    for client, share in enumerate([139 / 303, 98 / 261, 45 / 46, 101 / 130]):
        ill = data.train_y[data.train_client == client]
        assert abs(ill.sum() - share * len(ill)) <= 1


def test_missing_file_is_named(made_up):
    (made_up / "heart-disease" / "processed.va.data").unlink()
    with pytest.raises(DataError, match=r"processed\.va\.data not found.*FEDMERGE_DATA"):
        load_dataset("heart_disease", made_up)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("1,2,3\n", "3 columns instead of 14"),
        ("1,2\n1,2,3\n", "damaged"),
        ("63,1,9,145,233,1,2,150,0,2.3,3,0,6,0\n" * 10, "column cp has values other than"),
        ("63,1,4,145,?,1,2,150,0,2.3,3,0,6,0\n" * 10, "only 0 patients"),
    ],
)
def test_damaged_file_is_named(made_up, content, reason):
    (made_up / "heart-disease" / "processed.hungarian.data").write_text(content)
    with pytest.raises(DataError, match=rf"processed\.hungarian\.data is damaged.*{reason}|{reason}"):
        load_dataset("heart_disease", made_up)


def test_hospital_that_cannot_be_split_by_class_is_still_read(made_up):
    folder = made_up / "heart-disease"
    lines = (folder / "processed.va.data").read_text().splitlines()
    (folder / "processed.va.data").write_text("\n".join(line.rsplit(",", 1)[0] + ",1" for line in lines))
    data = load_dataset("heart_disease", made_up)
    assert (data.train_y[data.train_client == 3] == 1).all()


def test_same_files_elsewhere_give_the_same_tensors(made_up, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(made_up / "heart-disease", copy / "heart-disease")
    assert torch.equal(load_dataset("heart_disease", made_up).test_x, load_dataset("heart_disease", copy).test_x)
