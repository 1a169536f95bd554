"""Searches as a user runs them: files, progress, being stopped, refusals, the same pictures from the library."""

import json
import os
import signal

import numpy as np
import pytest
import torch
from PIL import Image

from visalign.commands import cli
from visalign.images import images_to_pil
from visalign.pipeline.generator import Generator
from visalign.rewards import make_reward, score
from visalign.search import METHODS, events_of, prepare, run
from visalign.search.session import search_prompts
from visalign.transitions import ode_of
from visalign.worlds import resolve_model

PROMPT = "two blue squares"


def redness(images, prompts):
    return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))


@pytest.fixture(scope="module")
def generator():
    return Generator.from_pretrained(resolve_model("shapes-flow"), num_steps=2)


def test_the_command_names_every_method():
    for name, method in METHODS.items():
        assert method.summary and method.search.__doc__, name


def test_a_search_writes_its_picture_its_costs_and_its_curve(capsys, tmp_path, generator):
    argv = ["generate", PROMPT, "a red circle", "--search", "best-of-n", "--reward", "clip_match", "--budget", "9"]
    cli.main([*argv, "--seed", "7", "--steps", "2", "--out", str(tmp_path)])
    told = json.loads((tmp_path / "search.json").read_text())
    assert {p.name for p in tmp_path.iterdir()} == {"0000-best.png", "0001-best.png", "search.json", "search.png"}
    first, second = told["searches"]
    assert (told["method"], told["seed"], told["budget"], told["reward"]) == ("best-of-n", 7, 9, "clip_match")
    assert first["ledger"]["nfe"] == first["ledger"]["forwards"] == 8 and first["ledger"]["rewards"] == 4
    assert second["prompt"] == "a red circle" and first["best"]["file"] == "0000-best.png"
    assert np.asarray(Image.open(tmp_path / "search.png")).std() > 5  # something is drawn
    reward = make_reward("clip_match")
    *_, last = run(generator, PROMPT, reward, budget=9, seed=7)
    assert first["best"]["reward"] == pytest.approx(last.best.reward, abs=1e-6)
    assert images_to_pil(last.best.image)[0].tobytes() == Image.open(tmp_path / "0000-best.png").tobytes()
    assert float(score(reward, last.best.image, [PROMPT]).total[0]) == pytest.approx(last.best.reward, abs=1e-4)
    line = capsys.readouterr().out.splitlines()[0]
    assert line.endswith("(8 denoiser calls)") and f"{last.best.reward:.4f}" in line


def test_ctrl_c_gives_the_best_so_far_and_leaves_out_the_rest(capsys, tmp_path, generator):
    seen = []

    def pressed(images, prompts):
        seen.append(len(images))
        if len(seen) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return redness(images, prompts)

    options, before = dict(budget=400, seed=0, batch_size=2), signal.getsignal(signal.SIGINT)
    search_prompts(generator, [PROMPT, "a red circle"], pressed, "best-of-n", tmp_path, {}, **options)
    told = json.loads((tmp_path / "search.json").read_text())["searches"]
    assert len(told) == 1 and told[0]["stopped"] and told[0]["ledger"]["nfe"] == 8 and sum(seen) == 4
    assert (tmp_path / "0000-best.png").is_file() and "stopped" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGINT) is before


def test_a_tree_is_drawn_and_goes_on_from_its_folder(capsys, tmp_path):
    argv = ["generate", PROMPT, "--search", "dts-star", "--reward", "clip_match", "--steps", "3"]
    argv += ["--option", f"folder={tmp_path / 'tree'}", "--out", str(tmp_path / "out"), "--budget"]
    cli.main([*argv, "12"])
    cli.main([*argv, "24"])
    told = json.loads((tmp_path / "out" / "search.json").read_text())["searches"][0]
    cli.main([*argv[:-5], "--out", str(tmp_path / "fresh"), "--budget", "24"])
    fresh = json.loads((tmp_path / "fresh" / "search.json").read_text())["searches"][0]
    assert told["best"] == fresh["best"] and told["ledger"]["nfe"] == fresh["ledger"]["nfe"] <= 24
    picture = np.asarray(Image.open(tmp_path / "out" / "0000-tree.png").convert("RGB"))
    assert picture.shape[1] > 600 and picture.std() > 5


def test_a_search_counts_both_branches_of_guidance_but_one_call():
    from visalign.search import prepare

    guided = Generator.from_pretrained(resolve_model("shapes-flow"), num_steps=2, guidance_scale=3.0)
    chain = prepare(guided, PROMPT, redness, budget=4)
    with chain.counted():
        chain.predict(chain.initial([0, 1]), 0)
    assert chain.ledger.nfe == 2 and chain.ledger.forwards == 4


def test_every_kind_of_model_can_be_searched_and_the_seed_decides(tmp_path):
    for name in ("shapes-diffusion", "shapes-consistency"):
        model = Generator.from_pretrained(resolve_model(name), num_steps=2)
        first, again, other = ([*run(model, PROMPT, redness, budget=8, seed=s)][-1].best for s in (0, 0, 1))
        assert torch.equal(first.image, again.image) and not torch.equal(first.image, other.image)


def test_what_goes_wrong_in_a_reward_is_said_and_what_was_found_stays(tmp_path, generator):
    calls = []

    def failing(images, prompts):
        calls.append(1)
        return redness(images, prompts) * (float("nan") if len(calls) == 3 else 1.0)

    with pytest.raises(ValueError, match="reward 'failing'"):
        search_prompts(generator, [PROMPT], failing, "best-of-n", tmp_path, {}, budget=40, batch_size=2)
    told = json.loads((tmp_path / "search.json").read_text())["searches"]
    assert told[0]["best"]["file"] == "0000-best.png" and told[0]["ledger"]["rewards"] == 4
    assert (tmp_path / "0000-best.png").is_file()


@pytest.mark.parametrize("method", ["best-of-n", "random", "zero-order"])
def test_the_best_noise_is_drawn_again_with_more_steps(method, capsys, tmp_path, generator):
    argv = ["generate", PROMPT, "--search", method, "--reward", "clip_match", "--budget", "15", "--transition", "ode"]
    cli.main([*argv, "--steps", "2", "--render-steps", "5", "--out", str(tmp_path)])
    told = json.loads((tmp_path / "search.json").read_text())
    (record,) = told["searches"]
    assert record["ledger"]["nfe"] == 10 and record["render"]["ledger"]["nfe"] == 5 and told["render_steps"] == 5
    *_, last = run(generator, PROMPT, make_reward("clip_match"), method, budget=10, transition="ode")
    assert record["best"]["reward"] == pytest.approx(last.best.reward, abs=1e-6)
    with Generator.from_pretrained(resolve_model("shapes-flow"), num_steps=5) as fine, torch.no_grad():
        fine.noise([PROMPT], [0])
        latents, ode = last.best.start, ode_of(fine.schedule)
        for i in range(5):
            latents = ode(fine.schedule, i, latents, fine.predict(latents, i, [PROMPT]))[0].mean
        image = fine.decode(latents, [PROMPT])
    assert images_to_pil(image)[0].tobytes() == Image.open(tmp_path / "0000-render.png").tobytes()
    wanted = float(score(make_reward("clip_match"), image, [PROMPT]).total[0])
    assert record["render"]["reward"] == pytest.approx(wanted, abs=1e-5)


def test_the_start_is_what_the_best_was_drawn_from(generator):
    chain = prepare(generator, PROMPT, redness, "zero-order", budget=24, transition="ode")
    for event in events_of(chain, "zero-order", {}):
        chain.ledger.nfe -= 2  # of this look
        again = chain.finish(event.best.start, 0, [0])
        assert torch.allclose(again, event.best.latents, atol=1e-5)


@pytest.mark.parametrize(
    "change, said",
    [
        (["--search", "fk"], "search: got 'fk' with render_steps, expected one of"),
        ([], "with render_steps, expected 'ode'"),
        (["--transition", "ode", "--render-steps", "2"], "render_steps: got 2, expected more than"),
        (["--budget", "4"], "render_steps: got 4, expected 1 .. 3, within the budget"),
        (["--render-steps", "0"], "render_steps: got 0, expected 1 .. 19"),
    ],
)
def test_what_cannot_be_drawn_again_is_refused_before_anything_is_spent(change, said, capsys, tmp_path):
    argv = ["generate", PROMPT, "--search", "best-of-n", "--reward", "clip_match", "--budget", "20", "--steps", "2"]
    with pytest.raises(SystemExit):
        cli.main([*argv, "--render-steps", "4", "--out", str(tmp_path), *change])
    assert said in " ".join(capsys.readouterr().err.split()) and not list(tmp_path.iterdir())
