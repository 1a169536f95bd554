"""Which pipeline families the Generator drives exactly, as a markdown table from a run of the conformance measurement.

    python benchmarks/conformance_table.py           # print it
    python benchmarks/conformance_table.py --write   # and put it into README.md, between its markers

Tiny randomly initialised pipelines, float32, four steps, on this machine's CPU (see tests/toys/tiny_pipelines.py).
"""

import argparse
import sys
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- conformance:begin -->", "<!-- conformance:end -->"
HEADER = "| family | prediction | ODE trajectory | decode | alone or in a batch | gradient | passes | note |"


class _Patch:
    """What `shrink_condition_images` needs of pytest's monkeypatch."""

    def setattr(self, target: object, name: str, value: object) -> None:
        mock.patch.object(target, name, value).start()


def table() -> str:
    """Measure every family; the largest absolute differences to the stock pipeline, one row a family."""
    sys.path.insert(0, str(ROOT / "tests" / "toys"))
    import tiny_pipelines as tiny

    tiny.shrink_condition_images(_Patch())
    rows = [HEADER, "|" + " --- |" * HEADER.count(" | ") + " --- |"]
    for name, family in tiny.FAMILIES.items():
        measured = tiny.measure(name)
        trajectory = "-" if measured.trajectory is None else f"{measured.trajectory:.1e}"
        numbers = f"{measured.prediction:.1e} | {trajectory} | {measured.decode:.1e} | {measured.batch:.1e}"
        gradient = "yes" if min(measured.gradients) > 0 else "no"
        rows.append(f"| {name} | {numbers} | {gradient} | {'yes' if measured.passed else 'NO'} | {family.note} |")
        print(rows[-1], file=sys.stderr, flush=True)
    return "\n".join(rows)


def write(readme: Path, text: str) -> None:
    """Replace what stands between the markers of `readme`.

    Raises:
        ValueError: the file has no such pair of markers.
    """
    old = readme.read_text()
    if old.count(BEGIN) != 1 or old.count(END) != 1 or old.index(BEGIN) > old.index(END):
        raise ValueError(f"{readme.name}: got no pair of markers, expected {BEGIN} and {END}, once each")
    before, after = old.split(BEGIN)[0], old.split(END)[1]
    readme.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="rewrite README.md in place")
    arguments = parser.parse_args()
    text = table()
    print(text)
    if arguments.write:
        write(ROOT / "README.md", text)


if __name__ == "__main__":
    main()
