"""Head only: ants and bees, MobileNetV2, 25 epochs. Ours against four peers, whole processes.

    python benchmarks/head_only.py ASSETS [--fastai-python PYTHON] [--output FILE]

Ours trains on one plain view of each picture, its default for a head alone, or on four augmented ones that are kept and
take turns; the peers draw a new crop in every epoch. A run of one epoch tells what a later epoch costs with everything
that is written at its end.
"""

from __future__ import annotations

import statistics

from _report import table, verdict
from _runs import Case, Outcomes, ours, peers, publish, read_options

DEFAULT, VIEWS, ONCE = "transferkit", "transferkit, views=4", "transferkit, 1 epoch"
ASKED = {DEFAULT: 25, VIEWS: 8}


def later_epochs(outcomes: Outcomes, epochs: int) -> str:
    """Say what an epoch after the first costs, checkpoints included: the long run less the short, without imports."""
    long, short = outcomes[DEFAULT], outcomes[ONCE]
    if isinstance(long, str) or isinstance(short, str) or epochs < 2:
        return "What a later epoch costs with its checkpoint was not measured."
    pairs = zip(long, short, strict=True)
    shares = [(more.command - once.command) / (epochs - 1) / more.epochs[0] for more, once in pairs]
    share = 100 * statistics.median(shares)
    return f"An epoch after the first, checkpoints included: asked under 3 % of the first, came to {share:.1f} %."


def main() -> None:
    options = read_options(__doc__, epochs=25)
    rivals = peers(options)
    mine = (ours(DEFAULT), ours(VIEWS, "--augment", "light", "--views", "4"), ours(ONCE, "--epochs", "1"))
    case = Case("MobileNetV2, head only", "mobilenet_v2", "head", options.mobilenet_weights, (*mine, *rivals))

    def write(case: Case, outcomes: Outcomes) -> str:
        lines = [
            table(outcomes, ours=list(ASKED), accuracy=case.weights != "none"),
            *(verdict(outcomes, name, [each.name for each in rivals], asked=asked) for name, asked in ASKED.items()),
            later_epochs(outcomes, options.epochs),
        ]
        return "\n\n".join(lines)

    publish("Head only", [case], options, write)


if __name__ == "__main__":
    main()
