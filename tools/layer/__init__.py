"""What `bench_layer.py` measures: shapes and routings, contenders, timing, growth."""
