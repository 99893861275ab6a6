"""Sources -> rows -> tokenised examples -> batches.

    references   where a reference points: a path, `package:`, `hub:`. Light: imports nothing heavy
    cache        Arrow files by content, on disk: large files and examples, made once
    files        one local file -> tables, in pieces; `delimited` knows csv and tsv
    hub          `hub:` -> a dataset, through `datasets.load_dataset`
    sources      any reference -> a dataset, as its author wrote it
    labels       label cells -> class indices or floats
    rows         one source -> canonical rows: id, text, text_pair, label
    holdout      what is drawn with the seed
    splits       the recipe's data section -> train, validation, test
    probe        which training rows stand beside the validation set
    tokenise     canonical rows -> examples -> batches; `encoding` runs the tokenizer, or finds what it made

Import from the modules: this package itself imports none of them, for they import `datasets` and transformers.
"""
