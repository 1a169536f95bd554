"""What the workbench is started with, from the command line; checked before anything is loaded."""

import argparse
import os
from dataclasses import dataclass, field
from pathlib import Path

from visalign.worlds import MODELS

SHAPES_REWARDS = ("clip_match", "gold", "shapes_taste", "jpeg_compressibility")
REWARDS = ("jpeg_compressibility",)  # of other models, where none is named: the one that needs no weights
MAX_PROMPT = 500  # characters
MAX_UPLOAD = 10 * 2**20  # bytes
MAX_PIXELS = 4096 * 4096  # of an uploaded picture


@dataclass(frozen=True)
class Settings:
    """How the workbench is set up.

    Attributes:
        model: a shipped model, a folder, or a hub id.
        loras: folders of LoRAs or of trained components, to be compared with the base.
        rewards: specs as `visalign.rewards.make_reward` takes; empty: those that fit the model.
        runs: the folder whose run folders the page may read.
        out: the folder for votes and saved comparisons.
        host, port: where it listens; port 0 takes a free one.
        share: whether a public link is asked for.
        user, password: what visitors must give; needed where others than this machine can come.
        judge: the vision-language model that reads rubrics; None: the shapes world's own on that world, else none.

    Raises:
        ValueError: it would be open to others without a password, or a file stands where a folder is to be.
    """

    model: str = "shapes-flow"
    loras: tuple[str, ...] = ()
    rewards: tuple[str, ...] = ()
    runs: Path = Path("runs")
    out: Path = Path("workbench")
    host: str = "127.0.0.1"
    port: int = 7860
    share: bool = False
    user: str | None = None
    password: str | None = field(default=None, repr=False)
    device: str = "cpu"
    judge: str | None = None

    def __post_init__(self) -> None:
        from visalign.rewards.urls import is_loopback  # takes seconds to import
        from visalign.training.run.folder import check_writable

        if (self.user is None) != (self.password is None):
            raise ValueError("user: got a user or a password without the other, expected both or neither")
        if (self.share or not is_loopback(self.host)) and not self.password:
            door = "--share" if self.share else f"--host {self.host}"
            raise ValueError(f"user: got none with {door}, expected --user, and a password in VISALIGN_PASSWORD")
        if not 0 <= self.port < 65536:
            raise ValueError(f"port: got {self.port}, expected within 0 .. 65535")
        for name in ("runs", "out"):
            folder = getattr(self, name)
            if folder.exists() and not folder.is_dir():
                raise ValueError(f"{name}: got {str(folder)!r}, a file, expected a folder")
        check_writable(self.out, resume=True, argument="out")

    @property
    def shapes(self) -> bool:
        """Whether the model draws the shapes world, whose judge can read it."""
        return self.model in MODELS

    @property
    def judge_name(self) -> str | None:
        return self.judge or ("shapes-vlm" if self.shapes else None)

    @property
    def reward_specs(self) -> tuple[str, ...]:
        return self.rewards or (SHAPES_REWARDS if self.shapes else REWARDS)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `visalign demo`."""
    parser.add_argument("--model", default="shapes-flow", help="a shipped model, a folder, or a hub id")
    parser.add_argument("--lora", action="append", default=[], metavar="FOLDER", help="a LoRA, or weights; repeatable")
    parser.add_argument("--reward", action="append", default=[], help="name or file.py:function; repeatable")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of run folders that may be looked at")
    parser.add_argument("--out", type=Path, default=Path("workbench"), help="folder for votes and saved comparisons")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at; others than loopback need a user")
    parser.add_argument("--port", type=int, default=7860, help="0 takes a free one")
    parser.add_argument("--share", action="store_true", help="ask for a public link; needs a user")
    parser.add_argument("--user", help="that visitors must name, with the password in VISALIGN_PASSWORD")
    parser.add_argument("--password", help="better in VISALIGN_PASSWORD, which other users of the machine cannot see")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--judge", help="vision-language model for rubrics; default: the shapes world's own, on it")


def read_settings(arguments: argparse.Namespace) -> Settings:
    """Settings from parsed options.

    Raises:
        ValueError: as `Settings`; names the option.
    """
    password = arguments.password or (os.environ.get("VISALIGN_PASSWORD") if arguments.user else None)
    return Settings(
        arguments.model,
        tuple(arguments.lora),
        tuple(arguments.reward),
        arguments.runs,
        arguments.out,
        arguments.host,
        arguments.port,
        arguments.share,
        arguments.user,
        password or None,
        arguments.device,
        arguments.judge,
    )
