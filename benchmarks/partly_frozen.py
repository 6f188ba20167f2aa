"""Partly frozen: the last stages train, 10 epochs, MobileNetV2 and ResNet-18. Ours against the tutorial's loop.

    python benchmarks/partly_frozen.py ASSETS [--output FILE]

``last:1`` trains the last stage and the head, and freezes three quarters of the blocks of either network. ``until:``
begins at three quarters of the stages before the head, rounded down, so that one stage more trains. ResNet-18 starts
from random weights: only its times mean something.
"""

from __future__ import annotations

from _report import table, verdict
from _runs import Case, Outcomes, ours, peers, publish, read_options

OURS = "transferkit"
POLICIES = {
    "mobilenet_v2": ("MobileNetV2", "last:1", "until:stage4"),
    "resnet18": ("ResNet-18", "last:1", "until:stage3"),
}


def main() -> None:
    options = read_options(__doc__, epochs=10, rivals="tutorial")
    rivals = peers(options)
    cases = []
    for model, (title, *policies) in POLICIES.items():
        weights = options.mobilenet_weights if model == "mobilenet_v2" else "none"
        cases += [Case(f"{title}, {policy}", model, policy, weights, (ours(OURS), *rivals)) for policy in policies]

    def write(case: Case, outcomes: Outcomes) -> str:
        asked = verdict(outcomes, OURS, [each.name for each in rivals], asked=3)
        return f"{table(outcomes, ours=[OURS], accuracy=case.weights != 'none')}\n\n{asked}"

    publish("Partly frozen", cases, options, write)


if __name__ == "__main__":
    main()
