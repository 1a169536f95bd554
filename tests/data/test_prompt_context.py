"""Prompt sets with metadata and references: what is read, what is refused, what reaches a reward."""

import json
import re

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


def test_a_prompt_is_what_stands_in_its_line(tmp_path):
    odd = "a\u2028b \u0085 c\x0bd\x0ce"
    (tmp_path / "a.txt").write_bytes(f"\ufefffirst\r\n{odd}\r\n# no\nlast".encode())
    assert read_prompts(tmp_path / "a.txt") == ["first", odd, "last"]
    lines = [json.dumps({"prompt": odd}, ensure_ascii=False), json.dumps({"prompt": "b"})]
    (tmp_path / "a.jsonl").write_bytes(("\ufeff" + "\r\n".join(lines)).encode())
    assert read_prompts(tmp_path / "a.jsonl") == [odd, "b"]


def test_tables_and_lists_are_read_as_what_they_are(tmp_path):
    (tmp_path / "a.csv").write_bytes('\ufeffid,Prompt\r\n1,"a ""red"", round\nthing"\r\n2,b\r\n3,\r\n'.encode())
    assert read_prompts(tmp_path / "a.csv") == ['a "red", round thing', "b"]
    (tmp_path / "a.tsv").write_text("caption\tn\na cat\t1\n")
    assert read_prompts(tmp_path / "a.tsv") == ["a cat"]
    (tmp_path / "a.json").write_text(json.dumps(["a cat", {"prompt": "a dog", "tag": 1}]))
    assert read_prompts(tmp_path / "a.json") == ["a cat", "a dog"]
    assert PromptContext.of_files(str(tmp_path / "a.json"))(["a dog"]) == {"metadata": [{"tag": 1}]}


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.csv", "a red circle\na cat\n", "with columns ['a red circle'], expected one of them called"),
        ("a.json", '{"prompt": "x"}', "which holds a dict, expected a list"),
        ("a.json", "[1]", "entry 1 of .* expected an object with a text 'prompt'"),
        ("a.json", "[", "is not JSON"),
        ("a.jsonl", "\n\n \n", "which holds no prompt"),
        ("a.jsonl", "[" * 5000, "is nested too deep"),
        ("a.jsonl", '{"prompt": "x", "references": [1]}', r"got \[1\] as 'references', expected a list of paths"),
        ("a.txt", "\ufeff\n", "which holds no prompt"),
    ],
)
def test_prompt_files_that_are_something_else_are_refused_in_one_line(tmp_path, name, text, says):
    (tmp_path / name).write_text(text, encoding="utf-8")
    says = says if "\\" in says or ".*" in says else re.escape(says)
    with pytest.raises(ValueError, match=f"^prompts: .*{says}") as caught:
        read_prompts(tmp_path / name)
    assert "\n" not in str(caught.value)
