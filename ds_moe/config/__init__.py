"""Every key of a run file, and what is wrong with one.

sections.py, moe.py, tasks.py, run.py   the typed tree of keys with their defaults
rules/          what types cannot say: a file for each section
check.py        all rules, and the keys a run uses
run_file.py     YAML and overrides into the tree       yaml_lines.py   YAML that knows its lines
complaints.py   pydantic's errors as one line each
deepspeed.py    the DeepSpeed JSON, filled in          deepspeed_json.py, deepspeed_keys.py   reading it
divisors.py     EP size against ranks and experts, micro-batches against the global batch
zero_plan.py    what it says about stages, offload and buckets, as typed values
"""

from ds_moe.config.moe import (
    AuxBalance,
    Balance,
    BalancedRouting,
    DispatchConfig,
    ExpertChoiceRouting,
    ExpertsConfig,
    HashRouting,
    LossFreeBalance,
    MoEConfig,
    NoBalance,
    NoisyTopKRouting,
    ReplayConfig,
    RouterConfig,
    TopKRouting,
    ZLossBalance,
)
from ds_moe.config.run import RunConfig
from ds_moe.config.sections import CheckpointConfig, DataConfig, LoRAConfig, ModelConfig, MonitorConfig, TrainConfig
from ds_moe.config.tasks import GateConfig, RLConfig

__all__ = [
    "AuxBalance",
    "Balance",
    "BalancedRouting",
    "CheckpointConfig",
    "DataConfig",
    "DispatchConfig",
    "ExpertChoiceRouting",
    "ExpertsConfig",
    "GateConfig",
    "HashRouting",
    "LoRAConfig",
    "LossFreeBalance",
    "MoEConfig",
    "ModelConfig",
    "MonitorConfig",
    "NoBalance",
    "NoisyTopKRouting",
    "RLConfig",
    "ReplayConfig",
    "RouterConfig",
    "RunConfig",
    "TopKRouting",
    "TrainConfig",
    "ZLossBalance",
]
