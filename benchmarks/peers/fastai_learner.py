"""fastai: a Learner on the same network and weights, one cycle, the best epoch kept.

It is put together as ``vision_learner`` does, which forgets ``cut`` on the way to torchvision's networks: fastai's own
head, and its defaults: Adam, and batch norms that train in frozen layers too. The layers are split in two groups, what
the policy freezes and the rest. fastai would feed MobileNetV2 pictures that are not
normalised, since it knows no statistics for it; this script adds what a careful user adds.
"""

from __future__ import annotations

import tempfile

from _common import MEAN, STD, Clock, begin, frozen_modules, make_network
from fastai.vision.all import (
    Callback,
    FlipItem,
    ImageDataLoaders,
    Learner,
    Normalize,
    RandomResizedCrop,
    SaveModelCallback,
    accuracy,
    add_head,
    create_body,
    default_device,
    num_features_model,
    set_seed,
)

CUTS = {"mobilenet_v2": -1, "resnet18": -2}  # the last child that belongs to the body
RATES = {"head": 2e-3, "full": 1e-4}


class Ticks(Callback):
    """Tells a clock where epochs begin, and where training ends."""

    order = 100  # behind SaveModelCallback, which loads the best epoch at the end

    def __init__(self, clock: Clock) -> None:
        """Take the clock."""
        self.clock = clock

    def before_epoch(self) -> None:
        """Note an epoch's beginning."""
        self.clock.tick()

    def after_fit(self) -> None:
        """Note the end."""
        self.clock.tick()


def main() -> None:
    options = begin(__doc__)
    default_device(False)
    set_seed(options.seed)
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        dls = ImageDataLoaders.from_folder(
            options.data,
            train="train",
            valid="val",
            item_tfms=[RandomResizedCrop(options.image_size), FlipItem()],
            batch_tfms=[Normalize.from_stats(MEAN, STD)],
            bs=options.batch_size,
            num_workers=options.workers,
        )
        network = make_network(options, dls.c)
        frozen = {
            id(each) for part in frozen_modules(network, options.model, options.policy) for each in part.parameters()
        }

        def split(model):
            groups = [], []
            for parameter in model.parameters():
                groups[id(parameter) not in frozen].append(parameter)
            return [group for group in groups if group]

        best = SaveModelCallback(monitor="accuracy")
        body = create_body(network, cut=CUTS[options.model])
        learn = Learner(
            dls,
            add_head(body, num_features_model(body), dls.c),
            splitter=split,
            metrics=accuracy,
            path=folder,
            cbs=[best, Ticks(clock)],
        )
        if frozen:
            learn.freeze()
        with learn.no_bar(), learn.no_logging():
            learn.fit_one_cycle(options.epochs, RATES.get(options.policy, 1e-3))
    clock.report(float(best.best))


if __name__ == "__main__":
    main()
