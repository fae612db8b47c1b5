"""Records that `ds-moe data prepare` has encoded: a run uses them where everything that they follow from is the same.

    <data.prepared>/train-<fingerprint>/
        index.json                what they were made of, the files with sizes and SHA-256; written last
        counts.safetensors        tokens and patches of each record
        00000.safetensors ...     the records, see `shards.py`
        report.json, lengths.png  for people

A folder appears under its name when it is complete and never changes. What a file does not hold as it was written, and
what is in images that have changed since, is encoded anew from its record: a run gets the same tensors in any case.

folder.py   such a folder, opened: `Prepared`
shards.py   its files of encoded records
stamps.py   whether images are as they were
find.py     the folder that a run's data match, or why there is none
make.py     a folder made, for `ds-moe data prepare`
chunks.py   what one process encodes of it
check.py    whether every record in a folder is as it was written
report.py   what the records are like
"""
