"""`visalign eval`: the options of models, LoRAs and searches against each other."""

import argparse
from pathlib import Path


def add_options(parser: argparse.ArgumentParser) -> None:
    shape = "LABEL=MODEL[,lora=FOLDER][,strength=0..1][,steps=N][,guidance=X][,transition=NAME]"
    shape += "[,search=METHOD,budget=N[,reward=SPEC][,OPTION=VALUE...]]; repeatable"
    parser.add_argument(
        "--contestant", action="append", required=True, metavar="LABEL=MODEL[,NAME=VALUE...]", help=shape
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


def run(arguments: argparse.Namespace) -> None:
    """Draw, score and compare; what the folder holds is not made again."""
    from visalign.evaluation.command import evaluate

    evaluate(arguments)
