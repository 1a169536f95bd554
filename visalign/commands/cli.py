"""The `visalign` command: train, generate, score, eval, serve, ... Heavy imports sit in the command using them."""

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from visalign.worlds import PARTS

TRAINERS = {
    "flow_grpo": "GRPO for flow-matching models (the default)",
    "ddpo": "DDPO, RLCM and TexForce for diffusion and consistency models",
    "adjoint_matching": "the base tilted by a differentiable reward, by regression on adjoints",
    "reward_backprop": "gradients of a differentiable reward: DRaFT, AlignProp, ReFL, SRPO and others",
    "vgpo": "a value for each denoising step",
    "tree_grpo": "images of a prompt branch: BranchGRPO, TreeGRPO, TempFlow-GRPO, TP-GRPO, B2-DiffuRL",
}
SEARCHES = (  # as `visalign.search.METHODS`, which takes seconds to import
    *("best-of-n", "random", "zero-order", "paths", "fk", "svdd", "dts", "dts-star", "rbf"),
    *("guidance", "tds", "das", "reno", "dno", "refine", "enhance"),
)


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command; a mistake in the options ends with one line on stderr and exit status 2."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["train"] or argv[:1] == ["doctor"]:  # these hand their options on
        return _train(argv[1:]) if argv[0] == "train" else _doctor(argv[1:])
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except (ValueError, OSError) as error:
        print(f"visalign {arguments.command}: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="visalign", description="Align image generators with visual rewards.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("train", help=f"train: visalign train [{'|'.join(TRAINERS)}] [options]; --help lists them")
    commands.add_parser("doctor", help="check a training before it costs anything: the same options as train")
    generate = commands.add_parser("generate", help="draw pictures")
    generate.add_argument("prompt", nargs="+", help="one or more prompts")
    generate.add_argument("--model", default="shapes-flow", help="a shipped model, a folder, or a hub id")
    generate.add_argument("--lora", help="a LoRA folder, e.g. runs/NAME/lora")
    generate.add_argument("--seed", type=int, default=0, help="seed of the first picture of each prompt")
    generate.add_argument("--count", type=int, default=1, help="pictures a prompt")
    generate.add_argument("--steps", type=int, help="denoising steps; default: the model's own")
    generate.add_argument("--guidance", type=float, help="guidance scale; default: the model's own")
    generate.add_argument("--device", default="cpu")
    generate.add_argument("--out", type=Path, default=Path("pictures"), help="folder for the PNG files")
    generate.add_argument("--reward", help="score the pictures: name, file.py:function, or a sum; what a search is for")
    generate.add_argument("--search", metavar="METHOD", help=f"search for the best picture: {', '.join(SEARCHES)}")
    generate.add_argument(
        "--budget", type=int, help="of a search: denoiser calls a prompt, never exceeded; default 500"
    )
    generate.add_argument("--render-steps", type=int, help="of a search: draw its best noise again in so many")
    generate.add_argument("--transition", help="of a search: its step; default: the model's with noise; ode for none")
    generate.add_argument("--batch-size", type=int, default=16, help="pictures at once; changes no result")
    generate.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="of a search; repeatable")
    generate.set_defaults(run=_generate)
    score = commands.add_parser("score", help="score picture files")
    score.add_argument("images", nargs="+", type=Path)
    score.add_argument("--prompt", required=True)
    score.add_argument("--reward", default="clip", help="name, file.py:function, or a sum such as clip:0.7+gold:0.3")
    score.set_defaults(run=_score)
    _add_eval(commands.add_parser("eval", help="compare models, LoRAs and searches: pictures, scores, who wins"))
    serve = commands.add_parser("serve", help="serve a reward over HTTP, for the reward remote:http://HOST:PORT")
    serve.add_argument("--reward", default="clip", help="as for score")
    serve.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="of the reward; repeatable")
    serve.add_argument("--host", default="127.0.0.1", help="address to listen at; others than loopback need a token")
    serve.add_argument("--port", type=int, default=8000, help="0 takes a free one")
    serve.add_argument("--token", help="that clients must send; better in VISALIGN_TOKEN, which other users cannot see")
    serve.add_argument("--max-bytes", type=int, default=256 * 2**20, help="largest request")
    serve.add_argument("--max-batch", type=int, default=64, help="pictures of several requests scored together")
    serve.set_defaults(run=_serve)
    demo = commands.add_parser("demo", help="the workbench in a browser: compare, search, score, collect preferences")
    _add_demo_options(demo)
    demo.set_defaults(run=_demo)
    rewards = commands.add_parser("rewards", help="what rewards there are, and what one of them is")
    rewards.add_argument("action", choices=("list", "show"))
    rewards.add_argument("name", nargs="?", help="for show")
    rewards.set_defaults(run=_rewards)
    world = commands.add_parser("world", help="the offline world: pictures, prompts, and building its models anew")
    world.add_argument("action", choices=("show", "prompts", "card", "build"))
    world.add_argument("part", nargs="?", choices=PARTS, help="for build")
    world.add_argument("--split", default="test", choices=("train", "test", "compositional"))
    world.add_argument("--count", type=int, default=32)
    world.add_argument("--out", type=Path, default=Path("world"), help="folder for the result")
    world.add_argument("--device", default="cpu", help="for build")
    world.add_argument("--steps", type=int, help="for build: training steps; default: those of the shipped model")
    world.set_defaults(run=_world)
    return parser


def _add_eval(parser: argparse.ArgumentParser) -> None:
    told = "LABEL=MODEL[,lora=FOLDER][,strength=0..1][,steps=N][,guidance=X][,transition=NAME]"
    told += "[,search=METHOD,budget=N[,reward=SPEC][,OPTION=VALUE...]]; repeatable"
    parser.add_argument(
        "--contestant", action="append", required=True, metavar="LABEL=MODEL[,NAME=VALUE...]", help=told
    )
    parser.add_argument("--prompts", default="50", help="a file, or a number of the world's test captions; default 50")
    parser.add_argument(
        "--reward", action="append", default=[], metavar="[LABEL=]SPEC", help="as for score; repeatable"
    )
    parser.add_argument(
        "--no-gold", action="store_true", help="without the exact judge, where all prompts are captions"
    )
    parser.add_argument("--seeds", type=int, default=1, help="pictures a prompt; default 1")
    parser.add_argument("--seed", type=int, default=0, help="of the first picture of each prompt")
    parser.add_argument("--batch-size", type=int, default=16, help="pictures at once; changes no result")
    parser.add_argument(
        "--device", default="auto", choices=("auto", "cpu"), help="auto: a GPU a process, where it has one"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/eval"), help="folder; what it holds is not made again")
    parser.set_defaults(run=_eval)


def _train(argv: list[str]) -> None:
    name = argv.pop(0) if argv and not argv[0].startswith("-") else "flow_grpo"
    if name not in TRAINERS:
        print(f"visalign train: got {name!r}, expected one of {sorted(TRAINERS)}", file=sys.stderr)
        raise SystemExit(2)
    importlib.import_module(f"visalign.trainers.{name}").cli(argv)


def _doctor(argv: list[str]) -> None:
    from visalign.training.before.doctor import cli

    cli(argv)


def _generate(arguments: argparse.Namespace) -> None:
    from .generate import generate

    _check_count(arguments)
    arguments.option = dict(_read_option(text) for text in arguments.option)
    generate(arguments)


def _eval(arguments: argparse.Namespace) -> None:
    from visalign.evaluation.command import evaluate

    evaluate(arguments)


def _check_count(arguments: argparse.Namespace) -> None:
    if arguments.count < 1:
        raise ValueError(f"count: got {arguments.count}, expected >= 1")


def _score(arguments: argparse.Namespace) -> None:
    import torch
    from PIL import Image, UnidentifiedImageError

    from visalign.images import pil_to_images
    from visalign.rewards import make_reward, parse_spec, score

    parse_spec(arguments.reward)
    images = []
    for path in arguments.images:
        try:
            images.append(pil_to_images([Image.open(path)])[0])
        except UnidentifiedImageError:
            raise ValueError(f"images: got {str(path)!r}, which is no picture") from None
    reward = make_reward(arguments.reward)
    for path, image in zip(arguments.images, images):
        with torch.no_grad():
            result = score(reward, image[None], [arguments.prompt])
        parts = "  ".join(f"{name} {float(values[0]):.4f}" for name, values in result.parts.items())
        print(f"{path}  {float(result.total[0]):.4f}" + (f"  ({parts})" if len(result.parts) > 1 else ""))


def _serve(arguments: argparse.Namespace) -> None:
    import json
    import os

    from visalign.rewards import make_reward, parse_spec

    try:
        from visalign.serving.server import Limits, make_app, open_socket, serve
    except ImportError as error:
        raise ValueError(f"{error}; the server needs the packages of pip install 'visalign[remote]'") from None
    options = dict(_read_option(text) for text in arguments.option)
    limits = Limits(max_bytes=arguments.max_bytes, max_batch=arguments.max_batch)
    token = arguments.token or os.environ.get("VISALIGN_TOKEN") or None
    parse_spec(arguments.reward, **options)
    with open_socket(arguments.host, arguments.port, token) as listening:
        reward = make_reward(arguments.reward, **options)
        spec = f"{arguments.reward} {json.dumps(options, sort_keys=True)}" if options else arguments.reward
        host = f"[{arguments.host}]" if ":" in arguments.host else arguments.host
        print(f"serving {arguments.reward} at http://{host}:{listening.getsockname()[1]}", flush=True)
        serve(make_app(reward, spec, token, limits), listening)


def _add_demo_options(parser: argparse.ArgumentParser) -> None:
    from visalign.demos.settings import add_options

    add_options(parser)


def _demo(arguments: argparse.Namespace) -> None:
    from visalign.demos.app import demo

    demo(arguments)


def _read_option(text: str) -> tuple[str, object]:
    """NAME=VALUE; the value as JSON where it is that (numbers, true, null, lists), else as it stands."""
    import json

    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise ValueError(f"option: got {text!r}, expected NAME=VALUE")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _rewards(arguments: argparse.Namespace) -> None:
    from visalign.rewards.describe import card, table

    if (arguments.action == "show") != (arguments.name is not None):
        raise ValueError("rewards: 'show' takes the name of a reward, 'list' takes none")
    print("\n".join(table() if arguments.action == "list" else card(arguments.name)))


def _world(arguments: argparse.Namespace) -> None:
    from visalign.worlds.shapes import WEIGHTS, world_prompts

    _check_count(arguments)
    if (arguments.action == "build") != (arguments.part is not None):
        raise ValueError(f"world: 'build' takes one of {', '.join(PARTS)}, the other actions take none of them")
    if arguments.action == "card":
        print((WEIGHTS / "CARD.md").read_text())
    elif arguments.action == "prompts":
        print("\n".join(world_prompts(arguments.split, arguments.count)))
    elif arguments.action == "show":
        _show_world(arguments)
    else:
        from visalign.worlds.shapes.building.build import build

        build(arguments.part, arguments.out, device=arguments.device, steps=arguments.steps)


def _show_world(arguments: argparse.Namespace) -> None:
    import numpy as np
    from torchvision.utils import make_grid, save_image

    from visalign.worlds.shapes import world_prompts
    from visalign.worlds.shapes.captions import parse
    from visalign.worlds.shapes.drawing import draw
    from visalign.worlds.shapes.scenes import place

    rng = np.random.default_rng(0)
    prompts = world_prompts(arguments.split, arguments.count)
    images = draw([place(parse(p), rng) for p in prompts]).repeat_interleave(2, -1).repeat_interleave(2, -2)
    arguments.out.mkdir(parents=True, exist_ok=True)
    save_image(make_grid(images, 8, padding=4, pad_value=1), arguments.out / "scenes.png")
    (arguments.out / "scenes.txt").write_text("\n".join(prompts) + "\n")
    print(arguments.out / "scenes.png")
