"""The model of a step's time and memory: shapes -> costs -> seconds and bytes of a step on a topology.

- `command`    the command line, and the tables that it prints
- `shapes`     sizes of a decoder, from a preset or a config.json
- `costs`      FLOPs and bytes of every operation
- `links`      seconds of the collectives
- `step_time`  what a step has of both, and what overlaps
- `machines`   figures of devices and links;  `calibrate` measures those of this CPU
- `sweep`      time and memory of a topology, the best EP size of each number of devices, and its figure
- `check`      estimated against measured steps
"""
