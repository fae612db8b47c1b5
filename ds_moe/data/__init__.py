"""Chat records with images -> micro-batches, the same for any number of ranks.

records.py   files, by position             record_kind.py     what a record is
chat.py      conversations in any dialect   chat_template.py   which tokens are learned
images.py    pixels, within limits          encode.py          tokens and batches
encoder.py   records into samples           bad_records.py     those that cannot be used
order.py     the order of an epoch          stream.py          what a rank trains on, with an exact position
batch.py     a micro-batch                  eval_set.py        what a rank is evaluated on
marks.py     texts found in a rendering     message_keys.py   thoughts, tools, weights
digits.py    the bundled data set           processor.py       what the data need of a processor
"""
