"""A model family of your own: Mistral. It has Llama's layer without scaled rotary embeddings. Sliding windows are refused.

A family is one table. To add it, move the table into ais_megatron/models/ and add its name to `FAMILIES` in
ais_megatron/models/registry.py. Here the line after the table does that for the running process.

    python -m examples.mistral_family       compares the table with transformers' own model, tensor by tensor
"""

from __future__ import annotations

from ais_megatron.models.family import Family
from ais_megatron.models.pieces import ATTENTION_OUTPUT, INPUT_NORM, MLP, MLP_NORM, QKV
from ais_megatron.models.registry import FAMILIES

MISTRAL = Family(
    model_type="mistral",  # in config.json
    hf_class="MistralForCausalLM",
    # Each row: Hugging Face name, sizes, the dimension that tensor parallelism cuts, Megatron's parameter, quantised or not.
    layer=(INPUT_NORM, *QKV, ATTENTION_OUTPUT, MLP_NORM, *MLP),
    sglang_attention="sglang.srt.models.llama.LlamaAttention",  # SGLang's Mistral is its Llama
    # Keys of config.json whose other values would compute something else: checkpoints with them are refused by name.
    fixed={"hidden_act": "silu", "sliding_window": None},
)
FAMILIES[MISTRAL.model_type] = MISTRAL


def main() -> None:
    from transformers import MistralConfig, MistralForCausalLM

    from ais_megatron.config import Architecture
    from ais_megatron.config.hf_config import hf_config
    from ais_megatron.models.family import tensors_of

    sizes = dict(vocab_size=71, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    architecture = Architecture(model_type="mistral", head_dim=16, **sizes)
    model = MistralForCausalLM(MistralConfig(**hf_config(architecture, "fp32")))
    theirs = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    ours = {tensor.name: tensor.shape for tensor in tensors_of(architecture)}
    for name in sorted(theirs.keys() ^ ours.keys()):
        print(f"{name}: only in {'transformers' if name in theirs else 'the table'}")
    for name in sorted(theirs.keys() & ours.keys()):
        if theirs[name] != ours[name]:
            print(f"{name}: {theirs[name]} in transformers, {ours[name]} by the table")
    if theirs != ours:
        raise SystemExit("the table is wrong")
    print(f"all {len(ours)} tensors have transformers' names and shapes")


if __name__ == "__main__":
    main()
