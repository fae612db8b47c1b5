"""Chat records with images -> micro-batches, the same for any number of ranks.

records.py   files, by position             record_kind.py     what a record is
chat.py      conversations in any dialect   chat_template.py   which tokens are learned
images.py    pixels, within limits          encode.py          tokens and batches
encoder.py   records into samples           bad_records.py     those that cannot be used
order.py     the order of an epoch          stream.py          batches of a rank, with an exact position
batch.py     a micro-batch                  processor.py       what is needed of a processor
digits.py    the bundled data set
"""
