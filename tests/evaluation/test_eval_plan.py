"""What `visalign eval` reads and refuses before it loads a model, and what it keeps in files."""

import json

import numpy as np
import pytest

from visalign.commands import cli
from visalign.evaluation.contestants import TYPES, parse_contestant, path_digest
from visalign.evaluation.judging import missing_batches
from visalign.evaluation.plan import make_plan, read_set
from visalign.evaluation.results import collect
from visalign.evaluation.store import Store
from visalign.search import METHODS
from visalign.worlds.shapes import world_prompts

REWARD = "def brightness(images, prompts):\n    return images.mean((1, 2, 3))\n"


def test_a_contestant_says_all_that_draws_it():
    text = "A.1=shapes-flow,lora=runs/a,b/lora,strength=0.5,steps=4,guidance=2,search=dts,budget=9,tilt=20,cache=true"
    found = parse_contestant(text, "clip")
    assert (found.label, found.model, found.lora, found.strength) == ("A.1", "shapes-flow", "runs/a,b/lora", 0.5)
    assert (found.steps, found.guidance, found.search, found.budget, found.reward) == (4, 2.0, "dts", 9, "clip")
    assert found.options == {"tilt": 20, "cache": True}
    listed = parse_contestant('r=m/m,search=refine,budget=9,critic_options={"a": 1, "b": [2, 3]},reward=gold', "clip")
    assert listed.options == {"critic_options": {"a": 1, "b": [2, 3]}} and listed.reward == "gold"
    assert parse_contestant("plain=shapes-flow", "clip").settings() == {"model": "shapes-flow"}


def test_no_option_of_a_search_has_the_name_of_a_setting():
    for method in METHODS.values():
        assert not set(method.options) & set(TYPES)


def test_a_set_of_prompts_is_a_file_or_captions_of_the_world(tmp_path):
    assert read_set("3")[0] == world_prompts("test", 3)
    assert read_set("compositional:2")[0] == world_prompts("compositional", 2)
    (tmp_path / "p.txt").write_text("a\n\n# b\nc\n")
    assert read_set(str(tmp_path / "p.txt")) == (["a", "c"], "")


WRONG = [
    (["--contestant", "shapes-flow"], "contestant: got 'shapes-flow', expected LABEL=MODEL"),
    (["--contestant", "a/b=shapes-flow"], "contestant: got 'a/b=shapes-flow', expected LABEL=MODEL"),
    (["--contestant", "a=none"], "contestant 'a': model: got 'none', expected one of"),
    (["--contestant", "a=shapes-flow,stesp=3"], "did you mean 'steps'?"),
    (["--contestant", "a=shapes-flow,steps=3.5"], "steps: got '3.5', expected a whole number"),
    (["--contestant", "a=shapes-flow,steps=0"], "steps: got 0, expected >= 1"),
    (["--contestant", "a=shapes-flow,steps=2,steps=3"], "steps: got it twice"),
    (["--contestant", "a=shapes-flow,guidance=nan"], "guidance: got 'nan', expected a finite number"),
    (["--contestant", "a=shapes-flow,strength=0.5"], "strength: got 0.5 without lora=FOLDER"),
    (["--contestant", "a=shapes-flow,lora=none,strength=1.5"], "strength: got 1.5, expected within [0, 1]"),
    (["--contestant", "a=shapes-flow,lora=none"], "lora: got 'none', which holds no .safetensors file"),
    (["--contestant", "a=shapes-flow,lora="], "lora: got '', expected a value"),
    (["--contestant", "a=shapes-flow,transition=odd"], "transition: got 'odd'"),
    (["--contestant", "a=shapes-flow,budget=50"], "budget: got 50 without search=METHOD"),
    (["--contestant", "a=shapes-flow,search=dts_sta,budget=50"], "did you mean 'dts-star'?"),
    (["--contestant", "a=shapes-flow,search=dts"], "budget: got none with a search"),
    (["--contestant", "a=shapes-flow,search=dts,budget=9"], "budget: got 9 denoiser calls, expected >= 10"),
    (["--contestant", "a=shapes-flow,search=dts,budget=50,tlit=2"], "did you mean 'tilt'?"),
    (["--contestant", "a=shapes-flow,search=dts,budget=50,tilt=high"], "tilt: got 'high'"),
    (["--contestant", "a=shapes-flow,search=dts,budget=50,folder=x"], "folder: got one, expected none"),
    (["--contestant", "a=shapes-flow,search=dts,budget=50,transition=ode"], "transition: got 'ode', expected one that"),
    (["--contestant", "a=shapes-flow,search=dts,budget=50,reward=golden"], "did you mean 'gold'?"),
    (["--contestant", "base=shapes-flow"], "contestant: got the label 'base' twice"),
    (["--reward", "golden"], "did you mean 'gold'?"),
    (["--reward", "gold", "--reward", "gold:1"], "reward: got the label 'gold' twice"),
    (["--prompts", "none.txt"], "prompts: got 'none.txt', which does not exist, expected a text file, or a number of"),
    (["--prompts", "0"], "prompts: got '0', expected at least one"),
    (["--prompts", "words.txt"], "reward: got none, expected at least one"),
    (["--no-gold"], "reward: got none, expected at least one"),
    (["--seeds", "0"], "seeds: got 0"),
    (["--seed", "-1"], "seed: got -1"),
    (["--batch-size", "0"], "batch_size: got 0"),
    (["--out", "words.txt"], "out: got 'words.txt', a file"),
    (["--reward", "vendi"], "reward: got 'vendi', which is setwise"),
    (["--contestant", "a=shapes-flow,search=reno,budget=50,reward=gold"], "got 'gold', which has no gradient"),
]


@pytest.mark.parametrize("argv, message", WRONG, ids=lambda v: " ".join(v) if isinstance(v, list) else "")
def test_mistakes_are_one_line_and_leave_nothing(capsys, tmp_path, monkeypatch, argv, message):
    monkeypatch.setattr("visalign.pipeline.generator.Generator.from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "words.txt").write_text("a dog\n")
    with pytest.raises(SystemExit) as caught:
        cli.main(["eval", "--contestant", "base=shapes-flow", "--prompts", "2", *argv])
    error = capsys.readouterr().err
    assert caught.value.code == 2 and error.startswith("visalign eval: ") and error.count("\n") == 1, error
    assert message in error
    assert [p.name for p in tmp_path.iterdir()] == ["words.txt"]


def test_what_decides_the_pictures_is_in_their_name_and_the_label_is_not(tmp_path):
    def key(text: str) -> str:
        return make_plan([text], "2", ["clip_match"], tmp_path).keys[0]

    assert key("a=shapes-flow") == key("b=shapes-flow")
    texts = ["", ",steps=4", ",guidance=2", ",transition=flow_ddim", ",search=dts,budget=20", ",search=dts,budget=30"]
    texts += [",search=dts,budget=20,tilt=3", ",search=dts,budget=20,reward=gold", ",search=dts-star,budget=20"]
    assert len({key(f"a=shapes-flow{text}") for text in texts}) == len(texts)


def test_a_reward_or_a_folder_that_changes_has_another_name(tmp_path):
    def columns():
        return {c.label: c.key for c in make_plan(["a=shapes-flow"], "2", [f"my={file}:brightness"], tmp_path).columns}

    file = tmp_path / "reward.py"
    file.write_text(REWARD)
    before, digest = columns(), path_digest(tmp_path)
    file.write_text(REWARD.replace("mean", "amax"))
    after = columns()
    assert list(before) == ["my", "gold_strict"] and before["gold_strict"] == after["gold_strict"]
    assert before["my"] != after["my"] and digest != path_digest(tmp_path)


def test_equal_prompts_are_different_pictures_and_sets_may_grow(tmp_path):
    (tmp_path / "few.txt").write_text("a dog\na dog\n")
    (tmp_path / "more.txt").write_text("a cat\na dog\na dog\n")
    few, more = (
        make_plan(["a=shapes-flow"], str(tmp_path / name), ["clip"], tmp_path, seeds=2).tasks
        for name in ("few.txt", "more.txt")
    )
    assert len({task.name for task in few}) == 4 and len({task.chain_seed for task in few}) == 4
    assert [task.name for task in few] == [task.name for task in more[2:]]


def picture(value: int, side: int = 8) -> np.ndarray:
    return np.full((side, side, 3), value, np.uint8)


def keep(store: Store, names, pictures, key="k"):
    store.keep(key, names, pictures, [1] * len(names), 1.0, [{"prompt": "é"}] * len(names))


def test_a_line_cut_short_by_a_kill_is_no_picture_and_spoils_no_other(tmp_path):
    keep(Store(tmp_path), ["one"], [picture(1)])
    file = tmp_path / "pictures" / "k" / "drawn-0.jsonl"
    whole = file.read_text()
    keep(Store(tmp_path), ["two"], [picture(2)])
    file.write_text(file.read_text()[:-9])
    assert set(Store(tmp_path).drawn("k")) == {"one"}
    keep(Store(tmp_path), ["three"], [picture(3)])
    assert set(Store(tmp_path).drawn("k")) == {"one", "three"} and file.read_text().startswith(whole)


def test_what_failed_is_kept_with_its_reason_until_it_succeeds(tmp_path):
    keep(Store(tmp_path), ["one", "two"], ["no light", picture(2)])
    assert Store(tmp_path).drawn("k")["one"].why == "no light"
    keep(Store(tmp_path, 1), ["one"], [picture(1)])
    assert Store(tmp_path).drawn("k")["one"].file
    for process, told in ((0, {"score": None, "why": "dark"}), (1, {"score": 1.0}), (2, {"score": None, "why": "x"})):
        Store(tmp_path, process).keep_scores("r", {("p", "a dog"): told})
    assert Store(tmp_path).scores("r") == {("p", "a dog"): {"score": 1.0}}


def test_a_picture_that_is_gone_is_drawn_again_and_one_that_changed_is_refused(tmp_path):
    store = Store(tmp_path)
    keep(store, ["one", "two"], [picture(1), picture(2)])
    drawn = store.drawn("k")
    assert (store.picture(drawn["one"]) == 1).all()
    (tmp_path / drawn["one"].file).write_bytes((tmp_path / drawn["two"].file).read_bytes())
    with pytest.raises(ValueError, match="has changed since it was drawn; delete it"):
        store.picture(drawn["one"])
    (tmp_path / drawn["one"].file).write_bytes(b"")
    with pytest.raises(ValueError, match="could not read"):
        store.picture(drawn["one"])
    (tmp_path / drawn["one"].file).unlink()
    assert set(store.drawn("k")) == {"two"}


def test_equal_pictures_are_scored_once_and_batches_hold_one_size(tmp_path):
    (tmp_path / "p.txt").write_text("a dog\na cat\n")
    contestants = ["a=shapes-flow", "b=shapes-flow,steps=3"]
    plan = make_plan(contestants, str(tmp_path / "p.txt"), ["clip"], tmp_path, seeds=2, batch_size=5)
    names = [task.name for task in plan.tasks]
    keep(Store(tmp_path), names, [picture(1), picture(2), picture(1), "no light"], plan.keys[0])
    keep(Store(tmp_path), names, [picture(1), picture(2, 9), picture(3, 9), picture(4)], plan.keys[1])
    batches = missing_batches(plan, Store(tmp_path))
    assert [len(batch.pictures) for batch in batches] == [3, 2, 1]  # 8 = one that failed, one that both drew, 6
    assert [{drawn.size for _, drawn in batch.pictures} for batch in batches] == [{(8, 8)}, {(9, 9)}, {(8, 8)}]
    for batch in batches[:2]:
        Store(tmp_path).keep_scores(plan.columns[0].key, {key: {"score": 1.0} for key, _ in batch.pictures})
    assert missing_batches(plan, Store(tmp_path)) == batches[2:]
    assert json.dumps([key for key, _ in batches[0].pictures])


def test_no_table_is_made_of_less_than_every_picture_and_score(tmp_path):
    (tmp_path / "p.txt").write_text("a dog\na cat\n")
    plan = make_plan(["a=shapes-flow"], str(tmp_path / "p.txt"), ["clip"], tmp_path)
    keep(Store(tmp_path), [plan.tasks[0].name], [picture(1)], plan.keys[0])
    with pytest.raises(ValueError, match="out: 2 pictures or scores of other processes are missing"):
        collect(plan, Store(tmp_path))  # one picture, and the score of the other
