"""Chat records with images and videos -> micro-batches, the same for any number of ranks.

records.py   data.train and data.eval, by position   record_kind.py   what a record is
chat.py      conversations in any dialect   chat_template.py   which tokens are learned
grounding.py names and boxes in texts       placeholders.py    <image>, <img>path</img> and others
images.py    pixels, within limits          record_keys.py     keys that are refused or count as absent
videos.py    frames, within limits          video_process.py   the process that decodes them, from outside
video_worker.py   the program that this process runs
encode.py    tokens and batches             bad_records.py     records that cannot be used
ahead.py     threads that decode images     steps.py           steps that are loaded
encoder.py   records into samples           stream.py          what a rank trains on, with an exact position
order.py     the order of an epoch          eval_set.py        what a rank is evaluated on
packing.py   samples into rows              token_counts.py    exact lengths, measured once
batch.py     a micro-batch                  processor.py       what the data need of a processor
marks.py     texts found in a rendering     message_keys.py    thoughts, tools, weights
special_tokens.py   which of them texts may write
rendering.py        what a template writes, and where answers stand in it
template_probe.py   what a template does, found out by a question and an answer
video_text.py       frames of videos in a text
blocks.py    files in pieces, not indexed   windows.py         the order of what is streamed, and places in it
pools.py     sources that are drawn from    step_dataset.py    a step as it is made
tables.py    blocks of Arrow's rows         streaming.py       what a rank trains on where nothing is indexed
patches.py   images as bytes, and their floats
row_part.py  the part of a row that one of several ranks computes
position.py  where a checkpoint is in the data
digits.py    the bundled data set          workers.py         how loading processes are started
kept_arrays.py      arrays in files, for later starts
sources/     files, folders, archives, hub datasets, mixtures
prepared/    records that were encoded before   ready.py          records with what they are read with
fingerprint.py      what encoded records follow from
"""
