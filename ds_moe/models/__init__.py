"""Model families: loading, tiny presets, processors, conversion to expert parallelism."""
