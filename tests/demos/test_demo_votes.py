import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from PIL import Image

from visalign.data.votes import LABELS, LOG, Pair, VoteStore, zipped

VOTER = """
import sys
from PIL import Image
from visalign.data.votes import Pair, VoteStore

store = VoteStore(sys.argv[1])
for n in range(int(sys.argv[2]), 200):
    images = (Image.new("RGB", (8, 8), (n, 0, 0)), Image.new("RGB", (8, 8), (0, n, 0)))
    store.add(Pair(f"pair-{n}", f"prompt {n}", images, (n, n + 1), ("base", "lora")), "image_0")
    print(n, flush=True)
"""


def pair(name="p", **changes):
    images = (Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue"))
    given = dict(prompt="a red circle", images=images, seeds=(1, 2), models=("base", "lora"))
    return Pair(name, **{**given, **changes})


def vote_from(folder, start):
    """A process that votes from here on, and a list that grows by what it has acknowledged."""
    process = subprocess.Popen(
        [sys.executable, "-c", VOTER, str(folder), str(start)], stdout=subprocess.PIPE, text=True
    )
    acknowledged = []
    reader = threading.Thread(target=lambda: acknowledged.extend(int(line) for line in process.stdout))
    reader.start()
    return process, reader, acknowledged


def test_two_hundred_votes_with_a_kill_in_the_middle_are_all_there(tmp_path):
    process, reader, before = vote_from(tmp_path, 0)
    while len(before) < 80 and process.poll() is None:
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait(), reader.join()
    assert 80 <= len(before) < 200  # it was killed at work
    with open(tmp_path / LOG, "ab") as file:
        file.write(b'{"prompt": "cut sho')  # as a crash of the machine may leave it
    process, reader, after = vote_from(tmp_path, before[-1] + 1)
    process.wait(), reader.join()
    rows = VoteStore(tmp_path).rows()
    stored = [row["prompt"] for row in rows]
    assert [f"prompt {n}" in stored for n in before + after] == [True] * 200
    assert all((tmp_path / row[f"image_{k}_file_name"]).is_file() for row in rows for k in (0, 1))
    colours = [Image.open(tmp_path / row["image_0_file_name"]).getpixel((0, 0)) for row in rows]
    assert all(colour == (row["seed_0"], 0, 0) for colour, row in zip(colours, rows))


def test_a_vote_is_on_disk_before_it_is_acknowledged(tmp_path, monkeypatch):
    synced = []
    real = os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda handle: (synced.append(os.readlink(f"/proc/self/fd/{handle}")), real(handle))
    )
    VoteStore(tmp_path).add(pair(), "tie")
    assert str(tmp_path / LOG) in synced and str(tmp_path) in synced and str(tmp_path / "images") in synced
    assert sum(name.endswith(".partial") for name in synced) == 2  # both pictures, before they got their names
    assert synced.index(str(tmp_path / "images")) < synced.index(str(tmp_path / LOG))


def test_a_vote_that_cannot_be_written_is_no_vote(tmp_path, monkeypatch):
    store = VoteStore(tmp_path)
    store.add(pair("one"), "tie")
    whole = (tmp_path / LOG).read_bytes()
    real = os.fsync

    def full(handle):
        if os.readlink(f"/proc/self/fd/{handle}").endswith(LOG):
            raise OSError(28, "No space left on device")
        real(handle)

    with monkeypatch.context() as patched, pytest.raises(OSError, match="No space"):
        patched.setattr(os, "fsync", full)
        store.add(pair("two"), "tie")
    assert (tmp_path / LOG).read_bytes() == whole
    store.add(pair("two"), "tie")  # may be tried again
    assert [row["pair"] for row in store.rows()] == ["one", "two"]


def test_rows_have_the_columns_of_preference_data(tmp_path):
    store = VoteStore(tmp_path)
    labels = {"image_0": (1, 0), "image_1": (0, 1), "tie": (0.5, 0.5), "both_bad": (0.5, 0.5)}
    assert tuple(labels) == LABELS
    for label, shares in labels.items():
        row = store.add(pair(label, swapped=True, rewards=({"clip": 0.5}, {})), label)
        assert (row["label"], row["label_0"], row["label_1"]) == (label, *shares)
    assert store.rows()[-1] == row
    assert {"prompt", "seed_0", "seed_1", "model_0", "model_1", "time", "swapped", "blind"} <= row.keys()
    assert row["swapped"] is True and json.loads(row["rewards_0"]) == {"clip": 0.5}


def test_a_pair_is_voted_on_once_and_labels_are_checked(tmp_path):
    store = VoteStore(tmp_path)
    store.add(pair(), "tie")
    with pytest.raises(ValueError, match="pair: got a vote before"):
        store.add(pair(), "image_0")
    with pytest.raises(ValueError, match="label: got 'best'"):
        store.add(pair("other"), "best")
    assert len(store.rows()) == 1


def test_votes_of_many_threads_do_not_mix(tmp_path):
    store = VoteStore(tmp_path)

    def many(k):
        for n in range(10):
            store.add(pair(f"{k}-{n}"), "image_1")

    threads = [threading.Thread(target=many, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(row["pair"] for row in store.rows()) == sorted(f"{k}-{n}" for k in range(4) for n in range(10))


def test_the_export_is_a_datasets_folder_of_whole_votes(tmp_path):
    datasets = pytest.importorskip("datasets")
    store = VoteStore(tmp_path / "votes")
    with pytest.raises(ValueError, match="votes: got none"):
        store.export(tmp_path / "none")
    for n in range(3):
        store.add(pair(f"p{n}", prompt=f"prompt {n}"), LABELS[n])
    with open(tmp_path / "votes" / LOG, "ab") as file:
        file.write(b'{"prompt": "cut')
    (tmp_path / "export").mkdir()
    folder = store.export(tmp_path / "export" / "preferences")
    with pytest.raises(ValueError, match="which exists"):
        store.export(folder)
    data = datasets.load_dataset("imagefolder", data_dir=str(folder), split="train", cache_dir=str(tmp_path / "cache"))
    assert len(data) == 3 and sorted(data["prompt"]) == ["prompt 0", "prompt 1", "prompt 2"]
    assert data[0]["image_0"].convert("RGB").getpixel((0, 0)) == (255, 0, 0)
    assert data[0]["image_1"].convert("RGB").getpixel((0, 0)) == (0, 0, 255)
    assert {"label", "label_0", "model_1", "time"} <= set(data.column_names)
    assert zipped(folder).name == "preferences.zip"
