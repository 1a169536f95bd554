"""`visalign demo`: the workbench in a browser."""

import argparse


def add_options(parser: argparse.ArgumentParser) -> None:
    from visalign.demos.settings import add_options as add

    add(parser)


def run(arguments: argparse.Namespace) -> None:
    """Serve the workbench until stopped."""
    from visalign.demos.app import demo

    demo(arguments)
