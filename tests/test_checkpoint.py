import json
import os
import pickle
import shutil
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import timm
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from safetensors.torch import load_file, save_file
from timm.data import resolve_data_config
from torch import nn
from torchvision import models

from transferkit.artifact_config import sealed
from transferkit.checkpoint import load_artifact, load_weights, read_config, save_artifact, save_temperature
from transferkit.create import adapt, create_model
from transferkit.exceptions import ArtifactError, OutputError, TransferkitError
from transferkit.preprocessing import Preprocessing
from transferkit.transforms import eval_transform

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
NAMES = ["ant", "bee", "wasp"]


def made(name, image_size=32, **options):
    """A network whose weights and statistics are all random, so that each tensor counts."""
    model = create_model(name, class_names=NAMES, weights=None, image_size=image_size, **options)
    generator = torch.Generator().manual_seed(1)
    for value in model.network.state_dict().values():
        if value.is_floating_point():
            value.copy_(torch.rand(value.shape, generator=generator) * 0.2 + 0.05)
    return model.eval()


def logits(network, size=32):
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return network.eval()(images)


def assert_same_logits(first, second, size=32):
    assert torch.equal(logits(first, size), logits(second, size))


@pytest.fixture
def artifact(tmp_path):
    """A saved model, to be damaged."""
    return save_artifact(made("timm/test_efficientnet"), tmp_path / "artifact")


def edited(artifact, change):
    """Change a config as somebody would who makes its checksum anew."""
    file = artifact / "config.json"
    config = json.loads(file.read_text())
    change(config)
    file.write_text(json.dumps(sealed(config)))


def said(error) -> str:
    """The message of an error, which must be one sentence on one line."""
    text = str(error.value)
    assert "\n" not in text
    assert len(text) < 600
    return text


# Round trips


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("timm/test_efficientnet", {}),
        ("timm/test_efficientnet", {"dropout": 0.3}),
        ("timm/test_efficientnet", {"hidden_size": 8, "dropout": 0.3}),
        ("torchvision/shufflenet_v2_x0_5", {}),
        ("torchvision/squeezenet1_1", {}),
        ("torchvision/squeezenet1_1", {"hidden_size": 8}),
        ("torchvision/squeezenet1_1", {"dropout": 0.2}),
        ("torchvision/mnasnet0_5", {}),
        ("torchvision/regnet_y_400mf", {}),
        ("timm/test_vit", {}),
    ],
)
def test_a_saved_model_comes_back_equal(tmp_path, name, options):
    model = made(name, **options)
    model.eval_preset = "cifar"
    loaded = load_artifact(save_artifact(model, tmp_path))
    assert_same_logits(loaded, model)
    assert not loaded.training
    for attribute in ("name", "class_names", "preprocessing", "head", "head_paths", "eval_preset", "weights"):
        assert getattr(loaded, attribute) == getattr(model, attribute)
    assert loaded.stage_names == model.stage_names
    assert read_config(tmp_path)["transferkit"]["native"] == ("hidden_size" not in options)


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("shufflenet_v2_x0_5", {}),
        ("squeezenet1_1", {"dropout": 0.2}),
        ("mobilenet_v3_small", {"dropout": 0.2}),
        ("mnasnet0_5", {}),
    ],
)
def test_a_torchvision_artifact_opens_in_plain_torchvision(tmp_path, architecture, options):
    model = made(f"torchvision/{architecture}", **options)
    save_artifact(model, tmp_path)
    network = models.get_model(architecture, num_classes=3)
    state, saved = network.state_dict(), load_file(tmp_path / "model.safetensors")
    assert saved.keys() == state.keys()
    state.update(saved)
    network.load_state_dict(state)
    assert_same_logits(network, model)


@pytest.mark.parametrize(
    ("architecture", "size", "options"),
    [
        ("test_efficientnet", 32, {"dropout": 0.3}),
        ("test_vit", 64, {}),
        ("test_convnext", 32, {}),
        ("deit_tiny_distilled_patch16_224", 32, {}),
    ],
)
def test_a_timm_artifact_opens_in_plain_timm(tmp_path, architecture, size, options):
    preprocessing = Preprocessing(
        size=size, resize_size=size + 8, mean=(0.1, 0.2, 0.3), std=(0.3, 0.2, 0.4), interpolation="bicubic"
    )
    model = made(f"timm/{architecture}", image_size=size, preprocessing=preprocessing, **options)
    save_artifact(model, tmp_path)
    network = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert_same_logits(network, model, size)
    config = resolve_data_config({}, model=network)
    assert tuple(config["mean"]) == preprocessing.mean
    assert tuple(config["std"]) == preprocessing.std
    assert tuple(config["input_size"]) == (3, size, size)
    assert config["interpolation"] == "bicubic"
    assert config["crop_mode"] == "center"
    assert config["crop_pct"] == pytest.approx(size / preprocessing.resize_size)
    assert network.num_classes == 3


def test_an_artifact_says_what_it_is_and_what_run_made_it(tmp_path):
    save_artifact(made("timm/test_efficientnet"), tmp_path, extra={"best": {"epoch": 3}, "name": "Bienen – ä"})
    config = read_config(tmp_path)
    assert config["run"] == {"best": {"epoch": 3}, "name": "Bienen – ä"}
    assert config["label_names"] == config["transferkit"]["class_names"] == NAMES
    assert set(config["transferkit"]["versions"]) == {"transferkit", "torch", "torchvision", "timm"}
    assert "Bienen – ä" in (tmp_path / "config.json").read_text(encoding="utf-8")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_class_names_of_any_script_come_back(tmp_path):
    names = ["日本", "naïve/名", 'quoted "x"', "emoji 🐝"]
    model = create_model("timm/test_efficientnet", class_names=names, weights=None, image_size=32)
    assert load_artifact(save_artifact(model, tmp_path)).class_names == tuple(names)


class Tied(nn.Module):
    """A module of the user's own with two layers that share a weight."""

    def __init__(self):
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.first, self.second, self.fc = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 10)
        self.second.weight = self.first.weight

    def forward(self, images):
        return self.fc(self.second(self.first(self.pool(images).flatten(1)).relu()).relu())


def test_tied_tensors_are_saved_and_stay_tied(tmp_path):
    preprocessing = Preprocessing(size=32, resize_size=32)
    model = adapt(Tied(), class_names=NAMES, preprocessing=preprocessing)
    loaded = load_artifact(save_artifact(model, tmp_path), network=Tied())
    assert_same_logits(loaded, model)
    assert loaded.network.second.weight is loaded.network.first.weight
    assert loaded.preprocessing == preprocessing


def test_a_module_of_the_users_own_must_be_built_again(tmp_path):
    model = adapt(Tied(), class_names=NAMES, preprocessing=Preprocessing(size=32, resize_size=32))
    save_artifact(model, tmp_path)
    assert not read_config(tmp_path)["transferkit"]["native"]
    with pytest.raises(ArtifactError, match=r"module of your own \(Tied\); build it again and pass it as network="):
        load_artifact(tmp_path)
    with pytest.raises(ArtifactError, match="cannot be rebuilt"):
        load_artifact(tmp_path, network=nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)))


def test_a_frozen_model_is_saved_whole_and_loaded_free(tmp_path):
    model = made("timm/test_efficientnet").freeze(["stem", "stage1"])
    loaded = load_artifact(save_artifact(model, tmp_path))
    assert loaded.frozen == frozenset()
    assert_same_logits(loaded, model)


def test_loading_draws_no_random_numbers(artifact):
    before = torch.get_rng_state()
    load_artifact(artifact)
    assert torch.equal(torch.get_rng_state(), before)


def test_loading_needs_no_network_and_no_pickle(artifact, tmp_path, monkeypatch):
    torchvision_artifact = save_artifact(made("torchvision/shufflenet_v2_x0_5"), tmp_path / "torchvision")

    def forbidden(*arguments, **keywords):
        raise AssertionError("loading must neither connect nor unpickle")

    for owner, name in (
        (socket, "socket"),
        (socket, "create_connection"),
        (pickle, "load"),
        (pickle, "loads"),
        (pickle, "Unpickler"),
        (torch, "load"),
        (torch.hub, "load_state_dict_from_url"),
    ):
        monkeypatch.setattr(owner, name, forbidden)
    assert load_artifact(artifact).class_names == tuple(NAMES)
    assert load_artifact(torchvision_artifact).class_names == tuple(NAMES)


def test_a_config_cannot_make_loading_open_another_file(artifact, tmp_path):
    planted, loot = tmp_path / "planted.pth", tmp_path / "executed"

    class Evil:
        def __reduce__(self):
            return Path.touch, (loot,)

    planted.write_bytes(pickle.dumps({"state_dict": Evil()}))
    edited(artifact, lambda config: config["transferkit"]["arguments"].update(checkpoint_path=str(planted)))
    with pytest.raises(ArtifactError) as error:
        load_artifact(artifact)
    assert "transferkit.arguments has fields that no saved model has: 'checkpoint_path'" in said(error)
    assert not loot.exists()


# Damage


def test_a_folder_without_a_model_is_named(tmp_path):
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(ArtifactError) as error:
            load_artifact(folder)
        assert said(error) == f"{folder} holds no saved model: there is no config.json in it"


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"3", b"null", b'{"transferkit": 1}', b'{"transferkit": {}}', b"\xff\xfe"]
)
def test_garbage_instead_of_a_config_is_named(artifact, content):
    (artifact / "config.json").write_bytes(content)
    with pytest.raises(ArtifactError) as error:
        load_artifact(artifact)
    assert "is no config of a saved model" in said(error)


def test_a_config_that_is_a_folder_is_named(tmp_path):
    (tmp_path / "config.json").mkdir()
    with pytest.raises(ArtifactError, match=r"'config.json' is no plain file; put the file itself there"):
        load_artifact(tmp_path)


def test_a_newer_format_asks_for_an_upgrade(artifact):
    edited(artifact, lambda config: config["transferkit"].update(format=3))
    with pytest.raises(ArtifactError) as error:
        load_artifact(artifact)
    assert "has format 3; this version reads up to 2: upgrade transferkit" in said(error)


def test_the_first_format_still_opens(artifact):
    model = load_artifact(artifact)

    def first(config):
        own = config["transferkit"]
        for name in ("weights_sha256", "temperature", "small_images", "stem"):
            del own[name]
        own["format"] = 1

    edited(artifact, first)
    config = json.loads((artifact / "config.json").read_text())
    del config["transferkit"]["config_sha256"]
    (artifact / "config.json").write_text(json.dumps(config))
    assert_same_logits(load_artifact(artifact), model)


@pytest.mark.parametrize("names", [[], [1, 2, 3], "abc", None])
def test_class_names_must_be_there(artifact, names):
    edited(artifact, lambda config: config["transferkit"].update(class_names=names))
    with pytest.raises(ArtifactError) as error:
        load_artifact(artifact)
    assert "transferkit.class_names" in said(error)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("backbone", "timm/test_efficientnut"),
        ("backbone", 5),
        ("class_names", ["ant", "ant", "bee"]),
        ("preprocessing", {"size": 32}),
        ("preprocessing", {"size": -1, "resize_size": 2, "mean": [0.5], "std": [0.5]}),
        ("eval_transform", "evil"),
        ("eval_transform", ["imagenet"]),
        ("head", {"paths": [], "dropout": 0.0, "hidden_size": None}),
        ("head", {"paths": ["nowhere"], "dropout": 0.0, "hidden_size": None}),
        ("head", {"paths": ["classifier"], "dropout": 3.0, "hidden_size": None}),
        ("head", {"paths": ["classifier"], "dropout": 0.0, "hidden_size": "wide"}),
        ("head", None),
        ("arguments", {"img_size": "wide"}),
        ("arguments", "img_size"),
        ("arguments", None),
    ],
)
def test_a_config_that_does_not_make_sense_is_named(artifact, key, value):
    edited(artifact, lambda config: config["transferkit"].update({key: value}))
    with pytest.raises(ArtifactError) as error:
        load_artifact(artifact)
    assert "cannot be rebuilt" in said(error) or "is no config of a saved model" in said(error)


@pytest.mark.parametrize("key", ["backbone", "head", "preprocessing", "eval_transform", "arguments", "weights"])
def test_a_config_that_lacks_something_is_named(artifact, key):
    edited(artifact, lambda config: config["transferkit"].pop(key))
    with pytest.raises(ArtifactError) as error:
        load_artifact(artifact)
    assert said(error) == f"{artifact / 'config.json'} is no config of a saved model: transferkit lacks '{key}'"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 40) | st.floats(allow_nan=False) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=4,
)


@given(data=st.data())
@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_other_value_in_a_config_loads_or_is_an_artifact_error(artifact, data):
    original = (artifact / "config.json").read_text()
    place = json.loads(original)["transferkit"]
    key = data.draw(st.sampled_from(sorted(set(place) - {"versions", "native", "weights", "config_sha256"})))
    inner = sorted(place[key]) if isinstance(place[key], dict) and place[key] else [None]
    path = [key, data.draw(st.sampled_from(inner))]
    value = data.draw(JSON)

    def change(config):
        own = config["transferkit"]
        if path[1] is None:
            own[key] = value
        else:
            own[key][path[1]] = value

    edited(artifact, change)
    with suppress(ArtifactError):
        model = load_artifact(artifact)
        eval_transform(model.eval_preset, model.preprocessing)
    (artifact / "config.json").write_text(original)


def truncated(file):
    file.write_bytes(file.read_bytes()[:-5])


def header_cut(file):
    file.write_bytes(file.read_bytes()[:100])


def flipped(file):
    content = bytearray(file.read_bytes())
    content[:8] = b"\xff" * 8
    file.write_bytes(bytes(content))


def emptied(file):
    file.write_bytes(b"")


def a_pickle(file):
    file.write_bytes(pickle.dumps({"weight": 1}))


def other_shape(file):
    state = load_file(file)
    save_file({**state, "conv_stem.weight": torch.zeros(2, 3, 3, 3)}, file)


def missing_key(file):
    state = load_file(file)
    del state["conv_stem.weight"]
    save_file(state, file)


def other_key(file):
    save_file({**load_file(file), "extra.weight": torch.zeros(1)}, file)


@pytest.mark.parametrize(
    "damage",
    [truncated, header_cut, flipped, emptied, a_pickle, other_shape, missing_key, other_key, Path.unlink],
    ids=lambda damage: damage.__name__,
)
def test_weights_that_are_damaged_or_do_not_fit_are_named(artifact, damage):
    damage(artifact / "model.safetensors")
    with pytest.raises(ArtifactError) as error:
        load_artifact(artifact)
    assert f"{artifact / 'model.safetensors'} does not hold the weights of this model" in said(error)


def test_weights_of_another_model_are_refused(artifact):
    model = made("torchvision/shufflenet_v2_x0_5")
    with pytest.raises(ArtifactError, match="does not hold the weights of this model"):
        load_weights(model, artifact)


def test_every_error_is_one_the_terminal_prints():
    assert issubclass(ArtifactError, TransferkitError)
    assert issubclass(OutputError, TransferkitError)


# Writing


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("size", [100, 500_000], ids=["weights", "config"])
def test_a_disk_that_is_full_leaves_the_old_files(artifact, small_files, size):
    before = contents(artifact)
    assert len(before["model.safetensors"]) < 500_000
    extra = {"note": "x" * 600_000}  # with the larger limit the weights fit and the config does not
    with small_files(size), pytest.raises(OutputError) as error:
        save_artifact(made("timm/test_efficientnet", hidden_size=4), artifact, extra=extra)
    assert f"the model cannot be saved in {artifact}" in said(error)
    assert contents(artifact) == before


def test_values_that_are_no_json_leave_the_old_files(artifact):
    before = contents(artifact)
    with pytest.raises(TypeError, match="not JSON serializable"):
        save_artifact(made("timm/test_efficientnet", hidden_size=4), artifact, extra={"x": object()})
    assert contents(artifact) == before


def test_an_interrupt_while_writing_leaves_the_old_files(artifact, monkeypatch):
    before = contents(artifact)

    def interrupt(*arguments, **keywords):
        Path(arguments[1]).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("transferkit.checkpoint.save_file", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_artifact(made("timm/test_efficientnet"), artifact)
    assert contents(artifact) == before


class Killed(BaseException):
    """What no code of ours catches."""


OPERATIONS = ("fsync", "replace", "unlink", "mkdir", "rmdir")


def killed_saves(folder, model):
    """Save a model, and let no file operation happen from the so many-th on; yield after each number."""
    before = shutil.copytree(folder, folder.with_name("before"))
    for at in range(1, 100):
        shutil.rmtree(folder)
        shutil.copytree(before, folder)
        left = at

        def wrapped(function):
            def call(*args, **options):
                nonlocal left
                left -= 1
                if left <= 0:
                    raise Killed
                return function(*args, **options)

            return call

        with pytest.MonkeyPatch.context() as patch:
            for name in OPERATIONS:
                patch.setattr(os, name, wrapped(getattr(os, name)))
            with suppress(Killed):
                save_artifact(model, folder)
        yield folder
        if left > 0:
            shutil.rmtree(before)
            return
    raise AssertionError("the save never ran through")


def test_a_save_that_is_killed_at_any_operation_leaves_the_old_or_the_new_model(tmp_path):
    models = [made("timm/test_efficientnet", hidden_size=width) for width in (2, 3, 4)]

    def opened(folder):
        """Tell which model is there, whole."""
        model = load_artifact(folder)
        number = model.head.hidden_size - 2
        assert_same_logits(model, models[number])
        return number

    folder, between, seen = save_artifact(models[0], tmp_path / "run"), None, []
    for state in killed_saves(folder, models[1]):
        seen.append(opened(state))
        if seen[-1] == 1 and between is None:
            between = shutil.copytree(state, tmp_path / "between")
    assert len(seen) > 6
    assert set(seen) == {0, 1}
    assert seen == sorted(seen)
    assert sorted(path.name for path in between.iterdir()) == [".partial", "config.json", "model.safetensors"]
    assert {opened(state) for state in killed_saves(between, models[2])} == {1, 2}  # killed again, where a save was
    assert sorted(path.name for path in between.iterdir()) == ["config.json", "model.safetensors"]


# One process that imports torch, and a child for each kill.
KILLED = """
import os, random, signal, sys, time
import torch
from transferkit.checkpoint import load_artifact, save_artifact
from transferkit.create import create_model

torch.set_num_threads(1)
folder, kills, chance, seen = sys.argv[1], int(sys.argv[2]), random.Random(0), []

def made(classes):
    return create_model("timm/test_efficientnet", num_classes=classes, weights=None, image_size=32, seed=classes)

models = [made(classes) for classes in (2, 3)]  # other heads: a mixture of the two would not open
save_artifact(models[0], folder)
started = time.perf_counter()
save_artifact(models[0], folder)
usual = time.perf_counter() - started
for kill in range(kills):
    child = os.fork()
    if not child:
        try:
            while True:
                for model in models:
                    save_artifact(model, folder)
        finally:
            os._exit(1)
    time.sleep(chance.uniform(0, 4 * usual))
    os.kill(child, signal.SIGKILL)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1]), "the writer ended by itself"
    found = load_artifact(folder)
    classes = len(found.class_names)
    wanted = models[classes - 2].network.state_dict()
    assert all(torch.equal(value, wanted[key]) for key, value in found.network.state_dict().items())
    seen.append(classes)
print(sorted(set(seen)))
"""


@pytest.mark.long
def test_a_process_that_is_killed_while_saving_leaves_a_whole_model(tmp_path):
    command = [sys.executable, "-c", KILLED, str(tmp_path / "run"), "50"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=250)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[2, 3]\n"


def test_an_error_between_the_two_moves_leaves_the_new_model(artifact, monkeypatch):
    model = made("timm/test_efficientnet", hidden_size=4)
    real = os.replace

    def failing(source, target):
        if Path(target).name == "config.json":
            raise OSError("the disk is gone")
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", failing)
        with pytest.raises(OutputError) as error:
            save_artifact(model, artifact)
    assert said(error).endswith("the disk is gone")
    assert_same_logits(load_artifact(artifact), model)
    other = made("timm/test_efficientnet", dropout=0.5)
    save_artifact(other, artifact)
    assert load_artifact(artifact).head.dropout == 0.5
    assert sorted(path.name for path in artifact.iterdir()) == ["config.json", "model.safetensors"]


def test_a_temperature_goes_with_the_model_of_a_save_that_was_killed_half_way(tmp_path):
    models = [made("timm/test_efficientnet", hidden_size=width) for width in (2, 3)]
    folder = save_artifact(models[0], tmp_path / "run")
    between = next(state for state in killed_saves(folder, models[1]) if load_artifact(state).head.hidden_size == 3)
    save_temperature(between, 1.5)
    model = load_artifact(between)
    assert model.temperature == 1.5
    assert_same_logits(model, models[1])
    assert sorted(path.name for path in between.iterdir()) == ["config.json", "model.safetensors"]


def test_what_could_not_be_opened_again_is_not_saved(artifact):
    before = contents(artifact)
    model = made("timm/test_efficientnet")
    model.class_names = ("x" * 10_001, "b", "c")
    with pytest.raises(OutputError, match=r"label_names\[0\] is 'xxx.*xxx', and must be a text of 10,000 char"):
        save_artifact(model, artifact)
    with pytest.raises(OutputError, match=r"config.json would have [\d,]+ bytes, 16,777,216 at most"):
        save_artifact(made("timm/test_efficientnet"), artifact, extra={"note": "x" * 2**24})
    assert contents(artifact) == before


def test_saving_again_replaces_the_model(artifact):
    model = made("timm/test_efficientnet", hidden_size=4)
    save_artifact(model, artifact)
    assert_same_logits(load_artifact(artifact), model)


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError) as error:
        save_artifact(made("timm/test_efficientnet"), tmp_path / "file")
    assert f"the model cannot be saved in {tmp_path / 'file'}" in said(error)


def test_a_folder_in_the_place_of_a_file_is_named(tmp_path):
    (tmp_path / "config.json").mkdir()
    with pytest.raises(OutputError, match="cannot be saved"):
        save_artifact(made("timm/test_efficientnet"), tmp_path)
    assert [path.name for path in tmp_path.iterdir() if path.is_file() and path.name.startswith(".")] == []
