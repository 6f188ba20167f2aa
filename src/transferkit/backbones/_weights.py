"""Weights from elsewhere: into the network they belong to, whatever their making, with a report."""

from __future__ import annotations

import inspect
import logging
import math
import re
import sys
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchvision.models import DenseNet
from torchvision.models.vision_transformer import VisionTransformer, interpolate_embeddings

from transferkit.backbones._channels import adapt_channels, input_convolutions
from transferkit.exceptions import WeightsError

__all__ = ["WeightsReport", "fit_state_dict"]

logger = logging.getLogger("transferkit")

_ENOUGH = 0.9
_COUNTER = "num_batches_tracked"
_FILTERS = ("checkpoint_filter_fn", "checkpoint_filter_fn_classifier", "_filter_fn", "_filter_torchvision_pretrained")
_SHARED_BIAS, _BLOCK_BIAS = "rel_pos_bias.", re.compile(r"blocks\.\d+\.attn\.(relative_position_bias_table)")


@dataclass(frozen=True)
class WeightsReport:
    """What of a file has found its place in a network; its ``str`` is one sentence.

    Attributes:
        matched: Keys of the backbone's tensors that were filled.
        missing: Keys of the backbone that the file lacks; they keep their initial values.
        left_over: Keys of the file that were not used: decoders, projection heads, a head of other classes.
        of_another_shape: Keys of the backbone that the file holds in another shape; they keep their initial values.
        share: The part of the backbone's tensors that matched, 0 to 1. Blocks that only the file has count against it,
            so that a deeper network's weights are not taken for a shallower one's.
        prefix: What stood before the backbone's keys in the file, ``"module.encoder_q."`` for example.
        wrapper: The keys that led to the state dict, ``"state_dict"`` for example.
        passed_over: Other prefixes under which the file holds the backbone just as well, a momentum encoder's for one.

    Example:
        >>> print(WeightsReport(("a", "b"), ("c",), (), (), 2 / 3, "module.", "state_dict"))
        2 of 3 tensors of the backbone are filled (from 'state_dict', keys 'module.…'); 1 missing: c
    """

    matched: tuple[str, ...]
    missing: tuple[str, ...]
    left_over: tuple[str, ...]
    of_another_shape: tuple[str, ...]
    share: float
    prefix: str = ""
    wrapper: str = ""
    passed_over: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Say it in one sentence."""
        own = len(self.matched) + len(self.missing) + len(self.of_another_shape)
        place = [f"from {self.wrapper!r}"] if self.wrapper else []
        place += [f"keys '{self.prefix}…'"] if self.prefix else []
        place += [f"not the equally fitting '{other}…'" for other in self.passed_over]
        parts = [
            f"{len(self.matched)} of {own} tensors of the backbone are filled"
            + (f" ({', '.join(place)})" if place else ""),
            *_listed({"missing": self.missing, "of another shape": self.of_another_shape, "left over": self.left_over}),
        ]
        return "; ".join(parts)


def _listed(keys: Mapping[str, Iterable[str]]) -> list[str]:
    """Return ``"3 missing: a, b, c"`` for each label that has keys, with the first few of them."""
    found = {label: tuple(each) for label, each in keys.items()}
    return [
        f"{len(each)} {label}: {', '.join(each[:3])}{', …' if len(each) > 3 else ''}"
        for label, each in found.items()
        if each
    ]


def fit_state_dict(
    network: nn.Module,
    state: Mapping[str, Tensor],
    *,
    head_paths: Iterable[str],
    source: str,
    resampled: Iterable[str] = (),
) -> WeightsReport:
    """Load weights into the network they belong to, whatever their keys were prefixed with, and log what matched.

    The prefix is the one under which most of the network's own tensors are found; where several serve equally well, a
    teacher or average is preferred, and a momentum encoder comes last. Where names or shapes still differ, the keys
    go through timm's own conversion for the family, which knows the styles of the original authors and resamples patch
    kernels and position embeddings; torchvision's vision transformers have theirs interpolated. First convolutions are
    adapted to the network's channels, half precision becomes the network's own. The head, which is replaced anyway, may
    be missing or have another shape, and the counters of batch norms may be missing.

    Args:
        network: The native network; changed in place.
        state: Tensors by key, as :func:`read_state_dict` returns them.
        head_paths: Dotted names of the classification layers.
        source: Where the state came from, for messages.
        resampled: Dotted names of convolutions whose kernels are resampled where the file has another size: an adapted
            stem's.

    Returns:
        What matched, was missing and was left over; also logged, as a warning if the backbone is incomplete.

    Raises:
        WeightsError: Less than 90 % of the backbone matched, or a value is not finite; nothing has been loaded then.

    Source: timm ``load_pretrained``; torchvision ``interpolate_embeddings``.

    Example:
        >>> network = nn.Sequential(OrderedDict(body=nn.Linear(4, 4), head=nn.Linear(4, 2)))
        >>> state = {"module.body.weight": torch.eye(4), "module.body.bias": torch.zeros(4)}
        >>> report = fit_state_dict(network, state, head_paths=["head"], source="mine")
        >>> report.share, report.prefix, bool((network.body.weight == torch.eye(4)).all())
        (1.0, 'module.', True)
    """
    heads = tuple(f"{path}." for path in head_paths)
    everything = network.state_dict(keep_vars=True)
    own = {key: value for key, value in everything.items() if isinstance(value, Tensor)}
    body = {key: own[key] for key in own if not key.startswith(heads) and not key.endswith(_COUNTER)}
    best, passed_over = _best_reading(network, state, body)
    tensors = _with_own_channels(network, best.tensors, own, source)
    for key in (f"{path}.weight" for path in resampled):
        if key in tensors and tensors[key].shape[:2] == own[key].shape[:2]:
            from timm.layers import resample_patch_embed

            tensors = {**tensors, key: resample_patch_embed(tensors[key], list(own[key].shape[2:]))}

    loadable = {key for key in own if key in tensors and tensors[key].shape == own[key].shape}
    filled = {id(own[key]) for key in loadable}  # by identity: tied tensors are filled under any of their names
    matched = tuple(key for key in body if id(own[key]) in filled)
    empty = [key for key in body if id(own[key]) not in filled]
    missing = tuple(key for key in empty if key not in tensors)
    reshaped = tuple(key for key in empty if key in tensors)
    unused = [key for key in tensors if key not in loadable and key not in body and not key.endswith(_COUNTER)]
    further = _further_blocks(network, unused, heads)
    outside = (key for key in state if not key.startswith(best.prefix) and not key.endswith(_COUNTER))
    share = len(matched) / (len(body) + len(further)) if body else 1.0
    report = WeightsReport(
        matched, missing, (*unused, *outside), reshaped, share, best.prefix, getattr(state, "wrapper", ""), passed_over
    )
    if share < _ENOUGH:
        shapes = list(reshaped)
        if shapes:  # one example tells enough
            one, other = (tuple(each[reshaped[0]].shape) for each in (tensors, own))
            shapes[0] += f" is {one} in the file, {other} in the network"
        rest = (key for key in report.left_over if key not in further)
        labels = ("missing", "of another shape", "in blocks that the network lacks", "left over")
        problems = _listed(dict(zip(labels, (missing, shapes, further, rest), strict=True)))
        raise WeightsError(
            f"{source} does not fit {type(network).__name__}: {math.floor(100 * share)} % of the backbone's tensors "
            f"match, 90 % are needed ({len(matched)} of {len(body)} matched; {'; '.join(problems)}); "
            "pass weights of the same architecture from the same library, or weights=None"
        )
    _check_values(source, {key: tensors[key] for key in own if key in loadable}, own)
    with torch.no_grad():
        for key in loadable:
            own[key].copy_(tensors[key])
    kept = " — what is not filled keeps its initial values" if empty else ""
    logger.log(logging.WARNING if empty or further else logging.INFO, "%s: %s%s", source, report, kept)
    return report


class _Reading(NamedTuple):
    """The part of a file that lies under one prefix, its keys cut or converted to the network's style."""

    prefix: str
    tensors: dict[str, Tensor]


def _best_reading(
    network: nn.Module, state: Mapping[str, Tensor], body: Mapping[str, Tensor]
) -> tuple[_Reading, tuple[str, ...]]:
    """Return the reading that fills most of the body, and the prefixes of others that are as good."""

    def score(reading: _Reading) -> tuple[int, int]:
        common = [key for key in body if key in reading.tensors]
        return sum(reading.tensors[key].shape == body[key].shape for key in common), len(common)

    readings = [
        _Reading(prefix, {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)})
        for prefix in _prefixes(state, at_least=len(body) // 2)
    ]
    scores = [score(reading) for reading in readings]
    # Names and shapes that agree throughout are native: converting them could only change them.
    if max(scores)[0] < len(body):
        readings += [_Reading(prefix, _convert(network, tensors)) for prefix, tensors in readings]
        scores += [score(reading) for reading in readings[len(scores) :]]
    best = readings[scores.index(max(scores))]
    equal = [reading.prefix for reading, each in zip(readings, scores, strict=True) if each == max(scores)]
    # One inside the other is the same set of weights, found with a conversion that cuts prefixes itself.
    others = [each for each in equal if not each.startswith(best.prefix) and not best.prefix.startswith(each)]
    return best, tuple(dict.fromkeys(others))


def _prefixes(state: Mapping[str, Tensor], *, at_least: int) -> list[str]:
    """Return the dotted prefixes, ``""`` included, that enough keys have, preferred ones first."""
    counts = Counter(key[: dot.end()] for key in state for dot in re.finditer(r"\.", key))

    def rank(prefix: str) -> tuple[int, int, str]:
        words = set(re.split(r"[._]", prefix))
        role = 0 if words & {"ema", "teacher"} else 2 if words & {"momentum", "target", "key", "k"} else 1
        return role, len(prefix), prefix

    return sorted(["", *(prefix for prefix, count in counts.items() if count >= max(1, at_least))], key=rank)


def _convert(network: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert names and shapes to the network's style, as far as its library knows how."""
    half = (torch.float16, torch.bfloat16)
    tensors = {key: value.float() if value.dtype in half else value for key, value in tensors.items()}
    names = network.state_dict().keys()
    shared = {key.removeprefix(_SHARED_BIAS): key for key in tensors if key.startswith(_SHARED_BIAS)}
    for key in names - tensors.keys():  # BEiT pretrains one table for all blocks, and is fine-tuned with one for each
        if (block := _BLOCK_BIAS.fullmatch(key)) and block[1] in shared:
            tensors[key] = tensors[shared[block[1]]]
    if (convert := _converter(network)) is None:
        return tensors
    for known in (tensors, {key: value for key, value in tensors.items() if key in names}):
        # timm's filters take some keys for those of modules that the network may lack.
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of torch about timm's code: nothing that a user could mend
                converted = convert(dict(known))
            return {**{key: value for key, value in tensors.items() if key not in known}, **converted}
        except Exception as error:  # code for files of its own family, given any file's keys
            logger.debug("%s cannot convert the keys: %r", type(network).__name__, error)
    return tensors


def _converter(network: nn.Module) -> Callable[[dict[str, Tensor]], dict[str, Tensor]] | None:
    """Return what turns files of the network's family, as their authors wrote them, into native keys and shapes."""
    if isinstance(network, VisionTransformer):
        return lambda tensors: _torchvision_vit(network, tensors)
    modules = [sys.modules[each.__module__] for each in type(network).__mro__ if "timm.models." in each.__module__]
    if isinstance(
        network, DenseNet
    ):  # torchvision renames the keys of its own old files in the same way, but in private
        from timm.models import densenet as timm_densenet

        modules = [timm_densenet]
    found = [getattr(module, name) for module in modules for name in _FILTERS if hasattr(module, name)]
    if not found:
        return None
    accepted = inspect.signature(found[0]).parameters
    # DeiT III shares its class and its filter with ViT; the switch renames its layer scales, which no other file has.
    options = {"adapt_layer_scale": True} if "adapt_layer_scale" in accepted else {}
    extra = (network,) if "model" in accepted else ()
    return lambda tensors: dict(found[0](tensors, *extra, **options))


def _torchvision_vit(network: VisionTransformer, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    renamed = {
        key.replace(".mlp.linear_1.", ".mlp.0.").replace(".mlp.linear_2.", ".mlp.3."): value
        for key, value in tensors.items()
    }
    return dict(interpolate_embeddings(network.image_size, network.patch_size, OrderedDict(renamed)))


def _further_blocks(network: nn.Module, keys: Iterable[str], heads: tuple[str, ...]) -> list[str]:
    """Return the keys that continue one of the network's own numbered rows: ``layer3.6.…`` after its ``layer3.5``."""
    modules = dict(network.named_modules())
    found = []
    for key in keys:
        parent, _, _ = key.rpartition(".")
        while parent and parent not in modules:
            parent = parent.rpartition(".")[0]
        name = key[len(parent) + 1 :].partition(".")[0]
        row = re.sub(r"\d+$", "", name)
        siblings = (re.sub(r"\d+$", "", child) for child, _ in modules[parent].named_children() if child != row)
        if parent and row != name and row in siblings and not any(head.startswith(f"{parent}.") for head in heads):
            found.append(key)
    return found


def _check_values(source: str, tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Refuse numbers with which no network computes anything."""
    for key, theirs in tensors.items():
        is_counter = not own[key].is_floating_point()
        if theirs.is_complex() or not (is_counter or theirs.is_floating_point()):
            raise WeightsError(
                f"{source} holds {key} as {theirs.dtype}, the network as {own[key].dtype}; save it as such"
            )
        if not is_counter and not torch.isfinite(theirs.float()).all():
            raise WeightsError(
                f"{source} holds values in {key} that are no finite numbers; the file is damaged, or training "
                "diverged: copy it again, or pass other weights"
            )


def _with_own_channels(
    network: nn.Module, tensors: dict[str, Tensor], own: Mapping[str, Tensor], source: str
) -> dict[str, Tensor]:
    """Adapt the first kernels to the channels that the network takes."""
    for name in input_convolutions(network):
        theirs, ours = tensors.get(f"{name}.weight"), own.get(f"{name}.weight")
        if theirs is None or ours is None or theirs.ndim != 4 or theirs.shape[1] in (0, ours.shape[1]):
            continue
        have, want = theirs.shape[1], ours.shape[1]
        pixels = have // 3
        # 12 or 48 channels are RGB pictures whose 2 x 2 or 4 x 4 pixels were folded, if the network folds alike.
        folded = have in (12, 48) and want % pixels == 0
        have, want = (3, want // pixels) if folded else (have, want)
        tensors = adapt_channels(tensors, first_convs=[name], in_chans=want, base_chans=have)
        logger.info("%s: %s is adapted from %d to %d channels", source, name, have, want)
    return tensors
