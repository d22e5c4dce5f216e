from __future__ import annotations

import gzip

import pytest
import torch

from fedmerge.data import load_dataset
from fedmerge.data.shakespeare import VOCABULARY, encode
from fedmerge.data.speeches import parse_marked_up, parse_plain
from fedmerge.errors import DataError, InvalidOption

PLAY = """# A Play
## ACT I
### SCENE I
@ANNE
one two three four five

@BOB|ANNE
both of them

# Another
@ANNE
elsewhere
"""


def text_of(tokens):
    return "".join(VOCABULARY[token] for token in tokens.flatten())


def write(folder, text, name="shakespeare_plays.txt"):
    (folder / "shakespeare").mkdir(exist_ok=True)
    path = folder / "shakespeare" / name
    if name.endswith(".gz"):
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text, encoding="utf-8")
    return folder


def test_roles_of_marked_up_plays():
    assert parse_marked_up(PLAY.splitlines()) == {
        "A Play: ANNE": "one two three four five\nboth of them\n",
        "A Play: BOB": "both of them\n",
        "Another: ANNE": "elsewhere\n",
    }


def test_plain_speech_may_have_lines_that_end_in_a_colon():
    lines = ["ROMEO:", "He said:", "go.", "", "JULIET:", "No."]
    assert parse_plain(lines) == {"ROMEO": "He said:\ngo.\n", "JULIET": "No.\n"}


def test_encoding_is_reversible_and_marks_the_unknown():
    text = "".join(VOCABULARY[1:])
    assert text_of(torch.from_numpy(encode(text))) == text
    assert encode("é\t\x7f\u2014\U0001f600").tolist() == [0] * 5
    assert len(set(VOCABULARY)) == len(VOCABULARY) == 97


def test_windows_follow_each_other_and_labels_are_one_ahead(tmp_path):
    said = "".join(chr(97 + k % 26) for k in range(101))
    data = load_dataset("shakespeare", write(tmp_path, f"# P\n@A\n{said}\n"), sequence_length=10, min_characters=1)
    # 102 characters with the newline: ten windows of ten, whose labels end at character 100; two are for testing.
    assert data.train_x.shape == data.train_y.shape == (8, 10)
    assert data.test_x.shape == data.test_y.shape == (2, 10)
    assert text_of(torch.cat([data.train_x, data.test_x])) == said[:100]
    assert text_of(torch.cat([data.train_y, data.test_y])) == said[1:101]
    assert data.train_x.dtype == data.train_y.dtype == torch.int64
    assert data.num_classes == len(data.class_names) == len(VOCABULARY)


def test_roles_are_ordered_by_size_and_limited(tmp_path):
    text = "# P\n" + "".join(f"@{who}\n{'x' * size}\n\n" for who, size in [("A", 60), ("B", 90), ("C", 75)])
    write(tmp_path, text)
    options = {"sequence_length": 5, "min_characters": 20}
    data = load_dataset("shakespeare", tmp_path, **options)
    assert data.client_names == ("P: B", "P: C", "P: A")
    assert torch.bincount(data.train_client).tolist() == [15, 12, 10]
    assert (data.train_client.diff() >= 0).all()
    assert load_dataset("shakespeare", tmp_path, **options, max_clients=2).client_names == ("P: B", "P: C")
    longer = load_dataset("shakespeare", tmp_path, sequence_length=5, min_characters=70)
    assert longer.client_names == ("P: B", "P: C")


@pytest.mark.parametrize("name", ["tinyshakespeare.txt", "tinyshakespeare.txt.gz", "input.txt", "input.txt.gz"])
def test_plain_format_under_each_of_its_names(name, tmp_path):
    text = "All:\nSpeak, speak. And speak again.\n\nFirst Citizen:\nResolved.\n"
    data = load_dataset("shakespeare", write(tmp_path, text, name), sequence_length=4, min_characters=20)
    assert data.client_names == ("All",)
    assert text_of(data.train_x[0]) == "Spea"


def test_real_plays(real_data):
    data = load_dataset("shakespeare", real_data)
    assert len(data.client_names) == 639
    assert "HAMLET" in data.client_names[0]
    sizes = torch.bincount(data.train_client)
    assert sizes.min() >= 9
    assert sizes[0] == sizes.max() == 613  # Hamlet: 61,294 characters are 766 windows, a fifth of them for testing
    assert (data.train_x != 0).all()
    assert abs(len(data.test_x) / (len(data.test_x) + len(data.train_x)) - 0.2) < 0.01


def test_real_tinyshakespeare(real_data, tmp_path):
    packed = (real_data / "shakespeare" / "tinyshakespeare.txt.gz").read_bytes()
    (tmp_path / "shakespeare").mkdir()
    (tmp_path / "shakespeare" / "tinyshakespeare.txt.gz").write_bytes(packed)
    data = load_dataset("shakespeare", tmp_path)
    assert {"ROMEO", "JULIET", "GLOUCESTER"} <= set(data.client_names)
    every_role = parse_plain(gzip.decompress(packed).decode().splitlines())
    assert all(len(name) < 40 for name in every_role)


def test_no_text_names_the_folder_and_files(tmp_path):
    with pytest.raises(DataError, match=r"no text in .*shakespeare.*shakespeare_plays\.txt.*FEDMERGE_DATA"):
        load_dataset("shakespeare", tmp_path)


def test_text_without_speeches(tmp_path):
    with pytest.raises(DataError, match="no speeches in"):
        load_dataset("shakespeare", write(tmp_path, "just\nsome words\n"))


def test_truncated_gz(tmp_path):
    write(tmp_path, PLAY * 50, "shakespeare_plays.txt.gz")
    path = tmp_path / "shakespeare" / "shakespeare_plays.txt.gz"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="cannot be read"):
        load_dataset("shakespeare", tmp_path)


def test_no_role_long_enough(tmp_path):
    with pytest.raises(DataError, match=r"no role has 1000 characters\. Lower min_characters"):
        load_dataset("shakespeare", write(tmp_path, PLAY))


@pytest.mark.parametrize("option", ["sequence_length", "min_characters", "max_clients"])
@pytest.mark.parametrize("value", [0, -1, 2.5, "80", True])
def test_options_must_be_positive_integers(option, value, tmp_path):
    with pytest.raises(InvalidOption, match=f"{option}="):
        load_dataset("shakespeare", tmp_path, **{option: value})
