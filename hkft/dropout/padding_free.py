"""Rows laid end to end, [1,T], with `position_ids` that begin anew at each: no padding, and no row sees another.

transformers tells such rows apart in its attention mask. Where that mask holds nothing else, attention goes row by row
instead: masks are drawn for each row, and nothing is spent on other rows.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from hkft.dropout.families import Family
from hkft.dropout.method import Method
from hkft.dropout.modes import evaluating
from hkft.dropout.protect import allowed
from hkft.errors import MethodError

FLAT = "_hkft_flat"  # on an attention module: batches may come so; on a tensor: what was read from it
CLOSE = {torch.float32: 1e-5, torch.float64: 1e-9}  # relative; in half precision 1e-2


def refuse(family: Family, method: Method) -> None:
    """Raise MethodError where rows cannot be laid end to end, as far as the model's structure tells."""
    name = type(family.model).__name__
    if not all(layer.causal for layer in family.text):
        raise MethodError(f"{name} looks both ways: rows laid end to end are for decoders", where="padding_free")
    blocks = {layer.block for layer in family.layers}
    for stack in {layer.name.rpartition(".")[0] for layer in family.text}:
        others = [type(each).__name__ for each in family.model.get_submodule(stack).children() if each not in blocks]
        if others:
            raise _leaks(f"{name} has layers without attention, {others[0]}, which may look across rows")
    for site in method.sites:
        if site.pattern == "span" and not site.position.startswith("attention_"):
            raise MethodError(
                "a span of tokens would run across rows laid end to end",
                where=f"pattern of {site.position}",
                found="span",
                allowed="element, column, or batches with padding",
            )


def prove(family: Family) -> None:
    """Two short rows in eval mode: other tokens in the first must change nothing in the second. Raises MethodError."""
    model = family.model
    parameters = list(model.parameters())
    if any(p.is_meta or hasattr(p, "ds_id") for p in parameters):
        return
    vocabulary, device = model.config.get_text_config().vocab_size, parameters[0].device
    tokens = torch.arange(1, 10, device=device).unsqueeze(0) % vocabulary
    others = torch.cat([(tokens[:, :5] + vocabulary // 2) % vocabulary, tokens[:, 5:]], 1)
    places = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3]], device=device)
    with evaluating(model), torch.no_grad():
        one, two = (model(input_ids=each, position_ids=places, return_dict=True)[0][:, 5:] for each in (tokens, others))
    if (one - two).abs().max() > CLOSE.get(one.dtype, 1e-2) * one.abs().max():
        raise _leaks(f"in {type(model).__name__} a row laid behind another sees it")


def _leaks(message: str) -> MethodError:
    return MethodError(message, where="padding_free", allowed="batches with padding")


def without_cache(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
    """Forward pre-hook on a model: of rows laid end to end nothing is cached.

    transformers tells them apart in its attention mask only where there is no cache, and most configurations ask for one.
    """
    places = kwargs.get("position_ids")
    if not isinstance(places, Tensor) or kwargs.get("past_key_values") is not None or len(_told_by(places)) < 2:
        return None
    return args, {**kwargs, "use_cache": False}


def row_lengths(query: Tensor, key: Tensor, mask: Tensor | None, kwargs: dict[str, Any]) -> list[int] | None:
    """Lengths of the rows that are laid end to end in query [1,H,T,D], told by where `position_ids` begin anew.

    None where there is one row, or where the attention mask holds more than rows and causality, such as a sliding window
    that a row is longer than: it then says what each token may see.
    """
    places, window = kwargs.get("position_ids"), kwargs.get("sliding_window")
    tokens = query.shape[2]
    if not isinstance(places, Tensor) or places.shape != (len(query), tokens) or key.shape[2] != tokens:
        return None
    lengths = _told_by(places)
    if len(lengths) < 2 or (window is not None and max(lengths) > window):
        return None
    return lengths if mask is None or _is_rows(mask, lengths) else None


def rows(x: Tensor, lengths: list[int]) -> Tensor:
    """[1,H,T,D] -> [N,H,L,D], L the longest: no earlier token of a causal row looks at what pads its end."""
    return pad_sequence(list(x[0].transpose(0, 1).split(lengths)), batch_first=True).transpose(1, 2)


def _told_by(places: Tensor) -> list[int]:
    """Lengths of the rows in `position_ids` [1,T], as transformers tells them: a row goes on where a place is the next.

    Several rows, [B,T], are none that are laid end to end. Every layer is handed the same tensor: it is read once.
    """
    if places.ndim != 2 or len(places) != 1:
        return []
    known, lengths = getattr(places, FLAT, (None, []))
    if known is None or known != _version(places):
        begins = [0, *(torch.nonzero(places[0].diff() != 1).squeeze(1) + 1).tolist(), places.shape[1]]
        lengths = [end - begin for begin, end in pairwise(begins)]
        setattr(places, FLAT, (_version(places), lengths))
    return lengths


def _is_rows(mask: Tensor, lengths: list[int]) -> bool:
    """Whether a mask, [1,1,T,T], lets every token see its own row up to itself, all of it, and adds no bias."""
    known, plain = getattr(mask, FLAT, (None, False))
    if known is None or known != _version(mask):
        may = allowed(mask)
        assert may is not None
        seen = sum(length * (length + 1) // 2 for length in lengths)
        plain = mask.shape[:2] == (1, 1) and int(may.sum()) == seen
        plain = plain and (mask.dtype == torch.bool or not bool(mask[may].any()))
        setattr(mask, FLAT, (_version(mask), plain))
    return plain


def _version(tensor: Tensor) -> int | None:
    """What changes with every writing into a tensor: a loop may fill one again and again. None: not counted."""
    return None if tensor.is_inference() else tensor._version
