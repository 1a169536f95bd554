"""Prompt sets with metadata and references: what is read, what is refused, what reaches a reward."""

import json

import pytest
import torch
from PIL import Image

from visalign.data.prompt_context import PromptContext
from visalign.data.prompts import read_prompts
from visalign.rewards import as_reward
from visalign.training.loop.scoring import Scorer


@pytest.fixture
def prompt_set(tmp_path):
    Image.new("RGB", (4, 6), (255, 0, 51)).save(tmp_path / "red.png")
    lines = [
        {"prompt": "a red bird", "references": ["red.png"], "metadata": {"weight": 2}, "tag": "colors"},
        {"prompt": "a dog", "include": [{"class": "dog", "count": 1}]},
        {"prompt": "a cat"},
    ]
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    return path


def test_prompts_keep_their_order_and_each_gets_its_own_context(prompt_set):
    assert read_prompts(prompt_set) == ["a red bird", "a dog", "a cat"]
    context = PromptContext.of_files(str(prompt_set), None)(["a dog", "a red bird", "a cat"])
    assert context["metadata"] == [
        {"include": [{"class": "dog", "count": 1}]},
        {"tag": "colors", "weight": 2},
        {},
    ]
    assert [len(own) for own in context["references"]] == [0, 1, 0]
    picture = context["references"][1][0]
    assert picture.shape == (3, 6, 4)
    torch.testing.assert_close(picture[:, 0, 0], torch.tensor([1.0, 0.0, 0.2]))


def test_plain_prompts_have_no_context(tmp_path):
    (tmp_path / "p.txt").write_text("one\ntwo\n")
    assert PromptContext.of_files(str(tmp_path / "p.txt"), None)(["one"]) == {}
    assert PromptContext.of_files("shapes", None)(["one"]) == {}


def test_a_reward_of_a_training_sees_the_context_of_its_samples_in_batches_and_evaluations(prompt_set):
    def weighed(images, prompts, context):
        return torch.tensor([float(m.get("weight", 0)) + len(r) for m, r in zip(*map(context.get, NAMES))])

    scorer = Scorer(as_reward(weighed), torch.device("cpu"), 0, PromptContext.of_files(str(prompt_set)))
    images, prompts = torch.rand(2, 3, 4, 4), ["a cat", "a red bird"]
    [scored] = scorer.submit([images], prompts, torch.tensor([0, 1])).result()
    assert scored.total.tolist() == [0.0, 3.0]
    assert scorer.evaluate(images, prompts).tolist() == [0.0, 3.0]


NAMES = ("metadata", "references")


@pytest.mark.parametrize(
    "line, says",
    [
        ("a bird", "line 2 of .* is not JSON"),
        ('["a bird"]', "expected an object with a text 'prompt'"),
        ('{"prompt": " "}', "expected an object with a text 'prompt'"),
        ('{"prompt": "x", "metadata": 3}', "expected a mapping as 'metadata'"),
        ('{"prompt": "x", "references": "red.png"}', "a list of paths as 'references'"),
        ('{"prompt": "x", "references": ["blue.png"]}', "could not read the picture .*blue.png"),
        ('{"prompt": "x", "references": ["cut.png"]}', "could not read the picture .*cut.png"),
        ('{"prompt": "a cat", "metadata": {"k": 1}}', "stands there twice, with another context"),
    ],
)
def test_lines_that_mean_nothing_are_refused_by_number(tmp_path, line, says):
    Image.effect_noise((64, 64), 60).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:1500])
    (tmp_path / "p.jsonl").write_text('{"prompt": "a cat"}\n' + line + "\n")
    with pytest.raises(ValueError, match=says):
        read_prompts(tmp_path / "p.jsonl")
