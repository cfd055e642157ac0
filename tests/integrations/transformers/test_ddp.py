"""Two processes against one with the double batch: DDP through accelerate, and FSDP2. Gloo, on the CPU."""

import os
import socket
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from helpers import tiny
from helpers.paths import ROOT
from helpers.subprocesses import fork
from peft import PeftModel
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

import hf_sparselr
from hf_sparselr.integrations.transformers.sharding import FSDP2_TORCH

pytestmark = pytest.mark.xdist_group("ddp")  # they share what their fixtures make

STEPS = 3
BATCH = 4  # of all processes together
KINDS = ("factors", "full", "adapter")
needs_fsdp2 = pytest.mark.skipif(torch.__version__ < FSDP2_TORCH, reason=f"FSDP2 needs torch >= {FSDP2_TORCH}")
WAYS = [pytest.param("", id="ddp"), pytest.param("fsdp2-", id="fsdp2", marks=needs_fsdp2)]
DATA = torch.randint(3, tiny.VOCAB, (STEPS * BATCH, 16), generator=torch.Generator().manual_seed(1))


def build(folder: Path, kind: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).train()
    return hf_sparselr.as_peft_model(model) if kind == "adapter" else hf_sparselr.train_mode(model, kind)


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def loss_of(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, labels=ids).loss


def train(folder: Path, kind: str) -> tuple[Accelerator, nn.Module]:
    """Through accelerate, whatever the number of processes."""
    accelerator = Accelerator(cpu=True)
    model = build(folder, kind)
    loader = DataLoader(DATA, batch_size=BATCH // accelerator.num_processes)
    model, optimizer, loader = accelerator.prepare(model, optimizer_of(model), loader)
    for ids in loader:
        accelerator.backward(loss_of(model, ids))
        optimizer.step()
        optimizer.zero_grad()
    return accelerator, model


def train_sharded(folder: Path, kind: str, dtype: torch.dtype | None = None) -> nn.Module:
    """FSDP2 as accelerate applies it: a unit a block; it leaves the CPU to DDP, hence by hand."""
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    model = build(folder, kind, dtype=torch.float64 if dtype is None else torch.float32)
    policy = MixedPrecisionPolicy(param_dtype=dtype)
    for block in model.get_decoder().layers:
        fully_shard(block, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    optimizer = optimizer_of(model)
    for batch in DATA.split(BATCH):
        loss_of(model, batch.chunk(world)[rank]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def run_processes(folder: Path) -> None:
    """Trains in two processes, which leave their results in the folder of the packed model."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.start_processes(_process, (port, folder), nprocs=2, start_method="fork")


def _process(rank: int, port: int, folder: Path) -> None:
    address = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "WORLD_SIZE": 2,
        "RANK": rank,
        "LOCAL_RANK": rank,
    }
    os.environ.update({name: str(value) for name, value in address.items()})
    train_everything(folder, folder)
    torch.distributed.destroy_process_group()


def train_everything(folder: Path, output: Path) -> None:
    torch.set_num_threads(1)
    for kind in KINDS:
        accelerator, model = train(folder, kind)
        assert accelerator.num_processes == 2 and type(model).__name__ == "DistributedDataParallel"
        model = accelerator.unwrap_model(model)
        torch.save(model.state_dict(), output / f"{kind}-{accelerator.process_index}.pt")
        model.save_pretrained(output / f"saved-{kind}", is_main_process=accelerator.is_main_process)
    if torch.__version__ < FSDP2_TORCH:
        return
    options = StateDictOptions(full_state_dict=True)
    for kind in KINDS:
        model = train_sharded(folder, kind)
        state = get_model_state_dict(model, options=options)
        torch.save(state, output / f"fsdp2-{kind}-{accelerator.process_index}.pt")
        if accelerator.is_main_process:
            model.save_pretrained(output / f"saved-fsdp2-{kind}", state_dict=state)
    state = get_model_state_dict(train_sharded(folder, "full", torch.bfloat16), options=options)
    torch.save(state, output / f"fsdp2-bf16-{accelerator.process_index}.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packed model, and what two processes made of it."""
    folder = tmp_path_factory.mktemp("ddp")
    hf_sparselr.compress(tiny.build("llama"), tiny.settings()).save_pretrained(folder)
    paths = [str(path) for path in (ROOT, ROOT / "tests", Path(__file__).parent)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "CUDA_VISIBLE_DEVICES": ""}
    code = f"from pathlib import Path; from test_ddp import run_processes; run_processes(Path({str(folder)!r}))"
    run = fork(code, environment, folder, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    return folder


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    AcceleratorState._reset_state(reset_partial_state=True)  # of other tests
    return {kind: train(folder, kind)[1].state_dict() for kind in KINDS}


def check(states: list[dict], expected: dict, start: dict) -> None:
    for state in states:
        assert state.keys() == expected.keys()
        for name, tensor in expected.items():
            assert state[name].dtype == tensor.dtype
            torch.testing.assert_close(state[name], tensor, rtol=1e-6, atol=1e-9, msg=name)
            if name.endswith(".mask"):
                assert torch.equal(state[name], tensor) and torch.equal(tensor, start[name])
    assert tiny.same(*states)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WAYS)
def test_two_processes_equal_one(folder: Path, alone: dict, kind: str, way: str) -> None:
    start = build(folder, kind).state_dict()
    moved = {name for name in start if not torch.equal(start[name], alone[kind][name])}
    assert moved == {name for name, p in build(folder, kind).named_parameters() if p.requires_grad}
    check([torch.load(folder / f"{way}{kind}-{rank}.pt") for rank in (0, 1)], alone[kind], start)


@pytest.mark.parametrize("kind", ["factors", "full"])
@pytest.mark.parametrize("way", WAYS)
def test_what_two_processes_save_reloads_packed(folder: Path, kind: str, way: str) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(folder / f"saved-{way}{kind}", dtype=torch.float64)
    assert tiny.same(loaded.state_dict(), torch.load(folder / f"{way}{kind}-0.pt"))


@pytest.mark.parametrize("way", WAYS)
def test_the_adapter_of_two_processes_reloads(folder: Path, way: str) -> None:
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    saved = folder / f"saved-{way}adapter"
    loaded = PeftModel.from_pretrained(base, saved, autocast_adapter_dtype=False)
    assert tiny.same(loaded.state_dict(), torch.load(folder / f"{way}adapter-0.pt"))


@needs_fsdp2
def test_fsdp2_in_mixed_precision_leaves_the_mask_alone(folder: Path, alone: dict) -> None:
    state = torch.load(folder / "fsdp2-bf16-0.pt")
    for name, tensor in alone["full"].items():
        if name.endswith(".mask"):
            assert torch.equal(state[name], tensor)
        else:
            assert (state[name].double() - tensor).norm() < 0.1 * tensor.norm(), name
