"""The values that options may take, each list stated once.

The invariant: nothing is imported but `typing`, so that files, models and compression may take a
list from here. Arrays-only code (compression cores, kernels) states its own; a test holds them.
"""

from typing import Literal

Algorithm = Literal["gptq", "rtn", "sparsegpt", "wanda", "magnitude"]
Bits = Literal[2, 3, 4, 8]
Grid = Literal["mse", "minmax"]
ActOrder = Literal["group", "static", "none"]

PackedForm = Literal["gptq", "gptq_v2", "pack-quantized"]
PrunedForm = Literal["dense", "sparse-bitmask", "sparse-24-bitmask"]
Form = Literal[PackedForm, PrunedForm]

FloatType = Literal["float32", "bfloat16", "float16"]
Dtype = Literal[FloatType, "auto"]  # auto: the checkpoint's own
Weights = Literal["auto", "packed", "dense"]
Kernel = Literal["auto", "pallas_tpu", "mosaic_gpu", "xla"]

TextOrder = Literal["first", "random"]
Schedule = Literal["linear", "constant"]
Repair = Literal["prompt", "prefix", "lora", "idp"]
# Of each method of repair where none is given; `recover.methods` trains them.
LEARNING_RATES: dict[Repair, float] = {"prompt": 1e-3, "prefix": 1e-3, "lora": 1e-4, "idp": 1e-3}
TeacherForm = Literal["full", "topk", "sampled"]
InitTokens = Literal["vocabulary", "text", "random", "zeros"]
InitFrom = Literal["compressed", "teacher"]
PoolTraining = Literal["apart", "joint", "clusters"]
PoolKind = Literal["prompts", "prefixes"]
PoolMixture = Literal["gumbel", "soft"]
SinkName = Literal["tensorboard", "wandb", "trackio"]
Role = Literal["dense", "compressed", "repaired", "control"]
