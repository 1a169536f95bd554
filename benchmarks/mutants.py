"""Do the tests notice a wrong formula? Breaks one expression at a time in the pure functions and runs their tests.

    python benchmarks/mutants.py                 # 240 mutants of seed 0, five minutes on one core
    python benchmarks/mutants.py --seed 1 --count 100 --only visalign/advantages/tree.py
    python benchmarks/mutants.py --write         # and benchmarks/mutants.md

A mutant is one change of one expression that runs (`variants` lists the kinds): an operator, a comparison, a bound, a
constant, an axis, a range, a condition, a lost detach. `count` of all possible ones are drawn by the seed. Left out,
for no formula changes: decorators, annotations, default values, strings, what is raised, the conditions of checks (an
`if` that ends in a raise), constants up to 1e-6 (guards of divisions) and code outside of functions.

Each runs in a fork of one process that has imported everything: the function's code is exchanged in memory, so that
no file is touched and no import repeated. A mutant is killed by a failing test, a crash, or by running out of time.
"""

import argparse
import ast
import copy
import gc
import importlib
import os
import random
import resource
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FunctionType

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest  # after the number of threads is set

ROOT = Path(__file__).resolve().parent.parent
PURE = "not (first_adjoint or belong or smoothing or diffusion or updates or every or wrong)"  # those without a model
PICTURES = "saturation or contrast or frequency or border or grid or statistics or cosine or even_pictures"
PATHS = "not shipped and not rounds and not budget"
ROOMS = {  # files of pure functions -> what tests them, as arguments of pytest; the first that fits counts
    "visalign/advantages/*.py": ["tests/advantages"],
    "visalign/objectives/adjoint.py": ["tests/trainers/test_adjoint_matching.py", "-k", PURE],
    "visalign/objectives/policy_gradient.py": ["tests/objectives/test_policy_gradient.py"],
    "visalign/objectives/rebel.py": ["tests/objectives/test_rebel.py"],
    "visalign/objectives/*.py": ["tests/objectives/test_reward_gradient.py"],
    "visalign/transitions/interpolant.py": [
        "tests/transitions",
        "tests/search/noise/test_search_rollover.py",
        "-k",
        PATHS,
    ],
    "visalign/transitions/memoryless.py": ["tests/trainers/test_adjoint_matching.py", "-k", PURE],
    "visalign/transitions/*.py": ["tests/transitions"],
    "visalign/statistics/pictures.py": ["tests/training/test_monitor.py", "-k", PICTURES],
    "visalign/statistics/bootstrap.py": ["tests/evaluation/test_eval_results.py"],
    "visalign/statistics/*.py": ["tests/statistics"],
    "visalign/sampling/windows.py": ["tests/sampling/test_windows.py"],
    "visalign/sampling/noising.py": ["tests/objectives/test_reward_gradient.py"],
    "visalign/search/tree/rules.py": ["tests/search/tree/test_search_tree.py"],
    "visalign/search/particles/resampling.py": ["tests/search/particles/test_search_resampling.py"],
    "visalign/training/loop/optimization.py": ["tests/training/test_optimization.py"],
    "visalign/training/watch/trends.py": ["tests/training/test_trends.py"],
    "rewards/aggregate.py": ["tests/rewards/test_aggregate.py"],
    "rewards/shaping.py": ["tests/rewards/test_reward_composition.py"],
    "rewards/groups/pairwise.py": ["tests/rewards/groups/test_pairwise.py"],
    "rewards/groups/sets.py": ["tests/rewards/groups/test_sets.py"],
}
EQUIVALENT = {  # judged one by one: no test could tell them from the original, and why
    "visalign/advantages/tree.py:keep_by_width: True -> False": "on the CPU torch sorts stably either way",
    "visalign/objectives/reward_gradient.py:augment: mirror < 0.5 -> mirror <= 0.5": "differs for a draw of 0.5 itself",
    "visalign/objectives/reward_gradient.py:augment: -2 -> 2": "the last two of four sides either way",
    "visalign/transitions/consistency.py:consistency_step: 1 -> 2": "of the bounds: the term they keep out is 0 there",
    "visalign/statistics/pictures.py:_hann: length > 1 -> length >= 1": "the window of one pixel is 1",
    "visalign/search/particles/resampling.py:ssp: draws[other] * (up + down) < down -> draws[other] * (up + down) <= "
    "down": "differs for a draw on the bound itself",
    "visalign/search/particles/resampling.py:resample: effective_sample_size(log_weights) >= len(weights) * (1 - "
    "ALL_EQUAL) -> effective_sample_size(log_weights) > len(weights) * (1 - ALL_EQUAL)": "differs on the bound itself",
    "visalign/training/loop/optimization.py:apply_gradients: accelerator.num_processes > 1 -> "
    "accelerator.num_processes >= 1": "a sum over one process is itself",
    "visalign/search/tree/rules.py:boltzmann: values - top -> values + top": "shares do not see a shift of all values",
    "visalign/search/particles/resampling.py:residual: remainders.sum() -> remainders.mean()": "_invert divides again",
    "visalign/training/watch/trends.py:trend: 0 -> 1": "the variance of ranks is 0 or at least 8 / 3",
    "rewards/aggregate.py:correlation_weighted: combined.mean() -> combined.sum()": "each group sums to 0: both are",
    "rewards/groups/sets.py:frechet_distance: mixed.detach() -> mixed": "a threshold passes no gradient",
    "rewards/groups/sets.py:vendi_score: 0 -> 1": "the wider of two matrices of the same eigenvalues that are not 0",
}
BINARY = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Pow: ast.Mult}
COMPARED = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
}  # fmt: skip
SWAPPED = {"min": "max", "max": "min", "amin": "amax", "amax": "amin", "sum": "mean", "mean": "sum"}
LATE = ("torch._dynamo", "sympy", "open_clip", "torch.onnx")  # what tests import only when they run: seconds a fork
DROPPED = ("detach", "sqrt", "abs", "exp", "log", "square")  # methods without an argument, taken away
SECONDS = 20  # of a processor; a mutant that takes more is killed: the slowest tests of a file take a quarter


@dataclass
class Mutant:
    """One change of one file: `place` (a node's field, or an item of it) gets `after`."""

    path: str
    line: int
    function: str
    place: tuple[ast.AST, str, int | None]
    before: ast.expr
    after: ast.expr

    def __str__(self) -> str:
        return f"{self.path}:{self.function}: {self.change}"

    @property
    def change(self) -> str:
        return f"{ast.unparse(self.before)} -> {ast.unparse(self.after)}"


def changed(node: ast.expr, **fields: object) -> ast.expr:
    other = copy.copy(node)
    for name, value in fields.items():
        setattr(other, name, value)
    return other


def variants(node: ast.expr) -> Iterator[ast.expr]:
    """What an expression is changed into."""
    if isinstance(node, ast.BinOp) and type(node.op) in BINARY:
        yield changed(node, op=BINARY[type(node.op)]())
        if isinstance(node.op, ast.Mult | ast.Div):
            yield node.left  # the factor is dropped
        if isinstance(node.op, ast.Mult):
            yield node.right
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.Not | ast.Invert):
        yield node.operand
    elif isinstance(node, ast.Compare):
        for k, op in enumerate(node.ops):
            yield changed(node, ops=[*node.ops[:k], COMPARED[type(op)](), *node.ops[k + 1 :]])
    elif isinstance(node, ast.BoolOp):
        yield changed(node, op=ast.Or() if isinstance(node.op, ast.And) else ast.And())
    elif isinstance(node, ast.IfExp):
        yield changed(node, test=ast.UnaryOp(ast.Not(), node.test))
    elif isinstance(node, ast.Constant):
        value = node.value
        if isinstance(value, bool):
            yield changed(node, value=not value)
        elif isinstance(value, int) or (isinstance(value, float) and abs(value) > 1e-6):
            yield changed(node, value=value + 1 if isinstance(value, int) else 1.5 * value)
        elif isinstance(value, float) and value == 0:
            yield changed(node, value=1.0)
    elif isinstance(node, ast.keyword) and node.arg in ("dim", "axis") and isinstance(node.value, ast.Constant):
        yield changed(node, value=ast.Constant(1 if node.value.value == 0 else 0))
    elif isinstance(node, ast.Call):
        yield from changed_calls(node)


def changed_calls(node: ast.Call) -> Iterator[ast.expr]:
    name = getattr(node.func, "attr", getattr(node.func, "id", ""))
    if name in SWAPPED:
        field = "attr" if isinstance(node.func, ast.Attribute) else "id"
        if field == "attr" or name in ("min", "max"):
            yield changed(node, func=changed(node.func, **{field: SWAPPED[name]}))
    if name in DROPPED and isinstance(node.func, ast.Attribute) and not node.args and not node.keywords:
        yield node.func.value
    if name == "range":
        yield changed(node, args=[*node.args[:-1], ast.BinOp(node.args[-1], ast.Sub(), ast.Constant(1))])
    if name == "clamp":
        bounds = [ast.keyword(k, v) for k, v in zip(("min", "max"), node.args)] + node.keywords
        for k, bound in enumerate(bounds):  # one bound less; or the other side's
            rest = [*bounds[:k], *bounds[k + 1 :]]
            other = [ast.keyword("max" if bound.arg == "min" else "min", bound.value)]
            yield changed(node, args=[], keywords=rest or other)


def mutants_of(path: str) -> tuple[ast.Module, list[Mutant]]:
    """The file's tree, and all its mutants in the order of the text."""
    tree, found = ast.parse((ROOT / path).read_text()), []

    def visit(node: ast.AST, name: str, runs: bool) -> None:
        for field, value in ast.iter_fields(node):
            if field in (
                "annotation",
                "returns",
                "decorator_list",
                "args" if isinstance(node, ast.FunctionDef) else "",
            ):
                continue
            if field == "test" and isinstance(node, ast.If) and isinstance(node.body[-1], ast.Raise):
                continue
            for k, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
                if not isinstance(child, ast.AST) or isinstance(child, ast.Raise | ast.JoinedStr):
                    continue
                if isinstance(child, ast.FunctionDef | ast.ClassDef):
                    visit(child, f"{name}.{child.name}".strip("."), isinstance(child, ast.FunctionDef))
                    continue
                if runs and isinstance(child, ast.expr | ast.keyword):
                    options = list(variants(child))
                    if field == "test" and isinstance(node, ast.If):
                        options.append(ast.UnaryOp(ast.Not(), child))
                    for after in options:
                        found.append(Mutant(path, child.lineno, name, (node, field, k), child, after))
                visit(child, name, runs)

    visit(tree, "", False)
    return tree, found


def functions_by_code() -> dict[tuple[str, str], list[FunctionType]]:
    """All functions of this process, by file and qualified name."""
    table: dict[tuple[str, str], list[FunctionType]] = {}
    for thing in gc.get_objects():
        if isinstance(thing, FunctionType) and str(ROOT) in thing.__code__.co_filename:
            table.setdefault((thing.__code__.co_filename, thing.__code__.co_qualname), []).append(thing)
    return table


def codes(code: CodeType) -> Iterator[CodeType]:
    for const in code.co_consts:
        if isinstance(const, CodeType):
            yield const
            yield from codes(const)


def compiled(tree: ast.Module, mutant: Mutant) -> dict[str, CodeType]:
    """The code of all functions of the changed file, by qualified name; the tree is left as it was."""
    node, field, k = mutant.place

    def put(value: ast.AST) -> None:
        if k is None:
            setattr(node, field, value)
        else:
            getattr(node, field)[k] = value

    put(mutant.after)
    try:
        changed_tree = ast.fix_missing_locations(copy.deepcopy(tree))
    finally:
        put(mutant.before)
    return {code.co_qualname: code for code in codes(compile(changed_tree, str(ROOT / mutant.path), "exec"))}


def exchange(table: dict, tree: ast.Module, mutant: Mutant) -> bool:
    """Give the functions of this process the mutant's code; False if no code differs."""
    hit = False
    for name, code in compiled(tree, mutant).items():
        for function in table.get((str(ROOT / mutant.path), name), ()):
            if function.__code__ != code:
                function.__code__, hit = code, True
    return hit


def run(arguments: list[str], prepare=lambda: True) -> str:
    """Run tests in a fork after `prepare`: "" if all pass, else what stopped them; "unchanged" if it gives False."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        code = 99
        try:
            resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(1, 2)
            code = (
                int(pytest.main([*arguments, "-x", "-q", "-p", "no:cacheprovider"], [Told(write)])) if prepare() else 98
            )
        except BaseException as error:  # the fork must never come back to the caller's loop
            os.write(write, repr(error).encode())
        finally:
            os._exit(code)
    os.close(write)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    said = os.read(read, 1000).decode()
    os.close(read)
    if status > 1 and status != 98:
        sys.exit(f"mutants: pytest {' '.join(arguments)} broke down with {status}: {said}")
    return {0: "", 98: "unchanged", 1: said or "a failing test", -signal.SIGKILL: "out of time"}.get(
        status, f"signal {-status}"
    )


class Told:
    """A plugin of pytest that writes down the first failing test."""

    def __init__(self, pipe: int) -> None:
        self.pipe = pipe

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            os.write(self.pipe, report.nodeid.encode())

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            os.write(self.pipe, f"collecting {report.nodeid}".encode())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="one file, as visalign/advantages/tree.py")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=240)
    parser.add_argument("--write", action="store_true", help="write benchmarks/mutants.md")
    options = parser.parse_args()
    os.chdir(ROOT)
    tests: dict[str, list[str]] = {}
    for glob, arguments in ROOMS.items():
        for path in sorted(Path().glob(glob)):
            tests.setdefault(str(path), arguments)
    if options.only:
        tests = {options.only: tests[options.only]}
    trees = {path: mutants_of(path) for path in tests}
    possible = [mutant for _, found in trees.values() for mutant in found]
    chosen = random.Random(options.seed).sample(possible, min(options.count, len(possible)))
    chosen.sort(key=lambda m: (list(tests).index(m.path), m.line))
    # Collecting imports the tests and all they need, once, for every fork.
    every = list({" ".join(arguments): arguments for arguments in tests.values()}.values())
    files = sorted({part for arguments in every for part in arguments if part.startswith("tests/")})
    if pytest.main(["--collect-only", "-qq", "-p", "no:cacheprovider", *files]) != 0:
        sys.exit("mutants: the tests cannot be collected")
    for name in LATE:
        importlib.import_module(name)
    for arguments in every:
        if trouble := run(arguments):
            sys.exit(f"mutants: {' '.join(arguments)} fails without any mutant: {trouble}")
    table, results, started = functions_by_code(), [], time.monotonic()
    gc.freeze()
    for number, mutant in enumerate(chosen, 1):
        result = run(tests[mutant.path], lambda m=mutant: exchange(table, trees[m.path][0], m))
        if str(mutant) in EQUIVALENT:
            result = f"equivalent: {EQUIVALENT[str(mutant)]}" if not result else f"{result}, though called equivalent"
        results.append(result)
        print(
            f"{number:4} {mutant.path}:{mutant.line} {mutant.function}: {mutant.change}  [{result or 'SURVIVED'}]",
            flush=True,
        )
    report(options, possible, chosen, results, time.monotonic() - started)


def kind_of(result: str) -> str:
    if result.startswith("equivalent") or result == "unchanged":
        return result.partition(":")[0]
    return "killed" if result else "survived"


def report(options: argparse.Namespace, possible: list, chosen: list[Mutant], results: list[str], took: float) -> None:
    kinds = Counter(map(kind_of, results))
    judged = kinds["killed"] + kinds["survived"]
    counts = ", ".join(f"{kinds[k]} {k}" for k in ("killed", "survived", "equivalent", "unchanged"))
    summary = f"{len(chosen)} of {len(possible)} possible mutants, seed {options.seed}, {took:.0f} s: {counts}. "
    summary += f"Killed of those not equivalent: {100 * kinds['killed'] / max(1, judged):.1f} %."
    print(summary)
    for mutant, result in zip(chosen, results):
        if not result:
            print(f"survived: {mutant.line} {mutant}")
    if options.write:
        rows = ["| line | before -> after | killed by |", "|---|---|---|"]
        for mutant, result in zip(chosen, results):
            change, told = mutant.change.replace("|", "\\|"), result.rpartition("/")[2].replace("|", "\\|")
            rows.append(f"| {mutant.path}:{mutant.line} | `{change}` | {told or '**survived**'} |")
        text = ["# Mutants", "", "Written by `python benchmarks/mutants.py --write`.", "", summary, "", *rows, ""]
        Path("benchmarks/mutants.md").write_text("\n".join(text))


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # else the compiler's bindings, imported for the tests, complain for a page at their end
