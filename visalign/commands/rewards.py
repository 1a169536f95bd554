"""`visalign rewards`: what rewards there are, and what one of them is."""

import argparse


def add_options(rewards: argparse.ArgumentParser) -> None:
    rewards.add_argument("action", choices=("list", "show"))
    rewards.add_argument("name", nargs="?", help="for show")


def run(arguments: argparse.Namespace) -> None:
    """Print the table, or a reward's card."""
    from visalign.rewards.describe import card, table

    if (arguments.action == "show") != (arguments.name is not None):
        raise ValueError("rewards: 'show' takes the name of a reward, 'list' takes none")
    print("\n".join(table() if arguments.action == "list" else card(arguments.name)))
