"""How far two views of one batch are apart. Every function is a mean over rows, computed in float32.

Legend: N rows, one for each example, or for each completion token in generation; C classes, or the vocabulary.

    kl            1/2 (KL(P||Q) + KL(Q||P))                      the paper's KL, R-Drop's loss
    js            KL(P || P_clean), what the paper calls JS
    js_symmetric  1/2 (KL(M||P) + KL(M||Q)), M = 1/2 (P + Q)     HiddenCut's own code
    squared       (p - q)^2                                                regression, R-Drop's choice

Gradient flows into whatever argument carries it: the caller detaches the other pass for the paper's one-pass gradient.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

Scalar = Float[Tensor, ""]


def kl(p: Float[Tensor, "N C"], q: Float[Tensor, "N C"]) -> Scalar:
    """1/2 (KL(P||Q) + KL(Q||P)) of the softmax of two batches of logits, mean over rows. Nats."""
    log_p, log_q = _log_softmax(p), _log_softmax(q)
    return 0.5 * ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(-1).mean()


def js(p: Float[Tensor, "N C"], clean: Float[Tensor, "N C"]) -> Scalar:
    """KL(P || P_clean), P_clean the output without dropout, mean over rows: the paper's "JS". Nats."""
    return kl_div(_log_softmax(clean), _log_softmax(p), reduction="batchmean", log_target=True)


def js_symmetric(p: Float[Tensor, "N C"], q: Float[Tensor, "N C"]) -> Scalar:
    """1/2 (KL(M||P) + KL(M||Q)) with M = (P+Q)/2, mean over rows, as HiddenCut's code has it. Nats."""
    log_p, log_q = _log_softmax(p), _log_softmax(q)
    log_m = torch.logaddexp(log_p, log_q) - torch.log(torch.tensor(2.0))
    terms = [kl_div(log_x, log_m, reduction="batchmean", log_target=True) for log_x in (log_p, log_q)]
    return 0.5 * (terms[0] + terms[1])


def squared(p: Float[Tensor, "N C"], q: Float[Tensor, "N C"]) -> Scalar:
    """(p - q)^2, mean over rows and outputs: two views of a regression."""
    return (p.float() - q.float()).square().mean()


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"kl": kl, "js": js, "js_symmetric": js_symmetric}


def _log_softmax(logits: Float[Tensor, "N C"]) -> Float[Tensor, "N C"]:
    return log_softmax(logits, -1, dtype=torch.float32)
