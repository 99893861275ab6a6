"""The dropout framework of "LoRA Meets Dropout under a Unified Framework" (arXiv 2403.00812), usable alone.

Read it in this order, with the paper beside it: `method`, `named`, `masks`, `protect`, `attention`, `hidden`, `consistency`:
data and pure functions. Then what puts them on a model: `families` (where the layers are), `dropper` and `interface` (how a
site acts), `proof` (that it does, in every pass), `attach`. On top: `selfcheck` (does it do what it says?) and `noise` (how
noisy is its gradient?). Needs torch and transformers; knows nothing of recipes or training.

A new named method is one entry of `named.METHODS`:

    Method([Site("hidden", layers="latter-half")], name="hiddencut-late", summary="HiddenCut in the latter half"),

It is then in `hkft methods`, in recipes, in `hkft compare`, and under the tests of every method.

A new pattern is one pure function of `masks`, under its name in `masks.PATTERNS` and in the type `method.Pattern`, and one row
of tests/dropout/test_dropout_masks.py that says what it drops; the laws take the table, and so hold it too:

    def pair(full, units, rate, draw):  # units are dropped two by two
        return (draw((*units[:-1], -(-units[-1] // 2))) >= rate).repeat_interleave(2, -1)[..., : units[-1]]

A new model family needs nothing: `families` finds its layers by structure, or refuses it with the reason.
"""
