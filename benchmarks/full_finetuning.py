"""Full fine-tuning on a CPU, 2 epochs, MobileNetV2 and ResNet-18. Ours against four peers and a loop tuned by hand.

    python benchmarks/full_finetuning.py ASSETS [--fastai-python PYTHON] [--output FILE]

The loop tuned by hand is the limit: its pictures are decoded before its training begins. It runs once as it is, and
once with large blocks of memory kept by malloc instead of being handed back to the system at every step. ResNet-18
starts from random weights: only its times mean something. It also runs in bf16, where the processor has instructions
for it; MobileNetV2 gains nothing from that.
"""

from __future__ import annotations

from _report import table, verdict
from _runs import Case, Outcomes, limit, ours, ours_in_bf16, peers, publish, read_options

OURS, HALF, LIMIT = "transferkit", "transferkit, bf16", "loop tuned by hand"
IN_HALF = ("resnet18",)
NETWORKS = {"mobilenet_v2": ("MobileNetV2", 1.8), "resnet18": ("ResNet-18", 1.05)}  # and the ratio that is asked


def main() -> None:
    options = read_options(__doc__, epochs=2)
    rivals = peers(options)
    kept = limit(f"{LIMIT}, memory kept", MALLOC_MMAP_MAX_="0", MALLOC_TRIM_THRESHOLD_=str(2**40))
    rest = (*rivals, limit(LIMIT), kept)
    cases = []
    for model, (title, _) in NETWORKS.items():
        weights = options.mobilenet_weights if model == "mobilenet_v2" else "none"
        mine = (ours(OURS), ours_in_bf16(HALF)) if model in IN_HALF else (ours(OURS),)
        cases.append(Case(f"{title}, full fine-tuning", model, "full", weights, (*mine, *rest)))

    def write(case: Case, outcomes: Outcomes) -> str:
        lines = [
            table(outcomes, ours=[OURS], accuracy=case.weights != "none"),
            verdict(outcomes, OURS, [each.name for each in rivals], asked=NETWORKS[case.model][1]),
            verdict(outcomes, OURS, [LIMIT, kept.name], asked=0.9),
        ]
        return "\n\n".join(lines)

    publish("Full fine-tuning", cases, options, write)


if __name__ == "__main__":
    main()
