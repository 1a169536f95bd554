"""Odd inputs by the thousand: each must be taken, or refused in one line that says what was given, at once.

    python benchmarks/fuzz.py --count 10000           # a few minutes on one core

Kinds: options of a trainer and YAML of its config, specs of rewards, prompt files, pictures, bodies of the server and
its .npy files. Half are good inputs with some bytes changed, half are picked from what has broken such programs before.
Counted: taken, refused (ValueError, or exit status 2 with one line), tracebacks (anything else), slow (over two
seconds of a processor). The first of the bad ones are printed with their seed: `--kinds KIND --seed N --count 1`.
"""

import argparse
import contextlib
import io
import json
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

from visalign.data.prompts import read_prompts
from visalign.files import parse_yaml
from visalign.images import read_picture
from visalign.rewards import parse_spec
from visalign.serving.wire import read_request
from visalign.trainers.ddpo import Config as Ddpo
from visalign.trainers.flow_grpo import Config as FlowGrpo
from visalign.training.before.config import parse_config

SLOW = 2.0
ODD = [
    "", " ", "0", "-1", "nan", ".nan", ".inf", "-.inf", "1e400", "1e-400", str(10**20), str(-(2**63) - 1), "010",
    "1:30", "yes", "null", "~", "true", "[]", "{}", "[1, 2]", "{a: 1}", "a: b: c", "*a", "&a [*a]",
    "!!python/name:os.system", "\u2028", "\x00", "\ufeff", "é" * 300, "x" * 9999, "[" * 3000, "{a: " * 3000, "$x_$",
    "[/b]", "../../etc/passwd", "os:system", "/dev/zero", "-", "--", "=", "\\", "'", '"', "%s", "{0}", "\ud800",
]  # fmt: skip


def mutated(rng: random.Random, data: bytes, text: bool = True) -> bytes:
    out = bytearray(data)
    for _ in range(rng.randint(1, 6)):
        place = rng.randrange(len(out) + 1)
        how = rng.randrange(4)
        if how == 0 and out:
            out[min(place, len(out) - 1)] = rng.randrange(32, 127) if text else rng.randrange(256)
        elif how == 1:
            del out[place : place + rng.randint(1, 40)]
        elif how == 2:
            out[place:place] = rng.choice(ODD).encode("utf-8", "surrogatepass")
        else:
            out[place:place] = out[place : place + rng.randint(1, 60)]
    return bytes(out)


def options(rng: random.Random, folder: Path) -> None:
    config = rng.choice((FlowGrpo, Ddpo))
    argv = []
    for field in rng.sample(fields(config), rng.randint(1, 3)):
        value = rng.choice(ODD)
        argv += [f"--{field.name}={value}"] if rng.random() < 0.5 else [f"--{field.name}", value]
    parse_config(config, argv, prog="fuzz", description="")


def config(rng: random.Random, folder: Path) -> None:
    lines = yaml.safe_dump({f.name: f.default for f in fields(FlowGrpo)}, sort_keys=False).splitlines()
    if rng.random() < 0.5:
        for _ in range(rng.randint(1, 2)):
            place = rng.randrange(len(lines))
            lines[place] = f"{lines[place].split(':')[0]}: {rng.choice(ODD)}"
        content = "\n".join(lines).encode("utf-8", "surrogatepass")
    else:
        content = mutated(rng, "\n".join(lines).encode())
    (folder / "c.yaml").write_bytes(content)
    parse_config(FlowGrpo, ["--config", str(folder / "c.yaml")], prog="fuzz", description="")


def yaml_text(rng: random.Random, folder: Path) -> None:
    parse_yaml(mutated(rng, b"a: &x [1, 2.5, yes]\nb: {c: *x, d: '10'}\n").decode("utf-8", "replace"), "yaml")


SPEC = b"combine: weighted\nrewards:\n- {name: clip_match, weight: 0.5, transform: [exp]}\n- jpeg_compressibility:2\n"


def spec(rng: random.Random, folder: Path) -> None:
    if rng.random() < 0.5:
        text = mutated(rng, b"clip_match:0.5+gold").decode("utf-8", "replace")
        parse_spec(rng.choice(ODD) if rng.random() < 0.5 else text)
    else:
        (folder / "s.yaml").write_bytes(mutated(rng, SPEC))
        parse_spec(str(folder / "s.yaml"))


PROMPTS = {
    ".txt": b"a red circle\n# no\ntwo cats\r\n",
    ".csv": b'id,prompt\n1,"a ""b"" c"\n2,d\n',
    ".tsv": b"caption\tn\na\t1\n",
    ".json": b'["a", {"prompt": "b", "metadata": {"n": 1}}]',
    ".jsonl": b'{"prompt": "a"}\n{"prompt": "b", "references": [], "metadata": {}}\n',
}


def prompts(rng: random.Random, folder: Path) -> None:
    suffix = rng.choice(list(PROMPTS))
    content = rng.choice(ODD).encode("utf-8", "surrogatepass") if rng.random() < 0.2 else mutated(rng, PROMPTS[suffix])
    (folder / f"p{suffix}").write_bytes(content)
    read_prompts(folder / f"p{suffix}")


def encoded(format: str, mode: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray((np.arange(48) * 5 % 256).astype(np.uint8).reshape(4, 4, 3)).convert(mode).save(buffer, format)
    return buffer.getvalue()


LAYOUTS = {"PNG": "RGBA", "JPEG": "CMYK", "WEBP": "RGB", "GIF": "P", "TIFF": "L", "BMP": "RGB"}
PICTURES = [encoded(*layout) for layout in LAYOUTS.items()]


def pictures(rng: random.Random, folder: Path) -> None:
    image = read_picture(io.BytesIO(mutated(rng, rng.choice(PICTURES), text=False)))
    if image.mode != "RGB":
        raise AssertionError(f"got mode {image.mode}")


def npy() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.zeros((1, 3, 4, 4), np.float32))
    return buffer.getvalue()


BODY = json.dumps({"images": {"$part": "x"}, "prompts": ["a"], "context": {"metadata": [{}]}}).encode()


def bodies(rng: random.Random, folder: Path) -> None:
    parts = {"x": npy() if rng.random() < 0.5 else mutated(rng, rng.choice([npy(), PICTURES[0]]), text=False)}
    read_request(BODY if rng.random() < 0.3 else mutated(rng, BODY), parts)


KINDS: dict[str, Callable[[random.Random, Path], None]] = {
    "options": options, "config": config, "yaml": yaml_text, "spec": spec, "prompts": prompts, "pictures": pictures,
    "bodies": bodies,
}  # fmt: skip


def tried(kind: str, seed: int, folder: Path) -> tuple[str, str]:
    """What became of one input, and what was said."""
    said, started = io.StringIO(), time.process_time()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            KINDS[kind](random.Random(f"{kind} {seed}"), folder)
        outcome, text = "taken", ""
    except SystemExit as error:
        text = said.getvalue()
        outcome = "refused" if error.code == 2 and text.count("\n") == 1 else "taken" if not error.code else "traceback"
    except ValueError as error:
        text = str(error)
        outcome = "refused" if "\n" not in text else "traceback"
    except BaseException as error:
        outcome, text = "traceback", f"{type(error).__name__}: {error}"
    return ("slow" if time.process_time() - started > SLOW else outcome), text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="*", default=list(KINDS), choices=list(KINDS))
    arguments = parser.parse_args()
    counts = {kind: Counter() for kind in arguments.kinds}
    shown = Counter()
    with tempfile.TemporaryDirectory() as name:
        for k in range(arguments.count):
            kind = arguments.kinds[k % len(arguments.kinds)]
            outcome, text = tried(kind, arguments.seed + k, Path(name))
            counts[kind][outcome] += 1
            if outcome in ("traceback", "slow") and (shown[kind] < 5 or arguments.count == 1):
                shown[kind] += 1
                print(f"{kind} seed {arguments.seed + k}: {outcome}: {text[:300]!r}", flush=True)
    print("| kind | tried | taken | refused in a line | tracebacks | slow |")
    print("|---|---|---|---|---|---|")
    for kind, c in counts.items():
        print(f"| {kind} | {c.total()} | {c['taken']} | {c['refused']} | {c['traceback']} | {c['slow']} |")


if __name__ == "__main__":
    main()
