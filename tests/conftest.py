"""Shared by the tests of trainings: CPU, one thread (so that runs repeat bit for bit), and a tiny run's files."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["ACCELERATE_USE_CPU"] = "true"

from pathlib import Path

import pytest

TRAIN = [
    "a red circle",
    "two blue squares",
    "a green star above a red square",
    "a yellow star",
    "a purple square",
]
HELD_OUT = ["a blue star", "two red triangles", "a green circle left of a yellow star", "three purple circles"]
REWARD = '''
"""Brightness, that can also be told by the environment to write down its scores, to fail, or to kill the process."""

import os
import signal

calls = 0


def brightness(images, prompts):
    global calls
    calls = calls + 1 if {"TEST_KILL_AT", "TEST_FAIL_AT"} & os.environ.keys() else 0
    if str(calls) == os.environ.get("TEST_KILL_AT"):
        os.kill(os.getpid(), signal.SIGKILL)
    if str(calls) == os.environ.get("TEST_FAIL_AT"):
        calls = 0
        raise RuntimeError("the lamp is broken")
    scores = images.flatten(1).mean(1)
    if "TEST_SCORES" in os.environ:
        with open(os.environ["TEST_SCORES"], "a") as file:
            file.writelines(f"{score:.9f} {prompt}\\n" for score, prompt in zip(scores.tolist(), prompts))
    return scores
'''


LONG = (  # files that take longest; begun first, so that no worker is left alone with one at the end
    "test_demo_browser",
    "test_every_trainer",
    "test_search_methods",
    "test_training_resume",
    "test_readme",
    "test_reward_backprop",
    "test_flow_grpo",
    "test_search_tree_search",
    "test_eval_runs",
    "test_world_models",
    "test_watching",
    "test_serving",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first; `--dist loadfile` hands files out in this order."""
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))


@pytest.fixture(scope="session")
def world_files(tmp_path_factory) -> Path:
    """A folder with train.txt, test.txt and reward.py."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "train.txt").write_text("\n".join(TRAIN) + "\n")
    (folder / "test.txt").write_text("\n".join(HELD_OUT) + "\n")
    (folder / "reward.py").write_text(REWARD)
    return folder


@pytest.fixture(scope="session")
def options(world_files) -> dict:
    """Options of a run on the shipped model that takes a second: two steps of two groups of two images."""
    return dict(
        prompts=str(world_files / "train.txt"),
        eval_prompts=str(world_files / "test.txt"),
        reward=f"{world_files / 'reward.py'}:brightness",
        steps=2,
        num_steps=4,
        window="all",
        prompts_per_step=2,
        group_size=2,
        batch_size=3,
        eval_count=4,
        lora_rank=4,
    )
