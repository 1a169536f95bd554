"""Checkpoints are whole or absent."""

import json
import math
import os
import resource
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from visalign.training.run import checkpoint as ckpt

STATE = dict(config={}, skipped=0, train_seconds=1.5, images_sampled=8, best=None, ema_updates=3, before_prompts=["p"])


def tensors(value=1.0):
    return {name: {"w": torch.full((2, 3), value)} for name in ("trained", "ema", "optimizer")}


def steps(folder):
    return [int(p.name.removeprefix("step-")) for p in ckpt.checkpoints(folder)]


def save(folder, *numbers):
    for step in numbers:
        ckpt.save_checkpoint(folder, step, tensors(step), STATE)


def test_what_is_saved_comes_back_bit_for_bit(tmp_path):
    values = {"trained": {"a.b": torch.randn(3, 4).T}, "ema": {}, "optimizer": {"0.step": torch.tensor(3.0)}}
    path = ckpt.save_checkpoint(tmp_path, 7, values, STATE)
    read, state = ckpt.load_checkpoint(path)
    assert torch.equal(read["trained"]["a.b"], values["trained"]["a.b"])
    assert read["optimizer"]["0.step"].shape == () and read["ema"] == {}
    assert state.pop("checksums").keys() == {"trained.safetensors", "ema.safetensors", "optimizer.safetensors"}
    assert state == {"step": 7, **STATE}


def test_optimizer_state_comes_back_and_goes_on_the_same():
    def make():
        torch.manual_seed(0)
        parameters = [torch.nn.Parameter(torch.randn(4)), torch.nn.Parameter(torch.randn(2, 2))]
        return parameters, torch.optim.AdamW(parameters, lr=0.1)

    def step(parameters, optimizer, seed):
        generator = torch.Generator().manual_seed(seed)
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()

    one, other = make(), make()
    for pair in (one, other):
        step(*pair, 1)
    fresh, again = torch.optim.AdamW(other[0], lr=0.1), ckpt.optimizer_tensors(other[1])
    ckpt.load_optimizer(fresh, {k: v.clone() for k, v in again.items()})
    step(*one, 2)
    step(other[0], fresh, 2)
    assert all(torch.equal(a, b) for a, b in zip(one[0], other[0]))


def test_the_newest_whole_checkpoint_is_found_and_what_a_kill_left_is_not(tmp_path):
    folder = tmp_path / "checkpoints"
    save(folder, 9, 10)
    (folder / ".partial-11-1").mkdir()
    (folder / ".partial-11-1" / "state.json").write_text("{}")
    (folder / "step-12").mkdir()  # without its state: not whole
    assert ckpt.find_checkpoint(tmp_path).name == "step-10"
    assert ckpt.find_checkpoint(folder / "step-9").name == "step-9"
    ckpt.prune(folder, 5, set())
    assert not list(folder.glob(".partial*"))


def test_a_failed_write_leaves_the_earlier_checkpoints_and_nothing_half(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ckpt, "save_file", full)
    with pytest.raises(OSError, match="earlier checkpoints are whole"):
        save(tmp_path, 2)
    assert [p.name for p in tmp_path.iterdir()] == ["step-1"]


def test_pruning_keeps_the_newest_and_the_best(tmp_path):
    save(tmp_path, 1, 2, 3, 4, 5)
    ckpt.prune(tmp_path, 2, {2})
    assert steps(tmp_path) == [2, 4, 5]


def test_checkpoints_of_a_branch_given_up_are_pruned(tmp_path):
    save(tmp_path, 2, 4, 6, 3)  # resumed from 2, then saved 3
    ckpt.prune(tmp_path, 5, {6}, newest=3)
    assert steps(tmp_path) == [2, 3]


def test_saving_a_step_again_replaces_it(tmp_path):
    save(tmp_path, 1)
    ckpt.save_checkpoint(tmp_path, 1, tensors(5.0), STATE)
    assert ckpt.load_checkpoint(tmp_path / "step-1")[0]["trained"]["w"][0, 0] == 5


def damage(path, how):
    if how == "truncated":
        os.truncate(path / "ema.safetensors", 40)
    elif how == "garbage":
        (path / "trained.safetensors").write_bytes(os.urandom(200))
    elif how == "missing":
        (path / "optimizer.safetensors").unlink()
    elif how == "json":
        (path / "state.json").write_text('{"step": 1, ')
    elif how == "binary":
        (path / "state.json").write_bytes(b"\xff\x00\xff")
    elif how == "list":
        (path / "state.json").write_text("[]")
    else:
        (path / "state.json").write_text(json.dumps({"step": 1, **STATE, "ema_updates": None}))


@pytest.mark.parametrize("how", ["truncated", "garbage", "missing", "json", "binary", "list", "foreign"])
def test_a_damaged_checkpoint_is_one_line(tmp_path, how):
    save(tmp_path, 1)
    damage(tmp_path / "step-1", how)
    with pytest.raises(ValueError, match="^resume: ") as caught:
        ckpt.load_checkpoint(tmp_path / "step-1")
    assert "\n" not in str(caught.value)


def test_a_folder_without_checkpoints_is_an_error(tmp_path):
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(ValueError, match="holds no checkpoint"):
            ckpt.find_checkpoint(path)


def test_a_checkpoint_of_which_something_is_missing_is_passed_over_and_swept_away(tmp_path):
    folder = tmp_path / "checkpoints"
    save(folder, 9, 10, 11)
    (folder / "step-11" / "trained.safetensors").unlink()  # a kill within deleting
    assert ckpt.find_checkpoint(tmp_path).name == "step-10" and steps(folder) == [9, 10]
    (folder / ".partial-12-1").mkdir()
    ckpt.clean(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["step-10", "step-9"]


def test_what_is_deleted_is_first_no_checkpoint_any_more(tmp_path, monkeypatch):
    save(tmp_path, 1, 2, 3)

    def killed(path, **_):
        assert not path.name.startswith("step-")
        raise KeyboardInterrupt

    monkeypatch.setattr(ckpt.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        ckpt.prune(tmp_path, 1, set())
    monkeypatch.undo()
    assert 3 in steps(tmp_path) and all(ckpt.load_checkpoint(path) for path in ckpt.checkpoints(tmp_path))


def rewrite(path, name, change):
    values = load_file(str(path / f"{name}.safetensors"))
    change(values)
    ckpt.save_file(values, str(path / f"{name}.safetensors"))


def restate(path, **changes):
    state = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps({**state, **changes}))


def flip(path):
    content = bytearray((path / "ema.safetensors").read_bytes())
    content[-3] ^= 4
    (path / "ema.safetensors").write_bytes(content)


def swap(path):
    os.replace(path / "ema.safetensors", path / "x")
    os.replace(path / "trained.safetensors", path / "ema.safetensors")
    os.replace(path / "x", path / "trained.safetensors")


@pytest.mark.parametrize(
    "harm",
    [
        flip,
        swap,
        lambda path: rewrite(path, "optimizer", lambda v: v.pop("w")),
        lambda path: rewrite(path, "optimizer", lambda v: v.update(w=torch.ones(3))),
        lambda path: restate(path, step=5),
        lambda path: restate(path, step=True),
        lambda path: restate(path, train_seconds=float("nan")),
        lambda path: restate(path, ema_updates=-1),
        lambda path: (path / "state.json").write_text("[" * 100_000),
    ],
)
def test_a_checkpoint_that_is_not_as_it_was_written_is_refused(tmp_path, harm):
    values = {**tensors(), "ema": {"w": torch.full((2, 3), 2.0)}}
    path = ckpt.save_checkpoint(tmp_path, 6, values, STATE)
    ckpt.load_checkpoint(path)
    harm(path)
    with pytest.raises(ValueError, match="^resume: ") as caught:
        ckpt.load_checkpoint(path)
    assert "\n" not in str(caught.value)


def test_weights_that_are_no_numbers_are_refused_even_if_they_were_written_so(tmp_path):
    path = ckpt.save_checkpoint(tmp_path, 1, {**tensors(), "trained": {"w": torch.tensor([1.0, math.nan])}}, STATE)
    with pytest.raises(ValueError, match="trained.safetensors has values of w that are not finite"):
        ckpt.load_checkpoint(path)


def test_optimiser_entries_of_another_shape_or_place_are_refused():
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(4))])
    good = {"0.step": torch.tensor(1.0), "0.exp_avg": torch.ones(4), "0.exp_avg_sq": torch.ones(4)}
    ckpt.load_optimizer(optimizer, good)
    for bad, says in (
        ({**good, "0.exp_avg": torch.ones(3)}, r"exp_avg of shape \(3,\) for parameter 0, expected \(4,\)"),
        ({**good, "7.step": torch.tensor(1.0)}, "an entry 7, expected 0 .. 0"),
    ):
        with pytest.raises(ValueError, match=says):
            ckpt.load_optimizer(optimizer, bad)


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_FSIZE"), reason="limits of files")
def test_where_there_is_no_room_nothing_is_left_behind_and_the_next_try_has_as_much(tmp_path):
    """In a child whose files may hold 100 kB; then without the limit in the same folder."""
    code = (
        "import resource, signal, sys, torch\n"
        "from pathlib import Path\n"
        "from visalign.training.run import checkpoint as ckpt\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "folder, limit = Path(sys.argv[1]), int(sys.argv[2])\n"
        "tensors = {name: {'w': torch.ones(100_000)} for name in ckpt.OWN}\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))\n"
        "try:\n"
        "    ckpt.save_checkpoint(folder, int(sys.argv[3]), tensors, {})\n"
        "except OSError as error:\n"
        "    print(error)\n"
    )
    for step, limit, says in ((1, -1, ""), (2, 100_000, "1,200,000 bytes (no room)"), (3, -1, "")):
        done = subprocess.run(
            [sys.executable, "-c", code, tmp_path, str(limit), str(step)], capture_output=True, text=True
        )
        assert says in done.stdout and not done.stderr and (not says) == (not done.stdout), done
    assert steps(tmp_path) == [1, 3] and len(list(tmp_path.iterdir())) == 2
