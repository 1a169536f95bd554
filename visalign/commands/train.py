"""`visalign train` and `visalign doctor`: they hand their options on, for each trainer has its own."""

import sys

from visalign.trainers import load_trainer


def train(argv: list[str]) -> None:
    """Train by the trainer that is named first, one of TRAINERS or "file.py:Class"; flow_grpo without a name."""
    name = argv.pop(0) if argv and not argv[0].startswith("-") else "flow_grpo"
    try:
        trainer = load_trainer(name)
        from visalign.training.loop.trainer import check_trainer, launch

        check_trainer(name, trainer)
    except ValueError as error:
        print(f"visalign train: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
    launch(trainer, argv)


def doctor(argv: list[str]) -> None:
    """Look for silent mistakes before a training costs anything."""
    from visalign.training.before.doctor import cli

    cli(argv)
