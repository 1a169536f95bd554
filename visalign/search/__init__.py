"""Alignment at test time: searches that spend denoiser calls, not weights, on a reward.

for event in run(generator, "three red circles", make_reward("clip"), "dts-star", budget=500, seed=7):
    print(event.nfe, event.best.reward if event.best else "-")
images_to_pil(event.best.image)[0].save("best.png")

At the top: what all searches share; `methods` lists them by name. From outside: the names below, imported when used.
"""

from typing import TYPE_CHECKING

from visalign.lazy import lazily

from .methods import METHODS, Method, find_method

if TYPE_CHECKING:
    from .best_of_n import best_of_n_kl, expected_best, snis_weights
    from .chain import Chain
    from .ledger import BudgetExceeded, Ledger
    from .records import Best, Event, Role
    from .running import events_of, prepare, run

__all__ = [
    "METHODS",
    "Best",
    "BudgetExceeded",
    "Chain",
    "Event",
    "Ledger",
    "Method",
    "Role",
    "best_of_n_kl",
    "events_of",
    "expected_best",
    "find_method",
    "prepare",
    "run",
    "snis_weights",
]

__getattr__ = lazily(
    __name__,
    best_of_n=("best_of_n_kl", "expected_best", "snis_weights"),
    chain=("Chain",),
    ledger=("BudgetExceeded", "Ledger"),
    records=("Best", "Event", "Role"),
    running=("events_of", "prepare", "run"),
)
