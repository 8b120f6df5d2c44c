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
Remat = Literal["none", "dots", "layer"]
Weights = Literal["auto", "packed", "dense"]
Kernel = Literal["auto", "pallas_tpu", "mosaic_gpu", "xla"]

TextOrder = Literal["first", "random"]
Documents = Literal["joined", "apart"]
Schedule = Literal["linear", "cosine", "constant"]
Repair = Literal["prompt", "prefix", "lora", "norms", "idp"]
# Of each method of repair where none is given; `recover.methods` trains them.
LEARNING_RATES: dict[Repair, float] = {
    "prompt": 1e-3,
    "prefix": 1e-3,
    "lora": 1e-4,
    "norms": 5e-4,
    "idp": 1e-3,
}
Biases = Literal["existing", "all", "none"]
TeacherForm = Literal["full", "topk", "sampled"]
LoraStart = Literal["zero", "eora"]
InitTokens = Literal["vocabulary", "text", "random", "zeros"]
InitFrom = Literal["compressed", "teacher"]
PoolTraining = Literal["apart", "joint", "clusters"]
PoolKind = Literal["prompts", "prefixes"]
PoolMixture = Literal["gumbel", "soft"]
SinkName = Literal["tensorboard", "wandb", "trackio"]
# Each is a file of configs/presets.
Preset = Literal["paper", "xu2023", "cartridge", "rilq", "intactkv", "qad-prompt"]
Role = Literal["dense", "compressed", "repaired", "control"]
ChipName = Literal["v4", "v5e", "v5p", "v6e", "h100"]  # each stands in `jobs.chips`
