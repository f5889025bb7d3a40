"""The command line under the real `torchrun`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sparsekern.cli.main import main
from tests.tiny import TEXT, save_folder

from .pool import WATCHDOG, succeeded
from .runs import digests

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """The arguments of `sparsekern prune`, without the folder for the result."""
    folder = tmp_path_factory.mktemp("torchrun")
    source = save_folder(folder / "source", num_hidden_layers=2)
    (folder / "text.txt").write_text(TEXT * 4)
    data = ["--calibration", str(folder / "text.txt"), "--samples", "9", "--length", "16", "--batch-size", "1"]
    return ["prune", str(source), "--method", "wanda", *data]


def torchrun(*program: str, processes: int = 2, options: tuple[str, ...] = ("--standalone",), prefix: tuple[str, ...] = ()):
    start = [*prefix, sys.executable, "-m", "torch.distributed.run", *options, f"--nproc-per-node={processes}", *program]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(start, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment)


@pytest.fixture(scope="module")
def alone(command, tmp_path_factory):
    """The digests of the files of one process."""
    out = tmp_path_factory.mktemp("alone") / "out"
    assert main([*command, "--out", str(out), "--leaves", "8"]) == 0
    return digests(out)


@pytest.mark.slow
def test_a_killed_rank_ends_the_others_and_any_number_goes_on(ranks, command, tmp_path):
    killed, text = tmp_path / "killed", command[command.index("--calibration") + 1]
    done = torchrun("tests/ranks/killed_rank.py", *command, "--stream", "--out", str(killed))
    _, errors = done.communicate(timeout=WATCHDOG * 2)
    assert done.returncode != 0
    said = [line for line in errors.splitlines() if line.startswith("sparsekern prune: ")]
    assert said and all("--resume" in line for line in said), errors
    assert list(killed.rglob("block-00000*")) and not list(killed.rglob("block-00001.safetensors"))
    assert main([*command, "--stream", "--out", str(tmp_path / "streamed"), "--leaves", "8"]) == 0
    expected = digests(tmp_path / "streamed")
    shutil.copytree(killed, tmp_path / "by four")
    assert main([*command, "--stream", "--out", str(killed), "--resume", "--leaves", "8"]) == 0
    assert digests(killed) == expected
    succeeded(ranks.run(4, "tests.ranks.runs:resumed_text", command[1], text, tmp_path / "by four"))
    assert digests(tmp_path / "by four") == expected


@pytest.fixture
def two_hosts():
    """The `ip netns exec` prefixes of two network namespaces that reach one another; none where this user may not make them."""
    if shutil.which("ip") is None:
        yield []
        return
    names = [f"sparsekern-{os.getpid()}-{host}" for host in range(2)]
    ends = [f"sk{os.getpid() % 100000}-{host}" for host in range(2)]
    steps = [["netns", "add", name] for name in names]
    steps.append(["link", "add", ends[0], "type", "veth", "peer", "name", ends[1]])
    for host, (name, end) in enumerate(zip(names, ends, strict=True)):
        inside = ["netns", "exec", name, "ip"]
        steps += [["link", "set", end, "netns", name], [*inside, "addr", "add", f"10.93.7.{host + 1}/24", "dev", end]]
        steps += [[*inside, "link", "set", link, "up"] for link in ("lo", end)]
    try:
        for step in steps:
            try:
                subprocess.run(["ip", *step], check=True, capture_output=True, text=True)
            except subprocess.CalledProcessError:  # no right to make them
                ends = []
                break
        yield [("ip", "netns", "exec", name, "env", f"GLOO_SOCKET_IFNAME={end}") for name, end in zip(names, ends, strict=False)]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


@pytest.mark.slow
def test_torchrun_prunes_with_the_bits_of_one_process_and_one_voice(two_hosts, command, alone, tmp_path):
    """On two machines where network namespaces can stand for them, else with two processes of one."""
    program = ("-m", "sparsekern", *command, "--out", str(tmp_path / "out"))
    together = "--nnodes=2", "--master-addr=10.93.7.1", "--master-port=29517"
    nodes = [
        torchrun(*program, processes=1, options=(*together, f"--node-rank={host}"), prefix=prefix)
        for host, prefix in enumerate(two_hosts)
    ] or [torchrun(*program)]
    try:
        said = [node.communicate(timeout=WATCHDOG * 2) for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert not any(node.returncode for node in nodes), said
    assert digests(tmp_path / "out") == alone
    output, errors = ("".join(part) for part in zip(*said, strict=True))
    assert output.count("saved to") == 1
    assert errors.count("loading ") == 1
    assert "MB by the formula" in output
