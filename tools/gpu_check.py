"""Is training right and fast on this machine's card? A few minutes, one table.

    python -m tools.gpu_check [CHECK ...] [--device cuda|cpu] [--out FILE]

    attention   each kernel against fp64 arithmetic, forward and backward, on packed documents
    model       logits and gradient in fp32 against the CPU's, loss in 16 bits against fp32
    steps       training compiles once, and forward and backward wait for nothing
    memory      the predicted peak of a step against what the device's allocator held
    speed       tokens a second by rows of a micro batch, with and without compilation
    stages      each stage for some steps, the first one killed and gone on with

On a CPU only what holds there is tried. Exit code 1 where a check fails; the table goes to the
terminal, and of a card to docs/gpu.md.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attention import attend, document_mask, load_varlen
from dataset import Batch, DataConfig, PackedDataset, load_datasets
from losses import cross_entropy_sum
from model import ModelConfig, Transformer
from tokenizer import Tokenizer, default_folder
from tools.made_rows import write_data
from trainlib.batches import ALONE, Place, StepBatch, StepLoader
from trainlib.errors import UserError
from trainlib.files import refuse_to_overwrite
from trainlib.hardware import Choice, choose_hardware, find_facts, read_table
from trainlib.loop import optimizer_step
from trainlib.memory import peak_bytes
from trainlib.mfu import flops_per_token, matmul_peak
from trainlib.optim import OptimConfig, build_optimizers
from trainlib.runtime import DTYPES, Hardware, looking, use_hardware, warm_up

LENGTH = 512
STEPS = 10
WORDS = {True: "OK", False: "FAILED", None: ""}
TABLE = ("| | check | found |", "| --- | --- | --- |")
STAGES = {"pretrain": "train.py", "sft": "sft_train.py", "dpo": "dpo_train.py"}
TINY = ModelConfig(
    hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, head_dim=32,
)  # fmt: skip


class Line(NamedTuple):
    """A line of the table; fine is None where nothing is required."""

    check: str
    fine: bool | None
    told: str


class Machine(NamedTuple):
    """What all checks work on."""

    choice: Choice
    data: PackedDataset
    sizes: ModelConfig
    folder: Path

    def hardware(self, rows: int = 0) -> Hardware:
        """The choice in use, with another micro batch if one is given."""
        choice = replace(self.choice, micro_batch_size=rows) if rows else self.choice
        return use_hardware(choice)

    def batch(self, rows: int) -> Batch:
        """The first rows of the data, on the device."""
        some = [row for row, _ in self.data.rows(Place())][:rows]
        return self.data.collate(some, rows).to(torch.device(self.choice.device))


def loss_fn(model: torch.nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Any]]:
    """As train.py's, without its figures."""
    return cross_entropy_sum(model(**batch.inputs), batch.selected(batch.labels)), {}


# ---- right ---------------------------------------------------------------------------------------


def check_attention(machine: Machine) -> Iterator[Line]:
    """Outputs and gradients of each kernel, on documents of many lengths in four rows."""
    batch, device = machine.batch(4), torch.device(machine.choice.device)
    generator = torch.Generator().manual_seed(0)
    shapes = [(4, heads, LENGTH, 64) for heads in (8, 4, 4)]
    values = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    visible = document_mask(batch.document_ids.cpu())
    expected = attention_by_hand(values, visible)
    kernels = {"masked fp32": (torch.float32, visible, 1e-4)}
    if machine.choice.attention == "varlen":
        load_varlen()
        kernels["varlen bf16"] = (torch.bfloat16, batch.boundaries, 2e-2)
    if machine.choice.attention == "blocks":
        kernels["blocks fp32"] = (torch.float32, batch.document_ids, 1e-4)
    if machine.choice.precision in DTYPES:
        kernels["masked 16 bits"] = (DTYPES[machine.choice.precision], visible, 2e-2)
    torch.set_float32_matmul_precision("highest")
    for name, (dtype, mask, limit) in kernels.items():
        q, k, v = (value.to(device, dtype).requires_grad_() for value in values)
        if mask.dtype == torch.bool:  # In numbers, as the model has it.
            mask = torch.zeros((), dtype=dtype).where(mask, -torch.inf)
        out = attend(q, k, v, mask.to(device))
        out.double().square().sum().backward()
        found = [out, q.grad, k.grad, v.grad]
        error = max(
            float((ours.detach().cpu().double() - theirs).abs().max() / theirs.abs().max())  # type: ignore[union-attr]
            for ours, theirs in zip(found, expected, strict=True)
        )
        yield Line(f"attention, {name}", error < limit, f"off by {error:.1e}, at most {limit:.0e}")


def attention_by_hand(values: list[Tensor], visible: Tensor) -> list[Tensor]:
    """Output and gradients of the sum of its squares, in fp64."""
    q, k, v = (value.clone().requires_grad_() for value in values)
    groups = q.shape[1] // k.shape[1]
    keys, content = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    scores = (q @ keys.mT / math.sqrt(q.shape[-1])).masked_fill(~visible, -math.inf)
    out = scores.softmax(-1) @ content
    out.square().sum().backward()
    return [out.detach(), *(x.grad for x in (q, k, v))]  # type: ignore[list-item]


def check_model(machine: Machine) -> Iterator[Line]:
    """Logits and gradient against the CPU's; the loss under autocast against that in fp32."""
    torch.manual_seed(0)
    model, batch = Transformer(machine.sizes), machine.batch(2)
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            parameter.data.normal_(std=0.02)  # As zeros, as it begins, they would hide the rest.
    torch.set_float32_matmul_precision("highest")
    device = torch.device(machine.choice.device)
    on_cpu = batch.to(torch.device("cpu"))
    wanted = gradient(model, on_cpu)
    with torch.no_grad():
        expected = model(**{**on_cpu.inputs, "select": None})
        found = model.to(device)(**{**batch.inputs, "select": None})
        error = float((found.cpu() - expected).abs().max())
        yield Line("logits in fp32", error < 1e-3, f"off by {error:.1e} from the CPU's")
        error = float((gradient(model, batch) - wanted).norm() / wanted.norm())
        yield Line("gradient in fp32", error < 1e-3, f"off by {error:.1e} of the CPU's norm")
        exact, _ = loss_fn(model, batch)
        hardware = machine.hardware()
        model.attention = hardware.attention  # type: ignore[assignment]
        with hardware.autocast():
            rounded, _ = loss_fn(model, batch)
    ratio = float(rounded / exact) - 1
    yield Line(f"loss in {hardware.precision}", abs(ratio) < 0.005, f"{ratio:+.2%} of that in fp32")


def gradient(model: Transformer, batch: Batch) -> Tensor:
    """Of the summed loss, as one vector, on the CPU."""
    with torch.enable_grad():
        found = torch.autograd.grad(loss_fn(model, batch)[0], list(model.parameters()))
    return torch.cat([part.flatten().cpu() for part in found])


def check_steps(machine: Machine) -> Iterator[Line]:
    """Optimizer steps that may neither compile anew nor wait."""
    rows = min(8, machine.choice.micro_batch_size)
    trainer = Trainer(machine, rows)
    try:
        for number in range(3 + STEPS):
            torch._dynamo.config.error_on_recompile = trainer.hardware.compile and number >= 3
            trainer.step()
        with looking(trainer.model), trainer.hardware.autocast():
            loss_fn(trainer.model, machine.batch(rows))
        fine, told = True, f"{STEPS} steps compile nothing anew"
        if machine.choice.compile and not trainer.hardware.compile:
            fine, told = False, "the layers could not be compiled (the log says why)"
    except Exception as error:  # noqa: BLE001  # Dynamo's own classes are no promise.
        fine, told = False, str(error).strip().splitlines()[0][:150]
    finally:
        torch._dynamo.config.error_on_recompile = False
    yield Line("compiled once" if trainer.hardware.compile else "uncompiled steps", fine, told)
    if machine.choice.device != "cuda":
        return
    batch = next(trainer.loader).micro_batches[0]
    torch.cuda.set_sync_debug_mode("error")
    try:
        batch = batch.to(trainer.hardware.device)
        with trainer.hardware.autocast():
            loss, _ = loss_fn(trainer.model, batch)
        loss.backward()
        fine, told = True, "copying a batch, forward and backward wait for nothing"
    except RuntimeError as error:
        fine, told = False, str(error).splitlines()[0][:150]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    yield Line("no hidden waiting", fine, told)


# ---- as large and as fast as said ----------------------------------------------------------------


def check_memory(machine: Machine) -> Iterator[Line]:
    """Peak of a step of the table's micro batch, uncompiled; on a card alone."""
    if machine.choice.device != "cuda":
        return
    rows = machine.choice.micro_batch_size
    trainer = Trainer(machine, rows, compile_=False)
    predicted = trainer.predicted_peak()
    trainer.step()
    torch.cuda.reset_peak_memory_stats()
    trainer.step()
    held = torch.cuda.max_memory_allocated()
    told = f"{held / 1e9:.2f} GB held, {predicted / 1e9:.2f} GB predicted, {rows} rows"
    yield Line("peak of a step", abs(held / predicted - 1) < 0.15, told)


def check_speed(machine: Machine) -> Iterator[Line]:
    """Tokens a second, and the share of the best matrix product here."""
    most = machine.choice.micro_batch_size
    peak = matmul_peak(torch.device(machine.choice.device), machine.hardware().precision)
    yield Line("best product", None, f"{peak / 1e12:.2f} TFLOP/s in {machine.choice.precision}")
    for compile_ in (False, True) if machine.choice.compile else (False,):
        for rows in sorted({max(1, most // 8), max(1, most // 2), most}):
            trainer = Trainer(machine, rows, compile_=compile_)
            trainer.step()
            trainer.synchronize()
            begin, before = time.perf_counter(), trainer.tokens
            trainer.step()
            while time.perf_counter() < begin + 3:
                trainer.step()
            trainer.synchronize()
            speed = (trainer.tokens - before) / (time.perf_counter() - begin)
            used = speed * flops_per_token(trainer.model, machine.data.mean_attended()) / peak
            how = "compiled" if compile_ and trainer.hardware.compile else "uncompiled"
            yield Line(f"{rows} rows, {how}", None, f"{speed:,.0f} tokens/s, MFU {used:.0%}")


class Trainer:
    """A fresh model, its optimizers, and the loop's own step, each on the next micro batch."""

    def __init__(self, machine: Machine, rows: int, compile_: bool = True) -> None:
        torch.manual_seed(0)
        hardware = machine.hardware(rows)
        hardware = replace(hardware, compile=hardware.compile and compile_)
        self.model = Transformer(machine.sizes).to(hardware.device)
        self.optimizers = build_optimizers(self.model, OptimConfig())
        self.sizes = (machine.data, rows * LENGTH, rows)
        pin = hardware.device.type == "cuda"
        self.loader: StepLoader[Batch] = StepLoader(*self.sizes, pin=pin)
        self.tokens = 0
        config = SimpleNamespace(optim=OptimConfig(), compile="auto")
        self.run: Any = SimpleNamespace(
            hardware=hardware, ranks=ALONE, config=config, layers=self.model.model.layers
        )
        warm_up(self.run, self.model, self.loader)
        self.hardware: Hardware = self.run.hardware  # As it is used.

    def step(self) -> None:
        """One update."""
        batch = next(self.loader)
        optimizer_step(self.run, self.model, self.optimizers, loss_fn, batch, 1.0)
        self.tokens += batch.num_tokens

    def predicted_peak(self) -> int:
        """What --plan would say of this step."""
        cpu = Hardware(torch.device("cpu"), self.hardware.precision, "masked", False, 0)
        run: Any = SimpleNamespace(**{**vars(self.run), "hardware": cpu})
        batch: StepBatch[Batch] = next(StepLoader(*self.sizes))
        plain = Transformer(self.model.config)
        return peak_bytes(
            plain, OptimConfig(), lambda m, o: optimizer_step(run, m, o, loss_fn, batch, 1.0)
        )

    def synchronize(self) -> None:
        """Until the device has done what it was told."""
        getattr(torch, self.hardware.device.type).synchronize()


# ---- the stages ----------------------------------------------------------------------------------


def check_stages(machine: Machine) -> Iterator[Line]:
    """The stage scripts as a user runs them, the first one killed in the middle."""
    common = [f"device={machine.choice.device}", "tokens_per_step=4096", "eval_every_steps=0",
              "log_every_steps=1", "data.val_max_rows=2", "ranks=1"]  # fmt: skip
    usual = asdict(ModelConfig())
    sizes = [f"model.{k}={v}" for k, v in asdict(TINY).items() if v != usual[k]]
    before = ""
    for stage, script in STAGES.items():
        out_dir = machine.folder / stage
        words = [sys.executable, script, f"configs/tiny_{stage}.yaml", f"out_dir={out_dir}",
                 f"data.files={machine.folder / stage}.jsonl", "max_steps=20", *common]  # fmt: skip
        words += [f"init_from={before}/final"] if before else [*sizes, "save_every_steps=5"]
        if stage == "pretrain":
            killed(words, out_dir)
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        losses = [row["train/loss"] for row in read(out_dir) if "train/loss" in row]
        fine = not done.returncode and len(losses) == 20 and all(map(math.isfinite, losses))
        told = " ".join((done.stdout + done.stderr)[-300:].replace("|", "/").split())
        if fine:
            told = f"loss {losses[0]:.3f} -> {losses[-1]:.3f}"
        if fine and stage == "pretrain":
            fine = losses[-1] < losses[0] and "resuming from" in done.stdout + done.stderr
            told += ", killed and gone on with"
        if fine and stage == "dpo":
            fine = abs(losses[0] - math.log(2)) < 5e-3
            told += ", begins at ln 2"
        yield Line(stage, fine, told)
        before = str(out_dir)


def killed(words: list[str], out_dir: Path) -> None:
    """Begin a run, and kill it once it has a checkpoint."""
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (out_dir / "latest").exists():
        time.sleep(0.05)
    process.kill()
    process.wait()


def read(out_dir: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics."""
    path = out_dir / "metrics.jsonl"
    return [json.loads(line) for line in path.open(encoding="utf-8")] if path.is_file() else []


CHECKS: dict[str, Callable[[Machine], Iterator[Line]]] = {
    "attention": check_attention, "model": check_model, "steps": check_steps,
    "memory": check_memory, "speed": check_speed, "stages": check_stages,
}  # fmt: skip


def main() -> None:
    """Run all checks, or those that are named."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.gpu_check", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("checks", nargs="*", metavar="CHECK", help=f"of {', '.join(CHECKS)}")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="where the table goes; docs/gpu.md of a card")
    options = parser.parse_args()
    device = options.device
    if device == "cuda" and not options.checks:
        options.out = options.out or Path("docs/gpu.md")
    if options.out:
        try:
            refuse_to_overwrite(options.out, TABLE[0])
        except UserError as error:
            parser.error(str(error))
    precision = "fp32" if device == "cpu" else "auto"
    choice = choose_hardware(find_facts(), read_table(), device=device, precision=precision)
    print(describe(device), flush=True)
    lines: list[Line] = []
    with tempfile.TemporaryDirectory() as name:
        write_data(Path(name))
        tokenizer = Tokenizer(default_folder())
        config = DataConfig(files=(f"{name}/pretrain.jsonl",))
        data = load_datasets(config, "pretrain", tokenizer, LENGTH, 0).train
        machine = Machine(choice, data, ModelConfig() if device == "cuda" else TINY, Path(name))
        for check in options.checks or CHECKS:
            for line in tried(check, machine):
                lines.append(line)
                print(f"  {WORDS[line.fine]:<7}{line.check:<24}{line.told}", flush=True)
    if options.out:
        table = list(TABLE)
        table += [f"| {WORDS[line.fine]} | {line.check} | {line.told} |" for line in lines]
        options.out.write_text("\n".join([f"# {describe(device)}", "", *table, ""]))
        print(f"wrote {options.out}")
    sys.exit(any(line.fine is False for line in lines))


def tried(check: str, machine: Machine) -> Iterator[Line]:
    """The lines of a check; one that ends in an error is a line that failed."""
    try:
        yield from CHECKS[check](machine)
    except Exception as error:  # noqa: BLE001  # What a card cannot do is what is asked for.
        yield Line(check, False, f"{type(error).__name__}: {error}".splitlines()[0][:150])


def describe(device: str) -> str:
    """The device and what drives it."""
    versions = f"torch {torch.__version__}, {time.strftime('%Y-%m-%d')}"
    if device != "cuda":
        return f"{device}, {versions}"
    card = torch.cuda.get_device_properties(0)
    size = f"{card.total_memory / 2**30:.0f} GiB, capability {card.major}.{card.minor}"
    return f"{card.name}, {size}, CUDA {torch.version.cuda}, {versions}"


if __name__ == "__main__":
    main()
