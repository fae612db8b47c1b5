"""Where records come from: files of several forms as one list of records, and how several sources are mixed.

find.py      the data files of a source            files.py     those of a path on this machine
hub.py       those of a hub dataset, at a commit   columns.py   columns of other names
indexed.py   a file as records by position         joined.py    several files or sources as one
as_opened.py a file as it was when it was opened    arrow_stream.py  its batches, all of them
jsonl.py     one object a line                     unpack.py    .gz and .zst, within limits
arrow.py     Parquet, folders of `save_to_disk`    tar.py       WebDataset shards
parquet.py   row groups, within limits
archive.py   the members of a tar file             mixture.py   what an epoch has of each source, in which order
"""
