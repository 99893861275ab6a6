"""`hub:<dataset>[/<config>]#<split>` -> a dataset, through `datasets.load_dataset`, online or from what is on disk.

What `a/b` means, in this order:
1. `a` is one of the old names without an owner (MOVED): dataset a under its present name, config b. `glue/sst2` is
   GLUE's SST-2 for good, whatever an owner called "glue" may upload.
2. else `b` is a dataset of the owner `a`;
3. where there is no such dataset, a dataset `a`, config b.
`a` alone is a dataset without a config, `a/b/c` dataset a/b, config c. Code from the hub never runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import shorten

import datasets
from datasets import config as settings
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError

from hkft.data.references import HUB
from hkft.errors import DataError, SetupError, UsageError

FORM = "hub:<dataset>[/<config>]#<split>, such as hub:glue/sst2#train"

MOVED: dict[str, str] = {
    "ag_news": "fancyzhx/ag_news",
    "anli": "facebook/anli",
    "boolq": "google/boolq",
    "emotion": "dair-ai/emotion",
    "glue": "nyu-mll/glue",
    "imdb": "stanfordnlp/imdb",
    "multi_nli": "nyu-mll/multi_nli",
    "paws": "google-research-datasets/paws",
    "rotten_tomatoes": "cornell-movie-review-data/rotten_tomatoes",
    "snli": "stanfordnlp/snli",
    "sst2": "stanfordnlp/sst2",
    "super_glue": "aps/super_glue",
    "trec": "CogComp/trec",
    "tweet_eval": "cardiffnlp/tweet_eval",
    "yelp_polarity": "fancyzhx/yelp_polarity",
    "yelp_review_full": "Yelp/yelp_review_full",
}

Candidate = tuple[str, str | None]  # dataset, config


def candidates(reference: str) -> tuple[list[Candidate], str]:
    """What a reference may mean, in the order it is tried, and the split. Raises UsageError unless it has FORM."""
    name, _, split = reference.removeprefix(HUB).partition("#")
    parts = name.split("/")
    if not split or len(parts) > 3 or not all(parts):
        raise UsageError("this names no split of a hub dataset", where=reference, allowed=FORM)
    if parts[0] in MOVED and len(parts) <= 2:
        config = parts[1] if len(parts) == 2 else None
        return [(MOVED[parts[0]], config), (parts[0], config)], split
    if len(parts) == 1:
        return [(name, None)], split
    if len(parts) == 2:
        return [(name, None), (parts[0], parts[1])], split
    return [(f"{parts[0]}/{parts[1]}", parts[2])], split


def read_hub(reference: str) -> datasets.Dataset:
    """The split a `hub:` reference names.

    Raises UsageError for a malformed reference, DataError for a dataset, config or split that does not exist or cannot
    be read, SetupError where the hub is out of reach and the dataset is not on this machine.
    """
    meanings, split = candidates(reference)
    reachable = True
    for dataset, config in meanings:
        try:
            # A hub that did not answer once, after several tries, is not asked again.
            return _load(dataset, config, split, ask=reachable or settings.HF_HUB_OFFLINE)
        except DatasetNotFoundError:
            continue
        except ConnectionError:
            reachable = False
        except PermissionError as error:
            raise SetupError(
                "the dataset cache cannot be written",
                where=reference,
                found=str(error.filename),
                hint="set HF_HOME to a folder of your own",
            ) from None
        # The border to a foreign library: whatever it raises is about this dataset.
        except Exception as error:
            raise DataError("the dataset cannot be read", where=reference, found=_reason(error)) from error
    raise _missing(reference, meanings, reachable)


def _load(dataset: str, config: str | None, split: str, ask: bool) -> datasets.Dataset:
    """From the hub or datasets' own cache if `ask`, and else, or out of reach, from a copy that `hf download` left.

    load_dataset does not look at the hub's file cache when offline; it does read the folder that lies there.
    """
    if ask:
        try:
            # "hf://": a folder of that name in the working directory is not the dataset.
            return _one_split(f"hf://datasets/{dataset}", config, split)
        except ConnectionError:
            pass
    try:
        folder = snapshot_download(dataset, repo_type="dataset", local_files_only=True)
    except LocalEntryNotFoundError:
        raise ConnectionError(f"{dataset} is not on this machine") from None
    return _one_split(folder, config, split)


def _one_split(path: str, config: str | None, split: str) -> datasets.Dataset:
    loaded = datasets.load_dataset(path, config, split=split)
    assert isinstance(loaded, datasets.Dataset), "one split was asked for"
    return loaded


def _missing(reference: str, meanings: Sequence[Candidate], reachable: bool) -> DataError | SetupError:
    tried = ", ".join(f"{dataset} (config {config})" if config else dataset for dataset, config in meanings)
    if reachable:
        return DataError("the hub has no such dataset, or hides it from you", where=reference, found=f"tried {tried}")
    offline = settings.HF_HUB_OFFLINE
    return SetupError(
        "the dataset is not on this machine, and the hub "
        + ("is not asked: HF_HUB_OFFLINE is set" if offline else "cannot be reached"),
        where=reference,
        found=f"tried {tried}",
        hint="unset HF_HUB_OFFLINE" if offline else "try again with a network",
    )


def _reason(error: BaseException) -> str:
    """What went wrong, in a line: a failed build says it in its cause."""
    if isinstance(error, DatasetGenerationError) and error.__cause__ is not None:
        error = error.__cause__
    return shorten(str(error), 300) or type(error).__name__
