"""`visalign score`: picture files under a reward."""

import argparse
from pathlib import Path


def add_options(score: argparse.ArgumentParser) -> None:
    score.add_argument("images", nargs="+", type=Path)
    score.add_argument("--prompt", required=True)
    score.add_argument("--reward", default="clip", help="name, file.py:function, or a sum such as clip:0.7+gold:0.3")


def run(arguments: argparse.Namespace) -> None:
    """Print each picture's score, and those of the reward's members."""
    import torch

    from visalign.images import pil_to_images, read_picture
    from visalign.rewards import make_reward, parse_spec, score

    from .drawing import told

    parse_spec(arguments.reward)
    images = []
    for path in arguments.images:
        try:
            images.append(pil_to_images([read_picture(path)])[0])
        except ValueError as error:
            raise ValueError(f"images: {error}") from None
    reward = make_reward(arguments.reward)
    for path, image in zip(arguments.images, images):
        with torch.no_grad():
            result = score(reward, image[None], [arguments.prompt], on_fail="later")
        parts = "  ".join(f"{name} {float(values[0]):.4f}" for name, values in result.parts.items())
        print(f"{path}  {told(result, 0)}" + (f"  ({parts})" if len(result.parts) > 1 and result.valid[0] else ""))
