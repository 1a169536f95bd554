"""The worlds that ship with the project, by the names that `--model`, `--prompts` and rewards take."""

from pathlib import Path

WEIGHTS = Path(__file__).parent / "shapes" / "weights"
MODELS = {
    "shapes-flow": WEIGHTS / "flow",
    "shapes-diffusion": WEIGHTS / "diffusion",
    "shapes-consistency": WEIGHTS / "consistency",
}
PARTS = ("vae", "clip", "flow", "diffusion", "consistency", "taste", "vlm")  # what `visalign world build` trains
JUDGES = {"shapes-vlm": WEIGHTS / "vlm"}  # vision-language models, for the rewards that ask one


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
