"""`visalign world`: pictures and prompts of the offline world, and its models built anew."""

import argparse
from pathlib import Path

from visalign.worlds import PARTS

from .options import check_count


def add_options(world: argparse.ArgumentParser) -> None:
    world.add_argument("action", choices=("show", "prompts", "card", "build"))
    world.add_argument("part", nargs="?", choices=PARTS, help="for build")
    world.add_argument("--split", default="test", choices=("train", "test", "compositional"))
    world.add_argument("--count", type=int, default=32)
    world.add_argument("--out", type=Path, default=Path("world"), help="folder for the result")
    world.add_argument("--device", default="cpu", help="for build")
    world.add_argument("--steps", type=int, help="for build: training steps; default: those of the shipped model")


def run(arguments: argparse.Namespace) -> None:
    """Show, print or build."""
    from visalign.worlds.shapes import WEIGHTS, world_prompts

    check_count(arguments)
    if (arguments.action == "build") != (arguments.part is not None):
        raise ValueError(f"world: 'build' takes one of {', '.join(PARTS)}, the other actions take none of them")
    if arguments.action == "card":
        print((WEIGHTS / "CARD.md").read_text())
    elif arguments.action == "prompts":
        print("\n".join(world_prompts(arguments.split, arguments.count)))
    elif arguments.action == "show":
        _show(arguments)
    else:
        from visalign.worlds.shapes.building.build import build

        build(arguments.part, arguments.out, device=arguments.device, steps=arguments.steps)


def _show(arguments: argparse.Namespace) -> None:
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
