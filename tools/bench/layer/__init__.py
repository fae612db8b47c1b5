"""One MoE layer against those of other libraries: `bench` is the command.

- `shapes` and routings, `block`: a case and a contender
- `contenders` of this package, `rivals` of other libraries
- `measure`: times and bytes;  `growth` of time with size;  `plot` draws it
"""
