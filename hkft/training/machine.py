"""What `hkft doctor` finds: what is installed, what of it is too old, and what works on this machine, by trying it.

Nothing is loaded before it is tried: a broken installation is told like anything else that does not work.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from hkft.events import Listener, Stage
from hkft.folder import cache_directory

PACKAGES = ("hkft", "torch", "transformers", "peft", "accelerate", "datasets", "tokenizers", "bitsandbytes", "numpy")
LEAST_SPACE = 2**30  # bytes: a few adapters with their checkpoints
WAIT = 60  # seconds for two processes to meet
MEET = """
import sys, torch, torch.distributed as distributed
distributed.init_process_group("gloo", init_method=sys.argv[1], rank=int(sys.argv[2]), world_size=2)
number = torch.ones(1)
distributed.all_reduce(number)
assert number.item() == 2
distributed.destroy_process_group()
"""


@dataclass(frozen=True)
class Check:
    """One thing that was looked at. told: what it gave, or why it does not work. required: without it hkft does not train."""

    name: str
    works: bool
    told: str
    next: str | None = None
    required: bool = True
    seconds: float = 0.0


@dataclass(frozen=True)
class Trial:
    """One thing to try. run: says what it gave; raises whatever goes wrong."""

    name: str
    run: Callable[[], str]
    next: str
    required: bool = True

    def done(self) -> Check:
        began = time.perf_counter()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                told, works = self.run(), True
        except Exception as error:  # whatever it is, it is what was asked for
            first = (str(error).strip().splitlines() or ["it said nothing"])[0]
            told, works = f"{type(error).__name__}: {first}", False
        return Check(self.name, works, told, None if works else self.next, self.required, time.perf_counter() - began)


def examine(tell: Listener) -> dict[str, Any]:
    """Everything, in JSON's own types. works: whether all that is required is there, new enough, and works."""
    needs, checks = requirements(), []
    for name, need in needs.items():
        if not need["works"]:
            had = f"{need['installed']} is installed" if need["installed"] else "it is not installed"
            checks.append(Check(name, False, f"{had}, {need['needed']} is needed", _upgrade(name, need["needed"])))
    places = _places()
    attempts = [trial for place in places for trial in _on(place)] + _of_the_machine()
    for number, trial in enumerate(attempts):
        tell(Stage("trying what works here", number, len(attempts)))
        checks.append(trial.done())
    return {
        "versions": {name: version(name) for name in dict.fromkeys(("python", *PACKAGES, *needs))},
        "requirements": needs,
        "checks": [asdict(check) for check in checks],
        "works": all(check.works for check in checks if check.required),
    }


def requirements() -> dict[str, dict[str, Any]]:
    """What hkft says that it needs: by name, what is installed, what is needed, and whether that will do.

    Nothing where hkft runs without being installed.
    """
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    try:
        told = metadata.metadata("hkft")
    except metadata.PackageNotFoundError:
        return {}
    wanted = [Requirement(line) for line in told.get_all("Requires-Dist") or ()]
    needed = {each.name: each.specifier for each in wanted if not each.marker or each.marker.evaluate({"extra": ""})}
    needed["python"] = SpecifierSet(told["Requires-Python"] or "")
    found = {}
    for name, specifier in needed.items():
        installed = version(name)
        enough = installed is not None and specifier.contains(installed, prereleases=True)
        found[name] = {"installed": installed, "needed": str(specifier), "works": enough}
    return found


def version(package: str) -> str | None:
    """Of an installed package, and of python."""
    if package == "python":
        return platform.python_version()
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _upgrade(name: str, needed: str) -> str:
    return f"a Python {needed}" if name == "python" else f"pip install '{name}{needed}'"


def _places() -> list[str]:
    """The devices that torch finds, as it names them."""
    try:
        import torch

        gpus = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
        return ["cpu", *gpus, *(["mps"] if torch.backends.mps.is_available() else [])]
    except Exception:  # what is tried on the CPU tells it
        return ["cpu"]


def _on(place: str) -> list[Trial]:
    gone = "CUDA_VISIBLE_DEVICES= hides it" if place.startswith("cuda") else "--set model.device=cpu goes without it"
    product = "pip install --force-reinstall torch" if place == "cpu" else f"does the driver fit this torch? {gone}"
    return [
        Trial(f"{place}: products of matrices", partial(_products, place), product),
        Trial(f"{place}: bfloat16", partial(_bfloat16, place), "--set model.dtype=float32", required=False),
        Trial(
            f"{place}: training with dropout",
            partial(_training, place),
            "pip install --upgrade transformers peft accelerate" if place == "cpu" else gone,
        ),
        *(
            Trial(
                f"{place}: model.quantization={bits}bit",
                partial(_quantised, place, bits),
                "pip install --upgrade bitsandbytes, or --set model.quantization=none",
                required=False,
            )
            for bits in (4, 8)
        ),
    ]


def _of_the_machine() -> list[Trial]:
    return [
        Trial(
            "several processes", _processes, "train without torchrun: does this machine's name resolve?", required=False
        ),
        Trial("the cache", _cache, "HKFT_CACHE names another place", required=False),
        Trial("space on the disk", _space, "--output names another place", required=False),
    ]


def _products(place: str) -> str:
    import torch

    ones = torch.ones(64, 64, device=place)
    assert (ones @ ones == 64).all(), "the product is wrong"
    if not place.startswith("cuda"):
        return f"{torch.get_num_threads()} threads" if place == "cpu" else "exact"
    facts = torch.cuda.get_device_properties(place)
    return f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB"


def _bfloat16(place: str) -> str:
    import torch

    def seconds(dtype: torch.dtype) -> float:
        ones, times = torch.ones(512, 512, dtype=dtype, device=place), []
        for _ in range(4):
            began = time.perf_counter()
            assert (ones @ ones)[0, 0].item() == 512, "the product is wrong"  # it waits for the device
            times.append(time.perf_counter() - began)
        return min(times)

    return f"a product takes {seconds(torch.bfloat16) / seconds(torch.float32):.2g} x the time of float32"


def _training(place: str) -> str:
    """Two steps of HiddenKey on a random BERT of two layers."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import BertConfig, BertForSequenceClassification

    from hkft.dropout.attach import attach
    from hkft.training.objective import consistency_loss

    config = BertConfig(
        vocab_size=32,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
    )
    base: Any = BertForSequenceClassification(config)
    lora: Any = LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["query", "value"])
    model = get_peft_model(base, lora).to(place).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    rows = torch.arange(48, device=place).reshape(4, 12) % 32
    batch = {"input_ids": rows, "attention_mask": torch.ones_like(rows), "labels": rows[:, 0] % 2}
    losses = []
    with attach(model, "hiddenkey", rate=0.1) as attachment:
        for _ in range(2):
            loss = consistency_loss(model, batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert all(site["calls"] for site in attachment.report()), "a site of the method was never called"
    assert all(loss == loss for loss in losses), "the loss is NaN"
    return f"two steps of HiddenKey, loss {losses[0]:.2f}, {losses[1]:.2f}"


def _quantised(place: str, bits: int) -> str:
    """A layer of quantised weights, forward and backward, by the same layer in full precision."""
    import torch
    from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt

    torch.manual_seed(0)
    plain: Any = torch.nn.Linear(64, 64, bias=False)
    layer: Any = (
        Linear4bit(64, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4")
        if bits == 4
        else Linear8bitLt(64, 64, bias=False, has_fp16_weights=False)
    )
    layer.load_state_dict(plain.state_dict())
    layer, plain = layer.to(place), plain.to(place)
    inputs = torch.randn(4, 64, device=place, requires_grad=True)
    results = []
    for each in (plain, layer):
        outputs = each(inputs)
        (gradient,) = torch.autograd.grad(outputs.square().sum(), inputs)
        results.append(torch.cat([outputs.flatten(), gradient.flatten()]).detach())
    off = ((results[1] - results[0]).norm() / results[0].norm()).item()
    assert off < 0.3, f"what it computes is off by {off:.0%}"
    return f"forward and backward, off by {off:.1%}"


def _processes() -> str:
    """Two that meet by gloo, and add their numbers."""
    with tempfile.TemporaryDirectory() as folder:
        commands = [[sys.executable, "-c", MEET, f"file://{folder}/meet", str(rank)] for rank in (0, 1)]
        pipes: Mapping[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        running = [subprocess.Popen(command, **pipes) for command in commands]
        try:
            for process in running:
                _, said = process.communicate(timeout=WAIT)
                if process.returncode:
                    raise RuntimeError((said.strip().splitlines() or [f"it ended with {process.returncode}"])[-1])
        finally:
            for process in running:
                process.kill()
                process.communicate()
    return "two of them met by gloo"


def _cache() -> str:
    place = cache_directory()
    place.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=place) as file:
        file.write(b"hkft")
    return f"{place} can be written"


def _space() -> str:
    free = shutil.disk_usage(Path.cwd()).free
    told = f"{free / 2**30:,.1f} GiB are free in {Path.cwd()}"
    if free < LEAST_SPACE:
        raise OSError(f"only {told}")
    return told
