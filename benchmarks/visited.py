"""Which files of the project one sample visits, from its prompt to its gradient.

    python benchmarks/visited.py            # the number, and the files in the order of their first call
    python benchmarks/visited.py --reward clip

One iteration of `trainers/flow_grpo.py` on the shipped model, two images of one prompt, after one that fills memos. A
file is visited if a function of it is called between the beginning of the iteration and the end of its update; what the
program does before (options, loading) and after (log, checkpoint, report) is not counted.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("visalign", "rewards", "trainers", "demos")
DURING = ("iteration", "sample", "assign_advantages", "update")  # methods of a trainer


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--reward", default="jpeg_compressibility")
    arguments = parser.parse_args()
    from visalign.trainers.flow_grpo import Config, FlowGRPO, main

    visited: dict[str, None] = {}

    def note(frame: Any, event: str, _argument: Any) -> None:
        if event == "call":
            file = Path(frame.f_code.co_filename)
            if file.is_relative_to(ROOT) and file.relative_to(ROOT).parts[0] in ROOMS:
                visited.setdefault(str(file.relative_to(ROOT)))

    def traced(function: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            outer = sys.getprofile()
            sys.setprofile(note)
            try:
                return function(*args, **kwargs)
            finally:
                sys.setprofile(outer)

        return run

    for name in DURING:
        if name in vars(FlowGRPO):
            setattr(FlowGRPO, name, traced(vars(FlowGRPO)[name]))
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "prompts.txt").write_text("a red circle\na blue star\n")
        files = dict(prompts=f"{folder}/prompts.txt", eval_prompts=f"{folder}/prompts.txt", run_dir=f"{folder}/run")
        small = dict(steps=2, num_steps=4, prompts_per_step=1, group_size=2, batch_size=2, eval_count=1, monitor="off")
        main(Config(**files, **small, reward=arguments.reward, judges=""))
    print(f"{len(visited)} files")
    print("\n".join(visited))


if __name__ == "__main__":
    main()
