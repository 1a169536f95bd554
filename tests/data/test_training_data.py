"""Prompts and the sampler of groups (Checks of the sampler: every process, and a resumed run, deals the same)."""

import pytest
import torch

from visalign.data.prompts import iteration_groups, overlap, read_prompts, share_of

PROMPTS = [f"prompt {k}" for k in range(7)]


def groups(iteration=0, count=3, size=4, seed=5, prompts=PROMPTS, **options):
    return iteration_groups(prompts, iteration, count, size, seed, **options)


def test_groups_are_a_function_of_their_arguments_whatever_was_drawn_before():
    first = groups(3)
    torch.randn(10)
    groups(0)
    assert groups(3) == first
    assert groups(4) != first and groups(3, seed=6) != first


def test_every_prompt_is_visited_once_a_pass_in_an_order_that_changes():
    visited = [g.prompt for i in range(14) for g in groups(i)]  # 42 = 6 passes over 7
    passes = [visited[k : k + 7] for k in range(0, 42, 7)]
    assert all(sorted(p) == PROMPTS for p in passes)
    assert len({tuple(p) for p in passes}) > 1


def test_all_seeds_of_a_run_differ():
    seeds = [s for i in range(20) for g in groups(i, size=8) for s in g.seeds]
    assert len(set(seeds)) == len(seeds)


def test_same_latents_share_the_first_noise_within_a_group_alone_and_never_the_later_noise():
    drawn = groups(same_latents=True)
    assert all(len(set(g.seeds)) == 1 and len(set(g.noise_seeds)) == 4 for g in drawn)
    assert len({g.seeds[0] for g in drawn}) == len(drawn)
    assert all(len(set(g.seeds)) == 4 for g in groups())


def test_duplicate_prompts_stay_separate_groups():
    drawn = groups(prompts=["same", "same", "same"])
    assert [g.prompt for g in drawn] == ["same"] * 3
    assert [g.index for g in drawn] == [0, 1, 2]
    assert len({g.seeds for g in drawn}) == 3


@pytest.mark.parametrize("processes", [1, 2, 3, 6])
def test_processes_share_whole_groups_evenly_and_lose_none(processes):
    drawn = groups(count=6)
    shares = [share_of(drawn, p, processes) for p in range(processes)]
    assert {len(s) for s in shares} == {6 // processes}
    assert sorted((g for s in shares for g in s), key=lambda g: g.index) == drawn


def test_uneven_shares_are_refused():
    with pytest.raises(ValueError, match="got 3 prompts an update for 2 processes"):
        share_of(groups(), 0, 2)


def test_prompt_files_skip_comments_and_empty_lines_and_keep_duplicates(tmp_path):
    (tmp_path / "p.txt").write_text("# set\n\n  a cat \na cat\na dog")
    assert read_prompts(tmp_path / "p.txt") == ["a cat", "a cat", "a dog"]


@pytest.mark.parametrize("content, message", [(b"", "no prompt"), (b"# x\n\n", "no prompt"), (b"\xff\xfe", "UTF-8")])
def test_unusable_prompt_files_are_refused(tmp_path, content, message):
    path = tmp_path / "p.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_prompts(path)
    with pytest.raises(ValueError, match="a folder"):
        read_prompts(tmp_path)
    with pytest.raises(ValueError, match="does not exist"):
        read_prompts(tmp_path / "none")


def test_overlap_ignores_case_and_spacing():
    assert overlap(["A  cat", "a dog"], ["a cat", "a cow"]) == ["a cat"]
