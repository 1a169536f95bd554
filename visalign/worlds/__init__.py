"""The worlds that ship with the project, by the names that `--model`, `--prompts` and rewards take.

A world is a package that announces what others ask it for; `world(name)` is the door, so that nothing else imports one:
`world_prompts(split, count)`, SPLITS, `parse(caption)` (ValueError for what is none of its captions), SIZE of its
pictures, `DrawnPictures`, `crowded`, `read` (what its judge finds in a picture), `ShapesCritic`, `draw`, `place`.
"""

import importlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from visalign.names import unknown_name

WEIGHTS = Path(__file__).parent / "shapes" / "weights"
MODELS = {
    "shapes-flow": WEIGHTS / "flow",
    "shapes-diffusion": WEIGHTS / "diffusion",
    "shapes-consistency": WEIGHTS / "consistency",
}
CLIP = WEIGHTS / "clip"  # the offline CLIP, where no other is asked for
WORLDS = ("shapes",)  # that announce prompts, pictures, a judge and a critic
PARTS = ("vae", "clip", "flow", "diffusion", "consistency", "taste", "vlm")  # what `visalign world build` trains
JUDGES = {"shapes-vlm": WEIGHTS / "vlm"}  # vision-language models, for the rewards that ask one


def world(name: str) -> Any:
    """A world by name, imported when it is asked for.

    Raises:
        ValueError: an unknown one.
    """
    if name not in WORLDS:
        raise unknown_name("world", name, WORLDS)
    return importlib.import_module(f"{__name__}.{name}")


def all_captions(name: str, prompts: Iterable[str]) -> bool:
    """Whether all prompts are captions of a world, so that its judge can tell whether pictures are right."""
    try:
        for prompt in prompts:
            world(name).parse(prompt)
    except ValueError:
        return False
    return True


def resolve_model(name: str) -> str:
    """The folder of a shipped model, or `name` itself: a local folder or a hub id.

    Raises:
        ValueError: it looks like a folder or a shipped name, but there is none.
    """
    if name in MODELS:
        return str(MODELS[name])
    if Path(name).is_dir():
        if not (Path(name) / "model_index.json").is_file():
            raise ValueError(f"model: got {name!r}, a folder without model_index.json, expected a diffusers pipeline")
        return name
    looks_local = name.startswith((".", "/", "~")) or name.count("/") != 1 or Path(name).parent.is_dir()
    if looks_local:
        raise ValueError(
            f"model: got {name!r}, expected one of {sorted(MODELS)}, a pipeline folder, or a hub id 'owner/name'"
        )
    return name
