"""Make some of the golden folders with transformers.

    pip install transformers==5.24.0 && python tests/golden/make.py qwen3 smollm3 llama_bias nemo
    pip install transformers==4.46.3 && python tests/golden/make.py llama3_blend

README.md says what each tensor is. nemo has a tokenizer like Mistral Nemo's too: byte-level, no space after
[INST]; prompts.json has {text: ids of its prompt, and of prompt and answer}.
"""
import json
import shutil
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

HERE = Path(__file__).resolve().parent
SIZES = {"vocab_size": 320, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 4,
         "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512,
         "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None, "tie_word_embeddings": False}
BFLOAT16 = {**SIZES, "dtype": "bfloat16", "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
MODELS = {  # folder: (configuration class, its arguments)
    "qwen3": ("Qwen3Config", BFLOAT16),
    "smollm3": ("SmolLM3Config", {
        **BFLOAT16, "tie_word_embeddings": True, "head_dim": 6, "no_rope_layers": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e6}}),
    "llama_bias": ("LlamaConfig", {
        **BFLOAT16, "attention_bias": True, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}),
    "nemo": ("MistralConfig", {**BFLOAT16, "head_dim": 12, "num_hidden_layers": 2, "sliding_window": None}),
    # Turns in 48 tokens: 7.6, kept (more than 4); 3.3 and 1.4, blended; 0.6, stretched (less than 1).
    "llama3_blend": ("LlamaConfig", {
        **SIZES, "num_hidden_layers": 2, "torch_dtype": "float32", "rope_theta": 30.0,
        "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                         "high_freq_factor": 4.0, "original_max_position_embeddings": 48}}),
}
TEMPLATE = ("{{- bos_token }}{%- for m in messages %}{%- if m['role'] == 'user' %}"
            "{{- '[INST]' + m['content'] + '[/INST]' }}"
            "{%- else %}{{- m['content'] + eos_token }}{%- endif %}{%- endfor %}")
CONTROL = ("<unk>", "<s>", "</s>", "[INST]", "[/INST]")
PATTERN = r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEXTS = ["Nini mji mkuu wa Kenya?", "  two  spaces\nand a line\t ", "भारत 😀"]


def make_model(folder, config, seed):
    """Random weights of a size that matters; logits of three right-padded rows, and 12 greedy tokens each."""
    generator = torch.Generator().manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_((1 + 0.2 * noise if p.dim() == 1 else 0.25 * noise).bfloat16())
    model.save_pretrained(folder)
    model = model.float()
    lengths = [14, 5, 11]
    ids = torch.zeros(3, max(lengths), dtype=torch.long)
    logits, greedy = torch.zeros(3, max(lengths), config.vocab_size), []
    with torch.no_grad():
        for i, n in enumerate(lengths):
            row = torch.randint(3, config.vocab_size, (1, n), generator=generator)
            ids[i, :n], logits[i, :n] = row[0], model(row).logits[0]
            for _ in range(12):
                row = torch.cat((row, model(row).logits[:, -1:].argmax(-1)), 1)
            greedy.append(row[0, n:])
    expected = {"input_ids": ids, "lengths": torch.tensor(lengths), "logits": logits,
                "greedy": torch.stack(greedy)}
    save_file(expected, folder / "expected.safetensors")


def make_tokenizer(folder):
    """A byte-level tokenizer.json with a chat template, and prompts.json."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = pre_tokenizers.Split(Regex(PATTERN), "isolated")
    tk = Tokenizer(models.BPE())
    tk.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tk.decoder = decoders.ByteLevel()
    control = [AddedToken(text, normalized=False, special=True) for text in CONTROL]
    tk.train_from_iterator(TEXTS * 4, trainers.BpeTrainer(
        vocab_size=300, special_tokens=control, initial_alphabet=byte_level.alphabet(),
        show_progress=False))
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tk, bos_token="<s>", eos_token="</s>",
                                                unk_token="<unk>")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)

    fast, prompts = transformers.AutoTokenizer.from_pretrained(folder), {}
    for text in TEXTS:
        prompt = [{"role": "user", "content": text}]
        dialogue = [*prompt, {"role": "assistant", "content": "Nairobi"}]
        prompts[text] = [fast.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"],
                         fast.apply_chat_template(dialogue)["input_ids"]]
    (folder / "prompts.json").write_text(json.dumps(prompts))


if __name__ == "__main__":
    for name in sys.argv[1:]:
        kind, arguments = MODELS[name]
        shutil.rmtree(HERE / name, ignore_errors=True)
        config = getattr(transformers, kind)(**arguments)
        make_model(HERE / name, config, seed=list(MODELS).index(name))
        if name == "nemo":
            make_tokenizer(HERE / name)
