"""Training in several processes is that in one, whatever is unfrozen, sharded, interrupted or spread over hosts."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import timm
import torch
import typer
from accelerate.commands.launch import launch_command_parser
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.run import get_args_parser as torchrun_parser
from torch.nn.modules.batchnorm import _BatchNorm

from processes import jobs
from transferkit import Finetuner, History, SettingError, load_artifact
from transferkit.cli import app
from transferkit.devices import make_accelerator, processes_per_machine
from transferkit.distribution import _parts, synchronised_norms

pytestmark = pytest.mark.timeout(1200)  # a start of processes takes seconds, and on a busy machine a minute

PAGE = Path(__file__).parents[1] / "docs" / "how-to" / "many-processes.md"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
TWO = [*TORCHRUN, "--standalone", "--nproc-per-node", "2"]
COMPARED = ["convnext", "vit", "kept_statistics", "scalars", "kept"]
FAILING = ["wrapped_once", "changed", "other_rates", "other_facts", "other_pictures"]
SHARDED = ["sharded", "uninterrupted_shards", "interrupted_shards", "continued_shards", "broken_shards"]
OTHER = ["batch_norm", "stopped", "finetuner", "uninterrupted", "interrupted"]
FILES = {
    "config.json",
    "curves.png",
    "history.csv",
    "model.safetensors",
    "predictions.png",
    "report.html",
    "validation.csv",
}


def started(command: list[str], *, folder: Path, **environment: str) -> subprocess.Popen[str]:
    known = {name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE_", "PYTEST_"))}
    return subprocess.Popen(
        command,
        cwd=folder,
        env={**known, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process: subprocess.Popen[str]) -> tuple[str, str]:
    try:
        return process.communicate(timeout=400)
    finally:
        if process.poll() is None:
            process.terminate()  # the launcher ends what it has started
            process.communicate(timeout=60)


def ran(command: list[str], *, folder: Path) -> tuple[str, str]:
    process = started(command, folder=folder)
    output, errors = ended(process)
    assert process.returncode == 0, errors
    return output, errors


class Run(NamedTuple):
    """What one process of a job has seen."""

    facts: dict[str, Any]
    weights: dict[str, Tensor]


def read(folder: Path, job: str, rank: int) -> Run:
    return Run(json.loads((folder / f"{job}-{rank}.json").read_text()), load_file(folder / f"{job}-{rank}.safetensors"))


def furthest(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    assert first.keys() == second.keys()
    return max(float((first[key].double() - second[key].double()).abs().max()) for key in first)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of what all jobs have seen in two processes."""
    folder = tmp_path_factory.mktemp("both")
    ran([*TWO, jobs.__file__, str(folder), *COMPARED, *FAILING, *SHARDED, *OTHER], folder=folder)
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of what the jobs that are compared have seen in one process."""
    folder = tmp_path_factory.mktemp("alone")
    jobs.main(folder, *COMPARED, "batch_norm")
    return folder


# Two against one, of the same global batch


@pytest.mark.long
@pytest.mark.parametrize("job", COMPARED)
def test_two_processes_train_the_weights_that_one_trains(both: Path, alone: Path, job: str) -> None:
    one, (first, second) = read(alone, job, 0), (read(both, job, rank) for rank in (0, 1))
    assert first.facts == second.facts
    assert furthest(first.weights, second.weights) == 0
    assert furthest(first.weights, one.weights) < 1e-6
    assert [each["val_accuracy"] for each in first.facts["history"]] == [
        each["val_accuracy"] for each in one.facts["history"]
    ]
    for figure in ("train_loss", "val_loss"):
        assert [each[figure] for each in first.facts["history"]] == pytest.approx(
            [each[figure] for each in one.facts["history"]], rel=1e-5
        )


@pytest.mark.long
def test_every_validation_picture_counts_once(both: Path) -> None:
    facts = read(both, "convnext", 1).facts
    assert facts["count"] == 13
    for record in facts["history"]:
        assert record["val_accuracy"] * 13 == pytest.approx(round(record["val_accuracy"] * 13), abs=1e-9)


@pytest.mark.long
def test_batch_norms_in_training_see_their_process_alone(both: Path, alone: Path) -> None:
    one, (first, second) = read(alone, "batch_norm", 0), (read(both, "batch_norm", rank) for rank in (0, 1))
    assert furthest(first.weights, second.weights) == 0
    assert furthest(first.weights, one.weights) > 1e-2


@pytest.mark.long
def test_without_wrapping_again_after_an_unfreeze_the_processes_would_drift_apart(both: Path) -> None:
    first, second = (read(both, "wrapped_once", rank) for rank in (0, 1))
    assert len(first.facts["history"]) == 2  # epochs before the unfreeze
    assert "have drifted apart" in first.facts["error"]
    assert furthest(first.weights, second.weights) > 1e-3


@pytest.mark.long
@pytest.mark.parametrize(
    ("job", "message"),
    [
        ("changed", "the processes' copies of the network have drifted apart; a callback that changes weights"),
        ("other_rates", "process 1 has learning rates of"),
        ("other_facts", "process 1 has list of pictures '1' where process 0 has '0'; give all machines the same"),
        ("other_pictures", "process 1 has training pictures 25 where process 0 has 24; give all machines the same"),
    ],
)
def test_processes_that_differ_end_with_the_same_sentence(both: Path, job: str, message: str) -> None:
    assert all(message in read(both, job, rank).facts["error"] for rank in (0, 1))


@pytest.mark.long
def test_a_wish_of_one_process_to_stop_ends_all_after_the_same_epoch(both: Path) -> None:
    assert [len(read(both, "stopped", rank).facts["history"]) for rank in (0, 1)] == [2, 2]


@pytest.mark.long
@pytest.mark.parametrize("kind", ["", "_shards"])
def test_an_interrupted_run_goes_on_to_the_same_weights_to_the_bit(both: Path, kind: str) -> None:
    whole, parts = (read(both, f"{name}{kind}", 1) for name in ("uninterrupted", "interrupted"))
    assert parts.facts["message"] == "interrupted after step 2 of 3 in epoch 3 of 4"
    assert furthest(whole.weights, parts.weights) == 0
    assert whole.facts["history"] == parts.facts["history"]


@pytest.mark.long
def test_a_script_writes_and_ends_in_every_process_with_the_best_weights_of_the_main_one(both: Path) -> None:
    first, second = (read(both, "finetuner", rank) for rank in (0, 1))
    assert first.facts == second.facts
    assert {path.name for path in both.glob("run-of-*")} == {"run-of-0"}
    saved = load_artifact(both / "run-of-0").network.state_dict()
    assert furthest(saved, first.weights) == furthest(saved, second.weights) == 0


# Sharded


@pytest.mark.long
def test_a_sharded_network_holds_no_whole_parameter_and_trains_the_same(both: Path) -> None:
    run, replicated = read(both, "sharded", 0), read(both, "convnext", 0)
    parameters = dict(jobs.model_of("timm/test_convnext").network.named_parameters())
    assert (run.facts["spread"], run.facts["whole"]) == (len(parameters), [])
    assert run.facts["history"] == replicated.facts["history"]
    assert run.facts["count"] == 13
    assert furthest(run.weights, replicated.weights) < 1e-6
    assert run.facts["native"]


@pytest.mark.long
def test_a_sharded_network_is_saved_as_any_other(both: Path) -> None:
    model = jobs.model_of("timm/test_convnext").eval()
    model.network.load_state_dict(read(both, "sharded", 1).weights)
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(load_artifact(both / "artifact").eval()(images), model(images))


@pytest.mark.long
def test_a_sharded_run_goes_on_in_the_same_trainer(both: Path) -> None:
    whole, parts = (read(both, f"{name}_shards", 0) for name in ("uninterrupted", "continued"))
    assert furthest(whole.weights, parts.weights) == 0


@pytest.mark.long
def test_after_an_error_a_sharded_network_is_native_with_the_weights_it_came_with(both: Path) -> None:
    facts = read(both, "broken_shards", 0).facts
    assert (facts["error"], facts["as before"]) == ("broken", True)


def test_blocks_are_gathered_one_by_one_unless_they_return_a_view() -> None:
    names = {type(module).__name__ for module in _parts(jobs.model_of("timm/test_convnext"))}
    assert names == {"ConvNeXtStage", "ConvNeXtBlock"}


def test_one_process_cannot_shard() -> None:
    trainer = jobs.trainer_of("timm/test_convnext", shard=True)
    with pytest.raises(SettingError, match="spreads a network over several processes, and this is one: start the run"):
        trainer.fit(*jobs.batches_of(trainer), epochs=1)


# Synchronised batch norms


def test_batch_norms_cannot_be_synchronised_on_a_cpu() -> None:
    tuner = Finetuner(
        "timm/test_efficientnet", weights=None, image_size=32, device="cpu", sync_batch_norm=True, progress=False
    )
    with pytest.raises(SettingError, match="sync_batch_norm needs GPUs"):
        tuner.fit(jobs.DATA)


@pytest.mark.parametrize("name", ["test_efficientnet", "test_resnet"])
def test_synchronised_norms_are_what_timm_converts_to_and_native_again_afterwards(name: str) -> None:
    network = timm.create_model(name, pretrained=False).eval()
    images, kinds = torch.randn(2, 3, 32, 32), [type(module) for module in network.modules()]
    expected, keys = network(images), list(network.state_dict())
    with synchronised_norms(network, torch.device("cuda")):
        norms = [type(module) for module in network.modules() if isinstance(module, _BatchNorm)]
        assert list(network.state_dict()) == keys
        assert torch.equal(network(images), expected)
    converted = timm.layers.convert_sync_batchnorm(timm.create_model(name, pretrained=False))
    assert norms == [type(module) for module in converted.modules() if isinstance(module, _BatchNorm)]
    assert [type(module) for module in network.modules()] == kinds
    assert torch.equal(network(images), expected)


def test_a_batch_norm_of_ones_own_cannot_be_synchronised() -> None:
    class Odd(nn.BatchNorm2d):
        pass

    with (
        pytest.raises(SettingError, match="and 0 is neither; leave it out"),
        synchronised_norms(nn.Sequential(Odd(3)), torch.device("cuda")),
    ):
        pass


# What launchers say


@pytest.mark.parametrize("name", ["FSDP", "DEEPSPEED", "MEGATRON_LM"])
def test_other_engines_of_accelerate_are_refused(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    with pytest.raises(SettingError, match=rf"accelerate launch --use_{name.lower()} is not what trains here.*--shard"):
        make_accelerator("cpu")


def test_the_precision_and_the_device_of_accelerate_launch_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert (make_accelerator().mixed_precision, make_accelerator().device.type) == ("bf16", "cpu")
    assert make_accelerator(precision="fp32").mixed_precision == "no"


def test_the_processes_of_a_machine_share_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert processes_per_machine() == 4


# What the documentation says


LINES = [
    shlex.split(line)
    for block in re.findall(r"^```bash\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
]


@pytest.mark.parametrize("words", LINES, ids=" ".join)
def test_the_launchers_and_the_command_take_the_lines_of_the_documentation(words: list[str]) -> None:
    if words[0] == "torchrun":
        launch = torchrun_parser().parse_args(words[1:])
    else:
        assert words[:2] == ["accelerate", "launch"]
        launch = launch_command_parser().parse_args(words[2:])
    assert (launch.module, launch.training_script) == (True, "transferkit")
    group = typer.main.get_command(app)
    context = group.make_context("transferkit", launch.training_script_args)
    name, subcommand, rest = group.resolve_command(context, launch.training_script_args)  # type: ignore[attr-defined]
    subcommand.make_context(name, rest, parent=context)


# The command


def command(pictures: Path, output: Path, *options: str, batch_size: int = 3) -> list[str]:
    given = {"--model": "timm/test_convnext", "--weights": "none", "--epochs": 12, "--image-size": 32, "--workers": 0}
    given |= {"--batch-size": batch_size, "--output": output}
    pairs = chain.from_iterable(given.items())
    return ["-m", "transferkit", "finetune", str(pictures), *map(str, pairs), *options]


class Finished(NamedTuple):
    folder: Path
    output: str
    errors: str


@pytest.fixture(scope="module")
def finished(picture_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A run of the command in two processes."""
    folder = tmp_path_factory.mktemp("command")
    return Finished(folder / "run", *ran([*TWO, *command(picture_folder, folder / "run", "--json")], folder=folder))


@pytest.mark.long
def test_one_process_prints_and_writes(finished: Finished) -> None:
    result = json.loads(finished.output)
    assert len(result["history"]) == 12
    assert {path.name for path in finished.folder.iterdir()} == FILES
    assert {path.name for path in finished.folder.parent.iterdir()} == {"run"}
    for line in ("policy:", "epoch 1: training head", ": training stem, stage1", "epoch 7/12"):
        assert finished.errors.count(line) == 1


@pytest.mark.long
def test_one_process_leaves_the_same_folder(finished: Finished, picture_folder: Path, tmp_path: Path) -> None:
    ran([sys.executable, *command(picture_folder, tmp_path / "run", batch_size=6)], folder=tmp_path)
    assert {path.name for path in (tmp_path / "run").iterdir()} == FILES
    one, two = (load_file(folder / "model.safetensors") for folder in (tmp_path / "run", finished.folder))
    assert furthest(one, two) < 1e-4  # AdamW makes more of a rounding error than SGD
    settings = [json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "run", finished.folder)]
    assert settings[0].keys() == settings[1].keys()


@pytest.mark.long
def test_accelerate_launch_does_the_same(finished: Finished, picture_folder: Path, tmp_path: Path) -> None:
    launch = [*ACCELERATE, "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    output, _ = ran([*launch, *command(picture_folder, tmp_path / "run", "--json")], folder=tmp_path)
    assert {path.name for path in (tmp_path / "run").iterdir()} == FILES
    assert len(json.loads(output)["history"]) == 12
    assert_same_run(tmp_path / "run", finished.folder)


def assert_same_run(first: Path, second: Path) -> None:
    assert furthest(*(load_file(folder / "model.safetensors") for folder in (first, second))) == 0
    tables = [History.load_csv(folder / "history.csv").to_dicts() for folder in (first, second)]
    assert [{**each, "seconds": 0} for each in tables[0]] == [{**each, "seconds": 0} for each in tables[1]]


@pytest.mark.long
def test_a_run_whose_launcher_is_stopped_goes_on_to_the_same_weights(
    finished: Finished, picture_folder: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    for number in (signal.SIGINT, signal.SIGTERM):
        before = epochs_of(run)
        process = started([*TWO, *command(picture_folder, run, "--resume")], folder=tmp_path)
        while process.poll() is None and epochs_of(run) == before:
            time.sleep(0.01)
        process.send_signal(number)
        _, errors = ended(process)
        assert process.returncode != 0
        assert errors.count("transferkit: interrupted after step") == 1
        assert not (run / "curves.png").exists()
    other = started([sys.executable, *command(picture_folder, run, "--resume")], folder=tmp_path)
    assert "was saved by 2 processes, and is to go on with 1; start as many" in ended(other)[1]
    assert other.returncode == 2
    ran([*TWO, *command(picture_folder, run, "--resume")], folder=tmp_path)
    assert_same_run(run, finished.folder)


def epochs_of(run: Path) -> int:
    file = run / "history.csv"
    return len(file.read_text().splitlines()) if file.exists() else 0


@pytest.mark.long
def test_an_error_in_one_process_ends_all_soon(tmp_path: Path) -> None:
    before = time.monotonic()
    process = started([*TWO, jobs.__file__, str(tmp_path), "alone"], folder=tmp_path)
    _, errors = ended(process)
    assert process.returncode != 0
    assert "TransferkitError: this picture is broken" in errors
    assert time.monotonic() - before < 240  # before anyone gives up waiting


# Two hosts


class Host(NamedTuple):
    """Where one of two machines runs what it is given, and how it is reached."""

    prefix: list[str]
    address: str
    interface: str


@pytest.fixture
def hosts() -> Iterator[list[Host]]:
    """Two network namespaces joined by a cable where this machine allows them, else its loopback twice."""
    tag = f"tk{os.getpid()}"
    names, ends, addresses = [f"{tag}-a", f"{tag}-b"], [f"{tag}a", f"{tag}b"], ["10.213.77.1", "10.213.77.2"]
    commands = [["netns", "add", name] for name in names]
    commands.append(["link", "add", ends[0], "type", "veth", "peer", "name", ends[1]])
    for name, end, address in zip(names, ends, addresses, strict=True):
        commands += [["link", "set", end, "netns", name], ["-n", name, "addr", "add", f"{address}/24", "dev", end]]
        commands += [["-n", name, "link", "set", each, "up"] for each in (end, "lo")]
    try:
        for each in commands:
            subprocess.run(["ip", *each], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        yield [Host([], "127.0.0.1", "lo")] * 2
    else:
        parts = zip(names, addresses, ends, strict=True)
        yield [Host(["ip", "netns", "exec", name], address, end) for name, address, end in parts]
    finally:
        for name in names:
            with contextlib.suppress(OSError):
                subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


@pytest.mark.long
def test_two_hosts_train_the_same_and_the_first_writes(
    finished: Finished, picture_folder: Path, tmp_path: Path, hosts: list[Host]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    rendezvous = ["--rdzv-backend", "c10d", "--rdzv-id", "bees", "--rdzv-endpoint", f"{hosts[0].address}:{port}"]
    agents = []
    for number, host in enumerate(hosts):
        launch = [*host.prefix, *TORCHRUN, "--nnodes", "2", "--nproc-per-node", "1", *rendezvous]
        # In a namespace the first does not know itself by the address that the others know it by.
        launch += ["--local-addr", host.address, "--rdzv-conf", f"is_host={number == 0}"]
        folder = tmp_path / f"host{number}"
        folder.mkdir()
        agent = [*launch, *command(picture_folder, folder / "run")]
        agents.append(started(agent, folder=folder, GLOO_SOCKET_IFNAME=host.interface))
    ends = [ended(agent) for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], ends
    written = [tmp_path / f"host{number}" / "run" for number in (0, 1)]
    assert sum(folder.exists() for folder in written) == 1  # the rendezvous chooses who comes first
    assert_same_run(next(folder for folder in written if folder.exists()), finished.folder)
    assert sum("epoch 7/12" in errors for _, errors in ends) == 1
    assert sum("best epoch" in output for output, _ in ends) == 1
