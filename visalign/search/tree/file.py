"""A tree in a folder: tree.json, replaced at once, and numbered files of states that are only added to."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from visalign.files import write_beside, write_whole
from visalign.search.chain import Best, Chain
from visalign.search.ledger import Ledger

from .rules import Rules
from .tree import Tree

FORMAT = 1


class TreeFile:
    """Where a search keeps its tree. Killed at any moment, it leaves what it saved last, whole.

    Args:
        method: the search's name.
        folder: made if need be; None: nothing is kept.
        save_every: iterations from one `save_if_due` that saves to the next.
        free: rules' fields and what was asked for; where that is None, a saved tree's own rule holds.
    """

    def __init__(
        self, chain: Chain, method: str, folder: str | Path | None, save_every: int, free: dict[str, Any]
    ) -> None:
        if folder is not None and not isinstance(folder, (str, Path)):
            raise ValueError(f"folder: got {folder!r}, expected a path")
        if save_every < 1:
            raise ValueError(f"save_every: got {save_every}, expected >= 1")
        self.chain, self.folder, self.every, self.free = (
            chain,
            None if folder is None else Path(folder),
            save_every,
            free,
        )
        self.search = {
            "method": method,
            "prompt": chain.prompt,
            "seed": chain.seed,
            "transition": repr(chain.transition),
            "levels": list(chain.schedule.levels),
            "reward": chain.reward.name,
        }
        self._kept: set[tuple[str, int]] = set()
        self._files = self._saved_iterations = 0
        self._saved_leaves = -1
        self._best: int | None = None

    def open(self, rules: Rules, device: torch.device) -> Tree:
        """The tree that lies in the folder, with the chain's ledger and best result as they were; or a new one.

        Raises:
            ValueError: it belongs to another search, or is damaged.
        """
        if self.folder is None or not (self.folder / "tree.json").exists():
            return Tree(rules)
        saved, tree, tensors = _load(self.folder)
        _refuse_other("search", saved["search"], self.search)
        own = {name: getattr(tree.rules, name) for name, given in self.free.items() if given is None}
        _refuse_other("rule", _plain(tree.rules), _plain(dataclasses.replace(rules, **own)))
        self.chain.ledger = Ledger.from_dict({**saved["ledger"], "max_nfe": self.chain.ledger.max_nfe})
        if best := saved["best"]:
            latents = tree.states[best["leaf"]].to(device)
            self.chain.best = Best(best["reward"], latents, tensors["best"], best["entity"])
        self._kept = {("state", n) for n in tree.states} | {("prediction", n) for n in tree.predictions}
        self._files, self._best = saved["files"], saved["best"] and saved["best"]["leaf"]
        self._saved_iterations, self._saved_leaves = tree.iterations, tree.scored_leaves
        return tree

    def save_if_due(self, tree: Tree) -> None:
        if tree.iterations >= self._saved_iterations + self.every:
            self.save(tree)

    def save(self, tree: Tree) -> None:
        """Add the new states in a file, then replace tree.json by one that counts it."""
        if self.folder is None or (tree.iterations, tree.scored_leaves) == (self._saved_iterations, self._saved_leaves):
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        new = self._new_tensors(tree)
        if new:
            path = self.folder / _name(self._files)
            write_beside(path, lambda partial: save_file(new, partial))
        files, best = self._files + bool(new), self._best_result(tree)
        saved = {"format": FORMAT, "search": self.search, "rules": _plain(tree.rules), "files": files}
        saved |= {"ledger": self.chain.ledger.to_dict(), "best": best, "tree": _numbers(tree)}
        path = self.folder / "tree.json"
        write_whole(path, json.dumps(saved, allow_nan=False))
        self._files = files
        for kind in ("state", "prediction"):
            self._kept |= {(kind, n) for n in new[f"{kind}_of"].tolist()} if kind in new else set()
        self._best = best["leaf"] if best else None
        self._saved_iterations, self._saved_leaves = tree.iterations, tree.scored_leaves

    def _new_tensors(self, tree: Tree) -> dict[str, Tensor]:
        """States and predictions of scored nodes that lie in no file yet, and the best image if it is new."""
        new = {}
        for kind, rows in (("state", tree.states), ("prediction", tree.predictions)):
            nodes = [n for n in rows if tree.scored[n] and (kind, n) not in self._kept]
            if nodes:
                new[f"{kind}_of"], new[kind] = torch.tensor(nodes), torch.cat([rows[n] for n in nodes])
        result = self._best_result(tree)
        if result and self.chain.best and result["leaf"] != self._best:
            new["best"] = self.chain.best.image.contiguous()
        return new

    def _best_result(self, tree: Tree) -> dict[str, Any] | None:
        best = self.chain.best
        if best is None or best.entity >= len(tree.leaf) or tree.value[tree.leaf[best.entity]] != best.reward:
            return None
        return {"reward": best.reward, "entity": best.entity, "leaf": tree.leaf[best.entity]}


def load_tree(folder: str | Path) -> Tree:
    """The tree in a folder, to look at."""
    return _load(Path(folder))[1]


def _load(folder: Path) -> tuple[dict[str, Any], Tree, dict[str, Tensor]]:
    """What tree.json holds, the tree, and the latest other tensors of its files.

    Raises:
        ValueError: there is none, or a file of it is not as it was written.
    """
    saved = _read(folder)
    try:
        tree, tensors = _tree(folder, saved)
        _check(saved, tree)
        return saved, tree, tensors
    except (LookupError, TypeError, AttributeError, ArithmeticError, ValueError, OSError, SafetensorError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ValueError(f"folder: got {str(folder)!r}, whose tree is damaged ({reason}); take another one") from error


def _check(saved: dict[str, Any], tree: Tree) -> None:
    """Raise ValueError for a tree that no search grows."""
    if any(not 0 <= parent < node for node, parent in enumerate(tree.parent) if node):
        raise ValueError("a parent that does not come before its child")
    if missing := [n for n in range(tree.size) if tree.scored[n] and n not in tree.states]:
        raise ValueError(f"no state of node {missing[0]}")
    if not np.isfinite(tree.value[: tree.size][tree.scored[: tree.size]]).all():
        raise ValueError("a value that is not finite")
    ledger = Ledger.from_dict(saved["ledger"])
    if tree.scored_leaves and ledger.nfe < 1:
        raise ValueError(f"{tree.scored_leaves} leaves for {ledger.nfe} denoiser calls")
    if saved["best"] and saved["best"]["leaf"] not in tree.states:
        raise ValueError("no state of the best leaf")


def _read(folder: Path) -> dict[str, Any]:
    try:
        saved = json.loads((folder / "tree.json").read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"folder: got {str(folder)!r}, expected one with a tree.json: {error}") from error
    if not isinstance(saved, dict):
        raise ValueError(
            f"folder: got {str(folder)!r}, whose tree.json holds a {type(saved).__name__}, expected a tree"
        )
    if saved.get("format") != FORMAT:
        raise ValueError(f"folder: got a tree of format {saved.get('format')}, expected {FORMAT}")
    return saved


def _tree(folder: Path, saved: dict[str, Any]) -> tuple[Tree, dict[str, Tensor]]:
    """The tree, and the latest other tensors of its files."""
    numbers = saved["tree"]
    tree = Tree(_rules(saved["rules"]))
    for parent, rollout in zip(numbers["parent"], numbers["rollout"]):
        tree.add(parent, rollout)
    tree.value[: tree.size] = numbers["value"]
    tree.visits[: tree.size] = numbers["visits"]
    tree.log_weight[: tree.size] = numbers.get("log_weight", 0.0)  # of trees saved before there was guidance
    tree.iterations, tree.unit = numbers["iterations"], numbers["unit"]
    tree.restore(numbers["queue"])
    others: dict[str, Tensor] = {}
    for k in range(saved["files"]):
        tensors = load_file(folder / _name(k))
        for kind, rows in (("state", tree.states), ("prediction", tree.predictions)):
            if kind in tensors:
                rows.update(zip(tensors.pop(f"{kind}_of").tolist(), tensors.pop(kind).split(1)))
        others |= tensors
    return tree, others


def _numbers(tree: Tree) -> dict[str, Any]:
    size = tree.size
    return {
        "parent": tree.parent[1:],
        "rollout": tree.rollout[1:],
        "value": tree.value[:size].tolist(),
        "visits": tree.visits[:size].tolist(),
        "log_weight": tree.log_weight[:size].tolist(),
        "queue": tree.queue,
        "iterations": tree.iterations,
        "unit": tree.unit,
    }


def _plain(rules: Rules) -> dict[str, Any]:
    """As JSON holds it: infinity is a string."""
    fields = {**dataclasses.asdict(rules), "branch_at": list(rules.branch_at)}
    return {name: "inf" if value == math.inf else value for name, value in fields.items()}


def _rules(saved: dict[str, Any]) -> Rules:
    numbers = {name: float(saved[name]) for name in ("tilt", "widening")}
    return Rules(**{**saved, **numbers, "branch_at": tuple(saved["branch_at"])})


def _refuse_other(what: str, saved: dict[str, Any], wanted: dict[str, Any]) -> None:
    for name, value in wanted.items():
        if saved[name] != value:
            raise ValueError(f"folder: got a tree whose {what} has {name} {saved[name]!r}, expected {value!r}")


def _name(number: int) -> str:
    return f"states-{number:06d}.safetensors"
