"""The `visalign` command, in this process."""

import pytest
from PIL import Image, ImageChops

from visalign.commands import cli
from visalign.trainers.flow_grpo import Config, main
from visalign.worlds import MODELS
from visalign.worlds.shapes import world_prompts
from visalign.worlds.shapes.captions import parse


def refused(capsys, *argv):
    with pytest.raises(SystemExit) as caught:
        cli.main([str(a) for a in argv])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "Traceback" not in error
    return error


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert all(name in out for name in ("train", "doctor", "generate", "score", "eval", "demo", "world"))
    with pytest.raises(SystemExit) as caught:
        cli.main([])
    assert caught.value.code == 2


def test_generate_draws_the_same_picture_for_the_same_seed_and_writes_png(capsys, tmp_path):
    argv = ["generate", "a red circle", "a blue star", "--steps", "2", "--count", "2", "--seed", "5", "--out"]
    cli.main([*argv, str(tmp_path / "a")])
    printed = capsys.readouterr().out.split()
    names = ["0000-seed5.png", "0001-seed6.png", "0002-seed5.png", "0003-seed6.png"]
    assert [p.rpartition("/")[2] for p in printed] == names == sorted(p.name for p in (tmp_path / "a").iterdir())
    assert Image.open(tmp_path / "a" / names[0]).size == (64, 64)
    cli.main(["generate", "a red circle", "--steps", "2", "--seed", "6", "--out", str(tmp_path / "b")])
    alone, batched = (
        Image.open(f).convert("RGB") for f in (tmp_path / "b" / "0000-seed6.png", tmp_path / "a" / names[1])
    )
    assert max(high for _, high in ImageChops.difference(alone, batched).getextrema()) <= 1
    other = ImageChops.difference(alone, Image.open(tmp_path / "a" / names[0]).convert("RGB"))
    assert max(high for _, high in other.getextrema()) > 50


def test_a_run_can_be_trained_and_its_lora_drawn_with(capsys, options, tmp_path):
    run = tmp_path / "run"
    given = {**options, "steps": 1, "learning_rate": 0.05, "run_dir": run}
    cli.main(["train", "flow_grpo", *(f"--{k}={v}" for k, v in given.items())])
    for name, lora in (("with", ["--lora", str(run / "lora")]), ("without", [])):
        cli.main(["generate", "a red circle", "--steps", "2", "--out", str(tmp_path / name), *lora])
    pictures = [(tmp_path / name / "0000-seed0.png").read_bytes() for name in ("with", "without")]
    assert pictures[0] != pictures[1]


SEARCH = ["generate", "x", "--search", "best-of-n", "--reward", "gold"]


@pytest.mark.parametrize(
    "argv, message",
    [
        (["generate", "x", "--model", "none"], f"generate: model: got 'none', expected one of {sorted(MODELS)}"),
        (["generate", ""], "prompt: got an empty one"),
        (["generate", "x", "--guidance", "nan"], "guidance: got nan, expected a finite number"),
        (["generate", "x", "--steps", "0"], "steps: got 0, expected 1 .. 1000"),
        ([*SEARCH, "--option", "batch_size=4"], "option of 'best-of-n': got 'batch_size', expected one of"),
        ([*SEARCH, "--option", "out=x"], "option of 'best-of-n': got 'out'"),
        ([*SEARCH, "--option", "context=5"], "option of 'best-of-n': got 'context'"),
        ([*SEARCH, "--option", "inputs=[1]"], "option of 'best-of-n': got 'inputs'"),
        ([*SEARCH, "--option", "ensemble=maybe"], "ensemble: got 'maybe', expected bool"),
        (["serve", "--reward", "gold", "--port", "99999"], "port: got 99999, expected 0 .. 65535"),
        (["score", "x.eps", "--prompt", "x", "--reward", "gold"], "images: x.eps: there is no such file"),
        (["demo", "--out", "/proc/none/there"], "out: got '/proc/none/there', which cannot be written"),
        (["generate", "x", "--count", "0"], "count: got 0, expected >= 1"),
        (["generate", "x", "--lora", "none"], "lora: got 'none', which holds no .safetensors file"),
        (["generate", "x", "--out", "file"], "out: got 'file', a file, expected a folder"),
        (["generate", "x", "--budget", "9"], "budget: got 9 without --search"),
        (["generate", "x", "--search", "best-of-n"], "reward: got none, expected what the search is for"),
        (["generate", "x", "--search", "best", "--reward", "gold"], "search: got 'best', expected one of ['best-of-n'"),
        (["generate", "x", "--search", "best-of-n", "--reward", "gold", "--count", "2"], "count: got 2 with --search"),
        (["generate", "x", "--search", "best-of-n", "--reward", "gold", "--budget", "0"], "budget: got 0"),
        (["generate", "x", "--reward", "golden"], "did you mean 'gold'?"),
        (["generate", "x", "--batch-size", "0"], "batch_size: got 0"),
        (["generate", "x", "--option", "tilt"], "option: got 'tilt', expected NAME=VALUE"),
        (["score", "none.png", "--prompt", "x", "--reward", "gold"], "none.png"),
        (["score", "file", "--prompt", "x", "--reward", "gold"], "images: file: is no picture of PNG"),
        (["score", "file", "--prompt", "x", "--reward", "golden"], "did you mean 'gold'?"),
        (["demo", "--host", "0.0.0.0"], "demo: user: got none with --host 0.0.0.0, expected --user"),
        (["demo", "--out", "file"], "out: got 'file', a file, expected a folder"),
        (["world", "build"], "'build' takes one of vae, clip, flow"),
        (["world", "show", "vae"], "the other actions take none"),
        (["world", "prompts", "--count", "0"], "count: got 0"),
        (["train", "flow_grp"], "visalign train: trainer: got 'flow_grp', expected one of ['adjoint_matching', "),
        (["train", "--stps", "3"], "did you mean 'steps'?"),
        (["doctor", "--group_size", "1"], "visalign doctor: group_size: got 1"),
        (["doctor", "--prompts", "none.txt"], "visalign doctor: prompts: got 'none.txt', which does not exist"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_mistakes_are_one_line_and_leave_nothing(capsys, tmp_path, monkeypatch, argv, message):
    monkeypatch.setattr("visalign.pipeline.generator.Generator.from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("no picture")
    assert message in refused(capsys, *argv)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_picture_that_cannot_be_scored_gets_no_number(capsys, tmp_path):
    (tmp_path / "picky.py").write_text(
        "from visalign.rewards import RewardOutput\n"
        "def picky(images):\n"
        "    values = images.mean(dim=(1, 2, 3))\n"
        "    return RewardOutput(values, valid=values < 0.9, rationale=['too bright' for _ in values])\n"
    )
    for name, shade in (("white", 255), ("grey", 51)):
        Image.new("RGB", (64, 64), (shade,) * 3).save(tmp_path / f"{name}.png")
    paths = [str(tmp_path / "white.png"), str(tmp_path / "grey.png")]
    cli.main(["score", *paths, "--prompt", "x", "--reward", f"{tmp_path / 'picky.py'}:picky"])
    white, grey = capsys.readouterr().out.splitlines()
    assert white.endswith("no score (picky: too bright)") and grey.endswith("0.2000")


def test_score_reads_pictures_and_says_each_part(capsys, tmp_path):
    cli.main(["world", "show", "--count", "2", "--out", str(tmp_path)])
    Image.new("RGB", (64, 64), "white").save(tmp_path / "white.png")
    capsys.readouterr()
    paths = [str(tmp_path / "white.png"), str(tmp_path / "scenes.png")]
    cli.main(["score", *paths, "--prompt", "a red circle", "--reward", "jpeg_compressibility"])
    white, scenes = (line.split() for line in capsys.readouterr().out.splitlines())
    assert [white[0], scenes[0]] == paths and float(white[1]) > float(scenes[1])
    cli.main(["score", paths[0], "--prompt", "a red circle", "--reward", "gold:1+jpeg_compressibility:0.5"])
    (line,) = capsys.readouterr().out.splitlines()
    total, gold, jpeg = (
        float(x.strip("()")) for x in line.split() if x.strip("()").replace("-", "").replace(".", "").isdigit()
    )
    assert gold == 0 and total == pytest.approx(0.5 * jpeg, abs=1e-3)


def test_world_prints_prompts_and_draws_scenes(capsys, tmp_path):
    cli.main(["world", "prompts", "--split", "compositional", "--count", "6"])
    prompts = capsys.readouterr().out.splitlines()
    assert prompts == world_prompts("compositional", 6) and all(parse(p).split() == "compositional" for p in prompts)
    cli.main(["world", "show", "--count", "9", "--out", str(tmp_path / "w")])
    assert (tmp_path / "w" / "scenes.txt").read_text().splitlines() == world_prompts("test", 9)
    assert Image.open(tmp_path / "w" / "scenes.png").width > 8 * 128


def test_the_card_is_printed(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("visalign.worlds.shapes.WEIGHTS", tmp_path)
    (tmp_path / "CARD.md").write_text("# Card")
    cli.main(["world", "card"])
    assert capsys.readouterr().out == "# Card\n"
    (tmp_path / "CARD.md").unlink()
    assert "CARD.md" in refused(capsys, "world", "card")


def examined(capsys, options, **changes):
    with pytest.raises(SystemExit) as caught:
        cli.main(["doctor", *(f"--{k}={v}" for k, v in {**options, **changes}.items())])
    lines = capsys.readouterr().out.splitlines()
    return caught.value.code, {line[5:].partition(":")[0]: line for line in lines}


def test_the_doctor_finds_nothing_wrong_with_a_sound_training_and_writes_nothing(
    capsys, options, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    code, findings = examined(capsys, options)
    assert code == 0 and list(findings) == ["prompts", "ratio", "KL gradient", "reward", "images", "memory", "disk"]
    assert all(line.startswith("ok ") for line in findings.values())
    assert "differs from 1 by at most 0.0e+00 over 4 steps" in findings["ratio"]
    assert not list(tmp_path.iterdir())


def test_the_doctor_finds_shared_prompts_and_a_reward_that_depends_on_its_batch(capsys, options, tmp_path):
    (tmp_path / "ranks.py").write_text("def ranks(images):\n    return images.flatten(1).mean(1) - images.mean()\n")
    changes = dict(eval_prompts=options["prompts"], reward=f"{tmp_path}/ranks.py:ranks", group_size=4, batch_size=4)
    code, findings = examined(capsys, options, **changes)
    assert code == 1
    assert {name for name, line in findings.items() if line.startswith("BAD")} == {"prompts", "reward"}


def test_the_doctor_takes_the_options_of_a_training(capsys, options, tmp_path):
    folder = main(Config(**{**options, "steps": 1, "run_dir": str(tmp_path / "run"), "sampler": "cps", "eta": 0.8}))
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        cli.main(["doctor", "flow_grpo", "--config", str(folder / "config.yaml")])
    assert caught.value.code == 0 and "over 3 steps" in capsys.readouterr().out
