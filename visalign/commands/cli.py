"""The `visalign` command: train, generate, score, eval, serve, ... Each is a file here, which imports what it needs
when it is used."""

import argparse
import sys
from collections.abc import Sequence

from visalign import __version__
from visalign.trainers import TRAINERS

from . import demo, evaluate, generate, rewards, score, serve, world
from .train import doctor, train

COMMANDS = {
    "generate": (generate, "draw pictures"),
    "score": (score, "score picture files"),
    "eval": (evaluate, "compare models, LoRAs and searches: pictures, scores, who wins"),
    "serve": (serve, "serve a reward over HTTP, for the reward remote:http://HOST:PORT"),
    "demo": (demo, "the workbench in a browser: compare, search, score, collect preferences"),
    "rewards": (rewards, "what rewards there are, and what one of them is"),
    "world": (world, "the offline world: pictures, prompts, and building its models anew"),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command; a mistake in the options ends with one line on stderr and exit status 2."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["train"] or argv[:1] == ["doctor"]:  # these hand their options on
        return train(argv[1:]) if argv[0] == "train" else doctor(argv[1:])
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except (ValueError, OSError) as error:
        print(f"visalign {arguments.command}: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="visalign", description="Align image generators with visual rewards.")
    parser.add_argument("--version", action="version", version=f"visalign {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser(
        "train", help=f"train: visalign train [{'|'.join(TRAINERS)}|FILE.py:Trainer] [options]; --help lists them"
    )
    commands.add_parser("doctor", help="check a training before it costs anything: the same options as train")
    for name, (module, summary) in COMMANDS.items():
        command = commands.add_parser(name, help=summary)
        module.add_options(command)
        command.set_defaults(run=module.run)
    return parser
