"""The compiler of the backend. Triton finds it as the one subclass of `BaseBackend` in this module."""

from triton.backends import compiler


class InterpretedBackend(compiler.BaseBackend):
    @staticmethod
    def supports_target(target):
        return target.backend == "cpu"

    def hash(self):
        return "interpreted"

    def parse_options(self, options):
        raise NotImplementedError("TRITON_INTERPRET=1 runs kernels uncompiled")

    def add_stages(self, stages, options, language):
        raise NotImplementedError("TRITON_INTERPRET=1 runs kernels uncompiled")

    def load_dialects(self, context):
        pass

    def get_module_map(self):
        return {}
