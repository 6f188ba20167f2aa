import os

import pytest
import torch
from accelerate.state import PartialState

from transferkit.devices import PRECISIONS, choose_device, make_accelerator
from transferkit.exceptions import SettingError


def test_the_best_device_is_the_default():
    best = torch.accelerator.current_accelerator(check_available=True)
    assert choose_device().type == ("cpu" if best is None else best.type)


@pytest.mark.parametrize("name", ["cuda:99", "tpu", "", "cpu:x"])
def test_a_device_that_is_not_there_is_named_with_those_that_are(name):
    with pytest.raises(SettingError, match=rf"device={name!r} is not there; this machine has cpu"):
        choose_device(name)


def test_an_unknown_precision_is_named_with_those_that_exist():
    with pytest.raises(SettingError, match=r"precision='fp8'; it can be auto, fp32, bf16, fp16"):
        make_accelerator("cpu", "fp8")


def test_fp16_on_a_cpu_is_refused():
    with pytest.raises(SettingError, match="precision='fp16' needs a CUDA device, not cpu; use bf16 or fp32"):
        make_accelerator("cpu", "fp16")


@pytest.mark.parametrize("precision", [name for name in PRECISIONS if name != "fp16"])
def test_an_accelerator_has_the_device_and_precision_that_were_asked_for(precision):
    accelerator = make_accelerator("cpu", precision)
    assert accelerator.device == torch.device("cpu")
    assert accelerator.mixed_precision == ("bf16" if precision == "bf16" else "no")


def test_one_process_can_change_its_mind():
    chosen = [make_accelerator("cpu", precision).mixed_precision for precision in ("fp32", "bf16", "fp32")]
    assert chosen == ["no", "bf16", "no"]


def test_no_environment_variable_is_left_behind():
    before = dict(os.environ)
    make_accelerator("cpu", "bf16")
    make_accelerator()
    assert dict(os.environ) == before


def test_one_process_alone_is_the_main_one():
    accelerator = make_accelerator("cpu")
    assert accelerator.is_main_process
    assert accelerator.num_processes == 1
    assert PartialState().device == torch.device("cpu")
