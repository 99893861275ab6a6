"""Merge LoRA adapters into a base model that is never in memory: tensor by tensor, from safetensors to safetensors.

The model is built without numbers, on the meta device, and PEFT wraps it: so PEFT itself says which layers are adapted,
and how. Each adapted layer is then given its own numbers, in float32, merged by PEFT, written and emptied again. What
no adapter touches is copied byte for byte, or cast once where the dtype changes. transformers says which tensor of the
files is which of the model.

Peak memory: one tensor as it is stored and, where that differs, as it is written; of DoRA and of convolutions, which are
merged whole, some five in float32. Several adapters: W + sum_i w_i (merged_i(W) - W), the mean of the products B_i A_i,
not of their factors; what is saved whole (a head, trained biases) is sum_i w_i saved_i.
"""

from __future__ import annotations

import copy
import math
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import peft
import torch
from peft.tuners.lora import layer as kinds
from peft.tuners.lora import variants
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, rename_source_key

from hkft.errors import DivergedError, SetupError, UsageError
from hkft.events import Listener, Stage, silent
from hkft.merging import shards
from hkft.merging.shards import ShardWriter, Stored

LAYERS = (kinds.Linear, kinds.Embedding, kinds.Conv1d, kinds.Conv2d, kinds.Conv3d)
VARIANTS = tuple(kind for name, kind in vars(variants).items() if name.lstrip("_").startswith("Dora"))
# How A and B began is of no account once they are trained; any other way changes the base model as well
BEGINNINGS = (True, False, "gaussian", "orthogonal", "eva")
UNSUPPORTED = ("layer_replication", "trainable_token_indices", "target_parameters", "ensure_weight_tying", "lora_bias")
PREFIX = "base_model.model."
BLOCK = 1 << 18  # numbers

Held = Callable[[str, Tensor], Tensor]  # name in the model, as it is in the files -> as it is in the base


class CannotStream(Exception):  # noqa: N818, a reason and not a fault
    """Why this merge needs the whole model in memory; its text is one plain sentence without a full stop."""


class NobodysError(CannotStream):
    """The model needs numbers that neither the base's files nor the adapter hold: it would make them up."""


@dataclass(frozen=True, eq=False)
class _Layer:
    """An adapted layer, and where the numbers of its factors are: parameter's name within the layer -> tensor."""

    module: Any
    factors: dict[str, Stored]

    def read(self) -> dict[str, Tensor]:
        return {name: stored.read().float() for name, stored in self.factors.items()}

    @property
    def cut(self) -> tuple[str, int] | None:
        """The factor, and its dimension, that belongs to the weight's rows; None where it cannot be merged by rows."""
        if self.module.lora_variant:
            return None
        if type(self.module) is kinds.Embedding:
            return "lora_embedding_A.default", 1
        if type(self.module) is kinds.Linear:
            return ("lora_A.default.weight", 1) if self.module.fan_in_fan_out else ("lora_B.default.weight", 0)
        return None


@dataclass(frozen=True)
class _Adapter:
    """What one adapter does, by the names of the target model's tensors.

    saved: replaced whole; kept: replaced for every tensor that is tied to it; layers: merged.
    """

    folder: Path
    weight: float
    saved: dict[str, Stored]
    kept: dict[str, Stored]
    layers: dict[str, _Layer]


@dataclass(frozen=True)
class _Item:
    """One tensor to write. saved, layers: (weight, source) of each adapter; both empty: as it is in the base."""

    name: str
    base: Stored | None
    shape: tuple[int, ...]
    dtype: torch.dtype
    folders: tuple[Path, ...]
    saved: tuple[tuple[float, Stored], ...] = ()
    layers: tuple[tuple[float, _Layer], ...] = ()

    @property
    def untouched(self) -> Stored | None:
        """What is copied as it is; None where there is something to do."""
        stays = self.base and not self.saved and not self.layers and shards.DTYPES[self.base.dtype] == self.dtype
        return self.base if stays else None


@dataclass(frozen=True)
class Plan:
    """A merge that has been checked and can be written.

    unties: the input and the output embeddings are no longer equal, both are written, and the model's configuration
    must say `tie_word_embeddings=False`.
    """

    items: tuple[_Item, ...]
    unties: bool
    held: Held | None

    @property
    def bytes(self) -> int:
        """How large the weights will be."""
        return sum(math.prod(item.shape) * item.dtype.itemsize for item in self.items)

    def write(self, folder: Path, tell: Listener = silent, max_shard_size: float = 5e9) -> None:
        """Write the weights into `folder`: model.safetensors, or shards of `max_shard_size` bytes and their index.

        Raises DivergedError (an adapter holds NaN or inf), SetupError (a file has changed since), OSError.
        """
        tensors = {item.name: (item.dtype, item.shape) for item in self.items}
        with ShardWriter(folder, tensors, max_shard_size) as writer, torch.no_grad():
            for done, item in enumerate(self.items, start=1):
                if self.held is None and (stored := item.untouched):
                    writer.copy(item.name, stored.chunks())
                else:
                    writer.write(item.name, _rounded(_computed(item, self.held), item))
                tell(Stage("merging", done, len(self.items)))


def plan(
    base: Path,
    adapters: Sequence[tuple[Path, float]],
    opens: Any,
    config: Any,
    dtype: torch.dtype,
    held: Held | None = None,
) -> Plan:
    """Find out, without reading any weights, what is to be written.

    base: the base model's folder. adapters: PEFT folders and their weights. opens, config: the Auto class and the
    configuration of the model that is written. dtype: of its floating tensors; the others stay what they are.
    held: applied to every floating tensor of the base that is used, `held(name, tensor) -> tensor`, as it is stored,
        before anything is added; what it returns may be overwritten.
    Raises CannotStream; SetupError (damaged or pickled files, an adapter that does not fit), UsageError (the weights).
    """
    if sys.byteorder != "little":
        raise CannotStream("this machine's numbers are not those of the files, byte for byte")
    stored, own = shards.checkpoint(base), [shards.adapter(folder) for folder, _ in adapters]
    model = _empty(opens, config)
    target = model.state_dict(keep_vars=True)
    sources = _sources(model, target, stored)
    loaded = [_adapter(*one, tensors, opens, config) for one, tensors in zip(adapters, own, strict=True)]
    items, unties = _tied(model, target, {name: _item(name, target[name], sources, loaded, dtype) for name in target})
    return Plan(tuple(items), unties, held)


def configuration(folder: Path) -> peft.PeftConfig:
    """An adapter's own. Raises SetupError."""
    try:
        return peft.PeftConfig.from_pretrained(str(folder))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise SetupError(
            "the adapter's configuration cannot be read",
            where=str(folder / "adapter_config.json"),
            found=_first(error),
        ) from error


def _empty(opens: Any, config: Any) -> PreTrainedModel:
    try:
        with torch.device("meta"):
            return opens.from_config(copy.deepcopy(config), dtype=torch.float32)
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        raise CannotStream(f"the model cannot be built without its weights ({_first(error)})") from error


def _sources(model: PreTrainedModel, target: Mapping[str, Tensor], stored: Mapping[str, Stored]) -> dict[str, Stored]:
    """Tensor of the model -> of the files, for all that are tied to it as well. What the model lacks is left out."""
    conversions = get_model_conversion_mapping(model)
    converters = [one for one in conversions if isinstance(one, WeightConverter)]
    meta = dict(target)
    renamings: list[Any] = [one for one in conversions if not isinstance(one, WeightConverter)]

    def renamed(name: str) -> str:
        found, converted = rename_source_key(name, renamings, converters, model.base_model_prefix, meta)
        if converted is not None:
            raise CannotStream(f"transformers makes other tensors of {name} when it loads this kind of model")
        return found

    found: dict[str, Stored] = {}
    for name in sorted(stored):
        own = renamed(name)
        if own in found:
            raise CannotStream(f"the files hold {own} twice, as {found[own].name} and as {name}")
        if own in target:
            found[own] = stored[name]
    other = next((name for name in target if renamed(name) != name), None)
    if other is not None:
        raise CannotStream(f"transformers renames {other} when it loads this kind of model")
    for names in _groups(target).values():
        present = [name for name in names if name in found]
        if len(present) > 1:
            raise CannotStream(f"{' and '.join(present)} are one tensor in the model, and several in the files")
        found |= {name: found[present[0]] for name in names if present}
    return found


def _groups(target: Mapping[str, Tensor]) -> dict[int, list[str]]:
    """id of a tensor -> its names: several where tensors are tied."""
    groups: dict[int, list[str]] = {}
    for name, tensor in target.items():
        groups.setdefault(id(tensor), []).append(name)
    return groups


def _adapter(folder: Path, weight: float, stored: Mapping[str, Stored], opens: Any, config: Any) -> _Adapter:
    lora = configuration(folder)
    model = _empty(opens, config)
    target = model.state_dict(keep_vars=True)
    wrapped = _wrapped(model, lora, folder)
    parameters = wrapped.state_dict(keep_vars=True)
    expected = peft.get_peft_model_state_dict(wrapped, dict(parameters), save_embedding_layers=False)
    stored = {name: one for name, one in stored.items() if name in expected or not _again(name, stored)}
    places = {name: expected.get(name, parameters.get(name)) for name in sorted({*expected, *stored})}
    _check_fit(places, stored, folder)
    found = {id(place): stored[name] for name, place in places.items()}

    def of(module: nn.Module) -> dict[str, Stored]:
        inner = module.state_dict(keep_vars=True)
        return {name: found.pop(id(inner[name])) for name in inner if id(inner[name]) in found}

    adapter = _Adapter(folder, weight, {}, {}, {})
    for names in _groups(target).values():
        if (kept := found.pop(id(target[names[0]]), None)) is not None:
            adapter.kept.update(dict.fromkeys(names, kept))
    for path, module in wrapped.named_modules():
        own = path.removeprefix(PREFIX)
        if isinstance(module, ModulesToSaveWrapper):
            adapter.saved.update({f"{own}.{name}": one for name, one in of(module.modules_to_save["default"]).items()})
        elif isinstance(module, kinds.LoraLayer):
            adapter.layers[f"{own}.weight"] = _Layer(module, of(cast(nn.Module, module)))
    if found or not target.keys() >= {*adapter.saved, *adapter.layers}:
        raise CannotStream("the adapter changes layers within layers that it saves whole")
    return adapter


def _again(name: str, stored: Mapping[str, Stored]) -> bool:
    """Whether PEFT has written this tensor a second time, as it does with embeddings that are saved whole and have grown."""
    plain = name.replace(".modules_to_save.", ".").replace(".original_module.", ".")
    return plain != name and plain in stored


def _wrapped(model: PreTrainedModel, lora: peft.PeftConfig, folder: Path) -> peft.PeftModel:
    """The model as PEFT would wrap it to load the adapter, still without numbers."""
    if not isinstance(lora, peft.LoraConfig) or lora.peft_type != peft.PeftType.LORA:
        raise CannotStream(f"the adapter is {getattr(lora.peft_type, 'value', lora.peft_type)}, not LoRA")
    if lora.init_lora_weights not in BEGINNINGS:
        raise CannotStream(f"its init_lora_weights, {lora.init_lora_weights}, changes the base model as well")
    for name in UNSUPPORTED:
        if getattr(lora, name, None):
            raise CannotStream(f"the adapter uses {name}")
    lora.init_lora_weights, lora.inference_mode = False, True
    kind = peft.MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(
        str(getattr(lora.task_type, "value", lora.task_type)), peft.PeftModel
    )
    try:
        with warnings.catch_warnings(), torch.device("meta"):
            warnings.simplefilter("ignore")  # of tied embeddings: they are untied
            wrapped = kind(model, lora, low_cpu_mem_usage=True)
    except (ValueError, RuntimeError, TypeError, re.error) as error:
        raise SetupError("the adapter does not fit the base model", where=str(folder), found=_first(error)) from error
    for path, module in wrapped.named_modules():
        if not isinstance(module, kinds.LoraLayer):
            continue
        if type(module) not in LAYERS or not all(isinstance(one, VARIANTS) for one in module.lora_variant.values()):
            raise CannotStream(f"the adapter's layer {path.removeprefix(PREFIX)} is a {type(module).__name__}")
    return wrapped


def _check_fit(places: Mapping[str, Tensor | None], stored: Mapping[str, Stored], folder: Path) -> None:
    """Every tensor of the adapter has its place in the model, every place its tensor, and the shapes agree."""
    wrong = []
    for name, place in sorted(places.items()):
        if name not in stored:
            wrong.append(f"no {name}")
        elif place is None:
            wrong.append(f"{name}, which has no place in it")
        elif stored[name].shape != tuple(place.shape):
            wrong.append(f"{name} {list(stored[name].shape)}, where {list(place.shape)} fits")
        elif stored[name].dtype not in shards.DTYPES:
            wrong.append(f"{name} in {stored[name].dtype}")
    if wrong:
        more = f", and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise SetupError(
            "the adapter does not fit the base model", where=str(folder), found="; ".join(wrong[:3]) + more
        )


def _item(
    name: str, like: Tensor, sources: Mapping[str, Stored], adapters: Sequence[_Adapter], dtype: torch.dtype
) -> _Item:
    whole = [(one.weight, one.saved.get(name) or one.kept.get(name)) for one in adapters]
    saved = [(weight, stored) for weight, stored in whole if stored is not None]
    layers = [(one.weight, one.layers[name]) for one in adapters if name in one.layers]
    base, folders = sources.get(name), tuple(one.folder for one in adapters)
    if saved and len(saved) < len(adapters):
        raise CannotStream(f"only some of the adapters have a {name} of their own")
    if saved and not math.isclose(sum(weight for weight, _ in saved), 1.0, abs_tol=1e-6):
        raise UsageError(
            f"the adapters have a {name} of their own, and a mean of these is needed",
            where="weights of the adapters",
            found=f"a sum of {sum(weight for weight, _ in saved):.6g}",
            allowed="a sum of 1",
        )
    if saved and layers:  # the base tensor came with the adapter
        if len(adapters) > 1:
            raise CannotStream(f"the adapters bring the base's {name} along, and there are several")
        (_, base), saved = saved[0], []
    used = [stored for _, stored in saved] or ([base] if base else [])
    if not used:
        raise NobodysError(f"neither the base model's files nor the adapter hold {name}")
    for stored in used:
        if stored.shape != tuple(like.shape) or stored.dtype not in shards.DTYPES:
            held = f"{stored.dtype} {list(stored.shape)}"
            raise NobodysError(f"{name} is {held} in the files, and the model needs {list(like.shape)}")
    floating = used[0].dtype in shards.FLOATING
    kind = dtype if floating else shards.DTYPES[used[0].dtype]
    return _Item(name, base, tuple(like.shape), kind, folders, tuple(saved), tuple(layers))


def _tied(model: PreTrainedModel, target: Mapping[str, Tensor], items: Mapping[str, _Item]) -> tuple[list[_Item], bool]:
    """(of tied tensors the one that transformers would write, or all where they have come apart; whether some have)."""
    written, unties = [], False
    for names in _groups(target).values():
        changed = [name for name in names if items[name].layers or items[name].saved]
        common = {(items[name].base, items[name].saved) for name in names}
        if len(names) == 1 or (not any(items[name].layers for name in names) and len(common) == 1):
            written.append(items[next((n for n in names if n not in model.all_tied_weights_keys), names[0])])
        elif len(names) == 2 and _embeddings(model) == set(names) and model.config.tie_word_embeddings:
            written += [items[name] for name in names]
            unties = True
        else:
            raise CannotStream(f"the adapter changes {changed[0]}, which is one tensor with others of the model")
    return written, unties


def _embeddings(model: PreTrainedModel) -> set[str]:
    """Names of the weights of the input and the output embeddings."""
    modules = {id(module): name for name, module in model.named_modules()}
    both = (model.get_input_embeddings(), model.get_output_embeddings())
    return {f"{modules[id(module)]}.weight" for module in both if module is not None}


def _computed(item: _Item, held: Held | None) -> Tensor:
    """The tensor to write."""
    if item.saved:
        parts = [(weight, stored.read()) for weight, stored in item.saved]
        value = parts[0][1] if len(parts) == 1 else cast(Tensor, sum(weight * part.float() for weight, part in parts))
        return _finite(value, item).to(item.dtype)
    assert item.base is not None
    value = item.base.read()
    if held is not None and value.is_floating_point():
        value = held(item.name, value)
    if not item.layers:
        return value.to(item.dtype)
    if all(layer.cut for _, layer in item.layers):
        return _added(item, value)
    value = value.float()
    if len(item.layers) == 1 and item.layers[0][0] == 1.0:
        total = _merged(item.layers[0][1], value)
    else:
        total = value.clone()
        for weight, layer in item.layers:
            total.add_(_merged(layer, value.clone()).sub_(value), alpha=weight)
    return _finite(total, item).to(item.dtype)


def _rounded(value: Tensor, item: _Item) -> Tensor:
    """In the dtype that is written. Raises SetupError for what float16 is too narrow for."""
    result = value.to(item.dtype)
    if item.dtype == torch.float16 and result.isinf().any():
        raise SetupError(
            "float16 cannot hold the numbers of this model",
            where=item.name,
            allowed="numbers up to 65,504",
            hint="--dtype bfloat16, or float32",
        )
    return result


def _added(item: _Item, value: Tensor) -> Tensor:
    """value + sum_i w_i (product_i as PEFT has it), in blocks of rows, which the processor's cache can hold."""
    parts = [(weight, layer, layer.read()) for weight, layer in item.layers]
    result = value if value.dtype == item.dtype else torch.empty_like(value, dtype=item.dtype)
    size = max(1, BLOCK // value[0].numel())
    with _one_thread():
        for first in range(0, len(value), size):
            total = value[first : first + size].float()
            for weight, layer, factors in parts:
                assert layer.cut is not None
                name, dimension = layer.cut
                piece = factors[name].narrow(dimension, first, len(total))
                with _filled(layer.module, {**factors, name: piece}):
                    total.add_(layer.module.get_delta_weight("default"), alpha=weight)
            result[first : first + size] = _finite(total, item)
    return result


@contextmanager
def _one_thread() -> Iterator[None]:
    """Threads of such small pieces wait for one another: on a busy machine ten times longer than they work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _merged(layer: _Layer, value: Tensor) -> Tensor:
    """The base layer's weight with the adapter in it, as PEFT merges it. value, float32, may be overwritten."""
    with _filled(layer.module, {"base_layer.weight": value, **layer.read()}):
        layer.module.merge()
        layer.module.merged_adapters.clear()
        layer.module._caches.clear()
        return layer.module.get_base_layer().weight.data


@contextmanager
def _filled(module: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Parameters of the module, by name, hold these numbers, and afterwards none again."""
    kept = []
    for name, tensor in tensors.items():
        owner, _, leaf = name.rpartition(".")
        place = module.get_submodule(owner)
        kept.append((place, leaf, getattr(place, leaf)))
        setattr(place, leaf, nn.Parameter(tensor, requires_grad=False))
    try:
        yield
    finally:
        for place, leaf, empty in kept:
            setattr(place, leaf, empty)


def _finite(value: Tensor, item: _Item) -> Tensor:
    if value.numel() and value.is_floating_point() and not all(map(math.isfinite, value.aminmax())):
        raise DivergedError(
            "the adapter holds NaN or inf: there is nothing to merge",
            where=", ".join(map(str, item.folders)),
            found=f"{item.name} would have numbers that are not finite",
            hint="another checkpoint of the run may be sound: --checkpoint",
        )
    return value


def _first(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
