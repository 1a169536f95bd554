"""`visalign generate`: the options of drawing and of searching."""

import argparse
from pathlib import Path

from visalign.search.methods import METHODS

from .options import check_count, read_option


def add_options(generate: argparse.ArgumentParser) -> None:
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
    generate.add_argument(
        "--search", metavar="METHOD", help=f"search for the best picture: {', '.join(METHODS)}, or file.py:function"
    )
    generate.add_argument(
        "--budget", type=int, help="of a search: denoiser calls a prompt, never exceeded; default 500"
    )
    generate.add_argument("--render-steps", type=int, help="of a search: draw its best noise again in so many")
    generate.add_argument("--transition", help="of a search: its step; default: the model's with noise; ode for none")
    generate.add_argument("--batch-size", type=int, default=16, help="pictures at once; changes no result")
    generate.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="of a search; repeatable")


def run(arguments: argparse.Namespace) -> None:
    """Draw pictures, or search for the best."""
    check_count(arguments)
    arguments.option = dict(read_option(text) for text in arguments.option)
    from .drawing import generate

    generate(arguments)
