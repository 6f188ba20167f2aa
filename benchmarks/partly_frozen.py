"""Partly frozen: the last stages train, 10 epochs, MobileNetV2 and ResNet-18. Ours against the tutorial's loop.

    python benchmarks/partly_frozen.py ASSETS [--output FILE]

``last:1`` trains the last stage and the head, and freezes three quarters of the blocks of either network. ``until:``
begins at three quarters of the stages before the head, rounded down, so that one stage more trains. ResNet-18 starts
from random weights: only its times mean something. It also runs in bf16, where the processor has instructions for it;
MobileNetV2 gains nothing from that.
"""

from __future__ import annotations

from _report import table, verdict
from _runs import Case, Outcomes, ours, ours_in_bf16, peers, publish, read_options

OURS, HALF = "transferkit", "transferkit, bf16"
IN_HALF = ("resnet18",)
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
        half = (ours_in_bf16(HALF),) if model in IN_HALF else ()
        contestants = (ours(OURS), *half, *rivals)
        cases += [Case(f"{title}, {policy}", model, policy, weights, contestants) for policy in policies]

    def write(case: Case, outcomes: Outcomes) -> str:
        mine = [name for name in (OURS, HALF) if name in outcomes]
        asked = [verdict(outcomes, name, [each.name for each in rivals], asked=3) for name in mine]
        return "\n\n".join([table(outcomes, ours=mine, accuracy=case.weights != "none"), *asked])

    publish("Partly frozen", cases, options, write)


if __name__ == "__main__":
    main()
