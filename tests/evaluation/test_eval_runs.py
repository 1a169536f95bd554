"""Whole evaluations on the shipped model: pairing, LoRA strength, resuming after a kill, processes, failing rewards."""

import html
import json
import multiprocessing
import os
import re
import signal
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from visalign.commands import cli
from visalign.images import pil_to_images
from visalign.pipeline.generator import Generator
from visalign.rewards import make_reward, score
from visalign.training.policy import Policy
from visalign.worlds import resolve_model

PROMPTS = ["a red circle", "two blue squares", "a red circle"]
SETTINGS = ["--seeds", "2", "--batch-size", "4", "--device", "cpu"]


@pytest.fixture(scope="module")
def files(tmp_path_factory, world_files) -> Path:
    """A folder with prompts.txt and a LoRA that changes the pictures."""
    folder = tmp_path_factory.mktemp("eval")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    policy = Policy(Generator.from_pretrained(resolve_model("shapes-flow"), num_steps=2), 2, 2)
    random = torch.Generator().manual_seed(0)
    values = {
        name: 0.1 * torch.randn(value.shape, generator=random) for name, value in sorted(policy.tensors().items())
    }
    policy.export(folder / "run" / "lora", values)
    (folder / "run" / "config.yaml").write_text(f"reward: {world_files / 'reward.py'}:brightness\n")
    return folder


@pytest.fixture(scope="module")
def argv(files, world_files) -> list[str]:
    model, lora = "shapes-flow,steps=2", f"lora={files / 'run' / 'lora'}"
    contestants = {
        "base": model,
        "off": f"{model},{lora},strength=0",
        "half": f"{model},{lora},strength=0.5",
        "tuned": f"{model},{lora}",
        "first": f"{model},search=best-of-n,budget=2,transition=ode,reward=jpeg_compressibility",
        "best": f"{model},search=best-of-n,budget=8,transition=ode",
    }
    rewards = ["--reward", f"{world_files / 'reward.py'}:brightness", "--reward", "clip:0.7+jpeg_compressibility:0.1"]
    told = [word for label, text in contestants.items() for word in ("--contestant", f"{label}={text}")]
    return ["eval", *told, *rewards, "--prompts", str(files / "prompts.txt"), *SETTINGS]


@pytest.fixture(scope="module")
def finished(argv, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "out"
    cli.main([*argv, "--out", str(out)])
    return out


def record(out: Path) -> dict:
    return json.loads((out / "eval.json").read_text())


def rows(out: Path) -> dict:
    """Lines of pictures by (contestant, prompt, seed)."""
    return {(line["contestant"], line["prompt"], line["seed"]): line for line in record(out)["pictures"]}


def pair(out: Path, contestant: str, against: str, reward: str = "brightness") -> dict:
    wanted = (contestant, against, reward)
    [found] = [p for p in record(out)["pairs"] if (p["contestant"], p["against"], p["reward"]) == wanted]
    return found


def test_every_contestant_has_a_score_for_every_prompt_and_seed_by_every_reward(finished):
    told, lines = record(finished), rows(finished)
    assert [r["label"] for r in told["rewards"]] == ["brightness", "clip:0.7+jpeg_compressibility:0.1", "gold_strict"]
    assert len(lines) == len(told["pictures"]) == 6 * 3 * 2
    assert all(isinstance(s, float) for line in lines.values() for s in line["scores"].values())
    assert all(line["clip:0.7+jpeg_compressibility:0.1_clip"] for line in lines.values())
    assert len(told["table"]) == 6 * 3 and all(entry["scored"] == 6 for entry in told["table"])
    assert len(told["pairs"]) == 15 * 3 and all(p["wins"] + p["ties"] + p["losses"] == 6 for p in told["pairs"])


def test_scores_are_those_of_the_pictures_in_their_files(finished, world_files):
    reward = make_reward(f"{world_files / 'reward.py'}:brightness")
    for line in rows(finished).values():
        with Image.open(finished / line["file"]) as image:
            assert image.text["prompt"] == PROMPTS[line["prompt"]]
            pixels = pil_to_images([image])
        assert float(score(reward, pixels, [""]).total[0]) == pytest.approx(line["scores"]["brightness"], abs=1e-6)


def test_a_plain_draw_is_the_first_sample_of_a_search_with_its_seed(finished):
    lines = rows(finished)
    for p in range(3):
        for seed in (0, 1):
            plain, first = (
                np.asarray(Image.open(finished / lines[name, p, seed]["file"])).astype(int)
                for name in ("base", "first")
            )
            assert abs(plain - first).max() <= 1  # rounding: they are drawn in batches of other sizes
            assert (
                lines["best", p, seed]["scores"]["brightness"] >= lines["base", p, seed]["scores"]["brightness"] - 1e-3
            )
    assert pair(finished, "best", "base")["difference"]["mean"] > 0 and pair(finished, "best", "base")["wins"] > 0
    assert lines["base", 0, 0]["nfe"] == 2 and lines["best", 0, 0]["nfe"] == 8


def test_equal_prompts_are_drawn_from_different_noise(finished):
    lines = rows(finished)
    assert lines["base", 0, 0]["scores"] != lines["base", 2, 0]["scores"]


def test_strength_0_is_the_model_itself_and_more_of_it_is_further_away(finished):
    off = pair(finished, "off", "base")
    assert (off["ties"], off["win_rate"]["mean"], off["difference"]["mean"]) == (6, 0.5, 0.0)
    lines = rows(finished)

    def away(name: str) -> float:
        shots = [np.asarray(Image.open(finished / lines[n, 0, 0]["file"])).astype(float) for n in (name, "base")]
        return float(abs(shots[0] - shots[1]).mean())

    assert away("off") == 0 < away("half") < away("tuned")


def test_contestants_made_for_a_reward_are_marked(finished):
    marked = {(e["contestant"], e["reward"]) for e in record(finished)["table"] if e["optimised_for"]}
    sum_label = "clip:0.7+jpeg_compressibility:0.1"
    assert marked == {(name, "brightness") for name in ("off", "half", "tuned", "best")} | {("first", sum_label)}


def test_the_report_holds_all_it_shows_and_links_to_pictures_that_are_there(finished):
    page = (finished / "report.html").read_text()
    assert "<script" not in page and not re.findall(r"(?:src|href)=[\"'](?:https?:|//)", page)
    assert all(source.startswith("data:image/") for source in re.findall(r"src=[\"']([^\"']+)", page))
    links = re.findall(r"<a href='([^']+)'", page)
    assert len(links) > 20 and all((finished / html.unescape(link)).is_file() for link in links)
    assert "6 contestants, 3 prompts, 2 seeds" in page and "ties half" in page and "3 prompts are few" in page
    assert page.count(">best wins<") == page.count(">worst losses<") == 15 * 3


def test_what_is_there_is_not_made_again_and_a_new_reward_draws_nothing(
    finished, argv, tmp_path, world_files, monkeypatch
):
    monkeypatch.setenv("TEST_SCORES", str(tmp_path / "asked"))
    before = record(finished)
    monkeypatch.setattr(Generator, "from_pretrained", lambda *_, **__: pytest.fail("the model was loaded"))
    cli.main([*argv, "--out", str(finished)])
    assert record(finished) == before and not (tmp_path / "asked").exists()
    again = ["jpeg_compressibility" if w == "clip:0.7+jpeg_compressibility:0.1" else w for w in argv]
    cli.main([*again, "--out", str(finished)])
    assert all("jpeg_compressibility" in line["scores"] for line in rows(finished).values())
    cli.main([*argv, "--out", str(finished)])


def in_processes(argv: list[str], count: int = 1, **environment: str) -> list[int | None]:
    """The exit codes of so many processes that run the command together."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1"}
    context = multiprocessing.get_context("fork")
    started = []
    for rank in range(count):
        told = {**environment, **(world if count > 1 else {}), "MASTER_PORT": str(port)}
        told |= {"RANK": str(rank), "LOCAL_RANK": str(rank)} if count > 1 else {}
        started.append(context.Process(target=one_process, args=(argv, told)))
        started[-1].start()
    for process in started:
        process.join(300)
        if process.is_alive():
            process.kill()
            process.join()
    return [process.exitcode for process in started]


def one_process(argv: list[str], environment: dict[str, str]) -> None:
    from accelerate.state import AcceleratorState

    os.environ |= environment
    AcceleratorState._reset_state(reset_partial_state=True)
    cli.main(argv)


def scores(out: Path) -> dict:
    return {key: line["scores"] for key, line in rows(out).items()}


def pixels(out: Path) -> dict:
    return {str(path.relative_to(out)): np.asarray(Image.open(path)).tobytes() for path in out.rglob("*.png")}


def test_killed_and_continued_on_two_processes_is_the_unbroken_run(finished, argv, tmp_path):
    """The reward of the first search's pictures kills the process at the third; then two processes go on."""
    out = tmp_path / "out"
    codes = in_processes([*argv, "--out", str(out)], TEST_KILL_AT="3")
    assert codes == [-signal.SIGKILL] and not (out / "eval.json").exists()
    there = {path: path.stat().st_mtime_ns for path in out.rglob("*.png")}
    assert len(there) == 6 + 6 + 2  # the model without the LoRA is done first
    assert in_processes([*argv, "--out", str(out)], 2) == [0, 0]
    finished_before = [path for path, made in there.items() if path.stat().st_mtime_ns == made]
    assert len(finished_before) == len(there)  # not drawn again
    assert len(list(out.rglob("drawn-1.jsonl"))) > 0 and len(list(out.rglob("scores/*-1.jsonl"))) > 0
    assert pixels(out) == pixels(finished)
    ours, theirs = scores(out), scores(finished)
    assert ours.keys() == theirs.keys()
    for key, found in ours.items():  # the CLIP remembers a prompt as of the batch it first met it in
        assert found == pytest.approx(theirs[key], abs=1e-6)
    for one, other in zip(record(out)["pairs"], record(finished)["pairs"], strict=True):
        assert [one[k] for k in ("wins", "ties", "losses")] == [other[k] for k in ("wins", "ties", "losses")]
        assert one["difference"] == pytest.approx(other["difference"], abs=1e-6)


LAMP = """
import torch


def lamp(images, prompts, context):
    bad = [m.get("bad", "") for m in context["metadata"]]
    if "raise" in bad:
        raise RuntimeError("the lamp is broken")
    light = images.mean((1, 2, 3))
    return torch.where(torch.tensor([word == "nan" for word in bad]), torch.nan, light)


lamp.needs = ("prompts", "metadata")
"""


def test_a_reward_that_fails_on_some_pictures_costs_only_those_scores(tmp_path, capsys):
    (tmp_path / "lamp.py").write_text(LAMP)
    told = [("a red circle", ""), ("<b>a blue star</b>", "nan"), ("a yellow star", "raise"), ("a green square", "")]
    lines = [json.dumps({"prompt": prompt, "metadata": {"bad": bad}}) for prompt, bad in told]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    contestants = ["base=shapes-flow,steps=1", "best=shapes-flow,steps=1,search=best-of-n,budget=2"]
    argv = [word for text in contestants for word in ("--contestant", text)]
    argv += ["--reward", f"{tmp_path / 'lamp.py'}:lamp", "--reward", "jpeg_compressibility"]
    argv += ["--prompts", str(tmp_path / "prompts.jsonl"), "--device", "cpu", "--out", str(tmp_path / "out")]
    cli.main(["eval", *argv])
    found, said = rows(tmp_path / "out"), capsys.readouterr().out
    base = [found["base", p, 0] for p in range(4)]
    assert [line["scores"]["lamp"] is None for line in base] == [False, True, True, False]
    assert "got nan" in base[1]["lamp_why"] and "the lamp is broken" in base[2]["lamp_why"]
    assert all(line["scores"]["jpeg_compressibility"] is not None for line in base)
    best = [found["best", p, 0] for p in range(4)]
    assert [line["file"] is None for line in best] == [False, True, True, False]  # it was searched for
    assert "the lamp is broken" in best[2]["why"]
    compared = record(tmp_path / "out")["pairs"]
    assert [p["prompts"] for p in compared] == [2, 2]
    notes = record(tmp_path / "out")["notes"]
    assert "best: 2 pictures could not be drawn" in notes[0] and "lamp: 2 of 6 pictures have no score" in notes[1]
    assert all(f"note: {note}" in said for note in notes)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<b>a blue" not in page and "&lt;b&gt;a blue" in page


def test_a_picture_that_is_no_numbers_is_said_to_have_failed(tmp_path, monkeypatch):
    from visalign.evaluation import drawing

    real = drawing.plain

    def broken(generator, tasks, transition):
        images = real(generator, tasks, transition)
        images[1] = torch.nan
        return images

    monkeypatch.setattr(drawing, "plain", broken)
    argv = ["--prompts", "2", "--reward", "jpeg_compressibility", "--device", "cpu", "--out", str(tmp_path / "out")]
    cli.main(["eval", "--contestant", "base=shapes-flow,steps=1", *argv])
    found = rows(tmp_path / "out")
    assert found["base", 0, 0]["scores"]["gold_strict"] is not None and found["base", 0, 0]["file"]
    assert found["base", 1, 0]["scores"]["gold_strict"] is None and "nan" in found["base", 1, 0]["why"]
    monkeypatch.setattr(drawing, "plain", real)
    cli.main(["eval", "--contestant", "base=shapes-flow,steps=1", *argv])
    assert rows(tmp_path / "out")["base", 1, 0]["file"]
