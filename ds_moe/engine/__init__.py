"""Everything that relies on DeepSpeed's internals.

start.py               joins the job that the launcher started
prepare.py             turns a loaded model into one that DeepSpeed can wrap
activation_offload.py  moves what gradient checkpointing keeps to host memory
build.py               builds the engine and checks its invariants
muon.py                Muon for matrices and AdamW for the rest, under ZeRO
orthogonal.py          Newton-Schulz
flat_matrices.py       where ZeRO's partitions hold matrices, and who orthogonalises which
unshared.py            spares ZeRO-3 the copies of gradients that no other rank shares
whole_weights.py       gathers ZeRO-3's weights once for an evaluation
moe_binding.py         shows DeepSpeed our expert layers
masters.py             reads and writes fp32 weights and moments, by parameter
cpu.py                 compiles DeepSpeed's CPU op, and sets the environment of CPU ranks
exchange.py   another set of weights in the place of an engine's own for some forwards
"""
