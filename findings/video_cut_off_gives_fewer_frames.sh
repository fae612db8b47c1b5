#!/usr/bin/env bash
# A video that is cut off gives fewer frames than were sampled, and metadata that speak of all of them.
#
# One expects: `transformers.video_utils.load_video(..., backend="pyav", num_frames=8)` gives 8 frames or an error. (The
# guess written down before: PyAV raises where the file ends early.)
# What happens: where a copy or a download stopped between two packets, decoding just ends. The frames before the end
# come back, 4 of 8 here; `metadata.frames_indices` has 8 entries, and `total_num_frames` and `duration` are the whole
# video's. A processor that writes timestamps from these writes those of frames that are not there, or of others.
# Why: video_utils.py, `read_video_pyav`, samples indices from `stream.frames`, which the container's header says, and
# keeps what `container.decode` yields of them; nothing compares the two. Since mp4 files for the web have their header
# in front (`movflags=faststart`), a cut file looks whole until its frames are counted.
# Who is hurt: whoever trains or evaluates on videos that were fetched by a job that may have been killed.
# Instead: compare len(frames) with len(metadata.frames_indices), and refuse the file where they differ.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/python -m pip install -q --disable-pip-version-check torch==2.13.0 transformers==5.23.0 av==18.1.0 pillow==13.0.0
cat > check.py <<'PY'
from pathlib import Path

import av
import numpy as np
import transformers
from transformers.video_utils import load_video

print("transformers", transformers.__version__, "av", av.__version__)
frames, sampled = 100, 8
with av.open("whole.mp4", "w", options={"movflags": "faststart"}) as container:
    stream = container.add_stream("mpeg4", rate=10)
    stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
    for number in range(frames):
        picture = np.full((48, 64, 3), number, np.uint8)
        container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
    container.mux(stream.encode())
with av.open("whole.mp4") as container:
    packets = [packet for packet in container.demux(video=0) if packet.size]
end = packets[frames // 2].pos  # where the packet of the middle begins
Path("cut.mp4").write_bytes(Path("whole.mp4").read_bytes()[:end])
found = {}
for name in ("whole.mp4", "cut.mp4"):
    video, metadata = load_video(name, num_frames=sampled, backend="pyav")
    found[name] = len(video)
    print(f"{name}: {len(video)} frames; metadata: {len(metadata.frames_indices)} indices of {metadata.total_num_frames}")
    assert len(metadata.frames_indices) == sampled and metadata.total_num_frames == frames
assert found == {"whole.mp4": sampled, "cut.mp4": sampled // 2}
print("as described")
PY
env/bin/python check.py
