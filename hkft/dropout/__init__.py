"""The dropout framework of "LoRA Meets Dropout under a Unified Framework" (arXiv 2403.00812), usable alone.

Read it in this order, with the paper beside it: method, masks, attention, hidden, consistency; then families and attach,
which put them on a model. Needs torch and transformers; knows nothing of recipes or training.
"""
