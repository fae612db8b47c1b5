"""Makes PyPI's torchvision, which is built for CUDA, importable beside a torch without it.

Without its library `import torchvision` fails at the fake kernels of two operators that nobody has declared. A .pth
file imports this module at the start of every process, and this declares them when torchvision is first imported.
"""

import sys


class DeclaredOperators:
    """A finder of modules that finds none."""

    library = None

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision" and self.library is None:
            import torch

            self.library = torch.library.Library("torchvision", "FRAGMENT")
            for operator in ("nms", "qnms"):
                self.library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return None


sys.meta_path.insert(0, DeclaredOperators())
